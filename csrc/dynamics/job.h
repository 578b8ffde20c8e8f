// What cpu.cpp and its loops (cpu_kernel.cpp) share. Plain data, because the files with AVX in them must not instantiate
// anything from std:: (isa.h).
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/philox.h"

namespace mmebm {

// One number, one per chain, or one per element of (chains, numel).
struct Coefficient {
  enum Kind : int32_t { number = 0, chain = 1, element = 2 };
  Kind kind = number;
  double value = 0.0;
  const float* values = nullptr;
};

// With step size h, friction c, temperature T and mass m: KICK h / m (half of it for Underdamped), DRIFT h (h / 2),
// DECAY exp(-c h), NOISE sqrt((1 - DECAY^2) T / m), THERMAL sqrt(T / m), MASS m.
enum DynamicsSlot : int32_t { KICK, DRIFT, DECAY, NOISE, THERMAL, MASS, DYNAMICS_SLOTS };

// A tensor that moves, (chains, numel) in float32. y may be x, where no step is taken back.
struct MovingTensor {
  int64_t numel = 0;
  uint32_t index = 0;                 // tensor index in the stream word
  const uint8_t* observed = nullptr;  // (chains, numel), nonzero: keeps its value; or null
  float *x = nullptr, *y = nullptr;   // the state, and where it goes
  float *v = nullptr, *before = nullptr;  // velocities, and those at the step's start (null: not kept)
  float* g = nullptr;                 // the gradient at x, where steps may be taken back; else null
  const float* grad = nullptr;        // of the step: the gradient that the energy returned last
  Coefficient c[DYNAMICS_SLOTS];
};

struct DynamicsJob {
  const MovingTensor* tensors = nullptr;
  int64_t count = 0, chains = 0;
  uint64_t seed = 0;
  uint32_t step = 0, chain_offset = 0;
  // (chains,): 0 where state, energy or gradient was not finite; frozen: such chains stay where they are
  uint8_t* alive = nullptr;
  bool freeze = false;
  float *energy = nullptr;            // at x; or null
  const float* new_energy = nullptr;  // at y; or null
  // HMC's decision, (chains,) each
  double temperature = 1.0;
  const float* temperatures = nullptr;
  float *accept_prob = nullptr, *accepted = nullptr, *energy_error = nullptr;
  double* prob_sum = nullptr;
  uint8_t* ever_accepted = nullptr;
};

// A proposal of the Langevin step, (rows, numel) in float32: see mmebm/samplers/metropolis.py.
enum ProposalSlot : int32_t { SIZE, SCALE, CLIP, NORM_CLIP, PRIOR, PROPOSAL_SLOTS };

struct ProposalTensor {
  int64_t numel = 0;
  const uint8_t* observed = nullptr;
  float *x = nullptr, *y = nullptr;       // before the step, and proposed: rejected rows of y become those of x
  float* gx = nullptr;                    // gradient at x: accepted rows become those of gy, where `keep`
  const float* gy = nullptr;
  bool has[PROPOSAL_SLOTS] = {};
  Coefficient c[PROPOSAL_SLOTS];          // numbers, or one per row
};

struct ProposalJob {
  const ProposalTensor* tensors = nullptr;
  int64_t count = 0, rows = 0, rows_per_chain = 1;
  NoiseAt at = {};
  bool keep = false;
  float* energy = nullptr;
  const float* new_energy = nullptr;
  double temperature = 1.0;
  const double* temperatures = nullptr;  // one per row
  const uint8_t* alive = nullptr;        // (rows,): 0 stays where it is; or null
  float *accept_prob = nullptr;
  uint8_t* accepted = nullptr;
};

// One instruction set's loops, each over chains (rows) [begin, end).
struct DynamicsLoops {
  void (*hmc_start)(const DynamicsJob& job, int64_t begin, int64_t end);
  void (*leap)(const DynamicsJob& job, int64_t begin, int64_t end);
  void (*hmc_end)(const DynamicsJob& job, int64_t begin, int64_t end);
  void (*baoa)(const DynamicsJob& job, int64_t begin, int64_t end);
  void (*baoab_end)(const DynamicsJob& job, int64_t begin, int64_t end);
  void (*decide)(const ProposalJob& job, int64_t begin, int64_t end);
  void (*finite)(const float* values, int64_t numel, uint8_t* alive, int64_t begin, int64_t end);
};

MMEBM_DECLARE_LOOPS(DynamicsLoops, dynamics_loops)

}  // namespace mmebm
