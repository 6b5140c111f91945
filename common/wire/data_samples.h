// Messages of the data plane with random content, for the tests of their codecs.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "common/limits.h"
#include "common/wire/data_codec.h"

namespace icecache::wire {

inline const ModelShape kShape{.layers = 4, .kv_heads = 6, .query_heads = 12, .head_dim = 16};
inline constexpr uint32_t kGroup = 2;

// What the transport makes of an OutMessage. Exact heap blocks, so that AddressSanitizer sees one
// byte too many.
class Received {
 public:
  Received(const OutMessage& out) {  // NOLINT: implicit by design
    std::vector<std::byte> body;
    for (const auto part : out.body) body.insert(body.end(), part.begin(), part.end());
    Assign(out.kind, out.meta, body);
  }
  Received(uint16_t kind, std::span<const std::byte> meta, std::span<const std::byte> body) {
    Assign(kind, meta, body);
  }
  operator const InMessage&() const { return in_; }  // NOLINT: implicit by design
  const InMessage& in() const { return in_; }
  Received Truncated(size_t meta_bytes, size_t body_bytes) const {
    return {in_.kind, in_.meta.first(meta_bytes), in_.body.first(body_bytes)};
  }
  std::span<std::byte> meta() { return {meta_.get(), in_.meta.size()}; }

 private:
  void Assign(uint16_t kind, std::span<const std::byte> meta, std::span<const std::byte> body) {
    meta_ = std::make_unique<std::byte[]>(meta.size());
    body_ = std::make_unique<std::byte[]>(body.size());
    if (!meta.empty()) std::memcpy(meta_.get(), meta.data(), meta.size());
    if (!body.empty()) std::memcpy(body_.get(), body.data(), body.size());
    in_ = {.kind = kind,
           .id = 1,
           .meta = {meta_.get(), meta.size()},
           .body = {body_.get(), body.size()}};
  }
  std::unique_ptr<std::byte[]> meta_, body_;
  InMessage in_;
};

inline unsigned Touch(std::span<const std::byte> bytes) {  // reads every byte: ASan's turn
  unsigned sum = 0;
  for (const std::byte b : bytes) sum += static_cast<unsigned>(b);
  return sum;
}

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  uint32_t Below(uint32_t n) { return std::uniform_int_distribution<uint32_t>(0, n - 1)(engine_); }
  uint64_t U64() { return engine_(); }
  float Float() { return std::normal_distribution<float>()(engine_); }
  std::vector<std::byte> Bytes(size_t n) {
    std::vector<std::byte> out(n);
    for (auto& b : out) b = static_cast<std::byte>(engine_());
    return out;
  }
  std::vector<float> Floats(size_t n) {
    std::vector<float> out(n);
    for (auto& f : out) f = Float();
    return out;
  }
  // Some heads of the shape, at least one, ascending.
  std::vector<KvHeadId> Heads() {
    std::vector<KvHeadId> heads;
    for (uint16_t h = 0; h < kShape.kv_heads; ++h) {
      if (Below(2) == 0) heads.emplace_back(h);
    }
    if (heads.empty()) heads.emplace_back(static_cast<uint16_t>(Below(kShape.kv_heads)));
    return heads;
  }
  SliceSet Slices() { return {ContextId(U64()), Epoch(U64()), Layer(), Heads()}; }
  LayerId Layer() { return LayerId(static_cast<uint16_t>(Below(kShape.layers))); }
  std::vector<ResidentPage> Resident(uint32_t count) {
    std::vector<ResidentPage> pages(count);
    for (auto& p : pages) {
      p = {SegmentId(U64()), PageId(Below(~0u)), Below(~0u), static_cast<uint8_t>(Below(17))};
    }
    return pages;
  }

 private:
  std::mt19937_64 engine_;
};

struct DataCodec : testing::Test {
  uint64_t seed = std::random_device{}();
  Random random{seed};
  void SetUp() override { RecordProperty("seed", std::to_string(seed)); }
  void TearDown() override {
    if (HasFailure()) std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  }
};

// ---- messages with random content; `bytes` owns what the body points to ----

struct Sample {
  OutMessage out;
  std::shared_ptr<std::vector<std::byte>> bytes = std::make_shared<std::vector<std::byte>>();
};

inline void AttachBody(Random& random, size_t size, Sample* sample) {
  *sample->bytes = random.Bytes(size);
  sample->out.body.push_back(*sample->bytes);
}

inline PutRowsRequest RandomPutRows(Random& random, Sample* sample) {
  PutRowsRequest in;
  in.slices = random.Slices();
  in.first_position = random.Below(1000);
  in.token_count = 1 + random.Below(20);
  Encode(in, &sample->out);
  AttachBody(random, in.slices.heads.size() * in.token_count * 2 * kShape.row_bytes(), sample);
  return in;
}

inline SelectRequest RandomSelect(Random& random, Sample* sample) {
  SelectRequest in;
  in.context = ContextId(random.U64());
  in.epoch = Epoch(random.U64());
  in.layer = random.Layer();
  for (const KvHeadId head : random.Heads()) {
    SelectHead& h = in.heads.emplace_back();
    h.head = head;
    h.resident = random.Resident(random.Below(30));
    if (random.Below(2) == 0) h.local_lse = random.Floats(kGroup);
    for (uint32_t i = random.Below(3) * 20; i > 0; --i) h.near.push_back(random.Below(100000));
  }
  if (!in.heads[0].local_lse.empty()) in.heads[0].local_lse[0] = -INFINITY;
  in.max_pages = random.Below(limits::kPagesPerSelectMax + 1);
  in.read_cap = random.Below(limits::kReadCapMax + 1);
  in.min_mass = static_cast<float>(random.Below(101)) / 100;
  in.rank = static_cast<uint8_t>(random.Below(3));
  in.flags = static_cast<uint8_t>(random.Below(2) + 8 * random.Below(4));
  in.append_first = random.Below(100000);
  in.append_count = random.Below(4);
  Encode(in, &sample->out);
  in.queries = random.Floats(in.heads.size() * kGroup * kShape.head_dim);
  const auto queries = std::as_bytes(std::span<const float>(in.queries));
  *sample->bytes =
      random.Bytes(queries.size() + in.heads.size() * in.append_count * 2 * kShape.row_bytes());
  std::memcpy(sample->bytes->data(), queries.data(), queries.size());
  sample->out.body.push_back(*sample->bytes);
  return in;
}

inline SelectReply RandomSelectReply(Random& random, Sample* sample) {
  SelectReply in;
  size_t body = 0;
  for (const KvHeadId head : random.Heads()) {
    HeadSelection& h = in.heads.emplace_back();
    h.head = head;
    for (uint32_t i = random.Below(10); i > 0; --i) {
      PagePayload& p = h.pages.emplace_back();
      p.segment = SegmentId(random.U64());
      p.page = PageId(random.Below(~0u));
      p.version = random.Below(~0u);
      p.fill = static_cast<uint8_t>(1 + random.Below(16));
      p.from = static_cast<uint8_t>(random.Below(p.fill + 1u));
      p.log_mass = random.Float();
      p.checksum = random.U64();
      const size_t rows = size_t{p.fill} - p.from;
      body += rows * (2 * kShape.row_bytes() + sizeof(uint32_t));
      if (p.from > 0 || random.Below(3) > 0) continue;
      p.coded_bytes = 1 + random.Below(static_cast<uint32_t>(2 * rows * kShape.row_bytes() - 1));
      p.coded_checksum = random.U64();
      body -= 2 * rows * kShape.row_bytes() - p.coded_bytes;
    }
    if (random.Below(3) > 0) h.residual = random.Floats(kGroup * (kShape.head_dim + 2));
    for (uint32_t g = 0; g < (h.residual.empty() ? 0 : kGroup); ++g) {
      h.residual[kGroup + g] = std::fabs(h.residual[kGroup + g]);
    }
    h.covered_mass = static_cast<float>(random.Below(101)) / 100;
    h.tokens_read = random.Below(5000);
  }
  in.select_ns = random.U64();
  in.gather_ns = random.U64();
  in.next_position = random.Below(100000);
  Encode(in, &sample->out);
  AttachBody(random, body, sample);
  return in;
}

}  // namespace icecache::wire
