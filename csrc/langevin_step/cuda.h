// One Langevin step for all tensors of a state on a GPU, in place. No Python and no CUDA header here; how it is done,
// see cuda.cu.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "common/langevin.h"

namespace mmebm {

constexpr int STEP_TENSORS = 32;  // tensors a launch; more take several

// One tensor as a kernel sees it.
struct StepTensor {
  void* x = nullptr;
  const void* grad = nullptr;
  const uint8_t* observed = nullptr;  // (chains or 1, numel), nonzero: keeps its value
  int64_t numel = 0;                  // elements of one chain
  uint32_t first_tile = 0;            // of the map kernel
  uint32_t inverse = 0;               // 2^shift / groups of a chain, rounded up
  uint32_t index = 0;                 // tensor index in the stream word
  uint32_t with = 0;                  // what applies (langevin.h), and the bits of TensorBit
  uint32_t kinds = 0;                 // the Kind of each constant, four bits each
  uint32_t groups = 0;                // of a chain
  uint64_t constants[SLOTS] = {};     // the bits of an fp32 number, or an address
};

// A number, or where the device finds it.
struct StepNumber {
  uint64_t value = 0;
  const int64_t* at = nullptr;
};

// What one step did, (chains,) each, on the state's device.
struct StepSums {
  float* grad_norm;
  float* displacement;
  int64_t* clipped;
  int64_t* nonfinite;
};

// Everything a launch needs, passed by value: a captured graph holds it.
struct StepTable {
  StepTensor tensors[STEP_TENSORS];
  int64_t chains = 0, items = 0;  // items: tiles, or splits of chains
  StepNumber seed, step;
  uint32_t chain_offset = 0, purpose = 0, todo = 0;
  int32_t count = 0, tile = 0;    // tensors; groups a tile of the map kernel
  int32_t team = 1, splits = 1;   // threads that work on one chain, and parts it is cut in
  int32_t column0 = 0, columns = 1;
  // Memory that programs share, each may be null
  float* norms = nullptr;    // sums of squares (count, chains, splits), then their totals (count,) for whole tensors
  float* outside = nullptr;  // (chains, columns)
  float* floats = nullptr;   // (2, chains, columns)
  int64_t* counts = nullptr;  // (2, chains, columns)
  StepSums sums = {nullptr, nullptr, nullptr, nullptr};
};

// One chain of steps over the same tensors: prepared once, then one call per step. Not for two threads at a time. Its
// name differs from the CPU's because pybind11 knows types by name in all extensions of a process.
class CudaLangevinStep {
 public:
  CudaLangevinStep(int64_t chains, uint32_t chain_offset, uint32_t options)
      : chains_(chains), chain_offset_(chain_offset), options_(options) {}
  void add(int64_t numel, uint32_t index, bool noisy, Storage storage, const uint8_t* observed, bool observed_rows);
  void set(size_t tensor, Slot slot, Kind kind, float value, const float* values);
  void set_grad(size_t tensor, Storage storage) { tensors_[tensor].grad_storage = storage; }

  int64_t chains() const { return chains_; }
  size_t count() const { return tensors_.size(); }
  bool empty(size_t i) const { return chains_ == 0 || tensors_[i].kernel.numel == 0; }
  void set_addresses(size_t i, void* x, const void* grad) {
    tensors_[i].kernel.x = x;
    tensors_[i].kernel.grad = grad;
  }

  // Loads the kernels, which a graph capture might not allow at its first launch. Returns a cudaError code.
  static int prepare(int device);
  // Bytes that `step` needs at `scratch`, aligned to 8.
  int64_t scratch_bytes(bool stats) const;
  // x <- x + noise, the first half of a step with noise_at="before". Returns a cudaError code; nothing synchronises.
  // device: its index, or HOST: the same device functions in the same order, on host memory.
  static constexpr int HOST = -1;
  int perturb(StepNumber seed, StepNumber step, int device, uint64_t cuda_stream);
  // The update. `sums` may be null.
  int step(StepNumber seed, StepNumber step, bool noise, const StepSums* sums, void* scratch, int device,
           uint64_t cuda_stream);

 private:
  struct Tensor {
    StepTensor kernel;
    Storage storage, grad_storage;
    bool noisy;
  };
  struct Plan;
  Plan plan(bool stats) const;
  int run_map(StepNumber seed, StepNumber step, uint32_t purpose, uint32_t drop, uint32_t add, int device,
              uint64_t cuda_stream);
  StepTable table(size_t first, size_t last, StepNumber seed, StepNumber step, uint32_t drop, uint32_t add) const;

  std::vector<Tensor> tensors_;
  int64_t chains_;
  uint32_t chain_offset_, options_;
};

}  // namespace mmebm
