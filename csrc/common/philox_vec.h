// Philox4x32-10 and Box-Muller in vectors, for the instruction set of the including file.
//
//   * a product of 32-bit words is 64 bits wide, so the even and the odd counters live in the low halves of the 64-bit
//     lanes of two registers: per round and register two multiplications, two moves of a high half and two three-way
//     xors. The high halves hold garbage that no multiplication reads;
//   * log by the split u = 2^e (1 + f), f in [sqrt(1/2) - 1, sqrt(2) - 1], -2 log u = -2 log 2 e + f q(f) with q of
//     degree 7 (weighted minimax, error 7e-8, relative next to u = 1, where f <= 0 and hence no root of a negative
//     number); sine and cosine of pi a by the quadrant of a and polynomials on [-1/4, 1/4] (errors 1.2e-9 and 3.2e-8).
//     u and a have the bits of noise.py; the normals are within 2e-6 of its float64 (largest difference seen 9.6e-7).
#pragma once

#include <cstdint>

#include "common/vec.h"

namespace mmebm {
namespace {

struct Key {
  uint64_t seed;
  uint32_t step, stream;
};

// Ten rounds on the counters (block, chain, step, stream): W blocks in the low halves of two registers, one chain.
struct OneChain {
  // Round r adds r Weyl constants to the key.
  uint64_t k0[10], k1[10];
  uint64_t c2_1, c0_2, c2_2, c2_3;  // what rounds 1 to 3 xor in besides the key: scalars folded into it

  MMEBM_INLINE void init(OneChain& s, Key key, uint32_t chain) {
    uint32_t k0 = static_cast<uint32_t>(key.seed), k1 = static_cast<uint32_t>(key.seed >> 32);
    for (int r = 0; r < 10; ++r) {
      s.k0[r] = k0;
      s.k1[r] = k1;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    const uint64_t product_1 = 0xCD9E8D57ull * key.step;
    const uint32_t c0 = static_cast<uint32_t>(product_1 >> 32) ^ chain ^ static_cast<uint32_t>(s.k0[0]);
    const uint64_t product_2 = 0xD2511F53ull * c0;
    s.c2_1 = key.stream ^ s.k1[0];
    s.c0_2 = (product_1 & 0xffffffffu) ^ s.k0[1];
    s.c2_2 = (product_2 >> 32) ^ s.k1[1];
    s.c2_3 = (product_2 & 0xffffffffu) ^ s.k1[2];
  }
};

struct Counters {
  I c0, c1, c2, c3;
};

// Rounds FROM to 9 of N sets of counters side by side: one round waits for the one before it, so a single set would
// leave the multipliers idle most of the time.
template <int FROM, int N>
MMEBM_INLINE void rounds(Counters* c, const OneChain& s) {
  const I m0 = seti64(0xD2511F53ull), m1 = seti64(0xCD9E8D57ull);
#pragma GCC unroll 10
  for (int r = FROM; r < 10; ++r) {
    const I k0 = seti64(s.k0[r]), k1 = seti64(s.k1[r]);
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) {
      const I p0 = mul_low(c[i].c0, m0), p1 = mul_low(c[i].c2, m1);
      c[i].c0 = xor3(high_half(p1), c[i].c1, k0);
      c[i].c1 = p1;
      c[i].c2 = xor3(high_half(p0), c[i].c3, k1);
      c[i].c3 = p0;
    }
  }
}

// The first three rounds of counters (block, chain of s, ...), then the rest.
template <int N>
MMEBM_INLINE void philox_one(const I* block, const OneChain& s, Counters* c) {
  const I m0 = seti64(0xD2511F53ull), m1 = seti64(0xCD9E8D57ull);
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) {
    const I p0 = mul_low(block[i], m0);                              // round 1
    const I q1 = mul_low(xor2(high_half(p0), seti64(s.c2_1)), m1);  // round 2
    const I r0 = mul_low(xor2(high_half(q1), seti64(s.c0_2)), m0);  // round 3
    const I r1 = mul_low(xor2(p0, seti64(s.c2_2)), m1);
    c[i] = {xor3(high_half(r1), q1, seti64(s.k0[2])), r1, xor2(high_half(r0), seti64(s.c2_3)), r0};
  }
  rounds<3, N>(c, s);
}

// K vectors side by side, operation by operation: each is one long chain, and a processor looks ahead no further than
// one of them.
#define MMEBM_EACH _Pragma("GCC unroll 4") for (int k = 0; k < K; ++k)

// -2 log x of x > 0, by the split x = 2^e (1 + f) and a polynomial in f.
template <int K>
MMEBM_INLINE void minus_two_log(const F (&x)[K], F (&out)[K]) {
  I above[K];
  F f[K];
  MMEBM_EACH above[k] = subi(as_int(x[k]), seti(0x3f3504f3u));  // sqrt(1/2)
  MMEBM_EACH f[k] = sub(as_float(subi(as_int(x[k]), andi(above[k], seti(0xff800000u)))), setf(1.0f));
  MMEBM_EACH out[k] = fma(setf(0.202383772f), f[k], setf(-0.32819885f));
  MMEBM_EACH out[k] = fma(out[k], f[k], setf(0.346468151f));
  MMEBM_EACH out[k] = fma(out[k], f[k], setf(-0.397488624f));
  MMEBM_EACH out[k] = fma(out[k], f[k], setf(0.499209881f));
  MMEBM_EACH out[k] = fma(out[k], f[k], setf(-0.666722298f));
  MMEBM_EACH out[k] = fma(out[k], f[k], setf(1.00001264f));
  MMEBM_EACH out[k] = fma(out[k], f[k], setf(-1.99999964f));
  MMEBM_EACH out[k] = fma(signed_float(high_exponent(above[k])), setf(-1.38629436f), mul(f[k], out[k]));
}

template <int K>
MMEBM_INLINE void box_muller(const I (&words_u)[K], const I (&words_a)[K], F (&first)[K], F (&second)[K]) {
  F u[K], r[K], half_turns[K], shifted[K], t[K], s[K], sine[K], cosine[K];
  MMEBM_EACH u[k] = fma(unsigned_float(words_u[k]), setf(0x1p-32f), setf(0x1p-33f));
  minus_two_log(u, r);
  MMEBM_EACH half_turns[k] = signed_float(words_a[k]);  // times 2^31
  // Adding 1.5 * 2^23 rounds 2 a to an integer and leaves it in the low bits: the quadrant. t is exact.
  MMEBM_EACH shifted[k] = fma(half_turns[k], setf(0x1p-30f), setf(12582912.0f));
  MMEBM_EACH t[k] = fma(sub(shifted[k], setf(12582912.0f)), setf(-0.5f), mul(half_turns[k], setf(0x1p-31f)));
  MMEBM_EACH s[k] = mul(t[k], t[k]);
  MMEBM_EACH sine[k] = fma(s[k], setf(-0.58781302f), setf(2.54962897f));
  MMEBM_EACH cosine[k] = fma(s[k], setf(-1.30727994f), setf(4.05770159f));
  MMEBM_EACH sine[k] = fma(sine[k], s[k], setf(-5.16770363f));
  MMEBM_EACH cosine[k] = fma(cosine[k], s[k], setf(-4.93479204f));
  MMEBM_EACH sine[k] = mul(fma(sine[k], s[k], setf(3.1415925f)), t[k]);
  MMEBM_EACH cosine[k] = fma(cosine[k], s[k], setf(1.0f));
  MMEBM_EACH {
    const I quadrant = as_int(shifted[k]);
    const F length = sqrt(r[k]);
    first[k] = mul(length, flip(where_odd(quadrant, sine[k], cosine[k]), quadrant_sign(addi(quadrant, seti(1)))));
    second[k] = mul(length, flip(where_odd(quadrant, cosine[k], sine[k]), quadrant_sign(quadrant)));
  }
}
#undef MMEBM_EACH

// Four normals per chain, elements 4 block to 4 block + 3: out[4 * m + j] holds element j of the chains of row[m].
// Block, step and stream are the same for all lanes, so that the first round and half of the second are scalar.
template <int N>
MMEBM_INLINE void normals_by_chain(const OneChain& s, Key key, uint32_t block, const I* row, F* out) {
  const uint64_t p0 = 0xD2511F53ull * block, p1 = 0xCD9E8D57ull * key.step;
  const uint32_t c2 = static_cast<uint32_t>(p0 >> 32) ^ key.stream ^ static_cast<uint32_t>(s.k1[0]);
  const uint64_t q1 = 0xCD9E8D57ull * c2;
  const I m0 = seti64(0xD2511F53ull);
  const I mix0 = seti64((p1 >> 32) ^ s.k0[0]);
  const I mix1 = seti64((q1 >> 32) ^ (p1 & 0xffffffffu) ^ s.k0[1]), mix2 = seti64((p0 & 0xffffffffu) ^ s.k1[1]);
  Counters c[2 * N];
#pragma GCC unroll 8
  for (int i = 0; i < 2 * N; ++i) {
    const I chain = i % 2 ? high_half(row[i / 2]) : row[i / 2];
    const I q0 = mul_low(xor2(chain, mix0), m0);
    c[i] = {mix1, seti64(q1), xor2(high_half(q0), mix2), q0};
  }
  rounds<2, 2 * N>(c, s);
#pragma GCC unroll 4
  for (int m = 0; m < N; ++m) {
    const Counters &even = c[2 * m], &odd = c[2 * m + 1];
    const I u[2] = {interleave(even.c0, odd.c0), interleave(even.c2, odd.c2)};
    const I a[2] = {interleave(even.c1, odd.c1), interleave(even.c3, odd.c3)};
    F first[2], second[2];
    box_muller(u, a, first, second);
    out[4 * m] = first[0];
    out[4 * m + 1] = second[0];
    out[4 * m + 2] = first[1];
    out[4 * m + 3] = second[1];
  }
}

}  // namespace
}  // namespace mmebm
