"""Energies traced into nets: found as they are, whatever module or function they are, or refused by name."""

from __future__ import annotations

import collections
import operator
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmebm.energies import CannotLower
from mmebm.energies.trace import tied, trace
from mmebm.models import JointEnergy, SharedGenerator
from mmebm.ops.net import reference
from mmebm.ops.net.graph import check_net
from mmebm.ops.net.op import net_energy
from mmebm.samplers import Langevin
from mmebm.state import flatten


def agree(energy: Callable[..., Any], state: Any, *args: Any, within: float = 1e-10) -> Any:
    """The net of ``energy`` at ``state`` and its gradient are the energy's own, in float64; ``within``: relatively."""
    traced = trace(energy, state, args=args)
    _, tensors, build = flatten(state)
    leaves = [t.clone().requires_grad_() for t in tensors]
    value = energy(build(leaves), *args)
    grads = torch.autograd.grad(value.sum(), leaves)
    flat, wanted = (torch.cat([t.flatten(1) for t in ts], 1) for ts in (tensors, grads))
    check_net(traced.net, flat.shape[0], flat.shape[1], flat.device)
    ours, grad = reference.energy_and_gradient(flat, traced.net)
    # both in float64, sums in another order: the last bits of 2^-52
    torch.testing.assert_close(
        ours.sum() if traced.scalar else ours,
        value.reshape(-1).detach().squeeze() if traced.scalar else value.reshape(-1).detach(),
        rtol=within,
        atol=within,
    )
    torch.testing.assert_close(grad, wanted, rtol=10 * within, atol=within * float(wanted.abs().max()))
    assert float(wanted.abs().max()) > 0
    return traced


def images(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64) * 2 - 1


@pytest.fixture(autouse=True)
def _seeded(seed: int) -> None:
    torch.manual_seed(seed)


def tutorial() -> nn.Sequential:
    """The energy of a well-known tutorial on deep energy models."""
    c = 8
    return nn.Sequential(
        nn.Conv2d(1, c, 5, stride=2, padding=4),
        nn.SiLU(),
        nn.Conv2d(c, 2 * c, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.Conv2d(2 * c, 4 * c, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.Conv2d(4 * c, 4 * c, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(16 * c, 4 * c),
        nn.SiLU(),
        nn.Linear(4 * c, 1),
    ).double()


class WideResNet(nn.Module):
    """A classifier with pre-activation blocks, as JEM has it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.one, self.two = nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.shortcut = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1, stride=2)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        y = self.two(F.leaky_relu(self.norm(self.one(F.leaky_relu(h, 0.2))), 0.2)) + self.shortcut(h)
        return self.head(F.leaky_relu(y, 0.2).mean(dim=(2, 3)))


@pytest.mark.parametrize("chains", (1, 3))
def test_published_energies(chains: int) -> None:
    net = tutorial()
    agree(lambda x: net(x).squeeze(dim=-1), images(chains, 1, 28, 28))
    agree(net, images(chains, 1, 28, 28))
    logits = WideResNet().double().eval()
    x, labels = images(chains, 3, 12, 12), torch.randint(0, 10, (chains,))
    agree(lambda x: -logits(x).logsumexp(1), x)
    agree(lambda x, y: -logits(x)[torch.arange(len(x)), y], x, labels)
    agree(lambda x, y: -logits(x).gather(1, y.unsqueeze(1)).squeeze(1), x, labels)
    agree(lambda x, y: F.cross_entropy(logits(x), y, reduction="none"), x, labels)
    agree(lambda x: logits(x)[:, 3] + (x**2).flatten(1).sum(1) / (2 * 0.01**2), x)


def test_a_class_beside_a_logit_that_overflowed() -> None:
    """What is not chosen does not count, also where it is infinite."""
    logits, x = nn.Linear(2, 3), torch.tensor([[3.5, 0.1], [1.0, 0.2]])
    with torch.no_grad():
        logits.weight[2, 0] = -1e38
    label = torch.tensor([0, 1])
    for energy in (lambda x: F.cross_entropy(logits(x), label, reduction="none"), lambda x: logits(x)[[0, 1], label]):
        leaf = x.clone().requires_grad_()
        value = energy(leaf)
        (grad,) = torch.autograd.grad(value.sum(), leaf)
        found = reference.energy_and_gradient(x, trace(energy, x).net)
        assert value.isfinite().all()
        torch.testing.assert_close(found, (value.detach(), grad), rtol=1e-6, atol=1e-6)


def test_conditions_of_each_chain() -> None:
    """Images, embedded labels and coordinates beside the state's channels, the same and another for each chain."""
    conv, embed = nn.Conv2d(6, 4, 3, padding=1).double(), nn.Embedding(10, 2 * 36).double()
    image, labels = images(5, 3, 6, 6), torch.tensor([3, 1, 4, 1, 5])
    value = lambda h: F.silu(conv(h)).square().sum((1, 2, 3))
    agree(lambda x: value(torch.cat([x, image, image[:, :1]], 1)), images(5, 2, 6, 6))
    agree(lambda x: value(torch.cat([embed(labels).view(-1, 2, 6, 6), x, image[:, 1:]], 1)), images(5, 2, 6, 6))
    agree(lambda x: value(torch.stack([*image.unbind(1), x[:, 0], image[:, 0], x[:, 1]], 1)), images(5, 2, 6, 6))

    def with_coordinates(x: Tensor) -> Tensor:
        at = torch.linspace(-1, 1, 6, dtype=x.dtype)
        rows, columns = at.view(1, 1, 6, 1).expand(len(x), 1, 6, 6), at.view(1, 1, 1, 6).expand(len(x), 1, 6, 6)
        return value(torch.cat([x, rows, columns], 1))

    agree(with_coordinates, images(5, 4, 6, 6))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(2, 3, 3, padding=(0, 1), padding_mode="circular"),
        nn.Conv2d(2, 3, (1, 4), padding="same"),
        nn.Conv2d(2, 3, 3, padding=2, padding_mode="replicate"),
        nn.InstanceNorm2d(2),
        nn.InstanceNorm2d(2, affine=True, track_running_stats=True),
        nn.Upsample(scale_factor=1.5, mode="bilinear"),
        nn.AdaptiveAvgPool2d((2, 3)),
        nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layers(layer: nn.Module) -> None:
    layer = layer.double().eval()
    for name, t in layer.named_buffers():
        if name.startswith("running"):
            t.uniform_(0.5, 1.5)
    agree(lambda x: layer(x).tanh().sum((1, 2, 3)), images(3, 2, 5, 6))


@pytest.mark.parametrize("corners", [True, False])
def test_layers_over_one_dimension(corners: bool) -> None:
    up = nn.Upsample(scale_factor=2, mode="linear", align_corners=corners)
    norm = nn.InstanceNorm1d(2, track_running_stats=True).double().eval()
    agree(lambda x: up(x).tanh().sum((1, 2)), images(3, 2, 7))
    agree(lambda x: F.adaptive_avg_pool1d(norm(x), 3).tanh().sum((1, 2)), images(3, 2, 7))


LIMITS: dict[str, Callable[[Tensor], Tensor]] = {
    "clamp": lambda h: h.clamp(-0.5, 0.5),
    "clamp from 0": lambda h: h.clamp(0, 0.5),
    "clip below": lambda h: h.clip(min=0.0),
    "clamp above": lambda h: h.clamp(max=0.5),
    "clamp_min": lambda h: h.clamp_min(-0.5),
    "hardtanh": lambda h: F.hardtanh(h, -0.5, 0.5),
    "relu6": lambda h: F.relu6(12 * h),
    "prelu": lambda h: F.prelu(h, torch.tensor([0.3, -0.2], dtype=h.dtype)),
    "in place": lambda h: (2 * h).clamp_(-1, 1) + F.relu6(0.5 * h, inplace=True),
}


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_limits_and_what_lies_on_them(name: str, dtype: torch.dtype) -> None:
    """Bounds put a state onto its limits, where torch.clamp has the slope 1, hardtanh 0 and prelu its weight."""
    x = images(3, 2, 6, 6).to(dtype)
    x[:, :, :3] = x[:, :, :3].sign() * 0.5
    x[:, :, 3, :3], x[:, :, 3, 3:] = 0.0, 1e6
    weight = images(2, 6, 6).to(dtype)
    energy = lambda x: (LIMITS[name](x) * weight).sum((1, 2, 3)) + 0.1 * LIMITS[name](x).square().sum((1, 2, 3))
    leaf = x.clone().requires_grad_()
    value = energy(leaf)
    (grad,) = torch.autograd.grad(value.sum(), leaf)
    layers = nn.Conv2d(2, 1, 1).to(dtype)  # a net has a layer
    nothing = lambda x: 0 * layers(x.clamp(0, 1)).sum((1, 2, 3))
    found, slopes = reference.energy_and_gradient(x.flatten(1), trace(lambda x: energy(x) + nothing(x), x).net)
    rounding = 8 * torch.finfo(dtype).eps  # of sums of a hundred numbers around 1, and 10^6 where nothing limits it
    torch.testing.assert_close(found, value.detach(), rtol=rounding, atol=rounding * 100)
    torch.testing.assert_close(slopes.view_as(grad), grad, rtol=rounding, atol=rounding)


def test_directions_and_cosines() -> None:
    """Energies of two modalities by the angle of their features, also of features that are 0."""
    a, b = nn.Conv2d(2, 4, 3).double(), nn.Linear(5, 64).double()
    state = {"image": images(3, 2, 6, 6), "words": images(3, 5)}

    def energy(s: dict[str, Tensor]) -> Tensor:
        image, words = F.normalize(a(s["image"]).flatten(1)), F.normalize(b(s["words"]), dim=-1, eps=1e-6)
        return -5 * (image * words).sum(-1)

    agree(energy, state)
    agree(lambda s: F.cosine_similarity(a(s["image"]).flatten(1), b(s["words"])), state)
    agree(lambda s: energy(s) + (F.normalize(torch.relu(s["words"]) * 0) * s["words"]).sum(1), state)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu by tanh": lambda h: F.gelu(h, approximate="tanh"),
    "mish": F.mish,
    "celu": lambda h: F.celu(h, 0.5),
    "selu": F.selu,
    "logsigmoid": F.logsigmoid,
    "hardsigmoid": lambda h: F.hardsigmoid(2 * h),
    "hardswish": lambda h: F.hardswish(2 * h),
    "modules": nn.Sequential(nn.Mish(), nn.Hardswish(), nn.LogSigmoid(), nn.Hardsigmoid(), nn.Hardtanh(-0.3, 0.4)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_made_of_others(name: str) -> None:
    layer = nn.Conv2d(2, 3, 3).double()
    # torch's own hardsigmoid and hardswish take a sixth as float32 has it, 3e-8 beside
    within = 1e-7 if name.startswith(("hard", "modules")) else 1e-10
    agree(lambda x: FUNCTIONS[name](4 * layer(x)).square().sum((1, 2, 3)), images(3, 2, 6, 6), within=within)


@pytest.mark.parametrize("name", ["hardsigmoid", "hardswish", "logsigmoid", "mish"])
def test_functions_that_somebody_replaces(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two chains of an energy whose net is kept."""
    layer, x = nn.Conv2d(1, 4, 3), torch.randn(3, 1, 6, 6)
    energies: dict[str, Callable[[Tensor], Tensor]] = {
        "hardsigmoid": lambda x: F.hardsigmoid(layer(x)).square().sum((1, 2, 3)),
        "hardswish": lambda x: F.hardswish(layer(x)).square().sum((1, 2, 3)),
        "logsigmoid": lambda x: F.logsigmoid(layer(x)).square().sum((1, 2, 3)),
        "mish": lambda x: F.mish(layer(x)).square().sum((1, 2, 3)),
    }
    energy = energies[name]
    sampler = Langevin(0.05, 0.01)
    assert sampler.sample(energy, x, 3, seed=1).info["op"] == "langevin_net"
    monkeypatch.setattr(F, name, lambda h: 2 * h)
    out, loop = (s.sample(energy, x, 3, seed=1) for s in (sampler, sampler.replace(backend="torch")))
    assert out.info["op"] == "langevin_step"
    torch.testing.assert_close(out.state, loop.state, rtol=0, atol=1e-6)  # the noise to its rounding, 6e-8 seen


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_losses(reduction: str) -> None:
    """Residuals of decoders: robust ones, and of black and white images."""
    decoder, target = nn.Linear(4, 12).double(), images(12)
    black = (target > 0).double()

    def energy(z: Tensor) -> Tensor:
        out = 3 * decoder(z)
        goal, bits = target.expand_as(out), black.expand_as(out)
        parts = [F.huber_loss(out, goal, reduction, 0.4), F.smooth_l1_loss(out, goal, reduction=reduction, beta=0.7)]
        parts += [
            F.binary_cross_entropy_with_logits(out, bits, reduction=reduction),
            F.mse_loss(out, goal, reduction=reduction),
        ]
        parts += [
            F.pairwise_distance(out, goal).sum() if reduction != "none" else F.pairwise_distance(out, goal)[:, None]
        ]
        return sum(part if reduction != "none" else part.sum(1) for part in parts)

    agree(energy, images(5, 4))


def test_layers_over_points() -> None:
    """A matrix for every position: sets of points, tokens, images with their channels last."""
    net = nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 2), nn.ReLU6(), nn.GELU("tanh")).double()
    norm, mix, head = nn.LayerNorm(2).double(), nn.Linear(5, 5, bias=False).double(), nn.Linear(2, 1).double()
    points = images(4, 5, 3)

    def mixed(x: Tensor) -> Tensor:
        tokens = norm(net(x))
        return head(tokens + F.mish(mix(tokens.transpose(1, 2))).transpose(1, 2)).sum((1, 2))

    agree(lambda x: net(x).square().sum((1, 2)), points)
    agree(lambda x: head(net(x.view(-1, 3))).view(4, 5).logsumexp(1), points)
    agree(lambda x: head(net(x.flatten(0, 1))).reshape(4, -1).sum(1), points)
    agree(lambda x: (net(x) @ head.weight[0]).square().sum(1), points)
    agree(mixed, points)
    agree(lambda x: mixed(x).sum(), points[:1])
    agree(lambda x: net(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).mean((1, 2, 3)), images(4, 3, 5, 6))
    for energy in (
        lambda x: (net(x.view(-1, 3)) - net(x.view(-1, 3)).mean(0)).view(4, -1).sum(1),
        lambda x: net(x.view(-1, 3))[::5].sum(1),
        lambda x: net(x.view(5, 4, 3)).sum((1, 2))[:4],
        lambda x: net(x.view(-1, 3)).sum(1)[:4],
    ):
        with pytest.raises(CannotLower, match=r"in one dimension|not one per chain|over the chains"):
            trace(energy, points)


class ByShapes(nn.Module):
    """Looks modalities up by name, as people write it."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes = {"a": (2, 6, 6), "b": (3, 5, 5)}
        self.nets = nn.ModuleDict({name: nn.Conv2d(c, 4, 3) for name, (c, *_) in self.shapes.items()})

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        total = torch.zeros(len(x["a"]), dtype=torch.float64)
        for name, shape in self.shapes.items():
            total = total + self.nets[name](x[name].view(-1, *shape)).tanh().sum((1, 2, 3))
        return total + sum(0.5 * v.square().flatten(1).sum(1) for v in x.values())


def test_modalities_by_name() -> None:
    agree(ByShapes().double(), {"a": images(3, 2, 6, 6), "b": images(3, 3, 5, 5)})


@pytest.mark.parametrize("net", ["conv", "resnet"])
def test_this_package(seed: int, net: Any) -> None:
    joint = JointEnergy({"a": (3, 28, 28), "b": (1, 13, 17), "w": (10,)}, net=net, trunk_width=4).double()
    agree(joint, {"w": images(3, 10), "a": images(3, 3, 28, 28), "b": images(3, 1, 13, 17)})
    shapes = {"a": (3, 28, 28), "w": (10,)}
    x = {"a": images(4, 3, 28, 28), "w": images(4, 10)}
    for likelihood in ("gaussian", "laplace"):
        weights = {"a": 0.5, "w": 3.0}
        generator = SharedGenerator(shapes, 5, net=net, width=4, likelihood=likelihood, weights=weights).double()
        agree(lambda z, g=generator: g.negative_log_likelihood(x, z) + 0.5 * z.square().sum(1), images(4, 5))
        present = {"a": torch.tensor([True, False, True, True])}
        agree(lambda z, g=generator, p=present: g.negative_log_likelihood(x, z, p), images(4, 5))


def test_scalars_and_signs() -> None:
    net = tutorial()
    x = images(3, 1, 28, 28)
    assert agree(lambda x: 2 * net(x).sum() - net(x).mean() / 3, x).scalar
    assert not agree(lambda x: -net(x), x).scalar
    flipped = trace(net, x, log_prob=True).net
    torch.testing.assert_close(reference.energy(x.flatten(1), flipped), -net(x).squeeze(1).detach())


def test_weights_are_those_of_the_call() -> None:
    net = (
        nn.Sequential(
            torch.nn.utils.parametrizations.spectral_norm(nn.Conv2d(1, 4, 3)),
            nn.SiLU(),
            torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3)),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(64, 1),
        )
        .double()
        .eval()
    )
    x = images(2, 1, 8, 8)
    agree(net, x)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.3 * torch.randn_like(p))
    agree(net, x)


def test_in_place_activations() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3), nn.LeakyReLU(0.1, inplace=True))
    net.double()
    agree(lambda x: net(x).sum((1, 2, 3)), images(2, 1, 8, 8))
    # the view would see another tensor than was written down
    with pytest.raises(CannotLower, match="view in place"):
        trace(lambda x: (net[0](x).flatten(1).relu_()).sum(1), images(2, 1, 8, 8))


def test_scripted_module() -> None:
    net: Any = torch.jit.trace(tutorial(), images(2, 1, 28, 28))
    agree(net, images(2, 1, 28, 28))


TRAINED = nn.BatchNorm2d(1).double()
REFUSALS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "an unknown operation": (lambda x: x.sort(1)[0].sum((1, 2, 3)), "sort"),
    "random numbers": (lambda x: (x + torch.randn_like(x)).sum((1, 2, 3)), "random"),
    "dropout": (lambda x: F.dropout(x, 0.5).sum((1, 2, 3)), "random|dropout"),
    "a branch on values": (lambda x: x.sum((1, 2, 3)) if x.sum() > 0 else x.mean((1, 2, 3)), "calls gt"),
    "a value in Python": (lambda x: x.sum((1, 2, 3)) * x.flatten(1)[0, 0].item(), "chains|calls"),
    "other chains' values": (lambda x: (x * x.flip(0)).sum((1, 2, 3)), "between chains"),
    "rolled chains": (lambda x: (x * x.roll(1, 0)).sum((1, 2, 3)), "between chains"),
    "the batch's mean": (lambda x: (x - x.mean(0)).square().sum((1, 2, 3)), "over the chains"),
    "batch norm in train mode": (lambda x: TRAINED(x).sum((1, 2, 3)), "in place|train mode"),
    "a changed state": (lambda x: x.mul_(2).sum((1, 2, 3)), "in place"),
    "another dtype": (lambda x: x.float().sum((1, 2, 3)), "casts"),
    "no gradient": (lambda x: x.detach().sum((1, 2, 3)), "detach"),
    "numpy": (lambda x: torch.from_numpy(x.numpy().sum((1, 2, 3))), "numpy"),
    "a list": (lambda x: torch.tensor(x.tolist()).sum((1, 2, 3)), "tolist"),
    "three dimensions": (lambda x: F.conv3d(x[:, None], torch.ones(1, 1, 1, 1, 1).double()).sum((1, 2, 3, 4)), "3 dim"),
    "one chain's value": (lambda x: x[0].sum(), "chains"),
    "too many values": (lambda x: x.sum((2, 3)).repeat(1, 2), "returns shape"),
    "a value in a new tensor": (lambda x: x.sum((1, 2, 3)) * torch.tensor([x.mean(), 1.0])[0], "out of torch"),
    "norms of one element": (lambda x: F.group_norm(x.mean((2, 3)), 1).sum(1), "one element a group"),
    "whether autograd watches": (lambda x: x.sum((1, 2, 3)) * (1.0 if x.requires_grad else 2.0), "requires_grad"),
    "where a tensor lies": (lambda x: x.sum((1, 2, 3)) * (1.0 if x.is_contiguous() else 2.0), "is_contiguous"),
    "a limit for each row": (lambda x: x.clamp(max=torch.zeros(6)).sum((1, 2, 3)), "by a tensor"),
    "a limit of the state": (lambda x: x.clamp(max=x.mean((1, 2, 3), keepdim=True)).sum((1, 2, 3)), "by a tensor"),
    "a limit that is none": (lambda x: x.clamp(min=float("nan")).sum((1, 2, 3)), "by nan"),
    "a limit beyond all": (lambda x: x.clamp(min=float("inf")).sum((1, 2, 3)), "by inf"),
    "a constant": (lambda x: torch.zeros(len(x)), "does not come from the state"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case: str) -> None:
    energy, message = REFUSALS[case]
    x = images(3, 1, 6, 6)
    before = x.clone()
    with pytest.raises(CannotLower, match=message):
        trace(energy, x)
    assert torch.equal(x, before)


def test_refusals_leave_no_trace() -> None:
    norm: Any = nn.BatchNorm2d(1).double()
    held = torch.zeros(3)
    with pytest.raises(CannotLower):
        trace(lambda x: norm(x).sum((1, 2, 3)), images(3, 1, 6, 6))
    with pytest.raises(CannotLower):
        trace(lambda x: (x + held.add_(1)[0]).sum((1, 2, 3)), images(3, 1, 6, 6))
    assert norm.num_batches_tracked == 0 and not norm.running_mean.any() and not held.any()
    state = torch.random.get_rng_state()
    with pytest.raises(CannotLower):
        trace(lambda x: F.dropout(x).sum((1, 2, 3)), images(3, 1, 6, 6) * 0)
    assert torch.equal(torch.random.get_rng_state()[:8], state[:8])


# ---------------------------------------------------------------------------------------------------------------------
# Effects that no result shows
# ---------------------------------------------------------------------------------------------------------------------


class Held(nn.Module):
    """An energy with containers in which it might count its calls."""

    def __init__(self, count: Callable[[Any], Any]) -> None:
        super().__init__()
        self.conv, self.count = nn.Conv1d(3, 7, 3), count
        self.list: list[Any] = []
        self.dict: dict[str, Any] = {"n": 0}
        self.pair = ([], 1.0)
        self.table: dict[str, list[int]] = {"n": []}
        self.set: set[Any] = set()
        self.deque: Any = collections.deque()
        self.bytes, self.array = bytearray(), numpy.zeros(1)
        self.layers = nn.ModuleList()
        self.parts = nn.Sequential()

    @property
    def log(self) -> list[Any]:
        return self.list

    def get(self) -> list[Any]:
        return self.list

    def forward(self, x: Tensor) -> Tensor:
        self.count(self)
        return F.silu(self.conv(x)).sum((1, 2))

    def size(self) -> int:
        held = [self.list, self.pair[0], self.table["n"], self.set, self.deque, self.bytes, self.layers, self.parts]
        return sum(map(len, held)) + len(self.dict) - 1 + self.dict["n"] + int(self.array[0])


def _alias(m: Any) -> None:
    n = m.list
    n += [1]


def _alias_of_an_alias(m: Any) -> None:
    n = m.list
    other = n
    other += (1,)


def _chained(m: Any) -> None:
    a = n = m.list  # noqa: F841
    n += [1]


def _pair_of_names(m: Any) -> None:
    n, _ = m.list, 1
    n += [1]


def _conditional(m: Any) -> None:
    n = m.list if m.training else m.log
    n += [1]


def _either(m: Any) -> None:
    n = m.list or m.log
    n += [1]


def _item_of_a_tuple(m: Any) -> None:
    n = m.pair[0]
    n += [1]


def _unpacked(m: Any) -> None:
    n, _ = m.pair
    n += [1]


def _iterated(m: Any) -> None:
    for n in m.table.values():
        n += [1]


def _looked_up(m: Any) -> None:
    n = m.table.get("n")
    n += [1]


def _property(m: Any) -> None:
    n = m.log
    n += [1]


def _method(m: Any) -> None:
    n = m.get()
    n += [1]


def _argument(m: Any) -> None:
    def add(n: Any) -> None:
        n += [1]

    add(m.list)


def _enclosed(m: Any) -> None:
    n = m.list

    def add() -> None:
        nonlocal n
        n += [1]

    add()


def _of_a_pair(m: Any) -> None:
    for n in (m.list, m.dict):
        n *= 2 if len(n) else 1
        n += [1]
        break


def _in_a_comprehension(m: Any) -> None:
    for n in [part for part in [m.list] if m is not None]:
        n += [1]


def _several(m: Any) -> None:
    def add(*several: Any) -> None:
        for n in several:
            n += [1]

    add(m.list)


def _yielded(m: Any) -> None:
    def each() -> Any:
        yield m.list

    for n in each():
        n += [1]


def _twice(m: Any) -> None:
    n = m.list
    n += [1]
    n *= 2


def _union(m: Any) -> None:
    n = m.dict
    n |= {"n": n["n"] + 1}


def _subscript(m: Any) -> None:
    d = m.dict
    d["n"] += 1


def _set(m: Any) -> None:
    n = m.set
    n |= {len(n)}


def _deque(m: Any) -> None:
    n = m.deque
    n += (1,)


def _bytes(m: Any) -> None:
    n = m.bytes
    n += b"a"


def _array(m: Any) -> None:
    n = m.array
    n += 1


def _layers(m: Any) -> None:
    n = m.layers
    n += [nn.Identity()]


def _parts(m: Any) -> None:
    n = m.parts
    n += nn.Sequential(nn.Identity())


def _fields(m: Any) -> None:
    d = m.__dict__
    d |= {"list": [*m.list, 1]}


COUNTS: dict[str, Callable[[Any], Any]] = {
    **{f.__name__.strip("_"): f for f in (_alias, _alias_of_an_alias, _chained, _pair_of_names, _conditional, _either)},
    **{f.__name__.strip("_"): f for f in (_item_of_a_tuple, _unpacked, _iterated, _looked_up, _property, _method)},
    **{f.__name__.strip("_"): f for f in (_argument, _enclosed, _twice, _union, _subscript, _set, _deque, _bytes)},
    **{f.__name__.strip("_"): f for f in (_of_a_pair, _in_a_comprehension, _several, _yielded)},
    **{f.__name__.strip("_"): f for f in (_array, _layers, _parts, _fields)},
    "append": lambda m: m.list.append(1),
    "extend": lambda m: m.list.extend([1]),
    "insert": lambda m: m.list.insert(0, 1),
    "add": lambda m: m.set.add(len(m.set)),
    "update": lambda m: m.dict.update(n=m.dict["n"] + 1),
    "setdefault": lambda m: m.dict.setdefault(len(m.dict), 0),
    "by the name of the operator": lambda m: m.list.__iadd__([1]),
    "by the name of the subscript": lambda m: m.dict.__setitem__("n", m.dict["n"] + 1),
    "by a function": lambda m: operator.iadd(m.list, [1]),
    "by another function": lambda m: operator.setitem(m.dict, "n", m.dict["n"] + 1),
}


@pytest.mark.parametrize("case", COUNTS)
def test_energies_that_count_their_calls(case: str) -> None:
    """Refused before they are called: the chain calls them as often as a loop does."""
    energy = Held(COUNTS[case])
    with pytest.raises(CannotLower):
        trace(energy, torch.randn(2, 3, 4))
    assert energy.size() == 0
    by_hand = Held(COUNTS[case])
    Langevin(0.1).sample(energy, torch.randn(2, 3, 4), 3, seed=0)
    for _ in range(3):
        by_hand(torch.randn(2, 3, 4))
    assert energy.size() == by_hand.size() > 0


class CountsByIndex(nn.Module):
    """What syntax calls is code of the user's, too."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def __getitem__(self, i: int) -> float:
        self.n += 1
        return 1.0

    def __add__(self, other: Any) -> Any:
        self.n += 1
        return other

    def __len__(self) -> int:
        self.n += 1
        return 1


class Indexed(nn.Module):
    def __init__(self, read: Callable[[Any], Any]) -> None:
        super().__init__()
        self.conv, self.read, self.counts = nn.Conv1d(3, 7, 3), read, CountsByIndex()

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.counts) * F.silu(self.conv(x)).sum((1, 2))


@pytest.mark.parametrize("read", [lambda m: m[0], lambda m: m + 1.0, lambda m: len(m)])
def test_what_syntax_calls_is_examined(read: Callable[[Any], Any]) -> None:
    energy = Indexed(read)
    Langevin(0.1).sample(energy, torch.randn(2, 3, 4), 4, seed=0)
    assert energy.counts.n == 4


class InPlace(nn.Module):
    """Local names that are written to in place, next to containers that are only read."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv1d(3, 3, 3, padding=1) for _ in range(3))
        self.weights, self.sizes, self.table = [0.5, 0.25, 2.0], {"a": 1.0, "b": 2.0}, {"a": [1.0, 2.0]}
        self.shift, self.start = nn.Parameter(torch.ones(1)), 0.0

    def term(self, h: Tensor, w: float) -> Tensor:
        return w * h.square().sum((1, 2))

    def forward(self, x: Tensor) -> Tensor:
        e, h, names, n = self.start, x * 1.0, [], 0
        names += ["a"]
        for layer, w in zip(self.layers, self.weights):
            h = layer(h)
            h += self.shift
            e += self.term(h, w)
            n += 1
        for size in self.sizes.values():
            e += size * h.sum((1, 2))
        e *= 0.5
        e -= n * self.table["a"][1]
        return e


def test_what_is_local_is_written_to_in_place() -> None:
    agree(InPlace().double(), images(2, 3, 8))


class OfParameters(nn.Module):
    """torch's own containers, which refuse to be called."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(4, 3, 3), torch.randn(2, 4, 3)])
        self.shifts = nn.ParameterDict({"a": torch.randn(4), "b": torch.randn(2)})

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(F.conv1d(x, self.weights[0], self.shifts["a"]))
        return F.silu(F.conv1d(h, self.weights[1], self.shifts["b"])).sum((1, 2))


def test_lists_and_dicts_of_parameters() -> None:
    agree(OfParameters().double(), images(2, 3, 8))


def test_gradients_of_a_net_reach_the_parameters() -> None:
    """Those of an energy and of a gradient penalty, against autograd on the module."""
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.SiLU(), nn.Flatten(), nn.Linear(64, 1), nn.Flatten(0)).double()
    x = images(3, 1, 6, 6)
    value, gradient = net_energy(x.flatten(1), tied(trace(net, x).net, net))
    found = torch.autograd.grad(value.sum() + gradient.square().sum(), list(net.parameters()))
    at = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(net(at).sum(), at, create_graph=True)
    wanted = torch.autograd.grad(net(at).sum() + slope.square().sum(), list(net.parameters()), materialize_grads=True)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
    normed = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Conv2d(1, 4, 3)), nn.Flatten(), nn.Linear(64, 1))
    normed.double().eval()
    with pytest.raises(ValueError, match=r"0\.parametrizations\.weight\.original is no tensor of the net"):
        tied(trace(normed, x).net, normed)
