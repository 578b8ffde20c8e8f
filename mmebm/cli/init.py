"""``mmebm init``: looks at data of one's own, says how it reads it, and writes what ``mmebm train`` needs."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from mmebm.data import intake
from mmebm.files import write_atomically


def init(arguments: argparse.Namespace) -> int:
    """Runs the command. A folder with arrays by split gets its ``meta.json``; from other files arrays are made, in a
    folder of their own. The configuration file lies in the current folder."""
    source = Path(arguments.source)
    if not 0 < arguments.test < 1:
        raise ValueError(f"--test is the share of tuples to test on, in (0, 1), got {arguments.test:g}")
    if arguments.size is not None and not 4 <= arguments.size <= 1024:
        raise ValueError(f"--size is the side of square images, 4 to 1024, got {arguments.size}")
    ready = source.is_dir() and intake.has_splits(source)
    parts: list[intake.Part] = []
    skipped: list[str] = []
    folder = source if ready else Path(arguments.out or f"{source.resolve().name}-arrays")
    settings = Path(f"{source.resolve().name}.toml")
    taken = [path for path in (folder / "meta.json", settings) if path.exists()]
    if taken and not arguments.force:
        raise ValueError(f"{taken[0]} is there already: --force writes it anew")
    if not ready and (stranger := intake.in_the_way(folder, force=arguments.force)) is not None:
        raise ValueError(
            f"{stranger} is there already, and no earlier init wrote it: move it away, or choose another --out"
        )
    if ready:
        if arguments.out is not None or arguments.size is not None:
            raise ValueError(
                f"{source} holds arrays by split already, which are read where they are: leave out --out and --size"
            )
        arrays, classes = intake.splits_of(source), intake.named_classes(source)
    else:
        parts, skipped = intake.collect(source, arguments.size)
        arrays = intake.split_rows(parts, folder, test=arguments.test, seed=arguments.seed)
        classes = intake.labelled_classes(parts)
    sources = {part.name: part.source for part in parts} or {name: f"{folder}, {name}" for name in arrays["train"]}
    meta, said = intake.describe(arrays, classes, sources)
    if ready:
        intake.write_meta(folder, meta)
    else:
        intake.write(folder, arrays, meta)
    quoted = shlex.quote(str(settings))
    text = (
        f"# mmebm train --config {quoted} --dry-run checks it; without --dry-run it trains. What is not here is\n"
        f"# as in the preset: mmebm train --config {quoted} --print-config shows all of it\n"
        f'preset = "base"\n\n[data]\nname = "folder"\npath = "{folder.as_posix()}"\n'
    )
    write_atomically(settings, lambda file: file.write(text.encode()))
    counts = {split: len(next(iter(of.values()))) for split, of in arrays.items()}
    print(f"{folder}: {counts['train']} tuples to train on, {counts['test']} to test")
    for name, words in said.items():
        print(f"  {name}: {words}")
    if classes:
        print(f"  labels: {', '.join(classes[:8])}")
    by_row = [part.name for part in parts if not part.keys]
    named = next((part for part in parts if part.keys), None)
    if named is not None and by_row:
        print(f"paired by row, and not by name: {', '.join(by_row)}; their first row is that of {named.keys[0]!r}")
    for by in sorted({part.key for part in parts} - {""}):
        print(f"{', '.join(part.name for part in parts if part.key == by)}: paired by the column {by!r}")
    if skipped:
        print(f"not read: {', '.join(skipped[:8])}{', ...' if len(skipped) > 8 else ''}")
    print(f"{folder / 'meta.json'} says so; change it where it is wrong, before training.")
    print(f"next: mmebm train --config {quoted} --dry-run")
    arguments.result = {"folder": str(folder), "config": str(settings), "modalities": said, **counts}
    return 0
