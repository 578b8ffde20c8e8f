// The noise of mmebm/noise.py as CUDA evaluates it: the words of philox.h bit for bit, the normals by the same method
// in a form that fused multiply-adds make short, with polynomials of their own. Every scaling by a power of two is
// exact, so u and the angle are those of philox.h. The host runs the same functions in the tests.
#pragma once

#include "common/langevin.h"

namespace mmebm {

MMEBM_HD uint32_t xor3(uint32_t a, uint32_t b, uint32_t c) {
#if defined(__CUDA_ARCH__)
  uint32_t out;
  asm("lop3.b32 %0, %1, %2, %3, 0x96;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
  return out;
#else
  return a ^ b ^ c;
#endif
}

// a with its sign turned where b is odd
MMEBM_HD float turned(float a, uint32_t b) {
  // the lowest bit of b, added to the highest of a: nothing else is carried, and one instruction does it
  uint32_t out;
#if defined(__CUDA_ARCH__)
  asm("mad.lo.u32 %0, %1, 0x80000000, %2;" : "=r"(out) : "r"(b), "r"(float_bits(a)));
#else
  out = float_bits(a) + (b << 31);
#endif
  return bits_float(out);
}

// One multiplication for both halves of a product.
template <uint32_t A>
MMEBM_HD void multiply_wide(uint32_t b, uint32_t& high, uint32_t& low) {
#if defined(__CUDA_ARCH__)
  asm("{ .reg .b64 p; mul.wide.u32 p, %2, %3; mov.b64 {%0, %1}, p; }" : "=r"(low), "=r"(high) : "r"(b), "n"(A));
#else
  const uint64_t p = static_cast<uint64_t>(A) * b;
  high = static_cast<uint32_t>(p >> 32), low = static_cast<uint32_t>(p);
#endif
}

// philox4x32_10 of philox.h: N blocks of each of U chains, the n-th ones with `streams[n]`. The key is the same for
// all, and the blocks of a chain share a product in each of the first two rounds.
template <int U, int N>
MMEBM_HD void philox_words(const uint32_t (&blocks)[U][N], const uint32_t (&chains)[U], uint32_t step,
                           const uint32_t (&streams)[N], uint64_t seed, Words (&out)[U][N]) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  uint32_t high_step, low_step;
  multiply_wide<0xCD9E8D57u>(step, high_step, low_step);
  const uint32_t k2 = k0 + 0x9E3779B9u, k3 = k1 + 0xBB67AE85u;
  MMEBM_UNROLL
  for (int u = 0; u < U; ++u) {
    uint32_t high_chain, low_chain;
    multiply_wide<0xD2511F53u>(xor3(high_step, chains[u], k0), high_chain, low_chain);
    MMEBM_UNROLL
    for (int n = 0; n < N; ++n) {
      uint32_t high, low, high1, low1;
      multiply_wide<0xD2511F53u>(blocks[u][n], high, low);
      multiply_wide<0xCD9E8D57u>(xor3(high, streams[n], k1), high1, low1);
      out[u][n] = {xor3(high1, low_step, k2), low1, xor3(high_chain, low, k3), low_chain};
    }
  }
  k0 = k2, k1 = k3;
  MMEBM_UNROLL
  for (int round = 2; round < 10; ++round) {
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
    MMEBM_UNROLL
    for (int u = 0; u < U; ++u) {
      MMEBM_UNROLL
      for (int n = 0; n < N; ++n) {
        Words& w = out[u][n];
        uint32_t high0, low0, high1, low1;
        multiply_wide<0xD2511F53u>(w.w0, high0, low0);
        multiply_wide<0xCD9E8D57u>(w.w2, high1, low1);
        w = {xor3(high1, w.w1, k0), low1, xor3(high0, w.w3, k1), low0};
      }
    }
  }
}

// The words of one block of row `row` of an array.
MMEBM_HD Words words_of(int64_t row, int64_t block, NoiseAt at) {
  Words out[1][1];
  philox_words({{static_cast<uint32_t>(block)}}, {at.chain_offset + static_cast<uint32_t>(row)}, at.step, {at.stream},
               at.seed, out);
  return out[0][0];
}

MMEBM_HD float root(float v) {
#if defined(__CUDA_ARCH__)
  // within 2^-23 of itself; what is not 0 is 2^-32 at least, far from what ftz makes 0
  float out;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(v));
  return out;
#else
  return sqrtf(v);
#endif
}

// sqrt(-2 log u) of a word.
MMEBM_HD float radius_of(uint32_t word) {
  const uint32_t bits = float_bits(unit_open(word));
  // u = 2^e m with m in [sqrt(1/2), sqrt(2)), so that log is accurate relative to itself also next to u = 1
  const uint32_t e = (bits - 0x3f3504f3u) & 0xff800000u;  // times 2^23
  const float f = bits_float(bits - e) - 1.0f;
  // -2 log(1 + f) = f p(f); minimax in the relative error, which is 1.8e-7
  float p = 2.0167014e-1f;
  p = fmaf(p, f, -3.236021e-1f);
  p = fmaf(p, f, 3.4485322e-1f);
  p = fmaf(p, f, -3.981384e-1f);
  p = fmaf(p, f, 4.9942574e-1f);
  p = fmaf(p, f, -6.6669428e-1f);
  p = fmaf(p, f, 1.0000064f);
  p = fmaf(p, f, -2.0f);
  // next to u = 1, f <= 0 and e = 0: no NaN; -2 log(2) 2^-23
  return root(fmaf(static_cast<float>(static_cast<int32_t>(e)), -1.6525917e-7f, f * p));
}

// radius (cos pi a, sin pi a), a the word read as int32 times 2^-31.
MMEBM_HD void polar(float radius, uint32_t word, float& x, float& y) {
  const float a = static_cast<float>(static_cast<int32_t>(word));
  // 2^-30 a are quarter turns. Adding 1.5 2^24 rounds them to an even number, half turns, and leaves that in the low
  // bits; t is what is left.
  const float shifted = fmaf(a, 0x1p-30f, 25165824.0f);
  const float t = fmaf(a, 0x1p-30f, 25165824.0f - shifted);  // exact, in [-1, 1]
  // Minimax of sine and cosine: errors 4e-9 and 1e-9. The sine is t and the rest, so that little is rounded next to 1.
  const float z = t * t;
  const float s =
      fmaf(z, fmaf(z, fmaf(z, fmaf(z, 1.5105301e-4f, -4.67283e-3f), 7.968902e-2f), -6.4596355e-1f), 5.707963e-1f);
  const float c = fmaf(
      z, fmaf(z, fmaf(z, fmaf(z, fmaf(z, -2.340213e-5f, 9.167334e-4f), -2.08619e-2f), 2.5366908e-1f), -1.2337005f),
      1.0f);
  // both change their sign with every half turn
  radius = turned(radius, float_bits(shifted));
  x = radius * c;
  y = radius * fmaf(t, s, t);
}

// Four normals times `scale`.
MMEBM_HD Normals normals_of(Words w, float scale = 1.0f) {
  Normals n;
  polar(scale * radius_of(w.w0), w.w1, n.n0, n.n1);
  polar(scale * radius_of(w.w2), w.w3, n.n2, n.n3);
  return n;
}

}  // namespace mmebm
