// Energy, gradient and whole Langevin chains of nets on the CPU. No Python here.
//
// The nodes are mmebm/ops/net/graph.py, the rule mmebm/ops/langevin_step/reference.py, the noise mmebm/noise.py; how it is
// done, see cpu_kernel.cpp.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "net/job.h"

namespace mmebm {

enum class NetNodeKind { input, view, conv, linear, activation, add, affine, product, map, norm, logsumexp };
// The same by name.
constexpr const char* NET_NODE_KINDS[] = {"input",  "view",    "conv", "linear", "activation", "add",
                                          "affine", "product", "map",  "norm",   "logsumexp"};

// A node as the caller describes it; fields as the kind needs them. Addresses are the caller's.
struct NetSpec {
  NetNodeKind kind = NetNodeKind::input;
  std::vector<int32_t> xs;
  int64_t channels = 1, height = 1, width = 1;  // the shape it has as (channels, height, width), row-major
  int64_t start = 0;                            // input
  const float *weight = nullptr, *bias = nullptr;
  int64_t sizes[4] = {1, 1, 1, 1};  // of a convolution's weight
  int64_t stride[2] = {1, 1}, padding[2] = {0, 0}, dilation[2] = {1, 1};
  int64_t groups = 1;  // convolution, norm
  bool transposed = false;
  bool divide = false;  // of a product: by the second
  bool tiles = true;  // a convolution may be taken in tiles (NetWinograd), which rounds otherwise
  int32_t function = -1;
  float slope = 0.0f, eps = 0.0f;
  std::vector<float> coefficients;
  const float *scale = nullptr, *shift = nullptr;
  bool scale_per_chain = false, shift_per_chain = false;
  const int64_t* index = nullptr;       // (elements, terms)
  const float* index_weight = nullptr;  // the same, or null
  int64_t terms = 0;

  int64_t elements() const { return channels * height * width; }
};

// Runs `job` on up to `threads` threads. Throws std::invalid_argument where an index is out of range or sizes do not
// fit together, and std::bad_alloc where a net needs more memory than there is.
void run_net(ChainJob job, const std::vector<NetSpec>& nodes, Isa isa, int threads);

}  // namespace mmebm
