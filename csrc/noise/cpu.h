// Filling arrays with the noise of mmebm/noise.py on the CPU. No Python here.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/philox.h"

namespace mmebm {

// out: (chains, blocks, 4) words.
void philox_words_cpu(uint32_t* out, int64_t chains, int64_t blocks, NoiseAt at, int threads, Isa isa);

// out: (chains, numel) normals, row-major.
void normal_cpu(float* out, int64_t chains, int64_t numel, NoiseAt at, int threads, Isa isa);

// words: (blocks, 4); out: (blocks, 4) normals. Box-Muller alone, so that tests can reach every word.
void box_muller_cpu(const uint32_t* words, float* out, int64_t blocks, Isa isa);

// Blocks [begin, end) of the flattened (chains, blocks per chain) array, one instruction set each.
struct NoiseLoops {
  void (*words)(uint32_t* out, int64_t blocks, int64_t begin, int64_t end, NoiseAt at);
  void (*normals)(float* out, int64_t numel, int64_t begin, int64_t end, NoiseAt at);
  void (*box_muller)(const uint32_t* words, float* out, int64_t blocks);
};

MMEBM_DECLARE_LOOPS(NoiseLoops, noise_loops)

}  // namespace mmebm
