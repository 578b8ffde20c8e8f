"""Several threads and one network: chains are right, trainings keep their gradients, and nothing stays changed."""

from __future__ import annotations

import copy
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from mmebm.samplers import HMC, Langevin, ParallelTempering, Underdamped
from mmebm.samplers.user_modules import _flags, sampling

SAMPLERS: dict[str, Any] = {
    "Langevin": Langevin(0.05),
    "loop": Langevin(0.05, backend="torch"),
    "MALA": Langevin(0.05, accept="metropolis"),
    "HMC": HMC(0.1, 2),
    "Underdamped": Underdamped(0.1),
    "ParallelTempering": ParallelTempering(0.05, (1.0, 2.0)),
}


@pytest.fixture(autouse=True)
def many_switches() -> Iterator[None]:
    """The interpreter changes threads every 10 microseconds, so that what can go wrong between them does."""
    before, threads = sys.getswitchinterval(), torch.get_num_threads()
    torch.set_num_threads(1)
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)
    torch.set_num_threads(threads)
    assert not _flags


def network() -> nn.Sequential:
    """In train mode but for one part, one parameter frozen; dropout, so that a chain in train mode is another."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(4, 16), nn.SiLU(), nn.Dropout(0.5), nn.Sequential(nn.Linear(16, 8), nn.Tanh()), nn.Linear(8, 1)
    )
    net.train()
    net[3].eval()
    net[0].bias.requires_grad_(False)
    return net


def flags(net: nn.Module) -> tuple[list[bool], list[bool], list[type]]:
    modules = list(net.modules())
    return [m.training for m in modules], [p.requires_grad for p in net.parameters()], [type(m) for m in modules]


def run(*functions: Callable[[], object]) -> None:
    """All at once, each in its thread; raises what one of them raised."""
    errors: list[BaseException] = []

    def guarded(function: Callable[[], object]) -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(function,), daemon=True) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads), "a thread waits for ever"
    if errors:
        raise errors[0]


@pytest.mark.parametrize("name", SAMPLERS)
def test_threads_sample_from_one_network(name: str) -> None:
    net, x = network(), torch.randn(5, 4)
    before = flags(net)
    sampler = SAMPLERS[name]
    energy = lambda x: net(x).squeeze(1) + 0.5 * x.square().sum(1)
    wanted = [sampler.sample(energy, x, 4, seed=i).state for i in range(4)]

    def chain(i: int) -> None:
        for _ in range(12):
            assert torch.equal(sampler.sample(energy, x, 4, seed=i).state, wanted[i])

    for _ in range(3):
        run(*(lambda i=i: chain(i) for i in range(4)))
        assert flags(net) == before


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("mode", ["eval", "keep"])
def test_one_thread_trains_what_another_samples(name: str, mode: Any) -> None:
    net, x = network(), torch.randn(5, 4)
    before = flags(net)
    sampler = SAMPLERS[name].replace(mode=mode)
    energy = lambda x: net(x).squeeze(1) + 0.5 * x.square().sum(1)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    moved = [p for p in net.parameters() if p.requires_grad]
    end = threading.Event()
    steps = [0]

    def train() -> None:
        try:
            while steps[0] < 60:
                optimizer.zero_grad()
                net(x).square().sum().backward()
                assert all(p.grad is not None for p in moved), f"no gradient in step {steps[0]}"
                optimizer.step()
                steps[0] += 1
        finally:
            end.set()

    def chains() -> None:
        while not end.is_set():
            assert bool(sampler.sample(energy, x, 5).state.isfinite().all())

    run(train, chains)
    assert steps == [60] and flags(net) == before
    assert all(p.grad is not None for p in moved)


def test_a_chain_leaves_other_threads_parametrized_weights_alone() -> None:
    """A training of one spectral-norm network beside chains of another: every step has its own graph."""
    trained, sampled = (
        nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 8)), nn.Tanh(), nn.Linear(8, 1)) for _ in range(2)
    )
    x, end, before = torch.randn(6, 4), threading.Event(), flags(sampled)

    def train(net: nn.Module) -> None:
        try:
            for _ in range(150):
                net.zero_grad()
                net(x).square().sum().backward()
                assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in net.parameters())
        finally:
            end.set()

    def chains() -> None:
        while not end.is_set():
            Langevin(0.05, backend="torch").sample(sampled, x, 20)

    run(lambda: train(trained), chains)
    end.clear()
    run(lambda: train(sampled), chains)  # and of the same one
    assert flags(sampled) == before


def test_a_copy_made_during_a_chain_is_a_plain_one() -> None:
    net = parametrizations.spectral_norm(nn.Linear(4, 1))
    copies: list[nn.Module] = []

    def energy(x: Tensor) -> Tensor:
        copies.append(copy.deepcopy(net))
        return net(x)

    Langevin(0.1, backend="torch").sample(energy, torch.randn(3, 4), 2)
    assert type(net.parametrizations.weight) is parametrize.ParametrizationList
    assert all(type(c.parametrizations.weight) is parametrize.ParametrizationList for c in copies)
    copies[0].train()
    copies[0](torch.randn(2, 4)).sum().backward()
    assert copies[0].parametrizations.weight.original.grad is not None


def test_chains_in_different_modes_take_turns() -> None:
    """eval, train and keep on one network: each chain is in its mode from its first to its last step."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    net[0].eval()
    x = torch.randn(3, 4)
    wanted = {"eval": (False, False), "train": (True, True), "keep": (False, True)}

    def chain(mode: Any) -> None:
        def energy(x: Tensor) -> Tensor:
            assert (net[0].training, net[1].training) == wanted[mode]
            return net(x)

        for _ in range(15):
            Langevin(0.1, mode=mode, backend="torch").sample(energy, x, 3)

    run(*(lambda mode=mode: chain(mode) for mode in (*wanted, *wanted)))
    assert (net[0].training, net[1].training) == (False, True)


def test_a_chain_inside_a_chain_has_its_own_mode_and_never_waits_for_ever() -> None:
    net, x = nn.Linear(2, 1), torch.randn(3, 2)
    seen: list[bool] = []

    def inner(x: Tensor) -> Tensor:
        seen.append(net.training)
        return net(x)

    def outer(x: Tensor) -> Tensor:
        seen.append(net.training)
        Langevin(0.1, mode="train").sample(inner, x.detach(), 1)
        seen.append(net.training)
        return net(x)

    Langevin(0.1).sample(outer, x, 1)
    assert seen == [False, True, False] and net.training

    entered, go = threading.Event(), threading.Event()

    def other() -> None:
        with sampling([net], "eval"):
            entered.set()
            go.wait(60)

    def nested() -> None:
        entered.wait(60)
        try:
            refused = pytest.raises(RuntimeError, match="inside another chain")
            with sampling([net], "eval"), refused, sampling([net], "train"):
                pass
        finally:
            go.set()

    run(other, nested)
    assert net.training


def test_who_trains_may_change_the_mode_meanwhile() -> None:
    net = nn.Linear(2, 1).eval()
    entered, go = threading.Event(), threading.Event()

    def chain() -> None:
        with sampling([net], "eval"):
            entered.set()
            go.wait(60)

    def trainer() -> None:
        entered.wait(60)
        net.train()
        go.set()

    run(chain, trainer)
    assert net.training


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_process_is_free_of_the_parents_other_threads() -> None:
    net = nn.Linear(2, 1)
    entered, go = threading.Event(), threading.Event()

    def hold() -> None:
        with sampling([net], "eval"):
            entered.set()
            go.wait(60)

    thread = threading.Thread(target=hold, daemon=True)
    thread.start()
    entered.wait(60)
    child = os.fork()
    if child == 0:
        right = net.training  # its own flag, as the chain of the other thread did not come along
        with sampling([net], "train"):
            right = right and net.training
        os._exit(0 if right and net.training and not _flags else 1)
    go.set()
    thread.join(60)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert net.training


class Interrupted(BaseException):
    pass


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers here")
@pytest.mark.parametrize("threads", [1, 2])
def test_interrupts_at_any_moment_leave_nothing_changed(
    seed: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Ctrl-C does, between any two instructions of a chain, its begin and its end included; with more threads only
    what this chain changed is put back."""
    monkeypatch.setattr("threading.active_count", lambda: threads)
    net = nn.Sequential(*(parametrizations.weight_norm(nn.Linear(2, 2)) for _ in range(6)), nn.Dropout(0.5))
    net[2].eval()
    before, x = flags(net), torch.randn(2, 2)
    sampler = Langevin(0.1, backend="torch")
    sampler.sample(net, x, 1)
    begin = time.perf_counter()
    sampler.sample(net, x, 1)
    longest = time.perf_counter() - begin
    delays = (torch.rand(150, generator=torch.Generator().manual_seed(seed)) * longest + 1e-6).tolist()
    caught = 0

    def handler(*_: object) -> None:
        raise Interrupted

    previous = signal.signal(signal.SIGALRM, handler)
    try:
        for delay in delays:
            try:
                signal.setitimer(signal.ITIMER_REAL, delay)
                try:
                    sampler.sample(net, x, 1)
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            except Interrupted:
                caught += 1
            assert flags(net) == before and not _flags
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert caught > 20


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers here")
@pytest.mark.parametrize(("chains", "threads"), [(1, 1), (40, 1), (5000, 1), (200, 2)])
def test_a_fused_chain_ends_soon_after_an_interrupt(chains: int, threads: int, need: Callable[[str], None]) -> None:
    """It looks for signals every 100 ms; the chain alone would take minutes."""
    need("cpp")
    torch.set_num_threads(threads)
    net = nn.Sequential(nn.Linear(64, 200), nn.SiLU(), nn.Linear(200, 200), nn.SiLU(), nn.Linear(200, 1))
    x, sampler = torch.randn(chains, 64), Langevin(1e-3, backend="cpp")
    assert sampler.sample(net, x, 2).info["op"] == "langevin_mlp"

    def handler(*_: object) -> None:
        raise Interrupted

    previous = signal.signal(signal.SIGALRM, handler)
    begin = time.perf_counter()
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(Interrupted):
            sampler.sample(net, x, 40_000_000 // chains)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    # 0.2 s to the signal and 0.1 s to the next look, on a machine that may be busy with ten times as much
    assert time.perf_counter() - begin < 5
    assert net.training and torch.equal(
        sampler.sample(net, x, 3, seed=1).state, sampler.sample(net, x, 3, seed=1).state
    )
