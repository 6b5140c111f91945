// Tenants: who may talk to the server, with what rights and how much memory.
//
// The token file is TOML (token_file.cc); what it does not know it refuses with file:line:
//
//   [[tenant]]
//   name = "alice"
//   # salt, ':', hex SHA-256 of salt followed by the secret
//   secret_sha256 = "c0ffee42:9f86d0..."
//   quota = "8GiB"                        # optional; no key or 0: no limit but the pool
//   weight = 2                            # optional, 1..100: share of the server under load
//   rights = ["read", "write", "share"]   # optional; all but "admin" by default
//
// A line for it:
//   s=$(openssl rand -hex 16); printf '%s%s' "$s" "$SECRET" | sha256sum    -> "$s:<hex>"
// Secrets are meant to be random tokens of 128 bits and more (openssl rand -hex 32): one hash is
// enough then.
//
// Without a token file there is one tenant, "default", without a secret and with all rights; the
// configuration admits that on loopback only. Thread: control. OpenSSL stays behind tenant.cc.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "common/ids.h"
#include "common/status.h"

namespace icecache {

inline constexpr size_t kSecretHashDigits = 64;  // of a SHA-256, in hex

struct Rights {
  bool read = true;    // open, fork, describe, list
  bool write = true;   // create, put rows, seal, drop
  bool share = true;   // publish
  bool admin = false;  // all tenants' contexts in reports, drain, the HTTP pages beyond loopback
};

struct Tenant {
  TenantId id;
  std::string name;
  std::string salt;           // empty with an empty hash: no secret is asked for
  std::string secret_sha256;  // kSecretHashDigits lower-case hex digits
  uint64_t quota_bytes = 0;   // 0: no limit
  uint32_t weight = 1;
  Rights rights;
  bool active = true;  // false: gone from the token file at a reload
};

class TenantTable {
 public:
  // The one tenant "default", id 0, without a secret.
  static TenantTable Open();
  // `source` names the text in errors. INVALID_ARGUMENT with line, key, found and expected.
  static Result<TenantTable> Parse(std::string_view text, const std::string& source);
  // NOT_FOUND when the file is missing; PERMISSION_DENIED when others than its owner may write it.
  static Result<TenantTable> Load(const std::string& path);

  // Takes over names, secrets, quotas and rights of `fresh`. Tenants of the same name keep their
  // id, new ones get new ids, tenants that are gone become inactive (their contexts stay, they
  // cannot say Hello).
  void Update(const TenantTable& fresh);

  // UNAUTHENTICATED, with the same words and in the same time for an unknown name and a wrong
  // secret.
  Result<TenantId> Authenticate(std::string_view name, std::string_view secret) const;

  const Tenant& Get(TenantId id) const;  // REQUIRES: an id that this table gave out
  const std::vector<Tenant>& all() const { return tenants_; }
  bool requires_secret() const { return requires_secret_; }

 private:
  std::vector<Tenant> tenants_;  // index = id
  bool requires_secret_ = false;
};

// Lower-case hex SHA-256 of salt followed by secret.
std::string HashSecret(std::string_view salt, std::string_view secret);

}  // namespace icecache
