// The few vector operations that the kernels of the CPU ops are written in, for the instruction set of the including file:
// 16 lanes with AVX-512, 8 with AVX2, else 4 (SSE2, or plain GCC/Clang vectors on other processors). With MMEBM_NARROW they
// are half as many, 8 and 4: a register holds two rows of a small batch then (net/cpu_kernel.cpp).
//
// Everything is in an unnamed namespace and nothing comes from std::, see isa.h. `max` and `min` return their second
// operand where one is NaN (the x86 rule), which is what makes `clamp` keep a NaN.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__GNUC__) && !defined(__clang__)
// gcc 12 takes the undefined operand of its own AVX-512 intrinsics for a mistake of ours (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace mmebm {
namespace {

#define MMEBM_INLINE static inline __attribute__((always_inline, unused))

#if defined(__AVX512F__) && !defined(MMEBM_NARROW)

constexpr int W = 16;
using F = __m512;
using I = __m512i;  // 16 words of 32 bits, or 8 of 64 where the name says so
using M = __mmask16;

MMEBM_INLINE F setf(float v) { return _mm512_set1_ps(v); }
MMEBM_INLINE I seti(uint32_t v) { return _mm512_set1_epi32(static_cast<int>(v)); }
MMEBM_INLINE I seti64(uint64_t v) { return _mm512_set1_epi64(static_cast<long long>(v)); }
MMEBM_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
MMEBM_INLINE I loadi(const uint32_t* p) { return _mm512_loadu_si512(p); }
MMEBM_INLINE void store(float* p, F v) { _mm512_storeu_ps(p, v); }
MMEBM_INLINE void storei(void* p, I v) { _mm512_storeu_si512(p, v); }
MMEBM_INLINE M first(int n) { return static_cast<M>((1u << n) - 1u); }
MMEBM_INLINE F load(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
MMEBM_INLINE void store(float* p, F v, int n) { _mm512_mask_storeu_ps(p, first(n), v); }
MMEBM_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
MMEBM_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
MMEBM_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
MMEBM_INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
MMEBM_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
MMEBM_INLINE F sqrt(F a) { return _mm512_sqrt_ps(a); }
MMEBM_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
MMEBM_INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }
MMEBM_INLINE F abs(F a) { return _mm512_abs_ps(a); }
MMEBM_INLINE M greater(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
MMEBM_INLINE M at_most(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
MMEBM_INLINE M unequal(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_NEQ_UQ); }
MMEBM_INLINE M either(M a, M b) { return static_cast<M>(a | b); }
MMEBM_INLINE M both(M a, M b) { return static_cast<M>(a & b); }
MMEBM_INLINE M without(M a, M b) { return static_cast<M>(a & ~b); }
MMEBM_INLINE M none() { return 0; }
MMEBM_INLINE M lanes(int n) { return first(n); }
MMEBM_INLINE int count(M m) { return __builtin_popcount(m); }
MMEBM_INLINE F select(M m, F yes, F no) { return _mm512_mask_blend_ps(m, no, yes); }
MMEBM_INLINE M bytes(const uint8_t* p, int n) {
  return _mm512_test_epi32_mask(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first(n), p)), _mm512_set1_epi32(0xff));
}
MMEBM_INLINE I addi(I a, I b) { return _mm512_add_epi32(a, b); }
MMEBM_INLINE I subi(I a, I b) { return _mm512_sub_epi32(a, b); }
MMEBM_INLINE I andi(I a, I b) { return _mm512_and_si512(a, b); }
MMEBM_INLINE I xor2(I a, I b) { return _mm512_xor_si512(a, b); }
MMEBM_INLINE I xor3(I a, I b, I c) { return _mm512_ternarylogic_epi32(a, b, c, 0x96); }
// a where the signed words of x are below those of y, else b
MMEBM_INLINE I where_less(I x, I y, I a, I b) { return _mm512_mask_blend_epi32(_mm512_cmplt_epi32_mask(x, y), b, a); }
MMEBM_INLINE I high_exponent(I a) { return _mm512_srai_epi32(a, 23); }
MMEBM_INLINE I exponent(I a) { return _mm512_slli_epi32(a, 23); }
MMEBM_INLINE I quadrant_sign(I a) { return _mm512_slli_epi32(a, 30); }
MMEBM_INLINE I mul_low(I a, I b) { return _mm512_mul_epu32(a, b); }  // low words of 64-bit lanes -> 64-bit products
// The high word of each 64-bit lane in the low one; what is left above does not matter. A shuffle, because a shift of
// 512 bits would compete with the multiplications for one port.
MMEBM_INLINE I high_half(I a) { return _mm512_shuffle_epi32(a, static_cast<_MM_PERM_ENUM>(0xF5)); }
// 32-bit lanes from the low words of the 64-bit lanes of two registers, even lanes first
MMEBM_INLINE I interleave(I even, I odd) {
  return _mm512_mask_shuffle_epi32(even, 0xAAAA, odd, static_cast<_MM_PERM_ENUM>(0xA0));
}
MMEBM_INLINE F unsigned_float(I a) { return _mm512_cvtepu32_ps(a); }
MMEBM_INLINE F signed_float(I a) { return _mm512_cvtepi32_ps(a); }
MMEBM_INLINE I as_int(F a) { return _mm512_castps_si512(a); }
MMEBM_INLINE F as_float(I a) { return _mm512_castsi512_ps(a); }
// v with its sign flipped where the top bit of s is set
MMEBM_INLINE F flip(F v, I s) {
  return as_float(_mm512_ternarylogic_epi32(as_int(v), s, _mm512_set1_epi32(static_cast<int>(0x80000000u)), 0x78));
}
// a where the low bit of q is set, else b
MMEBM_INLINE F where_odd(I q, F a, F b) {
  return _mm512_mask_blend_ps(_mm512_test_epi32_mask(q, _mm512_set1_epi32(1)), b, a);
}
// Four registers whose group of four lanes q holds the transposed 4 x 4 block q.
MMEBM_INLINE void transpose(F& a, F& b, F& c, F& d) {
  const F ab0 = _mm512_unpacklo_ps(a, b), ab1 = _mm512_unpackhi_ps(a, b);
  const F cd0 = _mm512_unpacklo_ps(c, d), cd1 = _mm512_unpackhi_ps(c, d);
  a = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab0), _mm512_castps_pd(cd0)));
  b = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab0), _mm512_castps_pd(cd0)));
  c = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab1), _mm512_castps_pd(cd1)));
  d = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab1), _mm512_castps_pd(cd1)));
}

#elif defined(__AVX512F__) || (defined(__AVX2__) && !defined(MMEBM_NARROW))

constexpr int W = 8;
using F = __m256;
using I = __m256i;
using M = __m256;  // all bits of a lane set where true

alignas(32) const int32_t FIRST[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};

MMEBM_INLINE F setf(float v) { return _mm256_set1_ps(v); }
MMEBM_INLINE I seti(uint32_t v) { return _mm256_set1_epi32(static_cast<int>(v)); }
MMEBM_INLINE I seti64(uint64_t v) { return _mm256_set1_epi64x(static_cast<long long>(v)); }
MMEBM_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
MMEBM_INLINE I loadi(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
MMEBM_INLINE void store(float* p, F v) { _mm256_storeu_ps(p, v); }
MMEBM_INLINE void storei(void* p, I v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
MMEBM_INLINE I first(int n) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(FIRST + 8 - n)); }
MMEBM_INLINE F load(const float* p, int n) { return _mm256_maskload_ps(p, first(n)); }
MMEBM_INLINE void store(float* p, F v, int n) { _mm256_maskstore_ps(p, first(n), v); }
MMEBM_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
MMEBM_INLINE F sub(F a, F b) { return _mm256_sub_ps(a, b); }
MMEBM_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
MMEBM_INLINE F div(F a, F b) { return _mm256_div_ps(a, b); }
MMEBM_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
MMEBM_INLINE F sqrt(F a) { return _mm256_sqrt_ps(a); }
MMEBM_INLINE F max(F a, F b) { return _mm256_max_ps(a, b); }
MMEBM_INLINE F min(F a, F b) { return _mm256_min_ps(a, b); }
MMEBM_INLINE F abs(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
MMEBM_INLINE M greater(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
MMEBM_INLINE M at_most(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_LE_OQ); }
MMEBM_INLINE M unequal(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_NEQ_UQ); }
MMEBM_INLINE M either(M a, M b) { return _mm256_or_ps(a, b); }
MMEBM_INLINE M both(M a, M b) { return _mm256_and_ps(a, b); }
MMEBM_INLINE M without(M a, M b) { return _mm256_andnot_ps(b, a); }
MMEBM_INLINE M none() { return _mm256_setzero_ps(); }
MMEBM_INLINE M lanes(int n) { return _mm256_castsi256_ps(first(n)); }
MMEBM_INLINE int count(M m) { return __builtin_popcount(static_cast<unsigned>(_mm256_movemask_ps(m))); }
MMEBM_INLINE F select(M m, F yes, F no) { return _mm256_blendv_ps(no, yes, m); }
MMEBM_INLINE M bytes(const uint8_t* p, int n) {
  uint64_t raw = 0;
  if (n == W) memcpy(&raw, p, 8); else memcpy(&raw, p, static_cast<size_t>(n));
  const __m256i wide = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(raw)));
  return _mm256_castsi256_ps(_mm256_cmpgt_epi32(wide, _mm256_setzero_si256()));
}
MMEBM_INLINE I addi(I a, I b) { return _mm256_add_epi32(a, b); }
MMEBM_INLINE I subi(I a, I b) { return _mm256_sub_epi32(a, b); }
MMEBM_INLINE I andi(I a, I b) { return _mm256_and_si256(a, b); }
MMEBM_INLINE I xor2(I a, I b) { return _mm256_xor_si256(a, b); }
MMEBM_INLINE I xor3(I a, I b, I c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
MMEBM_INLINE I where_less(I x, I y, I a, I b) { return _mm256_blendv_epi8(b, a, _mm256_cmpgt_epi32(y, x)); }
MMEBM_INLINE I high_exponent(I a) { return _mm256_srai_epi32(a, 23); }
MMEBM_INLINE I exponent(I a) { return _mm256_slli_epi32(a, 23); }
MMEBM_INLINE I quadrant_sign(I a) { return _mm256_slli_epi32(a, 30); }
MMEBM_INLINE I mul_low(I a, I b) { return _mm256_mul_epu32(a, b); }
MMEBM_INLINE I high_half(I a) { return _mm256_srli_epi64(a, 32); }
MMEBM_INLINE I interleave(I even, I odd) { return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA); }
// The halves become 2^23 + low and 2^39 + 65536 high by their bits; taking the constants off is exact, and the last
// addition rounds once.
MMEBM_INLINE F unsigned_float(I a) {
  const I low = _mm256_blend_epi16(a, _mm256_set1_epi32(0x4b000000), 0xAA);
  const I high = _mm256_blend_epi16(_mm256_srli_epi32(a, 16), _mm256_set1_epi32(0x53000000), 0xAA);
  const F rest = _mm256_sub_ps(_mm256_castsi256_ps(high), _mm256_set1_ps(549764202496.0f));  // 2^39 + 2^23
  return _mm256_add_ps(_mm256_castsi256_ps(low), rest);
}
MMEBM_INLINE F signed_float(I a) { return _mm256_cvtepi32_ps(a); }
MMEBM_INLINE I as_int(F a) { return _mm256_castps_si256(a); }
MMEBM_INLINE F as_float(I a) { return _mm256_castsi256_ps(a); }
MMEBM_INLINE F flip(F v, I s) {
  return _mm256_xor_ps(v, as_float(_mm256_and_si256(s, _mm256_set1_epi32(static_cast<int>(0x80000000u)))));
}
MMEBM_INLINE F where_odd(I q, F a, F b) { return _mm256_blendv_ps(b, a, as_float(_mm256_slli_epi32(q, 31))); }
MMEBM_INLINE void transpose(F& a, F& b, F& c, F& d) {
  const F ab0 = _mm256_unpacklo_ps(a, b), ab1 = _mm256_unpackhi_ps(a, b);
  const F cd0 = _mm256_unpacklo_ps(c, d), cd1 = _mm256_unpackhi_ps(c, d);
  a = _mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(ab0), _mm256_castps_pd(cd0)));
  b = _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(ab0), _mm256_castps_pd(cd0)));
  c = _mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(ab1), _mm256_castps_pd(cd1)));
  d = _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(ab1), _mm256_castps_pd(cd1)));
}

#else

constexpr int W = 4;
using F = float __attribute__((vector_size(16)));
using I = int32_t __attribute__((vector_size(16)));
using L = uint64_t __attribute__((vector_size(16)));
using M = I;

MMEBM_INLINE F setf(float v) { return F{v, v, v, v}; }
MMEBM_INLINE I seti(uint32_t u) {
  const int32_t v = static_cast<int32_t>(u);
  return I{v, v, v, v};
}
MMEBM_INLINE I seti64(uint64_t v) { return (I)(L{v, v}); }
MMEBM_INLINE F load(const float* p) {
  F v;
  memcpy(&v, p, sizeof v);
  return v;
}
MMEBM_INLINE I loadi(const uint32_t* p) {
  I v;
  memcpy(&v, p, sizeof v);
  return v;
}
MMEBM_INLINE void store(float* p, F v) { memcpy(p, &v, sizeof v); }
MMEBM_INLINE void storei(void* p, I v) { memcpy(p, &v, sizeof v); }
MMEBM_INLINE F load(const float* p, int n) {
  F v = {0.0f, 0.0f, 0.0f, 0.0f};
  memcpy(&v, p, sizeof(float) * static_cast<size_t>(n));
  return v;
}
MMEBM_INLINE void store(float* p, F v, int n) { memcpy(p, &v, sizeof(float) * static_cast<size_t>(n)); }
MMEBM_INLINE I first(int n) { return I{0, 1, 2, 3} < seti(static_cast<uint32_t>(n)); }
MMEBM_INLINE F add(F a, F b) { return a + b; }
MMEBM_INLINE F sub(F a, F b) { return a - b; }
MMEBM_INLINE F mul(F a, F b) { return a * b; }
MMEBM_INLINE F div(F a, F b) { return a / b; }
#if defined(__FMA__)
MMEBM_INLINE F fma(F a, F b, F c) { return (F)_mm_fmadd_ps((__m128)a, (__m128)b, (__m128)c); }
#else
MMEBM_INLINE F fma(F a, F b, F c) { return a * b + c; }
#endif
#if defined(__SSE2__)
MMEBM_INLINE F sqrt(F a) { return (F)_mm_sqrt_ps((__m128)a); }
MMEBM_INLINE F max(F a, F b) { return (F)_mm_max_ps((__m128)a, (__m128)b); }
MMEBM_INLINE F min(F a, F b) { return (F)_mm_min_ps((__m128)a, (__m128)b); }
MMEBM_INLINE I mul_low(I a, I b) { return (I)_mm_mul_epu32((__m128i)a, (__m128i)b); }
#else
MMEBM_INLINE F sqrt(F a) {
  return F{__builtin_sqrtf(a[0]), __builtin_sqrtf(a[1]), __builtin_sqrtf(a[2]), __builtin_sqrtf(a[3])};
}
MMEBM_INLINE F max(F a, F b) { return a > b ? a : b; }
MMEBM_INLINE F min(F a, F b) { return a < b ? a : b; }
MMEBM_INLINE I mul_low(I a, I b) { return (I)(((L)a & 0xffffffffull) * ((L)b & 0xffffffffull)); }
#endif
MMEBM_INLINE F abs(F a) { return (F)((I)a & seti(0x7fffffffu)); }
MMEBM_INLINE M greater(F a, F b) { return a > b; }
MMEBM_INLINE M at_most(F a, F b) { return a <= b; }
MMEBM_INLINE M unequal(F a, F b) { return a != b; }
MMEBM_INLINE M either(M a, M b) { return a | b; }
MMEBM_INLINE M both(M a, M b) { return a & b; }
MMEBM_INLINE M without(M a, M b) { return a & ~b; }
MMEBM_INLINE M none() { return I{0, 0, 0, 0}; }
MMEBM_INLINE M lanes(int n) { return first(n); }
MMEBM_INLINE int count(M m) { return -(m[0] + m[1] + m[2] + m[3]); }
MMEBM_INLINE F select(M m, F yes, F no) { return (F)(((I)yes & m) | ((I)no & ~m)); }
MMEBM_INLINE M bytes(const uint8_t* p, int n) {
  I v = {0, 0, 0, 0};
  for (int i = 0; i < n; ++i) v[i] = p[i] ? -1 : 0;
  return v;
}
MMEBM_INLINE I addi(I a, I b) { return a + b; }
MMEBM_INLINE I subi(I a, I b) { return a - b; }
MMEBM_INLINE I andi(I a, I b) { return a & b; }
MMEBM_INLINE I xor2(I a, I b) { return a ^ b; }
MMEBM_INLINE I xor3(I a, I b, I c) { return a ^ b ^ c; }
MMEBM_INLINE I where_less(I x, I y, I a, I b) {
  const I m = x < y;
  return (a & m) | (b & ~m);
}
MMEBM_INLINE I high_exponent(I a) { return a >> 23; }
MMEBM_INLINE I exponent(I a) { return a << 23; }
MMEBM_INLINE I quadrant_sign(I a) { return a << 30; }
MMEBM_INLINE I high_half(I a) { return (I)((L)a >> 32); }
MMEBM_INLINE I interleave(I even, I odd) { return (I)(((L)even & 0xffffffffull) | ((L)odd << 32)); }
MMEBM_INLINE F signed_float(I a) { return __builtin_convertvector(a, F); }
MMEBM_INLINE F unsigned_float(I a) {
  // both halves and the product are exact, the sum rounds once
  const I high = (I)((I)a >> 16) & seti(0xffffu);
  return signed_float(high) * setf(65536.0f) + signed_float(a & seti(0xffffu));
}
MMEBM_INLINE I as_int(F a) { return (I)a; }
MMEBM_INLINE F as_float(I a) { return (F)a; }
MMEBM_INLINE F flip(F v, I s) { return (F)((I)v ^ (s & seti(0x80000000u))); }
MMEBM_INLINE F where_odd(I q, F a, F b) { return select((I)(q << 31) >> 31, a, b); }
MMEBM_INLINE void transpose(F& a, F& b, F& c, F& d) {
  const F r0 = {a[0], b[0], c[0], d[0]}, r1 = {a[1], b[1], c[1], d[1]};
  const F r2 = {a[2], b[2], c[2], d[2]}, r3 = {a[3], b[3], c[3], d[3]};
  a = r0;
  b = r1;
  c = r2;
  d = r3;
}

#endif

MMEBM_INLINE F clamp(F v, F low, F high) { return min(high, max(low, v)); }

}  // namespace
}  // namespace mmebm
