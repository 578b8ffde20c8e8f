// The loops of HMC, Underdamped and the Metropolis test of the Langevin step, compiled once per instruction set
// (common/isa.h). The rules are those of mmebm/samplers/hmc.py,
// underdamped.py and metropolis.py, in float32 with sums over elements in double over 16 fixed lanes.
//
// A chain is one thread's from beginning to end, so that no sum depends on the number of threads or on how a batch was
// split. Every multiplication that meets an addition is written as `fma`: AVX2 and AVX-512 agree bit for bit.
#include <math.h>

#include <cstdint>
#include <cstring>

#include "dynamics/job.h"
#include "common/philox.h"
#include "common/noise_vec.h"
#include "common/vec.h"

namespace mmebm {
namespace {

// The purposes of noise.py that these draw for.
constexpr uint32_t DRIFT_NOISE = 0, ACCEPT_NOISE = 2, MOMENTUM_NOISE = 6;

// body(i, m) for elements [i, i + m) of n, m = W but for the last.
template <class Body>
MMEBM_INLINE void sweep(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + W <= n; i += W) body(i, W);
  if (i < n) body(i, static_cast<int>(n - i));
}

MMEBM_INLINE F at(const float* p, int64_t i, int m) { return m == W ? load(p + i) : load(p + i, m); }
MMEBM_INLINE void put(float* p, int64_t i, F v, int m) {
  if (m == W) {
    store(p + i, v);
  } else {
    store(p + i, v, m);
  }
}

// A coefficient as one loop sees it.
struct Value {
  const float* element;
  float number;
  MMEBM_INLINE F get(const Value& v, int64_t i, int m) { return v.element ? at(v.element, i, m) : setf(v.number); }
};

MMEBM_INLINE Value value_at(const Coefficient& c, int64_t chain, int64_t base, float factor = 1.0f) {
  if (c.kind == Coefficient::element) return {c.values + base, 0.0f};
  return {nullptr, factor * (c.kind == Coefficient::chain ? c.values[chain] : static_cast<float>(c.value))};
}

MMEBM_INLINE bool finite_number(double v) { return v - v == 0.0; }

MMEBM_INLINE double sum_of_lanes(const double* lane) {
  double total = 0.0;
  for (int i = 0; i < 16; ++i) total += lane[i];
  return total;
}

// Elements [begin, end) of one tensor's chains [row, row + rows), with their noise where there is any.
template <class Body>
MMEBM_INLINE void with_noise(const DynamicsJob& job, const MovingTensor& t, uint32_t purpose, bool noisy, int64_t begin,
                             int64_t end, const Body& body) {
  alignas(64) float noise[PADDED];
  const Key key = {job.seed, job.step, purpose << 24 | t.index};
  if (t.numel > TILE) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t from = 0; from < t.numel; from += TILE) {
        const int64_t to = from + TILE < t.numel ? from + TILE : t.numel;
        if (noisy) draw<true, 4>(key, job.chain_offset + static_cast<uint32_t>(row), 1, from, to, noise);
        body(row, from, to - from, noise);
      }
    }
    return;
  }
  const int64_t most = t.numel > 0 ? TILE / t.numel : 1;
  for (int64_t row = begin; row < end; row += most) {
    const int64_t rows = row + most < end ? most : end - row;
    if (noisy) draw<true, 4>(key, job.chain_offset + static_cast<uint32_t>(row), rows, 0, t.numel, noise);
    for (int64_t r = 0; r < rows; ++r) body(row + r, 0, t.numel, noise + r * t.numel);
  }
}

// v ~ N(0, THERMAL^2), kept; then half a kick and a drift.
void hmc_start(const DynamicsJob& job, int64_t begin, int64_t end) {
  for (int64_t i = 0; i < job.count; ++i) {
    const MovingTensor& t = job.tensors[i];
    with_noise(job, t, MOMENTUM_NOISE, true, begin, end, [&](int64_t row, int64_t from, int64_t n, const float* noise) {
      const int64_t base = row * t.numel + from;
      const Value thermal = value_at(t.c[THERMAL], row, base), kick = value_at(t.c[KICK], row, base);
      const Value drift = value_at(t.c[DRIFT], row, base);
      const F minus_half = setf(-0.5f), zero = setf(0.0f);
      const float *x = t.x + base, *g = t.g + base;
      float *y = t.y + base, *v = t.v + base, *before = t.before + base;
      const uint8_t* observed = t.observed ? t.observed + base : nullptr;
      sweep(n, [&](int64_t j, int m) {
        const F xi = at(x, j, m);
        F start = mul(Value::get(thermal, j, m), at(noise, j, m));
        if (observed) start = select(bytes(observed + j, m), zero, start);
        const F w = fma(mul(minus_half, Value::get(kick, j, m)), at(g, j, m), start);
        F to = fma(Value::get(drift, j, m), w, xi);
        if (observed) to = select(bytes(observed + j, m), xi, to);
        put(before, j, start, m);
        put(v, j, w, m);
        put(y, j, to, m);
      });
    });
  }
}

// A whole kick by `grad`, and a drift.
void leap(const DynamicsJob& job, int64_t begin, int64_t end) {
  for (int64_t i = 0; i < job.count; ++i) {
    const MovingTensor& t = job.tensors[i];
    for (int64_t row = begin; row < end; ++row) {
      const int64_t base = row * t.numel;
      const Value kick = value_at(t.c[KICK], row, base), drift = value_at(t.c[DRIFT], row, base);
      const F zero = setf(0.0f);
      float *y = t.y + base, *v = t.v + base;
      const float* g = t.grad + base;
      const uint8_t* observed = t.observed ? t.observed + base : nullptr;
      sweep(t.numel, [&](int64_t j, int m) {
        const F old = at(y, j, m);
        const F w = fma(sub(zero, Value::get(kick, j, m)), at(g, j, m), at(v, j, m));
        F to = fma(Value::get(drift, j, m), w, old);
        if (observed) to = select(bytes(observed + j, m), old, to);
        put(v, j, w, m);
        put(y, j, to, m);
      });
    }
  }
}

// min(1, exp(ratio)); 0 for NaN
MMEBM_INLINE double probability(double ratio) { return ratio >= 0.0 ? 1.0 : ratio < 0.0 ? ::exp(ratio) : 0.0; }

// The last half kick, the change of the Hamiltonian, and the decision: an accepted chain's x, gradient and energy
// become those at y.
void hmc_end(const DynamicsJob& job, int64_t begin, int64_t end) {
  const NoiseAt where = {job.seed, job.step, ACCEPT_NOISE << 24, job.chain_offset};
  for (int64_t row = begin; row < end; ++row) {
    double kinetic = 0.0;
    bool finite = true;
    for (int64_t i = 0; i < job.count; ++i) {
      const MovingTensor& t = job.tensors[i];
      const int64_t base = row * t.numel;
      const Value kick = value_at(t.c[KICK], row, base), mass = value_at(t.c[MASS], row, base);
      const F minus_half = setf(-0.5f), half = setf(0.5f);
      const float *y = t.y + base, *v = t.v + base, *before = t.before + base, *g = t.grad + base;
      alignas(64) double lane[16] = {};
      M bad = none();
      for (int64_t j = 0; j < t.numel; j += 16) {
        alignas(64) float part[16];
        for (int k = 0; k < 16; k += W) {
          const int64_t rest = t.numel - j - k;
          const int m = rest >= W ? W : rest > 0 ? static_cast<int>(rest) : 0;
          if (m == 0) {
            store(part + k, setf(0.0f));
            continue;
          }
          const F gj = at(g, j + k, m), yj = at(y, j + k, m), a = at(before, j + k, m);
          const F b = fma(mul(minus_half, Value::get(kick, j + k, m)), gj, at(v, j + k, m));
          // the change of m v^2 / 2, element by element
          store(part + k, mul(mul(mul(half, Value::get(mass, j + k, m)), sub(b, a)), add(b, a)));
          const F test = add(sub(gj, gj), sub(yj, yj));
          bad = either(bad, both(lanes(m), unequal(test, test)));
          if (m < W) {
            for (int l = m; l < W; ++l) part[k + l] = 0.0f;
          }
        }
        for (int k = 0; k < 16; ++k) lane[k] += static_cast<double>(part[k]);
      }
      kinetic += sum_of_lanes(lane);
      finite = finite && count(bad) == 0;
    }
    const double e = static_cast<double>(job.energy[row]), e_new = static_cast<double>(job.new_energy[row]);
    const double error = kinetic + (e_new - e);
    const double t = job.temperatures ? static_cast<double>(job.temperatures[row]) : job.temperature;
    // a broken proposal is never accepted, nor does a frozen chain move
    const bool allowed = finite && finite_number(e_new) && !(job.freeze && job.alive[row] == 0);
    const float prob = allowed ? static_cast<float>(probability(-error / t)) : 0.0f;
    const bool accept = uniform_at(where, row, 0) < prob;
    job.energy_error[row] = static_cast<float>(error);
    job.accept_prob[row] = prob;
    job.accepted[row] = accept ? 1.0f : 0.0f;
    job.prob_sum[row] += static_cast<double>(prob);
    if (!accept) continue;
    job.ever_accepted[row] = 1;
    job.energy[row] = job.new_energy[row];
    for (int64_t i = 0; i < job.count; ++i) {
      const MovingTensor& moved = job.tensors[i];
      const int64_t base = row * moved.numel;
      const size_t size = sizeof(float) * static_cast<size_t>(moved.numel);
      memcpy(moved.x + base, moved.y + base, size);
      memcpy(moved.g + base, moved.grad + base, size);
    }
  }
}

// Kick, drift, friction and noise, drift.
void baoa(const DynamicsJob& job, int64_t begin, int64_t end) {
  for (int64_t i = 0; i < job.count; ++i) {
    const MovingTensor& t = job.tensors[i];
    const bool noisy = t.c[NOISE].kind != Coefficient::number || t.c[NOISE].value != 0.0;
    with_noise(job, t, DRIFT_NOISE, noisy, begin, end, [&](int64_t row, int64_t from, int64_t n, const float* noise) {
      const int64_t base = row * t.numel + from;
      const Value kick = value_at(t.c[KICK], row, base), drift = value_at(t.c[DRIFT], row, base);
      const Value decay = value_at(t.c[DECAY], row, base), scale = value_at(t.c[NOISE], row, base);
      const F zero = setf(0.0f);
      const float *x = t.x + base, *g = t.grad + base;
      float *y = t.y + base, *v = t.v + base, *before = t.before ? t.before + base : nullptr;
      const uint8_t* observed = t.observed ? t.observed + base : nullptr;
      sweep(n, [&](int64_t j, int m) {
        const F xi = at(x, j, m), old = at(v, j, m), d = Value::get(drift, j, m);
        F w = fma(sub(zero, Value::get(kick, j, m)), at(g, j, m), old);
        F to = fma(d, w, xi);
        w = mul(Value::get(decay, j, m), w);
        if (noisy) w = fma(Value::get(scale, j, m), at(noise, j, m), w);
        if (observed) w = select(bytes(observed + j, m), zero, w);
        to = fma(d, w, to);
        if (observed) to = select(bytes(observed + j, m), xi, to);
        if (before) put(before, j, old, m);
        put(v, j, w, m);
        put(y, j, to, m);
      });
    });
  }
}

// The last kick. A chain that is not finite any more is marked and, where steps may be taken back, stays at x.
void baoab_end(const DynamicsJob& job, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    bool finite = !job.new_energy || finite_number(static_cast<double>(job.new_energy[row]));
    for (int64_t i = 0; i < job.count; ++i) {
      const MovingTensor& t = job.tensors[i];
      const int64_t base = row * t.numel;
      const Value kick = value_at(t.c[KICK], row, base);
      const F zero = setf(0.0f);
      const float *y = t.y + base, *g = t.grad + base;
      float* v = t.v + base;
      M bad = none();
      sweep(t.numel, [&](int64_t j, int m) {
        const F gj = at(g, j, m), yj = at(y, j, m), w = fma(sub(zero, Value::get(kick, j, m)), gj, at(v, j, m));
        put(v, j, w, m);
        const F test = add(add(sub(gj, gj), sub(yj, yj)), sub(w, w));
        bad = either(bad, both(lanes(m), unequal(test, test)));
      });
      finite = finite && count(bad) == 0;
    }
    if (!finite) job.alive[row] = 0;
    if (!job.freeze) continue;
    const bool goes = job.alive[row] != 0;
    for (int64_t i = 0; i < job.count; ++i) {
      const MovingTensor& t = job.tensors[i];
      const int64_t base = row * t.numel;
      const size_t size = sizeof(float) * static_cast<size_t>(t.numel);
      if (goes) {
        memcpy(t.x + base, t.y + base, size);
        memcpy(t.g + base, t.grad + base, size);
      } else {
        memcpy(t.v + base, t.before + base, size);
      }
    }
    if (goes && job.energy) job.energy[row] = job.new_energy[row];
  }
}

MMEBM_INLINE double number_at(const Coefficient& c, int64_t row) {
  return c.kind == Coefficient::chain ? static_cast<double>(c.values[row]) : c.value;
}

// The factor of the norm clip, of the gradient after its element-wise clip.
MMEBM_INLINE double clip_factor(const float* g, int64_t n, double clip, double limit) {
  double lane[16] = {};
  for (int64_t j = 0; j < n; ++j) {
    double v = static_cast<double>(g[j]);
    v = v < -clip ? -clip : v;
    v = v > clip ? clip : v;
    lane[j % 16] += v * v;
  }
  const double norm = __builtin_sqrt(sum_of_lanes(lane));
  return norm > limit ? limit / norm : norm <= limit ? 1.0 : norm;
}

// metropolis.log_ratio, and the decision: rejected rows of y become those of x.
void decide(const ProposalJob& job, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const double temperature = job.temperatures ? job.temperatures[row] : job.temperature;
    const double e = static_cast<double>(job.energy[row]), e_new = static_cast<double>(job.new_energy[row]);
    double ratio = (e - e_new) / temperature;
    bool finite = finite_number(e_new);
    for (int64_t i = 0; i < job.count; ++i) {
      const ProposalTensor& t = job.tensors[i];
      const int64_t base = row * t.numel;
      const float *x = t.x + base, *y = t.y + base, *gx = t.gx + base, *gy = t.gy + base;
      const uint8_t* observed = t.observed ? t.observed + base : nullptr;
      const double size = number_at(t.c[SIZE], row), scale = number_at(t.c[SCALE], row);
      const double clip = t.has[CLIP] ? number_at(t.c[CLIP], row) : static_cast<double>(__builtin_inff());
      const double prior = t.has[PRIOR] ? number_at(t.c[PRIOR], row) : 0.0;
      const double precision = t.has[PRIOR] ? 1.0 / (prior * prior) : 0.0;
      double factor_x = 1.0, factor_y = 1.0;
      if (t.has[NORM_CLIP]) {
        const double limit = number_at(t.c[NORM_CLIP], row);
        factor_x = clip_factor(gx, t.numel, clip, limit);
        factor_y = clip_factor(gy, t.numel, clip, limit);
      }
      alignas(64) double drift[16] = {}, quadratic[16] = {}, broken[16] = {};
      const auto term = [&](int64_t j, int lane) __attribute__((always_inline)) {
        const double a = static_cast<double>(x[j]), b = static_cast<double>(y[j]);
        double ga = static_cast<double>(gx[j]), gb = static_cast<double>(gy[j]);
        // what is observed does not move the chain
        broken[lane] += observed && observed[j] ? 0.0 : (gb - gb) + (b - b);
        ga = ga < -clip ? -clip : ga;
        ga = ga > clip ? clip : ga;
        gb = gb < -clip ? -clip : gb;
        gb = gb > clip ? clip : gb;
        const double bx = size * (ga * factor_x + a * precision), by = size * (gb * factor_y + b * precision);
        const double part = (bx + by) * (b - a - (by - bx) * 0.5);
        drift[lane] += observed && observed[j] ? 0.0 : part;
        quadratic[lane] += (b - a) * (b + a);
      };
      int64_t j = 0;
      for (; j + 16 <= t.numel; j += 16) {
        for (int lane = 0; lane < 16; ++lane) term(j + lane, lane);
      }
      for (int lane = 0; j < t.numel; ++j, ++lane) term(j, lane);
      ratio += sum_of_lanes(drift) / (scale * scale);
      if (t.has[PRIOR]) ratio -= sum_of_lanes(quadratic) * precision * 0.5 / temperature;
      finite = finite && sum_of_lanes(broken) == 0.0;
    }
    const bool allowed = finite && !(job.alive && job.alive[row] == 0);
    const double prob = allowed ? probability(ratio) : 0.0;
    const int64_t chain = row / job.rows_per_chain;
    const bool accept = static_cast<double>(uniform_at(job.at, chain, row % job.rows_per_chain)) < prob;
    job.accept_prob[row] = static_cast<float>(prob);
    job.accepted[row] = accept ? 1 : 0;
    for (int64_t i = 0; i < job.count; ++i) {
      const ProposalTensor& t = job.tensors[i];
      const int64_t base = row * t.numel;
      const size_t bytes_of_row = sizeof(float) * static_cast<size_t>(t.numel);
      if (!accept) memcpy(t.y + base, t.x + base, bytes_of_row);
      if (accept && job.keep) memcpy(t.gx + base, t.gy + base, bytes_of_row);
    }
    if (accept && job.keep) job.energy[row] = job.new_energy[row];
  }
}

void finite(const float* values, int64_t numel, uint8_t* alive, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    M bad = none();
    const float* from = values + row * numel;
    sweep(numel, [&](int64_t j, int m) {
      const F v = at(from, j, m), test = sub(v, v);
      bad = either(bad, both(lanes(m), unequal(test, test)));
    });
    if (count(bad) != 0) alive[row] = 0;
  }
}

}  // namespace

const DynamicsLoops MMEBM_LOOPS(dynamics_loops) = {hmc_start, leap, hmc_end, baoa, baoab_end, decide, finite};

}  // namespace mmebm
