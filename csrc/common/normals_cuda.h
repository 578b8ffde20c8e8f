// The noise of mmebm/noise.py as CUDA evaluates it: the words of philox.h bit for bit, the normals by the same method
// in a form that fused multiply-adds make short. Every scaling by a power of two is exact, so u, the angle and the
// quadrant are those of philox.h. The host runs the same functions in the tests.
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

// a with the sign of b on top of its own
MMEBM_HD float xor_sign(float a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint32_t out;
  asm("lop3.b32 %0, %1, %2, 0x80000000, 0x78;" : "=r"(out) : "r"(float_bits(a)), "r"(b));
  return bits_float(out);
#else
  return bits_float(float_bits(a) ^ (b & 0x80000000u));
#endif
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

// philox4x32_10 of philox.h.
MMEBM_HD Words philox_words(uint32_t block, uint32_t chain, uint32_t step, uint32_t stream, uint64_t seed) {
  uint32_t c0 = block, c1 = chain, c2 = step, c3 = stream;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  MMEBM_UNROLL
  for (int round = 0; round < 10; ++round) {
    uint32_t high0, low0, high1, low1;
    multiply_wide<0xD2511F53u>(c0, high0, low0);
    multiply_wide<0xCD9E8D57u>(c2, high1, low1);
    c0 = xor3(high1, c1, k0);
    c1 = low1;
    c2 = xor3(high0, c3, k1);
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {c0, c1, c2, c3};
}

// The words of one block of row `row` of an array.
MMEBM_HD Words words_of(int64_t row, int64_t block, NoiseAt at) {
  return philox_words(static_cast<uint32_t>(block), at.chain_offset + static_cast<uint32_t>(row), at.step, at.stream,
                      at.seed);
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
  // -2 log(1 + f) = f (-2 + f (1 + f p)), p from Cephes logf (S. Moshier) times -2
  float p = -1.40753672584e-1f;
  p = fmaf(p, f, 2.302922062e-1f);
  p = fmaf(p, f, -2.335399748e-1f);
  p = fmaf(p, f, 2.4840281692e-1f);
  p = fmaf(p, f, -2.8498645574e-1f);
  p = fmaf(p, f, 3.333611533e-1f);
  p = fmaf(p, f, -4.000142953e-1f);
  p = fmaf(p, f, 4.9999987986e-1f);
  p = fmaf(p, f, -6.6666662348e-1f);
  p = fmaf(p, f, 1.0f);
  p = fmaf(p, f, -2.0f);
  // next to u = 1, f <= 0 and e = 0: no NaN; -2 log(2) 2^-23
  return root(fmaf(static_cast<float>(static_cast<int32_t>(e)), -1.6525917e-7f, f * p));
}

// radius (cos pi a, sin pi a), a the word read as int32 times 2^-31.
MMEBM_HD void polar(float radius, uint32_t word, float& x, float& y) {
  const float a = static_cast<float>(static_cast<int32_t>(word));
  // 2^-30 a are quarter turns. Adding 1.5 2^23 rounds to an integer and leaves it in the low bits: the quadrant.
  const float shifted = fmaf(a, 0x1p-30f, 12582912.0f);
  const float t = fmaf(a, 0x1p-30f, 12582912.0f - shifted);  // exact, in [-1/2, 1/2]
  // the polynomials of philox.h, in half of their argument
  const float z = t * t;
  const float s = t * fmaf(z, fmaf(z, fmaf(z, -0.5890769f / 128, 2.549767f / 32), -5.167708f / 8), 3.1415927f / 2);
  const float c =
      fmaf(z, fmaf(z, fmaf(z, fmaf(z, 0.23212588f / 256, -1.3351378f / 64), 4.0587106f / 16), -4.934802f / 4), 1.0f);
  // both change their sign with the second bit of the quadrant
  const uint32_t turn = float_bits(shifted) << 30;
  const bool odd = (turn & 0x40000000u) != 0;
  radius = xor_sign(radius, turn);
  x = radius * (odd ? -s : c);
  y = radius * (odd ? c : s);
}

// Four normals times `scale`.
MMEBM_HD Normals normals_of(Words w, float scale = 1.0f) {
  Normals n;
  polar(scale * radius_of(w.w0), w.w1, n.n0, n.n1);
  polar(scale * radius_of(w.w2), w.w3, n.n2, n.n3);
  return n;
}

}  // namespace mmebm
