// The forward pass of every supported family on a Device: what LoadModel is for the CPU.
//
// Weights are copied once, in their own dtype; activations are f32. A token's layer is two recorded
// pieces of work around the attention (CUDA graphs on a GPU), so a decode step costs two launches
// and one wait per layer beyond its attention: q must reach the host to be sent to the cache
// server. Blocks of tokens are queued kernel by
// kernel and multiply through cuBLAS where it exists, which rounds activations to 16-bit weights'
// type.
#pragma once

#include <memory>
#include <string>

#include "kernels/gpu/device.h"
#include "worker/model/model.h"

namespace icecache {

// Borrows the device, which must outlive the model. RESOURCE_EXHAUSTED when the weights do not fit
// below its bound; else errors as LoadModel. The q, k, v and out that attention gets lie in pinned
// memory, but for the out of a Step whose attention writes on the device: it stays there.
Result<std::unique_ptr<Model>> LoadDeviceModel(const std::string& directory,
                                               const ModelOptions& options, gpu::Device& device);

}  // namespace icecache
