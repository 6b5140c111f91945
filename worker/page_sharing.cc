#include "worker/page_sharing.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "common/limits.h"
#include "common/log.h"
#include "kernels/gpu/memory_handle.h"

namespace icecache {
namespace {

constexpr uint64_t kFramesMin = 64;

}  // namespace

Result<std::unique_ptr<PageSharing>> PageSharing::Make(gpu::Device& device,
                                                       gpu::DeviceFrames& frames,
                                                       const ModelShape& shape, uint64_t bytes) {
  const uint64_t count = bytes / shape.page_bytes();
  if (count < kFramesMin || count > limits::kSharedFramesMax) {
    return InvalidArgument(std::to_string(bytes) + " bytes are " + std::to_string(count) +
                           " frames to share, expected " + std::to_string(kFramesMin) + " to " +
                           std::to_string(limits::kSharedFramesMax));
  }
  KV_ASSIGN_OR_RETURN(PageDirectory directory,
                      PageDirectory::Make(shape, static_cast<uint32_t>(count)));
  std::unique_ptr<PageSharing> sharing(new PageSharing(device, shape, std::move(directory)));
  KV_ASSIGN_OR_RETURN(sharing->shared_, frames.Share(count * shape.page_bytes()));
  KV_ASSIGN_OR_RETURN(sharing->offer_.memory, device.Export(sharing->shared_.data()));
  const auto name = std::as_bytes(std::span(&sharing->directory_.name(), 1));
  static_assert(sizeof(SharedMemoryName) <= limits::kDirectoryNameBytesMax);
  sharing->offer_.directory.assign(name.begin(), name.end());
  sharing->offer_.host = gpu::HostIdentity();
  return sharing;
}

Status PageSharing::Open(const wire::SharedFrames& named, Other* other) {
  SharedMemoryName name;
  if (named.directory.size() != sizeof(name)) {
    return InvalidArgument("a directory's name of " + std::to_string(named.directory.size()) +
                           " bytes, expected " + std::to_string(sizeof(name)));
  }
  std::memcpy(&name, named.directory.data(), sizeof(name));
  KV_ASSIGN_OR_RETURN(PageDirectoryView directory, PageDirectoryView::Open(name, shape_));
  KV_ASSIGN_OR_RETURN(const std::span<std::byte> frames, device_.Open(named.memory));
  if (frames.size() / shape_.page_bytes() < directory.frame_count()) {
    device_.Close(frames.data());
    return InvalidArgument("a directory of more frames than there are");
  }
  other->frames = frames;
  other->directory.emplace(std::move(directory));
  return OkStatus();
}

void PageSharing::SetOthers(const std::vector<wire::SharedFrames>& others) {
  std::erase_if(others_, [&](auto& known) {
    const bool named = std::any_of(others.begin(), others.end(), [&](const auto& other) {
      return other.id == known.first && other.memory == known.second.named.memory &&
             other.directory == known.second.named.directory;
    });
    if (!named && !known.second.frames.empty()) device_.Close(known.second.frames.data());
    return !named;
  });
  for (const wire::SharedFrames& named : others) {
    if (others_.contains(named.id) || others_.size() >= limits::kSharingWorkersMax) continue;
    Other& other = others_[named.id];
    other.named = named;
    const Status opened = Open(named, &other);
    (opened.ok() ? LogInfo : LogWarn)(
        "another worker's pages", {{"id", std::to_string(named.id)},
                                   {"used", opened.ok() ? "yes" : "no"},
                                   {"reason", opened.ok() ? "of this host" : opened.ToString()}});
  }
}

uint32_t PageSharing::other_count() const {
  return static_cast<uint32_t>(std::count_if(others_.begin(), others_.end(), [](const auto& other) {
    return other.second.directory.has_value();
  }));
}

std::optional<uint32_t> PageSharing::Publish(uint32_t slice, const std::byte* at,
                                             DirectoryPage page) {
  if (at < shared_.data() || at >= shared_.data() + shared_.size()) return std::nullopt;
  const auto offset = static_cast<uint64_t>(at - shared_.data());
  KV_CHECK(offset % shape_.page_bytes() == 0);
  page.frame = static_cast<uint32_t>(offset / shape_.page_bytes());
  return directory_.Publish(slice, page);
}

void PageSharing::List(uint32_t slice, std::span<const SegmentId> segments,
                       std::vector<Offer>* offers) const {
  const size_t first = offers->size();
  for (const auto& [id, other] : others_) {
    if (!other.directory.has_value()) continue;
    other.directory->List(
        slice, [&, owner = id](const DirectoryPage& page, const DirectoryRef& ref) {
          if (std::find(segments.begin(), segments.end(), page.segment) == segments.end()) return;
          offers->push_back({{page.segment, page.page, page.version, page.fill}, {owner, ref}});
        });
  }
  // Several workers, or sequences of one, may hold the same page.
  const auto begin = offers->begin() + static_cast<ptrdiff_t>(first);
  std::sort(begin, offers->end(), [](const Offer& a, const Offer& b) {
    if (a.page.segment != b.page.segment) return a.page.segment < b.page.segment;
    if (a.page.page != b.page.page) return a.page.page < b.page.page;
    if (a.page.version != b.page.version) return a.page.version > b.page.version;
    return a.page.fill > b.page.fill;
  });
  offers->erase(std::unique(begin, offers->end(),
                            [](const Offer& a, const Offer& b) {
                              return a.page.segment == b.page.segment && a.page.page == b.page.page;
                            }),
                offers->end());
  if (offers->size() - first > limits::kOfferedPagesMax) {
    offers->resize(first + limits::kOfferedPagesMax);
  }
}

std::optional<PageSharing::Found> PageSharing::Find(const Place& place) const {
  const auto owner = others_.find(place.owner);
  if (owner == others_.end() || !owner->second.directory.has_value()) return std::nullopt;
  const auto page = owner->second.directory->Read(place.ref);
  if (!page.has_value()) return std::nullopt;
  return Found{*page, owner->second.frames.data() + page->frame * shape_.page_bytes()};
}

bool PageSharing::Unchanged(const Place& place) const {
  const auto owner = others_.find(place.owner);
  return owner != others_.end() && owner->second.directory.has_value() &&
         owner->second.directory->Unchanged(place.ref);
}

}  // namespace icecache
