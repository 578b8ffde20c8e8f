// The update rule on vectors of elements, for the instruction set of the including file. It is that of
// mmebm/ops/langevin_step/reference.py: of a step of any tensors and of the steps of whole chains.
//
// Why langevin.h does not serve here too. There the noise comes with its scale, which Box-Muller takes up for nothing,
// and is the addend of d = fma(-a, g, s xi); here it comes from a buffer of normals, d = fma(s, xi, -a g), and a step
// without noise is one fma. Each form in the other's place costs a multiplication an element and moves last bits. And
// a GPU tests an option once for a group of all its threads, these loops when they are compiled.
#pragma once

#include "common/vec.h"

namespace mmebm {
namespace {

// What applies. Loops that know it when they are compiled leave the rest out.
struct With {
  bool grad, clip, norm_clip, prior, noise, max_update;
};

// The constants of W elements; what does not apply is not read.
struct Rates {
  F clip, factor;   // of the gradient: the limit of its elements, what its norm's limit makes of it
  F inverse, pull;  // the prior's 1 / std twice, the second with the gradient's sign
  F drift;          // minus the step size, with the gradient's sign
  F scale, most;    // of the noise, of the update
};

// x + d, before the bounds. `changed`: where a clip changed something.
MMEBM_INLINE F proposed(const With& with, const Rates& c, F x, F g, F z, M& changed) {
  const F zero = setf(0.0f);
  if (!with.grad) return with.noise ? fma(c.scale, z, x) : x;
  if (with.clip) {
    changed = greater(abs(g), c.clip);
    g = clamp(g, sub(zero, c.clip), c.clip);
  }
  if (with.norm_clip) {
    changed = either(changed, greater(setf(1.0f), c.factor));
    g = mul(g, c.factor);
  }
  // not times 1 / std^2, which overflows where the quotient does not
  if (with.prior) g = fma(mul(x, c.inverse), c.pull, g);
  if (!with.noise && !with.max_update) return fma(c.drift, g, x);
  F d = mul(c.drift, g);
  if (with.noise) d = fma(c.scale, z, d);
  if (with.max_update) {
    changed = either(changed, greater(abs(d), c.most));
    d = clamp(d, sub(zero, c.most), c.most);
  }
  return add(x, d);
}

// As that of langevin.h, of the norm itself.
MMEBM_INLINE F norm_factor(F norm, F limit) { return select(at_most(norm, limit), setf(1.0f), div(limit, norm)); }

}  // namespace
}  // namespace mmebm
