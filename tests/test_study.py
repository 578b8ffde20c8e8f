"""The study's README: every number in its tables is in the JSON that the table names, to the digits printed; tables
without one say so."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest

STUDY = Path(__file__).resolve().parents[1] / "benchmarks" / "study"
POINTS = {"x_k": "xk", "xk": "xk", "x0": "x0", "vae": "vae"}
NUMBER = r"[-+]?\d*\.?\d+"
VALUE = re.compile(rf"({NUMBER})(?:\s*±\s*({NUMBER}))?")
KEYS = {
    "joint coherence": "joint_coherence",
    "by the second judge": "second_joint_coherence",
    "least class share": "class_share_min",
    "Frechet distance": "frechet",
    "kernel distance": "kernel_features",
    "precision": "precision",
    "recall": "recall",
    "least spread": "spread_min",
    "nearest": "nearest",
}


class Table(NamedTuple):
    record: str | None  # the files named, or None where it is not on record
    head: list[str]
    rows: list[list[str]]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def tables(text: str) -> list[Table]:
    """Every table, with the line above it that says where its numbers are."""
    found, lines = [], text.splitlines()
    for at, line in enumerate(lines):
        if not (line.startswith("|") and at + 1 < len(lines) and re.fullmatch(r"[|\s:-]+", lines[at + 1])):
            continue
        end = at + 2
        while end < len(lines) and lines[end].startswith("|"):
            end += 1
        above = next(line for line in reversed(lines[:at]) if line.strip())
        assert above.startswith(("Record: ", "Not on record")), f"the table at line {at + 1} names no record: {above!r}"
        record = above if above.startswith("Record: ") else None
        found.append(Table(record, cells(line), [cells(row) for row in lines[at + 2 : end]]))
    return found


def rows_of(files: list[str]) -> dict[tuple[str, str], dict[str, Any]]:
    """(variant, point) -> its numbers by name, as [mean, spread], of both formats; what comes first stays."""
    out: dict[tuple[str, str], dict[str, Any]] = {}
    for file in files:
        content = json.loads((STUDY / file).read_text(encoding="utf-8"))
        for row in content["rows"] if isinstance(content, dict) else content:
            numbers = row.get("numbers", row)
            plain = {k: [v["mean"], v["interval"]] if isinstance(v, dict) else v for k, v in numbers.items()}
            out.setdefault((row["variant"], row["point"]), plain)
    return out


def asked(heading: str, point: str | None) -> tuple[str | None, str | None]:
    """The number's name that a heading stands for (or "given N"), and the point that it is of."""
    at = re.fullmatch(r"(?:conditional, )?given (\d)", heading)
    if at:
        return f"given {at[1]}", point
    of = re.fullmatch(r"(?:(.*) )?of (x0|x_k)", heading)
    if of:
        key = KEYS.get(of[1] or "", "joint_coherence" if (of[1] or "coherence") == "coherence" else None)
        return key, POINTS[of[2]]
    return KEYS.get(heading), point


def values(found: dict[tuple[str, str], dict[str, Any]], variant: str, heading: str, point: str | None) -> list[Any]:
    key, at = asked(heading, point)
    points = [p for v, p in found if v == variant]
    assert points and key is not None, (variant, heading, sorted({v for v, _ in found}))
    at = at or points[-1]
    if not key.startswith("given"):
        return found[variant, at][key]
    # of the last point by its last way to complete; of the start of the chain as decoded
    ways = [k for k in found[variant, points[-1]] if k.endswith(f", {key[-1]} given") and "second judge" not in k]
    way = ways[-1] if at == points[-1] else next(k for k in ways if k.startswith("A"))
    return found[variant, points[-1]][way]


def told(text: str) -> tuple[float, float | None, float]:
    """A printed number, what stands after its ±, and half of its last digit."""
    match = VALUE.match(text)
    assert match, text
    digits = len(match[1].partition(".")[2])
    return float(match[1]), float(match[2]) if match[2] else None, 0.5 * 10**-digits


def check(table: Table) -> int:
    """Compares every number of a table with its record; how many there were."""
    assert table.record is not None
    found = rows_of(re.findall(r"\]\(([^)]+\.json)\)", table.record))
    count = 0
    for row in table.rows:
        names = re.findall(r"`([^`]+)`", row[0])
        assert names, row[0]
        point = next((POINTS[p] for p in re.findall(r"`: (x_k|x0)\b", row[0])), None)
        for heading, cell in zip(table.head[1:], row[1:], strict=True):
            parts = [re.sub(r"\(.*?\)", "", part).replace("*", "").strip() for part in cell.split(" / ")]
            if not any(parts):
                continue
            assert len(parts) == len(names), (row[0], cell)
            for name, part in zip(names, parts, strict=True):
                mean, spread, half = told(part)
                own = values(found, name, heading, point)
                assert abs(mean - own[0]) <= half + 1e-9, (name, heading, part, own)
                if spread is not None:
                    assert own[1] is not None and abs(spread - own[1]) <= half + 1e-9, (name, heading, part, own)
                count += 1
    return count


def test_every_table_is_on_record_or_says_that_it_is_not() -> None:
    found = tables((STUDY / "README.md").read_text(encoding="utf-8"))
    checked = [check(table) for table in found if table.record]
    assert len(found) >= 5 and sum(checked) >= 90 and min(checked) > 0


@pytest.mark.parametrize("old, new", [("**.716 ± .023**", "**.717 ± .023**"), ("± 0.5 |", "± 0.4 |")])
def test_another_digit_is_found(old: str, new: str) -> None:
    text = (STUDY / "README.md").read_text(encoding="utf-8")
    assert old in text
    with pytest.raises(AssertionError):
        for table in tables(text.replace(old, new)):
            if table.record:
                check(table)


def test_a_table_that_says_nothing_is_found() -> None:
    with pytest.raises(AssertionError, match="names no record"):
        tables("Some text.\n\n| a | b |\n|---|---|\n| 1 | 2 |\n")


@pytest.mark.parametrize("file", sorted(STUDY.rglob("*.json")), ids=lambda file: str(file.relative_to(STUDY)))
def test_a_table_in_markdown_is_that_of_its_json(file: Path) -> None:
    """What mmebm ablate wrote beside each other; the files of 0.1.0 have rows of another form and no such check."""
    content = json.loads(file.read_text(encoding="utf-8"))
    assert not any(isinstance(value, float) and math.isinf(value) for value in _leaves(content))
    if isinstance(content, dict) and "rows" in content and file.with_suffix(".md").is_file():
        from mmebm.cli.ablate import table

        assert file.with_suffix(".md").read_text(encoding="utf-8") == table(content)


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in _leaves(item)]
    return [leaf for item in value for leaf in _leaves(item)] if isinstance(value, list) else [value]
