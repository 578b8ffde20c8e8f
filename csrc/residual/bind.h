// mmebm._cpu.residual, called by mmebm/ops/residual/cpp.py.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

#include "common/bind.h"
#include "residual/cpu.h"

namespace mmebm {

// The fields of a modality:
//   likelihood, positions, classes   // a Likelihood; terms of a chain; predictions of each term
//   prediction, storage              // [chains, classes, positions]; storage: a Storage
//   target, target_storage           // [chains, positions]; int64 where categorical
//   observed, observed_rows          // [chains, or 1 without observed_rows, positions] bool, optional
//   scale, scales, weight, weights   // a number, or [chains] float32 where the address is not 0
//   grad                             // as prediction, optional
inline ResidualTensor residual_tensor(const pybind11::dict& d, int64_t chains) {
  const int likelihood = field<int>(d, "likelihood");
  ResidualTensor t;
  t.positions = field<int64_t>(d, "positions");
  t.classes = field<int64_t>(d, "classes");
  const int64_t most = int64_t{1} << 40;
  if (likelihood < 0 || likelihood > 2) throw pybind11::value_error("likelihood is not in [0, 2]");
  if (t.positions < 0 || t.classes < 0 || t.positions > most || t.classes >= int64_t{1} << 31 ||
      (t.classes > 0 && t.positions > most / t.classes) || (likelihood != 2 && t.classes != 1)) {
    throw pybind11::value_error("positions or classes are out of range");
  }
  t.likelihood = static_cast<Likelihood>(likelihood);
  t.storage = storage_from(field<int>(d, "storage"));
  t.target_storage = storage_from(field<int>(d, "target_storage"));
  const bool empty = chains == 0 || t.positions * t.classes == 0;
  t.prediction = address_of<const void>(d, "prediction", empty);
  t.target = address_of<const void>(d, "target", empty);
  t.observed = address_of<const uint8_t>(d, "observed", true);
  t.observed_rows = field<bool>(d, "observed_rows");
  t.scale = {field<double>(d, "scale"), address_of<const float>(d, "scales", true)};
  t.weight = {field<double>(d, "weight"), address_of<const float>(d, "weights", true)};
  t.grad = address_of<void>(d, "grad", true);
  return t;
}

inline void bind_residual(pybind11::module_& m, Isa (*isa_from)(const std::string&)) {
  namespace py = pybind11;
  m.def("residual",
        [isa_from](const py::dict& job) {
          const int64_t chains = field<int64_t>(job, "chains");
          if (chains < 0) throw py::value_error("chains must not be negative");
          float* value = address_of<float>(job, "value", chains == 0);
          std::vector<ResidualTensor> tensors;
          for (const py::handle& each : field<py::list>(job, "modalities")) {
            tensors.push_back(residual_tensor(py::cast<py::dict>(each), chains));
          }
          const Isa isa = isa_from(field<std::string>(job, "isa"));
          const int threads = field<int>(job, "threads");
          py::gil_scoped_release release;
          residual(tensors, chains, value, threads, isa);
        },
        "Fill `value`, float32 [chains], with the sum over `modalities`, and their gradients; chains, threads, isa.",
        py::arg("job"));
}

}  // namespace mmebm
