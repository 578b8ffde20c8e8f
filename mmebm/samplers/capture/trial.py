"""What a chain that is tried may change, put back; and how far two runs of it are apart."""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmebm.samplers.capture.key import Identity
from mmebm.samplers.chain import Run

# Elements of a tensor, not a parameter, that is put back if the warm-up writes to it.
_RESTORABLE = 1 << 24


@contextmanager
def uncached_autocast() -> Generator[None, None, None]:
    """Autocast without its cache: a weight cast outside the graph would be baked in, one cast inside would leak."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


class Kept:
    """What the warm-up may write to, put back on leaving; ``changed`` says what could not be."""

    def __init__(self, identity: Identity) -> None:
        self.buffers: list[tuple[dict[str, Tensor | None], str, Tensor | None]] = [
            (own, name, own[name]) for own, name in identity.buffers
        ]
        self.tensors: list[tuple[Tensor, int, Tensor | None]] = []
        for t in {id(t): t for t in identity.held}.values():
            if not t.is_inference():
                small = not isinstance(t, nn.Parameter) and t.numel() <= _RESTORABLE
                self.tensors.append((t, t._version, t.detach().clone() if small else None))

    def restore(self) -> str | None:
        """Puts back; the reason where something stays changed."""
        for own, name, t in self.buffers:
            if own.get(name) is not t:
                own[name] = t
        with torch.no_grad():
            for t, version, copy in self.tensors:
                # batch norm writes its statistics behind the version's back; what is as it was is not written to, as a
                # graph of the caller's may have saved it
                if copy is not None and not torch.equal(t, copy):
                    t.copy_(copy)
                elif copy is None and t._version != version:
                    return f"the energy writes to a tensor of shape {tuple(t.shape)} that it holds"
        return None


def distance(a: Run, b: Run) -> float:
    """The largest difference of two runs, relative to the largest number of the tensor; inf where one is not finite
    and the other is, or where decisions differ."""
    pairs = [*zip(a.state, b.state, strict=True), *zip(a.trajectory, b.trajectory, strict=True)]
    pairs += [(t, b.trace[name]) for name, t in a.trace.items()]
    pairs.append((a.broken, b.broken))
    worst = 0.0
    for x, y in pairs:
        x, y = x.detach(), y.detach()
        if torch.equal(x.nan_to_num(), y.nan_to_num()) and torch.equal(x.isnan(), y.isnan()):
            continue
        finite = x.isfinite()
        if not x.is_floating_point() or not torch.equal(finite, y.isfinite()):
            return math.inf
        x, y = x[finite].double(), y[finite].double()
        worst = max(worst, ((x - y).abs().max() / y.abs().max().clamp_min(1e-30)).item())
    return worst


def same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b
