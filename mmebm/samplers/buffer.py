"""Persistent chains: a buffer that hands out where chains start and takes back where they ended.

    buffer = mmebm.ReplayBuffer(10_000, mmebm.initial.uniform((1, 28, 28), -1, 1), reinit=0.05, seed=0)
    x, handle = buffer.draw(128)
    x = sampler.sample(energy, x, steps=60).state
    buffer.write(handle, x)

Which slots a draw takes, which of its chains restart and what a reservoir keeps are Philox words of (seed, iteration,
row) (:mod:`mmebm.noise`, stream REINIT): the same on every device. Initialisers, dequantisation noise and transforms
draw from a ``torch.Generator`` on ``device`` seeded with a hash of (seed, iteration, purpose). Nothing depends on the
global generators, so a buffer restored from its ``state_dict`` goes on exactly.

With ``storage="device"`` neither ``draw`` nor ``write`` waits for the device. What the host may read at once is checked
(shapes, dtypes, labels on the CPU); labels on a GPU are clamped to the classes there are.
"""

from __future__ import annotations

import hashlib
import inspect
import secrets
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from mmebm import noise
from mmebm.ops import noise as drawn
from mmebm.ops.common.untyped import LISTS, TORCH
from mmebm.state import (
    Key,
    State,
    Structure,
    check_setting,
    check_type,
    choice,
    dense,
    flag,
    flatten,
    integer,
    one_number,
    per_key,
    place,
)

__all__ = ["Handle", "Lineages", "ReplayBuffer"]

_POLICIES = ("slots", "fifo", "reservoir")
_DRAWS = ("uniform", "stratified")
_STORAGES = ("device", "host", "pinned")
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.uint8)
_STREAM = noise.stream(0, noise.REINIT)
# What a torch.Generator is for.
_FILL, _FRESH, _DEQUANTISE, _TRANSFORM = range(4)
# The first states are made so many at a time: an initialiser may be a network.
_FILL_CHUNK = 1024


class Lineages(NamedTuple):
    """How many chains the buffer descends from: of those it began with, and with the restarted ones."""

    original: int
    total: int


@dataclass(frozen=True)
class Handle:
    """What :meth:`ReplayBuffer.write` needs to know of a draw.

    Attributes:
        iteration: the number of the draw.
        slots: (n,) int64, where each chain came from, on the storage's device.
        fresh: (n,) bool, chains that start anew; on the storage's device.
        labels: (n,) int64, the class of each chain (0 without classes), on the storage's device.
    """

    iteration: int
    slots: Tensor
    fresh: Tensor
    labels: Tensor
    _origin: Tensor = field(repr=False)
    _uniform: Tensor = field(repr=False)
    _buffer: str = field(default="", repr=False)  # which one it is of


class ReplayBuffer:
    """Persistent chains with a named policy.

    A draw takes ``n`` slots, restarts each chain with probability ``reinit``, and returns the states with a handle.
    ``write`` puts the chains back by the policy:

    * "slots": into the slots they were drawn from (JEM): every original chain lives until it is restarted.
    * "fifo": over the oldest states (IGEBM): chains that are drawn twice multiply, the others are lost.
    * "reservoir": so that the buffer is a uniform sample of all states that ever were in it, the first ones included.

    Where two rows go to one slot the later row wins, on every device. A row that holds an inf or NaN, or a value that
    becomes one in the ``dtype`` it is stored in (above 65,504 in float16), is not stored; its slot keeps what it had,
    and ``refused`` counts it.

    Several threads may use one buffer: a draw or a write is done before another begins, and no two draws have the same
    iteration. A buffer can be copied and pickled where ``init``, ``transform`` and ``reinit`` can.

    Args:
        capacity: number of chains kept; with ``classes`` a multiple of it.
        init: ``init(n, generator) -> state`` with ``n`` chains in its first dimension: a tensor, or a dict, list or
            tuple of tensors, on ``device``. A parameter named ``labels`` is given the classes (n,). See
            :mod:`mmebm.samplers.initial` for the usual ones. It makes the first states and every restart. At a draw it
            makes ``n`` states, of which the restarted chains take theirs: asking which would wait for the device.
        policy: as above.
        draw: "uniform" with replacement, or "stratified", one from each n-th of the buffer.
        reinit: probability that a drawn chain starts anew: a number, or a function of the iteration (a schedule).
        classes: number of classes; slots are then divided equally, in order, and belong to a class.
        dtype: what states are stored in: float64, float32, bfloat16, float16 or uint8, for all tensors or in a mapping
            from key; None as the initialiser gives it. uint8 stores 256 bins and needs ``value_range``.
        value_range: (low, high) of what uint8 can hold, for all tensors or in a mapping; values outside are clamped.
        dequantise: add uniform noise within a uint8 bin at each draw; False gives the middle of the bin.
        transform: ``transform(state, generator) -> state`` applied to stored states when they are drawn, not to fresh
            ones: augmentation.
        storage: "device", or "host" or "pinned" memory, for buffers that do not fit; those two wait for the device in
            ``write``, and in ``draw`` for labels that are on it.
        device: where states are drawn to, "cpu" by default.
        seed: 64-bit int; None draws one from torch's CPU generator.

    Raises:
        TypeError, ValueError: naming the argument, the value and what would do.

    Example:
        >>> buffer = mmebm.ReplayBuffer(100, mmebm.initial.uniform((2,), -1, 1), reinit=0.05, seed=0)
        >>> x, handle = buffer.draw(16)
        >>> x = mmebm.langevin(lambda x: x.square().sum(1), x, 10, step_size=0.1, seed=1)
        >>> buffer.write(handle, x)
        >>> bool((buffer.states(handle.slots[-1:]) == x[-1:]).all())
        True
    """

    capacity: int
    classes: int | None
    init: Callable[..., Any]
    transform: Callable[[Any, torch.Generator], Any] | None
    reinit: float | Callable[[int], float]
    dequantise: bool
    device: torch.device
    seed: int
    iteration: int

    def __init__(
        self,
        capacity: int,
        init: Callable[..., Any],
        *,
        policy: Literal["slots", "fifo", "reservoir"] = "slots",
        draw: Literal["uniform", "stratified"] = "uniform",
        reinit: float | Callable[[int], float] = 0.05,
        classes: int | None = None,
        dtype: torch.dtype | Mapping[Key, torch.dtype | None] | None = None,
        value_range: Sequence[float] | Mapping[Key, Sequence[float] | None] | None = None,
        dequantise: bool = True,
        transform: Callable[[Any, torch.Generator], Any] | None = None,
        storage: Literal["device", "host", "pinned"] = "device",
        device: torch.device | str = "cpu",
        seed: int | None = None,
    ) -> None:
        self.capacity = integer("capacity", capacity, 1, 2**31)
        self.classes = None if classes is None else integer("classes", classes, 1)
        if self.capacity % (self.classes or 1):
            raise ValueError(
                f"capacity must be a multiple of classes, so that each has as many slots, got {capacity} and {classes}"
            )
        for name, value, allowed in (
            ("policy", policy, _POLICIES),
            ("draw", draw, _DRAWS),
            ("storage", storage, _STORAGES),
        ):
            choice(name, value, allowed)
        for name, value in (("init", init), ("transform", transform)):
            if not callable(value) and not (name == "transform" and value is None):
                raise TypeError(f"{name} must be a function that returns a state, got {value!r:.80}")
        self.policy, self.draws, self.storage, self.init, self.transform = policy, draw, storage, init, transform
        flag("dequantise", dequantise)
        self.reinit, self.dequantise = reinit, dequantise
        self.device = place("device", device)
        if storage == "pinned" and not torch.cuda.is_available():
            raise ValueError('storage="pinned" needs a CUDA device, and torch sees none: use "host"')
        self.seed = noise.draw_seed() if seed is None else integer("seed", seed, -(2**63), 2**64)
        self.iteration = 0
        self._name, self._lock = secrets.token_hex(8), threading.RLock()
        self._probability(0)
        self._labelled = _takes_labels(init)
        if self._labelled and classes is None:
            raise ValueError("init takes labels, so classes must say how many there are, got None")
        self._per = self.capacity // (self.classes or 1)
        self._where = self.device if storage == "device" else torch.device("cpu")
        with torch.inference_mode(False), torch.no_grad():
            self._fill(dtype, value_range)

    # What follows from the arguments

    def _probability(self, iteration: int) -> float:
        value = self.reinit(iteration) if callable(self.reinit) else self.reinit
        label = f"reinit at iteration {iteration}" if callable(self.reinit) else "reinit"
        if isinstance(value, Tensor):
            raise TypeError(f"{label} must be a number: reading a tensor would wait for its device, got {value!r:.80}")
        check_setting(label, value, kinds="a number")
        if not float(value) <= 1.0:
            raise ValueError(f"{label} must be a probability in [0, 1], got {value!r}")
        return float(value)

    def _generator(self, purpose: int, iteration: int) -> torch.Generator:
        packed = struct.pack("<QQB", self.seed & (2**64 - 1), iteration, purpose)
        hashed = int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")
        return torch.Generator(self.device).manual_seed(hashed >> 1)

    def _made(self, what: str, state: Any, n: int, keys: tuple[Key, ...] | None = None) -> list[Tensor]:
        """The tensors of a state that ``init`` or ``transform`` returned or the user gave, checked."""
        found, tensors, _ = flatten(state)
        if keys is not None and found != keys:
            raise ValueError(f"{what} must have the tensors {list(keys)}, got {list(found)}")
        for i, (key, t) in enumerate(zip(found, tensors, strict=True)):
            shape = tuple(t.shape[1:]) if keys is None else self._shapes[i]
            if tuple(t.shape) != (n, *shape):
                raise ValueError(f"{what}[{key!r}] must have the shape {(n, *shape)}, got {tuple(t.shape)}")
            if t.device.type != self.device.type:
                raise ValueError(f"{what}[{key!r}] must be on {self.device}, the buffer's device, got {t.device}")
        return tensors

    def _initial(self, n: int, generator: torch.Generator, labels: Tensor) -> Any:
        if self._labelled:
            return self.init(n, generator, labels=labels.to(self.device, non_blocking=True))
        return self.init(n, generator)

    def _fill(self, dtype: Any, value_range: Any) -> None:
        generator = self._generator(_FILL, 0)
        slot = torch.arange(self.capacity, dtype=torch.int64, device=self._where)
        self._data: list[Tensor] = []
        for start in range(0, self.capacity, _FILL_CHUNK):
            rows = slot[start : start + _FILL_CHUNK]
            state = self._initial(len(rows), generator, rows // self._per)
            tensors = self._made("the state of init", state, len(rows), None if not start else self._keys)
            if not start:
                self._keys: tuple[Key, ...]
                self._build: Structure
                self._keys, _, self._build = flatten(state)
                self._settle(tensors, dtype, value_range)
            for key, data, encoded in zip(self._keys, self._data, self._encode(tensors), strict=True):
                if not bool(encoded.isfinite().all()):
                    raise ValueError(f"init must make finite states, and state[{key!r}] is not in {encoded.dtype}")
                data[start : start + len(rows)] = encoded
        # one slot more than there are: where what is not kept is written to, so that no one need ask
        spare = torch.full((1,), -1, dtype=torch.int64, device=self._where)
        self._origin = torch.cat([slot, spare])
        self._written = torch.zeros(self.classes or 1, dtype=torch.int64, device=self._where)
        self._refused = torch.zeros((), dtype=torch.int64, device=self._where)

    def _settle(self, tensors: list[Tensor], dtype: Any, value_range: Any) -> None:
        """Shapes, dtypes and ranges, from the first states."""
        self._shapes = [tuple(t.shape[1:]) for t in tensors]
        self._given = [t.dtype for t in tensors]
        chosen = per_key("dtype", dtype, self._keys, required=False)
        for each in chosen:
            if each is not None:
                check_type("dtype", each, torch.dtype, "a torch.dtype, or a mapping to such")
        self._dtypes: list[torch.dtype] = [c or g for c, g in zip(chosen, self._given, strict=True)]
        self._ranges: list[tuple[float, float] | None] = []
        for key, kind, pair in zip(
            self._keys, self._dtypes, per_key("value_range", value_range, self._keys, required=False), strict=True
        ):
            if kind not in _DTYPES:
                raise ValueError(f"dtype must be one of {list(_DTYPES)}, got {kind!r} for {key!r}")
            if kind is torch.uint8 and pair is None:
                raise ValueError(f"dtype torch.uint8 needs value_range, (low, high) of state[{key!r}], got None")
            if pair is not None:
                if not isinstance(pair, LISTS) or len(pair) != 2:
                    raise TypeError(f"value_range must be (low, high), or a mapping to such pairs, got {pair!r:.80}")
                for end in pair:
                    one_number("value_range", end, low=-torch.inf)
                if not -torch.inf < pair[0] < pair[1] < torch.inf:
                    raise ValueError(f"value_range must be finite with low < high, got {pair!r}")
            self._ranges.append(None if pair is None else (float(pair[0]), float(pair[1])))
        self._data = [
            torch.zeros(self.capacity + 1, *shape, dtype=kind, pin_memory=self.storage == "pinned", device=self._where)
            for shape, kind in zip(self._shapes, self._dtypes, strict=True)
        ]

    # Storage

    def _encode(self, tensors: list[Tensor]) -> list[Tensor]:
        out: list[Tensor] = []
        for t, kind, pair in zip(tensors, self._dtypes, self._ranges, strict=True):
            if kind is torch.uint8:
                assert pair is not None
                low, high = pair
                t = ((t.float() - low) * (256.0 / (high - low))).floor().nan_to_num(0.0).clamp(0, 255)
            out.append(t.to(self._where, kind))
        return out

    def _decode(self, slots: Tensor, generator: torch.Generator | None) -> list[Tensor]:
        """The states in ``slots`` on the device; uint8 with noise from ``generator``, or the middle of the bin."""
        out: list[Tensor] = []
        for data, given, pair in zip(self._data, self._given, self._ranges, strict=True):
            stored = data[slots]
            if self._where != self.device:
                stored = (stored.pin_memory() if self.storage == "pinned" else stored).to(
                    self.device, non_blocking=self.storage == "pinned"
                )
            if data.dtype is torch.uint8:
                assert pair is not None
                low, high = pair
                within: float | Tensor = 0.5
                if generator is not None:
                    within = torch.rand(stored.shape, generator=generator, dtype=torch.float32, device=self.device)
                stored = ((stored + within) * ((high - low) / 256.0) + low).clamp(low, high)
            out.append(stored.to(given))
        return out

    # Use

    def __len__(self) -> int:
        return self.capacity

    def draw(self, n: int, labels: Tensor | None = None) -> tuple[Any, Handle]:
        """Where ``n`` chains start.

        Args:
            n: number of chains.
            labels: (n,) integers in [0, classes): the class of each chain. Without them a buffer with classes draws
                from all; ``handle.labels`` then says which class each chain is of.

        Returns:
            The state, in the structure of the initialiser, and the handle that :meth:`write` needs.

        Raises:
            TypeError, ValueError: for bad ``n`` or ``labels``, or another state from ``init`` or ``transform``.
        """
        n = integer("n", n, 1, 2**31)
        with self._lock, torch.no_grad():
            classes = None if labels is None else self._check_labels(n, labels)
            iteration = self.iteration
            words = drawn.words(n, 1, seed=self.seed, step=iteration, stream=_STREAM, device=self._where)[:, 0]
            slots = self._slots(n, words[:, 0], classes)
            if classes is None:
                classes = slots // self._per
            probability = self._probability(iteration)
            # 0 and 1 exactly: words are integers below 2^32
            fresh = words[:, 1] < round(probability * 2**32)
            tensors = self._decode(slots, self._generator(_DEQUANTISE, iteration) if self._noisy else None)
            if self.transform is not None:
                changed = self.transform(self._build(tensors), self._generator(_TRANSFORM, iteration))
                tensors = self._made("the state of transform", changed, n, self._keys)
            if probability > 0:
                state = self._initial(n, self._generator(_FRESH, iteration), classes)
                mask = fresh.to(self.device, non_blocking=True)
                tensors = [
                    torch.where(mask.reshape(-1, *[1] * (old.dim() - 1)), made.to(old.dtype), old)
                    for made, old in zip(self._made("the state of init", state, n, self._keys), tensors, strict=True)
                ]
            row = torch.arange(n, dtype=torch.int64, device=self._where)
            origin = torch.where(fresh, self.capacity + (iteration << 31) + row, self._origin[slots])
            uniform = ((words[:, 2] << 21) | (words[:, 3] >> 11)).double() * 2.0**-53
            self.iteration += 1
        return self._build(tensors), Handle(iteration, slots, fresh, classes, origin, uniform, self._name)

    @property
    def _noisy(self) -> bool:
        return self.dequantise and torch.uint8 in self._dtypes

    def _check_labels(self, n: int, labels: Tensor) -> Tensor:
        if self.classes is None:
            raise ValueError("labels need a buffer with classes: ReplayBuffer(..., classes=number of classes)")
        if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"labels must be a tensor of integers ({n},), got {labels!r:.80}")
        if tuple(labels.shape) != (n,):
            raise ValueError(f"labels must have the shape ({n},), one per chain, got {tuple(labels.shape)}")
        if labels.device.type == "cpu" and not bool(((labels >= 0) & (labels < self.classes)).all()):
            raise ValueError(f"labels must be in [0, {self.classes}), got {labels.min()} to {labels.max()}")
        return labels.to(self._where, torch.int64, non_blocking=True).clamp(0, self.classes - 1)

    def _slots(self, n: int, word: Tensor, classes: Tensor | None) -> Tensor:
        if self.draws == "uniform":
            # a 32-bit word times a number below 2^31 fits an int64
            if classes is None:
                return (word * self.capacity) >> 32
            return classes * self._per + ((word * self._per) >> 32)
        u = word.double() * 2.0**-32
        if classes is None:
            row = torch.arange(n, dtype=torch.float64, device=self._where)
            return ((row + u) * (self.capacity / n)).long().clamp_(max=self.capacity - 1)
        rank, count = self._rank(classes, torch.ones_like(classes, dtype=torch.bool))
        within = (rank + u) * (self._per / count[classes])
        return classes * self._per + within.long().clamp_(max=self._per - 1)

    def _rank(self, classes: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
        """The number of each row among the counted rows of its class, and how many of each class there are."""
        one = (classes[:, None] == torch.arange(len(self._written), dtype=torch.int64, device=self._where)) & counted[
            :, None
        ]
        return (one.cumsum(0) - 1).gather(1, classes[:, None])[:, 0], one.sum(0)

    def write(self, handle: Handle, state: State) -> None:
        """Puts the chains of a draw back, by the policy.

        Args:
            handle: of the draw.
            state: the chains in the order of the draw, in its structure and shapes.

        Raises:
            TypeError, ValueError: for a handle of something else, or a state of another structure or shape.
        """
        if not isinstance(handle, Handle):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"handle must be what draw returned, got {type(handle).__name__}")
        if handle._buffer != self._name:  # pyright: ignore[reportPrivateUsage]
            raise ValueError(
                f"handle must be of a draw from this buffer, got one of draw {handle.iteration} of another"
            )
        n = len(handle.slots)
        with self._lock, torch.no_grad():
            tensors = self._made("state", state, n, self._keys)
            stored = self._encode(tensors)
            # as it is given and as it is stored: uint8 has no NaN, float16 overflows
            finite = torch.stack(
                [part.isfinite().flatten(1).all(1).to(self._where) for part in (*tensors, *stored)]
            ).all(0)
            slots, keep = handle.slots, finite
            if self.policy != "slots":
                rank, count = self._rank(handle.labels, finite)
                place = self._written[handle.labels] + rank
                if self.policy == "reservoir":
                    # of place + 1 states beyond the first ones, the last; it takes a slot with probability per / seen
                    place = (handle._uniform * (place + self._per + 1)).long()  # pyright: ignore[reportPrivateUsage]
                    keep = keep & (place < self._per)
                slots = handle.labels * self._per + place % self._per
                self._written += count
            spare = torch.full_like(slots, self.capacity)
            row = torch.arange(n, dtype=torch.int64, device=self._where)
            last = torch.full((self.capacity + 1,), -1, dtype=torch.int64, device=self._where)
            last.scatter_reduce_(0, torch.where(keep, slots, spare), row, "amax")
            to = torch.where(keep & (last[slots] == row), slots, spare)
            for data, encoded in zip(self._data, stored, strict=True):
                data[to] = encoded
            self._origin[to] = handle._origin  # pyright: ignore[reportPrivateUsage]
            self._refused += (~finite).sum()

    # Inspection; these may wait for the device

    def states(self, slots: Tensor | None = None) -> Any:
        """What is stored in ``slots`` (all of them by default), without noise, restarts or transform."""
        if slots is None:
            slots = torch.arange(self.capacity, dtype=torch.int64, device=self._where)
        elif dense("slots", slots).dtype not in (torch.int32, torch.int64):
            raise TypeError(f"slots must be a tensor of integers, got {slots!r:.80}")
        elif slots.is_cpu and not bool(((slots >= 0) & (slots < self.capacity)).all()):
            raise ValueError(f"slots must be in [0, {self.capacity}), got {slots.min()} to {slots.max()}")
        slots = slots.to(self._where)
        with torch.no_grad():
            return self._build(self._decode(slots, None))

    def lineages(self) -> Lineages:
        """How many chains what is stored descends from. Restarted chains are new ones; noise drives copies apart, so
        this is ancestry, the effective number of independent chains."""
        distinct: Tensor = TORCH.unique(self._origin[: self.capacity])
        return Lineages(int((distinct < self.capacity).sum()), len(distinct))

    @property
    def refused(self) -> int:
        """How many rows ``write`` did not store because they held an inf or NaN."""
        return int(self._refused)

    # Restart

    def _description(self) -> dict[str, Any]:
        return {
            "capacity": self.capacity,
            "policy": self.policy,
            "draw": self.draws,
            "classes": self.classes,
            "keys": list(self._keys),
            "shapes": self._shapes,
            "dtypes": [str(kind) for kind in self._dtypes],
            "ranges": self._ranges,
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything but the functions (initialiser, schedule, transform): tensors, copied, and plain values."""
        return {
            "description": self._description(),
            "seed": self.seed,
            "iteration": self.iteration,
            "data": [data[: self.capacity].clone() for data in self._data],
            "origin": self._origin[: self.capacity].clone(),
            "written": self._written.clone(),
            "refused": self._refused.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where another buffer was: the next draw is the one that the other would have made.

        Raises:
            TypeError, ValueError: where the other had another capacity, policy, classes, structure, shapes or storage
                type, or where the state is no state of a buffer: nothing has changed then.
        """
        wanted = {"description", "seed", "iteration", "data", "origin", "written", "refused"}
        if not isinstance(state, Mapping) or set(state) != wanted:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"state must be what state_dict returned, with {sorted(wanted)}, got {state!r:.80}")
        other, mine = state["description"], self._description()
        check_type("state['description']", other, Mapping, "a mapping")
        differ = [name for name in mine if _plain(other.get(name)) != _plain(mine[name])]
        if differ:
            raise ValueError(
                "state is of another buffer: "
                + ", ".join(f"{k} is {other.get(k)!r} there, {mine[k]!r} here" for k in differ)
            )
        seed = integer("state['seed']", state["seed"], -(2**63), 2**64)
        iteration = integer("state['iteration']", state["iteration"], 0)
        data = state["data"]
        if not isinstance(data, LISTS) or len(data) != len(self._data):
            raise ValueError(f"state['data'] must be {len(self._data)} tensors, got {data!r:.80}")
        parts: dict[str, tuple[Any, Tensor]] = {
            f"data of {key!r}": (saved, own[: self.capacity])
            for key, saved, own in zip(self._keys, data, self._data, strict=True)
        }
        parts |= {"origin": (state["origin"], self._origin[: self.capacity])}
        parts |= {name: (state[name], own) for name, own in (("written", self._written), ("refused", self._refused))}
        for name, (saved, own) in parts.items():
            found = (tuple(saved.shape), saved.dtype) if isinstance(saved, Tensor) else type(saved).__name__
            if found != (tuple(own.shape), own.dtype):
                raise ValueError(f"state: {name} must be {tuple(own.shape)} {own.dtype}, got {found}")
            if not bool(saved.isfinite().all()):
                raise ValueError(f"state: {name} holds numbers that are not finite")
        with self._lock, torch.no_grad():
            self.seed, self.iteration = seed, iteration
            for saved, own in parts.values():
                own.copy_(saved)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copy: a tiny state stands for the function that builds states."""
        with self._lock:
            held = dict(self.__dict__)
        del held["_lock"]
        return held | {"_build": self._build([torch.zeros(1, dtype=torch.float32, device="cpu") for _ in self._keys])}

    def __setstate__(self, held: dict[str, Any]) -> None:
        self.__dict__.update(held, _build=flatten(held["_build"])[2], _lock=threading.RLock())

    def __repr__(self) -> str:
        return (
            f"ReplayBuffer({self.capacity}, policy={self.policy!r}, draw={self.draws!r}, classes={self.classes}, "
            f"storage={self.storage!r}, device={str(self.device)!r}, iteration={self.iteration})"
        )


def _plain(value: Any) -> Any:
    """Tuples as lists: formats that a checkpoint passes through turn one into the other."""
    return [_plain(part) for part in value] if isinstance(value, LISTS) else value


def _takes_labels(init: Callable[..., Any]) -> bool:
    try:
        return "labels" in inspect.signature(init).parameters
    except (TypeError, ValueError):  # a builtin without a signature
        return False
