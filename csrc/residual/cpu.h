// Likelihood residuals of all modalities on the CPU: value per chain and gradient. No Python here.
//
// The terms are those of mmebm/ops/residual/reference.py; cpu_kernel.cpp says how.
#pragma once

#include <cstdint>
#include <vector>

#include "residual/job.h"

namespace mmebm {

// value: (chains,). Fills the tiling of `tensors`, and their gradients where those are not null.
void residual(std::vector<ResidualTensor>& tensors, int64_t chains, float* value, int threads, Isa isa);

}  // namespace mmebm
