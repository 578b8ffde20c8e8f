// Normals (and words for stochastic rounding) of consecutive elements of chains, in vectors: what the kernels of the CPU
// ops draw into a tile's buffer. How the lanes are laid out: see langevin_step/cpu_kernel.cpp.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/philox_vec.h"
#include "common/tile.h"
#include "common/vec.h"

namespace mmebm {
namespace {

// Vectors of counters that are worked on side by side.
constexpr int TURN = 2;
// Where 16 registers are all there are, all words of a tile are made before the first normal: both at once do not fit.
constexpr bool WORDS_FIRST = W < 16;
// Noise may overhang its tile by what one turn makes.
constexpr int64_t PADDED = TILE + 4 * W * TURN + 16;

MMEBM_INLINE uint32_t counter_of_lane(int lane) { return static_cast<uint32_t>(W / 4 * (lane % 4) + lane / 4); }

// W blocks, lanes in the order of counter_of_lane, to the order of elements: 4 W floats, or the words' 16 W bytes.
template <bool NORMALS>
MMEBM_INLINE void emit(I w0, I w1, I w2, I w3, char* out) {
  F even[2] = {as_float(w0), as_float(w2)}, odd[2] = {as_float(w1), as_float(w3)};
  if (NORMALS) box_muller({w0, w2}, {w1, w3}, even, odd);
  transpose(even[0], odd[0], even[1], odd[1]);
  storei(out, as_int(even[0]));
  storei(out + 4 * W, as_int(odd[0]));
  storei(out + 8 * W, as_int(even[1]));
  storei(out + 12 * W, as_int(odd[1]));
}

template <bool NORMALS>
MMEBM_INLINE void emit(const Counters& even, const Counters& odd, char* out) {
  emit<NORMALS>(interleave(even.c0, odd.c0), interleave(even.c1, odd.c1), interleave(even.c2, odd.c2),
                interleave(even.c3, odd.c3), out);
}

// The same in two parts, with the words in the place of what they become.
MMEBM_INLINE void keep(const Counters& even, const Counters& odd, char* out) {
  storei(out, interleave(even.c0, odd.c0));
  storei(out + 4 * W, interleave(even.c1, odd.c1));
  storei(out + 8 * W, interleave(even.c2, odd.c2));
  storei(out + 12 * W, interleave(even.c3, odd.c3));
}

template <bool NORMALS>
MMEBM_INLINE void emit_kept(char* out) {
  const auto word = [out](int i) { return as_int(load(reinterpret_cast<const float*>(out + 4 * W * i))); };
  emit<NORMALS>(word(0), word(1), word(2), word(3), out);
}

// Blocks [first, first + count) of one chain, up to a multiple of TURN W of them.
template <bool NORMALS>
MMEBM_INLINE void draw_chain(Key key, uint32_t chain, int64_t first, int64_t count, char* out) {
  OneChain s;
  OneChain::init(s, key, chain);
  alignas(64) uint32_t lanes_of[2 * TURN][W];
  for (int i = 0; i < 2 * TURN; ++i) {
    for (int lane = 0; lane < W; lane += 2) {
      lanes_of[i][lane] = static_cast<uint32_t>(first + i / 2 * W) + counter_of_lane(lane + i % 2);
      lanes_of[i][lane + 1] = 0;
    }
  }
  I block[2 * TURN];
  for (int i = 0; i < 2 * TURN; ++i) block[i] = loadi(lanes_of[i]);
  for (int64_t done = 0; done < count; done += TURN * W) {
    Counters c[2 * TURN];
    philox_one<2 * TURN>(block, s, c);
#pragma GCC unroll 2
    for (int i = 0; i < TURN; ++i) {
      char* const to = out + 16 * (done + i * W);
      WORDS_FIRST ? keep(c[2 * i], c[2 * i + 1], to) : emit<NORMALS>(c[2 * i], c[2 * i + 1], to);
    }
    for (int i = 0; i < 2 * TURN; ++i) block[i] = addi(block[i], seti(TURN * W));
  }
  if (!WORDS_FIRST) return;
  for (int64_t done = 0; done < count; done += W) emit_kept<NORMALS>(out + 16 * done);
}

// All blocks of `rows` chains, `elements` elements each, 16 / SIZE elements a block.
template <bool NORMALS, int SIZE>
MMEBM_INLINE void draw_chains(Key key, uint32_t chain, int64_t rows, int64_t elements, char* out) {
  constexpr int64_t PER = 16 / SIZE;
  const int64_t blocks = (elements + PER - 1) / PER, total = rows * blocks;
  const int64_t last = (elements - (blocks - 1) * PER) * SIZE;  // bytes of a chain's last block that are its own
  OneChain s;
  OneChain::init(s, key, 0);
  I block[TURN], row[TURN];
  for (int i = 0; i < TURN; ++i) {
    alignas(64) uint32_t block0[W], row0[W];
    for (int lane = 0; lane < W; ++lane) {
      const int64_t at = i * W + counter_of_lane(lane);
      block0[lane] = static_cast<uint32_t>(at % blocks);
      row0[lane] = chain + static_cast<uint32_t>(at / blocks);
    }
    block[i] = loadi(block0);
    row[i] = loadi(row0);
  }
  const I stride = seti(static_cast<uint32_t>(TURN * W % blocks));
  const I row_stride = seti(static_cast<uint32_t>(TURN * W / blocks));
  const I limit = seti(static_cast<uint32_t>(blocks)), zero = seti(0), one = seti(1);
  const I step = seti64(key.step), stream = seti64(key.stream);
  int64_t column = 0;
  for (int64_t done = 0; done < total; done += TURN * W) {
    Counters c[2 * TURN];
#pragma GCC unroll 2
    for (int i = 0; i < TURN; ++i) {
      c[2 * i] = {block[i], row[i], step, stream};
      c[2 * i + 1] = {high_half(block[i]), high_half(row[i]), step, stream};
      block[i] = addi(block[i], stride);
      row[i] = addi(addi(row[i], row_stride), where_less(block[i], limit, zero, one));
      block[i] = subi(block[i], where_less(block[i], limit, zero, limit));
    }
    rounds<0, 2 * TURN>(c, s);
    alignas(64) char group[16 * W * TURN];
    char* const to = last == 16 ? out : group;
#pragma GCC unroll 2
    for (int i = 0; i < TURN; ++i) emit<NORMALS>(c[2 * i], c[2 * i + 1], to + 16 * W * i);
    if (last == 16) {  // chains follow each other without a gap
      out += 16 * W * TURN;
      continue;
    }
    const int64_t inside = total - done < TURN * W ? total - done : TURN * W;
    for (int64_t j = 0; j < inside; ++j) {
      memcpy(out, group + 16 * j, 16);
      const bool ends = ++column == blocks;
      column = ends ? 0 : column;
      out += ends ? last : 16;
    }
  }
}

// The noise of elements [begin, end) of chains [row, row + rows), row-major; rows > 1 only for whole chains.
template <bool NORMALS, int SIZE>
void draw(Key key, uint32_t chain, int64_t rows, int64_t begin, int64_t end, void* buffer) {
  constexpr int64_t PER = 16 / SIZE;
  char* out = static_cast<char*>(buffer);
  const int64_t elements = end - begin;
  const int64_t turn = PER * W * TURN, made = (elements + turn - 1) / turn * turn;
  // By chain where at most one lane in 16 is wasted on what lies behind the chain's end.
  if (rows == 1 || made * 16 <= elements * 17) {
    for (int64_t r = 0; r < rows; ++r) {
      draw_chain<NORMALS>(key, chain + static_cast<uint32_t>(r), begin / PER, (elements + PER - 1) / PER,
                          out + r * elements * SIZE);
    }
  } else {
    draw_chains<NORMALS, SIZE>(key, chain, rows, elements, out);
  }
}

}  // namespace
}  // namespace mmebm
