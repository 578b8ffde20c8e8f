// What cpu.cpp and its loops (cpu_kernel.cpp) share: the work and how it is cut. Plain data, because the files with AVX
// in them must not instantiate anything from std:: (isa.h).
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/langevin.h"
#include "common/tile.h"

namespace mmebm {

enum class Likelihood : int32_t { gaussian = 0, laplace = 1, categorical = 2 };

// One value for all chains, or one per chain where `values` is not null.
struct PerChain {
  double value = 1.0;
  const float* values = nullptr;
};

struct ResidualTensor {
  Likelihood likelihood = Likelihood::gaussian;
  int64_t positions = 0;  // terms of one chain
  int64_t classes = 1;    // predictions per term; those of one class are consecutive
  Storage storage = Storage::fp32, target_storage = Storage::fp32;  // of predictions and gradients; of targets
  const void* prediction = nullptr;  // (chains, classes, positions)
  const void* target = nullptr;      // (chains, positions); int64 where categorical
  const uint8_t* observed = nullptr;  // nonzero: the term counts; (chains, positions), without observed_rows one row
  bool observed_rows = false;
  PerChain scale, weight;
  void* grad = nullptr;  // as prediction, or null
  // A tile is `rows` whole chains, or `part` positions of one chain, which has `parts` of them. The parts depend on
  // positions and classes alone and sums are taken part by part, so that no value depends on the number of threads or
  // on how a batch was split.
  int64_t rows = 1, parts = 1, part = 0;
  int64_t first_tile = 0, first_slot = 0;  // slot: one part of one chain
};

struct ResidualJob {
  int64_t chains = 0;
  double* sums = nullptr;  // per slot: what the part adds to the value
};

struct ResidualLoops {
  void (*tile)(const ResidualJob& job, const ResidualTensor& t, int64_t tile);
};

MMEBM_DECLARE_LOOPS(ResidualLoops, residual_loops)

}  // namespace mmebm
