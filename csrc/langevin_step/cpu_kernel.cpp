// The loops of langevin_step, compiled once per instruction set (common/isa.h). job.h says how the work is cut into
// tiles.
//
// Noise. Per W counters (a vector of them, 16 with AVX-512) ten rounds of Philox give 4 W words, which Box-Muller turns
// into 4 W normals. What the speed comes from:
//   * what philox_vec.h says; a round waits for the one before it, so TURN vectors of counters go through the rounds
//     side by side;
//   * inside one chain the second counter word, step and stream are the same for all lanes, so that one of the two
//     products of rounds 1 and 2 is a scalar, done once per tile;
//   * lane l holds counter W/4 (l % 4) + l / 4, so that after a 4 x 4 transposition inside groups of four lanes the
//     four registers are 4 W consecutive elements: no shuffle crosses a group.
// Chains too short to fill vectors (10 elements are 3 counters) share them: lanes then hold counters of several chains,
// and each block's elements are stored where they belong. A block of 16 bytes overhangs its chain by up to 3 elements,
// which the next chain's first block overwrites; the buffer has room for the last.
//
// Update. One loop over the tile reads x, gradient and noise and writes x. With scalar constants the loop is compiled
// for each set of options (`plain`); per-element constants, masks and counts go through one loop that asks at run time
// (`general`). Per-chain constants, norm clips and statistics take the tile chain by chain. Sums of squares are in
// double over 16 fixed lanes: products of two floats are exact there, so every instruction set gives the same bits.
//
// NaN. max and min return the second operand where one is NaN (vec.h) and are called so that a NaN state
// or gradient stays NaN, as torch.clamp does. Nothing here is compiled with -ffast-math.
//
// Every multiplication that meets an addition is written as `fma` in both loops, so that the compiler finds nothing to
// fuse in one of them only. With and without fused multiply-add results differ in the last bits: AVX2 and AVX-512 agree
// bit for bit, the generic loops agree with them within the 2e-6 of the normals.
//
// Limits: chains and steps count modulo 2^32; a chain has fewer than 2^32 blocks of 4 elements (checked by the caller).
#include <cstdint>
#include <cstring>

#include "common/half.h"
#include "common/noise_vec.h"
#include "common/philox_vec.h"
#include "common/rule_vec.h"
#include "langevin_step/job.h"

namespace mmebm {
namespace {

// The purposes of noise.py that this op draws for, besides DRIFT = 0.
constexpr uint32_t ROUNDING = 4, PERTURB_ROUNDING = 5;

// --------------------------------------------------------------------------------------------------------------- noise

void normals(const uint32_t* words, float* out, int64_t blocks) {
  for (int64_t first = 0; first < blocks; first += W) {
    alignas(64) uint32_t w[4][W];
    alignas(64) float group[4 * W];
    const int64_t inside = blocks - first < W ? blocks - first : W;
    for (int lane = 0; lane < W; ++lane) {
      const int64_t block = first + (counter_of_lane(lane) < inside ? counter_of_lane(lane) : 0);
      for (int j = 0; j < 4; ++j) w[j][lane] = words[4 * block + j];
    }
    emit<true>(loadi(w[0]), loadi(w[1]), loadi(w[2]), loadi(w[3]), reinterpret_cast<char*>(group));
    memcpy(out + 4 * first, group, 16 * static_cast<size_t>(inside));
  }
}

// ------------------------------------------------------------------------------------------------------ 16-bit storage

void widen(const void* from, Storage storage, float* to, int64_t n) {
  const uint16_t* h = static_cast<const uint16_t*>(from);
  if (storage == Storage::bf16) {
    for (int64_t i = 0; i < n; ++i) to[i] = from_bf16(h[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = from_fp16(h[i]);
  }
}

// reference.stochastic_round: the lower neighbour, or the upper one if the fraction between them exceeds (h + 1/2)
// 2^-16.
MMEBM_INLINE uint16_t round_bf16(float y, uint32_t h) {
  const uint32_t bits = float_bits(y), low = bits & 0xffffu;
  const bool negative = (bits >> 31) != 0;
  // away from zero is up for a positive, and "not up" for a negative number that is not representable
  const bool away = negative ? (low != 0) & (0x10000u - low <= h) : low > h;
  const uint32_t rounded = (bits >> 16) + (away ? 1u : 0u);
  const uint32_t special = (bits >> 16) | (low != 0 || (bits & 0x7fffffu) != 0 ? 0x40u : 0u);
  return static_cast<uint16_t>((bits & 0x7f800000u) == 0x7f800000u ? special : rounded);
}

MMEBM_INLINE uint16_t round_fp16(float y, uint32_t h) {
  const uint32_t bits = float_bits(y), sign = (bits >> 16) & 0x8000u;
  uint32_t exponent = (bits >> 23) & 0xffu;
  const bool special = exponent == 0xffu;
  exponent = exponent < 113u ? 113u : exponent;  // below 2^-14 the grid is that of 2^-14
  exponent = special ? 127u : exponent;
  // y 2^(10 - e) lies below 2^11; every step is exact
  const float scaled = bits_float(bits & 0x7fffffffu) * bits_float((264u - exponent) << 23);
  const float whole = static_cast<float>(static_cast<int32_t>(special ? 0.0f : scaled));
  const float fraction = scaled - whole;
  const float threshold = (static_cast<float>(static_cast<int32_t>(h)) + 0.5f) * 0x1p-16f;
  const bool away = sign ? (fraction > 0.0f) & !(1.0f - fraction > threshold) : fraction > threshold;
  const uint32_t units = static_cast<uint32_t>(static_cast<int32_t>(whole)) + (away ? 1u : 0u);
  // units of 2^(e - 10): 2^10 of them carry into the exponent field by themselves, as 2^11 do
  const uint32_t field = ((exponent - 113u) << 10) + units;
  const uint32_t finite = field > 0x7c00u ? 0x7c00u : field;
  const uint32_t not_finite = 0x7c00u | ((bits & 0x7fffffu) != 0 ? 0x200u : 0u);
  return static_cast<uint16_t>(sign | (special ? not_finite : finite));
}

void round_to(const float* y, Storage storage, const uint16_t* h, void* to, int64_t n) {
  uint16_t* out = static_cast<uint16_t*>(to);
  if (storage == Storage::bf16) {
    for (int64_t i = 0; i < n; ++i) out[i] = round_bf16(y[i], h[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = round_fp16(y[i], h[i]);
  }
}

// ---------------------------------------------------------------------------------------------------------------- sums

MMEBM_INLINE double lanes_sum(double* lane) {
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  }
  return lane[0];
}

// 16 elements from p on, as far as there are: the rest is 0. By vectors, so that what reads `out` need not wait for it.
MMEBM_INLINE void load_16(float* out, const float* p, int64_t n) {
  for (int i = 0; i < 16; i += W) {
    const int64_t rest = n - i;
    store(out + i, rest >= W ? load(p + i) : rest > 0 ? load(p + i, static_cast<int>(rest)) : setf(0.0f));
  }
}

// Of clamp(g, -clip, clip), where CLIP; a NaN stays.
template <bool CLIP>
double square_sum(const float* g, int64_t n, float clip) {
  alignas(64) double lane[16] = {};
  for (int64_t i = 0; i < n; i += 16) {
    alignas(64) float v[16];
    load_16(v, g + i, n - i);
    for (int j = 0; j < 16; ++j) {
      if (CLIP) {
        v[j] = v[j] < -clip ? -clip : v[j];
        v[j] = v[j] > clip ? clip : v[j];
        v[j] = i + j < n ? v[j] : 0.0f;  // a negative limit makes something of nothing
      }
      lane[j] += static_cast<double>(v[j]) * static_cast<double>(v[j]);
    }
  }
  return lanes_sum(lane);
}

// The same with a limit per element.
double square_sum(const float* g, int64_t n, const float* clip) {
  double lane[16] = {};
  for (int64_t i = 0; i < n; ++i) {
    float v = g[i];
    v = v < -clip[i] ? -clip[i] : v;
    v = v > clip[i] ? clip[i] : v;
    lane[i % 16] += static_cast<double>(v) * static_cast<double>(v);
  }
  return lanes_sum(lane);
}

double moved_sum(const float* y, const float* x, int64_t n) {
  alignas(64) double lane[16] = {};
  for (int64_t i = 0; i < n; i += 16) {
    alignas(64) float to[16], from[16];
    load_16(to, y + i, n - i);
    load_16(from, x + i, n - i);
    for (int j = 0; j < 16; ++j) {
      const float moved = to[j] - from[j];
      lane[j] += static_cast<double>(moved) * static_cast<double>(moved);
    }
  }
  return lanes_sum(lane);
}

// y - y is 0 for a number and NaN for what is not finite.
int64_t nonfinite_count(const float* y, int64_t n) {
  int64_t total = 0;
  for (int64_t i = 0; i < n; i += W) {
    const int m = n - i < W ? static_cast<int>(n - i) : W;
    const F v = load(y + i, m);
    total += count(both(lanes(m), unequal(sub(v, v), sub(v, v))));
  }
  return total;
}

// -------------------------------------------------------------------------------------------------------------- update

// The constants as one loop sees them: scalars, or per element from the loop's first on.
struct Values {
  bool has[SLOTS];
  float value[SLOTS];  // PRIOR_STD inverted (1 / std^2 could overflow)
  const float* element[SLOTS];
  float sign;  // of the gradient
  float norm;  // what GRAD_NORM_CLIP is compared with
};

MMEBM_INLINE void at_chain(const StepJob& job, const StepTensor& t, int64_t chain, int64_t base, Values& v) {
  for (int s = 0; s < SLOTS; ++s) {
    const Constant& c = t.constants[s];
    v.has[s] = c.kind != Kind::absent;
    v.element[s] = c.kind == Kind::element ? c.values + base : nullptr;
    const double value = c.kind == Kind::chain ? static_cast<double>(c.values[chain]) : c.value;
    v.value[s] = static_cast<float>(s == PRIOR_STD ? 1.0 / value : value);
  }
  // An absent bound is an infinite one: the clamp with it changes nothing, a NaN neither.
  if (!v.has[LOW]) v.value[LOW] = -__builtin_inff();
  if (!v.has[HIGH]) v.value[HIGH] = __builtin_inff();
  v.sign = job.options & SCORE ? -1.0f : 1.0f;
  v.norm = 0.0f;
}

enum { O_GRAD = 1, O_CLIP = 2, O_PRIOR = 4, O_NOISE = 8, O_MAX_UPDATE = 16, O_BOUNDS = 32 };

template <int OPTIONS>
void plain(float* out, const float* x, const float* g, const float* z, int64_t n, const Values& v) {
  constexpr With with = {(OPTIONS & O_GRAD) != 0, (OPTIONS & O_CLIP) != 0, false, (OPTIONS & O_PRIOR) != 0,
                         (OPTIONS & O_NOISE) != 0, (OPTIONS & O_MAX_UPDATE) != 0};
  const F zero = setf(0.0f), low = setf(v.value[LOW]), high = setf(v.value[HIGH]);
  const Rates c = {setf(v.value[GRAD_CLIP]), zero, setf(v.value[PRIOR_STD]), setf(v.sign * v.value[PRIOR_STD]),
                   setf(-v.sign * v.value[STEP_SIZE]), setf(v.value[NOISE_SCALE]), setf(v.value[MAX_UPDATE])};
  const auto updated = [&](F xi, F gi, F zi) {
    M changed = none();
    const F y = proposed(with, c, xi, gi, zi, changed);
    return OPTIONS & O_BOUNDS ? clamp(y, low, high) : y;
  };
  int64_t i = 0;
#pragma GCC unroll 2
  for (; i + W <= n; i += W) {
    store(out + i, updated(load(x + i), with.grad ? load(g + i) : zero, with.noise ? load(z + i) : zero));
  }
  if (i < n) {
    const int rest = static_cast<int>(n - i);
    const F gi = with.grad ? load(g + i, rest) : zero, zi = with.noise ? load(z + i, rest) : zero;
    store(out + i, updated(load(x + i, rest), gi, zi), rest);
  }
}

using Plain = void (*)(float*, const float*, const float*, const float*, int64_t, const Values&);
// Without a gradient only noise and bounds are left.
#define MMEBM_ONE(n) plain<(n) & O_GRAD ? (n) : (n) & (O_NOISE | O_BOUNDS)>
#define MMEBM_FOUR(n) MMEBM_ONE(n), MMEBM_ONE((n) + 1), MMEBM_ONE((n) + 2), MMEBM_ONE((n) + 3)
#define MMEBM_SIXTEEN(n) MMEBM_FOUR(n), MMEBM_FOUR((n) + 4), MMEBM_FOUR((n) + 8), MMEBM_FOUR((n) + 12)
const Plain PLAIN[64] = {MMEBM_SIXTEEN(0), MMEBM_SIXTEEN(16), MMEBM_SIXTEEN(32), MMEBM_SIXTEEN(48)};
#undef MMEBM_ONE
#undef MMEBM_FOUR
#undef MMEBM_SIXTEEN

struct Found {
  int64_t clipped;
  bool outside;
};

MMEBM_INLINE F get(const Values& v, Slot s, int64_t i, int n) {
  return v.element[s] ? load(v.element[s] + i, n) : setf(v.value[s]);
}

// Everything, asked at run time. `keep`: observed elements, or null. `reject`: low and high are only compared with, and
// not where observed.
Found general(float* out, const float* x, const float* g, const float* z, const uint8_t* keep, int64_t n,
              const Values& v, bool bounds, bool reject) {
  int64_t clipped = 0;
  M outside = none();
  const F zero = setf(0.0f), one = setf(1.0f), sign = setf(v.sign);
  const With with = {g != nullptr, g && v.has[GRAD_CLIP], g && v.has[GRAD_NORM_CLIP], g && v.has[PRIOR_STD],
                     z != nullptr, g && v.has[MAX_UPDATE]};
  const bool bounded = bounds && (v.has[LOW] || v.has[HIGH]);
  for (int64_t i = 0; i < n; i += W) {
    const int m = n - i < W ? static_cast<int>(n - i) : W;
    const M valid = lanes(m);
    M changed = none();
    Rates c = {zero, zero, zero, zero, zero, zero, zero};
    if (with.clip) c.clip = get(v, GRAD_CLIP, i, m);
    if (with.norm_clip) c.factor = norm_factor(setf(v.norm), get(v, GRAD_NORM_CLIP, i, m));
    if (with.prior) {
      c.inverse = v.element[PRIOR_STD] ? div(one, load(v.element[PRIOR_STD] + i, m)) : setf(v.value[PRIOR_STD]);
      c.pull = mul(sign, c.inverse);
    }
    if (with.grad) c.drift = mul(sub(zero, sign), get(v, STEP_SIZE, i, m));
    if (with.noise) c.scale = get(v, NOISE_SCALE, i, m);
    if (with.max_update) c.most = get(v, MAX_UPDATE, i, m);
    const F xi = load(x + i, m);
    F y = proposed(with, c, xi, g ? load(g + i, m) : zero, z ? load(z + i, m) : zero, changed);
    const M stays = keep ? bytes(keep + i, m) : none();
    if (bounded) {
      const F inside = clamp(y, get(v, LOW, i, m), get(v, HIGH, i, m));
      if (reject) {
        outside = either(outside, without(both(valid, unequal(inside, y)), stays));
      } else {
        y = inside;
      }
    }
    if (keep) y = select(stays, xi, y);
    store(out + i, y, m);
    clipped += count(both(valid, changed));
  }
  return {clipped, count(outside) != 0};
}

// --------------------------------------------------------------------------------------------------------------- tiles

struct Span {
  int64_t row, rows, begin, end, slot;
};

MMEBM_INLINE Span span_of(const StepJob& job, const StepTensor& t, int64_t tile) {
  if (t.parts == 1) {
    const int64_t row = tile * t.rows, left = job.chains - row;
    return {row, left < t.rows ? left : t.rows, 0, t.numel, t.first_slot + row};
  }
  const int64_t row = tile / t.parts, begin = tile % t.parts * t.part, end = begin + t.part;
  return {row, 1, begin, end < t.numel ? end : t.numel, t.first_slot + tile};
}

MMEBM_INLINE double clipped_squares(const float* g, int64_t n, const Values& v) {
  if (v.element[GRAD_CLIP]) return square_sum(g, n, v.element[GRAD_CLIP]);
  return v.has[GRAD_CLIP] ? square_sum<true>(g, n, v.value[GRAD_CLIP]) : square_sum<false>(g, n, 0.0f);
}

// Calls move(i, place, n) for parts of the elements [begin, end) of a chain whose memory has the channels last: n
// elements from begin + i on, t.channels apart from `place` on.
template <class Move>
MMEBM_INLINE void by_channel(const StepTensor& t, int64_t begin, int64_t end, const Move& move) {
  const int64_t positions = t.numel / t.channels;
  for (int64_t i = begin; i < end;) {
    const int64_t first = i % positions, left = end - i;
    const int64_t n = positions - first < left ? positions - first : left;
    move(i - begin, first * t.channels + i / positions, n);
    i += n;
  }
}

// The elements of a span, chain by chain, from memory with the channels last.
MMEBM_INLINE const float* gathered(const StepTensor& t, const Span& span, const void* from, float* buffer) {
  for (int64_t r = 0; r < span.rows; ++r) {
    const float* chain = static_cast<const float*>(from) + (span.row + r) * t.numel;
    float* to = buffer + r * (span.end - span.begin);
    by_channel(t, span.begin, span.end, [&](int64_t i, int64_t place, int64_t n) {
      for (int64_t j = 0; j < n; ++j) to[i + j] = chain[place + j * t.channels];
    });
  }
  return buffer;
}

MMEBM_INLINE void scattered(const StepTensor& t, const Span& span, const float* from, void* to) {
  for (int64_t r = 0; r < span.rows; ++r) {
    float* chain = static_cast<float*>(to) + (span.row + r) * t.numel;
    const float* y = from + r * (span.end - span.begin);
    by_channel(t, span.begin, span.end, [&](int64_t i, int64_t place, int64_t n) {
      for (int64_t j = 0; j < n; ++j) chain[place + j * t.channels] = y[i + j];
    });
  }
}

// n elements from `base` on as floats, in `buffer` where they are stored in 16 bits.
MMEBM_INLINE const float* floats(const void* from, Storage storage, int64_t base, int64_t n, float* buffer) {
  if (storage == Storage::fp32) return static_cast<const float*>(from) + base;
  widen(static_cast<const uint16_t*>(from) + base, storage, buffer, n);
  return buffer;
}

void norm_tile(const StepJob& job, const StepTensor& t, int64_t tile) {
  if (t.constants[GRAD_NORM_CLIP].kind == Kind::absent) return;
  const Span span = span_of(job, t, tile);
  alignas(64) float wide[TILE];
  const int64_t n = span.end - span.begin;
  const bool apart = t.channels > 1;
  if (apart) gathered(t, span, t.grad, wide);
  for (int64_t r = 0; r < span.rows; ++r) {
    const int64_t base = (span.row + r) * t.numel + span.begin;
    Values v;
    at_chain(job, t, span.row + r, base, v);
    const float* g = apart ? wide + r * n : floats(t.grad, t.grad_storage, base, n, wide);
    job.norm_squares[span.slot + r] = clipped_squares(g, n, v);
  }
}

void update_tile(const StepJob& job, const StepTensor& t, int64_t tile) {
  const Span span = span_of(job, t, tile);
  const int64_t n = span.end - span.begin, total = span.rows * n;
  const int64_t base = span.row * t.numel + span.begin;
  const bool wide = t.storage != Storage::fp32, apart = t.channels > 1;
  alignas(64) float noise[PADDED], proposal[TILE], wide_x[TILE], wide_g[TILE];

  const float* x = apart ? gathered(t, span, t.x, wide_x) : floats(t.x, t.storage, base, total, wide_x);
  const float* g = !job.drift ? nullptr
                   : apart    ? gathered(t, span, t.grad, wide_g)
                              : floats(t.grad, t.grad_storage, base, total, wide_g);
  const float* z = nullptr;
  const uint32_t chain = job.chain_offset + static_cast<uint32_t>(span.row);
  if (job.noise && t.noisy) {
    draw<true, 4>({job.seed, job.step, t.index}, chain, span.rows, span.begin, span.end, noise);
    z = noise;
  }
  // Written where it belongs, except where x is needed afterwards, or y has to be rounded first.
  void* target = job.reject ? t.proposal : t.x;
  const bool buffered = wide || apart || (job.stats && !job.reject);
  float* out = buffered ? proposal : static_cast<float*>(target) + base;

  const auto given = [&t](Slot slot) { return t.constants[slot].kind != Kind::absent; };
  bool chain_constants = false, element_constants = false;
  for (const Constant& c : t.constants) {
    chain_constants |= c.kind == Kind::chain;
    element_constants |= c.kind == Kind::element;
  }
  const bool norm_clip = job.drift && given(GRAD_NORM_CLIP);
  const bool bounded = job.bounds && (given(LOW) || given(HIGH));
  const bool by_chain = chain_constants || norm_clip || job.stats || job.reject;
  const bool simple = !element_constants && !norm_clip && !t.observed && !job.stats && !job.reject;
  const int options = (g ? O_GRAD : 0) | (given(GRAD_CLIP) ? O_CLIP : 0) | (given(PRIOR_STD) ? O_PRIOR : 0) |
                      (z ? O_NOISE : 0) | (given(MAX_UPDATE) ? O_MAX_UPDATE : 0) | (bounded ? O_BOUNDS : 0);
  const int64_t pieces = by_chain ? span.rows : 1, length = by_chain ? n : total;

  Values v;
  for (int64_t piece = 0; piece < pieces; ++piece) {
    const int64_t at = piece * length, slot = span.slot + piece;
    const float* gi = g ? g + at : nullptr;
    const float* zi = z ? z + at : nullptr;
    if (piece == 0 || chain_constants || element_constants) at_chain(job, t, span.row + piece, base + at, v);
    if (simple) {
      PLAIN[options](out + at, x + at, gi, zi, length, v);
      continue;
    }
    if (norm_clip) {
      const double norm = job.norms ? job.norms[(&t - job.tensors) * job.chains + span.row + piece]
                                    : __builtin_sqrt(clipped_squares(gi, length, v));
      v.norm = static_cast<float>(norm);
    }
    const uint8_t* keep = t.observed ? t.observed + base + at : nullptr;
    const Found found = general(out + at, x + at, gi, zi, keep, length, v, job.bounds, job.reject);
    if (job.stats) {
      job.clipped[slot] = found.clipped;
      job.grad_squares[slot] = square_sum<false>(gi, length, 0.0f);
    }
    if (job.reject) job.outside[slot] = found.outside;
  }

  if (wide) {
    alignas(64) uint16_t halves[PADDED + 4 * W * TURN];
    const uint32_t purpose = job.drift ? ROUNDING : PERTURB_ROUNDING;
    draw<false, 2>({job.seed, job.step, purpose << 24 | t.index}, chain, span.rows, span.begin, span.end, halves);
    uint16_t* stored = static_cast<uint16_t*>(target) + base;
    round_to(proposal, t.storage, halves, stored, total);
    if (job.stats && !job.reject) widen(stored, t.storage, proposal, total);
  }
  if (job.stats && !job.reject) {
    for (int64_t piece = 0; piece < pieces; ++piece) {
      job.moved_squares[span.slot + piece] = moved_sum(proposal + piece * n, x + piece * n, n);
      job.nonfinite[span.slot + piece] = nonfinite_count(proposal + piece * n, n);
    }
    if (!wide && !apart) memcpy(static_cast<float*>(t.x) + base, proposal, sizeof(float) * static_cast<size_t>(total));
  }
  if (apart) scattered(t, span, proposal, t.x);
}

void commit_tile(const StepJob& job, const StepTensor& t, int64_t tile) {
  const Span span = span_of(job, t, tile);
  const int64_t n = span.end - span.begin;
  alignas(64) float wide_x[TILE], wide_y[TILE];
  for (int64_t r = 0; r < span.rows; ++r) {
    const int64_t base = (span.row + r) * t.numel + span.begin;
    const bool rejected = job.rejected[span.row + r] != 0;
    if (job.stats) {
      const float* y = floats(rejected ? t.x : t.proposal, t.storage, base, n, wide_y);
      // also where y is x: infinity less itself is NaN
      job.moved_squares[span.slot + r] = moved_sum(y, floats(t.x, t.storage, base, n, wide_x), n);
      job.nonfinite[span.slot + r] = nonfinite_count(y, n);
    }
    if (!rejected) {
      const int64_t size = t.storage == Storage::fp32 ? 4 : 2;
      memcpy(static_cast<char*>(t.x) + base * size, static_cast<const char*>(t.proposal) + base * size,
             static_cast<size_t>(n * size));
    }
  }
}

}  // namespace

const StepLoops MMEBM_LOOPS(step_loops) = {update_tile, norm_tile, commit_tile, normals};

}  // namespace mmebm
