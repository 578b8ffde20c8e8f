"""What a run is worth, in one word and one paragraph, by rules that the page states beside it.

The limits are conventions of this page; each rule says its own. A rule whose numbers are not there judges nothing.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from mmebm.evaluation.heldout import TOP
from mmebm.report.page import number, with_error

__all__ = ["Rule", "Verdict", "heldout_by", "judge"]

EVEN: Final = 0.8  # of the real tuples' class entropy
RARE: Final = 0.2  # of the rarest real class
SPREAD: Final = 0.5
COPIES: Final = 0.5
GOOD, FAIR = 0.8, 0.5  # of the way from chance to real tuples
SETTLED: Final = 0.02
WORSE: Final = 0.05  # of held-out tuples' error, beyond which training has gone on too long
RHAT: Final = 1.1
VALID: Final = "valid_mse"  # the log's name of the reconstruction error of the validation's tuples
POINTS: Final = {
    "vae": "the VAE",
    "frozen": "the frozen VAE's chain",
    "x0": "the generator",
    "xk": "data-space Langevin",
}


@dataclass(frozen=True)
class Rule:
    """One rule: what it asks for, what was found, and whether that holds (None: not measured)."""

    name: str
    asks: str
    found: str = "not measured"
    holds: bool | None = None


@dataclass(frozen=True)
class Verdict:
    """``word`` for a table, ``text`` as a paragraph, and the rules it follows from."""

    word: str
    text: str
    rules: tuple[Rule, ...]


def judge(
    *,
    iteration: int,
    total: int,
    metrics: Mapping[str, Any] | None = None,
    mixing: Mapping[str, Any] | None = None,
    log: Sequence[Mapping[str, Any]] = (),
    stages: Sequence[Mapping[str, Any]] = (),
    compared: Mapping[str, Any] | None = None,
) -> Verdict:
    """Judges a run by what its folder holds.

    Args:
        iteration, total: how far training is, and how far it was meant to go.
        metrics: of metrics.json.
        mixing: of mixing.json.
        log: the rows of log.jsonl.
        stages: of the configuration, those with iterations.
        compared: samples beside training tuples (:meth:`mmebm.evaluation.neighbours.Neighbours.compare`).
    """
    points = {name: row for name, row in (metrics or {}).get("points", {}).items() if isinstance(row, Mapping)}
    last = next((name for name in ("xk", "x0", "frozen", "vae") if name in points), None)
    row: Mapping[str, Any] = points.get(last, {}) if last is not None else {}
    real = (metrics or {}).get("floor")
    real = real if isinstance(real, Mapping) else {}
    finished = total > 0 and iteration >= total
    heldout = heldout_by(metrics or {})
    rules = [
        Rule("finished", "training has reached its last iteration", f"{iteration} of {total or '?'}", finished),
        _settled(log, stages),
        _overfits(log, stages),
        _classes(row, real),
        _spread(compared),
        _copies(compared),
        _coherence(row, real),
        _related(heldout),
        _mixes(mixing),
    ]
    by = {rule.name: rule for rule in rules}
    share, related = _share(row, real), by["related"].holds
    word = next(
        (
            word
            for word, holds in (
                ("not finished", not finished),
                ("collapsed", by["classes"].holds is False or by["spread"].holds is False),
                ("copies", by["copies"].holds is False),
                ("overfitted", by["overfits"].holds is False),
                ("not converged", by["settled"].holds is False),
                ("not judged", share is None and related is None),
                ("related", share is None and related is True),
                ("good", share is not None and share >= GOOD),
                ("fair", share is not None and share >= FAIR),
            )
            if holds
        ),
        "poor",
    )
    said = [
        _opening(word, by, share),
        _samples_said(last, row, real),
        _heldout_said(heldout, row, real),
        _langevin_said(points),
        _compared_said(compared),
        _mixing_said(by["mixing"]),
    ]
    events = sum("rolled_back" in entry for entry in log), sum("alarm" in entry for entry in log)
    if any(events):
        said.append(f"Training was rolled back {events[0]} times and warned {events[1]} times.")
    return Verdict(word, " ".join(filter(None, said)), tuple(rules))


def _is_number(*values: Any) -> bool:
    return all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)


def _share(row: Mapping[str, Any], real: Mapping[str, Any]) -> float | None:
    """How far joint coherence is on the way from chance to that of real tuples."""
    joint, chance, most = row.get("joint_coherence"), row.get("chance_joint"), real.get("joint_coherence", 1.0)
    if joint is None or chance is None or most <= chance:
        return None
    return (joint - chance) / (most - chance)


def _fifths(
    key: str, log: Sequence[Mapping[str, Any]], stages: Sequence[Mapping[str, Any]]
) -> list[tuple[float, float]]:
    """Mean and squared standard error of each fifth of what the last stage that logs ``key`` logged of it; none where
    a fifth is less than three numbers."""
    rows = [entry for entry in log if _is_number(entry.get(key), entry.get("iteration"))]
    begins, at = [], 0
    for stage in stages:
        begins.append(at)
        at += stage["iterations"]
    if rows and begins:
        begin = max(b for b in begins if b < rows[-1]["iteration"] or b == 0)
        rows = [entry for entry in rows if entry["iteration"] > begin]
    part = len(rows) // 5
    if part < 3:
        return []
    values = [float(entry[key]) for entry in rows[-5 * part :]]
    fifths = [values[i * part : (i + 1) * part] for i in range(5)]
    return [(statistics.fmean(fifth), statistics.variance(fifth) / part) for fifth in fifths]


def _settled(log: Sequence[Mapping[str, Any]], stages: Sequence[Mapping[str, Any]]) -> Rule:
    asks = (
        "the reconstruction error no longer falls, of the validation's tuples where it was logged often enough, else "
        f"of those trained on: in the last fifth of the last stage that logs it, by less than {SETTLED:.0%} or two "
        "standard errors against the fifth before"
    )
    held = _fifths(VALID, log, stages)
    fifths = held or _fifths("mse", log, stages)
    if not fifths:
        return Rule("settled", asks)
    (a, before), (b, after) = fifths[-2:]
    fell = (a - b) / a if a > 0 else 0.0
    found = (
        f"{'fell' if fell >= 0 else 'rose'} by {abs(fell):.1%}, from {number(a)} to {number(b)}"
        f"{' (validation)' if held else ''}"
    )
    return Rule("settled", asks, found, not (fell > SETTLED and a - b > 2 * (before + after) ** 0.5))


def _overfits(log: Sequence[Mapping[str, Any]], stages: Sequence[Mapping[str, Any]]) -> Rule:
    asks = (
        "the reconstruction error of the validation's tuples in the last fifth of the last stage is at most "
        f"{WORSE:.0%} or two standard errors above that of the best fifth"
    )
    fifths = _fifths(VALID, log, stages)
    if not fifths:
        return Rule("overfits", asks)
    (best, least), (last, error) = min(fifths), fifths[-1]
    rose = (last - best) / best if best > 0 else 0.0
    found = f"{number(last)}, {rose:.1%} above the best fifth's {number(best)}"
    return Rule("overfits", asks, found, not (rose > WORSE and last - best > 2 * (least + error) ** 0.5))


def heldout_by(metrics: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """What held-out tuples say of the last networks: of the validation where there was one, else of the test split, so
    that runs can be chosen by a verdict without looking at the tuples that they are compared on."""
    found = metrics.get("heldout")
    found = found if isinstance(found, Mapping) else {}
    of = next((found[name] for name in ("x0", "vae") if isinstance(found.get(name), Mapping)), {})
    for split in ("validation", "test"):
        if isinstance(of.get(split), Mapping) and of[split]:
            return split, of[split]
    return "", {}


def _related(heldout: tuple[str, Mapping[str, Any]]) -> Rule:
    asks = (
        f"of held-out tuples a modality is found among the first {TOP} given another one, more often than by chance by "
        "two standard errors over the tuples"
    )
    split, of = heldout
    found = of.get("retrieval")
    if not isinstance(found, Mapping) or not _is_number(*(found.get(key) for key in ("top", "error", "chance"))):
        return Rule("related", asks)
    top, error, chance = found["top"], found["error"], found["chance"]
    said = f"{_percent(top, error)} of {of.get('n', '?')} ({split}), by chance {_percent(chance)}"
    return Rule("related", asks, said, top - chance > 2 * error)


def _classes(row: Mapping[str, Any], real: Mapping[str, Any]) -> Rule:
    asks = (
        f"the classes of the samples: their entropy is at least {EVEN:g} of that of real tuples, and the rarest "
        f"has at least {RARE:g} of the share of the rarest real one"
    )
    entropy, least = row.get("entropy"), row.get("class_share_min")
    if not _is_number(entropy, least):
        return Rule("classes", asks)
    classes = len(row.get("joint_coherence_by_class", ())) or None
    real_entropy = real.get("entropy", 1.0)
    real_least = real.get("class_share_min", 1 / classes if classes else 0.0)
    holds = entropy >= EVEN * real_entropy and least >= RARE * real_least
    found = f"entropy {number(entropy)} of {number(real_entropy)}, rarest {number(least)} of {number(real_least)}"
    return Rule("classes", asks, found, holds)


def _spread(compared: Mapping[str, Any] | None) -> Rule:
    asks = f"in every modality the samples spread at least {SPREAD:g} times as far as training tuples"
    if not compared or not compared.get("spread"):
        return Rule("spread", asks)
    name, least = min(compared["spread"].items(), key=lambda item: item[1])
    return Rule("spread", asks, f"{number(least)} times at least ({name})", least >= SPREAD)


def _copies(compared: Mapping[str, Any] | None) -> Rule:
    asks = (
        f"the nearest training tuple of a sample is at least {COPIES:g} times as far as that of a test tuple (medians)"
    )
    if not compared or compared.get("nearest") is None:
        return Rule("copies", asks)
    return Rule("copies", asks, f"{number(compared['nearest'])} times as far", compared["nearest"] >= COPIES)


def _coherence(row: Mapping[str, Any], real: Mapping[str, Any]) -> Rule:
    asks = (
        f"joint coherence lies at least {GOOD:.0%} of the way from chance to real tuples: good; at least "
        f"{FAIR:.0%}: fair"
    )
    share = _share(row, real)
    return Rule("coherence", asks) if share is None else Rule("coherence", asks, f"{share:.0%}", share >= GOOD)


def _mixes(mixing: Mapping[str, Any] | None) -> Rule:
    asks = f"the chains of a run forget their start within their trained steps: R-hat at most {RHAT:g}"
    worst: dict[str, float] = {}
    for chain in (mixing or {}).get("chains", {}).values():
        found = [row.get("rhat") for row in chain.get("horizons", {}).get("trained", {}).get("summaries", {}).values()]
        numbers = [value for value in found if _is_number(value)]
        if numbers:
            worst[chain["name"]] = max(numbers)
    if not worst:
        return Rule("mixing", asks)
    return Rule(
        "mixing", asks, ", ".join(f"{name} {value:.2f}" for name, value in worst.items()), max(worst.values()) <= RHAT
    )


def _opening(word: str, by: Mapping[str, Rule], share: float | None) -> str:
    return {
        "not finished": f"Training has not finished: iteration {by['finished'].found}.",
        "collapsed": "The samples have collapsed: some of what the data holds is missing from them or nearly so.",
        "copies": "The samples are close to copies of training tuples.",
        "not converged": f"Training had not converged when it ended: the reconstruction error {by['settled'].found} "
        "over the last fifth of its stage. More iterations would improve it.",
        "overfitted": "Training has gone on for too long: the reconstruction error of held-out tuples is "
        f"{by['overfits'].found}. checkpoint.best keeps the best state.",
        "not judged": "Nothing says whether the modalities of a sample belong together: that needs numbers of held-out "
        "tuples, or labels, by `mmebm evaluate`. The samples themselves must tell.",
        "related": "The model knows which values of the modalities belong together. How often those of a sample do, "
        "only labels or a look at the samples can tell.",
        "good": "The samples are good: their modalities agree nearly as often as those of real tuples.",
        "fair": "The samples are fair: their modalities agree well beyond chance, and not as often as real ones.",
        "poor": "The samples are poor: their modalities agree too seldom."
        if share is not None
        else "The model is poor: it shows no sign of knowing which values of the modalities belong together.",
    }[word]


def _percent(value: float, error: Any = None) -> str:
    return f"{100 * value:.1f}" + (f" ± {100 * error:.1f}" if _is_number(error) else "") + " %"


def _samples_said(last: str | None, row: Mapping[str, Any], real: Mapping[str, Any]) -> str:
    joint = row.get("joint_coherence")
    if last is None or not _is_number(joint):
        return ""
    share = _percent(float(joint or 0), row.get("joint_coherence_error"))
    said = f"Of {row.get('n', '?')} samples of {POINTS.get(last, last)}, {share} show one class in all modalities"
    if _is_number(row.get("chance_joint")):
        said += f"; by chance it would be {_percent(row['chance_joint'])}"
    if _is_number(real.get("joint_coherence")):
        said += f", and of real tuples it is {_percent(real['joint_coherence'])}"
    if _is_number(row.get("class_share_min"), row.get("class_share_max")):
        said += f". Class shares go from {_percent(row['class_share_min'])} to {_percent(row['class_share_max'])}"
    return said + "."


def _heldout_said(heldout: tuple[str, Mapping[str, Any]], row: Mapping[str, Any], real: Mapping[str, Any]) -> str:
    """What is known without labels: how held-out tuples are found, and how far samples are from real tuples."""
    (split, of), said = heldout, []
    found = of.get("retrieval")
    if isinstance(found, Mapping) and _is_number(found.get("top"), found.get("chance")):
        said.append(
            f"Of {of.get('n', 'the')} held-out tuples ({split}) a modality is among the first {TOP} that another one "
            f"points to for {_percent(found['top'], found.get('error'))}; by chance it would be "
            f"{_percent(found['chance'])}."
        )
    far, floor = (each.get("kernel", {}).get("joint", {}) for each in (row, real))
    if _is_number(far.get("value"), far.get("error"), floor.get("value"), floor.get("error")):
        apart = far["value"] - floor["value"] > 2 * math.hypot(far["error"], floor["error"])
        said.append(
            f"By their kernel distance {row.get('n', 'the')} samples can {'' if apart else 'not '}be told from as many "
            f"real tuples ({with_error(far['value'], far['error'])}; between real ones "
            f"{with_error(floor['value'], floor['error'])})."
        )
    return " ".join(said)


def _langevin_said(points: Mapping[str, Mapping[str, Any]]) -> str:
    before, after = points.get("x0", {}), points.get("xk", {})
    said = []
    if _is_number(before.get("joint_coherence"), after.get("joint_coherence")):
        change = after["joint_coherence"] - before["joint_coherence"]
        error = math.hypot(*(row.get("joint_coherence_error") or 0.0 for row in (before, after)))
        text = (
            f"changes joint coherence by {100 * change:+.1f}" + (f" ± {100 * error:.1f}" if error else "") + " points"
        )
        told = abs(change) <= 2 * error
        said.append(text + (" (less than two standard errors)" if told else ""))
    if _is_number(before.get("frechet"), after.get("frechet")):
        said.append(f"takes the Frechet distance from {number(before['frechet'])} to {number(after['frechet'])}")
    return f"Data-space Langevin {' and '.join(said)}." if said else ""


def _compared_said(compared: Mapping[str, Any] | None) -> str:
    if not compared or compared.get("nearest") is None or not compared.get("spread"):
        return ""
    name, least = min(compared["spread"].items(), key=lambda item: item[1])
    far = number(round(compared["nearest"], 2))
    return (
        f"A sample is {far} times as far from its nearest training tuple as a test tuple is, and the samples "
        f"spread {number(round(least, 2))} times as far as training tuples at least ({name})."
    )


def _mixing_said(rule: Rule) -> str:
    if rule.holds is None:
        return ""
    return (
        f"The chains forget their start (R-hat: {rule.found})."
        if rule.holds
        else f"Not every chain forgets its start within its trained steps (R-hat: {rule.found}): it revises what it "
        "starts from."
    )
