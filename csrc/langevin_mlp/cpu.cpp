// Packs the weights, cuts the batch into tiles and chooses the instruction set; the loops themselves are in
// cpu_kernel.cpp.
#include "langevin_mlp/cpu.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <new>

#include "common/threads.h"

namespace mmebm {
namespace {

// Panels of (depth, up to PANEL) from row-major rows: panel p holds rows p PANEL and following.
void pack_rows(const float* weight, int64_t rows, int64_t depth, float* to) {
  for (int64_t row = 0; row < rows; row += PANEL) {
    const int64_t n = std::min(PANEL, rows - row);
    for (int64_t j = 0; j < n; ++j) {
      const float* from = weight + (row + j) * depth;
      for (int64_t k = 0; k < depth; ++k) to[k * n + j] = from[k];
    }
    to += n * depth;
  }
}

// The same of the transposed matrix: panel p holds columns p PANEL and following.
void pack_columns(const float* weight, int64_t rows, int64_t columns, float* to) {
  for (int64_t column = 0; column < columns; column += PANEL) {
    const int64_t n = std::min(PANEL, columns - column);
    for (int64_t k = 0; k < rows; ++k) std::copy_n(weight + k * columns + column, n, to + k * n);
    to += n * rows;
  }
}

struct Free {
  void operator()(void* p) const { ::operator delete[](p, std::align_val_t(64)); }
};
using Floats = std::unique_ptr<float[], Free>;

Floats floats(int64_t n) {
  void* p = ::operator new[](sizeof(float) * static_cast<size_t>(std::max<int64_t>(n, 1)), std::align_val_t(64));
  return Floats(static_cast<float*>(p));
}

// What a tile may take of the second-level cache, beside the weights that all tiles read.
constexpr int64_t TILE_BYTES = 512 << 10;

// The batch in vectors of chains, and a small rest of it, which is a tile of its own, in quads.
struct Cut {
  int64_t units, rest;

  Cut(int64_t chains, const MlpLoops& loops)
      : units(chains / loops.lanes), rest(chains % loops.lanes) {
    if (rest > loops.quads) {
      ++units;
      rest = 0;
    }
  }
};

}  // namespace

int64_t mlp_tiles(int64_t chains, Isa isa) {
  const Cut cut(chains, mlp_loops(isa));
  return cut.units + (cut.rest > 0);
}

void langevin_mlp(MlpJob job, std::vector<MlpStackTerm>& stacks, Isa isa, int threads) {
  const MlpLoops& loops = mlp_loops(isa);
  threads = std::max(threads, 1);
  std::vector<MlpLayer*> layers;
  int64_t packed = 0;
  for (MlpStackTerm& stack : stacks) {
    stack.term.layers = stack.layers.data();
    stack.term.depth = static_cast<int64_t>(stack.layers.size());
    for (MlpLayer& layer : stack.layers) {
      layers.push_back(&layer);
      packed += 2 * ((layer.inputs * layer.outputs + 15) / 16 * 16);
    }
  }
  const Floats weights = floats(packed + 16);  // quads read a little past the end
  float* at = weights.get();
  for (MlpLayer* layer : layers) {
    layer->forward = at;
    at += (layer->inputs * layer->outputs + 15) / 16 * 16;
    layer->backward = at;
    at += (layer->inputs * layer->outputs + 15) / 16 * 16;
    pack_rows(layer->weight, layer->outputs, layer->inputs, const_cast<float*>(layer->forward));
    pack_columns(layer->weight, layer->outputs, layer->inputs, const_cast<float*>(layer->backward));
  }
  std::vector<MlpTerm> terms;
  for (const MlpStackTerm& stack : stacks) terms.push_back(stack.term);
  job.terms = terms.data();
  job.term_count = static_cast<int64_t>(terms.size());

  const Cut cut(job.chains, loops);
  const int64_t units = cut.units, rest = cut.rest;
  // The size of the other tiles: the one with which the threads have the least to do one after the other. Of equal ones
  // two vectors come before three, and one last (a third vector gains nothing over two, a second one 5 to 10 percent;
  // one core of a Xeon with AVX-512, 2026-11-22).
  int64_t vectors = 1, least = INT64_MAX;
  for (const int64_t v : {2, 3, 1}) {
    if (v > loops.most || (v > 1 && 4 * mlp_scratch(job, v * loops.lanes, false).size > TILE_BYTES)) continue;
    const int64_t count = (units + v - 1) / v, turns = (count + threads - 1) / threads;
    if (turns * v < least) {
      least = turns * v;
      vectors = v;
    }
  }
  const int64_t full = (units + vectors - 1) / vectors, tiles = full + (rest > 0);
  if (tiles == 0) return;
  threads = static_cast<int>(std::min<int64_t>(threads, tiles));

  const int64_t size = std::max(units > 0 ? mlp_scratch(job, vectors * loops.lanes, false).size : 0,
                                rest > 0 ? mlp_scratch(job, loops.lanes, true).size : 0);
  const Floats scratch = floats(size * threads);
  const std::unique_ptr<std::atomic<bool>[]> taken(new std::atomic<bool>[static_cast<size_t>(threads)]());
  for_each_tile(tiles, threads, [&](int64_t tile) {
    int slot = 0;
    while (taken[static_cast<size_t>(slot)].exchange(true, std::memory_order_acquire)) slot = (slot + 1) % threads;
    const int64_t first = tile < full ? tile * vectors : units;
    loops.tile(job, first * loops.lanes, std::min(vectors, units - first), scratch.get() + slot * size);
    taken[static_cast<size_t>(slot)].store(false, std::memory_order_release);
  });
}

void mlp_activation(Activation kind, float slope, const float* in, float* value, float* derivative, int64_t n,
                    Isa isa) {
  const MlpLoops& loops = mlp_loops(isa);
  const int64_t whole = n / loops.lanes * loops.lanes;
  loops.activate(kind, slope, in, value, derivative, whole);
  float rest[3][16] = {};
  std::copy(in + whole, in + n, rest[0]);
  loops.activate(kind, slope, rest[0], rest[1], rest[2], loops.lanes);
  std::copy_n(rest[1], n - whole, value + whole);
  std::copy_n(rest[2], n - whole, derivative + whole);
}

}  // namespace mmebm
