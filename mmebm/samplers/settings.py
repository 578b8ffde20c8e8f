"""A sampler's settings (numbers, tensors, mappings, functions of the step) as constants of each tensor at each step."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from mmebm.ops.common.layout import widen
from mmebm.ops.common.params import StepNumbers, StepRows, varies
from mmebm.samplers.schedules import Schedule, values_of
from mmebm.state import Key, broadcast, check_range, check_setting, per_key

# Settings by name, and what each may be (see check_setting).
Numbers = Mapping[str, Mapping[str, Any]]
Value = float | Tensor

# Langevin's.
NUMBERS: dict[str, dict[str, Any]] = {
    "step_size": {},
    "noise_scale": {},
    "temperature": {},
    "grad_clip": {},
    "grad_norm_clip": {"strict": True},
    "max_update": {},
    "prior_std": {"strict": True},
}
REQUIRED = ("step_size", "noise_scale", "temperature")
BOUND: dict[str, Any] = {"low": -math.inf}
# A prior so wide that x / prior_std^2 is below the smallest number of any dtype.
FLAT = 1e150


def is_mapping(value: object) -> TypeGuard[Mapping[Any, Any]]:
    """Whether ``value`` is a mapping, of whatever."""
    return isinstance(value, Mapping)


def is_sequence(value: object) -> TypeGuard[Sequence[Any]]:
    """Whether ``value`` is a list or tuple, of whatever."""
    return isinstance(value, (list, tuple))


def leaves(name: str, value: Any) -> list[tuple[str, Any]]:
    """What a setting holds, with a name for messages: each entry of a mapping, or itself; None is left out."""
    if not is_mapping(value):
        return [] if value is None else [(name, value)]
    return [(f"{name}[{key!r}]", leaf) for key, leaf in value.items() if leaf is not None]


def check_leaves(name: str, value: Any, *, required: bool = True, **allowed: Any) -> None:
    """Checks what a setting holds, but for its functions of the step (see :func:`mmebm.state.check_setting`)."""
    given = list(value.values()) if is_mapping(value) else [value]
    if required and any(leaf is None for leaf in given):
        raise TypeError(f"{name} must be a number, a tensor, a mapping or a function of the step, got {value!r:.80}")
    for label, leaf in leaves(name, value):
        if not callable(leaf):
            check_setting(label, leaf, **allowed)


def check_numbers(sampler: Any, numbers: Numbers, required: Sequence[str] | None = None) -> None:
    """Checks a description's settings, each a number, a tensor, a mapping or a function of the step.

    Args:
        required: those that must have a value, and in a mapping one for every key; all of them by default.

    Raises:
        TypeError, ValueError: naming the setting.
    """
    for name, allowed in numbers.items():
        check_leaves(name, getattr(sampler, name), required=required is None or name in required, **allowed)


def check_quotients(step_size: Value, temperature: Value, mass: Value, dtype: torch.dtype) -> None:
    """Checks that what numbers are divided by the mass to is finite in ``dtype``.

    Raises:
        ValueError: naming both.
    """
    for name, value in (("step_size", step_size), ("temperature", temperature)):
        if not isinstance(value, Tensor) and not isinstance(mass, Tensor) and value / mass > torch.finfo(dtype).max:
            raise ValueError(f"{name} / mass must be finite in {dtype}, got {value!r} and {mass!r}")


def least(allowed: Mapping[str, Any], dtype: torch.dtype) -> float:
    """The least value of a setting in the arithmetic of ``dtype``: what the step divides by must be a divisor there."""
    return torch.finfo(dtype).tiny if allowed.get("strict") else 0.0


def at_steps(
    label: str, setting: Callable[[int], Any], first: int, steps: int, allowed: Mapping[str, Any], required: bool
) -> Sequence[Any]:
    """A setting that is a function of the step: its values at ``steps`` steps from ``first`` on, checked.

    A :class:`~mmebm.samplers.schedules.Schedule` has them at once; any other function is asked step by step.

    Raises:
        TypeError, ValueError: naming the setting and the step.
    """
    known = setting.values_at if isinstance(setting, Schedule) else functools.partial(values_of, setting)
    values: Any = known(first, steps)
    if not isinstance(values, StepNumbers) and set(map(type, values)) == {float}:
        values = StepNumbers(torch.tensor(values, dtype=torch.float64, device="cpu"))
    if isinstance(values, StepNumbers):
        vector, low = values.vector, allowed.get("low", 0.0)
        good = vector.isfinite() & (vector > low if allowed.get("strict") else vector >= low)
        if bool(good.all()):
            return values
    each: list[Any] = list(values)
    for k, value in enumerate(each, first):
        if value is None and required:
            raise TypeError(f"{label} at step {k} must be a number or a tensor, got None")
        if value is not None:
            check_setting(f"{label} at step {k}", value, **allowed)
    return each


def _column(
    label: str,
    setting: Any,
    first_step: int | Tensor,
    steps: int,
    allowed: Mapping[str, Any],
    required: bool,
    value: Callable[[str, Any], Any],
) -> Any:
    """``value(label, setting)``, of a function of the step a list of them, or of its :class:`StepNumbers`."""
    if not callable(setting):
        return value(label, setting)
    if isinstance(first_step, Tensor):
        raise ValueError("first_step must be an int where a setting is a function of the step, got a tensor")
    # evaluated before the chain starts, so that no step waits for a copy to the device
    values = at_steps(label, setting, first_step, max(steps, 1), allowed, required)
    if isinstance(values, StepNumbers):
        return value(label, values)
    return [value(f"{label} at step {k}", v) for k, v in enumerate(values, first_step)]


def _label(name: str, i: int, keys: Sequence[Key]) -> str:
    return name + (f"[{keys[i]!r}]" if len(keys) > 1 else "")


def rows_of(
    sampler: Any, numbers: Numbers, keys: Sequence[Key], tensors: Sequence[Tensor], first_step: int | Tensor, steps: int
) -> list[dict[str, list[Value]]]:
    """The settings of every tensor by name: one entry for all steps or, with functions among them, one per step."""

    def value(allowed: Mapping[str, Any], like: Tensor, label: str, setting: Any) -> Any:
        series = isinstance(setting, StepNumbers)
        check_range(label, setting.vector if series else setting, like.dtype, least=least(allowed, like.dtype))
        return setting if series else broadcast(label, setting, like, like.dtype)

    columns: dict[str, list[Any]] = {}
    for name, allowed in numbers.items():
        given = per_key(name, getattr(sampler, name), keys, required=True)
        columns[name] = []
        for i, (setting, t) in enumerate(zip(given, tensors, strict=True)):
            label, convert = _label(name, i, keys), functools.partial(value, allowed, t)
            columns[name].append(_column(label, setting, first_step, steps, allowed, True, convert))
    count = max((len(c) for each in columns.values() for c in each if varies(c)), default=1)
    return [{name: [c[k] if varies(c) else c for c in each] for name, each in columns.items()} for k in range(count)]


def langevin_rows(
    sampler: Any, keys: Sequence[Key], tensors: Sequence[Tensor], first_step: int | Tensor, steps: int
) -> tuple[StepRows, list[bool]]:
    """Langevin's constants of every tensor, one row for all steps or one per step; and which tensors get noise."""
    settings = {name: per_key(name, getattr(sampler, name), keys, required=name in REQUIRED) for name in NUMBERS}
    pairs = [pair or (None, None) for pair in per_key("bounds", sampler.bounds, keys, required=False)]
    settings["low"], settings["high"] = [pair[0] for pair in pairs], [pair[1] for pair in pairs]

    def value(name: str, i: int, label: str, setting: Any) -> Any:
        """One value of a setting as a float, or as a tensor that broadcasts."""
        if setting is None:
            return None
        dtype = widen(tensors[i][:0]).dtype
        wide, lowest = dtype, least(NUMBERS.get(name, BOUND), dtype)
        if name == "prior_std":  # of which the step takes the square
            wide, lowest = torch.float64, torch.finfo(dtype).max ** -0.5
        if isinstance(setting, StepNumbers):
            check_range(label, setting.vector, wide, least=lowest)
            flat = name == "prior_std" and float(setting.vector.max()) > FLAT
            return [None if v > FLAT else v for v in setting] if flat else setting
        if not isinstance(setting, Tensor):
            check_range(label, setting, wide, least=lowest)
            if name == "prior_std" and setting > FLAT:
                return None
        out = broadcast(label, setting, tensors[i], dtype)
        if name == "grad_norm_clip" and isinstance(out, Tensor):
            per_chain_allowed = sampler.norm_over == "chain" and out.dim() > 0 and out.numel() == out.shape[0]
            if out.numel() != 1 and not per_chain_allowed:
                raise ValueError(f"{label} limits a norm, of each chain or of the whole tensor, got {tuple(out.shape)}")
        return out

    def constants(i: int) -> dict[str, Any]:
        now: dict[str, Any] = {}
        for name, each in settings.items():
            if each[i] is None:
                now[name] = None
                continue
            label = _label("bounds" if name in ("low", "high") else name, i, keys)
            allowed, needed = NUMBERS.get(name, BOUND), name in ("step_size", "temperature")
            convert = functools.partial(value, name, i)
            now[name] = _column(label, each[i], first_step, steps, allowed, needed, convert)
        a, t, s = now["step_size"], now.pop("temperature"), now["noise_scale"]
        series = [isinstance(c, StepNumbers) for c in (a, t)]
        if s is None and any(series) and all(known or isinstance(c, float) for known, c in zip(series, (a, t))):
            # products and roots of float64 are Python's
            now["noise_scale"] = StepNumbers(_tied(*(c.vector if isinstance(c, StepNumbers) else c for c in (a, t))))
        else:
            now["noise_scale"] = _along(_tied, a, t, s)
        _along(_check_bounds, now["low"], now["high"])
        return now

    def silent(name: str, i: int) -> bool:
        constant = settings[name][i]
        return not (constant is None or callable(constant) or isinstance(constant, Tensor)) and float(constant) == 0.0

    noisy = [
        not (silent("noise_scale", i) or (settings["noise_scale"][i] is None and silent("temperature", i)))
        for i in range(len(keys))
    ]
    # numbers are the same for all tensors of a dtype
    made: dict[Any, dict[str, Any]] = {}
    columns: list[dict[str, Any]] = []
    for i, t in enumerate(tensors):
        given = [each[i] for each in settings.values()]
        key = (t.dtype, *given) if all(value is None or type(value) in (int, float) for value in given) else i
        if key not in made:
            made[key] = constants(i)
        columns.append(made[key])
    return StepRows(columns, max(steps, 1)), noisy


def _tied(a: Any, t: Any, s: Any = None) -> Any:
    """sqrt(2 a t), where there is no noise scale."""
    if s is not None:
        return s
    product = 2 * a * t
    root = product.sqrt() if isinstance(product, Tensor) else math.sqrt(product)
    if not isinstance(root, Tensor) and math.isinf(root):
        raise ValueError(f"2 step_size temperature must be a number, got {product!r} for {a!r} and {t!r}")
    return root


def _check_bounds(low: Any, high: Any) -> None:
    if low is None or high is None:
        return
    inverted = low > high
    # reading a tensor elsewhere would wait for its device
    if bool(inverted.any()) if isinstance(inverted, Tensor) and inverted.is_cpu else inverted is True:
        raise ValueError(f"bounds must have low <= high, got {low!r} and {high!r}")


def _along(function: Callable[..., Any], *columns: Any) -> Any:
    """``function`` of columns of settings step by step: a list where any of them is one, else of the values."""
    steps = next((len(column) for column in columns if varies(column)), None)
    if steps is None:
        return function(*columns)
    return [function(*row) for row in zip(*(c if varies(c) else [c] * steps for c in columns), strict=True)]
