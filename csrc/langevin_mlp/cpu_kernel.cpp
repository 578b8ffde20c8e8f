// The loops of langevin_mlp, compiled once per instruction set (common/isa.h).
//
// A vector holds one number of W chains, and a tile is 1 to MOST vectors of chains that go through all steps together.
// State, activations and gradients lie as (feature, chain): a matrix product broadcasts a weight and multiplies it with
// the chains' vectors, and everything else (activations, noise, clips, norms, masks, bounds) is elementwise without any
// shuffle or remainder, whatever the widths are. A chain's sums run over features in one order, in its own lane, so
// that no result depends on the tile, the batch split or the number of threads, and AVX2 and AVX-512 agree bit for bit.
//
// Matrix products: PANEL outputs times the tile's vectors are accumulated in registers over the whole depth. Per depth
// step that is PANEL broadcasts and one load per vector for PANEL products per vector; with a single vector, AVX-512
// takes two panels at once, because eight sums alone would wait for each other. Layers of up to 4 outputs split the
// depth over several sums for the same reason.
//
// Quads. The chains that are left over when the batch is cut into vectors, up to 8, would leave most of a vector idle.
// With AVX-512 a vector of their layers is 4 outputs of 4 chains instead: a row of 4 weights is loaded into all four
// quarters, and a chain's input is copied over its quarter, once for all outputs. The sums are the same ones in the
// same order. Everything but products and activations stays as it is, in a vector with idle lanes.
//
// The backward pass needs act' of every hidden layer, so the forward pass leaves it beside act: both come from one
// exponential. Lanes behind the end of the batch repeat its last chain, and are not written.
//
// NaN. Clamps are written so that a NaN stays NaN (vec.h); nothing here is compiled with -ffast-math. Every
// multiplication that meets an addition is written as `fma`, so that the compiler finds nothing to fuse elsewhere.
#include <cstdint>
#include <cstring>

#include "common/activation_vec.h"
#include "common/chain_rule.h"
#include "langevin_mlp/job.h"

namespace mmebm {
namespace {

#if defined(__AVX512F__)
constexpr int MOST = 3, PANELS = 2, REST = 4 * QUADS;
#else
constexpr int MOST = 1, PANELS = 1, REST = 0;  // 16 registers: one panel, its weights and inputs
#endif

// ------------------------------------------------------------------------------------------------------ matrix product

enum class To { store, times, add };

// Products summed one after the other; parts of a longer sum are added up: in one run of 1,024 the rounding errors are up
// to five times those of torch, which sums in 16 lanes. Parts of 64 cost nothing measurable against 256.
constexpr int64_t PART = 64;

MMEBM_INLINE void write(F v, float* out, const float* factor, int64_t at, To to) {
  if (to == To::times) v = through(v, load(factor + at));
  if (to == To::add) v = add(load(out + at), v);
  store(out + at, v);
}

// P panels of J outputs: out = bias + w in, times `factor`, or added to out.
template <int M, int J, int P>
void panels(const float* w, const float* in, int64_t depth, const float* bias, const float* factor, float* out,
            To to) {
  constexpr int C = M * W;
  F sum[P * J][M];
#pragma GCC unroll 16
  for (int j = 0; j < P * J; ++j) {
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) sum[j][m] = setf(bias ? bias[j] : 0.0f);
  }
  const float* second = w + (P - 1) * J * depth;
  float before[P * J * C];
  for (int64_t k = 0; k < depth;) {
    const int64_t end = depth - k <= PART ? depth : k + PART;
    for (; k < end; ++k) {
      F x[M];
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) x[m] = load(in + k * C + m * W);
#pragma GCC unroll 16
      for (int j = 0; j < P * J; ++j) {
        const F weight = setf(j < J ? w[k * J + j] : second[k * J + j - J]);
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) sum[j][m] = fma(weight, x[m], sum[j][m]);
      }
    }
    if (depth <= PART) break;
#pragma GCC unroll 16
    for (int j = 0; j < P * J; ++j) {
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        float* const at = before + j * C + m * W;
        if (end > PART) sum[j][m] = add(load(at), sum[j][m]);
        store(at, sum[j][m]);
        if (end < depth) sum[j][m] = setf(0.0f);
      }
    }
  }
#pragma GCC unroll 16
  for (int j = 0; j < P * J; ++j) {
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) write(sum[j][m], out, factor, j * C + m * W, to);
  }
}

// J outputs, the depth dealt out to S sums.
template <int M, int J, int S>
void narrow(const float* w, const float* in, int64_t depth, const float* bias, const float* factor, float* out,
            To to) {
  constexpr int C = M * W;
  F total[J][M];
#pragma GCC unroll 4
  for (int j = 0; j < J; ++j) {
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) total[j][m] = setf(bias ? bias[j] : 0.0f);
  }
  for (int64_t k = 0; k < depth;) {
    const int64_t end = depth - k <= PART ? depth : k + PART;
    F sum[S][J][M];
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) {
#pragma GCC unroll 4
      for (int j = 0; j < J; ++j) {
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) sum[s][j][m] = setf(0.0f);
      }
    }
    for (; k + S <= end; k += S) {
#pragma GCC unroll 4
      for (int s = 0; s < S; ++s) {
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
          const F x = load(in + (k + s) * C + m * W);
#pragma GCC unroll 4
          for (int j = 0; j < J; ++j) sum[s][j][m] = fma(setf(w[(k + s) * J + j]), x, sum[s][j][m]);
        }
      }
    }
    for (; k < end; ++k) {
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        const F x = load(in + k * C + m * W);
#pragma GCC unroll 4
        for (int j = 0; j < J; ++j) sum[0][j][m] = fma(setf(w[k * J + j]), x, sum[0][j][m]);
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) {
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        F v = add(sum[0][j][m], sum[1][j][m]);
        if (S == 4) v = add(v, add(sum[S - 2][j][m], sum[S - 1][j][m]));
        total[j][m] = add(total[j][m], v);
      }
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < J; ++j) {
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) write(total[j][m], out, factor, j * C + m * W, to);
  }
}

// `outputs` rows from `depth` rows.
template <int M>
void product(const float* w, int64_t outputs, const float* in, int64_t depth, const float* bias, const float* factor,
             float* out, To to) {
  constexpr int C = M * W;
  switch (outputs) {
    case 1: return narrow<M, 1, 4>(w, in, depth, bias, factor, out, to);
    case 2: return narrow<M, 2, 4>(w, in, depth, bias, factor, out, to);
    case 3: return narrow<M, 3, 2>(w, in, depth, bias, factor, out, to);
    case 4: return narrow<M, 4, 2>(w, in, depth, bias, factor, out, to);
  }
  int64_t j = 0;
  const auto go = [&](auto one, int64_t count) {
    one(w + j * depth, in, depth, bias ? bias + j : nullptr, factor + j * C, out + j * C, to);
    j += count;
  };
  if (M == 1 && PANELS == 2) {
    while (j + 2 * PANEL <= outputs) go(panels<M, PANEL, M == 1 ? PANELS : 1>, 2 * PANEL);
  }
  while (j + PANEL <= outputs) go(panels<M, PANEL, 1>, PANEL);
  switch (outputs - j) {
    case 1: return go(panels<M, 1, 1>, 1);
    case 2: return go(panels<M, 2, 1>, 2);
    case 3: return go(panels<M, 3, 1>, 3);
    case 4: return go(panels<M, 4, 1>, 4);
    case 5: return go(panels<M, 5, 1>, 5);
    case 6: return go(panels<M, 6, 1>, 6);
    case 7: return go(panels<M, 7, 1>, 7);
  }
}

// ---------------------------------------------------------------------------------------------------------------- tile

template <int M>
struct Tile : Rows<M> {
  const MlpJob& job;
  float *a, *b, *slopes, *targets, *outputs, *quads;
  uint8_t* masks;
};

// From the outputs `y` (in place) to dE/dy; the energy where asked for.
template <int M>
void residual(const Tile<M>& t, const MlpTerm& term, const float* target, const uint8_t* mask, float* y, bool energy) {
  const int64_t outputs = mlp_outputs(term);
  const F zero = setf(0.0f), one = setf(1.0f);
  const double per = term.laplace ? term.scale : term.scale * term.scale;
  const F pull = setf(static_cast<float>(term.weight / per)), push = sub(zero, pull);
  for (int m = 0; m < M; ++m) {
    Sum sum = no_sum();
    for (int64_t j = 0; j < outputs; ++j) {
      const int64_t at = j * t.C + m * W;
      F v = load(y + at), slope = one;
      if (term.tanh) {
        const Both both = tanh_of(v);
        v = both.value;
        slope = both.derivative;
      }
      F r = sub(v, load(target + at));
      if (mask) r = select(bytes(mask + at, W), r, zero);
      if (energy) {
        sum.part = term.laplace ? add(sum.part, abs(r)) : fma(r, r, sum.part);
        next(sum);
      }
      F d = term.laplace ? select(greater(r, zero), pull, select(greater(zero, r), push, zero)) : mul(pull, r);
      if (term.tanh) d = mul(d, slope);
      store(y + at, d);
    }
    if (energy) {
      const F half = setf(static_cast<float>((term.laplace ? 1.0 : 0.5) * term.weight / per));
      store(t.energy + m * W, fma(half, whole(sum), load(t.energy + m * W)));
    }
  }
}

template <int M>
void quadratic(const Tile<M>& t, const MlpTerm& term, bool add_to, bool energy) {
  for (int m = 0; m < M; ++m) {
    Sum sum = no_sum();
    for (int64_t i = 0; i < t.job.inputs; ++i) {
      const int64_t at = i * t.C + m * W;
      const F moved = sub(load(t.x + at), setf(term.mean[i]));
      const F precision = setf(term.precision[i]), pull = mul(precision, moved);
      if (energy) {
        sum.part = fma(pull, moved, sum.part);
        next(sum);
      }
      store(t.g + at, add_to ? fma(precision, moved, load(t.g + at)) : pull);
    }
    if (energy) store(t.energy + m * W, fma(setf(0.5f), whole(sum), load(t.energy + m * W)));
  }
}

// The gradient at x in g; the energy in t.energy where asked for.
template <int M>
void evaluate(const Tile<M>& t, bool energy) {
  constexpr int C = M * W;
  for (int m = 0; m < M; ++m) store(t.energy + m * W, setf(0.0f));
  const float* target = t.targets;
  const uint8_t* mask = t.masks;
  for (int64_t i = 0; i < t.job.term_count; ++i) {
    const MlpTerm& term = t.job.terms[i];
    if (term.kind == TermKind::quadratic) {
      quadratic(t, term, i > 0, energy);
      continue;
    }
    float *now = t.a, *other = t.b, *slope = t.slopes;
    const float* in = t.x;
    for (int64_t l = 0; l + 1 < term.depth; ++l) {
      const MlpLayer& layer = term.layers[l];
      product<M>(layer.forward, layer.outputs, in, layer.inputs, layer.bias, now, now, To::store);
      activate(term.activation, term.slope, now, now, slope, layer.outputs * C);
      slope += layer.outputs * C;
      in = now;
      now = other;
      other = in == t.a ? t.a : t.b;
    }
    const MlpLayer& last = term.layers[term.depth - 1];
    if (term.kind == TermKind::scalar) {
      const F weight = setf(static_cast<float>(term.weight));
      if (energy) {
        product<M>(last.forward, 1, in, last.inputs, last.bias, t.row, t.row, To::store);
        for (int m = 0; m < M; ++m) {
          store(t.energy + m * W, fma(weight, load(t.row + m * W), load(t.energy + m * W)));
        }
      }
      for (int m = 0; m < M; ++m) store(now + m * W, weight);
    } else {
      product<M>(last.forward, last.outputs, in, last.inputs, last.bias, now, now, To::store);
      residual(t, term, target, term.observed ? mask : nullptr, now, energy);
      target += mlp_outputs(term) * C;
      if (term.observed) mask += mlp_outputs(term) * C;
    }
    for (int64_t l = term.depth - 1; l > 0; --l) {
      const MlpLayer& layer = term.layers[l];
      slope -= layer.inputs * C;
      product<M>(layer.backward, layer.inputs, now, layer.outputs, nullptr, slope, other, To::times);
      float* const swap = now;
      now = other;
      other = swap;
    }
    const MlpLayer& layer = term.layers[0];
    product<M>(layer.backward, layer.inputs, now, layer.outputs, nullptr, t.g, t.g, i > 0 ? To::add : To::store);
  }
}

#if defined(__AVX512F__)

// --------------------------------------------------------------------------------------------------------------- quads

// Block i of a quad's rows is rows 4 i to 4 i + 3: lane 4 chain + row.

MMEBM_INLINE F quarter(const float* p) { return _mm512_broadcast_f32x4(_mm_loadu_ps(p)); }

MMEBM_INLINE F quarter(const float* p, int64_t n) {
  return n >= 4 ? quarter(p) : _mm512_broadcast_f32x4(_mm_maskz_loadu_ps(static_cast<__mmask8>((1 << n) - 1), p));
}

// Row k of `in` over each chain's quarter.
MMEBM_INLINE F input_of(const float* in, int64_t k) {
  return _mm512_permutevar_ps(load(in + k / 4 * 16), _mm512_set1_epi32(static_cast<int>(k % 4)));
}

// 4 V outputs from `w` on, `stride` weights a depth step, the order of sums that of `panels`.
template <int V>
void quad_panels(const float* w, int64_t stride, const float* in, int64_t depth, const float* bias, int64_t outputs,
                 const float* factor, float* out, To to) {
  F sum[V];
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) sum[v] = bias && outputs > 4 * v ? quarter(bias + 4 * v, outputs - 4 * v) : setf(0.0f);
  float before[V * W];
  const auto next = [&](F x, int64_t k) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) sum[v] = fma(quarter(w + v / 2 * PANEL * depth + v % 2 * 4 + k * stride), x, sum[v]);
  };
  for (int64_t k = 0; k < depth;) {
    const int64_t end = depth - k <= PART ? depth : k + PART;
    for (; k + 4 <= end; k += 4) {
      const F x = load(in + k * 4);
      next(_mm512_shuffle_ps(x, x, 0x00), k);
      next(_mm512_shuffle_ps(x, x, 0x55), k + 1);
      next(_mm512_shuffle_ps(x, x, 0xAA), k + 2);
      next(_mm512_shuffle_ps(x, x, 0xFF), k + 3);
    }
    for (; k < end; ++k) next(input_of(in, k), k);
    if (depth <= PART) break;
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      if (end > PART) sum[v] = add(load(before + v * W), sum[v]);
      store(before + v * W, sum[v]);
      if (end < depth) sum[v] = setf(0.0f);
    }
  }
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) {
    if (outputs > 4 * v) write(sum[v], out, factor, v * W, to);
  }
}

// Up to 4 outputs, the order of sums that of `narrow`.
template <int S>
void quad_narrow(const float* w, int64_t outputs, const float* in, int64_t depth, const float* bias,
                 const float* factor, float* out, To to) {
  F total = bias ? quarter(bias, outputs) : setf(0.0f);
  for (int64_t k = 0; k < depth;) {
    const int64_t end = depth - k <= PART ? depth : k + PART;
    F sum[S];
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) sum[s] = setf(0.0f);
    for (; k + S <= end; k += S) {
#pragma GCC unroll 4
      for (int s = 0; s < S; ++s) sum[s] = fma(quarter(w + (k + s) * outputs), input_of(in, k + s), sum[s]);
    }
    for (; k < end; ++k) sum[0] = fma(quarter(w + k * outputs), input_of(in, k), sum[0]);
    F v = add(sum[0], sum[1]);
    if (S == 4) v = add(v, add(sum[S - 2], sum[S - 1]));
    total = add(total, v);
  }
  write(total, out, factor, 0, to);
}

// As `product`. A load may read up to 7 weights that belong to no output (the packed weights have room for that), for
// lanes that nobody reads.
void quad_product(const float* w, int64_t outputs, const float* in, int64_t depth, const float* bias,
                  const float* factor, float* out, To to) {
  if (outputs <= 2) return quad_narrow<4>(w, outputs, in, depth, bias, factor, out, to);
  if (outputs <= 4) return quad_narrow<2>(w, outputs, in, depth, bias, factor, out, to);
  int64_t j = 0;
  const auto go = [&](auto one, int64_t count, int64_t stride) {
    one(w + j * depth, stride, in, depth, bias ? bias + j : nullptr, count, factor + 4 * j, out + 4 * j, to);
    j += count;
  };
  while (j + 64 <= outputs) go(quad_panels<16>, 64, PANEL);
  if (j + 32 <= outputs) go(quad_panels<8>, 32, PANEL);
  while (j + PANEL <= outputs) go(quad_panels<2>, PANEL, PANEL);
  if (j < outputs) go(quad_panels<2>, outputs - j, outputs - j);
}

// Rows of 16 chains to those of one quad, and back.
MMEBM_INLINE void to_quad(const float* from, int64_t rows, int64_t quad, float* to) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int c = 0; c < 4; ++c) to[i / 4 * 16 + 4 * c + i % 4] = from[i * W + 4 * quad + c];
  }
}

MMEBM_INLINE void from_quad(const float* from, int64_t rows, int64_t quad, float* to, bool add_to) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int c = 0; c < 4; ++c) {
      const float v = from[i / 4 * 16 + 4 * c + i % 4];
      float* const at = to + i * W + 4 * quad + c;
      *at = add_to ? *at + v : v;
    }
  }
}

// As `evaluate`.
void evaluate_quads(const Tile<1>& t, bool energy) {
  const int64_t quads = (t.inside + 3) / 4, inputs = t.job.inputs;
  float* const g = t.quads + QUADS * mlp_quad(inputs);
  store(t.energy, setf(0.0f));
  for (int64_t q = 0; q < quads; ++q) to_quad(t.x, inputs, q, t.quads + q * mlp_quad(inputs));
  const float* target = t.targets;
  const uint8_t* mask = t.masks;
  for (int64_t i = 0; i < t.job.term_count; ++i) {
    const MlpTerm& term = t.job.terms[i];
    if (term.kind == TermKind::quadratic) {
      quadratic(t, term, i > 0, energy);
      continue;
    }
    int64_t wide = 1, hidden = 0;
    for (int64_t l = 0; l < term.depth; ++l) {
      wide = mlp_max(wide, term.layers[l].outputs);
      if (l + 1 < term.depth) hidden += mlp_quad(term.layers[l].outputs);
    }
    const MlpLayer& last = term.layers[term.depth - 1];
    const bool scalar = term.kind == TermKind::scalar;
    float* result[QUADS] = {};  // where each quad's outputs are, and the buffer beside them
    float* other[QUADS] = {};
    for (int64_t q = 0; q < quads; ++q) {
      float *now = t.a + q * mlp_quad(wide), *beside = t.b + q * mlp_quad(wide), *slope = t.slopes + q * hidden;
      const float* in = t.quads + q * mlp_quad(inputs);
      for (int64_t l = 0; l + 1 < term.depth; ++l) {
        const MlpLayer& layer = term.layers[l];
        quad_product(layer.forward, layer.outputs, in, layer.inputs, layer.bias, now, now, To::store);
        activate(term.activation, term.slope, now, now, slope, mlp_quad(layer.outputs));
        slope += mlp_quad(layer.outputs);
        in = now;
        float* const swap = now;
        now = beside;
        beside = swap;
      }
      if (!scalar || energy) {
        quad_product(last.forward, last.outputs, in, last.inputs, last.bias, now, now, To::store);
        from_quad(now, last.outputs, q, t.outputs, false);
      }
      result[q] = now;
      other[q] = beside;
    }
    if (scalar) {
      const F weight = setf(static_cast<float>(term.weight));
      if (energy) store(t.energy, fma(weight, load(t.outputs), load(t.energy)));
      for (int64_t q = 0; q < quads; ++q) store(result[q], weight);
    } else {
      residual(t, term, target, term.observed ? mask : nullptr, t.outputs, energy);
      for (int64_t q = 0; q < quads; ++q) to_quad(t.outputs, last.outputs, q, result[q]);
      target += mlp_outputs(term) * W;
      if (term.observed) mask += mlp_outputs(term) * W;
    }
    for (int64_t q = 0; q < quads; ++q) {
      float *now = result[q], *beside = other[q], *slope = t.slopes + (q + 1) * hidden;
      for (int64_t l = term.depth - 1; l > 0; --l) {
        const MlpLayer& layer = term.layers[l];
        slope -= mlp_quad(layer.inputs);
        quad_product(layer.backward, layer.inputs, now, layer.outputs, nullptr, slope, beside, To::times);
        float* const swap = now;
        now = beside;
        beside = swap;
      }
      const MlpLayer& layer = term.layers[0];
      quad_product(layer.backward, layer.inputs, now, layer.outputs, nullptr, g, g, To::store);
      from_quad(g, inputs, q, t.g, i > 0);
    }
  }
}

#endif

template <int M, bool QUAD>
void run_tile(const MlpJob& job, int64_t first, float* scratch) {
  constexpr int C = M * W;
  const MlpScratch s = mlp_scratch(job, C, QUAD);
  const int64_t left = job.chains - first;
  const Rows<M> rows = {job, first, left < C ? left : C, scratch + s.x, scratch + s.g, scratch + s.old,
                        scratch + s.rows, scratch + s.rows + C, scratch + s.rows + 2 * C, nullptr};
  Tile<M> t = {rows, job, scratch + s.a, scratch + s.b, scratch + s.slopes, scratch + s.targets,
               scratch + s.outputs, scratch + s.quads, reinterpret_cast<uint8_t*>(scratch + s.masks)};
  const auto evaluated = [&t](bool energy) {
#if defined(__AVX512F__)
    if constexpr (QUAD) return evaluate_quads(t, energy);
#endif
    evaluate(t, energy);
  };
  if (QUAD) {  // idle lanes hold numbers
    memset(t.g, 0, sizeof(float) * static_cast<size_t>(job.inputs * C));
    memset(t.outputs, 0, sizeof(float) * static_cast<size_t>(s.quads - s.outputs));
  }
  gather(t, job.x, job.inputs, job.inputs, t.x);
  if (job.observed) {
    t.observed = reinterpret_cast<uint8_t*>(scratch + s.observed);
    gather(t, job.observed, job.observed_stride, job.inputs, t.observed);
  }
  float* target = t.targets;
  uint8_t* mask = t.masks;
  for (int64_t i = 0; i < job.term_count; ++i) {
    const MlpTerm& term = job.terms[i];
    if (term.kind != TermKind::residual) continue;
    gather(t, term.target, mlp_outputs(term), mlp_outputs(term), target);
    target += mlp_outputs(term) * C;
    if (!term.observed) continue;
    gather(t, term.observed, term.observed_stride, mlp_outputs(term), mask);
    mask += mlp_outputs(term) * C;
  }
  if (job.gradient) {
    evaluated(true);
    record(t, t.energy, job.energy);
    scatter(t, t.g, job.inputs, job.gradient);
    return;
  }
  run_steps(t, evaluated);
}

void tile(const MlpJob& job, int64_t first, int64_t vectors, float* scratch) {
  switch (vectors) {
#if defined(__AVX512F__)
    case 3: return run_tile<3, false>(job, first, scratch);
    case 2: return run_tile<2, false>(job, first, scratch);
    case 0: return run_tile<1, true>(job, first, scratch);
#endif
    default: return run_tile<1, false>(job, first, scratch);
  }
}

}  // namespace

const MlpLoops MMEBM_LOOPS(mlp_loops) = {W, MOST, REST, tile, activate};

}  // namespace mmebm
