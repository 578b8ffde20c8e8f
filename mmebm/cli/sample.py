"""``mmebm sample``: one array per modality into an .npz file."""

from __future__ import annotations

import argparse
import json
import time
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from mmebm.cli.common import pick_device
from mmebm.files import check_writable, write_atomically
from mmebm.training.model import Model
from mmebm.training.run import Run


def sample(arguments: argparse.Namespace) -> int:
    """Runs the command: images float32 (n, C, H, W) in [0, 1], text an array of strings, vectors float32 (n, D);
    with ``--given`` the class index of each row as ``label``. The settings go into a .json file of the same name. An
    ``--out`` that ends in .png is a picture of the first rows instead."""
    out = Path(arguments.out)
    out = out if out.suffix else out.with_name(out.name + ".npz")
    if out.suffix not in (".npz", ".png"):
        raise ValueError(
            f"--out writes arrays to a file that ends in .npz, or a picture to .png, got {arguments.out!r}"
        )
    for file in (out, out.with_suffix(".json")):
        check_writable(file)
    if arguments.given_file is not None:
        return _complete(arguments, out)
    if arguments.n < 1:
        raise ValueError(f"--n must be at least 1, got {arguments.n}")
    steps = arguments.steps
    if isinstance(steps, int) and steps < 0:
        raise ValueError(f"--steps must be at least 0, got {steps}")
    run = Run(
        arguments.run, pick_device(arguments.device), prior_steps=arguments.prior_steps, data_path=arguments.data_path
    )
    modalities = run.modalities
    arrays: dict[str, Any] = {}
    started = time.perf_counter()
    if arguments.given:
        if arguments.point in ("vae", "frozen") or arguments.start is not None:
            raise ValueError("--given goes with --point x0 or xk, and without --start")
        if steps == "auto":
            raise ValueError("--steps auto is for joint samples; with --given take a number")
        names = [m.name for m in modalities]
        unknown = sorted(set(arguments.given) - set(names))
        if unknown:
            raise ValueError(f"--given names {unknown}; the modalities are {names}")
        split = arguments.split or run.judged_on
        data = run.dataset("train") if split == "train" else run.unseen(split)
        # every tuple once before any comes twice
        generator = torch.Generator().manual_seed(arguments.seed)
        rounds = -(-arguments.n // len(data))
        rows = torch.cat([torch.randperm(len(data), generator=generator) for _ in range(rounds)])[: arguments.n]
        rows = rows.to(run.device)
        real = data.batch(rows)
        data_steps = 0 if arguments.point == "x0" or arguments.mode != "data" else steps
        x = run.system.complete(
            {name: real[name] for name in names if name in arguments.given},
            seed=arguments.seed,
            latent_steps=0 if arguments.mode == "decode" else None,
            data_steps=data_steps,
        )
        arrays["label"] = data.labels[rows].cpu().numpy()
    else:
        if steps == "auto":
            start = run.start(min(arguments.n, 1000), seed=arguments.seed, name=arguments.start)
            steps = run.steps_to_real(start, seed=arguments.seed + 1)
        x = run.sample(arguments.n, arguments.point, seed=arguments.seed, steps=steps, start=arguments.start)
    seconds = time.perf_counter() - started
    for modality in modalities:
        arrays[modality.name] = modality.natural(x[modality.name])
    info = {
        **run.settings(steps),
        "seed": arguments.seed,
        "point": arguments.point,
        "start": arguments.start,
        "given": arguments.given or [],
        "mode": arguments.mode if arguments.given else None,
        "split": (arguments.split or run.judged_on) if arguments.given else None,
        "seconds": seconds,
    }
    _store(out, arrays, [m.name for m in modalities], info)
    arguments.result = {**info, "out": str(out)}
    return 0


def _complete(arguments: argparse.Namespace, out: Path) -> int:
    """``--given-file``: the other modalities, given arrays of the caller's own; images come back as uint8."""
    others = {"given": "--given", "start": "--start"}
    clash = [option for name, option in others.items() if getattr(arguments, name)]
    if clash or arguments.steps == "auto":
        raise ValueError(f"--given-file says what is given: leave out {', '.join(clash) or '--steps auto'}")
    given = _given(Path(arguments.given_file))
    run = Run(arguments.run, pick_device(arguments.device), prior_steps=arguments.prior_steps)
    started = time.perf_counter()
    mode = "latent" if arguments.point == "x0" and arguments.mode == "data" else arguments.mode
    arrays = Model(run).complete(given, seed=arguments.seed, mode=mode, steps=arguments.steps)
    info = {
        **run.settings(arguments.steps),
        "seed": arguments.seed,
        "given": sorted(given),
        "mode": mode,
        "given_file": str(arguments.given_file),
        "seconds": time.perf_counter() - started,
    }
    _store(out, arrays, list(arrays), info)
    arguments.result = {**info, "out": str(out)}
    return 0


def _given(file: Path) -> dict[str, Any]:
    """The arrays of an .npz file, one per modality."""
    try:
        if file.suffix == ".npy":
            raise ValueError("it is one array")
        with np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        raise
    except (ValueError, OSError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"--given-file {file} must be an archive of numpy.savez, one array per modality, numbers or "
            f"fixed-width strings: {error}"
        ) from error


def _store(out: Path, arrays: dict[str, Any], names: list[str], info: dict[str, Any]) -> None:
    if out.suffix == ".png":
        from mmebm.evaluation import figures

        pictures = {name: _drawable(arrays[name]) for name in names}
        figures.sample_grid({"samples": pictures}, out, columns=min(len(pictures[names[0]]), 12))
    else:

        def write(file: BinaryIO) -> None:
            np.savez_compressed(file, **arrays)

        write_atomically(out, write)
    # beside the arrays, not among them: whoever reads the file wants modalities
    text = json.dumps(info, indent=2)
    write_atomically(out.with_suffix(".json"), lambda file: file.write(text.encode()))
    shapes = ", ".join(f"{name} {value.shape}" for name, value in arrays.items())
    print(f"{out}: {shapes}, {info['seconds']:.1f} s")


def _drawable(values: Any) -> Any:
    return values.astype(np.float32) / 255 if values.dtype == np.uint8 else values
