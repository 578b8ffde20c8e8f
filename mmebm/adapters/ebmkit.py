# The peer is not installed where types are checked.
# pyright: reportMissingImports=false, reportGeneralTypeIssues=false
"""An ebmkit sampler that runs on ours: ``LangevinDynamics`` with the same signature and, from the same global
generator, the same numbers to rounding.

    from mmebm.adapters.ebmkit import LangevinDynamics
    loss = ebm.ContrastiveDivergence(LangevinDynamics(step_size=10.0, noise_scale=0.005, grad_clip=0.01), buffer)
    LangevinDynamics(10.0, noise_scale=0.005).configure(noise_at="before")      # any option of mmebm.Langevin
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmebm.samplers.langevin import Langevin

try:
    from ebm import samplers
except ImportError as error:
    raise ImportError("mmebm.adapters.ebmkit needs ebmkit: pip install 'mmebm[peers]'", name="ebm") from error

__all__ = ["LangevinDynamics"]

_OWN = ("step_size", "noise_scale", "grad_clip", "bounds")


class LangevinDynamics(samplers.LangevinDynamics):
    """ebmkit's ``LangevinDynamics`` with the loop replaced by :class:`mmebm.Langevin`.

    The arguments and attributes are ebmkit's, read at each call. Train or eval mode is left as it is
    (``configure(mode="eval")`` changes that); parameters are left alone, also where the energy is a function around a
    module.
    """

    _options: dict[str, Any]

    def configure(self, **options: Any) -> LangevinDynamics:
        """Sets options of :class:`mmebm.Langevin`, such as ``rng="philox"`` or ``noise_at``; returns the sampler.

        Raises:
            TypeError, ValueError: for what ebmkit's arguments already say, or a bad option.
        """
        for name in _OWN:
            if name in options:
                raise ValueError(f"{name} follows from the arguments of LangevinDynamics, so it cannot be set here")
        merged = {**self._settings(), **options}
        self._sampler(merged)
        self._options = merged
        return self

    def _settings(self) -> dict[str, Any]:
        return getattr(self, "_options", {"rng": "torch", "mode": "keep"})

    def _sampler(self, settings: dict[str, Any]) -> Langevin:
        return Langevin(self.step_size, self.noise_scale, grad_clip=self.grad_clip, bounds=self.clamp, **settings)

    def step(self, energy: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """One transition of every chain."""
        return self._sampler(self._settings()).sample(energy, x, 1).state

    def sample(
        self,
        energy: Callable[[Tensor], Tensor],
        x_init: Tensor,
        *,
        steps: int | None = None,
        return_trajectory: bool = False,
    ) -> Tensor:
        """As ebmkit's: the final state (chains, ...), or all of them with the start (steps + 1, chains, ...)."""
        steps = self.steps if steps is None else steps
        out = self._sampler(self._settings()).sample(energy, x_init, steps, thin=1 if return_trajectory else None)
        if not return_trajectory:
            return out.state
        return torch.cat([x_init.detach()[None], out.trajectory])
