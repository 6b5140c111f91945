// Reply mode "remote": a worker reads pages out of a server's memory by itself. Over shared memory
// and TCP UCX emulates that with the server's software, which only this server lets it do; on RDMA
// hardware none of it has been run.
#include <gtest/gtest.h>

#include <thread>

#include "cacheserver/server.h"
#include "common/ucx_environment.h"
#include "tests/support/linked_worker.h"

namespace icecache::test {
namespace {

// A server in this process, because the program has no switch for what `reads` lets its peers do.
class InProcessServer {
 public:
  explicit InProcessServer(const UcxOptions& ucx) {
    InitLogging(LogLevel::kError, LogFormat::kText, "test");
    ApplyUcxEnvironment();
    ServerParts parts;
    parts.config = DefaultServerConfig(ReadMachine());
    parts.config.port = parts.config.http_port = 0;
    parts.config.memory_size = 256u << 20;
    parts.config.threads = 2;
    parts.tenants = TenantTable::Open();
    parts.make_transport = [ucx](Reactor& reactor) { return MakeUcxTransport(reactor, ucx); };
    server_ = Server::Start(std::move(parts)).value();
    address = server_->control_address();
    thread_ = std::thread([this] {
      EXPECT_TRUE(server_->Run().ok());
      server_.reset();
    });
  }
  ~InProcessServer() {
    server_->Stop();
    thread_.join();
  }
  std::string address;

 private:
  std::unique_ptr<Server> server_;  // destroyed on its thread
  std::thread thread_;
};

class RemoteReads : public ::testing::TestWithParam<const char*> {
 protected:
  static ServerLinkOptions LinkTo(const InProcessServer& server) {
    ServerLinkOptions options;
    options.control.address = server.address;
    options.ucx.transports = GetParam();
    options.cache.reply_mode = ReplyMode::kRemote;
    return options;
  }
};

INSTANTIATE_TEST_SUITE_P(Transports, RemoteReads,
                         ::testing::Values("posix,cma,tcp,self", "tcp,self"),
                         [](const auto& i) { return i.index == 0 ? "Shm" : "Tcp"; });

TEST_P(RemoteReads, PagesComeWithoutTravellingInAReply) {
  InProcessServer server({GetParam(), true});
  LinkedWorker worker;
  ASSERT_EQ(worker.Open(LinkTo(server)).ToString(), "OK");
  CacheClient& cache = worker.link().cache();
  EXPECT_EQ(worker.Select(kPatience).ToString(), "OK");  // tries it with one page of each shard
  EXPECT_EQ(cache.bytes_mapped(), 2 * LinkedWorker::kShape.page_bytes());
  const uint64_t moved = cache.bytes_moved(), mapped = cache.bytes_mapped();
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(worker.Select(kPatience).ToString(), "OK");
  }
  const uint64_t pages = 3u * LinkedWorker::kPages * LinkedWorker::kShape.kv_heads;
  EXPECT_EQ(cache.bytes_mapped() - mapped, pages * LinkedWorker::kShape.page_bytes());
  EXPECT_LT(cache.bytes_moved() - moved, pages * LinkedWorker::kShape.page_bytes() / 2);
  for (const uint16_t shard : {0, 1}) {
    EXPECT_EQ(cache.link(ShardId(shard)).mode(), ReplyMode::kRemote);
  }
}

TEST_P(RemoteReads, WhereTheNetworkDoesNotReadByItselfPagesComeInline) {
  InProcessServer server({GetParam(), false});
  LinkedWorker worker;
  ASSERT_EQ(worker.Open(LinkTo(server)).ToString(), "OK");
  EXPECT_EQ(worker.Select(kPatience).ToString(), "OK") << "asked for again, inline";
  for (const uint16_t shard : {0, 1}) {
    EXPECT_EQ(worker.link().cache().link(ShardId(shard)).mode(), ReplyMode::kInline);
  }
  EXPECT_EQ(worker.Select(kPatience).ToString(), "OK");
  EXPECT_EQ(worker.link().cache().bytes_mapped(), 0u);
}

}  // namespace
}  // namespace icecache::test
