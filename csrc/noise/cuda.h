// Filling device arrays with the noise of mmebm/noise.py. Every function returns a cudaError_t as int, 0 for success;
// nothing synchronises. No CUDA header is needed to call them.
#pragma once

#include <cstdint>

#include "common/philox.h"

namespace mmebm {

// out: device pointer, (chains, blocks, 4) words. cuda_stream is a cudaStream_t as an integer, 0 for the default stream.
int philox_words_cuda(uint32_t* out, int64_t chains, int64_t blocks, NoiseAt at, int device, uint64_t cuda_stream);

// out: device pointer, (chains, numel) normals, row-major.
int normal_cuda(float* out, int64_t chains, int64_t numel, NoiseAt at, int device, uint64_t cuda_stream);

// The same device functions run on the host, on host pointers: what the tests compare where there is no GPU.
void philox_words_host(uint32_t* out, int64_t chains, int64_t blocks, NoiseAt at);
void normal_host(float* out, int64_t chains, int64_t numel, NoiseAt at);

int device_count_cuda(int& count);
const char* error_string_cuda(int code);
int runtime_version_cuda();

}  // namespace mmebm
