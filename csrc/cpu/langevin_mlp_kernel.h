// The loops of langevin_mlp, compiled once per instruction set: the including file defines MMEBM_LOOPS, the name of the
// table.
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

#include "langevin_mlp_job.h"
#include "philox_vec.h"
#include "vec.h"

namespace mmebm {
namespace {

using Mask = M;  // M counts the vectors of a tile below

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
  if (to == To::times) v = mul(v, load(factor + at));
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

// --------------------------------------------------------------------------------------------------------- activations

struct Both {
  F value, derivative;
};

// exp(x) = 2^n (1 + p) for x in [-87, 88], by n = round(x / log 2) and p = r + r^2 q(r) on the rest r of at most
// log(2) / 2, q of degree 4 (minimax, error 5.7e-9 relative to the exponential).
struct Exp {
  I power;  // n in the exponent's place; above the sign there is nothing left
  F p;
};

MMEBM_INLINE Exp exp_parts(F x) {
  // adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits
  const F shifted = fma(x, setf(1.44269504f), setf(12582912.0f));
  const F n = sub(shifted, setf(12582912.0f));
  F r = fma(n, setf(-0.693145752f), x);  // the first 16 bits of log 2, then the rest
  r = fma(n, setf(-1.42860677e-6f), r);
  F q = fma(setf(0.00138116628f), r, setf(0.00837013498f));
  q = fma(q, r, setf(0.0416685268f));
  q = fma(q, r, setf(0.166665092f));
  q = fma(q, r, setf(0.49999994f));
  return {exponent(as_int(shifted)), fma(mul(r, r), q, r)};
}

MMEBM_INLINE F exp_of(F x) {
  const Exp e = exp_parts(x);
  return as_float(addi(as_int(add(e.p, setf(1.0f))), e.power));
}

// exp(x) - 1
MMEBM_INLINE F expm1_of(F x) {
  const Exp e = exp_parts(x);
  const F scale = as_float(addi(seti(0x3f800000u), e.power));
  return fma(scale, e.p, sub(scale, setf(1.0f)));
}

// tanh |a| = e / (e + 2) with e = exp(2 |a|) - 1, and its derivative 4 (e + 1) / (e + 2)^2, which 1 - tanh^2 would lose to
// cancellation where tanh is near 1.
MMEBM_INLINE Both tanh_of(F a) {
  const F zero = setf(0.0f), size = abs(a);
  const F e = expm1_of(clamp(add(size, size), zero, setf(87.0f))), below = add(e, setf(2.0f));
  const F t = div(e, below), rest = div(setf(2.0f), below);
  return {select(greater(zero, a), sub(zero, t), t), mul(mul(add(e, setf(1.0f)), rest), rest)};
}

// Both of one vector. A limit at an infinity is taken exactly: silu(-inf) is 0 and its derivative too.
template <Activation KIND>
MMEBM_INLINE Both activation(F a, F slope) {
  const F zero = setf(0.0f), one = setf(1.0f);
  if (KIND == Activation::relu) {
    return {max(zero, a), select(greater(a, zero), one, zero)};
  }
  if (KIND == Activation::leaky_relu) {
    const M up = greater(a, zero);
    return {select(up, a, mul(slope, a)), select(up, one, slope)};
  }
  if (KIND == Activation::silu) {
    const F t = clamp(a, setf(-87.0f), setf(87.0f));
    const F e = exp_of(sub(zero, t)), s = div(one, add(one, e));
    return {mul(max(setf(-87.0f), a), s), fma(mul(t, s), mul(e, s), s)};
  }
  if (KIND == Activation::gelu) {
    // Phi(-|a|) = exp(-a^2 / 2) Q(u), u = 1 / (1 + |a| / 4): Q is half the scaled complementary error function, of
    // degree 9 (error 6e-8 of itself)
    const F t = clamp(a, setf(-13.1f), setf(13.1f));
    const F e = exp_of(mul(mul(t, setf(-0.5f)), t));
    const F u = div(one, fma(setf(0.25f), abs(t), one));
    F q = fma(setf(0.0365462191f), u, setf(-0.209777385f));
    q = fma(q, u, setf(0.425715446f));
    q = fma(q, u, setf(-0.372688621f));
    q = fma(q, u, setf(0.335633636f));
    q = fma(q, u, setf(-0.0363121331f));
    q = fma(q, u, setf(0.126806706f));
    q = fma(q, u, setf(0.0937523693f));
    q = fma(q, u, setf(0.100351408f));
    q = fma(q, u, setf(-2.76155424e-5f));
    const F below = mul(e, q);
    const F phi = select(greater(t, zero), fma(sub(zero, e), q, one), below);
    return {mul(max(setf(-13.1f), a), phi), fma(mul(t, e), setf(0.398942280f), phi)};
  }
  if (KIND == Activation::softplus) {
    const F e = exp_of(sub(zero, min(setf(87.0f), abs(a))));
    // log(1 + e) = e q(e) on [0, 1], q of degree 10 (error 4.8e-9)
    F q = fma(setf(0.00203021569f), e, setf(-0.0134073962f));
    q = fma(q, e, setf(0.0414779298f));
    q = fma(q, e, setf(-0.0824413821f));
    q = fma(q, e, setf(0.124184079f));
    q = fma(q, e, setf(-0.161056772f));
    q = fma(q, e, setf(0.198907435f));
    q = fma(q, e, setf(-0.249872699f));
    q = fma(q, e, setf(0.333325595f));
    q = fma(q, e, setf(-0.499999821f));
    q = fma(q, e, one);
    const F s = div(one, add(one, e));
    return {fma(e, q, max(zero, a)), select(greater(a, zero), s, mul(e, s))};
  }
  if (KIND == Activation::tanh) {
    return tanh_of(a);
  }
  const F e = expm1_of(clamp(a, setf(-87.0f), zero));  // elu
  const M up = greater(a, zero);
  return {select(up, a, mul(slope, e)), select(up, one, fma(slope, e, slope))};
}

template <Activation KIND>
void activations(float slope, const float* in, float* value, float* derivative, int64_t n) {
  const F s = setf(slope);
#pragma GCC unroll 2
  for (int64_t i = 0; i < n; i += W) {
    const Both both = activation<KIND>(load(in + i), s);
    store(value + i, both.value);
    store(derivative + i, both.derivative);
  }
}

void activate(Activation kind, float slope, const float* in, float* value, float* derivative, int64_t n) {
  switch (kind) {
    case Activation::relu: return activations<Activation::relu>(slope, in, value, derivative, n);
    case Activation::leaky_relu: return activations<Activation::leaky_relu>(slope, in, value, derivative, n);
    case Activation::silu: return activations<Activation::silu>(slope, in, value, derivative, n);
    case Activation::gelu: return activations<Activation::gelu>(slope, in, value, derivative, n);
    case Activation::softplus: return activations<Activation::softplus>(slope, in, value, derivative, n);
    case Activation::tanh: return activations<Activation::tanh>(slope, in, value, derivative, n);
    case Activation::elu: return activations<Activation::elu>(slope, in, value, derivative, n);
  }
}

// ---------------------------------------------------------------------------------------------------------------- tile

// A sum over many rows, in parts of 32, so that its rounding errors stay those of a short sum.
struct Sum {
  F part, total;
  int count;
};

MMEBM_INLINE Sum no_sum() { return {setf(0.0f), setf(0.0f), 0}; }

MMEBM_INLINE void next(Sum& s) {
  if (++s.count % 32 == 0) {
    s.total = add(s.total, s.part);
    s.part = setf(0.0f);
  }
}

MMEBM_INLINE F whole(const Sum& s) { return add(s.total, s.part); }

template <int M>
struct Tile {
  static constexpr int C = M * W;
  const MlpJob& job;
  int64_t first;   // chain of lane 0
  int64_t inside;  // lanes that are chains
  float *x, *g, *old, *a, *b, *slopes, *targets, *energy, *dead, *row, *outputs, *quads;
  uint8_t *masks, *observed;

  int64_t chain_of(int lane) const { return first + (lane < inside ? lane : inside - 1); }
  int lanes_of(int m) const {
    const int64_t left = inside - m * W;
    return left < 0 ? 0 : left < W ? static_cast<int>(left) : W;
  }
};

template <int M, class T>
void gather(const Tile<M>& t, const T* from, int64_t stride, int64_t width, T* to) {
  for (int lane = 0; lane < t.C; ++lane) {
    const T* source = from + t.chain_of(lane) * stride;
    for (int64_t i = 0; i < width; ++i) to[i * t.C + lane] = source[i];
  }
}

template <int M>
void scatter(const Tile<M>& t, const float* from, int64_t width, float* to) {
  for (int lane = 0; lane < t.inside; ++lane) {
    float* target = to + (t.first + lane) * width;
    for (int64_t i = 0; i < width; ++i) target[i] = from[i * t.C + lane];
  }
}

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

// A row of the table of constants, as one vector of chains sees it.
struct Row {
  const float* values;
  int64_t columns, chain;
  int lanes;
};

MMEBM_INLINE F get(const Row& r, Field f) {
  return r.columns == 1 ? setf(r.values[f]) : load(r.values + f * r.columns + r.chain, r.lanes);
}

template <int M>
MMEBM_INLINE Row row_of(const Tile<M>& t, int64_t step, int64_t tensor, int m) {
  const MlpJob& job = t.job;
  const int64_t row = job.constant_rows == 1 ? 0 : step;
  return {job.constants + (row * job.tensor_count + tensor) * FIELDS * job.constant_columns, job.constant_columns,
          t.first + m * W, t.lanes_of(m)};
}

template <int M>
MMEBM_INLINE void chain_words(const Tile<M>& t, I* words) {
  for (int m = 0; m < M; ++m) {
    alignas(64) uint32_t w[W];
    for (int lane = 0; lane < W; ++lane) {
      w[lane] = t.job.chain_offset + static_cast<uint32_t>(t.first) + static_cast<uint32_t>(m * W + lane);
    }
    words[m] = loadi(w);
  }
}

MMEBM_INLINE bool has(const MlpTensor& tensor, Field f) { return (tensor.present >> f & 1) != 0; }

// Calls body(row of the state, m, normal) for all rows of a tensor. Without noise the normals are 0.
template <int M, class Body>
MMEBM_INLINE void each_row(const Tile<M>& t, const MlpTensor& tensor, uint32_t step, bool noise, const Body& body) {
  if (!noise) {
    for (int64_t i = 0; i < tensor.width; ++i) {
      for (int m = 0; m < M; ++m) body(tensor.begin + i, m, setf(0.0f));
    }
    return;
  }
  const Key key = {t.job.seed, step, tensor.stream};
  OneChain schedule;
  OneChain::init(schedule, key, 0);
  I words[M];
  chain_words(t, words);
  for (int64_t i = 0; i < tensor.width; i += 4) {
    F z[4 * M];
    normals_by_chain<M>(schedule, key, static_cast<uint32_t>(i / 4), words, z);
    const int64_t rows = tensor.width - i < 4 ? tensor.width - i : 4;
    for (int64_t r = 0; r < rows; ++r) {
      for (int m = 0; m < M; ++m) body(tensor.begin + i + r, m, z[4 * m + r]);
    }
  }
}

// x + noise, where the noise stands before the gradient.
template <int M>
void perturb(const Tile<M>& t, int64_t k, uint32_t step) {
  for (int64_t i = 0; i < t.job.tensor_count; ++i) {
    const MlpTensor& tensor = t.job.tensors[i];
    const bool bounds = t.job.clamp_noise && (has(tensor, F_LOW) || has(tensor, F_HIGH));
    if (!tensor.moving || !(tensor.noisy || bounds)) continue;
    F scale[M], low[M], high[M];
    for (int m = 0; m < M; ++m) {
      const Row row = row_of(t, k, i, m);
      scale[m] = get(row, F_NOISE_SCALE);
      low[m] = get(row, F_LOW);
      high[m] = get(row, F_HIGH);
    }
    each_row(t, tensor, step, tensor.noisy, [&](int64_t r, int m, F z) {
      const int64_t at = r * Tile<M>::C + m * W;
      const F x = load(t.x + at);
      F y = tensor.noisy ? fma(scale[m], z, x) : x;
      if (bounds) y = clamp(y, low[m], high[m]);
      if (t.observed) y = select(bytes(t.observed + at, W), x, y);
      store(t.x + at, y);
    });
  }
}

// The norm of each chain's gradient over a tensor's rows, after the clip by value.
template <int M>
MMEBM_INLINE F clipped_norm(const Tile<M>& t, const MlpTensor& tensor, int m, bool clip, F limit) {
  const F below = sub(setf(0.0f), limit);
  Sum sum = no_sum();
  for (int64_t r = tensor.begin; r < tensor.begin + tensor.width; ++r) {
    F g = load(t.g + r * Tile<M>::C + m * W);
    if (clip) g = clamp(g, below, limit);
    sum.part = fma(g, g, sum.part);
    next(sum);
  }
  return sqrt(whole(sum));
}

template <int M>
void update(const Tile<M>& t, int64_t k, uint32_t step) {
  const F zero = setf(0.0f), one = setf(1.0f);
  for (int64_t i = 0; i < t.job.tensor_count; ++i) {
    const MlpTensor& tensor = t.job.tensors[i];
    if (!tensor.moving) continue;
    const bool clip = has(tensor, F_GRAD_CLIP), norm_clip = has(tensor, F_NORM_CLIP);
    const bool most = has(tensor, F_MAX_UPDATE), prior = has(tensor, F_PRECISION);
    const bool bounds = has(tensor, F_LOW) || has(tensor, F_HIGH);
    const bool noise = tensor.noisy && !t.job.noise_before;
    F rate[M], scale[M], limit[M], factor[M], largest[M], precision[M], low[M], high[M];
    for (int m = 0; m < M; ++m) {
      const Row row = row_of(t, k, i, m);
      rate[m] = sub(zero, get(row, F_STEP_SIZE));
      scale[m] = get(row, F_NOISE_SCALE);
      limit[m] = get(row, F_GRAD_CLIP);
      largest[m] = get(row, F_MAX_UPDATE);
      precision[m] = get(row, F_PRECISION);
      low[m] = get(row, F_LOW);
      high[m] = get(row, F_HIGH);
      factor[m] = one;
      if (norm_clip) {
        // 1 up to the limit; NaN where the norm is, so that a broken chain is seen
        const F norm = clipped_norm(t, tensor, m, clip, limit[m]), bound = get(row, F_NORM_CLIP);
        factor[m] = select(at_most(norm, bound), one, div(bound, norm));
      }
    }
    each_row(t, tensor, step, noise, [&](int64_t r, int m, F z) {
      const int64_t at = r * Tile<M>::C + m * W;
      const F x = load(t.x + at);
      F g = load(t.g + at);
      if (clip) g = clamp(g, sub(zero, limit[m]), limit[m]);
      if (norm_clip) g = mul(g, factor[m]);
      if (prior) g = fma(precision[m], x, g);
      F y;
      if (noise || most) {
        F d = mul(rate[m], g);
        if (noise) d = fma(scale[m], z, d);
        if (most) d = clamp(d, sub(zero, largest[m]), largest[m]);
        y = add(x, d);
      } else {
        y = fma(rate[m], g, x);
      }
      if (bounds) y = clamp(y, low[m], high[m]);
      if (t.observed) y = select(bytes(t.observed + at, W), x, y);
      store(t.x + at, y);
    });
  }
}

// Chains with an inf or NaN in a moving tensor go back to where they were, for good.
template <int M>
void freeze(const Tile<M>& t) {
  constexpr int C = M * W;
  const F zero = setf(0.0f), one = setf(1.0f);
  for (int m = 0; m < M; ++m) {
    Mask broken = unequal(load(t.dead + m * W), zero);
    for (int64_t i = 0; i < t.job.tensor_count; ++i) {
      const MlpTensor& tensor = t.job.tensors[i];
      if (!tensor.moving) continue;
      for (int64_t r = tensor.begin; r < tensor.begin + tensor.width; ++r) {
        const F v = load(t.x + r * C + m * W);
        const F nothing = sub(v, v);  // 0 for a number, else NaN
        broken = either(broken, unequal(nothing, nothing));
      }
    }
    if (count(broken) == 0) continue;
    store(t.dead + m * W, select(broken, one, zero));
    for (int64_t r = 0; r < t.job.inputs; ++r) {
      const int64_t at = r * C + m * W;
      store(t.x + at, select(broken, load(t.old + at), load(t.x + at)));
    }
  }
}

template <int M>
void record(const Tile<M>& t, const float* row, float* to) {
  for (int m = 0; m < M; ++m) {
    if (const int n = t.lanes_of(m)) store(to + t.first + m * W, load(row + m * W), n);
  }
}

template <int M>
void grad_norm(const Tile<M>& t) {
  for (int m = 0; m < M; ++m) {
    Sum sum = no_sum();
    for (int64_t i = 0; i < t.job.tensor_count; ++i) {
      const MlpTensor& tensor = t.job.tensors[i];
      if (!tensor.moving) continue;
      for (int64_t r = tensor.begin; r < tensor.begin + tensor.width; ++r) {
        const F g = load(t.g + r * Tile<M>::C + m * W);
        sum.part = fma(g, g, sum.part);
        next(sum);
      }
    }
    store(t.row + m * W, sqrt(whole(sum)));
  }
}

template <int M, bool QUAD>
void run_tile(const MlpJob& job, int64_t first, float* scratch) {
  constexpr int C = M * W;
  const MlpScratch s = mlp_scratch(job, C, QUAD);
  const int64_t left = job.chains - first;
  Tile<M> t = {job, first, left < C ? left : C, scratch + s.x, scratch + s.g, scratch + s.old, scratch + s.a,
               scratch + s.b, scratch + s.slopes, scratch + s.targets, scratch + s.rows, scratch + s.rows + C,
               scratch + s.rows + 2 * C, scratch + s.outputs, scratch + s.quads,
               reinterpret_cast<uint8_t*>(scratch + s.masks), nullptr};
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
  for (int m = 0; m < M; ++m) store(t.dead + m * W, setf(0.0f));
  for (int64_t k = 0; k < job.steps; ++k) {
    if (job.stopped && job.stopped(job.stopped_data)) return;
    const uint32_t step = job.first_step + static_cast<uint32_t>(k);
    if (job.freeze) memcpy(t.old, t.x, sizeof(float) * static_cast<size_t>(job.inputs * C));
    if (job.noise_before) perturb(t, k, step);
    evaluated(job.energy != nullptr);
    if (job.energy) record(t, t.energy, job.energy + k * job.chains);
    if (job.grad_norm) {
      grad_norm(t);
      record(t, t.row, job.grad_norm + k * job.chains);
    }
    update(t, k, step);
    if (job.freeze) freeze(t);
  }
  scatter(t, t.x, job.inputs, job.out);
  if (job.freeze) {
    for (int lane = 0; lane < t.inside; ++lane) job.frozen[first + lane] = t.dead[lane] != 0.0f;
  }
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

const MlpLoops MMEBM_LOOPS = {W, MOST, REST, tile, activate};

}  // namespace mmebm
