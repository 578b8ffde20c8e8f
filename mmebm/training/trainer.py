"""The training loop: stages of steps, and the one step that is the paper (:meth:`Trainer.joint_step`)."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mmebm import noise
from mmebm.data import WITH_VALIDATION, has_validation
from mmebm.data.base import MultimodalDataset
from mmebm.data.mapped import as_set
from mmebm.data.stream import Prefetch, WorkerBatches
from mmebm.evaluation.heldout import METRICS, held_out, summary
from mmebm.evaluation.latent import usable_rows
from mmebm.models import FlowPrior, LatentPrior, MixturePrior
from mmebm.ops.common.layout import widen
from mmebm.state import Batch
from mmebm.training import checkpoint
from mmebm.training.callbacks import Callback
from mmebm.training.config import TAUGHT, Config, LossConfig, Stage, fitted
from mmebm.training.extensions import EnergyTerm, PriorTeacher, ShuffledTuples
from mmebm.training.guard import Guard, TrainingDiverged
from mmebm.training.networks import Networks, chain_reports, class_name, flat_networks, own_names
from mmebm.training.objectives import Objective, contrastive, objective
from mmebm.training.optimise import Optimiser
from mmebm.training.parallel import Processes
from mmebm.training.reading import check_range, check_reading, describe, keep_codecs, kept_rows, tuple_keys
from mmebm.training.starts import DataStarts, Latents, LatentStarts, Start
from mmebm.training.system import System

__all__ = ["Trainer", "TrainingDiverged"]

Row = dict[str, Any]
FIT = 1 << 31  # the purpose of what a fit draws, beside those of an iteration's parts
MEASURED_EVERY = 5  # iterations: what the log alone wants, and which takes a network's forward pass of its own


class Minibatch(NamedTuple):
    """Training tuples ``x``, their numbers ``rows`` in the data set, and which modalities each has (None: all).

    ``offset`` is the global index of the first row, where several processes or parts share an iteration's rows.
    """

    x: dict[str, Tensor]
    rows: Tensor
    present: dict[str, Tensor] | None = None
    offset: int = 0

    @property
    def size(self) -> int:
        """The number of tuples."""
        return len(self.rows)


class Trainer:
    """Trains a :class:`System` on a data set, stage by stage.

    Everything random in an iteration is a function of (seed, iteration, rollbacks, process), so that a resumed run goes
    on exactly where it was.

    Args:
        config: the run.
        data: training tuples, also as a ``torch.utils.data.Dataset`` of dicts (:func:`mmebm.data.from_dataset`); moved
            to ``device``.
        device: where the networks and the data are.
        processes: this process among those that share the rows of an iteration.
        networks: of the user's own, ``{"encoders": {modality: module}, "decoders": {...}, "energy": module, "prior":
            module}``, any of them; these modules are trained themselves (docs/your-model.md).
        validation: tuples of which ``data`` shows no item, such as ``load("digits", "validation")``. None: where
            ``config.validation`` asks for some, they are kept back from ``data``, whole groups of tuples that share an
            item (:meth:`mmebm.data.MultimodalDataset.groups`).
        callbacks: called on the way (:class:`mmebm.training.callbacks.Callback`).

    Attributes:
        data: the tuples that are trained on.
        validation: those that it is validated on, at most ``config.validation.rows``, or None.
        stop: set it, such as to a signal's number, to end after the iteration in hand.

    Raises:
        ValueError, TypeError: for a setting, a network or data that does not fit; the message names it.
    """

    def __init__(
        self,
        config: Config,
        data: Any,
        device: torch.device | str = "cpu",
        *,
        processes: Processes | None = None,
        networks: Mapping[str, Any] | None = None,
        validation: MultimodalDataset | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        data = as_set(data)
        shapes = {m.name: m.shape for m in data.modalities}
        self.config: Config = fitted(config.checked(), shapes)
        self.device: torch.device = torch.device(device)
        config = self.config
        self.networks: Networks = flat_networks(networks, shapes)
        check_range(data, [name.partition(".")[2] for name in (*self.networks, *own_names(config.model))])
        self.processes: Processes = processes or Processes()
        if config.batch // config.accumulate < self.processes.world:
            raise ValueError(
                f"batch={config.batch} in {config.accumulate} parts has no row for each of "
                f"{self.processes.world} processes"
            )
        self.callbacks: list[Callback] = list(callbacks)
        self._whole, self._reading = data, describe(data)
        self._apart = validation and drawn_rows(config, validation)
        # where a run finds tuples that training never saw
        self.unseen: str | None = "split" if validation is not None or _has_split(config, data) else None
        self._split(kept_back(config, data) if validation is None else torch.empty(0, dtype=torch.int64))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.system: System = System(config, shapes, self.networks).to(self.device)
        s = self.system
        adams = {"generator": config.generator, "inference": config.inference, "energy": config.energy}
        if config.latent_prior is not None and isinstance(s.prior, (LatentPrior, FlowPrior)):
            adams["prior"] = config.latent_prior.adam
        part = config.batch // config.accumulate
        self._weight = self.processes.weight(part)
        self.optimisers: dict[str, Optimiser] = {
            name: Optimiser(
                getattr(s, name), adam, accumulate=config.accumulate, processes=self.processes, weight=self._weight
            )
            for name, adam in adams.items()
        }
        self.measures: bool = True  # in an iteration, for the log alone
        # the weights' moving average, which a run samples with; the chains of training keep to the weights themselves
        self.averaged: AveragedModel | None = (
            AveragedModel(s, multi_avg_fn=get_ema_multi_avg_fn(config.ema)) if config.ema else None
        )
        self.objective: Objective = objective(config.loss.objective, **config.loss.objective_options)
        self.prior_teacher: PriorTeacher | None = None
        if config.latent_prior is not None and isinstance(s.prior, (LatentPrior, FlowPrior)):
            self.prior_teacher = PriorTeacher(s.prior, config.latent_prior, self.optimisers["prior"])
        self.energy_terms: list[EnergyTerm] = []
        if config.shuffled_tuples is not None:
            self.energy_terms.append(ShuffledTuples(config.shuffled_tuples, self.processes, part))
        self.data_starts: DataStarts = DataStarts(s, config.start, seed=config.seed)
        self.latent_starts: LatentStarts = LatentStarts(s, config.start, len(self.data))
        noise_starts = config.start.data == "noise"
        limits = dataclasses.replace(config.guard, max_separation=0.0) if noise_starts else config.guard
        self.guard: Guard = Guard(limits)
        self.iteration = 0
        # seconds of the iterations of each stage that has some, by its number
        self.elapsed: dict[int, float] = {}
        # forward and backward passes of single tuples through an energy or a generator, in chains
        self.evaluations = 0
        # systems as they were on the way: "vae" after the warm-up, "frozen" after the energy learned alone
        self.snapshots: dict[str, dict[str, Tensor]] = {}
        # the best number of the validation that config.checkpoint.best goes by, and its iteration
        self.best: dict[str, float] | None = None
        self._reader: Prefetch | WorkerBatches | None = None
        self.stop: int = 0
        self._begin(config.stages[0] if config.stages else Stage("warmup", 0), 0.0)
        self._steps: dict[str, Callable[[Minibatch, torch.Generator], Row]] = {
            "warmup": self.warmup_step,
            "prior": self.prior_step,
            "matching": self.matching_step,
            "joint": self.joint_step,
        }

    # -- the steps -------------------------------------------------------------------------------------------------

    def joint_step(self, batch: Minibatch, rng: torch.Generator) -> Row:
        """One iteration of the paper on a mini-batch ``X``: three networks taught by what two chains revise."""
        s, x, teach = self.system, batch.x, self.teach
        seeds = [noise.draw_seed(rng) for _ in range(5)]
        row: Row = {}

        # 1, 2: the generator's samples X_0 = g(z_0) start the data chain of the energy
        start = self._start(batch, seeds[0])
        x_k = self._data_chain(batch, start.x, seeds[1], row) if self._learns_from_revised(start) else None

        # 3, 4: the inference network's samples start the latent chain of the generator's posterior
        z_k = self._latent_chain(batch, rng, seeds[2], row) if self._learns_from_posterior(batch) else None

        # 5, 6: generator and inference network learn two pairs: X with its revised z, revised X with its own z
        self._teach_vae(batch, z_k, x_k, start.z, rng, row)

        # 7: the energy falls at X and rises at what its chain makes of the updated generator's samples
        if "energy" in teach and self.loss.teaches("energy"):
            x_0 = start.x if start.z is None else s.decode(start.z)
            x_n = self._data_chain(batch, x_0, seeds[3], row)
            self.data_starts.keep(start, x_n)
            real = x if z_k is None or batch.present is None else self._fill(batch, z_k, seeds[4])
            self._teach_energy(real, x_0, x_n, rng, row)

        # an extension: the latent prior, where there is one
        if "prior" in teach and z_k is not None and self.prior_teacher is not None:
            drawn = start.z if self.config.start.data == "generator" else None

            def own() -> Tensor:
                return drawn if isinstance(drawn, Tensor) else self._prior(batch, seeds[0])

            row.update(self.prior_teacher.update(z_k, own, rng, self.lr))
        return row

    def warmup_step(self, batch: Minibatch, rng: torch.Generator) -> Row:
        """Generator and inference network as a multimodal VAE."""
        row: Row = {}
        with self.system.autocast():
            bound, z = self._bound(batch.x, rng, row, "loss_elbo", batch.present)
        self._update_vae(-bound)
        return {**row, **self._squared_error(batch, z)}

    def prior_step(self, batch: Minibatch, rng: torch.Generator) -> Row:
        """The latent prior learns the aggregated posterior; the other networks rest."""
        s, settings = self.system, self.config.latent_prior
        if isinstance(s.prior, MixturePrior) and settings is not None:
            if self._position()[1] or batch.offset != self._share()[0]:
                return {}  # it is there
            # not of this process's share: the same on all of them
            rng = self._rng(purpose=FIT, rank=0)
            rows = torch.randint(len(self.data), (settings.samples,), generator=rng, device=self.device)
            parts = [(self.data.batch(some), self._present(some, rng)) for some in rows.split(1000)]
            z = torch.cat([self._posterior(x, rng, present) for x, present in parts])
            s.prior.fit(z, regularisation=settings.regularisation, seed=self.config.seed)
            self.processes.average(list(s.prior.buffers()))
            return {"prior_fit": -s.prior.log_prob(z).mean()}
        if self.prior_teacher is None:
            return {}
        posterior = self._posterior(batch.x, rng, batch.present)
        seed = noise.draw_seed(rng)
        return self.prior_teacher.update(posterior, lambda: self._prior(batch, seed), rng, self.lr)

    @torch.no_grad()
    def _posterior(self, x: Batch, rng: torch.Generator, present: Mapping[str, Tensor] | None) -> Tensor:
        """Samples of the posterior that the latent prior learns."""
        settings = self.config.latent_prior
        joint = None if settings is None or settings.posterior == "inference" else settings.posterior
        return self.system.inference.sample(x, rng, joint=joint, present=present)

    def matching_step(self, batch: Minibatch, rng: torch.Generator) -> Row:
        """The energy's gradient is taught the way from the decoded z of a tuple to the tuple, without a chain.

            |(K s_m^2 / 2) dE/dx_m (x_t) + X_m - g_m(z)|^2 per element,   x_t = g(z) + t (X - g(z)),   z ~ q(z | X)

        with t uniform in [0, 1] and K steps of size s_m as the data chain is configured: from g(z), and without noise,
        it would end at X.
        """
        s, n = self.system, batch.size
        with torch.no_grad():
            z = s.inference.sample(batch.x, rng, present=batch.present)
            x = batch.x if batch.present is None else self._fill(batch, z, noise.draw_seed(rng))
            x_0 = s.generator(z)
        t = torch.rand(n, generator=rng, device=self.device)
        way = {name: value - x_0[name] for name, value in x.items()}
        at = {
            name: (x_0[name] + t.reshape(-1, *[1] * (step.dim() - 1)) * step).requires_grad_()
            for name, step in way.items()
        }
        size = self.config.data_chain.size()
        with s.autocast():
            grads = torch.autograd.grad(widen(s.energy(at)).sum(), list(at.values()), create_graph=True)
            missed = []
            for (name, step), grad in zip(way.items(), grads, strict=True):
                each = size[name] if isinstance(size, Mapping) else size
                missed.append((self.data_steps * each**2 / 2 * grad + step).flatten(1).square())
            loss = torch.cat(missed, dim=1).mean()
        self.optimisers["energy"].step(loss, self.lr)
        before = torch.cat([step.flatten(1) for step in way.values()], dim=1).square().mean()
        return {"loss_matching": loss.detach(), "way": before}

    # -- their parts -----------------------------------------------------------------------------------------------

    def _learns_from_revised(self, start: Start) -> bool:
        """Whether a loss of generator or inference network needs the revised X."""
        # a z of each modality's own is a pair for its decoder, not for the inference network
        pairs = {"generator": start.z is not None, "inference": isinstance(start.z, Tensor)}
        return any(self.loss.needs_revised(name, pairs=pairs.get(name, False)) for name in self.teach)

    def _learns_from_posterior(self, batch: Minibatch) -> bool:
        """Whether anything needs the revised z."""
        return batch.present is not None or any(self.loss.needs_posterior(name) for name in self.teach)

    def _start(self, batch: Minibatch, seed: int) -> Start:
        """Where the data chains of this batch start."""
        if self.config.start.data in ("generator", "independent"):
            self.evaluations += batch.size * self.system.prior.steps
        return self.data_starts(batch.size, seed=seed, x=batch.x, offset=batch.offset)

    def _data_chain(self, batch: Minibatch, x: Batch, seed: int, row: Row) -> dict[str, Tensor]:
        """The data chain from ``x``, all modalities at once."""
        out = self.system.revise_data(x, seed=seed, steps=self.data_steps, chain_offset=batch.offset)
        self.evaluations += batch.size * self.data_steps
        row["frozen_chains"] = row.get("frozen_chains", 0) + out.info["nonfinite"].sum()
        moved = [(end - x[name]).square().mean() for name, end in out.state.items()]
        row["revision_mse"] = torch.stack(moved).mean()
        return out.state

    def _latent_chain(self, batch: Minibatch, rng: torch.Generator, seed: int, row: Row) -> Tensor:
        """The latent chain of ``batch`` from where it starts."""
        s = self.system
        z = self.latent_starts(batch.x, rng, rows=batch.rows, present=batch.present)
        out = s.revise_latent(
            z, batch.x, seed=seed, steps=self.latent_steps, present=batch.present, chain_offset=batch.offset
        )
        self.evaluations += batch.size * self.latent_steps
        self.latent_starts.keep(batch.rows, out.state)
        row["frozen_chains"] = row.get("frozen_chains", 0) + out.info["nonfinite"].sum()
        row.update(self._squared_error(batch, out.state))
        row["latent_size"] = out.state.norm(dim=1).median() / s.latent**0.5
        row["latent_step"] = s.latent_step.clone()
        return out.state

    def _prior(self, batch: Minibatch, seed: int) -> Tensor:
        s = self.system
        self.evaluations += batch.size * s.prior.steps
        return s.prior.draw(batch.size, seed=seed, device=self.device, chain_offset=batch.offset)

    def _fill(self, batch: Minibatch, z: Tensor, seed: int) -> dict[str, Tensor]:
        """Whole tuples from a batch that lacks modalities: the energy needs all of them."""
        assert batch.present is not None
        self.evaluations += batch.size * self.data_steps
        return self.system.fill(batch.x, batch.present, z, seed=seed, steps=self.data_steps, chain_offset=batch.offset)

    def _bound(
        self, x: Batch, rng: torch.Generator, row: Row, name: str, present: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The configured multimodal VAE's bound, averaged over the rows, and the z it used; the bound without the
        contrastive term that is taken from it goes into ``row`` under ``name``, negative as losses are."""
        s, loss = self.system, self.loss
        experts = s.inference.encode(x, present)
        bound, z = self.objective(s.generator, s.inference, x, rng, beta=loss.beta, present=present, experts=experts)
        row[name] = -bound.detach()
        if loss.contrastive:
            apart = contrastive(experts, shared=s.inference.shared, temperature=loss.contrastive_temperature)
            row[name.replace("elbo", "contrastive")] = apart.detach()
            bound = bound - loss.contrastive * apart
        return bound, z

    @torch.no_grad()
    def _squared_error(self, batch: Minibatch, z: Tensor) -> Row:
        """For the log, where it is due: it decodes all modalities once more."""
        if not self.measures:
            return {}
        return {"mse": self.system.generator.squared_error(batch.x, z.detach(), present=batch.present).mean()}

    def _teach_vae(
        self,
        batch: Minibatch,
        z_k: Tensor | None,
        x_k: Batch | None,
        z_0: Latents | None,
        rng: torch.Generator,
        row: Row,
    ) -> None:
        """Steps 5 and 6: the likelihood of both pairs under generator and inference network, and what keeps the VAE."""
        s, loss, teach = self.system, self.loss, self.teach
        losses: Row = {}
        pairs = (
            ("real", batch.x, z_k, batch.present, loss.generator_real, loss.inference_real),
            ("revised", x_k, z_0, None, loss.generator_revised, loss.inference_revised),
        )
        with s.autocast():
            for pair, x, z, present, of_generator, of_inference in pairs:
                if x is None or z is None:
                    continue
                if "generator" in teach and of_generator:
                    parts = z.items() if isinstance(z, Mapping) else [(None, z)]
                    nll = sum(
                        s.generator.negative_log_likelihood(x if m is None else {m: x[m]}, at, present=present).mean()
                        for m, at in parts
                    )
                    losses["loss_generator"] = losses.get("loss_generator", 0) + of_generator * nll
                    row[f"generator_{pair}"] = torch.as_tensor(nll).detach()
                if "inference" in teach and of_inference and isinstance(z, Tensor):
                    each = loss.inference == "per_expert"
                    log_q = s.inference.log_prob(z, x, per_expert=each, present=present).mean()
                    losses["loss_inference"] = losses.get("loss_inference", 0) - of_inference * log_q
                    row[f"inference_{pair}"] = -log_q.detach()
            row.update({name: value.detach() for name, value in losses.items()})
            if {"generator", "inference"} & set(teach):
                for name, weight, x, present in (
                    ("loss_elbo", loss.elbo, batch.x, batch.present),
                    ("loss_elbo_revised", loss.elbo_revised, x_k, None),
                ):
                    if weight and x is not None:
                        losses[name] = -weight * self._bound(x, rng, row, name, present)[0]
        if losses:
            self._update_vae(torch.stack(list(losses.values())).sum())

    def _update_vae(self, loss: Tensor) -> None:
        """One backward for generator and inference network: with samples detached their losses share no parameter."""
        pair = [self.optimisers[name] for name in ("generator", "inference") if name in self.teach]
        grads = torch.autograd.grad(loss, [p for o in pair for p in o.parameters], allow_unused=True)
        for optimiser in pair:
            count = len(optimiser.parameters)
            optimiser.apply(grads[:count], self.lr)
            grads = grads[count:]

    def _teach_energy(self, real: Batch, x_0: Batch, x_n: Batch, rng: torch.Generator, row: Row) -> None:
        """Step 7's update: E falls at real tuples and rises at the chain's ends."""
        s, loss = self.system, self.loss
        with s.autocast():
            # differences of large energies: not in the 8 bits of a bfloat16
            up, down = widen(s.energy(real)), widen(s.energy(x_n))
            real_mean, revised_mean = up.mean(), down.mean()
            kept = down.sort().values[: max(round((1 - loss.energy_trim) * len(down)), 1)].mean()
            gap = real_mean - (kept if loss.energy_trim else revised_mean)
            loss_e = (gap if loss.energy_clamp is None else gap.clamp(min=-loss.energy_clamp)) + loss.energy_l2 * (
                up.square().mean() + down.square().mean()
            )
            for term in self.energy_terms:
                loss_e = loss_e + term(s, real, up, rng)
        self.optimisers["energy"].step(loss.energy * loss_e, self.lr)
        row["loss_energy"] = loss_e.detach()
        row["energy_real"], row["energy_revised"] = real_mean.detach(), revised_mean.detach()
        row["gap"] = row["energy_real"] - row["energy_revised"]
        # of single energies about their means: what the gap is large or small beside
        row["energy_spread"] = ((up.var() + down.var()) / 2).sqrt().detach() if len(up) > 1 else up.new_zeros(())
        if self.measures:
            with torch.no_grad(), s.autocast():
                row["gap_start"] = row["energy_real"] - widen(s.energy(x_0)).mean()

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

    def _done(self, index: int, k: int) -> float:
        """How much of a stage is over at its iteration ``k``: by its seconds where it has some."""
        stage = self.config.stages[index]
        if stage.seconds is not None:
            return min(self.elapsed.get(index, 0.0) / stage.seconds, 1.0)
        return k / max(stage.iterations - 1, 1)

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() if self.config.clock == "wall" else time.process_time()

    def _timed(self, index: int, k: int) -> Stage:
        """The stage, made to end with iteration ``k`` where its seconds are over, and to go on where they are not."""
        stage = self.config.stages[index]
        assert stage.seconds is not None
        over = torch.tensor([self.elapsed[index] >= stage.seconds], dtype=torch.float64, device=self.device)
        self.processes.average([over])  # over for all where it is for one
        iterations = k + 1 if over.item() else max(stage.iterations, k + 2)
        if not over.item() and iterations > stage.iterations:
            iterations = 2 * iterations
        if iterations != stage.iterations:
            stage = dataclasses.replace(stage, iterations=iterations)
            stages = self.config.stages
            self.config = self.config.replace(stages=(*stages[:index], stage, *stages[index + 1 :]))
        return stage

    def _begin(self, stage: Stage, done: float) -> None:
        """Sets what holds at this point of the stage: learning rate, who learns, and the settings that ramp."""
        self.lr: float = (stage.lr + (stage.final_lr - stage.lr) * done) * 0.5**self.guard.rollbacks
        learners = stage.train or TAUGHT[stage.kind]
        self.teach: tuple[str, ...] = tuple(name for name in learners if name in self.optimisers)
        now = stage.settings(done)
        self.loss: LossConfig = dataclasses.replace(
            self.config.loss, **{k.partition(".")[2]: v for k, v in now.items() if k.startswith("loss.")}
        )
        self.data_steps: int = round(now.get("data_chain.steps", self.config.data_chain.steps))
        self.latent_steps: int = round(now.get("latent_chain.steps", self.config.latent_chain.steps))

    def _rng(self, *, iteration: int | None = None, purpose: int = 0, rank: int | None = None) -> torch.Generator:
        """The generator of an iteration (this one), on this process, for one purpose."""
        counter = (
            self.iteration if iteration is None else iteration,
            self.guard.rollbacks,
            self.processes.rank if rank is None else rank,
            purpose,
        )
        key = (self.config.seed & noise.MASK32, (self.config.seed >> 32) & noise.MASK32)
        mixed = noise.philox4x32([torch.tensor(v) for v in counter], key)
        return torch.Generator(self.device).manual_seed(int(mixed[0]) << 31 ^ int(mixed[1]))

    def _share(self) -> tuple[int, int]:
        """This process's rows of a part of an iteration: from, to."""
        return self.processes.share(self.config.batch // self.config.accumulate)

    def chain_reports(self) -> dict[str, str]:
        """How each chain of as many rows as this process's part of an iteration runs here, and why: a line for each."""
        begin, end = self._share()
        return chain_reports(self.system, end - begin)

    def rows(self, iteration: int, part: int = 0) -> Tensor:
        """The tuples, drawn uniformly, of one part of an iteration on this process; known before its turn comes."""
        begin, end = self._share()
        rng = self._rng(iteration=iteration, purpose=1 + part)
        return torch.randint(len(self.data), (end - begin,), generator=rng, device=self.device)

    def batch(self, part: int = 0, x: dict[str, Tensor] | None = None) -> Minibatch:
        """This process's share of a part of this iteration; ``x`` are its tuples where they are there already."""
        rows = self.rows(self.iteration, part)
        present = self._present(rows, self._rng(purpose=1 + self.config.accumulate + part))
        offset = part * (self.config.batch // self.config.accumulate) + self._share()[0]
        return Minibatch(self.data.batch(rows) if x is None else x, rows, present, offset)

    def _ahead(self) -> Prefetch | WorkerBatches | None:
        """What reads the tuples of this and the next iterations in the background, for sets that are not in memory."""
        if self._reader is not None:
            self._reader.close()
        if all(isinstance(pool, Tensor) for pool in self.data.pools.values()):
            return None
        parts, workers, ahead = range(self.config.accumulate), self.config.data.workers, self.config.data.ahead
        # where stages end is not known beforehand if it is by their seconds
        open_ended = any(stage.seconds is not None for stage in self.config.stages)
        numbers = itertools.count(self.iteration) if open_ended else range(self.iteration, self.total)
        coming = (self.rows(i, part) for i in numbers for part in parts)
        if workers:
            return WorkerBatches(self.data, coming, workers=workers, ahead=ahead, seed=self.config.seed)
        return Prefetch(self.data, coming, depth=ahead)

    def _present(self, rows: Tensor, rng: torch.Generator) -> dict[str, Tensor] | None:
        """Which modalities the tuples ``rows`` have, after what ``data.missing`` takes away."""
        present = self.data.presence(rows)
        return self._lose(present, len(rows), rng) if self.config.data.missing else present

    def _lose(self, present: Mapping[str, Tensor] | None, n: int, rng: torch.Generator) -> dict[str, Tensor]:
        """``present`` with modalities dropped at random, one at least kept in each row."""
        names = [m.name for m in self.data.modalities]
        had = torch.ones(n, len(names), dtype=torch.bool, device=self.device)
        if present is not None:
            had = torch.stack([present[name] for name in names], dim=1)
        luck = torch.rand(had.shape, generator=rng, device=self.device)
        # the luckiest of those it had stays in any case
        best = torch.where(had, luck, -1.0).argmax(1, keepdim=True)
        kept = (had & (luck >= self.config.data.missing)).scatter(1, best, True)
        return dict(zip(names, kept.unbind(1), strict=True))

    def _iterate(self, stage: Stage, k: int) -> Row:
        """One iteration: its rows in as many parts as configured."""
        rng, chain = self._rng(), self.config.latent_chain
        # for networks that draw without a generator, as dropout does
        torch.manual_seed(self._rng(purpose=1 + 2 * self.config.accumulate).initial_seed())
        total: Row = {}
        for part in range(self.config.accumulate):
            batch = self.batch(part, next(self._reader)[1] if self._reader is not None else None)
            due = stage.kind == "joint" and chain.step == "auto" and k % chain.auto_every == 0 and not part
            if due and self._learns_from_posterior(batch):
                self.system.measure_latent_step(batch.x, rng, keep=0.5 if k else 0.0, present=batch.present)
                self.processes.average([self.system.latent_step])
            row = self._steps[stage.kind](batch, rng)
            total = row if not total else {name: total.get(name, 0) + value for name, value in row.items()}
        return {name: value / self.config.accumulate for name, value in total.items()}

    def run(self) -> Iterator[Row]:
        """Trains to the end; yields one averaged row of numbers every ``guard.every`` iterations.

        Raises:
            TrainingDiverged: where rolling back did not help.
        """
        every, checks = self.config.guard.every, self.config.validation.every
        keeps = self.config.checkpoint.every
        good = self._written()
        good_iteration = self.iteration
        rows: list[Row] = []
        self._reader = self._ahead()
        started = time.perf_counter()
        stop = self._stopped()
        while self.iteration < self.total and not stop:
            stage_index, k = self._position()
            stage = self.config.stages[stage_index]
            self._begin(stage, self._done(stage_index, k))
            clock = self._clock() if stage.seconds is not None else 0.0
            if not k:
                for callback in self.callbacks:
                    callback.on_stage(self, stage)
            if stage.kind != "warmup" and "vae" not in self.snapshots:
                self.snapshots["vae"] = self._snapshot()
            self.measures = len(rows) % MEASURED_EVERY == 0
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                rows.append({**self._iterate(stage, k), "iteration": self.iteration})
            if self.averaged is not None:
                if k == 0:  # what an earlier stage was after is no part of this one's mean
                    self.averaged.n_averaged.zero_()
                self.averaged.update_parameters(self.system)
            if stage.seconds is not None:
                self.elapsed[stage_index] = self.elapsed.get(stage_index, 0.0) + self._clock() - clock
                stage = self._timed(stage_index, k)
            self.iteration += 1
            for callback in self.callbacks:
                callback.on_iteration(self)
            last = k + 1 == stage.iterations
            # what is due at an iteration does not move when a run stops and goes on
            due = bool(checks) and self.iteration % checks == 0
            kept = bool(keeps) and self.iteration % keeps == 0
            stop = self._stopped()
            if len(rows) < every and not (last or due or kept or stop):
                continue
            seconds = (time.perf_counter() - started) / len(rows)
            numbers = self._numbers(rows)
            rows = []
            # a value is logged before the update that it leads to
            reason = self.guard.reason(numbers) or self._not_finite()
            if reason is not None:
                self._restore(good)
                self.iteration = good_iteration
                self.guard.roll_back(reason)
                self._reader = self._ahead()  # other rows from here on
                yield self._told({"stage": stage.kind, "iteration": self.iteration, "rolled_back": reason})
            else:
                if last and self.teach == ("energy",):
                    self.snapshots["frozen"] = self._snapshot()
                good, good_iteration = self._written(), self.iteration
                mean: Row = {}
                for name in dict.fromkeys(name for row in numbers for name in row):
                    values = [row[name] for row in numbers if name in row]
                    mean[name] = sum(values) / len(values)
                mean.update(
                    stage=stage.kind,
                    iteration=self.iteration,
                    seconds_per_iteration=seconds,
                    evaluations=self.evaluations,
                )
                if stage.seconds is not None:
                    mean["stage_seconds"] = self.elapsed[stage_index]
                if due:
                    mean.update({f"valid_{name}": value for name, value in self.validate().items()})
                    if self._is_best(mean):
                        mean["best"] = True
                alarm = self.guard.alarm(mean)
                yield self._told({**mean, "alarm": alarm} if alarm else mean)
            started = time.perf_counter()
            stop = self._stopped()  # whoever was given the row may have set it
        if self._reader is not None:
            self._reader.close()
        self._reader = None

    def _stopped(self) -> bool:
        """Whether any process is to stop: all of them end after the same iteration, whoever got a signal first."""
        self.stop = self.processes.largest(self.stop)
        return bool(self.stop)

    def _told(self, row: Row) -> Row:
        """``row``, with what the callbacks put into it."""
        for callback in self.callbacks:
            callback.on_row(self, row)
        return row

    # -- validation ------------------------------------------------------------------------------------------------

    def _split(self, held: Tensor) -> None:
        """Trains on all tuples but ``held``, which are kept for the validation, and those that share an item."""
        self.held: Tensor = held
        whole = self._whole
        self._held_keys = tuple_keys(whole, held)
        rest, validation = whole, self._apart
        if len(held):
            group = whole.groups()
            rest = whole.subset((~torch.isin(group, group[held])).nonzero().flatten())
            validation, self.unseen = dataclasses.replace(whole.subset(held), split="validation"), "held"
        if not len(rest):
            raise ValueError(f"the validation keeps all {len(whole)} tuples back: lower validation.share")
        self.data: Any = rest.to(self.device)
        self.validation: Any | None = None if validation is None else validation.to(self.device)

    def validate(self, *, seed: int | None = None) -> dict[str, float]:
        """The numbers of the held-out tuples (:func:`mmebm.evaluation.heldout.summary`), of the weights that a run
        samples with; and ``gap``, the energy of held-out tuples minus that of the data chain's samples. Nothing that
        training draws depends on whether it was called.

        Raises:
            ValueError: where nothing was kept back (``config.validation``).
        """
        if self.validation is None:
            raise ValueError("nothing was kept back to validate on: set validation.every")
        seed = self.config.seed if seed is None else seed
        n = len(self.validation)
        with self._aside(seed) as s, s.autocast():
            x = self.validation.batch(torch.arange(n, device=self.device))
            samples = self._samples(s, n, seed=seed)
            found = summary(held_out(s, x, samples=samples, infers=self._learned("inference"), seed=seed))
            if self._learned("energy"):
                found["gap"] = float(widen(s.energy(x)).mean() - widen(s.energy(samples)).mean())
        return found

    def samples(self, n: int, *, seed: int = 0) -> dict[str, Tensor]:
        """``n`` joint samples in model space, of the weights that a run samples with: decoded from the prior until the
        energy learns, after the data chain from then on. Nothing that training draws depends on it."""
        with self._aside(seed) as s:
            return self._samples(s, n, seed=seed)

    def _samples(self, s: System, n: int, *, seed: int) -> dict[str, Tensor]:
        x = s.generate(n, seed=seed)
        if not self._learned("energy"):
            return x
        # as many at a time as training has, which bounds the memory
        return dict(s.revise_data(x, seed=seed + 1, chunk_size=self.config.batch).state)

    @contextlib.contextmanager
    def _aside(self, seed: int) -> Iterator[System]:
        """The networks that a run samples with, in eval mode; modes and all random states are as before afterwards."""
        s = self._sampling()
        modes = [(part, part.training) for part in s.modules()]
        try:
            s.eval()
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []), torch.no_grad():
                torch.manual_seed(seed)
                yield s
        finally:
            for part, mode in modes:
                part.training = mode

    def _sampling(self) -> System:
        if self.averaged is None:
            return self.system
        system = self.averaged.module
        assert isinstance(system, System)
        return system

    def _learned(self, network: str) -> bool:
        """Whether a stage that teaches ``network`` has begun."""
        left = self.iteration
        for stage in self.config.stages:
            taught = stage.kind != "joint" or self.config.loss.teaches(network)
            if min(left, stage.iterations) > 0 and taught and network in (stage.train or TAUGHT[stage.kind]):
                return True
            left -= stage.iterations
        return False

    def _is_best(self, row: Row) -> bool:
        """Whether the validation in ``row`` is the best so far, by what ``checkpoint.best`` names."""
        name = self.config.checkpoint.best
        value = row.get(f"valid_{name}")
        if name is None or value is None:
            return False
        if self.best is not None:
            better = value > self.best["value"] if METRICS[name] == "highest" else value < self.best["value"]
            if not better:
                return False
        self.best = {"value": float(value), "iteration": self.iteration}
        return True

    def _numbers(self, rows: list[Row]) -> list[dict[str, float]]:
        """The logged values as numbers, averaged over the processes, so that all of them decide alike."""
        if self.processes.world > 1:
            flat = torch.tensor(
                [float(value) for row in rows for value in row.values()], dtype=torch.float64, device=self.device
            )
            self.processes.average([flat], weight=self._weight)
            values = iter(flat.tolist())
            return [{name: next(values) for name in row} for row in rows]
        return [{name: float(value) for name, value in row.items()} for row in rows]

    # -- state -----------------------------------------------------------------------------------------------------

    def _snapshot(self) -> dict[str, Tensor]:
        system = self.system if self.averaged is None else self.averaged.module
        return {name: value.detach().clone() for name, value in system.state_dict().items()}

    def _not_finite(self) -> str | None:
        """Which network is not made of numbers any more, on any process, or None: no state to go back to."""
        held = dict(self.system.named_parameters()) | {"latent_step": self.system.latent_step}
        if self.averaged is not None:
            held |= {f"average of {name}": p for name, p in self.averaged.module.named_parameters()}
        for name, o in self.optimisers.items():
            held |= {
                f"Adam's {key} of {name}": v for of in o.adam.state.values() for key, v in of.items() if key != "step"
            }
        largest = torch._foreach_norm([t.detach() for t in held.values() if t.numel()], torch.inf)
        wrong = [~n.isfinite() for n in largest]
        # a buffer may hold inf, as masks do
        buffers = {name: b for name, b in self.system.named_buffers() if b.is_floating_point()}
        flags = torch.stack([*wrong, *(b.isnan().any() for b in buffers.values())]).double()
        self.processes.average([flags])
        found = flags.nonzero()
        names = [name for name, t in held.items() if t.numel()] + list(buffers)
        return f"{names[int(found[0])]} is not finite" if len(found) else None

    def _written(self) -> dict[str, Any]:
        """A copy of all that training writes."""
        starts = {"data": self.data_starts.state_dict(), "latent": self.latent_starts.state_dict()}
        return {**self._networks(), "starts": starts}

    def _networks(self) -> dict[str, Any]:
        def copied(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.detach().clone()
            if isinstance(value, dict):
                return {key: copied(item) for key, item in value.items()}
            return [copied(item) for item in value] if isinstance(value, list) else value

        return {
            "system": copied(self.system.state_dict()),
            "averaged": None if self.averaged is None else copied(self.averaged.state_dict()),
            "optimisers": {name: copied(o.adam.state_dict()) for name, o in self.optimisers.items()},
            "buffers": [name for name, _ in self.system.named_buffers() if name != "latent_step"],
        }

    def _restore(self, written: dict[str, Any]) -> None:
        self.system.load_state_dict(written["system"])
        if self.averaged is not None:
            self.averaged.load_state_dict(written["averaged"])
        for name, optimiser in self.optimisers.items():
            optimiser.load_state_dict(written["optimisers"][name])
        self.data_starts.load_state_dict(written["starts"]["data"])
        self.latent_starts.load_state_dict(written["starts"]["latent"])

    def state_dict(self) -> dict[str, Any]:
        """All that resuming needs: plain data and tensors."""
        return {
            "format": checkpoint.FORMAT,
            "config": self.config.to_json(),
            "iteration": self.iteration,
            "rollbacks": self.guard.rollbacks,
            "guarded": self.guard.learned,
            "evaluations": self.evaluations,
            "elapsed": {str(index): seconds for index, seconds in self.elapsed.items()},
            "snapshots": self.snapshots,
            "data": self._reading,
            "networks": {name: class_name(net) for name, net in self.networks.items()},
            "held": self.held,
            "held_keys": self._held_keys,
            "tuples": len(self._whole),
            "validation": self.unseen,
            "best": self.best,
            **self._written(),
        }

    def save(self, folder: Path | str) -> None:
        """Writes what :func:`mmebm.load` needs into ``folder``: the checkpoint, and the codecs of captions."""
        keep_codecs(self.data.modalities, Path(folder))
        checkpoint.save(Path(folder) / "checkpoint.pt", self.state_dict())

    def begin_with(self, content: dict[str, Any]) -> None:
        """Takes the networks of another run's checkpoint, their moving average where it has one; all else is new.

        Raises:
            ValueError: where its networks are others, or its data was read in another way. A latent prior is taken
                where both have one.
        """
        if "data" in content:
            check_reading(content["data"], self.data)
        theirs, own = checkpoint.weights(content), self.system.state_dict()
        both = {name for name in (*theirs, *own) if not name.startswith("prior.") or (name in theirs and name in own)}
        for name in sorted(both):
            here, there = (tuple(of[name].shape) if name in of else "none" for of in (own, theirs))
            if here != there:
                raise ValueError(
                    f"its networks are others: {name} is {there} there and {here} here; `model` must be as it was there"
                )
        self.system.load_state_dict({**own, **{name: theirs[name] for name in both}})
        if self.averaged is not None:
            self.averaged.module.load_state_dict(self.system.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`, on a trainer of the same configuration and data.

        Raises:
            ValueError: where the state does not belong to this configuration, or the data is read in another way.
        """
        if "data" in state:
            check_reading(state["data"], self.data)
        held = kept_rows(state, self._whole) if "held" in state else self.held
        if not torch.equal(held, self.held):
            self._split(held)
        # a run of a version that trained on what is the validation split now has none
        self.unseen = state.get("validation", "held" if len(held) else None)
        if not 0 <= state["iteration"] <= self.total:
            raise ValueError(f"iteration {state['iteration']} of {self.total} that are configured")
        try:
            self._restore(state)
        except (RuntimeError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise ValueError(f"it does not belong to its configuration: {type(error).__name__} {error}") from error
        self.iteration: int = state["iteration"]
        self.guard.rollbacks = state["rollbacks"]
        self.evaluations: int = state["evaluations"]
        self.snapshots = dict(state["snapshots"])
        self.best, self.guard.learned = state.get("best"), state.get("guarded", 0)
        self.elapsed = {int(index): seconds for index, seconds in state.get("elapsed", {}).items()}


def kept_back(config: Config, data: MultimodalDataset) -> Tensor:
    """The tuples that the validation keeps from training, int64 in order: of those that lack no modality, by the seed
    of the data alone; with a tuple all that share an item with it. Where the smallest such group is more than was asked
    for, it is kept, if half of the tuples are left to learn from."""
    v = config.validation
    if not v.every:
        return torch.empty(0, dtype=torch.int64)
    whole = usable_rows(data, labelled=False)
    count = min(max(round(v.share * len(whole)), 2), v.rows)
    if count >= len(data):
        raise ValueError(
            f"the data has {len(data)} tuples, too few to keep some for a validation: set validation.every = 0"
        )
    group = data.groups()
    names, sizes = group[whole].unique(return_counts=True)
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(config.data.seed))
    chosen, total = [], 0
    for number, size in zip(names[order].tolist(), sizes[order].tolist(), strict=True):
        if total + size <= count:
            chosen.append(number)
            total += size
    least = int(sizes.min())
    if total < 2 and 2 <= least <= len(whole) // 2:
        chosen, total = [int(names[order][sizes[order] == least][0])], least
    if total < 2:
        own = f"pass validation=load({data.name!r}, 'validation')" if data.name in WITH_VALIDATION else "give it apart"
        raise ValueError(
            f"the tuples of {data.name!r} hang together by the items that they share, in groups of at least "
            f"{least}, so that no {count} of {len(whole)} can be kept for a validation: {own}, or set "
            "validation.every = 0"
        )
    return whole[torch.isin(group[whole], torch.tensor(chosen))]


def drawn_rows(config: Config, validation: MultimodalDataset) -> MultimodalDataset:
    """At most ``config.validation.rows`` of the tuples that lack no modality, drawn by the seed of the data."""
    whole = usable_rows(validation, labelled=False)
    rng = torch.Generator().manual_seed(config.data.seed)
    return validation.subset(whole[torch.randperm(len(whole), generator=rng)[: config.validation.rows]].sort().values)


def _has_split(config: Config, data: MultimodalDataset) -> bool:
    """Whether ``data`` is the train split of a set that has a validation split."""
    return data.split == "train" and data.name == config.data.name and has_validation(data.name, config.data.path)
