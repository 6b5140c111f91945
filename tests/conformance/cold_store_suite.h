// Conformance suite of the ColdStore seam: what every cold store promises, run over each
// implementation.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cacheserver/store/cold_store.h"
#include "common/limits.h"

namespace icecache::test {

struct ColdStoreParam {
  const char* name;
  // Opens the store in `directory`; a store without a disk ignores it.
  std::function<std::unique_ptr<ColdStore>(const std::string& directory)> open;
  bool keeps_data;  // across close and open
};

class ColdStoreSuite : public ::testing::TestWithParam<ColdStoreParam> {};

inline std::map<std::string, std::string> ReadAll(const ColdStore& store, ColdColumn column,
                                                  std::string_view prefix = "") {
  std::map<std::string, std::string> all;
  EXPECT_TRUE(store
                  .Scan(column, prefix,
                        [&](std::string_view k, std::string_view v) {
                          EXPECT_TRUE(all.empty() || all.rbegin()->first < k)
                              << "keys come in order";
                          all.emplace(k, v);
                          return true;
                        })
                  .ok());
  return all;
}

}  // namespace icecache::test
