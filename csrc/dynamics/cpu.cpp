// Threads and the choice of instruction set; the loops are in cpu_kernel.cpp.
#include "dynamics/cpu.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "common/threads.h"
#include "common/tile.h"

namespace mmebm {
namespace {

// Calls work(begin, end) for groups of rows of about TILE elements.
template <class Work>
void by_rows(int64_t rows, int64_t numel, int threads, const Work& work) {
  if (rows == 0) return;
  if (threads <= 1) {
    work(int64_t{0}, rows);
    return;
  }
  const int64_t group = std::max<int64_t>(1, TILE / std::max<int64_t>(1, numel));
  for_each_tile((rows + group - 1) / group, threads, [&](int64_t tile) {
    work(tile * group, std::min(rows, (tile + 1) * group));
  });
}

template <class Real>
void uniforms(Real* out, int64_t chains, int64_t numel, NoiseAt at) {
  for (int64_t chain = 0; chain < chains; ++chain) {
    for (int64_t first = 0; first < numel; first += 4) {
      const Words w = words_at(chain, first / 4, at);
      const uint32_t all[4] = {w.w0, w.w1, w.w2, w.w3};
      const int64_t inside = std::min<int64_t>(4, numel - first);
      for (int64_t j = 0; j < inside; ++j) out[chain * numel + first + j] = static_cast<Real>(uniform24(all[j]));
    }
  }
}

}  // namespace

void run_dynamics(const DynamicsJob& job, Phase phase, int threads, Isa isa) {
  const DynamicsLoops& loops = dynamics_loops(isa);
  int64_t numel = 0;
  for (int64_t i = 0; i < job.count; ++i) numel += job.tensors[i].numel;
  by_rows(job.chains, numel, threads, [&](int64_t begin, int64_t end) {
    switch (phase) {
      case Phase::hmc_start: return loops.hmc_start(job, begin, end);
      case Phase::leap: return loops.leap(job, begin, end);
      case Phase::hmc_end: return loops.hmc_end(job, begin, end);
      case Phase::baoa: return loops.baoa(job, begin, end);
      case Phase::baoab_end: return loops.baoab_end(job, begin, end);
    }
  });
}

void run_decide(const ProposalJob& job, int threads, Isa isa) {
  const DynamicsLoops& loops = dynamics_loops(isa);
  int64_t numel = 0;
  for (int64_t i = 0; i < job.count; ++i) numel += job.tensors[i].numel;
  by_rows(job.rows, numel, threads, [&](int64_t begin, int64_t end) { loops.decide(job, begin, end); });
}

void finite_rows(const float* values, int64_t rows, int64_t numel, uint8_t* alive, int threads, Isa isa) {
  const DynamicsLoops& loops = dynamics_loops(isa);
  by_rows(rows, numel, threads, [&](int64_t begin, int64_t end) { loops.finite(values, numel, alive, begin, end); });
}

void exchange(const Ladder& l, const Replicas* tensors, int64_t count, int side) {
  const int64_t pairs = l.rungs - 1;
  std::fill_n(l.prob, l.chains * pairs, std::numeric_limits<float>::quiet_NaN());
  for (int64_t chain = 0; chain < l.chains; ++chain) {
    for (int64_t r = side; r < pairs; r += 2) {
      const int64_t low = chain * l.rungs + r, high = low + 1, pair = chain * pairs + r;
      const float ratio = (l.inverse[r] - l.inverse[r + 1]) * (l.energy[low] - l.energy[high]);
      const bool allowed = l.alive[low] != 0 && l.alive[high] != 0;
      // NaN is never accepted
      const float prob = !allowed ? 0.0f : ratio >= 0.0f ? 1.0f : ratio < 0.0f ? std::exp(ratio) : 0.0f;
      l.prob[pair] = prob;
      l.prob_sum[pair] += prob;
      if (!(uniform_at(l.at, chain, r) < prob)) continue;
      std::swap(l.energy[low], l.energy[high]);
      std::swap(l.alive[low], l.alive[high]);
      std::swap(l.origin[low], l.origin[high]);
      for (int64_t i = 0; i < count; ++i) {
        const Replicas& t = tensors[i];
        std::swap_ranges(t.values + low * t.numel, t.values + high * t.numel, t.values + high * t.numel);
      }
    }
  }
}

void uniform_cpu(float* out, int64_t chains, int64_t numel, NoiseAt at) { uniforms(out, chains, numel, at); }
void uniform_cpu(double* out, int64_t chains, int64_t numel, NoiseAt at) { uniforms(out, chains, numel, at); }

}  // namespace mmebm
