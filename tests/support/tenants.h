// For tests: token files, and tables read from them.
#pragma once

#include <string>

#include "cacheserver/context/tenant.h"

namespace icecache::test {

// A [[tenant]] of a token file. `keys`: further lines of it ("weight = 3\n").
inline std::string TenantEntry(const std::string& name, const std::string& secret,
                               const std::string& keys = "") {
  return "[[tenant]]\nname = \"" + name +
         "\"\nsecret_sha256 = \"salt-of-tests:" + HashSecret("salt-of-tests", secret) + "\"\n" +
         keys;
}

// alice and bob; their names are their secrets.
inline TenantTable TwoTenants() {
  return *TenantTable::Parse(TenantEntry("alice", "alice") + TenantEntry("bob", "bob"), "test");
}

}  // namespace icecache::test
