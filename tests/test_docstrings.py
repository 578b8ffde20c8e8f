"""The docstrings of the public names: every one has an example, which runs, and says what its arguments are."""

from __future__ import annotations

import doctest
import inspect
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import mmebm
from mmebm import samplers

# Modules and names whose documentation is pages of their own (docs/), and a version, an error.
ELSEWHERE = {"BackendError", "Model", "__version__", "diagnostics", "from_pretrained", "load", "noise", "presets"}
MODULES = (samplers.capture, samplers.initial, samplers.schedules)
# What a buffer is used by stands in the example of the class.
OF_CLASS = {"ReplayBuffer", "Samples", "Carry"}


def public() -> Iterator[tuple[str, Any]]:
    names = {*mmebm.__all__, *samplers.__all__} - ELSEWHERE
    for name in sorted(names):
        item = getattr(mmebm, name, None) or getattr(samplers, name)
        if item in MODULES:
            yield from ((f"{name}.{part}", getattr(item, part)) for part in item.__all__ if part[0] != "_")
        else:
            yield name, item


def documented() -> Iterator[tuple[str, Any]]:
    """Functions and classes, and what classes of this package define for their users."""
    for name, item in public():
        if not callable(item) or name == "capture.GraphInfo":
            continue
        yield name, item
        if inspect.isclass(item) and name not in OF_CLASS and not name.startswith("schedules."):
            for base in item.__mro__:
                if base.__module__.startswith("mmebm"):
                    members = {part: value for part, value in vars(base).items() if part[0] != "_"}
                    yield from (
                        (f"{name}.{part}", value)
                        for part, value in members.items()
                        if inspect.isfunction(value) or isinstance(value, (property, classmethod))
                    )


ITEMS = {name: item for name, item in documented()}


@pytest.mark.parametrize("name", ITEMS)
def test_the_example_runs(name: str) -> None:
    # of a class its own text alone: its methods stand beside it
    text = inspect.getdoc(ITEMS[name])
    assert text is not None and ">>> " in text, "has no example"
    test = doctest.DocTestParser().get_doctest(text, {"mmebm": mmebm, "torch": torch}, name, None, 0)
    said: list[str] = []
    torch.manual_seed(0)
    failed, _ = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test, out=said.append)
    assert not failed, "".join(said)


def arguments(text: str) -> set[str]:
    """The names before the colons under "Args:" and "Other args:"."""
    sections = re.findall(r"^ *(?:Args|Other args):\n((?:(?: {4,}.*)?\n)+)", text + "\n", re.MULTILINE)
    lines = [line for section in sections for line in section.splitlines() if line.strip()]
    indent = min((len(line) - len(line.lstrip()) for line in lines), default=0)
    heads = [re.match(rf" {{{indent}}}(\w[\w, ]*(?: to \w+)?): ", line) for line in lines]
    return {name.strip() for head in heads if head for name in re.split(",| to ", head.group(1))}


@pytest.mark.parametrize(
    "name", [n for n, item in ITEMS.items() if inspect.isclass(item) or n.endswith((".sample", ".step"))]
)
def test_every_argument_is_described(name: str) -> None:
    item = ITEMS[name]
    given = {p for p in inspect.signature(item).parameters if p != "self"}
    if name.startswith("schedules."):
        pytest.skip("its formula names them")
    known = arguments(inspect.getdoc(item) or "")
    if name.endswith(".sample") and name != "Langevin.sample":  # "what is not named here is as in Langevin.sample"
        known |= arguments(inspect.getdoc(mmebm.Langevin.sample) or "")
    if item is mmebm.Samples or item is samplers.Carry:  # made by us: their attributes
        return
    assert given <= known, sorted(given - known)
