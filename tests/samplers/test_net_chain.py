"""Chains of convolutional energies in one call: found by the sampler, and the same as a step at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mmebm
from mmebm import Langevin
from mmebm.energies import Gaussian, Sum
from mmebm.models import JointEnergy
from mmebm.ops.residual import residual
from mmebm.samplers import whole_chain
from mmebm.training import System
from mmebm.training.presets import demo

# Two fp32 chains whose sums run in another order, from the same noise within 2e-6 of its definition: over 5 steps that
# move x by a tenth in all, 1.4e-6 was seen (1.5e-5 in the records, which reach 1e-3; three seeds, AVX-512).
CLOSE = 2e-5


@pytest.fixture(autouse=True)
def _cpp(need: Callable[[str], None], seed: int) -> None:
    need("cpp")
    torch.manual_seed(seed)


class Block(nn.Module):
    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.one, self.two, self.shortcut = (
            nn.Conv2d(a, b, 3, padding=1),
            nn.Conv2d(b, b, 3, padding=1),
            nn.Conv2d(a, b, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.two(F.leaky_relu(self.one(x), 0.2)) + self.shortcut(x)
        return F.avg_pool2d(F.leaky_relu(h, 0.2), 2)


class Classifier(nn.Module):
    """JEM: a class energy of a residual net with norms in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(Block(3, 6), nn.BatchNorm2d(6), Block(6, 8))
        self.head = nn.Linear(8, 10)

    def classify(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean(dim=(2, 3)))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        logits = self.classify(x)
        if y is None:
            return -logits.logsumexp(1)
        return -torch.gather(logits, 1, y[:, None])[:, 0]


def plain() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(72, 1),
    )


def both(energy: Any, x: Any, *, args: tuple[Any, ...] = (), move: float = 0.02, **options: Any) -> Any:
    """The chain in one call and the loop's with autograd, whose states agree; x moves by about ``move`` a step."""
    structure = x if isinstance(x, dict) else {"x": x}
    leaves = {k: t.clone().requires_grad_() for k, t in structure.items()}
    value = energy(leaves if isinstance(x, dict) else leaves["x"], *args)
    grads = torch.autograd.grad(value.sum(), list(leaves.values()))
    step = move / float(torch.cat([g.flatten() for g in grads]).abs().mean())
    runs = []
    for backend in ("auto", "torch"):
        sampler = Langevin(step, 0.01, backend=backend, **options)
        runs.append(sampler.sample(energy, x, 5, seed=3, args=args, record=("energy", "grad_norm"), thin=2))
    ours, loop = runs
    assert ours.info["op"] == "langevin_net", ours.info["reason"]
    for key in structure:
        a, b, start = (r if not isinstance(r, dict) else r[key] for r in (ours.state, loop.state, x))
        torch.testing.assert_close(a, b, rtol=0, atol=CLOSE)
        assert float((a - start).abs().mean()) > move / 2, "x hardly moves: the comparison would check nothing"
        one, two = (r.trajectory if not isinstance(r.trajectory, dict) else r.trajectory[key] for r in runs)
        torch.testing.assert_close(one, two, rtol=0, atol=CLOSE)
    for name in ("energy", "grad_norm"):
        torch.testing.assert_close(ours.trace[name], loop.trace[name], rtol=1e-3, atol=1e-3)
    return ours


def test_published_energies() -> None:
    x = torch.rand(6, 3, 12, 12) * 2 - 1
    net, jem, labels = plain(), Classifier(), torch.randint(0, 10, (6,))
    both(net, x)
    both(lambda x: net(x).squeeze(1), x)
    both(jem, x)
    both(jem, x, args=(labels,))
    both(lambda x: jem.classify(x)[:, 2] + 0.5 * x.flatten(1).square().sum(1), x)
    both(Sum(jem, Gaussian(0.0, 2.0), lambda x: net(x).squeeze(1)), x)
    both(jem.forward, x)


def test_conditional_and_masked() -> None:
    x = {"a": torch.rand(5, 3, 12, 12), "b": torch.rand(5, 1, 9, 8), "w": torch.rand(5, 4)}
    joint = JointEnergy({"a": (3, 12, 12), "b": (1, 9, 8), "w": (4,)}, net="conv", trunk_width=4)
    both(joint, x)
    sampler = Langevin(0.1, 0.01, bounds=(0.0, 1.0), grad_norm_clip=0.5, prior_std=2.0)
    mask = torch.rand(5, 3, 12, 12) < 0.5
    ours = sampler.sample(joint, x, 4, seed=1, observed={"a": mask, "w": torch.ones(5, 4, dtype=torch.bool)})
    loop = Langevin(0.1, 0.01, bounds=(0.0, 1.0), grad_norm_clip=0.5, prior_std=2.0, backend="torch").sample(
        joint, x, 4, seed=1, observed={"a": mask, "w": torch.ones(5, 4, dtype=torch.bool)}
    )
    assert ours.info["op"] == "langevin_net", ours.info["reason"]
    for key in x:
        torch.testing.assert_close(ours.state[key], loop.state[key], rtol=0, atol=CLOSE)
    assert torch.equal(ours.state["a"][mask], x["a"][mask]) and torch.equal(ours.state["w"], x["w"])


def test_log_prob_and_channels_last() -> None:
    net, x = plain(), torch.rand(4, 3, 12, 12)
    up = Langevin(0.5, 0.0, log_prob=True).sample(lambda x: -net(x).squeeze(1), x, 3, seed=0)
    down = Langevin(0.5, 0.0).sample(lambda x: net(x).squeeze(1), x, 3, seed=0)
    assert up.info["op"] == down.info["op"] == "langevin_net"
    assert torch.equal(up.state, down.state)
    last = x.contiguous(memory_format=torch.channels_last)
    out = Langevin(0.5, 0.0).sample(lambda x: net(x).squeeze(1), last, 3, seed=0)
    assert out.info["op"] == "langevin_net"
    assert torch.equal(out.state, down.state)


@pytest.mark.parametrize("size", [1, (1, 1), [1, 1], (2, 3)])
def test_pooling_of_channels_last(size: Any) -> None:
    """Torch changes the strides of a global pool's result in place, which is not the energy's doing."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.AdaptiveAvgPool2d(size)).to(memory_format=torch.channels_last)
    x = torch.rand(4, 3, 12, 14).contiguous(memory_format=torch.channels_last)
    energy = lambda x: net(x).flatten(1).square().sum(1)
    ours = Langevin(0.5, 0.0).sample(energy, x, 3, seed=0)
    assert ours.info["op"] == "langevin_net", ours.info["reason"]
    loop = Langevin(0.5, 0.0, backend="torch").sample(energy, x, 3, seed=0)
    torch.testing.assert_close(ours.state, loop.state, rtol=0, atol=CLOSE)


def test_weights_are_read_at_each_chain() -> None:
    net, x = plain(), torch.rand(4, 3, 12, 12)
    sampler, torchs = Langevin(0.5, 0.0), Langevin(0.5, 0.0, backend="torch")
    for _ in range(3):
        ours = sampler.sample(net, x, 3, seed=0)
        assert ours.info["op"] == "langevin_net"
        torch.testing.assert_close(ours.state, torchs.sample(net, x, 3, seed=0).state, rtol=0, atol=CLOSE)
        with torch.no_grad():
            for p in net.parameters():
                p.add_(0.2 * torch.randn_like(p))


def test_effects_and_what_is_unknown_take_the_loop() -> None:
    net, x, calls = plain(), torch.rand(4, 3, 12, 12), []

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.calls = net, 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.net(x).squeeze(1)

    counting = Counts()
    assert Langevin(0.1).sample(counting, x, 5, seed=0).info["op"] == "langevin_step"
    assert counting.calls == 5

    def appends(x: Tensor) -> Tensor:
        calls.append(1)
        return net(x).squeeze(1)

    assert Langevin(0.1).sample(appends, x, 5, seed=0).info["op"] == "langevin_step" and len(calls) == 5
    out = Langevin(0.1).sample(lambda x: net(x.sort(1)[0]).squeeze(1), x, 2, seed=0)
    assert out.info["op"] == "langevin_step" and "sort" in out.info["reason"]
    hooked = plain()
    hooked[0].register_forward_hook(lambda *_: None)
    assert Langevin(0.1).sample(hooked, x, 2, seed=0).info["op"] == "langevin_step"
    out = Langevin(0.1).sample(lambda x: net(x).squeeze(1) + x.detach().flatten(1).sum(1), x, 2, seed=0)
    assert out.info["op"] == "langevin_step" and "detach" in out.info["reason"]


def test_a_gradient_that_is_blocked_is_noticed() -> None:
    net, x = plain(), torch.rand(4, 3, 12, 12)

    class Half(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 1.0

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            return 0.5 * g

    out = Langevin(0.1).sample(lambda x: net(Half.apply(x)).squeeze(1), x, 2, seed=0)
    assert out.info["op"] == "langevin_step"


def test_the_training_system() -> None:
    config = demo.config()
    config = replace(config, model=replace(config.model, net="conv"))
    shapes = {"a": (3, 14, 14), "word": (10,)}
    system = System(config, shapes)
    x = {name: torch.rand(4, *shape) * 2 - 1 for name, shape in shapes.items()}
    z = torch.randn(4, config.model.latent)
    for out in (
        system.revise_data(x, seed=0, steps=3),
        system.revise_latent(z, x, seed=0, steps=3),
        system.revise_latent(z, x, seed=0, steps=3, present={"a": torch.tensor([True, False, True, True])}),
    ):
        assert out.info["op"] == "langevin_net", out.info["reason"]


def test_short_form(seed: int) -> None:
    net = plain()
    x = mmebm.langevin(net, torch.rand(2, 3, 12, 12), steps=2, step_size=0.1, seed=0)
    assert x.shape == (2, 3, 12, 12)


def test_an_energy_that_cannot_be_traced_is_not_tried_at_every_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Any] = []
    original = whole_chain.trace
    monkeypatch.setattr(whole_chain, "trace", lambda *a, **k: tried.append(a) or original(*a, **k))
    monkeypatch.setattr(whole_chain, "_refusals", whole_chain._Refusals())
    sampler, x = Langevin(0.01), torch.randn(2, 4)
    for _ in range(70):
        out = sampler.sample(lambda x: x.erfinv().sum(1), 0.1 * x, 1)
        assert "nor a net: it calls erfinv" in out.info["reason"]
    assert len(tried) == 3  # the first, and each 32nd after it
    net = nn.Sequential(nn.Linear(4, 3), nn.RReLU(), nn.Linear(3, 1))
    for mode in (True, False, True):
        sampler.replace(mode="keep").sample(net.train(mode), x, 1)
    assert len(tried) == 5  # another mode may be another energy
    # the same code, but over another network
    held: list[nn.Module] = []
    energy = lambda x: held[0](x).sum((1, 2, 3))
    for act in (nn.RReLU(), nn.SiLU()):
        held[:] = [nn.Sequential(nn.Conv2d(3, 2, 3), act)]
        out = sampler.replace(mode="train").sample(energy, torch.randn(2, 3, 4, 4), 1)
    assert out.info["op"] == "langevin_net", out.info["reason"]


@pytest.mark.parametrize("keepdim", [False, True])
def test_a_norm_of_exact_zeros_has_the_slope_0(keepdim: bool) -> None:
    """As torch's has, where the root of a sum of squares has none; here a chain at the origin among others."""
    layer = nn.Conv1d(3, 7, 3, bias=False)
    x = torch.randn(100, 3, 4)
    x[1] = 0.0

    def energy(x: Tensor) -> Tensor:
        return layer(x).flatten(1).norm(dim=1, keepdim=keepdim).reshape(-1)

    for _ in range(2):
        ours, loop = (Langevin(0.1, 0.0, backend=b).sample(energy, x, 5, seed=0) for b in ("auto", "torch"))
        assert ours.info["op"] == "langevin_net", ours.info["reason"]
        torch.testing.assert_close(ours.state, loop.state, rtol=0, atol=CLOSE)
        assert torch.equal(ours.state[1], x[1]) and not ours.info["nonfinite"].any()
    root = lambda x: layer(x).flatten(1).square().sum(1).sqrt()
    broken = Langevin(0.1, 0.0, on_nonfinite="ignore").sample(root, x, 5, seed=0)
    assert broken.info["nonfinite"].nonzero().flatten().tolist() == [1]


def test_what_is_masked_may_be_nan() -> None:
    decoder = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Unflatten(1, (2, 2, 2)), nn.ConvTranspose2d(2, 1, 4, 2, 1))
    x, seen = torch.rand(6, 1, 4, 4), torch.rand(6, 1, 4, 4) > 0.3
    z = torch.randn(6, 4)

    def posterior(z: Tensor, x: Tensor, seen: Tensor) -> Tensor:
        return residual([decoder(z)], [x], observed=[seen]) + 0.5 * z.square().sum(1)

    ends = []
    for holes in (0.0, torch.nan, torch.inf):
        out = Langevin(0.05, 0.0).sample(posterior, z, 5, args=(x.masked_fill(~seen, holes), seen), seed=0)
        assert out.info["op"] == "langevin_net", out.info["reason"]
        ends.append(out.state)
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])
    loop = Langevin(0.05, 0.0, backend="torch").sample(posterior, z, 5, args=(x, seen), seed=0)
    torch.testing.assert_close(ends[0], loop.state, rtol=0, atol=CLOSE)


def test_a_vector_of_zeros_by_its_norm_is_no_number() -> None:
    first, last = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.Linear(8 * 36, 1)

    def energy(x: Tensor) -> Tensor:
        h = F.relu(first(x)).flatten(1)
        return -last(h / h.norm(dim=1, keepdim=True)).squeeze(1)

    x = torch.randn(4, 1, 6, 6)
    sampler = Langevin(0.1, 0.0, on_nonfinite="ignore")
    sampler.sample(energy, x, 3, seed=0)  # the first chain of an energy is compared with it, the second is not
    x[2] = 0
    out = sampler.sample(energy, x, 3, seed=0, record=("energy",))
    assert out.info["op"] == "langevin_net", out.info["reason"]
    assert out.trace["energy"][0].isnan().tolist() == [False, False, True, False]
    assert out.info["nonfinite"].tolist() == [False, False, True, False]
