"""Parallel tempering: a ladder of temperatures as a batch dimension, with exchanges between neighbours."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mmebm import noise
from mmebm.ops.params import StepParams
from mmebm.samplers.call import (
    Call,
    Recorder,
    Samples,
    choice,
    leaves,
    map_tensors,
    per_chain_shape,
    resolve,
    running,
    where,
)
from mmebm.samplers.gradient import one_per_chain
from mmebm.samplers.metropolis import log_ratio
from mmebm.samplers.modes import Mode
from mmebm.samplers.opaque import opaque
from mmebm.state import State, check_setting, flag, flatten, integer, per_key

RECORDS = ("energy", "ladder_energy", "accept_prob", "swap_prob", "replica")


@dataclass(frozen=True)
class ParallelTempering:
    """An immutable description of parallel tempering with Langevin steps; :meth:`sample` runs it.

    Every chain has a replica at each of R temperatures. A step moves all replicas of all chains, with one call of the
    energy on (chains * R, ...) rows and one gradient, by x - a dE/dx + sqrt(2 a T) xi, and then tries to exchange
    neighbours: pairs (0, 1), (2, 3), ... and pairs (1, 2), (3, 4), ... in turn, each with probability
    min(1, exp((1 / T_r - 1 / T_r+1) (E_r - E_r+1))). The result is the replicas at the first temperature.

    Args:
        step_size: ``a``, the coefficient of the gradient: a number, a sequence or 1-D tensor of R numbers, one per
            temperature, or a mapping from the state's keys to such.
        temperatures: R increasing numbers, of the targets exp(-E / T); the first is the one that is wanted. Neighbours
            must be close: exchanges are rare once T_r+1 / T_r - 1 is above about sqrt(2 / elements).
        swap_every: try exchanges after every so many steps.
        accept: "metropolis", so that every temperature has its exact law, or None, Langevin steps with their bias.
        log_prob: the callable returns log p instead of E.
        mode: modules found in the energy run in "eval" or "train" mode or as they are ("keep"); restored afterwards.

    Raises:
        TypeError, ValueError: naming the argument, the value and what would do.
    """

    step_size: Any
    temperatures: Sequence[float]
    _: dataclasses.KW_ONLY
    swap_every: int = 1
    accept: Literal["metropolis"] | None = "metropolis"
    log_prob: bool = False
    mode: Mode = "eval"

    def __post_init__(self) -> None:
        choice("mode", self.mode, ("eval", "train", "keep"))
        flag("log_prob", self.log_prob)
        choice("accept", self.accept, ("metropolis", None))
        integer("swap_every", self.swap_every, 1)
        given = self.temperatures
        if isinstance(given, (str, Mapping)) or not hasattr(given, "__len__") or not hasattr(given, "__iter__"):
            raise TypeError(f"temperatures must be a sequence of increasing numbers, got {given!r:.80}")
        try:
            ladder = tuple(float(t) for t in given)
        except (TypeError, ValueError, RuntimeError):  # the last, of tensors without numbers
            raise TypeError(f"temperatures must be a sequence of increasing numbers, got {given!r:.80}") from None
        increasing = all(a < b for a, b in itertools.pairwise(ladder))
        if not ladder or not increasing or not (0 < ladder[0] and ladder[-1] < math.inf):
            raise ValueError(f"temperatures must be increasing, positive and finite, got {ladder}")
        object.__setattr__(self, "temperatures", ladder)
        for label, leaf in leaves("step_size", self.step_size) or [("step_size", None)]:
            self._rungs(label, leaf)

    def replace(self, **changes: Any) -> ParallelTempering:
        """A copy with some options changed."""
        return dataclasses.replace(self, **changes)

    def _rungs(self, label: str, value: Any) -> float | Tensor:
        """A step size as a number, or as a 1-D tensor with one per temperature."""
        if isinstance(value, Tensor) and value.dim() == 0:
            check_setting(label, value, strict=True)
            return value.reshape(1).expand(len(self.temperatures))
        if not isinstance(value, (list, tuple, Tensor)):
            check_setting(label, value, strict=True)
            return float(value)
        for item in [value] if isinstance(value, Tensor) else value:
            check_setting(label, item, strict=True)
        out = value
        if not isinstance(out, Tensor):
            out = torch.tensor([float(item) for item in value], dtype=torch.float64, device="cpu")
        if out.shape != (len(self.temperatures),):
            raise ValueError(
                f"{label} must be a number or one per temperature ({len(self.temperatures)},), got shape "
                f"{tuple(out.shape)}"
            )
        return out

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
        ladder: Any = None,
        seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
        chain_offset: int = 0,
        first_step: int = 0,
        record: Collection[str] = (),
        thin: int | None = None,
        inplace: bool = False,
    ) -> Samples:
        """Runs ``steps`` steps. What is not named here is as in :meth:`mmebm.Langevin.sample`.

        Args:
            energy: returns one value per row, of that row only; the rows are chain 0 at all temperatures, then chain 1.
            state: as there, in float32 or float64; every replica of a chain starts from it.
            args, kwargs: tensors among them (also inside lists, tuples and dicts) whose first dimension is the number
                of chains are repeated for the replicas.
            ladder: where the replicas start instead: ``out.info["ladder"]`` of the run before, in the state's structure
                of (chains, R, ...). K1 steps and then K2 with ``first_step=K1`` and the ladder equal K1 + K2.
            record: any of "energy" (at the first temperature, before the step), "ladder_energy" (the same at all R),
                "accept_prob" (of the move, R), "swap_prob" (of the exchange of r and r + 1, R - 1; NaN where it was not
                tried) and "replica" (which of the run's R replicas is at which temperature after the step). The last
                four have shape (steps, chains, R or R - 1).

        Returns:
            :class:`~mmebm.Samples`; state and trajectory are those of the first temperature. ``info`` holds the
            ``ladder``, and the mean probabilities ``acceptance`` (chains, R) and ``swap_acceptance`` (chains, R - 1).

        Raises:
            TypeError, ValueError: naming the argument, the value and what would do.
        """
        call = resolve(
            energy, state, steps, args=args, kwargs=kwargs, observed=observed, seed=seed, generator=generator,
            chain_offset=chain_offset, first_step=first_step, record=record, records=RECORDS, thin=thin,
            inplace=inplace,
        )  # fmt: skip
        first = call.first_step
        if isinstance(first, Tensor):
            raise ValueError("first_step must be an int, as it says which neighbours are next, got a tensor")
        rungs, chains, device = len(self.temperatures), call.chains, call.device
        sizes = per_key("step_size", self.step_size, call.keys, required=True)

        def repeat(t: Tensor) -> Tensor:
            return t.repeat_interleave(rungs, 0) if t.dim() and t.shape[0] == chains else t

        recorder = Recorder(call, {
            "ladder_energy": (rungs,), "accept_prob": (rungs,), "swap_prob": (rungs - 1,), "replica": (rungs,),
        })  # fmt: skip
        # what the energy sees: chains * rungs rows
        rows = dataclasses.replace(
            call, tensors=self._rows(call, ladder),
            masks=[mask if isinstance(mask, bool) else repeat(mask) for mask in call.masks],
        )  # fmt: skip
        with running(rows, self.mode, log_prob=self.log_prob, each=lambda pair: map_tensors(pair, repeat)) as target:
            x = [t.detach().clone() for t in rows.tensors]
            wide = x[0].dtype
            temperatures = torch.tensor(self.temperatures, dtype=wide, device=device)
            per_row = temperatures.repeat(chains)
            params = []
            for i in call.moving:
                size = self._rungs("step_size", sizes[i])
                if isinstance(size, Tensor):
                    size = per_chain_shape(size.to(device, x[i].dtype).repeat(chains), x[i])
                params.append(StepParams(size, (2 * size * per_chain_shape(per_row, x[i])).sqrt()))
            masks = [mask if isinstance(mask := rows.masks[i], Tensor) else None for i in call.moving]
            inverse = 1.0 / temperatures
            origin = torch.arange(rungs, dtype=torch.int64, device=device).expand(chains, rungs)
            accept_sum = torch.zeros(chains, rungs, dtype=wide, device=device)
            swap_sum = torch.zeros(chains, max(rungs - 1, 0), dtype=wide, device=device)
            tried = [0, 0]
            e: Tensor | None = None
            g: list[Tensor] = []
            # a network need not take an empty batch
            for k in range(call.steps if chains else 0):
                if e is None or target.varies:
                    e, g = target(x, k)
                e = one_per_chain("ParallelTempering", e)
                before = e.reshape(chains, rungs)
                recorder.add(energy=before[:, 0], ladder_energy=before)
                y = list(x)
                for i, p, gradient in zip(call.moving, params, g):
                    y[i] = x[i] - p.step_size * gradient + p.noise_scale * self._normals(call, i, k)
                e_new, g_new = target(y, k)
                e_new = one_per_chain("ParallelTempering", e_new)
                if self.accept is None:
                    accept_prob = torch.ones_like(e)
                    x, e, g = y, e_new, g_new
                else:
                    old, new = [x[i] for i in call.moving], [y[i] for i in call.moving]
                    ratio = log_ratio(old, new, g, g_new, e, e_new, params, masks, per_row, "chain")
                    # NaN, a broken proposal, is never accepted
                    accept_prob = torch.nan_to_num(ratio.clamp(max=0.0).exp(), nan=0.0).to(wide)
                    accept = call.uniforms(rungs, k, noise.ACCEPT).reshape(-1) < accept_prob
                    x, e, g = where(accept, y, x), torch.where(accept, e_new, e), where(accept, g_new, g)
                accept_prob = accept_prob.reshape(chains, rungs)
                accept_sum = accept_sum + accept_prob
                swap_prob = torch.full_like(swap_sum, math.nan)
                count, due = divmod(first + k + 1, self.swap_every)
                if not due and rungs > 1:
                    side = (count - 1) % 2
                    energies = e.reshape(chains, rungs)
                    lower, upper = slice(side, rungs - 1, 2), slice(side + 1, rungs, 2)
                    ratio = (inverse[lower] - inverse[upper]) * (energies[:, lower] - energies[:, upper])
                    prob = torch.nan_to_num(ratio.clamp(max=0.0).exp(), nan=0.0)
                    swap_prob[:, lower] = prob
                    swap_sum[:, lower] += prob
                    tried[side] += 1
                    exchange = call.uniforms(rungs - 1, k, noise.SWAP)[:, lower] < prob
                    source = torch.arange(rungs, dtype=torch.int64, device=device).repeat(chains, 1)
                    source[:, lower] += exchange
                    source[:, upper] -= exchange.long()
                    flat = (source + rungs * torch.arange(chains, dtype=torch.int64, device=device)[:, None]).reshape(
                        -1
                    )
                    x = [t.index_select(0, flat) for t in x]
                    e, g = e.index_select(0, flat), [t.index_select(0, flat) for t in g]
                    origin = origin.gather(1, source)
                recorder.add(accept_prob=accept_prob, swap_prob=swap_prob, replica=origin)
                if call.thin and (k + 1) % call.thin == 0:
                    recorder.keep(k, self._cold(call, x))
            for side in (0, 1):
                # NaN where nothing was tried
                swap_sum[:, side::2] /= tried[side] or math.nan
            return recorder.samples(
                self._cold(call, x),
                ladder=call.build([t.reshape(chains, rungs, *t.shape[1:]) for t in x]),
                acceptance=accept_sum / (call.steps or math.nan), swap_acceptance=swap_sum,
            )  # fmt: skip

    def _rows(self, call: Call, ladder: Any) -> list[Tensor]:
        """Where the replicas start, (chains * R, ...)."""
        rungs = len(self.temperatures)
        if ladder is None:
            return [t.detach().repeat_interleave(rungs, 0) for t in call.tensors]
        keys, parts, _ = flatten(ladder, "ladder")
        if keys != call.keys:
            raise ValueError(f"ladder must have the state's keys {list(call.keys)}, got {list(keys)}")
        for key, part, t in zip(keys, parts, call.tensors):
            wanted = (call.chains, rungs, *t.shape[1:])
            if part.shape != wanted or part.dtype != t.dtype or part.device != t.device:
                raise ValueError(
                    f"ladder[{key!r}] must be {wanted}, {t.dtype}, {t.device}, got {tuple(part.shape)}, {part.dtype}, "
                    f"{part.device}"
                )
        return [part.detach().flatten(0, 1) for part in parts]

    def _normals(self, call: Call, i: int, k: int) -> Tensor:
        """Normals of the replicas of tensor ``i``, (chains * R, ...): a chain's elements are replica by replica, so
        that the first temperature has Langevin's noise and a longer ladder leaves the lower rungs theirs."""
        t, mask = call.tensors[i], call.masks[i]
        xi = noise.normal(
            (call.chains, len(self.temperatures), *t.shape[1:]), seed=call.seed, step=call.first_step + k,
            stream=noise.stream(i), chain_offset=call.chain_offset, dtype=t.dtype, device=t.device,
        )  # fmt: skip
        if isinstance(mask, Tensor):
            xi = xi.masked_fill(mask.unsqueeze(1), 0.0)
        return xi.flatten(0, 1)

    def _cold(self, call: Call, x: list[Tensor]) -> list[Tensor]:
        return [t.reshape(call.chains, len(self.temperatures), *t.shape[1:])[:, 0].clone() for t in x]
