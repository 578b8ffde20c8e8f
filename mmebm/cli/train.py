"""``mmebm train``: trains, keeps a log and a checkpoint, then evaluates and draws."""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from mmebm import __version__
from mmebm.cli.common import peak_memory, pick_device
from mmebm.cli.evaluate import report
from mmebm.cli.progress import Progress
from mmebm.files import FolderLock, check_writable, new_folder, unwritable, write_atomically
from mmebm.training import PRESETS, Config, Trainer, checkpoint, parallel, preset
from mmebm.training.config import override
from mmebm.training.run import CHECKPOINT, LOG, Run, keep_codec, load_data, read_log

SAVE_EVERY_SECONDS = 30.0


def configure(
    name: str, *, data: str | None = None, data_path: str | None = None, seed: int | None = None,
    threads: int | None = None, changes: Sequence[str] = (),
) -> Config:  # fmt: skip
    """The preset ``name`` with what the command line changes; ``changes`` are FIELD=VALUE."""
    fields = {"data.name": data, "data.path": data_path, "seed": seed, "threads": threads}
    texts = {field: json.dumps(value) for field, value in fields.items() if value is not None}
    for item in changes:
        field, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"--set takes FIELD=VALUE, got {item!r}")
        texts[field] = value
    return override(preset(name), texts)


@contextlib.contextmanager
def _folder(runs: Path, name: str | None, default: str) -> Iterator[Path]:
    """The folder of a new run, which is this process's alone while it trains."""
    if name is None:
        with new_folder(runs, default) as folder:
            yield folder
        return
    with FolderLock(runs / name) as lock:
        if any(path.exists() for path in (runs / name / CHECKPOINT, checkpoint.previous(runs / name / CHECKPOINT))):
            raise ValueError(f"{lock.folder} holds a run already: give another --name, or --resume {lock.folder}")
        yield lock.folder


@contextlib.contextmanager
def _resumed(folder: Path) -> Iterator[Path]:
    """The folder of a run to go on with, which nobody else trains meanwhile."""
    if not folder.is_dir():
        checkpoint.load(folder / CHECKPOINT)  # says that there is none
    with FolderLock(folder):
        yield folder


def _commit() -> str:
    """The commit of the source tree, with "+" where it has changes; "" outside a repository."""
    root = Path(__file__).resolve().parents[2]
    try:

        def git(*words: str) -> str:
            return subprocess.run(
                ("git", "-C", str(root), *words), capture_output=True, text=True, check=True, timeout=10
            ).stdout.strip()

        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def _write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))


class _Log:
    """``log.jsonl``, one row per line, and TensorBoard where it is installed."""

    def __init__(self, folder: Path, iteration: int, rollbacks: int) -> None:
        """Goes on behind the rows that a run at ``iteration`` had written."""
        self.path = folder / LOG
        rows, back = [], 0
        for row in read_log(folder) if iteration else []:
            back += "rolled_back" in row
            if row["iteration"] > iteration or back > rollbacks:
                break
            rows.append(row)
        _write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        self.file = self.path.open("a", encoding="utf-8")
        self.board: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=iteration + 1)

    def write(self, row: dict[str, Any]) -> None:
        try:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        except OSError as error:
            raise unwritable(self.path, error) from error
        if self.board is not None:
            for name, value in row.items():
                if isinstance(value, float):
                    self.board.add_scalar(f"{row['stage']}/{name}", value, row["iteration"])

    def close(self) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()


def train(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    device = pick_device(arguments.device)
    config = None
    if arguments.resume is not None:
        given = [f"--{name}" for name in ("preset", "name", "seed", "data", "data_path") if getattr(arguments, name)]
        if given or arguments.set:
            raise ValueError(f"--resume goes on with the stored configuration; leave out {', '.join(given) or '--set'}")
        claim = _resumed(Path(arguments.resume))
    else:
        config = configure(
            arguments.preset or "demo", data=arguments.data, data_path=arguments.data_path, seed=arguments.seed,
            threads=arguments.threads, changes=arguments.set,
        )  # fmt: skip
        claim = _folder(Path(arguments.runs), arguments.name, config.preset.replace("/", "-"))
    processes = parallel.start(device)
    with contextlib.ExitStack() as stack:
        try:
            folder = processes.agree(lambda: stack.enter_context(claim))
            trainer = prepare(folder, device, config, threads=arguments.threads)
            finished = fit(trainer, folder)
            if not processes.first:
                return 0
        finally:
            parallel.finish()
        if not finished:
            print(f"stopped at iteration {trainer.iteration} of {trainer.total}; go on with: mmebm train --resume "
                  f"{folder}")  # fmt: skip
            return 130
        report(Run(folder, device))
    return 0


def prepare(folder: Path, device: torch.device, config: Config | None, *, threads: int | None = None) -> Trainer:
    """The trainer of a new run in ``folder``, or of the one that is there (``config=None``); writes config.json."""
    content = checkpoint.resume(folder / CHECKPOINT, device) if config is None else None
    if content is not None:
        config = Config.from_json(content["config"])
    if parallel.Processes.here().first:
        check_writable(folder / CHECKPOINT)
    assert config is not None
    threads = threads or config.threads
    if threads is not None:
        torch.set_num_threads(threads)
    data = load_data(config, "train", folder)
    trainer = Trainer(config, data, device, processes=parallel.Processes.here())
    if content is not None:
        try:
            trainer.load_state_dict(content)
        except ValueError as error:
            raise ValueError(f"{folder / CHECKPOINT}: {error}") from error
    # all have chosen the folder before one of them makes it
    trainer.processes.barrier()
    if trainer.processes.first:
        folder.mkdir(parents=True, exist_ok=True)
        keep_codec(data, folder)
        _write_text(folder / "config.json", json.dumps({
            "config": json.loads(config.to_json()), "data": data.info, "seed": config.seed, "device": str(device),
            "versions": {"mmebm": __version__, "torch": torch.__version__}, "commit": _commit(),
            "presets": sorted(PRESETS), "threads": torch.get_num_threads(), "processes": trainer.processes.world,
        }, indent=2, default=str))  # fmt: skip
        print(f"{folder}: {config.preset} on {data.name} ({len(data)} tuples), {device}, "
              f"{trainer.total - trainer.iteration} iterations")  # fmt: skip
    return trainer


def fit(trainer: Trainer, folder: Path) -> bool:
    """Trains to the end or to Ctrl-C, saving on the way; returns whether the end was reached."""
    if not trainer.processes.first:
        for _ in trainer.run():
            pass
        return trainer.iteration >= trainer.total

    def save() -> None:
        checkpoint.save(folder / CHECKPOINT, trainer.state_dict())

    def stop(number: int, frame: Any) -> None:
        # the first Ctrl-C ends the iteration in hand and saves; a second one ends at once, the last save stays
        trainer.stop = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    log, saved = _Log(folder, trainer.iteration, trainer.guard.rollbacks), time.perf_counter()
    try:
        before = signal.signal(signal.SIGINT, stop)
    except ValueError:  # not in the main thread: no handler, Ctrl-C is the caller's matter
        before = None
    try:
        with Progress(trainer.config.stages, trainer.iteration) as progress:
            for row in trainer.run():
                row["peak_memory_mib"] = peak_memory(trainer.device)
                log.write(row)
                progress.show(row)
                if time.perf_counter() - saved > SAVE_EVERY_SECONDS:
                    save()
                    saved = time.perf_counter()
        save()
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)
        log.close()
    return trainer.iteration >= trainer.total
