// A whole Langevin chain on a sum of MLP terms, in one launch. The definition is mmebm/ops/langevin_mlp/reference.py.
//
// A block owns `rows` chains (16, 8 or 4) for all steps. State, gradient, activations and slopes act' stay in shared
// memory, a row per chain; nothing but the records leaves the block before the last step. Chains share only weights, so
// blocks never wait for each other, and a captured graph is one node.
//
// Weights. They are read where they lie, as (outputs, inputs), straight into the registers that the products need: at
// each step from L2 if need be, but as many layers as fit beside the state are copied into shared memory first, in
// bf16 for bf16 products, and stay for all steps. Why: 64-200-200-1 has 211 KB of fp32 weights, each of which a step
// takes twice. An SM gets about 64 bytes a cycle from L2 and 128 from shared memory, and a load waits some 250 cycles
// for L2 and 30 for shared memory, which 8 warps a block do not hide. In bf16 these are 106 KB, and stay; in fp32 the
// first layer and what else fits. Nothing is repacked outside: a captured graph sees new weights. (Estimates for an
// H100: no device was there to measure on.)
//
// Products. A warp computes `rows` x a few columns over the whole depth, alone: no barrier and no staging inside a
// product, because with 16 rows no two warps read the same weight. A lane takes four consecutive units of the depth at
// a time, 16 bytes in one access for the forward pass and four coalesced ones for the backward pass, which reads
// columns of the same matrix. The order of a sum is free, so that the fragments of mma.sync take them in this order
// from both operands: what PTX calls k = 2q, 2q + 1, 2q + 8, 2q + 9 of m16n8k16 (q: lane modulo 4) are units 4q to
// 4q + 3, and likewise for two m16n8k8. Several loads of weights are on their way before the first is used.
//     fp32     FMA units: a lane has 4 rows of a column
//     tf32x3   each operand as a sum of two tf32 numbers, three products; what is left out is 2^-22 of the product
//     bf16     operands rounded to nearest even
// Sums are fp32, in parts of 64 units (256 for bf16), so that rounding errors stay those of a short sum.
//
// Everything else is elementwise or a sum over a chain's row, which a warp takes lane by lane and ends in a butterfly.
// All orders are functions of the widths alone: a chain's result depends neither on the chains beside it, nor on
// `rows`, nor on where weights lie.
//
// The code is templates over a team: a block on the device; one thread on the host, which does the lanes of a warp one
// after the other and the tensor cores' products by the layout that the PTX manual gives for their fragments.
//
// Limits: those of mmebm/ops/terms.py. The widest of everything fits shared memory (163 KB on sm_80) with 4 chains.
// Compute capability 8.0 or later.
#include "langevin_mlp/cuda.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "common/normals_cuda.h"

namespace mmebm {
namespace {

constexpr int WARP = 32, WARPS = 8, THREADS = WARP * WARPS;

static_assert(sizeof(DeviceChain) <= 4096, "kernel parameters are limited to 4 KB");

MMEBM_HD int up_to(int n, int unit) { return (n + unit - 1) / unit * unit; }

MMEBM_HD int smaller(int a, int b) { return a < b ? a : b; }

// Larger functions: inlined in a kernel, where arrays must become registers; not on the host, where the compiler would
// take a minute for it.
#if defined(__CUDA_ARCH__)
#define MMEBM_LARGE static __host__ __device__ __forceinline__
#else
#define MMEBM_LARGE static __host__ __device__ __attribute__((noinline))
#endif

// -- teams: who does the work of a block. LANES: the lanes of a warp that one thread does.

struct BlockTeam {
  static constexpr int LANES = 1;

  __device__ int thread() const { return static_cast<int>(threadIdx.x); }
  __device__ int threads() const { return THREADS; }
  __device__ int warp() const { return static_cast<int>(threadIdx.x) / WARP; }
  __device__ int warps() const { return WARPS; }
  __device__ int lane(int) const { return static_cast<int>(threadIdx.x) % WARP; }
  __device__ bool leads() const { return threadIdx.x % WARP == 0; }
  __device__ void sync() const { __syncthreads(); }
  __device__ void sync_warp() const { __syncwarp(); }
  // f(i) for i below n, by the lanes of a warp
  template <class F>
  __device__ __forceinline__ void each(int n, const F& f) const {
    for (int i = lane(0); i < n; i += WARP) f(i);
  }
  // The sum of f(i) for i below n, in every lane of a warp.
  template <class F>
  __device__ __forceinline__ float sum(int n, const F& f) const {
    float v = 0.0f;
    for (int i = lane(0); i < n; i += WARP) v += f(i);
    for (int reach = WARP / 2; reach > 0; reach /= 2) v += __shfl_xor_sync(~0u, v, reach);
    return v;
  }
};

struct HostTeam {
  static constexpr int LANES = WARP;

  __host__ __device__ int thread() const { return 0; }
  __host__ __device__ int threads() const { return 1; }
  __host__ __device__ int warp() const { return 0; }
  __host__ __device__ int warps() const { return 1; }
  __host__ __device__ int lane(int slot) const { return slot; }
  __host__ __device__ bool leads() const { return true; }
  __host__ __device__ void sync() const {}
  __host__ __device__ void sync_warp() const {}
  template <class F>
  __host__ __device__ void each(int n, const F& f) const {
    for (int i = 0; i < n; ++i) f(i);
  }
  template <class F>
  __host__ __device__ float sum(int n, const F& f) const {
    float v[WARP] = {}, next[WARP];
    for (int i = 0; i < n; ++i) v[i % WARP] += f(i);
    for (int reach = WARP / 2; reach > 0; reach /= 2) {
      for (int i = 0; i < WARP; ++i) next[i] = v[i] + v[i ^ reach];
      memcpy(v, next, sizeof v);
    }
    return v[0];
  }
};

// -- weights

struct Four {
  float v[4];
};

// Four bf16 numbers.
struct Pairs {
  uint32_t v[2];
};

// (outputs, inputs). `wide`: four units of a row from a multiple of 4 on are one access, zeros behind its end.
template <class S>
struct Matrix {
  const S* at;
  int ld, inputs, outputs;
  bool wide;
};

// Two numbers to bf16, the first in the low half.
MMEBM_HD uint32_t bf16_pair(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
#else
  const auto nearest = [](float v) {
    const uint32_t bits = float_bits(v);
    return is_nan(v) ? 0x7fc0u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  };
  return nearest(low) | nearest(high) << 16;
#endif
}

MMEBM_HD Four load4(const float* p) {
#if defined(__CUDA_ARCH__)
  const float4 v = *reinterpret_cast<const float4*>(p);
  return {{v.x, v.y, v.z, v.w}};
#else
  return {{p[0], p[1], p[2], p[3]}};
#endif
}

// Units k to k + 3 of the sum for output n of a product: forward along a row, backward down a column.
template <bool BACK>
MMEBM_HD Four fetch(const Matrix<float>& w, int n, int k) {
  Four out = {{0.0f, 0.0f, 0.0f, 0.0f}};
  if (BACK) {
    if (n >= w.inputs) return out;
    MMEBM_UNROLL
    for (int i = 0; i < 4; ++i) {
      if (k + i < w.outputs) out.v[i] = w.at[(k + i) * w.ld + n];
    }
  } else if (n < w.outputs && k < w.inputs) {
    const float* p = w.at + n * w.ld + k;
    if (w.wide) return load4(p);
    MMEBM_UNROLL
    for (int i = 0; i < 4; ++i) {
      if (k + i < w.inputs) out.v[i] = p[i];
    }
  }
  return out;
}

template <bool BACK>
MMEBM_HD Pairs fetch(const Matrix<uint16_t>& w, int n, int k) {
  Pairs out = {{0, 0}};
  if (BACK) {
    if (n >= w.inputs) return out;
    MMEBM_UNROLL
    for (int i = 0; i < 4; ++i) {
      if (k + i < w.outputs) out.v[i / 2] |= static_cast<uint32_t>(w.at[(k + i) * w.ld + n]) << 16 * (i % 2);
    }
  } else if (n < w.outputs && k < w.inputs) {
    const uint16_t* p = w.at + n * w.ld + k;  // always wide
#if defined(__CUDA_ARCH__)
    const uint2 v = *reinterpret_cast<const uint2*>(p);
    out.v[0] = v.x, out.v[1] = v.y;
#else
    memcpy(&out, p, sizeof out);
#endif
  }
  return out;
}

// -- products. A mode says which rows and columns of a warp's tile a lane has, and multiplies.
//
//   UNITS       of the depth that a warp takes at a time; first_unit(lane): the first of a lane's four
//   LOADS       of four weights a lane that are on their way at a time: as many as registers allow, MOST beside the
//               sums of four tiles
//   PART        units summed one after the other; parts of a longer sum are added up
//   columns     of one tile of the warp
//   A, B        operands of a lane, from four units of `rows` rows or of one column
//   row, column of element e of a lane's sums

struct Sum {
  float v[4];
};

// A tensor core's sum on the host: products of tf32 or 16-bit numbers and an accumulator, aligned to the largest of
// them with one bit more than fp32 has, cut off there and cut off again at the end. That is what an A100 was measured
// to do, four tf32 products or eight of 16 bits at a time (Fasi, Higham, Mikaitis and Pranesh, PeerJ Comput. Sci. 7,
// e330, 2021); an H100 keeps more bits. Every term and the sum are exact in fp64.
template <int N>
static float cut_sum(const float (&a)[N], const float (&b)[N], float c) {
  double terms[N + 1] = {c}, sum = 0.0;
  int most = -1000;
  for (int i = 0; i < N; ++i) terms[i + 1] = static_cast<double>(a[i]) * b[i];
  for (const double term : terms) {
    if (!std::isfinite(term)) most = 2000;
    if (term != 0.0 && most < 2000) most = std::max(most, std::ilogb(term));
  }
  const double unit = most < 2000 ? std::ldexp(1.0, most - 24) : 0.0;
  for (const double term : terms) sum += unit > 0.0 ? std::trunc(term / unit) * unit : term;
  const float nearest = static_cast<float>(sum);
  const bool up = std::isfinite(nearest) && std::fabs(static_cast<double>(nearest)) > std::fabs(sum);
  return up ? std::nextafter(nearest, 0.0f) : nearest;
}

struct Fp32 {
  using Stored = float;
  static constexpr int UNITS = 4, LOADS = 8, MOST = 4, PART = 64;
  struct A {
    Four row[4];
  };
  using B = Four;

  // 128 elements a tile: lanes side by side in a column group, each with every RG-th row, RG = rows / 4
  MMEBM_HD int columns(int rows) { return 4 * WARP / rows; }
  MMEBM_HD int column(int lane, int, int rows) { return lane % columns(rows); }
  MMEBM_HD int row(int lane, int e, int rows) { return lane / columns(rows) + rows / 4 * e; }
  MMEBM_HD int weight_column(int lane, int rows) { return lane % columns(rows); }
  MMEBM_HD int first_unit(int) { return 0; }
  MMEBM_LARGE A load(const float* a, int ld, int k, int lane, int rows) {
    A out;
    MMEBM_UNROLL
    for (int e = 0; e < 4; ++e) out.row[e] = load4(a + row(lane, e, rows) * ld + k);
    return out;
  }
  MMEBM_HD B operand(const Four& w) { return w; }
  template <int LANES>
  MMEBM_LARGE void multiply(Sum* sums, int stride, const A* a, const B* b) {
    for (int l = 0; l < LANES; ++l) {
      MMEBM_UNROLL
      for (int i = 0; i < 4; ++i) {
        MMEBM_UNROLL
        for (int e = 0; e < 4; ++e) {
          Sum& sum = sums[l * stride];
          sum.v[e] = fmaf(a[l].row[e].v[i], b[l * stride].v[i], sum.v[e]);
        }
      }
    }
  }
};

// What both modes of the tensor cores share: tiles of 16 x 8, a lane as in the manual (PTX ISA, "Matrix fragments for
// mma"): group = lane / 4 has rows group and group + 8 and the weights of column group, q = lane % 4 the units 4 q on.
struct Fragments {
  MMEBM_HD int columns(int) { return 8; }
  MMEBM_HD int column(int lane, int e, int) { return 2 * (lane % 4) + e % 2; }
  MMEBM_HD int row(int lane, int e, int) { return lane / 4 + 8 * (e / 2); }
  MMEBM_HD int weight_column(int lane, int) { return lane / 4; }
  MMEBM_HD int first_unit(int lane) { return 4 * (lane % 4); }
  // Four units of row `which` of the lane's two, zeros behind the block's rows.
  MMEBM_HD Four load_row(const float* a, int ld, int k, int lane, int rows, int which) {
    const int at = lane / 4 + 8 * which;
    return at < rows ? load4(a + at * ld + k) : Four{{0.0f, 0.0f, 0.0f, 0.0f}};
  }
};

struct Bf16 : Fragments {
  using Stored = uint16_t;
  static constexpr int UNITS = 16, LOADS = 8, MOST = 8, PART = 256;
  struct A {
    uint32_t v[4];
  };
  using B = Pairs;

  MMEBM_LARGE A load(const float* a, int ld, int k, int lane, int rows) {
    const Four low = load_row(a, ld, k, lane, rows, 0), high = load_row(a, ld, k, lane, rows, 1);
    return {{bf16_pair(low.v[0], low.v[1]), bf16_pair(high.v[0], high.v[1]), bf16_pair(low.v[2], low.v[3]),
             bf16_pair(high.v[2], high.v[3])}};
  }
  MMEBM_HD B operand(const Four& w) { return {{bf16_pair(w.v[0], w.v[1]), bf16_pair(w.v[2], w.v[3])}}; }
  MMEBM_HD B operand(const Pairs& w) { return w; }
  template <int LANES>
  MMEBM_LARGE void multiply(Sum* sums, int stride, const A* a, const B* b) {
#if defined(__CUDA_ARCH__)
#if __CUDA_ARCH__ >= 800
    float(&c)[4] = sums->v;
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a->v[0]), "r"(a->v[1]), "r"(a->v[2]), "r"(a->v[3]), "r"(b->v[0]), "r"(b->v[1]));
#endif
#else
    float left[16][16], right[16][8];
    for (int l = 0; l < LANES; ++l) {
      for (int half = 0; half < 2; ++half) {
        for (int i = 0; i < 4; ++i) {
          left[l / 4 + 8 * (i % 2)][2 * (l % 4) + 8 * (i / 2) + half] = bf16_float(a[l].v[i] >> 16 * half & 0xffffu);
        }
        for (int i = 0; i < 2; ++i) {
          right[2 * (l % 4) + 8 * i + half][l / 4] = bf16_float(b[l * stride].v[i] >> 16 * half & 0xffffu);
        }
      }
    }
    for (int l = 0; l < LANES; ++l) {
      for (int e = 0; e < 4; ++e) {
        float& c = sums[l * stride].v[e];
        for (int first = 0; first < 16; first += 8) {
          float a8[8], b8[8];
          for (int k = 0; k < 8; ++k) {
            a8[k] = left[row(l, e, 16)][first + k];
            b8[k] = right[first + k][column(l, e, 16)];
          }
          c = cut_sum(a8, b8, c);
        }
      }
    }
#endif
  }
};

// To tf32, 10 bits after the point, ties away from zero.
MMEBM_HD uint32_t tf32_bits(float v) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t out;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(out) : "f"(v));
  return out;
#else
  const uint32_t bits = float_bits(v);
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & 0xffffe000u;
#endif
}

// A number as the sum of two tf32 numbers, 22 bits of it or more.
struct Split {
  uint32_t high, low;
};

MMEBM_HD Split split(float v) {
  const uint32_t high = tf32_bits(v);
  return {high, tf32_bits(v - bits_float(high))};
}

struct Tf32x3 : Fragments {
  using Stored = float;
  static constexpr int UNITS = 16, LOADS = 4, MOST = 4, PART = 64;
  // The operand of two m16n8k8, split once for all tiles beside each other.
  struct A {
    uint32_t high[2][4], low[2][4];
  };
  using B = Four;

  MMEBM_LARGE A load(const float* a, int ld, int k, int lane, int rows) {
    const Four row[2] = {load_row(a, ld, k, lane, rows, 0), load_row(a, ld, k, lane, rows, 1)};
    A out;
    MMEBM_UNROLL
    for (int i = 0; i < 2; ++i) {
      MMEBM_UNROLL
      for (int j = 0; j < 4; ++j) {
        const Split s = split(row[j % 2].v[2 * i + j / 2]);
        out.high[i][j] = s.high, out.low[i][j] = s.low;
      }
    }
    return out;
  }
  MMEBM_HD B operand(const Four& w) { return w; }

  // `a(l)`: the four numbers of lane l
  template <int LANES, class F>
  MMEBM_LARGE void once(Sum* sums, const F& a, const uint32_t (*b)[2]) {
#if defined(__CUDA_ARCH__)
#if __CUDA_ARCH__ >= 800
    float(&c)[4] = sums->v;
    const uint32_t* const left = a(0);
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(b[0][0]), "r"(b[0][1]));
#endif
#else
    float left[16][8], right[8][8];
    for (int l = 0; l < LANES; ++l) {
      for (int i = 0; i < 4; ++i) left[l / 4 + 8 * (i % 2)][l % 4 + 4 * (i / 2)] = bits_float(a(l)[i]);
      for (int i = 0; i < 2; ++i) right[l % 4 + 4 * i][l / 4] = bits_float(b[l][i]);
    }
    for (int l = 0; l < LANES; ++l) {
      for (int e = 0; e < 4; ++e) {
        float& c = sums[l].v[e];
        for (int first = 0; first < 8; first += 4) {
          float a4[4], b4[4];
          for (int k = 0; k < 4; ++k) {
            a4[k] = left[row(l, e, 16)][first + k];
            b4[k] = right[first + k][column(l, e, 16)];
          }
          c = cut_sum(a4, b4, c);
        }
      }
    }
#endif
  }

  // The six products of 16 units go into a fresh zero, the small ones first, and ordinary additions take that up: a
  // tensor core cuts its sums off, towards zero, and over a whole sum these errors would pile up.
  template <int LANES>
  MMEBM_LARGE void multiply(Sum* sums, int stride, const A* a, const B* b) {
    Sum own[LANES];
    uint32_t high[2][LANES][2], low[2][LANES][2];
    for (int l = 0; l < LANES; ++l) {
      own[l] = {{0.0f, 0.0f, 0.0f, 0.0f}};
      MMEBM_UNROLL
      for (int i = 0; i < 4; ++i) {
        const Split s = split(b[l * stride].v[i]);
        high[i / 2][l][i % 2] = s.high, low[i / 2][l][i % 2] = s.low;
      }
    }
    MMEBM_UNROLL
    for (int i = 0; i < 2; ++i) {
      once<LANES>(own, [&](int l) { return a[l].low[i]; }, high[i]);
      once<LANES>(own, [&](int l) { return a[l].high[i]; }, low[i]);
    }
    MMEBM_UNROLL
    for (int i = 0; i < 2; ++i) once<LANES>(own, [&](int l) { return a[l].high[i]; }, high[i]);
    for (int l = 0; l < LANES; ++l) {
      MMEBM_UNROLL
      for (int e = 0; e < 4; ++e) sums[l * stride].v[e] += own[l].v[e];
    }
  }
};

enum class Put { store, times, add };

// Where a product goes: rows of `count` numbers, zeros behind them up to a multiple of 16.
struct Target {
  float* at;
  int ld, count;
  const float* bias;
  Put put;
};

// T tiles of columns from n0 on.
#pragma nv_exec_check_disable
template <class Mode, bool BACK, int T, class S, class Team>
MMEBM_LARGE void tiles(const Team& team, const Matrix<S>& w, const float* a, int ld, int n0, int rows,
                      const Target& to) {
  constexpr int LANES = Team::LANES, CHUNKS = (T == 4 ? Mode::MOST : Mode::LOADS) / T, PART = Mode::PART;
  static_assert(PART % (CHUNKS * Mode::UNITS) == 0, "chunks must not straddle parts");
  using Raw = decltype(fetch<BACK>(w, 0, 0));
  const int depth = BACK ? w.outputs : w.inputs, columns = Mode::columns(rows);
  Sum total[LANES][T];
  for (int l = 0; l < LANES; ++l) {
    MMEBM_UNROLL
    for (int t = 0; t < T; ++t) total[l][t] = {{0.0f, 0.0f, 0.0f, 0.0f}};
  }
  for (int part = 0; part < depth; part += PART) {
    const int end = smaller(depth, part + PART);
    Sum sums[LANES][T];
    for (int l = 0; l < LANES; ++l) {
      MMEBM_UNROLL
      for (int t = 0; t < T; ++t) sums[l][t] = {{0.0f, 0.0f, 0.0f, 0.0f}};
    }
#if defined(__CUDA_ARCH__)
#pragma unroll 1
#endif
    for (int k = part; k < end; k += CHUNKS * Mode::UNITS) {
      Raw raw[LANES][CHUNKS][T];
      for (int l = 0; l < LANES; ++l) {
        const int lane = team.lane(l), n = n0 + Mode::weight_column(lane, rows), first = k + Mode::first_unit(lane);
        MMEBM_UNROLL
        for (int c = 0; c < CHUNKS; ++c) {
          MMEBM_UNROLL
          for (int t = 0; t < T; ++t) raw[l][c][t] = fetch<BACK>(w, n + t * columns, first + c * Mode::UNITS);
        }
      }
      MMEBM_UNROLL
      for (int c = 0; c < CHUNKS; ++c) {
        const int at = k + c * Mode::UNITS;
        if (at >= end) break;
        typename Mode::A left[LANES];
        typename Mode::B right[LANES][T];
        for (int l = 0; l < LANES; ++l) {
          const int lane = team.lane(l);
          left[l] = Mode::load(a, ld, at + Mode::first_unit(lane), lane, rows);
          MMEBM_UNROLL
          for (int t = 0; t < T; ++t) right[l][t] = Mode::operand(raw[l][c][t]);
        }
        MMEBM_UNROLL
        for (int t = 0; t < T; ++t) Mode::template multiply<LANES>(&sums[0][t], T, left, &right[0][t]);
      }
    }
    for (int l = 0; l < LANES; ++l) {
      MMEBM_UNROLL
      for (int t = 0; t < T; ++t) {
        MMEBM_UNROLL
        for (int e = 0; e < 4; ++e) total[l][t].v[e] += sums[l][t].v[e];
      }
    }
  }
  const int written = up_to(to.count, 16);
  for (int l = 0; l < LANES; ++l) {
    const int lane = team.lane(l);
    MMEBM_UNROLL
    for (int t = 0; t < T; ++t) {
      MMEBM_UNROLL
      for (int e = 0; e < 4; ++e) {
        const int row = Mode::row(lane, e, rows), n = n0 + t * columns + Mode::column(lane, e, rows);
        if (row >= rows || n >= written) continue;
        float* const at = to.at + row * to.ld + n;
        float v = total[l][t].v[e];
        if (to.bias != nullptr && n < to.count) v += to.bias[n];
        if (to.put == Put::times) v *= *at;
        if (to.put == Put::add) v += *at;
        *at = n < to.count ? v : 0.0f;
      }
    }
  }
}

// All columns; `finish` takes what a warp has just written, by itself: the first column and how many.
#pragma nv_exec_check_disable
template <class Mode, bool BACK, class S, class Team, class F>
MMEBM_LARGE void product(const Team& team, const Matrix<S>& w, const float* a, int ld, int rows, const Target& to,
                        const F& finish) {
  const int columns = Mode::columns(rows), written = up_to(to.count, 16);
  // as many tiles a warp as leave none without work
  const int all = (written + columns - 1) / columns, count = all <= WARPS ? 1 : all <= 2 * WARPS ? 2 : 4;
  for (int n0 = team.warp() * count * columns; n0 < written; n0 += team.warps() * count * columns) {
    if (count == 1) {
      tiles<Mode, BACK, 1>(team, w, a, ld, n0, rows, to);
    } else if (count == 2) {
      tiles<Mode, BACK, 2>(team, w, a, ld, n0, rows, to);
    } else {
      tiles<Mode, BACK, 4>(team, w, a, ld, n0, rows, to);
    }
    finish(n0, smaller(count * columns, written - n0));
  }
}

// The stride of a layer's copy in shared memory, in elements: at most two lanes on a bank in both directions.
template <class Mode>
MMEBM_HD int copy_ld(const DeviceLayer& layer) {
  return up_to(layer.inputs, 16) + (sizeof(typename Mode::Stored) == 2 ? 8 : 4);
}

#pragma nv_exec_check_disable
template <class Mode, bool BACK, class Team, class F>
MMEBM_HD void layer_product(const Team& team, const DeviceLayer& layer, const float* memory, const float* a, int ld_a,
                            int rows, const Target& to, const F& finish) {
  using Stored = typename Mode::Stored;
  const int inputs = layer.inputs, outputs = layer.outputs;
  const bool wide = inputs % 4 == 0 && reinterpret_cast<uint64_t>(layer.weight) % 16 == 0, stays = layer.place >= 0;
  const Stored* copy = reinterpret_cast<const Stored*>(memory + (stays ? layer.place : 0));
  const int ld = copy_ld<Mode>(layer);
  if constexpr (sizeof(Stored) == 4) {
    // one address space for both: half the code
    const Matrix<float> w = {stays ? copy : layer.weight, stays ? ld : inputs, inputs, outputs, stays || wide};
    product<Mode, BACK>(team, w, a, ld_a, rows, to, finish);
  } else if (stays) {
    product<Mode, BACK>(team, Matrix<Stored>{copy, ld, inputs, outputs, true}, a, ld_a, rows, to, finish);
  } else {
    product<Mode, BACK>(team, Matrix<float>{layer.weight, inputs, inputs, outputs, wide}, a, ld_a, rows, to, finish);
  }
}

// -- the chain

MMEBM_HD bool has(const DeviceTensor& t, Field f) { return (t.present >> f & 1u) != 0; }

MMEBM_HD const DeviceLayer& last_layer(const DeviceChain& c, const DeviceTerm& t) {
  return c.layers[t.first_layer + t.depth - 1];
}

// What a block works on: chains first, first + 1, ...; behind the end of the batch the last one again, for nothing.
struct Tile {
  float* memory;
  int first;
  uint64_t seed;
  uint32_t step;
};

MMEBM_HD int chain_of(const DeviceChain& c, const Tile& tile, int row) {
  return smaller(tile.first + row, c.chains - 1);
}

MMEBM_HD float* energy_at(const DeviceChain& c, const Tile& tile, int row) { return tile.memory + c.at_rows + row; }

MMEBM_HD float* dead_at(const DeviceChain& c, const Tile& tile, int row) {
  return tile.memory + c.at_rows + c.rows + row;
}

MMEBM_HD float* factor_at(const DeviceChain& c, const Tile& tile, int row, int tensor) {
  return tile.memory + c.at_rows + 2 * c.rows + row * c.tensor_count + tensor;
}

MMEBM_HD float constant(const DeviceChain& c, int k, int tensor, Field f, int chain) {
  const int64_t row = c.constant_steps ? k : 0, columns = c.constant_chains ? c.chains : 1;
  return c.constants[((row * c.tensor_count + tensor) * FIELDS + f) * columns + (c.constant_chains ? chain : 0)];
}

#pragma nv_exec_check_disable
template <class Mode, class Team>
MMEBM_LARGE void begin(const Team& team, const DeviceChain& c, const Tile& tile) {
  // zeros behind the rows of all buffers: a product reads them
  for (int i = team.thread(); i < c.at_weights; i += team.threads()) tile.memory[i] = 0.0f;
  for (int l = 0; l < c.layer_count; ++l) {
    const DeviceLayer& layer = c.layers[l];
    if (layer.place < 0) continue;
    using Stored = typename Mode::Stored;
    Stored* const copy = reinterpret_cast<Stored*>(tile.memory + layer.place);
    const int ld = copy_ld<Mode>(layer), inputs = layer.inputs;
    for (int i = team.thread(); i < layer.outputs * ld; i += team.threads()) {
      const int n = i / ld, k = i - n * ld;
      const float v = k < inputs ? layer.weight[n * inputs + k] : 0.0f;
      if constexpr (sizeof(Stored) == 2) {
        copy[i] = static_cast<uint16_t>(bf16_pair(v, 0.0f));
      } else {
        copy[i] = v;
      }
    }
  }
  team.sync();
  for (int row = team.warp(); row < c.rows; row += team.warps()) {
    const float* from = c.x + static_cast<int64_t>(chain_of(c, tile, row)) * c.inputs;
    team.each(c.inputs, [&](int i) { tile.memory[row * c.ld_x + i] = from[i]; });
  }
  team.sync();
}

// dE/dy from the outputs y of a residual, in place; the energy.
#pragma nv_exec_check_disable
template <class Team>
MMEBM_LARGE void residual(const Team& team, const DeviceChain& c, const DeviceTerm& term, const Tile& tile, float* y,
                         int ld) {
  const int outputs = last_layer(c, term).outputs;
  for (int row = team.warp(); row < c.rows; row += team.warps()) {
    const int64_t chain = chain_of(c, tile, row);
    const float* target = static_cast<const float*>(term.first) + chain * outputs;
    const uint8_t* mask = static_cast<const uint8_t*>(term.second);
    if (mask != nullptr && term.mask_rows) mask += chain * outputs;
    float* const here = y + row * ld;
    const float sum = team.sum(outputs, [&](int j) {
      const float v = term.tanh ? tanh_of(here[j]) : here[j];
      const float r = mask == nullptr || mask[j] != 0 ? v - target[j] : 0.0f;
      float d = term.pull * r;
      if (term.laplace) d = r > 0.0f ? term.pull : r < 0.0f ? -term.pull : term.pull * r;  // a NaN stays one
      if (term.tanh) d *= fmaf(-v, v, 1.0f);
      here[j] = d;
      return term.laplace ? magnitude(r) : r * r;
    });
    if (team.leads()) *energy_at(c, tile, row) += term.half * sum;
  }
}

#pragma nv_exec_check_disable
template <class Team>
MMEBM_LARGE void quadratic(const Team& team, const DeviceChain& c, const DeviceTerm& term, const Tile& tile, bool add) {
  const float* mean = static_cast<const float*>(term.first);
  const float* precision = static_cast<const float*>(term.second);
  for (int row = team.warp(); row < c.rows; row += team.warps()) {
    const float* x = tile.memory + row * c.ld_x;
    float* const g = tile.memory + c.at_g + row * c.ld_x;
    const float sum = team.sum(c.inputs, [&](int i) {
      const float moved = x[i] - mean[i], pull = precision[i] * moved;
      g[i] = add ? g[i] + pull : pull;
      return pull * moved;
    });
    if (team.leads()) *energy_at(c, tile, row) += 0.5f * sum;
  }
}

// The gradient at x, and the energy of each chain.
#pragma nv_exec_check_disable
template <class Mode, class Team>
MMEBM_LARGE void evaluate(const Team& team, const DeviceChain& c, const Tile& tile) {
  float *const memory = tile.memory, *const x = memory, *const g = memory + c.at_g;
  for (int row = team.warp(); row < c.rows; row += team.warps()) {
    if (team.leads()) *energy_at(c, tile, row) = 0.0f;
  }
  for (int i = 0; i < c.term_count; ++i) {
    const DeviceTerm& term = c.terms[i];
    const Put put = i > 0 ? Put::add : Put::store;
    if (term.kind == DeviceTermKind::quadratic) {
      quadratic(team, c, term, tile, i > 0);
      team.sync();
      continue;
    }
    const DeviceLayer* const layers = c.layers + term.first_layer;
    const DeviceLayer& last = layers[term.depth - 1];
    const bool scalar = term.kind == DeviceTermKind::scalar;
    const int hidden = term.depth - 1;
    float* slopes = memory + c.at_slopes;
    // forward; a residual's last layer too
    for (int l = 0; l < (scalar ? hidden : term.depth); ++l) {
      const bool is_hidden = l < hidden, is_head = scalar && l + 1 == hidden;
      const float* in = l == 0 ? x : memory + c.at_values[(l - 1) % 2];
      const Target to = {memory + c.at_values[l % 2], c.ld_values[l % 2], layers[l].outputs, layers[l].bias,
                         Put::store};
      layer_product<Mode, false>(
          team, layers[l], memory, in, l == 0 ? c.ld_x : c.ld_values[(l - 1) % 2], c.rows, to,
          [&](int n0, int width) {
            if (!is_hidden) return;
            team.sync_warp();
            team.each(c.rows * width, [&](int item) {
              const int row = item / width, n = n0 + item - row * width;
              float* const at = to.at + row * to.ld + n;
              Activated both = activate(static_cast<Activation>(term.activation), *at, term.slope);
              const bool real = n < to.count;
              // the last hidden layer of a scalar: back through its output at once
              if (is_head) both.derivative *= real ? term.weight * last.weight[n] : 0.0f;
              *at = real ? both.value : 0.0f;
              slopes[row * c.ld_slopes + n] = real ? both.derivative : 0.0f;
            });
          });
      if (is_hidden) slopes += up_to(to.count, 16);
      team.sync();
    }
    // backward: a layer's slopes become dE/da in place
    const float* d = memory + c.at_values[hidden % 2];
    int ld = c.ld_values[hidden % 2];
    if (!scalar) {
      residual(team, c, term, tile, memory + c.at_values[hidden % 2], ld);
      team.sync();
    } else if (c.energy != nullptr) {
      const float* h = memory + c.at_values[(hidden - 1) % 2];
      const int stride = c.ld_values[(hidden - 1) % 2];
      for (int row = team.warp(); row < c.rows; row += team.warps()) {
        const float sum = team.sum(last.inputs, [&](int n) { return h[row * stride + n] * last.weight[n]; });
        const float bias = last.bias == nullptr ? 0.0f : *last.bias;
        if (team.leads()) *energy_at(c, tile, row) += term.weight * (sum + bias);
      }
    }
    for (int l = scalar ? hidden - 1 : hidden; l >= 0; --l) {
      if (l < hidden) {
        slopes -= up_to(layers[l].outputs, 16);
        d = slopes;
        ld = c.ld_slopes;
      }
      Target to = {g, c.ld_x, c.inputs, nullptr, put};
      if (l > 0) to = {slopes - up_to(layers[l].inputs, 16), c.ld_slopes, layers[l].inputs, nullptr, Put::times};
      layer_product<Mode, true>(team, layers[l], memory, d, ld, c.rows, to, [](int, int) {});
      team.sync();
    }
  }
}

// Four elements of one tensor of one chain, drawn together: x + noise before the gradient is taken, or the update.
MMEBM_LARGE void move(const DeviceChain& c, const Tile& tile, int k, int row, int quad, bool perturb) {
  int t = 0;
  while (t + 1 < c.tensor_count && quad >= c.tensors[t + 1].first_quad) ++t;
  const DeviceTensor& tensor = c.tensors[t];
  if (!tensor.moving) return;
  const bool noise = tensor.noisy && perturb == c.noise_before;
  const bool bounds = (has(tensor, F_LOW) || has(tensor, F_HIGH)) && (!perturb || c.clamp_noise);
  if (perturb && !noise && !bounds) return;

  const int chain = chain_of(c, tile, row), block = quad - tensor.first_quad, begin = tensor.begin + 4 * block;
  const int left = smaller(4, tensor.width - 4 * block);
  const auto of = [&](Field f) { return constant(c, k, t, f, chain); };
  Normals z = {0.0f, 0.0f, 0.0f, 0.0f};
  if (noise) {
    z = normals_of(words_of(chain, block, {tile.seed, tile.step + static_cast<uint32_t>(k), tensor.stream,
                                           c.chain_offset}));
  }
  const float scale = of(F_NOISE_SCALE);
  const float noises[4] = {scale * z.n0, scale * z.n1, scale * z.n2, scale * z.n3};
  const uint8_t* observed = c.observed;
  if (observed != nullptr) observed += (c.observed_rows ? static_cast<int64_t>(chain) * c.inputs : 0) + begin;
  float* const x = tile.memory + row * c.ld_x + begin;
  const float* g = tile.memory + c.at_g + row * c.ld_x + begin;
  MMEBM_UNROLL
  for (int j = 0; j < 4; ++j) {
    if (j >= left || (observed != nullptr && observed[j] != 0)) continue;
    float d = noises[j];
    if (!perturb) {
      float v = g[j];
      if (has(tensor, F_GRAD_CLIP)) v = between(v, -of(F_GRAD_CLIP), of(F_GRAD_CLIP));
      if (has(tensor, F_NORM_CLIP)) v *= *factor_at(c, tile, row, t);
      if (has(tensor, F_PRECISION)) v = fmaf(of(F_PRECISION), x[j], v);
      const float pull = -of(F_STEP_SIZE) * v;
      d = noise ? pull + d : pull;
      if (has(tensor, F_MAX_UPDATE)) d = between(d, -of(F_MAX_UPDATE), of(F_MAX_UPDATE));
    }
    float y = perturb && !noise ? x[j] : x[j] + d;
    if (bounds && has(tensor, F_LOW)) y = at_least(y, of(F_LOW));
    if (bounds && has(tensor, F_HIGH)) y = at_most(y, of(F_HIGH));
    x[j] = y;
  }
}

#pragma nv_exec_check_disable
template <class Team>
MMEBM_LARGE void move_all(const Team& team, const DeviceChain& c, const Tile& tile, int k, bool perturb) {
  for (int item = team.thread(); item < c.rows * c.quads; item += team.threads()) {
    const int row = item / c.quads;
    move(c, tile, k, row, item - row * c.quads, perturb);
  }
  team.sync();
}

// The factors of the norm clips, and the norm of the whole gradient.
#pragma nv_exec_check_disable
template <class Team>
MMEBM_LARGE void norms(const Team& team, const DeviceChain& c, const Tile& tile, int k) {
  for (int row = team.warp(); row < c.rows; row += team.warps()) {
    const float* g = tile.memory + c.at_g + row * c.ld_x;
    const int chain = chain_of(c, tile, row);
    float all = 0.0f;
    for (int t = 0; t < c.tensor_count; ++t) {
      const DeviceTensor& tensor = c.tensors[t];
      if (!tensor.moving) continue;
      const float* part = g + tensor.begin;
      if (c.grad_norm != nullptr) all += team.sum(tensor.width, [&](int i) { return part[i] * part[i]; });
      if (!has(tensor, F_NORM_CLIP)) continue;
      const bool clip = has(tensor, F_GRAD_CLIP);
      const float limit = clip ? constant(c, k, t, F_GRAD_CLIP, chain) : 0.0f;
      const float norm = sqrtf(team.sum(tensor.width, [&](int i) {
        const float v = clip ? between(part[i], -limit, limit) : part[i];
        return v * v;
      }));
      // 1 up to the limit; NaN where the norm is, so that a broken chain is seen
      const float bound = constant(c, k, t, F_NORM_CLIP, chain);
      if (team.leads()) *factor_at(c, tile, row, t) = norm <= bound ? 1.0f : bound / norm;
    }
    if (team.leads() && tile.first + row < c.chains) {
      const int64_t at = static_cast<int64_t>(k) * c.chains + tile.first + row;
      if (c.grad_norm != nullptr) c.grad_norm[at] = sqrtf(all);
      if (c.energy != nullptr) c.energy[at] = *energy_at(c, tile, row);
    }
  }
  team.sync();
}

// Chains with an inf or NaN in a moving tensor go back to where they were, for good.
#pragma nv_exec_check_disable
template <class Team>
MMEBM_LARGE void freeze(const Team& team, const DeviceChain& c, const Tile& tile) {
  for (int row = team.warp(); row < c.rows; row += team.warps()) {
    float* const x = tile.memory + row * c.ld_x;
    const float* old = tile.memory + c.at_old + row * c.ld_x;
    float broken = *dead_at(c, tile, row);
    for (int t = 0; t < c.tensor_count; ++t) {
      const DeviceTensor& tensor = c.tensors[t];
      if (tensor.moving) {
        broken += team.sum(tensor.width, [&](int i) { return is_finite(x[tensor.begin + i]) ? 0.0f : 1.0f; });
      }
    }
    if (broken == 0.0f) continue;
    team.sync_warp();  // all lanes have read whether it was dead
    if (team.leads()) *dead_at(c, tile, row) = 1.0f;
    team.each(c.inputs, [&](int i) { x[i] = old[i]; });
  }
  team.sync();
}

#pragma nv_exec_check_disable
template <class Mode, class Team>
MMEBM_LARGE void run(const Team& team, const DeviceChain& c, int number, float* memory) {
  Tile tile;
  tile.memory = memory;
  tile.first = number * c.rows;
  tile.seed = c.seed.at == nullptr ? c.seed.value : static_cast<uint64_t>(*c.seed.at);
  tile.step = static_cast<uint32_t>(c.first_step.at == nullptr ? c.first_step.value
                                                               : static_cast<uint64_t>(*c.first_step.at));
  begin<Mode>(team, c, tile);
  for (int k = 0; k < c.steps; ++k) {
    if (c.frozen != nullptr) {
      for (int i = team.thread(); i < c.rows * c.ld_x; i += team.threads()) memory[c.at_old + i] = memory[i];
      team.sync();
    }
    if (c.noise_before) move_all(team, c, tile, k, true);
    evaluate<Mode>(team, c, tile);
    norms(team, c, tile, k);
    move_all(team, c, tile, k, false);
    if (c.frozen != nullptr) freeze(team, c, tile);
  }
  for (int row = team.warp(); row < c.rows && tile.first + row < c.chains; row += team.warps()) {
    const int64_t chain = tile.first + row;
    team.each(c.inputs, [&](int i) { c.out[chain * c.inputs + i] = memory[row * c.ld_x + i]; });
    if (c.frozen != nullptr && team.leads()) c.frozen[chain] = *dead_at(c, tile, row) != 0.0f;
  }
}

template <class Mode>
__global__ void __launch_bounds__(THREADS, 2) chain_kernel(const __grid_constant__ DeviceChain chain) {
  extern __shared__ float4 shared_memory[];  // float4: aligned to 16 bytes
  run<Mode>(BlockTeam(), chain, static_cast<int>(blockIdx.x), reinterpret_cast<float*>(shared_memory));
}

template <class Mode>
void run_on_host(const DeviceChain& chain) {
  std::vector<float> memory(static_cast<size_t>(chain.floats));
  for (int i = 0; i * static_cast<int64_t>(chain.rows) < chain.chains; ++i) {
    run<Mode>(HostTeam(), chain, i, memory.data());
  }
}

const void* kernel_of(Precision precision) {
  switch (precision) {
    case Precision::tf32x3: return reinterpret_cast<const void*>(chain_kernel<Tf32x3>);
    case Precision::bf16: return reinterpret_cast<const void*>(chain_kernel<Bf16>);
    default: return reinterpret_cast<const void*>(chain_kernel<Fp32>);
  }
}

// The stride of rows of `width` floats, such that what the lanes of a warp read of several rows lies in other banks.
int row_ld(int width, Precision precision) {
  if (precision == Precision::fp32) return up_to(width, 32) + 4;
  const int padded = up_to(width, 16);
  return padded % 32 == 16 ? padded : padded + 16;
}

}  // namespace

bool lay_out(DeviceChain& chain, Precision precision, int rows, int64_t bytes) {
  if (rows != 16 && rows != 8 && rows != 4) return false;
  int values[2] = {0, 0}, slopes = 0, quads = 0;
  for (int i = 0; i < chain.term_count; ++i) {
    const DeviceTerm& term = chain.terms[i];
    if (term.kind == DeviceTermKind::quadratic) continue;
    const int hidden = term.depth - 1, outputs = hidden + (term.kind == DeviceTermKind::residual);
    int sum = 0;
    for (int l = 0; l < outputs; ++l) {
      const int width = chain.layers[term.first_layer + l].outputs;
      values[l % 2] = std::max(values[l % 2], width);
      if (l < hidden) sum += up_to(width, 16);
    }
    slopes = std::max(slopes, sum);
  }
  for (int t = 0; t < chain.tensor_count; ++t) {
    chain.tensors[t].first_quad = static_cast<uint16_t>(quads);
    quads += (chain.tensors[t].width + 3) / 4;
  }
  chain.quads = quads;
  chain.rows = rows;
  chain.ld_x = row_ld(chain.inputs, precision);
  chain.ld_slopes = row_ld(slopes, precision);
  int at = rows * chain.ld_x;
  const auto take = [&at, rows](int floats) {
    const int start = at;
    at += floats * rows;
    return start;
  };
  chain.at_g = take(chain.ld_x);
  chain.at_old = take(chain.frozen != nullptr ? chain.ld_x : 0);
  chain.at_slopes = take(chain.ld_slopes);
  for (int i = 0; i < 2; ++i) {
    chain.ld_values[i] = row_ld(values[i], precision);
    chain.at_values[i] = take(chain.ld_values[i]);
  }
  chain.at_rows = take(2 + chain.tensor_count);
  at = up_to(at, 4);
  chain.at_weights = at;
  if (4 * static_cast<int64_t>(at) > bytes) return false;
  for (int i = 0; i < chain.term_count; ++i) {
    const DeviceTerm& term = chain.terms[i];
    if (term.kind == DeviceTermKind::quadratic) continue;
    for (int l = 0; l < term.depth; ++l) {
      DeviceLayer& layer = chain.layers[term.first_layer + l];
      layer.place = -1;
      // the output of a scalar is no product
      if (term.kind == DeviceTermKind::scalar && l + 1 == term.depth) continue;
      const int floats = precision == Precision::bf16 ? layer.outputs * copy_ld<Bf16>(layer) / 2
                                                      : layer.outputs * copy_ld<Fp32>(layer);
      if (4 * (static_cast<int64_t>(at) + floats) > bytes) continue;
      layer.place = at;
      at += floats;
    }
  }
  chain.floats = at;
  return true;
}

int prepare_langevin_mlp(int device) {
  int code = cudaSetDevice(device);
  cudaFuncAttributes attributes;
  for (const Precision precision : {Precision::fp32, Precision::tf32x3, Precision::bf16}) {
    if (code == cudaSuccess) code = cudaFuncGetAttributes(&attributes, kernel_of(precision));
  }
  cudaGetLastError();  // clears the error, which the next launch check would report otherwise
  return code;
}

int langevin_mlp_cuda(DeviceChain chain, Precision precision, int device, uint64_t cuda_stream) {
  // The static runtime of this library keeps its own notion of the current device, apart from torch's.
  int code = cudaSetDevice(device), processors = 0, bytes = 0;
  if (code == cudaSuccess) code = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (code == cudaSuccess) code = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (code != cudaSuccess) return code;
  // Without tensor cores a block of fewer chains is done sooner, as long as there are multiprocessors for all; with
  // them 16 take as long as 4.
  int rows = 16;
  if (precision == Precision::fp32) rows = chain.chains <= 4 * processors ? 4 : chain.chains <= 8 * processors ? 8 : 16;
  while (!lay_out(chain, precision, rows, bytes)) {
    if (rows == 4) return cudaErrorInvalidConfiguration;
    rows /= 2;
  }
  const void* kernel = kernel_of(precision);
  const size_t shared = sizeof(float) * static_cast<size_t>(chain.floats);
  code = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (code != cudaSuccess) return code;
  void* arguments[] = {&chain};
  const unsigned int grid = static_cast<unsigned int>((static_cast<int64_t>(chain.chains) + rows - 1) / rows);
  code = cudaLaunchKernel(kernel, dim3(grid), dim3(THREADS), arguments, shared,
                          reinterpret_cast<cudaStream_t>(cuda_stream));
  cudaGetLastError();
  return code;
}

bool langevin_mlp_host(DeviceChain chain, Precision precision, int rows, int64_t bytes) {
  if (!lay_out(chain, precision, rows, bytes)) return false;
  switch (precision) {
    case Precision::tf32x3: run_on_host<Tf32x3>(chain); break;
    case Precision::bf16: run_on_host<Bf16>(chain); break;
    default: run_on_host<Fp32>(chain);
  }
  return true;
}

void mlp_activation_host(Activation kind, float slope, const float* in, float* value, float* derivative, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const Activated both = activate(kind, in[i], slope);
    value[i] = both.value;
    derivative[i] = both.derivative;
  }
}

}  // namespace mmebm
