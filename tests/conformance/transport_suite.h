// The conformance suite of the Transport seam: what every implementation must do, whatever it runs
// over. Instantiate with INSTANTIATE_TEST_SUITE_P(Name, TransportSuite,
// testing::Values(TransportKind{...})).
//
// Two transports live in one reactor on the steady clock; the suite waits by running the loop until
// a condition holds, never by sleeping.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "common/limits.h"
#include "common/transport.h"

namespace icecache {

// Makes the two ends of a test: transports of one kind that can reach each other, also from
// different reactors.
struct TransportKind {
  std::string name;
  std::function<std::function<Result<std::unique_ptr<Transport>>(Reactor&)>()> make_network;
};
inline std::string KindName(const testing::TestParamInfo<TransportKind>& info) {
  return info.param.name;
}

using Bytes = std::vector<std::byte>;

inline Bytes RandomBytes(size_t count, uint64_t seed) {
  std::mt19937_64 random(seed);
  Bytes bytes(count);
  for (size_t i = 0; i < count; i += 8) {
    const uint64_t value = random();
    std::memcpy(bytes.data() + i, &value, std::min<size_t>(8, count - i));
  }
  return bytes;
}

// As == does, and at once also under sanitizers.
inline bool Same(const Bytes& a, const Bytes& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size()) == 0);
}

// A received message, kept.
struct Got {
  uint16_t kind = 0, flags = 0;
  uint64_t id = 0;
  Bytes meta, body;
};

// An endpoint and what it has received.
struct Peer {
  std::unique_ptr<Endpoint> endpoint;
  std::vector<Got> got;
  std::vector<Status> closed;
  std::function<void(const InMessage&)> also;  // runs after the message was kept

  explicit Peer(std::unique_ptr<Endpoint> e) : endpoint(std::move(e)) {
    endpoint->SetHandlers(
        [this](const InMessage& m) {
          EXPECT_EQ(reinterpret_cast<uintptr_t>(m.meta.data()) % 8, 0u) << "meta is not aligned";
          got.push_back({m.kind, m.flags, m.id, Bytes(m.meta.begin(), m.meta.end()),
                         Bytes(m.body.begin(), m.body.end())});
          if (also) also(m);
        },
        [this](Status status) { closed.push_back(std::move(status)); });
  }
};

class TransportSuite : public testing::TestWithParam<TransportKind> {
 protected:
  static constexpr std::chrono::seconds kWait{20};

  TransportSuite()
      : clock_(MakeSteadyClock()),
        reactor_(*clock_, std::chrono::microseconds(20)),
        make_(GetParam().make_network()) {}

  std::unique_ptr<Transport> Make() {
    auto made = make_(reactor_);
    EXPECT_TRUE(made.ok()) << made.status().ToString();
    return std::move(made).value();
  }
  bool Wait(const std::function<bool()>& done) {
    return reactor_.RunUntil(done, clock_->Now() + kWait);
  }
  // Some turns in which nothing is expected to happen.
  void RunTurns(int count = 300) {
    for (int i = 0; i < count; ++i) reactor_.Poll();
  }

  // server_, client_, and one connection between them.
  void Connect() {
    server_ = Make();
    client_ = Make();
    Listen();
    here_ = std::make_unique<Peer>(client_->Connect(address_).value());
    ASSERT_TRUE(Wait([&] { return !accepted_.empty(); }));
  }
  void Listen() {
    auto address = server_->Listen("127.0.0.1:0", [this](std::unique_ptr<Endpoint> endpoint) {
      accepted_.push_back(std::make_unique<Peer>(std::move(endpoint)));
    });
    ASSERT_TRUE(address.ok()) << address.status().ToString();
    address_ = *address;
  }
  Peer& there() { return *accepted_.at(0); }

  static OutMessage Message(uint64_t id, Bytes meta = {},
                            std::vector<std::span<const std::byte>> body = {}) {
    OutMessage message;
    message.kind = 7;
    message.flags = 5;
    message.id = id;
    message.meta = std::move(meta);
    message.body = std::move(body);
    return message;
  }

  std::unique_ptr<Clock> clock_;
  Reactor reactor_;
  std::function<Result<std::unique_ptr<Transport>>(Reactor&)> make_;
  std::unique_ptr<Transport> server_, client_;
  std::string address_;
  std::vector<std::unique_ptr<Peer>> accepted_;
  std::unique_ptr<Peer> here_;
};

// The kinds that there are.
inline TransportKind Loopback() {
  return {"Loopback", [] {
            return [network = MakeLoopbackNetwork({})](Reactor& reactor) {
              return Result<std::unique_ptr<Transport>>(MakeLoopbackTransport(reactor, network));
            };
          }};
}

inline TransportKind DelayedLoopback() {
  return {"LoopbackWithDelays", [] {
            LoopbackFaults faults;
            faults.delay_max = std::chrono::microseconds(200);
            return [network = MakeLoopbackNetwork(faults)](Reactor& reactor) {
              return Result<std::unique_ptr<Transport>>(MakeLoopbackTransport(reactor, network));
            };
          }};
}

inline TransportKind Ucx(std::string name, std::string transports, bool reads = false) {
  return {std::move(name), [options = UcxOptions{std::move(transports), reads}] {
            return [options](Reactor& reactor) { return MakeUcxTransport(reactor, options); };
          }};
}

}  // namespace icecache
