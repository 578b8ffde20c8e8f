// The unit of work of the elementwise loops on the CPU.
#pragma once

#include <cstdint>

namespace mmebm {

// Elements: a tile's buffers (gradient, noise, proposal: 4 bytes an element each) stay in the L1 cache, and a tile is
// some 1.5 us of work.
constexpr int64_t TILE = 2048;

}  // namespace mmebm
