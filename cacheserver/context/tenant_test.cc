#include "cacheserver/context/tenant.h"

#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <fstream>
#include <random>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/support/tenants.h"

namespace icecache {
namespace {

using test::TenantEntry;
using ::testing::HasSubstr;

TEST(Tenant, HashIsThatOfTheCommandLineTool) {
  // printf '%s%s' abc "" | sha256sum
  EXPECT_EQ(HashSecret("ab", "c"),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
}

TEST(Tenant, ReadsEveryKey) {
  Result<TenantTable> table = TenantTable::Parse(
      "# tenants\n" +
          TenantEntry("alice", "s3cret",
                      "quota = \"8GiB\"\nweight = 3\nrights = [\"read\", \"admin\"]\n") +
          "\n" + TenantEntry("bob.b-1", "other"),
      "tokens.toml");
  ASSERT_TRUE(table.ok()) << table.status().ToString();
  ASSERT_EQ(table->all().size(), 2u);
  const Tenant& alice = table->Get(TenantId(0));
  EXPECT_EQ(alice.quota_bytes, 8ull << 30);
  EXPECT_EQ(alice.weight, 3u);
  EXPECT_TRUE(alice.rights.read);
  EXPECT_FALSE(alice.rights.write);
  EXPECT_TRUE(alice.rights.admin);
  const Tenant& bob = table->Get(TenantId(1));
  EXPECT_EQ(bob.quota_bytes, 0u);
  EXPECT_TRUE(bob.rights.write);
  EXPECT_FALSE(bob.rights.admin);
}

TEST(Tenant, RightSecretIsAdmittedAndEverythingElseLooksTheSame) {
  Result<TenantTable> table =
      TenantTable::Parse(TenantEntry("alice", "s3cret") + TenantEntry("bob", "b"), "t");
  ASSERT_TRUE(table.ok());
  EXPECT_EQ(table->Authenticate("alice", "s3cret")->value, 0u);
  EXPECT_EQ(table->Authenticate("bob", "b")->value, 1u);
  Result<TenantId> wrong = table->Authenticate("alice", "b");
  Result<TenantId> unknown = table->Authenticate("carol", "b");
  Result<TenantId> empty = table->Authenticate("", "");
  ASSERT_FALSE(wrong.ok() || unknown.ok() || empty.ok());
  EXPECT_EQ(wrong.status().code(), StatusCode::kUnauthenticated);
  EXPECT_EQ(wrong.status().ToString(), unknown.status().ToString());
  EXPECT_EQ(wrong.status().ToString(), empty.status().ToString());
}

TEST(Tenant, OpenTableKnowsDefaultOnly) {
  TenantTable table = TenantTable::Open();
  EXPECT_EQ(table.Authenticate("default", "")->value, 0u);
  EXPECT_EQ(table.Authenticate("", "")->value, 0u);
  EXPECT_FALSE(table.Authenticate("alice", "").ok());
}

TEST(Tenant, ErrorsNameLineKeyAndRemedy) {
  const std::string good = TenantEntry("alice", "s");
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"", "no [[tenant]]"},
      {"name = \"x\"\n", "t.toml:1"},
      {"[[tenant]]\nname = \"a b\"\n", "t.toml:2: name"},
      {"[[tenant]]\nname = \"a\"\n", "no secret_sha256"},
      {"[[tenant]]\nsecret_sha256 = \"12345678:xyz\"\n", "t.toml:2: secret_sha256"},
      {"[[tenant]]\nsecret_sha256 = \"1:" + std::string(64, 'a') + "\"\n", "salt is shorter"},
      {good + "weight = 0\n", "t.toml:4: weight"},
      {good + "weight = 3x\n", "t.toml:4: not TOML"},
      {good + "weight = 101\n", "1 to 100"},
      {good + "weight = \"3\"\n", "1 to 100"},
      {good + "quota = \"much\"\n", "t.toml:4: quota"},
      {good + "rights = [\"root\"]\n", "'root' is no right"},
      {good + "rights = \"read\"\n", "expected a list"},
      {good + "colour = \"red\"\n", "unknown key"},
      {good + "name = \"b\"\n", "t.toml:4: not TOML"},
      {good + good, "there twice"},
      {"[tenant]\nname = \"a\"\n", "expected [[tenant]]"},
      {good + "[tenants]\n", "t.toml:4: found 'tenants'"},
      {good + "[tenant]\n", "t.toml:4: not TOML"},
      {good + "quota = -1\n", "t.toml:4: quota"},
      {good + "rights = [1]\n", "expected a list"},
  };
  for (const auto& [text, expected] : cases) {
    Result<TenantTable> table = TenantTable::Parse(text, "t.toml");
    ASSERT_FALSE(table.ok()) << text;
    EXPECT_EQ(table.status().code(), StatusCode::kInvalidArgument);
    EXPECT_THAT(table.status().message(), HasSubstr(expected)) << text;
  }
}

TEST(Tenant, RandomTextNeverCrashesTheReader) {
  const uint32_t seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937 random(seed);
  const std::string good = TenantEntry("alice", "s", "quota = \"1GiB\"\nrights = [\"read\"]\n");
  for (int i = 0; i < 5000; ++i) {
    std::string text = good;
    for (uint32_t n = random() % 8; n > 0; --n)
      text[random() % text.size()] = static_cast<char>(random());
    if (random() % 4 == 0) text.resize(random() % text.size());
    (void)TenantTable::Parse(text, "fuzz").ok();
  }
}

TEST(Tenant, UpdateKeepsIdsAndDeactivatesWhoIsGone) {
  TenantTable table = *TenantTable::Parse(TenantEntry("alice", "a") + TenantEntry("bob", "b"), "t");
  table.Update(*TenantTable::Parse(TenantEntry("carol", "c") + TenantEntry("bob", "new"), "t"));
  EXPECT_FALSE(table.Authenticate("alice", "a").ok());
  EXPECT_FALSE(table.Get(TenantId(0)).active);
  EXPECT_FALSE(table.Authenticate("bob", "b").ok());
  EXPECT_EQ(table.Authenticate("bob", "new")->value, 1u);
  EXPECT_EQ(table.Authenticate("carol", "c")->value, 2u);
  table.Update(*TenantTable::Parse(TenantEntry("alice", "again"), "t"));
  EXPECT_EQ(table.Authenticate("alice", "again")->value, 0u);
}

TEST(Tenant, LoadRefusesAFileThatOthersMayWrite) {
  const std::string path = ::testing::TempDir() + "/tokens-" + std::to_string(getpid()) + ".toml";
  std::ofstream(path) << TenantEntry("alice", "s");
  ASSERT_EQ(chmod(path.c_str(), 0600), 0);
  EXPECT_TRUE(TenantTable::Load(path).ok());
  ASSERT_EQ(chmod(path.c_str(), 0622), 0);
  Result<TenantTable> table = TenantTable::Load(path);
  ASSERT_FALSE(table.ok());
  EXPECT_THAT(table.status().message(), HasSubstr("chmod 600"));
  std::remove(path.c_str());
  EXPECT_EQ(TenantTable::Load(path).status().code(), StatusCode::kNotFound);
}

}  // namespace
}  // namespace icecache
