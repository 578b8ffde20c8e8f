"""What a chain returns, as a line and as ArviZ takes it."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

import mmebm


def energy(x: dict[str, torch.Tensor]) -> torch.Tensor:
    return x["a"].square().sum(1) + x["b"].square().sum((1, 2))


def chain(steps: int = 12, thin: int | None = 3, **options: object) -> mmebm.Samples:
    start = {"a": torch.zeros(4, 2), "b": torch.zeros(4, 3, 5)}
    return mmebm.Langevin(0.1).sample(energy, start, steps, seed=1, thin=thin, **options)  # type: ignore[arg-type]


def test_repr_is_a_line() -> None:
    text = repr(
        mmebm.Langevin(0.1).sample(
            energy, {"a": torch.zeros(500, 20), "b": torch.zeros(500, 3, 5)}, 3, record=("energy",)
        )
    )
    assert text.startswith("<Samples: state {a: float32 (500, 20), b: float32 (500, 3, 5)}; 3 steps; trace of energy; ")
    assert len(text) < 200 and "\n" not in text
    assert "trajectory {a: float32 (4, 4, 2), b: float32 (4, 4, 3, 5)}" in repr(chain())


def test_arviz_gets_chains_and_draws() -> None:
    pytest.importorskip("arviz_base")
    out = chain(record=("energy", "grad_norm"))
    tree = out.to_arviz()
    assert tree["posterior"]["a"].shape == (4, 4, 2) and tree["posterior"]["b"].shape == (4, 4, 3, 5)
    for i in range(4):
        for t in range(4):
            np.testing.assert_array_equal(tree["posterior"]["b"].values[i, t], out.trajectory["b"][t, i].numpy())
            assert tree["sample_stats"]["energy"].values[i, t] == out.trace["energy"][3 * t + 2, i]
    assert out.to_arviz(burn_in=3)["posterior"]["a"].shape == (4, 1, 2)
    bare = mmebm.Langevin(0.1).sample(lambda x: x.square().sum(1), torch.zeros(5, 2), 6, seed=0, thin=1)
    np.testing.assert_array_equal(bare.to_arviz()["posterior"]["x"].values, bare.trajectory.transpose(0, 1).numpy())
    assert "sample_stats" not in bare.to_arviz()


def test_arviz_keeps_the_distribution() -> None:
    """The known mean and deviation of a Gaussian, by names of dimensions."""
    pytest.importorskip("arviz_base")
    start = torch.randn(8, 1, generator=torch.Generator().manual_seed(0))
    out = mmebm.MALA(0.5).sample(lambda x: 0.5 * (x - 3).square().sum(1), start, 3000, seed=0, thin=3)
    x = out.to_arviz(burn_in=100)["posterior"]["x"]
    mean, deviation = (float(getattr(x, what)(("chain", "draw"))[0]) for what in ("mean", "std"))
    # 7,200 draws, about independent at this step: errors of the mean and deviation about .012; five of them
    assert abs(mean - 3) < 0.06 and abs(deviation - 1) < 0.06


def test_what_arviz_cannot_have_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("arviz_base")
    with pytest.raises(ValueError, match="there is no trajectory: sample with thin=1"):
        chain(thin=None).to_arviz()
    with pytest.raises(ValueError, match="burn_in must leave one of 4 states at least, got 4"):
        chain().to_arviz(burn_in=4)
    with pytest.raises(ValueError, match="thin must be that of the chain, which kept 4 states of 12 steps, got 2"):
        chain().to_arviz(thin=2)
    # 11 steps leave two states for a thin of 4 and of 5
    out = chain(11, 4, record=("energy",))
    with pytest.raises(ValueError, match=r"thin= must say which: 2 states of 11 steps are left by each of \[4, 5\]"):
        out.to_arviz()
    assert out.to_arviz(thin=4)["sample_stats"]["energy"].values[0, 1] == out.trace["energy"][7, 0]
    monkeypatch.setitem(sys.modules, "arviz_base", None)
    with pytest.raises(ModuleNotFoundError, match="pip install arviz-base"):
        chain().to_arviz()
