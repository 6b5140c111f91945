// Saved indexes. Input: one byte for the policy, then the image, which is run as it is and with its
// length and checksum made right.
#include "tests/fuzz/fuzz_target.h"
#include "tests/fuzz/sealed.h"
#include "tests/support/forged_index.h"

namespace icecache::fuzz {
namespace {

// Of each policy.
const std::vector<std::vector<forged::Built>>& Seeds() {
  static const std::vector<std::vector<forged::Built>> seeds = [] {
    std::vector<std::vector<forged::Built>> all;
    for (const PolicyKind kind : AllPolicyKinds()) {
      all.emplace_back();
      for (const uint32_t count : {0u, 5u, forged::kTokensMax})
        all.back().push_back(forged::Build(kind, count));
    }
    return all;
  }();
  return seeds;
}

std::vector<std::string> Images() {
  std::vector<std::string> images;
  for (size_t kind = 0; kind < Seeds().size(); ++kind)
    for (const forged::Built& built : Seeds()[kind])
      images.push_back(std::string(1, static_cast<char>(kind)) + built.image);
  return images;
}

void CheckInput(const std::string& input) {
  if (input.empty()) return;
  const size_t kind = static_cast<uint8_t>(input[0]) % Seeds().size();
  const std::string image = input.substr(1);
  for (const forged::Built& built : Seeds()[kind]) {
    for (const std::string& variant : {image, Sealed(image, forged::kLengthAt)}) {
      const std::string broken = forged::Use(AllPolicyKinds()[kind], variant, built);
      if (!broken.empty()) Broken(broken.c_str());
    }
  }
}

}  // namespace

std::vector<Target> Targets() { return {{"image", Images(), CheckInput}}; }

}  // namespace icecache::fuzz
