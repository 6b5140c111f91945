// For tests: a whole server in this process, on free ports, with real sockets and UCX.
#pragma once

#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <thread>
#include <utility>

#include "cacheserver/server.h"
#include "cacheserver/test_client.h"
#include "common/model_shape.h"
#include "common/ucx_environment.h"

namespace icecache {

inline constexpr uint32_t kShards = 2;
// What server tests cache.
inline constexpr ModelShape kShape{
    .layers = 2, .kv_heads = 2, .query_heads = 4, .head_dim = 32, .dtype = DType::kF32};
inline constexpr uint32_t kSinks = 4, kWindow = 32;

template <typename Check>
void ForEachSlice(const Check& check) {
  for (uint16_t layer = 0; layer < kShape.layers; ++layer) {
    for (uint16_t head = 0; head < kShape.kv_heads; ++head) check(layer, head);
  }
}

class RunningServer {
 public:
  explicit RunningServer(TenantTable tenants = TenantTable::Open(),
                         const std::string& push_pages = "off") {
    QuietLog();
    ApplyUcxEnvironment();
    ServerParts parts;
    parts.config = DefaultServerConfig(ReadMachine());
    parts.config.port = parts.config.http_port = 0;
    parts.config.memory_size = 256u << 20;
    parts.config.threads = kShards;
    parts.config.build_threads = 2;
    parts.config.drain_timeout_ms = 3000;
    parts.config.push_pages = push_pages;
    parts.tenants = std::move(tenants);
    parts.make_transport = [](Reactor& reactor) { return MakeUcxTransport(reactor, {}); };
    Result<std::unique_ptr<Server>> started = Server::Start(std::move(parts));
    KV_CHECK(started.ok());
    server_ = std::move(started).value();
    address_ = server_->control_address();
    thread_ = std::thread([this] {
      EXPECT_TRUE(server_->Run().ok());
      server_.reset();
    });
  }
  ~RunningServer() {
    if (thread_.joinable()) {
      server_->Stop();
      thread_.join();
    }
  }
  void DrainAndJoin() {
    server_->Drain();
    thread_.join();
  }
  Server& server() { return *server_; }
  const std::string& address() const { return address_; }
  std::string Page(const std::string& path) const { return HttpGet(server_->http_address(), path); }

 private:
  std::unique_ptr<Server> server_;  // destroyed on its thread
  std::string address_;
  std::thread thread_;
};

}  // namespace icecache
