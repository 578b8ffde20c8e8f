// mmebm._cuda: pointers and sizes, no torch. Calls that run on the GPU return a cudaError code; mmebm/native.py raises.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "langevin_mlp/bind_cuda.h"
#include "langevin_step/bind_cuda.h"
#include "noise/cuda.h"

namespace py = pybind11;
using namespace mmebm;

namespace {

void require_sizes(uintptr_t out, int64_t rows, int64_t columns) {
  if (rows < 0 || columns < 0) throw py::value_error("sizes must not be negative");
  if (out == 0 && rows > 0 && columns > 0) throw py::value_error("out_ptr is null");
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA ops of mmebm on raw pointers; call them through mmebm.native, which checks what it is given";
  m.attr("__version__") = MMEBM_VERSION;
  m.attr("cuda_version") = runtime_version_cuda();
  m.attr("architectures") = MMEBM_CUDA_ARCHS;

  m.def("device_count", [] {
    int count = 0;
    const int code = device_count_cuda(count);
    return py::make_tuple(count, code);
  }, "(number of devices, cudaError code); works without a driver.");

  m.def("error_string", &error_string_cuda, "The text of a cudaError code.", py::arg("code"));

  m.def("philox_words",
        [](uintptr_t out_ptr, int64_t chains, int64_t blocks, uint64_t seed, uint32_t step, uint32_t stream,
           uint32_t chain_offset, int device, uint64_t cuda_stream) {
          require_sizes(out_ptr, chains, blocks);
          return philox_words_cuda(reinterpret_cast<uint32_t*>(out_ptr), chains, blocks,
                                   {seed, step, stream, chain_offset}, device, cuda_stream);
        },
        "Fill uint32 (chains, blocks, 4) on the device with the words of noise.words; returns a cudaError code.",
        py::arg("out_ptr"), py::arg("chains"), py::arg("blocks"), py::arg("seed"), py::arg("step"), py::arg("stream"),
        py::arg("chain_offset"), py::arg("device") = 0, py::arg("cuda_stream") = 0);

  m.def("normal",
        [](uintptr_t out_ptr, int64_t chains, int64_t numel, uint64_t seed, uint32_t step, uint32_t stream,
           uint32_t chain_offset, int device, uint64_t cuda_stream) {
          require_sizes(out_ptr, chains, numel);
          return normal_cuda(reinterpret_cast<float*>(out_ptr), chains, numel, {seed, step, stream, chain_offset},
                             device, cuda_stream);
        },
        "Fill float32 (chains, numel) on the device with the normals of noise.normal; returns a cudaError code.",
        py::arg("out_ptr"), py::arg("chains"), py::arg("numel"), py::arg("seed"), py::arg("step"), py::arg("stream"),
        py::arg("chain_offset"), py::arg("device") = 0, py::arg("cuda_stream") = 0);

  m.def("host_philox_words",
        [](uintptr_t out_ptr, int64_t chains, int64_t blocks, uint64_t seed, uint32_t step, uint32_t stream,
           uint32_t chain_offset) {
          require_sizes(out_ptr, chains, blocks);
          philox_words_host(reinterpret_cast<uint32_t*>(out_ptr), chains, blocks, {seed, step, stream, chain_offset});
        },
        "philox_words by the same device functions, run on the host on a host pointer.", py::arg("out_ptr"),
        py::arg("chains"), py::arg("blocks"), py::arg("seed"), py::arg("step"), py::arg("stream"),
        py::arg("chain_offset"));

  m.def("host_normal",
        [](uintptr_t out_ptr, int64_t chains, int64_t numel, uint64_t seed, uint32_t step, uint32_t stream,
           uint32_t chain_offset) {
          require_sizes(out_ptr, chains, numel);
          normal_host(reinterpret_cast<float*>(out_ptr), chains, numel, {seed, step, stream, chain_offset});
        },
        "normal by the same device functions, run on the host on a host pointer.", py::arg("out_ptr"),
        py::arg("chains"), py::arg("numel"), py::arg("seed"), py::arg("step"), py::arg("stream"),
        py::arg("chain_offset"));

  bind_langevin_step(m);
  bind_langevin_mlp(m);
}
