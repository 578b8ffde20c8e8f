"""What every example here does: digits, options, the comparison of two loops, a picture."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmebm.data import load


def options(what: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--quick", action="store_true", help="a few iterations, to see that it runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of the picture")
    given = parser.parse_args()
    torch.manual_seed(given.seed)
    given.out.mkdir(parents=True, exist_ok=True)
    return given


def digits(split: str, modality: str = "mnist") -> tuple[Tensor, Tensor]:
    """Each digit of the split once, in [-1, 1]: MNIST (n, 1, 14, 14) or optdigits (n, 1, 8, 8); and their classes."""
    data = load("digits", split, size=14)  # pyright: ignore[reportArgumentType]
    return data.pools[modality], data.pool_labels[modality]


def compare(old: Callable[[], Any], new: Callable[[], Any], old64: Callable[[], Any], new64: Callable[[], Any]) -> None:
    """Runs the hand-written loop and ours from the same seed in float64, then both in float32 against the clock."""
    results = []
    for run in (old64, new64):
        torch.manual_seed(1)
        out = run()
        results.append(torch.cat([t.flatten() for t in (out.values() if isinstance(out, dict) else [out])]))
    difference = float((results[0] - results[1]).abs().max())
    # rounding of float64, amplified by the chain
    assert difference < 1e-9, f"the two loops differ by {difference}"
    print(f"agree: the two loops differ by at most {difference:.1e}")
    took: list[list[float]] = [[], []]
    for _ in range(8):  # in turn, so that a busy machine is busy for both; the first round warms up
        for run, mine in zip((old, new), took, strict=True):
            start = time.perf_counter()
            run()
            mine.append(1e3 * (time.perf_counter() - start))
    times = [min(mine[1:]) for mine in took]
    print(f"time: by hand {times[0]:.1f} ms, ours {times[1]:.1f} ms, ratio {times[0] / times[1]:.2f}")


def picture(images: Tensor, path: Path, columns: int = 10) -> None:
    """Images (n, 1, h, w) in [-1, 1], in rows of ``columns``, as a PNG."""
    from PIL import Image

    rows = len(images) // columns
    h, w = images.shape[-2:]
    padded = torch.nn.functional.pad(images[: rows * columns, 0], (1, 1, 1, 1), value=-0.5)
    sheet = padded.reshape(rows, columns, h + 2, w + 2).transpose(1, 2).reshape(rows * (h + 2), columns * (w + 2))
    grey = ((sheet.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()
    Image.fromarray(grey).resize((4 * grey.shape[1], 4 * grey.shape[0]), Image.Resampling.NEAREST).save(path)
    print(f"picture: {path}")
