// The loops of residual, compiled once per instruction set (common/isa.h). job.h says how the work is cut into tiles.
//
// Everything goes in steps of 16 elements whose loops have a constant length, which the compiler turns into vectors of
// whatever width there is. Sums are in double over these 16 lanes and the lanes are added in one order: where the terms
// are squares and absolute values of float differences, exact in double, every instruction set gives the same bits. The
// exponential of the categorical terms may be fused differently, in the last bit.
#include <cstdint>
#include <cstring>

#include "common/half.h"
#include "residual/job.h"

namespace mmebm {
namespace {

#define MMEBM_ALWAYS static inline __attribute__((always_inline, unused))

constexpr int LANES = 16;

MMEBM_ALWAYS double at(const PerChain& p, int64_t chain) {
  return p.values ? static_cast<double>(p.values[chain]) : p.value;
}

MMEBM_ALWAYS double lanes_sum(double* lane) {
  for (int width = LANES / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  }
  return lane[0];
}

// ------------------------------------------------------------------------------------------------------------- storage

void widen(const void* from, Storage storage, int64_t base, float* to, int64_t n) {
  const uint16_t* h = static_cast<const uint16_t*>(from) + base;
  if (storage == Storage::bf16) {
    for (int64_t i = 0; i < n; ++i) to[i] = from_bf16(h[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = from_fp16(h[i]);
  }
}

void narrow(const float* from, Storage storage, void* to, int64_t base, int64_t n) {
  uint16_t* h = static_cast<uint16_t*>(to) + base;
  if (storage == Storage::bf16) {
    for (int64_t i = 0; i < n; ++i) h[i] = to_bf16(from[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) h[i] = to_fp16(from[i]);
  }
}

// n elements from `base` on as floats, in `buffer` where they are stored in 16 bits.
MMEBM_ALWAYS const float* floats(const void* from, Storage storage, int64_t base, int64_t n, float* buffer) {
  if (storage == Storage::fp32) return static_cast<const float*>(from) + base;
  widen(from, storage, base, buffer, n);
  return buffer;
}

MMEBM_ALWAYS float load_one(const void* from, Storage storage, int64_t i) {
  if (storage == Storage::fp32) return static_cast<const float*>(from)[i];
  const uint16_t h = static_cast<const uint16_t*>(from)[i];
  return storage == Storage::bf16 ? from_bf16(h) : from_fp16(h);
}

// Up to 16 elements; what is not there is `fill`.
MMEBM_ALWAYS void load_16(float* out, const void* from, Storage storage, int64_t base, int n, float fill) {
  if (n < LANES) {
    for (int j = 0; j < LANES; ++j) out[j] = fill;
    for (int j = 0; j < n; ++j) out[j] = load_one(from, storage, base + j);
  } else if (storage == Storage::fp32) {
    memcpy(out, static_cast<const float*>(from) + base, LANES * sizeof(float));
  } else {
    widen(from, storage, base, out, LANES);
  }
}

MMEBM_ALWAYS void store_16(const float* from, Storage storage, void* to, int64_t base, int n) {
  if (storage == Storage::fp32) {
    float* out = static_cast<float*>(to) + base;
    if (n == LANES) {
      memcpy(out, from, LANES * sizeof(float));
    } else {
      memcpy(out, from, sizeof(float) * static_cast<size_t>(n));
    }
  } else {
    narrow(from, storage, to, base, n);
  }
}

// ------------------------------------------------------------------------------------------------ gaussian and laplace

// Selections are by bits: of a condition on a byte the compiler makes jumps.
template <bool LAPLACE, bool MASK>
MMEBM_ALWAYS void terms_16(const float* __restrict y, const float* __restrict t, const uint8_t* __restrict keep,
                           float* __restrict g, float c, double* __restrict lane) {
  alignas(64) uint32_t mask[LANES];
  alignas(64) float r[LANES];
  if (MASK) {
    for (int j = 0; j < LANES; ++j) mask[j] = 0u - static_cast<uint32_t>(keep[j] != 0);
  }
  for (int j = 0; j < LANES; ++j) {
    r[j] = y[j] - t[j];
    if (MASK) r[j] = bits_float(float_bits(r[j]) & mask[j]);
  }
  for (int j = 0; j < LANES; ++j) {
    const double wide = static_cast<double>(r[j]);
    lane[j] += LAPLACE ? __builtin_fabs(wide) : wide * wide;
  }
  for (int j = 0; j < LANES; ++j) {
    float d = r[j];
    if (LAPLACE) {
      const float sign = bits_float((float_bits(d) & 0x80000000u) | 0x3f800000u);
      d = d != 0.0f ? sign : 0.0f;
      d = r[j] != r[j] ? r[j] : d;  // a NaN is its own sign, so that it stays visible
    }
    const float slope = c * d;
    g[j] = MASK ? bits_float(float_bits(slope) & mask[j]) : slope;
  }
}

// The sum of squares or absolute values of n residuals, and c times its slope to g.
template <bool LAPLACE, bool MASK>
double terms(const float* y, const float* t, const uint8_t* keep, float* g, int64_t n, float c) {
  alignas(64) double lane[LANES] = {};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) terms_16<LAPLACE, MASK>(y + i, t + i, keep + (MASK ? i : 0), g + i, c, lane);
  if (i < n) {
    alignas(64) float yb[LANES] = {}, tb[LANES] = {}, gb[LANES];
    uint8_t kb[LANES] = {};
    const size_t rest = static_cast<size_t>(n - i);
    memcpy(yb, y + i, sizeof(float) * rest);
    memcpy(tb, t + i, sizeof(float) * rest);
    if (MASK) memcpy(kb, keep + i, rest);
    terms_16<LAPLACE, MASK>(yb, tb, kb, gb, c, lane);
    memcpy(g + i, gb, sizeof(float) * rest);
  }
  return lanes_sum(lane);
}

void elements(const ResidualJob& job, const ResidualTensor& t, int64_t row, int64_t rows, int64_t begin, int64_t end,
              int64_t slot) {
  alignas(64) float y_buffer[TILE], t_buffer[TILE], g_buffer[TILE];
  const int64_t n = end - begin, total = rows * n, base = row * t.positions + begin;
  const float* y = floats(t.prediction, t.storage, base, total, y_buffer);
  const float* target = floats(t.target, t.target_storage, base, total, t_buffer);
  const bool direct = t.grad && t.storage == Storage::fp32;
  float* g = direct ? static_cast<float*>(t.grad) + base : g_buffer;
  const bool laplace = t.likelihood == Likelihood::laplace;
  for (int64_t r = 0; r < rows; ++r) {
    const double scale = at(t.scale, row + r), weight = at(t.weight, row + r);
    const double slope = weight / (laplace ? scale : scale * scale);
    const float c = static_cast<float>(slope);
    const int64_t o = r * n;
    double sum;
    if (t.observed) {
      const uint8_t* keep = t.observed + (t.observed_rows ? (row + r) * t.positions : 0) + begin;
      sum = laplace ? terms<true, true>(y + o, target + o, keep, g + o, n, c)
                    : terms<false, true>(y + o, target + o, keep, g + o, n, c);
    } else {
      sum = laplace ? terms<true, false>(y + o, target + o, nullptr, g + o, n, c)
                    : terms<false, false>(y + o, target + o, nullptr, g + o, n, c);
    }
    job.sums[slot + r] = (laplace ? slope : 0.5 * slope) * sum;
  }
  if (t.grad && !direct) narrow(g_buffer, t.storage, t.grad, base, total);
}

// --------------------------------------------------------------------------------------------------------- categorical

// e^x for x <= 0, relative error 2e-7; 0 below -87, where floats are about to become subnormal. NaN stays NaN.
MMEBM_ALWAYS float exp_16(float x) {
  // adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits
  const float shifted = x * 1.44269504f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // log 2 in two parts: the first product is exact
  float p = 1.3814599e-3f * r + 8.368717e-3f;
  p = p * r + 4.166839e-2f;
  p = p * r + 1.6666521e-1f;
  p = p * r + 4.9999994e-1f;
  p = (p * r) * r + r;
  const uint32_t exponent = float_bits(shifted) - 0x4b400000u + 127u;
  const uint32_t large = x < -87.0f ? 0u : 0xffffffffu;
  return bits_float(float_bits((p + 1.0f) * bits_float(exponent << 23)) & large);
}

// What one position adds, and what its gradients are made of.
struct Position {
  double value = 0.0;
  float scale = 0.0f;   // weight / sum of exponentials; NaN for a class that does not exist
  float weight = 0.0f;  // taken off at the target's class
  int64_t target = -1;
  bool counts = false;
};

MMEBM_ALWAYS Position position(const ResidualTensor& t, int64_t chain, int64_t at_position, int64_t base, float most,
                               double sum, double weight) {
  Position p;
  if (t.observed && !t.observed[(t.observed_rows ? chain * t.positions : 0) + at_position]) return p;
  p.counts = true;
  const int64_t k = static_cast<const int64_t*>(t.target)[chain * t.positions + at_position];
  if (k < 0 || k >= t.classes) {
    p.value = __builtin_nan("");
    p.scale = __builtin_nanf("");
    return p;
  }
  const double chosen = static_cast<double>(load_one(t.prediction, t.storage, base + k * t.positions + at_position));
  p.value = weight * ((static_cast<double>(most) - chosen) + __builtin_log(sum));
  p.scale = static_cast<float>(weight / sum);
  p.weight = static_cast<float>(weight);
  p.target = k;
  return p;
}

// One position a chain: the lanes are classes.
double classes_of_one(const ResidualTensor& t, int64_t chain, double weight) {
  const int64_t base = chain * t.classes;
  const auto part = [&t, base](float* v, int64_t k) {
    const int n = t.classes - k < LANES ? static_cast<int>(t.classes - k) : LANES;
    load_16(v, t.prediction, t.storage, base + k, n, -__builtin_inff());
    return n;
  };
  alignas(64) float v[LANES], best[LANES];
  alignas(64) double sum[LANES] = {};
  for (int j = 0; j < LANES; ++j) best[j] = -__builtin_inff();
  for (int64_t k = 0; k < t.classes; k += LANES) {
    part(v, k);
    for (int j = 0; j < LANES; ++j) best[j] = v[j] > best[j] ? v[j] : best[j];
  }
  float most = best[0];
  for (int j = 1; j < LANES; ++j) most = best[j] > most ? best[j] : most;
  for (int64_t k = 0; k < t.classes; k += LANES) {
    const int n = part(v, k);
    if (n == LANES) {
      for (int j = 0; j < LANES; ++j) sum[j] += static_cast<double>(exp_16(v[j] - most));
    } else {
      for (int j = 0; j < n; ++j) sum[j] += static_cast<double>(exp_16(v[j] - most));
    }
  }
  const Position p = position(t, chain, 0, base, most, lanes_sum(sum), weight);
  if (t.grad) {
    for (int64_t k = 0; k < t.classes; k += LANES) {
      const int n = part(v, k);
      alignas(64) float g[LANES];
      for (int j = 0; j < LANES; ++j) g[j] = p.counts ? p.scale * exp_16(v[j] - most) : 0.0f;
      if (p.target >= k && p.target < k + LANES) g[p.target - k] -= p.weight;
      store_16(g, t.storage, t.grad, base + k, n);
    }
  }
  return p.value;
}

// Up to 16 positions of a chain: the lanes are positions.
double classes_of_16(const ResidualTensor& t, int64_t chain, int64_t first, int n, double weight) {
  const int64_t base = chain * t.classes * t.positions;
  const auto part = [&t, base, first, n](float* v, int64_t k) {
    load_16(v, t.prediction, t.storage, base + k * t.positions + first, n, 0.0f);
  };
  alignas(64) float v[LANES], most[LANES];
  alignas(64) double sum[LANES] = {};
  for (int j = 0; j < LANES; ++j) most[j] = -__builtin_inff();
  for (int64_t k = 0; k < t.classes; ++k) {
    part(v, k);
    for (int j = 0; j < LANES; ++j) most[j] = v[j] > most[j] ? v[j] : most[j];
  }
  for (int64_t k = 0; k < t.classes; ++k) {
    part(v, k);
    for (int j = 0; j < LANES; ++j) sum[j] += static_cast<double>(exp_16(v[j] - most[j]));
  }
  alignas(64) float scale[LANES] = {}, off[LANES] = {};
  alignas(64) int32_t target[LANES];
  alignas(64) uint32_t counts[LANES] = {};
  double value = 0.0;
  for (int j = 0; j < LANES; ++j) target[j] = -1;
  for (int j = 0; j < n; ++j) {
    const Position p = position(t, chain, first + j, base, most[j], sum[j], weight);
    value += p.value;
    scale[j] = p.scale;
    off[j] = p.weight;
    target[j] = static_cast<int32_t>(p.target);
    counts[j] = p.counts ? 0xffffffffu : 0u;
  }
  if (t.grad) {
    for (int64_t k = 0; k < t.classes; ++k) {
      part(v, k);
      alignas(64) float g[LANES];
      for (int j = 0; j < LANES; ++j) {
        const uint32_t here = target[j] == static_cast<int32_t>(k) ? 0xffffffffu : 0u;
        const float full = scale[j] * exp_16(v[j] - most[j]) - bits_float(float_bits(off[j]) & here);
        g[j] = bits_float(float_bits(full) & counts[j]);
      }
      store_16(g, t.storage, t.grad, base + k * t.positions + first, n);
    }
  }
  return value;
}

void classes(const ResidualJob& job, const ResidualTensor& t, int64_t row, int64_t rows, int64_t begin, int64_t end,
             int64_t slot) {
  for (int64_t r = 0; r < rows; ++r) {
    const double weight = at(t.weight, row + r);
    double sum = 0.0;
    if (t.positions == 1) {
      sum = classes_of_one(t, row + r, weight);
    } else {
      for (int64_t first = begin; first < end; first += LANES) {
        const int n = end - first < LANES ? static_cast<int>(end - first) : LANES;
        sum += classes_of_16(t, row + r, first, n, weight);
      }
    }
    job.sums[slot + r] = sum;
  }
}

void tile(const ResidualJob& job, const ResidualTensor& t, int64_t index) {
  int64_t row, rows, begin = 0, end = t.positions, slot;
  if (t.parts == 1) {
    row = index * t.rows;
    rows = job.chains - row < t.rows ? job.chains - row : t.rows;
    slot = t.first_slot + row;
  } else {
    row = index / t.parts;
    rows = 1;
    begin = index % t.parts * t.part;
    end = begin + t.part < t.positions ? begin + t.part : t.positions;
    slot = t.first_slot + index;
  }
  (t.likelihood == Likelihood::categorical ? classes : elements)(job, t, row, rows, begin, end, slot);
}

#undef MMEBM_ALWAYS

}  // namespace

const ResidualLoops MMEBM_LOOPS(residual_loops) = {tile};

}  // namespace mmebm
