// What cpu.cpp and its loops (cpu_kernel.cpp) share: the plan of a net's forward and backward pass. Plain data
// (common/isa.h says why).
//
// All numbers of a tile lie in one arena of rows; a row holds one number of each of its W chains. A value of a node is
// an image of (height, width, channels) rows inside a border of zeros, which nothing ever writes to; vectors are images
// of one position. Offsets count rows.
#pragma once

#include <cstdint>

#include "common/activation.h"
#include "common/chain_job.h"
#include "common/isa.h"
#include "common/threads.h"

namespace mmebm {

// Products of vectors that are worth another thread's while: some microseconds.
constexpr int64_t NET_SHARED = 1 << 14;

// `value`: what the node gives; `slope`: the derivative of its activation; `grad`: dE/d(value), which the activation's
// backward pass turns into that before it. -1 where there is none. Rows that are not read again are used for others.
struct NetValue {
  int64_t channels = 1, height = 1, width = 1, border_y = 0, border_x = 0;
  int64_t value = -1, slope = -1, grad = -1;

  int64_t elements() const { return channels * height * width; }
  int64_t pitch() const { return (width + 2 * border_x) * channels; }
  int64_t rows() const { return (height + 2 * border_y) * pitch(); }
  bool alike(const NetValue& o) const {
    return channels == o.channels && height == o.height && width == o.width && border_y == o.border_y &&
           border_x == o.border_x;
  }
  int64_t at(int64_t y, int64_t x) const { return (y + border_y) * pitch() + (x + border_x) * channels; }
};

// Consecutive rows that a sum of products reads, from a position's base on. `part`: the products so far are a part that
// is added up apart, so that rounding errors stay those of a short sum.
struct NetSegment {
  int64_t offset;
  int32_t length;
  bool part;
};

// The micro-kernel's work: `outputs` sums over the same rows at each of many positions. A convolution, its gradient (one
// pass for each class of positions modulo the stride), a linear layer and its gradient are all this.
struct NetPass {
  int64_t in = 0, out = 0;  // rows in the arena that the positions are counted from
  const int32_t *from = nullptr, *to = nullptr;  // per position
  int64_t positions = 0, outputs = 0, depth = 0, segment_count = 0;
  const NetSegment* segments = nullptr;
  bool whole = true;  // no segment is a part
  const float* weight = nullptr;  // packed: block after block of outputs, each (depth, block)
  const float* bias = nullptr;    // (outputs,) or null
  int32_t block_positions = 0, block_outputs = 0;  // at most, in registers

  int64_t products() const { return positions * outputs * depth; }  // of vectors
};

// A convolution by Winograd's tiles of height x width outputs (Lavin and Gray, 2016): of taps x taps and stride 1, or a
// sum of such ones, for of stride s it is s x s of them, each over every s-th row and column of what is read (a phase).
// A tile takes (height + taps - 1) (width + taps - 1) products, one at each point, in the place of height width taps^2;
// each point is a pass of its own over the tiles, which sums over the phases too. Tiles are taken `chunk` at a time.
struct NetWinograd {
  int64_t taps = 3, height = 2, width = 2;
  const NetPass* points = nullptr;  // positions and rows are those of one chunk in its thread's scratch
  int64_t in = 0, out = 0;          // rows in the arena that the tiles are counted from
  const int32_t *from = nullptr, *to = nullptr;  // per tile: the first position it reads, and of its outputs
  const int32_t* phases = nullptr;               // (phase_count,) rows from there to where each begins
  int64_t phase_count = 1, channels = 0, outputs = 0, tiles = 0, chunk = 1;
  int64_t in_pitch = 0, in_step = 0, out_pitch = 0, out_step = 0;  // rows from a line, a position to the next
  int64_t in_point = 0, out_point = 0;  // rows of scratch from a point to the next
  const float* bias = nullptr;          // (outputs,) or null

  int64_t inputs() const { return phase_count * channels; }
  int64_t point_count() const { return (height + taps - 1) * (width + taps - 1); }
  int64_t chunks() const { return (tiles + chunk - 1) / chunk; }
  int64_t products() const { return point_count() * tiles * inputs() * outputs; }  // of vectors
  int64_t rows() const { return point_count() * (in_point + out_point); }  // of scratch: inputs, then outputs
};

// The products of a layer, or of its gradient: passes and tiles write to different rows.
struct NetProducts {
  const NetPass* passes = nullptr;
  int64_t pass_count = 0;
  const NetWinograd* tiles = nullptr;
  int64_t tile_count = 0;
};

// Rows out .. out + count - 1 are each the sum of `terms` rows times weights, all of them moving along.
struct NetTerm {
  int32_t in;
  float weight;
};
struct NetRun {
  int32_t out, count, terms;
  int64_t first;  // in the list of terms
};
struct NetRuns {
  const NetRun* runs = nullptr;
  int64_t count = 0;
  const NetTerm* terms = nullptr;
  int64_t products = 0;  // of vectors
};

// A constant over the elements of a value, in their order in memory: numbers, or rows filled at the start of a tile.
struct NetConstant {
  const float* numbers = nullptr;  // (elements,)
  const float* chains = nullptr;   // (chains, elements) in the caller's order
  const int32_t* order = nullptr;  // of chains: where each element is
  int64_t rows = -1;

  bool present() const { return numbers != nullptr || chains != nullptr; }
};

enum class NetKind : int32_t { input, product_sum, map, activation, add, affine, product, norm, logsumexp };

// What one node's backward pass does to the gradient of one it reads. `store`: nothing is there yet; `times`: it is the
// last to add to it, and the activation's derivative follows.
struct NetRead {
  int32_t value = 0;
  bool needed = false, store = false, times = false;
  float coefficient = 1.0f;
  NetRuns back;  // input, map
};

struct NetNode {
  NetKind kind = NetKind::input;
  int32_t out = 0, read_count = 0;
  const NetRead* reads = nullptr;
  int32_t activation = -1;  // applied to the value in place, or that of the node itself
  float slope = 0.0f;
  bool multiply = false;  // the gradient is still to be multiplied by the activation's derivative
  bool divide = false;    // a product is a quotient
  bool accumulate = false;  // the products are added to the value: a sum of layers needs no buffer for each
  NetProducts forward, backward;
  NetRuns runs;
  NetConstant scale, shift;
  // norm, logsumexp: groups of `length` rows of what is read, counted from its first
  const int32_t* index = nullptr;
  int64_t groups = 0, length = 0, scratch = 0;  // scratch: rows, one for each group or element
  float eps = 0.0f;
};

struct NetPlan {
  const NetValue* values = nullptr;
  const NetNode* nodes = nullptr;
  int64_t value_count = 0, node_count = 0;
  int64_t state = 0, grad = 0, old = 0;   // rows of the chains' state, its gradient, and the state before a step
  int64_t energy = 0, dead = 0, row = 0;  // rows of one number
  int64_t observed = 0;                   // rows of bytes
  int64_t rows = 0;                       // of the arena
  int64_t scratch = 0;                    // rows that each thread has for itself
  int32_t last = 0;                       // the value that is the energy
};

// What runs a tile: an arena of zeros, a thread's scratch, both aligned, and the threads that help (none: nullptr).
struct NetRoom {
  float *arena, *scratch;
  Team* team;
};

struct NetLoops {
  int64_t lanes;     // chains in one vector
  int64_t together;  // positions whose rows share a register in a product
  // of sums that a block may have, and along either side: registers of positions, and outputs
  int32_t registers, most_registers, most_outputs;
  // All steps, or one evaluation, of `lanes` chains from `first` on (fewer at the end).
  void (*tile)(const ChainJob& job, const NetPlan& plan, int64_t first, const NetRoom& room);
};

MMEBM_DECLARE_LOOPS(NetLoops, net_loops)
#if defined(MMEBM_X86)
extern const NetLoops net_loops_narrow512, net_loops_narrow256;  // AVX-512 for 8 chains, AVX2 for 4
#endif

// The outputs of a pass in blocks of nearly equal size, none above block_outputs.
struct NetSplit {
  int64_t parts, size, larger;  // `larger` parts of size + 1, the rest of size

  static NetSplit of(int64_t total, int64_t most) {
    const int64_t parts = (total + most - 1) / most;
    return {parts, total / parts, total % parts};
  }
  int64_t part(int64_t i) const { return size + (i < larger ? 1 : 0); }
  int64_t begin(int64_t i) const { return i * size + (i < larger ? i : larger); }
};

}  // namespace mmebm
