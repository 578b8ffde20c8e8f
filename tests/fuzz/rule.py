"""The samplers' rules, restated slowly in NumPy from their written definitions, without a line of mmebm.

A state is a list of arrays (chains, ...), all of one dtype: float64 for the truth, float32 for the loop that somebody
would write, whose distance from the truth says how much a float32 chain may be off. ``jitter`` moves each normal by
2e-6, which is what the definition of the noise leaves free.

An energy is a function of (state, k) that returns its value, (chains,) or (), and the gradient of the sum, one array
for each of the state's. A setting is a function of (name, tensor, k) that returns an array which broadcasts against the
tensor, a number, or None.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray
Energy = Callable[[list[Array], int], tuple[Array, list[Array]]]
Setting = Callable[[str, int, int], Any]

DRIFT, INITIAL, ACCEPT, REINIT, ROUNDING, PERTURB_ROUNDING, MOMENTUM, SWAP = range(8)

# -- the noise: Philox4x32-10 with key = seed, counter = (block, chain, step, purpose 2^24 + tensor)


def words(shape: Sequence[int], seed: int, step: int, purpose: int, tensor: int, offset: int, each: int) -> Array:
    """Words for tensors of ``shape`` = (chains, ...), ``each`` elements a block: uint64 (chains, blocks, 4)."""
    chains, numel = shape[0], int(np.prod(shape[1:], dtype=np.int64))
    blocks = -(-numel // each)
    low = np.uint64(0xFFFFFFFF)
    c = [
        np.broadcast_to(np.asarray(part, dtype=np.uint64), (chains, blocks))
        for part in (
            np.arange(blocks)[None, :],
            (np.arange(chains) + offset)[:, None] & 0xFFFFFFFF,
            step & 0xFFFFFFFF,
            purpose << 24 | tensor,
        )
    ]
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)  # both below 2^64
        c = [p1 >> np.uint64(32) ^ c[1] ^ np.uint64(k0), p1 & low, p0 >> np.uint64(32) ^ c[3] ^ np.uint64(k1), p0 & low]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack(c, axis=-1)


def normals(shape: Sequence[int], seed: int, step: int, tensor: int, purpose: int = DRIFT, offset: int = 0) -> Array:
    """float64 of ``shape``: Box-Muller on all four words of a block."""
    w = words(shape, seed, step, purpose, tensor, offset, 4).astype(np.uint32)
    u = w.astype(np.float32).astype(np.float64) * 2.0**-32 + 2.0**-33
    u = u.astype(np.float32).astype(np.float64)
    angle = np.pi * (w.view(np.int32).astype(np.float32).astype(np.float64) * 2.0**-31)
    r = np.sqrt(-2 * np.log(u[..., 0::2]))
    pairs = np.stack((r * np.cos(angle[..., 1::2]), r * np.sin(angle[..., 1::2])), axis=-1)
    return _cut(pairs, shape)


def uniforms(shape: Sequence[int], seed: int, step: int, tensor: int, purpose: int, offset: int = 0) -> Array:
    """24-bit uniforms in [0, 1), float64 of ``shape``."""
    return _cut((words(shape, seed, step, purpose, tensor, offset, 4) >> np.uint64(8)) * 2.0**-24, shape)


def thresholds(shape: Sequence[int], seed: int, step: int, tensor: int, purpose: int, offset: int = 0) -> Array:
    """What the fraction left over must exceed to be rounded up to a 16-bit number: float64 of ``shape``."""
    w = words(shape, seed, step, purpose, tensor, offset, 8)
    halves = np.stack((w & np.uint64(0xFFFF), w >> np.uint64(16)), axis=-1)
    return _cut((halves.astype(np.float64) + 0.5) * 2.0**-16, shape)


def _cut(x: Array, shape: Sequence[int]) -> Array:
    numel = int(np.prod(shape[1:], dtype=np.int64))
    flat = x.reshape(shape[0], int(np.prod(x.shape[1:], dtype=np.int64)))
    return flat[:, :numel].reshape(tuple(shape))


# -- helpers


def flat(x: Array) -> Array:
    return x.reshape(x.shape[0], int(np.prod(x.shape[1:], dtype=np.int64)))


def rows(v: Array, like: Array) -> Array:
    """(chains,) so that it broadcasts against ``like``."""
    return v.reshape(-1, *[1] * (like.ndim - 1))


def clamp(y: Array, low: Any, high: Any) -> Array:
    y = y if low is None else np.maximum(y, low)
    return y if high is None else np.minimum(y, high)


@dataclass
class Result:
    """``margin``: per chain, how far the closest of its decisions (accept, reject) was from falling otherwise."""

    state: list[Array]
    trajectory: list[list[Array]] = field(default_factory=list)
    trace: dict[str, list[Array]] = field(default_factory=dict)
    margin: Array = field(default_factory=lambda: np.zeros(0))
    extra: dict[str, Any] = field(default_factory=dict)

    def add(self, **values: Array) -> None:
        for name, value in values.items():
            self.trace.setdefault(name, []).append(np.asarray(value))


class Noise:
    """The normals of a run, where they count: ``jitter`` (a generator) moves them by the 2e-6 that are free."""

    def __init__(self, seed: int, first_step: int, offset: int, dtype: Any, jitter: np.random.Generator | None) -> None:
        self.seed, self.first_step, self.offset, self.dtype, self.jitter = seed, first_step, offset, dtype, jitter

    def normal(self, shape: Sequence[int], tensor: int, k: int, purpose: int = DRIFT) -> Array:
        xi = normals(shape, self.seed, self.first_step + k, tensor, purpose, self.offset)
        if self.jitter is not None:
            xi = xi + self.jitter.choice([-2e-6, 2e-6], size=xi.shape)
        return xi.astype(self.dtype)

    def uniform(self, shape: Sequence[int], tensor: int, k: int, purpose: int) -> Array:
        return uniforms(shape, self.seed, self.first_step + k, tensor, purpose, self.offset)


# -- Langevin


def langevin(
    energy: Energy,
    state: Sequence[Array],
    steps: int,
    setting: Setting,
    *,
    seed: int,
    masks: Sequence[Any],
    blocks: Sequence[Sequence[int]] | None = None,
    noise_at: str = "after",
    clamp_noise: bool = False,
    norm_over: str = "chain",
    bounds_at: str = "step",
    outside: str = "clamp",
    project: Sequence[Callable[[Array], Array] | None] | None = None,
    finish: Callable[[list[Array]], list[Array]] | None = None,
    accept: str | None = None,
    chain_offset: int = 0,
    first_step: int = 0,
    jitter: np.random.Generator | None = None,
    draw: Callable[[int, int], Array] | None = None,
    after_gradient: Callable[[list[Array], int], Array] | None = None,
) -> Result:
    """For every step and block: noise before, gradient, clips, prior, update, bounds, projection, observed, accept.

    Args:
        masks: per tensor True (wholly observed), False or a boolean array.
        draw: instead of the noise above, a function of (tensor, k).
        after_gradient: per chain, how far a gradient at this state is from a kink.
    """
    x = [t.copy() for t in state]
    chains, dtype, count = x[0].shape[0], x[0].dtype, len(x)
    noise = Noise(seed, first_step, chain_offset, dtype, jitter)
    moving = [i for i in range(count) if masks[i] is not True]
    groups = [moving] if blocks is None else [[i for i in group if i in moving] for group in blocks]
    groups = [group for group in groups if group]
    result = Result(x, margin=np.full(chains, np.inf))
    held = [np.broadcast_to(np.asarray(mask, dtype=bool), t.shape) for mask, t in zip(masks, x)]

    def now(name: str, i: int, k: int) -> Any:
        value = setting(name, i, k)
        return None if value is None else np.asarray(value, dtype=dtype)

    def scale(i: int, k: int) -> Any:
        s = now("noise_scale", i, k)
        return np.sqrt(2 * now("step_size", i, k) * now("temperature", i, k)).astype(dtype) if s is None else s

    def xi(i: int, k: int) -> Array:
        return noise.normal(x[i].shape, i, k) if draw is None else draw(i, k).astype(dtype)

    def closer(distance: Array) -> None:
        result.margin = np.minimum(result.margin, distance)

    def drift(points: list[Array], slopes: list[Array], i: int, k: int) -> tuple[Array, Array, Array]:
        """The gradient after clips and prior; and where a clip surely, or perhaps, changed it."""
        g = slopes[i]
        sure = np.zeros(g.shape, dtype=bool)
        limit = now("grad_clip", i, k)
        if limit is not None:
            sure |= np.abs(g) > limit
            g = clamp(g, -limit, limit)
        perhaps = sure.copy()
        limit = now("grad_norm_clip", i, k)
        if limit is not None:
            norm = np.sqrt((flat(g) ** 2).sum(1)) if norm_over == "chain" else np.sqrt((g**2).sum())[None]
            factor = np.ones_like(norm)
            limits = np.broadcast_to(limit.reshape(-1), norm.shape)
            over = norm > limits
            factor[over] = limits[over] / norm[over]
            sure = sure | (rows(over, g) & (g != 0))
            perhaps = perhaps | rows(over, g)
            g = g * rows(factor, g)
        std = now("prior_std", i, k)
        if std is not None:
            g = g + points[i] / std**2
        return g.astype(dtype), sure & ~held[i], perhaps

    for k in range(steps if chains else 0):
        first_energy: Array | None = None
        sums = {name: np.zeros(chains) for name in ("grad_norm", "displacement", "accepted", "clipped", "clipped_most")}
        if not groups:
            first_energy = energy(x, k)[0]
        for group in groups:
            old = [t.copy() for t in x]
            if noise_at == "before":
                for i in group:
                    y = x[i] + scale(i, k) * xi(i, k)
                    if clamp_noise:
                        y = clamp(y, now("low", i, k), now("high", i, k))
                    x[i] = np.where(held[i], old[i], y)
            start = [t.copy() for t in x]
            value, slopes = energy(start, k)
            if after_gradient is not None:
                closer(after_gradient(start, k))
            first_energy = value if first_energy is None else first_energy
            ok = np.ones(chains, dtype=bool)
            for i in group:
                g, sure, perhaps = drift(start, slopes, i, k)
                d = -now("step_size", i, k) * g
                if noise_at == "after":
                    d = d + scale(i, k) * xi(i, k)
                limit = now("max_update", i, k)
                if limit is not None:
                    cut = np.abs(d) > limit
                    sure, perhaps = sure | (cut & ~held[i]), perhaps | cut
                    d = clamp(d, -limit, limit)
                y = start[i] + d
                low, high = now("low", i, k), now("high", i, k)
                if bounds_at == "step" and outside == "clamp":
                    y = clamp(y, low, high)
                elif bounds_at == "step":
                    for bound, sign in ((low, 1), (high, -1)):
                        if bound is not None:
                            gap = flat(np.where(held[i], np.inf, sign * (y - bound)))
                            ok &= (gap >= 0).all(1)
                            closer(np.abs(gap).min(1, initial=np.inf))
                x[i] = np.where(held[i], old[i], y).astype(dtype)
                sums["grad_norm"] += (flat(slopes[i]) ** 2).sum(1)
                sums["clipped"] += flat(sure).sum(1)
                sums["clipped_most"] += flat(perhaps).sum(1)
            for i in group:
                x[i] = np.where(rows(ok, x[i]), x[i], start[i])
                if project is not None and project[i] is not None:
                    x[i] = np.where(held[i], x[i], project[i](x[i])).astype(dtype)
            if accept is not None:
                new_value, new_slopes = energy(x, k)
                if after_gradient is not None:
                    closer(after_gradient(x, k))
                if accept == "descent":
                    moved = new_value < value
                    closer(np.abs(new_value - value))
                else:
                    ratio = np.zeros(chains)
                    temperature: Any = 1.0
                    for i in group:
                        a, s = now("step_size", i, k).astype(float), np.asarray(scale(i, k), dtype=float)
                        t = s**2 / (2 * a)
                        temperature = flat(np.broadcast_to(t, x[i].shape))[:, :1].sum(1) if x[i].size else temperature
                        std = now("prior_std", i, k)
                        for point, other, sl, sign in ((start, x, slopes, 1), (x, start, new_slopes, -1)):
                            b = a * drift(point, sl, i, k)[0].astype(float)
                            gap = (other[i].astype(float) - point[i] + b) ** 2 / (2 * s**2)
                            ratio += sign * flat(np.where(held[i], 0.0, gap)).sum(1)
                            if std is not None:
                                ratio += sign * flat(point[i].astype(float) ** 2 / (2 * std**2 * t)).sum(1)
                    ratio += (value.astype(float) - new_value) / temperature
                    probability = np.nan_to_num(np.exp(np.minimum(ratio, 0)))
                    u = noise.uniform((chains, 1), group[0], k, ACCEPT)[:, 0]
                    moved = u < probability
                    closer(np.abs(u - probability))
                for i in group:
                    x[i] = np.where(rows(moved, x[i]), x[i], old[i])
                sums["accepted"] += moved / len(groups)
            for i in group:
                sums["displacement"] += (flat(x[i].astype(float) - old[i]) ** 2).sum(1)
        for name in ("grad_norm", "displacement"):
            sums[name] = np.sqrt(sums[name])
        result.add(energy=first_energy, **sums)
        result.trajectory.append([t.copy() for t in x])
    if bounds_at == "end" and steps:
        for i in moving:
            x[i] = np.where(held[i], x[i], clamp(x[i], now("low", i, steps - 1), now("high", i, steps - 1)))
    if finish is not None:
        done = finish([t.copy() for t in x])
        x = [np.where(h, t, y).astype(dtype) for h, t, y in zip(held, x, done)]
    result.state = x
    return result


# -- Hamiltonian Monte Carlo


def hmc(
    energy: Energy,
    state: Sequence[Array],
    steps: int,
    setting: Setting,
    *,
    seed: int,
    masks: Sequence[Any],
    leapfrog_steps: int,
    adapt: int = 0,
    target_accept: float = 0.8,
    adapt_over: str = "chain",
    chain_offset: int = 0,
    first_step: int = 0,
    jitter: np.random.Generator | None = None,
) -> Result:
    """Velocities from N(0, T / m), leapfrog, accepted with min(1, exp(-dH / T)); dual averaging of the step's factor
    (Hoffman and Gelman 2014, section 3.2, mu = log 10 eps_0, gamma = .05, t_0 = 10, kappa = .75)."""
    x = [t.copy() for t in state]
    chains, dtype = x[0].shape[0], x[0].dtype
    noise = Noise(seed, first_step, chain_offset, dtype, jitter)
    moving = [i for i in range(len(x)) if masks[i] is not True]
    held = [np.broadcast_to(np.asarray(mask, dtype=bool), t.shape) for mask, t in zip(masks, x)]
    result = Result(x, margin=np.full(chains, np.inf))
    log_scale, mean_log, shortfall = np.zeros(chains), np.zeros(chains), np.zeros(chains)

    def gradient(points: list[Array], k: int) -> tuple[Array, list[Array]]:
        value, slopes = energy(points, k)
        return value, [np.where(h, 0, g).astype(dtype) for h, g in zip(held, slopes)]

    for k in range(steps if chains else 0):
        factor = np.exp(log_scale if k < adapt else mean_log) if adapt else np.ones(chains)
        h, m, temperature = {}, {}, np.asarray(setting("temperature", 0, k), dtype=float)
        for i in moving:
            h[i] = (np.asarray(setting("step_size", i, k)) * rows(factor, x[i])).astype(dtype)
            m[i] = np.asarray(setting("mass", i, k), dtype=dtype)
        t = temperature.reshape(-1) if temperature.ndim else temperature
        v = {}
        for i in moving:
            std = np.sqrt((rows(t, x[i]) if temperature.ndim else t) / m[i]).astype(dtype)
            v[i] = np.where(held[i], 0, std * noise.normal(x[i].shape, i, k, MOMENTUM)).astype(dtype)
        value, g = gradient(x, k)
        y, new, slopes = [a.copy() for a in x], value, g
        kinetic = sum((flat(m[i] * v[i] ** 2 / 2).sum(1) for i in moving), np.zeros(chains))
        for _ in range(leapfrog_steps):
            v = {i: v[i] - h[i] / 2 * slopes[i] / m[i] for i in moving}
            for i in moving:
                y[i] = (y[i] + h[i] * v[i]).astype(dtype)
            new, slopes = gradient(y, k)
            v = {i: v[i] - h[i] / 2 * slopes[i] / m[i] for i in moving}
        error = new - value + sum((flat(m[i] * v[i] ** 2 / 2).sum(1) for i in moving), np.zeros(chains)) - kinetic
        probability = np.nan_to_num(np.exp(np.minimum(-error / t, 0)))  # what is not a number is not accepted
        u = noise.uniform((chains, 1), 0, k, ACCEPT)[:, 0]
        moved = u < probability
        result.margin = np.minimum(result.margin, np.abs(u - probability))
        x = [np.where(rows(moved, a), b, a) for a, b in zip(x, y)]
        result.add(energy=value, energy_error=error, accept_prob=probability, accepted=moved, step_scale=factor)
        result.trajectory.append([a.copy() for a in x])
        if k < adapt:
            mean = np.full(chains, probability.mean()) if adapt_over == "all" else probability
            shortfall = shortfall + (target_accept - mean - shortfall) / (k + 1 + 10)
            log_scale = np.log(10) - np.sqrt(k + 1) / 0.05 * shortfall
            mean_log = mean_log + (k + 1) ** -0.75 * (log_scale - mean_log)
    result.state = x
    return result


# -- underdamped Langevin


def underdamped(
    energy: Energy,
    state: Sequence[Array],
    steps: int,
    setting: Setting,
    *,
    seed: int,
    masks: Sequence[Any],
    chain_offset: int = 0,
    first_step: int = 0,
    jitter: np.random.Generator | None = None,
) -> Result:
    """BAOAB from velocities of N(0, T / m)."""
    x = [t.copy() for t in state]
    chains, dtype = x[0].shape[0], x[0].dtype
    noise = Noise(seed, first_step, chain_offset, dtype, jitter)
    moving = [i for i in range(len(x)) if masks[i] is not True]
    held = [np.broadcast_to(np.asarray(mask, dtype=bool), t.shape) for mask, t in zip(masks, x)]
    result = Result(x, margin=np.full(chains, np.inf))

    def gradient(points: list[Array], k: int) -> tuple[Array, list[Array]]:
        value, slopes = energy(points, k)
        return value, [np.where(h, 0, g).astype(dtype) for h, g in zip(held, slopes)]

    def now(name: str, i: int, k: int) -> Array:
        return np.asarray(setting(name, i, k), dtype=dtype)

    def start(i: int) -> Array:
        std = np.sqrt(now("temperature", i, 0) / now("mass", i, 0)).astype(dtype)
        return np.where(held[i], 0, std * noise.normal(x[i].shape, i, 0, MOMENTUM)).astype(dtype)

    v = {i: start(i) for i in moving} if chains else {}
    for k in range(steps if chains else 0):
        value, g = gradient(x, k)
        kinetic = np.zeros(chains)
        norm = np.zeros(chains)
        for i in moving:
            h, m = now("step_size", i, k), now("mass", i, k)
            c, t = now("friction", i, k), now("temperature", i, k)
            kinetic += flat(m * v[i] ** 2 / 2).sum(1)
            norm += flat(g[i] ** 2).sum(1)
            v[i] = v[i] - h / 2 * g[i] / m
            half = x[i] + h / 2 * v[i]
            xi = np.where(held[i], 0, noise.normal(x[i].shape, i, k)).astype(dtype)
            v[i] = np.exp(-c * h) * v[i] + np.sqrt((1 - np.exp(-2 * c * h)) * t / m) * xi
            x[i] = (half + h / 2 * v[i]).astype(dtype)
        _, g = gradient(x, k)
        for i in moving:
            v[i] = (v[i] - now("step_size", i, k) / 2 * g[i] / now("mass", i, k)).astype(dtype)
        result.add(energy=value, kinetic=kinetic, grad_norm=np.sqrt(norm))
        result.trajectory.append([a.copy() for a in x])
    result.state = x
    result.extra["velocity"] = [v.get(i, np.zeros_like(t)) for i, t in enumerate(x)]
    return result


# -- parallel tempering


def tempering(
    energy: Callable[[list[Array], int], tuple[Array, list[Array]]],
    state: Sequence[Array],
    steps: int,
    setting: Callable[[str, int, int], Array],
    temperatures: Sequence[float],
    *,
    seed: int,
    masks: Sequence[Any],
    swap_every: int = 1,
    accept: str | None = "metropolis",
    chain_offset: int = 0,
    first_step: int = 0,
    jitter: np.random.Generator | None = None,
) -> Result:
    """Langevin at each temperature, then exchanges. ``setting("step_size", i, r)``: of rung ``r``, a number.

    The energy is called with (chains * R, ...) rows, chain 0 at all temperatures first.
    """
    rungs = len(temperatures)
    chains, dtype = state[0].shape[0], state[0].dtype
    noise = Noise(seed, first_step, chain_offset, dtype, jitter)
    moving = [i for i in range(len(state)) if masks[i] is not True]
    held = [np.repeat(np.broadcast_to(np.asarray(m, dtype=bool), t.shape), rungs, 0) for m, t in zip(masks, state)]
    x = [np.repeat(t, rungs, 0) for t in state]
    hot = np.tile(np.asarray(temperatures, dtype=float), chains)
    result = Result(x, margin=np.full(chains, np.inf))
    for k in range(steps if chains else 0):
        value, g = energy(x, k)
        y, ratio = [t.copy() for t in x], np.zeros(chains * rungs)
        sizes, noises = {}, {}
        for i in moving:
            a = np.tile(np.asarray([setting("step_size", i, r) for r in range(rungs)], dtype=float), chains)
            sizes[i] = rows(a, x[i])
            noises[i] = noise.normal((chains, rungs, *x[i].shape[1:]), i, k).reshape(x[i].shape)
            move = -sizes[i] * g[i] + np.sqrt(2 * sizes[i] * rows(hot, x[i])) * noises[i]
            y[i] = np.where(held[i], x[i], x[i] + move).astype(dtype)
        new, p = energy(y, k)
        probability = np.ones(chains * rungs)
        if accept == "metropolis":
            ratio = (value.astype(float) - new) / hot
            for i in moving:
                spread = 4 * sizes[i] * rows(hot, x[i])
                there = (y[i].astype(float) - x[i] + sizes[i] * g[i]) ** 2 / spread
                back = (x[i].astype(float) - y[i] + sizes[i] * p[i]) ** 2 / spread
                ratio += flat(np.where(held[i], 0.0, there - back)).sum(1)
            probability = np.exp(np.minimum(ratio, 0))
            u = noise.uniform((chains, rungs), 0, k, ACCEPT).reshape(-1)
            moved = u < probability
            result.margin = np.minimum(result.margin, np.abs(u - probability).reshape(chains, rungs).min(1))
        else:
            moved = np.ones(chains * rungs, dtype=bool)
        result.add(
            energy=value.reshape(chains, rungs)[:, 0],
            ladder_energy=value.reshape(chains, rungs),
            accept_prob=probability.reshape(chains, rungs),
        )
        x = [np.where(rows(moved, a), b, a) for a, b in zip(x, y)]
        value = np.where(moved, new, value)
        done = first_step + k + 1
        if done % swap_every == 0 and rungs > 1:
            u = noise.uniform((chains, rungs - 1), 0, k, SWAP)
            for r in range((done // swap_every - 1) % 2, rungs - 1, 2):
                for c in range(chains):
                    i, j = c * rungs + r, c * rungs + r + 1
                    swap = np.exp(min(0.0, (1 / temperatures[r] - 1 / temperatures[r + 1]) * (value[i] - value[j])))
                    result.margin[c] = min(result.margin[c], abs(u[c, r] - swap))
                    if u[c, r] < swap:
                        for t in (*x, value):
                            t[[i, j]] = t[[j, i]]
        result.trajectory.append([t.reshape(chains, rungs, *t.shape[1:])[:, 0].copy() for t in x])
    result.state = [t.reshape(chains, rungs, *t.shape[1:])[:, 0].copy() for t in x]
    return result
