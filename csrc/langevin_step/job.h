// What cpu.cpp and its loops (cpu_kernel.cpp) share: the work and how it is cut. Plain data, because the files with AVX
// in them must not instantiate anything from std:: (isa.h).
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/langevin.h"
#include "common/tile.h"

namespace mmebm {

struct Constant {
  Kind kind = Kind::absent;
  double value = 0.0;             // scalar
  const float* values = nullptr;  // chain: (chains,); element: (chains, numel)
};

struct StepTensor {
  // fixed along the chain
  int64_t numel = 0;                  // elements of one chain
  int64_t channels = 1;               // above 1: x and grad are fp32 [chains, numel / channels, channels] in memory
  uint32_t index = 0;                 // tensor index in the stream word
  bool noisy = true;
  Storage storage = Storage::fp32, grad_storage = Storage::fp32;
  const uint8_t* observed = nullptr;  // (chains, numel), nonzero: keeps its value
  Constant constants[SLOTS];
  // A tile is `rows` whole chains, or one of `parts` parts of a chain of `part` elements (a multiple of 64, the last
  // one shorter). The parts depend on numel alone, and sums are taken part by part, so that no sum depends on the
  // number of threads or on how a batch was split.
  int64_t rows = 1, parts = 1, part = 0;
  int64_t first_tile = 0, first_slot = 0;  // slot: one part of one chain, where sums go
  // per step
  void* x = nullptr;
  const void* grad = nullptr;
  void* proposal = nullptr;  // outside = reject: same layout as x
};

struct StepJob {
  StepTensor* tensors = nullptr;
  int64_t count = 0, chains = 0;
  uint64_t seed = 0;
  uint32_t step = 0, chain_offset = 0;
  bool drift = true;       // false: only the noise (perturb)
  bool noise = true;
  bool bounds = true;      // low and high clamp the result
  uint32_t options = 0;    // Option
  bool reject = false;     // low and high reject the chain instead: REJECT, and there are some
  bool stats = false;
  // per slot, where asked for
  double* norm_squares = nullptr;  // of the clipped gradient: the norm clip of chains in parts, or of whole tensors
  double* norms = nullptr;         // (tensors, chains) their roots; null: every chain is in one tile
  double* grad_squares = nullptr;
  double* moved_squares = nullptr;
  int64_t* clipped = nullptr;
  int64_t* nonfinite = nullptr;
  uint8_t* outside = nullptr;  // reject: 1 where a part of a chain leaves the box
  uint8_t* rejected = nullptr;  // (chains,)
};

// One instruction set's loops, each over one tile.
struct StepLoops {
  void (*update)(const StepJob& job, const StepTensor& t, int64_t tile);
  void (*norm)(const StepJob& job, const StepTensor& t, int64_t tile);    // fills norm_squares
  void (*commit)(const StepJob& job, const StepTensor& t, int64_t tile);  // the proposals of chains that stay inside
  // Box-Muller alone, so that tests reach every word: (blocks, 4) words to (blocks, 4) normals.
  void (*normals)(const uint32_t* words, float* out, int64_t blocks);
};

MMEBM_DECLARE_LOOPS(StepLoops, step_loops)

}  // namespace mmebm
