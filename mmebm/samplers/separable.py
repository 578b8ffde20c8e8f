"""Does a chain's gradient depend on which other chains are evaluated with it? Then it cannot be run in chunks.

Nor can an argument be cut along with the chains, or be repeated for their replicas, that all of them share.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Generator

import torch
from torch import Tensor, nn

from mmebm.samplers.arithmetic import map_tensors
from mmebm.samplers.chain import Problem, cut
from mmebm.samplers.gradient import Target
from mmebm.samplers.user_modules import modules_of, sampling

# Of a gradient's norm. A mean over two chains is off by one half; two evaluations in bfloat16 differ by some 1e-2.
DIFFERENT = 0.1


@contextlib.contextmanager
def _same_random(device: torch.device) -> Generator[None, None, None]:
    """Random numbers on the host and on ``device`` as if nothing had been drawn."""
    state = random.getstate()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):  # pyright: ignore[reportUnknownMemberType]
            yield
    finally:
        random.setstate(state)


def _gradient(p: Problem, x: list[Tensor], rows: slice) -> list[Tensor]:
    target = Target.of(cut(p, x[0].shape[0], rows))
    return target([t[rows] for t in x], 0, energy=False)[1]


def _size(parts: list[Tensor]) -> float:
    return sum(float(part.double().square().sum()) for part in parts) ** 0.5


def _along_chains(p: Problem, chains: int) -> str:
    """The arguments of the energy that count as one for each chain: "args[0], kwargs['y']", or nothing."""
    args, kwargs = p.calls[0]
    given = {
        **{f"args[{i}]": value for i, value in enumerate(args)},
        **{f"kwargs[{k!r}]": v for k, v in kwargs.items()},
    }

    def some(t: Tensor) -> Tensor:
        return t[:0] if t.dim() and t.shape[0] == chains else t

    return ", ".join(name for name, value in given.items() if map_tensors(value, some) is not value)


def check_repeated(p: Problem, x: list[Tensor], grads: list[Tensor]) -> None:
    """Evaluates the energy on the chains as the caller gave its arguments, where others were repeated for replicas.

    Args:
        x: one replica of each chain.
        grads: the gradients there, in which the arguments were repeated.

    Raises:
        ValueError: where they differ: an argument has by chance as many rows as there are chains.
    """
    names, modules = _along_chains(p, x[0].shape[0]), modules_of(p.energy, *p.calls[0])
    if not names or not p.blocks or _writes_buffers(modules):
        return
    with _same_random(x[0].device):
        try:
            alone, again = (Target.of(p, masked=True)(x, 0, energy=False)[1] for _ in range(2))
        except Exception:  # it may not take so few rows
            return
    difference = _size([a - b for a, b in zip(alone, grads, strict=True)])
    # one that is random says nothing
    if _size([a - b for a, b in zip(alone, again, strict=True)]) == 0.0 and difference > DIFFERENT * _size(alone):
        raise ValueError(
            f"{names}: a tensor whose first dimension is the number of chains, {x[0].shape[0]}, is repeated for the "
            "replicas of each chain, which gives another gradient here. What all chains share goes into the energy "
            "(functools.partial, a closure), or gets another first dimension (t[None])"
        )


def _writes_buffers(modules: list[nn.Module]) -> bool:
    """In train mode: batch statistics, power iterations."""
    return any(m.training and m._buffers for root in modules for m in root.modules())  # pyright: ignore[reportPrivateUsage]


def check_separable(p: Problem, tensors: list[Tensor], chunk_size: int) -> None:
    """Evaluates the energy on the first two chains together and each alone, near where they start.

    Nothing is said of an energy that is random, writes to buffers (batch norm in train mode, which is meant to couple
    chains), or does not take one or two chains.

    Raises:
        ValueError: where the gradients differ, as those of a mean over the chains do.
    """
    modules = modules_of(p.energy, *p.calls[0])
    with torch.no_grad(), _same_random(tensors[0].device), sampling(modules, p.sampler.mode):
        if not p.blocks or _writes_buffers(modules):
            return
        # apart, as chains may start equal, and off a start where the gradient is 0
        shift = torch.Generator().manual_seed(0)
        x = [t.detach().clone() for t in tensors]
        for i in (i for block in p.blocks for i in block):
            size = (2, *x[i].shape[1:])
            noise = torch.randn(size, generator=shift, dtype=torch.float32, device="cpu").to(x[i]) * (
                0.01 + 0.01 * x[i][:2].abs()
            )
            x[i][:2] += noise
        try:
            first, again, second = (_gradient(p, x, rows) for rows in (slice(0, 1), slice(0, 1), slice(1, 2)))
        except Exception:  # where it is wrong, the chain itself will say so
            return
        try:
            both = _gradient(p, x, slice(0, 2))
        except Exception as error:
            # one chain broadcasts against a tensor of all, two do not; an energy may also be written for one alone
            text = str(error)
            if chunk_size > 1 or "must match the size of tensor" not in text or f"({len(tensors[0])})" not in text:
                return
            raise ValueError(
                f"chunk_size=1 would change the chain: the energy closes over a row for each chain ({text}), against "
                "all of which one chain broadcasts. Such a tensor goes into args or kwargs"
            ) from error
        random_part = _size([a - b for a, b in zip(first, again, strict=True)])
        apart = [torch.cat(pair) for pair in zip(first, second, strict=True)]
        difference = _size([a - b for a, b in zip(both, apart, strict=True)])
        size = max(_size(apart), _size(both))
    if random_part == 0.0 and difference > DIFFERENT * size:
        names = _along_chains(p, tensors[0].shape[0])
        cut_along = f" and with their part of {names}" if names else ""
        raise ValueError(
            f"chunk_size={chunk_size} would change the chain: the gradient of a chain depends on which others are "
            f"evaluated with it{cut_along}. Return one value per chain or the sum over the chains, not a mean, or "
            "leave chunk_size out"
        )
