// What the bindings of whole chains share: the fields of a job, and Ctrl-C while it runs.
#pragma once

#include <pybind11/pybind11.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "common/bind.h"
#include "common/chain_job.h"
#include "common/isa.h"

namespace mmebm {

// Looks for signals (Ctrl-C) while a chain runs without the interpreter's lock, so that it ends within INTERVAL and a
// few steps. Python runs their handlers in its main thread only; the thread that called looks, for itself and the others.
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

// A job, its tensors, and how it runs.
struct ChainCall {
  ChainJob job;
  std::vector<ChainTensor> tensors;
  Isa isa;
  int threads;
};

// One evaluation where there are no steps, else a chain. The fields, all of them but the optional ones required:
//   x                            // [chains, inputs] float32
//   chains, inputs, threads, isa
//   energy                       // [chains] float32, or of a chain [steps, chains], optional
//   gradient                     // [chains, inputs] float32, of an evaluation
// and of a chain
//   tensors                      // per tensor a dict: width, stream, noisy, moving, present (bit f: field f is given)
//   constants, rows, columns     // [rows, tensors, SLOTS, columns] float32; rows: steps or 1, columns: chains or 1
//   observed, observed_stride    // [chains or 1, inputs] uint8, optional; the stride is 0 or inputs
//   steps, seed, first_step, chain_offset, noise_before, clamp_noise
//   out                          // [chains, inputs] float32
//   grad_norm                    // [steps, chains] float32, optional
//   frozen                       // [chains] bool, optional: there where chains freeze
inline ChainCall chain_call(const pybind11::dict& d, int64_t most_inputs, Isa (*isa_from)(const std::string&)) {
  namespace py = pybind11;
  ChainCall call;
  ChainJob& job = call.job;
  call.isa = isa_from(field<std::string>(d, "isa"));
  call.threads = field<int>(d, "threads");
  job.chains = field<int64_t>(d, "chains");
  job.inputs = field<int64_t>(d, "inputs");
  if (job.chains < 0 || job.inputs < 1 || job.inputs > most_inputs) {
    throw py::value_error("chains or inputs is out of range");
  }
  const bool empty = job.chains == 0, chain = d.contains("steps");
  job.x = address_of<const float>(d, "x", empty);
  job.energy = address_of<float>(d, "energy", empty || chain);
  if (!chain) {
    job.gradient = address_of<float>(d, "gradient", empty);
    return call;
  }
  int64_t begin = 0;
  for (const py::handle& item : field<py::list>(d, "tensors")) {
    const py::dict t = py::cast<py::dict>(item);
    ChainTensor part;
    part.begin = begin;
    part.width = field<int64_t>(t, "width");
    part.stream = field<uint32_t>(t, "stream");
    part.noisy = field<bool>(t, "noisy");
    part.moving = field<bool>(t, "moving");
    part.present = field<uint32_t>(t, "present");
    if (part.width < 0 || part.width > job.inputs - begin) throw py::value_error("widths do not fit the inputs");
    begin += part.width;
    call.tensors.push_back(part);
  }
  if (begin != job.inputs) throw py::value_error("widths do not fit the inputs");
  job.tensors = call.tensors.data();
  job.tensor_count = static_cast<int64_t>(call.tensors.size());
  job.steps = field<int64_t>(d, "steps");
  job.constants = address_of<const float>(d, "constants");
  job.constant_rows = field<int64_t>(d, "rows");
  job.constant_columns = field<int64_t>(d, "columns");
  if (job.steps < 0 || (job.constant_rows != 1 && job.constant_rows < job.steps) ||
      (job.constant_columns != 1 && job.constant_columns != job.chains)) {
    throw py::value_error("steps or the table of constants is out of range");
  }
  job.observed = address_of<const uint8_t>(d, "observed", true);
  job.observed_stride = field<int64_t>(d, "observed_stride");
  if (job.observed_stride != 0 && job.observed_stride != job.inputs) {
    throw py::value_error("the stride of observed is off");
  }
  job.seed = field<uint64_t>(d, "seed");
  job.first_step = field<uint32_t>(d, "first_step");
  job.chain_offset = field<uint32_t>(d, "chain_offset");
  job.noise_before = field<bool>(d, "noise_before");
  job.clamp_noise = field<bool>(d, "clamp_noise");
  job.out = address_of<float>(d, "out", empty);
  job.grad_norm = address_of<float>(d, "grad_norm", true);
  job.frozen = address_of<uint8_t>(d, "frozen", true);
  job.freeze = job.frozen != nullptr;
  return call;
}

// Calls run() without the interpreter's lock; a chain ends early where a signal's handler raises. `steps`: see Signals.
template <class Run>
void run_chain(ChainJob& job, unsigned steps, const Run& run) {
  if (job.chains == 0) return;
  Signals signals(steps);
  job.stopped = &Signals::stopped;
  job.stopped_data = &signals;
  {
    pybind11::gil_scoped_release release;
    run();
  }
  signals.rethrow();
}

}  // namespace mmebm
