"""What a chain returns, and what is said of chains that broke."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mmebm.samplers.settings import is_mapping, is_sequence
from mmebm.state import flatten, integer


@dataclass(frozen=True, repr=False)
class Samples:
    """What a chain returns. Nothing here has synchronised with the device.

    Attributes:
        state: the final state, in the structure that was given, detached unless ``differentiable``.
        trace: per recorded quantity a tensor (steps, chains), or (steps,) for the energy where it returns a scalar; see
            ``record`` in :meth:`Langevin.sample`.
        trajectory: with ``thin=t`` the states after steps t, 2t, ...: the given structure of (steps // t, chains, ...).
        info: seed, steps, first_step, next_step (where a restart goes on), backend, op ("langevin_mlp" or
            "langevin_net" for the whole chain in one call, "langevin_graph" for a captured graph of all steps,
            "langevin_step" for a step at a time) and the reason for both, and ``nonfinite``, a boolean (chains,)
            tensor: chains whose state, energy or gradient was not finite (see :data:`NONFINITE`). Samplers that accept
            or reject say in ``never_accepted`` which chains did not move once.

    Example:
        >>> mmebm.Langevin(0.1).sample(lambda x: x.square().sum(1), torch.zeros(8, 2), 20, thin=5).trajectory.shape
        torch.Size([4, 8, 2])
    """

    state: Any
    trace: dict[str, Tensor]
    trajectory: Any
    info: dict[str, Any]

    def __repr__(self) -> str:
        """Shapes and how it ran, in a line."""
        parts = [f"state {_shapes(self.state)}", f"{self.info.get('steps')} steps"]
        if self.trajectory is not None:
            parts.append(f"trajectory {_shapes(self.trajectory)}")
        if self.trace:
            parts.append(f"trace of {', '.join(self.trace)}")
        return f"<Samples: {'; '.join(parts)}; {self.info.get('op')} on {self.info.get('backend')}>"

    def to_arviz(self, *, thin: int | None = None, burn_in: int = 0) -> Any:
        """The trajectory and what was recorded, as ArviZ takes them: groups ``posterior``, a variable of (chain, draw,
        ...) for each tensor of the state (``x`` for a bare tensor), and ``sample_stats``, what the trace holds of each
        chain at these steps.

        Args:
            thin: the ``thin`` of :meth:`Langevin.sample`; only needed where the numbers of steps and states leave it
                open, and something was recorded.
            burn_in: so many states are left out at the start.

        Returns:
            What ``arviz_base.from_dict`` makes: an ``xarray.DataTree``.

        Raises:
            ModuleNotFoundError: without the package arviz-base.
            ValueError: for a chain without trajectory (``thin=`` keeps one), a ``burn_in`` that leaves nothing, or a
                ``thin`` that is not the chain's.

        Example:
            >>> energy, x0 = lambda x: 0.5 * x.square().sum(1), torch.zeros(4, 2)
            >>> tree = mmebm.MALA(0.5).sample(energy, x0, 1000, thin=10).to_arviz(burn_in=20)
            >>> tree["posterior"]["x"].shape
            (4, 80, 2)
        """
        try:
            from arviz_base import from_dict  # pyright: ignore[reportMissingImports]
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("to_arviz needs ArviZ: pip install arviz-base") from error
        if self.trajectory is None:
            raise ValueError("there is no trajectory: sample with thin=1, or another distance of the states to keep")
        keys, tensors, _ = flatten(self.trajectory)
        states, steps = tensors[0].shape[0], self.info["steps"]
        if integer("burn_in", burn_in, 0) >= states:
            raise ValueError(f"burn_in must leave one of {states} states at least, got {burn_in}")
        fits = [t for t in range(1, steps + 1) if steps // t == states]
        if thin is not None and integer("thin", thin, 1) not in fits:
            raise ValueError(f"thin must be that of the chain, which kept {states} states of {steps} steps, got {thin}")
        if thin is None and len(fits) > 1 and self.trace:
            raise ValueError(f"thin= must say which: {states} states of {steps} steps are left by each of {fits}")
        every = fits[0] if thin is None else thin

        def chains_first(values: Tensor) -> Any:
            values = values[burn_in:].detach().cpu()
            return (values.float() if values.dtype == torch.bfloat16 else values).transpose(0, 1).numpy()

        bare = isinstance(self.trajectory, Tensor)
        groups = {
            "posterior": {"x" if bare else str(key): chains_first(t) for key, t in zip(keys, tensors, strict=True)}
        }
        by_chain = {
            name: chains_first(values[every - 1 :: every][:states])
            for name, values in self.trace.items()
            if values.dim() == 2
        }
        return from_dict({**groups, **({"sample_stats": by_chain} if by_chain else {})})


def _shapes(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if is_mapping(value):
        return "{" + ", ".join(f"{name}: {_shapes(part)}" for name, part in value.items()) + "}"
    if is_sequence(value):
        return "[" + ", ".join(map(_shapes, value)) + "]"
    return type(value).__name__


# What becomes of a chain whose state, or the energy or gradient at it, is inf or NaN. All report it in
# info["nonfinite"]. "warn" also warns, once per line of the caller; a state on a GPU is not read for that.
NONFINITE = ("warn", "ignore", "freeze", "raise")
NonFinite = Literal["warn", "ignore", "freeze", "raise"]


def report_nonfinite(on_nonfinite: str, broken: Tensor, steps: int) -> None:
    """Warns or raises, as asked, where chains are ``broken`` (chains,).

    Raises:
        FloatingPointError: with ``on_nonfinite="raise"``.
    """
    if on_nonfinite == "raise" and bool(broken.any()):
        raise FloatingPointError(
            f"{int(broken.sum())} of {broken.numel()} chains are not finite after {steps} steps: state, energy or "
            'gradient is inf or NaN; a smaller step_size, grad_clip or on_nonfinite="freeze" would keep them'
        )
    # reading it elsewhere would wait for the device
    if on_nonfinite == "warn" and broken.is_cpu and bool(broken.any()):
        level, frame = 1, inspect.currentframe()
        while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("mmebm", "torch"):
            level, frame = level + 1, frame.f_back
        warnings.warn(
            "some chains have a state, energy or gradient that is inf or NaN, and cannot be trusted: see "
            'info[\'nonfinite\'] of sample, and on_nonfinite="freeze", "raise" or "ignore"',
            RuntimeWarning,
            stacklevel=level,
        )
