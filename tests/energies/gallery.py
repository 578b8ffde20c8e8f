"""Awkward energies: what people do in an energy that a sampler which replaces it, or what surrounds it, may miss.

Each entry is a function of a :class:`Build` that makes the energy, for each dtype with the same numbers, and says in a
line what is special. tests/energies/test_gallery.py runs each on every path: the chain is that of a loop with autograd,
or refused with an error of this library.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

CHAINS, INPUTS, HIDDEN = 5, 6, 9


class Build:
    """Numbers in ``dtype``, the same in each (of float32's precision)."""

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        self.dtype, self.generator = dtype, torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=self.generator)).to(self.dtype)

    def linear(self, inputs: int = INPUTS, outputs: int = HIDDEN, bias: bool = True) -> nn.Linear:
        return self.fill(nn.Linear(inputs, outputs, bias=bias))

    def fill(self, module: Any) -> Any:
        with torch.no_grad():
            for p in module.parameters():
                p.copy_(torch.randn(p.shape, generator=self.generator) / max(p.shape[-1], 1) ** 0.5 * 1.3)
        return module.to(self.dtype)

    def mlp(self, *hidden: int, act: Callable[[], nn.Module] = nn.SiLU, outputs: int = 1) -> nn.Sequential:
        sizes = [INPUTS, *(hidden or (HIDDEN,)), outputs]
        layers: list[nn.Module] = []
        for i in range(len(sizes) - 1):
            layers += [self.linear(sizes[i], sizes[i + 1]), act()]
        return nn.Sequential(*layers[:-1])


@dataclass
class Case:
    """An energy with its start, what surrounds the call, what happens between two calls, and what it counts."""

    energy: Callable[..., Any]
    state: Any = None
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    between: Callable[[], Any] = lambda: None
    count: Callable[[], Any] = lambda: None


@dataclass(frozen=True)
class Entry:
    """``own_dtype``: the truth is the loop in float32, as the energy is not the same function in float64;
    ``one_call_a_step``: its value depends on how often it was called; ``couples``: a chain's energy depends on other
    chains; ``refuses``: the message where a loop would run but the samplers will not."""

    make: Callable[[Build], Any]
    special: str
    own_dtype: bool = False
    one_call_a_step: bool = False
    couples: bool = False
    refuses: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def build(self, dtype: torch.dtype, seed: int) -> Case:
        torch.manual_seed(seed)
        b = Build(torch.float32 if self.own_dtype else dtype, seed)
        state = b.normal(CHAINS, INPUTS, scale=0.7)
        made = self.make(b)
        case = made if isinstance(made, Case) else Case(made)
        if case.state is None:
            case.state = state
        return case


GALLERY: dict[str, Entry] = {}


def awkward(special: str, **flags: Any) -> Callable[[Callable[[Build], Any]], Callable[[Build], Any]]:
    def register(make: Callable[[Build], Any]) -> Callable[[Build], Any]:
        assert make.__name__ not in GALLERY
        GALLERY[make.__name__] = Entry(make, special, **flags)
        return make

    return register


# -- in place


@awkward("F.relu(e, inplace=True) as a statement")
def relu_inplace_function(b: Build) -> Any:
    first, last = b.linear(), b.linear(HIDDEN, 1)

    def energy(x: Tensor) -> Tensor:
        e = last(F.silu(first(x)))
        F.relu(e, inplace=True)
        return e.squeeze(1)

    return energy


@awkward("nn.ReLU(inplace=True) in a Sequential")
def relu_inplace_module(b: Build) -> Any:
    return b.mlp(act=lambda: nn.ReLU(inplace=True))


@awkward("nn.ReLU(inplace=True) on what is used again")
def relu_inplace_reused(b: Build) -> Any:
    first, last, act = b.linear(), b.linear(HIDDEN, 1), nn.ReLU(inplace=True)

    def energy(x: Tensor) -> Tensor:
        h = F.silu(first(x))
        a = h + 0.0
        act(a)
        return (last(a) + a.sum(1, keepdim=True)).squeeze(1)

    return energy


@awkward("e += b(x)")
def augmented_add(b: Build) -> Any:
    one, two = b.mlp(), b.mlp()

    def energy(x: Tensor) -> Tensor:
        e = one(x)
        e += two(x)
        return e.squeeze(1)

    return energy


@awkward("total is e; total += b(x); e is returned")
def augmented_alias(b: Build) -> Any:
    one, two = b.mlp(), b.mlp()

    def energy(x: Tensor) -> Tensor:
        e = one(x).squeeze(1)
        total = e
        total += two(x).squeeze(1)
        return e

    return energy


@awkward("h.mul_(3) as a statement")
def mul_(b: Build) -> Any:
    net = b.mlp()

    def energy(x: Tensor) -> Tensor:
        e = net(x)
        e.mul_(3)
        return e.squeeze(1)

    return energy


@awkward("a view is changed: flat = h.view(-1); flat *= 3")
def view_changed(b: Build) -> Any:
    first, last = b.linear(), b.linear(HIDDEN, 1)

    def energy(x: Tensor) -> Tensor:
        h = first(x)
        flat = h.view(-1)
        flat *= 3
        return last(F.silu(h)).squeeze(1)

    return energy


@awkward("h[:, 0] = a number")
def set_column(b: Build) -> Any:
    first, last = b.linear(), b.linear(HIDDEN, 1)

    def energy(x: Tensor) -> Tensor:
        h = F.silu(first(x))
        h[:, 0] = 0.5
        return last(h).squeeze(1)

    return energy


@awkward("h[:, :2] *= 2")
def set_slice(b: Build) -> Any:
    first, last = b.linear(), b.linear(HIDDEN, 1)

    def energy(x: Tensor) -> Tensor:
        h = first(x)
        h[:, :2] *= 2
        return last(torch.tanh(h)).squeeze(1)

    return energy


@awkward("e.clamp_(min=0) on the result")
def clamp_(b: Build) -> Any:
    net = b.mlp()

    def energy(x: Tensor) -> Tensor:
        e = net(x)
        e.clamp_(min=0.1)
        return e.squeeze(1)

    return energy


@awkward("torch.neg(e, out=...) has no gradient: a loop raises")
def out_argument(b: Build) -> Any:
    net = b.mlp()

    def energy(x: Tensor) -> Tensor:
        e = net(x)
        torch.neg(e, out=e)
        return e.squeeze(1)

    return energy


@awkward("the input itself is changed in place: a loop raises")
def input_inplace(b: Build) -> Any:
    net = b.mlp()

    def energy(x: Tensor) -> Tensor:
        x += 1.0
        return net(x).squeeze(1)

    return energy


@awkward("F.dropout(p=0, inplace=True), F.leaky_relu_, exponents in place")
def functional_inplace(b: Build) -> Any:
    net, last = b.linear(), b.linear(HIDDEN, 1)

    def energy(x: Tensor) -> Tensor:
        h = net(x)
        F.leaky_relu_(h, 0.3)
        h = torch.tanh(h)
        return last(h.clone().pow_(2)).squeeze(1)

    return energy


@awkward("index_add_, scatter and masked_fill_ on what an MLP made")
def scattered(b: Build) -> Any:
    first, last = b.linear(), b.linear(HIDDEN, 1)

    def energy(x: Tensor) -> Tensor:
        h = torch.tanh(first(x)).clone()
        h.index_add_(1, torch.tensor([0, 0]), h[:, 3:5].clone())
        h.masked_fill_(torch.arange(HIDDEN) == 2, 0.0)
        return last(h).squeeze(1)

    return energy


# -- hooks


@awkward("a forward hook that changes the output")
def forward_hook(b: Build) -> Any:
    net = b.mlp()
    net[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    return net


@awkward("a forward pre-hook that changes the input")
def forward_pre_hook(b: Build) -> Any:
    net = b.mlp()
    net.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1.0,))
    return net


@awkward("a full backward hook that changes the gradient")
def backward_hook(b: Build) -> Any:
    net = b.mlp()
    net[0].register_full_backward_hook(lambda module, grads, outputs: (3 * grads[0],))
    return net


@awkward("a full backward pre-hook that changes the gradient")
def backward_pre_hook(b: Build) -> Any:
    net = b.mlp()
    net[1].register_full_backward_pre_hook(lambda module, outputs: (0.5 * outputs[0],))
    return net


@awkward("a hook on a hidden tensor that clips its gradient")
def tensor_hook(b: Build) -> Any:
    first, last = b.linear(), b.linear(HIDDEN, 1)

    def energy(x: Tensor) -> Tensor:
        h = first(x)
        if h.requires_grad:
            h.register_hook(lambda g: g.clamp(-0.05, 0.05))
        return last(F.silu(h)).squeeze(1)

    return energy


@awkward("a hook on the state that doubles its gradient")
def input_hook(b: Build) -> Any:
    net = b.mlp()

    def energy(x: Tensor) -> Tensor:
        y = x * 1.0
        if y.requires_grad:
            y.register_hook(lambda g: 2 * g)
        return net(y).squeeze(1)

    return energy


@awkward("a hook on a weight, which nobody's gradient reaches")
def weight_hook(b: Build) -> Any:
    net, seen = b.mlp(), []
    net[0].weight.register_hook(lambda g: seen.append(1))
    return Case(net, count=lambda: len(seen))


@awkward("a forward hook that counts")
def counting_hook(b: Build) -> Any:
    net, seen = b.mlp(), []
    net[2].register_forward_hook(lambda module, inputs, output: seen.append(1))
    return Case(net, count=lambda: len(seen))


@awkward("hooks of the state dict, which say nothing about the energy")
def state_dict_hooks(b: Build) -> Any:
    net = b.mlp()
    net.register_state_dict_post_hook(lambda *args: None)
    net.register_load_state_dict_post_hook(lambda *args: None)
    return net


@awkward("a global forward hook that changes every Linear's output")
def global_forward_hook(b: Build) -> Any:
    @contextlib.contextmanager
    def around() -> Any:
        hook = nn.modules.module.register_module_forward_hook(
            lambda module, inputs, output: 2 * output if isinstance(module, nn.Linear) else None
        )
        yield
        hook.remove()

    return Case(b.mlp(), around=around)


@awkward("a global forward hook that counts Linears")
def global_counting_hook(b: Build) -> Any:
    seen: list[int] = []

    @contextlib.contextmanager
    def around() -> Any:
        hook = nn.modules.module.register_module_forward_hook(
            lambda module, inputs, output: seen.append(1) if isinstance(module, nn.Linear) else None
        )
        yield
        hook.remove()

    return Case(b.mlp(), around=around, count=lambda: len(seen))


@awkward("a global full backward hook that changes gradients")
def global_backward_hook(b: Build) -> Any:
    @contextlib.contextmanager
    def around() -> Any:
        hook = nn.modules.module.register_module_full_backward_hook(
            lambda module, grads, outputs: (2 * grads[0],) if isinstance(module, nn.SiLU) else None
        )
        yield
        hook.remove()

    return Case(b.mlp(), around=around)


@awkward("saved tensors that lose bits on their way to the backward pass")
def saved_tensor_hooks(b: Build) -> Any:
    halved = lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t * 0.5, lambda t: t)
    return Case(b.mlp(), around=halved)


@awkward("saved-tensor hooks inside the energy")
def saved_tensor_hooks_inside(b: Build) -> Any:
    net = b.mlp()

    def energy(x: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t * 0.5, lambda t: t):
            return net(x).squeeze(1)

    return energy


class DoubleLinear(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return 2 * out if func is F.linear else out


class DoubleProduct(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return out * 2 if func is torch.ops.aten.addmm.default else out


@awkward("a torch function mode that changes linear")
def function_mode(b: Build) -> Any:
    return Case(b.mlp(), around=DoubleLinear)


@awkward("a torch dispatch mode that changes the matrix product")
def dispatch_mode(b: Build) -> Any:
    return Case(b.mlp(), around=DoubleProduct)


@awkward("a torch function mode inside the energy")
def function_mode_inside(b: Build) -> Any:
    net = b.mlp()

    def energy(x: Tensor) -> Tensor:
        with DoubleLinear():
            return net(x).squeeze(1)

    return energy


@awkward("torch.nn.functional.linear replaced for everybody")
def patched_function(b: Build) -> Any:
    plain = F.linear
    patch = lambda: mock.patch.object(F, "linear", lambda x, w, bias=None: 2 * plain(x, w, bias))
    return Case(b.mlp(), around=patch)


class Straight(torch.autograd.Function):
    """A tanh with somebody's own gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.tanh(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return 0.5 * grad


def replaced_later(energy: Any, place: Any, name: str, other: Any, **more: Any) -> Case:
    """``place.name`` is another from the second run on."""
    changed: list[bool] = []
    patch = lambda: mock.patch.object(place, name, other, **more) if changed else nullcontext()
    return Case(energy, around=patch, between=lambda: changed.append(True))


@awkward("torch.tanh replaced between two calls, with another gradient")
def replaced_tanh(b: Build) -> Any:
    plain = torch._C._VariableFunctions.tanh

    class Own(Straight):
        forward = staticmethod(lambda ctx, x: plain(x))

    return replaced_later(b.mlp(act=nn.Tanh), torch, "tanh", Own.apply)


@awkward("the same, behind a convolution")
def replaced_tanh_in_a_net(b: Build) -> Any:
    conv, last, plain = b.fill(nn.Conv1d(1, 3, 3)), b.linear(12, 1), torch._C._VariableFunctions.tanh

    class Own(Straight):
        forward = staticmethod(lambda ctx, x: plain(x))

    energy = lambda x: last(torch.tanh(conv(x.unsqueeze(1))).flatten(1)).squeeze(1)
    return replaced_later(energy, torch, "tanh", Own.apply)


@awkward("torch.square replaced between two calls, which no layer calls")
def replaced_square(b: Build) -> Any:
    conv, plain = b.fill(nn.Conv1d(1, 3, 3)), torch._C._VariableFunctions.square

    class Own(Straight):
        forward = staticmethod(lambda ctx, x: plain(x))

    return replaced_later(lambda x: torch.square(conv(x.unsqueeze(1))).sum((1, 2)), torch, "square", Own.apply)


@awkward("a method of tensors replaced between two calls")
def replaced_method(b: Build) -> Any:
    first, last = b.linear(), b.linear(HIDDEN, 1)
    plain = torch._C.TensorBase.tanh
    energy = lambda x: last(first(x).tanh()).squeeze(1)
    return replaced_later(energy, Tensor, "tanh", lambda self: 0.5 * plain(self), create=True)


@awkward("the product of tensors replaced between two calls")
def replaced_product(b: Build) -> Any:
    net, plain = b.mlp(), torch._C.TensorBase.__mul__
    patched = lambda self, other: plain(self, 1.5 if isinstance(other, float) and other == 3.5 else other)
    return replaced_later(lambda x: (net(x) * 3.5).squeeze(1), Tensor, "__mul__", patched, create=True)


@awkward("the forward of every nn.Tanh replaced between two calls")
def replaced_forward(b: Build) -> Any:
    return replaced_later(b.mlp(act=nn.Tanh), nn.Tanh, "forward", lambda self, x: Straight.apply(x))


@awkward("a method of every nn.Conv1d replaced between two calls")
def replaced_conv_method(b: Build) -> Any:
    conv, last, plain = b.fill(nn.Conv1d(1, 3, 3)), b.linear(12, 1), nn.Conv1d._conv_forward
    energy = lambda x: last(F.silu(conv(x.unsqueeze(1))).flatten(1)).squeeze(1)
    return replaced_later(energy, nn.Conv1d, "_conv_forward", lambda self, *given: 2.0 * plain(self, *given))


@awkward("a wrapper around a function of torch that counts its calls, put there between two calls")
def counted_function(b: Build) -> Any:
    plain, seen = F.silu, []

    def silu(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(1)
        return plain(*args, **kwargs)

    case = replaced_later(b.mlp(), F, "silu", silu)
    case.count = lambda: len(seen)
    return case


# -- weights


@awkward("spectral norm by parametrization, in eval mode")
def spectral_norm_eval(b: Build) -> Any:
    net = b.mlp()
    parametrizations.spectral_norm(net[0])
    return net.eval()


@awkward("spectral norm by parametrization, in train mode: each call is a power iteration", one_call_a_step=True)
def spectral_norm_train(b: Build) -> Any:
    net = b.mlp()
    parametrizations.spectral_norm(net[0])
    return net.train()


@awkward("the old spectral norm, by hooks, in train mode", one_call_a_step=True)
def old_spectral_norm_train(b: Build) -> Any:
    net = b.mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.spectral_norm(net[0])
    return net.train()


@awkward("weight norm by parametrization")
def weight_norm(b: Build) -> Any:
    net = b.mlp()
    parametrizations.weight_norm(net[0])
    return net


class Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).T


@awkward("a parametrization of one's own")
def parametrized(b: Build) -> Any:
    net = b.mlp(INPUTS)
    parametrize.register_parametrization(net[0], "weight", Symmetric())
    return net


class LoRA(nn.Module):
    def __init__(self, base: nn.Linear, a: Tensor, c: Tensor) -> None:
        super().__init__()
        self.base, self.a, self.c = base, nn.Parameter(a), nn.Parameter(c)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.a), self.c)


@awkward("a low-rank wrapper that passes for the Linear it wraps")
def lora(b: Build) -> Any:
    net = b.mlp()
    net[0] = LoRA(net[0], b.normal(2, INPUTS), b.normal(HIDDEN, 2))
    return net


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * super().forward(x) + 1.0


@awkward("a subclass of Linear with a forward of its own")
def linear_subclass(b: Build) -> Any:
    return nn.Sequential(b.fill(Scaled(INPUTS, HIDDEN)), nn.Tanh(), b.linear(HIDDEN, 1))


@awkward("a Linear whose forward was replaced on the instance")
def patched_forward(b: Build) -> Any:
    net = b.mlp()
    plain = net[0].forward
    net[0].forward = lambda x: 2 * plain(x)  # type: ignore[method-assign]
    return net


@awkward("an activation whose slope changes between two calls")
def slope_changes(b: Build) -> Any:
    net = b.mlp(act=lambda: nn.LeakyReLU(0.1))
    return Case(net, between=lambda: setattr(net[1], "negative_slope", 0.6))


@awkward("weights replaced between two calls")
def weights_replaced(b: Build) -> Any:
    net, other = b.mlp(), b.linear()

    def between() -> None:
        net[0].weight = nn.Parameter(other.weight.detach().clone())

    return Case(net, between=between)


@awkward("weights changed in place between two calls")
def weights_changed(b: Build) -> Any:
    net = b.mlp()
    return Case(net, between=lambda: net[0].weight.data.mul_(-1.5))


@awkward("a layer replaced by another kind between two calls")
def layer_replaced(b: Build) -> Any:
    net = b.mlp()
    return Case(net, between=lambda: net.__setitem__(1, nn.Tanh()))


@awkward("a hook registered between two calls")
def hook_between(b: Build) -> Any:
    net = b.mlp()
    return Case(net, between=lambda: net[0].register_forward_hook(lambda module, inputs, output: 2 * output))


@awkward("functional_call with other weights")
def functional_call(b: Build) -> Any:
    net = b.mlp()
    other = {name: p.detach() * 0.5 for name, p in net.named_parameters()}
    return lambda x: torch.func.functional_call(net, other, (x,)).squeeze(1)


@awkward("an ensemble by stack_module_state and vmap")
def ensemble(b: Build) -> Any:
    nets = [b.mlp() for _ in range(3)]
    params, buffers = torch.func.stack_module_state(nets)  # pyright: ignore[reportArgumentType]

    def energy(x: Tensor) -> Tensor:
        one = lambda p, q: torch.func.functional_call(nets[0], (p, q), (x,))
        return torch.vmap(one)(params, buffers).mean(0).squeeze(1)

    return energy


@awkward("a float64 net on a float32 state", own_dtype=True)
def double_net(b: Build) -> Any:
    net = b.mlp().double()
    return lambda x: net(x.double()).squeeze(1)


@awkward("a float64 net that is given a float32 state: a loop raises", own_dtype=True)
def wrong_dtype(b: Build) -> Any:
    return b.mlp().double()


@awkward("bfloat16 weights", own_dtype=True)
def bfloat16_net(b: Build) -> Any:
    net = b.mlp().bfloat16()
    return lambda x: net(x.bfloat16()).float().squeeze(1)


@awkward("autocast inside", own_dtype=True)
def autocast_inside(b: Build) -> Any:
    net = b.mlp()

    def energy(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return net(x).float().squeeze(1)

    return energy


@awkward("autocast around", own_dtype=True)
def autocast_around(b: Build) -> Any:
    return Case(b.mlp(), around=lambda: torch.autocast("cpu", torch.bfloat16))


class Doubling(Tensor):
    """A weight that changes what ``linear`` means."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_function__(func, types, args, kwargs or {})
        return 2 * out.as_subclass(Tensor) if func is F.linear else out


@awkward("a weight of a tensor subclass that changes linear")
def subclass_weight(b: Build) -> Any:
    net = b.mlp()
    net[0].weight = nn.Parameter(net[0].weight.detach().as_subclass(Doubling))
    return net


@awkward("a bias of shape (1,)")
def bias_of_one(b: Build) -> Any:
    net = b.mlp()
    net[0].bias = nn.Parameter(b.normal(1))
    return net


@awkward("a bias of shape ()")
def bias_scalar(b: Build) -> Any:
    w, v, bias = b.normal(HIDDEN, INPUTS), b.normal(1, HIDDEN), b.normal(1)[0]
    return lambda x: F.linear(torch.tanh(F.linear(x, w, bias)), v).squeeze(1)


@awkward("a bias of shape (chains, hidden)")
def bias_per_chain(b: Build) -> Any:
    net = b.mlp()
    net[0].bias = nn.Parameter(b.normal(CHAINS, HIDDEN))
    return net


@awkward("a sparse weight")
def sparse_weight(b: Build) -> Any:
    w, v = b.normal(HIDDEN, INPUTS).to_sparse(), b.normal(1, HIDDEN)
    return lambda x: F.linear(torch.tanh(torch.sparse.mm(w, x.T).T), v).squeeze(1)


@awkward("a sparse weight in a Linear")
def sparse_linear(b: Build) -> Any:
    net = b.mlp()
    net[0].weight = nn.Parameter(net[0].weight.detach().to_sparse(), requires_grad=False)
    return net


@awkward("weights that are quantised on the way", own_dtype=True)
def fake_quantised(b: Build) -> Any:
    net = b.mlp()
    levels = lambda w: torch.fake_quantize_per_tensor_affine(w, 0.1, 0, -8, 7)
    return lambda x: F.linear(F.silu(F.linear(x, levels(net[0].weight), net[0].bias)), net[2].weight).squeeze(1)


@awkward("int8 weights with a scale")
def int8_weights(b: Build) -> Any:
    w, v = (10 * b.normal(HIDDEN, INPUTS)).round().to(torch.int8), b.normal(1, HIDDEN)
    return lambda x: F.linear(torch.tanh(F.linear(x, w.to(x.dtype) * 0.1)), v).squeeze(1)


@awkward("non-contiguous weights")
def transposed_weight(b: Build) -> Any:
    net = b.mlp()
    net[0].weight = nn.Parameter(b.normal(INPUTS, HIDDEN).T)
    net[2].weight = nn.Parameter(b.normal(1, 2 * HIDDEN)[:, ::2])
    return net


@awkward("tied weights: one layer twice, and transposed")
def tied_weights(b: Build) -> Any:
    first = b.linear(INPUTS, INPUTS)
    return lambda x: F.linear(torch.tanh(first(torch.tanh(first(x)))), first.weight.T).sum(1)


@awkward("an expanded weight")
def expanded_weight(b: Build) -> Any:
    net = b.mlp()
    net[0].weight = nn.Parameter(b.normal(1, INPUTS).expand(HIDDEN, INPUTS))
    return net


@awkward("NaN weights")
def nan_weights(b: Build) -> Any:
    net = b.mlp()
    net[0].weight.data[0, 0] = float("nan")
    return net


@awkward("a non-leaf weight, as in meta-learning")
def non_leaf_weight(b: Build) -> Any:
    net = b.mlp()
    weight = net[0].weight
    del net[0]._parameters["weight"]
    net[0].weight = weight * 0.5
    return net


@awkward("lazy layers not yet made")
def lazy_layer(b: Build) -> Any:
    net = nn.Sequential(nn.LazyLinear(HIDDEN, dtype=b.dtype), nn.SiLU(), b.linear(HIDDEN, 1))
    net(b.normal(2, INPUTS))
    return b.fill(net)


@awkward("PReLU, whose slope is a parameter")
def prelu(b: Build) -> Any:
    return nn.Sequential(b.linear(), nn.PReLU().to(b.dtype), b.linear(HIDDEN, 1))


@awkward("activations with arguments: Softplus(beta=2), GELU(tanh), ELU(1.7), Softplus(threshold=1)")
def activation_arguments(b: Build) -> Any:
    nets = [
        b.mlp(act=lambda: nn.Softplus(beta=2)),
        b.mlp(act=lambda: nn.GELU("tanh")),
        b.mlp(act=lambda: nn.ELU(1.7)),
        b.mlp(act=lambda: nn.Softplus(threshold=1)),
    ]
    return lambda x: nets[0](x).squeeze(1) + nets[1](x).squeeze(1) + nets[2](x).squeeze(1) + nets[3](x).squeeze(1)


@awkward("too deep and too wide for a fused chain")
def deep_and_wide(b: Build) -> Any:
    return b.mlp(300, 4, 4, 4, 4, 4, act=nn.Tanh)


# -- modules by mode


@awkward("dropout in train mode", own_dtype=True, one_call_a_step=True)
def dropout_train(b: Build) -> Any:
    return nn.Sequential(b.linear(), nn.SiLU(), nn.Dropout(0.4), b.linear(HIDDEN, 1)).train()


@awkward("dropout in eval mode")
def dropout_eval(b: Build) -> Any:
    return nn.Sequential(b.linear(), nn.SiLU(), nn.Dropout(0.4), b.linear(HIDDEN, 1)).eval()


@awkward("batch norm in train mode couples the chains", couples=True)
def batch_norm_train(b: Build) -> Any:
    return nn.Sequential(b.linear(), nn.BatchNorm1d(HIDDEN).to(b.dtype), nn.SiLU(), b.linear(HIDDEN, 1)).train()


@awkward("batch norm in eval mode")
def batch_norm_eval(b: Build) -> Any:
    norm = nn.BatchNorm1d(HIDDEN).to(b.dtype)
    norm.running_mean, norm.running_var = b.normal(HIDDEN), b.normal(HIDDEN).abs() + 0.5
    return nn.Sequential(b.linear(), norm, nn.SiLU(), b.linear(HIDDEN, 1)).eval()


@awkward("layer norm")
def layer_norm(b: Build) -> Any:
    return nn.Sequential(b.linear(), nn.LayerNorm(HIDDEN).to(b.dtype), nn.SiLU(), b.linear(HIDDEN, 1))


@awkward("a branch on self.training")
def training_branch(b: Build) -> Any:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = b.mlp()

        def forward(self, x: Tensor) -> Tensor:
            return (self.net(x) * (3.0 if self.training else 1.0)).squeeze(1)

    return Net().train()


# -- coupling between chains


@awkward("minus the batch's mean", couples=True)
def batch_mean(b: Build) -> Any:
    net = b.mlp()
    return lambda x: net(x - x.mean(0)).squeeze(1)


@awkward("a softmax over the batch", couples=True)
def batch_softmax(b: Build) -> Any:
    net = b.mlp()
    return lambda x: net(x).softmax(0).squeeze(1) * 3


@awkward("chains that repel each other", couples=True)
def repulsion(b: Build) -> Any:
    net = b.mlp()
    return lambda x: net(x).squeeze(1) + 0.1 * (x @ x.T).sum(1)


@awkward("the neighbour's state", couples=True)
def rolled(b: Build) -> Any:
    net = b.mlp()
    return lambda x: net(x + 0.5 * x.roll(1, 0)).squeeze(1)


@awkward("chains in another order", couples=True)
def flipped(b: Build) -> Any:
    net = b.mlp()
    return lambda x: net(x.flip(0)).squeeze(1)


@awkward("one chain's energy for all", couples=True)
def first_chain(b: Build) -> Any:
    net = b.mlp()
    return lambda x: net(x[:1]).expand(x.shape[0], 1).squeeze(1) + 0.1 * net(x).squeeze(1)


@awkward("all chains as one input", couples=True)
def one_input(b: Build) -> Any:
    net = nn.Sequential(b.linear(CHAINS * INPUTS), nn.Tanh(), b.linear(HIDDEN, 1))
    return lambda x: net(x.reshape(1, -1)).squeeze()


@awkward("the batch's maximum", couples=True)
def batch_max(b: Build) -> Any:
    net = b.mlp()
    return lambda x: net(x).squeeze(1) + net(x).max()


@awkward("a contrastive loss over the batch: logsumexp along dimension 0", couples=True)
def batch_logsumexp(b: Build) -> Any:
    net = b.mlp()
    return lambda x: net(x).squeeze(1) - torch.logsumexp(net(x).squeeze(1), 0)


# -- state of one's own


@awkward("self.calls += 1, and the energy depends on it", one_call_a_step=True)
def counter(b: Build) -> Any:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.calls = b.mlp(), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return (self.net(x) * (1 + 0.1 * self.calls)).squeeze(1)

    net = Net()
    return Case(net, count=lambda: net.calls)


@awkward("a buffer counts: c = self.calls; c += 1")
def buffer_alias(b: Build) -> Any:
    class Net(nn.Module):
        calls: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.net = b.mlp()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            c = self.calls
            c += 1
            return self.net(x).squeeze(1)

    net = Net()
    return Case(net, count=lambda: float(net.calls))


@awkward("torch.add(buffer, 1, out=buffer)")
def buffer_out(b: Build) -> Any:
    net, calls = b.mlp(), torch.zeros(())

    def energy(x: Tensor) -> Tensor:
        torch.add(calls, 1, out=calls)
        return net(x).squeeze(1)

    return Case(energy, count=lambda: float(calls))


@awkward("values are kept in a list")
def history(b: Build) -> Any:
    net, kept = b.mlp(), []

    def energy(x: Tensor) -> Tensor:
        e = net(x).squeeze(1)
        kept.append(e.detach().mean())
        return e

    return Case(energy, count=lambda: len(kept))


@awkward("a running mean of the energy in an attribute")
def running_mean(b: Build) -> Any:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.mean, self.calls = b.mlp(), None, []

        def forward(self, x: Tensor) -> Tensor:
            e = self.net(x).squeeze(1)
            self.mean = e.detach().mean() if self.mean is None else 0.9 * self.mean + 0.1 * e.detach().mean()
            self.calls.append(0)
            return e

    net = Net()
    return Case(net, count=lambda: len(net.calls))


@awkward("a generator that counts: next(count)", one_call_a_step=True)
def itertools_count(b: Build) -> Any:
    import itertools

    net, ticks = b.mlp(), itertools.count(1)
    return lambda x: net(x).squeeze(1) * (1 + 0.1 * next(ticks))


@awkward("a dict counts through a method")
def dict_counter(b: Build) -> Any:
    net, seen = b.mlp(), {"calls": 0}

    def energy(x: Tensor) -> Tensor:
        seen.update(calls=seen["calls"] + 1)
        return net(x).squeeze(1)

    return Case(energy, count=lambda: seen["calls"])


@awkward("a setattr by name counts")
def setattr_counter(b: Build) -> Any:
    net, seen = b.mlp(), SimpleNamespace(calls=0)

    def energy(x: Tensor) -> Tensor:
        setattr(seen, "calls", getattr(seen, "calls") + 1)  # noqa: B009, B010
        return net(x).squeeze(1)

    return Case(energy, count=lambda: seen.calls)


@awkward("a property counts")
def property_counter(b: Build) -> Any:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.calls = b.mlp(), 0

        @property
        def scale(self) -> float:
            self.calls += 1
            return 2.0

        def forward(self, x: Tensor) -> Tensor:
            return (self.net(x) * self.scale).squeeze(1)

    net = Net()
    return Case(net, count=lambda: net.calls)


SCALE = [1.0]


@awkward("a global that changes between two calls")
def python_global(b: Build) -> Any:
    net = b.mlp()
    SCALE[0] = 1.0
    return Case(lambda x: net(x).squeeze(1) * SCALE[0], between=lambda: SCALE.__setitem__(0, -1.0))


@awkward("a variable of a closure that changes between two calls")
def closure_variable(b: Build) -> Any:
    net, scale = b.mlp(), 1.0

    def energy(x: Tensor) -> Tensor:
        return net(x).squeeze(1) * scale

    def between() -> None:
        nonlocal scale
        scale = -0.5

    return Case(energy, between=between)


@awkward("another module behind the same name between two calls")
def module_swapped(b: Build) -> Any:
    nets = {"net": b.mlp()}
    other = b.mlp(act=nn.Tanh)
    return Case(lambda x: nets["net"](x).squeeze(1), between=lambda: nets.update(net=other))


@awkward("randomness inside the energy", own_dtype=True, one_call_a_step=True)
def random_inside(b: Build) -> Any:
    net = b.mlp()
    return lambda x: net(x + 0.1 * torch.randn_like(x)).squeeze(1)


@awkward("a random subset of hidden units", own_dtype=True, one_call_a_step=True)
def random_subset(b: Build) -> Any:
    first, last = b.linear(), b.linear(HIDDEN, 1)

    def energy(x: Tensor) -> Tensor:
        keep = torch.rand(HIDDEN) < 0.7
        return last(torch.tanh(first(x)) * keep).squeeze(1)

    return energy


# -- control flow


@awkward("a branch on the state's numbers", couples=True)
def data_branch(b: Build) -> Any:
    net, other = b.mlp(), b.mlp()
    return lambda x: (net(x) if x.abs().mean() < 0.75 else other(x)).squeeze(1)


@awkward("a branch on a number from .item()", couples=True)
def item_branch(b: Build) -> Any:
    net = b.mlp()

    def energy(x: Tensor) -> Tensor:
        size = x.detach().abs().max().item()
        return net(x).squeeze(1) * (2.0 if size > 1.5 else 1.0)

    return energy


@awkward("a while loop until the numbers are small", couples=True)
def data_loop(b: Build) -> Any:
    net = b.mlp()

    def energy(x: Tensor) -> Tensor:
        h = x
        while h.detach().abs().max() > 0.5:
            h = 0.5 * h
        return net(h).squeeze(1)

    return energy


@awkward("torch.where on the state")
def where(b: Build) -> Any:
    net = b.mlp()
    return lambda x: net(torch.where(x > 0, x, 0.3 * x)).squeeze(1)


@awkward("whatever goes wrong in a branch is swallowed")
def bare_except(b: Build) -> Any:
    net, other = b.mlp(), b.mlp()

    def energy(x: Tensor) -> Tensor:
        try:
            return net(torch.erf(x)).squeeze(1)
        except:  # noqa: E722
            return other(x).squeeze(1)

    return energy


@awkward("an exception of one's own decides")
def own_exception(b: Build) -> Any:
    net, other = b.mlp(), b.mlp()

    def energy(x: Tensor) -> Tensor:
        try:
            if float(x.detach().sum()) > -1e9:
                raise KeyError("large")
            return net(x).squeeze(1)
        except KeyError:
            return other(x).squeeze(1)

    return energy


@awkward("a branch on the type of the argument")
def type_branch(b: Build) -> Any:
    net, other = b.mlp(), b.mlp()
    return lambda x: (net(x) if type(x) is Tensor else other(x)).squeeze(1)


@awkward("a branch on whether gradients are on")
def grad_branch(b: Build) -> Any:
    net, other = b.mlp(), b.mlp()
    return lambda x: (net(x) if torch.is_grad_enabled() and x.requires_grad else other(x)).squeeze(1)


@awkward("hasattr decides")
def hasattr_branch(b: Build) -> Any:
    net, other = b.mlp(), b.mlp()
    return lambda x: (net(x) if hasattr(x, "untyped_storage") else other(x)).squeeze(1)


@awkward("an assertion about the numbers")
def assertion(b: Build) -> Any:
    net = b.mlp()

    def energy(x: Tensor) -> Tensor:
        assert torch.isfinite(x).all()
        return net(x).squeeze(1)

    return energy


# -- indices and shapes


@awkward("h[:, False], which is empty")
def index_false(b: Build) -> Any:
    first, last = b.linear(), b.linear(HIDDEN, 1)

    def energy(x: Tensor) -> Tensor:
        h = torch.tanh(first(x))
        return last(h).squeeze(1) + h[:, False].sum()

    return energy


@awkward("h[:, True]")
def index_true(b: Build) -> Any:
    first, last = b.linear(), b.linear(HIDDEN, 1)

    def energy(x: Tensor) -> Tensor:
        h = torch.tanh(first(x))
        return last(h[:, True][:, 0]).squeeze(1)

    return energy


@awkward("h[None]")
def index_none(b: Build) -> Any:
    net = b.mlp()
    return lambda x: net(x[None])[0].squeeze(1)


@awkward("h[..., None, :] and a squeeze")
def ellipsis(b: Build) -> Any:
    net = b.mlp()
    return lambda x: net(x[..., None, :]).squeeze(2).squeeze(1)


@awkward("columns in another order, one of them twice")
def fancy_index(b: Build) -> Any:
    net = b.mlp()
    return lambda x: net(x[:, [1, 1, 0, 5, 4, 2]]).squeeze(1)


@awkward("rows picked by a boolean tensor", couples=True)
def boolean_rows(b: Build) -> Any:
    net = b.mlp()

    def energy(x: Tensor) -> Tensor:
        e = net(x).squeeze(1)
        return e + e[torch.arange(x.shape[0]) < 2].sum()

    return energy


@awkward("negative steps and strides")
def strided_index(b: Build) -> Any:
    net = nn.Sequential(b.linear(INPUTS // 2), nn.SiLU(), b.linear(HIDDEN, 1))
    return lambda x: net(x[:, ::2]).squeeze(1) + net(x.flip(1)[:, 1::2]).squeeze(1)


@awkward("chunk, split, stack, cat and unbind")
def pieces(b: Build) -> Any:
    net = b.mlp()

    def energy(x: Tensor) -> Tensor:
        one, two = x.chunk(2, 1)
        first, *rest = x.unbind(1)
        return net(torch.cat((two, one), 1)).squeeze(1) + net(torch.stack([*rest, first], 1)).squeeze(1)

    return energy


@awkward("squeeze() without a dimension")
def bare_squeeze(b: Build) -> Any:
    net = b.mlp()
    return lambda x: net(x).squeeze()


@awkward("one chain only, squeeze() without a dimension")
def bare_squeeze_one(b: Build) -> Any:
    net = b.mlp()
    return Case(lambda x: net(x).squeeze(), state=b.normal(1, INPUTS))


@awkward("the result is (chains, 1)")
def column(b: Build) -> Any:
    return b.mlp()


@awkward("the result is a scalar")
def scalar(b: Build) -> Any:
    net = b.mlp()
    return lambda x: net(x).sum()


@awkward("the result is the mean: the step is divided by the number of chains")
def mean(b: Build) -> Any:
    net = b.mlp()
    return lambda x: net(x).mean()


@awkward("the result is (chains, k)")
def several(b: Build) -> Any:
    return b.mlp(outputs=4)


@awkward("the result is (chains, 2, 3)")
def several_dimensions(b: Build) -> Any:
    net = b.mlp(outputs=6)
    return lambda x: net(x).unflatten(1, (2, 3))


@awkward("the result is (1, chains), which only one chain could be", refuses="one value per chain")
def row(b: Build) -> Any:
    net = b.mlp()
    return lambda x: net(x).T


@awkward("the result is a tuple: a loop raises")
def returns_tuple(b: Build) -> Any:
    net = b.mlp()
    return lambda x: (net(x), x)


@awkward("a loss per chain through an expanded view")
def expanded_result(b: Build) -> Any:
    net = b.mlp()
    return lambda x: net(x).expand(x.shape[0], 3)


# -- gradients


@awkward("no_grad around a part")
def no_grad_part(b: Build) -> Any:
    net, other = b.mlp(), b.mlp()

    def energy(x: Tensor) -> Tensor:
        with torch.no_grad():
            weight = other(x)
        return (net(x) * weight.sigmoid()).squeeze(1)

    return energy


@awkward("no_grad around all: a loop raises")
def no_grad_all(b: Build) -> Any:
    net = b.mlp()

    def energy(x: Tensor) -> Tensor:
        with torch.no_grad():
            return net(x).squeeze(1)

    return energy


@awkward("detach of a part")
def detached(b: Build) -> Any:
    first, last = b.linear(), b.linear(HIDDEN, 1)

    def energy(x: Tensor) -> Tensor:
        h = torch.tanh(first(x))
        return last(h * h.detach()).squeeze(1)

    return energy


@awkward("the state's .data in a part")
def data_attribute(b: Build) -> Any:
    net, other = b.mlp(), b.mlp()
    return lambda x: (net(x) + other(x.data)).squeeze(1)


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign() * x.abs().sqrt()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return -3 * grad


@awkward("a Function with a gradient that is not its own")
def custom_function(b: Build) -> Any:
    first, last = b.linear(), b.linear(HIDDEN, 1)
    return lambda x: last(WrongGradient.apply(first(x))).squeeze(1)


@awkward("straight-through rounding")
def straight_through(b: Build) -> Any:
    net = b.mlp()
    return lambda x: net(x + ((x * 4).round() / 4 - x).detach()).squeeze(1)


@awkward("checkpointed")
def checkpointed(b: Build) -> Any:
    first, last = b.linear(), b.linear(HIDDEN, 1)
    return lambda x: last(checkpoint(lambda t: F.silu(first(t)), x, use_reentrant=False)).squeeze(1)


@awkward("checkpointed, reentrant, which cannot be differentiated by autograd.grad: a loop raises")
def checkpointed_reentrant(b: Build) -> Any:
    first, last = b.linear(), b.linear(HIDDEN, 1)
    return lambda x: last(checkpoint(lambda t: F.silu(first(t)), x, use_reentrant=True)).squeeze(1)


@awkward("vmap inside")
def vmapped(b: Build) -> Any:
    net = b.mlp()
    return lambda x: torch.vmap(lambda row: net(row).squeeze(0))(x)


@awkward("the squared norm of another energy's gradient")
def gradient_inside(b: Build) -> Any:
    net = b.mlp()

    def energy(x: Tensor) -> Tensor:
        with torch.enable_grad():
            y = x if x.requires_grad else x.detach().requires_grad_()
            (g,) = torch.autograd.grad(net(y).sum(), y, create_graph=True)
        return g.square().sum(1)

    return energy


@awkward("torch.func.grad inside")
def func_grad(b: Build) -> Any:
    net = b.mlp()
    slope = torch.func.grad(lambda x: net(x).sum())
    return lambda x: slope(x).square().sum(1) + net(x).squeeze(1)


@awkward("a complex intermediate")
def complex_inside(b: Build) -> Any:
    net = b.mlp()
    return lambda x: net(torch.fft.fft(x).abs()).squeeze(1)


@awkward("an optimisation inside: gradient descent on a latent")
def unrolled(b: Build) -> Any:
    decoder = b.linear(3, INPUTS)

    def energy(x: Tensor) -> Tensor:
        with torch.enable_grad():
            z = torch.zeros(x.shape[0], 3, dtype=x.dtype, requires_grad=True)
            for _ in range(3):
                (g,) = torch.autograd.grad((decoder(z) - x).square().sum(), z, create_graph=True)
                z = z - 0.05 * g
        return (decoder(z) - x).square().sum(1)

    return energy


@awkward("a part that saturates: clamp of the input")
def clamped_input(b: Build) -> Any:
    net = b.mlp()
    return lambda x: net(x.clamp(-0.5, 0.5)).squeeze(1) + 0.1 * x.square().sum(1)


@awkward("log of what may be negative: NaN")
def nan_energy(b: Build) -> Any:
    net = b.mlp()
    return lambda x: (net(x) - 1.0).log().squeeze(1)


# -- how it is called


@awkward("a module's own method named like a rule: model.sum(x)")
def own_method(b: Build) -> Any:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = b.mlp(), b.mlp()

        def sum(self, x: Tensor) -> Tensor:
            return (self.one(x) - 2 * self.two(x)).squeeze(1)

        def relu(self, x: Tensor) -> Tensor:
            return -x

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.sum(x))

    return Net()


@awkward("a function named like a rule: one's own relu")
def own_relu(b: Build) -> Any:
    first, last = b.linear(), b.linear(HIDDEN, 1)

    def relu(x: Tensor) -> Tensor:
        return x.clamp(min=0) + 0.3 * x

    return lambda x: last(relu(first(x))).squeeze(1)


@awkward("__call__ overridden")
def own_call(b: Build) -> Any:
    class Net(nn.Sequential):
        def __call__(self, x: Tensor) -> Tensor:
            return 2 * super().__call__(x)

    return Net(b.linear(), nn.SiLU(), b.linear(HIDDEN, 1))


@awkward("a Sequential with a forward of its own, residual")
def own_sequential(b: Build) -> Any:
    class Residual(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            for layer in self:
                x = x + layer(x)
            return x.sum(1)

    return Residual(b.linear(INPUTS, INPUTS), nn.Tanh(), b.linear(INPUTS, INPUTS))


@awkward("an activation of one's own that is an nn.ReLU by name")
def relu_subclass(b: Build) -> Any:
    class ReLU(nn.ReLU):
        def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            return x.clamp(-0.3, 0.3)

    return nn.Sequential(b.linear(), ReLU(), b.linear(HIDDEN, 1))


@awkward("functools.partial with a keyword")
def partial(b: Build) -> Any:
    net = b.mlp()
    return functools.partial(lambda x, scale: net(x).squeeze(1) * scale, scale=0.5)


@awkward("a bound method")
def bound_method(b: Build) -> Any:
    class Model:
        def __init__(self) -> None:
            self.net = b.mlp()

        def energy(self, x: Tensor) -> Tensor:
            return -self.net(x).squeeze(1)

    return Model().energy


@awkward("an object that is called, with attributes made when asked for")
def dynamic_object(b: Build) -> Any:
    class Model:
        def __init__(self) -> None:
            self.parts = {"net": b.mlp()}

        def __getattr__(self, name: str) -> Any:
            if name == "net":
                return self.parts["net"]
            raise AttributeError(name)

        def __call__(self, x: Tensor) -> Tensor:
            return self.net(x).squeeze(1)

    return Model()


@awkward("a decorated function")
def decorated(b: Build) -> Any:
    net = b.mlp()

    def twice(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        @functools.wraps(function)
        def wrapper(x: Tensor) -> Tensor:
            return 2 * function(x)

        return wrapper

    return twice(lambda x: net(x).squeeze(1))


@awkward("a default argument that holds the net")
def default_argument(b: Build) -> Any:
    mlp = b.mlp()
    return lambda x, net=mlp: net(x).squeeze(1)


@awkward("a scripted module")
def scripted(b: Build) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(b.mlp())


@awkward("a traced module")
def traced(b: Build) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(b.mlp(), b.normal(CHAINS, INPUTS))


@awkward("a frozen scripted module, which has no flag of its own")
def frozen_script(b: Build) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.freeze(torch.jit.script(b.mlp().eval()))


@awkward("a compiled module")
def compiled(b: Build) -> Any:
    return torch.compile(b.mlp(), backend="eager")


@awkward("a mixture of Gaussians by broadcasting and logsumexp")
def mixture(b: Build) -> Any:
    centres = b.normal(4, INPUTS)
    return lambda x: -torch.logsumexp(-0.5 * (x[:, None] - centres).square().sum(2), 1)


@awkward("einsum and a bilinear form")
def einsum(b: Build) -> Any:
    a = b.normal(INPUTS, INPUTS, scale=0.3)
    return lambda x: torch.einsum("ni,ij,nj->n", x, a @ a.T, x)


@awkward("sort, cumsum and topk")
def sorted_state(b: Build) -> Any:
    net = b.mlp()
    return lambda x: net(x.sort(1).values).squeeze(1) + x.topk(2, 1).values.sum(1) + 0.1 * x.cumsum(1).square().sum(1)


@awkward("attention of the elements to each other")
def attention(b: Build) -> Any:
    layer = b.fill(nn.MultiheadAttention(4, 2, batch_first=True))
    embed = b.linear(1, 4)

    def energy(x: Tensor) -> Tensor:
        h = embed(x.tanh().unsqueeze(2))
        return layer(h, h, h, need_weights=False)[0].square().sum((1, 2))

    return energy


@awkward("a recurrent network")
def recurrent(b: Build) -> Any:
    net = b.fill(nn.GRU(1, 4, batch_first=True))
    return lambda x: net(x.unsqueeze(2))[0][:, -1].sum(1)


@awkward("a convolution, in place, with a skip")
def convolution(b: Build) -> Any:
    one, two = b.fill(nn.Conv1d(1, 3, 3, padding=1)), b.fill(nn.Conv1d(3, 1, 3, padding=1))

    def energy(x: Tensor) -> Tensor:
        h = one(x.unsqueeze(1))
        F.relu_(h)
        y = two(h)
        y += x.unsqueeze(1)
        return y.square().flatten(1).sum(1)

    return energy


@awkward("a dict state of which one tensor does not count")
def ignored_tensor(b: Build) -> Any:
    net = b.mlp()
    state = {"a": b.normal(CHAINS, INPUTS), "b": b.normal(CHAINS, 2)}
    return Case(lambda s: net(s["a"]).squeeze(1), state=state)


@awkward("a dict state whose tensors are popped from it")
def popped(b: Build) -> Any:
    net, other = b.mlp(), nn.Sequential(b.linear(2), nn.SiLU(), b.linear(HIDDEN, 1))
    state = {"a": b.normal(CHAINS, INPUTS), "b": b.normal(CHAINS, 2)}

    def energy(s: dict[str, Tensor]) -> Tensor:
        first = s.pop("a")
        return net(first).squeeze(1) + other(s["b"]).squeeze(1)

    return Case(energy, state=state)


@awkward("a dict state that is written into")
def written(b: Build) -> Any:
    net, other = b.mlp(), nn.Sequential(b.linear(2), nn.SiLU(), b.linear(HIDDEN, 1))
    state = {"a": b.normal(CHAINS, INPUTS), "b": b.normal(CHAINS, 2)}

    def energy(s: dict[str, Tensor]) -> Tensor:
        s["a"] = 2 * s["a"]
        return net(s["a"]).squeeze(1) + other(s["b"]).squeeze(1)

    return Case(energy, state=state)


@awkward("a dict state by its order")
def by_order(b: Build) -> Any:
    net = nn.Sequential(b.linear(INPUTS + 2), nn.SiLU(), b.linear(HIDDEN, 1))
    state = {"z": b.normal(CHAINS, INPUTS), "a": b.normal(CHAINS, 2)}
    return Case(lambda s: net(torch.cat(list(s.values()), 1)).squeeze(1), state=state)


@awkward("a list state that is reversed in place")
def reversed_list(b: Build) -> Any:
    net, other = b.mlp(), nn.Sequential(b.linear(2), nn.SiLU(), b.linear(HIDDEN, 1))

    def energy(parts: list[Tensor]) -> Tensor:
        parts.reverse()
        return other(parts[0]).squeeze(1) + net(parts[1]).squeeze(1)

    return Case(energy, state=[b.normal(CHAINS, INPUTS), b.normal(CHAINS, 2)])


@awkward("an image state, flattened and normalised")
def image(b: Build) -> Any:
    net = b.mlp()
    return Case(lambda x: net((x.flatten(1) - 0.5) / 0.25).squeeze(1), state=b.normal(CHAINS, 1, 2, 3))


@awkward("a state whose chains lie in another order in memory")
def transposed_state(b: Build) -> Any:
    return Case(b.mlp(), state=b.normal(INPUTS, CHAINS).T)


# -- writes that go around a tensor's own operations


def _counting(b: Build, write: Callable[[Tensor], Any]) -> Case:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = b.mlp()
            self.register_buffer("calls", torch.zeros(1, dtype=b.dtype))

        def forward(self, x: Tensor) -> Tensor:
            write(self.calls)  # type: ignore[arg-type]
            return (1 + 0.1 * self.calls) * self.net(x).squeeze(1)  # type: ignore[operator]

    net = Counting()
    return Case(net, count=lambda: float(net.calls))  # type: ignore[arg-type]


def _through_numpy(t: Tensor) -> None:
    array = t.numpy()
    array += 1


for _name, _write in {
    "view": lambda t: t.view(-1).add_(1),
    "index": lambda t: t[0].add_(1),
    "narrow": lambda t: t.narrow(0, 0, 1).add_(1),
    "data": lambda t: t.data.add_(1),
    "detach": lambda t: t.detach().add_(1),
    "alias": lambda t: torch.as_tensor(t).add_(1),
    "numpy": _through_numpy,
    "apply": lambda t: t.apply_(lambda v: v + 1),
    "map": lambda t: t.map_(t, lambda v, _: v + 1),
}.items():

    def _made(b: Build, write: Callable[[Tensor], Any] = _write) -> Any:
        return _counting(b, write)

    _made.__name__ = f"counts_by_{_name}"
    awkward(f"counts its calls through {_name}", own_dtype=True, one_call_a_step=True)(_made)


# -- what float32 has no room for


@awkward("a softmax by hand, far from overflow but not in its slopes")
def softmax_by_hand(b: Build) -> Any:
    first, last, weight = b.linear(), b.linear(HIDDEN, 5), b.normal(5)

    def energy(x: Tensor) -> Tensor:
        p = torch.exp(4 * last(F.silu(first(x))) + 50)
        return (p / p.sum(1, keepdim=True) * weight).sum(1)

    return energy


@awkward("kernel regression in many dimensions: quotients of tiny numbers", own_dtype=True)
def kernel_regression(b: Build) -> Any:
    first, centres, weight = b.linear(outputs=52), b.normal(7, 52), b.normal(7)

    def energy(x: Tensor) -> Tensor:
        p = torch.exp(-0.5 * (first(x)[:, None] - centres).square().sum(2))
        return (p * weight).sum(1) / p.sum(1)

    return energy


@awkward("an infinite logit of a class that is not chosen")
def masked_classes(b: Build) -> Any:
    net, mask = b.mlp(outputs=5), torch.tensor([0.0, 0.0, 0.0, -torch.inf, -torch.inf], dtype=b.dtype)
    labels = torch.arange(CHAINS) % 3
    return lambda x: F.cross_entropy(net(x) + mask, labels, reduction="none")
