"""Whether chains have converged, and how much their draws are worth: R-hat, effective sample size, autocorrelation.

Draws have shape (steps, chains, ...), as ``Samples.trajectory`` and ``Samples.trace`` hold them. Each element is judged
by itself, so that results have shape (...). A dict, list or tuple of such tensors gives the same structure of results.
All is computed on the draws' device in float64, and nothing waits for it.

R-hat and effective sample size are those of Vehtari, Gelman, Simpson, Carpenter and Bürkner, "Rank-normalization,
folding, and localization: an improved R-hat", Bayesian Analysis 16 (2021). An element with an inf or NaN among its
draws, or whose draws are all equal, gives NaN: nothing can be said about it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from mmebm.state import choice, dense

Rhat = Literal["rank", "bulk", "folded", "split"]
Ess = Literal["bulk", "tail", "mean"]

# fewer steps leave halves of one draw, which have no variance
MIN_STEPS = 4
TAILS = (0.05, 0.95)


def rhat(draws: Any, *, method: Rhat = "rank") -> Any:
    """Split R-hat: the spread of all draws over the spread within half chains; above 1.01 they have not mixed.

    Args:
        draws: (steps, chains, ...), at least 4 steps; see the module's docstring.
        method: "bulk" of rank-normalised draws, which finds chains that differ in location, and needs no moments;
            "folded" of the rank-normalised distances from the median, which finds chains that differ in spread; "rank",
            the larger of both; "split", of the draws themselves.

    Returns:
        (...), float64.

    Raises:
        TypeError, ValueError: naming the argument, the value and what would do.
    """
    choice("method", method, ("rank", "bulk", "folded", "split"))

    def one(x: Tensor) -> Tensor:
        bulk = _rhat(_halves(x)) if method == "split" else None
        if method in ("rank", "bulk"):
            bulk = _rhat(_rank_normal(_halves(x)))
        if method in ("rank", "folded"):
            halves = _halves(x)
            folded = _rhat(_rank_normal((halves - _quantile(halves, 0.5)).abs()))
            bulk = folded if bulk is None else torch.maximum(bulk, folded)
        assert bulk is not None
        return _known(x, bulk)

    return _each(draws, one)


def ess(draws: Any, *, method: Ess = "bulk") -> Any:
    """Effective sample size: how many independent draws the steps * chains draws are worth.

    Args:
        draws: (steps, chains, ...), at least 4 steps; see the module's docstring.
        method: "bulk" of rank-normalised draws, for where the mass is; "tail", the smaller of those of the 5% and 95%
            quantiles, for intervals; "mean", of the draws themselves, for the error of their mean: std / sqrt(ess).

    Returns:
        (...), float64; above steps * chains where successive draws are anticorrelated, at most by a factor of
        log10(steps * chains).

    Raises:
        TypeError, ValueError: naming the argument, the value and what would do.
    """
    choice("method", method, ("bulk", "tail", "mean"))

    def one(x: Tensor) -> Tensor:
        if method == "mean":
            return _known(x, _ess(_halves(x)))
        if method == "bulk":
            return _known(x, _ess(_rank_normal(_halves(x))))
        low, high = (_ess(_halves((x <= _quantile(x, q)).double())) for q in TAILS)
        # one of them is NaN where many draws equal the largest
        return _known(x, torch.fmin(low, high))

    return _each(draws, one)


def autocorrelation_time(draws: Any) -> Any:
    """Integrated autocorrelation time, 1 + 2 (rho_1 + rho_2 + ...): steps per independent draw.

    It is steps * chains / ``ess(draws, method="mean")``, the sum ended by Geyer's initial monotone sequence, and counts
    chains that disagree as correlation. Independent draws have 1.

    Args:
        draws: (steps, chains, ...), at least 4 steps; see the module's docstring.

    Returns:
        (...), float64.

    Raises:
        TypeError, ValueError: naming the argument, the value and what would do.
    """
    return _each(draws, lambda x: _known(x, x.shape[0] * x.shape[1] / _ess(_halves(x))))


def autocorrelation(draws: Any) -> Any:
    """The autocorrelation of every chain at every lag, by FFT.

    With the chain's own mean and the biased estimate (all lags divided by the number of steps), which goes to 0 for
    long lags.

    Args:
        draws: (steps, chains, ...), at least 4 steps; see the module's docstring.

    Returns:
        (steps, chains, ...), float64; entry t is lag t, entry 0 is 1. NaN for a chain whose draws are all equal.

    Raises:
        TypeError, ValueError: naming the argument, the value and what would do.
    """

    def one(x: Tensor) -> Tensor:
        cov = _autocovariance(x)
        return cov / cov[:1]

    return _each(draws, one)


def _each(draws: Any, function: Callable[[Tensor], Tensor], name: str = "draws") -> Any:
    """``function`` of the float64 draws, tensor by tensor."""
    if isinstance(draws, Mapping):
        return {key: _each(value, function, f"{name}[{key!r}]") for key, value in draws.items()}
    if isinstance(draws, (list, tuple)):
        parts = [_each(value, function, f"{name}[{i}]") for i, value in enumerate(draws)]
        return parts if isinstance(draws, list) else tuple(parts)
    if not isinstance(draws, Tensor) or draws.is_complex():
        raise TypeError(f"{name} must be a real tensor (steps, chains, ...), or a structure of them, got {draws!r:.80}")
    dense(name, draws)
    if draws.dim() < 2 or draws.shape[0] < MIN_STEPS or draws.shape[1] < 1:
        raise ValueError(
            f"{name} must have shape (steps, chains, ...) with at least {MIN_STEPS} steps and a chain, got "
            f"{tuple(draws.shape)}"
        )
    with torch.no_grad():
        return function(draws.detach().double())


def _halves(x: Tensor) -> Tensor:
    """The two halves of every chain as chains: (steps // 2, 2 chains, ...); a middle draw is left out."""
    n = x.shape[0] // 2
    return torch.cat((x[:n], x[-n:]), dim=1)


def _rank_normal(x: Tensor) -> Tensor:
    """Normal scores of the ranks among all draws of an element; equal draws share their mean rank."""
    flat = x.flatten(0, 1).movedim(0, -1).contiguous()
    ordered = flat.sort(dim=-1).values
    below = torch.searchsorted(ordered, flat, side="left")
    not_above = torch.searchsorted(ordered, flat, side="right")
    rank = 0.5 * (below + not_above + 1).double()
    scores = torch.special.ndtri((rank - 0.375) / (flat.shape[-1] + 0.25))
    return scores.movedim(-1, 0).reshape(x.shape)


def _quantile(x: Tensor, q: float) -> Tensor:
    """The quantile of all draws of an element, linear between order statistics: (...)."""
    # torch.quantile takes at most 2^24 numbers
    ordered = x.flatten(0, 1).sort(dim=0).values
    position = q * (ordered.shape[0] - 1)
    below = math.floor(position)
    above = min(below + 1, ordered.shape[0] - 1)
    # weights of 1/2 are exact: the median is the mean of the two middle draws, to the bit
    return (1.0 - (position - below)) * ordered[below] + (position - below) * ordered[above]


def _known(x: Tensor, value: Tensor) -> Tensor:
    """``value`` for the elements whose draws are finite and not all equal."""
    good = torch.isfinite(x).all(0).all(0) & (x != x[:1, :1]).any(0).any(0)
    return torch.where(good, value, math.nan)


def _rhat(x: Tensor) -> Tensor:
    n = x.shape[0]
    within = x.var(dim=0).mean(0)
    between = x.mean(0).var(dim=0)
    return (between / within + (n - 1) / n).sqrt()


def _autocovariance(x: Tensor) -> Tensor:
    """Of each chain at all lags: (steps, chains, ...), divided by steps."""
    n = x.shape[0]
    # from the first draw on, so that equal draws are exactly equal to their mean
    x = x - x[:1]
    x = x - x.mean(0)
    size = 1 << (2 * n - 1).bit_length()
    spectrum = torch.fft.rfft(x, n=size, dim=0)
    return torch.fft.irfft(spectrum.abs().square(), n=size, dim=0)[:n] / n


def _ess(x: Tensor) -> Tensor:
    """Of (steps, chains, ...) without splitting; more than one chain."""
    n, chains = x.shape[:2]
    cov = _autocovariance(x).mean(1)
    within = cov[0] * n / (n - 1)
    # the variance of the target as all chains together have it
    var = cov[0] + x.mean(0).var(dim=0)
    rho = 1.0 - (within - cov) / var
    rho[0] = 1.0
    # sums of two neighbouring lags fall, and stay positive, for a reversible chain: where they do not is noise
    pairs = max((n - 1) // 2, 1)
    even = rho[0 : 2 * pairs : 2]
    sums = even + rho[1 : 2 * pairs : 2]
    used = (sums > 0).cumprod(dim=0)
    # the last pair, or the one that ended the sequence, counts only with its first lag, which lowers the variance
    used[-1] = 0
    tau = -1.0 + 2.0 * (sums.cummin(dim=0).values * used).sum(0)
    end = used.sum(0, keepdim=True)
    first, both = even.gather(0, end).squeeze(0), sums.gather(0, end).squeeze(0)
    tau = tau + torch.where(both > 0, first, first.clamp(min=0.0))
    return n * chains / tau.clamp(min=1.0 / math.log10(n * chains))
