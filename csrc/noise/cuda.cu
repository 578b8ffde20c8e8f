// One thread per block of four elements; neighbouring threads write neighbouring 16 bytes.
#include "noise/cuda.h"

#include <cuda_runtime.h>

#include "common/normals_cuda.h"

namespace mmebm {
namespace {

constexpr int THREADS = 256;

// Block `index` of the flattened (chains, blocks) array: all that the kernels do, and the host loops too.
__host__ __device__ void store_words(uint32_t* out, int64_t index, int64_t blocks, NoiseAt at) {
  const int64_t row = index / blocks;
  const Words w = words_of(row, index - row * blocks, at);
  uint32_t* to = out + 4 * index;
  to[0] = w.w0;
  to[1] = w.w1;
  to[2] = w.w2;
  to[3] = w.w3;
}

__host__ __device__ void store_normals(float* out, int64_t index, int64_t numel, NoiseAt at) {
  const int64_t blocks = (numel + 3) / 4;
  const int64_t row = index / blocks, column = index - row * blocks;
  const Normals n = normals_of(words_of(row, column, at));
  const int64_t left = numel - 4 * column;  // elements of this chain from here on
  float* to = out + row * numel + 4 * column;
  to[0] = n.n0;
  if (left > 1) to[1] = n.n1;
  if (left > 2) to[2] = n.n2;
  if (left > 3) to[3] = n.n3;
}

__global__ void words_kernel(uint32_t* out, int64_t total, int64_t blocks, NoiseAt at) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * THREADS;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x; i < total; i += stride) {
    store_words(out, i, blocks, at);
  }
}

__global__ void normal_kernel(float* out, int64_t total, int64_t numel, NoiseAt at) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * THREADS;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x; i < total; i += stride) {
    store_normals(out, i, numel, at);
  }
}

// Enough thread blocks to fill any GPU; the kernels stride over the rest.
unsigned int grid(int64_t total) {
  const int64_t wanted = (total + THREADS - 1) / THREADS;
  return static_cast<unsigned int>(wanted < 65536 ? wanted : 65536);
}

}  // namespace

int philox_words_cuda(uint32_t* out, int64_t chains, int64_t blocks, NoiseAt at, int device, uint64_t cuda_stream) {
  const int64_t total = chains * blocks;
  if (total == 0) return cudaSuccess;
  // The static runtime of this library keeps its own notion of the current device, apart from torch's.
  const cudaError_t set = cudaSetDevice(device);
  if (set != cudaSuccess) return set;
  words_kernel<<<grid(total), THREADS, 0, reinterpret_cast<cudaStream_t>(cuda_stream)>>>(out, total, blocks, at);
  return cudaGetLastError();
}

int normal_cuda(float* out, int64_t chains, int64_t numel, NoiseAt at, int device, uint64_t cuda_stream) {
  const int64_t total = chains * ((numel + 3) / 4);
  if (total == 0) return cudaSuccess;
  const cudaError_t set = cudaSetDevice(device);
  if (set != cudaSuccess) return set;
  normal_kernel<<<grid(total), THREADS, 0, reinterpret_cast<cudaStream_t>(cuda_stream)>>>(out, total, numel, at);
  return cudaGetLastError();
}

void philox_words_host(uint32_t* out, int64_t chains, int64_t blocks, NoiseAt at) {
  for (int64_t i = 0; i < chains * blocks; ++i) store_words(out, i, blocks, at);
}

void normal_host(float* out, int64_t chains, int64_t numel, NoiseAt at) {
  const int64_t total = chains * ((numel + 3) / 4);
  for (int64_t i = 0; i < total; ++i) store_normals(out, i, numel, at);
}

int device_count_cuda(int& count) {
  count = 0;
  const cudaError_t code = cudaGetDeviceCount(&count);
  cudaGetLastError();  // clears the error, which the next launch check would report otherwise
  return code;
}

const char* error_string_cuda(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}

int runtime_version_cuda() {
  return CUDART_VERSION;
}

}  // namespace mmebm
