// How the work is cut, the sums over parts of chains and modalities, and the choice of instruction set; the loops are
// in cpu_kernel.cpp.
#include "residual/cpu.h"

#include <algorithm>

#include "common/threads.h"

namespace mmebm {
namespace {

}  // namespace

void residual(std::vector<ResidualTensor>& tensors, int64_t chains, float* value, int threads, Isa isa) {
  int64_t tiles = 0, slots = 0;
  for (ResidualTensor& t : tensors) {
    t.first_tile = tiles;
    t.first_slot = slots;
    const int64_t numel = t.positions * t.classes;
    if (chains == 0 || numel == 0) {
      t.parts = 0;
      continue;
    }
    if (numel <= TILE) {
      t.rows = TILE / numel;
      t.part = t.positions;
      tiles += (chains + t.rows - 1) / t.rows;
      slots += chains;
    } else {
      const int64_t most = std::max<int64_t>(16, TILE / t.classes);
      const int64_t wanted = (t.positions + most - 1) / most;
      // whole vectors of 16; never more than TILE elements of a likelihood without classes, which has buffers for them
      t.part = ((t.positions + wanted - 1) / wanted + 15) / 16 * 16;
      t.parts = (t.positions + t.part - 1) / t.part;
      tiles += chains * t.parts;
      slots += chains * t.parts;
    }
  }
  std::vector<double> sums(static_cast<size_t>(slots));
  const ResidualJob job = {chains, sums.data()};
  const ResidualLoops& loops = residual_loops(isa);
  for_each_tile(tiles, threads, [&tensors, &job, &loops](int64_t tile) {
    size_t i = tensors.size() - 1;
    while (tensors[i].first_tile > tile) --i;
    loops.tile(job, tensors[i], tile - tensors[i].first_tile);
  });
  for (int64_t chain = 0; chain < chains; ++chain) {
    double sum = 0.0;
    for (const ResidualTensor& t : tensors) {
      for (int64_t part = 0; part < t.parts; ++part) {
        sum += sums[static_cast<size_t>(t.first_slot + chain * t.parts + part)];
      }
    }
    value[chain] = static_cast<float>(sum);
  }
}

}  // namespace mmebm
