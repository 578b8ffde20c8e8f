// The activations of the MLP ops and their derivatives, one number at a time, for host and device. The definition is
// mmebm/ops/mlp_energy/reference.py.
//
// One exponential serves both value and derivative. Its approximation is written out, so that what tests see on the
// host is what a GPU computes, up to the rounding of a division and the contraction of products. Errors on the host, in
// units of 2^-23 (1 + |exact|), over 500,000 bit patterns of fp32 and as many normals (x86-64, gcc 12, 2026-11-22): the
// values within 1.1, the derivatives within 2.7 (tests/ops/langevin_mlp/test_cuda_host.py allows 1.25 and 3).
//
// NaN stays NaN in the value. At infinities and at a kink as torch has it: silu(-inf) is NaN, as -inf times 0 is, and the
// derivative at 0 that of the left.
#pragma once

#include <cstdint>

#include "common/activation.h"
#include "common/langevin.h"

namespace mmebm {

struct Activated {
  float value, derivative;
};

// exp(x) = scale (1 + p) for x in [-87, 88]: scale = 2^n with n = round(x / log 2), and p = r + r^2 q(r) on the rest r,
// |r| <= log(2) / 2, q of degree 4 (minimax, error 5.7e-9 relative to the exponential).
struct Exponential {
  float scale, p;
};

MMEBM_HD Exponential exponential(float x) {
  // adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits
  const float shifted = fmaf(x, 1.44269504f, 12582912.0f);
  const float n = shifted - 12582912.0f;
  float r = fmaf(n, -0.693145752f, x);  // the first 16 bits of log 2, then the rest
  r = fmaf(n, -1.42860677e-6f, r);
  float q = fmaf(0.00138116628f, r, 0.00837013498f);
  q = fmaf(q, r, 0.0416685268f);
  q = fmaf(q, r, 0.166665092f);
  q = fmaf(q, r, 0.49999994f);
  return {bits_float((float_bits(shifted) << 23) + 0x3f800000u), fmaf(r * r, q, r)};
}

MMEBM_HD float exp_of(float x) {
  const Exponential e = exponential(x);
  return fmaf(e.scale, e.p, e.scale);
}

// exp(x) - 1
MMEBM_HD float expm1_of(float x) {
  const Exponential e = exponential(x);
  return fmaf(e.scale, e.p, e.scale - 1.0f);
}

MMEBM_HD float tanh_of(float a) {
  // 1 in fp32 from 9.02 on
  const float e = expm1_of(between(a + a, -20.0f, 20.0f));
  return e / (e + 2.0f);
}

// What is left of a gradient `d` behind an activation of this derivative.
MMEBM_HD float through(float d, float derivative) { return derivative == STOP ? 0.0f : d * derivative; }

MMEBM_HD Activated activate(Activation kind, float a, float slope) {
  const bool up = a > 0.0f;
  switch (kind) {
    case Activation::relu:
      return {at_least(a, 0.0f), a <= 0.0f ? STOP : 1.0f};
    case Activation::leaky_relu:
      return {up ? a : slope * a, up ? 1.0f : slope};
    case Activation::silu: {
      const float t = between(a, -87.0f, 87.0f), e = exp_of(-t), s = 1.0f / (1.0f + e);
      return {fmaf(0.0f, at_most(a, 0.0f), at_least(a, -87.0f) * s), fmaf(0.0f, a, fmaf(t * s, e * s, s))};
    }
    case Activation::gelu: {
      // Phi(-|a|) = exp(-a^2 / 2) q(u), u = 1 / (1 + |a| / 4): q is half the scaled complementary error function, of
      // degree 9 (error 6e-8 of itself)
      const float t = between(a, -13.1f, 13.1f), e = exp_of(t * -0.5f * t);
      const float u = 1.0f / fmaf(0.25f, magnitude(t), 1.0f);
      float q = fmaf(0.0365462191f, u, -0.209777385f);
      q = fmaf(q, u, 0.425715446f);
      q = fmaf(q, u, -0.372688621f);
      q = fmaf(q, u, 0.335633636f);
      q = fmaf(q, u, -0.0363121331f);
      q = fmaf(q, u, 0.126806706f);
      q = fmaf(q, u, 0.0937523693f);
      q = fmaf(q, u, 0.100351408f);
      q = fmaf(q, u, -2.76155424e-5f);
      const float phi = up ? fmaf(-e, q, 1.0f) : e * q;
      return {fmaf(0.0f, at_most(a, 0.0f), at_least(a, -13.1f) * phi),
              fmaf(0.0f, a, fmaf(t * e, 0.398942280f, phi))};
    }
    case Activation::softplus: {
      const float e = exp_of(-at_most(magnitude(a), 87.0f));
      // log(1 + e) = e q(e) on [0, 1], q of degree 10 (error 4.8e-9)
      float q = fmaf(0.00203021569f, e, -0.0134073962f);
      q = fmaf(q, e, 0.0414779298f);
      q = fmaf(q, e, -0.0824413821f);
      q = fmaf(q, e, 0.124184079f);
      q = fmaf(q, e, -0.161056772f);
      q = fmaf(q, e, 0.198907435f);
      q = fmaf(q, e, -0.249872699f);
      q = fmaf(q, e, 0.333325595f);
      q = fmaf(q, e, -0.499999821f);
      q = fmaf(q, e, 1.0f);
      const float s = 1.0f / (1.0f + e);
      return {fmaf(e, q, at_least(a, 0.0f)), up ? s : e * s};
    }
    case Activation::tanh: {
      const float t = tanh_of(a);
      return {t, fmaf(-t, t, 1.0f)};
    }
    default: {  // elu
      const float e = expm1_of(between(a, -87.0f, 0.0f));
      return {up ? a : slope * e, up ? 1.0f : fmaf(slope, e, slope)};
    }
  }
}

}  // namespace mmebm
