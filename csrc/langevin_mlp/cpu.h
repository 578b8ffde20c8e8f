// Whole Langevin chains on a sum of MLP terms on the CPU, and one evaluation of it. No Python here.
//
// The rule is mmebm/ops/langevin_mlp/reference.py, the noise mmebm/noise.py; cpu_kernel.cpp says how it is done.
#pragma once

#include <cstdint>
#include <vector>

#include "langevin_mlp/job.h"

namespace mmebm {

// A term with the layers its `layers` will point to.
struct MlpStackTerm {
  MlpTerm term;
  std::vector<MlpLayer> layers;
};

// Runs `job` (its terms are filled in here) on up to `threads` threads.
void langevin_mlp(MlpJob job, std::vector<MlpStackTerm>& terms, Isa isa, int threads);

// In how many tiles, each the work of one thread, it cuts the chains where there are threads for them.
int64_t mlp_tiles(int64_t chains, Isa isa);

// value and derivative of an activation, n numbers each.
void mlp_activation(Activation kind, float slope, const float* in, float* value, float* derivative, int64_t n, Isa isa);

}  // namespace mmebm
