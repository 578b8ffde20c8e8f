// The order of passes over a state, the sums over parts of chains, and the choice of instruction set; the loops
// themselves are in cpu_kernel.cpp.
//
// A step is one parallel pass over the tiles of all tensors. There is a pass before it where a norm is needed that
// spans tiles, and one after it where a chain that leaves the box keeps its place in all tensors.
#include "langevin_step/cpu.h"

#include <algorithm>
#include <cmath>

#include "common/threads.h"

namespace mmebm {
namespace {

}  // namespace

LangevinStep::LangevinStep(int64_t chains, uint32_t chain_offset, uint32_t options, Isa isa)
    : loops_(&step_loops(isa)) {
  fixed_.chains = chains;
  fixed_.chain_offset = chain_offset;
  fixed_.options = options;
  fixed_.reject = (options & REJECT_OUTSIDE) != 0;
}

void LangevinStep::add(int64_t numel, uint32_t index, bool noisy, Storage storage, const uint8_t* observed,
                       int64_t channels) {
  StepTensor t;
  t.numel = numel;
  t.channels = channels;
  t.index = index;
  t.noisy = noisy;
  t.storage = t.grad_storage = storage;
  t.observed = observed;
  t.first_tile = tiles_;
  t.first_slot = slots_;
  const int64_t chains = fixed_.chains;
  if (numel > 0 && chains > 0) {
    if (numel <= TILE) {
      t.rows = TILE / numel;
      t.part = numel;
      tiles_ += (chains + t.rows - 1) / t.rows;
      slots_ += chains;
    } else {
      const int64_t wanted = (numel + TILE - 1) / TILE;
      t.part = ((numel + wanted - 1) / wanted + 63) / 64 * 64;
      t.parts = (numel + t.part - 1) / t.part;
      tiles_ += chains * t.parts;
      slots_ += chains * t.parts;
    }
    elements_ += chains * numel;
  }
  if (fixed_.reject) {
    proposals_.emplace_back(static_cast<size_t>(chains * numel) * (storage == Storage::fp32 ? 4 : 2));
  }
  tensors_.push_back(t);
}

void LangevinStep::set(size_t tensor, Slot slot, Constant constant) {
  tensors_[tensor].constants[slot] = constant;
}

void LangevinStep::each_tile(void (*loop)(const StepJob&, const StepTensor&, int64_t), const StepJob& job,
                             int threads) const {
  for_each_tile(tiles_, threads, [this, loop, &job](int64_t tile) {
    size_t i = tensors_.size() - 1;
    while (tensors_[i].first_tile > tile) --i;
    loop(job, tensors_[i], tile - tensors_[i].first_tile);
  });
}

// Norms that need more than one tile, of the gradient after the clip by value.
void LangevinStep::fill_norms(StepJob& job, int threads) {
  bool needed = false;
  for (const StepTensor& t : tensors_) {
    needed |= t.constants[GRAD_NORM_CLIP].kind != Kind::absent && (t.parts > 1 || fixed_.options & NORM_OF_TENSOR);
  }
  if (!needed) return;
  norm_squares_.resize(static_cast<size_t>(slots_));
  norms_.resize(tensors_.size() * static_cast<size_t>(job.chains));
  job.norm_squares = norm_squares_.data();
  each_tile(loops_->norm, job, threads);
  for (size_t i = 0; i < tensors_.size(); ++i) {
    const StepTensor& t = tensors_[i];
    if (t.constants[GRAD_NORM_CLIP].kind == Kind::absent) continue;
    double* norm = norms_.data() + static_cast<int64_t>(i) * job.chains;
    double all = 0.0;
    for (int64_t chain = 0; chain < job.chains; ++chain) {
      double sum = 0.0;
      for (int64_t part = 0; part < t.parts && t.numel > 0; ++part) {
        sum += norm_squares_[static_cast<size_t>(t.first_slot + chain * t.parts + part)];
      }
      norm[chain] = std::sqrt(sum);
      all += sum;
    }
    if (fixed_.options & NORM_OF_TENSOR) std::fill(norm, norm + job.chains, std::sqrt(all));
  }
  job.norms = norms_.data();
}

void LangevinStep::fill_sums(const StepJob& job, const StepSums& sums) const {
  for (int64_t chain = 0; chain < job.chains; ++chain) {
    double grad = 0.0, moved = 0.0;
    int64_t clipped = 0, nonfinite = 0;
    for (const StepTensor& t : tensors_) {
      for (int64_t part = 0; part < t.parts && t.numel > 0; ++part) {
        const int64_t slot = t.first_slot + chain * t.parts + part;
        grad += job.grad_squares[slot];
        moved += job.moved_squares[slot];
        clipped += job.clipped[slot];
        nonfinite += job.nonfinite[slot];
      }
    }
    sums.grad_norm[chain] = static_cast<float>(std::sqrt(grad));
    sums.displacement[chain] = static_cast<float>(std::sqrt(moved));
    sums.clipped[chain] = clipped;
    sums.nonfinite[chain] = nonfinite;
  }
}

void LangevinStep::perturb(uint64_t seed, uint32_t step, int threads) {
  StepJob job = fixed_;
  job.tensors = tensors_.data();
  job.seed = seed;
  job.step = step;
  job.drift = false;
  job.bounds = (job.options & CLAMP_NOISE) != 0;
  job.reject = false;
  each_tile(loops_->update, job, threads);
}

void LangevinStep::step(uint64_t seed, uint32_t step, bool noise, const StepSums* sums, int threads) {
  StepJob job = fixed_;
  job.tensors = tensors_.data();
  job.seed = seed;
  job.step = step;
  job.noise = noise;
  job.stats = sums != nullptr;
  const size_t slots = static_cast<size_t>(slots_);
  if (job.reject) {
    job.reject = std::any_of(tensors_.begin(), tensors_.end(), [](const StepTensor& t) {
      return t.constants[LOW].kind != Kind::absent || t.constants[HIGH].kind != Kind::absent;
    });
    job.bounds = job.reject;
  }
  if (job.stats) {
    grad_squares_.resize(slots);
    moved_squares_.resize(slots);
    clipped_.resize(slots);
    nonfinite_.resize(slots);
    job.grad_squares = grad_squares_.data();
    job.moved_squares = moved_squares_.data();
    job.clipped = clipped_.data();
    job.nonfinite = nonfinite_.data();
  }
  if (job.reject) {
    outside_.resize(slots);
    job.outside = outside_.data();
    for (size_t i = 0; i < tensors_.size(); ++i) tensors_[i].proposal = proposals_[i].data();
  }
  fill_norms(job, threads);
  each_tile(loops_->update, job, threads);
  if (job.reject) {
    rejected_.assign(static_cast<size_t>(job.chains), 0);
    for (const StepTensor& t : tensors_) {
      for (int64_t i = 0; t.numel > 0 && i < job.chains * t.parts; ++i) {
        rejected_[static_cast<size_t>(i / t.parts)] |= outside_[static_cast<size_t>(t.first_slot + i)];
      }
    }
    job.rejected = rejected_.data();
    each_tile(loops_->commit, job, threads);
  }
  if (sums != nullptr) fill_sums(job, *sums);
}

void step_normals(const uint32_t* words, float* out, int64_t blocks, Isa isa) {
  step_loops(isa).normals(words, out, blocks);
}

}  // namespace mmebm
