// mmebm._cpu.langevin_net, called by mmebm/ops/net/cpp.py.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <iterator>
#include <string>
#include <vector>

#include "common/chain_bind.h"
#include "net/cpu.h"

namespace mmebm {

// A dict of a node's fields: kind, xs, shape (channels, height, width), and what the kind has (NetSpec).
inline NetSpec net_spec(const pybind11::dict& d) {
  namespace py = pybind11;
  NetSpec s;
  const std::string kind = field<std::string>(d, "kind");
  size_t number = 0;
  while (number < std::size(NET_NODE_KINDS) && kind != NET_NODE_KINDS[number]) ++number;
  if (number == std::size(NET_NODE_KINDS)) throw py::value_error("there is no kind " + kind);
  s.kind = static_cast<NetNodeKind>(number);
  for (const py::handle& x : field<py::tuple>(d, "xs")) s.xs.push_back(py::cast<int32_t>(x));
  const py::tuple shape = field<py::tuple>(d, "shape");
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
    case NetNodeKind::input: s.start = field<int64_t>(d, "start"); break;
    case NetNodeKind::conv: {
      s.weight = address_of<const float>(d, "weight");
      s.bias = address_of<const float>(d, "bias", true);
      const py::tuple sizes = field<py::tuple>(d, "sizes");
      for (size_t i = 0; i < 4; ++i) {
        s.sizes[i] = py::cast<int64_t>(sizes[i]);
        if (s.sizes[i] < 1 || s.sizes[i] > 1 << 20) throw py::value_error("sizes are out of range");
      }
      pair("stride", s.stride);
      pair("padding", s.padding);
      pair("dilation", s.dilation);
      s.groups = field<int64_t>(d, "groups");
      s.transposed = field<bool>(d, "transposed");
      s.tiles = field<bool>(d, "tiles");
      if (s.stride[0] < 1 || s.stride[1] < 1 || s.dilation[0] < 1 || s.dilation[1] < 1 || s.groups < 1 ||
          s.sizes[0] % s.groups != 0) {
        throw py::value_error("stride, dilation or groups is out of range");
      }
      break;
    }
    case NetNodeKind::linear:
      s.weight = address_of<const float>(d, "weight");
      s.bias = address_of<const float>(d, "bias", true);
      break;
    case NetNodeKind::activation:
      s.function = field<int32_t>(d, "function");
      s.slope = field<float>(d, "slope");
      if (s.function < 0 || s.function >= FUNCTIONS) throw py::value_error("function is out of range");
      break;
    case NetNodeKind::add:
      for (const py::handle& c : field<py::tuple>(d, "coefficients")) s.coefficients.push_back(py::cast<float>(c));
      if (s.coefficients.size() != s.xs.size()) throw py::value_error("coefficients do not fit what is read");
      [[fallthrough]];
    case NetNodeKind::affine:
      s.shift = address_of<const float>(d, "shift", true);
      s.shift_per_chain = field<bool>(d, "shift_per_chain");
      if (s.kind == NetNodeKind::affine) {
        s.scale = address_of<const float>(d, "scale");
        s.scale_per_chain = field<bool>(d, "scale_per_chain");
      }
      break;
    case NetNodeKind::product:
      if (s.xs.size() != 2) throw py::value_error("a product reads two nodes");
      s.divide = field<bool>(d, "divide");
      break;
    case NetNodeKind::map:
    case NetNodeKind::logsumexp:
      s.index = address_of<const int64_t>(d, "index");
      s.index_weight = address_of<const float>(d, "index_weight", true);
      s.terms = field<int64_t>(d, "terms");
      if (s.terms < 1 || s.terms > most) throw py::value_error("terms is out of range");
      break;
    case NetNodeKind::norm:
      s.groups = field<int64_t>(d, "groups");
      s.eps = field<float>(d, "eps");
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
  const auto run = [isa_from](const py::dict& fields, const py::list& nodes) {
    ChainCall call = chain_call(fields, 1 << 24, isa_from);
    const std::vector<NetSpec> specs = net_specs(nodes);
    run_chain(call.job, 1, [&] { run_net(call.job, specs, call.isa, call.threads); });
  };
  m.def("langevin_net", run, "A whole chain on a net: chain_call and net_spec name the fields.", py::arg("job"),
        py::arg("nodes"));
  m.def("net_energy", run, "One evaluation of a net, the same of a job without steps.", py::arg("job"),
        py::arg("nodes"));
}

}  // namespace mmebm
