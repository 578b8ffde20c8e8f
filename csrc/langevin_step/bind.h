// mmebm._cpu.LangevinStep. mmebm/ops/langevin_step/cpp.py checks tensors, keeps them alive and passes addresses.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>

#include "common/bind.h"
#include "langevin_step/cpu.h"

namespace mmebm {

// The addresses in `list`, one per tensor.
inline void take_addresses(LangevinStep& step, pybind11::handle list, const char* name, bool grad) {
  require_addresses(list, step.count(), name);
  for (size_t i = 0; i < step.count(); ++i) {
    void* address = address_at(list, i, name, step.empty(i));
    StepTensor& tensor = step.tensor(i);
    if (grad) {
      tensor.grad = address;
    } else {
      tensor.x = address;
    }
  }
}

// Below this many elements a step takes less time than giving up the interpreter lock and waking a thread.
constexpr int64_t SMALL_STEP = 1 << 14;

// Holds a step for one call: run(threads), without the interpreter lock where that is worth it.
struct StepCall {
  explicit StepCall(LangevinStep& step) : step(step) {
    if (!step.enter()) throw std::runtime_error("this LangevinStep is running in another thread");
  }
  ~StepCall() { step.leave(); }
  template <class Run>
  void operator()(int threads, const Run& run) {
    if (step.elements() < SMALL_STEP) {
      run(1);
    } else {
      pybind11::gil_scoped_release release;
      run(threads);
    }
  }
  LangevinStep& step;
};

inline void bind_langevin_step(pybind11::module_& m, Isa (*isa_from)(const std::string&)) {
  namespace py = pybind11;
  m.def("step_normals",
        [isa_from](uintptr_t words_ptr, uintptr_t out_ptr, int64_t blocks, const std::string& isa) {
          if (blocks < 0 || ((words_ptr == 0 || out_ptr == 0) && blocks > 0)) {
            throw py::value_error("blocks is negative or an address is null");
          }
          step_normals(reinterpret_cast<const uint32_t*>(words_ptr), reinterpret_cast<float*>(out_ptr), blocks,
                       isa_from(isa));
        },
        "Box-Muller as LangevinStep does it: float32 (blocks, 4) from uint32 (blocks, 4).", py::arg("words_ptr"),
        py::arg("out_ptr"), py::arg("blocks"), py::arg("isa") = "auto");
  py::class_<LangevinStep>(m, "LangevinStep", "The update of all tensors of a state, in place; one object per chain.")
      .def(py::init([isa_from](int64_t chains, uint32_t chain_offset, uint32_t options, const std::string& isa) {
             require_options(chains, options);
             return std::make_unique<LangevinStep>(chains, chain_offset, options, isa_from(isa));
           }),
           py::arg("chains"), py::arg("chain_offset"), py::arg("options"), py::arg("isa"))
      .def("add",
           [](LangevinStep& self, int64_t numel, uint32_t index, bool noisy, int storage, uintptr_t observed,
              int64_t channels) {
             require_tensor(numel, index);
             const bool apart = channels > 1 && (numel % channels != 0 || storage != 0 || self.rejects());
             if (channels < 1 || apart) throw py::value_error("channels does not fit the tensor");
             self.add(numel, index, noisy, storage_from(storage), reinterpret_cast<const uint8_t*>(observed), channels);
           },
           "A tensor [chains, numel] of the state; observed: the address of a mask [chains, numel] bool, or 0; "
           "channels: above 1 where the memory of an fp32 state and its gradients has them last.",
           py::arg("numel"), py::arg("index"), py::arg("noisy"), py::arg("storage"), py::arg("observed"),
           py::arg("channels") = 1)
      .def("set",
           [](LangevinStep& self, size_t tensor, int slot, int kind, double value, uintptr_t values) {
             if (tensor >= self.count() || slot < 0 || slot >= SLOTS || kind < 0 || kind > 3) {
               throw py::value_error("tensor, slot or kind is out of range");
             }
             if (kind >= 2 && values == 0 && !self.empty(tensor)) throw py::value_error("values is null");
             self.set(tensor, static_cast<Slot>(slot),
                      {static_cast<Kind>(kind), value, reinterpret_cast<const float*>(values)});
           },
           "A constant of one tensor, kind 0: absent, 1: value, 2 and 3: float32 at values, per chain and per element.",
           py::arg("tensor"), py::arg("slot"), py::arg("kind"), py::arg("value"), py::arg("values"))
      .def("set_grad",
           [](LangevinStep& self, size_t tensor, int storage) {
             if (tensor >= self.count()) throw py::value_error("tensor is out of range");
             if (storage != 0 && self.tensor(tensor).channels > 1) throw py::value_error("storage must be 0");
             self.tensor(tensor).grad_storage = storage_from(storage);
           },
           "How the gradients of a tensor are stored from now on.", py::arg("tensor"), py::arg("storage"))
      .def("perturb",
           [](LangevinStep& self, py::handle x, uint64_t seed, uint32_t step, int threads) {
             StepCall call(self);
             take_addresses(self, x, "x", false);
             call(threads, [&](int with) { self.perturb(seed, step, with); });
           },
           "x + noise, in place.", py::arg("x"), py::arg("seed"), py::arg("step"), py::arg("threads"))
      .def("step",
           [](LangevinStep& self, py::handle x, py::handle grad, uint64_t seed, uint32_t step, bool noise, int threads,
              const py::object& sums) {
             StepCall call(self);
             take_addresses(self, x, "x", false);
             take_addresses(self, grad, "grad", true);
             StepSums to = {};
             const bool sum = !sums.is_none();
             if (sum) {
               const py::dict d = sums;
               to = {address_of<float>(d, "grad_norm", true), address_of<float>(d, "displacement", true),
                     address_of<int64_t>(d, "clipped", true), address_of<int64_t>(d, "nonfinite", true)};
             }
             call(threads, [&](int with) { self.step(seed, step, noise, sum ? &to : nullptr, with); });
           },
           "One step, in place. sums, or None: where grad_norm, displacement (float32), clipped and nonfinite (int64) of "
           "each chain go.",
           py::arg("x"), py::arg("grad"), py::arg("seed"), py::arg("step"), py::arg("noise"), py::arg("threads"),
           py::arg("sums") = py::none());
}

}  // namespace mmebm
