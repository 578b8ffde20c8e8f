// mmebm._cpu.langevin_mlp and its relatives, called by mmebm/ops/langevin_mlp/cpp.py.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

#include "common/chain_bind.h"
#include "langevin_mlp/cpu.h"

namespace mmebm {

// The fields of a term, by kind:
//   quadratic: mean, precision                     // [inputs] float32
//   scalar:    layers, activation, slope, weight   // layers: a dict each
//                weight, bias                      // [outputs, inputs] and, optional, [outputs] float32
//                inputs, outputs
//   residual:  those of a scalar, and scale, laplace, tanh
//              target                              // [chains, outputs] float32
//              observed, observed_stride           // [chains or 1, outputs] bool, optional
inline MlpStackTerm mlp_term(const pybind11::dict& d, int64_t inputs) {
  namespace py = pybind11;
  MlpStackTerm out;
  MlpTerm& term = out.term;
  const std::string kind = field<std::string>(d, "kind");
  if (kind == "quadratic") {
    term.kind = TermKind::quadratic;
    term.mean = address_of<const float>(d, "mean");
    term.precision = address_of<const float>(d, "precision");
    return out;
  }
  int64_t width = inputs;
  for (const py::handle& item : field<py::list>(d, "layers")) {
    const py::dict layer = py::cast<py::dict>(item);
    MlpLayer l;
    l.weight = address_of<const float>(layer, "weight");
    l.bias = address_of<const float>(layer, "bias", true);
    l.inputs = field<int64_t>(layer, "inputs");
    l.outputs = field<int64_t>(layer, "outputs");
    if (l.inputs != width || l.outputs < 1 || l.outputs > 1 << 20) {
      throw py::value_error("sizes of layers do not fit together");
    }
    width = l.outputs;
    out.layers.push_back(l);
  }
  const int activation = field<int>(d, "activation");
  if (out.layers.empty() || activation < 0 || activation >= ACTIVATIONS) {
    throw py::value_error("a stack needs a layer and an activation that is known");
  }
  term.activation = static_cast<Activation>(activation);
  term.slope = field<float>(d, "slope");
  term.weight = field<double>(d, "weight");
  if (kind == "scalar") {
    term.kind = TermKind::scalar;
    if (width != 1) throw py::value_error("a scalar term must have one output");
    return out;
  }
  if (kind != "residual") throw py::value_error("kind of a term must be scalar, residual or quadratic");
  term.kind = TermKind::residual;
  term.scale = field<double>(d, "scale");
  term.laplace = field<bool>(d, "laplace");
  term.tanh = field<bool>(d, "tanh");
  term.target = address_of<const float>(d, "target");
  term.observed = address_of<const uint8_t>(d, "observed", true);
  term.observed_stride = field<int64_t>(d, "observed_stride");
  if (term.observed_stride != 0 && term.observed_stride != width) throw py::value_error("stride of observed is off");
  return out;
}

inline void bind_langevin_mlp(pybind11::module_& m, Isa (*isa_from)(const std::string&)) {
  namespace py = pybind11;
  const auto run = [isa_from](const py::dict& fields, const py::list& terms) {
    const ChainCall call = chain_call(fields, 1 << 20, isa_from);
    MlpJob job;
    static_cast<ChainJob&>(job) = call.job;
    std::vector<MlpStackTerm> stacks;
    for (const py::handle& t : terms) stacks.push_back(mlp_term(py::cast<py::dict>(t), job.inputs));
    if (stacks.empty()) throw py::value_error("there is no term");
    run_chain(job, 16, [&] { langevin_mlp(job, stacks, call.isa, call.threads); });
  };
  m.def("langevin_mlp", run, "A whole chain on a sum of terms: chain_call and mlp_term name the fields.",
        py::arg("job"), py::arg("terms"));
  m.def("mlp_energy", run, "One evaluation of a sum of terms, the same of a job without steps.", py::arg("job"),
        py::arg("terms"));
  m.def("mlp_tiles", [isa_from](int64_t chains, const std::string& isa) { return mlp_tiles(chains, isa_from(isa)); },
        "In how many tiles, each the work of one thread, the chains are cut at most.", py::arg("chains"), py::arg("isa"));
  m.def("mlp_activation",
        [isa_from](int activation, float slope, uintptr_t in, uintptr_t value, uintptr_t derivative, int64_t n,
                   const std::string& isa) {
          if (activation < 0 || activation >= ACTIVATIONS || n < 0 || ((!in || !value || !derivative) && n > 0)) {
            throw py::value_error("activation or n is out of range, or an address is null");
          }
          mlp_activation(static_cast<Activation>(activation), slope, reinterpret_cast<const float*>(in),
                         reinterpret_cast<float*>(value), reinterpret_cast<float*>(derivative), n, isa_from(isa));
        },
        "An activation and its derivative of n float32.", py::arg("activation"), py::arg("slope"), py::arg("input"),
        py::arg("value"), py::arg("derivative"), py::arg("n"), py::arg("isa") = "auto");
}

}  // namespace mmebm
