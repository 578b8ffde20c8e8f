"""The state of a chain: one tensor, a list or a dict of tensors, and the settings that belong to its tensors."""

from __future__ import annotations

import contextlib
import copy
import math
import operator
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, TypeAlias

import torch
from torch import Tensor

from mmebm.ops.common.address import MOST_CHAINS, surroundings, wrapped

Key: TypeAlias = "str | int"
State: TypeAlias = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
# Tuples of a multimodal set, or of samples: modality name -> (n, *shape).
Batch: TypeAlias = Mapping[str, Tensor]
Structure: TypeAlias = Callable[[list[Tensor]], Any]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """``value`` as an int in [low, high); NumPy's integers count, bools do not.

    Raises:
        TypeError, ValueError: where it is no integer, or out of range.
    """
    if type(value) is int and value >= low and (high is None or value < high):
        return value
    wanted = f"an int of at least {low}" + ("" if high is None else f" and below {high}")
    try:
        if isinstance(value, (bool, Tensor)):
            raise TypeError
        number = operator.index(value)
    except TypeError:  # some types have __index__ for few of their values
        raise TypeError(f"{name} must be {wanted}, got {value!r:.80}") from None
    if number < low or (high is not None and number >= high):
        raise ValueError(f"{name} must be {wanted}, got {number}")
    return number


def flag(name: str, value: Any) -> None:
    """Raises a TypeError where ``value`` is neither True nor False; "no" and tensors are not."""
    # NumPy's bool is of another type
    if not isinstance(value, bool) and type(value).__name__ not in ("bool", "bool_"):
        raise TypeError(f"{name} must be True or False, got {value!r:.80}")


def choice(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Raises a ValueError where ``value`` is not among those allowed."""
    # by type too: 1 is no True, and an array compares with anything
    if not any(isinstance(value, type(each)) and value == each for each in allowed):
        raise ValueError(f"{name} must be one of {list(allowed)}, got {value!r:.80}")


def check_type(name: str, value: Any, kind: Any, wanted: str) -> None:
    """Raises a TypeError where ``value`` is none of ``kind``, which is called ``wanted``."""
    # an instance check asks the classes of a callable, which need not let themselves be asked
    if not (callable(value) if kind is Callable else isinstance(value, kind)):
        raise TypeError(f"{name} must be {wanted}, got {type(value).__name__} {value!r:.80}")


def items(name: str, value: Any) -> list[Any]:
    """What a sequence holds, of whatever; a string, a mapping and a set are none.

    Raises:
        TypeError: where it is none.
    """
    try:
        if isinstance(value, (str, bytes, Mapping, Set)):
            raise TypeError
        return list(value)
    except (TypeError, RuntimeError):  # the latter of tensors without rows
        raise TypeError(f"{name} must be a sequence, got {value!r:.80}") from None


def sizes(name: str, value: Any, low: int = 0) -> tuple[int, ...]:
    """The sizes of a tensor, or of layers, each an int of at least ``low``.

    Raises:
        TypeError, ValueError: naming the sequence or its entry.
    """
    return tuple(integer(f"{name}[{i}]", size, low, 2**63) for i, size in enumerate(items(name, value)))


def one_integer(name: str, value: Tensor) -> Tensor:
    """A seed or step that is a 1-element tensor, in int64, which holds the bits of uint64.

    Raises:
        TypeError: where it is no integer, or not one.
    """
    if value.numel() != 1 or value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} must be an int or a 1-element integer tensor, got {value!r:.80}")
    # a narrower one would wrap when steps are added
    return value.to(torch.int64)


def dense(name: str, value: Any, least: int = 0) -> Tensor:
    """``value``, a dense tensor with numbers in it, of at least ``least`` dimensions.

    Raises:
        TypeError, ValueError: where it is none, or has fewer.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {value!r:.80}")
    if value.is_nested or value.layout is not torch.strided or value.is_quantized or value.is_meta:
        what = "nested" if value.is_nested else "meta" if value.is_meta else f"{value.dtype} {value.layout}"
        raise TypeError(f"{name} must be a dense tensor of numbers, got a {what} one")
    if value.dim() < least:
        raise ValueError(f"{name} must have {least} dimensions at least, got shape {tuple(value.shape)}")
    return value


def place(name: str, value: Any) -> torch.device:
    """``value`` as a device that is there.

    Raises:
        TypeError, ValueError: where it is none, or torch does not reach it.
    """
    try:
        device = torch.device(value)
        torch.empty(0, dtype=torch.float32, device=device)
    except (TypeError, ValueError, RuntimeError, AssertionError) as why:  # the last of a torch built without it
        error = TypeError if isinstance(why, TypeError) else ValueError
        raise error(f'{name} must be a device that torch has here, such as "cpu", got {value!r:.80}') from None
    return device


def _mapping(state: Mapping[Any, Any], keys: tuple[Key, ...]) -> Structure:
    """What makes mappings like ``state``: a plain dict where its kind cannot be copied and written to."""
    if type(state) is not dict:
        with contextlib.suppress(Exception):
            build = _filled(state, keys, list)
            if tuple(build(list(state.values()))) == keys:
                return build
    return lambda out: dict(zip(keys, out, strict=True))


def _filled(state: Any, places: Sequence[Any], values: Callable[[list[Tensor]], list[Any]]) -> Structure:
    """What makes copies of ``state``, a user's kind of container with fields of its own, with other values in it."""

    def build(out: list[Tensor]) -> Any:
        made = copy.copy(state)
        for place, value in zip(places, values(out), strict=True):
            made[place] = value
        return made

    return build


def flatten(state: State, name: str = "state") -> tuple[tuple[Key, ...], list[Tensor], Structure]:
    """Keys, tensors and the function that puts a list of tensors back into the structure of ``state``.

    Raises:
        TypeError: where the state is not a tensor, or a list, tuple or dict of dense tensors of 16 to 64 bits, with
            numbers in them (not meta or fake).
        ValueError: for an empty state, a tensor without chain dimension, or unequal numbers of chains or devices.
    """
    keys: tuple[Key, ...]
    tensors: list[Any]
    build: Structure
    if isinstance(state, Tensor):
        keys, tensors, build = (0,), [state], lambda out: out[0]
    elif isinstance(state, Mapping):
        keys, tensors = tuple(state), list(state.values())
        build = _mapping(state, keys)
    elif isinstance(state, (list, tuple)):
        keys, tensors = tuple(range(len(state))), list(state)
        if isinstance(state, list):
            build = list if type(state) is list else _filled(state, [slice(None)], lambda out: [out])
        else:
            make = type(state)
            build = (lambda out: make(*out)) if hasattr(state, "_fields") else tuple
    else:
        raise TypeError(f"{name} must be a tensor, or a list, tuple or dict of tensors, got {type(state).__name__}")
    if not tensors:
        raise ValueError(f"{name} must hold at least one tensor, got an empty one")
    for key, x in zip(keys, tensors, strict=True):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}[{key!r}] must be a tensor, got {type(x).__name__}")
        if x.is_nested:
            raise TypeError(
                f"{name}[{key!r}] must be a dense tensor, got a nested one; pad it, and give the padding as observed"
            )
        if x.dtype not in _DTYPES or x.layout is not torch.strided:
            raise TypeError(
                f"{name}[{key!r}] must be a dense floating-point tensor of 16, 32 or 64 bits, got {x.dtype}, {x.layout}"
            )
        if x.dim() == 0:
            raise ValueError(f"{name}[{key!r}] must have a leading chain dimension, got a 0-dimensional tensor")
        if x.shape[0] > MOST_CHAINS:
            raise ValueError(
                f"{name}[{key!r}] must have at most 2^32 chains, which the noise tells apart, got {len(x)}"
            )
        if x.shape[0] != tensors[0].shape[0]:
            raise ValueError(
                f"{name}[{key!r}] has {x.shape[0]} chains but {name}[{keys[0]!r}] has {tensors[0].shape[0]}; "
                "the first dimension of every tensor counts the chains"
            )
        if x.device != tensors[0].device:
            raise ValueError(f"{name}[{key!r}] is on {x.device} but {name}[{keys[0]!r}] is on {tensors[0].device}")
        reason = wrapped(x) or surroundings()
        if reason is not None:
            raise TypeError(f"{name}[{key!r}] must hold numbers, got {reason}")
    return keys, tensors, build


def like_state(value: Any, keys: Sequence[Key], tensors: Sequence[Tensor], *, name: str = "the score") -> list[Tensor]:
    """The tensors of a score (or what else ``name`` says) in the order of the state, in its dtypes.

    Raises:
        TypeError, ValueError: where it has not the state's structure and shapes.
    """
    parts: Any = value
    if isinstance(value, Tensor):
        parts = {0: value}
    elif isinstance(value, (list, tuple)):
        parts = dict(enumerate(value))
    known = isinstance(parts, Mapping) and len(parts) == len(keys)
    found: list[Any] = [parts.get(key) for key in keys] if known else []
    if not known or not all(isinstance(t, Tensor) and t.shape == x.shape for t, x in zip(found, tensors, strict=True)):
        wanted = {key: tuple(x.shape) for key, x in zip(keys, tensors, strict=True)}
        if not isinstance(parts, Mapping) or not all(isinstance(part, Tensor) for part in parts.values()):
            raise TypeError(f"{name} must be tensors in the state's structure, {wanted}, got {value!r:.80}")
        shapes = {key: tuple(part.shape) for key, part in parts.items()}
        raise ValueError(f"{name} must have the state's shapes {wanted}, got {shapes}")
    return [t if t.dtype is x.dtype else t.to(x.dtype) for t, x in zip(found, tensors, strict=True)]


def per_key(name: str, value: Any, keys: Sequence[Key], *, required: bool) -> list[Any]:
    """``value`` for each key of the state: one for all, or a mapping from key to value.

    Raises:
        ValueError: where the mapping names a key the state lacks, or leaves one out that is ``required``.
    """
    if not isinstance(value, Mapping):
        return [value] * len(keys)
    unknown = [key for key in value if key not in keys]
    if unknown:
        raise ValueError(f"{name} names {unknown} but the state has {list(keys)}")
    missing = [key for key in keys if key not in value]
    if required and missing:
        raise ValueError(f"{name} has no value for {missing}: give one for every tensor of the state, {list(keys)}")
    return [value.get(key) for key in keys]


def check_setting(
    name: str,
    value: Any,
    *,
    low: float = 0.0,
    strict: bool = False,
    kinds: str = "a number, a tensor, a mapping or a function of the step",
) -> Any:
    """Checks a number, or a tensor of numbers on the CPU (reading one elsewhere would wait for its device).

    Args:
        low: the least value allowed, itself excluded if ``strict``; with ``-inf`` infinities are allowed too.
        kinds: what the caller takes, said where the value is none of it.

    Returns:
        The value; as a float where floats and tensors would not compute with it (a Decimal).

    Raises:
        TypeError: where the value is neither a number nor a tensor of numbers.
        ValueError: where it is NaN or out of range.
    """
    finite = low > -math.inf
    wanted = f"finite and {'above' if strict else 'at least'} {low:g}" if finite else "no NaN"
    if isinstance(value, Tensor):
        dense(name, value)
        small = value.is_floating_point() and value.element_size() < 2
        if value.is_complex() or value.dtype == torch.bool or small:
            raise TypeError(f"{name} must hold real numbers, got a tensor of {value.dtype}")
        if value.device.type != "cpu":
            return value
        held = value.detach()
        good = ~held.isnan()
        if finite:
            good = held.isfinite() & (held > low if strict else held >= low)
        if not bool(good.all()):
            raise ValueError(f"{name} must be {wanted}, got {value!r:.200}")
        return value
    # NumPy's scalars have __float__, strings have not; int, a type, has one for its instances
    if isinstance(value, (bool, type)) or not hasattr(value, "__float__") or getattr(value, "ndim", 0) != 0:
        raise TypeError(f"{name} must be {kinds}, got {value!r:.80}")
    try:
        number = float(value)
    except OverflowError:
        raise ValueError(f"{name} must be a number that a float holds, got {value!r:.80}") from None
    if math.isnan(number) or (finite and not (math.isfinite(number) and (number > low if strict else number >= low))):
        raise ValueError(f"{name} must be {wanted}, got {value!r}")
    kind = type(value).__name__  # NumPy's numbers compute with tensors, its bools do not
    if isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63):
        return value
    return value if hasattr(value, "dtype") and kind not in ("bool", "bool_") else number


def one_number(name: str, value: Any, *, low: float = 0.0, strict: bool = False) -> Any:
    """:func:`check_setting` of what must be one number, or a tensor that holds one."""
    checked = check_setting(name, value, low=low, strict=strict, kinds="a number")
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"{name} must be a number, got a tensor of shape {tuple(value.shape)}")
    return checked


def square(name: str, value: Any) -> Any:
    """The square of a number or tensor.

    Raises:
        TypeError, ValueError: where it has none, or a float does not hold it.
    """
    try:
        return value**2
    except TypeError:
        raise TypeError(f"{name} must be a number or a tensor, got {value!r:.80}") from None
    except OverflowError:
        raise ValueError(f"{name} must have a square that a float holds, got {value!r:.80}") from None


def check_range(name: str, value: float | Tensor, dtype: torch.dtype, *, least: float = 0.0) -> None:
    """Checks that a finite number, or a tensor of numbers on the CPU, is one in ``dtype`` too, and not below ``least``.

    Raises:
        ValueError: where it would become infinite, or lies below.
    """
    if isinstance(value, Tensor):
        if not value.is_cpu or not value.numel():
            return
        held = value.detach().abs()
        held = torch.where(held.isfinite(), held, 1.0).double()
        low, high = float(held.min()), float(held.max())
    else:
        low = high = abs(value) if math.isfinite(value) else 1.0
    if low < least or high > torch.finfo(dtype).max:
        wanted = f"between {least:.3g} and {torch.finfo(dtype).max:.3g}, the range of {dtype},"
        raise ValueError(f"{name} must be {wanted} got {value!r:.200}")


def broadcast(name: str, value: Any, like: Tensor, dtype: torch.dtype) -> float | Tensor:
    """A setting as a float, or as a tensor of ``like``'s number of dimensions (or none) that broadcasts against it.

    A 1-D tensor of length chains holds one value per chain.

    Raises:
        ValueError: where a tensor does not broadcast, or a number is infinite in ``dtype``.
    """
    check_range(name, value, dtype)
    if not isinstance(value, Tensor):
        return float(value)
    out = value.to(device=like.device, dtype=dtype)
    if out.dim() == 0:
        return out
    if out.dim() == 1 and out.shape[0] == like.shape[0]:
        return out.reshape(-1, *[1] * (like.dim() - 1))
    try:
        fits = torch.broadcast_shapes(out.shape, like.shape) == like.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"{name} of shape {tuple(out.shape)} does not broadcast against the state's {tuple(like.shape)}; "
            f"give a number, one value per chain ({like.shape[0]},), or a shape that broadcasts"
        )
    return out.reshape(*[1] * (like.dim() - out.dim()), *out.shape)


def observed_masks(observed: Any, keys: Sequence[Key], tensors: Sequence[Tensor]) -> list[bool | Tensor]:
    """Per tensor: True (wholly observed), False, or a boolean mask of the observed elements.

    ``observed`` is a collection of keys, a mapping from key to mask (or bool), or one mask for a single tensor. A 1-D
    mask of length chains marks whole chains, one of another length the elements of the last dimension.

    Raises:
        TypeError, ValueError: for anything else, unknown keys, masks that do not broadcast, and a 1-D mask that could
            be either of the two.
    """
    out: list[bool | Tensor] = [False] * len(keys)
    if observed is None:
        return out
    if isinstance(observed, Tensor):
        if len(keys) != 1:
            raise ValueError(f"observed is one mask but the state has {list(keys)}: give a mapping from key to mask")
        observed = {keys[0]: observed}
    elif isinstance(observed, (list, tuple, Set)) and not any(isinstance(key, bool) for key in observed):
        unknown = [key for key in observed if not isinstance(key, (str, int))]
        if unknown:
            raise TypeError(f"observed must hold keys of the state, {list(keys)}, got {unknown!r:.80}")
        observed = dict.fromkeys(observed, True)
    elif not isinstance(observed, Mapping):
        raise TypeError(f"observed must be a collection of keys, a mapping or a mask, got {observed!r:.80}")
    for i, value in enumerate(per_key("observed", observed, keys, required=False)):
        if value is None or isinstance(value, bool):
            out[i] = bool(value)
            continue
        if not isinstance(value, Tensor) or value.dtype != torch.bool:
            raise TypeError(f"observed[{keys[i]!r}] must be a boolean mask or True, got {value!r:.80}")
        mask = value.to(tensors[i].device)
        if mask.dim() == 1 and mask.shape[0] == tensors[i].shape[0]:
            if tensors[i].dim() > 1 and mask.shape[0] == tensors[i].shape[-1] > 1:
                every = ", None" * (tensors[i].dim() - 1)
                raise ValueError(
                    f"observed[{keys[i]!r}] of shape {tuple(mask.shape)} may mean chains or elements of a state of "
                    f"shape {tuple(tensors[i].shape)}: write mask[:{every}] for chains, mask[None] for elements"
                )
            mask = mask.reshape(-1, *[1] * (tensors[i].dim() - 1))
        try:
            out[i] = mask.expand(tensors[i].shape)
        except RuntimeError:
            raise ValueError(
                f"observed[{keys[i]!r}] of shape {tuple(value.shape)} does not broadcast against "
                f"{tuple(tensors[i].shape)}"
            ) from None
    return out


def check_apart(keys: Sequence[Key], tensors: Sequence[Tensor]) -> None:
    """Raises a ValueError where two elements of the state share memory, so that it cannot be written to."""
    if len(tensors) == 1 and tensors[0].is_contiguous():
        return
    taken: dict[int, list[tuple[Key, Tensor]]] = {}
    for key, t in zip(keys, tensors, strict=True):
        if t.numel():
            taken.setdefault(t.untyped_storage().data_ptr(), []).append((key, t))
    for group in taken.values():
        if len(group) == 1 and group[0][1].is_contiguous():
            continue
        # a byte of the memory from the first to the last element: 1 where it belongs to an element
        spans = [(t.data_ptr(), t.data_ptr() + t.element_size() * (1 + _reach(t))) for _, t in group]
        low = min(begin for begin, _ in spans)
        # data pointers and sizes are multiples of the smallest element's size, but need not be of the largest one's
        unit = math.gcd(*(t.element_size() for _, t in group), *(begin - low for begin, _ in spans))
        seen = torch.zeros((max(end for _, end in spans) - low) // unit, dtype=torch.bool, device="cpu")
        for (key, t), (begin, _) in zip(group, spans, strict=True):
            width = t.element_size() // unit
            size = (*t.shape, width)
            stride = (*(s * width for s in t.stride()), 1)
            place = seen.as_strided(size, stride, (begin - low) // unit)
            before = int(seen.sum())
            if bool(place.any()):
                raise ValueError(f"inplace needs tensors apart: state[{key!r}] shares memory with another of the state")
            place.fill_(True)
            if int(seen.sum()) - before != place.numel():
                raise ValueError(
                    f"inplace needs memory for every element of state[{key!r}], got a view whose elements overlap"
                )


def _reach(t: Tensor) -> int:
    """How many elements of memory lie between the first and the last one."""
    return sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
