// What the conformance suite cannot ask of a transport: a peer that speaks UCX but not our framing.
// Part of the border to UCX, for the sake of that peer.

#include <arpa/inet.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <ucp/api/ucp.h>

#include <cstring>
#include <vector>

#include "common/address.h"
#include "common/limits.h"
#include "common/message_header.h"
#include "common/transport.h"
#include "common/ucx_connection.h"
#include "common/ucx_environment.h"

namespace icecache {
namespace {

// A client without manners: sends any header and data as an active message.
class RawPeer {
 public:
  explicit RawPeer(const std::string& address) {
    ucp_config_t* config = nullptr;
    KV_CHECK(ucp_config_read(nullptr, nullptr, &config) == UCS_OK);
    KV_CHECK(ucp_config_modify(config, "TLS", "posix,tcp,self") == UCS_OK);
    ucp_params_t params{};
    params.field_mask = UCP_PARAM_FIELD_FEATURES;
    params.features = UCP_FEATURE_AM | UCP_FEATURE_WAKEUP;
    KV_CHECK(ucp_init(&params, config, &context_) == UCS_OK);
    ucp_config_release(config);
    ucp_worker_params_t worker{};
    KV_CHECK(ucp_worker_create(context_, &worker, &worker_) == UCS_OK);
    ucp_am_handler_param_t handler{};
    handler.field_mask = UCP_AM_HANDLER_PARAM_FIELD_ID | UCP_AM_HANDLER_PARAM_FIELD_CB |
                         UCP_AM_HANDLER_PARAM_FIELD_ARG;
    handler.id = kUcxMessageId;
    handler.cb = [](void* self, const void*, size_t, void*, size_t, const ucp_am_recv_param_t*) {
      static_cast<RawPeer*>(self)->greeted_ = true;
      return UCS_OK;
    };
    handler.arg = this;
    KV_CHECK(ucp_worker_set_am_recv_handler(worker_, &handler) == UCS_OK);
    const HostPort parsed = ParseHostPort(address).value();
    sockaddr_in target{};
    target.sin_family = AF_INET;
    target.sin_port = htons(parsed.port);
    ::inet_pton(AF_INET, parsed.host.c_str(), &target.sin_addr);
    ucp_ep_params_t ep{};
    ep.field_mask = UCP_EP_PARAM_FIELD_FLAGS | UCP_EP_PARAM_FIELD_SOCK_ADDR |
                    UCP_EP_PARAM_FIELD_ERR_HANDLER | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE;
    ep.flags = UCP_EP_PARAMS_FLAGS_CLIENT_SERVER;
    ep.sockaddr = {reinterpret_cast<const sockaddr*>(&target), sizeof target};
    ep.err_mode = UCP_ERR_HANDLING_MODE_PEER;
    ep.err_handler = {
        [](void* self, ucp_ep_h, ucs_status_t) { static_cast<RawPeer*>(self)->lost_ = true; },
        this};
    KV_CHECK(ucp_ep_create(worker_, &ep, &endpoint_) == UCS_OK);
    SendHello();
  }
  ~RawPeer() {
    ucp_request_param_t param{};
    param.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS;
    param.flags = UCP_EP_CLOSE_FLAG_FORCE;
    const ucs_status_ptr_t request = ucp_ep_close_nbx(endpoint_, &param);
    if (UCS_PTR_IS_PTR(request)) {
      while (ucp_request_check_status(request) == UCS_INPROGRESS) Progress();
      ucp_request_free(request);
    }
    for (void* request_left : requests_) ucp_request_free(request_left);
    ucp_worker_destroy(worker_);
    ucp_cleanup(context_);
  }
  RawPeer(const RawPeer&) = delete;
  RawPeer& operator=(const RawPeer&) = delete;

  void Progress() { ucp_worker_progress(worker_); }
  bool lost() const { return lost_; }
  bool greeted() const { return greeted_; }
  void SendHello() {
    MessageHeader hello{};
    hello.magic = kMessageMagic;
    hello.control = kControlHello;
    Send(hello, 0);
  }
  // Header and data stay alive as long as the peer.
  void Send(const void* header, size_t header_bytes, size_t data_bytes, bool rendezvous = false,
            unsigned message_id = kUcxMessageId) {
    const auto* from = static_cast<const std::byte*>(header);
    headers_.push_back(std::make_unique<std::vector<std::byte>>(from, from + header_bytes));
    data_.resize(std::max(data_.size(), size_t{8} << 20));
    ucp_request_param_t param{};
    param.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS;
    param.flags = UCP_AM_SEND_FLAG_REPLY;
    if (rendezvous) param.flags |= UCP_AM_SEND_FLAG_RNDV;
    const ucs_status_ptr_t request =
        ucp_am_send_nbx(endpoint_, message_id, headers_.back()->data(), header_bytes, data_.data(),
                        data_bytes, &param);
    if (UCS_PTR_IS_PTR(request)) requests_.push_back(request);
  }
  void Send(const MessageHeader& header, size_t data_bytes, bool rendezvous = false) {
    Send(&header, sizeof header, data_bytes, rendezvous);
  }

 private:
  ucp_context_h context_ = nullptr;
  ucp_worker_h worker_ = nullptr;
  ucp_ep_h endpoint_ = nullptr;
  bool lost_ = false, greeted_ = false;
  std::vector<std::unique_ptr<std::vector<std::byte>>> headers_;
  std::vector<std::byte> data_;
  std::vector<void*> requests_;
};

MessageHeader Header(uint32_t sequence, uint32_t body_bytes) {
  MessageHeader header{};
  header.magic = kMessageMagic;
  header.kind = 1;
  header.sequence = sequence;
  header.body_bytes = body_bytes;
  return header;
}

class UcxBorder : public testing::Test {
 protected:
  UcxBorder() {
    server_ = MakeUcxTransport(reactor_, {"posix,tcp,self"}).value();
    address_ = server_
                   ->Listen("127.0.0.1:0",
                            [this](std::unique_ptr<Endpoint> endpoint) {
                              endpoint->SetHandlers(
                                  [this](const InMessage& m) { received_.push_back(m.id); },
                                  [this](Status status) { closed_.push_back(std::move(status)); });
                              endpoints_.push_back(std::move(endpoint));
                            })
                   .value();
  }
  bool Wait(RawPeer* peer, const std::function<bool()>& done) {
    const TimePoint until = clock_->Now() + std::chrono::seconds(10);
    while (!done()) {
      if (clock_->Now() > until) return false;
      reactor_.Poll();
      if (peer != nullptr) peer->Progress();
    }
    return true;
  }

  std::unique_ptr<Clock> clock_ = MakeSteadyClock();
  Reactor reactor_{*clock_, Duration(0)};
  std::unique_ptr<Transport> server_;
  std::string address_;
  std::vector<std::unique_ptr<Endpoint>> endpoints_;
  std::vector<uint64_t> received_;
  std::vector<Status> closed_;
};

TEST_F(UcxBorder, MessagesInTheWrongOrderAreDeliveredInTheRightOne) {
  RawPeer peer(address_);
  ASSERT_TRUE(Wait(&peer, [&] { return peer.greeted(); }));
  // The large one is asked for first and arrives last.
  for (const uint32_t sequence : {2u, 1u, 3u, 0u}) {
    MessageHeader header = Header(sequence, sequence == 0 ? 4u << 20 : 100);
    header.id = sequence;
    peer.Send(header, header.body_bytes, /*rendezvous=*/sequence == 0);
  }
  ASSERT_TRUE(Wait(&peer, [&] { return received_.size() == 4; }));
  EXPECT_THAT(received_, testing::ElementsAre(0, 1, 2, 3));
}

TEST_F(UcxBorder, MessagesUnderAnyIdAreTaken) {
  RawPeer peer(address_);
  ASSERT_TRUE(Wait(&peer, [&] { return peer.greeted(); }));
  uint32_t sequence = 0;
  for (const unsigned id : {0u, 2u, 60000u, 65535u}) {
    for (const uint32_t bytes : {10u, 100000u, 4u << 20}) {
      const MessageHeader header = Header(sequence++, bytes);
      peer.Send(&header, sizeof header, bytes, /*rendezvous=*/bytes > 1u << 20, id);
    }
  }
  ASSERT_TRUE(Wait(&peer, [&] { return received_.size() == sequence; }));
  EXPECT_TRUE(closed_.empty());
}

TEST_F(UcxBorder, MalformedMessagesCloseTheirConnectionAndNoOther) {
  const auto client_transport = MakeUcxTransport(reactor_, {"posix,tcp,self"}).value();
  const auto good = client_transport->Connect(address_).value();
  good->SetHandlers([](const InMessage&) {},
                    [](Status status) { ADD_FAILURE() << status.ToString(); });
  ASSERT_TRUE(Wait(nullptr, [&] { return endpoints_.size() == 1; }));

  struct Case {
    const char* named;
    std::function<void(RawPeer&)> send;
  };
  const std::vector<Case> cases = {
      {"magic",
       [](RawPeer& p) {
         MessageHeader h = Header(0, 10);
         h.magic = 1;
         p.Send(h, 10);
       }},
      {"magic",
       [](RawPeer& p) {
         MessageHeader h = Header(0, 4u << 20);
         h.magic = 1;
         p.Send(h, 4u << 20, /*rendezvous=*/true);
       }},
      {"header of 5 bytes", [](RawPeer& p) { p.Send("abcde", 5, 100); }},
      {"header of 0 bytes", [](RawPeer& p) { p.Send("", 0, 3); }},
      {"header says 1000", [](RawPeer& p) { p.Send(Header(0, 1000), 999); }},
      {"header says 20", [](RawPeer& p) { p.Send(Header(0, 20), 4u << 20, /*rendezvous=*/true); }},
      {"body of", [](RawPeer& p) { p.Send(Header(0, ~0u), 100); }},
      {"ahead", [](RawPeer& p) { p.Send(Header(limits::kSendWindowMessages + 1, 1), 1); }},
      {"ahead",
       [](RawPeer& p) {
         p.Send(Header(0, 1), 1);
         p.Send(Header(0, 1), 1);  // again
       }},
      {"came twice",
       [](RawPeer& p) {
         p.Send(Header(5, 1), 1);
         p.Send(Header(5, 1), 1);
       }},
      {"second hello", [](RawPeer& p) { p.SendHello(); }},
  };
  uint64_t id = 1000;
  for (const Case& broken : cases) {
    SCOPED_TRACE(broken.named);
    closed_.clear();
    RawPeer peer(address_);
    ASSERT_TRUE(Wait(&peer, [&] { return peer.greeted(); }));
    broken.send(peer);
    ASSERT_TRUE(Wait(&peer, [&] { return !closed_.empty(); }));
    EXPECT_EQ(closed_[0].code(), StatusCode::kDataLoss) << closed_[0].ToString();
    EXPECT_THAT(closed_[0].message(), testing::HasSubstr(broken.named));
    EXPECT_TRUE(Wait(&peer, [&] { return peer.lost(); })) << "the connection still stands";
    OutMessage message;
    message.id = ++id;
    good->Send(std::move(message));
    ASSERT_TRUE(Wait(nullptr, [&] { return !received_.empty() && received_.back() == id; }));
  }
}

}  // namespace
}  // namespace icecache
