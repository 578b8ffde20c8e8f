// mmebm._cuda.LangevinStep. mmebm/ops/langevin_step/cuda.py checks tensors, keeps them alive and passes addresses.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>

#include "common/bind.h"
#include "langevin_step/cuda.h"

namespace mmebm {

// The addresses of all tensors, and of their gradients unless `grad` is None.
inline void take_addresses(CudaLangevinStep& self, pybind11::handle x, pybind11::handle grad) {
  require_addresses(x, self.count(), "x");
  if (!grad.is_none()) require_addresses(grad, self.count(), "grad");
  for (size_t i = 0; i < self.count(); ++i) {
    void* to = address_at(x, i, "x", self.empty(i));
    self.set_addresses(i, to, grad.is_none() ? nullptr : address_at(grad, i, "grad", self.empty(i)));
  }
}

inline StepNumber step_number(uint64_t value, uintptr_t at) {
  return {value, reinterpret_cast<const int64_t*>(at)};
}

inline int run_perturb(CudaLangevinStep& self, pybind11::handle x, uint64_t seed, uintptr_t seed_at, uint64_t step,
                       uintptr_t step_at, int device, uint64_t cuda_stream) {
  take_addresses(self, x, pybind11::none());
  return self.perturb(step_number(seed, seed_at), step_number(step, step_at), device, cuda_stream);
}

inline int run_step(CudaLangevinStep& self, pybind11::handle x, pybind11::handle grad, uint64_t seed, uintptr_t seed_at,
                    uint64_t step, uintptr_t step_at, bool noise, uintptr_t scratch, uintptr_t floats, uintptr_t counts,
                    int device, uint64_t cuda_stream) {
  take_addresses(self, x, grad);
  const bool stats = floats != 0 && counts != 0;
  if (scratch == 0 && self.scratch_bytes(stats) != 0) throw pybind11::value_error("scratch is null");
  float* norms = reinterpret_cast<float*>(floats);
  int64_t* counted = reinterpret_cast<int64_t*>(counts);
  const StepSums sums = {norms, norms + self.chains(), counted, counted + self.chains()};
  return self.step(step_number(seed, seed_at), step_number(step, step_at), noise, stats ? &sums : nullptr,
                   reinterpret_cast<void*>(scratch), device, cuda_stream);
}

inline void bind_langevin_step(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("prepare_langevin_step", &CudaLangevinStep::prepare,
        "Load the kernels on a device, before a graph capture needs them; returns a cudaError code.",
        py::arg("device"));
  py::class_<CudaLangevinStep>(
      m, "LangevinStep",
      "The update of all tensors of a state on a GPU, in place; one object per chain. Calls return a cudaError code. "
      "The host_ functions do the same with the same device functions on host memory.")
      .def(py::init([](int64_t chains, uint32_t chain_offset, uint32_t options) {
             require_options(chains, options);
             return std::make_unique<CudaLangevinStep>(chains, chain_offset, options);
           }),
           py::arg("chains"), py::arg("chain_offset"), py::arg("options"))
      .def("add",
           [](CudaLangevinStep& self, int64_t numel, uint32_t index, bool noisy, int storage, uintptr_t observed,
              bool observed_rows) {
             require_tensor(numel, index);
             self.add(numel, index, noisy, storage_from(storage), reinterpret_cast<const uint8_t*>(observed),
                      observed_rows);
           },
           "A tensor of the state; observed: address of a mask, a byte per element of all chains (observed_rows) or of "
           "one, or 0.",
           py::arg("numel"), py::arg("index"), py::arg("noisy"), py::arg("storage"), py::arg("observed"),
           py::arg("observed_rows"))
      .def("set",
           [](CudaLangevinStep& self, size_t tensor, int slot, int kind, double value, uintptr_t values) {
             const Kind as = static_cast<Kind>(kind);
             if (tensor >= self.count() || slot < 0 || slot >= SLOTS || kind < 0 || kind > 4 || as == Kind::element) {
               throw py::value_error("tensor, slot or kind is out of range");
             }
             if (kind >= 2 && values == 0 && !self.empty(tensor)) throw py::value_error("values is null");
             self.set(tensor, static_cast<Slot>(slot), as, static_cast<float>(value),
                      reinterpret_cast<const float*>(values));
           },
           "A constant of one tensor, kind 0: absent, 1: value, 2 and 4: float32 at values, one per chain or just one.",
           py::arg("tensor"), py::arg("slot"), py::arg("kind"), py::arg("value"), py::arg("values"))
      .def("set_grad",
           [](CudaLangevinStep& self, size_t tensor, int storage) {
             if (tensor >= self.count()) throw py::value_error("tensor is out of range");
             self.set_grad(tensor, storage_from(storage));
           },
           "How the gradients of a tensor are stored from now on.", py::arg("tensor"), py::arg("storage"))
      .def("scratch_bytes", &CudaLangevinStep::scratch_bytes,
           "Bytes of scratch that a step needs with these constants.", py::arg("stats"))
      .def("perturb", &run_perturb,
           "x + noise, in place; seed and step are read from device addresses where these are not 0.", py::arg("x"),
           py::arg("seed"), py::arg("seed_at"), py::arg("step"), py::arg("step_at"), py::arg("device"),
           py::arg("cuda_stream"))
      .def("step", &run_step,
           "One step, in place; floats and counts, unless 0: float32 and int64 (2, chains) for the statistics.",
           py::arg("x"), py::arg("grad"), py::arg("seed"), py::arg("seed_at"), py::arg("step"), py::arg("step_at"),
           py::arg("noise"), py::arg("scratch"), py::arg("floats"), py::arg("counts"), py::arg("device"),
           py::arg("cuda_stream"))
      .def("host_perturb",
           [](CudaLangevinStep& self, py::handle x, uint64_t seed, uintptr_t seed_at, uint64_t step,
              uintptr_t step_at) {
             return run_perturb(self, x, seed, seed_at, step, step_at, CudaLangevinStep::HOST, 0);
           },
           py::arg("x"), py::arg("seed"), py::arg("seed_at"), py::arg("step"), py::arg("step_at"))
      .def("host_step",
           [](CudaLangevinStep& self, py::handle x, py::handle grad, uint64_t seed, uintptr_t seed_at, uint64_t step,
              uintptr_t step_at, bool noise, uintptr_t scratch, uintptr_t floats, uintptr_t counts) {
             return run_step(self, x, grad, seed, seed_at, step, step_at, noise, scratch, floats, counts,
                             CudaLangevinStep::HOST, 0);
           },
           py::arg("x"), py::arg("grad"), py::arg("seed"), py::arg("seed_at"), py::arg("step"), py::arg("step_at"),
           py::arg("noise"), py::arg("scratch"), py::arg("floats"), py::arg("counts"));
}

}  // namespace mmebm
