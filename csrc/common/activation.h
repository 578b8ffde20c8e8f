// The activations of all ops, in the order of mmebm/ops/terms.py and, all of them, mmebm/ops/net/graph.py.
#pragma once

#include <cstdint>

namespace mmebm {

enum class Activation : int32_t {
  relu, leaky_relu, silu, gelu, softplus, tanh, elu, sigmoid, square, abs, exp, sqrt, reciprocal
};
constexpr int ACTIVATIONS = 7;  // of the MLP ops
constexpr int FUNCTIONS = 13;   // of the net ops

// The derivative of relu where it is off: the smallest normal number, as a mark. Nothing passes there, also nothing
// infinite or NaN (`through`), as in autograd; 0 times these would be NaN.
constexpr float STOP = 0x1p-126f;

}  // namespace mmebm
