// The loops of cpu.cpp, compiled once per instruction set (common/isa.h). Blocks are taken LANES at a time through small arrays, which is what lets the compiler vectorise every stage.
#include "noise/cpu.h"

namespace mmebm {
namespace {

constexpr int LANES = 64;

struct Lanes {
  alignas(64) uint32_t w0[LANES], w1[LANES], w2[LANES], w3[LANES];
};

// Blocks first .. first + LANES - 1 of the flattened (chains, blocks) array. Lanes past the end are computed and dropped.
void draw(Lanes& lanes, int64_t blocks, int64_t first, NoiseAt at) {
  alignas(64) uint32_t block[LANES], chain[LANES];
  int64_t row = first / blocks, column = first % blocks;
  for (int i = 0; i < LANES; ++i) {
    block[i] = static_cast<uint32_t>(column);
    chain[i] = at.chain_offset + static_cast<uint32_t>(row);
    if (++column == blocks) {
      column = 0;
      ++row;
    }
  }
  for (int i = 0; i < LANES; ++i) {
    const Words w = philox4x32_10(block[i], chain[i], at.step, at.stream, at.seed);
    lanes.w0[i] = w.w0;
    lanes.w1[i] = w.w1;
    lanes.w2[i] = w.w2;
    lanes.w3[i] = w.w3;
  }
}

void transform(const Lanes& lanes, float* normals) {
  for (int i = 0; i < LANES; ++i) {
    const Normals n = box_muller({lanes.w0[i], lanes.w1[i], lanes.w2[i], lanes.w3[i]});
    normals[4 * i + 0] = n.n0;
    normals[4 * i + 1] = n.n1;
    normals[4 * i + 2] = n.n2;
    normals[4 * i + 3] = n.n3;
  }
}

void fill_words(uint32_t* out, int64_t blocks, int64_t begin, int64_t end, NoiseAt at) {
  Lanes lanes;
  for (int64_t first = begin; first < end; first += LANES) {
    draw(lanes, blocks, first, at);
    const int count = end - first < LANES ? static_cast<int>(end - first) : LANES;
    uint32_t* to = out + 4 * first;
    for (int i = 0; i < count; ++i) {
      to[4 * i + 0] = lanes.w0[i];
      to[4 * i + 1] = lanes.w1[i];
      to[4 * i + 2] = lanes.w2[i];
      to[4 * i + 3] = lanes.w3[i];
    }
  }
}

void fill_normals(float* out, int64_t numel, int64_t begin, int64_t end, NoiseAt at) {
  const int64_t blocks = (numel + 3) / 4;
  const int last = static_cast<int>(numel - 4 * (blocks - 1));  // elements in a chain's last block, 1 to 4
  Lanes lanes;
  alignas(64) float normals[4 * LANES];
  for (int64_t first = begin; first < end; first += LANES) {
    draw(lanes, blocks, first, at);
    transform(lanes, normals);
    const int count = end - first < LANES ? static_cast<int>(end - first) : LANES;
    if (last == 4) {  // rows have no gaps: one copy
      memcpy(out + 4 * first, normals, sizeof(float) * 4 * static_cast<size_t>(count));
      continue;
    }
    int64_t row = first / blocks, column = first % blocks;
    for (int i = 0; i < count; ++i) {
      const int keep = column == blocks - 1 ? last : 4;
      float* to = out + row * numel + 4 * column;
      for (int j = 0; j < keep; ++j) {
        to[j] = normals[4 * i + j];
      }
      if (++column == blocks) {
        column = 0;
        ++row;
      }
    }
  }
}

void fill_box_muller(const uint32_t* words, float* out, int64_t blocks) {
  Lanes lanes;
  alignas(64) float normals[4 * LANES];
  for (int64_t first = 0; first < blocks; first += LANES) {
    const int count = blocks - first < LANES ? static_cast<int>(blocks - first) : LANES;
    for (int i = 0; i < LANES; ++i) {
      const uint32_t* from = words + 4 * (first + (i < count ? i : 0));
      lanes.w0[i] = from[0];
      lanes.w1[i] = from[1];
      lanes.w2[i] = from[2];
      lanes.w3[i] = from[3];
    }
    transform(lanes, normals);
    memcpy(out + 4 * first, normals, sizeof(float) * 4 * static_cast<size_t>(count));
  }
}

}  // namespace

const NoiseLoops MMEBM_LOOPS(noise_loops) = {fill_words, fill_normals, fill_box_muller};

}  // namespace mmebm
