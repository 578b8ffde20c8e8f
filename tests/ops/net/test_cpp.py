"""The net ops in C++ against float64: every kind of layer, published energies, whole chains, invariances."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from mmebm import native
from mmebm.energies.trace import trace
from mmebm.models import JointEnergy, SharedGenerator
from mmebm.ops.common.params import FIELDS, StepParams
from mmebm.ops.langevin_mlp import op as mlp
from mmebm.ops.net import cpp, op, reference
from mmebm.ops.net.graph import FUNCTIONS, Activation, Add, Affine, Input, Net, Node, pack, unpack

pytestmark = pytest.mark.usefixtures("cpp")

# The normals may be this far from their float64 values (mmebm.noise).
NORMAL_TOLERANCE = 2e-6
# An fp32 result may be off by some of its last bits, also where torch's happens to be exact: of the largest result.
FLOAT_TOLERANCE = 1e-6
# Two fp32 passes may take different sides of a kink that is nearer than this.
KINK = 1e-4


# -- nets


class Residual(nn.Module):
    """Two convolutions, a 1x1 shortcut, average pooling."""

    def __init__(self, a: int, b: int, act: Callable[[Tensor], Tensor] = F.silu) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(a, b, 3, padding=1), nn.Conv2d(b, b, 3, padding=1)
        self.shortcut, self.act = nn.Conv2d(a, b, 1), act

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.act(self.two(self.act(self.one(x))) + self.shortcut(x)), 2)


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _norm(module: Any) -> Any:
    """Statistics and weights that are not those of a new module."""
    for t in (*module.parameters(), *module.buffers()):
        if t.is_floating_point():
            t.data = torch.rand_like(t) + 0.5
    return module.eval()


def _twice(x: Tensor) -> Tensor:
    return torch.cat([x, x.flip(2)], dim=1)


# Each as (what makes it, shape of one chain's input). Odd sides, single channels, and channels that fill no block.
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv 1x1": (lambda: nn.Conv2d(3, 5, 1), (3, 5, 7)),
    "conv 2x2": (lambda: nn.Conv2d(2, 3, 2), (2, 5, 4)),
    "conv 3x3": (lambda: nn.Conv2d(5, 7, 3, padding=1), (5, 7, 9)),
    "conv 3x3, no bias": (lambda: nn.Conv2d(1, 1, 3, padding=1, bias=False), (1, 7, 9)),
    "conv 4x4, stride 2": (lambda: nn.Conv2d(3, 12, 4, stride=2, padding=1), (3, 9, 11)),
    "conv 5x5, stride 2, wide padding": (lambda: nn.Conv2d(1, 16, 5, stride=2, padding=4), (1, 9, 8)),
    "conv 6x3": (lambda: nn.Conv2d(2, 4, (6, 3), padding=(2, 0)), (2, 8, 7)),
    "conv 7x7, stride 2": (lambda: nn.Conv2d(3, 9, 7, stride=2, padding=3), (3, 13, 11)),
    "conv 1x1, stride 2": (lambda: nn.Conv2d(4, 6, 1, stride=2), (4, 7, 6)),
    "conv 2x2, stride 3": (lambda: nn.Conv2d(2, 3, 2, stride=3), (2, 8, 9)),
    "conv, dilation": (lambda: nn.Conv2d(2, 3, 3, padding=2, dilation=2), (2, 8, 7)),
    "conv, stride and dilation": (lambda: nn.Conv2d(2, 3, 3, padding=1, stride=2, dilation=(3, 2)), (2, 11, 9)),
    "conv, depthwise": (lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6), (6, 7, 5)),
    "conv, depthwise, two each, stride 2": (lambda: nn.Conv2d(3, 6, 5, padding=2, stride=2, groups=3), (3, 7, 9)),
    "conv, groups": (lambda: nn.Conv2d(6, 4, 3, groups=2), (6, 7, 5)),
    "conv, reflect": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 5, 6)),
    "conv, replicate": (lambda: nn.Conv2d(2, 3, 5, padding=2, padding_mode="replicate"), (2, 5, 6)),
    "conv, circular": (lambda: nn.Conv2d(2, 3, 5, padding=2, padding_mode="circular"), (2, 5, 6)),
    "conv over the whole map": (lambda: nn.Conv2d(2, 3, (5, 6)), (2, 5, 6)),
    "conv of many channels": (lambda: nn.Conv2d(70, 33, 3, padding=1), (70, 3, 3)),
    "tiles": (lambda: nn.Conv2d(24, 25, 3, padding=1), (24, 8, 6)),
    "tiles, odd sides": (lambda: nn.Conv2d(28, 24, 3, padding=1), (28, 11, 13)),
    "tiles, valid": (lambda: nn.Conv2d(24, 24, 3), (24, 8, 12)),
    "tiles, padding 2": (lambda: nn.Conv2d(24, 24, 3, padding=(2, 1)), (24, 10, 10)),
    "tiles, transposed": (lambda: nn.ConvTranspose2d(24, 25, 3, padding=1), (24, 8, 6)),
    "tiles between layers": (
        lambda: nn.Sequential(nn.Conv2d(2, 24, 3, padding=1), nn.SiLU(), Residual(24, 36), nn.Conv2d(36, 3, 3)),
        (2, 12, 16),
    ),
    "hidden widths above 256": (
        lambda: nn.Sequential(nn.Linear(12, 300), nn.SiLU(), nn.Linear(300, 270), nn.Tanh(), nn.Linear(270, 5)),
        (12,),
    ),
    "spectral and weight norm": (
        lambda: nn.Sequential(
            parametrizations.spectral_norm(nn.Conv2d(2, 5, 3)),
            nn.SiLU(),
            parametrizations.weight_norm(nn.Conv2d(5, 3, 2)),
        ),
        (2, 6, 7),
    ),
    "conv1d": (lambda: nn.Conv1d(3, 5, 4, stride=2, padding=1), (3, 11)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 3, 4, stride=2, padding=1), (4, 5, 3)),
    "transposed, output padding": (
        lambda: nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1, output_padding=1),
        (4, 5, 3),
    ),
    "transposed, stride 1, groups": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (4, 5, 3)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(2, 3, 5, stride=3), (2, 4)),
    "linear on images": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(2 * 5 * 6, 9)), (2, 5, 6)),
    "linear after a padded map": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1),
            nn.SiLU(),
            Function(lambda x: torch.cat([x.flatten(1), F.pad(x, (1, 1, 1, 1)).flatten(1)], 1)),
            nn.Linear(3 * 4 * 5 + 3 * 6 * 7, 4),
        ),
        (1, 4, 5),
    ),
    "decoder": (
        lambda: nn.Sequential(
            nn.Linear(7, 4 * 3 * 2),
            nn.SiLU(),
            nn.Unflatten(1, (4, 3, 2)),
            nn.ConvTranspose2d(4, 3, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(3, 2, 3, padding=1),
            Function(lambda x: x[..., :5, :3]),
            nn.Tanh(),
        ),
        (7,),
    ),
    "residual": (lambda: Residual(3, 5), (3, 9, 7)),
    "average pool": (lambda: nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False), (3, 7, 9)),
    "average pool 1d": (lambda: nn.AvgPool1d(3, stride=1, padding=1), (3, 7)),
    "global pool": (lambda: nn.AdaptiveAvgPool2d(1), (5, 7, 3)),
    "adaptive pool": (lambda: nn.AdaptiveAvgPool2d((3, 2)), (2, 7, 5)),
    "sum and mean over positions": (lambda: Function(lambda x: x.sum((2, 3)) + x.mean((2, 3))), (3, 5, 7)),
    "nearest": (lambda: nn.Upsample(scale_factor=2), (3, 4, 5)),
    "nearest to odd": (lambda: nn.Upsample(size=(7, 9)), (3, 4, 5)),
    "bilinear": (lambda: nn.Upsample(scale_factor=2, mode="bilinear"), (3, 4, 5)),
    "bilinear, corners": (lambda: nn.Upsample(size=(7, 9), mode="bilinear", align_corners=True), (3, 4, 5)),
    "bicubic": (lambda: nn.Upsample(scale_factor=2, mode="bicubic"), (2, 4, 5)),
    "crop and pad": (lambda: Function(lambda x: F.pad(x[:, :, 1:4, ::2], (1, 2, 0, 1))), (2, 6, 7)),
    "concatenation": (lambda: nn.Sequential(Function(_twice), nn.Conv2d(6, 4, 3)), (3, 5, 6)),
    "a mean of many": (lambda: Function(lambda x: x.sigmoid().mean((2, 3))), (2, 150, 160)),
    "a norm of many": (lambda: _norm(nn.GroupNorm(1, 2)), (2, 100, 110)),
    "pixel shuffle": (lambda: nn.PixelShuffle(2), (8, 3, 2)),
    "permuted": (lambda: Function(lambda x: x.permute(0, 2, 3, 1).reshape(len(x), -1, 6).transpose(1, 2)), (6, 3, 5)),
    "batch norm": (lambda: _norm(nn.BatchNorm2d(5)), (5, 4, 3)),
    "batch norm after conv": (
        lambda: nn.Sequential(nn.Conv2d(2, 5, 3), _norm(nn.BatchNorm2d(5)), nn.SiLU()),
        (2, 5, 6),
    ),
    "group norm": (lambda: _norm(nn.GroupNorm(2, 6)), (6, 4, 3)),
    "instance norm": (lambda: _norm(nn.InstanceNorm2d(3, affine=True)), (3, 4, 5)),
    "layer norm": (lambda: _norm(nn.LayerNorm([3, 5])), (2, 3, 5)),
    "norm between convolutions": (
        lambda: nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), _norm(nn.GroupNorm(3, 6)), nn.SiLU(), nn.Conv2d(6, 2, 3)),
        (2, 5, 7),
    ),
    "logsumexp": (lambda: Function(lambda x: x.logsumexp(1)), (10, 2)),
    "log softmax": (lambda: Function(lambda x: F.log_softmax(x, 1)), (10, 2)),
    "softmax": (lambda: Function(lambda x: F.softmax(3 * x, 1)), (10, 2)),
    "products": (lambda: Function(lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True))), (3, 4, 5)),
    "quotient": (lambda: Function(lambda x: x / (1 + x.abs())), (3, 4, 5)),
    "l2 norm": (lambda: Function(lambda x: x.flatten(2).norm(dim=2)), (3, 4, 5)),
    **{
        name: (lambda act=act: act, (2, 3, 5))
        for name, act in {
            "relu": nn.ReLU(),
            "leaky relu": nn.LeakyReLU(0.2),
            "silu": nn.SiLU(),
            "gelu": nn.GELU(),
            "softplus": nn.Softplus(),
            "softplus, beta": nn.Softplus(beta=2.0),
            "tanh": nn.Tanh(),
            "elu": nn.ELU(0.7),
            "selu": nn.SELU(),
            "sigmoid": nn.Sigmoid(),
            "softsign": nn.Softsign(),
            "square": Function(torch.square),
            "cube": Function(lambda x: x**3),
            "exp": Function(torch.exp),
            "sqrt": Function(lambda x: (x * x + 1).sqrt()),
        }.items()
    },
}


class Energy(nn.Module):
    """A layer's outputs, each with a weight of its own, and their squares: every element has a gradient of its own."""

    def __init__(self, layer: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.layer = layer
        with torch.no_grad():
            outputs = layer(torch.zeros(2, *shape)).flatten(1).shape[1]
        self.register_buffer("weight", torch.randn(outputs) / outputs**0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x).flatten(1)
        return (y * self.weight).sum(1) + 0.1 * y.square().mean(1)


def double_net(net: Net) -> Net:
    """The same in float64."""
    description, tensors = pack(net)
    return unpack(description, [t.double() if t.is_floating_point() else t for t in tensors])


def kink_distance(net: Net, x: Tensor) -> Tensor:
    """Per chain, how far the nearest kink is from the numbers of the forward pass."""
    values = reference.values_of(x, net)
    nearest = x.new_full((x.shape[0],), float("inf"))
    for node in net.nodes:
        if isinstance(node, Activation) and node.function in ("relu", "leaky_relu", "elu", "abs"):
            nearest = torch.minimum(nearest, values[node.x].flatten(1).abs().amin(1))
    return nearest


@pytest.fixture
def torch_seed(seed: int) -> int:
    torch.manual_seed(seed)
    return seed


# -- comparisons


def three_times(name: str, ours: Tensor, torchs: Tensor, exact: Tensor, tiny: float = 0.0) -> None:
    """err(ours) <= 3 err(torch) + some last bits of the largest result: issue 14's bound. ``ours``: the first rows."""
    assert ours.dtype == torch.float32 and ours.shape[1:] == torchs.shape[1:]
    scale = float(exact.abs().max())
    error = float((ours.double() - exact[: len(ours)]).abs().max())
    torch_error = float((torchs.double() - exact).abs().max())
    limit = 3 * torch_error + FLOAT_TOLERANCE * scale + tiny
    assert error <= limit, f"{name}: error {error:.3e}, torch's {torch_error:.3e}, largest {scale:.3e}"


def part_of(net: Net, rows: slice) -> Net:
    """The net of some of the chains."""

    def cut(t: Tensor | None) -> Tensor | None:
        return t if t is None or t.shape[0] == 1 else t[rows]

    nodes = []
    for node in net.nodes:
        if isinstance(node, Add):
            node = replace(node, shift=cut(node.shift))
        elif isinstance(node, Affine):
            node = replace(node, scale=cut(node.scale), shift=cut(node.shift))
        nodes.append(node)
    return Net(tuple(nodes))


def compare_energy(net: Net, flat: Tensor, chains: tuple[int, ...]) -> None:
    exact = double_net(net)
    keep = kink_distance(exact, flat.double()) > KINK
    value, grad = reference.energy_and_gradient(flat, net)
    wanted, wanted_grad = reference.energy_and_gradient(flat.double(), exact)
    assert keep.sum() > 3
    for n in chains:
        ours, ours_grad = cpp.energy_and_gradient(part_of(net, slice(0, n)), flat[:n])
        rows = keep[:n]
        if not rows.any():
            continue
        three_times("energy", ours[rows], value[keep], torch.cat([wanted[:n][rows], wanted[keep][rows.sum() :]]))
        three_times(
            "gradient", ours_grad[rows], grad[keep], torch.cat([wanted_grad[:n][rows], wanted_grad[keep][rows.sum() :]])
        )


@pytest.mark.parametrize("layer", LAYERS)
def test_layers(isa: str, torch_seed: int, layer: str) -> None:
    make, shape = LAYERS[layer]
    energy = Energy(make().requires_grad_(False), shape).eval()
    x = torch.randn(33, *shape)
    compare_energy(trace(energy, x).net, x.flatten(1), (1, 7, 33))


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.sqrt,
        lambda: lambda h: F.avg_pool2d(h, 2).sqrt(),
        lambda: lambda h: 1.0 / h,
        lambda: lambda h: h / h.flip(1),
        lambda: lambda h: (2.0 * h).sqrt() + h.square(),
        lambda: nn.Sequential(nn.Conv2d(24, 3, 2), Function(torch.sqrt)),
        lambda: nn.Sequential(nn.Conv2d(24, 25, 3, padding=1), Function(torch.sqrt)),
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(24 * 36, 5), Function(torch.sqrt)),
    ],
    ids=["root", "map", "inverse", "quotient", "sum", "convolution", "tiles", "linear"],
)
def test_nothing_passes_a_unit_that_is_off(isa: str, torch_seed: int, make: Any) -> None:
    """Not even what is infinite or NaN, such as the slope of a root at 0."""
    made = make()
    module = nn.Sequential(nn.ReLU(), made if isinstance(made, nn.Module) else Function(made))
    x = torch.randn(9, 24, 6, 6)
    net = trace(lambda x: module(x).flatten(1).sum(1), x).net
    _, wanted = reference.energy_and_gradient(x.flatten(1), net)
    _, found = cpp.energy_and_gradient(net, x.flatten(1))
    assert (wanted.flatten()[x.flatten() < 0] == 0).all() and (found.flatten()[x.flatten() < 0] == 0).all()
    assert torch.equal(found.isfinite(), wanted.isfinite()) and (wanted != 0).any()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions_at_the_ends(isa: str, function: Any) -> None:
    """As torch has them in float64; its float32 GELU of infinity and its slope of ELU at NaN depend on the size of the
    tensor."""
    ends = [0.0, -0.0, 1.0, -1.0, 100.0, -100.0, 1e15, -1e15, float("inf"), float("-inf")]
    ends += [float("nan")] if function != "elu" else []
    for slope in (0.3, 0.0):
        net = Net((Input(0, (1,)), Activation(0, function, slope), Affine(1, torch.full((1, 1), 2.0), None)))
        x = torch.tensor(ends)[:, None]
        exact = reference.energy_and_gradient(x.double(), double_net(net))
        for found, wanted in zip(cpp.energy_and_gradient(net, x), exact, strict=True):
            torch.testing.assert_close(found, wanted.float(), rtol=1e-6, atol=1e-6, equal_nan=True)


def tutorial() -> nn.Sequential:
    c = 16
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
    )


def residual_energy() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        Residual(8, 8),
        Residual(8, 12),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 1),
    )


def tiled_energy() -> nn.Sequential:
    """With convolutions that Winograd's tiles take, some of them over odd sides."""
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(24, 24, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(24, 28, 2),
        nn.SiLU(),
        nn.Conv2d(28, 24, 3, padding=1),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 1),
    )


def strided_energy() -> nn.Sequential:
    """With strides that Winograd's tiles take in phases, there and back: four of 2 x 2 taps, four of 3 x 3, nine of
    2 x 2; sides that tiles of every size are left over of."""
    return nn.Sequential(
        nn.Conv2d(2, 12, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(12, 24, 4, stride=2, padding=1),
        nn.SiLU(),
        nn.ConvTranspose2d(24, 20, 4, stride=2, padding=1),
        nn.SiLU(),
        nn.Conv2d(20, 24, 6, stride=2, padding=2),
        nn.SiLU(),
        nn.Conv2d(24, 20, 6, stride=3, padding=2),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(20, 1),
    )


def posterior(chains: int) -> Callable[[Tensor], Tensor]:
    generator = SharedGenerator({"a": (3, 13, 14)}, 8, net="conv", width=4).requires_grad_(False)
    target = torch.rand(chains, 3, 13, 14) * 2 - 1
    return lambda z: (generator(z)["a"] - target).square().flatten(1).sum(1) + 0.5 * z.square().sum(1)


ENERGIES: dict[str, tuple[Callable[[int], Any], tuple[tuple[int, ...], ...], float]] = {
    # what makes it for so many chains, shapes of the state's tensors, how far an element moves in a step, about
    "tutorial": (lambda n: tutorial(), ((1, 28, 28),), 0.02),
    "residual": (lambda n: residual_energy(), ((3, 13, 11),), 0.02),
    "joint": (
        lambda n: JointEnergy({"0": (3, 13, 15), "1": (1, 9, 8), "2": (6,)}, net="conv", trunk_width=5),
        ((3, 13, 15), (1, 9, 8), (6,)),
        0.02,
    ),
    "posterior": (posterior, ((8,),), 0.02),
    "classes": (lambda n: _classes(), ((3, 9, 9),), 0.02),
    "tiles": (lambda n: tiled_energy(), ((3, 12, 12),), 0.02),
    "strides": (lambda n: strided_energy(), ((2, 14, 17),), 0.02),
}


def _classes() -> Callable[[Tensor], Tensor]:
    net = nn.Sequential(*list(residual_energy())[:-1], nn.Linear(12, 10)).requires_grad_(False)
    return lambda x: -net(x).logsumexp(1)


def make_chain(name: str, chains: int, seed: int, noise: float = 0.01, **changes: Any) -> tuple[op.NetChain, Tensor]:
    make, shapes, move = ENERGIES[name]
    energy = make(chains)
    if isinstance(energy, nn.Module):
        energy.requires_grad_(False)
    tensors = [torch.rand(chains, *shape) * 2 - 1 for shape in shapes]
    state = tensors[0] if len(tensors) == 1 else {str(i): t for i, t in enumerate(tensors)}
    flat, net = torch.cat([t.flatten(1) for t in tensors], 1), trace(energy, state).net
    step = move / float(reference.energy_and_gradient(flat, net)[1].abs().mean())
    params, n = changes.pop("params", StepParams(step, noise)), len(shapes)
    table = mlp.constants_of([[params] * n], chains, torch.float32, torch.device("cpu"))
    assert not isinstance(table, str), table
    chain = op.NetChain(
        net=net,
        widths=tuple(t[0].numel() for t in tensors),
        streams=tuple(range(n)),
        noisy=(True,) * n,
        moving=(True,) * n,
        constants=table[0],
        present=table[1],
        seed=seed,
    )
    return replace(chain, **changes), flat


def double_chain(chain: op.NetChain) -> op.NetChain:
    return replace(chain, net=double_net(chain.net), constants=chain.constants.double())


def compare_chain(chain: op.NetChain, x: Tensor, steps: int) -> Any:
    ours = cpp.run(chain, x, steps, 3, energy=True, grad_norm=True)
    torchs = op.run(None, chain, x, steps, 3)
    exact = op.run(None, double_chain(chain), x.double(), steps, 3)
    scale = float(chain.constants[:, :, FIELDS.index("noise_scale")].abs().max())
    three_times("x", ours.x, torchs.x, exact.x, steps * NORMAL_TOLERANCE * scale)
    # noise that is off by its tolerance moves energies and gradients in proportion
    for name in ("energy", "grad_norm"):
        a, b, c = (getattr(r, name).T for r in (ours, torchs, exact))
        three_times(name, a, b, c, 10 * steps * NORMAL_TOLERANCE * scale * float(c.abs().max()))
    plain = cpp.run(chain, x, steps, 3)
    assert plain.energy is None and plain.grad_norm is None and torch.equal(plain.x, ours.x)
    return exact.x


@pytest.mark.parametrize("chains", (1, 7, 40))
@pytest.mark.parametrize("name", ENERGIES)
def test_chains_that_move(isa: str, torch_seed: int, name: str, chains: int) -> None:
    chain, x = make_chain(name, chains, torch_seed, noise=0.0)
    end = compare_chain(chain, x, 20)
    assert float((end - x).abs().mean()) > 0.05, "x hardly moves: the comparison would check nothing"


def test_a_thousand_chains(torch_seed: int) -> None:
    chain, x = make_chain("tutorial", 1000, torch_seed)
    ours = cpp.run(chain, x, 2, 0).x
    rows = [0, 499, 992, 999]
    for row in rows:
        one = replace(chain, chain_offset=row)
        assert torch.equal(cpp.run(one, x[row : row + 1], 2, 0).x[0], ours[row])
    compare_chain(chain, x[:9], 2)


OPTIONS: dict[str, dict[str, Any]] = {
    "value clip": {"grad_clip": 0.002},
    "norm clip": {"grad_norm_clip": 0.02},
    "prior": {"prior_std": 30.0},
    "max_update": {"max_update": 0.02},
    "bounds": {"low": -0.6, "high": 0.5},
    "everything": {
        "grad_clip": 0.02,
        "grad_norm_clip": 0.05,
        "prior_std": 40.0,
        "max_update": 0.2,
        "low": -1.0,
        "high": 0.9,
    },
}


@pytest.mark.parametrize("noise_at", ("after", "before"))
@pytest.mark.parametrize("option", OPTIONS)
def test_options(isa: str, torch_seed: int, option: str, noise_at: Any) -> None:
    # the rule itself is tested with langevin_mlp, whose code it is
    params = StepParams(3.0, 0.05, **OPTIONS[option])
    chain, x = make_chain("joint", 19, torch_seed, params=params, noise_at=noise_at, clamp_noise=noise_at == "before")
    compare_chain(chain, x, 4)
    mask = (torch.rand(19, x.shape[1]) < 0.5).to(torch.uint8)
    masked = cpp.run(replace(chain, observed=mask, moving=(True, False, True), freeze=True), x, 4, 0)
    assert torch.equal(masked.x[mask.bool()], x[mask.bool()]) and masked.frozen is not None
    first, second, _ = chain.widths
    assert torch.equal(masked.x[:, first : first + second], x[:, first : first + second])
    exact = op.run(None, replace(chain, observed=mask, moving=(True, False, True)), x, 4, 0)
    three_times("masked", masked.x, exact.x, exact.x.double(), 1e-5)


def test_a_broken_chain_freezes(isa: str, torch_seed: int) -> None:
    chain, x = make_chain("residual", 20, torch_seed, freeze=True)
    x[11, 3] = float("nan")
    out = cpp.run(chain, x, 3, 0)
    assert out.frozen is not None and out.frozen.nonzero().flatten().tolist() == [11]
    others = [i for i in range(20) if i != 11]
    clean = x.clone()
    clean[11] = 0
    assert torch.equal(out.x[others], cpp.run(chain, clean, 3, 0).x[others])


# -- what no result may depend on


@pytest.mark.parametrize("name", ENERGIES)
def test_batch_split_and_threads(isa: str, torch_seed: int, name: str) -> None:
    chain, x = make_chain(name, 41, torch_seed)
    whole = cpp.run(chain, x, 3, 0, energy=True)
    cuts = [0, 1, 9, 26, 29, 41]  # batches and rests that fill half a vector or less are of narrow ones
    parts = [
        cpp.run(replace(chain, net=part_of(chain.net, slice(a, b)), chain_offset=a), x[a:b], 3, 0)
        for a, b in pairwise(cuts)
    ]
    assert torch.equal(torch.cat([part.x for part in parts]), whole.x)
    torch.set_num_threads(3)
    again = cpp.run(chain, x, 3, 0, energy=True)
    assert again.energy is not None and whole.energy is not None
    assert torch.equal(again.x, whole.x) and torch.equal(again.energy, whole.energy)


@pytest.mark.parametrize("chains", [21, 8, 3, 1])  # a rest of half a vector or less is of narrow ones
@pytest.mark.parametrize("name", ENERGIES)
def test_instruction_sets_agree(torch_seed: int, name: str, chains: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if "avx512" not in native.cpu().isas():
        pytest.skip("this processor has no avx512")
    chain, x = make_chain(name, chains, torch_seed)
    results = []
    for isa in ("avx2", "avx512"):
        monkeypatch.setenv("MMEBM_CPU_ISA", isa)
        results.append(cpp.run(chain, x, 3, 0, energy=True, grad_norm=True))
    for one, two in zip(*results, strict=True):
        assert one is two is None or torch.equal(one, two)


@dataclass(frozen=True, slots=True)
class Doubled(Node):
    """A kind that no backend knows."""

    x: int


def test_what_is_not_built_is_refused_by_its_name() -> None:
    x = torch.randn(3, 1)
    net = Net((Input(0, (1,)), Doubled(0)))
    assert cpp.supports_energy(net, x) == "Doubled is not built"
    with pytest.raises(native.BackendError, match="Doubled is not built"):
        op.net_energy(x, net, backend="cpp")
    with pytest.raises(ValueError, match="a net has no Doubled"):  # the reference
        op.net_energy(x, net)
    strange = Net((Input(0, (1,)), Activation(0, "softsign")))  # type: ignore[arg-type]
    assert cpp.supports_energy(strange, x) == "the function softsign is not built"


@pytest.mark.parametrize("name", ["tiles", "strides"])
def test_tiles_are_off_where_bits_matter(isa: str, name: str, torch_seed: int) -> None:
    chain, x = make_chain(name, 9, torch_seed)
    tiled = cpp.run(chain, x, 2, 0).x
    torch.use_deterministic_algorithms(True)
    try:
        summed = cpp.run(chain, x, 2, 0).x
    finally:
        torch.use_deterministic_algorithms(False)
    assert not torch.equal(tiled, summed)
    torch.testing.assert_close(tiled, summed, rtol=0, atol=1e-5)
    plain, x = make_chain("residual", 9, torch_seed)
    before = cpp.run(plain, x, 2, 0).x
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(cpp.run(plain, x, 2, 0).x, before)
    finally:
        torch.use_deterministic_algorithms(False)


class Everything(nn.Module):
    """Layers of every kind, so wide that threads share them."""

    def __init__(self) -> None:
        super().__init__()
        c = 24
        self.first = nn.Conv2d(3, c, 5, padding=2, stride=2)
        self.tiles, self.deep = nn.Conv2d(c, c, 3, padding=1), nn.Conv2d(c, c, 3, padding=1, groups=c)
        self.norm, self.up = nn.GroupNorm(4, c), nn.ConvTranspose2d(c, 12, 4, stride=2, padding=1)
        self.batch = nn.BatchNorm2d(12)
        self.scale = nn.Parameter(torch.rand(12, 40, 40))
        self.hidden, self.last = nn.Linear(12 * 10 * 10, 300), nn.Linear(300, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.first(x))
        h = h + self.deep(F.leaky_relu(self.norm(self.tiles(h))))
        h = F.silu(self.batch(self.up(h))) * self.scale
        h = F.interpolate(F.avg_pool2d(h, 4), scale_factor=2, mode="bilinear")
        return -self.last(F.gelu(self.hidden(F.avg_pool2d(h, 2).flatten(1)))).logsumexp(1)


@pytest.mark.parametrize("noise_at", ["before", "after"])
def test_threads_that_share_a_tile_change_no_bit(isa: str, torch_seed: int, noise_at: Any) -> None:
    """3 chains are one tile and 37 a few: whoever has none of its own helps with the others'."""
    energy = Everything().requires_grad_(False).eval()
    x = torch.rand(37, 3, 40, 40) * 2 - 1
    net, flat = trace(energy, x).net, x.flatten(1)
    step = 0.02 / float(reference.energy_and_gradient(flat[:3], net)[1].abs().mean())
    params = StepParams(step, 0.01, low=-1.0, high=1.0, grad_norm_clip=1e3)
    table = mlp.constants_of([[params]], 37, torch.float32, torch.device("cpu"))
    assert not isinstance(table, str), table
    chain = op.NetChain(
        net=net,
        widths=(flat.shape[1],),
        streams=(0,),
        noisy=(True,),
        moving=(True,),
        constants=table[0],
        present=table[1],
        seed=torch_seed,
        noise_at=noise_at,
    )
    for chains in (3, 37):
        torch.set_num_threads(1)
        alone = cpp.run(chain, flat[:chains], 3, 0, energy=True, grad_norm=True)
        assert float((alone.x - flat[:chains]).abs().mean()) > 0.01
        for threads in (2, 3, 8, 2, 3, 8):
            torch.set_num_threads(threads)
            shared = cpp.run(chain, flat[:chains], 3, 0, energy=True, grad_norm=True)
            for one, two in zip(alone, shared, strict=True):
                assert one is two is None or torch.equal(one, two)


def test_refusals(torch_seed: int) -> None:
    chain, x = make_chain("tutorial", 3, torch_seed)
    assert "float64" in str(cpp.supports(chain, x.double()))
    twice = Net((chain.net.nodes[0], chain.net.nodes[0], Add((0, 1), (1.0, 1.0)), *chain.net.nodes[-1:]))
    assert "overlap" in str(cpp.supports_energy(replace(twice, nodes=twice.nodes[:3]), x))
    with pytest.raises(native.BackendError, match="constants"):
        cpp.run(replace(chain, constants=chain.constants.repeat(2, 1, 1, 1)), x, 3, 0)
    with pytest.raises(native.BackendError, match="not built for cuda"):
        op.room("cuda", chain, x)


def test_memory_is_bounded_by_the_machines(torch_seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chain, x = make_chain("tutorial", 33, torch_seed)
    torch.set_num_threads(2)
    try:
        needed = cpp._buffers(chain.net, 33)
        monkeypatch.setattr(cpp, "_machine", lambda: int(needed / cpp._SHARE) - 8)
        assert "GiB of buffers on 2 threads" in str(cpp.supports(chain, x))
        assert op.room("auto", chain, x)[0] is None
        torch.set_num_threads(1)  # half as much
        assert cpp.supports(chain, x) is None
    finally:
        torch.set_num_threads(1)
