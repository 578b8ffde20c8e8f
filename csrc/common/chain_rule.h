// All steps of a few chains around any energy, in vectors whose lanes are chains: noise, clips, prior, bounds, masks,
// freezing and records, for the instruction set of the including file. The rule is mmebm/ops/langevin_step/reference.py.
//
// State and gradient lie as (element, chain), elements in the order of the state, M vectors of W chains a row. A chain's
// sums run over elements in one order, in its own lane, so that no result depends on how a batch is split.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/chain_job.h"
#include "common/philox_vec.h"
#include "common/rule_vec.h"
#include "common/threads.h"
#include "common/vec.h"

namespace mmebm {
namespace {

// In how many pieces the members of a team cut so many items, of which `least` are worth another thread's while: several
// for each, so that one that is kept waiting keeps nobody waiting.
MMEBM_INLINE int64_t pieces_of(const Team* team, int64_t items, int64_t least) {
  if (!team || items < 2 * least) return 1;
  const int helpers = team->helpers();
  if (helpers == 0) return 1;
  const int64_t most = items / least, wanted = 4 * (int64_t{1} + helpers);
  return most < wanted ? most : wanted;
}

using Lanes = M;  // M counts the vectors of a row below

// A sum over many rows, in parts of 32 and these in parts of 32, so that its rounding errors stay those of a short sum.
struct Sum {
  F part, middle, total;
  int64_t count;
};

MMEBM_INLINE Sum no_sum() { return {setf(0.0f), setf(0.0f), setf(0.0f), 0}; }

MMEBM_INLINE void next(Sum& s) {
  if (++s.count % 32 != 0) return;
  s.middle = add(s.middle, s.part);
  s.part = setf(0.0f);
  if (s.count % 1024 != 0) return;
  s.total = add(s.total, s.middle);
  s.middle = setf(0.0f);
}

MMEBM_INLINE F whole(const Sum& s) { return add(add(s.total, s.middle), s.part); }

// M vectors of chains and their memory.
template <int M>
struct Rows {
  static constexpr int C = M * W;
  const ChainJob& job;
  int64_t first;   // chain of lane 0
  int64_t inside;  // lanes that are chains
  float *x, *g, *old, *energy, *dead, *row;
  uint8_t* observed;
  Team* team = nullptr;  // threads that help with the rows

  int64_t chain_of(int lane) const { return first + (lane < inside ? lane : inside - 1); }
  int lanes_of(int m) const {
    const int64_t left = inside - m * W;
    return left < 0 ? 0 : left < W ? static_cast<int>(left) : W;
  }
};

template <int M, class T>
void gather(const Rows<M>& t, const T* from, int64_t stride, int64_t width, T* to) {
  for (int lane = 0; lane < t.C; ++lane) {
    const T* source = from + t.chain_of(lane) * stride;
    for (int64_t i = 0; i < width; ++i) to[i * t.C + lane] = source[i];
  }
}

template <int M>
void scatter(const Rows<M>& t, const float* from, int64_t width, float* to) {
  for (int lane = 0; lane < t.inside; ++lane) {
    float* target = to + (t.first + lane) * width;
    for (int64_t i = 0; i < width; ++i) target[i] = from[i * t.C + lane];
  }
}

// A row of the table of constants, as one vector of chains sees it.
struct Row {
  const float* values;
  int64_t columns, chain;
  int lanes;
};

MMEBM_INLINE F get(const Row& r, Slot f) {
  return r.columns == 1 ? setf(r.values[f]) : load(r.values + f * r.columns + r.chain, r.lanes);
}

template <int M>
MMEBM_INLINE Row row_of(const Rows<M>& t, int64_t step, int64_t tensor, int m) {
  const ChainJob& job = t.job;
  const int64_t row = job.constant_rows == 1 ? 0 : step;
  return {job.constants + (row * job.tensor_count + tensor) * SLOTS * job.constant_columns, job.constant_columns,
          t.first + m * W, t.lanes_of(m)};
}

template <int M>
MMEBM_INLINE void chain_words(const Rows<M>& t, I* words) {
  for (int m = 0; m < M; ++m) {
    alignas(64) uint32_t w[W];
    for (int lane = 0; lane < W; ++lane) {
      w[lane] = t.job.chain_offset + static_cast<uint32_t>(t.first) + static_cast<uint32_t>(m * W + lane);
    }
    words[m] = loadi(w);
  }
}

MMEBM_INLINE bool has(const ChainTensor& tensor, Slot f) { return (tensor.present >> f & 1) != 0; }

// Calls body(row of the state, m, normal) for the rows of a tensor in groups of four, `begin` to `end`. Without noise the
// normals are 0.
template <int M, class Body>
MMEBM_INLINE void each_row(const Rows<M>& t, const ChainTensor& tensor, uint32_t step, bool noise, const Body& body,
                           int64_t begin, int64_t end) {
  const int64_t last = 4 * end < tensor.width ? 4 * end : tensor.width;
  if (!noise) {
    for (int64_t i = 4 * begin; i < last; ++i) {
      for (int m = 0; m < M; ++m) body(tensor.begin + i, m, setf(0.0f));
    }
    return;
  }
  const Key key = {t.job.seed, step, tensor.stream};
  OneChain schedule;
  OneChain::init(schedule, key, 0);
  I words[M];
  chain_words(t, words);
  for (int64_t i = 4 * begin; i < last; i += 4) {
    F z[4 * M];
    normals_by_chain<M>(schedule, key, static_cast<uint32_t>(i / 4), words, z);
    const int64_t rows = tensor.width - i < 4 ? tensor.width - i : 4;
    for (int64_t r = 0; r < rows; ++r) {
      for (int m = 0; m < M; ++m) body(tensor.begin + i + r, m, z[4 * m + r]);
    }
  }
}

// Groups of four rows that are worth another thread's while: some microseconds.
constexpr int64_t GROUPS_SHARED = 128;

// The same for all rows, on all threads of the team.
template <int M, class Body>
MMEBM_INLINE void each_row(const Rows<M>& t, const ChainTensor& tensor, uint32_t step, bool noise, const Body& body) {
  const int64_t groups = (tensor.width + 3) / 4;
  const int64_t pieces = pieces_of(t.team, groups, GROUPS_SHARED);
  if (pieces == 1) return each_row(t, tensor, step, noise, body, 0, groups);
  t.team->share(pieces, nullptr, [&](int64_t k, float*) {
    each_row(t, tensor, step, noise, body, groups * k / pieces, groups * (k + 1) / pieces);
  });
}

// x + noise, where the noise stands before the gradient.
template <int M>
void perturb(const Rows<M>& t, int64_t k, uint32_t step) {
  for (int64_t i = 0; i < t.job.tensor_count; ++i) {
    const ChainTensor& tensor = t.job.tensors[i];
    const bool bounds = t.job.clamp_noise && (has(tensor, LOW) || has(tensor, HIGH));
    if (!tensor.moving || !(tensor.noisy || bounds)) continue;
    F scale[M], low[M], high[M];
    for (int m = 0; m < M; ++m) {
      const Row row = row_of(t, k, i, m);
      scale[m] = get(row, NOISE_SCALE);
      low[m] = get(row, LOW);
      high[m] = get(row, HIGH);
    }
    each_row(t, tensor, step, tensor.noisy, [&](int64_t r, int m, F z) {
      const int64_t at = r * Rows<M>::C + m * W;
      const F x = load(t.x + at);
      F y = tensor.noisy ? fma(scale[m], z, x) : x;
      if (bounds) y = clamp(y, low[m], high[m]);
      if (t.observed) y = select(bytes(t.observed + at, W), x, y);
      store(t.x + at, y);
    });
  }
}

// The norm of each chain's gradient over a tensor's rows, after the clip by value.
template <int M>
MMEBM_INLINE F clipped_norm(const Rows<M>& t, const ChainTensor& tensor, int m, bool clip, F limit) {
  const F below = sub(setf(0.0f), limit);
  Sum sum = no_sum();
  for (int64_t r = tensor.begin; r < tensor.begin + tensor.width; ++r) {
    F g = load(t.g + r * Rows<M>::C + m * W);
    if (clip) g = clamp(g, below, limit);
    sum.part = fma(g, g, sum.part);
    next(sum);
  }
  return sqrt(whole(sum));
}

template <int M>
void update(const Rows<M>& t, int64_t k, uint32_t step) {
  const F zero = setf(0.0f), one = setf(1.0f);
  for (int64_t i = 0; i < t.job.tensor_count; ++i) {
    const ChainTensor& tensor = t.job.tensors[i];
    if (!tensor.moving) continue;
    const With with = {true, has(tensor, GRAD_CLIP), has(tensor, GRAD_NORM_CLIP), has(tensor, PRIOR_STD),
                       tensor.noisy && !t.job.noise_before, has(tensor, MAX_UPDATE)};
    const bool bounds = has(tensor, LOW) || has(tensor, HIGH);
    Rates c[M];
    F low[M], high[M];
    for (int m = 0; m < M; ++m) {
      const Row row = row_of(t, k, i, m);
      const F inverse = with.prior ? div(one, get(row, PRIOR_STD)) : zero;
      c[m] = {get(row, GRAD_CLIP), one, inverse, inverse, sub(zero, get(row, STEP_SIZE)), get(row, NOISE_SCALE),
              get(row, MAX_UPDATE)};
      low[m] = get(row, LOW);
      high[m] = get(row, HIGH);
      if (with.norm_clip) {
        c[m].factor = norm_factor(clipped_norm(t, tensor, m, with.clip, c[m].clip), get(row, GRAD_NORM_CLIP));
      }
    }
    each_row(t, tensor, step, with.noise, [&](int64_t r, int m, F z) {
      const int64_t at = r * Rows<M>::C + m * W;
      const F x = load(t.x + at);
      Lanes changed = none();
      F y = proposed(with, c[m], x, load(t.g + at), z, changed);
      if (bounds) y = clamp(y, low[m], high[m]);
      if (t.observed) y = select(bytes(t.observed + at, W), x, y);
      store(t.x + at, y);
    });
  }
}

// Chains with an inf or NaN in a moving tensor go back to where they were, for good.
template <int M>
void freeze(const Rows<M>& t) {
  constexpr int C = M * W;
  const F zero = setf(0.0f), one = setf(1.0f);
  for (int m = 0; m < M; ++m) {
    Lanes broken = unequal(load(t.dead + m * W), zero);
    for (int64_t i = 0; i < t.job.tensor_count; ++i) {
      const ChainTensor& tensor = t.job.tensors[i];
      if (!tensor.moving) continue;
      for (int64_t r = tensor.begin; r < tensor.begin + tensor.width; ++r) {
        const F v = load(t.x + r * C + m * W);
        const F nothing = sub(v, v);  // 0 for a number, else NaN
        broken = either(broken, unequal(nothing, nothing));
      }
    }
    if (count(broken) == 0) continue;
    store(t.dead + m * W, select(broken, one, zero));
    for (int64_t r = 0; r < t.job.inputs; ++r) {
      const int64_t at = r * C + m * W;
      store(t.x + at, select(broken, load(t.old + at), load(t.x + at)));
    }
  }
}

template <int M>
void record(const Rows<M>& t, const float* row, float* to) {
  for (int m = 0; m < M; ++m) {
    if (const int n = t.lanes_of(m)) store(to + t.first + m * W, load(row + m * W), n);
  }
}

template <int M>
void grad_norm(const Rows<M>& t) {
  for (int m = 0; m < M; ++m) {
    Sum sum = no_sum();
    for (int64_t i = 0; i < t.job.tensor_count; ++i) {
      const ChainTensor& tensor = t.job.tensors[i];
      if (!tensor.moving) continue;
      for (int64_t r = tensor.begin; r < tensor.begin + tensor.width; ++r) {
        const F g = load(t.g + r * Rows<M>::C + m * W);
        sum.part = fma(g, g, sum.part);
        next(sum);
      }
    }
    store(t.row + m * W, sqrt(whole(sum)));
  }
}

// All steps from the state in t.x on. `evaluate(energy)` leaves the gradient at t.x in t.g and, where asked for, the
// energy in t.energy.
template <int M, class Evaluate>
void run_steps(const Rows<M>& t, const Evaluate& evaluate) {
  const ChainJob& job = t.job;
  for (int m = 0; m < M; ++m) store(t.dead + m * W, setf(0.0f));
  for (int64_t k = 0; k < job.steps; ++k) {
    if (job.stopped && job.stopped(job.stopped_data)) return;
    const uint32_t step = job.first_step + static_cast<uint32_t>(k);
    if (job.freeze) memcpy(t.old, t.x, sizeof(float) * static_cast<size_t>(job.inputs * t.C));
    if (job.noise_before) perturb(t, k, step);
    evaluate(job.energy != nullptr);
    if (job.energy) record(t, t.energy, job.energy + k * job.chains);
    if (job.grad_norm) {
      grad_norm(t);
      record(t, t.row, job.grad_norm + k * job.chains);
    }
    update(t, k, step);
    if (job.freeze) freeze(t);
  }
  scatter(t, t.x, job.inputs, job.out);
  if (job.freeze) {
    for (int lane = 0; lane < t.inside; ++lane) job.frozen[t.first + lane] = t.dead[lane] != 0.0f;
  }
}

}  // namespace
}  // namespace mmebm
