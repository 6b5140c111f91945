#include "worker/layer_rows.h"

#include "common/status.h"
#include "kernels/distance.h"

namespace icecache {

void LayerRows::RoundAndStore(uint32_t begin, uint32_t count, float* k, float* v) {
  KV_CHECK(begin + count <= tokens_);
  const size_t dim = shape_.head_dim;
  const size_t row_bytes = shape_.row_bytes();
  for (uint16_t h = 0; h < shape_.kv_heads; ++h) {
    const std::span<std::byte> blocks[2] = {this->k(KvHeadId(h)), this->v(KvHeadId(h))};
    float* const sources[2] = {k, v};
    for (int part = 0; part < 2; ++part) {
      for (uint32_t t = 0; t < count; ++t) {
        float* const source = sources[part] + (size_t{t} * shape_.kv_heads + h) * dim;
        std::byte* const row = blocks[part].data() + (size_t{begin} + t) * row_bytes;
        FromF32(source, dim, shape_.dtype, row);
        ToF32(row, shape_.dtype, dim, source);
      }
    }
  }
}

void LayerRows::StoreToken(TokenPos position, const float* k, const float* v) {
  KV_CHECK(tokens_ == 1);
  first_ = position;
  for (uint16_t h = 0; h < shape_.kv_heads; ++h) {
    const size_t offset = size_t{h} * shape_.head_dim;
    FromF32(k + offset, shape_.head_dim, shape_.dtype, this->k(KvHeadId(h)).data());
    FromF32(v + offset, shape_.head_dim, shape_.dtype, this->v(KvHeadId(h)).data());
  }
}

}  // namespace icecache
