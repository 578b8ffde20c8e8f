"""The C++ room of ``langevin_mlp`` and ``mlp_energy``: :file:`csrc/langevin_mlp/cpu_kernel.cpp`.

The instruction set is the best this processor has; ``MMEBM_CPU_ISA`` = ``baseline``, ``avx2`` or ``avx512`` asks for
another. No result depends on the number of threads (``torch.get_num_threads()``) or on how a batch is split, and
``avx2`` and ``avx512`` agree bit for bit. Weights are read, and repacked, at each call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor

from mmebm import native, noise
from mmebm.ops import dispatch
from mmebm.ops.common.address import MOST_CHAINS, Addresses, obstacle
from mmebm.ops.common.params import FIELDS
from mmebm.ops.langevin_mlp import MlpChain, MlpResult
from mmebm.ops.terms import ACTIVATIONS, Quadratic, Residual, Term, check_terms, inputs_of, tensors_of

__all__ = ["energy_and_gradient", "run", "supports", "supports_energy"]

_LIMITS: Final = ("grad_clip", "grad_norm_clip", "max_update", "low", "high")


def plain_on_cpu(name: str, t: Tensor) -> str | None:
    """Why C++ cannot read ``t``, or ``None``."""
    reason = obstacle(t)
    if reason is None and not t.is_cpu:
        reason = f"on {t.device}"
    return None if reason is None else f"{name} is {reason}; taken are plain tensors on the CPU"


def supports_energy(terms: Sequence[Term], x: Tensor) -> str | None:
    """Whether :func:`energy_and_gradient` takes ``terms`` at the flat state ``x``: ``None``, or the reason why not."""
    reason = plain_on_cpu("the state", x)
    if reason is not None:
        return reason
    if x.dim() != 2 or x.dtype != torch.float32:
        return f"the state is {x.dtype} of shape {tuple(x.shape)}, taken is float32 (chains, inputs)"
    for i, term in enumerate(terms):
        if not isinstance(term, Quadratic) and min(term.stack.sizes) < 1:
            return f"term {i} has a layer without inputs or outputs: {term.stack.sizes}"
        for t in tensors_of(term):
            reason = reason or plain_on_cpu(f"a tensor of term {i}", t)
            if t.dtype not in (torch.float32, torch.bool):
                return f"a tensor of term {i} is {t.dtype}, taken is float32"
        if inputs_of(term) != x.shape[1] or x.shape[1] == 0:
            return f"term {i} has {inputs_of(term)} inputs, the state {x.shape[1]}; taken is one number of at least 1"
    if reason is not None:
        return reason
    available, reason = native.available("cpp")
    return None if available else reason


def supports(chain: MlpChain, x: Tensor) -> str | None:
    """Whether :func:`run` takes ``chain`` from the flat state ``x``: ``None``, or the reason why not."""
    return supports_energy(chain.terms, x) or supports_options(chain, x)


def supports_options(chain: MlpChain, x: Tensor) -> str | None:
    """The same of all but the energy."""
    table, mask = chain.constants, chain.observed
    tensors, (chains, inputs) = len(chain.widths), x.shape
    if chains > MOST_CHAINS:
        return f"{chains} chains; the noise tells 2^32 apart"
    if {len(chain.streams), len(chain.noisy), len(chain.moving), len(chain.present)} != {tensors} or tensors == 0:
        return f"streams, noisy, moving and present do not all have {tensors} entries, one per tensor"
    if sum(chain.widths) != inputs or min(chain.widths) < 0:
        return f"the widths {chain.widths} do not sum to the {inputs} inputs"
    if (
        table.dim() != 4
        or table.dtype != torch.float32
        or plain_on_cpu("constants", table) is not None
        or table.shape[0] == 0
        or table.shape[1:3] != (tensors, len(FIELDS))
        or table.shape[3] not in (1, chains)
    ):
        return f"the constants are {table.dtype} {tuple(table.shape)} on {table.device}"
    if bool(table.isnan().any()):
        for name in _LIMITS:
            # a clamp whose limit is NaN is NaN in torch, and no limit at all in the processor's min and max
            if bool(table[:, :, FIELDS.index(name)].isnan().any()):
                return f"{name} holds NaN"
    if mask is not None and (
        mask.dtype != torch.uint8
        or plain_on_cpu("observed", mask) is not None
        or mask.shape not in ((chains, inputs), (1, inputs))
    ):
        return f"observed is {mask.dtype} {tuple(mask.shape)} on {mask.device}"
    return None


def note(chain: MlpChain, x: Tensor) -> str | None:
    """What to know of a chain that :func:`run` takes, or ``None``."""
    return idle_threads(x, native.cpu().mlp_tiles(x.shape[0], dispatch.isa()))


def idle_threads(x: Tensor, tiles: int) -> str | None:
    """That so many tiles, each the work of one thread, are too few for the threads there are; or ``None``."""
    threads = torch.get_num_threads()
    return None if tiles >= threads else f"{x.shape[0]} chains keep {tiles} of {threads} threads busy"


def _described(terms: Sequence[Term], x: Tensor, addresses: Addresses) -> list[dict[str, Any]]:
    """The terms as ``mmebm._cpu`` takes them (:file:`csrc/langevin_mlp/bind.h` names the fields)."""

    def at(name: str, t: Tensor | None, dtype: torch.dtype = torch.float32) -> int:
        return addresses(name, t, dtype)

    out: list[dict[str, Any]] = []
    for term in terms:
        if isinstance(term, Quadratic):
            mean, precision = at("mean", term.mean), at("precision", term.precision)
            out.append({"kind": "quadratic", "mean": mean, "precision": precision})
            continue
        stack = term.stack
        layers = [
            {"weight": at("a weight", w), "bias": at("a bias", b), "inputs": w.shape[1], "outputs": w.shape[0]}
            for w, b in zip(stack.weights, stack.biases, strict=True)
        ]
        d: dict[str, Any] = {"kind": "scalar", "layers": layers, "weight": float(term.weight)}
        d.update(activation=ACTIVATIONS.index(stack.activation), slope=float(stack.slope))
        if isinstance(term, Residual):
            mask = term.observed
            d.update(
                kind="residual", scale=float(term.scale), laplace=term.likelihood == "laplace", tanh=bool(term.tanh)
            )
            d.update(target=at("target", term.target), observed=at("observed", mask, torch.bool))
            d["observed_stride"] = 0 if mask is None or mask.shape[0] == 1 else mask.shape[1]
        out.append(d)
    return out


# What C++ takes an energy as, given where tensors lie
Described: TypeAlias = Callable[[Addresses], list[dict[str, Any]]]


def _job(x: Tensor, addresses: Addresses) -> dict[str, Any]:
    """The fields that every call has (:file:`csrc/common/chain_bind.h`)."""
    return {
        "x": addresses("x", x, torch.float32),
        "chains": x.shape[0],
        "inputs": x.shape[1],
        "threads": torch.get_num_threads(),
        "isa": dispatch.isa(),
    }


def call_energy(name: str, x: Tensor, described: Described, reason: str | None) -> tuple[Tensor, Tensor]:
    """E (chains,) and dE/dx (chains, inputs) by the function ``name`` of ``mmebm._cpu``, which takes what ``described``
    returns.

    Raises:
        BackendError: with the ``reason`` why it does not take the arguments.
    """
    if reason is not None:
        raise native.BackendError(f"cpp: {name}: {reason}")
    addresses = Addresses(x.device)
    energy = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    grad = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    job = _job(x, addresses)
    job.update(energy=addresses.output("energy", energy), gradient=addresses.output("grad", grad))
    getattr(native.cpu(), name)(job, described(addresses))
    return energy, grad


def call_chain(
    name: str,
    chain: Any,
    x: Tensor,
    described: Described,
    steps: int,
    first_step: int | Tensor,
    *,
    energy: bool,
    grad_norm: bool,
    reason: str | None,
) -> MlpResult:
    """``steps`` steps of an :class:`MlpChain`, or of a chain of other terms with the same fields, by the function
    ``name`` of ``mmebm._cpu``; as :func:`call_energy`."""
    if reason is None and chain.constants.shape[0] != 1 and chain.constants.shape[0] < steps:
        reason = f"{steps} steps with constants for {chain.constants.shape[0]}"
    if reason is not None:
        raise native.BackendError(f"cpp: {name}: {reason}")
    addresses = Addresses(x.device)
    chains, inputs = x.shape
    out = torch.empty((chains, inputs), dtype=torch.float32, device=x.device)
    energies = torch.empty((steps, chains), dtype=torch.float32, device=x.device) if energy else None
    norms = torch.empty((steps, chains), dtype=torch.float32, device=x.device) if grad_norm else None
    frozen = torch.zeros(chains, dtype=torch.bool, device=x.device) if chain.freeze else None
    mask = chain.observed
    job = _job(x, addresses)
    job["tensors"] = [
        {"width": width, "stream": noise.stream(i, noise.DRIFT), "noisy": noisy, "moving": moving, "present": present}
        for width, i, noisy, moving, present in zip(
            chain.widths, chain.streams, chain.noisy, chain.moving, chain.present, strict=True
        )
    ]
    job.update(
        constants=addresses("constants", chain.constants, torch.float32),
        rows=chain.constants.shape[0],
        columns=chain.constants.shape[3],
        observed=addresses("observed", mask, torch.uint8),
        observed_stride=0 if mask is None or mask.shape[0] == 1 else inputs,
        steps=steps,
        seed=int(chain.seed) & (1 << 64) - 1,
        first_step=int(first_step) & noise.MASK32,
        chain_offset=chain.chain_offset & noise.MASK32,
        noise_before=chain.noise_at == "before",
        clamp_noise=chain.clamp_noise,
        out=addresses.output("out", out),
        energy=addresses.output("energy", energies),
        grad_norm=addresses.output("grad_norm", norms),
        frozen=addresses.output("frozen", frozen),
    )
    getattr(native.cpu(), name)(job, described(addresses))
    return MlpResult(out, energies, norms, frozen)


def energy_and_gradient(terms: Sequence[Term], x: Tensor) -> tuple[Tensor, Tensor]:
    """E (chains,) and dE/dx (chains, inputs); see :func:`supports_energy`."""
    described: Described = lambda addresses: _described(
        check_terms(terms, x.shape[0], x.shape[1], x.device), x, addresses
    )
    return call_energy("mlp_energy", x, described, supports_energy(terms, x))


def run(
    chain: MlpChain, x: Tensor, steps: int, first_step: int | Tensor, *, energy: bool = False, grad_norm: bool = False
) -> MlpResult:
    """``steps`` steps from the flat state ``x``, which stays as it is; see :func:`supports`."""
    reason = None
    if not chain.checked:
        reason = supports(chain, x)
        if reason is None:
            check_terms(chain.terms, x.shape[0], x.shape[1], x.device)
    described: Described = lambda addresses: _described(chain.terms, x, addresses)
    records = {"energy": energy, "grad_norm": grad_norm}
    return call_chain("langevin_mlp", chain, x, described, steps, first_step, **records, reason=reason)
