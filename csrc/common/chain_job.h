// What a whole chain on the CPU is asked to do, whatever its energy. Plain data (common/isa.h says why).
#pragma once

#include <cstdint>

#include "common/langevin.h"

namespace mmebm {

struct ChainTensor {
  int64_t begin = 0, width = 0;  // its rows of the state
  uint32_t stream = 0, present = 0;
  bool noisy = true, moving = true;
};

struct ChainJob {
  const ChainTensor* tensors = nullptr;
  int64_t tensor_count = 0, chains = 0, inputs = 0;
  const float* x = nullptr;  // (chains, inputs)
  // one evaluation: energy (chains,) and gradient (chains, inputs); no steps then
  float* gradient = nullptr;
  // or a chain
  int64_t steps = 0;
  uint64_t seed = 0;
  uint32_t first_step = 0, chain_offset = 0;
  bool noise_before = false, clamp_noise = false, freeze = false;
  const float* constants = nullptr;  // (rows, tensors, SLOTS, columns)
  int64_t constant_rows = 1, constant_columns = 1;
  const uint8_t* observed = nullptr;  // rows of inputs, or null
  int64_t observed_stride = 0;
  float* out = nullptr;        // (chains, inputs)
  float* energy = nullptr;     // (steps, chains) or null
  float* grad_norm = nullptr;  // (steps, chains) or null
  uint8_t* frozen = nullptr;   // (chains,) where freeze
  // called by every thread before every step, or null; true ends the job, whose results are then worth nothing
  bool (*stopped)(void*) = nullptr;
  void* stopped_data = nullptr;
};

}  // namespace mmebm
