# The peer is not installed where types are checked.
# pyright: reportMissingImports=false, reportGeneralTypeIssues=false
"""A torchebm sampler that runs on ours: ``LangevinDynamics`` with the same signature and, from the same generator, the
same numbers to rounding.

    from mmebm.adapters.torchebm import LangevinDynamics
    sampler = LangevinDynamics(model, step_size=0.01)            # wherever torchebm's own would go
    sampler.configure(rng="philox", grad_clip=0.01)              # what torchebm has not
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmebm.samplers import schedules
from mmebm.samplers.langevin import Langevin
from mmebm.state import integer

try:
    from torchebm import samplers
    from torchebm.core import BaseModel, Schedulable
    from torchebm.core.base_scheduler import BaseScheduler, ConstantScheduler
    from torchebm.integrators import EulerMaruyamaIntegrator
except ImportError as error:
    raise ImportError("mmebm.adapters.torchebm needs torchebm: pip install 'mmebm[peers]'", name="torchebm") from error

__all__ = ["LangevinDynamics"]

_OWN = ("step_size", "noise_scale", "bounds", "score")


class LangevinDynamics(samplers.LangevinDynamics):
    """torchebm's ``LangevinDynamics`` with the loop replaced by :class:`mmebm.Langevin`.

    The arguments are torchebm's: ``noise_scale`` is a factor of sqrt(2 step_size), and 1 the unadjusted Langevin
    algorithm. A model that overrides ``gradient`` is asked for it; any other is differentiated. Train or eval mode and
    parameters are left as they are (``configure(mode="eval")`` changes that).

    What our sampler does not do is left to torchebm's loop: integrators other than Euler-Maruyama, mixed precision, and
    models with schedulers of their own, which step with the chain.
    """

    _options: dict[str, Any]

    def configure(self, **options: Any) -> LangevinDynamics:
        """Sets options of :class:`mmebm.Langevin`, such as ``rng="philox"`` or ``grad_clip``; returns the sampler.

        Raises:
            TypeError, ValueError: for what torchebm's arguments already say, or a bad option.
        """
        for name in _OWN:
            if name in options:
                raise ValueError(f"{name} follows from the arguments of LangevinDynamics, so it cannot be set here")
        merged = {**self._settings(), **options}
        Langevin(1.0, **merged, bounds=self.clamp)
        self._options = merged
        return self

    def _settings(self) -> dict[str, Any]:
        return getattr(self, "_options", {"rng": "torch", "mode": "keep"})

    @torch.no_grad()
    def sample(
        self,
        x: Tensor | None = None,
        dim: int | tuple[int, ...] | None = None,
        n_steps: int = 100,
        n_samples: int = 1,
        thin: int = 1,
        return_trajectory: bool = False,
        return_diagnostics: bool = False,
        reset_schedulers: bool = True,
        *,
        y: Tensor | None = None,
        model_kwargs: dict[str, Any] | None = None,
        generator: torch.Generator | None = None,
    ) -> Any:
        """As torchebm's: the final state (chains, ...), or with ``return_trajectory`` (chains, n_steps // thin, ...);
        with ``return_diagnostics`` also a dict of "mean", "var" and "energy" at the kept steps. For either the kept
        states are held at once."""
        if not self._ours():
            return super().sample(
                x,
                dim,
                n_steps,
                n_samples,
                thin,
                return_trajectory,
                return_diagnostics,
                reset_schedulers,
                y=y,
                model_kwargs=model_kwargs,
                generator=generator,
            )
        thin, n_steps = integer("thin", thin, 1), integer("n_steps", n_steps, 0)
        if reset_schedulers:
            self.reset_schedulers()
        start = self._init_state(x, dim, n_samples, generator)
        given = self._prepare_model_kwargs(self._merge_condition(model_kwargs, y))
        step_size, noise_scale = self._advance(n_steps)
        analytic = getattr(self.model, "gradient", None) if self._overrides_gradient() else None
        energy = self.model if analytic is None else lambda x: -self._model_gradient(x, given)
        sampler = Langevin(step_size, noise_scale, bounds=self.clamp, score=analytic is not None, **self._settings())
        wants_states = return_trajectory or return_diagnostics
        out = sampler.sample(
            energy,
            start,
            n_steps,
            kwargs=given if analytic is None else None,
            generator=generator,
            thin=thin if wants_states else None,
        )
        result = out.trajectory.transpose(0, 1).contiguous() if return_trajectory else out.state
        return (result, self._diagnostics(out.trajectory, given)) if return_diagnostics else result

    def _ours(self) -> bool:
        others = (m for m in self.modules() if isinstance(m, Schedulable) and m is not self and m.schedulers)
        plain = type(self.integrator) is EulerMaruyamaIntegrator
        return plain and not self.use_mixed_precision and next(others, None) is None

    def _overrides_gradient(self) -> bool:
        gradient = getattr(self.model, "gradient", None)
        return gradient is not None and getattr(gradient, "__func__", None) is not BaseModel.gradient

    def _advance(self, steps: int) -> tuple[Any, Any]:
        """Step size and noise of each step from torchebm's schedulers, which are then ``steps`` further."""
        pair: list[BaseScheduler] = [self.schedulers[name] for name in ("step_size", "noise_scale")]
        fixed = all(type(scheduler) is ConstantScheduler for scheduler in pair)
        rows = [[float(scheduler.get_value()) for scheduler in pair]]
        for k in range(steps):
            for scheduler in pair:
                scheduler.step()
            if k < steps - 1 and not fixed:
                rows.append([float(scheduler.get_value()) for scheduler in pair])
        noises = [factor * (2 * size) ** 0.5 for size, factor in rows]
        if fixed:
            return rows[0][0], noises[0]
        return schedules.table([size for size, _ in rows]), schedules.table(noises)

    def _diagnostics(self, kept: Tensor, given: dict[str, Any]) -> dict[str, Tensor]:
        alone = kept.shape[1] == 1
        variance = kept.var(1, unbiased=False).clamp(1e-10, 1e10)
        energies = [self._model_energy(x, given).mean() for x in kept]
        return {
            "mean": kept.mean(1),
            "var": torch.zeros_like(variance) if alone else variance,
            "energy": torch.stack(energies).to(self.dtype) if energies else kept.new_zeros(0),
        }
