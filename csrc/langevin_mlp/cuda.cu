// A whole Langevin chain on a sum of MLP terms, in one launch. The definition is mmebm/ops/langevin_mlp/reference.py.
//
// A cluster of 1, 2, 4 or 8 blocks owns 8 chains for all steps; a single block also 16 of them, or 4. State, gradient,
// activations and slopes act' stay in shared memory, a row per chain; nothing but the records leaves it before the last
// step. Chains share only weights, so clusters never wait for each other, and a captured graph is one node.
//
// Clusters (compute capability 9.0 or later). A step is a sequence of small products, and 100 chains in blocks of 8 use
// 13 multiprocessors. So the blocks of a cluster share the work on the same chains: the tiles of each product, rows of
// chains, elements of the update. Each has a copy of what all read, and who makes a number writes it to all copies over
// distributed shared memory; `sync` is the cluster's barrier, six a step for two hidden layers. Slopes, which only their
// makers need, stay. A block keeps its own share of the weights. No sum is cut, so that no result depends on the cluster.
//
// Weights. As many layers as fit beside the state are copied into shared memory first, in bf16 for bf16 products, and
// stay for all steps; the rest is read where it lies, as (outputs, inputs), from L2. Why: 64-200-200-1 has 211 KB of
// fp32 weights, each of which a step takes twice. An SM gets about 64 bytes a cycle from L2 and 128 from shared memory,
// and a load waits some 250 cycles for L2 and 30 for shared memory, which 8 warps a block do not hide. A cluster's blocks
// keep tiles of the matrix for the forward pass and of the transposed one for the backward pass; a single block keeps
// the matrix once and reads it in both directions. Nothing is repacked outside: a captured graph sees new weights.
// (Estimates for an H100: no device was there to measure on.)
//
// Products. A warp computes a tile of 8 or 16 outputs x 8 chains over the whole depth, alone: no barrier and no staging
// inside a product.
//     fp32     FMA units: a lane has 4 outputs x 4 chains and an eighth of the depth, whose sums a butterfly adds up
//     tf32x3   each operand as a sum of two tf32 numbers, three products; what is left out is 2^-22 of the product
//     bf16     operands rounded to nearest even; weights by ldmatrix, transposed for columns
// Sums are fp32, those of the tensor cores in parts of 16 units, so that rounding errors stay those of a short sum.
//
// Everything else is elementwise or a sum over a chain's row, which a warp takes lane by lane and ends in a butterfly.
// All orders are functions of the widths alone: a chain's result depends neither on the chains beside it, nor on
// `rows` or the cluster, nor on where weights lie.
//
// The code is templates over a team: a cluster on the device; one thread on the host, which does the lanes of a warp one
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

// n >= 0
MMEBM_HD int up_to(int n, int unit) {
  return static_cast<int>((static_cast<uint32_t>(n) + unit - 1) / unit * unit);
}

MMEBM_HD int smaller(int a, int b) { return a < b ? a : b; }

// Larger functions: inlined in a kernel, where arrays must become registers; not on the host, where the compiler would
// take a minute for it.
#if defined(__CUDA_ARCH__)
#define MMEBM_LARGE static __host__ __device__ __forceinline__
#else
#define MMEBM_LARGE static __host__ __device__ __attribute__((noinline))
#endif

// -- teams: who does the work of a cluster of blocks. LANES: the lanes of a warp that one thread does.

struct BlockTeam {
  static constexpr int LANES = 1;
  const DeviceChain& chain;
  int block;  // which of its cluster's

  // neighbours are on different multiprocessors, so that each has a share of short work
  __device__ int thread() const { return static_cast<int>(threadIdx.x) << chain.doublings | block; }
  __device__ int threads() const { return THREADS << chain.doublings; }
  __device__ int warp() const { return static_cast<int>(threadIdx.x) / WARP << chain.doublings | block; }
  __device__ int warps() const { return WARPS << chain.doublings; }
  __device__ int lane(int) const { return static_cast<int>(threadIdx.x) % WARP; }
  __device__ bool leads() const { return threadIdx.x % WARP == 0; }
  __device__ void sync() const {
#if __CUDA_ARCH__ >= 900
    if (chain.doublings > 0) {
      asm volatile("barrier.cluster.arrive.aligned;\n\tbarrier.cluster.wait.aligned;" ::: "memory");
      return;
    }
#endif
    __syncthreads();
  }
  __device__ void sync_warp() const { __syncwarp(); }
  // f(i) for i below n, by the threads of this block alone
  template <class F>
  __device__ __forceinline__ void each_here(int n, const F& f) const {
    for (int i = static_cast<int>(threadIdx.x); i < n; i += THREADS) f(i);
  }
  // f(block, its memory) for the blocks whose memory this one fills
  template <class F>
  __device__ __forceinline__ void each_block(float* memory, int, const F& f) const {
    f(block, memory);
  }
  // The memory in which the weights of tile `t` are.
  __device__ const float* weights_of(const float* memory, int, int) const { return memory; }
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
  // Writes to all blocks' copies of a number.
  __device__ __forceinline__ void put(float* at, float v) const {
    *at = v;
#if __CUDA_ARCH__ >= 900
    const uint32_t here = static_cast<uint32_t>(__cvta_generic_to_shared(at));
    for (int i = 1; i < 1 << chain.doublings; ++i) {
      asm volatile(
          "{ .reg .u32 there; mapa.shared::cluster.u32 there, %0, %1; st.shared::cluster.f32 [there], %2; }" ::"r"(here),
          "r"(block ^ i), "f"(v)
          : "memory");
    }
#endif
  }
  // Sends what a warp has written here, `rows` rows of 2^bits numbers, to the other blocks' copies.
  __device__ __forceinline__ void share(const float* at, int ld, int rows, int bits) const {
#if __CUDA_ARCH__ >= 900
    if (chain.doublings == 0) return;
    __syncwarp();
    for (int i = lane(0); i < rows << (bits - 2); i += WARP) {
      const float* const from = at + (i >> (bits - 2)) * ld + 4 * (i & ((1 << (bits - 2)) - 1));
      const float4 v = *reinterpret_cast<const float4*>(from);
      const uint32_t here = static_cast<uint32_t>(__cvta_generic_to_shared(from));
      for (int j = 1; j < 1 << chain.doublings; ++j) {
        asm volatile(
            "{ .reg .u32 there; mapa.shared::cluster.u32 there, %0, %1; "
            "st.shared::cluster.v4.f32 [there], {%2, %3, %4, %5}; }" ::"r"(here),
            "r"(block ^ j), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
            : "memory");
      }
    }
#endif
  }
};

// All blocks of a cluster: what they hold copies of is there once, their weights are side by side.
struct HostTeam {
  static constexpr int LANES = WARP;
  int doublings;

  __host__ __device__ int thread() const { return 0; }
  __host__ __device__ int threads() const { return 1; }
  __host__ __device__ int warp() const { return 0; }
  __host__ __device__ int warps() const { return 1; }
  __host__ __device__ int lane(int slot) const { return slot; }
  __host__ __device__ bool leads() const { return true; }
  __host__ __device__ void sync() const {}
  __host__ __device__ void sync_warp() const {}
  template <class F>
  __host__ __device__ void each_here(int n, const F& f) const {
    for (int i = 0; i < n; ++i) f(i);
  }
  template <class F>
  __host__ __device__ void each_block(float* memory, int floats, const F& f) const {
    for (int i = 0; i < 1 << doublings; ++i) f(i, memory + i * static_cast<int64_t>(floats));
  }
  __host__ __device__ const float* weights_of(const float* memory, int floats, int t) const {
    return memory + (t & ((1 << doublings) - 1)) * static_cast<int64_t>(floats);
  }
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
  __host__ __device__ void put(float* at, float v) const { *at = v; }
  __host__ __device__ void share(const float*, int, int, int) const {}
};

// -- weights

struct Four {
  float v[4];
};

// Where a tile's weights are. Those that stay in shared memory: zeros behind what there is, `at` is that of the tile's
// first output, in `rows` rows. Else the matrix (outputs, inputs) itself, of which `first` is the tile's first output;
// `wide`: four numbers of a row from a multiple of 4 on are one access, zeros behind its end.
template <class S>
struct Matrix {
  const S* at;
  int ld, rows, inputs, outputs, first;
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

MMEBM_HD void load2(const float* p, float* out) {
#if defined(__CUDA_ARCH__)
  const float2 v = *reinterpret_cast<const float2*>(p);
  out[0] = v.x, out[1] = v.y;
#else
  out[0] = p[0], out[1] = p[1];
#endif
}

// The weight of output n of the tile for unit k of the sum, forward along a row, or COLUMN: backward, down a column.
template <bool COLUMN>
MMEBM_HD float weight_at(const Matrix<float>& w, int n, int k) {
  n += w.first;
  if (COLUMN) return n < w.inputs && k < w.outputs ? w.at[k * w.ld + n] : 0.0f;
  return n < w.outputs && k < w.inputs ? w.at[n * w.ld + k] : 0.0f;
}

// Four weights side by side: of units k on, or COLUMN: of outputs n on.
template <bool COLUMN>
MMEBM_HD Four weights_at(const Matrix<float>& w, int n, int k) {
  Four out = {{0.0f, 0.0f, 0.0f, 0.0f}};
  const int row = COLUMN ? k : n + w.first, column = COLUMN ? n + w.first : k;
  if (row >= w.outputs || column >= w.inputs) return out;
  const float* p = w.at + row * w.ld + column;
  if (w.wide) return load4(p);
  MMEBM_UNROLL
  for (int i = 0; i < 4; ++i) {
    if (column + i < w.inputs) out.v[i] = p[i];
  }
  return out;
}

// -- products. A warp computes tiles of 2^bits outputs x 8 chains; a mode says how.
//
//   bits        2^bits outputs of a tile; narrow: only 4 chains
//   UNITS       of the depth that a warp takes at a time
//   UNROLL      of these that are worked at side by side, where weights stay in shared memory
//   OCTETS      most tiles above each other that a warp takes at a time
//   Weights, Inputs   a lane's operands for UNITS of the depth, inputs of 8 chains
//   Sums        a lane's part of the tile; finish: its RESULTS numbers, of chain `row` and output `column`

struct Geometry {
  int lane, rows;
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

// A lane has 4 outputs x 4 chains and four units of each 32: 8 reads of 16 bytes for 64 FMA instructions. Four lanes
// beside each other read the same units, of two rows each.
struct Fp32 {
  using Stored = float;
  static constexpr int UNITS = 32, RESULTS = 2;
  static constexpr int UNROLL = 1, OCTETS = 1;
  struct Weights {
    Four output[4];  // four units each
  };
  struct Inputs {
    Four chain[4];
  };
  struct Sums {
    float v[16];  // 4 * chain + output
  };
  struct Results {
    float v[RESULTS];
  };

  MMEBM_HD int bits(bool narrow) { return narrow ? 4 : 3; }
  // lanes beside each other share units: 2 groups of outputs x 2 of chains, or 4 of outputs where there are 4 chains
  MMEBM_HD int outputs_at(Geometry g) { return 4 * (g.rows == 4 ? g.lane & 3 : g.lane & 1); }
  MMEBM_HD int chains_at(Geometry g) { return g.rows == 4 ? 0 : 4 * (g.lane >> 1 & 1); }
  MMEBM_HD int part(Geometry g) { return g.lane >> 2; }
  MMEBM_HD int row(Geometry g, int) { return chains_at(g) + (part(g) >> 1); }
  MMEBM_HD int column(Geometry g, int e) { return outputs_at(g) + 2 * (part(g) & 1) + e; }

  template <bool COLUMN, bool STAYS>
  MMEBM_LARGE Weights fetch(const Matrix<float>& w, int k, Geometry g) {
    Weights out;
    const int n = outputs_at(g), first = k + 4 * part(g);
    MMEBM_UNROLL
    for (int i = 0; i < 4; ++i) {
      Four four = {{0.0f, 0.0f, 0.0f, 0.0f}};
      if (!STAYS) {
        four = COLUMN ? weights_at<true>(w, n, first + i) : weights_at<false>(w, n + i, first);
      } else if (!COLUMN) {
        four = load4(w.at + (n + i) * w.ld + first);
      } else if (first < w.rows) {
        four = load4(w.at + (first + i) * w.ld + n);
      }
      MMEBM_UNROLL
      for (int j = 0; j < 4; ++j) out.output[COLUMN ? j : i].v[COLUMN ? i : j] = four.v[j];
    }
    return out;
  }
  MMEBM_LARGE Inputs load(const float* a, int ld, int k, Geometry g) {
    Inputs out;
    MMEBM_UNROLL
    for (int i = 0; i < 4; ++i) out.chain[i] = load4(a + (chains_at(g) + i) * ld + k + 4 * part(g));
    return out;
  }
  template <int LANES>
  MMEBM_LARGE void multiply(Sums (&sums)[LANES], const Inputs (&a)[LANES], const Weights (&b)[LANES]) {
    for (int l = 0; l < LANES; ++l) {
      MMEBM_UNROLL
      for (int i = 0; i < 4; ++i) {
        MMEBM_UNROLL
        for (int at = 0; at < 16; ++at) {
          sums[l].v[at] = fmaf(a[l].chain[at / 4].v[i], b[l].output[at % 4].v[i], sums[l].v[at]);
        }
      }
    }
  }
  // Of two lanes each gives the other half of its sums.
  template <int HALF, int LANES>
  MMEBM_LARGE void fold(Sums (&sums)[LANES]) {
#if defined(__CUDA_ARCH__)
    float(&v)[16] = sums->v;
    const bool upper = (threadIdx.x & 2u * HALF) != 0;
    MMEBM_UNROLL
    for (int i = 0; i < HALF; ++i) {
      const float mine = upper ? v[HALF + i] : v[i], other = upper ? v[i] : v[HALF + i];
      v[i] = mine + __shfl_xor_sync(~0u, other, 2 * HALF);
    }
#else
    Sums next[LANES];
    for (int l = 0; l < LANES; ++l) {
      const int from = (l & 2 * HALF) != 0 ? HALF : 0;
      for (int i = 0; i < HALF; ++i) next[l].v[i] = sums[l].v[from + i] + sums[l ^ 2 * HALF].v[from + i];
    }
    for (int l = 0; l < LANES; ++l) memcpy(sums[l].v, next[l].v, sizeof(float) * HALF);
#endif
  }
  // Over the eight lanes of a part of the tile, each of which ends with two of 16 sums.
  template <int LANES>
  MMEBM_LARGE void finish(Sums (&sums)[LANES], Results (&out)[LANES]) {
    fold<8>(sums);
    fold<4>(sums);
    fold<2>(sums);
    for (int l = 0; l < LANES; ++l) out[l] = {{sums[l].v[0], sums[l].v[1]}};
  }
};

// What both modes of the tensor cores share: weights are the 16 rows of a product's left side, chains the 8 columns of
// its right side (PTX ISA, "Matrix fragments for mma"): a lane, of group g = lane / 4 and q = lane % 4, has the weights
// of outputs g and g + 8, the inputs of chain g and the sums of chains 2 q and 2 q + 1.
struct Fragments {
  static constexpr int UNITS = 16, RESULTS = 4, OCTETS = 2;
  struct Sums {
    float v[RESULTS];
  };
  using Results = Sums;

  MMEBM_HD int bits(bool) { return 4; }
  MMEBM_HD int row(Geometry g, int e) { return 2 * (g.lane % 4) + e % 2; }
  MMEBM_HD int column(Geometry g, int e) { return g.lane / 4 + 8 * (e / 2); }
  template <int LANES>
  MMEBM_LARGE void add(Sums (&sums)[LANES], const Sums (&more)[LANES]) {
    for (int l = 0; l < LANES; ++l) {
      MMEBM_UNROLL
      for (int e = 0; e < RESULTS; ++e) sums[l].v[e] += more[l].v[e];
    }
  }
  template <int LANES>
  MMEBM_LARGE void finish(const Sums (&sums)[LANES], Results (&out)[LANES]) {
    for (int l = 0; l < LANES; ++l) out[l] = sums[l];
  }
};

struct Bf16 : Fragments {
  using Stored = uint16_t;
  static constexpr int UNROLL = 4;
  struct Weights {
    uint32_t v[4];
  };
  struct Inputs {
    uint32_t v[2];
  };

  // One ldmatrix for a warp: four matrices of 8 x 8, whose 32 rows the lanes point at. COLUMN: rows are units, and the
  // lanes get them transposed.
  template <bool COLUMN, bool STAYS>
  MMEBM_LARGE Weights fetch(const Matrix<uint16_t>& w, int k, Geometry g) {
    Weights out;
#if defined(__CUDA_ARCH__)
    const int high = g.lane >> 3 & 1, behind = g.lane >> 4, line = g.lane & 7;
    const uint16_t* p = COLUMN ? w.at + (k + line + 8 * behind) * w.ld + 8 * high
                               : w.at + (line + 8 * high) * w.ld + k + 8 * behind;
    const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(p));
    if (COLUMN) {
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(out.v[0]), "=r"(out.v[1]), "=r"(out.v[2]), "=r"(out.v[3])
                   : "r"(at)
                   : "memory");
    } else {
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(out.v[0]), "=r"(out.v[1]), "=r"(out.v[2]), "=r"(out.v[3])
                   : "r"(at)
                   : "memory");
    }
#else
    for (int i = 0; i < 4; ++i) {
      const int n = g.lane / 4 + 8 * (i % 2), unit = k + 2 * (g.lane % 4) + 8 * (i / 2);
      const uint16_t* p = COLUMN ? w.at + unit * w.ld + n : w.at + n * w.ld + unit;
      out.v[i] = p[0] | static_cast<uint32_t>(p[COLUMN ? w.ld : 1]) << 16;
    }
#endif
    return out;
  }
  template <bool COLUMN, bool STAYS>
  MMEBM_LARGE Weights fetch(const Matrix<float>& w, int k, Geometry g) {
    Weights out;
    MMEBM_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int n = g.lane / 4 + 8 * (i % 2), unit = k + 2 * (g.lane % 4) + 8 * (i / 2);
      float two[2] = {0.0f, 0.0f};
      if (!COLUMN && w.wide) {
        if (n + w.first < w.outputs && unit < w.inputs) load2(w.at + (n + w.first) * w.ld + unit, two);
      } else {
        two[0] = weight_at<COLUMN>(w, n, unit), two[1] = weight_at<COLUMN>(w, n, unit + 1);
      }
      out.v[i] = bf16_pair(two[0], two[1]);
    }
    return out;
  }
  MMEBM_LARGE Inputs load(const float* a, int ld, int k, Geometry g) {
    float v[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (g.lane / 4 < g.rows) {
      const float* p = a + g.lane / 4 * ld + k + 2 * (g.lane % 4);
      load2(p, v), load2(p + 8, v + 2);
    }
    return {{bf16_pair(v[0], v[1]), bf16_pair(v[2], v[3])}};
  }
  // 16 units go into a fresh zero: see Tf32x3
  template <int LANES>
  MMEBM_LARGE void multiply(Sums (&sums)[LANES], const Inputs (&b)[LANES], const Weights (&a)[LANES]) {
    Sums own[LANES] = {};
#if defined(__CUDA_ARCH__)
#if __CUDA_ARCH__ >= 800
    float(&c)[4] = own->v;
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a->v[0]), "r"(a->v[1]), "r"(a->v[2]), "r"(a->v[3]), "r"(b->v[0]), "r"(b->v[1]));
#endif
#else
    float left[16][16], right[8][16];
    for (int l = 0; l < LANES; ++l) {
      for (int half = 0; half < 2; ++half) {
        for (int i = 0; i < 4; ++i) {
          left[l / 4 + 8 * (i % 2)][2 * (l % 4) + 8 * (i / 2) + half] = bf16_float(a[l].v[i] >> 16 * half & 0xffffu);
        }
        for (int i = 0; i < 2; ++i) {
          right[l / 4][2 * (l % 4) + 8 * i + half] = bf16_float(b[l].v[i] >> 16 * half & 0xffffu);
        }
      }
    }
    for (int l = 0; l < LANES; ++l) {
      for (int e = 0; e < 4; ++e) {
        float& c = own[l].v[e];
        const Geometry g = {l, 8};
        for (int first = 0; first < 16; first += 8) {
          float a8[8], b8[8];
          for (int k = 0; k < 8; ++k) a8[k] = left[column(g, e)][first + k], b8[k] = right[row(g, e)][first + k];
          c = cut_sum(a8, b8, c);
        }
      }
    }
#endif
    add(sums, own);
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

// A lane takes four consecutive units, 16 bytes, of 16: the order of a sum is free, so that the fragments of two
// m16n8k8 take them in this order from both sides.
struct Tf32x3 : Fragments {
  using Stored = float;
  static constexpr int UNROLL = 1;
  struct Weights {
    Four output[2];
  };
  struct Inputs {
    uint32_t high[4], low[4];  // split once for the tiles of a warp
  };

  template <bool COLUMN, bool STAYS>
  MMEBM_LARGE Weights fetch(const Matrix<float>& w, int k, Geometry g) {
    Weights out;
    MMEBM_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int n = g.lane / 4 + 8 * i, first = k + 4 * (g.lane % 4);
      if constexpr (COLUMN) {
        MMEBM_UNROLL
        for (int j = 0; j < 4; ++j) {
          out.output[i].v[j] = STAYS ? w.at[(first + j) * w.ld + n] : weight_at<true>(w, n, first + j);
        }
      } else {
        out.output[i] = STAYS ? load4(w.at + n * w.ld + first) : weights_at<false>(w, n, first);
      }
    }
    return out;
  }
  MMEBM_LARGE Inputs load(const float* a, int ld, int k, Geometry g) {
    Four v = {{0.0f, 0.0f, 0.0f, 0.0f}};
    if (g.lane / 4 < g.rows) v = load4(a + g.lane / 4 * ld + k + 4 * (g.lane % 4));
    Inputs out;
    MMEBM_UNROLL
    for (int i = 0; i < 4; ++i) {
      const Split s = split(v.v[i]);
      out.high[i] = s.high, out.low[i] = s.low;
    }
    return out;
  }

  // One m16n8k8: `a(l)` the four numbers of lane l on the left, `b(l)` its two on the right
  template <int LANES, class A, class B>
  MMEBM_LARGE void once(Sums (&sums)[LANES], const A& a, const B& b) {
#if defined(__CUDA_ARCH__)
#if __CUDA_ARCH__ >= 800
    float(&c)[4] = sums->v;
    const uint32_t *const left = a(0), *const right = b(0);
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
#endif
#else
    float left[16][8], right[8][8];
    for (int l = 0; l < LANES; ++l) {
      for (int i = 0; i < 4; ++i) left[l / 4 + 8 * (i % 2)][l % 4 + 4 * (i / 2)] = bits_float(a(l)[i]);
      for (int i = 0; i < 2; ++i) right[l / 4][l % 4 + 4 * i] = bits_float(b(l)[i]);
    }
    for (int l = 0; l < LANES; ++l) {
      for (int e = 0; e < 4; ++e) {
        float& c = sums[l].v[e];
        const Geometry g = {l, 8};
        for (int first = 0; first < 8; first += 4) {
          float a4[4], b4[4];
          for (int k = 0; k < 4; ++k) a4[k] = left[column(g, e)][first + k], b4[k] = right[row(g, e)][first + k];
          c = cut_sum(a4, b4, c);
        }
      }
    }
#endif
  }

  // The six products of 16 units go into a fresh zero, the small ones first, and ordinary additions take that up: a
  // tensor core cuts its sums off, towards zero, and over a whole sum these errors would pile up.
  template <int LANES>
  MMEBM_LARGE void multiply(Sums (&sums)[LANES], const Inputs (&b)[LANES], const Weights (&a)[LANES]) {
    Sums own[LANES] = {};
    uint32_t high[2][LANES][4], low[2][LANES][4];
    for (int l = 0; l < LANES; ++l) {
      MMEBM_UNROLL
      for (int i = 0; i < 8; ++i) {
        const Split s = split(a[l].output[i % 2].v[i / 2]);
        high[i / 4][l][i % 4] = s.high, low[i / 4][l][i % 4] = s.low;
      }
    }
    MMEBM_UNROLL
    for (int i = 0; i < 2; ++i) {
      once(own, [&](int l) { return low[i][l]; }, [&](int l) { return b[l].high + 2 * i; });
      once(own, [&](int l) { return high[i][l]; }, [&](int l) { return b[l].low + 2 * i; });
    }
    MMEBM_UNROLL
    for (int i = 0; i < 2; ++i) {
      once(own, [&](int l) { return high[i][l]; }, [&](int l) { return b[l].high + 2 * i; });
    }
    add(sums, own);
  }
};

enum class Put { store, times, add };

// Where a product goes: rows of stride `ld`.
struct Target {
  float* at;
  int ld;
  Put put;
};

// A warp's tile of N times 8 chains: the sums over the whole depth.
#pragma nv_exec_check_disable
template <class Mode, bool COLUMN, bool STAYS, int N, class S, class Team>
MMEBM_LARGE void tile(const Team& team, const Matrix<S>& w, int depth, const float* a, int ld, int rows,
                      const Target& to) {
  constexpr int LANES = Team::LANES;
  typename Mode::Sums total[N][LANES];
  MMEBM_UNROLL
  for (int o = 0; o < N; ++o) {
    for (int l = 0; l < LANES; ++l) total[o][l] = {};
  }
  const int end = up_to(depth, Mode::UNITS);
#if defined(__CUDA_ARCH__)
  // with more than one, what reads the matrix itself takes more registers than there are
#pragma unroll(STAYS ? Mode::UNROLL : 1)
#endif
  for (int k = 0; k < end; k += Mode::UNITS) {
    typename Mode::Weights weights[LANES];
    for (int l = 0; l < LANES; ++l) {
      weights[l] = Mode::template fetch<COLUMN, STAYS>(w, k, Geometry{team.lane(l), rows});
    }
    MMEBM_UNROLL
    for (int o = 0; o < N; ++o) {
      typename Mode::Inputs inputs[LANES];
      for (int l = 0; l < LANES; ++l) inputs[l] = Mode::load(a + 8 * o * ld, ld, k, Geometry{team.lane(l), rows});
      Mode::template multiply<LANES>(total[o], inputs, weights);
    }
  }
  MMEBM_UNROLL
  for (int o = 0; o < N; ++o) {
    typename Mode::Results results[LANES];
    Mode::template finish<LANES>(total[o], results);
    for (int l = 0; l < LANES; ++l) {
      const Geometry g = {team.lane(l), rows};
      MMEBM_UNROLL
      for (int e = 0; e < Mode::RESULTS; ++e) {
        const int row = 8 * o + Mode::row(g, e);
        if (row >= rows) continue;
        float* const at = to.at + row * to.ld + Mode::column(g, e);
        float v = results[l].v[e];
        if (to.put == Put::times) v = through(v, *at);
        if (to.put == Put::add) v += *at;
        *at = v;
      }
    }
  }
}

// All chains of the block.
#pragma nv_exec_check_disable
template <class Mode, bool COLUMN, bool STAYS, class S, class Team>
MMEBM_LARGE void tiles(const Team& team, const Matrix<S>& w, int depth, const float* a, int ld, int rows,
                       const Target& to) {
  if (Mode::OCTETS == 2 && rows > 8) {
    tile<Mode, COLUMN, STAYS, Mode::OCTETS>(team, w, depth, a, ld, rows, to);
    return;
  }
  for (int o = 0; o < rows; o += 8) {
    tile<Mode, COLUMN, STAYS, 1>(team, w, depth, a + o * ld, ld, rows, Target{to.at + o * to.ld, to.ld, to.put});
  }
}

// Buffers hold rows of a layer's numbers and zeros behind them, up to a multiple of this: products read them.
constexpr int PAD = 32;

// The stride of a copy of a matrix in shared memory, in elements, for a sum over `depth`: what eight lanes, or the
// eight rows of an ldmatrix, read in one turn lies in different banks. Of a copy that is read in both directions with
// tf32, at most two lanes on one.
template <class Mode>
MMEBM_HD int copy_ld(int depth, bool both) {
  if (Mode::UNITS == 32) return up_to(depth, 32) + 4;
  if (sizeof(typename Mode::Stored) == 2) return up_to(depth, 16) + 8;
  return both ? up_to(depth, 16) + 4 : up_to(depth, 32) + 16;
}

// Rows of the copy: tiles of a block's share.
MMEBM_HD int copy_rows(int outputs, int bits, int doublings) {
  const int tiles = up_to(outputs, 1 << bits) >> bits;
  return up_to(tiles, 1 << doublings) >> doublings << bits;
}

// The outputs of a layer, or BACK: the derivatives in its inputs, from rows `a` of stride `ld`. A warp takes up its tile
// by itself: `use` one number (row, which, whether there is such a number), `done` the tile (its first number, bits).
#pragma nv_exec_check_disable
template <class Mode, bool BACK, class Team, class F, class Done>
MMEBM_LARGE void product(const Team& team, const DeviceChain& c, const DeviceLayer& layer, const float* memory,
                         const float* a, int ld, const Target& to, const F& use, const Done& done) {
  using Stored = typename Mode::Stored;
  const int rows = c.rows, bits = Mode::bits(rows == 4);
  const int inputs = layer.inputs, outputs = layer.outputs;
  const int depth = BACK ? outputs : inputs, count = BACK ? inputs : outputs;
  if (team.warp() << bits >= up_to(count, PAD)) return;
  const bool both = c.doublings == 0, wide = inputs % 4 == 0 && reinterpret_cast<uint64_t>(layer.weight) % 16 == 0;
  const int place = BACK && !both ? layer.place_back : layer.place;
  for (int t = team.warp(); t << bits < up_to(count, PAD); t += team.warps()) {
    const int n0 = t << bits;
    const Target here = {to.at + n0, to.ld, to.put};
    if (n0 >= count) {
      team.each(rows << bits, [&](int i) { here.at[(i >> bits) * to.ld + (i & ((1 << bits) - 1))] = 0.0f; });
    } else if (place < 0) {
      const Matrix<float> w = {layer.weight, inputs, outputs, inputs, outputs, n0, wide};
      tiles<Mode, BACK, false>(team, w, depth, a, ld, rows, here);
    } else {
      Matrix<Stored> w = {reinterpret_cast<const Stored*>(team.weights_of(memory, c.floats, t) + place), 0, 0, 0, 0, 0,
                          true};
      w.ld = copy_ld<Mode>(both ? inputs : depth, both);
      w.rows = copy_rows(outputs, bits, 0);
      if (BACK && both) {
        w.at += n0;
        tiles<Mode, BACK, true>(team, w, depth, a, ld, rows, here);
      } else {
        w.at += (t >> c.doublings << bits) * w.ld;
        tiles<Mode, false, true>(team, w, depth, a, ld, rows, here);
      }
    }
    team.sync_warp();
    team.each(rows << bits, [&](int i) {
      const int n = n0 + (i & ((1 << bits) - 1));
      use(i >> bits, n, n < count);
    });
    done(n0, bits);
  }
}

// -- the chain

MMEBM_HD bool has(const DeviceTensor& t, int slot) { return (t.present >> slot & 1u) != 0; }

MMEBM_HD const DeviceLayer& last_layer(const DeviceChain& c, const DeviceTerm& t) {
  return c.layers[t.first_layer + t.depth - 1];
}

// What a block works on: chains first, first + 1, ...; behind the end of the batch the last one again, for nothing.
struct Tile {
  float* memory;
  int first;
};

// Words of the noise, in shared memory: two of the seed, one of the first step.
MMEBM_HD uint32_t word_at(const DeviceChain& c, const Tile& tile, int which) {
  return float_bits(tile.memory[c.at_words + which]);
}

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

MMEBM_HD float constant(const DeviceChain& c, int k, int tensor, int slot, int chain) {
  const int64_t row = c.constant_steps ? k : 0, columns = c.constant_chains ? c.chains : 1;
  return c.constants[((row * c.tensor_count + tensor) * SLOTS + slot) * columns + (c.constant_chains ? chain : 0)];
}

// A layer's weights into shared memory: of all outputs, or of a cluster's blocks each the tiles that it computes,
// BACK: of the transposed matrix.
#pragma nv_exec_check_disable
template <class Mode, class Team>
MMEBM_LARGE void copy(const Team& team, const DeviceChain& c, const DeviceLayer& layer, float* memory, bool back) {
  using Stored = typename Mode::Stored;
  const int place = back ? layer.place_back : layer.place;
  if (place < 0) return;
  const int outputs = back ? layer.inputs : layer.outputs, depth = back ? layer.outputs : layer.inputs;
  const int bits = Mode::bits(c.rows == 4), rows = copy_rows(outputs, bits, c.doublings);
  const int ld = copy_ld<Mode>(depth, c.doublings == 0);
  team.each_block(memory, c.floats, [&](int block, float* own) {
    Stored* const to = reinterpret_cast<Stored*>(own + place);
    team.each_here(rows * ld, [&](int i) {
      // along the rows of the matrix, also where it is transposed
      const int row = back ? i % rows : i / ld, k = back ? i / rows : i % ld;
      const int n = ((row >> bits << c.doublings | block) << bits) + (row & ((1 << bits) - 1));
      const bool real = n < outputs && k < depth;
      const float v = !real ? 0.0f : layer.weight[back ? k * outputs + n : n * depth + k];
      if constexpr (sizeof(Stored) == 2) {
        to[row * ld + k] = static_cast<uint16_t>(bf16_pair(v, 0.0f));
      } else {
        to[row * ld + k] = v;
      }
    });
  });
}

#pragma nv_exec_check_disable
template <class Mode, class Team>
MMEBM_LARGE void begin(const Team& team, const DeviceChain& c, const Tile& tile) {
  // zeros behind the rows of all buffers: a product reads them
  team.each_here(c.at_weights, [&](int i) { tile.memory[i] = 0.0f; });
  for (int l = 0; l < c.layer_count; ++l) {
    copy<Mode>(team, c, c.layers[l], tile.memory, false);
    if (c.doublings > 0) copy<Mode>(team, c, c.layers[l], tile.memory, true);
  }
  team.sync();
  team.each_here(1, [&](int) {
    const uint64_t seed = c.seed.at == nullptr ? c.seed.value : static_cast<uint64_t>(*c.seed.at);
    const uint64_t step = c.first_step.at == nullptr ? c.first_step.value : static_cast<uint64_t>(*c.first_step.at);
    float* const words = tile.memory + c.at_words;
    words[0] = bits_float(static_cast<uint32_t>(seed)), words[1] = bits_float(static_cast<uint32_t>(seed >> 32));
    words[2] = bits_float(static_cast<uint32_t>(step));
  });
  const int rows = c.rows, inputs = c.inputs;
  team.each_here(rows * inputs, [&](int i) {
    const int row = i / inputs, at = i - row * inputs;
    tile.memory[row * c.ld_x + at] = c.x[static_cast<int64_t>(chain_of(c, tile, row)) * inputs + at];
  });
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
      team.put(here + j, d);
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
      team.put(g + i, add ? g[i] + pull : pull);
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
      float* const to = memory + c.at_values[l % 2];
      const int ld_to = c.ld_values[l % 2];
      const float* bias = layers[l].bias;
      product<Mode, false>(
          team, c, layers[l], memory, in, l == 0 ? c.ld_x : c.ld_values[(l - 1) % 2], Target{to, ld_to, Put::store},
          [&](int row, int n, bool real) {
            float* const at = to + row * ld_to + n;
            float v = *at;
            if (bias != nullptr && real) v += bias[n];
            if (is_hidden) {
              Activated both = activate(static_cast<Activation>(term.activation), v, term.slope);
              // the last hidden layer of a scalar: back through its output at once
              if (is_head) both.derivative = through(real ? term.weight * last.weight[n] : 0.0f, both.derivative);
              v = both.value;
              slopes[row * c.ld_slopes + n] = real ? both.derivative : 0.0f;
            }
            *at = real ? v : 0.0f;
          },
          [&](int n0, int bits) {
            // other slopes are used where they were made, and a head's values in the energy only
            if (is_head) team.share(slopes + n0, c.ld_slopes, c.rows, bits);
            if (!is_head || c.energy != nullptr) team.share(to + n0, ld_to, c.rows, bits);
          });
      if (is_hidden) slopes += up_to(layers[l].outputs, PAD);
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
        slopes -= up_to(layers[l].outputs, PAD);
        d = slopes;
        ld = c.ld_slopes;
      }
      const Target to = l > 0 ? Target{slopes - up_to(layers[l].inputs, PAD), c.ld_slopes, Put::times}
                              : Target{g, c.ld_x, put};
      product<Mode, true>(team, c, layers[l], memory, d, ld, to, [](int, int, bool) {},
                          [&](int n0, int bits) { team.share(to.at + n0, to.ld, c.rows, bits); });
      team.sync();
    }
  }
}

// Four elements of one tensor of one chain, drawn together: x + noise before the gradient is taken, or the update.
#pragma nv_exec_check_disable
template <class Team>
MMEBM_LARGE void move(const Team& team, const DeviceChain& c, const Tile& tile, int k, int row, int quad,
                      bool perturb) {
  int t = 0;
  while (t + 1 < c.tensor_count && quad >= c.tensors[t + 1].first_quad) ++t;
  const DeviceTensor& tensor = c.tensors[t];
  if (!tensor.moving) return;
  const bool noise = tensor.noisy && perturb == c.noise_before;
  const uint32_t limits = 1u << LOW | 1u << HIGH, bounds = perturb && !c.clamp_noise ? 0u : tensor.present & limits;
  if (perturb && !noise && bounds == 0) return;

  const int chain = chain_of(c, tile, row), block = quad - tensor.first_quad, begin = tensor.begin + 4 * block;
  const int left = smaller(4, tensor.width - 4 * block);
  Normals z = {-0.0f, -0.0f, -0.0f, -0.0f};  // which leaves every bit of what it is added to
  if (noise) {
    const uint64_t seed = static_cast<uint64_t>(word_at(c, tile, 1)) << 32 | word_at(c, tile, 0);
    const uint32_t step = word_at(c, tile, 2) + static_cast<uint32_t>(k);
    z = normals_of(words_of(chain, block, {seed, step, tensor.stream, c.chain_offset}));
  }
  Constants constants[1];
  MMEBM_UNROLL
  for (int slot = 0; slot < SLOTS; ++slot) {
    constants[0].of[slot] = has(tensor, slot) ? constant(c, k, t, slot, chain) : 0.0f;
  }
  if (has(tensor, PRIOR_STD)) constants[0].of[PRIOR_STD] = 1.0f / constants[0].of[PRIOR_STD];
  const uint8_t* observed = c.observed;
  if (observed != nullptr) observed += (c.observed_rows ? static_cast<int64_t>(chain) * c.inputs : 0) + begin;
  float* const at = tile.memory + row * c.ld_x + begin;
  const float scale = constants[0].of[NOISE_SCALE];
  Group<4> x[1], g[1], y[1];
  const Group<4> noises[1] = {{{scale * z.n0, scale * z.n1, scale * z.n2, scale * z.n3}}};
  MMEBM_UNROLL
  for (int j = 0; j < 4; ++j) {
    x[0].v[j] = j < left ? at[j] : 0.0f;
    g[0].v[j] = j < left && !perturb ? at[c.at_g + j] : 0.0f;
  }
  uint32_t changed[1];
  propose(x, g, noises, perturb ? 1.0f : *factor_at(c, tile, row, t), constants,
          perturb ? 0u : tensor.present | WITH_GRAD, y, changed);
  bounded(y, constants, bounds);
  MMEBM_UNROLL
  for (int j = 0; j < 4; ++j) {
    if (j < left && (observed == nullptr || observed[j] == 0)) team.put(at + j, y[0].v[j]);
  }
}

#pragma nv_exec_check_disable
template <class Team>
MMEBM_LARGE void move_all(const Team& team, const DeviceChain& c, const Tile& tile, int k, bool perturb) {
  for (int item = team.thread(); item < c.rows * c.quads; item += team.threads()) {
    const int row = item / c.quads;
    move(team, c, tile, k, row, item - row * c.quads, perturb);
  }
  team.sync();
}

// The factors of the norm clips, and the norm of the whole gradient.
#pragma nv_exec_check_disable
template <class Team>
MMEBM_LARGE void norms(const Team& team, const DeviceChain& c, const Tile& tile, int k) {
  if (!c.norm_clip && c.grad_norm == nullptr && c.energy == nullptr) return;
  for (int row = team.warp(); row < c.rows; row += team.warps()) {
    const float* g = tile.memory + c.at_g + row * c.ld_x;
    const int chain = chain_of(c, tile, row);
    float all = 0.0f;
    for (int t = 0; t < c.tensor_count; ++t) {
      const DeviceTensor& tensor = c.tensors[t];
      if (!tensor.moving) continue;
      const float* part = g + tensor.begin;
      if (c.grad_norm != nullptr) all += team.sum(tensor.width, [&](int i) { return part[i] * part[i]; });
      if (!has(tensor, GRAD_NORM_CLIP)) continue;
      const bool clip = has(tensor, GRAD_CLIP);
      const float limit = clip ? constant(c, k, t, GRAD_CLIP, chain) : 0.0f;
      const float squares = team.sum(tensor.width, [&](int i) {
        const float v = clip ? between(part[i], -limit, limit) : part[i];
        return v * v;
      });
      const float factor = norm_factor(squares, constant(c, k, t, GRAD_NORM_CLIP, chain));
      if (team.leads()) team.put(factor_at(c, tile, row, t), factor);
    }
    if (team.leads() && tile.first + row < c.chains) {
      const int64_t at = static_cast<int64_t>(k) * c.chains + tile.first + row;
      if (c.grad_norm != nullptr) c.grad_norm[at] = sqrtf(all);
      if (c.energy != nullptr) c.energy[at] = *energy_at(c, tile, row);
    }
  }
  // nothing else here is read by another warp
  if (c.norm_clip) team.sync();
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
    team.each(c.inputs, [&](int i) { team.put(x + i, old[i]); });
  }
  team.sync();
}

#pragma nv_exec_check_disable
template <class Mode, class Team>
MMEBM_LARGE void run(const Team& team, const DeviceChain& c, int number, float* memory) {
  Tile tile;
  tile.memory = memory;
  tile.first = number * c.rows;
  begin<Mode>(team, c, tile);
  for (int k = 0; k < c.steps; ++k) {
    if (c.frozen != nullptr) {
      team.each_here(c.rows * c.ld_x, [&](int i) { memory[c.at_old + i] = memory[i]; });
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
  const int block = static_cast<int>(blockIdx.x), doublings = chain.doublings;
  run<Mode>(BlockTeam{chain, block & ((1 << doublings) - 1)}, chain, block >> doublings,
            reinterpret_cast<float*>(shared_memory));
}

template <class Mode>
void run_on_host(const DeviceChain& chain) {
  std::vector<float> memory(static_cast<size_t>(chain.floats) << chain.doublings);
  for (int i = 0; i * static_cast<int64_t>(chain.rows) < chain.chains; ++i) {
    run<Mode>(HostTeam{chain.doublings}, chain, i, memory.data());
  }
}

template <class F>
auto with_mode(Precision precision, const F& f) {
  switch (precision) {
    case Precision::tf32x3: return f(Tf32x3());
    case Precision::bf16: return f(Bf16());
    default: return f(Fp32());
  }
}

const void* kernel_of(Precision precision) {
  return with_mode(precision, [](auto mode) { return reinterpret_cast<const void*>(chain_kernel<decltype(mode)>); });
}

// The stride of rows of `width` floats, such that what a warp reads of several rows in one turn lies in other banks.
int row_ld(int width, Precision precision) {
  const int behind = precision == Precision::fp32 ? 4 : precision == Precision::tf32x3 ? 16 : 8;
  return up_to(width, PAD) + behind;
}

// Floats of a copy of a layer in one block of a cluster.
int copy_floats(const DeviceLayer& layer, Precision precision, bool back, int rows, int doublings) {
  return with_mode(precision, [&](auto mode) {
    using Mode = decltype(mode);
    const int outputs = back ? layer.inputs : layer.outputs, depth = back ? layer.outputs : layer.inputs;
    const int size = copy_rows(outputs, Mode::bits(rows == 4), doublings) * copy_ld<Mode>(depth, doublings == 0);
    return size * static_cast<int>(sizeof(typename Mode::Stored)) / 4;
  });
}

}  // namespace

bool lay_out(DeviceChain& chain, Precision precision, int rows, int blocks, int64_t bytes) {
  const bool known = (blocks == 1 && (rows == 16 || rows == 4)) || rows == 8;
  if (!known || (blocks != 1 && blocks != 2 && blocks != 4 && blocks != 8)) return false;
  int values[2] = {0, 0}, slopes = 0, quads = 0;
  for (int i = 0; i < chain.term_count; ++i) {
    const DeviceTerm& term = chain.terms[i];
    if (term.kind == DeviceTermKind::quadratic) continue;
    const int hidden = term.depth - 1, outputs = hidden + (term.kind == DeviceTermKind::residual);
    int sum = 0;
    for (int l = 0; l < outputs; ++l) {
      const int width = chain.layers[term.first_layer + l].outputs;
      values[l % 2] = std::max(values[l % 2], width);
      if (l < hidden) sum += up_to(width, PAD);
    }
    slopes = std::max(slopes, sum);
  }
  for (int t = 0; t < chain.tensor_count; ++t) {
    chain.tensors[t].first_quad = static_cast<uint16_t>(quads);
    quads += (chain.tensors[t].width + 3) / 4;
    chain.norm_clip |= chain.tensors[t].moving && has(chain.tensors[t], GRAD_NORM_CLIP);
  }
  chain.quads = quads;
  chain.rows = rows;
  chain.doublings = blocks == 8 ? 3 : blocks / 2;
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
  chain.at_words = at;
  at += 3;
  at = up_to(at, 4);
  chain.at_weights = at;
  if (4 * static_cast<int64_t>(at) > bytes) return false;
  const auto place = [&](const DeviceLayer& layer, bool back) {
    const int floats = copy_floats(layer, precision, back, rows, chain.doublings);
    if (4 * (static_cast<int64_t>(at) + floats) > bytes) return -1;
    at += floats;
    return at - floats;
  };
  for (int i = 0; i < chain.term_count; ++i) {
    const DeviceTerm& term = chain.terms[i];
    if (term.kind == DeviceTermKind::quadratic) continue;
    for (int l = 0; l < term.depth; ++l) {
      DeviceLayer& layer = chain.layers[term.first_layer + l];
      // the output of a scalar is no product
      const bool product = term.kind != DeviceTermKind::scalar || l + 1 < term.depth;
      layer.place = product ? place(layer, false) : -1;
      layer.place_back = product && blocks > 1 ? place(layer, true) : -1;
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
  int code = cudaSetDevice(device), processors = 0, bytes = 0, major = 0;
  if (code == cudaSuccess) code = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (code == cudaSuccess) code = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (code == cudaSuccess) code = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (code != cudaSuccess) return code;
  // A step is a sequence of small products, and its time that of one block: as long as there are multiprocessors for
  // all, tiles of 8 chains and clusters of as many blocks as have a few thousand weights each to multiply with, less
  // than that does not pay for their barriers. Where there are no clusters, 4 chains a block on the FMA units; the
  // tensor cores take as long for 4 as for 8.
  int64_t weights = 0;
  for (int l = 0; l < chain.layer_count; ++l) weights += chain.layers[l].inputs * chain.layers[l].outputs;
  const int tiles = (chain.chains + 7) / 8;
  int rows = chain.chains <= 8 * processors ? 8 : 16, blocks = 1;
  if (major < 9) {
    if (precision == Precision::fp32 && chain.chains <= 4 * processors) rows = 4;
  } else {
    while (blocks < 8 && 2 * blocks * tiles <= processors && 8192 * blocks <= weights) blocks *= 2;
  }
  while (!lay_out(chain, precision, rows, blocks, bytes)) {
    if (rows == 4) return cudaErrorInvalidConfiguration;
    rows /= 2;
    if (rows == 4) blocks = 1;
  }
  const void* kernel = kernel_of(precision);
  const size_t shared = sizeof(float) * static_cast<size_t>(chain.floats);
  code = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (code != cudaSuccess) return code;
  void* arguments[] = {&chain};
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned int>(blocks);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t launch = {};
  launch.gridDim = dim3(static_cast<unsigned int>((static_cast<int64_t>(chain.chains) + rows - 1) / rows * blocks));
  launch.blockDim = dim3(THREADS);
  launch.dynamicSmemBytes = shared;
  launch.stream = reinterpret_cast<cudaStream_t>(cuda_stream);
  launch.attrs = &cluster;
  launch.numAttrs = blocks > 1 ? 1 : 0;
  code = cudaLaunchKernelExC(&launch, kernel, arguments);
  cudaGetLastError();
  return code;
}

bool langevin_mlp_host(DeviceChain chain, Precision precision, int rows, int blocks, int64_t bytes) {
  if (!lay_out(chain, precision, rows, blocks, bytes)) return false;
  with_mode(precision, [&](auto mode) { run_on_host<decltype(mode)>(chain); });
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
