// Steps of HMC and Underdamped, the Metropolis test of the Langevin step, exchanges of tempering. No Python here.
#pragma once

#include <cstdint>

#include "dynamics/job.h"

namespace mmebm {

enum class Phase { hmc_start, leap, hmc_end, baoa, baoab_end };

void run_dynamics(const DynamicsJob& job, Phase phase, int threads, Isa isa);
void run_decide(const ProposalJob& job, int threads, Isa isa);

// alive[row] = 0 where row `row` of values (rows, numel) holds an inf or NaN.
void finite_rows(const float* values, int64_t rows, int64_t numel, uint8_t* alive, int threads, Isa isa);

// A ladder of `rungs` replicas per chain, rows chain by chain; tensors (chains * rungs, numel) are exchanged in place.
struct Ladder {
  int64_t chains = 0, rungs = 0;
  NoiseAt at = {};
  const float* inverse = nullptr;  // (rungs,): 1 / T
  float* energy = nullptr;         // (chains * rungs,)
  uint8_t* alive = nullptr;        // (chains * rungs,): 0 is not exchanged
  int64_t* origin = nullptr;       // (chains, rungs): which replica is there
  float* prob = nullptr;           // (chains, rungs - 1); NaN where not tried
  float* prob_sum = nullptr;       // the same, added to where tried
};

struct Replicas {
  float* values = nullptr;
  int64_t numel = 0;
};

// Pairs (side, side + 1), (side + 2, side + 3), ... side is 0 or 1.
void exchange(const Ladder& ladder, const Replicas* tensors, int64_t count, int side);

// out: (chains, numel) uniforms in [0, 1), row-major.
void uniform_cpu(float* out, int64_t chains, int64_t numel, NoiseAt at);
void uniform_cpu(double* out, int64_t chains, int64_t numel, NoiseAt at);

}  // namespace mmebm
