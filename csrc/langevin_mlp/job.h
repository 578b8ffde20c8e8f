// What cpu.cpp and its loops (cpu_kernel.cpp) share: the problem, and a tile's memory. Plain data,
// because the files with AVX in them must not instantiate anything from std:: (isa.h).
#pragma once

#include <cstdint>

#include "common/activation.h"
#include "common/chain_job.h"
#include "common/isa.h"

namespace mmebm {

// Outputs of a layer that are summed side by side. A packed matrix is one panel after the other, each (depth, PANEL),
// the last one (depth, what is left).
constexpr int64_t PANEL = 8;

struct MlpLayer {
  int64_t inputs = 0, outputs = 0;
  const float* weight = nullptr;    // (outputs, inputs)
  const float* bias = nullptr;      // (outputs,) or null
  const float* forward = nullptr;   // packed: outputs from inputs
  const float* backward = nullptr;  // packed: inputs from outputs
};

enum class TermKind : int32_t { scalar, residual, quadratic };

struct MlpTerm {
  TermKind kind = TermKind::scalar;
  Activation activation = Activation::relu;
  float slope = 0.0f;
  MlpLayer* layers = nullptr;
  int64_t depth = 0;  // layers
  double weight = 1.0, scale = 1.0;
  bool laplace = false, tanh = false;
  const float* target = nullptr;      // residual: (chains, outputs)
  const uint8_t* observed = nullptr;  // residual: rows of outputs, or null
  int64_t observed_stride = 0;        // from one chain's row to the next: outputs, or 0 for one row
  const float *mean = nullptr, *precision = nullptr;  // quadratic: (inputs,)
};

static inline int64_t mlp_outputs(const MlpTerm& term) { return term.layers[term.depth - 1].outputs; }

struct MlpJob : ChainJob {
  const MlpTerm* terms = nullptr;
  int64_t term_count = 0;
};

// Where a tile of `lanes` chains keeps its things, in floats from the start of its scratch memory.
struct MlpScratch {
  int64_t x, g, old, a, b, slopes, targets, masks, observed, rows, outputs, quads, size;
};

// Quads (cpu_kernel.cpp): four rows of four chains are 16 floats.
static inline int64_t mlp_quad(int64_t rows) { return (rows + 3) / 4 * 16; }
constexpr int64_t QUADS = 2;

static inline int64_t mlp_max(int64_t a, int64_t b) { return a > b ? a : b; }

// `quads`: for a tile in quads, whose state is as that of any other.
static inline MlpScratch mlp_scratch(const MlpJob& job, int64_t lanes, bool quads) {
  int64_t wide = 1, slopes = 0, targets = 0, masks = 0, quad_slopes = 0;
  for (int64_t t = 0; t < job.term_count; ++t) {
    const MlpTerm& term = job.terms[t];
    if (term.kind == TermKind::quadratic) continue;
    int64_t hidden = 0, quad_hidden = 0;
    for (int64_t l = 0; l < term.depth; ++l) {
      wide = mlp_max(wide, term.layers[l].outputs);
      if (l + 1 < term.depth) {
        hidden += term.layers[l].outputs;
        quad_hidden += mlp_quad(term.layers[l].outputs);
      }
    }
    slopes = mlp_max(slopes, hidden);
    quad_slopes = mlp_max(quad_slopes, quad_hidden);
    if (term.kind == TermKind::residual) {
      targets += mlp_outputs(term);
      if (term.observed) masks += mlp_outputs(term);
    }
  }
  MlpScratch s;
  int64_t at = 0;
  const auto take = [&at](int64_t floats) {
    const int64_t begin = at;
    at += (floats + 15) / 16 * 16;
    return begin;
  };
  s.x = take(job.inputs * lanes);
  s.g = take(job.inputs * lanes);
  s.old = take(job.freeze ? job.inputs * lanes : 0);
  s.a = take(quads ? QUADS * mlp_quad(wide) : wide * lanes);
  s.b = take(quads ? QUADS * mlp_quad(wide) : wide * lanes);
  s.slopes = take(quads ? QUADS * quad_slopes : slopes * lanes);
  s.targets = take(targets * lanes);
  s.masks = take((masks * lanes + 3) / 4);
  s.observed = take(job.observed ? (job.inputs * lanes + 3) / 4 : 0);
  s.rows = take(3 * lanes);  // energy, dead, one more row
  s.outputs = take(quads ? wide * lanes : 0);
  s.quads = take(quads ? (QUADS + 1) * mlp_quad(job.inputs) : 0);
  s.size = at;
  return s;
}

// One instruction set's loops.
struct MlpLoops {
  int64_t lanes;  // chains in one vector
  int64_t most;   // vectors a tile can have
  int64_t quads;  // a rest of up to this many chains is faster in quads than as a vector; 0: there are none
  // All steps of `vectors * lanes` chains from `first` on (fewer at the end of the batch), in aligned scratch memory.
  // No vectors: the rest of the batch, in quads.
  void (*tile)(const MlpJob& job, int64_t first, int64_t vectors, float* scratch);
  // An activation and its derivative alone, so that tests reach every bit pattern; n is a multiple of lanes.
  void (*activate)(Activation kind, float slope, const float* in, float* value, float* derivative, int64_t n);
};

MMEBM_DECLARE_LOOPS(MlpLoops, mlp_loops)

}  // namespace mmebm
