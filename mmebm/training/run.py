"""A run's folder: where training writes and everything else reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmebm import data
from mmebm.data.base import MultimodalDataset
from mmebm.training import checkpoint
from mmebm.training.config import Config
from mmebm.training.system import Batch, System

CHECKPOINT = "checkpoint.pt"

# Where samples are taken: the multimodal VAE after the warm-up, the generator after the joint stage, its revision.
POINTS = ("vae", "x0", "xk")


class Run:
    """A trained (or half-trained) run: configuration, data and networks, for sampling and evaluation.

    Args:
        folder: the run's folder; must hold a checkpoint.
        device: where to put the networks.

    Raises:
        FileNotFoundError, ValueError: where there is no checkpoint, or not one of ours.
    """

    def __init__(self, folder: Path | str, device: torch.device | str = "cpu") -> None:
        self.folder = Path(folder)
        self.device = torch.device(device)
        self.content = checkpoint.load(self.folder / CHECKPOINT, self.device)
        self.config = Config.from_json(self.content["config"])
        self._sets: dict[str, MultimodalDataset] = {}
        shapes = {m.name: m.shape for m in self.dataset("test").modalities}
        self.system = System(self.config, shapes).to(self.device).eval()
        self.system.load_state_dict(self.content["system"])
        # the VAE by itself: its own weights, and the prior it was trained with
        plain = self.config.replace(latent_prior=None)
        self.vae = System(plain, shapes).to(self.device).eval()
        snapshot = self.content["vae_only"] or {
            "generator": self.system.generator.state_dict(), "inference": self.system.inference.state_dict(),
        }  # fmt: skip
        self.vae.generator.load_state_dict(snapshot["generator"])
        self.vae.inference.load_state_dict(snapshot["inference"])

    @property
    def joint_trained(self) -> bool:
        """Whether the joint stage has begun (before that, all points are the VAE)."""
        return bool(self.content["vae_only"])

    def dataset(self, split: data.Split) -> MultimodalDataset:
        """The run's data set, one of its splits, on the run's device."""
        if split not in self._sets:
            self._sets[split] = load_data(self.config, split).to(self.device)
        return self._sets[split]

    def sample(self, n: int, point: str, *, seed: int, steps: int | None = None) -> Batch:
        """``n`` joint samples in model space at one of :data:`POINTS`.

        Raises:
            ValueError: for an unknown point.
        """
        if point not in POINTS:
            raise ValueError(f"point must be one of {list(POINTS)}, got {point!r}")
        if point == "vae":
            return self.vae.generate(n, seed=seed)
        x0 = self.system.generate(n, seed=seed)
        return x0 if point == "x0" else self.system.revise_data(x0, seed=seed + 1, steps=steps).state

    def trajectory(self, n: int, *, seed: int, every: int = 2) -> tuple[dict[str, Tensor], list[int]]:
        """The data chain of ``n`` samples: {modality: (T, n, *shape)} and the steps, the start included."""
        x0 = self.system.generate(n, seed=seed)
        out = self.system.revise_data(x0, seed=seed + 1, thin=every)
        states = {name: torch.cat([x0[name][None], out.trajectory[name]]) for name in x0}
        return states, [every * i for i in range(len(next(iter(states.values()))))]

    def completions(self, steps: int | None = None) -> dict[str, Callable[[Batch, int], Batch]]:
        """The ways to fill in missing modalities: decode (A), with latent Langevin (B), with data Langevin too (C)."""
        s, v = self.system, self.vae
        out: dict[str, Callable[[Batch, int], Batch]] = {
            "vae, decode": lambda given, seed: v.complete(given, seed=seed, latent_steps=0, data_steps=0),
        }
        if self.joint_trained:
            out["A: decode"] = lambda given, seed: s.complete(given, seed=seed, latent_steps=0, data_steps=0)
            out["B: latent chain"] = lambda given, seed: s.complete(given, seed=seed, data_steps=0)
            out["C: B + data chain"] = lambda given, seed: s.complete(given, seed=seed, data_steps=steps)
        return out

    def settings(self, steps: int | None = None) -> dict[str, Any]:
        """What every result file records of the chains."""
        c = self.config
        data_steps = c.data_chain.steps if steps is None else steps
        return {
            "preset": c.preset, "iteration": self.content["iteration"], "data_steps": data_steps,
            "data_step": c.data_chain.size(), "data_noise": c.data_chain.noise,
            "data_temperature": self.system.data_sampler.implied_temperature,
            "latent_steps": c.latent_chain.steps, "latent_step": float(self.system.latent_step),
            "prior_steps": c.latent_prior.chain.steps if c.latent_prior else 0,
            "backend": c.backend, "device": str(self.device),
        }  # fmt: skip


def load_data(config: Config, split: data.Split) -> MultimodalDataset:
    """The configured data set."""
    d = config.data
    return data.load(d.name, split, seed=d.seed, path=d.path, **d.options)
