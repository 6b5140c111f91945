#include "common/prefix_key.h"

#include <openssl/evp.h>

#include <algorithm>

#include "common/limits.h"
#include "common/status.h"

namespace icecache {

struct PrefixHasher::Impl {
  Impl() : md(EVP_MD_CTX_new()), end(EVP_MD_CTX_new()) {
    KV_CHECK(md != nullptr && end != nullptr);
    KV_CHECK(EVP_DigestInit_ex(md, EVP_sha256(), nullptr) == 1);
  }
  ~Impl() {
    EVP_MD_CTX_free(md);
    EVP_MD_CTX_free(end);
  }
  void Update(const void* data, size_t bytes) {
    KV_CHECK(EVP_DigestUpdate(md, data, bytes) == 1);
  }
  // Length first: no two lists of texts look alike.
  void Text(std::string_view text) {
    Number(text.size());
    Update(text.data(), text.size());
  }
  void Number(uint64_t value) { Update(&value, sizeof value); }

  EVP_MD_CTX* md;
  EVP_MD_CTX* end;  // a copy that is finished
};

PrefixHasher::PrefixHasher(const PrefixIdentity& identity) : impl_(std::make_unique<Impl>()) {
  impl_->Text("icecache prefix 1");
  impl_->Text(identity.model);
  const ModelShape& shape = identity.shape;
  for (const uint64_t value :
       {uint64_t{shape.layers}, uint64_t{shape.kv_heads}, uint64_t{shape.query_heads},
        uint64_t{shape.head_dim}, static_cast<uint64_t>(shape.dtype),
        uint64_t{limits::kPageTokens}, uint64_t{identity.sink_tokens},
        uint64_t{identity.window_tokens}, identity.seed}) {
    impl_->Number(value);
  }
  impl_->Text(identity.policy);
}
PrefixHasher::~PrefixHasher() = default;

void PrefixHasher::Add(std::span<const int32_t> tokens) {
  impl_->Update(tokens.data(), tokens.size_bytes());
}

PrefixKey PrefixHasher::key() const {
  PrefixKey key;
  unsigned bytes = 0;
  KV_CHECK(EVP_MD_CTX_copy_ex(impl_->end, impl_->md) == 1);
  KV_CHECK(EVP_DigestFinal_ex(impl_->end, reinterpret_cast<unsigned char*>(key.data()), &bytes) ==
               1 &&
           bytes == key.size());
  return key;
}

std::vector<PrefixKey> PrefixKeys(const PrefixIdentity& identity, std::span<const int32_t> tokens,
                                  bool end) {
  PrefixHasher hasher(identity);
  std::vector<PrefixKey> keys;
  while (!tokens.empty()) {
    const size_t count = std::min<size_t>(limits::kPrefixBlockTokens, tokens.size());
    if (count < limits::kPrefixBlockTokens && !end) break;
    hasher.Add(tokens.first(count));
    keys.push_back(hasher.key());
    tokens = tokens.subspan(count);
  }
  return keys;
}

PrefixKey PrefixKeyOf(const PrefixIdentity& identity, std::span<const int32_t> tokens) {
  PrefixHasher hasher(identity);
  hasher.Add(tokens);
  return hasher.key();
}

uint32_t PrefixKeyCount(uint32_t tokens) {
  return (tokens + limits::kPrefixBlockTokens - 1) / limits::kPrefixBlockTokens;
}

}  // namespace icecache
