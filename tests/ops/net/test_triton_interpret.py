"""The net ops in Triton, in Triton's interpreter, against the reference in float64.

Run with ``TRITON_INTERPRET=1 python -m pytest -m interpret``; it replaces the compiler for the whole process. All
layers are smooth: on the other side of a kink a last bit changes the gradient.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("triton")

from torch.utils._python_dispatch import TorchDispatchMode

import mmebm
from mmebm.energies.trace import trace
from mmebm.native import BackendError
from mmebm.ops import dispatch, parity
from mmebm.ops import langevin_mlp as mlp
from mmebm.ops.common.params import StepParams
from mmebm.ops.net import op, reference
from mmebm.ops.net import triton as room
from mmebm.ops.net.graph import Activation, Add, Input, Linear, Net, pack, unpack

pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"),
    # NumPy's, of the interpreter: exp and log of lanes that are masked
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

# A float32 result may be off by some of its last bits, also where torch's happens to be exact: of the largest result.
# 8 2^-24, for sums of some hundred products (2.3e-7 seen).
FLOAT_TOLERANCE = 5e-7


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Block(nn.Module):
    """Two convolutions, a shortcut of one or none, average pooling."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(a, b, 3, padding=1), nn.Conv2d(b, b, 3, padding=1)
        self.shortcut = nn.Conv2d(a, b, 1) if a != b else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(F.silu(self.two(F.silu(self.one(x))) + self.shortcut(x)), 2)


def _decoder() -> nn.Module:
    return nn.Sequential(
        nn.Linear(7, 4 * 3 * 2),
        nn.SiLU(),
        nn.Unflatten(1, (4, 3, 2)),
        nn.ConvTranspose2d(4, 3, 4, stride=2, padding=1),
        nn.SiLU(),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        Function(lambda x: x[..., :5, :7]),
        nn.Conv2d(3, 1, 3, padding=1),
        nn.Tanh(),
    )


# Each as (what makes it, shape of one chain's input, chains). Odd sides, one channel, and channels that fill no block.
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "one channel": (lambda: nn.Conv2d(1, 1, 3, padding=1, bias=False), (1, 7, 9), 1),
    "odd sides, stride 2": (lambda: nn.Sequential(nn.Conv2d(3, 12, 4, 2, 1), nn.SiLU()), (3, 9, 11), 7),
    "stride 2 and 1x1": (lambda: nn.Sequential(nn.Conv2d(4, 6, 1, stride=2), nn.Softplus()), (4, 7, 6), 3),
    "stride above the kernel": (lambda: nn.Conv2d(2, 3, 2, stride=3), (2, 8, 9), 2),
    "stride and dilation": (lambda: nn.Conv2d(2, 3, 3, padding=1, stride=2, dilation=(3, 2)), (2, 11, 9), 2),
    "depthwise, stride 2": (lambda: nn.Conv2d(3, 6, 5, padding=2, stride=2, groups=3), (3, 7, 9), 2),
    "groups": (lambda: nn.Conv2d(6, 4, 3, groups=2, padding_mode="circular", padding=1), (6, 5, 7), 2),
    "more channels than a block": (lambda: nn.Conv2d(70, 67, 3, padding=1), (70, 3, 3), 2),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1, groups=2), (4, 5, 3), 2),
    "decoder": (_decoder, (7,), 3),
    "residual blocks": (
        lambda: nn.Sequential(Block(2, 5), Block(5, 5), Function(lambda h: h.sum((2, 3)))),
        (2, 9, 7),
        2,
    ),
    "concatenation": (
        lambda: nn.Sequential(Function(lambda x: torch.cat([x, x.flip(2), x.tanh()], 1)), nn.Conv2d(6, 4, 3)),
        (2, 5, 6),
        2,
    ),
    "norms": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 3, 2), nn.InstanceNorm2d(3), nn.ELU()
        ),
        (2, 7, 6),
        2,
    ),
    "a norm longer than a block": (lambda: nn.GroupNorm(1, 3), (3, 17, 19), 1),
    "softmax": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(30, 9), nn.Softmax(1)), (30,), 7),
    "functions": (
        lambda: Function(
            lambda x: (
                x.sigmoid() * x.square() + x.exp().sqrt() + x.tanh() / (3 + x.square()) + 1 / (4 + x) - 0.5 * F.gelu(x)
            )
        ),
        (5, 7),
        2,
    ),
}


def flat(x: Any) -> Tensor:
    return torch.cat([t.flatten(1) for t in (x if isinstance(x, list) else [x])], 1)


def double(value: Any) -> Any:
    return parity._double(value)


def compare(net: Net, x: Tensor, terms: float = 0.0, products: int = 0) -> None:
    """Energy and gradient in Triton, against float64 within twice the error of PyTorch in float32.

    ``terms``: the sum of the magnitudes of what the energy adds up. Where they cancel, PyTorch's own error may be next
    to none; four roundings of that sum are always allowed (seed 4711 takes 0.6 of one).
    ``products``: of a layer's longest sum. A GPU adds them one after the other, where PyTorch and the interpreter add
    sums of blocks: as many roundings, at random (16 of 2^-24 seen with 603, in an emulator of the PTX, seed 9032).
    """
    assert room.supports_energy(net, x) is None
    ours = room.energy_and_gradient(net, x)
    single, exact = reference.energy_and_gradient(x, net), reference.energy_and_gradient(x.double(), double(net))
    for name, a, b, c in zip(("energy", "gradient"), ours, single, exact, strict=True):
        assert a.shape == c.shape
        allowed = parity.limit(b, c, 0.0, max(FLOAT_TOLERANCE, products**0.5 * 2.0**-24))
        if name == "energy":
            allowed = max(allowed, 4 * 2.0**-24 * terms)
        error = float((a.double() - c).abs().max())
        assert error <= allowed, f"{name}: off by {error:.2e}, {allowed:.2e} allowed, of {float(c.abs().max()):.2e}"


@pytest.mark.parametrize("case", LAYERS)
def test_layers(case: str, seed: int) -> None:
    torch.manual_seed(seed)
    make, shape, chains = LAYERS[case]
    module, x = make().eval(), torch.randn(chains, *shape)
    weights = torch.randn(module(x).shape[1:])
    energy = lambda x: (module(x) * weights).flatten(1).sum(1)
    net = trace(energy, x).net
    terms = float((module(x) * weights).abs().flatten(1).sum(1).max())
    matrices = [w for w in module.parameters() if w.dim() > 1]
    products = max((w.numel() // min(w.shape[:2]) for w in matrices), default=0)
    compare(net, flat(x), terms, products)


class Joint(nn.Module):
    """A trunk per modality, a linear one for the last, and a fusion of all."""

    def __init__(self, classes: int = 1) -> None:
        super().__init__()
        self.trunks = nn.ModuleList(
            [
                nn.Sequential(nn.Conv2d(1, 5, 3, 2, 1), nn.SiLU(), nn.Conv2d(5, 3, 3), nn.SiLU(), nn.Flatten()),
                nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            ]
        )
        self.fusion = nn.Sequential(nn.Linear(3 * 2 * 1 + 3, 8), nn.Tanh(), nn.Linear(8, classes))

    def forward(self, x: list[Tensor]) -> Tensor:
        h = torch.cat([trunk(t) for trunk, t in zip(self.trunks, x, strict=True)], 1)
        h = self.fusion(h)
        return -h.logsumexp(1) if h.shape[1] > 1 else h.squeeze(1)


def test_launches_are_as_few_as_the_page_says(seed: int) -> None:
    """docs/kernels.md: four forward and four back for a residual block, one and one for a convolution with its
    activation; the head is a sum."""
    torch.manual_seed(seed)
    conv = nn.Sequential(nn.Conv2d(2, 3, 3), nn.SiLU())
    for module, launches in ((conv, 1 + 1), (nn.Sequential(conv, Block(3, 5)), 1 + 1 + 4 + 4)):
        net = trace(lambda x, module=module: module(x).sum((1, 2, 3)), torch.randn(2, 2, 7, 6)).net
        assert len(room.plan_of(net, 2, 84).launches) == launches + 1 + 1


SHAPES = ((1, 7, 5), (2, 3, 5))


def joint(seed: int, chains: int, classes: int = 1) -> tuple[nn.Module, list[Tensor], Net]:
    torch.manual_seed(seed)
    module, x = Joint(classes).eval(), [torch.randn(chains, *shape) for shape in SHAPES]
    return module, x, trace(module, x).net


@pytest.mark.parametrize("chains", [1, 7])
def test_several_modalities_and_a_logsumexp_head(chains: int, seed: int) -> None:
    _, x, net = joint(seed, chains, classes=3)
    compare(net, flat(x))


@pytest.mark.parametrize("kind", ["root", "map", "convolution", "linear"])
def test_nothing_passes_a_unit_that_is_off(kind: str, seed: int) -> None:
    """Not even what is infinite or NaN, such as the slope of a root at 0."""
    torch.manual_seed(seed)
    after = {
        "root": lambda h: h,
        "map": lambda h: F.avg_pool2d(h, 2),
        "convolution": nn.Conv2d(3, 2, 2),
        "linear": nn.Sequential(nn.Flatten(), nn.Linear(48, 5)),
    }[kind]
    x = torch.randn(4, 3, 4, 4)
    net = trace(lambda x: after(F.relu(x)).sqrt().flatten(1).sum(1), x).net
    found, wanted = room.energy_and_gradient(net, flat(x))[1], reference.energy_and_gradient(flat(x), net)[1]
    assert (found[flat(x) < 0] == 0).all() and torch.equal(found.isfinite(), wanted.isfinite())


def test_a_class_of_each_chain(seed: int) -> None:
    torch.manual_seed(seed)
    logits, labels = nn.Linear(6, 5), torch.tensor([0, 4, 2])
    for energy in (
        lambda x: F.cross_entropy(logits(x), labels, reduction="none"),
        lambda x: -logits(x).gather(1, labels[:, None]).squeeze(1),
    ):
        x = torch.randn(3, 6)
        compare(trace(energy, x).net, x, float(logits(x).detach().abs().sum(1).max()))


def test_what_no_gradient_reaches_is_zero() -> None:
    net = Net((Input(1, (3,)), Linear(0, torch.tensor([[1.0, 2.0, 3.0]]))))
    x = torch.arange(10.0).reshape(2, 5)
    energy, gradient = room.energy_and_gradient(net, x)
    assert energy.tolist() == [1 + 4 + 9, 6 + 14 + 24] and gradient.tolist() == [[0, 1, 2, 3, 0]] * 2


def test_results_are_the_caller_s() -> None:
    net = Net((Input(0, (3,)), Activation(0, "square"), Linear(1, torch.ones(1, 3))))
    first = room.energy_and_gradient(net, torch.ones(1, 3))
    room.energy_and_gradient(net, torch.zeros(1, 3))
    assert first[0].tolist() == [3.0] and first[1].tolist() == [[2.0] * 3]


def test_an_energy_that_is_the_state() -> None:
    x = torch.tensor([[2.0], [-3.0]])
    for net, slope in (
        (Net((Input(0, (1,)),)), [1.0, 1.0]),
        (Net((Input(0, (1,)), Activation(0, "square"))), [4.0, -6]),
    ):
        energy, gradient = room.energy_and_gradient(net, x)
        assert torch.equal(energy, reference.energy(x, net)) and gradient.flatten().tolist() == slope


# -- chains


@dataclass(frozen=True)
class Case:
    """Options of a chain; ``straight``: whether the first layers' gradients go straight into the update."""

    params: list[StepParams]
    straight: bool
    mask: bool = False
    more: tuple[tuple[str, Any], ...] = ()


# Steps that move the state by a good part of its range in two
PLAIN = [StepParams(3.0, 0.1), StepParams(2.0, 0.05)]
ALL = [
    StepParams(3.0, 0.1, grad_clip=0.2, max_update=0.4, prior_std=4.0, low=-2.0, high=1.5),
    StepParams(2.0, 0.05, prior_std=4.0),
]
CASES = {
    "straight": Case(PLAIN, True),
    "straight, all options, observed": Case(ALL, True, mask=True),
    # products on tensor cores, in three parts
    "straight, tf32x3": Case(PLAIN, True, more=(("precision", "tf32x3"),)),
    "noise first": Case(ALL, True, more=(("noise_at", "before"), ("clamp_noise", True))),
    "norm clip": Case([replace(p, grad_norm_clip=0.3) for p in ALL], False, mask=True),
    "one tensor moves": Case(PLAIN, True, more=(("moving", (True, False)), ("noisy", (True, False)))),
    "frozen, noise first": Case(PLAIN, False, more=(("noise_at", "before"), ("freeze", True))),
}


def chain_of(net: Net, case: Case, chains: int, steps: int) -> op.NetChain:
    decaying = [[replace(p, step_size=p.step_size * 0.99**k) for p in case.params] for k in range(steps)]
    table = mlp.constants_of(decaying, chains, torch.float32, torch.device("cpu"))
    assert not isinstance(table, str)
    widths = tuple(int(torch.Size(s).numel()) for s in SHAPES)
    observed = (torch.arange(sum(widths)) % 5 == 0).to(torch.uint8).expand(chains, -1).clone() if case.mask else None
    options: dict[str, Any] = {"noisy": (True, True), "moving": (True, True), **dict(case.more)}
    return op.NetChain(
        net=net,
        widths=widths,
        streams=(0, 3),
        constants=table[0],
        present=table[1],
        observed=observed,
        seed=11,
        chain_offset=2**32 - 2,
        **options,
    )


@pytest.mark.parametrize("case", CASES)
def test_chains(case: str, seed: int) -> None:
    _, parts, net = joint(seed, 2)
    x, steps = flat(parts), 2
    chain = chain_of(net, CASES[case], 2, steps)
    assert room.supports(chain, x) is None
    plan = room.plan_of(net, 2, x.shape[1], chain=chain)
    assert plan.updates == CASES[case].straight
    before = x.clone()
    ours = room.run(chain, x, steps, 2**32 - 2, energy=True, grad_norm=True)
    assert torch.equal(x, before)
    single = op.run(None, chain, x, steps, 2**32 - 2)
    exact = op.run(None, double(chain), x.double(), steps, 2**32 - 2)
    assert (exact.x - x).abs().max() > 0.1 * x.abs().max()
    for name in ("x", "energy", "grad_norm"):
        a, b, c = (getattr(result, name) for result in (ours, single, exact))
        # the largest noise scale; energy and gradient follow the state, with slopes of order 1
        slack = steps * parity.NORMAL_TOLERANCE * 0.1
        error, allowed = float((a.double() - c).abs().max()), parity.limit(b, c, slack, FLOAT_TOLERANCE)
        assert error <= allowed, f"{name}: off by {error:.2e}, {allowed:.2e} allowed"
    if chain.freeze:
        assert ours.frozen is not None and not ours.frozen.any()


def test_a_broken_chain_freezes_alone(seed: int) -> None:
    _, parts, net = joint(seed, 3)
    parts[0][1, 0, 2, 2] = 3e38
    x = flat(parts)
    # the step size overflows what the first chain alone has as a prior's pull
    params = [StepParams(0.3, 0.0, prior_std=0.1), StepParams(0.2, 0.0)]
    chain = chain_of(net, Case(params, False, more=(("freeze", True),)), 3, 1)
    ours, expected = room.run(chain, x, 1, 0), op.run(None, chain, x, 1, 0)
    assert ours.frozen is not None and expected.frozen is not None
    assert ours.frozen.tolist() == [False, True, False]
    assert torch.equal(ours.frozen, expected.frozen) and torch.equal(ours.x[1], x[1])
    alone = room.run(chain, x.clamp(-9, 9), 1, 0)
    assert torch.equal(alone.x[[0, 2]], ours.x[[0, 2]])


def test_pieces_of_a_chain_and_of_a_batch(seed: int) -> None:
    _, parts, net = joint(seed, 2)
    x = flat(parts)
    chain = replace(chain_of(net, Case(PLAIN, True), 2, 1), chain_offset=5)
    whole = room.run(chain, x, 2, 7).x
    first = room.run(chain, x, 1, 7).x
    assert torch.equal(room.run(chain, first, 1, torch.tensor(8)).x, whole)
    # The interpreter's products are NumPy's, which on some processors round by the number of rows (6e-8 were seen on an
    # EPYC): two roundings of the largest number. Noise of another chain would be off by a tenth.
    part = room.run(replace(chain, chain_offset=6), x[1:], 2, 7).x
    torch.testing.assert_close(part, whole[1:], rtol=0, atol=2**-22 * float(whole.abs().max()))


# -- what is captured


class Forbidden(TorchDispatchMode):
    """No operation of torch: nothing is allocated, copied or waited for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} in a step")


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """A graph is the launches with the arguments that they had when it was captured."""
    graphs: list[Any] = []

    def captured(launch: Any, device: torch.device) -> Callable[[], None]:
        calls = list(launch.__self__.calls)
        pointers = [(t, t.data_ptr()) for _, _, arguments in calls for t in arguments.values() if isinstance(t, Tensor)]

        def replay() -> None:
            assert all(t.data_ptr() == address for t, address in pointers)
            # the interpreter itself uses torch to look at the arguments
            for kernel, grid, arguments in calls:
                kernel[grid](**arguments)

        graphs.append(replay)
        return replay

    monkeypatch.setattr(room, "_captured", captured)
    room._workspaces.clear()
    yield graphs
    room._workspaces.clear()


def test_one_graph_of_a_step_for_any_number_of_them(captures: list[Any], seed: int) -> None:
    _, parts, net = joint(seed, 2)
    x = flat(parts)
    chain = chain_of(net, Case(ALL, True, mask=True), 2, 1)
    for steps, factor, chain_seed in ((2, 1.0, 5), (1, 0.5, torch.tensor(6))):
        # other numbers everywhere, in tensors that did not exist before
        described, tensors = pack(net)
        other = unpack(described, [t * factor if t.is_floating_point() else t.clone() for t in tensors])
        now = replace(
            chain,
            net=other,
            seed=chain_seed,
            constants=chain.constants * 1.0,
            observed=torch.roll(chain.observed, steps, 1),  # type: ignore[arg-type]
        )
        ours = room.run(now, x + steps, steps, 3, energy=True)
        expected = op.run(None, double(now), (x + steps).double(), steps, 3)
        assert torch.allclose(ours.x.double(), expected.x, rtol=0, atol=1e-5)
        assert expected.energy is not None and ours.energy is not None and ours.energy.shape == expected.energy.shape
    assert len(captures) == 1 and len(room._workspaces) == 1


def test_a_step_runs_nothing_but_kernels(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    _, parts, net = joint(seed, 2, classes=3)
    chain = chain_of(net, Case([replace(p, grad_norm_clip=1.0) for p in ALL], False), 2, 1)
    workspace = room._workspace(net, flat(parts), chain, 4)
    launched = []

    class Kernel:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda **arguments: launched.append((self.kernel, grid, arguments))

    workspace.calls = [(Kernel(kernel), grid, arguments) for kernel, grid, arguments in workspace.calls]
    with Forbidden():
        workspace.launch()
    owned = {t.data_ptr() for t in vars(workspace).values() if isinstance(t, Tensor)}
    for kernel, _, arguments in launched:
        assert set(arguments) - {"num_warps", "num_stages", "enable_fp_fusion"} == set(kernel.arg_names)
        assert all(t.data_ptr() in owned for t in arguments.values() if isinstance(t, Tensor))
    assert len(launched) == len(workspace.plan.launches)


# -- the door


def test_parity_case(monkeypatch: pytest.MonkeyPatch) -> None:
    right, results = room.energy_and_gradient, []
    monkeypatch.setattr(room, "energy_and_gradient", lambda net, x: results.append(right(net, x)) or results[0])
    verdict = parity.check("net_energy", "triton", torch.device("cpu"))
    assert verdict.reason is None, verdict
    # and it sees a gradient that is off by a thousandth
    energy, gradient = results[0]
    monkeypatch.setattr(room, "energy_and_gradient", lambda net, x: (energy, gradient * 1.001))
    assert "gradient is off" in str(parity.check("net_energy", "triton", torch.device("cpu")).reason)


def test_a_sampler_takes_it(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setitem(parity.CASES, "langevin_net", lambda *_: iter(()))  # another test runs it
    monkeypatch.setitem(parity.CASES, "net_energy", lambda *_: iter(()))
    module, x, _ = joint(seed, 2)
    sampler = mmebm.Langevin(0.1, 0.05, backend="triton")
    ours = sampler.sample(module, x, 2, seed=3, record=("energy",))
    assert (ours.info["op"], ours.info["backend"]) == ("langevin_net", "triton"), ours.info["reason"]
    loop = mmebm.Langevin(0.1, 0.05, backend="torch").sample(module, x, 2, seed=3, record=("energy",))
    for a, b in zip((*ours.state, ours.trace["energy"]), (*loop.state, loop.trace["energy"]), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-5)


def test_auto_leaves_wide_layers_to_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dispatch.OPS, "langevin_net", dispatch.Op(dispatch._NET, {"cpu": ("triton",)}))
    wide = nn.Sequential(
        nn.Conv2d(3, 256, 3), nn.SiLU(), nn.Conv2d(256, 256, 3), nn.SiLU(), nn.Flatten(), nn.Linear(4096, 1)
    )
    out = mmebm.Langevin(0.1).sample(wide, torch.zeros(64, 3, 8, 8), 1, seed=0)
    assert out.info["op"] == "langevin_step" and "cuDNN in a captured graph" in out.info["reason"]
    assert "256 wide" in out.info["reason"]


def test_refusals(seed: int) -> None:
    _, parts, net = joint(seed, 2)
    x, chain = flat(parts), chain_of(net, Case(PLAIN, True), 2, 1)
    assert "bf16" in str(room.supports(replace(chain, precision="bf16"), x))
    assert "float64" in str(room.supports_energy(net, x.double()))
    assert "float64" in str(room.supports_energy(double(net), x))
    twice = Net((Input(0, (3,)), Input(2, (3,)), Add((0, 1), (1.0, 1.0)), Linear(2, torch.ones(1, 3))))
    assert "overlap" in str(room.supports_energy(twice, torch.zeros(2, 5)))
    assert "chunk_size" in str(room.supports_energy(net, x[:1].expand(1 << 24, -1)))

    unknown = Net((Input(0, (4,)), Linear(0, torch.ones(1, 4)), Function(torch.abs)))  # type: ignore[arg-type]
    erf = Net((Input(0, (1,)), Activation(0, "erf")))  # type: ignore[arg-type]
    assert "the function erf is not built" in str(room.supports_energy(erf, torch.zeros(1, 1)))
    assert "Function is not built" in str(room.supports_energy(unknown, torch.zeros(1, 4)))
    with pytest.raises(BackendError, match="triton: langevin_net: precision='bf16'"):
        room.run(replace(chain, precision="bf16"), x, 1, 0)
    with pytest.raises(BackendError, match="constants for 2"):
        room.run(chain_of(net, Case(PLAIN, True), 2, 2), x, 3, 0)
    with pytest.raises(ValueError, match=r"nodes\[1\]"):
        room.energy_and_gradient(Net((Input(0, (4,)), Linear(0, torch.ones(1, 5)))), torch.zeros(1, 4))
