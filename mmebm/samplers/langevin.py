"""Langevin dynamics as one call: ``langevin(energy, x0, steps=60, step_size=1e-2)``.

The update rule stands in :mod:`mmebm.ops.langevin_step.reference`; the noise in :mod:`mmebm.noise`. This module is what
the user says and gets. How the chain runs: in one call (:mod:`mmebm.samplers.whole_chain`), as one CUDA graph
(:mod:`mmebm.samplers.capture`), or a step at a time (:mod:`mmebm.samplers.langevin_steps`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from mmebm.ops.common.layout import widen
from mmebm.ops.common.params import NormOver, Outside, Rng
from mmebm.ops.langevin_mlp import Precision
from mmebm.samplers import capture, langevin_steps, metropolis, whole_chain
from mmebm.samplers.chain import Problem, Run, clamp_at_end, cut, follow, join
from mmebm.samplers.driver import S, Sampler
from mmebm.samplers.opaque import opaque
from mmebm.samplers.options import Bounds, LangevinKeywords, LangevinOptions, Project, Setting
from mmebm.samplers.samples import NonFinite, Samples
from mmebm.samplers.separable import check_separable
from mmebm.samplers.settings import (
    BOUND,
    NUMBERS,
    check_leaves,
    check_numbers,
    is_mapping,
    is_sequence,
    langevin_rows,
    leaves,
)
from mmebm.samplers.user_modules import Mode, modules_of, sampling
from mmebm.samplers.watch import Callback
from mmebm.state import State, check_setting, choice, flag, per_key, square

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["MALA", "Langevin", "Samples", "langevin"]


def _map(value: Any, function: Callable[[Any], Any]) -> Any:
    """``function`` of a setting's value: of each entry of a mapping, of a schedule's value at each step."""
    if is_mapping(value):
        return {key: _map(leaf, function) for key, leaf in value.items()}
    if not callable(value):
        return function(value)

    def at(k: int) -> Any:
        return function(value(k))

    return at


@dataclass(frozen=True)
class Langevin(Sampler):
    """An immutable description of Langevin dynamics; :meth:`sample` runs it.

        x <- x - a g(x) + s xi,    g = dE/dx,  xi ~ N(0, 1) for each element

    with the stationary law exp(-E / T), T = s^2 / (2a), for small steps (Parisi 1981; Roberts and Tweedie, Bernoulli
    1996; without bias as :func:`MALA`). In full, a step is

        g = clip(dE/dx) + x / prior_std^2;  x <- bounds(x + clamp(-a g + s xi, +-max_update))

    Every number may be a float, a tensor that broadcasts (a 1-D tensor of length chains means one value per chain), a
    mapping from the state's keys (names of a dict, indices of a list) to such values, or a function of the step
    (:mod:`mmebm.samplers.schedules`). A tensor that a mapping of clips, bounds or priors leaves out has none.

    Args:
        step_size: ``a``, literally the coefficient of the gradient.
        noise_scale: ``s``, literally the standard deviation of the noise; ``None`` means sqrt(2 step_size temperature).
        temperature: of the target exp(-E / temperature), where ``noise_scale`` is None.
        bounds: (low, high), each as above or None.
        log_prob: the callable returns log p (or f = -E) instead of E.

    Other args:
        noise_at: "after" the gradient (Langevin), or "before" it (IGEBM and its relatives).
        clamp_noise: with ``noise_at="before"``, clamp to the bounds before the gradient is taken too.
        grad_clip: limit of each element of the gradient.
        grad_norm_clip: limit of the gradient's l2 norm.
        norm_over: of each "chain", or of the whole "tensor".
        max_update: limit of each element of the update, noise included.
        prior_std: adds x / prior_std^2 to the gradient, the drift of a Gaussian prior or reference N(0, prior_std^2).
        bounds_at: at every "step" or only at the "end" (the states of the trajectory are then without bounds).
        outside: at the bounds "clamp", or "reject": a chain with an element outside stays where it was.
        project: a function (or one per key) applied to a tensor after its update, e.g. onto a sphere.
        finish: a function of the final state, in its structure, that returns the state to hand out (a denoising step,
            a rescaling); after the bounds at the end, without effect on the trajectory and on observed elements.
        accept: None, "descent": a chain moves only where its energy fell, or "metropolis": the step is a proposal
            (MALA), so that the chain's law is exp(-E / T) exactly, T = s^2 / (2a), which all tensors must share.
        score: the callable returns the score d log p / dx, in the state's structure.
        mode: modules found in the energy run in "eval" or "train" mode or as they are ("keep"); restored afterwards.
        rng: "philox", noise that depends on (seed, chain, step, tensor, element) only, or "torch", ``torch.randn`` per
            tensor in state order, so that a ported script gives its old numbers.
        backend: "auto", or one by name, which then must be available (:func:`mmebm.backends`).
        precision: of a fused MLP energy's matrix products on a GPU (:class:`mmebm.ops.langevin_mlp.MlpChain`).
        capture: a chain that is not one fused call as one CUDA graph, replayed (:mod:`mmebm.samplers.capture`): "auto"
            from the second equal call on, where it can be; True at once, or a BackendError with the reason; False not.
        on_nonfinite: where a chain's state, or the energy or gradient at it, is inf or NaN: "warn" once (not on a GPU,
            whose state is not read), "ignore" (it is reported in ``info`` in any case), "freeze" it at its last finite
            state, or "raise" at the end. A scalar energy does not say which chain made it what it is.

    Raises:
        TypeError, ValueError: naming the argument, the value and what would do.

    Example:
        >>> sampler = mmebm.Langevin(step_size={"image": 0.5, "text": 0.01}, bounds={"image": (0, 1)})
        >>> sampler.replace(noise_scale=0.5).implied_temperature["image"]
        0.25
    """

    records: ClassVar[tuple[str, ...]] = ("energy", "grad_norm", "displacement", "clipped", "nonfinite", "accepted")
    takes_16_bits: ClassVar[bool] = True
    takes_blocks: ClassVar[bool] = True

    step_size: Setting
    noise_scale: Setting | None = None
    temperature: Setting = 1.0
    _: dataclasses.KW_ONLY
    noise_at: Literal["after", "before"] = "after"
    clamp_noise: bool = False
    grad_clip: Setting | None = None
    grad_norm_clip: Setting | None = None
    norm_over: NormOver = "chain"
    max_update: Setting | None = None
    prior_std: Setting | None = None
    bounds: Bounds | None = None
    bounds_at: Literal["step", "end"] = "step"
    outside: Outside = "clamp"
    project: Project | None = None
    finish: Callable[[Any], Any] | None = None
    accept: Literal["descent", "metropolis"] | None = None
    log_prob: bool = False
    score: bool = False
    mode: Mode = "eval"
    rng: Rng = "philox"
    backend: str = "auto"
    precision: Precision = "fp32"
    capture: Literal["auto", True, False] = "auto"
    on_nonfinite: NonFinite = "warn"

    def __post_init__(self) -> None:
        self._check_options()
        flag("clamp_noise", self.clamp_noise)
        choice("noise_at", self.noise_at, ("after", "before"))
        choice("norm_over", self.norm_over, ("chain", "tensor"))
        choice("bounds_at", self.bounds_at, ("step", "end"))
        choice("outside", self.outside, ("clamp", "reject"))
        choice("accept", self.accept, (None, "descent", "metropolis"))
        choice("rng", self.rng, ("philox", "torch"))
        choice("precision", self.precision, get_args(Precision))
        choice("capture", self.capture, ("auto", True, False))
        if not isinstance(self.backend, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f'backend must be "auto" or a backend\'s name, got {self.backend!r:.80}')
        check_numbers(self, NUMBERS, required=("step_size", "temperature"))
        plain = isinstance(self.temperature, (int, float)) and self.temperature == 1.0
        if self.noise_scale is not None and not plain:
            raise ValueError(
                "give noise_scale or temperature, not both: noise_scale is the noise's standard deviation; "
                f"got {self.noise_scale!r} and {self.temperature!r}"
            )
        for label, pair in leaves("bounds", self.bounds):
            if not is_sequence(pair) or len(pair) != 2:
                raise ValueError(f"{label} must be (low, high), or a mapping to such pairs, got {pair!r:.80}")
            fixed = [end for end in pair if end is not None and not callable(end)]
            for end in fixed:
                check_setting(label, end, **BOUND)
            if len(fixed) == 2 and not any(isinstance(end, Tensor) for end in fixed) and fixed[0] > fixed[1]:
                raise ValueError(f"{label} must have low <= high, got {pair!r}")
        if self.clamp_noise and (self.bounds is None or self.bounds_at == "end" or self.noise_at != "before"):
            raise ValueError('clamp_noise=True needs bounds at every step and noise_at="before"')
        if self.outside == "reject" and (self.bounds is None or self.bounds_at == "end" or self.noise_at == "before"):
            raise ValueError('outside="reject" needs bounds at every step and noise_at="after"')
        if self.accept is not None and (self.score or self.noise_at == "before"):
            raise ValueError(f'accept={self.accept!r} needs an energy and noise_at="after"')
        why = metropolis.refusal(self) if self.accept == "metropolis" else None
        if why is not None:
            raise ValueError(f'accept="metropolis" needs a step that can be taken back; it goes without {why}')
        if self.finish is not None and not callable(self.finish):
            raise TypeError(f"finish must be a function of the state, got {self.finish!r:.80}")
        for label, item in leaves("project", self.project):
            if not callable(item):
                raise TypeError(f"{label} must be a function of a tensor, or a mapping to such, got {item!r:.80}")

    @classmethod
    def from_sgld(
        cls,
        scale: Setting,
        *,
        accept: Literal["descent", "metropolis"] | None = None,
        **options: Unpack[LangevinKeywords],
    ) -> Langevin:
        """The convention x <- x - s^2/2 dE/dx + s xi: step_size = s^2 / 2, noise_scale = s; temperature 1.

        Args:
            scale: ``s``, whatever a setting may be: a number, a tensor, a mapping or a function of the step.

        Other args:
            accept, options: as :class:`Langevin` describes them; ``temperature`` is not among them.

        Raises:
            TypeError, ValueError: as :class:`Langevin`.

        Example:
            >>> mmebm.Langevin.from_sgld(0.2).implied_temperature
            1.0
        """
        check_leaves("scale", scale)
        return cls(_map(scale, lambda s: square("scale", s) / 2), scale, accept=accept, **options)

    def replace(self, **changes: Unpack[LangevinOptions]) -> Langevin:
        """A copy with some options changed.

        Example:
            >>> mmebm.Langevin(0.1).replace(step_size=0.2).step_size
            0.2
        """
        return dataclasses.replace(self, **changes)

    @property
    def implied_temperature(self) -> Any:
        """s^2 / (2a): the chain's stationary law is close to exp(-E / T). A mapping where the settings are mappings;
        the value at step 0 where they are schedules; inf for step_size 0 with noise.

        Example:
            >>> mmebm.Langevin(step_size=10.0, noise_scale=0.005).implied_temperature  # gradient descent, nearly
            1.25e-06
        """

        def temperature(a: Any, s: Any, t: Any) -> Any:
            a, s, t = (v(0) if callable(v) else v for v in (a, s, t))
            if s is None:
                return t
            variance = square("noise_scale", s)
            if isinstance(a, Tensor) or isinstance(s, Tensor):
                return variance / (2 * a)
            return variance / (2 * a) if a else (math.inf if s else 0.0)

        parts: list[Any] = [self.step_size, self.noise_scale, self.temperature]
        keys = [key for part in parts if is_mapping(part) for key in part]
        if not keys:
            return temperature(*parts)
        return {
            key: temperature(*(part.get(key) if is_mapping(part) else part for part in parts))
            for key in dict.fromkeys(keys)
        }

    @opaque
    def sample(
        self,
        energy: Callable[..., Any],
        state: State,
        steps: int,
        *,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        observed: Any = None,
        blocks: Sequence[Any] | None = None,
        seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
        chain_offset: int = 0,
        first_step: int | Tensor = 0,
        record: Collection[str] = (),
        thin: int | None = None,
        offload: bool = False,
        inplace: bool = False,
        chunk_size: int | None = None,
        differentiable: int | bool | None = None,
        progress: bool = False,
        callback: Callback | None = None,
    ) -> Samples:
        """Runs ``steps`` steps from ``state``.

        Args:
            energy: called as ``energy(state, *args, **kwargs)`` with the state in the structure given; returns anything
                with a leading chain dimension, or a scalar; the gradient is that of its sum.
            state: a tensor (chains, ...), or a list, tuple or dict of such tensors. Left as it is, unless ``inplace``.
            steps: number of updates; 0 returns a copy.
            seed: 64-bit int, or a 1-element int64 tensor on the state's device; None draws one from ``generator`` or,
                without one, from torch's global CPU generator.
            observed: what keeps its value: a collection of keys, a mapping from key to a boolean mask, or one mask.
            args, kwargs: what else the energy is given; a :class:`~mmebm.samplers.schedules.Schedule` among them stands
                for its value at each step.

        Other args:
            blocks: keys, or collections of keys, updated in turn within a step, each with its own gradient; together
                they hold every key once.
            generator: a ``torch.Generator``; with ``rng="torch"`` it draws the noise itself.
            chain_offset: global index of the first chain: rows [o, o+n) alone equal those of the whole run.
            first_step: index of the first step, so that K1 steps and then K2 with ``first_step=K1`` equal K1 + K2.
            record: any of "energy" and "grad_norm" (where the gradient is taken; before clips and prior),
                "displacement" (distance from the state before the step to the one after it), "clipped" (elements whose
                gradient or update a clip changed), "nonfinite" (elements of the update that are inf or NaN),
                "accepted" (with ``accept``: the fraction of the step's blocks that moved, so 0 or 1 without blocks).
            thin: keep the state after every ``thin``-th step.
            offload: keep the trajectory in the CPU's memory (pinned where the state is on a GPU: the copies overlap
                with the steps, and the call waits for them at its end).
            inplace: write the result into the given tensors.
            chunk_size: run at most so many chains at a time; tensors in ``args`` and ``kwargs`` (also inside lists,
                tuples and dicts) whose first dimension is the number of chains are cut along. An energy that couples
                the chains (a mean over them) has another gradient in chunks: a ValueError, where two chains show it.
            differentiable: keep the graph of the last k steps (True: all), with parameters and ``state`` as they are.
            progress: say on standard error how far the chain is: one line in a terminal, elsewhere one now and then.
            callback: called as ``callback(step, state)`` with the number of steps done and the state, after every
                ``thin`` steps (without it a hundred times) and at the end; the state is a copy. True ends the chain
                there: ``info["steps"]`` says where. The numbers stay the same, and a chain that is one fused call is
                run in pieces; where it cannot go on so, it goes on a step at a time.

        Returns:
            :class:`Samples`.

        Raises:
            TypeError, ValueError: naming the argument, the value and what would do.
            BackendError: where an explicit backend cannot run this chain.
            FloatingPointError: with ``on_nonfinite="raise"``, where a chain ended non-finite.

        Example:
            >>> state = {"x": torch.zeros(8, 2), "y": torch.ones(8, 3)}
            >>> energy = lambda s: (s["x"] ** 2).sum(1) + (s["x"][:, :1] - s["y"]).square().sum(1)
            >>> out = mmebm.Langevin(0.1).sample(energy, state, 20, observed={"y"}, seed=0, record=("energy",), thin=10)
            >>> out.trace["energy"].shape, out.trajectory["x"].shape, bool((out.state["y"] == 1).all())
            (torch.Size([20, 8]), torch.Size([2, 8, 2]), True)
        """
        return self._sample(locals())

    def _without_steps(self) -> str | None:
        return 'bounds_at="end", as it is in no chain\'s end' if self.bounds_at == "end" else super()._without_steps()

    def _run(self, p: Problem, tensors: list[Tensor]) -> Run:
        if "accepted" in p.record and self.accept is None:
            raise ValueError('record="accepted" needs accept="metropolis" or "descent"')
        if self.accept == "metropolis" and any(widen(t[:0]).dtype != t.dtype for t in tensors):
            raise ValueError('accept="metropolis" needs float32 or float64: a step rounded to 16 bits is no Gaussian')
        if self.rng == "torch" and (p.chain_offset or p.chunk_size is not None):
            raise ValueError('chain_offset and chunk_size need rng="philox": torch\'s noise depends on the batch')
        if p.chunk_size is not None and self.norm_over == "tensor" and self.grad_norm_clip is not None:
            raise ValueError('chunk_size cannot go with norm_over="tensor": its norm runs over all chains')
        params, noisy = langevin_rows(self, p.keys, tensors, p.first_step, p.steps)
        ends: list[Any] = params[-1] if self.bounds_at == "end" and p.steps else []
        if self.bounds_at == "end":
            params = params.map(lambda name, value: None if name in ("low", "high") else value)
        project = per_key("project", self.project, p.keys, required=False)
        p = dataclasses.replace(p, params=params, noisy=noisy, project=project)
        chains, size = tensors[0].shape[0], p.chunk_size
        if size is None or chains <= size:
            run = _one_run(p, tensors)
        else:
            check_separable(p, tensors, size)
            rows = [slice(start, start + size) for start in range(0, chains, size)]
            run = join([_one_run(cut(p, chains, part), [t[part] for t in tensors]) for part in rows])
        if not ends:
            return run
        return dataclasses.replace(
            run, state=[clamp_at_end(end, mask, t) for end, mask, t in zip(ends, p.masks, run.state, strict=True)]
        )


def _one_run(p: Problem, tensors: list[Tensor]) -> Run:
    """In one call, as a CUDA graph or a step at a time, and why."""
    detached = [t.detach() for t in tensors]
    with torch.no_grad(), sampling(modules_of(p.energy, *p.calls[0]), p.sampler.mode):
        whole = whole_chain.run(p, detached)
    if isinstance(whole, whole_chain.Rest):
        return _rest(p, whole)
    if isinstance(whole, Run):
        return whole
    captured = capture.run(p, detached, langevin_steps.run)
    if isinstance(captured, str):
        out = langevin_steps.run(p, tensors)
        reason = f"{out.info['reason']}; a step at a time: {whole}; not captured: {captured}"
        return dataclasses.replace(out, info={**out.info, "reason": reason})
    reason = f"{captured.info['reason']}; not a fused call: {whole}"
    return dataclasses.replace(captured, info={**captured.info, "op": "langevin_graph", "reason": reason})


def _rest(p: Problem, whole: whole_chain.Rest) -> Run:
    """The steps that are left of a chain, one at a time."""
    before, done = whole.run, whole.run.info["steps"]
    assert p.watch is not None
    p.watch.before = done
    params = p.params[done:] if len(p.params) > 1 else p.params
    left = dataclasses.replace(
        p, steps=p.steps - done, first_step=p.first_step + done, params=params, carried=before.carried
    )
    out = follow(before, langevin_steps.run(left, before.state))
    reason = f"{out.info['reason']}; a step at a time from step {done} on: {whole.reason}"
    return dataclasses.replace(out, info={**out.info, "reason": reason})


def MALA(
    step_size: Setting,
    temperature: Setting = 1.0,
    *,
    noise_scale: Setting | None = None,
    **options: Unpack[LangevinKeywords],
) -> Langevin:
    """The Metropolis-adjusted Langevin algorithm (Roberts and Tweedie, Bernoulli 1996): a :class:`Langevin` whose step

        y = x - a dE/dx + sqrt(2 a T) xi

    is a proposal, which a chain takes with probability min(1, exp((E(x) - E(y)) / T) q(x | y) / q(y | x)), q the normal
    density of the proposal. The stationary law is exp(-E / T) for every step size. One gradient a step.

    Args:
        step_size: ``a``. About 0.57 of the proposals should be accepted (Roberts and Rosenthal 1998); see
            ``record=("accepted",)`` of :meth:`Langevin.sample`.
        temperature: ``T``.

    Other args:
        noise_scale: the noise's standard deviation ``s`` in place of a temperature: T = s^2 / (2a).
        options: any keyword of :class:`Langevin` that leaves the step reversible; not bounds at every step, max_update
            or project.

    Raises:
        TypeError, ValueError: as :class:`Langevin`.

    Example:
        >>> x = mmebm.MALA(0.5).sample(lambda x: 0.5 * x.square().sum(1), torch.zeros(1000, 2), 100, seed=0).state
        >>> bool((x.var(0) - 1).abs().max() < 0.2)
        True
    """
    return Langevin(step_size, noise_scale, temperature, accept="metropolis", **options)


@opaque
def langevin(
    energy: Callable[..., Any],
    state: S,
    steps: int,
    *,
    step_size: Setting,
    noise_scale: Setting | None = None,
    temperature: Setting = 1.0,
    noise_at: Literal["after", "before"] = "after",
    clamp_noise: bool = False,
    grad_clip: Setting | None = None,
    grad_norm_clip: Setting | None = None,
    norm_over: NormOver = "chain",
    max_update: Setting | None = None,
    prior_std: Setting | None = None,
    bounds: Bounds | None = None,
    bounds_at: Literal["step", "end"] = "step",
    outside: Outside = "clamp",
    project: Project | None = None,
    finish: Callable[[Any], Any] | None = None,
    accept: Literal["descent", "metropolis"] | None = None,
    log_prob: bool = False,
    score: bool = False,
    mode: Mode = "eval",
    rng: Rng = "philox",
    backend: str = "auto",
    precision: Precision = "fp32",
    capture: Literal["auto", True, False] = "auto",
    on_nonfinite: NonFinite = "warn",
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    observed: Any = None,
    blocks: Sequence[Any] | None = None,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    chain_offset: int = 0,
    first_step: int | Tensor = 0,
    inplace: bool = False,
    chunk_size: int | None = None,
    differentiable: int | bool | None = None,
    progress: bool = False,
    callback: Callback | None = None,
) -> S:
    """Langevin dynamics in one call: state in, state out.

    ``x <- x - step_size dE/dx + noise_scale xi``, ``steps`` times, with fresh standard normals xi each time.

    Args:
        energy: takes the state and returns one energy per chain, (chains,) or (chains, ...), or a scalar.
        state: a tensor (chains, ...), or a list, tuple or dict of such tensors.
        steps: number of updates.
        step_size: the coefficient of the gradient.

    Other args:
        noise_scale to on_nonfinite: as :class:`Langevin` describes them.
        args to callback: as :meth:`Langevin.sample` does, which also has ``record``, ``thin`` and ``offload``.

    Returns:
        The final state, in the structure that was given.

    Raises:
        TypeError, ValueError: naming the argument, the value and what would do.

    Example:
        >>> x = mmebm.langevin(lambda x: 0.5 * x.square().sum(1), torch.zeros(100, 2), 50, step_size=0.1, seed=0)
        >>> x.shape
        torch.Size([100, 2])
    """
    given = locals()
    options = {f.name: given.pop(f.name) for f in dataclasses.fields(Langevin) if f.init and f.name in given}
    return Langevin(**options).sample(**given).state
