// One Langevin step for all tensors of a state, in place. The rule is in common/langevin.h.
//
// Kernels
//   map     Whatever needs no sum over a chain: one launch, every element read and written once (x in, g in, x out: 12
//           bytes an element in fp32). The groups of all chains of a tensor are one flat range, cut into tiles; the
//           tiles of all tensors follow each other and the thread blocks stride over them.
//   chain   Norm clips, rejection and statistics. A team of threads owns one chain, all tensors of it, and passes over
//           it: for a tensor's norm, for the check of the bounds, and for the update. Noise is a function of its
//           counter, so the check makes the same proposal again instead of keeping it. A team is as many threads as
//           the longest tensor has groups (a power of two up to a warp), or a whole block where that is more than 8
//           turns of a warp. Chains of more than SPLIT groups are cut into up to 64 splits, and the passes are
//           launches then.
//   norm    The sums of squares of each split: for chains that are cut, and for norms of whole tensors.
//   fold    Their total for a whole tensor.
//   finish  The statistics of chains that are cut.
//
// Sums are taken in a fixed order (each thread over its groups, a butterfly over the warp, the warps one by one),
// which depends on the sizes of one chain and on nothing else: results repeat bit for bit, and do not depend on the
// device, on the grid, or on how a batch was split. No atomics, no synchronisation with the host.
//
// Layout. A group is 16 bytes of the state: 4 elements in fp32 and 8 in 16 bits, one access where the chain's length
// is a multiple of that and the addresses are aligned, element by element otherwise (the cache then puts the lines
// together; stores are four or eight instead of one). Neighbouring threads have neighbouring groups. Offsets are
// 64-bit.
//
// A thread of the map kernel takes two groups at a time, so that what it asks of the table it asks once
// (docs/kernels.md has the arithmetic of bytes in flight and instructions).
//
// The table of tensors is the kernel's parameter, 4 KB at most: a copy to the device would be one more operation a
// step, and a captured graph holds it without anything kept alive. Seed and step may lie on the device, so that a
// replay draws fresh noise.
//
// Limits: fewer than 2^32 blocks of 4 elements a chain, as the noise. Sums are fp32: a chain whose gradient's norm is
// above 1.8e19 has an infinite one, and the norm clip makes its gradient 0.
#include "langevin_step/cuda.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>

#include "common/normals_cuda.h"

namespace mmebm {
namespace {

constexpr int THREADS = 256;
constexpr int MAP_THREADS = 128, MAP_GROUPS = 2;  // of the map kernel; a thread takes so many groups at a time
constexpr int WARP = 32;
// A tile behind so many groups still counts them in 31 bits.
constexpr int64_t MANY_GROUPS = (int64_t{1} << 31) - 4096;
constexpr int64_t SPLIT = 2048;     // groups: 8 turns of a block
constexpr int64_t MAX_SPLITS = 64;
constexpr int64_t BLOCKS_PER_SM = 16;  // the grid's limit: a few waves, so that no block is left with much at the end

static_assert(sizeof(StepTable) <= 4096, "kernel parameters are limited to 4 KB");

// Bits of StepTensor::with above those of langevin.h.
enum TensorBit : uint32_t {
  MASK = 8u << SLOTS,
  MASK_ROWS = 16u << SLOTS,  // the mask has a row per chain
  ALIGNED = 32u << SLOTS,    // every group is one access in each array
  INDIRECT = 64u << SLOTS,   // a constant is at an address
  MANY = 128u << SLOTS       // 2^31 groups or more in all
};
constexpr int STORAGE = 16;  // bits 16 and 17: of x, 18 and 19: of the gradient
constexpr int SHIFT = 26;    // bits from 26 on: the shift that belongs to `inverse`

// StepTable::todo
enum Todo : uint32_t {
  CHECK = 1,    // does the proposal stay inside?
  UPDATE = 2,
  REJECT = 4,   // bounds reject instead of clamping
  SHARED = 8,   // the answers of CHECK are at `outside`
  STATS = 16,
  FINISH = 32,  // this program has the whole sums: it writes the statistics themselves
  WHOLE = 64,   // norms of whole tensors
  KEEP = 128    // this chain stays where it is
};

template <Storage S>
constexpr int GROUP = S == Storage::fp32 ? 4 : 8;

MMEBM_HD Storage storage_of(const StepTensor& t) { return static_cast<Storage>(t.with >> STORAGE & 3u); }

MMEBM_HD Storage grad_storage_of(const StepTensor& t) { return static_cast<Storage>(t.with >> (STORAGE + 2) & 3u); }

MMEBM_HD uint64_t number(const StepNumber& n) { return n.at == nullptr ? n.value : static_cast<uint64_t>(*n.at); }

MMEBM_HD uint32_t count_bits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return static_cast<uint32_t>(__popc(bits));
#else
  return static_cast<uint32_t>(__builtin_popcount(bits));
#endif
}

// Sums of one thread.
struct LaneSums {
  float squares, grad, moved;
  uint32_t clipped, nonfinite, outside;
};

// Purposes of noise, mmebm/noise.py.
constexpr uint32_t ROUNDING = 4, PERTURB_ROUNDING = 5;

// -- memory

template <class T>
MMEBM_HD T fetch(const char* p) {
#if defined(__CUDA_ARCH__)
  return *reinterpret_cast<const T*>(p);
#else
  T out;
  memcpy(&out, p, sizeof out);
  return out;
#endif
}

template <class T>
MMEBM_HD void put(char* p, T value) {
#if defined(__CUDA_ARCH__)
  *reinterpret_cast<T*>(p) = value;
#else
  memcpy(p, &value, sizeof value);
#endif
}

template <int BYTES>
MMEBM_HD uint32_t fetch_element(const char* p) {
  if (BYTES == 4) return fetch<uint32_t>(p);
  if (BYTES == 2) return fetch<uint16_t>(p);
  return fetch<uint8_t>(p);
}

// N words of elements of BYTES bytes from element `place` on, 0 for those that are not `left`.
template <int BYTES, int N>
MMEBM_HD void load_group(uint32_t (&w)[N], const void* base, int64_t place, int left, bool aligned) {
  constexpr int G = 4 * N / BYTES;
  const char* p = static_cast<const char*>(base) + place * BYTES;
  if (aligned) {
    if (N % 4 == 0) {
      MMEBM_UNROLL
      for (int i = 0; i < N; i += 4) {
        const uint4 v = fetch<uint4>(p + 4 * i);
        w[i] = v.x, w[(i + 1) % N] = v.y, w[(i + 2) % N] = v.z, w[(i + 3) % N] = v.w;
      }
    } else if (N == 2) {
      const uint2 v = fetch<uint2>(p);
      w[0] = v.x, w[N - 1] = v.y;
    } else {
      w[0] = fetch<uint32_t>(p);
    }
  } else {
    MMEBM_UNROLL
    for (int i = 0; i < N; ++i) w[i] = 0;
    MMEBM_UNROLL
    for (int j = 0; j < G; ++j) {
      if (j < left) w[j * BYTES / 4] |= fetch_element<BYTES>(p + j * BYTES) << 8 * (j * BYTES % 4);
    }
  }
}

template <int BYTES>
MMEBM_HD void store_group(void* base, int64_t place, const uint32_t (&w)[4], int left, bool aligned) {
  char* p = static_cast<char*>(base) + place * BYTES;
  if (aligned) {
    put(p, make_uint4(w[0], w[1], w[2], w[3]));
  } else {
    MMEBM_UNROLL
    for (int j = 0; j < 16 / BYTES; ++j) {
      if (j >= left) continue;
      const uint32_t bits = w[j * BYTES / 4] >> 8 * (j * BYTES % 4);
      if (BYTES == 4) {
        put(p + 4 * j, bits);
      } else {
        put(p + 2 * j, static_cast<uint16_t>(bits));
      }
    }
  }
}

template <Storage S, int G, int N>
MMEBM_HD Group<G> unpack(const uint32_t (&w)[N]) {
  Group<G> out;
  if constexpr (S == Storage::bf16) {
    MMEBM_UNROLL
    for (int j = 0; j < G; j += 2) bf16_pair(w[j / 2 % N], out.v[j], out.v[j + 1]);
  } else {
    MMEBM_UNROLL
    for (int j = 0; j < G; ++j) {
      out.v[j] = S == Storage::fp32 ? bits_float(w[j % N]) : fp16_float(w[j / 2 % N] >> 16 * (j % 2) & 0xffffu);
    }
  }
  return out;
}

// The gradients of U groups, whatever they are stored as; `base` stands for the tensor's address.
template <int G, int U>
MMEBM_HD void gradients(const StepTensor& t, const void* base, const int64_t (&place)[U], const int (&left)[U],
                        bool aligned, Group<G> (&out)[U]) {
  const Storage storage = grad_storage_of(t);
  if (storage == Storage::fp32) {
    MMEBM_UNROLL
    for (int u = 0; u < U; ++u) {
      uint32_t w[G];
      load_group<4>(w, base, place[u], left[u], aligned);
      out[u] = unpack<Storage::fp32, G>(w);
    }
    return;
  }
  uint32_t w[U][G / 2];
  MMEBM_UNROLL
  for (int u = 0; u < U; ++u) load_group<2>(w[u], base, place[u], left[u], aligned);
  if (storage == Storage::bf16) {
    MMEBM_UNROLL
    for (int u = 0; u < U; ++u) out[u] = unpack<Storage::bf16, G>(w[u]);
  } else {
    MMEBM_UNROLL
    for (int u = 0; u < U; ++u) out[u] = unpack<Storage::fp16, G>(w[u]);
  }
}

MMEBM_HD Constants constants_of(const StepTensor& t, int64_t chain) {
  Constants out;
  MMEBM_UNROLL
  for (int slot = 0; slot < SLOTS; ++slot) out.of[slot] = bits_float(static_cast<uint32_t>(t.constants[slot]));
  if (t.with & INDIRECT) {
    MMEBM_UNROLL
    for (int slot = 0; slot < SLOTS; ++slot) {
      const Kind kind = static_cast<Kind>(t.kinds >> 4 * slot & 15u);
      if (kind != Kind::chain && kind != Kind::one) continue;
      const float value = reinterpret_cast<const float*>(t.constants[slot])[kind == Kind::chain ? chain : 0];
      out.of[slot] = slot == PRIOR_STD ? 1.0f / value : value;
    }
  }
  return out;
}

// -- one group

// The random numbers of U groups: the normals times each group's scale, and what rounds 16 bits.
template <Storage S, int U>
struct Draws {
  Group<GROUP<S>> normals[U] = {};
  uint32_t halves[U][4];
};

// `groups` count the groups of one chain, `chains` are global. Without noise only what rounds.
template <Storage S, int U>
MMEBM_HD void draw(const uint32_t (&groups)[U], const uint32_t (&chains)[U], const NoiseAt& at, uint32_t purpose,
                   uint32_t with, const Constants (&c)[U], Draws<S, U>& out) {
  constexpr int G = GROUP<S>, NOISE = G / 4, N = S == Storage::fp32 ? 1 : 3;
  const uint32_t tag = at.stream | purpose << 24;
  if (with & WITH_NOISE) {
    uint32_t blocks[U][N], streams[N];
    MMEBM_UNROLL
    for (int n = 0; n < N; ++n) {
      streams[n] = n < NOISE ? at.stream : tag;
      MMEBM_UNROLL
      for (int u = 0; u < U; ++u) blocks[u][n] = n < NOISE ? NOISE * groups[u] + n : groups[u];
    }
    Words words[U][N];
    philox_words(blocks, chains, at.step, streams, at.seed, words);
    MMEBM_UNROLL
    for (int u = 0; u < U; ++u) {
      MMEBM_UNROLL
      for (int i = 0; i < NOISE; ++i) {
        const Normals n = normals_of(words[u][i], c[u].of[NOISE_SCALE]);
        float* to = out.normals[u].v + 4 * i;
        to[0] = n.n0, to[1] = n.n1, to[2] = n.n2, to[3] = n.n3;
      }
      const Words& w = words[u][N - 1];
      out.halves[u][0] = w.w0, out.halves[u][1] = w.w1, out.halves[u][2] = w.w2, out.halves[u][3] = w.w3;
    }
  } else if (S != Storage::fp32) {
    uint32_t blocks[U][1];
    MMEBM_UNROLL
    for (int u = 0; u < U; ++u) blocks[u][0] = groups[u];
    Words words[U][1];
    philox_words(blocks, chains, at.step, {tag}, at.seed, words);
    MMEBM_UNROLL
    for (int u = 0; u < U; ++u) {
      const Words& w = words[u][0];
      out.halves[u][0] = w.w0, out.halves[u][1] = w.w1, out.halves[u][2] = w.w2, out.halves[u][3] = w.w3;
    }
  }
}

// The bits of the elements from `element` of a chain on that keep their value.
template <int G>
MMEBM_HD uint32_t observed(const StepTensor& t, int64_t chain, int64_t element, int left) {
  uint32_t bytes[G / 4], keep = 0;
  load_group<1>(bytes, t.observed, (t.with & MASK_ROWS ? chain * t.numel : 0) + element, left, (t.with & ALIGNED) != 0);
  MMEBM_UNROLL
  for (int j = 0; j < G; ++j) keep |= (bytes[j / 4] >> 8 * (j % 4) & 0xffu) != 0 ? 1u << j : 0u;
  return keep;
}

// The bits of a group as it is stored: rounded, if in 16 bits.
template <Storage S, int G>
MMEBM_HD void stored(const Group<G>& y, const uint32_t (&halves)[4], uint32_t (&out)[4]) {
  if constexpr (S == Storage::fp32) {
    MMEBM_UNROLL
    for (int j = 0; j < 4; ++j) out[j] = float_bits(y.v[j]);
  } else {
    round_all<S>(y.v, halves, out);
  }
}

// What `raw` has at the elements of `keep`, back into `out`.
template <int BYTES>
MMEBM_HD void keep_bits(uint32_t keep, const uint32_t (&raw)[4], uint32_t (&out)[4]) {
  MMEBM_UNROLL
  for (int j = 0; j < 16 / BYTES; ++j) {
    const uint32_t bits = BYTES == 4 ? 0xffffffffu : 0xffffu << 16 * (j % 2);
    const int word = j * BYTES / 4;
    if (keep & 1u << j) out[word] = (out[word] & ~bits) | (raw[word] & bits);
  }
}

// Checks or updates one group of one chain; `todo` says which. Adds to `sums` where that is asked for. `constants` is a
// function, called after the noise, which needs the registers until then.
template <Storage S, class F>
MMEBM_HD void visit(const StepTensor& t, const NoiseAt& at, uint32_t purpose, const F& constants, int64_t chain,
                    int64_t group, float factor, uint32_t todo, LaneSums& sums) {
  constexpr int G = GROUP<S>, BYTES = 16 / G;
  const uint32_t with = t.with;
  const bool aligned = (with & ALIGNED) != 0;
  const int64_t rest = t.numel - group * G, place = chain * t.numel + group * G;
  const int left = rest < G ? static_cast<int>(rest) : G;
  const uint32_t valid = (1u << left) - 1u, global = at.chain_offset + static_cast<uint32_t>(chain);

  uint32_t raw[4];
  load_group<BYTES>(raw, t.x, place, left, aligned);
  Group<G> g[1] = {};
  if (with & WITH_GRAD) gradients<G, 1>(t, t.grad, {place}, {left}, aligned, g);
  uint32_t keep = with & MASK ? observed<G>(t, chain, group * G, left) : 0u;
  if (todo & STATS) {
    MMEBM_UNROLL
    for (int j = 0; j < G; ++j) sums.grad += g[0].v[j] * g[0].v[j];
  }
  const Constants c[1] = {constants()};
  Draws<S, 1> random;
  draw({static_cast<uint32_t>(group)}, {global}, at, purpose, with, c, random);

  const Group<G> x[1] = {unpack<S, G>(raw)};
  uint32_t changed[1];
  Group<G> y[1];
  propose(x, g, random.normals, factor, c, with, y, changed);
  if (todo & CHECK) {
    // what stays anyway rejects nothing
    if (with & (1u << LOW | 1u << HIGH)) sums.outside |= leaving(y, c, with) & ~keep & valid;
    return;
  }
  if (!(todo & REJECT)) bounded(y, c, with);
  uint32_t out[4];
  stored<S>(y[0], random.halves[0], out);
  if (todo & KEEP) keep = valid;
  if (keep != 0) keep_bits<BYTES>(keep, raw, out);
  if (!(todo & KEEP)) store_group<BYTES>(t.x, place, out, left, aligned);
  if (todo & STATS) {
    sums.clipped += count_bits(changed[0] & valid);
    const Group<G> now = unpack<S, G>(out);
    MMEBM_UNROLL
    for (int j = 0; j < G; ++j) {
      const float move = now.v[j] - x[0].v[j];
      if (valid & 1u << j) sums.moved += move * move;
      if (valid & 1u << j && !is_finite(now.v[j])) ++sums.nonfinite;
    }
  }
}

MMEBM_HD NoiseAt noise_of(const StepTable& table, const StepTensor& t) {
  return {number(table.seed), static_cast<uint32_t>(number(table.step)), t.index, table.chain_offset};
}

// -- map

// The part of a tensor that a tile has: `count` groups, the first one `first` groups behind the start of chain `chain`,
// where x and grad are.
struct Span {
  uint32_t chain, first, count;
  char* x;
  const char* grad;
};

// No division: `inverse` is 2^shift / groups, rounded up, and its product exact below 2^31 groups. With more, a chain
// of the longest that there may be, 2^31 groups, ends behind its tile's first group at most once: exact as well.
template <int G, bool WHOLE>
MMEBM_HD void place_of(const StepTensor& t, const Span& span, uint32_t k, uint32_t& chain, uint32_t& group,
                       int64_t& element, int& left) {
  const uint32_t index = span.first + k;
  const uint32_t ended = static_cast<uint32_t>(static_cast<uint64_t>(index) * t.inverse >> (t.with >> SHIFT));
  chain = span.chain + ended;
  group = index - ended * t.groups;
  element = static_cast<int64_t>(index) * G;
  left = G;
  if (!WHOLE) {
    const int64_t rest = t.numel - static_cast<int64_t>(group) * G;
    element = static_cast<int64_t>(ended) * t.numel + static_cast<int64_t>(group) * G;
    if (rest < G) left = static_cast<int>(rest);
  }
}

// Groups k, k + MAP_THREADS, ... of a span. WHOLE: every group is one access in each array.
template <Storage S, bool WHOLE>
MMEBM_HD void map_groups(const StepTensor& t, const Span& span, const NoiseAt& at, uint32_t purpose, uint32_t k) {
  constexpr int G = GROUP<S>, BYTES = 16 / G, U = MAP_GROUPS;
  const uint32_t with = t.with;
  uint32_t chains[U], groups[U], raw[U][4];
  int64_t elements[U];
  int left[U];
  Group<G> g[U] = {};
  MMEBM_UNROLL
  for (int u = 0; u < U; ++u) {
    // behind the end the thread's first group once more, for nothing; any other group is another thread's to write
    const uint32_t here = k + u * MAP_THREADS < span.count ? k + u * MAP_THREADS : k;
    place_of<G, WHOLE>(t, span, here, chains[u], groups[u], elements[u], left[u]);
    load_group<BYTES>(raw[u], span.x, elements[u], left[u], WHOLE);
  }
  if (with & WITH_GRAD) gradients<G, U>(t, span.grad, elements, left, WHOLE, g);
  Constants c[U];
  c[0] = constants_of(t, chains[0]);
  MMEBM_UNROLL
  for (int u = 1; u < U; ++u) {
    c[u] = c[0];
    if (with & INDIRECT) c[u] = constants_of(t, chains[u]);
  }
  uint32_t global[U];
  MMEBM_UNROLL
  for (int u = 0; u < U; ++u) global[u] = at.chain_offset + chains[u];
  Draws<S, U> random;
  draw(groups, global, at, purpose, with, c, random);
  Group<G> x[U], y[U];
  MMEBM_UNROLL
  for (int u = 0; u < U; ++u) x[u] = unpack<S, G>(raw[u]);
  uint32_t changed[U];
  propose(x, g, random.normals, 1.0f, c, with, y, changed);
  bounded(y, c, with);
  MMEBM_UNROLL
  for (int u = 0; u < U; ++u) {
    uint32_t out[4];
    stored<S>(y[u], random.halves[u], out);
    if (with & MASK) {
      keep_bits<BYTES>(observed<G>(t, chains[u], static_cast<int64_t>(groups[u]) * G, left[u]), raw[u], out);
    }
    if (k + u * MAP_THREADS < span.count) store_group<BYTES>(span.x, elements[u], out, left[u], WHOLE);
  }
}

template <Storage S>
MMEBM_HD void map_span(const StepTensor& t, const Span& span, const NoiseAt& at, uint32_t purpose, uint32_t lane) {
  for (uint32_t k = lane; k < span.count; k += MAP_GROUPS * MAP_THREADS) {
    if (t.with & ALIGNED) {
      map_groups<S, true>(t, span, at, purpose, k);
    } else {
      map_groups<S, false>(t, span, at, purpose, k);
    }
  }
}

MMEBM_HD void map_item(const StepTable& table, int64_t item, int lane) {
  int i = 0;
  while (i + 1 < table.count && item >= table.tensors[i + 1].first_tile) ++i;
  const StepTensor& t = table.tensors[i];
  const uint32_t size = static_cast<uint32_t>(table.tile);
  const uint64_t start = static_cast<uint64_t>(item - t.first_tile) * size;
  const uint64_t rest = static_cast<uint64_t>(table.chains) * t.groups - start;
  Span span = {0, static_cast<uint32_t>(start), rest < size ? static_cast<uint32_t>(rest) : size,
               static_cast<char*>(t.x), static_cast<const char*>(t.grad)};
  if (t.with & MANY) {
    span.chain = static_cast<uint32_t>(start / t.groups);
    span.first = static_cast<uint32_t>(start - static_cast<uint64_t>(span.chain) * t.groups);
    span.x += static_cast<int64_t>(span.chain) * t.numel * (storage_of(t) == Storage::fp32 ? 4 : 2);
    span.grad += static_cast<int64_t>(span.chain) * t.numel * (grad_storage_of(t) == Storage::fp32 ? 4 : 2);
  }
  const NoiseAt at = noise_of(table, t);
  const uint32_t own = static_cast<uint32_t>(lane);
  switch (storage_of(t)) {
    case Storage::fp32: return map_span<Storage::fp32>(t, span, at, table.purpose, own);
    case Storage::bf16: return map_span<Storage::bf16>(t, span, at, table.purpose, own);
    case Storage::fp16: return map_span<Storage::fp16>(t, span, at, table.purpose, own);
  }
}

// -- teams: the threads that work on one chain. `each` runs a function for every lane, `total` adds over them.

// On the device a thread is one lane; `size` is a power of two up to a warp, or a whole block.
struct ThreadTeam {
  int size, lane;
  LaneSums own;

  template <class F>
  __host__ __device__ __forceinline__ void each(const F& f) {
    f(lane, own);
  }
  template <class T, class Get>
  __host__ __device__ __forceinline__ T total(const Get& get) {
    T v = get(own);
#if defined(__CUDA_ARCH__)
    for (int reach = (size < WARP ? size : WARP) / 2; reach > 0; reach /= 2) v += __shfl_xor_sync(~0u, v, reach);
    if (size > WARP) {
      __shared__ T parts[THREADS / WARP];
      if (lane % WARP == 0) parts[lane / WARP] = v;
      __syncthreads();
      v = parts[0];
      MMEBM_UNROLL
      for (int i = 1; i < THREADS / WARP; ++i) v += parts[i];
      __syncthreads();
    }
#endif
    return v;
  }
};

// On the host one after the other, added in the same order.
struct HostTeam {
  int size;
  LaneSums own[THREADS];

  template <class F>
  __host__ __device__ __forceinline__ void each(const F& f) {
    for (int lane = 0; lane < size; ++lane) f(lane, own[lane]);
  }
  template <class T, class Get>
  __host__ __device__ __forceinline__ T total(const Get& get) {
    T v[THREADS], next[THREADS];
    for (int lane = 0; lane < size; ++lane) v[lane] = get(own[lane]);
    for (int reach = (size < WARP ? size : WARP) / 2; reach > 0; reach /= 2) {
      for (int lane = 0; lane < size; ++lane) next[lane] = v[lane] + v[lane ^ reach];
      for (int lane = 0; lane < size; ++lane) v[lane] = next[lane];
    }
    for (int warp = WARP; warp < size; warp += WARP) v[0] += v[warp];
    return v[0];
  }
};

// The groups [first, last) of one tensor that a split has.
struct Range {
  int64_t first, last;
};

MMEBM_HD Range range_of(const StepTable& table, const StepTensor& t, int64_t split, bool active) {
  const int64_t groups = t.groups, share = (groups + table.splits - 1) / table.splits, first = split * share;
  const int64_t last = first + share;
  return {first, !active ? first : last < groups ? last : groups};
}

template <int G>
MMEBM_HD float squares_lane(const StepTensor& t, int64_t chain, Range range, float limit, int lane, int size) {
  float out = 0.0f;
  for (int64_t group = range.first + lane; group < range.last; group += size) {
    const int64_t rest = t.numel - group * G;
    Group<G> g[1];
    gradients<G, 1>(t, t.grad, {chain * t.numel + group * G}, {rest < G ? static_cast<int>(rest) : G},
                    (t.with & ALIGNED) != 0, g);
    if (t.with & 1u << GRAD_CLIP) clip_value(g[0], limit);
    MMEBM_UNROLL
    for (int j = 0; j < G; ++j) out += g[0].v[j] * g[0].v[j];
  }
  return out;
}

// The sum of squares of one split's gradient, after the clip by value.
template <class Team>
MMEBM_HD float squares_of(const StepTensor& t, int64_t chain, Range range, float limit, Team& team) {
  team.each([&](int lane, LaneSums& own) {
    own.squares = storage_of(t) == Storage::fp32 ? squares_lane<4>(t, chain, range, limit, lane, team.size)
                                                 : squares_lane<8>(t, chain, range, limit, lane, team.size);
  });
  return team.template total<float>([](const LaneSums& own) { return own.squares; });
}

// The sum of `count` numbers.
template <class Team>
MMEBM_HD float sum_of(const float* from, int64_t count, Team& team) {
  team.each([&](int lane, LaneSums& own) {
    own.squares = 0.0f;
    for (int64_t i = lane; i < count; i += team.size) own.squares += from[i];
  });
  return team.template total<float>([](const LaneSums& own) { return own.squares; });
}

template <class Team>
MMEBM_HD uint32_t leaving_lanes(Team& team) {
  return team.template total<uint32_t>([](const LaneSums& own) { return own.outside != 0 ? 1u : 0u; });
}

template <class Team>
MMEBM_HD void norm_item(const StepTable& table, int64_t item, bool active, Team& team) {
  const int64_t chain = active ? item / table.splits : 0, split = active ? item - chain * table.splits : 0;
  for (int i = 0; i < table.count; ++i) {
    const StepTensor& t = table.tensors[i];
    if (!(t.with & 1u << GRAD_NORM_CLIP)) continue;
    const float limit = constants_of(t, chain).of[GRAD_CLIP];
    const float squares = squares_of(t, chain, range_of(table, t, split, active), limit, team);
    team.each([&](int lane, LaneSums&) {
      if (lane == 0 && active) table.norms[(i * table.chains + chain) * table.splits + split] = squares;
    });
  }
}

// The total of tensor `i`, behind the sums that it adds.
template <class Team>
MMEBM_HD void fold_item(const StepTable& table, int64_t i, Team& team) {
  if (!(table.tensors[i].with & 1u << GRAD_NORM_CLIP)) return;
  const int64_t count = table.chains * table.splits;
  const float total = sum_of(table.norms + i * count, count, team);
  team.each([&](int lane, LaneSums&) {
    if (lane == 0) table.norms[table.count * count + i] = total;
  });
}

template <class Team>
MMEBM_HD void chain_item(const StepTable& table, int64_t item, bool active, Team& team) {
  const int64_t chain = active ? item / table.splits : 0, split = active ? item - chain * table.splits : 0;
  const uint32_t todo = table.todo;
  team.each([](int, LaneSums& own) { own = {}; });
  bool keeps = false;
  if (todo & SHARED) keeps = sum_of(table.outside + chain * table.columns, table.columns, team) > 0.0f;

  for (uint32_t turn = todo & CHECK ? CHECK : UPDATE; turn <= UPDATE && turn & todo; turn *= 2) {
    if (turn == UPDATE && todo & CHECK) {
      keeps = leaving_lanes(team) != 0;
    }
    const uint32_t how = turn == CHECK ? turn : turn | (todo & (STATS | REJECT)) | (keeps ? KEEP : 0u);
    for (int i = 0; i < table.count; ++i) {
      const StepTensor& t = table.tensors[i];
      const Constants c = constants_of(t, chain);
      const Range range = range_of(table, t, split, active);
      float factor = 1.0f;
      if (t.with & 1u << GRAD_NORM_CLIP) {
        float squares;
        if (table.norms == nullptr) {
          squares = squares_of(t, chain, range, c.of[GRAD_CLIP], team);
        } else if (todo & WHOLE) {
          squares = table.norms[table.count * table.chains * table.splits + i];
        } else {
          squares = sum_of(table.norms + (i * table.chains + chain) * table.splits, table.splits, team);
        }
        factor = norm_factor(squares, c.of[GRAD_NORM_CLIP]);
      }
      const NoiseAt at = noise_of(table, t);
      const auto constants = [&] { return c; };
      team.each([&](int lane, LaneSums& own) {
        for (int64_t group = range.first + lane; group < range.last; group += team.size) {
          switch (storage_of(t)) {
            case Storage::fp32:
              visit<Storage::fp32>(t, at, table.purpose, constants, chain, group, factor, how, own);
              break;
            case Storage::bf16:
              visit<Storage::bf16>(t, at, table.purpose, constants, chain, group, factor, how, own);
              break;
            case Storage::fp16:
              visit<Storage::fp16>(t, at, table.purpose, constants, chain, group, factor, how, own);
              break;
          }
        }
      });
    }
  }

  const int64_t place = chain * table.columns + table.column0 + split, next = table.chains * table.columns;
  if (!(todo & UPDATE)) {
    const uint32_t found = leaving_lanes(team);
    team.each([&](int lane, LaneSums&) {
      if (lane == 0 && active) table.outside[place] = found != 0 ? 1.0f : 0.0f;
    });
  }
  if (todo & STATS) {
    const float grad = team.template total<float>([](const LaneSums& own) { return own.grad; });
    const float moved = team.template total<float>([](const LaneSums& own) { return own.moved; });
    const uint32_t clipped = team.template total<uint32_t>([](const LaneSums& own) { return own.clipped; });
    const uint32_t nonfinite = team.template total<uint32_t>([](const LaneSums& own) { return own.nonfinite; });
    team.each([&](int lane, LaneSums&) {
      if (lane != 0 || !active) return;
      if (todo & FINISH) {
        table.sums.grad_norm[chain] = sqrtf(grad);
        table.sums.displacement[chain] = sqrtf(moved);
        table.sums.clipped[chain] = clipped;
        table.sums.nonfinite[chain] = nonfinite;
      } else {
        table.floats[place] = grad;
        table.floats[next + place] = moved;
        table.counts[place] = clipped;
        table.counts[next + place] = nonfinite;
      }
    });
  }
}

MMEBM_HD void finish_item(const StepTable& table, int64_t chain) {
  const int64_t next = table.chains * table.columns;
  float grad = 0.0f, moved = 0.0f;
  int64_t clipped = 0, nonfinite = 0;
  for (int64_t place = chain * table.columns; place < (chain + 1) * table.columns; ++place) {
    grad += table.floats[place];
    moved += table.floats[next + place];
    clipped += table.counts[place];
    nonfinite += table.counts[next + place];
  }
  table.sums.grad_norm[chain] = sqrtf(grad);
  table.sums.displacement[chain] = sqrtf(moved);
  table.sums.clipped[chain] = clipped;
  table.sums.nonfinite[chain] = nonfinite;
}

// -- kernels

// Blocks an SM must hold: 128 registers a thread, then 128 and 64. With 96 the map kernel, which makes the noise of two
// groups at a time, spills.
__global__ void __launch_bounds__(MAP_THREADS, 4) map_kernel(const __grid_constant__ StepTable table) {
  for (int64_t item = blockIdx.x; item < table.items; item += gridDim.x) map_item(table, item, threadIdx.x);
}

// The loops over items are the same for all threads of a block, because they meet in `total`.
__device__ __forceinline__ int64_t first_item(const StepTable& table, ThreadTeam& team) {
  team.size = table.team;
  team.lane = static_cast<int>(threadIdx.x) % table.team;
  return static_cast<int64_t>(blockIdx.x) * (THREADS / table.team);
}

__global__ void __launch_bounds__(THREADS, 2) chain_kernel(const __grid_constant__ StepTable table) {
  ThreadTeam team;
  const int64_t teams = THREADS / table.team, own = threadIdx.x / table.team;
  for (int64_t item = first_item(table, team); item < table.items; item += gridDim.x * teams) {
    chain_item(table, item + own, item + own < table.items, team);
  }
}

__global__ void __launch_bounds__(THREADS, 4) norm_kernel(const __grid_constant__ StepTable table) {
  ThreadTeam team;
  const int64_t teams = THREADS / table.team, own = threadIdx.x / table.team;
  for (int64_t item = first_item(table, team); item < table.items; item += gridDim.x * teams) {
    norm_item(table, item + own, item + own < table.items, team);
  }
}

__global__ void __launch_bounds__(THREADS) fold_kernel(const __grid_constant__ StepTable table) {
  ThreadTeam team;
  team.size = THREADS;
  team.lane = threadIdx.x;
  fold_item(table, blockIdx.x, team);
}

__global__ void __launch_bounds__(THREADS) finish_kernel(const __grid_constant__ StepTable table) {
  for (int64_t chain = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x; chain < table.chains;
       chain += static_cast<int64_t>(gridDim.x) * THREADS) {
    finish_item(table, chain);
  }
}

// -- launches

enum class Loop { map, norm, fold, chain, finish };

void run_on_host(Loop loop, const StepTable& table) {
  HostTeam team;
  team.size = table.team;
  switch (loop) {
    case Loop::map:
      for (int64_t item = 0; item < table.items; ++item) {
        for (int lane = 0; lane < MAP_THREADS; ++lane) map_item(table, item, lane);
      }
      break;
    case Loop::norm:
      for (int64_t item = 0; item < table.items; ++item) norm_item(table, item, true, team);
      break;
    case Loop::fold:
      team.size = THREADS;
      for (int64_t i = 0; i < table.count; ++i) fold_item(table, i, team);
      break;
    case Loop::chain:
      for (int64_t item = 0; item < table.items; ++item) chain_item(table, item, true, team);
      break;
    case Loop::finish:
      for (int64_t chain = 0; chain < table.chains; ++chain) finish_item(table, chain);
      break;
  }
}

struct Launcher {
  int device;
  cudaStream_t stream;
  int64_t blocks = 0;  // at most
  int code = cudaSuccess;

  Launcher(int device, uint64_t cuda_stream) : device(device), stream(reinterpret_cast<cudaStream_t>(cuda_stream)) {
    if (device == CudaLangevinStep::HOST) return;
    // The static runtime of this library keeps its own notion of the current device, apart from torch's.
    code = cudaSetDevice(device);
    int processors = 0;
    if (code == cudaSuccess) code = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    blocks = BLOCKS_PER_SM * processors;
  }

  void operator()(Loop loop, const StepTable& table) {
    if (code != cudaSuccess) return;
    if (device == CudaLangevinStep::HOST) return run_on_host(loop, table);
    const int64_t teams = THREADS / table.team;
    const int64_t wanted = loop == Loop::map    ? table.items
                           : loop == Loop::fold ? table.count
                           : loop == Loop::finish ? (table.chains + THREADS - 1) / THREADS
                                                  : (table.items + teams - 1) / teams;
    if (wanted == 0) return;
    const unsigned int grid = static_cast<unsigned int>(std::min(wanted, loop == Loop::fold ? wanted : blocks));
    switch (loop) {
      case Loop::map: map_kernel<<<grid, MAP_THREADS, 0, stream>>>(table); break;
      case Loop::norm: norm_kernel<<<grid, THREADS, 0, stream>>>(table); break;
      case Loop::fold: fold_kernel<<<grid, THREADS, 0, stream>>>(table); break;
      case Loop::chain: chain_kernel<<<grid, THREADS, 0, stream>>>(table); break;
      case Loop::finish: finish_kernel<<<grid, THREADS, 0, stream>>>(table); break;
    }
    code = cudaGetLastError();
  }
};

// Whether every group of a tensor is one access in each of its arrays.
bool aligned(const StepTensor& t) {
  const int64_t group = storage_of(t) == Storage::fp32 ? 4 : 8;
  const uint64_t grad_bytes = grad_storage_of(t) == Storage::fp32 ? 16 : 2 * static_cast<uint64_t>(group);
  return t.numel % group == 0 && reinterpret_cast<uint64_t>(t.x) % 16 == 0 &&
         reinterpret_cast<uint64_t>(t.grad) % grad_bytes == 0 &&
         reinterpret_cast<uint64_t>(t.observed) % static_cast<uint64_t>(group) == 0;
}

uint32_t bit(Slot slot) { return 1u << slot; }

}  // namespace

// -- the state

void CudaLangevinStep::add(int64_t numel, uint32_t index, bool noisy, Storage storage, const uint8_t* observed,
                           bool observed_rows) {
  Tensor t = {};
  t.kernel.numel = numel;
  t.kernel.index = index;
  t.kernel.observed = observed;
  if (observed != nullptr) t.kernel.with = MASK | (observed_rows ? MASK_ROWS : 0u);
  t.storage = t.grad_storage = storage;
  t.noisy = noisy;
  tensors_.push_back(t);
}

void CudaLangevinStep::set(size_t tensor, Slot slot, Kind kind, float value, const float* values) {
  StepTensor& t = tensors_[tensor].kernel;
  t.kinds = (t.kinds & ~(15u << 4 * slot)) | static_cast<uint32_t>(kind) << 4 * slot;
  t.with = kind == Kind::absent ? t.with & ~bit(slot) : t.with | bit(slot);
  // what is read as a number is what propose takes
  if (slot == PRIOR_STD) value = 1.0f / value;
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  const bool at = kind == Kind::chain || kind == Kind::one;
  t.constants[slot] = at ? reinterpret_cast<uint64_t>(values) : bits;
  t.with &= ~static_cast<uint32_t>(INDIRECT);
  for (int i = 0; i < SLOTS; ++i) {
    const Kind other = static_cast<Kind>(t.kinds >> 4 * i & 15u);
    if (other == Kind::chain || other == Kind::one) t.with |= INDIRECT;
  }
}

// The tensors that have elements, from number `first` of them on, with the bits `drop` taken from what applies to them
// and `add` added.
StepTable CudaLangevinStep::table(size_t first, size_t last, StepNumber seed, StepNumber step, uint32_t drop,
                                  uint32_t add) const {
  StepTable out;
  out.chains = chains_;
  out.chain_offset = chain_offset_;
  out.seed = seed;
  out.step = step;
  size_t number = 0;
  for (const Tensor& tensor : tensors_) {
    if (tensor.kernel.numel == 0) continue;
    if (number >= first && number < last) {
      StepTensor& t = out.tensors[out.count++];
      t = tensor.kernel;
      t.with = (t.with & ~drop) | (tensor.noisy ? add : add & ~static_cast<uint32_t>(WITH_NOISE));
      t.with &= ~(15u << STORAGE);
      t.with |= static_cast<uint32_t>(tensor.storage) << STORAGE;
      t.with |= static_cast<uint32_t>(tensor.grad_storage) << (STORAGE + 2);
      const int64_t group = tensor.storage == Storage::fp32 ? 4 : 8;
      t.groups = static_cast<uint32_t>((t.numel + group - 1) / group);
      if (aligned(t)) t.with |= ALIGNED;
    }
    ++number;
  }
  return out;
}

// How the launches with sums are cut: by sizes alone, which `scratch_bytes` and `step` both need.
struct CudaLangevinStep::Plan {
  struct Batch {
    size_t first, last;
    int32_t team, splits, column0;
    bool normed;
    int64_t norms;  // floats
  };
  std::vector<Batch> batches;
  int32_t columns = 0;
  bool bounded = false, normed = false;
  int64_t norms = 0, outside = 0, floats = 0, counts = 0;  // how many of each `scratch` holds
};

CudaLangevinStep::Plan CudaLangevinStep::plan(bool stats) const {
  Plan out;
  std::vector<const Tensor*> present;
  for (const Tensor& t : tensors_) {
    if (t.kernel.numel != 0) present.push_back(&t);
    if (t.kernel.with & (bit(LOW) | bit(HIGH))) out.bounded = true;
    if (t.kernel.with & bit(GRAD_NORM_CLIP)) out.normed = true;
  }
  size_t first = 0;
  do {
    const size_t last = std::min(first + STEP_TENSORS, present.size());
    int64_t longest = 0;
    bool normed = false;
    for (size_t i = first; i < last; ++i) {
      const int64_t group = present[i]->storage == Storage::fp32 ? 4 : 8;
      longest = std::max(longest, (present[i]->kernel.numel + group - 1) / group);
      normed |= (present[i]->kernel.with & bit(GRAD_NORM_CLIP)) != 0;
    }
    int32_t team = 1;
    while (team < WARP && team < longest) team *= 2;
    if (longest > 8 * WARP) team = THREADS;
    const int64_t splits = std::max<int64_t>(1, std::min(MAX_SPLITS, (longest + SPLIT - 1) / SPLIT));
    const int64_t count = static_cast<int64_t>(last - first);
    const int64_t norms = normed && (splits > 1 || options_ & NORM_OF_TENSOR) ? count * (chains_ * splits + 1) : 0;
    out.batches.push_back({first, last, team, static_cast<int32_t>(splits), out.columns, normed, norms});
    out.columns += static_cast<int32_t>(splits);
    out.norms += norms;
    first = last;
  } while (first < present.size());
  if (out.columns > 1) {
    if (options_ & REJECT_OUTSIDE && out.bounded) out.outside = chains_ * out.columns;
    if (stats) out.floats = out.counts = 2 * chains_ * out.columns;
  }
  return out;
}

int64_t CudaLangevinStep::scratch_bytes(bool stats) const {
  const Plan p = plan(stats);
  return 8 * p.counts + 4 * (p.norms + p.outside + p.floats);
}

int CudaLangevinStep::perturb(StepNumber seed, StepNumber step, int device, uint64_t cuda_stream) {
  const uint32_t bounds = options_ & CLAMP_NOISE ? bit(LOW) | bit(HIGH) : 0u;
  return run_map(seed, step, PERTURB_ROUNDING, ~(bit(NOISE_SCALE) | bounds | MASK | MASK_ROWS | INDIRECT), WITH_NOISE,
                 device, cuda_stream);
}

int CudaLangevinStep::run_map(StepNumber seed, StepNumber step, uint32_t purpose, uint32_t drop, uint32_t add,
                              int device, uint64_t cuda_stream) {
  if (chains_ == 0) return cudaSuccess;
  Launcher launch(device, cuda_stream);
  for (size_t first = 0; first < tensors_.size(); first += STEP_TENSORS) {
    StepTable t = table(first, first + STEP_TENSORS, seed, step, drop, add);
    if (t.count == 0) break;
    t.purpose = purpose;
    int64_t groups = 0;
    for (int i = 0; i < t.count; ++i) groups += chains_ * int64_t{t.tensors[i].groups};
    // Choosing its tensor costs a tile some dozen instructions: two turns of its threads where that leaves 32 tiles for
    // each of 132 SMs.
    const int turn = MAP_GROUPS * MAP_THREADS;
    t.tile = groups >= int64_t{2} * turn * 32 * 132 ? 2 * turn : turn;
    for (int i = 0; i < t.count; ++i) {
      const int64_t per_chain = t.tensors[i].groups, all = chains_ * per_chain;
      t.tensors[i].first_tile = static_cast<uint32_t>(t.items);
      uint32_t shift = 31;
      while (int64_t{1} << shift < per_chain << 31) ++shift;
      t.tensors[i].with |= shift << SHIFT;
      t.tensors[i].inverse = static_cast<uint32_t>((uint64_t{1} << shift) / static_cast<uint64_t>(per_chain) + 1);
      if (all > MANY_GROUPS) t.tensors[i].with |= MANY;
      t.items += (all + t.tile - 1) / t.tile;
    }
    launch(Loop::map, t);
  }
  return launch.code;
}

int CudaLangevinStep::step(StepNumber seed, StepNumber step, bool noise, const StepSums* sums, void* scratch,
                           int device, uint64_t cuda_stream) {
  if (chains_ == 0) return cudaSuccess;
  const uint32_t add = WITH_GRAD | (noise ? WITH_NOISE : 0u) | (options_ & SCORE ? WITH_SCORE : 0u);
  const Plan p = plan(sums != nullptr);
  const bool reject = options_ & REJECT_OUTSIDE && p.bounded;
  if (sums == nullptr && !p.normed && !reject) return run_map(seed, step, ROUNDING, 0, add, device, cuda_stream);

  int64_t* counts = static_cast<int64_t*>(scratch);
  float* floats = reinterpret_cast<float*>(counts + p.counts);
  float* outside = floats + p.floats;
  float* norms = outside + p.outside;
  std::vector<StepTable> tables;
  for (const Plan::Batch& batch : p.batches) {
    StepTable t = table(batch.first, batch.last, seed, step, 0, add);
    t.purpose = ROUNDING;
    t.team = batch.team;
    t.splits = batch.splits;
    t.column0 = batch.column0;
    t.columns = p.columns;
    t.items = chains_ * batch.splits;
    t.floats = floats;
    t.counts = counts;
    t.outside = outside;
    t.norms = batch.norms != 0 ? norms : nullptr;
    norms += batch.norms;
    if (sums != nullptr) t.sums = *sums;
    if (options_ & NORM_OF_TENSOR) t.todo |= WHOLE;
    tables.push_back(t);
  }

  Launcher launch(device, cuda_stream);
  for (const StepTable& t : tables) {
    if (t.norms == nullptr) continue;
    launch(Loop::norm, t);
    if (options_ & NORM_OF_TENSOR) launch(Loop::fold, t);
  }
  if (p.outside != 0) {
    for (StepTable& t : tables) {
      const uint32_t todo = t.todo;
      t.todo = todo | CHECK | REJECT;
      launch(Loop::chain, t);
      t.todo = todo;
    }
  }
  for (StepTable& t : tables) {
    t.todo |= UPDATE;
    if (reject) t.todo |= REJECT | (p.outside != 0 ? SHARED : CHECK);
    if (sums != nullptr) t.todo |= STATS | (p.columns == 1 ? FINISH : 0u);
    launch(Loop::chain, t);
  }
  if (p.floats != 0) launch(Loop::finish, tables[0]);
  return launch.code;
}

int CudaLangevinStep::prepare(int device) {
  int code = cudaSetDevice(device);
  cudaFuncAttributes attributes;
  for (const void* kernel : {reinterpret_cast<const void*>(map_kernel), reinterpret_cast<const void*>(norm_kernel),
                             reinterpret_cast<const void*>(fold_kernel), reinterpret_cast<const void*>(chain_kernel),
                             reinterpret_cast<const void*>(finish_kernel)}) {
    if (code == cudaSuccess) code = cudaFuncGetAttributes(&attributes, kernel);
  }
  cudaGetLastError();  // clears the error, which the next launch check would report otherwise
  return code;
}

}  // namespace mmebm
