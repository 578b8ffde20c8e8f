// mmebm._cpu.Dynamics, .Proposals, exchange, finite_rows. mmebm/ops/dynamics.py checks tensors, keeps them alive and
// passes addresses.
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

inline void bind_dynamics(pybind11::module_& m, Isa (*isa_from)(const std::string&)) {
  namespace py = pybind11;
  const auto floats = [](uintptr_t p) { return reinterpret_cast<float*>(p); };
  const auto flags = [](uintptr_t p) { return reinterpret_cast<uint8_t*>(p); };

  py::class_<Dynamics>(m, "Dynamics")
      .def(py::init([isa_from, flags](int64_t chains, uint32_t chain_offset, uint64_t seed, uintptr_t alive,
                                      bool freeze, const std::string& isa) {
             if (chains < 0 || (alive == 0 && chains > 0)) throw py::value_error("chains < 0, or alive_ptr is null");
             Dynamics d;
             d.job.chains = chains;
             d.job.chain_offset = chain_offset;
             d.job.seed = seed;
             d.job.alive = flags(alive);
             d.job.freeze = freeze;
             d.isa = isa_from(isa);
             return d;
           }),
           py::arg("chains"), py::arg("chain_offset"), py::arg("seed"), py::arg("alive_ptr"), py::arg("freeze"),
           py::arg("isa") = "auto")
      .def("add",
           [floats, flags](Dynamics& d, int64_t numel, uint32_t index, uintptr_t observed, uintptr_t x, uintptr_t y,
                           uintptr_t v, uintptr_t before, uintptr_t g) {
             require_tensor(numel, index);
             if (numel > 0 && d.job.chains > 0 && (x == 0 || y == 0 || v == 0)) {
               throw py::value_error("an address is null");
             }
             MovingTensor t;
             t.numel = numel;
             t.index = index;
             t.observed = flags(observed);
             t.x = floats(x);
             t.y = floats(y);
             t.v = floats(v);
             t.before = floats(before);
             t.g = floats(g);
             d.tensors.push_back(t);
             d.elements += numel * d.job.chains;
           },
           py::arg("numel"), py::arg("index"), py::arg("observed_ptr"), py::arg("x_ptr"), py::arg("y_ptr"),
           py::arg("v_ptr"), py::arg("before_ptr"), py::arg("g_ptr"))
      .def("set",
           [](Dynamics& d, size_t i, int slot, int kind, double value, uintptr_t values) {
             if (i >= d.tensors.size() || slot < 0 || slot >= DYNAMICS_SLOTS) throw py::index_error("no such slot");
             d.tensors[i].c[slot] = coefficient_from(kind, value, values);
           })
      .def("temperature",
           [floats](Dynamics& d, double value, uintptr_t values) {
             d.job.temperature = value;
             d.job.temperatures = floats(values);
           })
      .def("energies",
           [floats](Dynamics& d, uintptr_t energy) { d.job.energy = floats(energy); })
      .def("outputs",
           [floats, flags](Dynamics& d, uintptr_t prob, uintptr_t accepted, uintptr_t error, uintptr_t sum,
                           uintptr_t ever) {
             if (d.job.chains > 0 && (!prob || !accepted || !error || !sum || !ever)) {
               throw py::value_error("an address is null");
             }
             d.job.accept_prob = floats(prob);
             d.job.accepted = floats(accepted);
             d.job.energy_error = floats(error);
             d.job.prob_sum = reinterpret_cast<double*>(sum);
             d.job.ever_accepted = flags(ever);
           })
      .def("hmc_start",
           [](Dynamics& d, uint32_t step, int threads) {
             for (const MovingTensor& t : d.tensors) {
               if (t.numel > 0 && d.job.chains > 0 && (!t.before || !t.g)) throw py::value_error("an address is null");
             }
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
          for (const MovingTensor& t : d.tensors) {
            if (t.numel > 0 && d.job.chains > 0 && (!t.before || !t.g)) throw py::value_error("an address is null");
          }
          if (d.job.energy && !new_energy && d.job.chains > 0) throw py::value_error("new_energy_ptr is null");
        }
        d.run(Phase::baoab_end, 0, threads);
      });

  py::class_<Proposals>(m, "Proposals")
      .def(py::init([isa_from](int64_t rows, int64_t rows_per_chain, uint32_t chain_offset, uint64_t seed,
                               uint32_t stream, bool keep, const std::string& isa) {
             if (rows < 0 || rows_per_chain < 1) throw py::value_error("rows < 0 or rows_per_chain < 1");
             Proposals p;
             p.job.rows = rows;
             p.job.rows_per_chain = rows_per_chain;
             p.job.at = {seed, 0, stream, chain_offset};
             p.job.keep = keep;
             p.isa = isa_from(isa);
             return p;
           }),
           py::arg("rows"), py::arg("rows_per_chain"), py::arg("chain_offset"), py::arg("seed"), py::arg("stream"),
           py::arg("keep"), py::arg("isa") = "auto")
      .def("add",
           [flags](Proposals& p, int64_t numel, uintptr_t observed) {
             require_tensor(numel, 0);
             ProposalTensor t;
             t.numel = numel;
             t.observed = flags(observed);
             p.tensors.push_back(t);
             p.elements += numel * p.job.rows;
           })
      .def("set",
           [](Proposals& p, size_t i, int slot, int kind, double value, uintptr_t values) {
             if (i >= p.tensors.size() || slot < 0 || slot >= PROPOSAL_SLOTS) throw py::index_error("no such slot");
             p.tensors[i].has[slot] = kind >= 0;
             if (kind == 2) throw py::value_error("kind must be 0 (number) or 1 (chain)");
             if (kind >= 0) p.tensors[i].c[slot] = coefficient_from(kind, value, values);
           })
      .def("temperature",
           [](Proposals& p, double value, uintptr_t values) {
             p.job.temperature = value;
             p.job.temperatures = reinterpret_cast<const double*>(values);
           })
      .def("outputs",
           [floats, flags](Proposals& p, uintptr_t prob, uintptr_t accepted, uintptr_t alive) {
             if (p.job.rows > 0 && (!prob || !accepted)) throw py::value_error("an address is null");
             p.job.accept_prob = floats(prob);
             p.job.accepted = flags(accepted);
             p.job.alive = flags(alive);
           })
      .def("decide",
           [floats](Proposals& p, py::handle x, py::handle y, py::handle gx, py::handle gy, uintptr_t energy,
                    uintptr_t new_energy, uint32_t step, int threads) {
             const size_t count = p.tensors.size();
             require_addresses(x, count, "x");
             require_addresses(y, count, "y");
             require_addresses(gx, count, "gx");
             require_addresses(gy, count, "gy");
             for (size_t i = 0; i < count; ++i) {
               ProposalTensor& t = p.tensors[i];
               const bool empty = t.numel == 0 || p.job.rows == 0;
               t.x = static_cast<float*>(address_at(x, i, "x", empty));
               t.y = static_cast<float*>(address_at(y, i, "y", empty));
               t.gx = static_cast<float*>(address_at(gx, i, "gx", empty));
               t.gy = static_cast<const float*>(address_at(gy, i, "gy", empty));
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
           });

  m.def("exchange",
        [floats, flags](const py::list& tensors, const py::list& numels, int64_t chains, int64_t rungs, uint64_t seed,
                        uint32_t step, uint32_t stream, uint32_t chain_offset, uintptr_t inverse, uintptr_t energy,
                        uintptr_t alive, uintptr_t origin, uintptr_t prob, uintptr_t prob_sum, int side) {
          if (chains < 0 || rungs < 2 || side < 0 || side > 1 || tensors.size() != numels.size()) {
            throw py::value_error("chains, rungs, side or the number of tensors is out of range");
          }
          if (chains > 0 && (!inverse || !energy || !alive || !origin || !prob || !prob_sum)) {
            throw py::value_error("an address is null");
          }
          std::vector<Replicas> replicas;
          for (size_t i = 0; i < tensors.size(); ++i) {
            const int64_t numel = numels[i].cast<int64_t>();
            require_tensor(numel, 0);
            replicas.push_back({static_cast<float*>(address_at(tensors, i, "tensors", numel == 0 || chains == 0)),
                                numel});
          }
          Ladder l;
          l.chains = chains;
          l.rungs = rungs;
          l.at = {seed, step, stream, chain_offset};
          l.inverse = floats(inverse);
          l.energy = floats(energy);
          l.alive = flags(alive);
          l.origin = reinterpret_cast<int64_t*>(origin);
          l.prob = floats(prob);
          l.prob_sum = floats(prob_sum);
          exchange(l, replicas.data(), static_cast<int64_t>(replicas.size()), side);
        },
        "Exchanges neighbours of a ladder of temperatures in place.");

  m.def("finite_rows",
        [isa_from, floats, flags](uintptr_t values, int64_t rows, int64_t numel, uintptr_t alive, int threads) {
          require_tensor(numel, 0);
          if (rows < 0 || (rows > 0 && numel > 0 && (!values || !alive))) {
            throw py::value_error("rows is negative or an address is null");
          }
          static const Isa isa = isa_from("auto");
          run_released(rows * numel, threads, [&](int n) { finite_rows(floats(values), rows, numel, flags(alive), n, isa); });
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
