// The update rule of one Langevin step on G consecutive elements of one chain, for host and device. The rule is
// mmebm/ops/langevin_step/reference.py, the noise mmebm/noise.py. What one thread of csrc/langevin_step/cuda.cu and of
// csrc/langevin_mlp/cuda.cu does to a group is made of these functions, and the tests run them on the host. The CPU's
// vectors have their own, in rule_vec.h, which says why.
//
//     g = clip(g);  g = g f;  g = +-g;  g = g + x / prior_std^2
//     d = s xi - a g;  d = clamp(d);  y = x + d;  y = clamp(y)
//
// f is the norm clip's factor, which the caller knows. Arithmetic is fp32, states and gradients are stored as fp32,
// bf16 or fp16. A group is what 16 bytes of the state hold, G = 4 or 8: one Philox block an fp32 group, two a 16-bit
// one, and one more for its stochastic rounding.
//
// NaN stays NaN everywhere, and a NaN limit makes NaN, as torch.clamp does: comparisons are written so that they fail
// towards it. Options are bits that all threads of a block share, tested once a group.
#pragma once

#include <cstdint>

#include "common/philox.h"

#if defined(__CUDA_ARCH__) || defined(__clang__)
#define MMEBM_UNROLL _Pragma("unroll")
#elif defined(__GNUC__) && !defined(__CUDACC__)
#define MMEBM_UNROLL _Pragma("GCC unroll 8")
#else
#define MMEBM_UNROLL
#endif

namespace mmebm {

enum class Storage : int32_t { fp32 = 0, bf16 = 1, fp16 = 2 };

// The constants of a step, and the columns of a whole chain's table, in the order of StepParams
// (mmebm/ops/common/params.py).
enum Slot { STEP_SIZE, NOISE_SCALE, GRAD_CLIP, GRAD_NORM_CLIP, MAX_UPDATE, PRIOR_STD, LOW, HIGH, SLOTS };

// Bits of what stays the same along a chain, in the order of OPTIONS (mmebm/ops/common/params.py).
enum Option : uint32_t {
  REJECT_OUTSIDE = 1,  // low and high reject the chain instead of clamping
  CLAMP_NOISE = 2,     // they clamp also where the noise stands before the gradient
  NORM_OF_TENSOR = 4,  // grad_norm_clip limits the whole tensor's norm, not each chain's
  SCORE = 8            // the gradient is that of log p: it counts with the other sign
};
constexpr uint32_t ALL_OPTIONS = 15;

// How a constant is given: a number, or fp32 numbers at an address: one per chain, per element, or just one.
enum class Kind : int32_t { absent = 0, scalar = 1, chain = 2, element = 3, one = 4 };

// What applies to a group: bit 1 << slot for each constant, and these.
enum : uint32_t { WITH_NOISE = 1u << SLOTS, WITH_GRAD = 2u << SLOTS, WITH_SCORE = 4u << SLOTS };

// One chain's constants; at PRIOR_STD its inverse. What is absent is not read.
struct Constants {
  float of[SLOTS];
};

template <int G>
struct Group {
  float v[G];
};

MMEBM_HD bool is_nan(float v) { return v != v; }

MMEBM_HD bool is_finite(float v) { return (float_bits(v) & 0x7f800000u) != 0x7f800000u; }

MMEBM_HD float magnitude(float v) { return bits_float(float_bits(v) & 0x7fffffffu); }

MMEBM_HD float at_least(float v, float low) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  float out;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(v), "f"(low));
  return out;
#else
  return v >= low || is_nan(v) ? v : low;
#endif
}

MMEBM_HD float at_most(float v, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  float out;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(v), "f"(high));
  return out;
#else
  return v <= high || is_nan(v) ? v : high;
#endif
}

MMEBM_HD float between(float v, float low, float high) { return at_most(at_least(v, low), high); }

// The factor that brings a norm down to its limit: 1 up to the limit, exactly, an infinite one too; NaN for a NaN norm,
// so that a broken chain is seen.
MMEBM_HD float norm_factor(float squares, float limit) {
  const float norm = sqrtf(squares);
  return norm <= limit ? 1.0f : limit / norm;
}

template <int G>
MMEBM_HD void clip_value(Group<G>& g, float limit) {
  MMEBM_UNROLL
  for (int j = 0; j < G; ++j) g.v[j] = between(g.v[j], -limit, limit);
}

template <int U, int G>
MMEBM_HD void bounded(Group<G> (&y)[U], const Constants (&c)[U], uint32_t with) {
  if (with & 1u << LOW) {
    MMEBM_UNROLL
    for (int u = 0; u < U; ++u) {
      MMEBM_UNROLL
      for (int j = 0; j < G; ++j) y[u].v[j] = at_least(y[u].v[j], c[u].of[LOW]);
    }
  }
  if (with & 1u << HIGH) {
    MMEBM_UNROLL
    for (int u = 0; u < U; ++u) {
      MMEBM_UNROLL
      for (int j = 0; j < G; ++j) y[u].v[j] = at_most(y[u].v[j], c[u].of[HIGH]);
    }
  }
}

// The bits of the elements that are beyond a limit in size: not NaN.
template <int G>
MMEBM_HD uint32_t beyond(const Group<G>& v, float limit) {
  uint32_t bits = 0;
  MMEBM_UNROLL
  for (int j = 0; j < G; ++j) bits |= magnitude(v.v[j]) > limit ? 1u << j : 0u;
  return bits;
}

// x + d of U groups, before the bounds. `noise` is that times its scale, or zeros; `c` is each group's.
// `changed`: bits of the elements that a clip changed.
template <int U, int G>
MMEBM_HD void propose(const Group<G> (&x)[U], Group<G> (&g)[U], const Group<G> (&noise)[U], float factor,
                      const Constants (&c)[U], uint32_t with, Group<G> (&y)[U], uint32_t (&changed)[U]) {
  MMEBM_UNROLL
  for (int u = 0; u < U; ++u) changed[u] = 0;
  if (with & 1u << GRAD_CLIP) {
    MMEBM_UNROLL
    for (int u = 0; u < U; ++u) {
      changed[u] = beyond(g[u], c[u].of[GRAD_CLIP]);
      clip_value(g[u], c[u].of[GRAD_CLIP]);
    }
  }
  if (with & 1u << GRAD_NORM_CLIP) {
    MMEBM_UNROLL
    for (int u = 0; u < U; ++u) {
      if (factor < 1.0f) changed[u] = (1u << G) - 1u;
      MMEBM_UNROLL
      for (int j = 0; j < G; ++j) g[u].v[j] = g[u].v[j] * factor;
    }
  }
  if (with & WITH_SCORE) {
    MMEBM_UNROLL
    for (int u = 0; u < U; ++u) {
      MMEBM_UNROLL
      for (int j = 0; j < G; ++j) g[u].v[j] = -g[u].v[j];
    }
  }
  if (with & 1u << PRIOR_STD) {
    MMEBM_UNROLL
    for (int u = 0; u < U; ++u) {
      // not times 1 / std^2, which overflows where the quotient does not
      const float inverse = c[u].of[PRIOR_STD];
      MMEBM_UNROLL
      for (int j = 0; j < G; ++j) g[u].v[j] = fmaf(x[u].v[j] * inverse, inverse, g[u].v[j]);
    }
  }
  MMEBM_UNROLL
  for (int u = 0; u < U; ++u) {
    MMEBM_UNROLL
    for (int j = 0; j < G; ++j) y[u].v[j] = noise[u].v[j];
  }
  if (with & WITH_GRAD) {
    MMEBM_UNROLL
    for (int u = 0; u < U; ++u) {
      MMEBM_UNROLL
      for (int j = 0; j < G; ++j) y[u].v[j] = fmaf(-c[u].of[STEP_SIZE], g[u].v[j], y[u].v[j]);
    }
  }
  if (with & 1u << MAX_UPDATE) {
    MMEBM_UNROLL
    for (int u = 0; u < U; ++u) {
      changed[u] |= beyond(y[u], c[u].of[MAX_UPDATE]);
      clip_value(y[u], c[u].of[MAX_UPDATE]);
    }
  }
  MMEBM_UNROLL
  for (int u = 0; u < U; ++u) {
    MMEBM_UNROLL
    for (int j = 0; j < G; ++j) y[u].v[j] = x[u].v[j] + y[u].v[j];
  }
}

// The bits of the elements that leave the bounds; NaN does.
template <int G>
MMEBM_HD uint32_t leaving(const Group<G> (&y)[1], const Constants (&c)[1], uint32_t with) {
  Group<G> inside[1] = {y[0]};
  bounded(inside, c, with);
  uint32_t bits = 0;
  MMEBM_UNROLL
  for (int j = 0; j < G; ++j) bits |= inside[0].v[j] == y[0].v[j] ? 0u : 1u << j;
  return bits;
}

// -- 16-bit numbers

MMEBM_HD float bf16_float(uint32_t bits) { return bits_float(bits << 16); }

MMEBM_HD float fp16_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(static_cast<uint16_t>(bits)));
  return out;
#else
  // The exponents' biases differ by 112; the product is exact, for subnormals too.
  const uint32_t rest = (bits & 0x7fffu) << 13, sign = (bits & 0x8000u) << 16;
  const bool infinite = (bits & 0x7c00u) == 0x7c00u;
  return bits_float(sign | (infinite ? rest | 0x7f800000u : float_bits(bits_float(rest) * 0x1p112f)));
#endif
}

// The bits of an fp32 number that fp16 holds, or that is at least 2^16 in size: infinity.
MMEBM_HD uint32_t float_fp16(float v) {
#if defined(__CUDA_ARCH__)
  uint16_t out;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out) : "f"(v));
  return out;
#else
  const uint32_t sign = float_bits(v) >> 16 & 0x8000u;
  if (is_nan(v)) return sign | 0x7e00u;
  const float size = magnitude(v);
  return sign | (size >= 0x1p16f ? 0x7c00u : float_bits(size * 0x1p-112f) >> 13);
#endif
}

// fp32 to 16 bits, to the neighbour above where the fraction left over exceeds (half + 1/2) 2^-16: unbiased. "Above" is
// towards +inf, so the magnitude of a negative number grows where its own fraction is large against the complement.
MMEBM_HD uint32_t round_bf16(float y, uint32_t half) {
  // The fraction is the low half of the bits, for subnormals too; that of infinity is 0. It exceeds the threshold where
  // adding the threshold's complement carries.
  const uint32_t bits = float_bits(y);
  return is_nan(y) ? 0x7fc0u : (bits + (bits >> 31 ? half : 0xffffu - half)) >> 16;
}

MMEBM_HD uint32_t round_fp16(float y, uint32_t half) {
  // The unit in the last place of fp16 at y is a power of two, 2^-24 at least: scaling by it is exact.
  const uint32_t bits = float_bits(y), biased = bits >> 23 & 0xffu;
  const uint32_t exponent = biased < 113u ? 113u : biased;
  const float unit = bits_float((exponent - 10u) << 23), inverse = bits_float((264u - exponent) << 23);
  const float scaled = magnitude(y) * inverse;
  const float down = floorf(scaled);
  const float fraction = scaled - down;
  const float threshold = (static_cast<float>(half) + 0.5f) * 0x1p-16f;
  const bool negative = bits >> 31 != 0;
  // 1 - threshold is exact
  const bool grows = negative ? fraction >= 1.0f - threshold : fraction > threshold;
  const float rounded = (grows ? down + 1.0f : down) * unit;
  return float_fp16(biased == 0xffu ? y : negative ? -rounded : rounded);
}

// The two bf16 numbers of a word. In assembly: a compiler that sees what this is does it again wherever it is needed.
MMEBM_HD void bf16_pair(uint32_t word, float& low, float& high) {
  uint32_t a, b;
#if defined(__CUDA_ARCH__)
  asm("shl.b32 %0, %1, 16;" : "=r"(a) : "r"(word));
  asm("and.b32 %0, %1, 0xffff0000;" : "=r"(b) : "r"(word));
#else
  a = word << 16, b = word & 0xffff0000u;
#endif
  low = bits_float(a), high = bits_float(b);
}

template <Storage S>
MMEBM_HD uint32_t stochastic_round(float y, uint32_t half) {
  return S == Storage::bf16 ? round_bf16(y, half) : round_fp16(y, half);
}

// N numbers to 16 bits, two in a word, with the thresholds of `halves`.
template <Storage S, int N>
MMEBM_HD void round_all(const float (&y)[N], const uint32_t (&halves)[N / 2], uint32_t (&out)[N / 2]) {
#if defined(__CUDA_ARCH__)
  if (S == Storage::bf16) {
    static_assert(N == 8, "one chain of comparisons");
    MMEBM_UNROLL
    for (int i = 0; i < N / 2; ++i) {
      // round_bf16: what is added is (half ^ ~sign) & 0xffff, here for both numbers at once; a dot product takes one of
      // the two halves and adds it
      const uint32_t low = float_bits(y[2 * i]), high = float_bits(y[2 * i + 1]);
      uint32_t sign, add, low_sum, high_sum;
      asm("prmt.b32 %0, %1, %2, 0xffbb;" : "=r"(sign) : "r"(low), "r"(high));
      asm("lop3.b32 %0, %1, %2, 0, 0xc3;" : "=r"(add) : "r"(halves[i]), "r"(sign));
      asm("dp2a.lo.u32.u32 %0, %1, 0x0001, %2;" : "=r"(low_sum) : "r"(add), "r"(low));
      asm("dp2a.lo.u32.u32 %0, %1, 0x0100, %2;" : "=r"(high_sum) : "r"(add), "r"(high));
      out[i] = __byte_perm(low_sum, high_sum, 0x7632);
    }
    uint32_t nan;
    asm("{ .reg .pred p; setp.nan.f32 p, %1, %2; setp.nan.or.f32 p, %3, %4, p; setp.nan.or.f32 p, %5, %6, p; "
        "setp.nan.or.f32 p, %7, %8, p; selp.u32 %0, 1, 0, p; }"
        : "=r"(nan)
        : "f"(y[0]), "f"(y[1]), "f"(y[2]), "f"(y[3]), "f"(y[4]), "f"(y[5]), "f"(y[6]), "f"(y[7]));
    if (nan == 0) return;
  }
#endif
  MMEBM_UNROLL
  for (int i = 0; i < N / 2; ++i) {
    out[i] = stochastic_round<S>(y[2 * i], halves[i] & 0xffffu) |
             stochastic_round<S>(y[2 * i + 1], halves[i] >> 16) << 16;
  }
}

}  // namespace mmebm
