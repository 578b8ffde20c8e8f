"""A run's folder: where training writes and everything else reads."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmebm import data
from mmebm.data.base import Modality, MultimodalDataset
from mmebm.plugins import import_modules
from mmebm.state import Batch
from mmebm.training import checkpoint
from mmebm.training.config import TAUGHT, Config
from mmebm.training.networks import class_name, flat_networks
from mmebm.training.parallel import Processes
from mmebm.training.reading import CODEC, check_reading, kept_rows, modalities_of, stored_codecs
from mmebm.training.starts import DataStarts
from mmebm.training.system import System

CHECKPOINT = "checkpoint.pt"
LOG = "log.jsonl"

# Where samples are taken: the multimodal VAE after the warm-up; the chain of an energy that learned on top of it while
# it was held; where the data chain starts after the joint stage; and what that chain makes of it.
POINTS = ("vae", "frozen", "x0", "xk")

# Chains run at a time when samples are drawn: bounds the memory, and changes nothing else.
CHUNK = 2000
# These starts are made of training tuples, which samples should not be.
_FROM_DATA = ("data+noise", "shuffled", "aggregated")


class Run:
    """A trained (or half-trained) run: configuration and networks, for sampling and evaluation; its data set is read
    where it is asked for, and only there.

    Args:
        folder: the run's folder; must hold a checkpoint.
        device: where to put the networks.
        prior_steps: steps of the latent prior's chain, instead of those configured for samples
            (``latent_prior.chain.sample_steps``).
        data_path: where the data is, if no longer at the configured ``data.path``.
        content: what a checkpoint holds, where it is not read from the folder.
        networks: those that the trainer was given as objects (docs/your-model.md).

    Raises:
        FileNotFoundError, ValueError: where there is no checkpoint, or not one of ours; for ``prior_steps`` that are
            negative, or given for a run without a latent prior.
    """

    def __init__(
        self,
        folder: Path | str,
        device: torch.device | str = "cpu",
        *,
        prior_steps: int | None = None,
        data_path: str | None = None,
        content: dict[str, Any] | None = None,
        networks: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder: Path = Path(folder)
        self.networks: Mapping[str, Any] | None = networks
        self.device: torch.device = torch.device(device)
        self.content: dict[str, Any] = (
            checkpoint.load(self.folder / CHECKPOINT, self.device) if content is None else content
        )
        self.config = Config.from_json(self.content["config"])
        prior = self.config.latent_prior
        if prior_steps is not None:
            if prior is None:
                raise ValueError(f"prior_steps={prior_steps} is for runs with a latent prior, which this one lacks")
            if prior.kind == "mixture":
                raise ValueError(
                    f"prior_steps={prior_steps} is for priors that a chain draws from: this run's is exact"
                )
            chain = dataclasses.replace(prior.chain, sample_steps=prior_steps)
            self.config = self.config.replace(latent_prior=dataclasses.replace(prior, chain=chain))
        if data_path is not None:
            self.config: Config = self.config.replace(data=dataclasses.replace(self.config.data, path=data_path))
        import_modules(self.config.imports)
        self.processes: Processes = Processes.here()
        self._sets: dict[str, MultimodalDataset] = {}
        self.modalities: tuple[Modality, ...] = self._modalities()
        self.shapes: dict[str, tuple[int, ...]] = {m.name: m.shape for m in self.modalities}
        self._own = self._networks()
        weights, snapshots = checkpoint.weights(self.content), self.content["snapshots"]
        self.system: System = self._system(weights)
        # the VAE by itself: its own weights, and the prior it was trained with
        self.vae: System = self._system(snapshots.get("vae", weights), plain=True)
        self.frozen: System | None = self._system(snapshots["frozen"]) if "frozen" in snapshots else None
        self.starts: DataStarts = DataStarts(self.system, self.config.start, seed=self.config.seed)
        self.starts.load_state_dict(self.content["starts"]["data"])

    def _modalities(self) -> tuple[Modality, ...]:
        description = self.content.get("data")
        if description is None:  # a checkpoint of 0.1.0 does not say: the data must
            return self.dataset("test").modalities
        return modalities_of(description, stored_codecs(self.folder, description))

    def _networks(self) -> dict[str, nn.Module]:
        """The networks that the trainer was given as objects, which only the caller can make again."""
        given = flat_networks(self.networks, self.shapes)
        needed = self.content.get("networks", {})
        missing = {name: kind for name, kind in needed.items() if name not in given}
        if missing:
            raise ValueError(
                f"this run was trained with networks given as objects: {missing}. Give them as networks=, "
                "made as they were then; or train with their import paths in the configuration, which are "
                "stored"
            )
        for name, net in given.items():
            if name not in needed:
                raise ValueError(f"networks has {name!r}, and the run was trained with {sorted(needed) or 'none'}")
            if class_name(net) != needed[name]:
                raise ValueError(f"network {name!r} must be a {needed[name]}, as in training, got {class_name(net)}")
        return given

    def _system(self, state: dict[str, Tensor], *, plain: bool = False) -> System:
        config = self.config.for_samples()
        # each system has modules of its own
        own = {name: copy.deepcopy(net) for name, net in self._own.items() if not plain or name != "prior"}
        if plain:
            config = config.replace(latent_prior=None, model=dataclasses.replace(config.model, prior=None))
        system = System(config, self.shapes, own).to(self.device).eval()
        if plain:
            state = {name: value for name, value in state.items() if not name.startswith("prior.")}
        try:
            system.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"{self.folder / CHECKPOINT} does not belong to its configuration: {error}") from error
        return system

    @property
    def joint_trained(self) -> bool:
        """Whether another stage than the warm-up has begun (before that, all points are the VAE)."""
        return bool(self.content["snapshots"])

    @property
    def infers(self) -> bool:
        """Whether the inference network has learned anything: without it nothing is completed through z."""
        return self._learned("inference")

    @property
    def revises(self) -> bool:
        """Whether the energy has learned anything: without it the data chain means nothing."""
        return self._learned("energy")

    def _learned(self, network: str) -> bool:
        return any(
            network in (stage.train or TAUGHT[stage.kind])
            and (stage.kind != "joint" or self.config.loss.teaches(network))
            for stage in self.config.stages
            if stage.iterations
        )

    @property
    def points(self) -> tuple[str, ...]:
        """Those of :data:`POINTS` that this run has."""
        stages = [stage for stage in self.config.stages if stage.iterations]
        has = {
            "vae": any(stage.kind == "warmup" for stage in stages),
            "x0": self.joint_trained,
            "xk": self.joint_trained and self.revises,
            # where nothing learned after it, xk is this
            "frozen": self.frozen is not None and stages[-1].train != ("energy",),
        }
        return tuple(point for point in POINTS if has[point])

    def log(self) -> list[dict[str, Any]]:
        """The rows of the training log; none where there is no log."""
        return read_log(self.folder)

    @property
    def peak_memory(self) -> float | None:
        """The most memory that training held, in MiB, by the log; None without one."""
        return max((row["peak_memory_mib"] for row in self.log() if "peak_memory_mib" in row), default=None)

    @property
    def seconds_training(self) -> float | None:
        """Seconds of training: measured, where the stages end by it; else by the log, iterations times seconds per
        iteration; None without one."""
        if self.content.get("elapsed"):
            return float(sum(self.content["elapsed"].values()))
        rows, total, last = self.log(), 0.0, 0
        for row in rows:
            if "seconds_per_iteration" in row:
                total += row["seconds_per_iteration"] * max(row["iteration"] - last, 0)
            last = row["iteration"]
        return total if rows else None

    def dataset(self, split: data.Split) -> MultimodalDataset:
        """The run's data set, one of its splits, on the run's device.

        Raises:
            FileNotFoundError: where the data is not where it was.
            ValueError: where the data is now read in another way than it was in training.
        """
        if split not in self._sets:
            path = self.config.data.path
            try:
                held = load_data(self.config, split, self.folder)
            except FileNotFoundError as error:
                if path is None or Path(path).exists():
                    raise
                raise FileNotFoundError(
                    f"the run's data is not at {path}: say where it is by --data-path, in Python data_path= ({error})"
                ) from error
            if "data" in self.content:
                check_reading(self.content["data"], held)
            self._sets[split] = held.to(self.device)
        return self._sets[split]

    @property
    def _keeps(self) -> bool:
        """Whether training kept tuples of the train split back."""
        rows = self.content.get("held")
        return rows is not None and len(rows) > 0

    @functools.cached_property
    def _kept(self) -> Tensor:
        """Their places, on the CPU."""
        return kept_rows(self.content, self.dataset("train"))

    def validation(self) -> MultimodalDataset | None:
        """Tuples that training saw no item of: the validation split, or those of the train split that training kept
        back (``config.validation``). None where there are none, as of a run of a version that had no such split."""
        if self._keeps:
            return dataclasses.replace(self.dataset("train").subset(self._kept), split="validation").labelled_only()
        return self.dataset("validation") if self.content.get("validation") == "split" else None

    def trained(self) -> MultimodalDataset:
        """The tuples that training saw; instances that it did not see have no label."""
        whole = self.dataset("train")
        if not self._keeps:
            return whole
        group = whole.groups()
        held = torch.isin(group, group[self._kept])
        return whole.subset((~held).nonzero().flatten()).labelled_only()

    @property
    def judged_on(self) -> Literal["validation", "test"]:
        """The split that a run is looked at on unless it is the end: its validation, or where it has none the test."""
        return "validation" if self._keeps or self.content.get("validation") == "split" else "test"

    def unseen(self, split: data.Split | None = None) -> MultimodalDataset:
        """The tuples of ``split``, or of :attr:`judged_on`.

        Raises:
            ValueError: for the validation of a run that has none.
        """
        split = split or self.judged_on
        found = self.validation() if split == "validation" else self.dataset(split)
        if found is None:
            raise ValueError(
                f"{self.folder} has no validation: its set has no such split, and training kept nothing back. Train "
                "with --validation.every 500, or take --split test"
            )
        return found

    def real(self, n: int, *, split: data.Split = "train", seed: int = 0) -> dict[str, Tensor]:
        """``n`` real tuples (as many as there are, where fewer), drawn without putting back."""
        held = self.dataset("train") if split == "train" else self.unseen(split)
        rows = torch.randperm(len(held), generator=torch.Generator().manual_seed(seed))[:n]
        return held.batch(rows.to(self.device))

    def sample(
        self, n: int, point: str, *, seed: int, steps: int | Literal["auto"] | None = None, start: str | None = None
    ) -> Batch:
        """``n`` joint samples in model space at one of :data:`POINTS`; the same on any number of processes.

        Args:
            n: number of tuples.
            point: where they are taken.
            seed: of the whole draw.
            steps: of the data chain: a number, None for as many as configured for samples, or "auto" for as many as
                bring the mean energy to that of real tuples (:meth:`steps_to_real`).
            start: where the data chain starts (:mod:`mmebm.training.starts`); None as in training, but from the
                generator where that was made of training tuples.

        Raises:
            ValueError: for a point that is unknown or that this run does not have.
        """
        if point not in POINTS:
            raise ValueError(f"point must be one of {list(POINTS)}, got {point!r}")
        untrained = not self.joint_trained and point in ("x0", "xk")
        if point not in self.points and point != "vae" and not untrained:
            raise ValueError(f"this run has no point {point!r}, only {list(self.points)}")
        begin, end = self.processes.share(n)
        if point == "vae":
            return self.processes.gather(self.vae.generate(end - begin, seed=seed, chain_offset=begin), n)
        system = self.frozen if point == "frozen" and self.frozen is not None else self.system
        x = self.start(end - begin, seed=seed, name=start, offset=begin, system=system)
        if point != "x0":
            steps = self.steps_to_real(x, seed=seed + 1) if steps == "auto" else steps
            x = system.revise_data(x, seed=seed + 1, steps=steps, chain_offset=begin, chunk_size=CHUNK).state
        return self.processes.gather(x, n)

    def start(
        self, n: int, *, seed: int, name: str | None = None, offset: int = 0, system: System | None = None
    ) -> dict[str, Tensor]:
        """Where ``n`` data chains start (see :meth:`sample`)."""
        if name is None:
            name = self.config.start.data
            name = "generator" if name in _FROM_DATA else name
        starts = self.starts
        if system is not None and system is not self.system:
            starts = DataStarts(system, self.config.start, seed=self.config.seed)
        real = self.real(n, seed=seed) if name in _FROM_DATA else {}
        return starts(n, seed=seed, x=real, name=name, offset=offset).x

    def steps_to_real(self, x: Batch, *, seed: int, limit: int | None = None) -> int:
        """The number of steps after which the chain from ``x`` has the mean energy of real tuples; ``limit`` (4 times
        the trained steps) where it does not get there."""
        limit = 4 * max(self.config.data_chain.steps, 1) if limit is None else limit
        with torch.no_grad(), self.system.autocast():
            level = self.system.energy(self.real(1000)).mean()
        energies = (
            self.system.revise_data(x, seed=seed, steps=limit, record=("energy",), chunk_size=CHUNK)
            .trace["energy"]
            .mean(1)
        )
        reached = (energies <= level).nonzero()
        # the energy is recorded where the gradient is taken: entry k is that of x_k
        return int(reached[0]) if len(reached) else limit

    def trajectory(self, n: int, *, seed: int, every: int = 2) -> tuple[dict[str, Tensor], list[int]]:
        """The data chain of ``n`` samples: {modality: (T, n, *shape)} and the steps, the start included."""
        x0 = self.start(n, seed=seed)
        out = self.system.revise_data(x0, seed=seed + 1, thin=every)
        states = {name: torch.cat([x0[name][None], out.trajectory[name]]) for name in x0}
        return states, [every * i for i in range(len(next(iter(states.values()))))]

    def completions(self, steps: int | None = None) -> dict[str, Callable[[Batch, int], Batch]]:
        """The ways to fill in missing modalities: decode (A), with latent Langevin (B), with data Langevin too (C)."""
        s, v = self.system, self.vae
        out: dict[str, Callable[[Batch, int], Batch]] = {}
        if "vae" in self.points:
            out["vae, decode"] = lambda given, seed: v.complete(given, seed=seed, latent_steps=0, data_steps=0)
        if not self.infers:

            def from_start(given: Batch, seed: int) -> Batch:
                n = next(iter(given.values())).shape[0]
                x = {**self.start(n, seed=seed), **given}
                return s.revise_data(x, seed=seed + 1, steps=steps, observed=set(given)).state

            out["data chain from its start"] = from_start
        elif self.joint_trained:
            out["A: decode"] = lambda given, seed: s.complete(given, seed=seed, latent_steps=0, data_steps=0)
            out["B: latent chain"] = lambda given, seed: s.complete(given, seed=seed, data_steps=0)
            if self.revises:
                out["C: B + data chain"] = lambda given, seed: s.complete(given, seed=seed, data_steps=steps)
        return out

    def settings(self, steps: int | None = None) -> dict[str, Any]:
        """What every result file records of the chains."""
        c = self.system.config
        data_steps = c.data_chain.steps if steps is None else steps
        return {
            "preset": c.preset,
            "iteration": self.content["iteration"],
            "evaluations": self.content["evaluations"],
            "data_start": c.start.data,
            "latent_start": c.start.latent,
            "completion": c.start.completion,
            "data_steps": data_steps,
            "data_step": c.data_chain.size(),
            "data_noise": c.data_chain.noise,
            "data_temperature": self.system.data_sampler.implied_temperature,
            "latent_steps": c.latent_chain.steps,
            "latent_step": float(self.system.latent_step),
            "prior_steps": self.system.prior.steps,
            **({"clock": c.clock} if any(stage.seconds is not None for stage in c.stages) else {}),
            "backend": c.backend,
            "device": str(self.device),
        }


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The rows of ``log.jsonl`` in a run's folder; none where there is no log.

    Raises:
        ValueError: naming the line that is no row. One that was cut off at the end is none, and left out.
    """
    path = folder / LOG
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number}: not a row of a log: {error}") from error
    return rows


def load_data(config: Config, split: data.Split, folder: Path | None = None) -> MultimodalDataset:
    """The configured data set, its captions by the codecs that are kept in the run's ``folder``, where some are."""
    d = config.data
    options = dict(d.options)
    for file in sorted(folder.glob("codec*.pt")) if folder is not None else ():
        name = "caption" if file.name == CODEC else file.stem.removeprefix("codec-")
        if d.name == "folder":
            options["codecs"] = {**options.get("codecs", {}), name: str(file)}
        elif file.name == CODEC:
            options["codec"] = str(file)
    return data.load(d.name, split, seed=d.seed, path=d.path, **options)
