// One Langevin step for all tensors of a state on the CPU, in place. No Python here.
//
// The rule is mmebm/ops/langevin_step/reference.py, the noise mmebm/noise.py; cpu_kernel.cpp says how it is done.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "langevin_step/job.h"

namespace mmebm {

// What one step did, (chains,) each.
struct StepSums {
  float* grad_norm;
  float* displacement;
  int64_t* clipped;
  int64_t* nonfinite;
};

// One chain of steps over the same tensors: prepared once, then one call per step. Not for two threads at a time.
class LangevinStep {
 public:
  LangevinStep(int64_t chains, uint32_t chain_offset, uint32_t options, Isa isa);
  void add(int64_t numel, uint32_t index, bool noisy, Storage storage, const uint8_t* observed, int64_t channels);
  void set(size_t tensor, Slot slot, Constant constant);

  size_t count() const { return tensors_.size(); }
  bool rejects() const { return fixed_.reject; }
  bool empty(size_t i) const { return fixed_.chains == 0 || tensors_[i].numel == 0; }
  int64_t elements() const { return elements_; }
  StepTensor& tensor(size_t i) { return tensors_[i]; }

  // x <- x + noise, the first half of a step with noise_at="before". The x of every tensor is set.
  void perturb(uint64_t seed, uint32_t step, int threads);
  // The update. The x and the gradient of every tensor are set. `sums` may be null.
  void step(uint64_t seed, uint32_t step, bool noise, const StepSums* sums, int threads);

  // False if a step is already running. Call `leave` where it was true.
  bool enter() { return !running_.test_and_set(std::memory_order_acquire); }
  void leave() { running_.clear(std::memory_order_release); }

 private:
  void each_tile(void (*loop)(const StepJob&, const StepTensor&, int64_t), const StepJob& job, int threads) const;
  void fill_norms(StepJob& job, int threads);
  void fill_sums(const StepJob& job, const StepSums& sums) const;

  std::vector<StepTensor> tensors_;
  StepJob fixed_;
  const StepLoops* loops_;
  int64_t tiles_ = 0, slots_ = 0, elements_ = 0;
  std::vector<double> norm_squares_, norms_, grad_squares_, moved_squares_;
  std::vector<int64_t> clipped_, nonfinite_;
  std::vector<uint8_t> outside_, rejected_;
  std::vector<std::vector<char>> proposals_;
  std::atomic_flag running_ = ATOMIC_FLAG_INIT;
};

// Box-Muller as the step does it, alone: (blocks, 4) words to (blocks, 4) normals.
void step_normals(const uint32_t* words, float* out, int64_t blocks, Isa isa);

}  // namespace mmebm
