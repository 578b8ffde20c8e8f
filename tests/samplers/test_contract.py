"""What every sampler promises whatever its law: rows, restarts, structures, modules, device, errors."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmebm import noise
from mmebm.diagnostics import autocorrelation, autocorrelation_time, ess, mala_acceptance, rhat
from mmebm.samplers import HMC, MALA, Langevin, ParallelTempering, Underdamped
from mmebm.samplers.schedules import linear

SAMPLERS: dict[str, Any] = {
    "Underdamped": Underdamped(0.2, 0.7, 1.3, 1.5),
    "HMC": HMC(0.25, 3, 1.2, 1.1),
    "adapted HMC": HMC(0.1, 2, adapt=4),
    "ParallelTempering": ParallelTempering(0.05, (1.0, 1.5, 2.5)),
    "unadjusted ParallelTempering": ParallelTempering([0.02, 0.03], (1.0, 1.5), accept=None, swap_every=2),
}
RECORDS = {
    Underdamped: ("energy", "kinetic", "grad_norm"),
    HMC: ("energy", "accept_prob", "accepted", "energy_error", "step_scale"),
    ParallelTempering: ("energy", "ladder_energy", "accept_prob", "swap_prob", "replica"),
}
# what a restart takes besides the state, and where the run before left it
CARRIED = {Underdamped: "velocity", HMC: "adaptation", ParallelTempering: "ladder"}

every = pytest.mark.parametrize("name", SAMPLERS)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def double_well(x: Tensor) -> Tensor:
    """Minima at -1 and 1; of bounded curvature, so that no chain diverges."""
    square = x.flatten(1).square()
    return (0.5 * square + 2 / (1 + square)).sum(1)


def joint(s: dict[str, Tensor], shift: Tensor | None = None) -> Tensor:
    b = s["b"] if shift is None else s["b"] - shift[:, None]
    return double_well(s["a"]) + 0.5 * b.square().sum(1) + 0.3 * (s["a"][:, 0, :3] * b[:, :3]).sum(1)


def state(seed: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(12, 2, 3, generator=g, dtype=dtype), "b": torch.randn(12, 5, generator=g, dtype=dtype)}


def cut(value: Any, rows: slice) -> Any:
    if isinstance(value, Tensor):
        return value[rows]
    return {key: cut(item, rows) for key, item in value.items()}


def close(a: Any, b: Any) -> bool:
    """Equal up to the order of float64 sums over a chain's elements, which may depend on the number of chains."""
    if isinstance(a, Tensor):
        return torch.allclose(a, b, rtol=1e-10, atol=1e-10, equal_nan=True)
    return all(close(a[key], b[key]) for key in a)


def same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else all(same(a[key], b[key]) for key in a)


@every
def test_some_chains_alone_equal_rows_of_the_whole(name: str, seed: int) -> None:
    sampler, start = SAMPLERS[name], state(seed)
    shift = torch.linspace(-1, 1, 12, dtype=torch.float64)
    mask = start["b"] > 0.8
    options = {"seed": seed, "thin": 2, "record": RECORDS[type(sampler)]}
    whole = sampler.sample(joint, start, 7, args=(shift,), observed={"b": mask}, **options)
    for rows in (slice(0, 4), slice(4, 5), slice(5, 12)):
        part = sampler.sample(
            joint,
            cut(start, rows),
            7,
            args=(shift[rows],),
            observed={"b": mask[rows]},
            chain_offset=rows.start,
            **options,
        )
        assert close(part.state, cut(whole.state, rows))
        assert close(part.trajectory, {key: t[:, rows] for key, t in whole.trajectory.items()})
        assert close(part.trace, {key: t[:, rows] for key, t in whole.trace.items()})


@every
@pytest.mark.parametrize("first", [0, 3, 4])
def test_steps_in_two_runs_equal_one_run(name: str, first: int, seed: int) -> None:
    sampler, start = SAMPLERS[name], state(seed)
    options = {"seed": seed, "first_step": 0, "observed": {"a": start["a"] > 1}}
    carried = CARRIED[type(sampler)]
    whole = sampler.sample(joint, start, 9, **options)
    before = sampler.sample(joint, start, first, **options)
    options["first_step"] = before.info["next_step"]
    if carried in before.info:
        options[carried] = before.info[carried]
    after = sampler.sample(joint, before.state, 9 - first, **options)
    assert same(after.state, whole.state) and after.info["next_step"] == 9
    if carried in whole.info:
        assert same(after.info[carried], whole.info[carried])


@every
def test_seeds(name: str, seed: int) -> None:
    sampler, start = SAMPLERS[name], state(seed)
    run = lambda **options: sampler.sample(joint, start, 3, **options)
    drawn = run()
    assert same(run(seed=drawn.info["seed"]).state, drawn.state)
    assert not same(run().state, drawn.state)
    generator = lambda: torch.Generator().manual_seed(seed)
    assert same(run(generator=generator()).state, run(generator=generator()).state)
    assert same(run(seed=torch.tensor([seed])).state, run(seed=seed).state)


@every
def test_structures_shapes_and_inputs(name: str, seed: int) -> None:
    """A tensor, a list and a dict of it are the same; the input is neither changed nor aliased; inplace writes it."""
    sampler, x = SAMPLERS[name], state(seed, torch.float32)["a"]
    given = x.clone()
    one = sampler.sample(double_well, x, 3, seed=seed, thin=1)
    listed = sampler.sample(lambda s: double_well(s[0]), [x], 3, seed=seed, thin=1)
    assert torch.equal(listed.state[0], one.state) and torch.equal(listed.trajectory[0], one.trajectory)
    assert one.trajectory.shape == (3, *x.shape) and torch.equal(one.trajectory[-1], one.state)
    assert torch.equal(x, given) and one.state.data_ptr() != x.data_ptr() and one.state.dtype == x.dtype
    none = sampler.sample(double_well, x, 0, seed=seed)
    assert torch.equal(none.state, x) and none.state.data_ptr() != x.data_ptr()
    again = sampler.sample(double_well, x, 3, seed=seed, inplace=True)
    assert again.state is x and torch.equal(x, one.state)
    log_prob = sampler.replace(log_prob=True).sample(lambda s: -double_well(s), given, 3, seed=seed)
    assert torch.equal(log_prob.state, one.state)


@pytest.mark.parametrize("name", [*SAMPLERS, "MALA", "Langevin"])
def test_an_energy_may_write_to_what_it_is_given(name: str, seed: int) -> None:
    """A list or dict among the arguments is the caller's own, as in a loop by hand."""
    sampler = {**SAMPLERS, "MALA": MALA(0.1), "Langevin": Langevin(0.1)}[name]
    log: list[float] = []
    cache: dict[str, Any] = {"calls": 0, "shift": torch.ones(3)}

    def energy(x: Tensor, log: list[float], *, cache: dict[str, Any]) -> Tensor:
        value = double_well(x - cache["shift"])
        log.append(float(value.detach().sum()))
        cache["calls"] += 1
        return value

    sampler.sample(energy, state(seed)["a"], 4, args=(log,), kwargs={"cache": cache}, seed=seed)
    assert len(log) == cache["calls"] >= 4


@pytest.mark.parametrize("name", [*SAMPLERS, "MALA", "Langevin"])
def test_where_the_elements_of_a_state_lie_in_memory_does_not_matter(name: str, seed: int) -> None:
    sampler = {**SAMPLERS, "MALA": MALA(0.1), "Langevin": Langevin(0.1)}[name]
    x = torch.randn(8, 3, 4, 5, generator=torch.Generator().manual_seed(seed))
    rows = torch.zeros(16, 3, 8, 5)
    rows[::2, :, 2:6] = x
    layouts = {
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "permuted": x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        "cut out": rows[::2, :, 2:6],
        "negated": torch._neg_view(-x),  # pyright: ignore[reportPrivateUsage, reportUnknownMemberType]
    }
    expected = sampler.sample(double_well, x, 3, seed=seed).state
    for layout, t in layouts.items():
        # sums over a chain's elements may be taken in the order of their memory
        assert torch.allclose(sampler.sample(double_well, t, 3, seed=seed).state, expected, 1e-5, 1e-5), layout
        assert torch.equal(t, x)


@every
def test_observed_elements_keep_their_value(name: str, seed: int) -> None:
    sampler, start = SAMPLERS[name], state(seed)
    mask = torch.arange(12) % 3 == 0
    out = sampler.sample(joint, start, 5, seed=seed, observed={"a": True, "b": mask}).state
    assert torch.equal(out["a"], start["a"]) and torch.equal(out["b"][mask], start["b"][mask])
    assert bool((out["b"][~mask] != start["b"][~mask]).all(1).sum() >= 5)
    whole = sampler.sample(joint, start, 2, observed={"a", "b"}, record=("energy",))
    assert same(whole.state, start) and torch.equal(whole.trace["energy"][1], joint(start))


@every
def test_the_other_tensor_is_conditioned_on(name: str, seed: int) -> None:
    """Observing ``a`` is the same as closing over it, with the noise of ``b``'s place."""
    sampler, start = SAMPLERS[name], state(seed)
    fixed = sampler.sample(joint, start, 4, seed=seed, observed={"a"}).state["b"]
    calls: list[Tensor] = []

    def energy(s: dict[str, Tensor]) -> Tensor:
        calls.append(s["a"])
        return joint(s)

    assert torch.equal(sampler.sample(energy, start, 4, seed=seed, observed={"a"}).state["b"], fixed)
    assert all(not a.requires_grad for a in calls)


@every
@pytest.mark.parametrize("raises", [False, True])
def test_modules_are_left_as_they_were(name: str, raises: bool) -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 1))
    net[1].train()
    net[0].eval()
    net[3].weight.requires_grad_(False)
    net[0].weight.grad = torch.ones(8, 6)
    flags = [m.training for m in net.modules()], [p.requires_grad for p in net.parameters()]
    seen: list[bool] = []

    def energy(x: Tensor) -> Tensor:
        seen.append(net[1].training or [p.requires_grad for p in net.parameters()] != flags[1])
        if raises and len(seen) > 3:
            raise RuntimeError("user's")
        return net(x)

    run = lambda: SAMPLERS[name].sample(energy, torch.zeros(4, 6), 5)
    if raises:
        with pytest.raises(RuntimeError, match="user's"):
            run()
    else:
        out = run()
        assert not out.state.requires_grad
    assert not any(seen)
    assert flags == ([m.training for m in net.modules()], [p.requires_grad for p in net.parameters()])
    assert torch.equal(net[0].weight.grad, torch.ones(8, 6)) and net[3].bias.grad is None


@every
def test_gradient_modes_and_inference_tensors(name: str, seed: int) -> None:
    sampler, x = SAMPLERS[name], state(seed)["a"]
    wanted = sampler.sample(double_well, x, 3, seed=seed).state
    with torch.no_grad():
        assert torch.equal(sampler.sample(double_well, x, 3, seed=seed).state, wanted)
    with torch.inference_mode():
        made = x.clone()
        shift = torch.zeros(12, dtype=torch.float64)
        energy = lambda s, t: double_well(s) + (t[:, None] * s.flatten(1)).sum(1)
        assert torch.equal(sampler.sample(energy, made, 3, seed=seed, args=(shift,)).state, wanted)


@every
def test_no_chains_and_descriptions_pickle(name: str) -> None:
    sampler = pickle.loads(pickle.dumps(SAMPLERS[name]))
    assert sampler == SAMPLERS[name]
    out = sampler.sample(double_well, torch.zeros(0, 3), 4, thin=2, record=RECORDS[type(sampler)])
    assert out.state.shape == (0, 3) and out.trajectory.shape == (2, 0, 3)
    assert all(t.shape[:2] == (4, 0) for t in out.trace.values())


@every
def test_schedules_among_the_arguments(name: str, seed: int) -> None:
    """Each step is at its own energy: equal to runs of one step each."""
    sampler, x = SAMPLERS[name], state(seed)["a"]
    energy = lambda s, scale: scale * double_well(s)
    whole = sampler.sample(energy, x, 4, args=(linear(1.0, 2.0, 4),), seed=seed)
    carried, options, y = CARRIED[type(sampler)], {}, x
    for k in range(4):
        step = sampler.sample(energy, y, 1, args=(linear(1.0, 2.0, 4)(k),), seed=seed, first_step=k, **options)
        y = step.state
        options = {carried: step.info[carried]} if carried in step.info else {}
    # by hand the gradient at the end of a step is taken again, of the next energy, as in the whole run
    assert close(y, whole.state)


class NoWaiting(TorchDispatchMode):
    """Refuses what would wait for a device: reading a number from a tensor, or a shape from its values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        names = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "item")
        if func.overloadpacket.__name__ in names:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


@every
def test_nothing_waits_for_the_device(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a state on a GPU goes through: the reference, and without a look at the flags that a CPU's may have."""
    monkeypatch.setenv("MMEBM_BACKEND", "torch")
    sampler, start = SAMPLERS[name].replace(on_nonfinite="ignore"), state(seed, torch.float32)
    with NoWaiting():
        with pytest.raises(AssertionError, match="waits"):
            float(start["a"].sum())
        out = sampler.sample(
            joint, start, 6, seed=seed, thin=1, record=RECORDS[type(sampler)], observed={"b": start["b"] > 1}
        )
        for measure in (rhat, ess, autocorrelation, autocorrelation_time):
            measure(out.trajectory)
        ess(out.trajectory, method="tail")
        mala_acceptance(joint, start, Langevin(0.1), seed=seed)


def test_purposes_of_noise_are_apart() -> None:
    purposes = (
        noise.DRIFT,
        noise.INITIAL,
        noise.ACCEPT,
        noise.REINIT,
        noise.ROUNDING,
        noise.PERTURB_ROUNDING,
        noise.MOMENTUM,
        noise.SWAP,
    )
    assert purposes == tuple(range(8))


def test_broken_chains_of_underdamped(seed: int) -> None:
    energy = lambda x: (0.5 * x.square() + 1e-3 * (2 - x).sqrt()).sum(1)  # no number above 2
    x = torch.tensor([[0.0, 0.1], [1.9, 0.0], [0.3, 0.4]], dtype=torch.float64)
    v = torch.tensor([[0.0, 0.0], [5.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    sampler = Underdamped(0.1, temperature=0.01)
    run = lambda how: sampler.replace(on_nonfinite=how).sample(energy, x, 20, velocity=v, seed=seed, thin=1)
    loose, frozen = run("ignore"), run("freeze")
    for out in (loose, frozen):
        assert out.info["nonfinite"].tolist() == [False, True, False]
        assert torch.equal(out.state[::2], loose.state[::2])
    assert bool(loose.state[1].isnan().any())
    assert torch.equal(frozen.state[1], x[1]) and torch.equal(frozen.info["velocity"][1], v[1])
    with pytest.raises(FloatingPointError, match="1 of 3 chains are not finite after 20 steps"):
        run("raise")


def test_broken_chains_of_the_metropolised_stay(seed: int) -> None:
    x = torch.tensor([[0.3], [math.nan]])
    for sampler in (SAMPLERS["HMC"], SAMPLERS["ParallelTempering"]):
        out = sampler.sample(double_well, x, 8, seed=seed)
        assert out.info["nonfinite"].tolist() == [False, True]
        assert float(out.state[0]) != float(x[0]) and bool(out.state[1].isnan().all())


x0 = torch.zeros(4, 3)
ERRORS: dict[str, tuple[Any, type[Exception], str]] = {
    "step_size": (lambda: Underdamped(-0.1), ValueError, "step_size must be finite and at least 0"),
    "friction": (lambda: Underdamped(0.1, friction="a"), TypeError, "friction must be a number"),
    "mass": (lambda: HMC(0.1, mass=0.0), ValueError, "mass must be finite and above 0"),
    "mass of a key": (lambda: HMC({"a": None}), TypeError, "step_size must be a number"),
    "leapfrog_steps": (lambda: HMC(0.1, 0), ValueError, "leapfrog_steps must be an int of at least 1, got 0"),
    "adapt": (lambda: HMC(0.1, adapt=1.5), TypeError, "adapt must be an int"),
    "adapt_over": (lambda: HMC(0.1, adapt_over="x"), ValueError, "adapt_over must be one of"),  # type: ignore[arg-type]
    "target_accept": (lambda: HMC(0.1, target_accept=1.0), ValueError, "target_accept must be a number between"),
    "temperature per key": (lambda: HMC(0.1, temperature={"a": 1.0}), TypeError, "temperature must be a number or one"),
    "temperature per element": (
        lambda: HMC(0.1, temperature=torch.ones(1, 3)).sample(double_well, x0, 1),
        ValueError,
        r"temperature must be a number or one per chain \(4,\)",
    ),
    "log_prob and score": (lambda: Underdamped(0.1, log_prob=True, score=True), ValueError, "log_prob=True or score"),
    "ladder down": (lambda: ParallelTempering(0.1, (2.0, 1.0)), ValueError, "temperatures must be increasing"),
    "ladder of zero": (lambda: ParallelTempering(0.1, (0.0, 1.0)), ValueError, "temperatures must be increasing, pos"),
    "no ladder": (lambda: ParallelTempering(0.1, 2.0), TypeError, "temperatures must be a sequence"),  # type: ignore
    "words": (lambda: ParallelTempering(0.1, ("a",)), TypeError, "temperatures must be a sequence"),  # type: ignore
    "sizes": (lambda: ParallelTempering([0.1], (1.0, 2.0)), ValueError, r"step_size must be a number or one per temp"),
    "size 0": (lambda: ParallelTempering([0.1, 0.0], (1.0, 2.0)), ValueError, "step_size must be finite and above 0"),
    "no size": (lambda: ParallelTempering(None, (1.0, 2.0)), TypeError, "step_size must be a number"),
    "energy": (lambda: HMC(0.1).sample(3, x0, 1), TypeError, "energy must be callable, got int"),  # type: ignore
    "half": (lambda: HMC(0.1).sample(double_well, x0.half(), 1), TypeError, "state.0. must be float32 or float64"),
    "steps": (lambda: Underdamped(0.1).sample(double_well, x0, -1), ValueError, "steps must be an int of at least 0"),
    "args": (lambda: Underdamped(0.1).sample(double_well, x0, 1, args=x0), TypeError, "args must be a list or tuple"),
    "record": (lambda: HMC(0.1).sample(double_well, x0, 1, record=("grad_norm",)), ValueError, "record must be a coll"),
    "seeds": (lambda: HMC(0.1).sample(double_well, x0, 1, seed=1, generator=torch.Generator()), ValueError, "not both"),
    "key": (lambda: HMC({"a": 0.1}).sample(double_well, x0, 1), ValueError, r"step_size names \['a'\]"),
    "scalar": (lambda: HMC(0.1).sample(lambda x: x.sum(), x0, 1), ValueError, "HMC needs one energy per chain"),
    "scalar of a ladder": (
        lambda: ParallelTempering(0.1, [1.0]).sample(lambda x: x.sum(), x0, 1),
        ValueError,
        "ParallelTempering needs one energy per chain",
    ),
    "no state in it": (lambda: HMC(0.1).sample(lambda x: torch.zeros(4), x0, 1), ValueError, "must depend on the"),
    "no tensor": (lambda: HMC(0.1).sample(lambda x: 0.0, x0, 1), TypeError, "energy must return a tensor, got float"),
    "chains": (lambda: HMC(0.1).sample(lambda x: x[:2].sum(1), x0, 1), ValueError, "one value per chain"),
    "velocity": (
        lambda: Underdamped(0.1).sample(double_well, x0, 1, velocity=x0[:2]),
        ValueError,
        "velocity.0. must be like the state",
    ),
    "velocity's keys": (
        lambda: Underdamped(0.1).sample(double_well, x0, 1, velocity={"a": x0}),
        ValueError,
        "velocity must have the state's keys",
    ),
    "ladder's shape": (
        lambda: ParallelTempering(0.1, (1.0, 2.0)).sample(double_well, x0, 1, ladder=x0),
        ValueError,
        r"ladder\[0\] must be \(4, 2, 3\)",
    ),
    "first step on a device": (
        lambda: ParallelTempering(0.1, (1.0,)).sample(double_well, x0, 1, first_step=torch.tensor(1)),
        ValueError,
        "first_step must be an int",
    ),  # type: ignore
    "adaptation unasked": (lambda: HMC(0.1).sample(double_well, x0, 1, adaptation={}), ValueError, "adapt above 0"),
    "adaptation": (
        lambda: HMC(0.1, adapt=3).sample(double_well, x0, 1, adaptation={}),
        ValueError,
        r"adaptation\['log_scale'\] must be a tensor",
    ),
    "score's energy": (
        lambda: Underdamped(0.1, score=True).sample(lambda x: -x, x0, 1, record=("energy",)),
        ValueError,
        "with score=True there is none",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_argument(case: str) -> None:
    make, error, message = ERRORS[case]
    with pytest.raises(error, match=message):
        make()


def test_underdamped_takes_scores_and_scalars(seed: int) -> None:
    x = state(seed)["b"]
    sampler = Underdamped(0.3)
    wanted = sampler.sample(lambda x: 0.5 * x.square().sum(1), x, 4, seed=seed).state
    torch.testing.assert_close(sampler.replace(score=True).sample(lambda x: -x, x, 4, seed=seed).state, wanted)
    scalar = sampler.sample(lambda x: 0.5 * x.square().sum(), x, 4, seed=seed, record=("energy",))
    torch.testing.assert_close(scalar.state, wanted)
    assert scalar.trace["energy"].shape == (4,)
