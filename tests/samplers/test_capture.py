"""Whole chains as graphs, without a GPU: the engine on a tape that does what a CUDA graph does.

:class:`Tape` records the operations under a chain and repeats them on the same tensors, so that what Python saw while
recording is baked in: numbers, shapes, branches. Reading a value on the host ends the recording, as in CUDA. So a
replay equals the loop only where the engine copies, keys and restores what it must. The same on a GPU is in
tests/samplers/test_capture_gpu.py.
"""

from __future__ import annotations

import functools
import gc
import math
import random
import threading
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mmebm
from mmebm import BackendError, Langevin, Samples, native, schedules
from mmebm.samplers import capture
from mmebm.samplers.capture import CannotCapture, Engine, brief
from mmebm.training.config import ChainConfig, Config, ModelConfig
from mmebm.training.system import System


class _Record(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        out = func(*args, **(kwargs or {}))
        self.ops.append((func, args, kwargs or {}, out))
        return out


def _storages(value: Any) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in tree_leaves(value) if isinstance(t, Tensor)}


class TapeGraph:
    """Operations and the tensors they were recorded with; outputs that are no views are written again in place."""

    def __init__(self, ops: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]], outputs: Any) -> None:
        self.ops, self.outputs, self.events, self.released = ops, outputs, [], False
        # a capture runs no kernel: nothing may rest on what recording has computed
        for _, args, kwargs, out in ops:
            for t in tree_leaves(out):
                if isinstance(t, Tensor) and t.is_floating_point() and not _storages(t) & _storages((args, kwargs)):
                    t.detach().fill_(torch.nan)

    def wait(self) -> None:
        self.events.append("wait")

    def replay(self) -> None:
        assert not self.released
        self.events.append("replay")
        with torch.no_grad():
            for func, args, kwargs, out in self.ops:
                again = func(*args, **kwargs)
                for new, old in zip(tree_leaves(again), tree_leaves(out), strict=True):
                    if isinstance(old, Tensor) and not _storages(old) & _storages((args, kwargs)):
                        old.detach().copy_(new)

    def done(self) -> None:
        self.events.append("done")

    def release(self) -> None:
        self.released = True


class Tape:
    """A backend of the engine on the CPU."""

    def __init__(self) -> None:
        self.captures = 0
        self.warm_ups = 0
        self.graphs: list[TapeGraph] = []
        self.recording = False

    def unsupported(self, device: torch.device) -> str | None:
        return None

    def capturing(self) -> bool:
        return self.recording

    def warm_up(self, device: Any, body: Callable[[], object], generators: Any) -> None:
        self.warm_ups += 1
        state = torch.get_rng_state()
        body()
        torch.set_rng_state(state)

    def capture(self, device: Any, body: Callable[[], Any], generators: Any) -> TapeGraph:
        self.captures += 1
        state, record = torch.get_rng_state(), _Record()
        self.recording = True
        before = [
            (t, t.detach().clone())
            for t in (p for g in gc.get_objects() if type(g) is BatchLinear for p in g.buffers())
        ]
        try:
            with record:
                outputs = body()
        except Exception as error:
            raise CannotCapture(brief(error)) from error
        finally:
            self.recording = False
            torch.set_rng_state(state)
            # recording has executed what a capture would not
            with torch.no_grad():
                for t, old in before:
                    t.copy_(old)
        self.graphs.append(TapeGraph(record.ops, outputs))
        return self.graphs[-1]

    def random(self, device: Any, generators: Any) -> list[Any]:
        return [torch.get_rng_state(), [(g, g.get_state()) for g in generators]]

    def restore_random(self, state: list[Any]) -> None:
        torch.set_rng_state(state[0])
        for generator, of in state[1]:
            generator.set_state(of)

    def host_random(self) -> tuple[Any, ...]:
        # torch's generator on the host is the device's here
        return (random.getstate(),)

    def restore_host_random(self, state: tuple[Any, ...]) -> None:
        random.setstate(state[0])


@pytest.fixture
def tape(monkeypatch: pytest.MonkeyPatch) -> Tape:
    backend = Tape()
    monkeypatch.setattr(capture, "_engine", Engine(backend))
    # nor what C++ does for tensors on the CPU, such as marking chains that are not finite
    monkeypatch.setattr(native, "loaded", lambda name: False)
    return backend


class BatchLinear(nn.Module):
    """A layer with running statistics, that writes to its buffers in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(x)).tanh().sum(1)


def net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))


def quartic(x: Tensor) -> Tensor:
    return 0.25 * (x.square() - 1).square().sum(1)


# backend="torch": the tape sees torch's operations only
def sampler(**options: Any) -> Langevin:
    return Langevin(**{"step_size": 0.05, "backend": "torch", "capture": True, **options})


def same(a: Samples, b: Samples) -> None:
    """Bit for bit, whatever was asked for."""
    left, right = (
        [*tree_leaves(s.state), *tree_leaves(s.trajectory), *s.trace.values(), s.info["nonfinite"]] for s in (a, b)
    )
    assert len(left) == len(right) and list(a.trace) == list(b.trace)
    for x, y in zip(left, right, strict=True):
        if isinstance(x, Tensor):
            assert x.dtype == y.dtype and torch.equal(torch.nan_to_num(x), torch.nan_to_num(y))
            assert torch.equal(x.isnan(), y.isnan())


def check(s: Langevin, energy: Any, state: Any, steps: int, **options: Any) -> Samples:
    """The captured chain is the loop's; returns it."""
    out = s.sample(energy, state, steps, **options)
    assert out.info["op"] == "langevin_graph", out.info["reason"]
    same(out, s.replace(capture=False).sample(energy, state, steps, **options))
    return out


def x0(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape or (6, 5), generator=torch.Generator().manual_seed(seed))


SETTINGS = {
    "plain": ({}, {}),
    "bounds": ({"bounds": (-1.0, 1.0), "grad_clip": 0.5, "max_update": 0.3, "prior_std": 2.0}, {}),
    "norm clip": ({"grad_norm_clip": 0.7}, {"record": ("energy", "grad_norm", "clipped", "displacement")}),
    "before": ({"noise_at": "before", "noise_scale": 0.01, "bounds": (0.0, 1.0), "clamp_noise": True}, {}),
    "end": ({"bounds": (-0.5, 0.5), "bounds_at": "end"}, {"thin": 2}),
    "reject": ({"bounds": (-2.0, 2.0), "outside": "reject"}, {"record": ("nonfinite",)}),
    "descent": ({"accept": "descent"}, {"record": ("energy", "displacement")}),
    "metropolis": ({"accept": "metropolis"}, {"record": ("energy", "accepted")}),
    "project": ({"project": lambda x: x / x.norm(dim=1, keepdim=True)}, {}),
    "freeze": ({"on_nonfinite": "freeze"}, {"thin": 1}),
    "schedule": ({"step_size": schedules.geometric(0.1, 0.01, 5), "temperature": schedules.linear(1.0, 0.5, 5)}, {}),
    "clip schedule": ({"grad_clip": schedules.linear(1.0, 0.1, 5)}, {}),
    "train": ({"mode": "train"}, {}),
    "no noise": ({"noise_scale": 0.0}, {}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_replays_equal_the_loop(name: str, tape: Tape, seed: int) -> None:
    """Three calls with other seeds, states and first steps: one graph, and each time the loop's result bit for bit."""
    options, call = SETTINGS[name]
    s, energy = sampler(**options), net(seed)
    first_step = 0 if "schedule" in name else 7
    for i in range(3):
        out = check(s, energy, x0(seed + i), 5, seed=seed * 3 + i, first_step=i * first_step, **call)
        assert f"captured: replay {i + 1} of a graph of 5 steps" in out.info["reason"]
    assert (tape.captures, tape.warm_ups) == (1, 1)
    # one more, which is compared with the loop
    assert tape.graphs[0].events == ["wait", "replay", "done"] * 4


def test_other_structures(tape: Tape, seed: int) -> None:
    """A dict with a mask and blocks, a tuple of dtypes, a tensor seed and first step: copied, not baked in."""

    def energy(x: dict[str, Tensor]) -> Tensor:
        return quartic(x["a"]) + 0.1 * (x["a"].sum(1) - x["b"].flatten(1).sum(1)).square()

    for i in range(3):
        state = {"a": x0(seed + i), "b": x0(seed + i + 9, 6, 2, 3)}
        mask = x0(seed + 5 * i, 6, 5) > 0
        check(
            sampler(step_size={"a": 0.02, "b": 0.01 * (i + 1)}),
            energy,
            state,
            4,
            seed=torch.tensor(seed + i),
            first_step=torch.tensor([i]),
            observed={"a": mask},
            blocks=["b", "a"],
        )
    assert tape.captures == 1

    def pair(x: tuple[Tensor, Tensor]) -> Tensor:
        return quartic(x[0]).double() + quartic(x[1])

    for i in range(2):
        check(sampler(), pair, (x0(seed + i), x0(seed - i).double()), 3, seed=i)
    for i in range(2):
        check(sampler(), quartic, x0(seed + i).to(torch.bfloat16), 3, seed=i)
    assert tape.captures == 3


def test_numbers_that_change(tape: Tape, seed: int) -> None:
    """Step size and noise are read from memory; a tensor setting is copied; a clip is baked in and makes a graph."""
    for i in range(3):
        check(sampler(step_size=0.01 * (i + 1), noise_scale=0.1 / (i + 1)), quartic, x0(seed), 3, seed=seed)
    assert tape.captures == 1
    for i in range(3):
        check(sampler(step_size=torch.rand(6) / 10, prior_std=torch.tensor(2.0 + i)), quartic, x0(seed), 3, seed=seed)
    assert tape.captures == 2
    for i in range(3):
        check(sampler(grad_clip=0.1 * (i + 1)), quartic, x0(seed), 3, seed=seed)
    assert tape.captures == 5


def test_noise_is_fresh(tape: Tape, seed: int) -> None:
    """Without a seed each replay draws its own, from torch's generator as the loop does."""
    s = sampler()
    a, b = (s.sample(quartic, x0(seed), 3).state for _ in range(2))
    assert not torch.equal(a, b)
    torch.manual_seed(seed)
    c = s.sample(quartic, x0(seed), 3)
    torch.manual_seed(seed)
    same(c, s.replace(capture=False).sample(quartic, x0(seed), 3))
    assert tape.captures == 1


def test_results_are_copies(tape: Tape, seed: int) -> None:
    """What a call returned stays as it was at the next replay, and belongs to no graph."""
    s = sampler(on_nonfinite="freeze")
    out = s.sample(quartic, x0(seed), 3, thin=1, record=("energy",), seed=seed)
    tensors = [*tree_leaves(out.state), *tree_leaves(out.trajectory), *out.trace.values()]
    kept = [t.clone() for t in tensors]
    start = x0(seed + 1)
    given = start.clone()
    s.sample(quartic, start, 3, thin=1, record=("energy",), seed=seed + 1)
    assert all(torch.equal(a, b) for a, b in zip(tensors, kept, strict=True)) and torch.equal(start, given)
    graph = tape.graphs[0].outputs
    assert not _storages(tensors) & _storages([graph.state, list(graph.trace.values()), graph.trajectory])


def test_auto_waits_for_the_second_call(tape: Tape, seed: int) -> None:
    """One call pays for no capture; another shape is another first call."""
    s = sampler(capture="auto")
    ops = [s.sample(quartic, x0(seed), 3, seed=i).info["op"] for i in range(3)]
    assert ops == ["langevin_step", "langevin_graph", "langevin_graph"]
    out = s.sample(quartic, x0(seed, 7, 5), 3)
    assert out.info["op"] == "langevin_step" and "the first call of its kind" in out.info["reason"]
    assert tape.captures == 1


def test_weights_are_read_in_place(tape: Tape, seed: int) -> None:
    """An optimiser's step and load_state_dict keep the graph; a replaced parameter makes another."""
    energy, s = net(seed), sampler()
    check(s, energy, x0(seed), 4, seed=seed)
    optimiser = torch.optim.SGD(energy.parameters(), lr=0.5)
    energy(x0(seed)).sum().backward()
    optimiser.step()
    check(s, energy, x0(seed), 4, seed=seed)
    energy.load_state_dict(net(seed + 1).state_dict())
    check(s, energy, x0(seed), 4, seed=seed)
    assert tape.captures == 1
    layer = energy[0]
    assert isinstance(layer, nn.Linear)
    layer.weight.data = torch.randn_like(layer.weight)
    check(s, energy, x0(seed), 4, seed=seed)
    assert tape.captures == 2
    layer.weight = nn.Parameter(torch.randn_like(layer.weight))
    check(s, energy, x0(seed), 4, seed=seed)
    assert tape.captures == 3
    layer.weight.requires_grad_(False)  # frozen or not, a chain freezes it
    check(s, energy, x0(seed), 4, seed=seed)
    assert tape.captures == 3 and all(p.grad is None or p is not layer.weight for p in energy.parameters())


SCALE = 1.0


class Scaled:
    """A small object, made anew at each call, that sees a number of its own, one of its class and a global."""

    factor = 1.0

    def __init__(self, net: nn.Module, power: int) -> None:
        self.net, self.power = net, power

    def __call__(self, x: Tensor) -> Tensor:
        return SCALE * self.factor * self.net(x).squeeze(1) ** self.power


def test_what_the_code_sees_is_part_of_the_key(tape: Tape, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal objects share a graph; another field, class attribute, global, closure or function does not."""
    energy, s = net(seed), sampler()

    def run(e: Callable[[Tensor], Tensor]) -> int:
        check(s, e, x0(seed), 3, seed=seed)
        return tape.captures

    assert [run(Scaled(energy, 2)) for _ in range(2)] == [1, 1]
    assert run(Scaled(energy, 3)) == 2
    monkeypatch.setattr(Scaled, "factor", 2.0)
    assert run(Scaled(energy, 3)) == 3
    monkeypatch.setitem(globals(), "SCALE", 3.0)
    assert run(Scaled(energy, 3)) == 4
    assert [run(lambda x, b=b: b * quartic(x)) for b in (1.0, 1.0, 2.0)] == [5, 5, 6]
    assert run(lambda x, b=1.0: b * quartic(x) + 1) == 7

    def closing(power: float) -> Callable[[Tensor], Tensor]:
        class Power:
            def __call__(self, x: Tensor) -> Tensor:
                return quartic(x) ** power

        return Power()

    first, second = closing(1.5), closing(2.0)
    assert [run(first), run(second), run(first)] == [8, 9, 9]


@pytest.mark.parametrize("change", ["training", "hook", "flag"])
def test_modules_as_they_are(change: str, tape: Tape, seed: int) -> None:
    """With mode="keep" train and eval are two graphs; hooks and numbers in a module count always."""
    inner = BatchLinear()
    energy = nn.Sequential(inner)
    s = sampler(mode="keep" if change == "training" else "eval")
    energy.eval()
    check(s, energy, x0(seed), 3, seed=seed)
    if change == "training":
        energy.train()
    elif change == "hook":
        inner.layer.register_forward_hook(lambda *called: torch.mul(called[-1], 2))
    else:
        inner.norm.eps = 0.5
    out = s.sample(energy, x0(seed), 3, seed=seed)
    assert tape.captures == 2 and out.info["op"] == "langevin_graph"


@pytest.mark.parametrize("how", ["global hook", "function", "method", "mode"])
def test_who_watches_from_outside_sees_every_step(how: str, tape: Tape, seed: int) -> None:
    """Also where a graph is there already."""
    energy, s = net(seed), sampler(capture="auto")
    for _ in range(2):
        s.sample(energy, x0(seed), 3, seed=seed)
    assert tape.captures == 1
    seen: list[Any] = []
    plain = torch.tanh

    def counted(x: Tensor) -> Tensor:
        seen.append(x)
        return plain(x)

    class Counting(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.extend([func] * (func is plain))
            return func(*args, **(kwargs or {}))

    around: Any = {
        "global hook": lambda: register_module_forward_hook(lambda m, *_: seen.extend([m] * isinstance(m, nn.Tanh))),
        "function": lambda: mock.patch.object(torch, "tanh", counted),
        "method": lambda: mock.patch.object(nn.Tanh, "forward", lambda self, x: counted(x)),
        "mode": Counting,
    }[how]()
    with around:
        out = s.sample(energy, x0(seed), 3, seed=seed)
    assert len(seen) == 3 and out.info["op"] == "langevin_step"


def test_warm_up_leaves_no_trace(tape: Tape, seed: int) -> None:
    """Batch statistics and random numbers go on from where they were: as after as many chains in the loop."""
    buffers = []
    for how in (False, True):
        torch.manual_seed(seed)
        energy = BatchLinear()
        s = sampler(mode="train", capture=how)
        states = [s.sample(energy, x0(seed + i), 3, seed=i).state for i in range(3)]
        buffers.append([*(b.clone() for b in energy.buffers()), *states])
    assert tape.captures == 1
    assert all(torch.equal(a, b) for a, b in zip(*buffers, strict=True))


def test_dropout(tape: Tape, seed: int) -> None:
    """Random numbers of the device in the energy: the replay draws what the loop would."""
    energy = nn.Sequential(nn.Linear(5, 64), nn.Dropout(0.5), nn.Tanh(), nn.Linear(64, 1))
    out = {}
    for how in (True, False):
        torch.manual_seed(seed)
        s = sampler(mode="train", capture=how)
        out[how] = [s.sample(energy, x0(0), 3, seed=5) for _ in range(2)]
    for a, b in zip(out[True], out[False], strict=True):
        same(a, b)
    assert not torch.equal(out[True][0].state, out[True][1].state)


class Matched:
    """An energy of a batch, made anew for each, as the latent posterior in training is."""

    def __init__(self, net: nn.Module, batch: dict[str, Tensor]) -> None:
        self.net, self.batch = net, batch

    def __call__(self, x: Tensor) -> Tensor:
        return self.net(x).squeeze(1) + (x - self.batch["target"]).square().sum(1)

    def mmebm_parts(self) -> tuple[Any, tuple[Any, ...]]:
        return Matched, (self.net, self.batch)


def test_tensors_given_at_each_call(tape: Tape, seed: int) -> None:
    """In args, kwargs, a partial and ``mmebm_parts``: copied, so that another batch is the same graph."""
    energy, s = net(seed), sampler()

    def joined(x: Tensor, target: Tensor, *, extra: dict[str, Any]) -> Tensor:
        return energy(x).squeeze(1) + extra["weight"] * (x - target).square().sum(1) * extra["more"][0]

    keep = []  # so that no address comes back
    for i in range(3):
        batch = x0(seed + i, 6, 5)
        extra = {"weight": 0.5, "more": [torch.rand(6)]}
        keep += [batch, extra]
        check(s, joined, x0(seed), 3, seed=i, args=(batch,), kwargs={"extra": extra})
        check(s, functools.partial(joined, target=batch, extra=extra), x0(seed), 3, seed=i)
        check(s, Matched(energy, {"target": batch}), x0(seed), 3, seed=i)
    assert tape.captures == 3
    check(s, joined, x0(seed), 3, args=(batch,), kwargs={"extra": {**extra, "weight": 0.25}}, seed=1)
    assert tape.captures == 4
    noise = schedules.table(torch.linspace(0.1, 1, 3))
    for i in range(2):
        check(s, lambda x, level: level * quartic(x), x0(seed), 3, args=(noise,), seed=i)
    assert tape.captures == 5


def test_moving_tensors_are_left_to_the_loop(tape: Tape, seed: int) -> None:
    """A closure's tensor at another address is another graph; after four in vain "auto" says what would do."""
    s, keep = sampler(capture="auto"), []
    for i in range(6):
        target = x0(seed + i)
        keep.append(target)
        for _ in range(2):
            out = s.sample(lambda x, t=target: (x - t).square().sum(1), x0(seed), 2, seed=i)
    assert tape.captures == 4 and "args or kwargs" in out.info["reason"]


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return quartic(x) / self.calls


class Memo(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        self.last = quartic(x).detach()
        return quartic(x)


class Writing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.scale.mul_(0.5)
        return self.scale * quartic(x)


def branching(x: Tensor) -> Tensor:
    return quartic(x) * (2.0 if float(x.detach().sum()) > 0 else 1.0)


def selecting(x: Tensor) -> Tensor:
    return quartic(x) + x[x > 0].sum() / 6


def restless(x: Tensor) -> Tensor:
    """Reads a value only while it is recorded: what a warm-up does not show."""
    if getattr(capture._engine.backend, "recording", False):
        float(x.detach().sum())
    return quartic(x)


def host_noise(x: Tensor) -> Tensor:
    return quartic(x) * random.random()


@pytest.mark.parametrize(
    "energy, reason",
    [
        (branching, "the energy reads a value on the host (test_capture.py:"),
        (selecting, "selects by a mask, so that a shape depends on values (test_capture.py:"),
        (restless, "not permitted when stream is capturing (test_capture.py:"),
        (host_noise, "random numbers on the host"),
        (Writing(), "writes to a tensor of shape () that it holds"),
    ],
    ids=["branching", "selecting", "restless", "host noise", "writing"],
)
def test_falls_back_with_the_reason(energy: Any, reason: str, tape: Tape, seed: int) -> None:
    """The loop runs instead, and the failed attempt is not made again; capture=True raises the reason."""
    s = sampler(capture="auto", noise_scale=0.0)
    outs = [s.sample(energy, x0(seed), 3, seed=seed) for _ in range(4)]
    assert "the first call" in outs[0].info["reason"]
    for out in outs[1:]:
        assert out.info["op"] == "langevin_step" and reason in out.info["reason"]
    assert tape.warm_ups == 1 and not tape.graphs
    if energy is branching:
        same(outs[-1], s.replace(capture=False).sample(energy, x0(seed), 3, seed=seed))
    with pytest.raises(BackendError, match="capture=True: "):
        s.replace(capture=True).sample(energy, x0(seed), 3)


@pytest.mark.parametrize("make", [Counting, Memo])
def test_energies_that_change_themselves(make: type[nn.Module], tape: Tape, seed: int) -> None:
    """No call is like the one before, so that none is captured; asked for, the warm-up notices."""
    with pytest.raises(BackendError, match="the energy changes what it holds when it is called"):
        sampler().sample(make(), x0(seed), 3)
    s, energy = sampler(capture="auto"), make()
    outs = [s.sample(energy, x0(seed), 3) for _ in range(8)]
    assert not tape.captures and all(out.info["op"] == "langevin_step" for out in outs)
    # refused above by structure, or, where that differs, not two calls alike
    assert any(text in outs[-1].info["reason"] for text in ("changes what it holds", "differ from call to call"))


def test_host_random_numbers_are_put_back(tape: Tape, seed: int) -> None:
    """After the refused attempt the loop draws what it would have drawn."""
    found = []
    for how in (False, "auto"):
        random.seed(seed)
        s = sampler(capture=how)
        found.append([s.sample(host_noise, x0(seed), 3, seed=i).state for i in range(3)])
    assert tape.warm_ups == 1
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    "options, call, reason",
    [
        ({"rng": "torch"}, {}, "rng='torch'"),
        ({}, {"differentiable": 1}, "differentiable"),
        ({}, {"steps": 0}, "nothing to do"),
        ({}, {"state": torch.zeros(0, 5)}, "nothing to do"),
        ({"capture": False}, {}, "capture=False"),
    ],
    ids=["rng", "differentiable", "no steps", "no chains", "off"],
)
def test_options_without_capture(options: dict, call: dict, reason: str, tape: Tape, seed: int) -> None:
    given = {"state": x0(seed), "steps": 3, **call}
    for _ in range(2):
        out = sampler(**{"capture": "auto", **options}).sample(quartic, **given)
        assert reason in out.info["reason"] and out.info["op"] == "langevin_step"
    assert not tape.warm_ups


def test_on_the_cpu(seed: int) -> None:
    """The real engine: never captured here, and capture=True says why."""
    out = Langevin(0.1).sample(quartic, x0(seed), 2)
    assert "not captured: the state is on cpu" in out.info["reason"]
    with pytest.raises(BackendError, match="capture=True: the state is on cpu"):
        Langevin(0.1, capture=True).sample(quartic, x0(seed), 2)
    with pytest.raises(ValueError, match="capture must be one of"):
        Langevin(0.1, capture=1)  # type: ignore[arg-type]


def test_the_users_errors_are_the_loops(tape: Tape, seed: int) -> None:
    """What the energy raises comes out, flags are back, and nothing is remembered against it."""
    energy = BatchLinear().train()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        sampler().sample(energy, x0(seed, 6, 4), 3)
    assert energy.training and all(p.requires_grad for p in energy.parameters())
    with pytest.raises(ValueError, match="must depend on the state"):
        sampler().sample(lambda x: torch.zeros(6), x0(seed), 3)
    check(sampler(), energy, x0(seed), 3, seed=seed)


def test_no_memory_for_a_capture(tape: Tape, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop alone may fit where it does not beside its copies."""

    def warm_up(*given: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(tape, "warm_up", warm_up)
    s = sampler(capture="auto")
    outs = [s.sample(quartic, x0(seed), 3, seed=seed) for _ in range(3)]
    assert all("no memory to warm up" in out.info["reason"] for out in outs[1:])
    same(outs[-1], s.replace(capture=False).sample(quartic, x0(seed), 3, seed=seed))


def test_objects_that_do_not_let_themselves_be_looked_at(tape: Tape, seed: int) -> None:
    """An energy that no key can hold is left to the loop."""

    class Comparable(type):
        def __eq__(cls, other: object) -> bool:
            return cls is other

    class Shy(metaclass=Comparable):
        def __call__(self, x: Tensor) -> Tensor:
            return quartic(x)

    out = sampler(capture="auto").sample(Shy(), x0(seed), 2)
    assert "cannot be told: TypeError: unhashable type" in out.info["reason"]


def test_least_recently_used_goes_first(tape: Tape, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmebm.capture, "cache_size", 2)
    s = sampler()
    for steps in (1, 2, 1, 3):
        s.sample(quartic, x0(seed), steps, seed=seed)
    assert [(g.steps, g.replays, g.state) for g in mmebm.capture.graphs()] == [(1, 2, ((6, 5),)), (3, 1, ((6, 5),))]
    assert [g.released for g in tape.graphs] == [False, True, False]
    mmebm.capture.clear()
    assert mmebm.capture.graphs() == [] and all(g.released for g in tape.graphs)
    check(s, quartic, x0(seed), 1, seed=seed)
    monkeypatch.setattr(mmebm.capture, "cache_size", 0)
    assert "cache_size is 0" in s.replace(capture="auto").sample(quartic, x0(seed), 1).info["reason"]
    monkeypatch.setattr(mmebm.capture, "cache_size", -1)
    with pytest.raises(ValueError, match=r"mmebm\.capture\.cache_size must be"):
        s.sample(quartic, x0(seed), 1)


def test_a_dead_energy_takes_its_graph_along(tape: Tape, seed: int) -> None:
    s, energy = sampler(), Memo()
    energy.forward = lambda x: quartic(x)  # type: ignore[method-assign]
    other = net(seed)
    s.sample(energy, x0(seed), 2)
    s.sample(other, x0(seed), 2)
    assert len(mmebm.capture.graphs()) == 2
    del energy
    gc.collect()
    assert [g.released for g in tape.graphs] == [True, False] and len(mmebm.capture.graphs()) == 1


def test_chunks(tape: Tape, seed: int) -> None:
    """A graph per chunk, as the first chain's index is baked in."""
    s = sampler()
    for i in range(2):
        check(s, quartic, x0(seed + i), 3, seed=i, chunk_size=4)
    assert tape.captures == 2


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_under_grad_modes(around: Any, tape: Tape, seed: int) -> None:
    """The tensors of a graph belong to no mode of the caller's."""
    energy, s = net(seed), sampler()
    with around():
        out = s.sample(energy, x0(seed), 3, seed=seed)
    same(out, s.replace(capture=False).sample(energy, x0(seed), 3, seed=seed))
    check(s, energy, x0(seed + 1), 3, seed=seed)
    assert tape.captures == 1 and not out.state.is_inference()


def test_autocast_is_part_of_the_key(tape: Tape, seed: int) -> None:
    """A chain in bfloat16 is another graph; weights cast before the graph, kept by autocast, are not in it."""
    weight = torch.randn(5, 4, requires_grad=True)

    def energy(x: Tensor) -> Tensor:
        return (x @ weight).tanh().float().sum(1)

    s = sampler()
    with torch.autocast("cpu", torch.bfloat16):
        check(s, energy, x0(seed), 3, seed=seed)
        energy(x0(seed))
        with torch.no_grad():
            weight.mul_(2.0)
        torch.clear_autocast_cache()
        check(s, energy, x0(seed), 3, seed=seed)
    check(s, energy, x0(seed), 3, seed=seed)
    assert tape.captures == 2 and torch.is_autocast_cache_enabled()


def test_several_threads(tape: Tape, seed: int) -> None:
    """Each gets its own result; one captures, the others run the loop meanwhile."""
    s, energy = sampler(capture="auto"), net(seed)
    starts = [x0(seed + i) for i in range(4)]
    wanted = [s.replace(capture=False).sample(energy, x, 3, seed=i).state for i, x in enumerate(starts)]
    found: list[list[Tensor]] = [[] for _ in starts]

    # modules have one set of flags: threads that share an energy must not sample it while another captures
    s.sample(energy, starts[0], 3, seed=0)
    s.sample(energy, starts[0], 3, seed=0)

    def work(i: int) -> None:
        for _ in range(5):
            found[i].append(s.sample(energy, starts[i], 3, seed=i).state)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for states, right in zip(found, wanted, strict=True):
        assert len(states) == 5 and all(torch.equal(state, right) for state in states)
    assert tape.captures == 1


@pytest.mark.parametrize("net", ["mlp", "conv"])
def test_an_iteration_of_training(net: Any, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """The data chain twice and the latent chain, other batches, weights and latent steps: a graph for each of the two,
    and in the end the weights of the loop."""
    shapes = {"image": (1, 8, 8), "word": (4,)}
    model = ModelConfig(
        latent=3, net=net, generator_width=4, inference_width=4, energy_width=8, energy_trunk_width=4, energy_features=8
    )
    config = Config(
        "test",
        model=model,
        backend="torch",
        data_chain=ChainConfig(steps=3, step=0.3, noise=0.01),
        latent_chain=ChainConfig(steps=2, step="auto"),
        batch=5,
    )
    found, tape, keep = [], Tape(), []
    for backend in (capture.CudaBackend(), tape):
        monkeypatch.setattr(capture, "_engine", Engine(backend))
        torch.manual_seed(seed)
        system = System(config, shapes)
        optimiser = torch.optim.Adam(system.parameters(), lr=1e-2)
        for i in range(5):
            # with a gradient of their own, so that the likelihood is plain PyTorch: on the CPU its op reads a value
            x = {name: torch.randn(5, *shape).requires_grad_() for name, shape in shapes.items()}
            keep.append(x)  # so that no address comes back
            system.latent_step.fill_(0.1 / (i + 1))
            z = system.revise_latent(torch.randn(5, 3), x, seed=i)
            fake = system.revise_data(system.generate(5, seed=i), seed=i)
            again = system.revise_data(system.generate(5, seed=i + 1), seed=i)
            loss = system.energy(x).mean() - system.energy(fake.state).mean() - system.energy(again.state).mean()
            loss = loss + system.generator.negative_log_likelihood(x, z.state).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        found.append([p.clone() for p in system.parameters()])
    assert tape.captures == 2 and [g.replays for g in mmebm.capture.graphs()] == [4, 9]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_inside_another_capture(tape: Tape, seed: int) -> None:
    """A chain inside an energy is part of the outer graph."""
    # on the CPU, which stands for a device here, "warn" would read whether chains are finite
    inner = sampler(capture="auto", noise_scale=0.0, on_nonfinite="ignore")

    def energy(x: Tensor) -> Tensor:
        near = inner.sample(quartic, x.detach(), 2, seed=0).state
        return quartic(x) + (x - near).square().sum(1)

    for i in range(3):
        check(sampler(), energy, x0(seed + i), 2, seed=i)
    tape.recording = True
    assert "inside another capture" in inner.sample(quartic, x0(seed), 2).info["reason"]


# -- the first replay is compared with the loop


class WrongGraph(TapeGraph):
    """A graph that replays a little else than was recorded."""

    def replay(self) -> None:
        super().replay()
        self.outputs.state[0].view(-1)[3] *= 1 + 1e-6


@pytest.mark.parametrize("asked", [True, "auto"])
def test_a_graph_that_differs_is_left_to_the_loop(
    asked: Any, tape: Tape, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.TapeGraph", WrongGraph)
    energy, x = BatchLinear().train(), x0(seed) + 1
    s = sampler(mode="keep", capture=asked)
    plain = s.replace(capture=False)
    wanted, before = [], energy.state_dict()
    before = {name: t.clone() for name, t in before.items()}
    for i in range(3):
        wanted.append(plain.sample(energy, x, 4, seed=i))
    buffers = {name: t.clone() for name, t in energy.state_dict().items()}
    energy.load_state_dict(before)
    random_state = torch.get_rng_state()
    if asked is True:
        with (
            pytest.warns(RuntimeWarning, match="a replay of the captured chain differs from the loop by"),
            pytest.raises(BackendError, match="capture=True: a replay of the captured chain differs"),
        ):
            s.sample(energy, x, 4, seed=0)
        for name, t in energy.state_dict().items():
            assert torch.equal(t, before[name]), name
    else:
        first = s.sample(energy, x, 4, seed=0)
        with pytest.warns(RuntimeWarning, match="differs from the loop") as caught:
            rest = [s.sample(energy, x, 4, seed=i) for i in (1, 2)]
        assert len(caught) == 1 and "differs from the loop" in rest[1].info["reason"]
        for out, expected in zip([first, *rest], wanted, strict=True):
            assert out.info["op"] == "langevin_step"
            same(out, expected)
        for name, t in energy.state_dict().items():
            assert torch.equal(t, buffers[name]), name
    assert torch.equal(torch.get_rng_state(), random_state)
    assert tape.captures == 1 and tape.graphs[0].released


@pytest.mark.parametrize(("spread", "taken"), [(1e-6, True), (1e-9, False), (0.0, False)])
def test_a_loop_that_does_not_repeat_itself(
    spread: float, taken: bool, tape: Tape, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where two runs of the loop differ, as sums on many threads may, a replay may differ as much."""
    distances = iter((1e-6, spread))
    monkeypatch.setattr(capture, "distance", lambda a, b: next(distances))
    if taken:
        assert sampler().sample(quartic, x0(seed), 3, seed=1).info["op"] == "langevin_graph"
    else:
        with pytest.warns(RuntimeWarning, match="two runs of the loop"), pytest.raises(BackendError):
            sampler().sample(quartic, x0(seed), 3, seed=1)


def test_distance() -> None:
    def run(*values: float, frozen: bool = False) -> capture.Run:
        t = torch.tensor(values)
        return capture.Run([t], {"energy": t.clone()}, [], torch.tensor([frozen]), {"backend": "torch", "reason": ""})

    assert capture.distance(run(1.0, math.nan), run(1.0, math.nan)) == 0.0
    assert capture.distance(run(1.0, 4.0), run(1.0, 2.0)) == 1.0
    assert capture.distance(run(1.0, math.nan), run(1.0, 2.0)) == math.inf
    assert capture.distance(run(1.0, frozen=True), run(1.0)) == math.inf
