// TenantTable from a token file: every key checked, every error with its line.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <charconv>
#include <cstring>

#include "cacheserver/context/tenant.h"
#include "common/config_file.h"
#include "common/limits.h"
#include "common/size.h"

namespace icecache {
namespace {

using config::FileEntry;

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
std::string Text(const FileEntry& entry) {
  return entry.kind == FileEntry::Kind::kString ? entry.values[0] : std::string();
}

Status SetName(Tenant& tenant, const FileEntry& entry) {
  tenant.name = Text(entry);
  if (IsTenantName(tenant.name)) return OkStatus();
  return InvalidArgument("expected a quoted name of 1 to 64 letters, digits, '-', '_' or '.'");
}

Status SetSecret(Tenant& tenant, const FileEntry& entry) {
  const std::string text = Text(entry);
  const size_t colon = text.rfind(':');
  if (colon != std::string::npos && colon < 8) {
    return InvalidArgument("the salt is shorter than 8 characters; use `openssl rand -hex 16`");
  }
  tenant.salt = text.substr(0, colon);
  tenant.secret_sha256 = colon == std::string::npos ? "" : text.substr(colon + 1);
  if (tenant.secret_sha256.size() == kSecretHashDigits && IsLowerHex(tenant.secret_sha256)) {
    return OkStatus();
  }
  return InvalidArgument(
      "expected \"SALT:HEX\" with 64 lower-case hex digits of SHA-256(salt + secret)");
}

Status SetQuota(Tenant& tenant, const FileEntry& entry) {
  const bool number = entry.kind == FileEntry::Kind::kInteger;
  KV_ASSIGN_OR_RETURN(tenant.quota_bytes, ParseSize(number ? entry.values[0] : Text(entry)));
  return OkStatus();
}

Status SetWeight(Tenant& tenant, const FileEntry& entry) {
  const std::string digits = entry.kind == FileEntry::Kind::kInteger ? entry.values[0] : "";
  const auto [end, error] =
      std::from_chars(digits.data(), digits.data() + digits.size(), tenant.weight);
  if (error == std::errc() && tenant.weight >= 1 && tenant.weight <= limits::kTenantWeightMax) {
    return OkStatus();
  }
  return InvalidArgument("expected a whole number from 1 to " +
                         std::to_string(limits::kTenantWeightMax));
}

Status SetRights(Tenant& tenant, const FileEntry& entry) {
  if (entry.kind != FileEntry::Kind::kStrings) {
    return InvalidArgument("expected a list such as [\"read\", \"write\"]");
  }
  tenant.rights = Rights{false, false, false, false};
  const std::pair<const char*, bool*> all[] = {{"read", &tenant.rights.read},
                                               {"write", &tenant.rights.write},
                                               {"share", &tenant.rights.share},
                                               {"admin", &tenant.rights.admin}};
  for (const std::string& name : entry.values) {
    const auto* right = std::find_if(std::begin(all), std::end(all),
                                     [&](const auto& r) { return r.first == name; });
    if (right == std::end(all)) {
      return InvalidArgument("'" + name + "' is no right; expected read, write, share or admin");
    }
    *right->second = true;
  }
  return OkStatus();
}

Status SetKey(Tenant& tenant, const FileEntry& entry) {
  if (entry.key == "name") return SetName(tenant, entry);
  if (entry.key == "secret_sha256") return SetSecret(tenant, entry);
  if (entry.key == "quota") return SetQuota(tenant, entry);
  if (entry.key == "weight") return SetWeight(tenant, entry);
  if (entry.key == "rights") return SetRights(tenant, entry);
  return InvalidArgument("unknown key; expected name, secret_sha256, quota, weight or rights");
}

Result<Tenant> ReadTenant(const FileEntry& table) {
  Tenant tenant;
  for (const FileEntry& entry : table.children) {
    if (Status status = SetKey(tenant, entry); !status.ok()) {
      return status.WithContext(entry.where + ": " + entry.key);
    }
  }
  if (tenant.name.empty()) return InvalidArgument(table.where + ": a [[tenant]] has no name");
  if (tenant.secret_sha256.empty()) {
    return InvalidArgument(table.where + ": tenant '" + tenant.name + "' has no secret_sha256");
  }
  return tenant;
}

Status CheckAmong(const std::vector<Tenant>& others, const Tenant& tenant) {
  for (const Tenant& other : others) {
    if (other.name == tenant.name) {
      return InvalidArgument("tenant '" + tenant.name + "' is there twice; names must differ");
    }
  }
  if (others.size() < limits::kTenantsMax) return OkStatus();
  return InvalidArgument("more than " + std::to_string(limits::kTenantsMax) + " tenants");
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
  KV_ASSIGN_OR_RETURN(const std::vector<FileEntry> entries, config::ParseToml(text, source));
  TenantTable table;
  table.requires_secret_ = true;
  for (const FileEntry& entry : entries) {
    if (entry.key != "tenant" || entry.kind != FileEntry::Kind::kTables) {
      return InvalidArgument(entry.where + ": found '" + entry.key +
                             "', expected [[tenant]] and then key = value");
    }
    for (const FileEntry& each : entry.children) {
      KV_ASSIGN_OR_RETURN(Tenant tenant, ReadTenant(each));
      const Status fits = CheckAmong(table.tenants_, tenant);
      if (!fits.ok()) return fits.WithContext(each.where);
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
