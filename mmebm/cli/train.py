"""``mmebm train``: trains, keeps a log and a checkpoint, then evaluates and draws."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import subprocess
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from mmebm import __version__
from mmebm.cli.common import pick_device
from mmebm.cli.evaluate import report
from mmebm.cli.progress import Progress
from mmebm.cli.threads import cores
from mmebm.data import has_validation
from mmebm.files import FolderLock, check_writable, new_folder, write_atomically
from mmebm.plugins import Logger, find, import_modules
from mmebm.training import PRESETS, Callback, Config, Trainer, checkpoint, fitting, parallel, preset
from mmebm.training.config import extended, merged, override
from mmebm.training.loggers import TensorBoard, logger
from mmebm.training.reading import CODEC, keep_codecs
from mmebm.training.run import CHECKPOINT, LOG, Run, load_data
from mmebm.training.settings import read_file, to_toml
from mmebm.training.variants import without_data


def configure(
    name: str | None = None,
    *,
    file: str | None = None,
    data: str | None = None,
    data_path: str | None = None,
    seed: int | None = None,
    threads: int | None = None,
    imports: Sequence[str] = (),
    changes: Sequence[str] = (),
) -> Config:
    """The configuration of a preset with what a file and the command line change; ``changes`` are FIELD=VALUE.

    The preset is ``name``, or the one that the file names, or "base" for a file that names none, or "demo". For another
    data set than the preset's own, the preset's options and weights of modalities are left out.

    Raises:
        ValueError: for a preset, a field or a value that there is not, or two presets.
    """
    settings = read_file(Path(file)) if file is not None else {}
    own, more = settings.get("preset"), settings.get("imports")
    import_modules(more if isinstance(more, list) else ())
    if name is not None and own is not None and name != own:
        raise ValueError(f"--preset {name}, but {file} says preset {own!r}: leave one out")
    config = preset(name or (own if isinstance(own, str) else None) or ("demo" if file is None else "base"))
    wanted = settings.get("data")
    in_file = wanted.get("name") if isinstance(wanted, dict) else None
    other = data if data is not None else in_file
    if other is not None and other != config.data.name:
        config = without_data(config)
    config = merged(config, settings) if settings else config
    fields = {"data.name": data, "data.path": data_path, "seed": seed, "threads": threads}
    texts = {field: json.dumps(value) for field, value in fields.items() if value is not None}
    for item in changes:
        field, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"--set takes FIELD=VALUE, got {item!r}")
        texts[field] = value
    config = override(config, texts)
    return config.replace(imports=tuple(dict.fromkeys((*config.imports, *imports))))


TRACES = ("tensorboard", "wandb", "wandb-id", "mlflow-id")  # of loggers


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
        others = sorted(path.name for path in (runs / name).iterdir() if not _of_a_start(path))
        if others:
            raise ValueError(f"{lock.folder} is not empty, it has {', '.join(others[:3])}: give another --name")
        yield lock.folder


def _of_a_start(path: Path) -> bool:
    """Whether a run that was ended before its first save may have left this file: with no row in its log."""
    empty_log = path.name == LOG and not path.stat().st_size
    named = path.name in ("config.json", CODEC, *TRACES) or (path.name.startswith("codec-") and path.suffix == ".pt")
    return path.name.startswith(".") or named or empty_log


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


def train(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    device = pick_device(arguments.device)
    loggers = [logger(name) for name in arguments.logger]
    callbacks = [_callback(name) for name in arguments.callback]
    config = None
    if arguments.resume is not None:
        only_new = ("preset", "config", "name", "seed", "data", "data_path", "print_config", "dry_run", "init_from")
        given = [f"--{name.replace('_', '-')}" for name in only_new if getattr(arguments, name)]
        if given or arguments.set:
            raise ValueError(f"--resume goes on with the stored configuration; leave out {', '.join(given) or '--set'}")
        if arguments.extend is not None and arguments.extend < 1:
            raise ValueError(f"--extend must be at least 1, got {arguments.extend}")
        claim = _resumed(Path(arguments.resume))
    elif arguments.extend is not None:
        raise ValueError("--extend goes with --resume: a new run has its iterations in stages")
    else:
        config = configure(
            arguments.preset,
            file=arguments.config,
            data=arguments.data,
            data_path=arguments.data_path,
            seed=arguments.seed,
            threads=arguments.threads,
            imports=arguments.imports,
            changes=arguments.set,
        )
        if arguments.print_config:
            arguments.result = json.loads(config.to_json())
            print(config.to_json() if arguments.print_config == "json" else to_toml(arguments.result))
            return 0
        if not any(stage.iterations for stage in config.stages):
            raise ValueError("stages has no iteration, so there is nothing to train: see --print-config of a preset")
        if arguments.dry_run:
            arguments.result = dry_run(config, device, init_from=arguments.init_from)
            return 0
        claim = _folder(Path(arguments.runs), arguments.name, config.preset.replace("/", "-"))
    processes = parallel.start(device)
    with contextlib.ExitStack() as stack:
        try:
            folder = processes.agree(lambda: stack.enter_context(claim))
            trainer = prepare(
                folder,
                device,
                config,
                threads=arguments.threads,
                extend=arguments.extend or 0,
                init_from=arguments.init_from,
            )
            trainer.callbacks += callbacks
            finished = fit(trainer, folder, quiet=arguments.quiet, loggers=loggers)
            if not processes.first:
                return 0
        finally:
            parallel.finish()
        if not finished:
            print(
                f"stopped at iteration {trainer.iteration} of {trainer.total}; go on with: mmebm train --resume "
                f"{folder}"
            )
            return 128 + trainer.stop
        arguments.result = {"run": str(folder), **report(Run(folder, device))}
    return 0


def _callback(name: str) -> Callback:
    """What ``--callback`` names, made."""
    made = find("callbacks", name)()
    if not isinstance(made, Callback):
        raise TypeError(f"--callback {name} must give a mmebm.training.Callback, got {type(made).__name__}")
    return made


def dry_run(config: Config, device: torch.device, *, init_from: Path | str | None = None) -> dict[str, Any]:
    """Two iterations of every stage with nothing written: what the data is read as, how the chains run, and about how
    long training would take. With ``init_from`` from the networks of that run, as training would begin."""
    import_modules(config.imports)
    _use_threads(config.threads)
    data = load_data(config, "train")
    load_data(config, "test")
    stages = [(number, stage) for number, stage in enumerate(config.stages, start=1) if stage.iterations]
    short = tuple(dataclasses.replace(stage, iterations=2) for _, stage in stages)
    trainer = Trainer(
        config.replace(stages=short, guard=dataclasses.replace(config.guard, every=1, max_gap=1e30)), data, device
    )
    _begin_with(trainer, init_from, device)
    print(f"{config.preset} on {data!r}, {device}")
    model = trainer.config.model
    for m in data.modalities:
        weight = model.weights.get(m.name, 1.0) if isinstance(model.weights, dict) else 1.0
        print(f"  {m.name}: {m.kind} {m.shape}, weight {weight:g} in the likelihood")
    sizes = {
        name: sum(p.numel() for p in getattr(trainer.system, name).parameters())
        for name in ("generator", "inference", "energy", "prior")
    }
    print(
        f"  latent {model.latent}; parameters: {', '.join(f'{name} {size:,}' for name, size in sizes.items() if size)}"
    )
    reports = trainer.chain_reports()
    for name, line in reports.items():
        print(f"{name}: {line}")
    times = [row["seconds_per_iteration"] for row in trainer.run()][1::2]  # the first of two also warms up
    total = 0.0
    for (number, stage), seconds in zip(stages, times, strict=True):
        total += seconds * stage.iterations
        print(
            f"stage {number}, {stage.kind}: {stage.iterations} iterations of about {seconds:.3g} s, "
            f"{seconds * stage.iterations / 60:.1f} minutes"
        )
    print(f"about {total / 60:.0f} minutes in all; nothing was written")
    return {"latent": model.latent, "weights": model.weights, "chains": reports, "seconds": total, "parameters": sizes}


def _use_threads(threads: int | None) -> None:
    """So many CPU threads; by default as torch has it, but no more than the cores that a container may use."""
    torch.set_num_threads(threads or min(torch.get_num_threads(), cores()))


def _begin_with(trainer: Trainer, init_from: Path | str | None, device: torch.device) -> None:
    """Gives ``trainer`` the networks of another run, where one is named."""
    if init_from is None:
        return
    try:
        trainer.begin_with(checkpoint.load(Path(init_from) / CHECKPOINT, device))
    except ValueError as error:
        raise ValueError(f"--init-from {init_from}: {error}") from error


def prepare(
    folder: Path,
    device: torch.device,
    config: Config | None,
    *,
    threads: int | None = None,
    extend: int = 0,
    init_from: Path | str | None = None,
) -> Trainer:
    """The trainer of a new run in ``folder``, or of the one that is there (``config=None``); writes config.json.

    Args:
        folder: of the run.
        device: where to train.
        config: of a new run.
        threads: CPU threads.
        extend: so many iterations more than a run that is there was configured for.
        init_from: the folder of a run whose networks a new run begins with.
    """
    content = checkpoint.resume(folder / CHECKPOINT, device) if config is None else None
    if content is not None:
        config = extended(Config.from_json(content["config"]), extend)
    if parallel.Processes.here().first:
        check_writable(folder / CHECKPOINT)
    assert config is not None
    import_modules(config.imports)
    _use_threads(threads or config.threads)
    data = load_data(config, "train", folder)
    validation = None
    if config.validation.every and has_validation(config.data.name, config.data.path):
        validation = load_data(config, "validation", folder)
    trainer = Trainer(config, data, device, processes=parallel.Processes.here(), validation=validation)
    if content is not None:
        try:
            trainer.load_state_dict(content)
        except ValueError as error:
            raise ValueError(f"{folder / CHECKPOINT}: {error}") from error
    _begin_with(trainer, init_from, device)
    # all have chosen the folder before one of them makes it
    trainer.processes.barrier()
    if trainer.processes.first:
        folder.mkdir(parents=True, exist_ok=True)
        keep_codecs(data.modalities, folder)
        _write_text(
            folder / "config.json",
            json.dumps(
                {
                    "config": json.loads(trainer.config.to_json()),
                    "data": data.info,
                    "seed": config.seed,
                    "device": str(device),
                    "versions": {"mmebm": __version__, "torch": torch.__version__},
                    "commit": _commit(),
                    "presets": sorted(PRESETS),
                    "threads": torch.get_num_threads(),
                    "processes": trainer.processes.world,
                },
                indent=2,
                default=str,
            ),
        )
        print(
            f"{folder}: {config.preset} on {data.name} ({len(data)} tuples), {device}, "
            f"{trainer.total - trainer.iteration} iterations"
        )
        for name, line in trainer.chain_reports().items():
            print(f"{name}: {line}")
    return trainer


def fit(trainer: Trainer, folder: Path, *, quiet: bool = False, loggers: Sequence[Callable[..., Logger]] = ()) -> bool:
    """:func:`mmebm.training.fitting.fit` with a progress bar, and TensorBoard where it is installed."""
    makers = [*loggers, *([TensorBoard] if TensorBoard not in loggers and find_spec("tensorboard") else [])]
    with Progress(trainer.config.stages, trainer.iteration, quiet=quiet) as progress:

        def show(row: dict[str, Any]) -> None:
            progress.stages = trainer.config.stages  # stages that end by their seconds get other numbers on the way
            progress.show(row)

        return fitting.fit(trainer, folder, loggers=makers, show=show)
