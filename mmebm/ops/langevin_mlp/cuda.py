"""The CUDA C++ room of ``langevin_mlp``: :file:`csrc/langevin_mlp/cuda.cu`, one launch for all steps.

It runs on the current stream of the state's device, never waits for it, and may be captured in a graph; the first call
on a device must not be a captured one. Weights, targets and constants are read where they lie, so that a replay sees
what they hold then; what a graph reads must live as long as it does. A tensor that is not contiguous is copied first.
No result depends on the device or on the chains beside a chain.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Final, get_args

import torch
from torch import Tensor

from mmebm import native, noise
from mmebm.ops.common.address import Addresses, obstacle
from mmebm.ops.common.params import FIELDS
from mmebm.ops.langevin_mlp import MlpChain, MlpResult, Precision
from mmebm.ops.terms import ACTIVATIONS, LIMITS, Quadratic, Residual, Term, check_terms, inputs_of, tensors_of, too_wide

__all__ = ["run", "supports"]

_PRECISIONS: Final = {name: number for number, name in enumerate(get_args(Precision))}
_WORD64: Final = (1 << 64) - 1


def _plain(name: str, t: Tensor, device: torch.device) -> str | None:
    reason = obstacle(t)
    if reason is None and t.device != device:
        reason = f"on {t.device}"
    return None if reason is None else f"{name} is {reason}; taken are plain tensors on {device}"


def _reason(chain: MlpChain, x: Tensor) -> str | None:
    """Why the kernel does not take ``chain`` from ``x``, wherever both are."""
    reason = _plain("the state", x, x.device)
    if reason is not None:
        return reason
    if x.dim() != 2 or x.dtype != torch.float32:
        return f"the state is {x.dtype} of shape {tuple(x.shape)}, taken is float32 (chains, inputs)"
    chains, inputs = x.shape
    if chains > 1 << 30:
        return f"{chains} chains, taken are up to 2^30"
    reason = too_wide(chain.terms)
    for i, term in enumerate(chain.terms):
        if not isinstance(term, Quadratic) and min(term.stack.sizes) < 1:
            return f"term {i} has a layer without inputs or outputs: {term.stack.sizes}"
        for t in tensors_of(term):
            reason = reason or _plain(f"a tensor of term {i}", t, x.device)
            if t.dtype not in (torch.float32, torch.bool):
                return f"a tensor of term {i} is {t.dtype}, taken is float32"
        if inputs_of(term) != inputs or inputs == 0:
            return f"term {i} has {inputs_of(term)} inputs, the state {inputs}; taken is one number of at least 1"
    if reason is not None:
        return reason
    table, mask, tensors = chain.constants, chain.observed, len(chain.widths)
    if {len(chain.streams), len(chain.noisy), len(chain.moving), len(chain.present)} != {tensors} or tensors == 0:
        return f"streams, noisy, moving and present do not all have {tensors} entries, one per tensor"
    if tensors > LIMITS.tensors:
        return f"{tensors} tensors, taken are up to {LIMITS.tensors}"
    if sum(chain.widths) != inputs or min(chain.widths) < 0:
        return f"the widths {chain.widths} do not sum to the {inputs} inputs"
    if (
        table.dim() != 4
        or table.dtype != torch.float32
        or _plain("constants", table, x.device) is not None
        or table.shape[0] == 0
        or table.shape[1:3] != (tensors, len(FIELDS))
        or table.shape[3] not in (1, chains)
    ):
        return f"the constants are {table.dtype} {tuple(table.shape)} on {table.device}"
    if mask is not None and (
        mask.dtype != torch.uint8
        or _plain("observed", mask, x.device) is not None
        or mask.shape not in ((chains, inputs), (1, inputs))
    ):
        return f"observed is {mask.dtype} {tuple(mask.shape)} on {mask.device}"
    if isinstance(chain.seed, Tensor) and chain.seed.device not in (x.device, torch.device("cpu")):
        return f"the seed is on {chain.seed.device}, the state on {x.device}"
    return None


def supports(chain: MlpChain, x: Tensor) -> str | None:
    """``None`` if :func:`run` takes ``chain`` from the flat state ``x``, else the reason why not."""
    if x.device.type != "cuda":
        return f"the state is on {x.device}, taken is a CUDA device"
    reason = _reason(chain, x)
    if reason is not None:
        return reason
    available, reason = native.available("cuda")
    if not available:
        return reason
    major, minor = torch.cuda.get_device_capability(x.device)
    return f"compute capability {major}.{minor} is below 8.0" if major < 8 else None


def _described(terms: Sequence[Term], x: Tensor, addresses: Addresses) -> list[tuple[Any, ...]]:
    """The terms as ``mmebm._cuda`` takes them."""

    def at(name: str, t: Tensor | None, dtype: torch.dtype = torch.float32) -> int:
        return addresses(name, t, dtype)

    out: list[tuple[Any, ...]] = []
    for term in check_terms(terms, x.shape[0], x.shape[1], x.device):
        if isinstance(term, Quadratic):
            out.append((2, at("mean", term.mean), at("precision", term.precision)))
            continue
        stack = term.stack
        layers = tuple(
            (at("a weight", w), at("a bias", b), w.shape[1], w.shape[0])
            for w, b in zip(stack.weights, stack.biases, strict=True)
        )
        common = (layers, ACTIVATIONS.index(stack.activation), float(stack.slope), float(term.weight))
        if not isinstance(term, Residual):
            out.append((0, *common))
            continue
        mask = term.observed
        out.append(
            (
                1,
                *common,
                float(term.scale),
                term.likelihood == "laplace",
                bool(term.tanh),
                at("target", term.target),
                at("observed", mask, torch.bool),
                mask is not None and mask.shape[0] > 1,
            )
        )
    return out


def _number(name: str, value: int | Tensor, addresses: Addresses) -> tuple[int, int]:
    """(value, address): an int itself, a tensor on the device by its address."""
    if not isinstance(value, Tensor):
        return int(value) & _WORD64, 0
    if value.numel() != 1 or value.dtype.is_floating_point or value.dtype.is_complex:
        raise ValueError(f"{name} must be an int or 1-element int tensor, got {tuple(value.shape)} {value.dtype}")
    if value.device != addresses.device:
        if value.device.type != "cpu":
            raise ValueError(f"{name} must be on {addresses.device}, got {value.device}")
        return int(value) & _WORD64, 0
    return 0, addresses(name, value.to(torch.int64), torch.int64)


@functools.cache
def _prepare(index: int) -> None:
    native.check_cuda(native.cuda().prepare_langevin_mlp(index), "loading langevin_mlp")


def _launch(x: Tensor, arguments: tuple[Any, ...]) -> None:
    index = x.device.index
    with nullcontext() if index == torch.cuda.current_device() else torch.cuda.device(index):
        _prepare(index)
        queue = torch.cuda.current_stream(index).cuda_stream
        code = native.cuda().langevin_mlp(*arguments, index, queue)
    native.check_cuda(code, "langevin_mlp")


def run(
    chain: MlpChain, x: Tensor, steps: int, first_step: int | Tensor, *, energy: bool = False, grad_norm: bool = False
) -> MlpResult:
    """``steps`` steps from the flat state ``x``, which stays as it is; see :func:`supports`."""
    reason = supports(chain, x)
    if reason is None and chain.constants.shape[0] != 1 and chain.constants.shape[0] < steps:
        reason = f"{steps} steps with constants for {chain.constants.shape[0]}"
    if reason is not None:
        raise native.BackendError(f"cuda: langevin_mlp: {reason}")
    addresses = Addresses(x.device)
    chains, inputs = x.shape
    out = torch.empty((chains, inputs), dtype=torch.float32, device=x.device)
    energies = torch.empty((steps, chains), dtype=torch.float32, device=x.device) if energy else None
    norms = torch.empty((steps, chains), dtype=torch.float32, device=x.device) if grad_norm else None
    frozen = torch.empty(chains, dtype=torch.bool, device=x.device) if chain.freeze else None
    if chains == 0:
        return MlpResult(out, energies, norms, frozen)
    mask = chain.observed
    tensors = [
        (width, noise.stream(index, noise.DRIFT), noisy, moving, present)
        for width, index, noisy, moving, present in zip(
            chain.widths, chain.streams, chain.noisy, chain.moving, chain.present, strict=True
        )
    ]
    arguments = (
        addresses("x", x, torch.float32),
        chains,
        inputs,
        _described(chain.terms, x, addresses),
        tensors,
        addresses("constants", chain.constants, torch.float32),
        chain.constants.shape[0],
        chain.constants.shape[3],
        addresses("observed", mask, torch.uint8),
        mask is not None and mask.shape[0] > 1,
        steps,
        *_number("seed", chain.seed, addresses),
        *_number("first_step", first_step, addresses),
        chain.chain_offset & noise.MASK32,
        chain.noise_at == "before",
        chain.clamp_noise,
        addresses.output("out", out),
        addresses.output("energy", energies),
        addresses.output("grad_norm", norms),
        addresses.output("frozen", frozen),
        _PRECISIONS[chain.precision],
    )
    _launch(x, arguments)
    return MlpResult(out, energies, norms, frozen)
