// What the planner (cpu.cpp) needs to know of Winograd's tiles: how an axis is cut into them, and what becomes of a
// kernel's weights at their points (Lavin and Gray, 2016). The transforms of inputs and outputs are in cpu_kernel.cpp.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "net/job.h"

namespace mmebm {

// An axis of a kernel, in the order of the sum: rows from an output's `from` on, and the place in the kernel.
// `unit`: rows between neighbours in what is read; `phases`: every so-many-th tap is that of the next output too.
struct Axis {
  std::vector<std::pair<int64_t, int64_t>> taps;
  int64_t unit, phases;

  // Taps of a phase, 0 where they are not neighbours.
  int64_t each() const {
    const auto n = static_cast<int64_t>(taps.size());
    for (int64_t i = 0; i < n; ++i) {
      if (taps[static_cast<size_t>(i)].first != i * unit) return 0;
    }
    return n % phases == 0 ? n / phases : 0;
  }
};

// Weights of a group: of output j and input c at output_step j + input_step c.
struct Weights {
  const float *from, *bias;
  int64_t outputs, inputs, output_step, input_step, line;
};

// `count` tiles of `size` outputs each, from output `first` on.
struct Cut {
  int64_t size, first, count;
};

// An axis of n outputs of r taps cut into tiles with the fewest points. Of three taps tiles are of 2, of two of 3, and
// the rest is smaller ones: nothing is computed that is not there.
inline std::vector<Cut> cut(int64_t n, int64_t r) {
  std::vector<Cut> cuts;
  const int64_t most = n == 4 && r == 2 ? 2 : 5 - r;  // 2 and 2 have as few points as 3 and 1
  if (n >= most) cuts.push_back({most, 0, n / most});
  if (n % most > 0) cuts.push_back({n % most, n - n % most, 1});
  return cuts;
}

inline int64_t points(const std::vector<Cut>& cuts, int64_t r) {
  int64_t sum = 0;
  for (const Cut& c : cuts) sum += c.count * (c.size + r - 1);
  return sum;
}

// G, which takes r taps to the points of a tile of m outputs; A and B are in cpu_kernel.cpp.
inline std::vector<std::vector<double>> to_points(int64_t m, int64_t r) {
  std::vector<std::vector<double>> g(static_cast<size_t>(m + r - 1), std::vector<double>(static_cast<size_t>(r), 0.0));
  g.front().front() = g.back().back() = 1.0;
  if (m == 1) {
    for (size_t i = 0; i < g.size(); ++i) g[i][i] = 1.0;
  } else if (m + r == 4) {
    g[1] = {1.0, 1.0};
  } else {
    for (size_t i = 0; i < static_cast<size_t>(r); ++i) {
      g[1][i] = 0.5;
      g[2][i] = i % 2 ? -0.5 : 0.5;
    }
  }
  return g;
}

// G g G^T of every kernel at each point of each kind of tiles, to where that point's pass reads its weights.
inline void pack_at_points(const std::vector<NetWinograd>& kinds, const std::vector<std::vector<float*>>& to,
                           const Axis& ys, const Axis& xs, const Weights& weights) {
  const NetWinograd& any = kinds[0];
  const auto r = static_cast<size_t>(any.taps), n = static_cast<size_t>(any.outputs);
  std::vector<int64_t> places;  // of all taps in a kernel, phase by phase
  for (int64_t phase = 0; phase < any.phase_count; ++phase) {
    for (int64_t y = phase / xs.phases; y < any.taps * ys.phases; y += ys.phases) {
      for (int64_t x = phase % xs.phases; x < any.taps * xs.phases; x += xs.phases) {
        places.push_back(ys.taps[static_cast<size_t>(y)].second * weights.line +
                         xs.taps[static_cast<size_t>(x)].second);
      }
    }
  }
  using Matrix = std::vector<std::vector<double>>;
  std::vector<std::pair<Matrix, Matrix>> by;  // of each kind, along both axes
  for (const NetWinograd& w : kinds) by.push_back({to_points(w.height, w.taps), to_points(w.width, w.taps)});
  std::vector<double> all(places.size() * n), half(r * n);
  std::vector<float> row(n);
  for (int64_t c = 0; c < any.channels; ++c) {
    for (size_t j = 0; j < n; ++j) {  // a kernel lies in a line or two of a cache: read at once
      const float* const from = weights.from + static_cast<int64_t>(j) * weights.output_step + c * weights.input_step;
      for (size_t i = 0; i < places.size(); ++i) all[i * n + j] = static_cast<double>(from[places[i]]);
    }
    for (int64_t phase = 0; phase < any.phase_count; ++phase) {
      const double* const taps = all.data() + static_cast<size_t>(phase) * r * r * n;
      for (size_t kind = 0; kind < kinds.size(); ++kind) {
        const NetSplit split = NetSplit::of(any.outputs, kinds[kind].points[0].block_outputs);
        auto point = to[kind].begin();
        for (const std::vector<double>& gy : by[kind].first) {
          for (size_t i = 0; i < r * n; ++i) {
            half[i] = gy[0] * taps[i] + gy[1] * taps[r * n + i] + (r == 3 ? gy[2] * taps[2 * r * n + i] : 0.0);
          }
          for (const std::vector<double>& gx : by[kind].second) {
            for (size_t j = 0; j < n; ++j) {
              const double two = gx[0] * half[j] + gx[1] * half[n + j];
              row[j] = static_cast<float>(r == 3 ? two + gx[2] * half[2 * n + j] : two);
            }
            float* const at = *point++;
            for (int64_t i = 0, j = 0; i < split.parts; j += split.part(i), ++i) {
              memcpy(at + j * any.inputs() + (phase * any.channels + c) * split.part(i), row.data() + j,
                     sizeof(float) * static_cast<size_t>(split.part(i)));
            }
          }
        }
      }
    }
  }
}

}  // namespace mmebm
