"""``net_energy`` and ``langevin_net``: energy and gradient of a net, and a whole chain on it, each in one call.

A backend is a module with

    supports_energy(net, x) -> None, or the reason why not
    energy_and_gradient(net, x) -> (chains,), (chains, inputs)
    supports(chain, x) -> None, or the reason why not
    run(chain, x, steps, first_step, energy=, grad_norm=) -> MlpResult
    slower(net, x, precision), optional -> why "auto" does better without it, or None
    note(chain, x) -> None, or what to know of a chain that it takes; may be absent

as :mod:`mmebm.ops.langevin_mlp` has them for sums of MLPs; state, constants and results are the same.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, Final

import torch
from torch import Tensor

from mmebm.ops import dispatch
from mmebm.ops.common.address import require_dense, tangents, unfit
from mmebm.ops.common.untyped import TORCH, gradients, register
from mmebm.ops.langevin_mlp import MlpChain, MlpResult
from mmebm.ops.langevin_mlp import op as mlp
from mmebm.ops.net import reference
from mmebm.ops.net.graph import Net, check_net, pack, tensors_of, unpack

__all__ = ["NetChain", "net_energy", "room", "run"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NetChain(MlpChain):
    """As :class:`~mmebm.ops.langevin_mlp.MlpChain`, with a ``net`` in the place of terms."""

    net: Net
    terms: tuple[Any, ...] = ()


def _refusal(module: ModuleType, net: Net, chain: NetChain | None, x: Tensor, backend: str) -> str | None:
    """Why ``module`` does not take this net or chain, or is not to for ``backend`` "auto"; or ``None``."""
    reason = unfit("the net", x, tensors_of(net), torch.int64)
    if reason is not None:
        return reason
    reason = module.supports_energy(net, x) if chain is None else module.supports(chain, x)
    if reason is None and dispatch.requested(backend)[0] == "auto" and hasattr(module, "slower"):
        reason = module.slower(net, x, "fp32" if chain is None else chain.precision)
    return reason


def room(backend: str, chain: NetChain, x: Tensor) -> tuple[ModuleType | None, str]:
    """The module that runs ``chain`` from the flat state ``x``, ``None`` for the reference, and the reason.

    "auto" takes C++ on the CPU, and on a GPU Triton unless wide layers make cuDNN the better choice; see
    :func:`mmebm.ops.dispatch.choose`.

    Raises:
        TypeError, ValueError: for an unknown backend, and for nodes that do not fit together.
        BackendError: where a backend asked for by name does not take this chain.
    """
    refusal: dispatch.Refusal = lambda _, module: _refusal(module, chain.net, chain, x, backend)
    chosen = dispatch.choose("langevin_net", backend, x.device, refusal, chain.precision)
    if chosen.module is not None:
        check_net(chain.net, x.shape[0], x.shape[1], x.device)
    return chosen.module, mlp.noted(chosen, chain, x)


def run(
    module: ModuleType | None,
    chain: NetChain,
    x: Tensor,
    steps: int,
    first_step: int | Tensor,
    *,
    energy: bool = False,
    grad_norm: bool = False,
) -> MlpResult:
    """``steps`` steps from the flat state ``x`` (chains, inputs) in the module that :func:`room` chose."""
    if steps == 0 or x.shape[0] == 0:
        return mlp.run(None, chain, x, 0, first_step)
    if module is None:
        return mlp.run_reference(chain, x, steps, first_step, partial(reference.energy_and_gradient, net=chain.net))
    return module.run(chain, x, steps, first_step, energy=energy, grad_norm=grad_norm)


# -- the functional entry


@contextmanager
def _autograd() -> Generator[None, None, None]:
    """Autograd inside an op, where torch has it off."""
    c: Any = TORCH._C
    key, keys = c.DispatchKey, c.DispatchKeySet
    excluded = c._dispatch_tls_local_exclude_set()
    excluded = excluded - keys(key.AutogradFunctionality) - keys(key.ADInplaceOrView)
    with c._ForceDispatchKeyGuard(c._dispatch_tls_local_include_set(), excluded):
        yield


def _op(x: Tensor, tensors: list[Tensor], net: str, backend: str) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        unpacked = unpack(net, tensors)
        refusal: dispatch.Refusal = lambda _, m: _refusal(m, unpacked, None, x, backend)
        module = dispatch.choose("net_energy", backend, x.device, refusal).module
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
        grads = gradients(outputs, leaves, create_graph=create_graph)
    return grads[0], grads[1:], None, None


_SCHEMA: Final = "net_energy(Tensor x, Tensor[] tensors, str net, str backend) -> (Tensor, Tensor)"
_library = register(_SCHEMA, _op, _fake, _backward, _setup)


def net_energy(x: Tensor, net: Net, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """E(x) and dE/dx in one pass. Differentiable, also twice, in ``x`` and in every tensor of the net, in reverse mode.

    Args:
        x: (chains, inputs), floating.
        net: see :mod:`mmebm.ops.net.graph`; :func:`mmebm.energies.trace.trace` makes one of an energy, whose tensors
            have no graph, and :func:`mmebm.energies.trace.tied` puts the parameters themselves into it.
        backend: "auto", "torch", "cpp" or "triton".

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
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() != 2:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"x must be a floating-point tensor (chains, inputs), got {getattr(x, 'shape', x)!r:.80}")
    check_net(net, x.shape[0], x.shape[1], x.device)
    for t in (x, *tensors_of(net)):
        require_dense("x" if t is x else "a tensor of the net", t, None if t is x else x)
        # autocast makes one dtype of several
        mixed = t.is_floating_point() and t.dtype != x.dtype
        if mixed and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"a tensor of the net must be {x.dtype} as x is, got {t.dtype}")
    description, tensors = pack(net)
    if tangents(x, *tensors):
        raise TypeError("net_energy has no forward mode (torch.func.jvp, dual tensors): take torch.autograd.grad of it")
    return torch.ops.mmebm.net_energy(x, tensors, description, backend)
