// The loops of the net ops, compiled once per instruction set (common/isa.h).
//
// Vector lanes are chains, as in langevin_mlp/: whatever the channels, maps, pools and norms are, there are no
// shuffles and no remainders. A chain's sums run in one order in its own lane, so that no result depends on how a
// batch is split, and AVX2 and AVX-512 agree bit for bit.
//
// The micro-kernel keeps P positions x J outputs of sums in registers: per row of depth P loads and J broadcasts for
// P J products, or for half as many where few chains leave room for two positions in a register (MMEBM_NARROW). What
// differs between a convolution, its gradient, a transposed one and a linear layer is only which rows belong to a
// position (NetPass). The activation follows while the block is in the first-level cache, and leaves its derivative
// beside the value; the backward pass takes it into account where it stores (through).
#include <cstdint>
#include <cstring>

#include "common/activation_vec.h"
#include "common/chain_rule.h"
#include "net/job.h"

namespace mmebm {
namespace {

#if defined(__AVX512F__)
constexpr int REGISTERS = 24, MOST_REGISTERS = 8, MOST_OUTPUTS = 16;
#else
constexpr int REGISTERS = 12, MOST_REGISTERS = 6, MOST_OUTPUTS = 12;
#endif

// --------------------------------------------------------------------------------------------------------- micro-kernel

// Where a block's sums go: out, added to it unless `store`, times `factor` where there is one.
struct Into {
  float* out;
  const float* factor;
  bool store;
};

struct Yes {
  constexpr operator bool() const { return true; }
};
struct No {
  constexpr operator bool() const { return false; }
};

// Calls finish(adds, times) with constants: asked of each sum, the two questions are a third of the time of a point of a
// tile with 16 channels.
template <class Finish>
MMEBM_INLINE void with_kind(const Into& into, const Finish& finish) {
  if (into.store) return into.factor ? finish(No(), Yes()) : finish(No(), No());
  into.factor ? finish(Yes(), Yes()) : finish(Yes(), No());
}

template <bool adds, bool times>
MMEBM_INLINE void store_sum(const Into& into, int64_t at, F v) {
  if (adds) v = add(load(into.out + at), v);
  if (times) v = through(v, load(into.factor + at));
  store(into.out + at, v);
}

using Block = void (*)(const NetPass& pass, const float* in, const int32_t* from, const float* weight,
                       const float* bias, const Into& into, const int32_t* to, int64_t count);

// What a register of the micro-kernel holds: a row of one position, or those of two where a row fills half of it.
#if defined(MMEBM_NARROW)
constexpr int TOGETHER = 2;
#if defined(__AVX512F__)
using Register = __m512;
MMEBM_INLINE Register set_rows(float v) { return _mm512_set1_ps(v); }
MMEBM_INLINE Register load_rows(const float* const* at, int64_t i) {
  return _mm512_insertf32x8(_mm512_castps256_ps512(load(at[0] + i)), load(at[1] + i), 1);
}
// By way of memory: what else touches a row needs one of the first 16 registers, and the compiler would keep all sums there.
MMEBM_INLINE F row_of(Register v, int which) {
  float both[2 * W];
  _mm512_storeu_ps(both, v);
  return load(both + which * W);
}
MMEBM_INLINE Register multiply_add(Register a, Register b, Register c) { return _mm512_fmadd_ps(a, b, c); }
MMEBM_INLINE Register add_rows(Register a, Register b) { return _mm512_add_ps(a, b); }
MMEBM_INLINE Register loaded(const float* p) { return _mm512_loadu_ps(p); }
MMEBM_INLINE void stored(float* p, Register v) { _mm512_storeu_ps(p, v); }
// Each number of a row twice; both of p in turn; the numbers at even places, then those at odd ones.
MMEBM_INLINE Register twice(F v) {
  const __m512i from = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
  return _mm512_permutexvar_ps(from, _mm512_castps256_ps512(v));
}
MMEBM_INLINE Register in_turn(double both) { return _mm512_castpd_ps(_mm512_set1_pd(both)); }
MMEBM_INLINE Register apart(Register v) {
  const __m512i from = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
  return _mm512_permutexvar_ps(from, v);
}
#else
using Register = __m256;
MMEBM_INLINE Register set_rows(float v) { return _mm256_set1_ps(v); }
MMEBM_INLINE Register load_rows(const float* const* at, int64_t i) {
  return _mm256_insertf128_ps(_mm256_castps128_ps256((__m128)load(at[0] + i)), (__m128)load(at[1] + i), 1);
}
MMEBM_INLINE F row_of(Register v, int which) {
  return (F)(which ? _mm256_extractf128_ps(v, 1) : _mm256_castps256_ps128(v));
}
MMEBM_INLINE Register multiply_add(Register a, Register b, Register c) { return _mm256_fmadd_ps(a, b, c); }
MMEBM_INLINE Register add_rows(Register a, Register b) { return _mm256_add_ps(a, b); }
MMEBM_INLINE Register loaded(const float* p) { return _mm256_loadu_ps(p); }
MMEBM_INLINE void stored(float* p, Register v) { _mm256_storeu_ps(p, v); }
MMEBM_INLINE Register twice(F v) {
  const __m256i from = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
  return _mm256_permutevar8x32_ps(_mm256_castps128_ps256((__m128)v), from);
}
MMEBM_INLINE Register in_turn(double both) { return _mm256_castpd_ps(_mm256_set1_pd(both)); }
MMEBM_INLINE Register apart(Register v) {
  return _mm256_permutevar8x32_ps(v, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
}
#endif
#else
constexpr int TOGETHER = 1;
using Register = F;
MMEBM_INLINE Register set_rows(float v) { return setf(v); }
MMEBM_INLINE Register load_rows(const float* const* at, int64_t i) { return load(at[0] + i); }
MMEBM_INLINE F row_of(Register v, int) { return v; }
MMEBM_INLINE Register multiply_add(Register a, Register b, Register c) { return fma(a, b, c); }
#endif

// Into a register: a compiler would rather load it anew for each product that it is a factor of, and there are two loads
// a cycle.
MMEBM_INLINE Register held(Register x) {
#if defined(MMEBM_X86)
  asm("" : "+v"(x));
#endif
  return x;
}

// Weights are read once a tile, one pass after the other, and the processor foresees no more than a page of them: so many
// numbers ahead they are on their way.
constexpr int64_t AHEAD = 1024;

// R registers of positions and J outputs; `count` positions, which may leave a half of the last register unused. `whole`:
// the products do not fall into parts.
template <int R, int J, bool whole>
void block(const NetPass& pass, const float* in, const int32_t* from, const float* weight, const float* bias,
           const Into& into, const int32_t* to, int64_t count) {
  constexpr int P = R * TOGETHER;
  Register sum[R][J];
  const float* at[P];
  float before[P * J * W];
  bool parts = false;
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p) {
    const bool unused = TOGETHER > 1 && p == P - 1 && count < P;
    at[p] = in + static_cast<int64_t>(from[unused ? p - 1 : p]) * W;
  }
#pragma GCC unroll 16
  for (int j = 0; j < J; ++j) {
    const Register first = set_rows(bias ? bias[j] : 0.0f);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) sum[r][j] = first;
  }
  for (int64_t s = 0; s < pass.segment_count; ++s) {
    const NetSegment& segment = pass.segments[s];
    if (!whole && segment.part) {
#pragma GCC unroll 16
      for (int p = 0; p < P; ++p) {
#pragma GCC unroll 16
        for (int j = 0; j < J; ++j) {
          float* const old = before + (p * J + j) * W;
          const F here = row_of(sum[p / TOGETHER][j], p % TOGETHER);
          store(old, parts ? add(load(old), here) : here);
        }
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
        for (int j = 0; j < J; ++j) sum[r][j] = set_rows(0.0f);
      }
      parts = true;
    }
    const int64_t begin = segment.offset * W, end = begin + segment.length * int64_t{W};
    for (int64_t i = begin; i < end; i += W, weight += J) {
      __builtin_prefetch(weight + AHEAD);
      // the fewer of the two stay in registers
      if constexpr (R < J) {
        Register x[R];
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) x[r] = held(load_rows(at + r * TOGETHER, i));
#pragma GCC unroll 16
        for (int j = 0; j < J; ++j) {
          const Register w = held(set_rows(weight[j]));
#pragma GCC unroll 16
          for (int r = 0; r < R; ++r) sum[r][j] = multiply_add(w, x[r], sum[r][j]);
        }
      } else {
        Register w[J];
#pragma GCC unroll 16
        for (int j = 0; j < J; ++j) w[j] = held(set_rows(weight[j]));
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          const Register x = held(load_rows(at + r * TOGETHER, i));
#pragma GCC unroll 16
          for (int j = 0; j < J; ++j) sum[r][j] = multiply_add(w[j], x, sum[r][j]);
        }
      }
    }
  }
  with_kind(into, [&](auto adds, auto times) {
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) {
      if (TOGETHER > 1 && p == count) return;
      const int64_t begin = static_cast<int64_t>(to[p]) * W;
#pragma GCC unroll 16
      for (int j = 0; j < J; ++j) {
        F v = row_of(sum[p / TOGETHER][j], p % TOGETHER);
        if (!whole && parts) v = add(load(before + (p * J + j) * W), v);
        store_sum<adds, times>(into, begin + j * W, v);
      }
    }
  });
}

#if defined(MMEBM_NARROW)
// A single position and J outputs, two of which share a register, lane by lane: weights are read two at a time then.
template <int J>
void single(const NetPass& pass, const float* in, const int32_t* from, const float* weight, const float* bias,
            const Into& into, const int32_t* to, int64_t) {
  constexpr int PAIRS = (J + 1) / 2;
  const float* const at = in + static_cast<int64_t>(from[0]) * W;
  const auto two = [](const float* p) {
    double both;
    memcpy(&both, p, sizeof both);
    return in_turn(both);
  };
  float own[2 * PAIRS] = {}, before[2 * PAIRS * W] = {};
  if (bias) memcpy(own, bias, sizeof(float) * J);
  Register sum[PAIRS];
#pragma GCC unroll 16
  for (int k = 0; k < PAIRS; ++k) sum[k] = two(own + 2 * k);
  bool parts = false;
  for (int64_t s = 0; s < pass.segment_count; ++s) {
    const NetSegment& segment = pass.segments[s];
    if (segment.part) {
#pragma GCC unroll 16
      for (int k = 0; k < PAIRS; ++k) {
        float* const old = before + 2 * k * W;
        stored(old, parts ? add_rows(loaded(old), sum[k]) : sum[k]);
        sum[k] = set_rows(0.0f);
      }
      parts = true;
    }
    const int64_t begin = segment.offset * W, end = begin + segment.length * int64_t{W};
    for (int64_t i = begin; i < end; i += W, weight += J) {
      __builtin_prefetch(weight + AHEAD);
      const Register x = held(twice(load(at + i)));
#pragma GCC unroll 16
      for (int k = 0; k < PAIRS; ++k) sum[k] = multiply_add(held(two(weight + 2 * k)), x, sum[k]);
    }
  }
  const int64_t begin = static_cast<int64_t>(to[0]) * W;
  with_kind(into, [&](auto adds, auto times) {
#pragma GCC unroll 16
    for (int k = 0; k < PAIRS; ++k) {
      if (parts) sum[k] = add_rows(loaded(before + 2 * k * W), sum[k]);
      const Register rows = apart(sum[k]);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const int j = 2 * k + half;
        if (j == J) break;
        store_sum<adds, times>(into, begin + j * W, row_of(rows, half));
      }
    }
  });
}
#endif

struct Blocks {
  // whole, registers of positions, outputs; 0 registers: a single position
  Block of[2][MOST_REGISTERS + 1][MOST_OUTPUTS + 1];
};

template <int R, int J>
constexpr void fill(Blocks& table) {
  if constexpr (R * J <= REGISTERS) {
    table.of[0][R][J] = block<R, J, false>;
    table.of[1][R][J] = block<R, J, true>;
  }
#if defined(MMEBM_NARROW)
  if constexpr (R == 1) table.of[0][0][J] = table.of[1][0][J] = single<J>;
#endif
  if constexpr (J < MOST_OUTPUTS) {
    fill<R, J + 1>(table);
  } else if constexpr (R < MOST_REGISTERS) {
    fill<R + 1, 1>(table);
  }
}

constexpr Blocks blocks() {
  Blocks table = {};
  fill<1, 1>(table);
  return table;
}

constexpr Blocks BLOCKS = blocks();

// Where in the table a number of positions is.
MMEBM_INLINE int64_t registers_of(int64_t count) {
  return TOGETHER > 1 && count == 1 ? 0 : (count + TOGETHER - 1) / TOGETHER;
}

// What threads share of a pass: blocks of positions, or of outputs where there is but one of positions.
struct Units {
  NetSplit positions, outputs;

  static Units of(const NetPass& pass) {
    return {NetSplit::of(pass.positions, pass.block_positions), NetSplit::of(pass.outputs, pass.block_outputs)};
  }
  int64_t count() const { return positions.parts > 1 ? positions.parts : outputs.parts; }
};

// Units `first` to `last` of a pass, from rows counted from `base`; `after(first, outputs)` follows when the outputs of
// these units are there at all positions of a block.
template <class After>
void run_pass(const NetPass& pass, const Units& units, const float* base, Into into, const After& after, int64_t first,
              int64_t last) {
  const auto [positions, outputs] = units;
  const bool by_position = positions.parts > 1;
  const int64_t from = by_position ? first : 0, to = by_position ? last : positions.parts;
  const int64_t left = by_position ? 0 : first, right = by_position ? outputs.parts : last;
  const int64_t begin_output = outputs.begin(left), end_output = outputs.begin(right);
  const float* in = base + pass.in * W;
  const auto& blocks = BLOCKS.of[pass.whole];
  int64_t begin = positions.begin(from);
  for (int64_t i = from; i < to; ++i) {
    const int64_t count = positions.part(i);
    const float* weight = pass.weight + begin_output * pass.depth;
    int64_t j = begin_output;
    for (int64_t k = left; k < right; ++k) {
      const int64_t n = outputs.part(k);
      const Into here = {into.out + j * W, into.factor ? into.factor + j * W : nullptr, into.store};
      blocks[registers_of(count)][n](pass, in, pass.from + begin, weight, pass.bias ? pass.bias + j : nullptr, here,
                                     pass.to + begin, count);
      weight += n * pass.depth;
      j += n;
    }
    for (int64_t p = begin; p < begin + count; ++p) {
      after(into.out + (pass.to[p] + begin_output) * W, end_output - begin_output);
    }
    begin += count;
  }
}

// ------------------------------------------------------------------------------------------------------------- Winograd

// Along one axis: B^T d, of the M + R - 1 numbers that M outputs of R taps read, and A^T m, these outputs. The points are
// 0, 1, -1 and infinity, without -1 where there are three; a single output takes its taps as they are.
template <int M, int R>
MMEBM_INLINE void to_line(const F* d, F* to) {
  if constexpr (M == 1) {
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) to[i] = d[i];
  } else if constexpr (M + R == 4) {
    to[0] = sub(d[0], d[1]);
    to[1] = d[1];
    to[2] = sub(d[1], d[2]);
  } else {
    to[0] = sub(d[0], d[2]);
    to[1] = add(d[1], d[2]);
    to[2] = sub(d[2], d[1]);
    to[3] = sub(d[1], d[3]);
  }
}

template <int M, int R>
MMEBM_INLINE void from_line(const F* m, F* to) {
  if constexpr (M == 1) {
    to[0] = add(m[0], m[1]);
    if constexpr (R == 3) to[0] = add(to[0], m[2]);
  } else if constexpr (M + R == 4) {
    to[0] = add(m[0], m[1]);
    to[1] = sub(m[1], m[2]);
  } else {
    to[0] = add(add(m[0], m[1]), m[2]);
    to[1] = sub(m[1], m[2]);
    if constexpr (M == 2) {
      to[1] = sub(to[1], m[3]);
    } else {
      to[2] = sub(add(m[1], m[2]), m[3]);
    }
  }
}

// An address that is computed here: a compiler would keep all 32 of a tile's, most of them in memory.
template <class T>
MMEBM_INLINE T* pinned(T* p) {
  asm("" : "+r"(p));
  return p;
}

// B^T d B of a tile's inputs, channel by channel.
template <int R, int MY, int MX>
void to_points(const NetWinograd& w, const float* in, float* to) {
  constexpr int NY = MY + R - 1, NX = MX + R - 1;
  const int64_t point = w.in_point * W, pitch = w.in_pitch * W, step = w.in_step * W;
  for (int64_t phase = 0; phase < w.phase_count; ++phase) {
    const float* at = in + w.phases[phase] * int64_t{W};
    for (int64_t c = 0; c < w.channels; ++c, at += W, to += W) {
      F half[NY][NX], line[4];
      const float* lines[NY];
      lines[0] = at;
#pragma GCC unroll 4
      for (int y = 1; y < NY; ++y) lines[y] = pinned(lines[y - 1] + pitch);
#pragma GCC unroll 4
      for (int x = 0; x < NX; ++x) {
        F d[NY];
#pragma GCC unroll 4
        for (int y = 0; y < NY; ++y) d[y] = load(lines[y] + x * step);
        to_line<MY, R>(d, line);
#pragma GCC unroll 4
        for (int y = 0; y < NY; ++y) half[y][x] = line[y];
      }
      float* out = to;
#pragma GCC unroll 4
      for (int y = 0; y < NY; ++y) {
        to_line<MX, R>(half[y], line);
#pragma GCC unroll 4
        for (int x = 0; x < NX; ++x) store(out + x * point, line[x]);
        out = pinned(out + NX * point);
      }
    }
  }
}

// A^T m A: the outputs of a tile.
template <int R, int MY, int MX>
void from_points(const NetWinograd& w, const float* from, const Into& into, int64_t to) {
  constexpr int NY = MY + R - 1, NX = MX + R - 1;
  const int64_t point = w.out_point * W, pitch = w.out_pitch * W, step = w.out_step * W;
  with_kind(into, [&](auto adds, auto times) {
    for (int64_t j = 0; j < w.outputs; ++j) {
      F half[MY][NX], line[3];
      const float* lines[NY];
      lines[0] = from + j * W;
#pragma GCC unroll 4
      for (int y = 1; y < NY; ++y) lines[y] = pinned(lines[y - 1] + NX * point);
#pragma GCC unroll 4
      for (int x = 0; x < NX; ++x) {
        F m[NY];
#pragma GCC unroll 4
        for (int y = 0; y < NY; ++y) m[y] = load(lines[y] + x * point);
        from_line<MY, R>(m, line);
#pragma GCC unroll 3
        for (int y = 0; y < MY; ++y) half[y][x] = line[y];
      }
      const F bias = setf(w.bias ? w.bias[j] : 0.0f);
      int64_t at = (to + j) * W;
#pragma GCC unroll 3
      for (int y = 0; y < MY; ++y, at += pitch) {
        from_line<MX, R>(half[y], line);
#pragma GCC unroll 3
        for (int x = 0; x < MX; ++x) store_sum<adds, times>(into, at + x * step, add(line[x], bias));
      }
    }
  });
}

struct Tile {
  void (*to_points)(const NetWinograd& w, const float* in, float* to);
  void (*from_points)(const NetWinograd& w, const float* from, const Into& into, int64_t to);
};

template <int R, int MY, int MX>
constexpr Tile TILE = {to_points<R, MY, MX>, from_points<R, MY, MX>};

Tile tile_of(const NetWinograd& w) {
  constexpr Tile of[2][3][3] = {
      {{TILE<2, 1, 1>, TILE<2, 1, 2>, TILE<2, 1, 3>},
       {TILE<2, 2, 1>, TILE<2, 2, 2>, TILE<2, 2, 3>},
       {TILE<2, 3, 1>, TILE<2, 3, 2>, TILE<2, 3, 3>}},
      {{TILE<3, 1, 1>, TILE<3, 1, 2>}, {TILE<3, 2, 1>, TILE<3, 2, 2>}},
  };
  return of[w.taps - 2][w.height - 1][w.width - 1];
}

// `count` tiles from `begin` on, which have a thread's scratch for themselves.
struct Chunk {
  const NetWinograd& w;
  float* scratch;
  int64_t begin, count;

  float* outs() const { return scratch + w.point_count() * w.in_point * W; }
  void gather(const float* arena) const {
    const auto to_points = tile_of(w).to_points;
    for (int64_t t = 0; t < count; ++t) {
      to_points(w, arena + (w.in + w.from[begin + t]) * W, scratch + t * w.inputs() * W);
    }
  }
  void multiply(int64_t first, int64_t last) const {
    NetPass pass = w.points[first];
    pass.positions = count;
    const Units units = Units::of(pass);  // of all points: its divisions take as long as a block of sums
    for (int64_t f = first; f < last; ++f) {
      const auto nothing = [](float*, int64_t) {};
      run_pass(w.points[f], units, scratch, {outs() + f * w.out_point * W, nullptr, true}, nothing, 0, units.count());
    }
  }
  template <class After>
  void scatter(const Into& into, const After& after) const {
    const auto from_points = tile_of(w).from_points;
    for (int64_t t = 0; t < count; ++t) {
      const int64_t to = w.to[begin + t];
      from_points(w, outs() + t * w.outputs * W, into, to);
      for (int64_t y = 0; y < w.height; ++y) {
        for (int64_t x = 0; x < w.width; ++x) {
          after(into.out + (to + y * w.out_pitch + x * w.out_step) * W, w.outputs);
        }
      }
    }
  }
};

// ------------------------------------------------------------------------------------------------------------- elements

F sum_of(const NetTerm* terms, int64_t count, const float* at);

// The sum of terms at a row: up to 32 one after the other, more by halves, so that rounding errors stay those of a short
// sum.
MMEBM_INLINE F terms_of(const NetTerm* terms, int64_t count, const float* at) {
  if (count > 32) return sum_of(terms, count, at);
  F sum = setf(0.0f);
  for (int64_t k = 0; k < count; ++k) {
    sum = fma(setf(terms[k].weight), load(at + static_cast<int64_t>(terms[k].in) * W), sum);
  }
  return sum;
}

F sum_of(const NetTerm* terms, int64_t count, const float* at) {
  const int64_t half = count < 64 ? 32 : count / 64 * 32;
  return add(terms_of(terms, half, at), terms_of(terms + half, count - half, at));
}

// Rows `begin` to `end` of a run; `slope`: from a row that is written to the factor it is multiplied by, or 0 for none.
void map_rows(const NetRuns& runs, const NetRun& run, float* arena, bool store_it, int64_t slope, int64_t begin,
              int64_t end) {
  const NetTerm* terms = runs.terms + run.first;
  float* out = arena + static_cast<int64_t>(run.out) * W;
  for (int64_t r = begin * W; r < end * W; r += W) {
    F sum = terms_of(terms, run.terms, arena + r);
    if (!store_it) sum = add(load(out + r), sum);
    if (slope != 0) sum = through(sum, load(out + slope * W + r));
    store(out + r, sum);
  }
}

// Row `i` in memory order of a constant.
MMEBM_INLINE F constant(const NetConstant& c, const float* arena, int64_t i) {
  return c.numbers ? setf(c.numbers[i]) : load(arena + (c.rows + i) * W);
}

MMEBM_INLINE void put(float* to, F v, bool store_it) { store(to, store_it ? v : add(load(to), v)); }

MMEBM_INLINE F log_of(F x) {
  F twice[1];
  minus_two_log({x}, twice);
  return mul(setf(-0.5f), twice[0]);
}

// Operations on vectors that are worth another thread's while.
constexpr int64_t SHARED = NET_SHARED / 8;

struct Net {
  const NetPlan& plan;
  const NetRoom& room;
  float* arena = room.arena;

  float* row(int64_t r) const { return arena + r * W; }
  const NetValue& value(int32_t i) const { return plan.values[i]; }
  float* of(const NetRead& r) const { return row(value(r.value).value); }
  float* grad_of(const NetRead& r) const { return row(value(r.value).grad); }

  // -- what threads share

  // body(begin, end, scratch) over [0, items), in pieces of at least `least` items.
  template <class Body>
  void each(int64_t items, int64_t least, const Body& body) const {
    const int64_t pieces = pieces_of(room.team, items, least > 0 ? least : 1);
    if (pieces == 1) return body(int64_t{0}, items, room.scratch);
    room.team->share(pieces, room.scratch, [&](int64_t k, float* scratch) {
      body(items * k / pieces, items * (k + 1) / pieces, scratch);
    });
  }

  // body(row of a from its start, row of b, row of c, the first's number, how many) for the rows inside the borders of
  // values of one shape.
  template <class Body>
  void each_span(const NetValue& a, const NetValue& b, const NetValue& c, const Body& body) const {
    const int64_t line = a.width * a.channels;
    if (a.border_x + a.border_y + b.border_x + b.border_y + c.border_x + c.border_y == 0) {
      return each(a.height * line, SHARED, [&](int64_t begin, int64_t end, float*) {
        body(begin, begin, begin, begin, end - begin);
      });
    }
    each(a.height, SHARED / line, [&](int64_t begin, int64_t end, float*) {
      for (int64_t y = begin; y < end; ++y) body(a.at(y, 0), b.at(y, 0), c.at(y, 0), y * line, line);
    });
  }

  void map(const NetRuns& runs, bool store_it, int64_t slope) const {
    const int64_t least = runs.count * SHARED / (runs.products + 1);
    if (runs.count >= 2 * least) {
      return each(runs.count, least, [&](int64_t begin, int64_t end, float*) {
        for (int64_t i = begin; i < end; ++i) {
          map_rows(runs, runs.runs[i], arena, store_it, slope, 0, runs.runs[i].count);
        }
      });
    }
    for (int64_t i = 0; i < runs.count; ++i) {
      const NetRun& run = runs.runs[i];
      each(run.count, SHARED / (run.terms + 1), [&](int64_t begin, int64_t end, float*) {
        map_rows(runs, run, arena, store_it, slope, begin, end);
      });
    }
  }

  // run(pass, first unit, last unit) over all units of a node's passes, which write to different rows.
  template <class Run>
  void each_pass(const NetPass* passes, int64_t count, const Run& run) const {
    if (!room.team || room.team->helpers() == 0) {  // nothing to weigh
      for (int64_t i = 0; i < count; ++i) run(passes[i], 0, Units::of(passes[i]).count());
      return;
    }
    int64_t units = 0, products = 0;
    for (int64_t i = 0; i < count; ++i) {
      units += Units::of(passes[i]).count();
      products += passes[i].products();
    }
    each(units, units * NET_SHARED / (products + 1), [&](int64_t begin, int64_t end, float*) {
      for (int64_t i = 0, before = 0; i < count && before < end; ++i) {
        const int64_t here = Units::of(passes[i]).count();
        const int64_t first = begin > before ? begin - before : 0, last = end - before < here ? end - before : here;
        if (first < last) run(passes[i], first, last);
        before += here;
      }
    });
  }

  // Chunks of all kinds of tiles are shared, the first of each kind before the second ones: then the pieces from the front
  // and from the back, where others begin, are of about one size. Of a single one the points are.
  template <class IntoOf, class After>
  void tiled(const NetProducts& p, const IntoOf& into_of, const After& after) const {
    const auto run = [&](const NetWinograd& w, int64_t i, float* scratch) {
      const Chunk chunk = {w, scratch, i * w.chunk, i + 1 < w.chunks() ? w.chunk : w.tiles - i * w.chunk};
      chunk.gather(arena);
      chunk.multiply(0, w.point_count());
      chunk.scatter(into_of(w.out), after);
    };
    if (!room.team || room.team->helpers() == 0) {
      for (int64_t k = 0; k < p.tile_count; ++k) {
        for (int64_t i = 0; i < p.tiles[k].chunks(); ++i) run(p.tiles[k], i, room.scratch);
      }
      return;
    }
    int64_t chunks = 0, products = 0;
    for (int64_t k = 0; k < p.tile_count; ++k) {
      chunks = p.tiles[k].chunks() > chunks ? p.tiles[k].chunks() : chunks;
      products += p.tiles[k].products();
    }
    const int64_t units = chunks * p.tile_count;
    if (units == 1) {
      const NetWinograd& w = p.tiles[0];
      const Chunk all = {w, room.scratch, 0, w.tiles};
      all.gather(arena);
      each(w.point_count(), w.point_count() * NET_SHARED / (products + 1), [&](int64_t first, int64_t last, float*) {
        all.multiply(first, last);
      });
      return all.scatter(into_of(w.out), after);
    }
    each(units, units * NET_SHARED / (products + 1), [&](int64_t begin, int64_t end, float* scratch) {
      for (int64_t u = begin; u < end; ++u) {
        const NetWinograd& w = p.tiles[u % p.tile_count];
        if (u / p.tile_count < w.chunks()) run(w, u / p.tile_count, scratch);
      }
    });
  }

  // into_of(rows): where the sums go that are written from these rows on.
  template <class IntoOf, class After>
  void products(const NetProducts& p, const IntoOf& into_of, const After& after) const {
    tiled(p, into_of, after);
    each_pass(p.passes, p.pass_count, [&](const NetPass& pass, int64_t first, int64_t last) {
      run_pass(pass, Units::of(pass), arena, into_of(pass.out), after, first, last);
    });
  }

  // -- forward

  void elementwise(const NetNode& n) const {
    const NetValue& out = value(n.out);
    float* const y = row(out.value);
    for (int32_t k = 0; k < n.read_count; ++k) {
      const NetRead& read = n.reads[k];
      const float* x = of(read);
      const F by = setf(read.coefficient);
      const NetValue& second = value(n.reads[n.kind == NetKind::product ? 1 : k].value);
      each_span(out, value(read.value), second, [&](int64_t a, int64_t b, int64_t c, int64_t i, int64_t count) {
        for (int64_t r = 0; r < count; ++r, ++i) {
          F v = load(x + (b + r) * W);
          if (n.kind == NetKind::add) {
            v = k ? fma(by, v, load(y + (a + r) * W)) : mul(by, v);
            if (k + 1 == n.read_count && n.shift.present()) v = add(v, constant(n.shift, arena, i));
          } else if (n.kind == NetKind::affine) {
            v = n.shift.present() ? fma(constant(n.scale, arena, i), v, constant(n.shift, arena, i))
                                  : mul(constant(n.scale, arena, i), v);
          } else {
            const F by_second = load(row(second.value + c + r));
            v = n.divide ? div(v, by_second) : mul(v, by_second);
          }
          store(y + (a + r) * W, v);
        }
      });
      if (n.kind == NetKind::product) break;
    }
  }

  // The activation in place, or that of a node of its own.
  void activate_value(const NetNode& n, const NetValue& in) const {
    const NetValue& out = value(n.out);
    const float* const x = row(in.value);
    float *const y = row(out.value), *const slope = row(out.slope);
    each_span(out, in, in, [&](int64_t a, int64_t b, int64_t, int64_t, int64_t count) {
      activate(static_cast<Activation>(n.activation), n.slope, x + b * W, y + a * W, slope + a * W, count * W);
    });
  }

  template <class Body>
  void each_group(const NetNode& n, const Body& body) const {
    each(n.groups, SHARED / (4 * n.length), [&](int64_t begin, int64_t end, float*) {
      for (int64_t g = begin; g < end; ++g) body(g);
    });
  }

  void norm(const NetNode& n) const {
    const NetValue& out = value(n.out);
    const NetValue& in = value(n.reads[0].value);
    const F by = setf(1.0f / static_cast<float>(n.length));
    each_group(n, [&](int64_t g) {
      const int32_t *from = n.index + 2 * g * n.length, *to = from + n.length;
      Sum sum = no_sum();
      for (int64_t i = 0; i < n.length; ++i) {
        sum.part = add(sum.part, load(row(in.value + from[i])));
        next(sum);
      }
      const F mean = mul(whole(sum), by);
      sum = no_sum();
      for (int64_t i = 0; i < n.length; ++i) {
        const F v = sub(load(row(in.value + from[i])), mean);
        sum.part = fma(v, v, sum.part);
        next(sum);
      }
      const F scale = div(setf(1.0f), sqrt(fma(whole(sum), by, setf(n.eps))));
      store(row(n.scratch + g), scale);
      for (int64_t i = 0; i < n.length; ++i) {
        const F v = mul(sub(load(row(in.value + from[i])), mean), scale);
        store(row(out.value + to[i]), v);
        store(row(n.scratch + n.groups + g * n.length + i), v);
      }
    });
  }

  void norm_back(const NetNode& n) const {
    const NetValue& out = value(n.out);
    const NetRead& read = n.reads[0];
    const F by = setf(1.0f / static_cast<float>(n.length));
    each_group(n, [&](int64_t g) {
      const int32_t *from = n.index + 2 * g * n.length, *to = from + n.length;
      Sum sum = no_sum(), along = no_sum();
      for (int64_t i = 0; i < n.length; ++i) {
        const F d = load(row(out.grad + to[i]));
        sum.part = add(sum.part, d);
        along.part = fma(d, load(row(n.scratch + n.groups + g * n.length + i)), along.part);
        next(sum);
        next(along);
      }
      const F mean = mul(whole(sum), by), slope = mul(whole(along), by), scale = load(row(n.scratch + g));
      for (int64_t i = 0; i < n.length; ++i) {
        const F v = load(row(n.scratch + n.groups + g * n.length + i));
        const F d = sub(sub(load(row(out.grad + to[i])), mean), mul(v, slope));
        put(row(value(read.value).grad + from[i]), mul(d, scale), read.store);
      }
    });
  }

  // scratch: exp(x - log sum exp), the derivatives
  void logsumexp(const NetNode& n) const {
    const NetValue& in = value(n.reads[0].value);
    const F top = setf(3.4028234e38f), zero = setf(0.0f);
    for (int64_t g = 0; g < n.groups; ++g) {
      const int32_t* from = n.index + g * n.length;
      F most = load(row(in.value + from[0]));
      for (int64_t i = 1; i < n.length; ++i) most = max(load(row(in.value + from[i])), most);
      // of an infinite or all but infinite maximum nothing is taken off, as torch has it
      const F shift = select(greater(abs(most), top), zero, most);
      Sum sum = no_sum();
      for (int64_t i = 0; i < n.length; ++i) {
        const F e = activation<Activation::exp>(sub(load(row(in.value + from[i])), shift), zero).value;
        store(row(n.scratch + g * n.length + i), e);
        sum.part = add(sum.part, e);
        next(sum);
      }
      const F total = whole(sum);
      for (int64_t i = 0; i < n.length; ++i) {
        float* const at = row(n.scratch + g * n.length + i);
        store(at, div(load(at), total));
      }
      const F inside = add(log_of(total), shift);
      const F nothing = sub(total, total);  // NaN where the sum is infinite or NaN
      const F out = select(unequal(nothing, nothing), add(total, shift),
                           select(greater(total, zero), inside, sub(zero, setf(__builtin_inff()))));
      store(row(value(n.out).value + n.index[n.groups * n.length + g]), out);
    }
  }

  void logsumexp_back(const NetNode& n) const {
    const NetRead& read = n.reads[0];
    for (int64_t g = 0; g < n.groups; ++g) {
      const F d = load(row(value(n.out).grad + n.index[n.groups * n.length + g]));
      for (int64_t i = 0; i < n.length; ++i) {
        float* const to = row(value(read.value).grad + n.index[g * n.length + i]);
        store(to, fma(d, load(row(n.scratch + g * n.length + i)), load(to)));
      }
    }
  }

  void forward() const {
    for (int64_t k = 0; k < plan.node_count; ++k) {
      const NetNode& n = plan.nodes[k];
      const NetValue& out = value(n.out);
      if (n.kind == NetKind::product_sum) {
        const int64_t slope = (out.slope - out.value) * W;
        products(n.forward, [&](int64_t rows) { return Into{row(rows), nullptr, !n.accumulate}; },
                 [&](float* y, int64_t outputs) {
                   if (n.activation < 0) return;
                   activate(static_cast<Activation>(n.activation), n.slope, y, y, y + slope, outputs * W);
                 });
        continue;
      }
      switch (n.kind) {
        case NetKind::input:
        case NetKind::map: map(n.runs, true, 0); break;
        case NetKind::activation: activate_value(n, value(n.reads[0].value)); continue;
        case NetKind::add:
        case NetKind::affine:
        case NetKind::product: elementwise(n); break;
        case NetKind::norm: norm(n); break;
        case NetKind::logsumexp: logsumexp(n); break;
        case NetKind::product_sum: break;
      }
      if (n.activation >= 0) activate_value(n, out);
    }
  }

  // -- backward

  // From a row of the gradient that is read to the factor that follows it, 0 for none.
  int64_t slope_of(const NetNode& n, const NetRead& read) const {
    if (!read.times || n.kind == NetKind::input) return 0;
    return value(read.value).slope - value(read.value).grad;
  }

  void elementwise_back(const NetNode& n) const {
    const NetValue& out = value(n.out);
    const float* const d = row(out.grad);
    for (int32_t k = 0; k < n.read_count; ++k) {
      const NetRead& read = n.reads[k];
      if (!read.needed) continue;
      const NetValue& in = value(read.value);
      float* const to = row(in.grad);
      const int64_t slope = slope_of(n, read);
      const F by = setf(read.coefficient);
      const NetValue& other = value(n.reads[n.kind == NetKind::product ? 1 - k : k].value);
      each_span(out, in, other, [&](int64_t a, int64_t b, int64_t c, int64_t i, int64_t count) {
        for (int64_t r = 0; r < count; ++r, ++i) {
          F v = load(d + (a + r) * W);
          if (n.kind == NetKind::add) {
            v = mul(by, v);
          } else if (n.kind == NetKind::affine) {
            v = mul(constant(n.scale, arena, i), v);
          } else if (n.kind == NetKind::activation) {
            v = through(v, load(row(out.slope + a + r)));
          } else if (!n.divide) {
            v = mul(v, load(row(other.value + c + r)));
          } else if (k == 0) {
            v = div(v, load(row(other.value + c + r)));
          } else {  // -(a / b) / b
            const F ratio = div(load(row(out.value + a + r)), load(row(in.value + b + r)));
            v = sub(setf(0.0f), mul(v, ratio));
          }
          float* const at = to + (b + r) * W;
          if (!read.store) v = add(load(at), v);
          if (slope != 0) v = through(v, load(at + slope * W));
          store(at, v);
        }
      });
    }
  }

  void backward() const {
    const NetValue& last = value(plan.last);
    store(row(last.grad + last.at(0, 0)), setf(1.0f));  // a convolution's value has a border
    for (int64_t k = plan.node_count - 1; k >= 0; --k) {
      const NetNode& n = plan.nodes[k];
      const NetValue& out = value(n.out);
      if (out.grad < 0) continue;
      if (n.multiply) {
        each_span(out, out, out, [&](int64_t a, int64_t, int64_t, int64_t, int64_t count) {
          for (int64_t r = a; r < a + count; ++r) {
            store(row(out.grad + r), through(load(row(out.grad + r)), load(row(out.slope + r))));
          }
        });
      }
      switch (n.kind) {
        case NetKind::product_sum: {
          const NetRead& read = n.reads[0];
          if (!read.needed) break;
          const NetValue& in = value(read.value);
          const auto into_of = [&](int64_t rows) {
            float* const to = row(rows);
            return Into{to, read.times ? to + (in.slope - in.grad) * W : nullptr, read.store};
          };
          products(n.backward, into_of, [](float*, int64_t) {});
          break;
        }
        case NetKind::input:
        case NetKind::map:
          for (int32_t i = 0; i < n.read_count; ++i) {
            if (n.reads[i].needed) map(n.reads[i].back, n.reads[i].store, slope_of(n, n.reads[i]));
          }
          break;
        case NetKind::activation:
        case NetKind::add:
        case NetKind::affine:
        case NetKind::product: elementwise_back(n); break;
        case NetKind::norm:
          if (n.reads[0].needed) norm_back(n);
          break;
        case NetKind::logsumexp:
          if (!n.reads[0].needed) break;
          if (n.reads[0].store) {
            const NetValue& in = value(n.reads[0].value);
            memset(row(in.grad), 0, sizeof(float) * static_cast<size_t>(in.rows() * W));
          }
          logsumexp_back(n);
          break;
      }
    }
  }
};

void fill_constant(const NetConstant& c, int64_t elements, const Rows<1>& t, float* arena) {
  if (!c.chains) return;
  for (int lane = 0; lane < W; ++lane) {
    const float* from = c.chains + t.chain_of(lane) * elements;
    for (int64_t i = 0; i < elements; ++i) arena[(c.rows + i) * W + lane] = from[c.order[i]];
  }
}

void tile(const ChainJob& job, const NetPlan& plan, int64_t first, const NetRoom& room) {
  float* const arena = room.arena;
  const int64_t left = job.chains - first;
  Rows<1> t = {job, first, left < W ? left : W, arena + plan.state * W, arena + plan.grad * W, arena + plan.old * W,
               arena + plan.energy * W, arena + plan.dead * W, arena + plan.row * W, nullptr, room.team};
  const Net net = {plan, room};
  gather(t, job.x, job.inputs, job.inputs, t.x);
  if (job.observed) {
    t.observed = reinterpret_cast<uint8_t*>(arena + plan.observed * W);
    gather(t, job.observed, job.observed_stride, job.inputs, t.observed);
  }
  for (int64_t k = 0; k < plan.node_count; ++k) {
    const NetNode& n = plan.nodes[k];
    fill_constant(n.scale, plan.values[n.out].elements(), t, arena);
    fill_constant(n.shift, plan.values[n.out].elements(), t, arena);
  }
  const auto evaluate = [&](bool energy) {
    net.forward();
    net.backward();
    const NetValue& last = plan.values[plan.last];
    if (energy) store(t.energy, load(net.row(last.value + last.at(0, 0))));
  };
  if (job.gradient) {
    evaluate(true);
    record(t, t.energy, job.energy);
    scatter(t, t.g, job.inputs, job.gradient);
    return;
  }
  run_steps(t, evaluate);
}

}  // namespace

const NetLoops MMEBM_LOOPS(net_loops) = {W, TOGETHER, REGISTERS, MOST_REGISTERS, MOST_OUTPUTS, tile};

}  // namespace mmebm
