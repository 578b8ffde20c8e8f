// mmebm._cpu.net_energy and langevin_net. mmebm/ops/net/cpp.py checks tensors, keeps them alive and passes addresses;
// what is checked here is that sizes fit together.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

#include "net/cpu.h"

namespace mmebm {

template <class T>
const T* net_address(const pybind11::dict& d, const char* name, bool optional = false) {
  const uintptr_t address = d.contains(name) ? pybind11::cast<uintptr_t>(d[name]) : 0;
  if (address == 0 && !optional) throw pybind11::value_error(std::string(name) + " is null");
  return reinterpret_cast<const T*>(address);
}

// A dict of a node's fields: kind, xs, shape (channels, height, width), and what the kind has (NetSpec).
inline NetSpec net_spec(const pybind11::dict& d) {
  namespace py = pybind11;
  NetSpec s;
  const int kind = py::cast<int>(d["kind"]);
  if (kind < 0 || kind > static_cast<int>(NetNodeKind::logsumexp)) throw py::value_error("kind is out of range");
  s.kind = static_cast<NetNodeKind>(kind);
  for (const py::handle& x : py::cast<py::tuple>(d["xs"])) s.xs.push_back(py::cast<int32_t>(x));
  const py::tuple shape = py::cast<py::tuple>(d["shape"]);
  s.channels = py::cast<int64_t>(shape[0]);
  s.height = py::cast<int64_t>(shape[1]);
  s.width = py::cast<int64_t>(shape[2]);
  const int64_t most = int64_t{1} << 24;
  if (s.channels < 1 || s.height < 1 || s.width < 1 || s.channels > most || s.height > most || s.width > most ||
      s.channels * s.height > most || s.elements() > most) {
    throw py::value_error("shape is out of range");
  }
  const auto pair = [&](const char* name, int64_t* to) {
    const py::tuple t = py::cast<py::tuple>(d[name]);
    for (size_t i = 0; i < 2; ++i) {
      to[i] = py::cast<int64_t>(t[i]);
      if (to[i] < 0 || to[i] > 1 << 16) throw py::value_error(std::string(name) + " is out of range");
    }
  };
  switch (s.kind) {
    case NetNodeKind::input: s.start = py::cast<int64_t>(d["start"]); break;
    case NetNodeKind::conv: {
      s.weight = net_address<float>(d, "weight");
      s.bias = net_address<float>(d, "bias", true);
      const py::tuple sizes = py::cast<py::tuple>(d["sizes"]);
      for (size_t i = 0; i < 4; ++i) {
        s.sizes[i] = py::cast<int64_t>(sizes[i]);
        if (s.sizes[i] < 1 || s.sizes[i] > 1 << 20) throw py::value_error("sizes are out of range");
      }
      pair("stride", s.stride);
      pair("padding", s.padding);
      pair("dilation", s.dilation);
      s.groups = py::cast<int64_t>(d["groups"]);
      s.transposed = py::cast<bool>(d["transposed"]);
      if (s.stride[0] < 1 || s.stride[1] < 1 || s.dilation[0] < 1 || s.dilation[1] < 1 || s.groups < 1 ||
          s.sizes[0] % s.groups != 0) {
        throw py::value_error("stride, dilation or groups is out of range");
      }
      break;
    }
    case NetNodeKind::linear:
      s.weight = net_address<float>(d, "weight");
      s.bias = net_address<float>(d, "bias", true);
      break;
    case NetNodeKind::activation:
      s.function = py::cast<int32_t>(d["function"]);
      s.slope = py::cast<float>(d["slope"]);
      if (s.function < 0 || s.function >= FUNCTIONS) throw py::value_error("function is out of range");
      break;
    case NetNodeKind::add:
      for (const py::handle& c : py::cast<py::tuple>(d["coefficients"])) s.coefficients.push_back(py::cast<float>(c));
      if (s.coefficients.size() != s.xs.size()) throw py::value_error("coefficients do not fit what is read");
      [[fallthrough]];
    case NetNodeKind::affine:
      s.shift = net_address<float>(d, "shift", true);
      s.shift_per_chain = py::cast<bool>(d["shift_per_chain"]);
      if (s.kind == NetNodeKind::affine) {
        s.scale = net_address<float>(d, "scale");
        s.scale_per_chain = py::cast<bool>(d["scale_per_chain"]);
      }
      break;
    case NetNodeKind::product:
      if (s.xs.size() != 2) throw py::value_error("a product reads two nodes");
      break;
    case NetNodeKind::map:
    case NetNodeKind::logsumexp:
      s.index = net_address<int64_t>(d, "index");
      s.index_weight = net_address<float>(d, "index_weight", true);
      s.terms = py::cast<int64_t>(d["terms"]);
      if (s.terms < 1 || s.terms > most) throw py::value_error("terms is out of range");
      break;
    case NetNodeKind::norm:
      s.groups = py::cast<int64_t>(d["groups"]);
      s.eps = py::cast<float>(d["eps"]);
      break;
    case NetNodeKind::view: break;
  }
  return s;
}

// sizes of a convolution and of a linear layer against what they read
inline std::vector<NetSpec> net_specs(const pybind11::list& nodes) {
  namespace py = pybind11;
  std::vector<NetSpec> out;
  for (const py::handle& node : nodes) {
    const NetSpec s = net_spec(py::cast<py::dict>(node));
    for (const int32_t x : s.xs) {
      if (x < 0 || static_cast<size_t>(x) >= out.size()) throw py::value_error("a node reads a later one");
    }
    if (s.kind != NetNodeKind::input && s.xs.empty()) throw py::value_error("a node reads nothing");
    if (s.kind == NetNodeKind::conv) {
      const NetSpec& x = out[static_cast<size_t>(s.xs[0])];
      const int64_t a = s.sizes[0], b = s.sizes[1] * s.groups;
      if ((s.transposed ? a : b) != x.channels || (s.transposed ? b : a) != s.channels) {
        throw py::value_error("channels of a convolution do not fit together");
      }
      const int64_t sides[2][2] = {{x.height, s.height}, {x.width, s.width}};
      for (size_t i = 0; i < 2; ++i) {
        const int64_t small = sides[i][s.transposed ? 0 : 1], large = sides[i][s.transposed ? 1 : 0];
        const int64_t reach = s.dilation[i] * (s.sizes[2 + i] - 1) + 1, free = large + 2 * s.padding[i] - reach;
        if (free < 0 || free / s.stride[i] + 1 < small) throw py::value_error("a convolution's sides do not fit");
      }
    }
    out.push_back(s);
  }
  if (out.empty()) throw py::value_error("there is no node");
  return out;
}

inline void bind_net(pybind11::module_& m, Isa (*isa_from)(const std::string&)) {
  namespace py = pybind11;
  m.def("net_energy",
        [isa_from](uintptr_t x, int64_t chains, int64_t inputs, const py::list& nodes, uintptr_t energy,
                   uintptr_t gradient, int threads, const std::string& isa) {
          const std::vector<NetSpec> specs = net_specs(nodes);
          if (chains < 0 || inputs < 1 || inputs > 1 << 24) throw py::value_error("chains or inputs is out of range");
          if (chains == 0) return;
          if (x == 0 || energy == 0 || gradient == 0) throw py::value_error("x, energy or gradient is null");
          ChainJob job;
          job.x = reinterpret_cast<const float*>(x);
          job.chains = chains;
          job.inputs = inputs;
          job.energy = reinterpret_cast<float*>(energy);
          job.gradient = reinterpret_cast<float*>(gradient);
          const Isa chosen = isa_from(isa);
          py::gil_scoped_release release;
          run_net(job, specs, chosen, threads);
        },
        "Energy (chains,) and gradient (chains, inputs) of a net.", py::arg("x"), py::arg("chains"),
        py::arg("inputs"), py::arg("nodes"), py::arg("energy"), py::arg("gradient"), py::arg("threads"),
        py::arg("isa"));
  m.def("langevin_net",
        [isa_from](uintptr_t x, int64_t chains, int64_t inputs, const py::list& nodes, const py::list& tensors,
                   uintptr_t constants, int64_t rows, int64_t columns, uintptr_t observed, int64_t observed_stride,
                   int64_t steps, uint64_t seed, uint32_t first_step, uint32_t chain_offset, bool noise_before,
                   bool clamp_noise, uintptr_t out, uintptr_t energy, uintptr_t grad_norm, uintptr_t frozen,
                   int threads, const std::string& isa) {
          const std::vector<NetSpec> specs = net_specs(nodes);
          if (chains < 0 || inputs < 1 || inputs > 1 << 24) throw py::value_error("chains or inputs is out of range");
          std::vector<ChainTensor> parts;
          ChainJob job = chain_job(x, chains, inputs, tensors, parts, constants, rows, columns, observed,
                                   observed_stride, steps, out);
          if (chains == 0) return;
          job.seed = seed;
          job.first_step = first_step;
          job.chain_offset = chain_offset;
          job.noise_before = noise_before;
          job.clamp_noise = clamp_noise;
          job.energy = reinterpret_cast<float*>(energy);
          job.grad_norm = reinterpret_cast<float*>(grad_norm);
          job.frozen = reinterpret_cast<uint8_t*>(frozen);
          job.freeze = frozen != 0;
          const Isa chosen = isa_from(isa);
          Signals signals(1);
          job.stopped = &Signals::stopped;
          job.stopped_data = &signals;
          {
            py::gil_scoped_release release;
            run_net(job, specs, chosen, threads);
          }
          signals.rethrow();
        },
        "A whole chain; energy and grad_norm (steps, chains) may be 0, and frozen (chains,) is where chains freeze.",
        py::arg("x"), py::arg("chains"), py::arg("inputs"), py::arg("nodes"), py::arg("tensors"), py::arg("constants"),
        py::arg("rows"), py::arg("columns"), py::arg("observed"), py::arg("observed_stride"), py::arg("steps"),
        py::arg("seed"), py::arg("first_step"), py::arg("chain_offset"), py::arg("noise_before"),
        py::arg("clamp_noise"), py::arg("out"), py::arg("energy"), py::arg("grad_norm"), py::arg("frozen"),
        py::arg("threads"), py::arg("isa"));
}

}  // namespace mmebm
