"""Progress and callbacks: called where they say, bits unchanged, and a chain that is ended there."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import mmebm

STEPS = 12
SAMPLERS = {
    "langevin": mmebm.Langevin(0.05),
    "mala": mmebm.MALA(0.05),
    "hmc": mmebm.HMC(0.1, leapfrog_steps=2, adapt=5),
    "underdamped": mmebm.Underdamped(0.1, friction=1.0),
    "tempering": mmebm.ParallelTempering(0.05, [1.0, 2.0]),
}


def quadratic(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * (x - 1).square().sum(1)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 1))


def same(a: Any, b: Any) -> bool:
    return torch.equal(torch.as_tensor(a).nan_to_num(9e9), torch.as_tensor(b).nan_to_num(9e9))


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("thin", [None, 1, 4])
def test_a_watched_chain_is_the_same_chain(name: str, thin: int | None) -> None:
    sampler, x = SAMPLERS[name], torch.zeros(4, 3)
    options: dict[str, Any] = {"seed": 0, "thin": thin, "record": ("energy",)}
    plain = sampler.sample(quadratic, x, STEPS, **options)
    seen: list[tuple[int, torch.Tensor]] = []
    out = sampler.sample(
        quadratic, x, STEPS, callback=lambda step, state: seen.append((step, state.clone())), **options
    )
    every = thin or 1  # a hundred times would be less than once a step
    assert [step for step, _ in seen] == list(range(every, STEPS + 1, every))
    assert same(out.state, plain.state) and same(out.trace["energy"], plain.trace["energy"])
    assert same(seen[-1][1], plain.state) and out.info["steps"] == STEPS
    if thin:
        assert all(same(state, kept) for (_, state), kept in zip(seen, plain.trajectory, strict=True))
    for key in ("acceptance", "never_accepted", "velocity", "ladder"):
        assert (key in plain.info) == (key in out.info) and same(plain.info.get(key, 0), out.info.get(key, 0))


@pytest.mark.parametrize("name", [*SAMPLERS, "fused"])
def test_true_ends_the_chain_there(name: str) -> None:
    sampler, energy = SAMPLERS.get(name, mmebm.Langevin(0.05)), mlp() if name == "fused" else quadratic
    options: dict[str, Any] = {"seed": 0, "thin": 2, "record": ("energy",)}
    x = torch.zeros(4, 3)
    out = sampler.sample(energy, x, STEPS, callback=lambda step, state: step >= 6, **options)
    short = sampler.sample(energy, x, 6, **options)
    assert same(out.state, short.state) and same(out.trajectory, short.trajectory) and len(out.trajectory) == 3
    assert same(out.trace["energy"], short.trace["energy"]) and len(out.trace["energy"]) == 6
    assert out.info["steps"] == 6 and out.info["next_step"] == 6 and same(out.info["nonfinite"], torch.zeros(4) > 0)


def test_a_fused_chain_stays_fused(need: Any) -> None:
    need("cpp")
    sampler, x, energy = mmebm.Langevin(0.05), torch.zeros(4, 3), mlp()
    seen: list[int] = []
    out = sampler.sample(energy, x, 1000, seed=0, callback=lambda step, state: seen.append(step))
    assert out.info["op"] == "langevin_mlp" and seen == list(range(10, 1001, 10))
    assert same(out.state, sampler.sample(energy, x, 1000, seed=0).state)


def test_a_dict_is_seen_as_a_dict() -> None:
    state = {"a": torch.zeros(4, 2), "b": torch.ones(4, 1)}
    seen: list[Any] = []
    mmebm.Langevin(0.1).sample(
        lambda s: s["a"].square().sum(1) + s["b"].square().sum(1),
        state,
        3,
        observed={"b"},
        seed=0,
        callback=lambda step, s: seen.append(s),
    )
    assert all(list(s) == ["a", "b"] and torch.equal(s["b"], state["b"]) for s in seen)


@pytest.mark.parametrize("name", [*SAMPLERS, "fused", "alone"])
def test_a_state_that_was_seen_may_be_kept_and_written_to(name: str) -> None:
    """It is a copy: the chain goes on in the memory of its own."""
    sampler = mmebm.Langevin(0.05, backend="torch") if name == "alone" else SAMPLERS.get(name, mmebm.Langevin(0.05))
    energy, x = mlp() if name == "fused" else quadratic, torch.zeros(4, 3)
    seen: list[torch.Tensor] = []
    out = sampler.sample(energy, x, 5, seed=0, thin=1, callback=lambda step, state: seen.append(state))
    assert same(torch.stack(seen), out.trajectory)

    def spoil(step: int, state: torch.Tensor) -> None:
        state.zero_()

    assert same(sampler.sample(energy, x, 5, seed=0, thin=1, callback=spoil).trajectory, out.trajectory)


def test_progress_is_lines_without_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    mmebm.HMC(0.1).sample(quadratic, torch.zeros(4, 3), 300, seed=0, progress=True)
    out, err = capsys.readouterr()
    assert out == "" and "\r" not in err and err.splitlines()[-1].startswith("step 300 of 300 (100%), ")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with pytest.raises(ZeroDivisionError):
        mmebm.Langevin(0.1).sample(
            quadratic, torch.zeros(4, 3), 50, progress=True, callback=lambda step, state: 1 / (step < 20) < 0
        )
    mmebm.Langevin(0.1).sample(quadratic, torch.zeros(4, 3), 50, progress=True)
    err = capsys.readouterr().err
    assert err.startswith("\rstep") and err.endswith("\n")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"callback": 3}, "callback must be a function of the number of steps and the state, got 3"),
        ({"progress": "yes"}, "progress must be True or False"),
        ({"progress": True, "differentiable": 1}, "progress and callback go without differentiable and chunk_size"),
        ({"progress": True, "chunk_size": 2}, "progress and callback go without differentiable and chunk_size"),
    ],
)
def test_what_cannot_be_watched_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        mmebm.Langevin(0.1).sample(quadratic, torch.zeros(4, 3), 3, **options)


@pytest.mark.parametrize("name", [*SAMPLERS, "descent"])
def test_a_callback_changes_the_energy_for_the_next_step(name: str, seed: int) -> None:
    """Recorded is the energy of the state before each step, by the weights of then."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 1), nn.Flatten(0))
    sampler: Any = mmebm.Langevin(0.05, accept="descent") if name == "descent" else SAMPLERS[name]
    x, wanted = torch.randn(7, 3), []

    def callback(done: int, state: torch.Tensor) -> None:
        with torch.no_grad():
            net[0].weight.mul_(-1.5 if done % 2 == 0 else 1.0)
            wanted.append(net(state))

    wanted.append(net(x).detach())
    out = sampler.sample(net, x, 6, seed=seed, thin=1, record=("energy",), callback=callback)
    for k in range(6):
        found = out.trace["energy"][k].reshape(7, -1)[:, 0]  # of tempering that of the coldest replica
        torch.testing.assert_close(found, wanted[k], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "layer", [lambda: nn.Linear(3, 8), lambda: nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 8, 3))]
)
@pytest.mark.parametrize("freeze", [False, True])
def test_an_energy_that_is_not_fused_any_more(layer: Any, freeze: bool, seed: int, need: Any) -> None:
    """The steps so far stay, by the energy of then, and nobody is called twice."""
    need("cpp")
    x, runs = torch.randn(7, 3), []
    for backend in ("auto", "torch"):
        torch.manual_seed(seed)
        net = nn.Sequential(layer(), nn.Flatten(1), nn.SiLU(), nn.Linear(8, 1), nn.Flatten(0))
        calls: list[int] = []

        def callback(done: int, state: torch.Tensor, net: Any = net, calls: Any = calls) -> bool:
            calls.append(done)
            if done == 6:
                net[2].register_forward_hook(lambda module, inputs, output: -2.0 * output)
            return done == 14

        sampler = mmebm.Langevin(
            mmebm.schedules.linear(0.1, 0.01, 20), 0.05, backend=backend, on_nonfinite="freeze" if freeze else "warn"
        )
        out = sampler.sample(
            net, x, 20, seed=seed, first_step=3, thin=2, record=("energy", "grad_norm"), callback=callback
        )
        runs.append((out, calls))
    (ours, called), (loop, wanted) = runs
    assert "a step at a time from step 6 on" in ours.info["reason"]
    assert called == wanted == [2, 4, 6, 8, 10, 12, 14]
    assert ours.info["steps"] == loop.info["steps"] == 14 and ours.info["next_step"] == loop.info["next_step"] == 17
    pairs = [(ours.state, loop.state), (ours.trajectory, loop.trajectory)]
    for one, two in [*pairs, *((ours.trace[name], loop.trace[name]) for name in ours.trace)]:
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_a_check_that_fails_on_the_way(need: Any) -> None:
    """What a callback was told of had been compared."""
    need("cpp")

    class Flat(nn.Module):
        """Its terms do not know that it never falls below a limit."""

        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 1))

        def mmebm_lowered(self, x: Any) -> Any:
            return self.net(x).squeeze(1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x).squeeze(1).clamp(min=limit)

    torch.manual_seed(0)
    net, x, runs = Flat(), torch.randn(7, 3), []
    limit = float(net.net(x).detach().min()) - 0.5
    for backend in ("auto", "torch"):
        calls: list[int] = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sampler = mmebm.Langevin(0.05, 0.0, backend=backend)
            out = sampler.sample(net, x, 400, thin=10, callback=lambda done, state, calls=calls: calls.append(done))
        runs.append((out, calls))
    (ours, called), (loop, wanted) = runs
    assert "in the middle of the chain" in ours.info["reason"] and "from step 0 on" not in ours.info["reason"]
    assert called == wanted
    torch.testing.assert_close(ours.trajectory, loop.trajectory, rtol=1e-5, atol=1e-5)
