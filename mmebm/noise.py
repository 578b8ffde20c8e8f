"""The noise of every chain, written down once.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) is a function from a
128-bit counter and a 64-bit key to four 32-bit words. Here

    key     = seed                                    two words, low first
    counter = (block, chain, step, stream)            four words

where ``chain`` is the global chain index, ``step`` the Langevin step, ``stream`` says which tensor of the state and
which purpose (:func:`stream`), and ``block`` counts groups of four elements inside one chain's tensor: word ``j`` of
block ``b`` belongs to element ``4 b + j`` in row-major order. The noise is therefore a function of (seed, chain, step,
modality, element) and of nothing else: not of the batch split, the block size, the device or the number of threads.

Normals take all four words (Box-Muller, both branches):

    r(u)  = sqrt(-2 log u),     u = fl32(w) 2^-32 + 2^-33           in (0, 1], so r <= 6.77, never inf or NaN
    a(w)  = fl32(int32(w)) 2^-31                                    in [-1, 1], the angle in half turns
    elements 4b .. 4b+3 = r(w0) cos(pi a(w1)), r(w0) sin(pi a(w1)), r(w2) cos(pi a(w3)), r(w2) sin(pi a(w3))

``fl32`` rounds to nearest even, ``int32`` reinterprets the bits. ``u`` and ``a`` are bit-equal in every backend (both
are exact after one rounding, with or without fused multiply-add), so that only the functions log, sqrt, sin and cos
differ: this module evaluates them in float64, every other backend must be within 2e-6 of it.

Uniforms are ``(w >> 8) 2^-24`` in [0, 1); float32 or float64.

Stochastic rounding to a 16-bit format uses 16 bits an element: element ``e`` takes the low (``e`` even) or high half of
word ``(e % 8) // 2`` of block ``e // 8`` in its own stream.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from mmebm.state import check_type, choice, integer, items, one_integer, place, sizes

__all__ = [
    "ACCEPT",
    "DRIFT",
    "INITIAL",
    "MOMENTUM",
    "PERTURB_ROUNDING",
    "REINIT",
    "ROUNDING",
    "SWAP",
    "draw_seed",
    "normal",
    "philox4x32",
    "rounding_fraction",
    "stream",
    "uniform",
    "words",
]

MULTIPLIERS: Final = (0xD2511F53, 0xCD9E8D57)
WEYL: Final = (0x9E3779B9, 0xBB67AE85)
ROUNDS: Final = 10
MASK32: Final = 0xFFFFFFFF

# Purposes: the high byte of the stream word. Append, never renumber: old seeds must keep their chains.
DRIFT: Final = 0  # the normals of the Langevin update
INITIAL: Final = 1  # the initial state
ACCEPT: Final = 2  # accept-reject decisions
REINIT: Final = 3  # re-initialisation of chains (replay buffers)
ROUNDING: Final = 4  # stochastic rounding of an updated state to 16-bit storage
PERTURB_ROUNDING: Final = 5  # the same where noise is added before the gradient: that state is stored too
MOMENTUM: Final = 6  # velocities drawn afresh: at every step of HMC, at the start of underdamped dynamics
SWAP: Final = 7  # exchanges between the temperatures of a ladder


def stream(tensor_index: int, purpose: int = DRIFT) -> int:
    """The stream word of tensor ``tensor_index`` of the state, for one purpose: ``purpose * 2**24 + tensor_index``."""
    return integer("purpose", purpose, 0, 1 << 8) << 24 | integer("tensor_index", tensor_index, 0, 1 << 24)


def draw_seed(generator: torch.Generator | None = None) -> int:
    """A 63-bit seed from ``generator``, or from torch's global CPU generator, so that ``torch.manual_seed`` rules."""
    if generator is None:
        return int(torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device="cpu").item())
    check_type("generator", generator, torch.Generator, "a torch.Generator")
    draw = torch.randint(0, 2**63 - 1, (), dtype=torch.int64, generator=generator, device=generator.device)
    return int(draw.item())


def _mulhilo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    # int64 multiplication wraps modulo 2**64, which keeps all 64 bits of the product of two 32-bit numbers
    product = b * a
    return (product >> 32) & MASK32, product & MASK32


def philox4x32(counter: Sequence[Tensor], key: tuple[int | Tensor, int | Tensor], rounds: int = ROUNDS) -> list[Tensor]:
    """Philox4x32 on int64 tensors that hold 32-bit words.

    Args:
        counter: four tensors that broadcast against each other, values in [0, 2**32).
        key: two words in [0, 2**32), ints or 1-element tensors.
        rounds: 10 in every use of this library.

    Returns:
        Four int64 tensors of the broadcast shape, values in [0, 2**32).

    Raises:
        TypeError, ValueError: naming the argument, the value and what would do.
    """
    given = items("counter", counter)
    if len(given) != 4 or not all(isinstance(word, Tensor) and word.dtype == torch.int64 for word in given):
        raise TypeError(f"counter must be four int64 tensors, got {counter!r:.80}")
    try:
        torch.broadcast_shapes(*(word.shape for word in given))
    except RuntimeError:
        shapes = [tuple(word.shape) for word in given]
        raise ValueError(f"counter must be tensors that broadcast against each other, got shapes {shapes}") from None
    if len(items("key", key)) != 2:
        raise ValueError(f"key must be two words, got {key!r:.80}")
    c0, c1, c2, c3 = given
    k0, k1 = (_number(f"key[{i}]", word) for i, word in enumerate(key))
    for _ in range(integer("rounds", rounds, 0)):
        hi0, lo0 = _mulhilo(MULTIPLIERS[0], c0)
        hi1, lo1 = _mulhilo(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + WEYL[0]) & MASK32, (k1 + WEYL[1]) & MASK32
    return list(torch.broadcast_tensors(c0, c1, c2, c3))


def _split_seed(seed: int | Tensor) -> tuple[int | Tensor, int | Tensor]:
    seed = _number("seed", seed)
    return seed & MASK32, (seed >> 32) & MASK32


def _number(name: str, value: int | Tensor) -> int | Tensor:
    """A seed or step: an int, or a tensor without dimensions."""
    if isinstance(value, Tensor):
        return one_integer(name, value).reshape(())
    return integer(name, value, -(2**63), 2**64)


def words(
    chains: int,
    blocks: int,
    *,
    seed: int | Tensor,
    step: int | Tensor = 0,
    stream: int = 0,
    chain_offset: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """The Philox words of ``blocks`` blocks of ``chains`` chains: int64 (chains, blocks, 4), values in [0, 2**32).

    ``seed`` (64 bits) and ``step`` (32 bits) may be 1-element integer tensors on ``device``.

    Raises:
        TypeError, ValueError: naming the argument, the value and what would do.
    """
    chains, blocks = integer("chains", chains, 0, 2**62), integer("blocks", blocks, 0, 2**62)
    stream, chain_offset = integer("stream", stream, 0, 2**32), integer("chain_offset", chain_offset, 0, 2**62)
    if device is not None and not isinstance(device, torch.device):
        device = place("device", device)
    step = _number("step", step) & MASK32
    if not isinstance(step, Tensor):
        step = torch.full((), step, dtype=torch.int64, device=device)
    block = torch.arange(blocks, dtype=torch.int64, device=device)
    chain = torch.arange(chain_offset, chain_offset + chains, dtype=torch.int64, device=device)[:, None] & MASK32
    tag = torch.full((), stream, dtype=torch.int64, device=device)
    return torch.stack(philox4x32((block, chain, step, tag), _split_seed(seed)), dim=-1)


def _per_element(shape: Sequence[int]) -> tuple[tuple[int, ...], int, int]:
    shape = sizes("shape", shape)
    if not shape:
        raise ValueError("shape must have a leading chain dimension, got ()")
    return shape, shape[0], math.prod(shape[1:])


def box_muller(w: Tensor) -> Tensor:
    """Four normals from four words, in float64: (..., 4) int64 -> (..., 4) float64 (see the module docstring)."""
    u = (w[..., 0::2].to(torch.float32) * 2.0**-32 + 2.0**-33).double()
    signed = w[..., 1::2] - ((w[..., 1::2] >> 31) << 32)
    angle = (signed.to(torch.float32) * 2.0**-31).double() * math.pi
    radius = torch.sqrt(-2.0 * torch.log(u))
    return torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1).flatten(-2)


def normal(
    shape: Sequence[int],
    *,
    seed: int | Tensor,
    step: int | Tensor = 0,
    stream: int = 0,
    chain_offset: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Standard normals of ``shape`` = (chains, ...), each a function of (seed, chain, step, stream, element)."""
    check_type("dtype", dtype, torch.dtype, "a torch.dtype")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be floating, got {dtype}")
    shape, chains, numel = _per_element(shape)
    w = words(chains, -(-numel // 4), seed=seed, step=step, stream=stream, chain_offset=chain_offset, device=device)
    return box_muller(w).flatten(1)[:, :numel].to(dtype).reshape(shape)


def uniform(
    shape: Sequence[int],
    *,
    seed: int | Tensor,
    step: int | Tensor = 0,
    stream: int = INITIAL << 24,
    chain_offset: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Uniforms in [0, 1) of ``shape`` = (chains, ...), 24 bits each."""
    choice("dtype", dtype, (torch.float32, torch.float64))  # 16 bits hold neither the words nor all below 1
    shape, chains, numel = _per_element(shape)
    w = words(chains, -(-numel // 4), seed=seed, step=step, stream=stream, chain_offset=chain_offset, device=device)
    return ((w >> 8).to(dtype) * 2.0**-24).flatten(1)[:, :numel].reshape(shape)


def rounding_fraction(
    shape: Sequence[int],
    *,
    seed: int | Tensor,
    step: int | Tensor = 0,
    stream: int = ROUNDING << 24,
    chain_offset: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """The thresholds of stochastic rounding: float32 of ``shape``, ``(h + 1/2) 2**-16`` for 16-bit ``h``."""
    shape, chains, numel = _per_element(shape)
    w = words(chains, -(-numel // 8), seed=seed, step=step, stream=stream, chain_offset=chain_offset, device=device)
    halves = torch.stack((w & 0xFFFF, w >> 16), dim=-1)
    return ((halves.flatten(1)[:, :numel].float() + 0.5) * 2.0**-16).reshape(shape)
