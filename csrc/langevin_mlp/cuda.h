// A whole Langevin chain on a sum of MLP terms on a GPU. No Python and no CUDA header here; how it is done, see
// cuda.cu.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/activations.h"
#include "langevin_step/cuda.h"

namespace mmebm {

// What a launch takes: LIMITS of mmebm/ops/terms.py, from which these follow.
constexpr int MLP_TERMS = 16, MLP_LAYERS = 5, MLP_TENSORS = 32, MLP_ENDS = 1024, MLP_HIDDEN = 256;

enum class Precision : int32_t { fp32, tf32x3, bf16 };

struct DeviceLayer {
  const float* weight = nullptr;  // (outputs, inputs)
  const float* bias = nullptr;    // (outputs,) or null
  // of its copies in shared memory, in floats; -1: read from `weight`. The second: transposed, where a cluster's blocks
  // share the work, else the first serves both directions
  int32_t place = -1, place_back = -1;
  uint16_t inputs = 0, outputs = 0;
};

enum class DeviceTermKind : uint8_t { scalar, residual, quadratic };

struct DeviceTerm {
  const void* first = nullptr;   // residual: the target, fp32 (chains, outputs); quadratic: the mean
  const void* second = nullptr;  // residual: the mask, bytes, or null; quadratic: the precision
  float slope = 0.0f, weight = 1.0f;
  float pull = 0.0f, half = 0.0f;  // residual: dE/dy is pull times r, or its sign; E is half times sum of r^2, or |r|
  uint8_t first_layer = 0, depth = 0;
  DeviceTermKind kind = DeviceTermKind::scalar;
  uint8_t activation = 0;
  bool laplace = false, tanh = false, mask_rows = false;  // mask_rows: one for each chain
};

struct DeviceTensor {
  uint16_t begin = 0, width = 0, first_quad = 0;
  bool noisy = true, moving = true;
  uint32_t stream = 0, present = 0;
};

// Everything a launch needs, passed by value: a captured graph holds it.
struct DeviceChain {
  DeviceLayer layers[MLP_TERMS * MLP_LAYERS];
  DeviceTerm terms[MLP_TERMS];
  DeviceTensor tensors[MLP_TENSORS];
  int32_t term_count = 0, tensor_count = 0, layer_count = 0, quads = 0;
  int32_t chains = 0, inputs = 0, steps = 0;
  const float* x = nullptr;          // (chains, inputs)
  float* out = nullptr;              // (chains, inputs)
  float* energy = nullptr;           // (steps, chains) or null
  float* grad_norm = nullptr;        // (steps, chains) or null
  uint8_t* frozen = nullptr;         // (chains,), where chains freeze
  const uint8_t* observed = nullptr;  // (chains or 1, inputs) or null
  const float* constants = nullptr;  // (steps or 1, tensors, SLOTS, chains or 1)
  bool observed_rows = false, constant_steps = false, constant_chains = false;
  bool noise_before = false, clamp_noise = false, norm_clip = false;
  StepNumber seed, first_step;
  uint32_t chain_offset = 0;
  // How a block's shared memory is laid out, in floats
  int32_t rows = 16;      // chains of a block
  int32_t doublings = 0;  // 2^doublings blocks, a cluster, share the work on the same chains
  int32_t ld_x = 0, ld_slopes = 0, ld_values[2] = {0, 0};
  int32_t at_old = 0, at_g = 0, at_slopes = 0, at_values[2] = {0, 0}, at_rows = 0, at_words = 0;
  int32_t at_weights = 0, floats = 0;
};

// Loads the kernels, which a graph capture might not allow at its first launch. Returns a cudaError code.
int prepare_langevin_mlp(int device);

// Lays out a cluster of `blocks` (1, 2, 4, 8) for `rows` chains (8; 4 or 16 in one block), each with up to `bytes` of
// shared memory: weights that fit beside the state stay there for all steps. False if not even the state fits.
bool lay_out(DeviceChain& chain, Precision precision, int rows, int blocks, int64_t bytes);

// All steps. Returns a cudaError code; nothing synchronises.
int langevin_mlp_cuda(DeviceChain chain, Precision precision, int device, uint64_t cuda_stream);
// The same functions on host memory, the tensor cores' products emulated; the rest as for `lay_out`. False if nothing
// fits.
bool langevin_mlp_host(DeviceChain chain, Precision precision, int rows, int blocks, int64_t bytes);

// An activation and its derivative alone, on the host.
void mlp_activation_host(Activation kind, float slope, const float* in, float* value, float* derivative, int64_t n);

}  // namespace mmebm
