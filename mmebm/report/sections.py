"""What a run's page says, section by section, and what it says is missing.

A section returns its content, or None where there is nothing to show; what a reader may miss is told at the top.
Numbers come from the files that training and evaluation left, so that the page and they agree; pictures are drawn anew.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from mmebm import __version__
from mmebm.evaluation import figures
from mmebm.evaluation.heldout import summary
from mmebm.evaluation.neighbours import Neighbours
from mmebm.files import write_atomically
from mmebm.report import pictures
from mmebm.report.glossary import glossary
from mmebm.report.mixing import sentences
from mmebm.report.page import Html, details, document, element, figure, join, number, table, tree, with_error
from mmebm.report.verdict import Verdict, judge
from mmebm.training.run import CHECKPOINT, Run

__all__ = ["write_report"]

MIXING: Final = "mixing.json"
METRICS: Final = "metrics.json"
TEST_METRICS: Final = "metrics-test.json"
LOG: Final = "log.jsonl"
CONFIG: Final = "config.json"

# Keys of a point's numbers as a reader knows them; all others keep their own name.
NAMES: Final = {
    "joint_coherence": "joint coherence",
    "chance_joint": "by chance",
    "pair_agreement": "pair agreement",
    "chance_pair": "by chance, pairs",
    "entropy": "lowest class entropy",
    "frechet": "Frechet distance",
    "kernel": "kernel distance",
    "bound": "bound, nats",
    "mse": "reconstruction error",
    "cross_mse": "from the others",
    "retrieval": "found, among first 5",
    "chance": "found by chance",
    "class_share_min": "rarest class",
    "class_share_max": "commonest class",
    "second_joint_coherence": "by the second judge",
    "kernel_features": "kernel distance of features",
    "spread_min": "least spread",
    "nearest": "nearest training tuple",
}
SHOWN: Final = {
    "classifiers",
    "conditional",
    "floor",
    "heldout",
    "points",
    "second_judge",
    "seconds",
    "settings",
    "skipped",
    "split",
    "sweep",
    "test",
    "training",
}
HELD: Final = {"vae": "VAE after the warm-up", "x0": "trained networks"}  # of whose numbers of held-out tuples


# Curves that are looked at when something else is wrong.
SIDE: Final = {
    "peak_memory_mib",
    "frozen_chains",
    "revision_mse",
    "latent_size",
    "latent_step",
    "generator_real",
    "generator_revised",
    "inference_real",
    "inference_revised",
    "energy_real",
    "energy_revised",
    "gap_start",
}


@dataclass
class Opened:
    """What is known of a run; ``missing`` grows while the page is written."""

    path: Path
    run: Run | None
    info: dict[str, Any]
    log: list[dict[str, Any]]
    metrics: dict[str, Any] | None
    mixing: dict[str, Any] | None
    drawings: Path
    seed: int
    on_test: dict[str, Any] | None = None  # numbers, where the run was evaluated on test too
    missing: list[str] = field(default_factory=list)
    neighbours: Neighbours | None = None  # None without the data too
    compared: dict[str, Any] | None = None

    @property
    def iteration(self) -> int:
        """How far training is."""
        if self.run is not None:
            return int(self.run.content["iteration"])
        return max((row.get("iteration", 0) for row in self.log), default=0)

    @property
    def total(self) -> int:
        """How far it was meant to go; 0 where that is not known."""
        return sum(stage["iterations"] for stage in self.stages)

    @property
    def verdict(self) -> Verdict:
        return judge(
            iteration=self.iteration,
            total=self.total,
            metrics=self.metrics,
            mixing=self.mixing,
            log=self.log,
            stages=self.stages,
            compared=self.compared,
        )

    @property
    def stages(self) -> list[dict[str, Any]]:
        """The configured stages that have iterations."""
        return [s for s in self.info.get("config", {}).get("stages", ()) if s.get("iterations")]


def write_report(
    folder: Path | str,
    run: Run | None = None,
    *,
    mixing: Mapping[str, Any] | None = None,
    seed: int = 0,
    out: Path | str | None = None,
) -> Path:
    """Writes the page of a run, whatever of it there is by now.

    Args:
        folder: the run's folder: config.json, log.jsonl, metrics.json and mixing.json are read where they are.
        run: its networks, for the pictures; None for a run without a checkpoint.
        mixing: what :func:`mmebm.evaluation.mixing.mixing` returned, instead of mixing.json.
        seed: of the pictures.
        out: where to write; ``folder``/report.html unless given.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: where ``folder`` holds nothing of a run.
        ValueError: where one of its files is not JSON.
        ImportError: without matplotlib.
    """
    folder = Path(folder)
    with tempfile.TemporaryDirectory() as drawings:
        text = _page(opened(folder, run, Path(drawings), mixing=mixing, seed=seed))
    path = Path(out) if out is not None else folder / "report.html"
    write_atomically(path, lambda file: file.write(text.encode()))
    return path


def opened(
    folder: Path, run: Run | None, drawings: Path, *, mixing: Mapping[str, Any] | None = None, seed: int = 0
) -> Opened:
    """What is known of a run, with its samples compared with its data where that can be read.

    Raises:
        FileNotFoundError, ValueError: as :func:`write_report`.
    """
    if run is None and not any((folder / name).is_file() for name in (CONFIG, LOG, METRICS)):
        raise FileNotFoundError(f"no run in {folder}: `mmebm train` leaves {CONFIG}, {LOG} and {CHECKPOINT} there")
    of = Opened(
        path=folder,
        run=run,
        info=_json(folder / CONFIG) or {},
        log=_log(folder / LOG),
        metrics=_json(folder / METRICS),
        on_test=_json(folder / TEST_METRICS),
        drawings=drawings,
        seed=seed,
        mixing=dict(mixing) if mixing is not None else _json(folder / MIXING),
    )
    if run is not None:
        of.info["config"] = json.loads(run.config.to_json())
        try:
            run.unseen()
            of.neighbours = Neighbours(run.dataset("train"), seed=seed)
            of.compared = pictures.compared(run, of.neighbours, seed=seed)
        except (OSError, ValueError, ImportError) as error:
            of.missing.append(
                f"real tuples, nearest training tuples, the latent chain, completions and paths: the "
                f"data cannot be read ({error})"
            )
    return of


def _page(of: Opened) -> str:
    sections: list[tuple[str, str, Callable[[Opened], Html | None]]] = [
        ("numbers", "Numbers", _numbers),
        ("test", "Numbers on the test split", _on_test),
        ("samples", "Samples", _samples),
        ("chains", "Chains, step by step", _revisions),
        ("conditional", "Given some modalities", _conditional),
        ("paths", "Through the latent", _paths),
        ("steps", "What more steps buy", _sweep),
        ("mixing", "Do the chains mix?", _mixing),
        ("training", "Training", _training),
        ("more", "All other numbers", _more),
        ("seconds", "Seconds", _seconds),
        ("configuration", "Configuration", _configuration),
        ("versions", "Versions and data", _versions),
    ]
    _say_missing(of)
    written = [(name, heading, content) for name, heading, write in sections if (content := write(of)) is not None]
    if (terms := glossary("".join(content for _, _, content in written))) is not None:
        written.append(("glossary", "Glossary", terms))
    config = of.info.get("config", {})
    lead = [element("p", _progress(of), class_="lead"), *_judged(of)]
    if of.missing:
        lead.append(
            element("div", "Not on this page:", element("ul", *(element("li", m) for m in of.missing)), class_="note")
        )
    name = of.path.resolve().name
    title = f"{name}: {config['preset']} on {config.get('data', {}).get('name', '?')}" if "preset" in config else name
    return document(title, join(*lead), written)


def _progress(of: Opened) -> str:
    at, total = of.iteration, of.total
    state = "finished" if total and at >= total else "not finished" if total else "unknown length"
    commit = f", commit {of.info['commit']}" if of.info.get("commit") else ""
    seed = f", seed {of.info['seed']}" if "seed" in of.info else ""
    return f"Iteration {at} of {total or '?'} ({state}){seed}{commit}"


def _judged(of: Opened) -> list[Html]:
    """The verdict, and the rules that it follows from."""
    verdict = of.verdict
    said = {None: "–", True: "yes", False: "no"}
    rows = [(rule.name, rule.asks, rule.found, said[rule.holds]) for rule in verdict.rules]
    text = element("p", element("strong", verdict.word.capitalize() + "."), " ", verdict.text, class_="verdict")
    return [text, details("The rules of this verdict", table(("rule", "asks that", "found", "holds"), rows))]


def _say_missing(of: Opened) -> None:
    if of.run is None:
        of.missing.append(f"every picture of samples: there is no {CHECKPOINT} yet")
    elif not of.run.joint_trained:
        of.missing.append("samples after joint training, and both chains: only the warm-up has run")
    if of.metrics is None:
        of.missing.append(f"numbers: there is no {METRICS} yet; `mmebm evaluate {of.path}` writes it")
    if not of.log:
        of.missing.append(f"training curves: there is no {LOG}, or it is empty")
    if not of.info.get("versions"):
        of.missing.append(f"versions and commit: there is no {CONFIG}")
    if of.mixing is None:
        of.missing.append(f"whether the chains mix: `mmebm report {of.path} --mixing` finds out")


def _numbers(of: Opened) -> Html | None:
    if of.metrics is None:
        return None
    m, parts = of.metrics, []
    settings = m.get("settings", {})
    if of.run is not None and settings.get("iteration", of.run.content["iteration"]) != of.run.content["iteration"]:
        parts.append(
            element(
                "p",
                f"Measured at iteration {settings['iteration']}; the checkpoint is at {of.run.content['iteration']}.",
                class_="note",
            )
        )
    parts += _told(m)
    points = {name: row for name, row in m.get("points", {}).items() if isinstance(row, Mapping)}
    if points:
        parts += _points_and_real(points, m)
    parts.append(_held(m.get("heldout")))
    if isinstance(m.get("skipped"), Mapping):
        parts += [element("h3", "Not measured"), tree(m["skipped"])]
    completed = {name: row for name, row in m.get("conditional", {}).items() if isinstance(row, Mapping)}
    given = {name: row["by_given"] for name, row in completed.items() if isinstance(row.get("by_given"), Mapping)}
    if given:
        sizes = list(dict.fromkeys(size for row in given.values() for size in row))
        parts += [
            element("h3", "Conditional coherence, by the number of given modalities"),
            table(["", *sizes], [[name, *(row.get(size) for size in sizes)] for name, row in given.items()]),
        ]
    if completed:
        parts.append(details("By subset, by class, and the rest", tree(completed)))
    nested = {name: {k: v for k, v in row.items() if isinstance(v, (Mapping, list))} for name, row in points.items()}
    if any(nested.values()):
        parts.append(details("Every point in full: by class, by modality, by network", tree(nested)))
    return join(*parts) if parts else None


def kernel_of(row: Mapping[str, Any]) -> dict[str, float]:
    """The kernel distance of whole tuples among a point's numbers, and its error, as they stand in a table."""
    joint = row["kernel"].get("joint") if isinstance(row.get("kernel"), Mapping) else None
    return {"kernel": joint["value"], "kernel_error": joint["error"]} if isinstance(joint, Mapping) else {}


def _by_modality(kernels: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    return {
        point: {
            key: value
            for name, found in kernel.get("by_modality", {}).items()
            for key, value in ((name, found["value"]), (f"{name}_error", found["error"]))
        }
        for point, kernel in kernels.items()
    }


def heldout_of(of: Mapping[str, Any]) -> dict[str, float]:
    """What held-out tuples say of a model, a number of each kind, as they stand in a table."""
    out = {key: value for key, value in summary(of).items() if key != "kernel"}
    if "bound_error" in of:
        out["bound_error"] = of["bound_error"]
    if "retrieval" in of:
        out |= {"retrieval_error": of["retrieval"].get("error", 0.0), "chance": of["retrieval"]["chance"]}
    return out


def _held(heldout: Any) -> Html | None:
    """The numbers of tuples that training never saw, by networks and split."""
    rows = {
        f"{HELD.get(name, name)}, {split}": {**heldout_of(of), "n": of.get("n")}
        for name, splits in (heldout.items() if isinstance(heldout, Mapping) else ())
        for split, of in splits.items()
        if isinstance(of, Mapping)
    }
    if not rows:
        return None
    text = (
        "Errors are mean squares in units of [-1, 1], averaged over modalities: decoded from a z inferred from all of "
        "them, and from all others. Found: given one modality, another one of the tuple."
    )
    return join(element("h3", "Held-out tuples"), _points(rows), element("p", text, class_="lead"))


def _on_test(of: Opened) -> Html | None:
    m = of.on_test or {}
    points = {name: row for name, row in m.get("points", {}).items() if isinstance(row, Mapping)}
    return join(*_told(m), *_points_and_real(points, m)) if points else None


def _told(m: Mapping[str, Any]) -> list[Html]:
    """On what the numbers are, and how often that was used where it should be used once."""
    if "split" not in m:
        return []
    times = m.get("test", {}).get("evaluated")
    used = f", which was evaluated {times} {'time' if times == 1 else 'times'}" if times else ""
    return [element("p", f"Measured on the {m['split']} split{used}.", class_="lead" if times in (None, 1) else "note")]


def _points_and_real(points: Mapping[str, Mapping[str, Any]], m: Mapping[str, Any]) -> list[Html]:
    """A row for each point, for real tuples against others, and for training tuples; and how good the judges are."""
    rows = dict(points)
    for name, key in (("real against real", "floor"), ("training tuples", "training")):
        if isinstance(m.get(key), Mapping):
            rows[name] = m[key]
    kernels = {name: row["kernel"] for name, row in rows.items() if isinstance(row.get("kernel"), Mapping)}
    for name, row in rows.items():
        second = row.get("second_judge")
        if isinstance(second, Mapping):
            keys = ("joint_coherence", "joint_coherence_error")
            rows[name] = {**row, **{f"second_{key}": second[key] for key in keys if key in second}}
    parts = [_points({name: {**row, **kernel_of(row)} for name, row in rows.items()})]
    if len(next(iter(kernels.values()), {}).get("by_modality", ())) > 1:
        parts += [element("h3", "Kernel distance to real tuples, by modality"), _points(_by_modality(kernels))]
    second = m.get("second_judge")
    for what, accuracy in (
        ("Judged by the project's classifiers, accuracy", m.get("classifiers")),
        ("The second judge", second.get("accuracy") if isinstance(second, Mapping) else None),
    ):
        if accuracy:
            each = ", ".join(f"{name} {number(share)}" for name, share in accuracy.items())
            parts.append(element("p", f"{what}: {each}.", class_="lead"))
    return parts


def _points(points: Mapping[str, Mapping[str, Any]], corner: str = "") -> Html:
    """One row per point; an error joins its value, and the class shares are a range."""
    single = (k for row in points.values() for k, v in row.items() if not isinstance(v, (Mapping, list)))
    names = list(dict.fromkeys(single))
    shares = {"class_share_min", "class_share_max"} <= set(names)
    hidden = {f"{name}_error" for name in names} | ({"class_share_min", "class_share_max"} if shares else set())
    kept = sorted((name for name in names if name not in hidden), key=lambda name: name == "n")

    def value(row: Mapping[str, Any], name: str) -> Any:
        value, error = row.get(name), row.get(f"{name}_error")
        if not isinstance(value, (int, float)) or not isinstance(error, (int, float)):
            return value
        return with_error(value, error)

    def share(value: Any) -> str:
        return f"{value:.2g}" if isinstance(value, (int, float)) else number(value)

    head = [corner, *(NAMES.get(name, name) for name in kept), *(["class shares"] if shares else [])]
    rows = []
    for point, row in points.items():
        ends = [f"{share(row.get('class_share_min'))} to {share(row.get('class_share_max'))}"] if shares else []
        rows.append([pictures.TITLES.get(point, point), *(value(row, name) for name in kept), *ends])
    return table(head, rows)


def _samples(of: Opened) -> Html | None:
    if of.run is None:
        return None
    path = pictures.samples(of.run, of.drawings / "samples.png", neighbours=of.neighbours, seed=of.seed)
    caption = "A column is one sample of the joint model; all points from one seed."
    if of.neighbours is not None:
        caption += f" Nearest of {len(of.neighbours.rows)} training tuples. Real tuples belong to no column."
    if any(m.kind == "vector" for m in of.run.modalities):
        caption += " Every dimension of a vector has a colour scale of its own, the same in the whole picture."
    return figure(path, "joint samples at each point", caption)


def _revisions(of: Opened) -> Html | None:
    if of.run is None or not of.run.joint_trained:
        return None
    drawn = pictures.revisions(of.run, of.drawings, data=of.neighbours is not None, seed=of.seed)
    parts = [join(element("h3", name), figure(path, name, caption)) for name, (path, caption) in drawn.items()]
    return join(*parts) if parts else None


def _conditional(of: Opened) -> Html | None:
    path = of.run and of.neighbours and pictures.completions(of.run, of.drawings / "conditional.png", seed=of.seed)
    caption = "Test tuples: what is given, and the others by each way to complete them. A column is one tuple."
    return figure(path, "completions", caption) if path else None


def _paths(of: Opened) -> Html | None:
    path = of.run and of.neighbours and pictures.interpolations(of.run, of.drawings / "paths.png", seed=of.seed)
    caption = "Decoded on the way from one test tuple's latent to another's; the ends are reconstructions."
    return figure(path, "latent paths", caption) if path else None


def _rows(value: Any) -> dict[str, list[Mapping[str, Any]]]:
    """The series of a sweep: name -> rows with "steps", whether there is one list or one for each point."""
    named = value if isinstance(value, Mapping) else {"": value}
    return {
        str(name): rows
        for name, rows in named.items()
        if isinstance(rows, list) and rows and all(isinstance(row, Mapping) and "steps" in row for row in rows)
    }


def _sweep(of: Opened) -> Html | None:
    series = _rows((of.metrics or {}).get("sweep"))
    if not series:
        return None
    parts = []
    every = [row for rows in series.values() for row in rows]
    first = ("joint_coherence", "frechet", "kernel")
    wanted = [name for name in first if all(isinstance(row.get(name), (int, float)) for row in every)]
    try:
        path = figures.sweep(series, of.drawings / "sweep.png", quantities=wanted or None)
        caption = "The data chain at test time, stopped after each number of steps."
        parts.append(figure(path, "metrics against steps and seconds", caption))
    except ValueError:  # rows of something else than numbers: the table has them
        pass
    for name, rows in series.items():
        by_steps = {number(row["steps"]): {k: v for k, v in row.items() if k != "steps"} for row in rows}
        parts += [element("h3", pictures.TITLES.get(name, name)) if name else None, _points(by_steps, "steps")]
    return join(*parts)


def columns_of(log: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """The numbers of a log by name, NaN where a row has none; nothing where no row has one."""
    rows = [row for row in log if "rolled_back" not in row]
    names = dict.fromkeys(name for row in rows for name, value in row.items() if isinstance(value, float))
    if not names:
        return {}
    logged = {name: [row.get(name) for row in rows] for name in ("iteration", *names)}
    return {
        name: [float(v) if isinstance(v, (int, float)) else math.nan for v in values] for name, values in logged.items()
    }


def _training(of: Opened) -> Html | None:
    columns = columns_of(of.log)
    if not columns:
        return None
    rows = [row for row in of.log if "rolled_back" not in row]
    begins, total = {}, 0
    for index, stage in enumerate(of.stages, start=1):
        begins[f"{index} {stage['kind']}"] = float(total)
        total += stage["iterations"]
    main = {name: values for name, values in columns.items() if name not in SIDE}
    parts = []
    caption = "Each over the stages in which it is logged; lines end where a stage does, and where nothing was logged."
    if len(main) > 1:
        path = figures.curves(main, of.drawings / "curves.png", stages=begins)
        parts.append(figure(path, "training curves", caption))
    side = {name: values for name, values in columns.items() if name in SIDE}
    if side:
        path = figures.curves({"iteration": columns["iteration"], **side}, of.drawings / "side.png", stages=begins)
        parts.append(details(f"{len(side)} more curves", figure(path, "more training curves")))
    events = [(row.get("iteration"), f"rolled back: {row['rolled_back']}") for row in of.log if "rolled_back" in row]
    events += [(row.get("iteration"), f"warning: {row['alarm']}") for row in rows if "alarm" in row]
    if events:
        parts += [element("h3", "Events"), table(("iteration", "what"), sorted(events, key=lambda e: e[0] or 0))]
    return join(*parts)


def _mixing(of: Opened) -> Html | None:
    if of.mixing is None:
        return None
    parts = []
    at = of.mixing.get("settings", {}).get("iteration")
    if of.run is not None and at is not None and at != of.run.content["iteration"]:
        parts.append(
            element(
                "p",
                f"Examined at iteration {at}; the checkpoint is at {of.run.content['iteration']}. "
                f"--mixing examines it again.",
                class_="note",
            )
        )
    for name, chain in of.mixing.get("chains", {}).items():
        parts += [element("h3", chain["name"].capitalize()), _chain(of, name, chain)]
    sources = {name: {k: v for k, v in row.items()} for name, row in of.mixing.get("thresholds", {}).items()}
    if sources:
        parts.append(details("Thresholds and where they come from", tree(sources)))
    return join(*parts)


def _chain(of: Opened, name: str, chain: Mapping[str, Any]) -> Html:
    curves, marks = chain["curves"], {"trained": chain["steps"]}
    parts: list[Any] = [element("ul", *(element("li", sentence) for sentence in sentences(chain)))]
    starts = chain["starts"]
    followed = list(curves["mean"][starts[0]])
    # a class is a name and not a size: its mean over chains says nothing
    shown = [q for q in followed if not q.startswith("class of ")]
    by = {kind: {q: {s: curves[kind][s][q] for s in starts} for q in shown} for kind in ("mean", "error")}
    path = figures.lines(
        by["mean"],
        of.drawings / f"mixing-{name}.png",
        x=curves["step"],
        errors=by["error"],
        marks=marks,
        logarithmic=True,
    )
    caption = "Means over the chains of each initialiser, with two standard errors. Chains of one law must meet."
    parts.append(figure(path, f"{chain['name']}: summaries by step", caption))
    path = of.drawings / f"traces-{name}.png"
    figures.traces(chain["traces"], curves["step"], path, marks=marks, logarithmic=True)
    parts.append(figure(path, f"{chain['name']}: traces", "The energy of a few single chains, by initialiser."))
    if curves["distance"]:
        steps = sorted({step for rows in curves["distance"].values() for step, _ in rows})
        rows = [
            [start, *(dict(map(tuple, curves["distance"][start])).get(step) for step in steps)]
            for start in starts
            if start in curves["distance"]
        ]
        text = f"Of {chain['chains']} chains each, so biased upwards for all alike."
        if chain.get("floor") is not None:
            text += f" As many real tuples have {number(chain['floor'])}."
        parts += [
            element("h4", "Frechet distance to real data, by step"),
            table(["", *steps], rows),
            element("p", text, class_="lead"),
        ]
    for label, horizon in chain["horizons"].items():
        if label == "long" and horizon["steps"] == chain["steps"]:
            continue
        parts += _horizon(label, horizon, several=chain["targets"] > 1)
    rest = {key: chain[key] for key in ("step", "change", "broken") if key in chain}
    kept = {
        f"{label}, {q}": {s: f"{number(row['kept'])} ({number(row['chance'])})" for s, row in rows.items()}
        for label, horizon in chain["horizons"].items()
        for q, rows in horizon["kept"].items()
    }
    if kept:
        parts.append(details("Chains that keep their class (by chance)", tree(kept)))
    parts.append(details("Noise, drift, acceptance and changes", tree(rest)))
    return join(*parts)


def _horizon(label: str, horizon: Mapping[str, Any], *, several: bool) -> list[Any]:
    window = horizon["steps"] - horizon["from_step"]
    head = (
        "",
        "R-hat",
        *(["worst law"] if several else []),
        "bulk ESS",
        "tail ESS",
        "autocorrelation time, steps",
        "never changed",
    )
    rows = []
    for name, row in horizon["summaries"].items():
        tau = row.get("autocorrelation_time")
        # a window of fewer than fifty autocorrelation times cannot tell how long they are
        tau = f"≥ {number(tau)}" if tau is not None and 50 * tau > window else tau
        worst = [row.get("rhat_worst")] if several else []
        rows.append(
            [name, row.get("rhat"), *worst, row.get("ess_bulk"), row.get("ess_tail"), tau, f"{row['unmoved']:.0%}"]
        )
    title = f"After {horizon['steps']} steps ({'as trained' if label == 'trained' else 'beyond training'})"
    text = (
        f"{horizon['chains']} chains of all initialisers, {horizon['draws']} draws each, from step "
        f"{horizon['from_step']} on, every {horizon['every']}. Effective sizes mean nothing beside a high R-hat; a "
        f"dash is an R-hat that is infinite, or of equal values."
    )
    return [element("h4", title), table(head, rows), element("p", text, class_="lead")]


def _more(of: Opened) -> Html | None:
    """Every key of metrics.json that no other section knows."""
    rest = {key: value for key, value in (of.metrics or {}).items() if key not in SHOWN}
    sweep = (of.metrics or {}).get("sweep")
    if sweep is not None and not _rows(sweep):
        rest["sweep"] = sweep
    if not rest:
        return None
    return join(*(join(element("h3", key), tree(value, 4)) for key, value in rest.items()))


def _seconds(of: Opened) -> Html | None:
    parts = []
    if isinstance((of.metrics or {}).get("seconds"), Mapping):
        parts.append(tree((of.metrics or {})["seconds"]))
    by_stage: dict[str, list[float]] = {}
    for row in of.log:
        if isinstance(row.get("seconds_per_iteration"), (int, float)):
            by_stage.setdefault(str(row.get("stage", "?")), []).append(row["seconds_per_iteration"])
    if by_stage:
        rows = [(stage, statistics.median(values)) for stage, values in by_stage.items()]
        parts.append(table(("stage", "seconds per iteration, median"), rows))
    return join(*parts) if parts else None


def _configuration(of: Opened) -> Html | None:
    parts = []
    if of.info.get("config"):
        parts.append(details("The whole configuration", tree(of.info["config"])))
    if (of.metrics or {}).get("settings"):
        parts.append(details("Settings of the evaluation", tree((of.metrics or {})["settings"])))
    return join(*parts) if parts else None


def _versions(of: Opened) -> Html:
    info = {key: value for key, value in of.info.items() if key not in ("config", "data", "presets")}
    parts = [tree({**info, "this page": f"mmebm {__version__}"})]
    if of.info.get("data"):
        parts.append(details("Data", tree(of.info["data"])))
    return join(*parts)


def _json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(value).__name__}")
    return value


def _log(path: Path) -> list[dict[str, Any]]:
    """The rows of the log; the last line may be half written while training goes on."""
    if not path.is_file():
        return []
    lines: Sequence[str] = path.read_text(encoding="utf-8").splitlines()
    rows = []
    for i, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if i < len(lines) - 1:
                raise ValueError(f"{path}, line {i + 1} is not JSON: {error}") from error
    return [row for row in rows if isinstance(row, dict)]
