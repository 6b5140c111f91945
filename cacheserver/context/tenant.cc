#include "cacheserver/context/tenant.h"

#include <openssl/crypto.h>
#include <openssl/sha.h>

#include <algorithm>
#include <array>

namespace icecache {

static_assert(kSecretHashDigits == 2 * SHA256_DIGEST_LENGTH);

std::string HashSecret(std::string_view salt, std::string_view secret) {
  std::string text(salt);
  text += secret;
  std::array<unsigned char, SHA256_DIGEST_LENGTH> digest{};
  SHA256(reinterpret_cast<const unsigned char*>(text.data()), text.size(), digest.data());
  OPENSSL_cleanse(text.data(), text.size());
  constexpr char kHex[] = "0123456789abcdef";
  std::string hex;
  for (unsigned char byte : digest) {
    hex += kHex[byte >> 4];
    hex += kHex[byte & 15];
  }
  return hex;
}

TenantTable TenantTable::Open() {
  TenantTable table;
  table.tenants_.push_back(Tenant{.id = TenantId(0), .name = "default", .rights = {.admin = true}});
  return table;
}

void TenantTable::Update(const TenantTable& fresh) {
  requires_secret_ = fresh.requires_secret_;
  for (Tenant& tenant : tenants_) tenant.active = false;
  for (Tenant next : fresh.tenants_) {
    auto same = std::find_if(tenants_.begin(), tenants_.end(),
                             [&](const Tenant& tenant) { return tenant.name == next.name; });
    if (same != tenants_.end()) {
      next.id = same->id;
      *same = std::move(next);
    } else {
      next.id = TenantId(static_cast<uint32_t>(tenants_.size()));
      tenants_.push_back(std::move(next));
    }
  }
}

Result<TenantId> TenantTable::Authenticate(std::string_view name, std::string_view secret) const {
  const Tenant* found = nullptr;
  for (const Tenant& tenant : tenants_) {
    if (tenant.active && tenant.name == name) found = &tenant;
  }
  if (!requires_secret_) {
    // Without a token file an empty name means "default".
    if (found == nullptr && name.empty()) found = &tenants_.front();
    if (found != nullptr) return found->id;
    return Unauthenticated(
        "tenant '" + std::string(name) +
        "': this server has no token file and knows only the tenant \"default\"");
  }
  // Hash and compare for unknown names too, so that time does not tell which names exist.
  static const Tenant kNobody{.salt = "0123456789abcdef0123456789abcdef",
                              .secret_sha256 = std::string(kSecretHashDigits, '0')};
  const Tenant& against = found != nullptr ? *found : kNobody;
  const std::string hash = HashSecret(against.salt, secret);
  const bool equal =
      CRYPTO_memcmp(hash.data(), against.secret_sha256.data(), kSecretHashDigits) == 0;
  if (found == nullptr || !equal) return Unauthenticated("unknown tenant or wrong secret");
  return found->id;
}

const Tenant& TenantTable::Get(TenantId id) const {
  KV_CHECK(id.value < tenants_.size());
  return tenants_[id.value];
}

}  // namespace icecache
