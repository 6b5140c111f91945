// For tests of the server: requests that are sent as real workers send rows, without waiting for
// the answers in between. Turns the test's reactor.
#pragma once

#include <chrono>
#include <utility>

#include "common/channel.h"
#include "common/reactor.h"

namespace icecache {

class Upload {
 public:
  Upload(Reactor& reactor, Channel& channel) : reactor_(reactor), channel_(channel) {}
  Upload(const Upload&) = delete;
  Upload& operator=(const Upload&) = delete;
  ~Upload() { (void)Wait(); }

  // The message's body stays where it is until Wait.
  void Send(OutMessage message) {
    ++waiting_;
    channel_.Call(std::move(message), std::chrono::seconds(20),
                  [this](const Result<InMessage>& reply) {
                    --waiting_;
                    if (status_.ok()) status_ = reply.status();
                  });
  }
  // Until all are answered: the first error.
  Status Wait() {
    KV_CHECK(reactor_.RunUntil([&] { return waiting_ == 0; },
                               reactor_.clock().Now() + std::chrono::seconds(30)));
    return status_;
  }

 private:
  Reactor& reactor_;
  Channel& channel_;
  int waiting_ = 0;
  Status status_;
};

}  // namespace icecache
