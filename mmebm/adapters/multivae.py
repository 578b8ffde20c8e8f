"""An energy-based prior in MultiVae's sampler slot.

    sampler = EBMSampler(model, EBMSamplerConfig(steps=60))
    sampler.fit(train_data)
    CoherenceEvaluator(model, classifiers, test_data, sampler=sampler).eval()

The energy tilts a Gaussian: with u the latents of the training set brought to mean 0 and deviation 1, all latent
spaces side by side, p(u) is proportional to exp(-f(u) - |u|^2 / 2). It is trained by maximum likelihood with short
chains from N(0, I), and samples are the ends of chains of the same length, scaled back. (With persistent chains in
training, new chains from N(0, I) ended far outside the data.)
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from mmebm import noise
from mmebm.energies import MLP
from mmebm.samplers.langevin import Langevin
from mmebm.state import integer

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
        steps: Langevin steps from N(0, I), in ``fit`` and in ``sample``.
        step_size: of the chains in the whitened latents; the noise is sqrt(2 step_size).
        iterations: of ``fit``.
        batch_size: of ``fit``.
        learning_rate: of Adam in ``fit``, where it falls to 0 linearly.
        seed: of the training and of the first call of ``sample``.
    """

    hidden: int = 128
    steps: int = 40
    step_size: float = 0.02
    iterations: int = 1000
    batch_size: int = 256
    learning_rate: float = 1e-3
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

    def _short_run(self, energy: MLP, n: int, call: int, *, first_chain: int, chunk: int | None = None) -> Tensor:
        """The ends (n, latents) of chains that no other ``call``, and no other range of chains, has run."""
        c = self.sampler_config
        start = noise.normal(
            (n, len(self._mean)),
            seed=c.seed,
            step=call,
            stream=noise.stream(0, noise.INITIAL),
            chain_offset=first_chain,
            device=self.device,
        )
        return (
            Langevin(c.step_size, prior_std=1.0)
            .sample(
                energy,
                start,
                c.steps,
                seed=c.seed,
                first_step=call * c.steps,
                chain_offset=first_chain,
                chunk_size=chunk,
            )
            .state
        )

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
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(c.seed)
            energy = MLP(u.shape[1], (c.hidden, c.hidden)).to(self.device)
        # without momentum, which would push where the samples no longer are
        optimiser = torch.optim.Adam(energy.parameters(), lr=c.learning_rate, betas=(0.0, 0.999))
        decay = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda k: 1 - k / c.iterations)
        pick = torch.Generator(self.device).manual_seed(c.seed)
        for k in range(c.iterations):
            rows = torch.randint(len(u), (c.batch_size,), generator=pick, device=self.device)
            fake = self._short_run(energy, c.batch_size, k, first_chain=0)
            real_energy, fake_energy = energy(u[rows]), energy(fake)
            loss = real_energy.mean() - fake_energy.mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            decay.step()
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
        n_samples, batch_size = integer("n_samples", n_samples, 0), integer("batch_size", batch_size, 1)
        # training ran chains below batch_size
        first = self.sampler_config.batch_size
        u = self._short_run(self.energy, n_samples, self._calls, first_chain=first, chunk=batch_size)
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
                {
                    "energy": self.energy.state_dict(),
                    "mean": self._mean,
                    "std": self._std,
                    "sizes": self._sizes,
                    "calls": self._calls,
                },
                os.path.join(dir_path, "ebm_sampler.pt"),
            )

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
