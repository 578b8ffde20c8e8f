"""The training loop: stages of steps, and the one step that is the paper (:meth:`Trainer.joint_step`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mmebm import noise
from mmebm.data.base import MultimodalDataset
from mmebm.reference.langevin_step import widen
from mmebm.training.config import Config
from mmebm.training.extensions import EnergyTerm, ShuffledTuples, prior_teacher
from mmebm.training.guard import Guard, TrainingDiverged
from mmebm.training.optimise import Optimiser
from mmebm.training.system import System

__all__ = ["Trainer", "TrainingDiverged"]

Row = dict[str, Any]


class Trainer:
    """Trains a :class:`System` on a data set, stage by stage.

    Everything random in an iteration is a function of (seed, iteration, rollbacks), so that a resumed run goes on
    exactly where it was.

    Args:
        config: the run.
        data: training tuples; moved to ``device``.
        device: where the networks and the data are.
    """

    def __init__(self, config: Config, data: MultimodalDataset, device: torch.device | str = "cpu") -> None:
        self.config, self.device = config, torch.device(device)
        self.data = data.to(self.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.system = System(config, {m.name: m.shape for m in data.modalities}).to(self.device)
        s = self.system
        self.optimisers = {
            "generator": Optimiser(s.generator, config.generator),
            "inference": Optimiser(s.inference, config.inference),
            "energy": Optimiser(s.energy, config.energy),
        }
        if config.latent_prior is not None:
            self.optimisers["prior"] = Optimiser(s.prior, config.latent_prior.adam)
        self.prior_teacher = prior_teacher(s.prior, config.latent_prior, self.optimisers.get("prior"))
        self.energy_terms: list[EnergyTerm] = []
        if config.shuffled_tuples is not None:
            self.energy_terms.append(ShuffledTuples(config.shuffled_tuples))
        self.guard = Guard(config.guard)
        self.iteration = 0
        self.vae_only: dict[str, dict[str, Tensor]] | None = None
        self.lr = 1.0
        self.stop = False  # set to end after the iteration in hand
        self._steps: dict[str, Callable[[dict[str, Tensor], torch.Generator], Row]] = {
            "warmup": self.warmup_step, "prior": self.prior_step, "joint": self.joint_step,
        }  # fmt: skip

    # -- the steps -------------------------------------------------------------------------------------------------

    def joint_step(self, x: dict[str, Tensor], rng: torch.Generator) -> Row:
        """One iteration of the paper on a mini-batch ``x``: three networks taught by what two chains revise."""
        s, loss = self.system, self.config.loss
        seeds = [noise.draw_seed(rng) for _ in range(4)]

        # 1, 2: the generator's samples start the data chain of the energy
        z0 = s.prior.draw(self.config.batch, seed=seeds[0], device=self.device)
        x0 = self._decode(z0)
        revised = s.revise_data(x0, seed=seeds[1])
        x_k = revised.state

        # 3, 4: the inference network's samples start the latent chain of the generator's posterior
        z_q = s.inference.sample(x, rng).detach()
        latent = s.revise_latent(z_q, x, seed=seeds[2])
        z_k = latent.state

        with s.autocast():
            # 5: the generator learns both pairs: real X with its revised z, revised X with its own z
            loss_g = (
                loss.generator_real * s.generator.negative_log_likelihood(x, z_k).mean()
                + loss.generator_revised * s.generator.negative_log_likelihood(x_k, z0).mean()
            )
            # 6: so does the inference network
            per_expert = loss.inference == "per_expert"
            loss_i = -(
                loss.inference_real * s.inference.log_prob(z_k, x, per_expert=per_expert).mean()
                + loss.inference_revised * s.inference.log_prob(z0, x_k, per_expert=per_expert).mean()
            )
            bound = self._elbo(x, rng)[0] if loss.elbo else x0[next(iter(x0))].new_zeros(())
        self._teach_vae(loss_g + loss_i - loss.elbo * bound)

        # 7: the energy falls at real X and rises at what its chain makes of the updated generator's samples
        x_0 = self._decode(z0)
        x_n = s.revise_data(x_0, seed=seeds[3]).state
        with s.autocast():
            # differences of large energies: not in the 8 bits of a bfloat16
            real, fake = widen(s.energy(x)), widen(s.energy(x_n))
            loss_e = real.mean() - fake.mean() + loss.energy_l2 * (real.square().mean() + fake.square().mean())
            for term in self.energy_terms:
                loss_e = loss_e + term(s.energy, x, real, rng)
        self.optimisers["energy"].step(loss_e, self.lr)

        extra = self.prior_teacher.update(z_k, z0, self.lr)

        with torch.no_grad(), s.autocast():
            start = widen(s.energy(x_0)).mean()
        return {
            "loss_generator": loss_g.detach(), "loss_inference": loss_i.detach(), "loss_energy": loss_e.detach(),
            "gap": (real.mean() - fake.mean()).detach(), "gap_start": (real.mean() - start).detach(),
            "mse": s.generator.squared_error(x, z_k).mean().detach(),
            "latent_size": z_k.norm(dim=1).median() / s.config.model.latent**0.5, "latent_step": s.latent_step.clone(),
            "frozen_chains": revised.info["nonfinite"].sum() + latent.info["nonfinite"].sum(), **extra,
        }  # fmt: skip

    def warmup_step(self, x: dict[str, Tensor], rng: torch.Generator) -> Row:
        """Generator and inference as a multimodal VAE: each row encoded by one expert, all modalities decoded."""
        with self.system.autocast():
            bound, mse = self._elbo(x, rng)
        self._teach_vae(-bound)
        return {"loss_elbo": -bound.detach(), "mse": mse.detach()}

    def prior_step(self, x: dict[str, Tensor], rng: torch.Generator) -> Row:
        """The latent prior learns the aggregated posterior; the other networks rest."""
        with torch.no_grad():
            posterior = self.system.inference.sample(x, rng)
        own = self.system.prior.draw(self.config.batch, seed=noise.draw_seed(rng), device=self.device)
        return self.prior_teacher.update(posterior, own, self.lr)

    # -- their parts -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _decode(self, z: Tensor) -> dict[str, Tensor]:
        return self.system.generator(z)

    def _elbo(self, x: dict[str, Tensor], rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """The evidence lower bound of a mixture posterior, one component per row, and the squared error."""
        s = self.system
        components = s.inference(x)
        n = next(iter(x.values())).shape[0]
        pick = torch.randint(len(components), (n,), generator=rng, device=self.device)
        rows = torch.arange(n, device=self.device)
        z = torch.stack([c.sample(rng) for c in components])[pick, rows]
        kl = torch.stack([c.kl() for c in components])[pick, rows]
        nll = s.generator.negative_log_likelihood(x, z)
        with torch.no_grad():
            mse = s.generator.squared_error(x, z.detach()).mean()
        return -(nll + self.config.loss.beta * kl).mean(), mse

    def _teach_vae(self, loss: Tensor) -> None:
        """One backward for generator and inference: with samples detached their losses share no parameter."""
        pair = [self.optimisers["generator"], self.optimisers["inference"]]
        grads = torch.autograd.grad(loss, [p for o in pair for p in o.parameters], allow_unused=True)
        for optimiser in pair:
            count = len(optimiser.parameters)
            optimiser.apply(grads[:count], self.lr)
            grads = grads[count:]

    # -- running ---------------------------------------------------------------------------------------------------

    @property
    def total(self) -> int:
        """Iterations of all stages."""
        return sum(stage.iterations for stage in self.config.stages)

    def _position(self) -> tuple[int, int]:
        """The stage of the next iteration and its position in it."""
        left = self.iteration
        for i, stage in enumerate(self.config.stages):
            if left < stage.iterations:
                return i, left
            left -= stage.iterations
        return len(self.config.stages), 0

    def _rng(self) -> torch.Generator:
        mixed = noise.philox4x32(
            [torch.tensor(v) for v in (self.iteration, self.guard.rollbacks, 0, 0)],
            (self.config.seed & noise.MASK32, (self.config.seed >> 32) & noise.MASK32),
        )
        return torch.Generator(self.device).manual_seed(int(mixed[0]) << 31 ^ int(mixed[1]))

    def batch(self, rng: torch.Generator) -> dict[str, Tensor]:
        """A mini-batch drawn uniformly from the training tuples."""
        return self.data.batch(torch.randint(len(self.data), (self.config.batch,), generator=rng, device=self.device))

    def run(self) -> Iterator[Row]:
        """Trains to the end; yields one averaged row of numbers every ``guard.every`` iterations.

        Raises:
            TrainingDiverged: where rolling back did not help.
        """
        every = self.config.guard.every
        good = self._networks()
        good_iteration = self.iteration
        rows: list[Row] = []
        started = time.perf_counter()
        while self.iteration < self.total and not self.stop:
            stage_index, k = self._position()
            stage = self.config.stages[stage_index]
            done = k / max(stage.iterations - 1, 1)
            self.lr = (stage.lr + (stage.final_lr - stage.lr) * done) * 0.5**self.guard.rollbacks
            rng = self._rng()
            x = self.batch(rng)
            chain = self.config.latent_chain
            if stage.kind == "joint" and chain.step == "auto" and k % chain.auto_every == 0:
                self.system.measure_latent_step(x, rng, keep=0.5 if k else 0.0)
            if stage.kind == "joint" and k == 0:
                self.vae_only = self._vae()
            rows.append({**self._steps[stage.kind](x, rng), "iteration": self.iteration})
            self.iteration += 1
            if len(rows) < every and k + 1 < stage.iterations and not self.stop:
                continue
            seconds = (time.perf_counter() - started) / len(rows)
            numbers = [{name: float(value) for name, value in row.items()} for row in rows]
            rows = []
            reason = self.guard.reason(numbers)
            if reason is not None:
                self._restore(good)
                self.iteration = good_iteration
                self.guard.roll_back(reason)
                yield {"stage": stage.kind, "iteration": self.iteration, "rolled_back": reason}
            else:
                good, good_iteration = self._networks(), self.iteration
                mean: Row = {name: sum(row[name] for row in numbers) / len(numbers) for name in numbers[0]}
                mean.update(stage=stage.kind, iteration=self.iteration, seconds_per_iteration=seconds)
                alarm = self.guard.alarm(mean)
                yield {**mean, "alarm": alarm} if alarm else mean
            started = time.perf_counter()

    # -- state -----------------------------------------------------------------------------------------------------

    def _vae(self) -> dict[str, dict[str, Tensor]]:
        s = self.system
        return {
            name: {key: value.detach().clone() for key, value in net.state_dict().items()}
            for name, net in (("generator", s.generator), ("inference", s.inference))
        }

    def _networks(self) -> dict[str, Any]:
        def copied(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.detach().clone()
            if isinstance(value, dict):
                return {key: copied(item) for key, item in value.items()}
            return [copied(item) for item in value] if isinstance(value, list) else value

        return {
            "system": copied(self.system.state_dict()),
            "optimisers": {name: copied(o.adam.state_dict()) for name, o in self.optimisers.items()},
        }

    def _restore(self, networks: dict[str, Any]) -> None:
        self.system.load_state_dict(networks["system"])
        for name, state in networks["optimisers"].items():
            self.optimisers[name].adam.load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        """All that resuming needs: plain data and tensors."""
        return {
            "format": "mmebm-run-1", "config": self.config.to_json(), "iteration": self.iteration,
            "rollbacks": self.guard.rollbacks, "vae_only": self.vae_only or {}, **self._networks(),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`, on a trainer of the same configuration."""
        self._restore(state)
        self.iteration, self.guard.rollbacks = state["iteration"], state["rollbacks"]
        self.vae_only = state["vae_only"] or None
