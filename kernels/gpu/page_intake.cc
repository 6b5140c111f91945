#include "kernels/gpu/page_intake.h"

#include <cstring>
#include <utility>

#include "kernels/gpu/aligned.h"
#include "kernels/int8_rows.h"

namespace icecache::gpu {
namespace {

// What a page adds to a half besides its bytes: two spans, an entry to verify, padding.
constexpr size_t kPerPage = 2 * sizeof(CopySpan) + sizeof(PageToVerify) + 4 * kPartAlignment;

static_assert(2 * limits::kLandingBytes / kPerPage < limits::kIntakePagesMax);

}  // namespace

Result<std::unique_ptr<PageIntake>> PageIntake::Make(Device& device, size_t landing_bytes) {
  KV_CHECK(landing_bytes <= limits::kLandingBytes);
  std::unique_ptr<PageIntake> intake(new PageIntake(device));
  for (Half& half : intake->halves_) {
    KV_ASSIGN_OR_RETURN(half.pinned,
                        DeviceMemory::Allocate(device, MemoryKind::kPinned, landing_bytes));
    KV_ASSIGN_OR_RETURN(half.device,
                        DeviceMemory::Allocate(device, MemoryKind::kDevice, landing_bytes));
  }
  const size_t bytes = limits::kIntakePagesMax * sizeof(uint32_t);
  KV_ASSIGN_OR_RETURN(intake->verdicts_,
                      DeviceMemory::Allocate(device, MemoryKind::kPinned, bytes));
  std::memset(intake->verdicts_.data(), 0, bytes);
  return intake;
}

PageIntake::~PageIntake() {
  while (!registered_.empty()) Forget(registered_.begin()->first);
}

Status PageIntake::Register(std::span<const std::byte> host) {
  KV_ASSIGN_OR_RETURN(const std::byte* const seen, device_.Register(host, Mapping::kReadOnly));
  registered_[host.data()] = {host.size(), seen};
  return OkStatus();
}

void PageIntake::Forget(const std::byte* host) {
  if (registered_.erase(host) == 0) return;
  device_.Unregister(host);
}

// Where the device finds registered bytes; null when it does not.
const std::byte* PageIntake::Source(std::span<const std::byte> bytes) {
  auto it = registered_.upper_bound(bytes.data());
  if (it == registered_.begin()) return nullptr;
  --it;
  const auto& [size, seen] = it->second;
  const auto offset = static_cast<size_t>(bytes.data() - it->first);
  if (offset > size || bytes.size() > size - offset) return nullptr;
  direct_bytes_ += bytes.size();
  return seen + offset;
}

// The copy in the pinned half.
std::byte* PageIntake::Land(std::span<const std::byte> bytes) {
  Half& half = halves_[filling_];
  std::byte* const at = half.pinned.data(half.used);
  std::memcpy(at, bytes.data(), bytes.size());
  half.used += Aligned(bytes.size());
  landed_bytes_ += bytes.size();
  return at;
}

// For a page of so many bytes, in the half that is being filled.
Status PageIntake::MakeRoom(size_t bytes) {
  const size_t lists = spans_.size() * sizeof(CopySpan) + pages_.size() * sizeof(PageToVerify);
  const size_t needed = bytes + lists + 2 * kPerPage;
  const size_t room = halves_[filling_].pinned.bytes();
  KV_CHECK(bytes + 2 * kPerPage <= room);
  if (halves_[filling_].used + needed <= room) return OkStatus();
  KV_RETURN_IF_ERROR(Flush());
  filling_ = 1 - filling_;
  return halves_[filling_].used == 0 ? OkStatus() : Settle(next_ - 1);
}

std::optional<PageIntake::Ticket> PageIntake::Add(const IncomingPage& page) {
  const size_t bytes = page.coded.size() + page.k_rows.size() + page.v_rows.size();
  if (error_.ok()) error_ = MakeRoom(bytes);
  if (!error_.ok()) return std::nullopt;
  Half& half = halves_[filling_];
  const size_t used = half.used;
  const size_t row_bytes = page.dim * size_t{DTypeBytes(page.dtype)};
  std::byte* const v_frame = page.frame + limits::kPageTokens * row_bytes;
  const auto on_device = [&half](const std::byte* landed) {
    return half.device.data(static_cast<size_t>(landed - half.pinned.data()));
  };
  PageToVerify verify;
  if (!page.coded.empty()) {
    // Checked where nobody else can change it.
    const std::byte* const landed = Land(page.coded);
    if (!CheckInt8Rows({landed, page.coded.size()}, page.dtype, page.fill, page.dim)) {
      half.used = used;
      return std::nullopt;
    }
    verify.k = on_device(landed);
    verify.k_bytes = static_cast<uint32_t>(page.coded.size());
    spans_.push_back({verify.k, page.frame, verify.k_bytes, page.fill, page.dtype, page.dim});
  } else {
    verify.k = page.frame;
    verify.v = v_frame;
    verify.k_bytes = verify.v_bytes = static_cast<uint32_t>(page.fill * row_bytes);
    for (const auto& [rows, to] : {std::pair(page.k_rows, page.frame), {page.v_rows, v_frame}}) {
      const std::byte* from = page.on_device ? rows.data() : Source(rows);
      if (from == nullptr) from = on_device(Land(rows));
      if (page.on_device) pushed_bytes_ += rows.size();
      spans_.push_back({from, to + page.from * row_bytes, static_cast<uint32_t>(rows.size())});
    }
  }
  verify.seed = PageNameSeed(page.name);
  verify.expected = page.checksum;
  verify.verdict = verdicts_.data<uint32_t>() + next_ % limits::kIntakePagesMax;
  *verify.verdict = 0;
  verify.fill = page.fill;
  std::memcpy(verify.positions, page.positions, page.fill * sizeof(uint32_t));
  pages_.push_back(verify);
  return next_++;
}

Status PageIntake::Flush() {
  KV_RETURN_IF_ERROR(std::exchange(error_, OkStatus()));
  if (pages_.empty()) return OkStatus();
  Half& half = halves_[filling_];
  const size_t spans_at = half.used;
  const size_t pages_at = spans_at + Aligned(spans_.size() * sizeof(CopySpan));
  half.used = pages_at + Aligned(pages_.size() * sizeof(PageToVerify));
  std::memcpy(half.pinned.data(spans_at), spans_.data(), spans_.size() * sizeof(CopySpan));
  std::memcpy(half.pinned.data(pages_at), pages_.data(), pages_.size() * sizeof(PageToVerify));
  device_.Copy(half.device.data(half.flushed), half.pinned.data(half.flushed),
               half.used - half.flushed);
  half.flushed = half.used;
  device_.Launch(
      CopyArgs{half.device.data<CopySpan>(spans_at), static_cast<uint32_t>(spans_.size())});
  device_.Launch(
      VerifyArgs{half.device.data<PageToVerify>(pages_at), static_cast<uint32_t>(pages_.size())});
  spans_.clear();
  pages_.clear();
  return OkStatus();
}

Status PageIntake::Settle(Ticket ticket) {
  KV_RETURN_IF_ERROR(Flush());
  if (ticket <= settled_) return OkStatus();
  KV_RETURN_IF_ERROR(device_.Synchronize());
  settled_ = next_ - 1;
  for (Half& half : halves_) half.used = half.flushed = 0;
  return OkStatus();
}

bool PageIntake::intact(Ticket ticket) const {
  KV_CHECK(ticket > 0 && ticket <= settled_);
  return next_ - ticket < limits::kIntakePagesMax &&
         verdicts_.data<uint32_t>()[ticket % limits::kIntakePagesMax] == kPageIntact;
}

}  // namespace icecache::gpu
