"""What the fuzz draws: states, energies and settings, each in the form a user gives it and as plain arrays.

Hypothesis draws what shrinks (structure, shapes, options); a seed drawn with it gives the numbers.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from mmebm.samplers import schedules
from tests.fuzz import rule

Array = np.ndarray
Draw = Callable[..., Any]
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
    "elu": nn.ELU,
}
# where the gradient jumps
KINKED = ("relu", "leaky_relu")
ENERGIES = ("quadratic", "mlp", "joint mlp", "mlp by hand", "conv", "coupled")


def flat(x: Tensor) -> Tensor:
    return x.flatten(1) if x.dim() > 1 else x.unsqueeze(1)


# -- states


@dataclass
class State:
    """``given`` is what the sampler gets, ``arrays`` the same numbers in float64."""

    structure: str
    keys: tuple[Any, ...]
    arrays: list[Array]
    dtypes: list[torch.dtype]
    layouts: list[str]
    given: Any = None

    def build(self, parts: Sequence[Any]) -> Any:
        if self.structure == "tensor":
            return parts[0]
        if self.structure == "dict":
            return dict(zip(self.keys, parts))
        return list(parts) if self.structure == "list" else tuple(parts)

    def parts(self, value: Any) -> list[Any]:
        if self.structure == "tensor":
            return [value]
        return list(value.values()) if self.structure == "dict" else list(value)

    @property
    def chains(self) -> int:
        return self.arrays[0].shape[0]


def laid_out(t: Tensor, layout: str) -> Tensor:
    """``t`` with its numbers in another order in memory."""
    if layout == "transposed" and t.dim() > 1:
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided":
        wide = torch.zeros(*t.shape[:-1], 2 * t.shape[-1] + 1, dtype=t.dtype)
        wide[..., 1::2] = t
        return wide[..., 1::2]
    if layout == "channels_last" and t.dim() == 4:
        return t.contiguous(memory_format=torch.channels_last)
    if layout == "offset":
        out = torch.zeros(t.numel() + 3, dtype=t.dtype)[3:].view(t.shape)
        return out.copy_(t)
    if layout == "expanded" and t.shape[0]:
        return t[:1].expand(t.shape)
    return t


@st.composite
def states(
    draw: Draw, dtypes: Sequence[torch.dtype], max_tensors: int = 3, max_chains: int = 9, min_dims: int = 0
) -> State:
    chains = draw(st.integers(0, max_chains), label="chains")
    structure = draw(st.sampled_from(("tensor", "list", "tuple", "dict")), label="structure")
    count = 1 if structure == "tensor" else draw(st.integers(1, max_tensors), label="tensors")
    keys: tuple[Any, ...] = tuple("abc"[:count]) if structure == "dict" else tuple(range(count))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1), label="state's numbers"))
    kinds = draw(st.sampled_from([(d,) * count for d in dtypes] + [tuple((*dtypes, *dtypes, *dtypes)[:count])]))
    arrays, layouts, tensors = [], [], []
    for dtype in kinds:
        shape = (chains, *draw(st.lists(st.integers(0, 5), min_size=min_dims, max_size=3), label="shape"))
        layout = draw(
            st.sampled_from(("contiguous", "transposed", "strided", "channels_last", "offset", "expanded")),
            label="layout",
        )
        t = laid_out(torch.from_numpy(np.array(generator.normal(size=shape), dtype=np.float32)).to(dtype), layout)
        tensors.append(t)
        arrays.append(t.double().numpy().copy())
        layouts.append(layout)
    state = State(structure, keys, arrays, list(kinds), layouts)
    state.given = state.build(tensors)
    return state


# -- energies


class Net(nn.Module):
    """The energy of one kind on all tensors of a state, (chains,), with its weights in the dtypes given."""

    def __init__(
        self,
        kind: str,
        shapes: Sequence[Sequence[int]],
        dtypes: Sequence[torch.dtype],
        activation: str,
        hidden: Sequence[int],
        seed: int,
    ) -> None:
        super().__init__()
        self.kind, self.activation = kind, activation
        generator = np.random.default_rng(seed)
        numels = [math.prod(shape[1:]) for shape in shapes]

        def numbers(*shape: int) -> Tensor:
            return torch.from_numpy(np.array(generator.normal(size=shape), dtype=np.float32))

        self.means = [numbers(n).to(d) for n, d in zip(numels, dtypes)]
        self.stiffness = [float(s) for s in generator.uniform(0.2, 1.5, size=len(numels))]
        self.kernels = [numbers(3, 1, 3).to(d) for d in dtypes]
        sizes = [sum(numels)] if kind == "joint mlp" else numels
        nets = []
        for size, dtype in zip(sizes, dtypes):
            widths = [size, *hidden, 1]
            layers: list[nn.Module] = []
            for a, b in itertools.pairwise(widths):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of an empty weight
                    linear = nn.Linear(a, b, dtype=dtype)
                with torch.no_grad():
                    linear.weight.copy_(numbers(b, a) / max(a, 1) ** 0.5)
                    linear.bias.copy_(0.3 * numbers(b))
                layers += [linear, ACTIVATIONS[activation]()]
            nets.append(nn.Sequential(*layers[:-1]))
        self.nets = nn.ModuleList(nets)

    def forward(self, parts: Sequence[Tensor]) -> Tensor:
        x = [flat(t) for t in parts]
        if self.kind == "mlp":
            total = self.nets[0](x[0]).squeeze(1)
            for net, t in zip(list(self.nets)[1:], x[1:]):
                total = total + net(t).squeeze(1)
            return total
        if self.kind == "joint mlp":
            return self.nets[0](torch.cat(x, 1) if len(x) > 1 else x[0]).squeeze(1)
        if self.kind == "mlp by hand":
            return sum(self._by_hand(net, t)[0] for net, t in zip(self.nets, x))  # type: ignore[return-value]
        pull = [0.5 * c * (t - m).square().sum(1) for t, m, c in zip(x, self.means, self.stiffness)]
        total = pull[0]
        for part in pull[1:]:
            total = total + part
        if self.kind == "conv":
            for t, kernel in zip(x, self.kernels):
                if t.shape[1]:
                    total = total + nn.functional.conv1d(t.unsqueeze(1), kernel, padding=1).tanh().sum((1, 2))
        if self.kind == "coupled":
            total = total + 0.05 * sum(t.sum(1) for t in x).square()  # type: ignore[union-attr]
        return total

    def _by_hand(self, net: nn.Module, h: Tensor) -> tuple[Tensor, Tensor]:
        nearest = h.new_full((h.shape[0],), math.inf)
        layers = list(net)  # type: ignore[call-overload]
        for layer in layers:
            if isinstance(layer, nn.Linear):
                h = torch.einsum("ni,oi->no", h, layer.weight) + layer.bias
            else:
                nearest = torch.minimum(nearest, h.detach().abs().amin(1))
                h = layer(h)
        return h.squeeze(1), nearest

    def to_kink(self, parts: Sequence[Tensor]) -> Tensor:
        """Per chain the least distance of a number before an activation from the activation's kink."""
        x = [flat(t) for t in parts]
        out = x[0].new_full((x[0].shape[0],), math.inf)
        if "mlp" in self.kind and self.activation in KINKED:
            inputs = [torch.cat(x, 1)] if self.kind == "joint mlp" else x
            for net, t in zip(self.nets, inputs):
                out = torch.minimum(out, self._by_hand(net, t)[1])
        return out


def sum_of_nets(net: Net, keys: Sequence[Any] | None, log_prob: bool, returns: str) -> Callable[..., Tensor]:
    """The MLP kinds of :class:`Net` as somebody writes them, for tensors (chains, elements, ...)."""
    first, second, third = (*net.nets, None, None)[:3]
    a, b, c = (*(keys or ()), None, None, None)[:3]
    count = 0 if keys is None else len(keys)
    joint = net.kind == "joint mlp"

    def value(x: Any, weight: Any = 1.0) -> Tensor:
        if count == 0:
            out = first(x.flatten(1))
        elif joint and count == 3:
            out = first(torch.cat((x[a].flatten(1), x[b].flatten(1), x[c].flatten(1)), 1))
        elif joint and count == 2:
            out = first(torch.cat((x[a].flatten(1), x[b].flatten(1)), 1))
        else:
            out = first(x[a].flatten(1))
            if count > 1 and not joint:
                out = out + second(x[b].flatten(1))
            if count > 2 and not joint:
                out = out + third(x[c].flatten(1))
        out = weight * out.squeeze(1)
        out = -out if log_prob else out
        if returns == "scalar":
            return out.sum()
        return out.unsqueeze(1) if returns == "column" else out

    return value


@dataclass
class Energy:
    """An energy as the user's callable (``given``, with ``args`` and ``kwargs``) and for the rule (:meth:`of`)."""

    state: State
    kind: str
    returns: str
    log_prob: bool
    score: bool
    activation: str
    hidden: tuple[int, ...]
    seed: int
    factor: Callable[[int], Any] = lambda k: 1.0  # of the energy at step k: a number, or (chains,)
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def net(self, dtypes: Sequence[torch.dtype]) -> Net:
        return Net(self.kind, [a.shape for a in self.state.arrays], dtypes, self.activation, self.hidden, self.seed)

    @property
    def given(self) -> Callable[..., Any]:
        wide = {torch.float16: torch.float32, torch.bfloat16: torch.float32}
        dtypes = [wide.get(d, d) for d in self.state.dtypes]
        net, state = self.net(dtypes), self.state
        if (
            "mlp" in self.kind
            and self.kind != "mlp by hand"
            and not self.score
            and dtypes == self.state.dtypes
            and (self.returns != "parts" and all(a.ndim > 1 for a in self.state.arrays))
        ):
            keys = None if state.structure == "tensor" else state.keys
            return sum_of_nets(net, keys, self.log_prob, self.returns)
        cast = [a != b for a, b in zip(dtypes, self.state.dtypes)]

        def value(x: Any, weight: Any = 1.0) -> Tensor:
            parts = [t.to(d) if c else t for t, d, c in zip(state.parts(x), dtypes, cast)]
            out = net(parts)
            if not (isinstance(weight, float) and weight == 1.0):
                out = out * weight
            if self.log_prob:
                out = -out
            if self.returns == "column":
                return out.unsqueeze(1)
            if self.returns == "parts":
                return torch.stack((0.25 * out, 0.75 * out), 1)
            return out.sum() if self.returns == "scalar" else out

        def score(x: Any, weight: Any = 1.0) -> Any:
            leaves = [t if t.requires_grad else t.detach().requires_grad_() for t in state.parts(x)]
            total = (net([t.to(d) if c else t for t, d, c in zip(leaves, dtypes, cast)]) * weight).sum()
            grads = torch.autograd.grad(total, leaves, create_graph=True, allow_unused=True)
            return state.build([torch.zeros_like(t) if g is None else -g for g, t in zip(grads, leaves)])

        return score if self.score else value

    def of(self, dtype: torch.dtype, every: int = 1) -> rule.Energy:
        """For the rule, in ``dtype``; ``every``: rows per chain of the state."""
        net = self.net([dtype] * len(self.state.arrays))

        def call(x: list[Array], k: int) -> tuple[Array, list[Array]]:
            leaves = [torch.from_numpy(np.ascontiguousarray(t)).to(dtype).requires_grad_() for t in x]
            factor = torch.as_tensor(self.factor(k), dtype=dtype)
            if factor.dim():
                factor = factor.repeat_interleave(every, 0)
            value = net(leaves) * factor
            grads = torch.autograd.grad(value.sum(), leaves, allow_unused=True)
            out = value.sum() if self.returns == "scalar" else value
            return out.detach().numpy(), [np.zeros_like(t) if g is None else g.numpy() for g, t in zip(grads, x)]

        return call

    def to_kink(self, x: list[Array], k: int) -> Array:
        net = self.net([torch.float64] * len(x))
        with torch.no_grad():
            return net.to_kink([torch.from_numpy(t) for t in x]).numpy()


@st.composite
def energies(
    draw: Draw, state: State, first_step: int, *, one_per_chain: bool = False, scores: bool = True, fused: bool = False
) -> Energy:
    """``fused``: one that a whole chain can be run on in one call."""
    mixed = len(set(state.dtypes)) > 1
    kinds = ["mlp", "joint mlp"] if fused else [k for k in ENERGIES if not (k == "joint mlp" and mixed)]
    shape = draw(st.sampled_from(("plain", "log_prob", "score") if scores else ("plain", "log_prob")), label="returns")
    returns = {"chains": False, "column": False, "parts": fused, "scalar": one_per_chain}
    out = Energy(
        state,
        draw(st.sampled_from(kinds), label="energy"),
        draw(st.sampled_from([r for r, unfit in returns.items() if not unfit]), label="result"),
        shape == "log_prob",
        shape == "score",
        draw(st.sampled_from(tuple(ACTIVATIONS)), label="activation"),
        tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3), label="hidden")),
        draw(st.integers(0, 2**32 - 1), label="energy's numbers"),
    )
    forms = ("none", "none", "number") if fused else ("none", "number", "tensor", "schedule")
    form = draw(st.sampled_from(forms), label="argument")
    if form == "number":
        out.args, out.factor = (0.7,), lambda k: 0.7
    elif form == "tensor":
        numbers = np.linspace(0.5, 1.5, state.chains, dtype=np.float32)
        wide = torch.float64 if torch.float64 in state.dtypes else torch.float32
        out.kwargs, out.factor = {"weight": torch.from_numpy(numbers).to(wide)}, lambda k: numbers.astype(float)
    elif form == "schedule":
        last = first_step + 5
        out.args = (schedules.linear(0.5, 1.5, last),)
        out.factor = lambda k: 0.5 + min((first_step + k) / max(last - 1, 1), 1.0)
    return out


# -- settings


@dataclass
class Settings:
    """``given``: by name what the sampler gets; ``table``: (name, tensor, step of the run) -> array or None."""

    given: dict[str, Any] = field(default_factory=dict)
    table: dict[tuple[str, int], Callable[[int], Any]] = field(default_factory=dict)
    varies: bool = False
    silent: set[int] = field(default_factory=set)

    def __call__(self, name: str, i: int, k: int) -> Any:
        value = self.table.get((name, i))
        return None if value is None else value(k)


@st.composite
def leaf(
    draw: Draw, shape: tuple[int, ...], low: float, high: float, forms: Sequence[str], zero: bool
) -> tuple[Any, Array]:
    """A value as given, and as an array that broadcasts against ``shape`` = (chains, ...)."""
    form = draw(st.sampled_from(forms), label="form")
    generator = np.random.default_rng(draw(st.integers(0, 2**16), label="setting's numbers"))
    if form in ("number", "numpy", "0-dim"):
        number = float(np.float32(generator.uniform(low, high)))
        if zero and draw(st.integers(0, 9), label="zero?") == 9:
            number = 0.0
        given = {"number": number, "numpy": np.float64(number), "0-dim": torch.tensor(number)}[form]
        return given, np.asarray(number)
    size = {"chains": shape[:1], "elements": shape, "row": (1, *shape[1:])}[form]
    values = np.array(generator.uniform(low, high, size=size), dtype=np.float32)
    given = torch.from_numpy(values.copy())
    if draw(st.booleans(), label="double"):
        given = given.double()
    wide = values.astype(float)
    return given, rule.rows(wide, np.zeros(shape)) if form == "chains" else wide


NUMBERS = ("number", "numpy", "0-dim")


@st.composite
def setting(
    draw: Draw,
    out: Settings,
    name: str,
    state: State,
    first_step: int,
    low: float,
    high: float,
    *,
    forms: Sequence[str] = (*NUMBERS, "chains", "elements", "row"),
    optional: bool = False,
    zero: bool = False,
    mapping: bool = True,
    varies: bool = True,
    column: str | None = None,
    given: bool = True,
    pos: int = 0,
) -> Any:
    """Draws the setting ``name`` into ``out``; returns what the sampler gets.

    ``column``: the name under which the rule asks (bounds are two), if another.
    """
    shapes = [a.shape for a in state.arrays]
    column = column or name
    keys = list(range(len(shapes)))
    as_mapping = mapping and draw(st.booleans(), label=f"{name} by key?")
    if as_mapping and optional and len(keys) > 1:
        keys = sorted(draw(st.sets(st.sampled_from(keys)), label=f"{name}'s keys"))

    def one(indices: Sequence[int]) -> Any:
        """One value for some tensors."""
        common = list(forms)
        if any(shapes[i] != shapes[indices[0]] for i in indices):
            common = [form for form in forms if form not in ("elements", "row")]
        shape = shapes[indices[0]]
        schedule = varies and draw(st.integers(0, 4), label=f"{name} varies?") == 4
        if schedule:
            out.varies = True
            if draw(st.booleans(), label="linear"):
                last = first_step + 5
                for i in indices:
                    out.table[column, i] = lambda k: np.asarray(
                        low + (high - low) * min((first_step + k) / max(last - 1, 1), 1.0)
                    )
                return schedules.linear(low, high, last)
            pairs = [draw(leaf(shape, low, high, common, zero)) for _ in range(3)]
            for i in indices:
                out.table[column, i] = lambda k, i=i: _like(pairs[k % 3][1], shapes[i])
            return lambda k: pairs[(k - first_step) % 3][0]
        value, array = draw(leaf(shape, low, high, common, zero))
        for i in indices:
            out.table[column, i] = lambda k, i=i: _like(array, shapes[i])
            if not isinstance(value, Tensor) and value == 0:
                out.silent.add(i)
        return value

    value = {state.keys[i]: one([i]) for i in keys} if as_mapping else one(keys)
    if given:
        out.given[name] = value
    return value


def _like(array: Array, shape: Sequence[int]) -> Array:
    """One value per chain has as many dimensions as the tensor it is for."""
    if array.ndim and array.size == shape[0] and all(n == 1 for n in array.shape[1:]):
        return array.reshape(-1, *[1] * (len(shape) - 1))
    return array


@st.composite
def masks(draw: Draw, state: State) -> tuple[Any, list[Any]]:
    """(observed, one of True, False or a boolean array per tensor)."""
    count = len(state.keys)
    kind = draw(st.sampled_from(("none", "none", "keys", "masks")), label="observed")
    if kind == "none":
        return None, [False] * count
    if kind == "keys":
        held = draw(st.sets(st.sampled_from(range(count))), label="observed keys")
        make = draw(st.sampled_from((list, tuple, set)))
        return make(state.keys[i] for i in held), [i in held for i in range(count)]
    generator = np.random.default_rng(draw(st.integers(0, 2**16), label="mask's numbers"))
    given, plain = {}, []
    for key, a in zip(state.keys, state.arrays):
        form = draw(st.sampled_from(("full", "row", "chains", "true", "false")), label="mask")
        if form in ("true", "false"):
            plain.append(form == "true")
            given[key] = form == "true"
            continue
        sizes = {"full": a.shape, "row": (1, *a.shape[1:]), "chains": (*a.shape[:1], *[1] * (a.ndim - 1))}
        mask = generator.random(sizes[form]) < 0.5
        given[key] = torch.from_numpy(np.array(mask))
        plain.append(np.broadcast_to(mask, a.shape))
    if count == 1 and isinstance(given[state.keys[0]], Tensor) and draw(st.booleans(), label="bare mask"):
        return given[state.keys[0]], plain
    return given, plain


# -- the comparison


@dataclass
class Tolerance:
    """How far a float32 (float64) chain may be from the truth, by quantity.

    ``FACTOR`` times the largest distance, over all chains and elements, of float32 loops of the rule from the float64
    one (times the ratio of the roundings in float64), and for quantities where these happened to be exact
    ``ROUNDINGS`` of the largest number about.
    """

    FACTOR, ROUNDINGS = 16.0, 16.0
    truth: rule.Result
    rough: list[rule.Result]
    eps: float

    def sound(self, decision: float) -> Array:
        """The chains whose decisions all rough loops took alike, with ``decision`` to spare."""
        return self.truth.margin > decision

    def limit(self, pick: Callable[[rule.Result], Array], chosen: Any = slice(None)) -> float:
        exact = np.asarray(pick(self.truth), dtype=float)[chosen]
        if exact.size == 0:
            return 0.0
        worst = max(float(np.abs(np.asarray(pick(r), dtype=float)[chosen] - exact).max()) for r in self.rough)
        return self.FACTOR * worst * (self.eps / 2.0**-24) + self.ROUNDINGS * self.eps * (
            1 + float(np.abs(exact).max())
        )

    def close(
        self, name: str, got: Tensor, pick: Callable[[rule.Result], Any], chosen: Any = slice(None), how: str = ""
    ) -> None:
        """Fails where ``got`` is not the truth's ``pick``, among the ``chosen``."""
        exact, limit = np.asarray(pick(self.truth), dtype=float), self.limit(pick, chosen)
        mine = got.detach().double().numpy()
        assert mine.shape == exact.shape, (name, mine.shape, exact.shape)
        worst = np.abs(mine - exact)[chosen].max(initial=0.0)
        assert worst <= limit, f"{name} is {worst} off, allowed are {limit}; {how}"


def states_at(i: int, steps: Sequence[int]) -> Callable[[rule.Result], Array]:
    """Tensor ``i`` of the trajectory after these steps."""
    return lambda r: np.stack([r.trajectory[k][i] for k in steps])


def traced(name: str) -> Callable[[rule.Result], Array]:
    return lambda r: np.stack(r.trace[name])
