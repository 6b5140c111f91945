#include "cacheserver/context/tenant.h"

#include <fcntl.h>
#include <openssl/crypto.h>
#include <openssl/sha.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <optional>

#include "common/limits.h"
#include "common/size.h"

namespace icecache {
namespace {

constexpr size_t kHashHexBytes = 2 * SHA256_DIGEST_LENGTH;

std::string_view Trim(std::string_view text) {
  while (!text.empty() && std::isspace(static_cast<unsigned char>(text.front())))
    text.remove_prefix(1);
  while (!text.empty() && std::isspace(static_cast<unsigned char>(text.back())))
    text.remove_suffix(1);
  return text;
}

// The line without its comment; a '#' inside a quoted string is not one.
std::string_view WithoutComment(std::string_view line) {
  bool quoted = false;
  for (size_t i = 0; i < line.size(); ++i) {
    if (line[i] == '"') quoted = !quoted;
    if (line[i] == '#' && !quoted) return line.substr(0, i);
  }
  return line;
}

// "text" without escapes: names and hashes need none.
std::optional<std::string> ParseQuoted(std::string_view value) {
  if (value.size() < 2 || value.front() != '"' || value.back() != '"') return std::nullopt;
  std::string_view inner = value.substr(1, value.size() - 2);
  if (inner.find_first_of("\"\\") != std::string_view::npos) return std::nullopt;
  return std::string(inner);
}

std::optional<std::vector<std::string>> ParseQuotedList(std::string_view value) {
  if (value.size() < 2 || value.front() != '[' || value.back() != ']') return std::nullopt;
  std::string_view rest = Trim(value.substr(1, value.size() - 2));
  std::vector<std::string> items;
  while (!rest.empty()) {
    size_t comma = rest.find(',');
    std::optional<std::string> item = ParseQuoted(Trim(rest.substr(0, comma)));
    if (!item) return std::nullopt;
    items.push_back(*std::move(item));
    if (comma == std::string_view::npos) break;
    rest = Trim(rest.substr(comma + 1));
  }
  return items;
}

bool IsTenantName(std::string_view name) {
  return !name.empty() && name.size() <= 64 && std::all_of(name.begin(), name.end(), [](char c) {
    return std::isalnum(static_cast<unsigned char>(c)) || c == '-' || c == '_' || c == '.';
  });
}

bool IsLowerHex(std::string_view text) {
  return std::all_of(text.begin(), text.end(),
                     [](char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); });
}

Status SetSecret(Tenant& tenant, std::string_view value) {
  constexpr const char* kExpected =
      "expected \"SALT:HEX\" with 64 lower-case hex digits of SHA-256(salt + secret)";
  std::optional<std::string> text = ParseQuoted(value);
  const size_t colon = text ? text->rfind(':') : std::string::npos;
  if (colon == std::string::npos) return InvalidArgument(kExpected);
  tenant.salt = text->substr(0, colon);
  tenant.secret_sha256 = text->substr(colon + 1);
  if (tenant.salt.size() < 8)
    return InvalidArgument("the salt is shorter than 8 characters; use `openssl rand -hex 16`");
  if (tenant.secret_sha256.size() != kHashHexBytes || !IsLowerHex(tenant.secret_sha256)) {
    return InvalidArgument(kExpected);
  }
  return OkStatus();
}

Status SetRights(Tenant& tenant, std::string_view value) {
  std::optional<std::vector<std::string>> names = ParseQuotedList(value);
  if (!names) return InvalidArgument("expected a list such as [\"read\", \"write\"]");
  tenant.rights = Rights{false, false, false, false};
  for (const std::string& name : *names) {
    if (name == "read")
      tenant.rights.read = true;
    else if (name == "write")
      tenant.rights.write = true;
    else if (name == "share")
      tenant.rights.share = true;
    else if (name == "admin")
      tenant.rights.admin = true;
    else
      return InvalidArgument("'" + name + "' is no right; expected read, write, share or admin");
  }
  return OkStatus();
}

Status SetKey(Tenant& tenant, std::string_view key, std::string_view value) {
  if (key == "name") {
    std::optional<std::string> name = ParseQuoted(value);
    if (!name || !IsTenantName(*name)) {
      return InvalidArgument("expected a quoted name of 1 to 64 letters, digits, '-', '_' or '.'");
    }
    tenant.name = *std::move(name);
    return OkStatus();
  }
  if (key == "secret_sha256") return SetSecret(tenant, value);
  if (key == "rights") return SetRights(tenant, value);
  if (key == "quota") {
    std::string text = ParseQuoted(value).value_or(std::string(value));
    KV_ASSIGN_OR_RETURN(tenant.quota_bytes, ParseSize(text));
    return OkStatus();
  }
  if (key == "weight") {
    auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), tenant.weight);
    if (error != std::errc() || end != value.data() + value.size() || tenant.weight < 1 ||
        tenant.weight > limits::kTenantWeightMax) {
      return InvalidArgument("expected a whole number from 1 to 100");
    }
    return OkStatus();
  }
  return InvalidArgument("unknown key; expected name, secret_sha256, quota, weight or rights");
}

Status CheckComplete(const std::vector<Tenant>& tenants) {
  const Tenant& last = tenants.back();
  if (last.name.empty()) return InvalidArgument("a [[tenant]] has no name");
  if (last.secret_sha256.empty()) {
    return InvalidArgument("tenant '" + last.name + "' has no secret_sha256");
  }
  for (size_t i = 0; i + 1 < tenants.size(); ++i) {
    if (tenants[i].name == last.name) {
      return InvalidArgument("tenant '" + last.name + "' is there twice; names must differ");
    }
  }
  return OkStatus();
}

}  // namespace

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
  table.tenants_.push_back(
      Tenant{.id = TenantId(0), .name = "default", .rights = {.admin = true}});
  return table;
}

Result<TenantTable> TenantTable::Parse(std::string_view text, const std::string& source) {
  TenantTable table;
  table.requires_secret_ = true;
  int number = 0;
  // Which keys the tenant at hand has had: TOML forbids a key twice.
  std::vector<std::string> seen;
  auto at = [&](const Status& status, std::string_view key) {
    std::string where = source + ":" + std::to_string(number);
    if (!key.empty()) where += ": " + std::string(key);
    return status.WithContext(where);
  };
  while (!text.empty()) {
    const size_t eol = text.find('\n');
    std::string_view line = Trim(WithoutComment(text.substr(0, eol)));
    text = eol == std::string_view::npos ? std::string_view() : text.substr(eol + 1);
    ++number;
    if (line.empty()) continue;
    if (line == "[[tenant]]") {
      if (!table.tenants_.empty()) {
        if (Status status = CheckComplete(table.tenants_); !status.ok()) return at(status, "");
      }
      if (table.tenants_.size() >= limits::kTenantsMax) {
        return at(InvalidArgument("more than " + std::to_string(limits::kTenantsMax) + " tenants"),
                  "");
      }
      table.tenants_.push_back(
          Tenant{.id = TenantId(static_cast<uint32_t>(table.tenants_.size()))});
      seen.clear();
      continue;
    }
    const size_t equals = line.find('=');
    if (equals == std::string_view::npos || table.tenants_.empty()) {
      return at(InvalidArgument("found '" + std::string(line) +
                                "', expected [[tenant]] and then key = value"),
                "");
    }
    const std::string key(Trim(line.substr(0, equals)));
    if (std::find(seen.begin(), seen.end(), key) != seen.end()) {
      return at(InvalidArgument("is set twice for one tenant"), key);
    }
    seen.push_back(key);
    Status status = SetKey(table.tenants_.back(), key, Trim(line.substr(equals + 1)));
    if (!status.ok()) return at(status, key);
  }
  if (table.tenants_.empty())
    return InvalidArgument(source + ": no [[tenant]] in it; every client would be refused");
  if (Status status = CheckComplete(table.tenants_); !status.ok()) return at(status, "");
  return table;
}

Result<TenantTable> TenantTable::Load(const std::string& path) {
  const std::string what = "token file " + path;
  int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0)
    return NotFound(what + ": " + std::strerror(errno) + "; create it or correct --token-file");
  std::string text;
  struct stat info {};
  Status status;
  if (fstat(fd, &info) != 0 || !S_ISREG(info.st_mode)) {
    status = InvalidArgument(what + ": not a regular file");
  } else if ((info.st_mode & (S_IWGRP | S_IWOTH)) != 0) {
    status =
        PermissionDenied(what + ": others than its owner may write it; run: chmod 600 " + path);
  } else if (static_cast<uint64_t>(info.st_size) > limits::kTokenFileBytesMax) {
    status = InvalidArgument(what + ": " + FormatSize(static_cast<uint64_t>(info.st_size)) +
                             ", at most " + FormatSize(limits::kTokenFileBytesMax));
  } else {
    text.resize(static_cast<size_t>(info.st_size));
    size_t have = 0;
    while (have < text.size()) {
      ssize_t n = read(fd, text.data() + have, text.size() - have);
      if (n < 0 && errno == EINTR) continue;
      if (n <= 0) break;
      have += static_cast<size_t>(n);
    }
    if (have != text.size())
      status = DataLoss(what + ": it changed or failed while it was read; try again");
  }
  close(fd);
  if (!status.ok()) return status;
  return Parse(text, path);
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
                              .secret_sha256 = std::string(kHashHexBytes, '0')};
  const Tenant& against = found != nullptr ? *found : kNobody;
  const std::string hash = HashSecret(against.salt, secret);
  const bool equal = CRYPTO_memcmp(hash.data(), against.secret_sha256.data(), kHashHexBytes) == 0;
  if (found == nullptr || !equal) return Unauthenticated("unknown tenant or wrong secret");
  return found->id;
}

const Tenant& TenantTable::Get(TenantId id) const {
  KV_CHECK(id.value < tenants_.size());
  return tenants_[id.value];
}

}  // namespace icecache
