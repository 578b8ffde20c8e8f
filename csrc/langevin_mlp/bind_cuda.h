// mmebm._cuda.langevin_mlp. mmebm/ops/langevin_mlp/cuda.py checks tensors, keeps them alive and passes addresses; what
// is checked here is that sizes fit together and into a launch.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "langevin_step/bind_cuda.h"
#include "langevin_mlp/cuda.h"

namespace mmebm {

template <class T>
const T* mlp_address(const pybind11::handle& value, const char* name, bool optional = false) {
  const uintptr_t address = pybind11::cast<uintptr_t>(value);
  if (address == 0 && !optional) throw pybind11::value_error(std::string(name) + " is null");
  return reinterpret_cast<const T*>(address);
}

// (kind, ...): 0 or 1, layers, activation, slope, weight, and for 1 scale, laplace, tanh, target, observed, rows of it;
// 2, mean, precision. layers: (weight, bias, inputs, outputs) each.
inline void add_term(DeviceChain& chain, const pybind11::tuple& t) {
  namespace py = pybind11;
  if (chain.term_count == MLP_TERMS) throw py::value_error("there are too many terms");
  DeviceTerm& term = chain.terms[chain.term_count++];
  const int kind = py::cast<int>(t[0]);
  if (kind < 0 || kind > 2) throw py::value_error("kind of a term must be 0, 1 or 2");
  term.kind = static_cast<DeviceTermKind>(kind);
  if (kind == 2) {
    term.first = mlp_address<void>(t[1], "mean");
    term.second = mlp_address<void>(t[2], "precision");
    return;
  }
  const py::tuple layers = py::cast<py::tuple>(t[1]);
  if (layers.size() < 2 || layers.size() > MLP_LAYERS) throw py::value_error("a stack must have 1 to 4 hidden layers");
  term.first_layer = static_cast<uint8_t>(chain.layer_count);
  term.depth = static_cast<uint8_t>(layers.size());
  int64_t width = chain.inputs;
  for (size_t l = 0; l < layers.size(); ++l) {
    const py::tuple layer = py::cast<py::tuple>(layers[l]);
    const int64_t inputs = py::cast<int64_t>(layer[2]), outputs = py::cast<int64_t>(layer[3]);
    if (inputs != width || outputs < 1 || outputs > (l + 1 < layers.size() ? MLP_HIDDEN : MLP_ENDS)) {
      throw py::value_error("sizes of layers do not fit together");
    }
    DeviceLayer& to = chain.layers[chain.layer_count++];
    to.weight = mlp_address<float>(layer[0], "weight");
    to.bias = mlp_address<float>(layer[1], "bias", true);
    to.inputs = static_cast<uint16_t>(inputs);
    to.outputs = static_cast<uint16_t>(outputs);
    width = outputs;
  }
  const int activation = py::cast<int>(t[2]);
  if (activation < 0 || activation >= ACTIVATIONS) throw py::value_error("the activation is not known");
  term.activation = static_cast<uint8_t>(activation);
  term.slope = py::cast<float>(t[3]);
  const double weight = py::cast<double>(t[4]);
  term.weight = static_cast<float>(weight);
  if (kind == 0) {
    if (width != 1) throw py::value_error("a scalar term must have one output");
    return;
  }
  const double scale = py::cast<double>(t[5]);
  term.laplace = py::cast<bool>(t[6]);
  term.tanh = py::cast<bool>(t[7]);
  const double per = term.laplace ? scale : scale * scale;
  term.pull = static_cast<float>(weight / per);
  term.half = static_cast<float>((term.laplace ? 1.0 : 0.5) * weight / per);
  term.first = mlp_address<void>(t[8], "target");
  term.second = mlp_address<void>(t[9], "observed", true);
  term.mask_rows = py::cast<bool>(t[10]);
}

inline DeviceChain device_chain(uintptr_t x, int64_t chains, int64_t inputs, const pybind11::list& terms,
                                const pybind11::list& tensors, uintptr_t constants, int64_t rows, int64_t columns,
                                uintptr_t observed, bool observed_rows, int64_t steps, uint64_t seed, uintptr_t seed_at,
                                uint64_t step, uintptr_t step_at, uint32_t chain_offset, bool noise_before,
                                bool clamp_noise, uintptr_t out, uintptr_t energy, uintptr_t grad_norm,
                                uintptr_t frozen) {
  namespace py = pybind11;
  if (chains < 1 || chains > 1 << 30 || inputs < 1 || inputs > MLP_ENDS || steps < 0 || steps > INT32_MAX) {
    throw py::value_error("chains, inputs or steps is out of range");
  }
  if (x == 0 || out == 0 || constants == 0) throw py::value_error("x, out or constants is null");
  if ((rows != 1 && rows < steps) || (columns != 1 && columns != chains)) {
    throw py::value_error("the table of constants is out of range");
  }
  DeviceChain chain;
  chain.chains = static_cast<int32_t>(chains);
  chain.inputs = static_cast<int32_t>(inputs);
  chain.steps = static_cast<int32_t>(steps);
  for (const py::handle& term : terms) add_term(chain, py::cast<py::tuple>(term));
  if (chain.term_count == 0) throw py::value_error("there is no term");
  int64_t begin = 0;
  for (const py::handle& item : tensors) {  // (width, stream, noisy, moving, present)
    if (chain.tensor_count == MLP_TENSORS) throw py::value_error("there are too many tensors");
    const py::tuple t = py::cast<py::tuple>(item);
    const int64_t width = py::cast<int64_t>(t[0]);
    if (width < 0 || width > inputs - begin) throw py::value_error("widths do not fit the inputs");
    DeviceTensor& to = chain.tensors[chain.tensor_count++];
    to.begin = static_cast<uint16_t>(begin);
    to.width = static_cast<uint16_t>(width);
    to.stream = py::cast<uint32_t>(t[1]);
    to.noisy = py::cast<bool>(t[2]);
    to.moving = py::cast<bool>(t[3]);
    to.present = py::cast<uint32_t>(t[4]);
    begin += width;
  }
  if (begin != inputs) throw py::value_error("widths do not fit the inputs");
  chain.x = reinterpret_cast<const float*>(x);
  chain.out = reinterpret_cast<float*>(out);
  chain.energy = reinterpret_cast<float*>(energy);
  chain.grad_norm = reinterpret_cast<float*>(grad_norm);
  chain.frozen = reinterpret_cast<uint8_t*>(frozen);
  chain.observed = reinterpret_cast<const uint8_t*>(observed);
  chain.constants = reinterpret_cast<const float*>(constants);
  chain.observed_rows = observed_rows;
  chain.constant_steps = rows != 1;
  chain.constant_chains = columns != 1;
  chain.noise_before = noise_before;
  chain.clamp_noise = clamp_noise;
  chain.seed = step_number(seed, seed_at);
  chain.first_step = step_number(step, step_at);
  chain.chain_offset = chain_offset;
  return chain;
}

inline Precision precision_from(int precision) {
  if (precision < 0 || precision > 2) throw pybind11::value_error("precision must be 0 (fp32), 1 (tf32x3) or 2 (bf16)");
  return static_cast<Precision>(precision);
}

// A binding for one function: the chain's arguments, then those of `Last`.
template <class... Last, class F>
auto chain_function(const F& function) {
  return [function](uintptr_t x, int64_t chains, int64_t inputs, const pybind11::list& terms,
                    const pybind11::list& tensors, uintptr_t constants, int64_t rows, int64_t columns,
                    uintptr_t observed, bool observed_rows, int64_t steps, uint64_t seed, uintptr_t seed_at,
                    uint64_t step, uintptr_t step_at, uint32_t chain_offset, bool noise_before, bool clamp_noise,
                    uintptr_t out, uintptr_t energy, uintptr_t grad_norm, uintptr_t frozen, int precision, Last... last) {
    const DeviceChain chain =
        device_chain(x, chains, inputs, terms, tensors, constants, rows, columns, observed, observed_rows, steps, seed,
                     seed_at, step, step_at, chain_offset, noise_before, clamp_noise, out, energy, grad_norm, frozen);
    const Precision as = precision_from(precision);
    pybind11::gil_scoped_release release;
    return function(chain, as, last...);
  };
}

inline void bind_langevin_mlp(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("prepare_langevin_mlp", &prepare_langevin_mlp,
        "Load the kernels on a device, before a graph capture needs them; returns a cudaError code.",
        py::arg("device"));
  m.def("langevin_mlp", chain_function<int, uint64_t>(&langevin_mlp_cuda),
        "A whole chain, by positional arguments: x, chains, inputs, terms, tensors, constants, rows, columns, "
        "observed, observed_rows, steps, seed, seed_at, step, step_at, chain_offset, noise_before, clamp_noise, out, "
        "energy, grad_norm, frozen, precision, device, cuda_stream. Of addresses, observed, energy, grad_norm, frozen "
        "may be 0. Returns a cudaError code.");
  m.def("host_langevin_mlp", chain_function<int, int, int64_t>(&langevin_mlp_host),
        "The same by the same device functions on host memory; instead of the last two, the chains of a cluster (8, "
        "or 4 or 16 in one block), its blocks (1, 2, 4 or 8) and the bytes of shared memory each has. False if they do "
        "not fit.");
  m.def("host_mlp_activation",
        [](int activation, float slope, uintptr_t in, uintptr_t value, uintptr_t derivative, int64_t n) {
          if (activation < 0 || activation >= ACTIVATIONS || n < 0 || ((!in || !value || !derivative) && n > 0)) {
            throw py::value_error("activation or n is out of range, or an address is null");
          }
          mlp_activation_host(static_cast<Activation>(activation), slope, reinterpret_cast<const float*>(in),
                              reinterpret_cast<float*>(value), reinterpret_cast<float*>(derivative), n);
        },
        "An activation and its derivative of n float32, by the device functions.", py::arg("activation"),
        py::arg("slope"), py::arg("input"), py::arg("value"), py::arg("derivative"), py::arg("n"));
}

}  // namespace mmebm
