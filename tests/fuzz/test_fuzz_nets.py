"""Random convolutional networks, as people write them, through whole chains: against the rule in float64 (rule.py)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import assume, event, given, note, reject, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mmebm import Langevin
from tests.fuzz import rule
from tests.fuzz.strategies import Draw, Tolerance

Shape = tuple[int, ...]
SMOOTH: dict[str, Callable[[], nn.Module]] = {
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu tanh": lambda: nn.GELU(approximate="tanh"),
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "elu": nn.ELU,
}
KINKED: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu inplace": lambda: nn.ReLU(inplace=True),
    "leaky": lambda: nn.LeakyReLU(0.2),
    "leaky .01": nn.LeakyReLU,
    "max": lambda: nn.MaxPool1d(2),
}


class Call(nn.Module):
    """A function as a layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Residual(nn.Module):
    def __init__(self, body: nn.Module, shortcut: nn.Module, weight: float, join: str) -> None:
        super().__init__()
        self.body, self.shortcut, self.weight, self.join = body, shortcut, weight, join

    def forward(self, x: Tensor) -> Tensor:
        if self.join == "cat":
            return torch.cat((self.body(x), self.shortcut(x)), 1)
        out = self.body(x)
        if self.join == "+=":
            out = out * 1.0
            out += self.shortcut(x)
            return out
        return self.shortcut(x) + self.weight * out


def of_dimension(name: str, dimension: int) -> Any:
    return getattr(nn, f"{name}{dimension}d")


@st.composite
def layer(draw: Draw, shape: Shape, depth: int, kinds: tuple[str, ...] = ()) -> nn.Module:
    """One layer for tensors (chains, *shape), shape = (channels, positions...)."""
    channels, sides = shape[0], shape[1:]
    dimension, least = len(sides), min(sides)
    kind = draw(
        st.sampled_from(
            kinds
            or (
                *("conv",) * 5,
                *("act",) * 4,
                *("convT", "pool", "norm", "up", "scale", "crop", "pad", "adaptive"),
                *(("residual",) * 3 if depth else ()),
            )
        ),
        label="layer",
    )
    whole = st.integers
    if kind == "conv":
        mode = draw(st.sampled_from(("zeros", "zeros", "reflect", "circular", "replicate")), label="padding_mode")
        kernel = draw(st.lists(whole(1, 7), min_size=dimension, max_size=dimension), label="kernel")
        stride = draw(st.sampled_from((1, 1, 2)), label="stride")
        most = [min(k // 2, n - 1) if mode == "reflect" else min(k // 2 + 1, n) for k, n in zip(kernel, sides)]
        padding: Any = tuple(draw(whole(0, m), label="padding") for m in most)
        if stride == 1 and draw(whole(0, 5), label="same?") == 5 and mode == "zeros":
            padding = "same"
        kernel = [min(k, n + (0 if padding == "same" else 2 * p)) for k, n, p in zip(kernel, sides, [*padding, 0])]
        groups = draw(st.sampled_from((1, 1, 1, channels)), label="groups")
        out = groups * draw(whole(1, 3), label="outputs") if groups > 1 else draw(whole(1, 9), label="outputs")
        made = of_dimension("Conv", dimension)(
            channels,
            out,
            tuple(kernel),
            stride,
            padding,
            groups=groups,
            bias=draw(st.booleans(), label="bias"),
            padding_mode=mode,
            dilation=2 if draw(whole(0, 19), label="dilated?") == 19 and padding == "same" else 1,
        )
        normed = draw(st.sampled_from((None, None, None, "spectral", "weight")), label="normed")
        if normed == "spectral":
            return nn.utils.parametrizations.spectral_norm(made)
        return nn.utils.parametrizations.weight_norm(made) if normed == "weight" else made
    if kind == "act":
        named = SMOOTH | {name: act for name, act in KINKED.items() if name != "max" or (dimension == 1 and least > 1)}
        return named[draw(st.sampled_from(tuple(named)), label="activation")]()
    if kind == "convT":
        kernel, stride = draw(whole(1, 4), label="kernel"), draw(st.sampled_from((1, 2)), label="stride")
        padding = draw(whole(0, (kernel - 1) // 2), label="padding")
        outputs = draw(whole(0, stride - 1), label="output_padding")
        out = draw(whole(1, 5), label="outputs")
        return of_dimension("ConvTranspose", dimension)(channels, out, kernel, stride, padding, outputs)
    if kind == "pool":
        kernel = draw(whole(1, min(3, least)), label="kernel")
        stride, padding = draw(whole(1, 2), label="stride"), draw(whole(0, kernel // 2), label="padding")
        flags = [draw(st.booleans(), label="flag") for _ in range(2)]
        return of_dimension("AvgPool", dimension)(kernel, stride, padding, *flags)
    if kind == "adaptive":
        return of_dimension("AdaptiveAvgPool", dimension)(draw(whole(1, 3), label="positions"))
    if kind == "norm":
        norm = draw(st.sampled_from(("group", "instance", "batch", "layer")), label="norm")
        affine = draw(st.booleans(), label="affine")
        if norm == "group":
            groups = draw(st.sampled_from([g for g in range(1, channels + 1) if channels % g == 0]), label="groups")
            return nn.GroupNorm(groups, channels, affine=affine)
        if norm == "layer":
            return nn.LayerNorm(shape, elementwise_affine=affine)
        if norm == "instance":
            assume(math.prod(sides) > 1)
        name = "InstanceNorm" if norm == "instance" else "BatchNorm"
        return of_dimension(name, dimension)(channels, affine=affine, track_running_stats=True)
    if kind == "up":
        if max(sides) > 12:
            return nn.Identity()
        mode = draw(st.sampled_from(("nearest", "bilinear" if dimension == 2 else "linear")), label="mode")
        corners = None if mode == "nearest" else draw(st.booleans(), label="align_corners")
        if draw(st.booleans(), label="by size"):
            return nn.Upsample(size=tuple(n + 3 for n in sides), mode=mode, align_corners=corners)
        return nn.Upsample(scale_factor=draw(st.sampled_from((2, 2.0, 1.5))), mode=mode, align_corners=corners)
    if kind == "scale":
        a, b = draw(st.floats(-1.5, 1.5, width=16), label="a"), draw(st.floats(-1, 1, width=16), label="b")
        functions = (lambda x: a * x + b, lambda x: b - x / 2, lambda x: x.mul(a), lambda x: x * x * 0.3, torch.sin)
        return Call(functions[draw(whole(0, len(functions) - 1), label="function")])
    if kind == "crop":
        low, high = draw(whole(0, (least - 1) // 2), label="low"), draw(whole(0, (least - 1) // 2), label="high")
        inside = (slice(None), slice(None), *[slice(low, n - high) for n in sides])
        some = draw(st.booleans(), label="channels too") and channels > 1
        return Call(lambda x: x[inside][:, 1:] if some else x[inside])
    if kind == "pad":
        return Call(lambda x: F.pad(x, (1, 2) if dimension == 1 else (0, 1, 2, 0)))
    assert kind == "residual"
    body = draw(layers(shape, depth - 1, 3))
    made_shape = out_shape(body, shape)
    join = "cat" if made_shape[1:] == sides and draw(st.booleans(), label="cat") else draw(st.sampled_from(("+", "+=")))
    shortcut: nn.Module = nn.Identity()
    if join != "cat" and made_shape != shape:
        projection = of_dimension("Conv", dimension)(channels, made_shape[0], 1)
        shortcut = nn.Sequential(of_dimension("AdaptiveAvgPool", dimension)(made_shape[1:]), projection)
    return Residual(body, shortcut, draw(st.sampled_from((1.0, 0.5))), join)


def out_shape(module: nn.Module, shape: Shape) -> Shape:
    with torch.no_grad():
        return tuple(module.eval()(torch.zeros(2, *shape)).shape[1:])


@st.composite
def layers(draw: Draw, shape: Shape, depth: int, most: int) -> nn.Sequential:
    made: list[nn.Module] = []
    for _ in range(draw(st.integers(1, most), label="layers")):
        following = draw(layer(shape, depth))
        made.append(following)
        shape = out_shape(following, shape)
        assume(min(shape) > 0)
        if math.prod(shape) > 600:
            break
    return nn.Sequential(*made)


@st.composite
def trunks(draw: Draw, shape: Shape) -> nn.Sequential:
    """From (chains, *shape) to features (chains, count)."""
    body = draw(layers(shape, 1, 5))
    end = draw(st.sampled_from(("flatten", "mean", "sum", "pool")), label="end")
    sides = tuple(range(2, len(shape) + 1))
    ends = {
        "flatten": nn.Flatten(),
        "mean": Call(lambda x: x.mean(sides)),
        "sum": Call(lambda x: 0.1 * x.sum(dim=sides)),
        "pool": nn.Sequential(of_dimension("AdaptiveAvgPool", len(sides))(1), nn.Flatten()),
    }
    return nn.Sequential(body, ends[end])


class Energy(nn.Module):
    """A trunk for each tensor of the state, a head on all features, and a pull to the origin."""

    def __init__(self, trunks: list[nn.Module], head: nn.Module, end: str, pull: bool, decoded: Tensor | None) -> None:
        super().__init__()
        self.trunks, self.head, self.end, self.pull = nn.ModuleList(trunks), head, end, pull
        self.register_buffer("target", decoded)

    def forward(self, x: Any) -> Tensor:
        parts = list(x.values()) if isinstance(x, dict) else [x]
        features = [trunk(1 * t) for trunk, t in zip(self.trunks, parts)]  # in-place layers change no leaf
        h = self.head(features[0] if len(features) == 1 else torch.cat(features, 1))
        if self.end == "column":
            value = h[:, :1].squeeze(1)
        elif self.end == "logsumexp":
            value = -h.logsumexp(1)
        elif self.end == "squares":
            value = 0.1 * h.square().sum(1)
        elif self.end == "residual":
            value = ((h - self.target) ** 2).sum(1) / (2 * 1.3**2)
        else:
            value = h.mean(dim=-1)
        if self.pull:
            for t in parts:
                value = value + 0.5 * (t**2).flatten(1).sum(1)
        return value


@dataclass
class Example:
    """``numbers``: the state in float32; ``options``: of the sampler, with what the rule calls them in ``table``."""

    energy: Energy
    state: Any
    table: dict[str, float]
    options: dict[str, Any]
    steps: int
    seed: int
    keys: list[str] = field(default_factory=list)

    @property
    def parts(self) -> list[Tensor]:
        return list(self.state.values()) if isinstance(self.state, dict) else [self.state]

    def restated(self, dtype: torch.dtype, jitter: int | None = None) -> rule.Result:
        """The rule, with this network by autograd in ``dtype``."""
        net = copy.deepcopy(self.energy).to(dtype).eval()
        near: list[Tensor] = []

        def distance(module: nn.Module, given: Any) -> None:
            x = given[0].detach()
            if isinstance(module, nn.MaxPool1d):
                pair = x[..., : x.shape[-1] // 2 * 2].unflatten(-1, (-1, 2))
                x = pair[..., 0] - pair[..., 1]
            near.append(x.abs().flatten(1).amin(1))

        for module in net.modules():
            if isinstance(module, (nn.ReLU, nn.LeakyReLU, nn.MaxPool1d)):
                module.register_forward_pre_hook(distance)

        def call(x: list[np.ndarray], k: int) -> tuple[np.ndarray, list[np.ndarray]]:
            leaves = [torch.from_numpy(np.ascontiguousarray(t)).to(dtype).requires_grad_() for t in x]
            near.clear()
            value = net(dict(zip(self.keys, leaves)) if self.keys else leaves[0])
            if not value.requires_grad:
                return value.numpy(), [np.zeros_like(t) for t in x]
            grads = torch.autograd.grad(value.sum(), leaves, allow_unused=True)
            return value.detach().numpy(), [np.zeros_like(t) if g is None else g.numpy() for g, t in zip(grads, x)]

        def to_kink(x: list[np.ndarray], k: int) -> np.ndarray:
            call(x, k)
            least = np.full(x[0].shape[0], np.inf)
            for values in near:
                least = np.minimum(least, values.numpy())
            return least

        arrays = [t.numpy().astype(np.float32 if dtype is torch.float32 else np.float64) for t in self.parts]
        return rule.langevin(
            call,
            arrays,
            self.steps,
            lambda name, i, k: self.table.get(name),
            seed=self.seed,
            masks=[False] * len(arrays),
            jitter=None if jitter is None else np.random.default_rng(jitter),
            after_gradient=to_kink if dtype is torch.float64 else None,
        )


def numbered(module: nn.Module, seed: int) -> None:
    """Fills weights and running statistics with numbers of ``seed`` that float32 holds."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in (*module.named_parameters(), *module.named_buffers()):
            if not p.is_floating_point() or name.endswith(("_u", "_v", "target")):
                continue
            value = torch.randn(p.shape, generator=generator)
            if name.endswith("running_var"):
                p.copy_(0.5 + value.abs())
            elif p.dim() > 1:
                p.copy_(value * (1.5 / math.sqrt(math.prod(p.shape[1:]))))
            else:
                p.copy_(0.3 * value + (1.0 if name.endswith("weight") else 0.0))


@st.composite
def examples(draw: Draw) -> Example:
    chains = draw(st.sampled_from((1, 2, 3, 7, 8, 9, 17)), label="chains")
    count = draw(st.sampled_from((1, 1, 2)), label="tensors")
    shapes: list[Shape] = []
    made: list[nn.Module] = []
    for _ in range(count):
        if draw(st.integers(0, 3), label="latent?") == 3:
            size = draw(st.integers(1, 9), label="size")
            shape = (draw(st.integers(1, 3)), draw(st.integers(2, 5)), draw(st.integers(2, 5)))
            lift = nn.Sequential(nn.Linear(size, math.prod(shape)), nn.Unflatten(1, shape))
            shapes.append((size,))
            made.append(nn.Sequential(lift, draw(trunks(shape))))
        else:
            sides = draw(st.lists(st.integers(2, 9), min_size=1, max_size=2), label="sides")
            shapes.append((draw(st.integers(1, 4), label="channels"), *sides))
            made.append(draw(trunks(shapes[-1])))
    features = 0
    for trunk, shape in zip(made, shapes):
        features += out_shape(trunk, shape)[0]
    head: nn.Module = nn.Identity()
    wide = draw(st.sampled_from((0, 5, 40)), label="head")
    if wide:
        act = draw(st.sampled_from(tuple(SMOOTH)), label="head's activation")
        head = nn.Sequential(nn.Linear(features, wide), SMOOTH[act](), nn.Linear(wide, draw(st.integers(1, 4))))
    outputs = features if not wide else head[2].out_features
    end = draw(st.sampled_from(("column", "logsumexp", "squares", "residual", "mean")), label="end")
    seed = draw(st.integers(0, 2**32 - 1), label="numbers")
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(chains, outputs, generator=generator) if end == "residual" else None
    energy = Energy(made, head, end, draw(st.booleans(), label="pull"), target)
    numbered(energy, seed)
    tensors = [torch.randn(chains, *shape, generator=generator) for shape in shapes]
    if draw(st.booleans(), label="channels_last"):
        tensors = [t.to(memory_format=torch.channels_last) if t.dim() == 4 else t for t in tensors]
    keys = list("ab"[:count]) if count > 1 or draw(st.booleans(), label="dict") else []
    step = draw(st.sampled_from((0.003, 0.02)), label="step_size")
    options: dict[str, Any] = {"step_size": step}
    table: dict[str, float] = {"step_size": step, "temperature": 1.0}
    for name, value in (("noise_scale", 0.05), ("grad_clip", 0.5), ("prior_std", 1.5), ("max_update", 0.05)):
        if draw(st.booleans(), label=name):
            options[name] = table[name] = value
    if draw(st.booleans(), label="bounds"):
        options["bounds"], table["low"], table["high"] = (-1.0, 1.5), -1.0, 1.5
    steps = draw(st.integers(1, 5), label="steps")
    state = dict(zip(keys, tensors)) if keys else tensors[0]
    return Example(energy, state, table, options, steps, seed, keys)


# an example takes half a second, and what is special about convolutions each of them meets several times
FEW = settings(max_examples=20 if settings.get_current_profile_name() == "fuzz-plain" else settings().max_examples)


@FEW
@given(example=examples())
def test_convolutional_energy(example: Example) -> None:
    try:
        truth = example.restated(torch.float64)
    except RuntimeError:  # autograd's: an in-place activation took what another layer needs
        reject()
    assume(all(np.isfinite(t).all() for t in truth.state))
    rough = [example.restated(torch.float32, jitter=n) for n in range(3)]
    tolerance = Tolerance(truth, rough, 2.0**-24)
    sound = tolerance.sound(1e-3)
    before = {name: value.clone() for name, value in example.energy.state_dict().items()}
    training = example.energy.training
    out = Langevin(**example.options).sample(
        example.energy, example.state, example.steps, seed=example.seed, record=("energy", "grad_norm")
    )
    event(f"{out.info['op']} {out.info['backend']}")
    if out.info["op"] != "langevin_net":
        event(str(out.info["reason"]).partition("a step at a time: ")[2].partition("; not captured")[0][:160])
    note(f"{example.energy}\n{out.info['reason']}")
    assert example.energy.training == training
    for name, value in example.energy.state_dict().items():
        assert torch.equal(value, before[name]), name
    assume(sound.any())
    parts = list(out.state.values()) if example.keys else [out.state]
    for i, t in enumerate(parts):
        tolerance.close(f"state {i}", t, lambda r, i=i: r.state[i], sound)
    for name in ("energy", "grad_norm"):
        tolerance.close(name, out.trace[name], lambda r, name=name: np.stack(r.trace[name]), (slice(None), sound))
