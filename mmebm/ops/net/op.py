"""``net_energy`` and ``langevin_net``: energy and gradient of a net, and a whole chain on it, each in one call.

A backend is a module with

    supports_energy(net, x) -> None, or the reason why not
    energy_and_gradient(net, x) -> (chains,), (chains, inputs)
    supports(chain, x) -> None, or the reason why not
    run(chain, x, steps, first_step, energy=, grad_norm=) -> MlpResult

as :mod:`mmebm.ops.langevin_mlp` has them for sums of MLPs; state, constants and results are the same.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final

import torch
from torch import Tensor

from mmebm import native
from mmebm.backends import NAMES
from mmebm.ops import langevin_mlp as mlp
from mmebm.ops.langevin_mlp import MlpChain, MlpResult
from mmebm.ops.net import reference
from mmebm.ops.net.graph import Net, check_net, pack, tensors_of, unpack

__all__ = ["NetChain", "choose", "name_of", "net_energy", "run"]

_MODULES: Final = {"cpp": "mmebm.ops.net.cpp"}


@dataclass(frozen=True, slots=True, kw_only=True)
class NetChain(MlpChain):
    """As :class:`~mmebm.ops.langevin_mlp.MlpChain`, with a ``net`` in the place of terms."""

    net: Net
    terms: tuple[Any, ...] = ()


def _refusal(backend: str, net: Net, chain: NetChain | None, x: Tensor) -> tuple[ModuleType | None, str | None]:
    """(the module, None), or why it does not take this net or chain."""
    if backend not in _MODULES:
        return None, f"net ops are not built for {backend}"
    if x.dtype != torch.float32 or any(t.is_floating_point() and t.dtype != torch.float32 for t in tensors_of(net)):
        return None, "the state and the net are not all float32"
    try:
        module = importlib.import_module(_MODULES[backend])
    except ImportError as error:
        return None, f"{_MODULES[backend]} does not import ({error})"
    return module, module.supports_energy(net, x) if chain is None else module.supports(chain, x)


def choose(backend: str, net: Net, x: Tensor, chain: NetChain | None = None) -> tuple[ModuleType | None, str]:
    """The module that runs ``net``, or ``chain`` on it, from the flat state ``x``; ``None`` for the reference; and why.

    "auto" takes C++ on the CPU. ``MMEBM_BACKEND`` replaces "auto", and counts as asked for by name.

    Raises:
        ValueError: for an unknown backend.
        BackendError: where a backend asked for by name does not take it.
    """
    why = f"backend={backend!r}"
    if backend == "auto" and os.environ.get("MMEBM_BACKEND"):
        backend = os.environ["MMEBM_BACKEND"]
        why = f"MMEBM_BACKEND={backend}"
    if backend not in ("auto", *NAMES):
        raise ValueError(f"backend must be one of {', '.join(('auto', *NAMES))}, got {why}")
    if backend == "torch":
        return None, why
    if backend != "auto":
        module, reason = _refusal(backend, net, chain, x)
        if reason is not None or module is None:
            raise native.BackendError(f"{backend}: net: {reason}")
        return module, why
    reasons = []
    for name in {"cpu": ("cpp",)}.get(x.device.type, ()):
        module, reason = _refusal(name, net, chain, x)
        if reason is None:
            return module, f"auto: {name}, the state is on {x.device}"
        reasons.append(f"not {name}: {reason}")
    return None, f"auto: {'; '.join(reasons) or f'no backend for nets on {x.device}'}"


def name_of(module: ModuleType) -> str:
    """The backend whose module it is."""
    return next((name for name, path in _MODULES.items() if path == module.__name__), module.__name__)


def run(
    module: ModuleType | None, chain: NetChain, x: Tensor, steps: int, first_step: int | Tensor, *,
    energy: bool = False, grad_norm: bool = False,
) -> MlpResult:  # fmt: skip
    """``steps`` steps from the flat state ``x`` (chains, inputs) in the module that :func:`choose` gave."""
    if steps == 0 or x.shape[0] == 0:
        return mlp.run(None, chain, x, 0, first_step)
    if module is None:
        return mlp._reference(chain, x, steps, first_step, lambda flat: reference.energy_and_gradient(flat, chain.net))
    return module.run(chain, x, steps, first_step, energy=energy, grad_norm=grad_norm)


# -- the functional entry


@contextmanager
def _autograd() -> Iterator[None]:
    """Autograd inside an op, where torch has it off."""
    key, keys = torch._C.DispatchKey, torch._C.DispatchKeySet
    excluded = torch._C._dispatch_tls_local_exclude_set()
    excluded = excluded - keys(key.AutogradFunctionality) - keys(key.ADInplaceOrView)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded):
        yield


def _op(x: Tensor, tensors: list[Tensor], net: str, backend: str) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        unpacked = unpack(net, tensors)
        module, _ = choose(backend, unpacked, x)
        if module is None:
            with _autograd():
                return reference.energy_and_gradient(x, unpacked)
        return module.energy_and_gradient(unpacked, x.contiguous())


def _fake(x: Tensor, tensors: list[Tensor], net: str, backend: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0]), x.new_empty(x.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, tensors, net, _ = inputs
    ctx.net = net
    ctx.save_for_backward(x, *tensors)


def _backward(ctx: Any, d_energy: Tensor | None, d_grad: Tensor | None) -> tuple[Any, ...]:
    """By autograd through the reference, so that it can be differentiated again."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # aliases, so that the graph ends here and, with create_graph, goes on into the inputs
        leaves = [t.view_as(t) if t.requires_grad else t for t in ctx.saved_tensors]
        x, net = leaves[0], unpack(ctx.net, leaves[1:])
        if d_grad is None:
            outputs = [(reference.energy(x, net), d_energy)]
        else:
            start = x if x.requires_grad else x.detach().requires_grad_()
            outputs = list(zip(reference.energy_and_gradient(start, net, create_graph=True), (d_energy, d_grad)))
        wanted = [t for t in leaves if t.requires_grad]
        outputs = [(o, d) for o, d in outputs if d is not None and o.requires_grad]
        found: list[Tensor | None] = [None] * len(wanted)
        if wanted and outputs:
            found = list(torch.autograd.grad(
                [o for o, _ in outputs], wanted, [d for _, d in outputs], create_graph=create_graph, allow_unused=True
            ))  # fmt: skip
    each = iter(found)
    grads = [next(each) if t.requires_grad else None for t in leaves]
    return grads[0], grads[1:], None, None


_library = torch.library.Library("mmebm", "FRAGMENT")
if not hasattr(torch.ops.mmebm, "net_energy"):
    _library.define(
        "net_energy(Tensor x, Tensor[] tensors, str net, str backend) -> (Tensor, Tensor)",
        tags=(torch.Tag.pt2_compliant_tag,),
    )
    _library.impl("net_energy", _op, "CompositeExplicitAutograd")
    torch.library.register_fake("mmebm::net_energy", _fake, lib=_library)
    torch.library.register_autograd("mmebm::net_energy", _backward, setup_context=_setup, lib=_library)


def net_energy(x: Tensor, net: Net, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """E(x) and dE/dx in one pass. Differentiable, also twice, in ``x`` and in every tensor of the net.

    Args:
        x: (chains, inputs), floating.
        net: see :mod:`mmebm.ops.net.graph`; :func:`mmebm.energies.trace.trace` makes one of an energy.
        backend: "auto", "torch" or "cpp".

    Returns:
        (chains,) and (chains, inputs).

    Raises:
        TypeError, ValueError: naming the argument.
        BackendError: where ``backend`` does not take this net.

    Example:
        >>> conv = torch.nn.Conv2d(1, 8, 3)
        >>> net = Net((
        ...     Input(0, (1, 8, 8)), Conv(0, conv.weight, conv.bias), Activation(1, "silu"),
        ...     Map((2,), (1,), torch.arange(288).reshape(1, -1)),
        ... ))
        >>> energy, gradient = net_energy(torch.randn(100, 64), net)
    """
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() != 2:
        raise TypeError(f"x must be a floating-point tensor (chains, inputs), got {getattr(x, 'shape', x)!r:.80}")
    check_net(net, x.shape[0], x.shape[1], x.device)
    description, tensors = pack(net)
    return torch.ops.mmebm.net_energy(x, tensors, description, backend)
