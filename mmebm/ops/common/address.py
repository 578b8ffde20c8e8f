"""The one door from tensors to native code: every address that a kernel reads or writes is made here.

A kernel believes what it is told, so that a wrong address is a crash. What passes is memory that lies as the kernel
reads it: a plain tensor (no subclass, no wrapper of a functorch transform, neither sparse, nested nor quantised, not on
"meta"), of the expected dtype and device, contiguous, its sign bit resolved, its storage as long as its shape says.
Anything else is an error that names the argument, or one copy where a copy helps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from mmebm.ops.common.untyped import TORCH

__all__ = [
    "MOST_CHAINS",
    "Addresses",
    "address",
    "known_addresses",
    "obstacle",
    "plain",
    "readable",
    "require_broadcast",
    "require_dense",
    "same_memory",
    "step_addresses",
    "surroundings",
    "tangents",
    "unfit",
    "wrapped",
]

FORWARD: Any = torch.autograd.forward_ad
_PLAIN: Final = (Tensor, nn.Parameter)
_NO_DISPATCH: Final = getattr(TORCH._C, "_disabled_torch_dispatch_impl", None)
# where the noise's chain counter ends
MOST_CHAINS: Final = 1 << 32


def _bytes(t: Tensor) -> Any:
    """How many bytes of its storage ``t`` reaches into."""
    if t.numel() == 0:
        return 0
    if t.is_contiguous():
        return t.nbytes + t.storage_offset() * t.itemsize
    span = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return (t.storage_offset() + span) * t.itemsize


_INSIDE: Final = "a tensor inside a transform (torch.func: vmap, grad, jvp, functionalize), which holds no data"


def _odd(t: Tensor) -> str | None:
    """What ``t`` is where no op takes it, not even the reference: torch crashes on a storage that is too short."""
    if t.is_nested:
        return "a nested tensor"
    if t.layout is not torch.strided:
        return f"a tensor of layout {t.layout}"
    if t.is_quantized or (t.is_floating_point() and t.itemsize == 1):
        return f"a tensor of {t.dtype}"
    if type(t) not in _PLAIN or t.is_meta:
        return None
    length, needed = t.untyped_storage().nbytes(), _bytes(t)
    return f"a tensor of {needed} bytes whose storage holds {length}" if length < needed else None


def require_dense(name: str, t: Tensor, like: Tensor | None = None) -> None:
    """Raises where no implementation takes ``t``. Fake and meta tensors and those of a transform pass: torch's
    dispatcher knows what to do with an op of them, unless they are mixed with others (``like``).

    Raises:
        TypeError: naming the argument.
    """
    if torch.compiler.is_compiling():
        return
    if like is not None and (isinstance(t, FakeTensor), t.is_meta) != (isinstance(like, FakeTensor), like.is_meta):
        raise TypeError(
            f"{name} must hold data if and only if the other tensors do, got a {type(t).__name__} on {t.device}"
        )
    try:
        reason = _odd(t)
    except (RuntimeError, NotImplementedError):
        return
    if reason is not None:
        raise TypeError(f"{name} must be a dense tensor of numbers, got {reason}")


def require_broadcast(name: str, t: Tensor, like: Tensor) -> None:
    """Raises where ``t`` beside ``like`` would make a tensor of another shape than ``like``'s.

    Raises:
        ValueError: naming the argument.
    """
    sizes = zip(reversed(t.shape), reversed(like.shape), strict=False)
    if t.dim() > like.dim() or any(own not in (1, size) for own, size in sizes):
        raise ValueError(
            f"{name} of shape {tuple(t.shape)} does not broadcast against {tuple(like.shape)}: a row for each chain "
            "has the shape (chains, 1, ...)"
        )


def wrapped(t: Tensor) -> str | None:
    """What ``t`` is where it holds no numbers that a computation could go on with, or ``None``."""
    if torch.compiler.is_compiling():  # what is traced has no memory yet, and is not asked again
        return None
    if isinstance(t, FakeTensor):
        return "a FakeTensor, which holds no data"
    try:
        reason = _odd(t)
        if reason is not None:
            return reason
        if t.is_meta:
            return "a meta tensor, which holds no data"
        if type(t) in _PLAIN and t.data_ptr() == 0 and _bytes(t):
            return _INSIDE
    except (RuntimeError, NotImplementedError):
        return _INSIDE
    return None


def tangents(*tensors: Any) -> bool:
    """Whether forward-mode differentiation goes through one of ``tensors``: an op of torch.library would go on without
    their tangents and say nothing."""
    if torch.compiler.is_compiling() or FORWARD._current_level < 0:
        return False
    return any(FORWARD.unpack_dual(t).tangent is not None for t in tensors if isinstance(t, Tensor))


def surroundings() -> str | None:
    """What around the call keeps a chain from running on plain tensors too, or ``None``."""
    if torch.compiler.is_compiling():
        return None
    if TORCH._C._get_dispatch_mode(TORCH._C._TorchDispatchModeKey.FAKE) is not None:
        return "a call inside FakeTensorMode, where nothing is computed"
    return None


def obstacle(t: Any) -> str | None:
    """What keeps ``t`` from being plain memory, or ``None``. Dtype, device and strides are not looked at."""
    if not isinstance(t, Tensor):
        return f"{type(t).__name__}, no tensor"
    if type(t) not in _PLAIN and not isinstance(t, FakeTensor):
        return f"{type(t).__name__}, not a plain tensor"  # what it computes need not lie in its memory
    return wrapped(t)


def unfit(what: str, x: Tensor, tensors: Sequence[Tensor], other: torch.dtype) -> str | None:
    """Why no fused chain runs from the state ``x`` on the ``tensors`` of ``what``, or ``None``: all are to be plain and
    float32, those of ``what`` may be ``other``."""
    for name, t in (("the state", x), *((f"a tensor of {what}", t) for t in tensors)):
        if t.dtype is not torch.float32 and (t is x or t.dtype is not other):
            return f"{name} is {t.dtype}, taken is float32"
        reason = obstacle(t)
        if reason is not None:
            return f"{name} is {reason}"
    return None


def plain(name: str, t: Tensor) -> Tensor:
    """``t`` without a subclass that says nothing about its memory (one without ``__torch_dispatch__``).

    Raises:
        TypeError: where :func:`obstacle` has something against it.
    """
    if type(t) not in _PLAIN and getattr(type(t), "__torch_dispatch__", None) is _NO_DISPATCH:
        with TORCH._C.DisableTorchFunctionSubclass():
            t = t.as_subclass(Tensor)
    reason = obstacle(t)
    if reason is not None:
        raise TypeError(f"{name} must be a plain tensor, got {reason}")
    return t


def readable(
    name: str,
    t: Tensor,
    device: torch.device,
    dtypes: Sequence[torch.dtype],
    order: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """``t`` as native code can read it: detached, dense in this order, without a pending sign; itself where it is so.

    Raises:
        TypeError: where it is not plain, or of another device or dtype.
    """
    t = plain(name, t)
    if t.device != device or t.dtype not in dtypes:
        taken = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name} must be {taken} on {device}, got {t.dtype} on {t.device}")
    return t.detach().resolve_neg().contiguous(memory_format=order)


def address(name: str, t: Tensor, device: torch.device, dtype: torch.dtype) -> int:
    """The address of a contiguous tensor; whoever calls keeps it alive until native code has read it.

    Raises:
        TypeError: where ``t`` is anything but plain, contiguous memory of ``dtype`` on ``device``.
    """
    try:
        if (
            type(t) in _PLAIN
            and t.dtype is dtype
            and t.layout is torch.strided
            and not t.is_nested
            and t.device == device
            and t.is_contiguous()
            and not t.is_neg()
        ):
            size, place = t.nbytes, t.data_ptr()
            if size == 0 or (place and t.untyped_storage().nbytes() >= size + t.storage_offset() * t.itemsize):
                return place
    except (RuntimeError, NotImplementedError):
        pass  # wrapped: named below
    readable(name, t, device, (dtype,))  # raises, unless the strides alone are at fault
    raise TypeError(f"{name} must be contiguous, got shape {tuple(t.shape)} and strides {t.stride()}")


class Addresses:
    """The addresses of one call on one device. What they point to lives as long as this object."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._alive: list[Tensor] = []

    def __call__(self, name: str, t: Tensor | None, dtype: torch.dtype) -> int:
        """Of ``t``, or of a copy that native code can read; 0 for ``None``."""
        if t is None:
            return 0
        if type(t) is not Tensor or not t.is_contiguous() or t.is_neg():
            t = readable(name, t, self.device, (dtype,))
        self._alive.append(t)
        return address(name, t, self.device, dtype)

    def output(self, name: str, t: Tensor | None) -> int:
        """Of a tensor that native code writes to; 0 for ``None``."""
        if t is None:
            return 0
        self._alive.append(t)
        return address(name, t, self.device, t.dtype)


def step_addresses(
    x: Sequence[Tensor],
    grad: Sequence[Tensor],
    params: Sequence[Any],
    known: Sequence[Tensor],
    settled: Sequence[Any],
    dtypes: Sequence[torch.dtype],
    shapes: Sequence[torch.Size],
    sizes: Sequence[int],
    orders: Sequence[torch.memory_format] | None = None,
) -> tuple[list[int], list[int]] | None:
    """The addresses of ``x`` and ``grad`` on the CPU, or ``None`` where one of them or ``params`` wants a closer look.

    ``x`` and ``params`` must be the objects ``known`` and ``settled`` of the last step; a gradient is a new tensor at
    every step, which must have this dtype, shape, size in bytes and order (``None``: row-major). The checks are those
    of :func:`address`, and they count: a step of a small state takes 1 us in C++.
    """
    places: list[int] = []
    gradients: list[int] = []
    try:
        for i, g in enumerate(grad):
            t = x[i]
            dense = g.is_contiguous() if orders is None else g.is_contiguous(memory_format=orders[i])
            if (
                t is not known[i]
                or params[i] is not settled[i]
                or type(g) is not Tensor
                or g.dtype is not dtypes[i]
                or not dense
                or not g.is_cpu
                or g.shape != shapes[i]
                or g.is_neg()
                or g.untyped_storage().nbytes() < sizes[i]
                or g.storage_offset()
            ):
                return None
            places.append(t.data_ptr())
            gradients.append(g.data_ptr())
    except (RuntimeError, NotImplementedError):
        return None
    return places, gradients


def known_addresses(tensors: Sequence[Tensor]) -> list[int]:
    """The addresses of tensors that went through :func:`readable`, and were not replaced since."""
    return [t.data_ptr() for t in tensors]


def same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two plain tensors begin at the same address."""
    return a.data_ptr() == b.data_ptr()
