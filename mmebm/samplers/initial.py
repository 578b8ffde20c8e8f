"""Where chains start: functions ``(n, generator) -> state`` for :class:`mmebm.ReplayBuffer`, or to call.

Those that depend on a class take ``labels`` (n,) too. All draw on the generator's device, and can be pickled where what
they were made of can. Normals and uniforms on the CPU are those of :mod:`mmebm.noise`, stream INITIAL, with a seed
drawn from the generator; on a GPU, where reading that seed would wait for the device, they are torch's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmebm import noise
from mmebm.ops import noise as drawn
from mmebm.ops.common.untyped import TORCH
from mmebm.state import check_setting, check_type, choice, dense, one_number, sizes

__all__ = ["class_gaussian", "data", "each", "generated", "normal", "uniform"]

Initial = Callable[..., Any]


def _of_chains(name: str, value: Any, size: tuple[int, ...], low: float) -> Any:
    """A number, or a tensor that broadcasts against chains of ``size``."""
    value = check_setting(name, value, low=low, kinds="a number or a tensor")
    if isinstance(value, Tensor):
        shape = tuple(value.shape)
        pairs = zip(reversed(shape), reversed(size))
        if len(shape) > len(size) + 1 or any(own not in (1, wanted) for own, wanted in pairs):
            raise ValueError(f"{name} must be a number, or broadcast against {size}, got shape {shape}")
    return value


def _draw(
    ours: Callable[..., Tensor],
    torchs: Callable[..., Tensor],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    generator: torch.Generator,
) -> Tensor:
    if generator.device.type != "cpu":
        return torchs(shape, generator=generator, device=generator.device, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    seed, stream = noise.draw_seed(generator), noise.stream(0, noise.INITIAL)
    return ours(shape, seed=seed, stream=stream, dtype=wide, device=generator.device).to(dtype)


def uniform(shape: Sequence[int], low: float = 0.0, high: float = 1.0, dtype: torch.dtype = torch.float32) -> Initial:
    """Uniform in [low, high), of ``shape``, the sizes of one chain.

    Raises:
        TypeError, ValueError: for another shape, or bounds that are not finite or in order.

    Example:
        >>> mmebm.initial.uniform((1, 28, 28), -1, 1)(16, torch.Generator().manual_seed(0)).shape
        torch.Size([16, 1, 28, 28])
    """
    size = sizes("shape", shape, 1)
    check_type("dtype", dtype, torch.dtype, "a torch.dtype")
    low, high = one_number("low", low, low=-math.inf), one_number("high", high, low=-math.inf)
    if not -math.inf < low <= high < math.inf:
        raise ValueError(f"low and high must be finite with low <= high, got {low!r} and {high!r}")
    return partial(_uniform, size, low, high, dtype)


def _uniform(
    size: tuple[int, ...], low: float, high: float, dtype: torch.dtype, n: int, generator: torch.Generator
) -> Tensor:
    return _draw(drawn.uniform, torch.rand, (n, *size), dtype, generator) * (high - low) + low


def normal(shape: Sequence[int], std: float = 1.0, mean: float = 0.0, dtype: torch.dtype = torch.float32) -> Initial:
    """Normal with one mean and standard deviation, of ``shape``, the sizes of one chain.

    Raises:
        TypeError, ValueError: for another shape, or a standard deviation below 0.

    Example:
        >>> mmebm.initial.normal((2,), std=0.1)(16, torch.Generator().manual_seed(0)).shape
        torch.Size([16, 2])
    """
    size = sizes("shape", shape, 1)
    check_type("dtype", dtype, torch.dtype, "a torch.dtype")
    return partial(_normal, size, _of_chains("std", std, size, 0.0), _of_chains("mean", mean, size, -math.inf), dtype)


def _normal(
    size: tuple[int, ...], std: float, mean: float, dtype: torch.dtype, n: int, generator: torch.Generator
) -> Tensor:
    for name, value in (("std", std), ("mean", mean)):
        if isinstance(value, Tensor) and value.dim() > len(size) and value.shape[0] not in (1, n):
            raise ValueError(f"{name} of shape {tuple(value.shape)} has a row for each chain, but {n} are drawn")
    return _draw(drawn.normal, torch.randn, (n, *size), dtype, generator) * std + mean


def data(examples: Tensor, labels: Tensor | None = None) -> Initial:
    """A row of ``examples`` (m, ...), drawn uniformly; with ``labels`` (m,), among those of the chain's class.

    Raises:
        TypeError, ValueError: for no examples, labels of another length, or a class below the largest without an
            example.

    Example:
        >>> examples, labels = torch.arange(6.0).reshape(6, 1), torch.tensor([0, 0, 0, 1, 1, 1])
        >>> start = mmebm.initial.data(examples, labels)
        >>> bool((start(4, torch.Generator().manual_seed(0), torch.ones(4, dtype=torch.int64)) >= 3).all())
        True
    """
    if len(dense("examples", examples, 1)) == 0:
        raise ValueError(f"examples must hold at least one row, got shape {tuple(examples.shape)}")
    if labels is None:
        return partial(_anyone, examples)
    order, start, count = _by_class(examples, labels)
    return partial(_of_class, examples[order.to(examples.device)], start, count)


def _anyone(examples: Tensor, n: int, generator: torch.Generator) -> Tensor:
    at = torch.randint(len(examples), (n,), generator=generator, dtype=torch.int64, device=generator.device)
    return examples.to(generator.device)[at]


def _of_class(rows: Tensor, start: Tensor, count: Tensor, n: int, generator: torch.Generator, labels: Tensor) -> Tensor:
    device = generator.device
    u = torch.rand(n, generator=generator, device=device, dtype=torch.float64)
    first, size = start.to(device)[labels], count.to(device)[labels]
    return rows.to(device)[first + torch.minimum((u * size).long(), size - 1)]


def _by_class(examples: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows in the order of their class, where each class starts, and how many it has; on the CPU."""
    if dense("labels", labels).is_complex():
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    held = labels.detach().cpu().long()
    if held.shape != (len(examples),) or bool((held < 0).any()):
        raise ValueError(f"labels must be ({len(examples)},), 0 or above, one per example, got {tuple(held.shape)}")
    # one above the number of examples leaves a class without any
    count = torch.bincount(held.clamp(max=len(examples)))
    if bool((count == 0).any()):
        raise ValueError(f"labels must name every class below the largest, got none of {(count == 0).nonzero()[0, 0]}")
    return held.argsort(stable=True), count.cumsum(0) - count, count


def class_gaussian(examples: Tensor, labels: Tensor, *, covariance: str = "full", jitter: float = 1e-4) -> Initial:
    """A normal per class, fitted to the ``examples`` (m, ...) of the class (JEM++).

    Args:
        covariance: "full", or "diagonal", for examples of many elements.
        jitter: added to the variances, so that constant elements are no trouble.

    Raises:
        TypeError, ValueError: for another ``covariance``, examples of a class that have none, or labels as in
            :func:`data`.

    Example:
        >>> examples, labels = torch.randn(20, 3), torch.arange(20) % 2
        >>> start = mmebm.initial.class_gaussian(examples, labels)
        >>> start(4, torch.Generator().manual_seed(0), torch.zeros(4, dtype=torch.int64)).shape
        torch.Size([4, 3])
    """
    choice("covariance", covariance, ("full", "diagonal"))
    jitter = one_number("jitter", jitter, strict=True)
    check_setting("examples", dense("examples", examples, 2), low=-math.inf)
    flat = examples.detach().cpu().double().flatten(1)
    if len(flat) == 0 or not bool(flat.isfinite().all()):
        raise ValueError(f"examples must hold at least one row, of finite numbers, got {examples!r:.80}")
    order, start, count = _by_class(examples, labels)
    flat = flat[order]
    means: list[Tensor] = []
    scales: list[Tensor] = []
    for a, m in TORCH.stack((start, count), 1).tolist():
        part = flat[a : a + m]
        means.append(part.mean(0))
        centred = part - means[-1]
        if covariance == "full":
            spread = centred.T @ centred / m
            spread.diagonal().add_(jitter)
            root, failed = TORCH.linalg.cholesky_ex(spread)
            if bool(failed):
                raise ValueError(f"jitter must make every class's covariance positive definite, got {jitter!r:.80}")
            scales.append(root)
        else:
            scales.append((centred.square().mean(0) + jitter).sqrt())
    mean = torch.stack(means).to(examples.dtype)
    scale = torch.stack(scales).to(examples.dtype)
    return partial(_class_normal, mean, scale, covariance, examples.shape[1:])


def _class_normal(
    mean: Tensor,
    scale: Tensor,
    covariance: str,
    shape: Sequence[int],
    n: int,
    generator: torch.Generator,
    labels: Tensor,
) -> Tensor:
    device = generator.device
    xi = _draw(drawn.normal, torch.randn, (n, mean.shape[1]), mean.dtype, generator)
    spread = scale.to(device)
    if covariance == "diagonal":
        out = xi * spread[labels]
    else:
        # one product per class, so that no (n, elements, elements) tensor is made
        out = torch.zeros_like(xi)
        for c in range(len(spread)):
            out = torch.where((labels == c)[:, None], xi @ spread[c].T, out)
    return (mean.to(device)[labels] + out).reshape(n, *shape)


def generated(generator_net: Callable[[Any], Any], latent: Initial) -> Initial:
    """What a generator makes of latents: ``generator_net(latent(n, generator))``, without its graph.

    Raises:
        TypeError: where either is no function.

    Example:
        >>> start = mmebm.initial.generated(torch.nn.Linear(2, 5), mmebm.initial.normal((2,)))
        >>> start(4, torch.Generator().manual_seed(0)).shape
        torch.Size([4, 5])
    """
    if not callable(generator_net) or not callable(latent):
        raise TypeError("generator_net and latent must be functions")
    return partial(_generated, generator_net, latent)


def _generated(generator_net: Callable[[Any], Any], latent: Initial, n: int, generator: torch.Generator) -> Any:
    with torch.no_grad():
        return generator_net(latent(n, generator))


def each(parts: Mapping[str, Initial]) -> Initial:
    """A dict state, each tensor from its own initialiser (none of them by class).

    Raises:
        TypeError: where ``parts`` is no mapping from name to initialiser.

    Example:
        >>> start = mmebm.initial.each({"x": mmebm.initial.normal((2,)), "y": mmebm.initial.uniform((3,))})
        >>> {name: tuple(t.shape) for name, t in start(4, torch.Generator().manual_seed(0)).items()}
        {'x': (4, 2), 'y': (4, 3)}
    """
    if not isinstance(parts, Mapping) or not parts or not all(callable(part) for part in parts.values()):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"parts must be a mapping from name to initialiser, got {parts!r:.80}")
    return partial(_each, dict(parts))


def _each(parts: dict[str, Initial], n: int, generator: torch.Generator) -> dict[str, Any]:
    return {name: part(n, generator) for name, part in parts.items()}
