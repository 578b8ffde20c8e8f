// The noise of every chain in C++ and CUDA: the same definition as mmebm/noise.py, which is the authority.
//
//     key     = seed                            two words, low first
//     counter = (block, chain, step, stream)    four words
//
// Word j of block b belongs to element 4 b + j of one chain's tensor, row-major. The words, u and the angle are
// bit-equal to noise.py. The normals are evaluated in fp32 and must stay within 2e-6 of its float64 values. Measured on
// x86-64, gcc 12, with and without fused multiply-add, over 2^28 words spread evenly: 4.0e-7 at angle 0, and 9.0e-7 over
// all angles at the largest radius.
//
// There is no table, no branch and no library call except sqrt, so that loops over blocks vectorise and the same lines
// serve the GPU.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// Internal linkage and forced inlining: this header is compiled with different instruction sets in one library (see
// csrc/noise/cpu_kernel.cpp), and a shared out-of-line copy could be the one that an older processor cannot run.
#if defined(__CUDACC__)
#define MMEBM_HD static __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define MMEBM_HD static inline __attribute__((always_inline, unused))
#else
#define MMEBM_HD static inline
#endif

namespace mmebm {

struct Words {
  uint32_t w0, w1, w2, w3;
};

struct Normals {
  float n0, n1, n2, n3;
};

// Where in the noise an array lies: everything but chain and element. Row i of an array is chain chain_offset + i.
struct NoiseAt {
  uint64_t seed;
  uint32_t step, stream, chain_offset;
};

MMEBM_HD uint32_t mulhi(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
}

MMEBM_HD Words philox4x32_10(uint32_t block, uint32_t chain, uint32_t step, uint32_t stream, uint64_t seed) {
  uint32_t c0 = block, c1 = chain, c2 = step, c3 = stream;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#if defined(__CUDA_ARCH__) || defined(__clang__)
#pragma unroll
#elif defined(__GNUC__) && !defined(__CUDACC__)
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    const uint32_t hi0 = mulhi(0xD2511F53u, c0), lo0 = 0xD2511F53u * c0;
    const uint32_t hi1 = mulhi(0xCD9E8D57u, c2), lo1 = 0xCD9E8D57u * c2;
    c0 = hi1 ^ c1 ^ k0;
    c1 = lo1;
    c2 = hi0 ^ c3 ^ k1;
    c3 = lo0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {c0, c1, c2, c3};
}

// The words of one block of row `row` of an array.
MMEBM_HD Words words_at(int64_t row, int64_t block, NoiseAt at) {
  return philox4x32_10(static_cast<uint32_t>(block), at.chain_offset + static_cast<uint32_t>(row), at.step, at.stream,
                       at.seed);
}

MMEBM_HD uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

MMEBM_HD float bits_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// u(w) = fl32(w) 2^-32 + 2^-33, in (0, 1]. The product is exact, so a fused multiply-add gives the same bits.
MMEBM_HD float unit_open(uint32_t w) {
  return static_cast<float>(w) * 0x1p-32f + 0x1p-33f;
}

// a(w) = fl32(int32(w)) 2^-31, the angle in half turns, in [-1, 1].
MMEBM_HD float half_turns(uint32_t w) {
  return static_cast<float>(static_cast<int32_t>(w)) * 0x1p-31f;
}

// Uniform in [0, 1), 24 bits.
MMEBM_HD float uniform24(uint32_t w) {
  return static_cast<float>(w >> 8) * 0x1p-24f;
}

MMEBM_HD float uniform_at(NoiseAt where, int64_t chain, int64_t element) {
  const Words w = words_at(chain, element / 4, where);
  const uint32_t word = element % 4 == 0 ? w.w0 : element % 4 == 1 ? w.w1 : element % 4 == 2 ? w.w2 : w.w3;
  return uniform24(word);
}

// sqrt(-2 log u) for u in [2^-33, 1].
MMEBM_HD float radius(float u) {
  // u = 2^e m with m in [sqrt(1/2), sqrt(2)), so that log is accurate relative to itself also next to u = 1.
  const int32_t above = static_cast<int32_t>(float_bits(u)) - 0x3f3504f3;
  const int32_t e = above >> 23;
  const float f = bits_float(static_cast<uint32_t>(static_cast<int32_t>(float_bits(u)) - e * (1 << 23))) - 1.0f;
  // log(1 + f) = f - f^2/2 + f^3 P(f), P from Cephes logf (S. Moshier); log 2 in two parts, the first exact times e.
  float p = 7.0376836292e-2f;
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const float square = f * f;
  const float exponent = static_cast<float>(e);
  const float log_u = (f + (f * square * p + exponent * -2.12194440e-4f - 0.5f * square)) + exponent * 0.693359375f;
  // The rounding of log u can only come out above 0 next to u = 1, where f <= 0 keeps it at or below 0: no NaN.
  return sqrtf(-2.0f * log_u);
}

// cos(pi a) and sin(pi a) for a in [-1, 1].
MMEBM_HD void cos_sin_pi(float a, float& cosine, float& sine) {
  // Adding 1.5 * 2^23 rounds 2 a to the nearest integer and leaves it in the low bits: the quadrant. t is exact.
  const float shifted = 2.0f * a + 12582912.0f;
  const uint32_t quadrant = float_bits(shifted);
  const float t = a - 0.5f * (shifted - 12582912.0f);  // [-1/4, 1/4]
  // Least squares on Chebyshev nodes in t^2, coefficients rounded to fp32: errors 2.4e-8 (sine) and 0.9e-8 (cosine).
  const float s = t * t;
  const float sin_t = t * (3.1415927f + s * (-5.167708f + s * (2.549767f + s * -0.5890769f)));
  const float cos_t = 1.0f + s * (-4.934802f + s * (4.0587106f + s * (-1.3351378f + s * 0.23212588f)));
  const bool odd = (quadrant & 1u) != 0;
  const uint32_t sine_sign = (quadrant & 2u) << 30;
  const uint32_t cosine_sign = ((quadrant + 1u) & 2u) << 30;
  sine = bits_float(float_bits(odd ? cos_t : sin_t) ^ sine_sign);
  cosine = bits_float(float_bits(odd ? sin_t : cos_t) ^ cosine_sign);
}

// Four normals from four words: Box-Muller, both branches, twice.
MMEBM_HD Normals box_muller(Words w) {
  const float r0 = radius(unit_open(w.w0)), r1 = radius(unit_open(w.w2));
  float cos0, sin0, cos1, sin1;
  cos_sin_pi(half_turns(w.w1), cos0, sin0);
  cos_sin_pi(half_turns(w.w3), cos1, sin1);
  return {r0 * cos0, r0 * sin0, r1 * cos1, r1 * sin1};
}

}  // namespace mmebm
