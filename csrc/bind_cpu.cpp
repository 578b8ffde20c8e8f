// mmebm._cpu: pointers and sizes, no torch. mmebm/native.py checks tensors and calls these.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "dynamics/bind.h"
#include "langevin_mlp/bind.h"
#include "langevin_step/bind.h"
#include "net/bind.h"
#include "noise/cpu.h"
#include "residual/bind.h"

namespace py = pybind11;
using namespace mmebm;

namespace {

Isa isa_from(const std::string& name) {
  const Isa best = best_isa();
  if (name == "auto") return best;
  for (int i = 0; i <= static_cast<int>(best); ++i) {
    if (name == isa_name(static_cast<Isa>(i))) return static_cast<Isa>(i);
  }
  throw py::value_error("isa must be 'auto' or one of isas() on this processor, got '" + name + "'");
}

void require_sizes(uintptr_t out, int64_t rows, int64_t columns) {
  if (rows < 0 || columns < 0) throw py::value_error("sizes must not be negative");
  if (out == 0 && rows > 0 && columns > 0) throw py::value_error("out_ptr is null");
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "C++ ops of mmebm on raw pointers; call them through mmebm.native, which checks what it is given";
  m.attr("__version__") = MMEBM_VERSION;

  m.def("isas", [] {
    py::tuple names(static_cast<size_t>(best_isa()) + 1);
    for (size_t i = 0; i < names.size(); ++i) names[i] = isa_name(static_cast<Isa>(i));
    return names;
  }, "The instruction sets this processor can run, slowest first; the last one is used.");

  m.def("philox_words",
        [](uintptr_t out_ptr, int64_t chains, int64_t blocks, uint64_t seed, uint32_t step, uint32_t stream,
           uint32_t chain_offset, int threads, const std::string& isa) {
          require_sizes(out_ptr, chains, blocks);
          const Isa chosen = isa_from(isa);
          py::gil_scoped_release release;
          philox_words_cpu(reinterpret_cast<uint32_t*>(out_ptr), chains, blocks, {seed, step, stream, chain_offset},
                           threads, chosen);
        },
        "Fill uint32 (chains, blocks, 4) at out_ptr with the words of noise.words.", py::arg("out_ptr"),
        py::arg("chains"), py::arg("blocks"), py::arg("seed"), py::arg("step"), py::arg("stream"),
        py::arg("chain_offset"), py::arg("threads") = 1, py::arg("isa") = "auto");

  m.def("normal",
        [](uintptr_t out_ptr, int64_t chains, int64_t numel, uint64_t seed, uint32_t step, uint32_t stream,
           uint32_t chain_offset, int threads, const std::string& isa) {
          require_sizes(out_ptr, chains, numel);
          const Isa chosen = isa_from(isa);
          py::gil_scoped_release release;
          normal_cpu(reinterpret_cast<float*>(out_ptr), chains, numel, {seed, step, stream, chain_offset}, threads,
                     chosen);
        },
        "Fill float32 (chains, numel) at out_ptr with the normals of noise.normal.", py::arg("out_ptr"),
        py::arg("chains"), py::arg("numel"), py::arg("seed"), py::arg("step"), py::arg("stream"),
        py::arg("chain_offset"), py::arg("threads") = 1, py::arg("isa") = "auto");

  m.def("box_muller",
        [](uintptr_t words_ptr, uintptr_t out_ptr, int64_t blocks, const std::string& isa) {
          require_sizes(words_ptr, blocks, 4);
          require_sizes(out_ptr, blocks, 4);
          box_muller_cpu(reinterpret_cast<const uint32_t*>(words_ptr), reinterpret_cast<float*>(out_ptr), blocks,
                         isa_from(isa));
        },
        "float32 (blocks, 4) at out_ptr from uint32 (blocks, 4) at words_ptr: noise.box_muller.", py::arg("words_ptr"),
        py::arg("out_ptr"), py::arg("blocks"), py::arg("isa") = "auto");

  bind_dynamics(m, isa_from);
  bind_langevin_step(m, isa_from);
  bind_residual(m, isa_from);
  bind_langevin_mlp(m, isa_from);
  bind_net(m, isa_from);
}
