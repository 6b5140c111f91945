#include "kernels/gpu/attention_gpu.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "kernels/gpu/aligned.h"
#include "kernels/gpu/device_frames.h"

namespace icecache::gpu {
namespace {

constexpr uint32_t kSplitsMax = 64;
constexpr uint32_t kPagesPerSplitMin = 8;  // two per warp: less is all overhead

class GpuAttention final : public AttentionBackend {
 public:
  GpuAttention(Device& device, DeviceFrames* frames)
      : device_(device),
        frames_(frames),
        name_(device.info().name.substr(0, device.info().name.find(':'))) {}

  const char* name() const override { return name_.c_str(); }
  bool on_device() const override { return true; }

  Status Start(std::span<const AttentionItem> items) override {
    Plan(items);
    if (tasks_.empty()) return OkStatus();
    KV_RETURN_IF_ERROR(Reclaim());
    if (flights_open_ == flights_.size()) flights_.emplace_back();
    Flight& flight = flights_[flights_open_];
    KV_RETURN_IF_ERROR(Stage(items, &flight));
    if (frames_ != nullptr) KV_RETURN_IF_ERROR(frames_->QueueCopies(&flight.dirty));
    Queue(flight);
    ++flights_open_;
    return OkStatus();
  }

  Status Finish() override {
    const size_t open = std::exchange(flights_open_, 0);
    if (open == 0) return OkStatus();
    for (size_t f = 0; f < open; ++f) KV_RETURN_IF_ERROR(QueueReturn(&flights_[f]));
    KV_RETURN_IF_ERROR(device_.Synchronize());
    for (size_t f = 0; f < open; ++f) AddResults(flights_[f]);
    return OkStatus();
  }

  Status FinishTo(std::span<const AttentionResult> results) override {
    const Status reclaimed = Reclaim();
    const Status queued = reclaimed.ok() ? QueueMerge(results) : reclaimed;
    flights_open_ = 0;
    in_use_until_ = device_.synchronize_count() + 1;
    return queued;
  }

 private:
  // One page of a task: where its rows are, and where they go in the staging memory.
  struct Source {
    PageView host;
    size_t staged = 0;  // offset of K, then V; not used when the frame is on the device
    const std::byte* device_k = nullptr;
    const std::byte* device_v = nullptr;
  };

  // The offsets of the parts of the staging memory.
  struct Layout {
    size_t queries = 0, tasks = 0, pages = 0, rows = 0, bytes = 0;
  };

  // Where results of a task go.
  struct Target {
    uint32_t head = 0;  // first, within the flight's states
    AttentionStateRef states;
  };
  // What was started and is not finished, with memory of its own.
  struct Flight {
    DeviceMemory pinned, staged;  // the same layout on both sides
    DeviceMemory dirty;           // pinned: what goes to frames of the device
    DeviceMemory states;          // [splits] x states
    DeviceMemory results;         // pinned: states; for Finish
    uint32_t heads = 0;
    uint32_t head_dim = 0;
    uint32_t splits = 1;
    std::vector<Target> targets;

    size_t floats() const { return AttentionStates::FlatFloats(heads, head_dim); }
  };
  // A term of the merge, and the head of all results that it belongs to.
  struct Contribution {
    uint32_t head = 0;
    HeadTerm term;
  };

  void Plan(std::span<const AttentionItem> items);
  void AddPage(const PageView& page, size_t row_bytes);
  Status Stage(std::span<const AttentionItem> items, Flight* flight);
  void Queue(const Flight& flight);
  Status QueueReturn(Flight* flight);
  static void AddResults(const Flight& flight);

  Status Reclaim();
  void ListFlights(std::span<const AttentionResult> results);
  Status QueueMerge(std::span<const AttentionResult> results);

  Device& device_;
  DeviceFrames* const frames_;
  const std::string name_;

  // Of the call at hand.
  DType dtype_ = DType::kF16;
  uint32_t head_dim_ = 0;
  uint32_t heads_ = 0;
  std::vector<AttendTask> tasks_;
  std::vector<size_t> item_of_;  // per task
  std::vector<Source> sources_;
  size_t staged_bytes_ = 0;
  Layout layout_;

  std::deque<Flight> flights_;  // memory is kept from call to call; as many as were ever open
  size_t flights_open_ = 0;
  // Of FinishTo: the lists of the merge. Queued work reads them and the flights until the device
  // was synchronized so often.
  DeviceMemory merge_pinned_, merge_staged_;
  std::vector<Contribution> contributions_;
  std::vector<MergedHead> merged_;
  std::vector<HeadTerm> terms_;
  std::vector<uint32_t> first_head_;  // of each result
  uint64_t in_use_until_ = 0;
};

void GpuAttention::AddPage(const PageView& page, size_t row_bytes) {
  Source source{page, staged_bytes_, nullptr, nullptr};
  if (frames_ != nullptr) {
    source.device_k = frames_->OnDevice(page.k);
    source.device_v = frames_->OnDevice(page.v);
  }
  if (source.device_k == nullptr || source.device_v == nullptr) {
    source.device_k = source.device_v = nullptr;
    staged_bytes_ += 2 * page.fill * row_bytes;
  }
  sources_.push_back(source);
}

void GpuAttention::Plan(std::span<const AttentionItem> items) {
  tasks_.clear();
  item_of_.clear();
  sources_.clear();
  heads_ = 0;
  staged_bytes_ = 0;
  for (size_t i = 0; i < items.size(); ++i) {
    const AttentionItem& item = items[i];
    if (item.rows.count == 0 && item.pages.empty()) continue;
    const DType dtype = item.rows.count > 0 ? item.rows.dtype : item.kv.dtype;
    KV_CHECK(item.states.heads <= kTaskRows);
    KV_CHECK(tasks_.empty() || (dtype == dtype_ && item.states.head_dim == head_dim_));
    dtype_ = dtype;
    head_dim_ = item.states.head_dim;
    AttendTask task;
    task.head = heads_;
    task.rows = item.states.heads;
    task.page_begin = static_cast<uint32_t>(sources_.size());
    const size_t row_bytes = size_t{head_dim_} * DTypeBytes(dtype);
    for (uint32_t r = 0; r < item.rows.count; r += limits::kPageTokens) {
      const uint32_t fill = std::min(limits::kPageTokens, item.rows.count - r);
      AddPage({item.rows.k + r * row_bytes, item.rows.v + r * row_bytes, fill}, row_bytes);
    }
    for (const PageId id : item.pages) {
      KV_CHECK(id.value < item.kv.page_count);
      const PageView& page = item.kv.pages[id.value];
      KV_CHECK(page.k != nullptr && page.fill <= limits::kPageTokens);
      AddPage(page, row_bytes);
    }
    task.page_end = static_cast<uint32_t>(sources_.size());
    heads_ += task.rows;
    tasks_.push_back(task);
    item_of_.push_back(i);
  }
}

Status GpuAttention::Stage(std::span<const AttentionItem> items, Flight* flight) {
  layout_.queries = 0;
  layout_.tasks = Aligned(size_t{heads_} * head_dim_ * sizeof(float));
  layout_.pages = layout_.tasks + Aligned(tasks_.size() * sizeof(AttendTask));
  layout_.rows = layout_.pages + Aligned(sources_.size() * sizeof(PageView));
  layout_.bytes = layout_.rows + staged_bytes_;
  const auto grow = [&](MemoryKind kind, size_t bytes, DeviceMemory* memory) {
    return DeviceMemory::Grow(device_, kind, bytes, memory);
  };
  KV_RETURN_IF_ERROR(grow(MemoryKind::kPinned, layout_.bytes, &flight->pinned));
  KV_RETURN_IF_ERROR(grow(MemoryKind::kDevice, layout_.bytes, &flight->staged));
  const DeviceMemory& pinned = flight->pinned;
  flight->heads = heads_;
  flight->head_dim = head_dim_;
  flight->targets.clear();
  for (size_t t = 0; t < tasks_.size(); ++t) {
    const size_t floats = size_t{tasks_[t].rows} * head_dim_;
    std::memcpy(pinned.data<float>(layout_.queries) + size_t{tasks_[t].head} * head_dim_,
                items[item_of_[t]].queries, floats * sizeof(float));
    flight->targets.push_back({tasks_[t].head, items[item_of_[t]].states});
  }
  std::memcpy(pinned.data(layout_.tasks), tasks_.data(), tasks_.size() * sizeof(AttendTask));
  auto* const pages = pinned.data<PageView>(layout_.pages);
  for (size_t p = 0; p < sources_.size(); ++p) {
    const Source& source = sources_[p];
    if (source.device_k != nullptr) {
      pages[p] = {source.device_k, source.device_v, source.host.fill};
      continue;
    }
    const size_t bytes = source.host.fill * size_t{head_dim_} * DTypeBytes(dtype_);
    const size_t at = layout_.rows + source.staged;
    std::memcpy(pinned.data(at), source.host.k, bytes);
    std::memcpy(pinned.data(at + bytes), source.host.v, bytes);
    pages[p] = {flight->staged.data(at), flight->staged.data(at + bytes), source.host.fill};
  }
  uint32_t pages_max = 0;
  for (const AttendTask& task : tasks_) {
    pages_max = std::max(pages_max, task.page_end - task.page_begin);
  }
  const size_t state_bytes = AttentionStates::FlatFloats(heads_, head_dim_) * sizeof(float);
  flight->splits =
      SplitsFor(device_.info().processors, static_cast<uint32_t>(tasks_.size()), pages_max);
  return grow(MemoryKind::kDevice, flight->splits * state_bytes, &flight->states);
}

void GpuAttention::Queue(const Flight& flight) {
  device_.Copy(flight.staged.data(), flight.pinned.data(), layout_.bytes);
  AttendArgs args;
  args.queries = flight.staged.data<float>(layout_.queries);
  args.tasks = flight.staged.data<AttendTask>(layout_.tasks);
  args.pages = flight.staged.data<PageView>(layout_.pages);
  args.states = flight.states.data<float>();
  args.dtype = dtype_;
  args.task_count = static_cast<uint32_t>(tasks_.size());
  args.heads = heads_;
  args.group = args.query_heads = kTaskRows;  // a task's rows are neighbours
  args.head_dim = head_dim_;
  args.splits = flight.splits;
  device_.Launch(args);
}

Status GpuAttention::QueueReturn(Flight* flight) {
  const size_t bytes = flight->floats() * sizeof(float);
  KV_RETURN_IF_ERROR(DeviceMemory::Grow(device_, MemoryKind::kPinned, bytes, &flight->results));
  auto* const states = flight->states.data<float>();
  if (flight->splits > 1) {
    MergeArgs merge;
    merge.terms[0] = {states, flight->splits};
    merge.term_count = 1;
    merge.heads = flight->heads;
    merge.head_dim = flight->head_dim;
    merge.state = states;
    device_.Launch(merge);
  }
  device_.Copy(flight->results.data(), states, bytes);
  return OkStatus();
}

void GpuAttention::AddResults(const Flight& flight) {
  float* const max = flight.results.data<float>();
  float* const denom = max + flight.heads;
  float* const out = denom + flight.heads;
  for (const Target& target : flight.targets) {
    const size_t head = target.head;
    MergeStates({target.states.heads, flight.head_dim, max + head, denom + head,
                 out + head * flight.head_dim},
                target.states);
  }
}

// What the last FinishTo left in the queue has to be over before its memory is written again. In a
// model it is: q, k and v of the next layer were waited for.
Status GpuAttention::Reclaim() {
  if (device_.synchronize_count() >= in_use_until_) return OkStatus();
  return device_.Synchronize();
}

// Heads of all results count through; targets are parts of some result's states, or of none.
void GpuAttention::ListFlights(std::span<const AttentionResult> results) {
  size_t r = 0;  // neighbours are likely to be of one result
  const auto find = [&](const float* max) {
    for (size_t tried = 0; tried < results.size(); ++tried, r = (r + 1) % results.size()) {
      const AttentionStateRef& states = results[r].states;
      if (std::less_equal<>()(states.max, max) && std::less<>()(max, states.max + states.heads)) {
        return true;
      }
    }
    return false;
  };
  for (size_t f = 0; f < flights_open_; ++f) {
    const Flight& flight = flights_[f];
    for (const Target& target : flight.targets) {
      if (!find(target.states.max)) continue;
      const auto first = static_cast<uint32_t>(target.states.max - results[r].states.max);
      KV_CHECK(first + target.states.heads <= results[r].states.heads);
      for (uint32_t h = 0; h < target.states.heads; ++h) {
        for (uint32_t split = 0; split < flight.splits; ++split) {
          const float* const states = flight.states.data<float>() + split * flight.floats();
          contributions_.push_back(
              {first_head_[r] + first + h, {states, flight.heads, target.head + h}});
        }
      }
    }
  }
}

Status GpuAttention::QueueMerge(std::span<const AttentionResult> results) {
  contributions_.clear();
  first_head_.clear();
  uint32_t heads = 0, dim = 0;
  for (const AttentionResult& result : results) {
    KV_CHECK(dim == 0 || dim == result.states.head_dim);
    dim = result.states.head_dim;
    first_head_.push_back(heads);
    heads += result.states.heads;
  }
  if (heads == 0) return OkStatus();
  ListFlights(results);
  // Room for a term per head besides: what the states hold on the host.
  const size_t terms_at = Aligned(heads * sizeof(MergedHead));
  const size_t states_at = terms_at + Aligned((contributions_.size() + heads) * sizeof(HeadTerm));
  const size_t bytes = states_at + AttentionStates::FlatFloats(heads, dim) * sizeof(float);
  KV_RETURN_IF_ERROR(DeviceMemory::Grow(device_, MemoryKind::kPinned, bytes, &merge_pinned_));
  KV_RETURN_IF_ERROR(DeviceMemory::Grow(device_, MemoryKind::kDevice, bytes, &merge_staged_));
  auto* const max = merge_pinned_.data<float>(states_at);
  merged_.clear();
  for (const AttentionResult& result : results) {
    for (uint32_t h = 0; h < result.states.heads; ++h) {
      const auto head = static_cast<uint32_t>(merged_.size());
      merged_.push_back({0, 0, result.out + size_t{h} * dim});
      if (!(result.states.denom[h] > 0)) continue;
      max[head] = result.states.max[h];
      max[heads + head] = result.states.denom[h];
      std::memcpy(max + 2 * size_t{heads} + size_t{head} * dim, result.states.row(h),
                  dim * sizeof(float));
      contributions_.push_back({head, {merge_staged_.data<float>(states_at), heads, head}});
    }
  }
  // Sorted by head: count, then place.
  for (const Contribution& c : contributions_) ++merged_[c.head].term_end;
  uint32_t begin = 0;
  for (MergedHead& head : merged_) {
    head.term_begin = begin;
    begin += std::exchange(head.term_end, begin);
  }
  terms_.resize(contributions_.size());
  for (const Contribution& c : contributions_) terms_[merged_[c.head].term_end++] = c.term;
  std::memcpy(merge_pinned_.data(), merged_.data(), heads * sizeof(MergedHead));
  std::memcpy(merge_pinned_.data(terms_at), terms_.data(), terms_.size() * sizeof(HeadTerm));
  device_.Copy(merge_staged_.data(), merge_pinned_.data(), bytes);
  MergeHeadsArgs args;
  args.heads = merge_staged_.data<MergedHead>();
  args.terms = merge_staged_.data<HeadTerm>(terms_at);
  args.head_count = heads;
  args.head_dim = dim;
  device_.Launch(args);
  return OkStatus();
}

}  // namespace

uint32_t SplitsFor(uint32_t processors, uint32_t tasks, uint32_t pages) {
  const uint32_t wanted = 2 * processors / std::max(1u, tasks);
  return std::clamp(std::min(wanted, pages / kPagesPerSplitMin), 1u, kSplitsMax);
}

std::unique_ptr<AttentionBackend> MakeGpuAttention(Device& device, DeviceFrames* frames) {
  return std::make_unique<GpuAttention>(device, frames);
}

}  // namespace icecache::gpu
