// mmebm._cpu.langevin_mlp and its relatives. mmebm/ops/langevin_mlp_cpp.py checks tensors, keeps them alive and passes
// addresses; what is checked here is that sizes fit together.
#pragma once

#include <pybind11/pybind11.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "langevin_mlp/cpu.h"

namespace mmebm {

template <class T>
const T* mlp_address(const pybind11::handle& value, const char* name, bool optional = false) {
  const uintptr_t address = pybind11::cast<uintptr_t>(value);
  if (address == 0 && !optional) throw pybind11::value_error(std::string(name) + " is null");
  return reinterpret_cast<const T*>(address);
}

// (kind, ...): 0 or 1, layers, activation, slope, weight, and for 1 scale, laplace, tanh, target, observed, stride;
// 2, mean, precision. layers: (weight, bias, inputs, outputs) each.
inline MlpStackTerm mlp_term(const pybind11::tuple& t, int64_t inputs) {
  namespace py = pybind11;
  MlpStackTerm out;
  MlpTerm& term = out.term;
  const int kind = py::cast<int>(t[0]);
  if (kind == 2) {
    term.kind = TermKind::quadratic;
    term.mean = mlp_address<float>(t[1], "mean");
    term.precision = mlp_address<float>(t[2], "precision");
    return out;
  }
  if (kind != 0 && kind != 1) throw py::value_error("kind of a term must be 0, 1 or 2");
  term.kind = static_cast<TermKind>(kind);
  int64_t width = inputs;
  for (const py::handle& item : py::cast<py::tuple>(t[1])) {
    const py::tuple layer = py::cast<py::tuple>(item);
    MlpLayer l;
    l.weight = mlp_address<float>(layer[0], "weight");
    l.bias = mlp_address<float>(layer[1], "bias", true);
    l.inputs = py::cast<int64_t>(layer[2]);
    l.outputs = py::cast<int64_t>(layer[3]);
    if (l.inputs != width || l.outputs < 1 || l.outputs > 1 << 20) {
      throw py::value_error("sizes of layers do not fit together");
    }
    width = l.outputs;
    out.layers.push_back(l);
  }
  const int activation = py::cast<int>(t[2]);
  if (out.layers.empty() || activation < 0 || activation >= ACTIVATIONS) {
    throw py::value_error("a stack needs a layer and an activation that is known");
  }
  term.activation = static_cast<Activation>(activation);
  term.slope = py::cast<float>(t[3]);
  term.weight = py::cast<double>(t[4]);
  if (kind == 0) {
    if (width != 1) throw py::value_error("a scalar term must have one output");
    return out;
  }
  term.scale = py::cast<double>(t[5]);
  term.laplace = py::cast<bool>(t[6]);
  term.tanh = py::cast<bool>(t[7]);
  term.target = mlp_address<float>(t[8], "target");
  term.observed = mlp_address<uint8_t>(t[9], "observed", true);
  term.observed_stride = py::cast<int64_t>(t[10]);
  if (term.observed_stride != 0 && term.observed_stride != width) throw py::value_error("stride of observed is off");
  return out;
}

inline std::vector<MlpStackTerm> mlp_terms(const pybind11::list& terms, int64_t inputs) {
  std::vector<MlpStackTerm> out;
  for (const pybind11::handle& term : terms) out.push_back(mlp_term(pybind11::cast<pybind11::tuple>(term), inputs));
  if (out.empty()) throw pybind11::value_error("there is no term");
  return out;
}

inline MlpJob mlp_job(uintptr_t x, int64_t chains, int64_t inputs) {
  if (chains < 0 || inputs < 1 || inputs > 1 << 20) throw pybind11::value_error("chains or inputs is out of range");
  if (x == 0 && chains > 0) throw pybind11::value_error("x is null");
  MlpJob job;
  job.x = reinterpret_cast<const float*>(x);
  job.chains = chains;
  job.inputs = inputs;
  return job;
}

// Looks for signals (Ctrl-C) while a chain runs without the interpreter's lock, so that it ends within INTERVAL and a few
// steps. Python runs their handlers in its main thread only; the thread that called looks, for itself and the others.
class Signals {
 public:
  // `steps`: between two looks at the clock, which take 25 ns each.
  explicit Signals(unsigned steps = 16)
      : caller_(std::this_thread::get_id()), steps_(steps), next_(Clock::now() + INTERVAL) {}

  static bool stopped(void* self) { return static_cast<Signals*>(self)->look(); }

  // Throws what a handler has raised; with the lock held.
  void rethrow() const {
    if (error_) throw pybind11::error_already_set(*error_);
  }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr std::chrono::milliseconds INTERVAL{100};

  bool look() {
    if (stop_.load(std::memory_order_relaxed)) return true;
    if (std::this_thread::get_id() != caller_ || ++count_ % steps_ != 0 || Clock::now() < next_) return false;
    pybind11::gil_scoped_acquire lock;
    if (PyErr_CheckSignals() != 0) {
      error_ = std::make_unique<pybind11::error_already_set>();
      stop_.store(true, std::memory_order_relaxed);
      return true;
    }
    next_ = Clock::now() + INTERVAL;
    return false;
  }

  const std::thread::id caller_;
  const unsigned steps_;
  Clock::time_point next_;
  unsigned count_ = 0;
  std::atomic<bool> stop_{false};
  std::unique_ptr<pybind11::error_already_set> error_;
};

// What every whole chain is given: its tensors (width, stream, noisy, moving, present), constants and masks. `parts` is
// what job.tensors points to.
inline ChainJob chain_job(uintptr_t x, int64_t chains, int64_t inputs, const pybind11::list& tensors,
                          std::vector<ChainTensor>& parts, uintptr_t constants, int64_t rows, int64_t columns,
                          uintptr_t observed, int64_t observed_stride, int64_t steps, uintptr_t out) {
  namespace py = pybind11;
  ChainJob job;
  int64_t begin = 0;
  for (const py::handle& item : tensors) {
    const py::tuple t = py::cast<py::tuple>(item);
    ChainTensor part;
    part.begin = begin;
    part.width = py::cast<int64_t>(t[0]);
    part.stream = py::cast<uint32_t>(t[1]);
    part.noisy = py::cast<bool>(t[2]);
    part.moving = py::cast<bool>(t[3]);
    part.present = py::cast<uint32_t>(t[4]);
    if (part.width < 0 || part.width > inputs - begin) throw py::value_error("widths do not fit the inputs");
    begin += part.width;
    parts.push_back(part);
  }
  if (begin != inputs) throw py::value_error("widths do not fit the inputs");
  if (x == 0 && chains > 0) throw py::value_error("x is null");
  if (chains == 0) return job;
  if (steps < 0 || (rows != 1 && rows < steps) || (columns != 1 && columns != chains) || constants == 0) {
    throw py::value_error("steps or the table of constants is out of range");
  }
  if (out == 0 || (observed_stride != 0 && observed_stride != inputs)) {
    throw py::value_error("out is null, or the stride of observed is off");
  }
  job.x = reinterpret_cast<const float*>(x);
  job.chains = chains;
  job.inputs = inputs;
  job.tensors = parts.data();
  job.tensor_count = static_cast<int64_t>(parts.size());
  job.constants = reinterpret_cast<const float*>(constants);
  job.constant_rows = rows;
  job.constant_columns = columns;
  job.observed = reinterpret_cast<const uint8_t*>(observed);
  job.observed_stride = observed_stride;
  job.steps = steps;
  job.out = reinterpret_cast<float*>(out);
  return job;
}

inline void bind_langevin_mlp(pybind11::module_& m, Isa (*isa_from)(const std::string&)) {
  namespace py = pybind11;
  m.def("mlp_energy",
        [isa_from](uintptr_t x, int64_t chains, int64_t inputs, const py::list& terms, uintptr_t energy,
                   uintptr_t gradient, int threads, const std::string& isa) {
          MlpJob job = mlp_job(x, chains, inputs);
          std::vector<MlpStackTerm> stacks = mlp_terms(terms, inputs);
          if (chains == 0) return;
          if (energy == 0 || gradient == 0) throw py::value_error("energy or gradient is null");
          job.energy = reinterpret_cast<float*>(energy);
          job.gradient = reinterpret_cast<float*>(gradient);
          const Isa chosen = isa_from(isa);
          py::gil_scoped_release release;
          langevin_mlp(job, stacks, chosen, threads);
        },
        "Energy (chains,) and gradient (chains, inputs) of a sum of terms.", py::arg("x"), py::arg("chains"),
        py::arg("inputs"), py::arg("terms"), py::arg("energy"), py::arg("gradient"), py::arg("threads"),
        py::arg("isa"));
  m.def("langevin_mlp",
        [isa_from](uintptr_t x, int64_t chains, int64_t inputs, const py::list& terms, const py::list& tensors,
                   uintptr_t constants, int64_t rows, int64_t columns, uintptr_t observed, int64_t observed_stride,
                   int64_t steps, uint64_t seed, uint32_t first_step, uint32_t chain_offset, bool noise_before,
                   bool clamp_noise, uintptr_t out, uintptr_t energy, uintptr_t grad_norm, uintptr_t frozen,
                   int threads, const std::string& isa) {
          MlpJob job = mlp_job(x, chains, inputs);
          std::vector<MlpStackTerm> stacks = mlp_terms(terms, inputs);
          std::vector<ChainTensor> parts;
          static_cast<ChainJob&>(job) = chain_job(x, chains, inputs, tensors, parts, constants, rows, columns, observed,
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
          Signals signals;
          job.stopped = &Signals::stopped;
          job.stopped_data = &signals;
          {
            py::gil_scoped_release release;
            langevin_mlp(job, stacks, chosen, threads);
          }
          signals.rethrow();
        },
        "A whole chain; energy and grad_norm (steps, chains) may be 0, and frozen (chains,) is where chains freeze.",
        py::arg("x"), py::arg("chains"), py::arg("inputs"), py::arg("terms"), py::arg("tensors"), py::arg("constants"),
        py::arg("rows"), py::arg("columns"), py::arg("observed"), py::arg("observed_stride"), py::arg("steps"),
        py::arg("seed"), py::arg("first_step"), py::arg("chain_offset"), py::arg("noise_before"),
        py::arg("clamp_noise"), py::arg("out"), py::arg("energy"), py::arg("grad_norm"), py::arg("frozen"),
        py::arg("threads"), py::arg("isa"));
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
