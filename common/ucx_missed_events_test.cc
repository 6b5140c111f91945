#include "common/ucx_missed_events.h"

#include <gtest/gtest.h>

#include <chrono>
#include <memory>
#include <vector>

#include "common/transport.h"

namespace icecache {
namespace {

// What happens without: tests/integration/connect_storm_test.cc.
TEST(UcxMissedEvents, UcxGivesItsNotesToUs) {
  EXPECT_TRUE(UcxNotesAreDropped());
  const auto clock = MakeSteadyClock();
  Reactor reactor(*clock, Duration(0));
  const auto server = MakeUcxTransport(reactor, {"tcp,self"}).value();
  const auto client = MakeUcxTransport(reactor, {"tcp,self"}).value();
  std::vector<std::unique_ptr<Endpoint>> accepted;
  const auto address = server->Listen("127.0.0.1:0", [&](std::unique_ptr<Endpoint> endpoint) {
    accepted.push_back(std::move(endpoint));
  });
  // UCX packs a client's first message while its socket is writable: nearly every connection makes
  // a note.
  for (int i = 0; i < 300 && UcxNotesDropped() == 0; ++i) {
    const auto endpoint = client->Connect(*address).value();
    const size_t before = accepted.size();
    ASSERT_TRUE(reactor.RunUntil([&] { return accepted.size() > before; },
                                 clock->Now() + std::chrono::seconds(10)));
  }
  EXPECT_GT(UcxNotesDropped(), 0u);
}

}  // namespace
}  // namespace icecache
