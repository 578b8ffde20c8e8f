"""The user's energy as a sampler sees it: one value per chain, and the gradient of the tensors that move."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmebm.ops.common.layout import per_chain
from mmebm.ops.common.untyped import TORCH
from mmebm.samplers.autograd_remedies import Remedies
from mmebm.samplers.chain import Problem
from mmebm.state import Key, Structure, like_state

# not public: without it the public function serves
_run_backward = getattr(torch.autograd.graph, "_engine_run_backward", None)
_use_count: Callable[[int], int] | None = getattr(TORCH._C, "_storage_Use_Count", None)


def gradient_of_sum(value: Tensor, leaves: Sequence[Tensor], *, create_graph: bool) -> Sequence[Tensor | None]:
    """The gradient of ``value.sum()`` in ``leaves``; None for one on which it does not depend. Parameters are not among
    the leaves, so that neither they nor their ``.grad`` are touched."""
    ones = torch.ones_like(value)
    if _run_backward is None or create_graph or type(value) is not Tensor:
        return torch.autograd.grad(value, leaves, ones, create_graph=create_graph, allow_unused=True)
    # what torch.autograd.grad calls, without its 10 us of checks that plain tensors of one shape pass
    return _run_backward((value,), (ones,), False, False, tuple(leaves), True, accumulate_grad=False)


def uses(t: Tensor) -> int:
    """How many tensors there are on the memory of ``t``."""
    return 0 if _use_count is None else _use_count(t.untyped_storage()._cdata)  # pyright: ignore[reportPrivateUsage]


class _Memory:
    """An energy may keep what it is given, for a log say, while the chain goes on in the memory of its state. Then the
    chain goes on in a copy, where its steps can (``moves``); else the energy is given a copy, at its first evaluation,
    and always once it kept one."""

    def __init__(self, moves: bool) -> None:
        self.moves: bool = moves
        self.copies: bool = not moves
        self.keeps: bool = False

    def given(self, x: Sequence[Tensor]) -> tuple[Sequence[Tensor], list[int]]:
        """What the energy is given for ``x``, and how many tensors there are on the memory of each."""
        given = [t.detach().clone() for t in x] if self.copies else x
        return given, list(map(uses, given))

    def look(self, x: list[Tensor], given: Sequence[Tensor], before: list[int], results: Sequence[Tensor]) -> None:
        """After the evaluation at ``x``, of which ``results`` are left, which may lie in the same memory."""
        now = list(map(uses, given))
        if now == before:
            self.copies = self.keeps
            return
        theirs = [g.untyped_storage().data_ptr() for g in results]
        rows = zip(given, before, now, strict=True)
        kept = [n - b > theirs.count(t.untyped_storage().data_ptr()) for t, b, n in rows]
        if self.moves:
            x[:] = [t.clone() if is_kept else t for t, is_kept in zip(x, kept, strict=True)]
            return
        if any(kept) and not self.copies:
            warnings.warn(
                "the energy keeps the state that it was given, in whose memory the chain goes on: what it kept at this "
                "step will hold a later state; let it keep a clone",
                RuntimeWarning,
                stacklevel=2,
            )
        self.keeps = self.copies = any(kept) or self.keeps


@dataclass(frozen=True)
class Target:
    """An energy with everything it is called with.

    Attributes:
        energy: called as ``energy(build(x), *args, **kwargs)``.
        calls: (args, kwargs) per step, or one entry for all steps.
        keys, build: of the state, from :func:`mmebm.state.flatten`.
        moving: indices of the tensors whose gradient is wanted.
        masks: per tensor of the state a boolean mask of observed elements, whose gradient is 0, or a bool.
        log_prob: the callable returns log p.
        score: the callable returns d log p / dx in the state's structure.
        downhill: whether a gradient is handed out as dE/dx also then; else as it is, for an update that takes the sign.
        remedies: what this energy has turned out to need for its gradient.
        memory: whether it keeps what it is given, and what is done then.
    """

    energy: Callable[..., Any]
    calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]
    keys: tuple[Key, ...]
    build: Structure
    moving: Sequence[int]
    masks: Sequence[bool | Tensor]
    log_prob: bool = False
    score: bool = False
    downhill: bool = True
    remedies: Remedies = field(default_factory=Remedies)
    memory: _Memory = field(default_factory=lambda: _Memory(moves=False))

    @classmethod
    def of(cls, p: Problem, *, masked: bool = False, downhill: bool = True, moves: bool = False) -> Target:
        """The energy of a problem; ``masked``: with no gradient where observed; ``moves``: the chain goes on in the
        list that it gave, in which a copy stands for each tensor that the energy kept."""
        masks = p.masks if masked else [False] * len(p.masks)
        return cls(
            p.energy,
            p.calls,
            p.keys,
            p.build,
            p.moving,
            masks,
            log_prob=p.sampler.log_prob,
            score=p.sampler.score,
            downhill=downhill,
            memory=_Memory(moves),
        )

    @property
    def varies(self) -> bool:
        """Whether the energy is another one at each step, so that no gradient outlives its step."""
        return len(self.calls) > 1

    def value(self, x: Sequence[Tensor], k: int) -> Tensor:
        """The energy alone, (chains,) or () as the callable has it, detached."""
        value = self._call(list(x), k).detach()
        # a copy, as the energy may be a view of the state
        energy = per_chain(value).sum(1) if value.dim() else value.clone()
        return -energy if self.log_prob else energy

    def __call__(
        self,
        x: list[Tensor],
        k: int,
        *,
        moving: Sequence[int] | None = None,
        create_graph: bool = False,
        energy: bool = True,
    ) -> tuple[Tensor | None, list[Tensor]]:
        """Energy and gradient at step ``k`` of the run.

        Args:
            moving: instead of the target's own.
            create_graph: whether the gradient, and through ``x`` the steps before, can be differentiated.
            energy: whether the energy is wanted.

        Returns:
            The energy, (chains,) or () as the callable has it, detached, ``None`` for a score or where not wanted; and
            the gradient of each moving tensor.

        Raises:
            TypeError, ValueError: where the callable returns no tensor, one of another number of chains, or one that
                does not depend on the state.
        """
        moving = self.moving if moving is None else moving
        if create_graph:  # the steps are made of new tensors
            return self.remedies(self._gradient, x, k, moving, create_graph, energy)
        given, before = self.memory.given(x)
        value, grads = self.remedies(self._gradient, given, k, moving, create_graph, energy)
        self.memory.look(x, given, before, grads)
        return value, grads

    def _gradient(
        self, x: Sequence[Tensor], k: int, moving: Sequence[int], create_graph: bool, energy: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        full = list(x)
        # on also for a score, which may take a gradient itself
        with torch.enable_grad():
            if self.score:
                if not create_graph:
                    full = [t.detach() for t in full]
                parts = like_state(self._call(full, k), self.keys, full)
                found = [parts[i] for i in moving]
                if not create_graph:
                    found = [g.detach() if g.requires_grad else g for g in found]
                if self.downhill:
                    found = [-g for g in found]
                return None, [self._masked(i, g) for i, g in zip(moving, found, strict=True)]
            for i in moving:
                if not (create_graph and full[i].requires_grad):
                    full[i] = full[i].detach().requires_grad_()
            value = self._call(full, k)
            leaves = [full[i] for i in moving]
            grads: Sequence[Tensor | None] = [None] * len(leaves)
            if value.requires_grad and leaves:
                grads = gradient_of_sum(value, leaves, create_graph=create_graph)
        if leaves and all(g is None for g in grads) and not self._depends(x, k):
            raise ValueError("energy must depend on the state through differentiable operations; it does not")
        found = [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, grads, strict=True)]
        if self.log_prob and self.downhill:
            found = [-g for g in found]
        found = [self._masked(i, g) for i, g in zip(moving, found, strict=True)]
        if not energy:
            return None, found
        value = value.detach()
        each = per_chain(value).sum(1) if value.dim() > 1 else value.clone()
        return -each if self.log_prob else each, found

    def _masked(self, i: int, g: Tensor) -> Tensor:
        mask = self.masks[i]
        return g.masked_fill(mask, 0.0) if isinstance(mask, Tensor) else g

    def _call(self, x: list[Tensor], k: int) -> Any:
        args, kwargs = self.calls[min(k, len(self.calls) - 1)]
        versions = [t._version for t in x]
        value = self.energy(self.build(x), *args, **kwargs)
        for key, t, version in zip(self.keys, x, versions, strict=True):
            if t._version != version:
                raise ValueError(
                    f"energy must leave the state as it is; it wrote to state[{key!r}] in place: let it work on a "
                    "clone, or change the state between the steps by project"
                )
        if self.score:
            return value
        if not isinstance(value, Tensor):
            raise TypeError(f"energy must return a tensor, got {type(value).__name__}")
        if value.is_complex():
            raise TypeError(f"energy must return real numbers, got a tensor of {value.dtype}")
        if value.layout is not torch.strided:
            raise TypeError(f"energy must return a dense tensor, got one of {value.layout}; .to_dense() makes it one")
        if value.dim() and value.shape[0] != x[0].shape[0]:
            raise ValueError(
                f"energy must return a scalar or one value per chain ({x[0].shape[0]}, ...), "
                f"got shape {tuple(value.shape)}"
            )
        return value

    def _depends(self, x: Sequence[Tensor], k: int) -> bool:
        """Whether the energy depends on anything in the state (on the tensors that move it need not)."""
        every = [t.detach().requires_grad_() for t in x]
        with torch.enable_grad():
            total = self._call(every, k).sum()
            grads = torch.autograd.grad(total, every, allow_unused=True) if total.requires_grad else ()
        return any(g is not None for g in grads)  # pyright: ignore[reportUnnecessaryComparison]


def one_per_chain(name: str, energy: Tensor | None) -> Tensor:
    """``energy`` where it has one value per chain, (chains,).

    Raises:
        ValueError: naming the sampler, where the callable returned a scalar.
    """
    if energy is None or energy.dim() == 0:
        raise ValueError(f"{name} needs one energy per chain; the energy returned a scalar")
    return energy
