// Activations and their derivatives in vectors, for the instruction set of the including file. Both come from one
// exponential.
#pragma once

#include "common/activation.h"
#include "common/vec.h"

namespace mmebm {
namespace {

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

// What is left of a gradient `d` behind an activation of this derivative.
MMEBM_INLINE F through(F d, F derivative) {
  return select(unequal(derivative, setf(STOP)), mul(d, derivative), setf(0.0f));
}

// Both of one vector. At infinities as torch has them, which multiplies: silu(-inf) is NaN, as -inf times 0 is.
template <Activation KIND>
MMEBM_INLINE Both activation(F a, F slope) {
  const F zero = setf(0.0f), one = setf(1.0f);
  if (KIND == Activation::relu) {
    return {max(zero, a), select(at_most(a, zero), setf(STOP), one)};
  }
  if (KIND == Activation::leaky_relu) {
    const M up = greater(a, zero);
    return {select(up, a, mul(slope, a)), select(up, one, slope)};
  }
  if (KIND == Activation::silu) {
    const F t = clamp(a, setf(-87.0f), setf(87.0f));
    const F e = exp_of(sub(zero, t)), s = div(one, add(one, e));
    return {fma(zero, min(a, zero), mul(max(setf(-87.0f), a), s)), fma(zero, a, fma(mul(t, s), mul(e, s), s))};
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
    return {fma(zero, min(a, zero), mul(max(setf(-13.1f), a), phi)),
            fma(zero, a, fma(mul(t, e), setf(0.398942280f), phi))};
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
  if (KIND == Activation::sigmoid) {
    const F e = exp_of(sub(zero, min(setf(87.0f), abs(a)))), s = div(one, add(one, e)), below = mul(e, s);
    return {select(greater(a, zero), s, below), mul(s, below)};
  }
  if (KIND == Activation::square) {
    return {mul(a, a), add(a, a)};
  }
  if (KIND == Activation::abs) {
    return {abs(a), select(greater(a, zero), one, select(greater(zero, a), setf(-1.0f), zero))};
  }
  if (KIND == Activation::exp) {
    const F e = exp_of(clamp(a, setf(-87.0f), setf(88.7f)));
    const F v = select(greater(a, setf(88.7f)), setf(__builtin_inff()), select(greater(setf(-87.0f), a), zero, e));
    return {v, v};
  }
  if (KIND == Activation::sqrt) {
    const F root = sqrt(a);
    return {root, div(setf(0.5f), root)};
  }
  if (KIND == Activation::reciprocal) {
    const F inverse = div(one, a);
    return {inverse, sub(zero, mul(inverse, inverse))};
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
    case Activation::sigmoid: return activations<Activation::sigmoid>(slope, in, value, derivative, n);
    case Activation::square: return activations<Activation::square>(slope, in, value, derivative, n);
    case Activation::abs: return activations<Activation::abs>(slope, in, value, derivative, n);
    case Activation::exp: return activations<Activation::exp>(slope, in, value, derivative, n);
    case Activation::sqrt: return activations<Activation::sqrt>(slope, in, value, derivative, n);
    case Activation::reciprocal: return activations<Activation::reciprocal>(slope, in, value, derivative, n);
  }
}

}  // namespace
}  // namespace mmebm
