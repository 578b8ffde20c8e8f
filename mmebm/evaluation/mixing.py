"""Does a chain mix? Chains from several initialisers, followed far beyond their trained length, and judged.

A short chain that ends near good samples may sample its energy, or only revise what it was started from. What tells
them apart is where else it can be started: chains of one law from a generator, from noise and from data must come to
agree. R-hat and effective sample size say whether they do (:mod:`mmebm.diagnostics`, Vehtari et al. 2021), the
acceptance of a Metropolis test what the unadjusted step costs, the noise beside the drift whether it samples or
minimises, and agreement of the modalities beside the energy whether a falling energy makes them agree or only sharper.

:func:`examine` takes any chain, :func:`mixing` the two chains of a run. Both return plain data, ready for JSON:
numbers and curves; :mod:`mmebm.report.mixing` says in words what they mean. Nothing but the states of the moment is
held, whatever the length.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from mmebm.data.base import MultimodalDataset, check_count
from mmebm.diagnostics import autocorrelation_time, ess, mala_acceptance, rhat
from mmebm.evaluation.latent import usable_rows
from mmebm.evaluation.metrics import frechet_distance
from mmebm.samplers import Langevin

if TYPE_CHECKING:
    from mmebm.evaluation.classifiers import Classifiers
    from mmebm.training.run import Run

__all__ = ["THRESHOLDS", "Subject", "data_subject", "examine", "latent_subject", "mixing"]

State = Any  # a tensor (n, ...) or a dict of such

# What is called good, and who says so.
THRESHOLDS: Final[dict[str, dict[str, Any]]] = {
    "rhat": {"at_most": 1.01, "source": "Vehtari et al. 2021"},
    "rhat_nearly": {"at_most": 1.1, "source": "Gelman et al., Bayesian Data Analysis, 2013, the older limit"},
    "ess": {"at_least": 400, "source": "Vehtari et al. 2021: 100 for each of four chains"},
    "acceptance": {"at_least": 0.9, "source": "docs/diagnostics.md: one step moves the law by at most a tenth"},
    "change": {"standard_errors": 2, "source": "about 95 % of a normal law"},
}
MIN_DRAWS: Final = 4  # of a chain: fewer leave halves of one draw
TRACES: Final = 4  # chains of each initialiser that are kept as lines
DISTANCES: Final = 8  # states, spread logarithmically, at which the distance to real data is taken


@dataclass(frozen=True)
class Subject:
    """A chain to examine.

    Args:
        name: for people, such as "data chain".
        energy: the energy of a state, ``(n,)``, as the sampler takes it (a prior of the sampler is left to it).
        sampler: the step; bounds, projections and limits of the update are left out where a single step is judged.
        steps: the length of the chain in use.
        starts: initialiser -> state of ``n`` chains, a tensor ``(n, ...)`` or a dict of such; the first one is the
            start in use. The more they differ, the more R-hat can see.
        summaries: state -> {name: ``(n,)``}, the scalars that are followed. "energy" must be among them, here with all
            its terms; "agreement", 1 where all modalities show one class and 0 elsewhere, may be.
        nominal: the summaries that are class indices: how many chains keep theirs is counted.
        targets: how many laws there are; row ``i`` of every start samples law ``i % targets``, and chains are compared
            within a law.
        advance: how the chain moves, where not by ``sampler.sample(energy, ...)``: called as ``advance(state, steps,
            seed=, first_step=, chain_offset=)``, returning :class:`mmebm.samplers.Samples`.
        distance: a distance of a whole state to real data, such as Frechet's.
        floor: that distance of real data to itself, at the same ``n``.
    """

    name: str
    energy: Callable[[State], Tensor]
    sampler: Langevin
    steps: int
    starts: Mapping[str, State]
    summaries: Callable[[State], Mapping[str, Tensor]]
    nominal: tuple[str, ...] = ()
    targets: int = 1
    advance: Callable[..., Any] | None = None
    distance: Callable[[State], float] | None = None
    floor: float | None = None


def examine(
    subject: Subject,
    *,
    long: int = 2000,
    points: int = 100,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Follows the chain from each of its starts for ``long`` steps and judges it at both lengths.

    The chain as it is used is the beginning of the long one: noise is a function of the step.

    Args:
        subject: what to examine.
        long: steps of the long chain, at least ``subject.steps``.
        points: how often the states are looked at, at most, up to ``subject.steps`` and beyond.
        seed: of the noise.
        progress: called with a line of text after each start.

    Returns:
        ``horizons``: "trained" and "long", each with its ``steps``, the ``draws`` and ``chains`` used (of the second
        half of the steps), and per summary ``rhat`` across all starts (the median over the laws), ``rhat_worst``,
        ``rhat_within`` each start, ``ess_bulk``, ``ess_tail`` (medians over the laws; worth nothing beside a high
        R-hat), ``autocorrelation_time`` in steps, within chains (a lower bound in a window shorter than fifty of it),
        and ``unmoved``, the share of chains that never changed it; ``kept``: the share of chains that keep their class,
        and by chance. ``change``: how the summaries of the first start change, paired, with standard errors. ``step``:
        ``drift``, ``noise`` and their ``ratio`` per tensor of the state (root mean square over chains) at the start and
        the end of the trained chain, the implied ``temperature``, ``acceptance`` by temperature. ``curves``: means and
        standard errors of the summaries by step and start, distances; ``traces``: the energy of a few chains.
        ``broken``: share of chains per start that became non-finite. None stands for what is not finite: the R-hat of a
        summary with ``unmoved`` 1 is infinite, or one of equal values.

    Raises:
        TypeError, ValueError: for a length or number of points out of range, starts that differ in ``n`` or are no
            multiple of ``targets``, or no summary "energy".
    """
    check_count("subject.steps", subject.steps)
    check_count("points", points, least=MIN_DRAWS)
    check_count("long", long, least=subject.steps)
    n = _check_starts(subject)
    marks = [0, *_marks(0, subject.steps, points), *_marks(subject.steps, long, points)]
    apart = _logarithmic(marks, DISTANCES, {0, subject.steps, long}) if subject.distance is not None else set()
    curves: dict[str, Any] = {"step": marks, "mean": {}, "error": {}, "distance": {}}
    traces: dict[str, list[list[float | None]]] = {}
    broken, seconds, followed, step = {}, {}, {}, {}
    for index, (start, state) in enumerate(subject.starts.items()):
        began = time.perf_counter()
        rows, distances, bad = [], [], torch.zeros(n, dtype=torch.bool)
        for i, mark in enumerate(marks):
            if i:
                samples = (subject.advance or _plain(subject))(
                    state, mark - marks[i - 1], seed=seed, first_step=marks[i - 1], chain_offset=index * n
                )
                state, bad = samples.state, bad | samples.info["nonfinite"].cpu()
            with torch.no_grad():
                summaries = subject.summaries(state)
            if "energy" not in summaries:
                raise ValueError(f"subject.summaries must hold 'energy', got {list(summaries)}")
            rows.append(torch.stack([value.detach().double().reshape(n).cpu() for value in summaries.values()]))
            if subject.distance is not None and mark in apart:
                distances.append([mark, _number(subject.distance(state))])
            if index == 0 and mark in (0, subject.steps):
                step["start" if mark == 0 else "end"] = _drift_and_noise(subject, state, seed, mark)
                if mark == subject.steps:
                    step["acceptance"] = _acceptance(subject, state, seed, mark)
        followed[start] = torch.stack(rows)  # (marks, summaries, n)
        names = list(summaries)
        curves["mean"][start] = _series(names, followed[start].mean(2))
        curves["error"][start] = _series(names, followed[start].std(2) / math.sqrt(n))
        traces[start] = [_list(line) for line in followed[start][:, names.index("energy"), :TRACES].T]
        if distances:
            curves["distance"][start] = distances
        broken[start], seconds[start] = bad.double().mean().item(), time.perf_counter() - began
        if progress is not None:
            progress(f"{subject.name} from {start}: {long} steps of {n} chains, {seconds[start]:.1f} s")
    all_starts = torch.stack(list(followed.values()), 1)  # (marks, starts, summaries, n)
    horizons = {
        name: _horizon(subject, marks, end, {s: all_starts[:, :, j] for j, s in enumerate(names)})
        for name, end in (("trained", subject.steps), ("long", long))
    }
    return {
        "name": subject.name,
        "steps": subject.steps,
        "long": long,
        "chains": n,
        "targets": subject.targets,
        "starts": list(subject.starts),
        "horizons": horizons,
        "change": _changes(subject, marks, names, followed[next(iter(subject.starts))]),
        "step": {**step, "temperature": _temperature(subject.sampler)},
        "floor": subject.floor,
        "broken": broken,
        "seconds": seconds,
        "curves": curves,
        "traces": traces,
    }


def mixing(
    run: Run,
    classifiers: Classifiers | None = None,
    *,
    chains: int = 128,
    long: int = 2000,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Examines both chains of a run.

    Args:
        run: a run that has reached its joint stage.
        classifiers: the judges of classes, agreement and distance; without them these are left out.
        chains: per initialiser. The latent chain shares them out among posteriors of :data:`REPLICAS` chains each.
        long: steps of the long chains.
        seed: of starts and noise.
        progress: called with a line of text now and then.

    Returns:
        ``settings``, ``thresholds``, and under ``chains`` "data" and, where anything infers a latent, "latent", each as
        :func:`examine` gives it.

    Raises:
        ValueError: before the joint stage, when the energy has learned nothing; or for less than eight chains.
        TypeError: for numbers that are none.
    """
    if not run.joint_trained:
        raise ValueError("run has not reached its joint stage: there is no trained chain to examine")
    check_count("chains", chains, least=REPLICAS)
    both = {"data": data_subject(run, classifiers, chains=chains, seed=seed)} if run.revises else {}
    if run.infers:
        both["latent"] = latent_subject(run, classifiers, tuples=chains // REPLICAS, seed=seed)
    return {
        "settings": {**run.settings(), "seed": seed, "chains": chains, "long": long},
        "thresholds": THRESHOLDS,
        "chains": {
            name: examine(c, long=max(long, c.steps), seed=seed, progress=progress)
            for name, c in both.items()
            if c.steps
        },
    }


REPLICAS: Final = 8  # chains of one posterior from one initialiser
REAL: Final = 1000  # real tuples behind principal components and distances


def data_subject(run: Run, classifiers: Classifiers | None = None, *, chains: int = 128, seed: int = 0) -> Subject:
    """The chain on x under the joint energy, started as in use, at the generator, noise, real and shuffled tuples.

    Followed are the energy, the first two principal components of every modality (those of real data), and with
    ``classifiers`` the class of every modality and whether all agree.
    """
    system, test, train = run.system, run.unseen(), run.dataset("train")
    rng = torch.Generator().manual_seed(seed)
    real = train.batch(_some(train, REAL, rng))
    components = {name: _components(value) for name, value in real.items()}

    def rows() -> Tensor:
        whole = usable_rows(test, labelled=False)
        return whole[torch.randint(len(whole), (chains,), generator=rng)]

    # the run's own start, unless that is made of data, which is here anyway
    own = run.config.start.data
    first = [own] if own in ("noise", "independent", "buffer") else []
    names = dict.fromkeys([*first, "generator", "noise"])
    starts = {name: run.start(chains, seed=seed, name=name) for name in names}
    starts["data"] = test.batch(rows())
    starts["shuffled"] = {name: test.batch(rows())[name] for name in real}

    def summaries(x: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {"energy": system.energy(x)}
        for name, (mean, axes) in components.items():
            found |= {f"{name} pc{i + 1}": p for i, p in enumerate(((x[name].flatten(1) - mean) @ axes.T).unbind(1))}
        return found | _classes(classifiers, x)

    distance, floor = _distance(classifiers, real, test.batch(rows()))
    return Subject(
        name="data chain",
        energy=system.energy,
        sampler=system.data_sampler,
        steps=run.config.data_chain.steps,
        starts=starts,
        summaries=summaries,
        nominal=_nominal(classifiers),
        distance=distance,
        floor=floor,
        advance=lambda x, steps, **options: system.revise_data(x, steps=steps, **options),
    )


def latent_subject(
    run: Run, classifiers: Classifiers | None = None, *, tuples: int = 16, replicas: int = REPLICAS, seed: int = 0
) -> Subject:
    """The chain on z given all modalities of ``tuples`` test tuples, started at q(z | X), the prior, and N(0, 4).

    Each tuple has its own posterior, so chains are compared within it. Followed are the energy, |z|, two principal
    components of inferred z, the squared error of what z decodes to, and with ``classifiers`` its classes.
    """
    system, test, train = run.system, run.unseen(), run.dataset("train")
    rng = torch.Generator().manual_seed(seed)
    on_device = torch.Generator(system.device).manual_seed(seed)
    few = test.batch(_some(test, tuples, rng))
    tuples = len(next(iter(few.values())))
    x = {name: value.repeat(replicas, *[1] * (value.dim() - 1)) for name, value in few.items()}
    count = tuples * replicas
    with torch.no_grad():
        real = train.batch(_some(train, REAL, rng))
        mean, axes = _components(system.inference.sample(real, on_device))
        inferred = system.inference.sample(x, on_device)
    starts = {
        "inference": inferred,
        "prior": system.prior.draw(count, seed=seed, device=system.device),
        "wide": 2 * torch.randn(inferred.shape, generator=on_device, device=system.device),
    }

    def energy(z: Tensor) -> Tensor:
        return system.generator.negative_log_likelihood(x, z) + system.prior(z)

    def summaries(z: Tensor) -> dict[str, Tensor]:
        size = z.square().sum(1)
        found = {"energy": energy(z) + 0.5 * size, "|z|": size.sqrt()}
        found |= {f"z pc{i + 1}": p for i, p in enumerate(((z - mean) @ axes.T).unbind(1))}
        found["squared error"] = system.generator.squared_error(x, z)
        return found | _classes(classifiers, system.generator(z) if classifiers is not None else {})

    settings, noise = run.settings(), run.config.latent_chain.noise
    step = settings["latent_step"]
    return Subject(
        name="latent chain",
        energy=energy,
        steps=run.config.latent_chain.steps,
        starts=starts,
        summaries=summaries,
        sampler=Langevin(step**2 / 2, step if noise is None else noise, prior_std=1.0, on_nonfinite="freeze"),
        nominal=_nominal(classifiers),
        targets=tuples,
        advance=lambda z, steps, **options: system.revise_latent(z, x, steps=steps, **options),
    )


def _some(data: MultimodalDataset, count: int, rng: torch.Generator) -> Tensor:
    """``count`` rows of tuples that lack no modality (fewer where there are)."""
    whole = usable_rows(data, labelled=False)
    return whole[torch.randperm(len(whole), generator=rng)[:count]]


def _classes(classifiers: Classifiers | None, x: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if classifiers is None:
        return {}
    names = [m.name for m in classifiers.modalities]
    pred = classifiers.predict({name: x[name] for name in names})
    return {
        "agreement": (pred == pred[:, :1]).all(1).double(),
        **{f"class of {name}": column.double() for name, column in zip(names, pred.unbind(1), strict=True)},
    }


def _nominal(classifiers: Classifiers | None) -> tuple[str, ...]:
    return tuple(f"class of {m.name}" for m in classifiers.modalities) if classifiers is not None else ()


def _distance(
    classifiers: Classifiers | None, real: Mapping[str, Tensor], other: Mapping[str, Tensor]
) -> tuple[Callable[[State], float] | None, float | None]:
    """The mean Frechet distance over the judged modalities to ``real``, and that of ``other`` real tuples."""
    if classifiers is None or not classifiers.learned:
        return None, None
    names = classifiers.learned

    def features(x: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return classifiers.features({name: x[name] for name in names})

    true = features(real)

    def distance(x: Mapping[str, Tensor]) -> float:
        if any(not bool(x[name].isfinite().all()) for name in names):
            return math.nan
        found = features(x)
        return sum(frechet_distance(found[name], true[name]) for name in names) / len(names)

    return distance, distance(other)


def _components(value: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) and the first two principal directions (2, d), scaled to unit variance."""
    flat = value.detach().flatten(1)
    mean = flat.mean(0)
    _, scale, axes = torch.linalg.svd(flat - mean, full_matrices=False)
    return mean, axes[:2] / (scale[:2, None] / math.sqrt(len(flat) - 1)).clamp_min(1e-12)


def _check_starts(subject: Subject) -> int:
    if not subject.starts:
        raise ValueError("subject.starts must hold at least one initialiser, got none")
    counts = {name: {len(t) for t in _tensors(state).values()} for name, state in subject.starts.items()}
    sizes = set().union(*counts.values())
    if len(sizes) != 1:
        raise ValueError(f"subject.starts must all have as many chains, got {counts}")
    n = sizes.pop()
    if subject.targets < 1 or n < 1 or n % subject.targets:
        raise ValueError(f"subject.starts must have a multiple of targets={subject.targets} chains, got {n}")
    return n


def _plain(subject: Subject) -> Callable[..., Any]:
    return lambda state, steps, **options: subject.sampler.sample(subject.energy, state, steps, **options)


def _tensors(state: State) -> dict[str, Tensor]:
    return dict(state) if isinstance(state, Mapping) else {"state": state}


def _marks(begin: int, end: int, points: int) -> list[int]:
    """At most ``points`` steps in (begin, end], evenly spaced back from ``end``, which is one of them."""
    if end <= begin:
        return []
    stride = -(-(end - begin) // points)
    return list(range(end, begin, -stride))[::-1]


def _logarithmic(marks: Sequence[int], count: int, always: set[int]) -> set[int]:
    last = max(marks)
    wanted = [last ** (i / (count - 1)) for i in range(count)]
    return always | {min(marks, key=lambda m: abs(m - w)) for w in wanted}


def _horizon(subject: Subject, marks: Sequence[int], end: int, summaries: Mapping[str, Tensor]) -> dict[str, Any]:
    """R-hat and its kin over the evenly spaced marks of the second half of ``end`` steps.

    Args:
        summaries: name -> (marks, starts, n).
    """
    last = marks.index(end)
    stride = marks[last] - marks[last - 1]
    even = [last]
    while even[0] > 1 and marks[even[0]] - marks[even[0] - 1] == stride:
        even.insert(0, even[0] - 1)
    used = [i for i in even if marks[i] > end / 2]
    used = used if len(used) >= MIN_DRAWS else even[-MIN_DRAWS:]
    n = next(iter(summaries.values())).shape[2]
    head = {
        "steps": end,
        "from_step": marks[used[0]],
        "every": stride,
        "draws": len(used),
        "chains": n * len(subject.starts),
    }
    judged = {}
    for name, values in summaries.items():
        draws = values[used]
        judged[name] = {"unmoved": (draws == draws[:1]).all(0).double().mean().item()}
        if len(used) < MIN_DRAWS:
            continue
        laws = draws.reshape(len(used), len(subject.starts), -1, subject.targets)
        together = laws.flatten(1, 2)  # (draws, chains of one law, laws)
        r = rhat(together)
        within = rhat(laws.permute(0, 2, 3, 1)).nanmedian(0).values
        # each chain about its own mean: what ess counts as correlation, chains that disagree, is R-hat's matter
        tau = autocorrelation_time(together - together.mean(0)) * stride
        judged[name] |= {
            "rhat": _number(r.nanmedian()),
            "rhat_worst": _number(r.max()),
            "rhat_within": dict(zip(subject.starts, _list(within), strict=True)),
            "ess_bulk": _number(ess(together, method="bulk").nanmedian()),
            "ess_tail": _number(ess(together, method="tail").nanmedian()),
            "autocorrelation_time": _number(tau.nanmedian()),
        }
    kept = {name: _kept(subject, summaries[name][0], summaries[name][last]) for name in subject.nominal}
    return {**head, "summaries": judged, "kept": kept}


def _kept(subject: Subject, before: Tensor, after: Tensor) -> dict[str, dict[str, float]]:
    """Per start the share of chains with the class they began with, and what unrelated classes would give."""
    found = {}
    for start, a, b in zip(subject.starts, before, after, strict=True):
        classes = torch.unique(torch.cat([a, b]))
        shares = [(values == classes[:, None]).double().mean(1) for values in (a, b)]
        found[start] = {"kept": (a == b).double().mean().item(), "chance": (shares[0] * shares[1]).sum().item()}
    return found


def _changes(subject: Subject, marks: Sequence[int], names: Sequence[str], rows: Tensor) -> dict[str, Any]:
    """How the summaries of the first start change, up to the trained length and beyond: paired, per chain.

    Args:
        rows: (marks, summaries, n).
    """
    at = {"start": 0, "trained": marks.index(subject.steps), "long": len(marks) - 1}
    found: dict[str, Any] = {}
    for j, name in enumerate(names):
        if name in subject.nominal:
            continue
        values = {label: rows[i, j] for label, i in at.items()}
        found[name] = {label: _number(v.mean()) for label, v in values.items()}
        for label, (a, b) in {"revision": ("start", "trained"), "beyond": ("trained", "long")}.items():
            off = values[b] - values[a]
            found[name] |= {label: _number(off.mean()), f"{label}_error": _number(off.std() / math.sqrt(len(off)))}
    return found


def _free(sampler: Langevin) -> Langevin:
    """The step without what confines it, which is then a Gaussian of the state."""
    return sampler.replace(
        bounds=None,
        bounds_at="step",
        outside="clamp",
        clamp_noise=False,
        max_update=None,
        project=None,
        finish=None,
        accept=None,
        on_nonfinite="ignore",
    )


def _drift_and_noise(subject: Subject, state: State, seed: int, at: int) -> dict[str, dict[str, float | None]]:
    """Of the very next step, taken with and without its noise: root mean squares over chains of the l2 norms."""
    free = _free(subject.sampler)
    still = free.replace(noise_scale=0.0, temperature=1.0)
    noisy, calm = (_tensors(s.sample(subject.energy, state, 1, seed=seed, first_step=at).state) for s in (free, still))
    found = {}
    for key, before in _tensors(state).items():
        drift, noise = (
            (a - b).detach().double().flatten(1).square().sum(1).mean().sqrt().item()
            for a, b in ((calm[key], before), (noisy[key], calm[key]))
        )
        ratio = _number(noise / drift) if drift else None
        found[key] = {"drift": _number(drift), "noise": _number(noise), "ratio": ratio}
    return found


def _temperature(sampler: Langevin) -> Any:
    t = sampler.implied_temperature
    return {key: _number(v) for key, v in t.items()} if isinstance(t, Mapping) else _number(t)


def _acceptance(subject: Subject, state: State, seed: int, at: int) -> dict[str, Any]:
    """Mean acceptance of a Metropolis test of the next step, at temperature 1 and at the implied one."""
    implied = _temperature(subject.sampler)
    values = set(implied.values()) if isinstance(implied, dict) else {implied}
    free, temperatures = _free(subject.sampler), {"1": 1.0}
    if len(values) == 1 and (only := values.pop()) and abs(only - 1) > 1e-6:
        temperatures["implied"] = only
    found: dict[str, Any] = {}
    for name, t in temperatures.items():
        try:
            accepted = mala_acceptance(subject.energy, state, free, temperature=t, seed=seed, first_step=at)
        except (TypeError, ValueError) as error:  # a step that is no Gaussian, e.g. with noise before the gradient
            return {"reason": str(error)}
        found[name] = _number(accepted.double().mean())
    return found


def _number(value: Any) -> float | None:
    """Six digits, which is more than any of these numbers has; None for inf and NaN, which JSON does not know."""
    value = float(value)
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _list(values: Tensor) -> list[float | None]:
    return [_number(v) for v in values.tolist()]


def _series(names: Sequence[str], values: Tensor) -> dict[str, list[float | None]]:
    """(marks, summaries) by name."""
    return {name: _list(column) for name, column in zip(names, values.unbind(1), strict=True)}
