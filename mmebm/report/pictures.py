"""What is drawn from a run's networks: samples, both chains step by step, completions, paths through the latent."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from mmebm.evaluation import figures
from mmebm.evaluation.latent import interpolate, usable_rows
from mmebm.evaluation.neighbours import Neighbours
from mmebm.training.run import Run

__all__ = ["compared", "completions", "interpolations", "revisions", "samples"]

TITLES: Final = {
    "vae": "VAE after the warm-up",
    "frozen": "frozen: Langevin on the VAE held fixed",
    "x0": "x0: generator",
    "xk": "xk: after data-space Langevin",
}
COLUMNS: Final = 12
COMPARED: Final = 256  # samples that are compared with training tuples
FRAMES: Final = 16  # columns of a revision: every second of 30 steps, and the start


def samples(run: Run, path: Path, *, neighbours: Neighbours | None = None, seed: int = 0) -> Path:
    """Joint samples at every point that the run has, the same seed in each; with ``neighbours`` also the nearest
    training tuple of each of the last ones, and real tuples."""
    blocks: dict[str, Any] = {}
    x: Mapping[str, Tensor] = {}
    for point in run.points or ("vae",):
        x = run.sample(COLUMNS, point, seed=seed)
        blocks[TITLES.get(point, point)] = natural(run, x)
    if neighbours is not None:
        point = (run.points or ("vae",))[-1]
        blocks[f"the nearest training tuple of each {point} above"] = natural(run, neighbours.nearest(x))
        blocks["real tuples, not trained on"] = natural(run, _real(run, COLUMNS, seed))
    return figures.sample_grid(blocks, path, columns=COLUMNS)


def compared(run: Run, neighbours: Neighbours, *, seed: int = 0) -> dict[str, Any]:
    """Samples of the run's last point beside training tuples (:meth:`Neighbours.compare`)."""
    x = run.sample(COMPARED, (run.points or ("vae",))[-1], seed=seed)
    return neighbours.compare(x, _real(run, COMPARED, seed))


def revisions(
    run: Run, folder: Path, *, data: bool = True, seed: int = 0, chains: int = 3
) -> dict[str, tuple[Path, str]]:
    """Both chains every second step up to 30 (or as many as trained, if more): name -> (picture, caption).

    The latent chain is shown as what its z decodes to, started at q(z | X) and, the last one, at the prior; it needs
    the ``data``.
    """
    config, system = run.config, run.system
    found = {}
    if config.data_chain.steps and run.revises:
        steps, every = _frames(config.data_chain.steps)
        x0 = run.start(chains, seed=seed)
        moved = system.revise_data(x0, seed=seed + 1, steps=steps, thin=every).trajectory
        states = {name: torch.cat([x0[name][None], moved[name]]) for name in x0}
        strips = {f"chain {i + 1}": natural(run, {k: v[:, i] for k, v in states.items()}) for i in range(chains)}
        path = figures.revision_grid(strips, range(0, steps + 1, every), folder / "data-chain.png")
        found["Data chain"] = (
            path,
            f"x under the joint energy, all modalities at once.{_beyond(config.data_chain.steps, steps)}",
        )
    if data and config.latent_chain.steps and run.infers:
        steps, every = _frames(config.latent_chain.steps)
        x = _real(run, chains, seed)
        with torch.no_grad():
            z = system.inference.sample(x, torch.Generator(system.device).manual_seed(seed))
            z[-1] = system.prior.draw(1, seed=seed, device=system.device)[0]
            moved = system.revise_latent(z, x, seed=seed + 1, steps=steps, thin=every).trajectory
            frames = torch.cat([z[None], moved])
            states = system.generator(frames.flatten(0, 1))
        shape = frames.shape[:2]
        strips, inputs = {}, {}
        for i in range(chains):
            title = f"tuple {i + 1}, from {'the prior' if i == chains - 1 else 'q(z | X)'}"
            strips[title] = natural(run, {k: v.unflatten(0, shape)[:, i] for k, v in states.items()})
            inputs[title] = natural(run, {k: v[i : i + 1] for k, v in x.items()})
        path = figures.revision_grid(strips, range(0, steps + 1, every), folder / "latent-chain.png", observed=inputs)
        found["Latent chain"] = (
            path,
            f"z given a test tuple, the last column, as decoded.{_beyond(config.latent_chain.steps, steps)}",
        )
    return found


def completions(run: Run, path: Path, *, seed: int = 0, columns: int = 4) -> Path | None:
    """Every single modality given, and the others as each way completes them; None where the run has no way."""
    ways = run.completions()
    if run.joint_trained:
        ways = {name: way for name, way in ways.items() if not name.startswith("vae")}
    x = _real(run, columns, seed)
    if not ways or len(x) < 2:
        return None
    blocks = {}
    for given in x:
        held = {given: x[given]}
        groups: dict[str, Mapping[str, np.ndarray]] = {"given": natural(run, held)}
        for name, way in ways.items():
            made = natural(run, way(held, seed))
            groups[name] = {k: v for k, v in made.items() if k != given}
        blocks[f"given {given}"] = groups
    return figures.conditional_grid(blocks, path, columns=columns)


def interpolations(run: Run, path: Path, *, seed: int = 0, rows: int = 3, points: int = 11) -> Path | None:
    """From one test tuple to another, through the latent; None where nothing infers a latent."""
    if not run.infers:
        return None
    x = _real(run, 2 * rows, seed)
    a, b = ({k: v[i : 2 * rows : 2] for k, v in x.items()} for i in (0, 1))
    made = interpolate(run.system, a, b, points, seed=seed, latent_steps=None if run.joint_trained else 0)
    strips = {f"path {i + 1}": natural(run, {k: v[i] for k, v in made.items()}) for i in range(rows)}
    return figures.interpolation_grid(strips, path)


def natural(run: Run, x: Mapping[str, Tensor]) -> dict[str, Any]:
    """Model space to what a figure takes, of the modalities that ``x`` holds."""
    return {m.name: m.natural(x[m.name]) for m in run.modalities if m.name in x}


def _real(run: Run, count: int, seed: int) -> dict[str, Tensor]:
    test = run.unseen()
    rows = usable_rows(test, labelled=False)
    return test.batch(rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count]])


def _frames(trained: int) -> tuple[int, int]:
    """Steps and stride of a revision: the paper's 30 by 2, or what is trained if that is more."""
    steps = max(trained, 30)
    every = max(2, -(-steps // (FRAMES - 1)))
    return steps - steps % every, every


def _beyond(trained: int, shown: int) -> str:
    return f" Trained with {trained} steps{'; what comes after them is beyond training' if shown > trained else ''}."
