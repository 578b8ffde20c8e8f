// Likelihood residuals of all modalities on the CPU: value per chain and gradient. No Python here.
//
// The terms are those of mmebm/reference/residual.py; how they are computed, see residual_kernel.h.
#pragma once

#include <cstdint>
#include <vector>

#include "residual_job.h"

namespace mmebm {

// value: (chains,). Fills the tiling of `tensors`, and their gradients where those are not null.
void residual(std::vector<ResidualTensor>& tensors, int64_t chains, float* value, int threads, Isa isa);

}  // namespace mmebm
