// Whole Langevin chains on a sum of MLP terms on the CPU, and one evaluation of it. No Python here.
//
// The rule is mmebm/reference/langevin_mlp.py, the noise mmebm/noise.py; how it is done, see langevin_mlp_kernel.h.
#pragma once

#include <cstdint>
#include <vector>

#include "langevin_mlp_job.h"

namespace mmebm {

// A term with the layers its `layers` will point to.
struct MlpStackTerm {
  MlpTerm term;
  std::vector<MlpLayer> layers;
};

// Runs `job` (its terms are filled in here) on up to `threads` threads.
void langevin_mlp(MlpJob job, std::vector<MlpStackTerm>& terms, Isa isa, int threads);

// value and derivative of an activation, n numbers each.
void mlp_activation(Activation kind, float slope, const float* in, float* value, float* derivative, int64_t n, Isa isa);

}  // namespace mmebm
