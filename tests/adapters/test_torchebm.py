"""Ours as a torchebm sampler, against torchebm's own from the same generator."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn

torchebm = pytest.importorskip("torchebm", reason="torchebm is not installed (pip install 'mmebm[peers]')")

from torchebm import losses, samplers  # noqa: E402
from torchebm.core import (  # noqa: E402
    BaseModel,
    BaseSampler,
    DoubleWellModel,
    ExponentialDecayScheduler,
    GaussianModel,
    LinearScheduler,
)

from mmebm.adapters.torchebm import LangevinDynamics  # noqa: E402

# float64 in another order of operations; worst seen 6e-16 over 100 seeds of the cases here (Xeon, 2026-11-22)
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


class Conditional(BaseModel):
    def __init__(self) -> None:
        super().__init__(dtype=torch.float64)
        self.net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1)).double()

    def forward(self, x, y=None):
        out = self.net(x).squeeze(1) + 0.5 * x.square().sum(1)
        return out if y is None else out + (x * y[:, None]).sum(1)


class Analytic(BaseModel):
    """A model whose gradient is not that of its energy, so that asking the wrong one shows."""

    def forward(self, x):
        return x.square().sum(1)

    def gradient(self, x, model_kwargs=None):
        return x.detach() ** 3


def pair(model: Any, **options: Any):
    return [kind(model, dtype=torch.float64, **options) for kind in (samplers.LangevinDynamics, LangevinDynamics)]


def runs(theirs, ours, seed, **given):
    make = lambda: torch.Generator().manual_seed(seed)
    start = torch.randn(5, 3, generator=make(), dtype=torch.float64)
    return [s.sample(x=start.clone(), generator=make(), **given) for s in (theirs, ours)]


@pytest.mark.parametrize(
    "given",
    [
        {"n_steps": 7},
        {"n_steps": 0},
        {"n_steps": 7, "return_trajectory": True},
        {"n_steps": 7, "return_trajectory": True, "thin": 3},
        {"n_steps": 6, "return_diagnostics": True, "thin": 2},
        {"n_steps": 6, "return_diagnostics": True, "return_trajectory": True},
    ],
)
@pytest.mark.parametrize(
    "options",
    [
        {"step_size": 0.05},
        {"step_size": 0.05, "noise_scale": 0.3, "clamp": (-0.5, 0.7)},
        {
            "step_size": lambda: LinearScheduler(0.1, 0.01, 5),
            "noise_scale": lambda: ExponentialDecayScheduler(1.0, 0.7),
        },
    ],
)
def test_same_numbers_as_its_own(given, options, seed, monkeypatch):
    torch.manual_seed(seed)
    model = Conditional()
    # a scheduler counts its steps, so that each sampler needs its own
    made = [{k: v() if callable(v) else v for k, v in options.items()} for _ in range(2)]
    theirs = samplers.LangevinDynamics(model, dtype=torch.float64, **made[0])
    ours = LangevinDynamics(model, dtype=torch.float64, **made[1])
    monkeypatch.setattr(ours.integrator, "step", None)  # torchebm's loop would call it
    a, b = runs(theirs, ours, seed, **given)
    if not isinstance(a, tuple):
        a, b = (a, {}), (b, {})
    torch.testing.assert_close(b[0], a[0], **CLOSE)
    assert list(a[1]) == list(b[1])
    for name in a[1]:
        torch.testing.assert_close(b[1][name], a[1][name], **CLOSE)
    for name in ("step_size", "noise_scale"):
        assert ours.schedulers[name].step_count == theirs.schedulers[name].step_count


def test_schedulers_go_on_where_they_were(seed):
    torch.manual_seed(seed)
    model = Conditional()
    both = [
        kind(model, step_size=LinearScheduler(0.1, 0.01, 9), dtype=torch.float64)
        for kind in (samplers.LangevinDynamics, LangevinDynamics)
    ]
    for _ in range(2):
        a, b = runs(*both, seed, n_steps=4, reset_schedulers=False)
    torch.testing.assert_close(b, a, **CLOSE)


def test_conditioning(seed):
    torch.manual_seed(seed)
    model = Conditional()
    y = torch.arange(5.0, dtype=torch.float64)
    both = pair(model, step_size=0.05)
    a, b = runs(*both, seed, n_steps=5, y=y)
    c, d = runs(*both, seed, n_steps=5, model_kwargs={"y": y})
    plain, _ = runs(*both, seed, n_steps=5)
    torch.testing.assert_close(b, a, **CLOSE)
    assert torch.equal(b, d) and torch.equal(a, c)
    assert (plain - a).abs().max() > 1e-3
    with pytest.raises(ValueError, match="model_kwargs"):
        both[1].sample(x=torch.zeros(5, 3), n_steps=1, y=y, model_kwargs={"y": y})


def test_analytic_gradients_are_asked_for(seed):
    a, b = runs(*pair(Analytic(dtype=torch.float64), step_size=0.05), seed, n_steps=6)
    torch.testing.assert_close(b, a, **CLOSE)


def test_what_ours_has_not_is_left_to_torchebm(seed):
    a, b = runs(*pair(Conditional(), step_size=0.05, integrator="heun"), seed, n_steps=6)
    assert torch.equal(a, b)


def test_start_and_signature(seed):
    theirs, ours = (inspect.signature(kind.sample).parameters for kind in (samplers.LangevinDynamics, LangevinDynamics))
    assert [(p.name, p.kind, p.default) for p in theirs.values()] == [
        (p.name, p.kind, p.default) for p in ours.values()
    ]
    sampler = LangevinDynamics(GaussianModel(torch.zeros(2), torch.eye(2)), step_size=0.01)
    assert isinstance(sampler, BaseSampler)
    torch.manual_seed(seed)
    a = sampler.sample(dim=2, n_steps=3, n_samples=4)
    torch.manual_seed(seed)
    assert torch.equal(sampler.sample(dim=(2,), n_steps=3, n_samples=4), a)
    assert a.shape == (4, 2) and a.dtype == torch.float32
    with pytest.raises(ValueError, match="dim"):
        sampler.sample(n_steps=3)
    with pytest.raises(ValueError, match="thin"):
        sampler.sample(dim=2, thin=0)
    with pytest.raises(ValueError, match="step_size"):
        LangevinDynamics(DoubleWellModel(), step_size=-1.0)


def test_one_chain_has_no_variance(seed):
    _, diagnostics = LangevinDynamics(DoubleWellModel(), step_size=0.01).sample(
        dim=2, n_steps=4, return_diagnostics=True
    )
    assert (diagnostics["var"] == 0).all() and diagnostics["mean"].shape == (4, 2)


def test_configure(seed):
    model = GaussianModel(torch.zeros(2), torch.eye(2))
    sampler = LangevinDynamics(model, step_size=0.3).configure(rng="philox", grad_clip=0.0)
    x = sampler.sample(x=torch.zeros(4000, 2), n_steps=2, generator=torch.Generator().manual_seed(seed))
    # no drift: two steps of variance .6, by 8,000 numbers
    assert abs(float(x.var()) / 1.2 - 1) < 6 * (2 / 8000) ** 0.5
    with pytest.raises(ValueError, match="step_size follows"):
        sampler.configure(step_size=1.0)
    with pytest.raises(ValueError, match="rng"):
        sampler.configure(rng="numpy")


@pytest.mark.parametrize("persistent", [False, True])
def test_its_losses_take_it(persistent, seed):
    values = []
    for kind in (samplers.LangevinDynamics, LangevinDynamics):
        torch.manual_seed(seed)
        model = Conditional()
        loss_of = losses.ContrastiveDivergence(
            model,
            kind(model, step_size=0.05, dtype=torch.float64),
            k_steps=4,
            persistent=persistent,
            buffer_size=64,
            init_steps=2,
            dtype=torch.float64,
        )
        data = torch.randn(16, 3, dtype=torch.float64)
        for _ in range(3):
            model.zero_grad()
            loss, negatives = loss_of(data)
            loss.backward()
        values.append([loss.detach(), negatives, *(p.grad for p in model.parameters())])
    for a, b in zip(*values, strict=True):
        torch.testing.assert_close(b, a, **CLOSE)
