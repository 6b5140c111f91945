// ControlClient: the client's side of the control plane, a TCP connection with framed messages,
// under TLS where asked for. Workers and icecachectl use it.
// Calls are synchronous on the reactor and bounded by a deadline; leases are renewed in the
// background as long as the reactor turns.
//
// When the connection is lost, or the server does not answer renewals, every waiting and every
// later call ends with UNAVAILABLE and the reason. The server then voids the leases: there is no
// reconnection behind the caller's back. Owner's thread: the reactor's; not from inside its
// handlers.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "common/limits.h"
#include "common/reactor.h"
#include "common/wire/control_codec.h"

namespace icecache {

struct ControlClientOptions {
  std::string address = "127.0.0.1:7400";
  std::string tenant;  // empty: the server's default tenant
  std::string secret;
  std::string client = "icecache-worker";  // for the server's logs
  std::string tls_ca;  // PEM file of trusted certificates, or "system"; empty: no TLS
  Duration deadline = limits::kControlDeadline;
  std::function<bool()> interrupted;  // asked while waiting; true ends waits with CANCELLED
};

class ControlClient {
 public:
  // Connects and says Hello. UNAVAILABLE naming the address and the remedy; UNIMPLEMENTED when the
  // server speaks another version of the protocol.
  static Result<std::unique_ptr<ControlClient>> Connect(Reactor& reactor,
                                                        const ControlClientOptions& options);
  ~ControlClient();  // closes; the server voids the leases
  ControlClient(const ControlClient&) = delete;
  ControlClient& operator=(const ControlClient&) = delete;

  const wire::HelloReply& hello() const;  // shard addresses are complete: no wildcard hosts

  Result<wire::Grant> Create(const wire::Create& request);
  Result<wire::Grant> Open(const std::string& name);
  Result<wire::Grant> Fork(const std::string& parent, const std::string& name) {
    return Fork(wire::Fork{.parent = parent, .name = name});
  }
  Result<wire::Grant> Fork(const wire::Fork& request);
  // keys: PrefixKeys of all its tokens, for others to find it by.
  Status Seal(ContextId context, std::vector<PrefixKey> keys = {});
  // durable: answered when the context is on disk; a large one takes as long as the disk needs.
  // shared: to all tenants.
  Status Publish(ContextId context, bool durable = false, bool shared = false);
  // Published contexts that begin as asked, longest first; each holds if its key is that of the
  // caller's first `tokens` tokens.
  Result<std::vector<wire::PrefixCandidate>> MatchPrefix(const wire::MatchPrefix& request);
  Status Release(ContextId context);
  Status Drop(const std::string& name);
  Result<std::vector<wire::ContextInfo>> List();
  Result<wire::ContextInfo> Describe(const std::string& name);
  // A report in JSON (docs/server.md); name: as the topic needs.
  Result<std::string> Inspect(wire::InspectTopic topic, const std::string& name = "");
  // Shares these frames, or none, from now on; done on a later turn, with those of the others or
  // why not. Not called once this object has ended.
  void ShareFrames(const wire::ShareFrames& request,
                   std::function<void(Result<std::vector<wire::SharedFrames>>)> done);
  Status Drain();  // the server ends when its work is done; for admins

  // OK, or why the connection is lost.
  Status Health() const;

 private:
  struct Impl;
  explicit ControlClient(std::shared_ptr<Impl> impl);
  std::shared_ptr<Impl> impl_;  // shared with handlers of the socket
};

}  // namespace icecache
