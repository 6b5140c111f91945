// Pages on their way into a device's frames: checksums, int8 codes and the intake, against the
// host's code for the same.
#include <cstring>
#include <random>

#include "common/checksum.h"
#include "kernels/distance.h"
#include "kernels/gpu/page_intake.h"
#include "kernels/int8_rows.h"
#include "tests/conformance/device_suite.h"

namespace icecache::gpu {
namespace {

constexpr uint64_t kSeed = 20261129;

std::vector<std::byte> RandomBytes(std::mt19937_64& rng, size_t count) {
  std::vector<std::byte> bytes(count);
  for (std::byte& b : bytes) b = static_cast<std::byte>(rng());
  return bytes;
}

class DevicePagesSuite : public DeviceSuite {
 protected:
  // What the kernel finds of each, in one launch.
  std::vector<uint32_t> Verdicts(std::vector<PageToVerify> pages) {
    auto* const verdicts = Upload(std::vector<uint32_t>(pages.size(), 0));
    for (size_t i = 0; i < pages.size(); ++i) pages[i].verdict = verdicts + i;
    device_->Launch(VerifyArgs{Upload(pages), static_cast<uint32_t>(pages.size())});
    return Download(verdicts, pages.size());
  }
};

// Bytes of any length at any address, whole and with one bit turned.
TEST_P(DevicePagesSuite, HashesEveryLengthAsTheHostDoes) {
  SCOPED_TRACE(testing::Message() << "seed " << kSeed);
  std::mt19937_64 rng(kSeed);
  std::vector<uint32_t> lengths;
  for (uint32_t n = 0; n <= 300; ++n) lengths.push_back(n);
  for (uint32_t n : {1023u, 1024u, 1025u, 1087u, 1088u, 1089u, 2047u, 2048u, 2049u, 16384u,
                     kXxh3BytesMax - 1, kXxh3BytesMax}) {
    lengths.push_back(n);
  }
  for (int i = 0; i < 20; ++i) lengths.push_back(static_cast<uint32_t>(rng() % kXxh3BytesMax));
  std::vector<PageToVerify> pages;
  std::vector<uint32_t> expected;
  for (const uint32_t n : lengths) {
    const std::vector<std::byte> bytes = RandomBytes(rng, n + 16);
    const size_t shift = rng() % 9;
    PageToVerify page;
    page.k = Upload(bytes) + shift;
    page.k_bytes = n;
    page.seed = n % 7 == 0 ? 0 : rng();
    // Nothing and no positions behind it: three hashes, one upon the other.
    uint64_t h = Checksum64(std::span(bytes).subspan(shift, n), page.seed);
    page.expected = Checksum64({}, Checksum64({}, h));
    pages.push_back(page);
    expected.push_back(kPageIntact);
    page.expected ^= uint64_t{1} << (rng() % 64);
    pages.push_back(page);
    expected.push_back(kPageDamaged);
    if (n == 0) continue;
    std::vector<std::byte> damaged = bytes;
    damaged[shift + rng() % n] ^= static_cast<std::byte>(1 << (rng() % 8));
    page = pages[pages.size() - 2];
    page.k = Upload(damaged) + shift;
    pages.push_back(page);
    expected.push_back(kPageDamaged);
  }
  const std::vector<uint32_t> verdicts = Verdicts(pages);
  for (size_t i = 0; i < pages.size(); ++i) {
    ASSERT_EQ(verdicts[i], expected[i]) << pages[i].k_bytes << " bytes, entry " << i;
  }
}

// Every size that a page can have.
TEST_P(DevicePagesSuite, VerifiesPagesOfEverySize) {
  SCOPED_TRACE(testing::Message() << "seed " << kSeed);
  std::mt19937_64 rng(kSeed);
  std::vector<PageToVerify> pages;
  for (const uint32_t row_bytes : {32u, 128u, 160u, 192u, 256u, 512u, 1024u}) {
    for (uint32_t fill = 1; fill <= limits::kPageTokens; ++fill) {
      const std::vector<std::byte> k = RandomBytes(rng, fill * row_bytes),
                                   v = RandomBytes(rng, fill * row_bytes);
      const PageIdentity name{rng(), static_cast<uint32_t>(rng()), static_cast<uint32_t>(rng())};
      PageToVerify page;
      page.seed = PageNameSeed(name);
      page.k = Upload(k);
      page.v = Upload(v);
      page.k_bytes = page.v_bytes = fill * row_bytes;
      page.fill = fill;
      for (uint32_t i = 0; i < fill; ++i) page.positions[i] = static_cast<uint32_t>(rng());
      page.expected = PageChecksum(
          name, k, v, std::as_bytes(std::span(page.positions)).first(fill * sizeof(uint32_t)));
      pages.push_back(page);
      page.positions[rng() % fill] ^= 1;
      pages.push_back(page);
    }
  }
  const std::vector<uint32_t> verdicts = Verdicts(pages);
  for (size_t i = 0; i < pages.size(); ++i) {
    ASSERT_EQ(verdicts[i], i % 2 == 0 ? kPageIntact : kPageDamaged)
        << pages[i].k_bytes << " bytes of " << pages[i].fill << " rows";
  }
}

struct Code {
  std::vector<std::byte> bytes, frame;  // what the host makes of them
};

// Rows with outliers in some channels.
Code EncodedRows(std::mt19937_64& rng, DType dtype, uint32_t rows, uint32_t dim) {
  std::normal_distribution<float> normal;
  const size_t row_bytes = dim * DTypeBytes(dtype);
  std::vector<std::byte> stored[2];
  for (auto& part : stored) {
    const uint32_t outliers = static_cast<uint32_t>(rng() % 5);
    std::vector<float> x(size_t{rows} * dim);
    for (float& e : x) e = normal(rng);
    for (uint32_t o = 0; o < outliers; ++o) {
      const size_t channel = rng() % dim;
      for (uint32_t r = 0; r < rows; ++r) x[r * dim + channel] *= 100;
    }
    part.resize(rows * row_bytes);
    FromF32(x.data(), x.size(), dtype, part.data());
  }
  Code code;
  code.bytes.resize(Int8RowsBytesMax(dtype, rows, dim));
  code.bytes.resize(
      EncodeInt8Rows({dtype, dim, rows, stored[0].data(), stored[1].data()}, code.bytes.data()));
  code.frame.assign(2 * limits::kPageTokens * row_bytes, std::byte{0x5a});
  KV_CHECK(DecodeInt8Rows(code.bytes, dtype, rows, dim, code.frame.data(),
                          code.frame.data() + limits::kPageTokens * row_bytes));
  return code;
}

// Scattered from the device's memory and gathered from the host's, next to spans of plain bytes.
TEST_P(DevicePagesSuite, Int8CodesAreDecodedOnTheWayAsTheHostDecodesThem) {
  SCOPED_TRACE(testing::Message() << "seed " << kSeed);
  std::mt19937_64 rng(kSeed);
  std::vector<Code> codes;
  std::vector<CopySpan> spans;
  std::vector<std::byte*> frames;
  for (const DType dtype : {DType::kF16, DType::kBF16, DType::kF32}) {
    for (const uint32_t dim : {16u, 80u, 128u, 256u}) {
      for (const uint32_t rows : {1u, 7u, 8u, 15u, 16u}) {
        codes.push_back(EncodedRows(rng, dtype, rows, dim));
        const Code& code = codes.back();
        CopySpan span;
        if (codes.size() % 2 == 0) {
          span.from = Upload(code.bytes);
        } else {
          memory_.push_back(
              DeviceMemory::Allocate(*device_, MemoryKind::kPinned, code.bytes.size()).value());
          std::memcpy(memory_.back().data(), code.bytes.data(), code.bytes.size());
          span.from = memory_.back().data();
        }
        frames.push_back(Upload(std::vector<std::byte>(code.frame.size(), std::byte{0x5a})));
        span.to = frames.back();
        span.bytes = static_cast<uint32_t>(code.bytes.size());
        span.rows = static_cast<uint8_t>(rows);
        span.dtype = dtype;
        span.dim = static_cast<uint16_t>(dim);
        spans.push_back(span);
      }
    }
  }
  const std::vector<std::byte> plain = RandomBytes(rng, 4096);
  std::byte* const copied = Room<std::byte>(plain.size());
  spans.insert(spans.begin() + 7, CopySpan{Upload(plain), copied, 4096});
  device_->Launch(CopyArgs{Upload(spans), static_cast<uint32_t>(spans.size())});
  for (size_t i = 0; i < codes.size(); ++i) {
    const std::vector<std::byte> frame = Download(frames[i], codes[i].frame.size());
    ASSERT_EQ(std::memcmp(frame.data(), codes[i].frame.data(), frame.size()), 0) << "code " << i;
  }
  EXPECT_EQ(Download(copied, plain.size()), plain);
}

// Pages for one intake: landed, read where they lie, coded, grown, damaged.
class PageIntakeSuite : public DevicePagesSuite {
 protected:
  static constexpr uint16_t kDim = 64;
  static constexpr size_t kRowBytes = kDim * 2;
  static constexpr size_t kFrameBytes = 2 * limits::kPageTokens * kRowBytes;

  struct Page {
    std::vector<std::byte> k, v;
    std::vector<uint32_t> positions;
    IncomingPage incoming;
  };
  // Rows [from, fill) of random content, `bytes` of which lie in `k` and `v` of the result.
  Page MakePage(std::mt19937_64& rng, uint8_t from, uint8_t fill) {
    Page page;
    page.k = RandomBytes(rng, fill * kRowBytes);
    page.v = RandomBytes(rng, fill * kRowBytes);
    for (uint8_t i = 0; i < fill; ++i) page.positions.push_back(static_cast<uint32_t>(rng()));
    IncomingPage& in = page.incoming;
    in.name = {rng(), static_cast<uint32_t>(rng()), 1};
    in.checksum = PageChecksum(in.name, page.k, page.v, std::as_bytes(std::span(page.positions)));
    in.k_rows = std::span(page.k).subspan(from * kRowBytes);
    in.v_rows = std::span(page.v).subspan(from * kRowBytes);
    in.dim = kDim;
    in.from = from;
    in.fill = fill;
    in.positions = reinterpret_cast<const std::byte*>(page.positions.data());
    return page;
  }
  void ExpectFrame(const std::byte* frame, const Page& page) {
    const std::vector<std::byte> found = Download(frame, kFrameBytes);
    EXPECT_EQ(std::memcmp(found.data(), page.k.data(), page.k.size()), 0);
    EXPECT_EQ(
        std::memcmp(found.data() + limits::kPageTokens * kRowBytes, page.v.data(), page.v.size()),
        0);
  }
};

TEST_P(PageIntakeSuite, LandedPagesArriveAndDamagedOnesAreKnown) {
  SCOPED_TRACE(testing::Message() << "seed " << kSeed);
  std::mt19937_64 rng(kSeed);
  const auto intake = PageIntake::Make(*device_).value();
  for (int round = 0; round < 3; ++round) {
    std::vector<Page> pages;
    std::vector<PageIntake::Ticket> tickets;
    for (uint8_t i = 0; i < 12; ++i) {
      pages.push_back(MakePage(rng, 0, 1 + (5 * i) % 16));
      pages[i].incoming.frame = Room<std::byte>(kFrameBytes);
      if (i % 4 == 3) pages[i].incoming.checksum ^= 1;
      tickets.push_back(intake->Add(pages[i].incoming).value());
      for (std::byte& b : pages[i].k) b ^= std::byte{0xff};  // it has been landed: free to change
      if (i == 5) {
        ASSERT_TRUE(intake->Flush().ok());
      }
    }
    ASSERT_TRUE(intake->Settle(tickets.back()).ok());
    for (size_t i = 0; i < pages.size(); ++i) {
      EXPECT_EQ(intake->intact(tickets[i]), i % 4 != 3);
      for (std::byte& b : pages[i].k) b ^= std::byte{0xff};
      ExpectFrame(pages[i].incoming.frame, pages[i]);
    }
  }
  EXPECT_EQ(intake->direct_bytes(), 0u);
  EXPECT_GT(intake->landed_bytes(), 0u);
}

// The rows that are new complete the page: the checksum is of all of it.
TEST_P(PageIntakeSuite, GrownPagesAreVerifiedAsAWhole) {
  std::mt19937_64 rng(kSeed);
  const auto intake = PageIntake::Make(*device_).value();
  const Page page = MakePage(rng, 0, 12);
  std::byte* const frame = Room<std::byte>(kFrameBytes);
  IncomingPage first = page.incoming;
  first.fill = 5;
  first.k_rows = first.k_rows.first(5 * kRowBytes);
  first.v_rows = first.v_rows.first(5 * kRowBytes);
  first.checksum = PageChecksum(first.name, first.k_rows, first.v_rows, {first.positions, 20});
  first.frame = frame;
  ASSERT_TRUE(intake->Settle(intake->Add(first).value()).ok());
  EXPECT_TRUE(intake->intact(1));
  IncomingPage grown = page.incoming;
  grown.from = 5;
  grown.k_rows = grown.k_rows.subspan(5 * kRowBytes);
  grown.v_rows = grown.v_rows.subspan(5 * kRowBytes);
  grown.frame = frame;
  ASSERT_TRUE(intake->Settle(intake->Add(grown).value()).ok());
  EXPECT_TRUE(intake->intact(2));
  ExpectFrame(frame, page);
}

TEST_P(PageIntakeSuite, CodesAreVerifiedAsTheyTravelledAndDecoded) {
  std::mt19937_64 rng(kSeed);
  const auto intake = PageIntake::Make(*device_).value();
  Page page = MakePage(rng, 0, 9);
  const Code code = EncodedRows(rng, DType::kF16, 9, kDim);
  IncomingPage& in = page.incoming;
  in.k_rows = in.v_rows = {};
  in.coded = code.bytes;
  in.checksum = PageChecksum(in.name, code.bytes, {}, std::as_bytes(std::span(page.positions)));
  in.frame = Upload(std::vector<std::byte>(kFrameBytes, std::byte{0x5a}));
  const PageIntake::Ticket ticket = intake->Add(in).value();
  std::vector<std::byte> broken = code.bytes;
  broken.back() ^= std::byte{1};  // a code still, of other rows
  IncomingPage other = in;
  other.coded = broken;
  other.frame = Room<std::byte>(kFrameBytes);
  const PageIntake::Ticket damaged = intake->Add(other).value();
  other.coded = std::span(broken).first(broken.size() - 1);
  EXPECT_FALSE(intake->Add(other).has_value());
  ASSERT_TRUE(intake->Settle(damaged).ok());
  EXPECT_TRUE(intake->intact(ticket));
  EXPECT_FALSE(intake->intact(damaged));
  EXPECT_EQ(Download(in.frame, kFrameBytes), code.frame);
}

// What the device reads for itself may change until it has: the copy is what counts.
TEST_P(PageIntakeSuite, RegisteredMemoryIsReadInPlaceAndItsCopyIsJudged) {
  if (!device_->info().registers) GTEST_SKIP() << "this device registers no memory";
  std::mt19937_64 rng(kSeed);
  const auto intake = PageIntake::Make(*device_).value();
  std::vector<std::byte> extent(1 << 16);
  void* const aligned_at = extent.data();
  void* base = aligned_at;
  size_t room = extent.size();
  ASSERT_NE(std::align(4096, 1 << 14, base, room), nullptr);
  auto* const host = static_cast<std::byte*>(base);
  ASSERT_TRUE(intake->Register({host, 1 << 14}).ok());
  std::vector<Page> pages;
  for (int i = 0; i < 3; ++i) pages.push_back(MakePage(rng, 0, 16));
  for (int i = 0; i < 3; ++i) {
    std::byte* const at = i < 2 ? host + i * kFrameBytes : host + (1 << 14) + 64;  // beyond it
    std::memcpy(at, pages[i].k.data(), 16 * kRowBytes);
    std::memcpy(at + 16 * kRowBytes, pages[i].v.data(), 16 * kRowBytes);
    pages[i].incoming.k_rows = {at, 16 * kRowBytes};
    pages[i].incoming.v_rows = {at + 16 * kRowBytes, 16 * kRowBytes};
    pages[i].incoming.frame = Room<std::byte>(kFrameBytes);
  }
  const PageIntake::Ticket first = intake->Add(pages[0].incoming).value();
  ASSERT_TRUE(intake->Settle(first).ok());
  EXPECT_TRUE(intake->intact(first));
  EXPECT_EQ(intake->landed_bytes(), 0u);
  EXPECT_EQ(intake->direct_bytes(), 2 * 16 * kRowBytes);
  const PageIntake::Ticket second = intake->Add(pages[1].incoming).value();
  const PageIntake::Ticket third = intake->Add(pages[2].incoming).value();
  host[kFrameBytes + 100] ^= std::byte{1};  // reused before the device came to read it
  host[(1 << 14) + 64 + 100] ^= std::byte{1};
  ASSERT_TRUE(intake->Settle(third).ok());
  EXPECT_FALSE(intake->intact(second));
  EXPECT_TRUE(intake->intact(third));  // was landed
  ExpectFrame(pages[0].incoming.frame, pages[0]);
  intake->Forget(host);
  intake->Forget(host);
}

// More than both halves hold, without a turn of the caller in between.
TEST_P(PageIntakeSuite, MoreThanTheLandingBufferHoldsArrivesAllTheSame) {
  std::mt19937_64 rng(kSeed);
  const auto intake = PageIntake::Make(*device_, 16384).value();
  std::vector<Page> pages;
  for (int i = 0; i < 40; ++i) {
    pages.push_back(MakePage(rng, 0, static_cast<uint8_t>(1 + i % 16)));
    pages[i].incoming.frame = Room<std::byte>(kFrameBytes);
    ASSERT_TRUE(intake->Add(pages[i].incoming).has_value());
  }
  ASSERT_TRUE(intake->Settle(40).ok());
  EXPECT_GT(intake->landed_bytes(), 4 * 16384u);
  for (size_t i = 0; i < pages.size(); ++i) {
    EXPECT_TRUE(intake->intact(i + 1)) << i;
    ExpectFrame(pages[i].incoming.frame, pages[i]);
  }
}

INSTANTIATE_DEVICES(DevicePagesSuite);
INSTANTIATE_DEVICES(PageIntakeSuite);

}  // namespace
}  // namespace icecache::gpu
