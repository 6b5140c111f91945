#include "common/ucx_peer.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <unistd.h>

#include <algorithm>
#include <string>

namespace icecache {
namespace {

TEST(UcxPeer, KnowsWhenWhoeverAskedHasLeft) {
  const int listener = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t length = sizeof address;
  auto* generic = reinterpret_cast<sockaddr*>(&address);
  ASSERT_EQ(bind(listener, generic, length), 0);
  ASSERT_EQ(listen(listener, 4), 0);
  ASSERT_EQ(getsockname(listener, generic, &length), 0);
  const int client = socket(AF_INET, SOCK_STREAM, 0), other = socket(AF_INET, SOCK_STREAM, 0);
  ASSERT_EQ(connect(client, generic, length), 0);
  ASSERT_EQ(connect(other, generic, length), 0);
  sockaddr_storage peer{};
  socklen_t peer_length = sizeof peer;
  const int accepted = accept(listener, reinterpret_cast<sockaddr*>(&peer), &peer_length);
  const int accepted_other = accept(listener, nullptr, nullptr);
  EXPECT_FALSE(PeerHasClosed(peer));
  close(other);
  EXPECT_FALSE(PeerHasClosed(peer)) << "somebody else has left";
  close(client);
  EXPECT_TRUE(PeerHasClosed(peer));
  for (const int fd : {accepted, accepted_other, listener}) close(fd);
  EXPECT_FALSE(PeerHasClosed(peer)) << "nothing is known of it";
}

TEST(UcxPeer, NumbersOfClosedMemoryAreNotUsedAgainAtOnce) {
  const std::string path = "/dev/shm/ucx_shm_posix_test_" + std::to_string(getpid());
  const int memory = open(path.c_str(), O_CREAT | O_RDWR, 0600);
  ASSERT_GE(memory, 0);
  unlink(path.c_str());
  const std::vector<int> were_open = UcxMemoryDescriptors();
  EXPECT_EQ(std::count(were_open.begin(), were_open.end(), memory), 1);
  close(memory);
  KeepNumbers(were_open);
  const int next = open("/dev/null", O_RDONLY);
  EXPECT_NE(next, memory);
  // Who attaches late finds nothing that can be mapped.
  EXPECT_LT(open(("/proc/self/fd/" + std::to_string(memory)).c_str(), O_RDWR), 0);
  close(next);
}

}  // namespace
}  // namespace icecache
