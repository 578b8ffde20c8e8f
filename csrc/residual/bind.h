// mmebm._cpu.residual. mmebm/ops/residual.py checks tensors, keeps them alive and passes addresses.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

#include "residual/cpu.h"

namespace mmebm {

// A tuple as `_describe` in mmebm/ops/residual.py makes it, in the order of the casts.
inline ResidualTensor residual_tensor(const pybind11::tuple& from, int64_t chains) {
  namespace py = pybind11;
  if (from.size() != 14) throw py::value_error("a modality has 14 entries");
  size_t next = 0;
  const auto integer = [&from, &next] { return from[next++].cast<int64_t>(); };
  const auto number = [&from, &next] { return from[next++].cast<double>(); };
  const auto address = [&from, &next] { return from[next++].cast<uintptr_t>(); };
  ResidualTensor t;
  const int64_t likelihood = integer();
  t.positions = integer();
  t.classes = integer();
  const int64_t storage = integer(), target_storage = integer();
  t.prediction = reinterpret_cast<const void*>(address());
  t.target = reinterpret_cast<const void*>(address());
  t.observed = reinterpret_cast<const uint8_t*>(address());
  t.observed_rows = integer() != 0;
  t.scale.value = number();
  t.scale.values = reinterpret_cast<const float*>(address());
  t.weight.value = number();
  t.weight.values = reinterpret_cast<const float*>(address());
  t.grad = reinterpret_cast<void*>(address());
  if (likelihood < 0 || likelihood > 2 || storage < 0 || storage > 2 || target_storage < 0 || target_storage > 2) {
    throw py::value_error("a likelihood or storage is not in [0, 2]");
  }
  const int64_t most = int64_t{1} << 40;
  if (t.positions < 0 || t.classes < 0 || t.positions > most || t.classes >= int64_t{1} << 31 ||
      (t.classes > 0 && t.positions > most / t.classes) || (likelihood != 2 && t.classes != 1)) {
    throw py::value_error("positions or classes are out of range");
  }
  if (chains > 0 && t.positions * t.classes > 0 && (!t.prediction || !t.target)) {
    throw py::value_error("an address is null");
  }
  t.likelihood = static_cast<Likelihood>(likelihood);
  t.storage = static_cast<Storage>(storage);
  t.target_storage = static_cast<Storage>(target_storage);
  return t;
}

inline void bind_residual(pybind11::module_& m, Isa (*isa_from)(const std::string&)) {
  namespace py = pybind11;
  m.def("residual",
        [isa_from](const py::list& modalities, int64_t chains, uintptr_t value_ptr, int threads,
                   const std::string& isa) {
          if (chains < 0) throw py::value_error("chains must not be negative");
          if (value_ptr == 0 && chains > 0) throw py::value_error("value_ptr is null");
          std::vector<ResidualTensor> tensors;
          tensors.reserve(modalities.size());
          for (const py::handle& each : modalities) {
            tensors.push_back(residual_tensor(each.cast<py::tuple>(), chains));
          }
          const Isa chosen = isa_from(isa);
          py::gil_scoped_release release;
          residual(tensors, chains, reinterpret_cast<float*>(value_ptr), threads, chosen);
        },
        "Fill float32 (chains,) at value_ptr with the sum over modalities, and their gradients.", py::arg("modalities"),
        py::arg("chains"), py::arg("value_ptr"), py::arg("threads") = 1, py::arg("isa") = "auto");
}

}  // namespace mmebm
