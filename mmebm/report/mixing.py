"""What the numbers of :mod:`mmebm.evaluation.mixing` mean, in sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmebm.evaluation.mixing import THRESHOLDS

__all__ = ["sentences"]


def sentences(result: Mapping[str, Any]) -> list[str]:
    """What the numbers of :func:`~mmebm.evaluation.mixing.examine` mean, in sentences; the first is the conclusion."""
    trained, long = (result["horizons"][name] for name in ("trained", "long"))
    steps, far = result["steps"], result["long"]
    limit, nearly = THRESHOLDS["rhat"], THRESHOLDS["rhat_nearly"]
    where = "across initialisers" if len(result["starts"]) > 1 else "across chains of a single initialiser"
    first, second = _worst(trained), _worst(long)
    said = []
    if first is None:
        said.append(f"{steps} steps are too few draws for R-hat.")
    elif first[0] <= limit["at_most"]:
        fewest, least = _fewest(trained), THRESHOLDS["ess"]
        few = fewest is not None and fewest < least["at_least"]
        worth = f", but they are worth only {fewest:.0f} independent draws ({least['at_least']} or more: "
        said.append(
            f"R-hat {first[0]:.3f} {where} (at most {limit['at_most']}: {limit['source']}): the chain forgets its "
            f"start within {steps} steps{worth + least['source'] + ')' if few else ''}."
        )
    elif first[0] <= nearly["at_most"]:
        said.append(
            f"R-hat {first[0]:.3f} {where} ({first[1]}; {limit['at_most']} would do: {limit['source']}): the chain has "
            f"nearly forgotten its start within {steps} steps."
        )
    else:
        said.append(
            f"R-hat {first[0]:.1f} {where} ({first[1]}; {limit['at_most']} would do: {limit['source']}): the chain "
            f"does not forget its start within {steps} steps; it is a revision, not a sampler of the energy."
        )
    if far > steps and second is not None:
        still = first is None or first[0] > limit["at_most"]
        if second[0] <= limit["at_most"]:
            said.append(f"After {far} steps R-hat is {second[0]:.3f}: such chains have forgotten their start.")
        elif second[0] <= nearly["at_most"]:
            said.append(f"After {far} steps R-hat is {second[0]:.3f} ({second[1]}): nearly mixed.")
        else:
            who = "even such chains" if still else "such chains"
            said.append(f"After {far} steps R-hat is {second[0]:.1f} ({second[1]}): {who} have not mixed.")
    said += _change_sentences(result)
    own = {name.removeprefix("class of "): kept[result["starts"][0]] for name, kept in trained["kept"].items()}
    if own:
        each = ", ".join(f"{name} {row['kept']:.0%} ({row['chance']:.0%})" for name, row in own.items())
        said.append(f"Chains from {result['starts'][0]} that end with the class they began with (by chance): {each}.")
    said += _step_sentences(result["step"])
    lost = {start: share for start, share in result["broken"].items() if share}
    if lost:
        said.append("Chains that became inf or NaN: " + ", ".join(f"{v:.1%} from {s}" for s, v in lost.items()) + ".")
    return said


def _worst(horizon: Mapping[str, Any]) -> tuple[float, str] | None:
    """The largest R-hat and its summary."""
    return max(
        ((row["rhat"], name) for name, row in horizon["summaries"].items() if row.get("rhat") is not None), default=None
    )


def _fewest(horizon: Mapping[str, Any]) -> float | None:
    sizes = (row.get(kind) for row in horizon["summaries"].values() for kind in ("ess_bulk", "ess_tail"))
    return min((size for size in sizes if size is not None), default=None)


def _change_sentences(result: Mapping[str, Any]) -> list[str]:
    """Is the chain making modalities agree, or only sharpening? Paired differences of the chains in use."""
    change, start, steps = result["change"], result["starts"][0], result["steps"]
    errors = THRESHOLDS["change"]["standard_errors"]

    def moved(row: Mapping[str, Any], label: str) -> bool:
        value, error = row[label], row[f"{label}_error"]
        return value is not None and error is not None and abs(value) > errors * error

    def words(row: Mapping[str, Any], a: str, b: str) -> str:
        return f"{row[a]:.4g} to {row[b]:.4g}"

    said, energy, agreement = [], change["energy"], change.get("agreement")
    if energy["revision"] is None:
        return said
    falls = moved(energy, "revision") and energy["revision"] < 0
    text = f"From {start}, {steps} steps change the energy from {words(energy, 'start', 'trained')}"
    if agreement is None:
        said.append(f"{text}.")
    elif not moved(agreement, "revision"):
        # of a chain on the modalities themselves; one on their latent does something else
        on_data = len(result["step"]["start"]) > 1
        meaning = ": it sharpens, and does not make the modalities agree more" if falls and on_data else ""
        said.append(
            f"{text} and agreement from {words(agreement, 'start', 'trained')}, within {errors} standard errors"
            f"{meaning}."
        )
    else:
        meaning = "it makes modalities agree" if agreement["revision"] > 0 else "it costs agreement"
        said.append(f"{text} and agreement from {words(agreement, 'start', 'trained')}: {meaning}.")
    if result["long"] > steps and energy["beyond"] is not None:
        far, drifts = result["long"], []
        if moved(energy, "beyond"):
            drifts.append(f"energy {words(energy, 'trained', 'long')}")
        if agreement is not None and moved(agreement, "beyond"):
            drifts.append(f"agreement {words(agreement, 'trained', 'long')}")
        distance = dict(result["curves"]["distance"].get(start, ()))
        if distance.get(steps) is not None and distance.get(far) is not None:
            drifts.append(f"distance to real data {distance[steps]:.3g} to {distance[far]:.3g}")
        beyond = f"From step {steps} to {far}"
        said.append(
            f"{beyond}: {', '.join(drifts)}."
            if drifts
            else f"{beyond} nothing drifts by more than {errors} standard errors."
        )
    return said


def _step_sentences(step: Mapping[str, Any]) -> list[str]:
    said, t = [], step["temperature"]
    ratios = {key: row["ratio"] for key, row in step["end"].items() if row["ratio"] is not None}
    ratio = ", ".join(f"{v:.2g} ({key})" if len(ratios) > 1 else f"{v:.2g}" for key, v in ratios.items())
    if isinstance(t, dict):
        size = ", ".join(f"{v:.2g} ({key})" for key, v in t.items() if v is not None)
        cold = all(v is not None and v < 0.1 for v in t.values())
    else:
        size, cold = ("unknown" if t is None else f"{t:.2g}"), t is not None and t < 0.1
    said.append(
        f"Noise over drift of a step: {ratio or 'no drift'}; implied temperature {size}"
        f"{': the chain minimises rather than samples' if cold else ''}."
    )
    accepted = step["acceptance"]
    if "reason" in accepted:
        return [*said, f"Acceptance of the step is not known: {accepted['reason']}."]
    least = THRESHOLDS["acceptance"]["at_least"]
    parts = [
        f"{v:.2f} at temperature {name if name == '1' else f'{size} (implied)'}"
        for name, v in accepted.items()
        if v is not None
    ]
    at = accepted.get("1")
    tail = "" if at is None or at >= least else f"; below {least} the unadjusted step distorts the law of temperature 1"
    said.append(f"A Metropolis test would accept a step with probability {' and '.join(parts)}{tail}.")
    return said
