"""Every awkward energy (gallery.py) on every path: the chain of a loop with autograd in float64, or an error of ours.

The loop by hand is tests/fuzz/rule.py, with the noise from the same definition. Each entry is sampled twice, the second
run going on where the first ended, since some change in between and the first run of an energy is checked more than the
second. The tolerance is the fuzz's: sixteen times the distance of float32 loops by hand from the float64 one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import mmebm
from mmebm import HMC, MALA, BackendError, Langevin, Underdamped
from tests.energies.gallery import GALLERY, Case, Entry
from tests.fuzz import rule
from tests.fuzz.strategies import Tolerance

STEPS, SEED = 3, 11
NUMBERS = {"step_size": 0.1, "noise_scale": 0.05, "temperature": 1.0, "friction": 0.7, "mass": 1.0}
PATHS: dict[str, Callable[..., Any]] = {
    "auto": Langevin(0.1, 0.05, mode="keep"),
    "torch": Langevin(0.1, 0.05, mode="keep", backend="torch"),
    "cpp": Langevin(0.1, 0.05, mode="keep", backend="cpp"),
    "mala": MALA(0.1, mode="keep"),
    "hmc": HMC(0.1, leapfrog_steps=2, mode="keep"),
    "underdamped": Underdamped(0.1, friction=0.7, mode="keep"),
}  # type: ignore[dict-item]
# where a loop by hand calls the energy once a step too
LANGEVIN = ("auto", "torch", "cpp")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def parts(state: Any) -> list[Tensor]:
    return [state] if isinstance(state, Tensor) else list(state.values() if isinstance(state, dict) else state)


def structure(like: Any, tensors: list[Tensor]) -> Any:
    if isinstance(like, Tensor):
        return tensors[0]
    return dict(zip(like, tensors)) if isinstance(like, dict) else tensors


def by_hand(case: Case, dtype: torch.dtype, path: str, jitter: int | None = None) -> rule.Result:
    """Two runs of the loop; the result of the second. ``extra``: what the energy counted."""
    x = [t.to(dtype).numpy() for t in parts(case.state)]
    setting = lambda name, i, k: NUMBERS.get(name)

    def energy(points: list[np.ndarray], k: int) -> tuple[np.ndarray, list[np.ndarray]]:
        leaves = [torch.from_numpy(np.array(t)).requires_grad_() for t in points]
        value = case.energy(structure(case.state, list(leaves)))
        if value.dim() and value.shape[0] != len(points[0]):
            raise ValueError("another number of chains")
        grads = torch.autograd.grad(value.sum(), leaves, allow_unused=True)
        each = value.detach()
        each = each.flatten(1).sum(1) if each.dim() > 1 else each
        slopes = [np.zeros_like(t) if g is None else g.numpy() for g, t in zip(grads, points)]
        return each.to(leaves[0].dtype).numpy(), slopes

    masks = [False] * len(x)
    result = rule.Result([])
    for run in range(2):
        given = {
            "seed": SEED,
            "masks": masks,
            "first_step": run * STEPS,
            "jitter": None if jitter is None else np.random.default_rng(jitter + run),
        }
        with case.around():
            if path in LANGEVIN:
                result = rule.langevin(energy, x, STEPS, setting, **given)
            elif path == "mala":
                free = lambda name, i, k: None if name == "noise_scale" else setting(name, i, k)
                result = rule.langevin(energy, x, STEPS, free, accept="metropolis", **given)
            elif path == "hmc":
                result = rule.hmc(energy, x, STEPS, setting, leapfrog_steps=2, **given)
            else:
                result = rule.underdamped(energy, x, STEPS, setting, **given)
        x = result.state
        if run == 0:
            case.between()
    result.extra["count"] = case.count()
    return result


def sampled(case: Case, path: str) -> tuple[Any, Any, str]:
    """The state after two runs, what the energy counted, and how the runs were made."""
    state, how = case.state, []
    for run in range(2):
        with case.around():
            out = PATHS[path].sample(case.energy, state, STEPS, seed=SEED, first_step=run * STEPS)  # type: ignore[attr-defined]
        how.append(f"{out.info.get('op')}: {out.info.get('reason')}")
        state = out.state
        if run == 0:
            case.between()
    return state, case.count(), "; ".join(how)


def test_the_gallery_is_large() -> None:
    assert len(GALLERY) >= 60
    assert all(entry.special for entry in GALLERY.values())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", GALLERY)
def test_equal_or_refused(name: str, path: str, seed: int) -> None:
    entry: Entry = GALLERY[name]
    if entry.one_call_a_step and path not in LANGEVIN:
        pytest.skip("the number of calls of the energy is the sampler's own there")
    if entry.couples and path in ("hmc", "mala"):
        pytest.skip("chains are accepted one by one, so that an energy of several is none for these")
    widest = torch.float32 if entry.own_dtype else torch.float64
    try:
        torch.manual_seed(seed)
        truth = by_hand(entry.build(widest, seed), widest, path)
    except Exception as error:
        # where the loop fails, the call must, and say something
        torch.manual_seed(seed)
        with pytest.raises(Exception) as caught:
            sampled(entry.build(torch.float32, seed), path)
        assert str(caught.value), error
        return
    rough = []
    for trial in range(6 if entry.own_dtype else 2):  # a truth in float32 errs as they do: more of them (seed 43000146)
        case = entry.build(torch.float32, seed)
        torch.manual_seed(seed)
        rough.append(by_hand(case, torch.float32, path, jitter=2 * trial))
    case = entry.build(torch.float32, seed)
    before = [t.clone() for t in parts(case.state)]
    torch.manual_seed(seed)
    try:
        state, count, how = sampled(case, path)
    except (TypeError, ValueError, BackendError) as error:
        one_per_chain = path in ("hmc", "mala") and "one energy per chain" in str(error)
        if not one_per_chain and not (entry.refuses and entry.refuses in str(error)):
            raise
        return
    assert all(torch.equal(t, old) for t, old in zip(parts(case.state), before))
    tolerance = Tolerance(truth, rough, 2.0**-24)
    sound = truth.margin > 1e-3
    for i, t in enumerate(parts(state)):
        exact, got = truth.state[i], t.detach().double().numpy()
        assert np.array_equal(np.isnan(got), np.isnan(exact)), how
        finite = np.isfinite(exact).reshape(len(exact), -1).all(1) & sound
        tolerance.close(f"state {i}", t, lambda r, i=i: r.state[i], finite, how)
        assert sound.any()
    if path in LANGEVIN:
        assert count == truth.extra["count"], how


def test_the_drop_in_call(seed: int) -> None:
    """``mmebm.langevin`` is what ``sample`` returns."""
    case = GALLERY["mixture"].build(torch.float32, seed)
    got = mmebm.langevin(case.energy, case.state, 3, step_size=0.1, seed=5)
    assert torch.equal(got, Langevin(0.1).sample(case.energy, case.state, 3, seed=5).state)
