// mmebm._cpu.Dynamics, .Proposals, exchange, finite_rows, called by mmebm/ops/dynamics/cpp.py.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

#include "common/bind.h"
#include "dynamics/cpu.h"

namespace mmebm {

// Below this many elements a call takes less time than giving up the interpreter lock and waking a thread.
constexpr int64_t SMALL_DYNAMICS = 1 << 14;

template <class Run>
void run_released(int64_t elements, int threads, const Run& run) {
  if (elements < SMALL_DYNAMICS) {
    run(1);
  } else {
    pybind11::gil_scoped_release release;
    run(threads);
  }
}

inline Coefficient coefficient_from(int kind, double value, uintptr_t values) {
  if (kind < 0 || kind > 2) throw pybind11::value_error("kind must be 0 (number), 1 (chain) or 2 (element)");
  if (kind != 0 && values == 0) throw pybind11::value_error("values_ptr is null");
  return {static_cast<Coefficient::Kind>(kind), value, reinterpret_cast<const float*>(values)};
}

// HMC and Underdamped: what stays along a run, and a method for each phase of a step.
struct Dynamics {
  std::vector<MovingTensor> tensors;
  DynamicsJob job;
  Isa isa = Isa::generic;
  int64_t elements = 0;
  bool keeps = true;  // velocities and gradient of the step's start, so that it can be taken back

  void take(pybind11::handle grads) {
    require_addresses(grads, tensors.size(), "grads");
    for (size_t i = 0; i < tensors.size(); ++i) {
      const bool empty = tensors[i].numel == 0 || job.chains == 0;
      tensors[i].grad = static_cast<const float*>(address_at(grads, i, "grads", empty));
    }
  }

  void run(Phase phase, uint32_t step, int threads) {
    job.tensors = tensors.data();
    job.count = static_cast<int64_t>(tensors.size());
    job.step = step;
    run_released(elements, threads, [&](int n) { run_dynamics(job, phase, n, isa); });
  }
};

// The Metropolis test.
struct Proposals {
  std::vector<ProposalTensor> tensors;
  ProposalJob job;
  Isa isa = Isa::generic;
  int64_t elements = 0;
};

// The fields of a run: chains, chain_offset, seed, freeze, isa, and
//   alive     // [chains] bool
//   tensors   // per tensor that moves a dict: numel, index (in the stream word), and, [chains, numel]:
//               observed (bool, optional); x, y, v, before, g (float32; the last two 0 where no step is taken back)
inline Dynamics dynamics_from(const pybind11::dict& job, Isa isa) {
  namespace py = pybind11;
  Dynamics d;
  d.isa = isa;
  d.job.chains = field<int64_t>(job, "chains");
  if (d.job.chains < 0) throw py::value_error("chains must not be negative");
  d.job.chain_offset = field<uint32_t>(job, "chain_offset");
  d.job.seed = field<uint64_t>(job, "seed");
  d.job.alive = address_of<uint8_t>(job, "alive", d.job.chains == 0);
  d.job.freeze = field<bool>(job, "freeze");
  for (const py::handle& each : field<py::list>(job, "tensors")) {
    const py::dict from = py::cast<py::dict>(each);
    MovingTensor t;
    t.numel = field<int64_t>(from, "numel");
    t.index = field<uint32_t>(from, "index");
    require_tensor(t.numel, t.index);
    const bool empty = t.numel == 0 || d.job.chains == 0;
    t.observed = address_of<const uint8_t>(from, "observed", true);
    t.x = address_of<float>(from, "x", empty);
    t.y = address_of<float>(from, "y", empty);
    t.v = address_of<float>(from, "v", empty);
    t.before = address_of<float>(from, "before", true);
    t.g = address_of<float>(from, "g", true);
    d.keeps = d.keeps && (empty || (t.before && t.g));
    d.tensors.push_back(t);
    d.elements += t.numel * d.job.chains;
  }
  return d;
}

// The fields of a ladder: chains, rungs, seed, step, stream, chain_offset, and
//   tensors                 // a dict each: values, float32 [chains * rungs, numel], and numel
//   inverse                 // [rungs] float32
//   energy, alive           // [chains * rungs] float32, bool
//   origin, prob, prob_sum  // [chains, rungs] int64, [chains, rungs - 1] float32
//   side                    // 0 or 1: which pairs
inline void run_exchange(const pybind11::dict& job) {
  namespace py = pybind11;
  Ladder l;
  l.chains = field<int64_t>(job, "chains");
  l.rungs = field<int64_t>(job, "rungs");
  const int side = field<int>(job, "side");
  if (l.chains < 0 || l.rungs < 2 || side < 0 || side > 1) throw py::value_error("chains, rungs or side is out of range");
  const bool empty = l.chains == 0;
  l.at = {field<uint64_t>(job, "seed"), field<uint32_t>(job, "step"), field<uint32_t>(job, "stream"),
          field<uint32_t>(job, "chain_offset")};
  l.inverse = address_of<const float>(job, "inverse", empty);
  l.energy = address_of<float>(job, "energy", empty);
  l.alive = address_of<uint8_t>(job, "alive", empty);
  l.origin = address_of<int64_t>(job, "origin", empty);
  l.prob = address_of<float>(job, "prob", empty);
  l.prob_sum = address_of<float>(job, "prob_sum", empty);
  std::vector<Replicas> replicas;
  for (const py::handle& each : field<py::list>(job, "tensors")) {
    const py::dict from = py::cast<py::dict>(each);
    const int64_t numel = field<int64_t>(from, "numel");
    require_tensor(numel);
    replicas.push_back({address_of<float>(from, "values", numel == 0 || empty), numel});
  }
  exchange(l, replicas.data(), static_cast<int64_t>(replicas.size()), side);
}

inline void bind_dynamics(pybind11::module_& m, Isa (*isa_from)(const std::string&)) {
  namespace py = pybind11;
  const auto floats = [](uintptr_t p) { return reinterpret_cast<float*>(p); };

  py::class_<Dynamics>(m, "Dynamics", "A run of HMC or Underdamped: dynamics_from names the fields.")
      .def(py::init([isa_from](const py::dict& job) {
             return dynamics_from(job, isa_from(field<std::string>(job, "isa")));
           }),
           py::arg("job"))
      .def("set",
           [](Dynamics& d, size_t i, int slot, int kind, double value, uintptr_t values) {
             if (i >= d.tensors.size() || slot < 0 || slot >= DYNAMICS_SLOTS) throw py::index_error("no such slot");
             d.tensors[i].c[slot] = coefficient_from(kind, value, values);
           },
           py::arg("tensor"), py::arg("slot"), py::arg("kind"), py::arg("value"), py::arg("values"))
      .def("temperature",
           [floats](Dynamics& d, double value, uintptr_t values) {
             d.job.temperature = value;
             d.job.temperatures = floats(values);
           })
      .def("energies",
           [floats](Dynamics& d, uintptr_t energy) { d.job.energy = floats(energy); })
      .def("outputs",
           [](Dynamics& d, const py::dict& to) {
             const bool empty = d.job.chains == 0;
             d.job.accept_prob = address_of<float>(to, "accept_prob", empty);
             d.job.accepted = address_of<float>(to, "accepted", empty);
             d.job.energy_error = address_of<float>(to, "energy_error", empty);
             d.job.prob_sum = address_of<double>(to, "prob_sum", empty);
             d.job.ever_accepted = address_of<uint8_t>(to, "ever_accepted", empty);
           },
           "Where HMC's decisions go, [chains]: accept_prob, accepted, energy_error (float32), prob_sum (float64), "
           "ever_accepted (bool).",
           py::arg("to"))
      .def("hmc_start",
           [](Dynamics& d, uint32_t step, int threads) {
             if (!d.keeps) throw py::value_error("before or g is null");
             d.run(Phase::hmc_start, step, threads);
           })
      .def("leap",
           [](Dynamics& d, py::handle grads, int threads) {
             d.take(grads);
             d.run(Phase::leap, 0, threads);
           })
      .def("hmc_end",
           [floats](Dynamics& d, py::handle grads, uintptr_t new_energy, uint32_t step, int threads) {
             d.take(grads);
             d.job.new_energy = floats(new_energy);
             if (d.job.chains > 0 && (!new_energy || !d.job.energy || !d.job.accept_prob)) {
               throw py::value_error("an address is null");
             }
             d.run(Phase::hmc_end, step, threads);
           })
      .def("baoa",
           [](Dynamics& d, py::handle grads, uint32_t step, int threads) {
             d.take(grads);
             d.run(Phase::baoa, step, threads);
           })
      .def("baoab_end", [floats](Dynamics& d, py::handle grads, uintptr_t new_energy, int threads) {
        d.take(grads);
        d.job.new_energy = floats(new_energy);
        if (d.job.freeze) {
          if (!d.keeps) throw py::value_error("before or g is null");
          if (d.job.energy && !new_energy && d.job.chains > 0) throw py::value_error("new_energy is null");
        }
        d.run(Phase::baoab_end, 0, threads);
      });

  py::class_<Proposals>(m, "Proposals",
                        "The Metropolis test. Fields: rows, rows_per_chain, chain_offset, seed, stream, keep, isa, tensors "
                        "(a dict each: numel; observed, [rows, numel] bool, optional).")
      .def(py::init([isa_from](const py::dict& job) {
             Proposals p;
             p.job.rows = field<int64_t>(job, "rows");
             p.job.rows_per_chain = field<int64_t>(job, "rows_per_chain");
             if (p.job.rows < 0 || p.job.rows_per_chain < 1) throw py::value_error("rows < 0 or rows_per_chain < 1");
             p.job.at = {field<uint64_t>(job, "seed"), 0, field<uint32_t>(job, "stream"),
                         field<uint32_t>(job, "chain_offset")};
             p.job.keep = field<bool>(job, "keep");
             p.isa = isa_from(field<std::string>(job, "isa"));
             for (const py::handle& each : field<py::list>(job, "tensors")) {
               const py::dict from = py::cast<py::dict>(each);
               ProposalTensor t;
               t.numel = field<int64_t>(from, "numel");
               require_tensor(t.numel);
               t.observed = address_of<const uint8_t>(from, "observed", true);
               p.tensors.push_back(t);
               p.elements += t.numel * p.job.rows;
             }
             return p;
           }),
           py::arg("job"))
      .def("set",
           [](Proposals& p, size_t i, int slot, int kind, double value, uintptr_t values) {
             if (i >= p.tensors.size() || slot < 0 || slot >= PROPOSAL_SLOTS) throw py::index_error("no such slot");
             p.tensors[i].has[slot] = kind >= 0;
             if (kind == 2) throw py::value_error("kind must be 0 (number) or 1 (chain)");
             if (kind >= 0) p.tensors[i].c[slot] = coefficient_from(kind, value, values);
           },
           py::arg("tensor"), py::arg("slot"), py::arg("kind"), py::arg("value"), py::arg("values"))
      .def("temperature",
           [](Proposals& p, double value, uintptr_t values) {
             p.job.temperature = value;
             p.job.temperatures = reinterpret_cast<const double*>(values);
           })
      .def("outputs",
           [](Proposals& p, const py::dict& to) {
             p.job.accept_prob = address_of<float>(to, "accept_prob", p.job.rows == 0);
             p.job.accepted = address_of<uint8_t>(to, "accepted", p.job.rows == 0);
             p.job.alive = address_of<const uint8_t>(to, "alive", true);
           },
           "Where the decisions go, [rows]: accept_prob (float32), accepted (bool); and who may move: alive (bool, "
           "optional).",
           py::arg("to"))
      .def("decide",
           [floats](Proposals& p, py::handle x, py::handle y, py::handle gx, py::handle gy, uintptr_t energy,
                    uintptr_t new_energy, uint32_t step, int threads) {
             const size_t count = p.tensors.size();
             const auto places = [&](py::handle list, size_t i, const char* name) {
               if (i == 0) require_addresses(list, count, name);
               const bool empty = p.tensors[i].numel == 0 || p.job.rows == 0;
               return static_cast<float*>(address_at(list, i, name, empty));
             };
             for (size_t i = 0; i < count; ++i) {
               ProposalTensor& t = p.tensors[i];
               t.x = places(x, i, "x");
               t.y = places(y, i, "y");
               t.gx = places(gx, i, "gx");
               t.gy = places(gy, i, "gy");
             }
             p.job.energy = floats(energy);
             p.job.new_energy = floats(new_energy);
             if (p.job.rows > 0 && (!energy || !new_energy || !p.job.accepted)) {
               throw py::value_error("an address is null");
             }
             p.job.tensors = p.tensors.data();
             p.job.count = static_cast<int64_t>(count);
             p.job.at.step = step;
             run_released(p.elements, threads, [&](int n) { run_decide(p.job, n, p.isa); });
           },
           "Lists of addresses of state, proposal and the gradients at both, all [rows, numel]; energies [rows].",
           py::arg("x"), py::arg("y"), py::arg("gx"), py::arg("gy"), py::arg("energy"), py::arg("new_energy"),
           py::arg("step"), py::arg("threads"));

  m.def("exchange", &run_exchange, "Exchanges neighbours of a ladder of temperatures in place.", py::arg("job"));

  m.def("finite_rows",
        [isa_from, floats](uintptr_t values, int64_t rows, int64_t numel, uintptr_t alive, int threads) {
          require_tensor(numel);
          if (rows < 0 || (rows > 0 && numel > 0 && (!values || !alive))) {
            throw py::value_error("rows is negative or an address is null");
          }
          static const Isa isa = isa_from("auto");
          uint8_t* flags = reinterpret_cast<uint8_t*>(alive);
          run_released(rows * numel, threads, [&](int n) { finite_rows(floats(values), rows, numel, flags, n, isa); });
        },
        "Clears the flags at alive_ptr of the rows of float32 (rows, numel) that hold an inf or NaN.");

  m.def("uniform",
        [](uintptr_t out, int64_t chains, int64_t numel, uint64_t seed, uint32_t step, uint32_t stream,
           uint32_t chain_offset, bool wide) {
          if (chains < 0 || numel < 0 || (out == 0 && chains > 0 && numel > 0)) {
            throw py::value_error("sizes are negative, or out_ptr is null");
          }
          const NoiseAt at = {seed, step, stream, chain_offset};
          py::gil_scoped_release release;
          if (wide) {
            uniform_cpu(reinterpret_cast<double*>(out), chains, numel, at);
          } else {
            uniform_cpu(reinterpret_cast<float*>(out), chains, numel, at);
          }
        },
        "Fill (chains, numel) at out_ptr, float64 where `wide` and else float32, with noise.uniform.",
        py::arg("out_ptr"), py::arg("chains"), py::arg("numel"), py::arg("seed"), py::arg("step"), py::arg("stream"),
        py::arg("chain_offset"), py::arg("wide"));
}

}  // namespace mmebm
