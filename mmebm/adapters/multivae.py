"""An energy-based prior in MultiVae's sampler slot.

    sampler = EBMSampler(model, EBMSamplerConfig(steps=60))
    sampler.fit(train_data)
    CoherenceEvaluator(model, classifiers, test_data, sampler=sampler).eval()

The energy tilts a Gaussian: with u the latents of the training set brought to mean 0 and deviation 1, all latent
spaces side by side, p(u) is proportional to exp(-f(u) - |u|^2 / 2). It is trained by maximum likelihood with persistent
chains; samples are Langevin chains from N(0, I), scaled back.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from mmebm import noise
from mmebm.energies import MLP
from mmebm.samplers import initial
from mmebm.samplers.buffer import ReplayBuffer
from mmebm.samplers.langevin import Langevin

try:
    from multivae.data.utils import set_inputs_to_device  # pyright: ignore[reportMissingImports]
    from multivae.models.base import ModelOutput  # pyright: ignore[reportMissingImports]
    from multivae.samplers.base import BaseSampler, BaseSamplerConfig  # pyright: ignore[reportMissingImports]
    from pydantic.dataclasses import dataclass  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise ImportError(
        "mmebm.adapters.multivae needs MultiVae: pip install 'mmebm[multivae]', in an environment of its own: it may "
        "bring another torch",
        name="multivae",
    ) from error

__all__ = ["EBMSampler", "EBMSamplerConfig"]


@dataclass
class EBMSamplerConfig(BaseSamplerConfig):
    """Settings of :class:`EBMSampler`.

    Args:
        hidden: width of the energy's two hidden layers.
        steps: Langevin steps per iteration of ``fit``.
        sample_steps: Langevin steps from N(0, I) of ``sample``.
        step_size: of the chains in the whitened latents; the noise is sqrt(2 step_size).
        iterations: of ``fit``.
        batch_size: of ``fit``.
        learning_rate: of Adam in ``fit``.
        buffer_size: number of persistent chains.
        seed: of the training and of the first call of ``sample``.
    """

    hidden: int = 128
    steps: int = 20
    sample_steps: int = 200
    step_size: float = 0.05
    iterations: int = 1000
    batch_size: int = 256
    learning_rate: float = 1e-3
    buffer_size: int = 4096
    seed: int = 0


class EBMSampler(BaseSampler):
    """A MultiVae sampler: ``fit`` trains the energy on a data set's latents, ``sample`` draws latents to decode.

    Args:
        model: a trained MultiVae model, with one or several latent spaces; their dependence is modelled too.
        sampler_config: :class:`EBMSamplerConfig`.
    """

    def __init__(self, model: Any, sampler_config: EBMSamplerConfig | None = None) -> None:
        super().__init__(model=model, sampler_config=sampler_config or EBMSamplerConfig())
        self.name = "EBMsampler"
        self.energy: MLP | None = None
        self._calls = 0

    def _chain(self) -> Langevin:
        return Langevin(self.sampler_config.step_size, prior_std=1.0)

    def fit(self, train_data: Any, **kwargs: Any) -> None:
        """Trains the energy on the latents of ``train_data``, a MultiVae data set.

        Raises:
            ValueError: where there are fewer than two examples.
        """
        c = self.sampler_config
        parts = self._latents(train_data)
        self._sizes = {name: part.shape[1] for name, part in parts.items()}
        z = torch.cat(list(parts.values()), dim=1)
        if len(z) < 2:
            raise ValueError(f"train_data must hold at least two examples, got {len(z)}")
        self._mean, self._std = z.mean(0), z.std(0).clamp_min(1e-6)
        u = (z - self._mean) / self._std
        shape = (u.shape[1],)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(c.seed)
            energy = MLP(u.shape[1], (c.hidden, c.hidden)).to(self.device)
        optimiser = torch.optim.Adam(energy.parameters(), lr=c.learning_rate)
        buffer = ReplayBuffer(c.buffer_size, initial.normal(shape), device=self.device, seed=c.seed)
        pick = torch.Generator(self.device).manual_seed(c.seed)
        chain = self._chain()
        for k in range(c.iterations):
            rows = torch.randint(len(u), (c.batch_size,), generator=pick, device=self.device)
            start, handle = buffer.draw(c.batch_size)
            fake = chain.sample(energy, start, c.steps, seed=c.seed, first_step=k * c.steps).state
            buffer.write(handle, fake)
            real_energy, fake_energy = energy(u[rows]), energy(fake)
            # the squares keep the energy's level, which the data leave free, near 0
            loss = real_energy.mean() - fake_energy.mean()
            loss = loss + 1e-3 * (real_energy.square().mean() + fake_energy.square().mean())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        self.energy = energy.eval().requires_grad_(False)
        self._calls = 0
        self.is_fitted = True

    def _latents(self, train_data: Any) -> dict[str, Tensor]:
        """The latents of a data set, by latent space; "" is the shared one."""
        found: dict[str, list[Tensor]] = {}
        with torch.no_grad():
            for batch in torch.utils.data.DataLoader(train_data, batch_size=100):
                out = self.model.encode(set_inputs_to_device(batch, self.device))
                found.setdefault("", []).append(out.z.flatten(1))
                if self._several:
                    for name, part in out.modalities_z.items():
                        found.setdefault(name, []).append(part.flatten(1))
        return {name: torch.cat(parts).float() for name, parts in found.items()}

    @property
    def _several(self) -> bool:
        return bool(getattr(self.model, "multiple_latent_spaces", False))

    def sample(self, n_samples: int = 1, batch_size: int = 500, **kwargs: Any) -> Any:
        """Draws latents, at most ``batch_size`` chains at a time.

        Returns:
            ``ModelOutput`` with ``z`` (n_samples, latent_dim), ``one_latent_space`` and, where there are several,
            ``modalities_z``: what the model's ``decode`` takes. Each call draws other samples.

        Raises:
            ArithmeticError: before ``fit``, as MultiVae's own samplers do.
        """
        if not self.is_fitted or self.energy is None:
            raise ArithmeticError("the sampler is not fitted: call sampler.fit(train_data) before sampler.sample()")
        c, width = self.sampler_config, sum(self._sizes.values())
        # calls are told apart by the steps of their noise; the stream of initial states is another
        first, tag = self._calls * c.sample_steps, noise.stream(0, noise.INITIAL)
        start = noise.normal(
            (n_samples, width), seed=c.seed, step=self._calls, stream=tag, device=self.device
        )  # fmt: skip
        # not the chains of the training: these are other chains of the same seed
        u = self._chain().sample(
            self.energy, start, c.sample_steps, seed=c.seed, first_step=first, chain_offset=c.batch_size,
            chunk_size=batch_size,
        ).state  # fmt: skip
        self._calls += 1
        parts = dict(zip(self._sizes, (u * self._std + self._mean).split(list(self._sizes.values()), 1), strict=True))
        out = ModelOutput(z=parts.pop(""), one_latent_space=not self._several)
        if self._several:
            out["modalities_z"] = parts
        return out

    def save(self, dir_path: str) -> None:
        """The config as MultiVae saves it, and what was fitted in ``ebm_sampler.pt``."""
        super().save(dir_path)
        if self.energy is not None:
            torch.save(
                {"energy": self.energy.state_dict(), "mean": self._mean, "std": self._std, "sizes": self._sizes,
                 "calls": self._calls},
                os.path.join(dir_path, "ebm_sampler.pt"),
            )  # fmt: skip

    def load(self, dir_path: str) -> EBMSampler:
        """Reads what :meth:`save` wrote for a sampler with the same config; returns the sampler, fitted."""
        saved = torch.load(os.path.join(dir_path, "ebm_sampler.pt"), map_location=self.device, weights_only=True)
        self._mean, self._std, self._sizes = saved["mean"], saved["std"], saved["sizes"]
        hidden = self.sampler_config.hidden
        self.energy = MLP(len(self._mean), (hidden, hidden)).to(self.device)
        self.energy.load_state_dict(saved["energy"])
        self.energy.eval().requires_grad_(False)
        self._calls, self.is_fitted = saved["calls"], True
        return self
