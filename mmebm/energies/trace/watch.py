"""The two modes under which an energy is called: what it does is written down, and refused where it has an effect."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mmebm.energies.lower.attempt import refuse
from mmebm.energies.trace import arithmetic, layers, moves  # noqa: F401 (their rules)
from mmebm.energies.trace.recorder import ROWS, RULES, Recorder
from mmebm.energies.trace.tape import Step, Tape, tensors_in
from mmebm.ops.net import graph

# What reads no value of its argument
_SHAPES = frozenset(
    [
        "zeros_like",
        "ones_like",
        "empty_like",
        "full_like",
        "new_zeros",
        "new_ones",
        "new_full",
        "new_empty",
        "new_empty_strided",
    ]
)


def _circular(x: Tensor, pad: Sequence[int]) -> Tensor:
    for i in range(len(pad) // 2):
        before, after, dim = pad[2 * i], pad[2 * i + 1], x.dim() - 1 - i
        n = x.shape[dim]
        if min(before, after) < 0 or max(before, after) > n:
            refuse(f"it pads {n} elements circularly by {before} and {after}")
        left = [x.narrow(dim, n - before, before)] if before else []
        right = [x.narrow(dim, 0, after)] if after else []
        x = torch.cat([*left, x, *right], dim) if left or right else x
    return x


# Where a batch norm is told that it is in train mode
_TRAINING = {"native_batch_norm": 5, "_native_batch_norm_legit": 5, "cudnn_batch_norm": 5, "miopen_batch_norm": 5}
# What no operation shows
_LEAVES = (Tensor.numpy, Tensor.__array__, Tensor.tolist, Tensor.__dlpack__)
_LEAVES += (Tensor.__float__, Tensor.__int__, Tensor.__index__, Tensor.__complex__, Tensor.__bool__)
# Functions that read what they are given without any operation, and the place of it among their arguments
_FROM_PYTHON: dict[Any, int] = {
    **dict.fromkeys((torch.tensor, torch.as_tensor, torch.asarray, torch.scalar_tensor), 0),
    **dict.fromkeys((Tensor.new_tensor, Tensor.new), 1),
}


def _numbers_alone(data: Any) -> bool:
    """Whether ``data`` is numbers of Python in lists and tuples."""
    if isinstance(data, (list, tuple)):
        return all(map(_numbers_alone, data))
    return type(data) in (bool, int, float, complex)


class Rewrite(TorchFunctionMode):
    """Three functions that torch takes apart in a way in which chains are no longer seen, in another way."""

    def __init__(self, watched: Callable[[Any], Any], tape: Tape) -> None:
        super().__init__()
        self.watched: Callable[[Any], Any] = watched
        self.tape: Tape = tape

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func in _LEAVES and args:
            if self.watched(args[0]):
                refuse(f"it takes a value of the state out of torch ({func.__name__})")
            self.tape.valid = False
        if func in _FROM_PYTHON:
            place = _FROM_PYTHON[func]
            data = args[place] if len(args) > place else given.get("data")
            if not isinstance(data, Tensor):  # which is copied by an operation
                if any(map(self.watched, tensors_in(data))):
                    refuse(f"it takes a value of the state out of torch ({func.__name__})")
                if not _numbers_alone(data):  # another call may find other numbers there
                    self.tape.valid = False
        if func is F.adaptive_avg_pool2d and given.get("output_size", args[1:] and args[1]) in (1, (1, 1), [1, 1]):
            # as the mean that it is: of channels_last torch changes the strides of its result in place
            return (args[0] if args else given["input"]).mean((-2, -1), keepdim=True)
        if func is F.pad:
            pad = args[1] if len(args) > 1 else given.get("pad", ())
            mode = args[2] if len(args) > 2 else given.get("mode", "constant")
            if mode == "circular":
                return _circular(args[0], list(pad))
        if func is F.instance_norm:
            names = ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps")
            given = {**dict(zip(names, args, strict=False)), **given}
            x, weight, bias, eps = (*map(given.get, ("input", "weight", "bias")), given.get("eps", 1e-5))
            if not given.get("use_input_stats", True):
                mean, variance = given.get("running_mean"), given.get("running_var")
                return F.batch_norm(x, mean, variance, weight, bias, eps=eps)  # type: ignore[arg-type]
            if given.get("running_mean") is not None:
                refuse("its instance norm tracks running statistics")
            return F.group_norm(x, x.shape[1], weight, bias, eps)  # type: ignore[union-attr]
        return func(*args, **(kwargs or {}))


@functools.lru_cache(maxsize=2048)
def _written(func: Any) -> tuple[tuple[int, str], ...]:
    """(position, name) of the arguments that ``func`` writes to."""
    arguments = enumerate(func._schema.arguments)
    return tuple((i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write)


class Watch(TorchDispatchMode):
    """Runs every operation, and writes down those that read the state."""

    def __init__(self, recorder: Recorder, tape: Tape) -> None:
        super().__init__()
        self.recorder: Recorder = recorder
        self.tape: Tape = tape
        self.own: dict[int, Tensor] = {}  # storages made during the call, kept

    def _own(self, result: Any, given: Sequence[Tensor]) -> None:
        """Notes the memory of a result, but not that of a view of what was there before."""
        before = {t.untyped_storage()._cdata for t in given}
        for t in tensors_in(result):
            storage = t.untyped_storage()._cdata
            if storage not in before:
                self.own.setdefault(storage, t)

    def _examine(self, func: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The tensors that ``func`` changes. Refuses what must not happen in a call that nobody asked for."""
        if torch.Tag.nondeterministic_seeded in func.tags:
            refuse(f"it draws random numbers ({name})")
        if name in _TRAINING and args[_TRAINING[name]]:
            refuse("its batch norm is in train mode")
        changed = []
        for i, label in _written(func):
            changed += tensors_in(args[i] if i < len(args) else kwargs.get(label))
        for t in changed:
            if t.untyped_storage()._cdata not in self.own:
                refuse(f"it changes a tensor in place ({name})")
        return changed

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        r, name = self.recorder, func._schema.name.rpartition("::")[2]
        flat = tensors_in((args, given))
        values = [r.value(t) for t in flat]
        watched = any(value is not None for value in values) and name not in _SHAPES
        changed = self._examine(func, name, args, given)
        plain = name.removesuffix("_") if changed and name.endswith("_") else name
        if watched and (plain not in RULES or (changed and plain == name)):
            refuse(f"it calls {name}")
        if not watched and changed:
            storages = {t.untyped_storage()._cdata for t in changed}
            if any(v.tensor.untyped_storage()._cdata in storages for v in r.values.values()):
                refuse(f"it changes what it computed in place ({name})")
        if changed and watched:
            # another tensor that looks at the same memory would no longer be what was written down
            target = changed[0]
            sharing = [
                v for v in r.values.values() if v.tensor.untyped_storage()._cdata == target.untyped_storage()._cdata
            ]
            if r.value(target) is None or any(v.tensor is not target for v in sharing):
                refuse(f"it changes a view in place ({name})")
        result = func(*args, **given)
        self._own(result, flat)
        apply = None
        if watched:
            total = any(value is not None and value.total for value in values)
            # the rule of an operation in place, too: a tensor's node is still what it was
            apply = functools.partial(_written_total if total else _written_down, plain)
            apply(r, result, args, given)
        self.tape.add(Step(func, plain, args, given, result, apply), changed)
        return result


def _written_down(name: str, r: Recorder, result: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """By the rule of the operation ``name``."""
    r.rows = name in ROWS
    nodes = RULES[name](r, result, *args, **kwargs)
    outputs = list(result) if isinstance(result, (list, tuple)) else [result]
    for node, t in zip(nodes if isinstance(nodes, list) else [nodes], outputs, strict=True):
        if node is None:
            continue
        total = isinstance(node, tuple)
        r.keep(t, node[1] if isinstance(node, tuple) else node, total, rows=r.rows)


def _written_total(name: str, r: Recorder, result: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """What may follow a sum over the chains: numbers times it, and sums of such."""
    parts = list(map(r.value, args[:2]))
    if name in ("view", "reshape", "squeeze", "unsqueeze", "_unsafe_view", "alias", "detach", "clone") or (
        name == "sum" and args[0].numel() == 1
    ):
        parts, factors = parts[:1], (1.0,)
    elif name in ("neg", "mul", "div"):
        number = -1.0 if name == "neg" else args[1]
        if r.value(args[0]) is None and name == "mul":
            parts, number = parts[::-1], args[0]
        if r.value(number) is not None or (r.value(args[0]) is None and name == "div"):
            refuse("it computes with sums over the chains")
        parts, factors = parts[:1], (1.0 / float(number) if name == "div" else float(number),)
    elif name in ("add", "sub"):
        alpha = float(kwargs.get("alpha", 1.0))
        factors = (1.0, alpha if name == "add" else -alpha)
        if any(p is None for p in parts):  # a constant changes no gradient, but each chain's energy
            number = args[1] if parts[0] is not None else args[0]
            if float(number) != 0:
                refuse("it adds a constant to a sum over the chains")
            factors = tuple(f for p, f in zip(parts, factors, strict=True) if p is not None)
            parts = [p for p in parts if p is not None]
    else:
        refuse(f"it calls {name} on a sum over the chains")
    found = [p for p in parts if p is not None]
    if not found or not all(p.total for p in found):
        refuse("it adds a sum over the chains to a value for each")
    ones = [r.add(graph.View(p.node, (1,))) if r.shapes[p.node] != (1,) else p.node for p in found]
    r.keep(result, r.add(graph.Add(tuple(ones), factors)), total=True)
