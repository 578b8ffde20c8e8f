"""No fused chain is trusted before it agreed with the energy that it replaces.

A fused chain computes what :mod:`mmebm.energies.lower` understood. Before the first update, the user's energy itself is
evaluated by autograd at the actual state, all chains of it as an energy may couple them, and value and gradient are
compared with the op's; after the chain the same is done at the state where it ended, where other branches of an energy
may show. Where they differ, the chain takes the loop, whose noise is the same.

When: at the first chain of an energy, at its 8th, and at every 64th; a chain without any gradient does not count.
Another energy is another module, other code of a function, or terms of other kinds, shapes or activations; also another
backend or sign. Weights may change between chains: they are read anew each time, and do not make another energy. An
energy that once disagreed takes the loop from then on.
"""

from __future__ import annotations

import dataclasses
import threading
import warnings
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor, nn

from mmebm.energies.lower import Lowered
from mmebm.energies.trace import Traced
from mmebm.introspect import Memory
from mmebm.ops.common.description import of_chains, replaced, structure
from mmebm.ops.common.layout import per_chain
from mmebm.ops.evaluate import Energy, by_op, by_reference
from mmebm.samplers.gradient import Target

# Every chain's value and gradient are computed, those of so many are compared.
ROWS: Final = 32
# Points close to each of them at which the reference's error is looked at
COPIES: Final = 4
# Two float32 evaluations of one function, sums in another order, are each off by about as much as the reference is in
# float32. tests/samplers/test_verify.py measures by how many times, over many networks.
FACTOR: Final = 16.0
# At most this share of the largest value or gradient: a formula that rounds worse than the energy itself does, say
# where its slopes underflow, is no excuse. Of sound networks, away from kinks, 2^-14.1 is the largest seen up to five
# layers and 2^-7.1 in forty of GELU (12,900 comparisons: the gallery, published energies, random MLPs and convolutions
# of every activation, states up to 1e6; 2026-11-30).
MOST: Final = 2.0**-6
# Where the reference happens to make none: some units in the last place of the largest value or gradient.
FLOOR: Final = 32 * 2.0**-24
EARLY: Final = (1, 8)
PERIOD: Final = 64
START: Final = "at the start"


@dataclasses.dataclass
class _Entry:
    """What is known of one energy."""

    chains: int = 0
    reason: str | None = None


_entries: Memory[_Entry] = Memory(512)
_lock = threading.Lock()


class Check:
    """The check of one chain: :meth:`before` its first update, and :meth:`after` its last or
    :meth:`between` wherever a callback is told of it."""

    def __init__(self, target: Target, lowered: Lowered | Traced, backend: str) -> None:
        self.target: Target = target
        self.backend: str = backend
        self._modules = [item for item in lowered.seen if isinstance(item, nn.Module)]
        rest = (structure(lowered.energy), lowered.scalar, backend, target.log_prob)
        entry = _entries.get(lowered.seen, rest, _Entry)
        with _lock:
            entry.chains += 1
            n = entry.chains
        self._entry = entry
        self.due: bool = n in EARLY or n % PERIOD == 0
        self._moved = False  # whether any gradient compared was not 0
        self.renew(lowered)

    def renew(self, lowered: Lowered | Traced) -> None:
        """From here on the chain runs on what the energy is now."""
        self.energy: Energy = lowered.energy
        parameters = {id(p): p for m in self._modules for p in (*m.parameters(), *m.buffers())} if self.due else {}
        self._versions = [(p, p._version) for p in parameters.values() if not p.is_inference()]

    def before(self, tensors: Sequence[Tensor]) -> str | None:
        """Why the chain from ``tensors`` may not be fused, or None."""
        if self._entry.reason is not None or not self.due:
            return self._entry.reason
        if tensors[0].is_cuda and torch.cuda.is_current_stream_capturing():
            return "it cannot be compared with autograd while a graph is captured" if self._entry.chains == 1 else None
        return self._compare(tensors, START)

    def between(self, tensors: Sequence[Tensor]) -> str | None:
        """Why the steps that led to ``tensors``, of which somebody will be told, are not to be used, or None."""
        return self._compare(tensors, "in the middle") if self.looks(tensors) else None

    def settle(self) -> None:
        """The chain is over."""
        if not self._moved:
            # such as with a last layer of zeros: what is in front of it was not compared
            with _lock:
                self._entry.chains -= 1

    def after(self, tensors: Sequence[Tensor]) -> str | None:
        """Why the chain that ended at ``tensors`` is not to be used, or None."""
        if not self.looks(tensors):
            return None
        reason = self._compare(tensors, "at the end")
        self.settle()
        return reason

    def looks(self, tensors: Sequence[Tensor]) -> bool:
        """Whether this chain is compared, which a graph that is captured cannot be."""
        return self.due and not (tensors[0].is_cuda and torch.cuda.is_current_stream_capturing())

    def _compare(self, tensors: Sequence[Tensor], where: str) -> str | None:
        everything = range(len(tensors))
        try:
            value, grads = self.target(list(tensors), 0, moving=everything)
        except Exception as error:  # the loop raises it again, if it is the energy's own
            return f"the energy raised {type(error).__name__} {where}"
        flat = torch.cat([per_chain(t) for t in tensors], dim=1)
        grad = torch.cat([per_chain(g) for g in grads], dim=1)
        self._moved = self._moved or bool(grad.any())
        chains = flat.shape[0]
        rows = torch.linspace(0, chains - 1, min(chains, ROWS), dtype=torch.float64, device=flat.device).round().long()
        values = None if value is None or value.dim() == 0 else value[rows]
        backend = self.backend if where == START else None
        difference = disagreement(values, grad[rows], flat[rows], of_chains(self.energy, rows), backend)
        if difference is None:
            return None
        if any(p._version != version for p, version in self._versions):
            # another thread trains: nothing was learned, and the next chain is compared again
            with _lock:
                self._entry.chains -= 1
            return f"the weights changed while the energy was compared {where}"
        reason = f"the energy is not what it was understood to be: {where} of the chain {difference}"
        if self._entry.reason is None:
            self._entry.reason = reason
            warnings.warn(
                f"mmebm does not fuse this chain: {reason}. It runs a step at a time, which is right, but slower. "
                "Please report the energy.",
                RuntimeWarning,
                stacklevel=2,
            )
        return reason


def disagreement(
    value: Tensor | None, grad: Tensor, x: Tensor, energy: Energy, backend: str | None = None
) -> str | None:
    """How an energy's value (chains,) and gradient (chains, inputs) at the flat state ``x`` differ from what ``energy``
    says in float64; None where they agree. With a ``backend``, the op's in float32 are compared as well.

    Rows at which both are infinite or NaN in float32 are left out, and those of such a state. The tolerance is
    :data:`FACTOR` times the error that the reference makes in float32 at the row and close to it, or in the median row;
    next to a kink of an activation, where a rounding decides between two slopes, either slope is right.
    """
    pairs = [("autograd", "value", value, 0), ("autograd", "gradient", grad, 1)]
    if backend is not None:
        op = by_op(x, energy, backend)
        pairs += [("the fused op", "value", op[0], 0), ("the fused op", "gradient", op[1], 1)]

    def apart_from(reference: Sequence[Tensor]) -> list[Tensor | None]:
        """By how much each of what is compared differs, (chains,)."""
        return [
            None if found is None else (found.reshape(reference[i].shape).double() - reference[i]).abs().amax(1)
            for _, _, found, i in pairs
        ]

    def equal(reference: Sequence[Tensor], differences: Sequence[Tensor | None]) -> bool:
        sizes = [part.abs().max() for part in reference]
        pairwise = zip(differences, pairs, strict=True)
        # below infinity, which everything is
        return all(d is None or bool((d <= FLOOR * sizes[i]).all() & sizes[i].isfinite()) for d, (*_, i) in pairwise)

    def rows(parts: Sequence[Tensor]) -> list[Tensor]:
        return [part.reshape(x.shape[0], -1) for part in parts]

    # In float32 first, which mostly settles it: in float64 a large convolutional net takes many times as long.
    single = rows(by_reference(x, energy))
    if equal(single, apart_from(single)):
        return None
    wide = replaced(energy, lambda t, _: t.double() if t.is_floating_point() else t)
    exact = rows(by_reference(x.double(), wide))
    differences = apart_from(exact)
    if equal(exact, differences):
        return None

    copies = max(COPIES, ROWS // max(x.shape[0], 1))
    apart = 1 + torch.arange(copies, device=x.device, dtype=x.dtype) * 2.0**-12
    many = (apart.view(-1, 1, 1) * x).flatten(0, 1)
    each = torch.arange(x.shape[0], dtype=torch.int64, device=x.device).repeat(copies)
    single, double = (by_reference(many, of_chains(energy, each)), by_reference(many.double(), of_chains(wide, each)))
    # a saturated network's gradient is what is left of slopes that are rounded at the size of those at the origin
    origin = by_reference(torch.zeros_like(x, dtype=torch.float64), wide)

    def finite(parts: Sequence[Tensor | None]) -> Tensor:
        found = [p[: x.shape[0]].reshape(x.shape[0], -1).isfinite().all(1) for p in parts if p is not None]
        return torch.stack(found).all(0)

    usual, theirs, ours = x.isfinite().all(1), finite((value, grad)), finite(single)
    if bool((usual & (theirs != ours)).any()):
        row = int((usual & (theirs != ours)).int().argmax())
        who = "the terms are" if bool(theirs[row]) else "autograd is"
        return f"{who} infinite or NaN in a chain, of which the other is finite"
    counted = usual & ours
    if not bool(counted.any()):
        return None
    for (who, name, found, i), difference in zip(pairs, differences, strict=True):
        if found is None or difference is None:
            continue
        error = (single[i].double() - double[i]).abs().nan_to_num(0.0, 0.0).reshape(copies, x.shape[0], -1).amax((0, 2))
        size = exact[i][counted].abs().max().maximum(origin[i].abs().max())
        allowed = (FACTOR * error.maximum(error.median())).clamp(max=MOST * size) + FLOOR * size  # (chains,)
        wrong = counted & ~(difference <= allowed)
        if i == 1 and bool(wrong.any()):
            wrong = wrong & ~_beside_a_kink(found, x, wide, wrong, allowed)
        if bool(wrong.any()):
            row = int(difference.masked_fill(~wrong, -1.0).nan_to_num(torch.inf).argmax())
            return (
                f"{who} and the terms differ by {float(difference[row]):.3g} in the {name} of a chain, as "
                f"{int(wrong.sum())} of {len(wrong)} do ({float(allowed[row]):.3g} allowed, the largest is "
                f"{float(size):.3g})"
            )
    return None


def _beside_a_kink(grad: Tensor, x: Tensor, wide: Energy, wrong: Tensor, allowed: Tensor) -> Tensor:
    """Of the rows ``wrong``, those whose gradient is that of a point within some roundings of ``x``: bool (chains,)."""
    found = torch.zeros_like(wrong)
    generator = torch.Generator().manual_seed(0)
    for row in map(int, wrong.nonzero().flatten()[:8]):
        shifts = (
            torch.randn(64, x.shape[1], generator=generator, dtype=torch.float64, device="cpu").to(x.device) * 2.0**-22
        )
        near = x[row].double() + shifts * x[row].double().abs().clamp(min=1.0)
        _, grads = by_reference(near, of_chains(wide, torch.full((64,), row, dtype=torch.int64, device=x.device)))
        found[row] = bool(((grads - grad[row].double()).abs().amax(1) <= 2 * allowed[row]).any())
    return found
