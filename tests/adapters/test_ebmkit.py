"""Ours as an ebmkit sampler, against ebmkit's own from the same global generator."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

ebm = pytest.importorskip("ebm", reason="ebmkit is not installed (pip install 'mmebm[peers]')")

from mmebm.adapters.ebmkit import LangevinDynamics  # noqa: E402

# float64 in another order of operations; worst seen 6e-16 over 100 seeds of the cases here (Xeon, 2026-11-22)
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1), nn.Flatten(0)).double()


def runs(seed, options, call):
    out = []
    for kind in (ebm.LangevinDynamics, LangevinDynamics):
        torch.manual_seed(seed)
        out.append(call(kind(**options)))
    return out


@pytest.mark.parametrize(
    "options",
    [
        {"step_size": 0.1, "steps": 6},
        {"step_size": 10.0, "steps": 5, "noise_scale": 0.005, "grad_clip": 0.01, "clamp": (-1, 1)},
        {"step_size": 0.1, "steps": 3, "noise_scale": 0.0},
    ],
)
def test_same_numbers_as_its_own(options, seed):
    energy, x = network(seed), torch.randn(7, 3, dtype=torch.float64)
    before = x.clone()
    for call in (
        lambda s: s.sample(energy, x),
        lambda s: s.sample(energy, x, steps=4, return_trajectory=True),
        lambda s: s.sample(lambda t: energy(t) + t.square().sum(1), x, steps=0, return_trajectory=True),
        lambda s: s.step(energy, x),
    ):
        a, b = runs(seed, options, call)
        torch.testing.assert_close(b, a, **CLOSE)
        assert a.shape == b.shape and not b.requires_grad
    assert torch.equal(x, before)
    assert all(p.requires_grad and p.grad is None for p in energy.parameters())


def test_attributes_are_read_at_each_call(seed):
    energy, x = network(seed), torch.randn(7, 3, dtype=torch.float64)

    def call(sampler):
        sampler.step_size, sampler.steps = 0.3, 2
        return sampler.sample(energy, x)

    a, b = runs(seed, {}, call)
    torch.testing.assert_close(b, a, **CLOSE)


def test_signatures():
    for name in ("__init__", "sample", "step"):
        a, b = (
            [(p.name, p.kind, p.default) for p in inspect.signature(getattr(kind, name)).parameters.values()]
            for kind in (ebm.LangevinDynamics, LangevinDynamics)
        )
        assert a == b
    sampler = LangevinDynamics()
    assert isinstance(sampler, ebm.samplers.Sampler) and sampler.last_accept_rate is None


def test_its_loss_and_buffer_take_it(seed):
    values = []
    for kind in (ebm.LangevinDynamics, LangevinDynamics):
        energy = network(seed)
        buffer = ebm.ReplayBuffer(40, (3,), init_fn=lambda shape: torch.randn(shape, dtype=torch.float64))
        loss_of = ebm.ContrastiveDivergence(kind(0.1, steps=3), buffer, energy_reg=0.1)
        data = torch.randn(8, 3, dtype=torch.float64)
        for _ in range(3):
            energy.zero_grad()
            out = loss_of(energy, data)
            out.loss.backward()
        values.append([out.loss.detach(), out.x_neg, buffer.data, *(p.grad for p in energy.parameters())])
    for a, b in zip(*values, strict=True):
        torch.testing.assert_close(b, a, **CLOSE)


def test_configure(seed):
    torch.manual_seed(seed)
    sampler = LangevinDynamics(1.0, noise_scale=0.0, clamp=(0, 1)).configure(rng="philox", max_update=0.25)
    x = sampler.sample(lambda t: 100 * t.sum(1), torch.full((3, 2), 0.9), steps=2)
    # the update is limited to .25: two roundings of float32
    assert (x - 0.4).abs().max() < 2e-7
    with pytest.raises(ValueError, match="grad_clip follows"):
        sampler.configure(grad_clip=1.0)
    with pytest.raises(ValueError, match="noise_at"):
        sampler.configure(noise_at="never")
