// TenantTable from a token file: TOML, read by toml++, every key checked.
#include <fcntl.h>
#include <sys/stat.h>
#include <toml++/toml.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <cstring>

#include "cacheserver/context/tenant.h"
#include "common/limits.h"
#include "common/size.h"

namespace icecache {
namespace {

constexpr size_t kHashHexDigits = 64;  // of a SHA-256

bool IsTenantName(std::string_view name) {
  return !name.empty() && name.size() <= 64 && std::all_of(name.begin(), name.end(), [](char c) {
    return std::isalnum(static_cast<unsigned char>(c)) || c == '-' || c == '_' || c == '.';
  });
}

bool IsLowerHex(std::string_view text) {
  return std::all_of(text.begin(), text.end(),
                     [](char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); });
}

// "" for what is no string: none of the keys takes an empty one.
std::string Text(const toml::node& value) {
  return value.value_exact<std::string>().value_or(std::string());
}

Status SetName(Tenant& tenant, const toml::node& value) {
  tenant.name = Text(value);
  if (IsTenantName(tenant.name)) return OkStatus();
  return InvalidArgument("expected a quoted name of 1 to 64 letters, digits, '-', '_' or '.'");
}

Status SetSecret(Tenant& tenant, const toml::node& value) {
  const std::string text = Text(value);
  const size_t colon = text.rfind(':');
  if (colon != std::string::npos && colon < 8) {
    return InvalidArgument("the salt is shorter than 8 characters; use `openssl rand -hex 16`");
  }
  tenant.salt = text.substr(0, colon);
  tenant.secret_sha256 = colon == std::string::npos ? "" : text.substr(colon + 1);
  if (tenant.secret_sha256.size() == kHashHexDigits && IsLowerHex(tenant.secret_sha256)) {
    return OkStatus();
  }
  return InvalidArgument(
      "expected \"SALT:HEX\" with 64 lower-case hex digits of SHA-256(salt + secret)");
}

Status SetQuota(Tenant& tenant, const toml::node& value) {
  const auto bytes = value.value_exact<int64_t>();
  KV_ASSIGN_OR_RETURN(tenant.quota_bytes, ParseSize(bytes ? std::to_string(*bytes) : Text(value)));
  return OkStatus();
}

Status SetWeight(Tenant& tenant, const toml::node& value) {
  const int64_t weight = value.value_exact<int64_t>().value_or(0);
  if (weight < 1 || weight > int64_t{limits::kTenantWeightMax}) {
    return InvalidArgument("expected a whole number from 1 to " +
                           std::to_string(limits::kTenantWeightMax));
  }
  tenant.weight = static_cast<uint32_t>(weight);
  return OkStatus();
}

Status SetRights(Tenant& tenant, const toml::node& value) {
  const toml::array* names = value.as_array();
  if (names == nullptr) return InvalidArgument("expected a list such as [\"read\", \"write\"]");
  tenant.rights = Rights{false, false, false, false};
  const std::pair<const char*, bool*> all[] = {{"read", &tenant.rights.read},
                                               {"write", &tenant.rights.write},
                                               {"share", &tenant.rights.share},
                                               {"admin", &tenant.rights.admin}};
  for (const toml::node& item : *names) {
    const std::string name = Text(item);
    const auto* right = std::find_if(std::begin(all), std::end(all),
                                     [&](const auto& r) { return r.first == name; });
    if (right == std::end(all)) {
      return InvalidArgument("'" + name + "' is no right; expected read, write, share or admin");
    }
    *right->second = true;
  }
  return OkStatus();
}

Status SetKey(Tenant& tenant, std::string_view key, const toml::node& value) {
  if (key == "name") return SetName(tenant, value);
  if (key == "secret_sha256") return SetSecret(tenant, value);
  if (key == "quota") return SetQuota(tenant, value);
  if (key == "weight") return SetWeight(tenant, value);
  if (key == "rights") return SetRights(tenant, value);
  return InvalidArgument("unknown key; expected name, secret_sha256, quota, weight or rights");
}

std::string Line(const std::string& source, const toml::source_region& at) {
  return source + ":" + std::to_string(at.begin.line);
}

Result<Tenant> ReadTenant(const toml::table& table, const std::string& source) {
  Tenant tenant;
  for (const auto& [key, value] : table) {
    if (Status status = SetKey(tenant, key.str(), value); !status.ok()) {
      return status.WithContext(Line(source, key.source()) + ": " + std::string(key.str()));
    }
  }
  const std::string where = Line(source, table.source());
  if (tenant.name.empty()) return InvalidArgument(where + ": a [[tenant]] has no name");
  if (tenant.secret_sha256.empty()) {
    return InvalidArgument(where + ": tenant '" + tenant.name + "' has no secret_sha256");
  }
  return tenant;
}

// A regular file that its owner alone may write.
Result<std::string> ReadTokenFile(int fd, const std::string& what, const std::string& path) {
  struct stat info {};
  if (fstat(fd, &info) != 0 || !S_ISREG(info.st_mode)) {
    return InvalidArgument(what + ": not a regular file");
  }
  if ((info.st_mode & (S_IWGRP | S_IWOTH)) != 0) {
    return PermissionDenied(what + ": others than its owner may write it; run: chmod 600 " + path);
  }
  const auto bytes = static_cast<uint64_t>(info.st_size);
  if (bytes > limits::kTokenFileBytesMax) {
    return InvalidArgument(what + ": " + FormatSize(bytes) + ", at most " +
                           FormatSize(limits::kTokenFileBytesMax));
  }
  std::string text(bytes, '\0');
  for (size_t have = 0; have < text.size();) {
    const ssize_t n = read(fd, text.data() + have, text.size() - have);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return DataLoss(what + ": it changed or failed while it was read; try again");
    have += static_cast<size_t>(n);
  }
  return text;
}

}  // namespace

Result<TenantTable> TenantTable::Parse(std::string_view text, const std::string& source) {
  toml::table file;
  try {
    file = toml::parse(text, source);
  } catch (const toml::parse_error& e) {
    return InvalidArgument(Line(source, e.source()) +
                           ": not TOML: " + std::string(e.description()));
  }
  TenantTable table;
  table.requires_secret_ = true;
  for (const auto& [key, value] : file) {
    if (key.str() != "tenant" || !value.is_array_of_tables()) {
      return InvalidArgument(Line(source, key.source()) + ": found '" + std::string(key.str()) +
                             "', expected [[tenant]] and then key = value");
    }
    for (const toml::node& entry : *value.as_array()) {
      KV_ASSIGN_OR_RETURN(Tenant tenant, ReadTenant(*entry.as_table(), source));
      for (const Tenant& other : table.tenants_) {
        if (other.name != tenant.name) continue;
        return InvalidArgument(Line(source, entry.source()) + ": tenant '" + tenant.name +
                               "' is there twice; names must differ");
      }
      if (table.tenants_.size() >= limits::kTenantsMax) {
        return InvalidArgument(Line(source, entry.source()) + ": more than " +
                               std::to_string(limits::kTenantsMax) + " tenants");
      }
      tenant.id = TenantId(static_cast<uint32_t>(table.tenants_.size()));
      table.tenants_.push_back(std::move(tenant));
    }
  }
  if (table.tenants_.empty()) {
    return InvalidArgument(source + ": no [[tenant]] in it; every client would be refused");
  }
  return table;
}

Result<TenantTable> TenantTable::Load(const std::string& path) {
  const std::string what = "token file " + path;
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) {
    return NotFound(what + ": " + std::strerror(errno) + "; create it or correct --token-file");
  }
  Result<std::string> text = ReadTokenFile(fd, what, path);
  close(fd);
  if (!text.ok()) return text.status();
  return Parse(*text, path);
}

}  // namespace icecache
