"""Chains as CUDA graphs on a GPU: the loop bit for bit, fresh noise, weights in place, and what cannot be captured.

``python -m pytest -m gpu``; skipped with the reason where there is no CUDA device. The engine's logic is tested without
a GPU in tests/samplers/test_capture.py.
"""

from __future__ import annotations

import functools
import gc
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import mmebm
from mmebm import BackendError, Langevin, Samples, schedules
from mmebm.models import JointEnergy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: torch.cuda.is_available() is False"),
]
DEVICE = torch.device("cuda")
SHAPES = {"image": (3, 16, 16), "text": (20,)}


@pytest.fixture(autouse=True)
def repeatable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty cache, and convolutions whose sums do not depend on the order in which blocks finish."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    mmebm.capture.clear()
    yield
    mmebm.capture.clear()


def joint(seed: int) -> JointEnergy:
    torch.manual_seed(seed)
    return JointEnergy(SHAPES, net="conv", width=32, features=16).to(DEVICE)


def start(seed: int, batch: int = 8) -> dict[str, Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return {name: torch.randn(batch, *shape, device=DEVICE, generator=generator) for name, shape in SHAPES.items()}


def points(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape or (16, 5), device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(seed))


def quartic(x: Tensor) -> Tensor:
    return 0.25 * (x.square() - 1).square().sum(1)


def sampler(**options: Any) -> Langevin:
    return Langevin(**{"step_size": 0.05, "capture": True, **options})


def same(a: Samples, b: Samples) -> None:
    left, right = (
        [*tree_leaves(s.state), *tree_leaves(s.trajectory), *s.trace.values(), s.info["nonfinite"]] for s in (a, b)
    )
    for x, y in zip(left, right, strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y)


def check(s: Langevin, energy: Any, state: Any, steps: int, **options: Any) -> Samples:
    out = s.sample(energy, state, steps, **options)
    assert out.info["op"] == "langevin_graph", out.info["reason"]
    same(out, s.replace(capture=False).sample(energy, state, steps, **options))
    return out


OPTIONS = {
    "plain": ({}, {}),
    "everything": (
        {
            "bounds": (-2.0, 2.0),
            "grad_clip": 0.5,
            "grad_norm_clip": 0.7,
            "max_update": 0.3,
            "prior_std": 1.0,
            "on_nonfinite": "freeze",
        },
        {"record": ("energy", "grad_norm", "clipped", "displacement", "nonfinite"), "thin": 2},
    ),
    "before": ({"noise_at": "before", "noise_scale": 0.01, "bounds": (0.0, 1.0), "clamp_noise": True}, {}),
    "reject": ({"bounds": (-4.0, 4.0), "outside": "reject"}, {}),
    "descent": ({"accept": "descent"}, {"record": ("energy",)}),
    "schedule": ({"step_size": schedules.geometric(0.1, 0.01, 6)}, {}),
    "blocks": ({}, {"blocks": ["text", "image"]}),
}


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", OPTIONS)
def test_replays_equal_the_loop(name: str, backend: str, seed: int) -> None:
    """Convolutions, forward and backward, and the update: other seeds and states, one graph, the loop's bits."""
    options, call = OPTIONS[name]
    energy, s = joint(seed), sampler(backend=backend, **options)
    for i in range(3):
        out = check(s, energy, start(seed + i), 6, seed=seed + i, first_step=0 if name == "schedule" else i, **call)
        assert f"replay {i + 1} of a graph of 6 steps" in out.info["reason"]
    assert len(mmebm.capture.graphs()) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype, seed: int) -> None:
    for i in range(2):
        check(sampler(), quartic, points(seed + i).to(dtype), 5, seed=seed + i)


def test_noise_is_fresh(seed: int) -> None:
    """Each replay draws its own; a seed tensor on the device is read there."""
    s = sampler()
    a, b = (s.sample(quartic, points(0), 5).state for _ in range(2))
    assert not torch.equal(a, b)
    for i in range(2):
        check(s, quartic, points(0), 5, seed=torch.tensor([seed + i], device=DEVICE))
    assert len(mmebm.capture.graphs()) == 1


def test_auto_captures_the_second_call(seed: int) -> None:
    s = sampler(capture="auto")
    assert [s.sample(quartic, points(i), 5).info["op"] for i in range(3)] == ["langevin_step", *["langevin_graph"] * 2]


def test_weights_in_place_and_replaced(seed: int) -> None:
    """Adam's steps and load_state_dict are seen by the graph; a replaced tensor makes another."""
    energy, s = joint(seed), sampler()
    check(s, energy, start(seed), 5, seed=seed)
    adam = torch.optim.Adam(energy.parameters(), lr=0.05, fused=True)
    for _ in range(3):
        energy(start(seed)).sum().backward()
        adam.step()
        adam.zero_grad()
        check(s, energy, start(seed), 5, seed=seed)
    energy.load_state_dict(joint(seed + 1).state_dict())
    check(s, energy, start(seed), 5, seed=seed)
    assert len(mmebm.capture.graphs()) == 1
    first = next(m for m in energy.modules() if isinstance(m, nn.Conv2d))
    first.weight.data = torch.randn_like(first.weight)
    check(s, energy, start(seed), 5, seed=seed)
    first.weight = nn.Parameter(torch.randn_like(first.weight))
    check(s, energy, start(seed), 5, seed=seed)
    assert len(mmebm.capture.graphs()) == 3


def test_inputs_are_copied(seed: int) -> None:
    """Batches in args, a partial and masks at other addresses: one graph each; a number on the host is baked in."""
    keep: list[Any] = []

    def near(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        return quartic(x) + (weight * (x - target).square()).sum(1)

    weight = torch.tensor(0.5)  # on the host: kernels take it by value
    for i in range(3):
        batch, mask = points(seed + i), points(seed - i) > 0
        keep += [batch, mask]
        check(sampler(), near, points(0), 5, args=(batch, weight), observed=mask, seed=i)
        check(sampler(), functools.partial(near, target=batch, weight=weight), points(0), 5, seed=i)
        check(sampler(step_size=0.01 * (i + 1)), quartic, points(0), 5, seed=i)
        check(sampler(step_size=torch.rand(16) / 10), quartic, points(0), 5, seed=i)
    assert len(mmebm.capture.graphs()) == 4
    weight.fill_(2.0)
    check(sampler(), functools.partial(near, target=batch, weight=weight), points(0), 5, seed=1)
    assert len(mmebm.capture.graphs()) == 5


def item(x: Tensor) -> Tensor:
    return quartic(x) * (1.0 + float(x.detach().mean() > 0))


def from_the_host(x: Tensor) -> Tensor:
    return quartic(x) + (x * torch.ones(5).to(x.device)).sum(1)


def branch(x: Tensor) -> Tensor:
    return quartic(x) if x.detach().sum() > 0 else 2 * quartic(x)


def selecting(x: Tensor) -> Tensor:
    return quartic(x) + x[x > 0].sum() / 16


def waiting(x: Tensor) -> Tensor:
    torch.cuda.synchronize()  # no operation of torch's, so that only the capture itself finds it
    return quartic(x)


def host_noise(x: Tensor) -> Tensor:
    return quartic(x) * torch.rand(()).item()


@pytest.mark.parametrize("energy", [item, from_the_host, branch, selecting, waiting, host_noise])
def test_what_cannot_be_captured(energy: Any, seed: int) -> None:
    """The reason, the loop's result, the caller's stream as it was, and a GPU and a generator that go on working."""
    with pytest.raises(BackendError, match="capture=True: "):
        sampler().sample(energy, points(seed), 5)
    s, stream = sampler(capture="auto"), torch.cuda.current_stream()
    outs = []
    for _ in range(3):
        torch.manual_seed(seed)
        outs.append(s.sample(energy, points(seed), 5, seed=seed))
    assert outs[-1].info["op"] == "langevin_step" and not mmebm.capture.graphs()
    assert "test_capture_gpu.py:" in outs[-1].info["reason"] or energy is host_noise
    torch.manual_seed(seed)
    same(outs[-1], s.replace(capture=False).sample(energy, points(seed), 5, seed=seed))
    assert torch.cuda.current_stream() == stream and not torch.cuda.is_current_stream_capturing()
    assert torch.rand(64, device=DEVICE).std() > 0
    check(sampler(), quartic, points(seed), 5, seed=seed)
    torch.cuda.synchronize()


def test_eviction_frees_memory(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the bound the least recently used goes; cleared, all memory that the graphs held is given back."""
    monkeypatch.setattr(mmebm.capture, "cache_size", 2)
    x = points(seed, 4096, 1024)  # 16 MB
    # cuBLAS and the side stream keep what they took
    sampler().sample(quartic, x, 2)
    mmebm.capture.clear()
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    held = []
    for steps in (4, 5, 6, 7):
        sampler().sample(quartic, x, steps)
        gc.collect()
        torch.cuda.empty_cache()
        held.append(torch.cuda.memory_reserved() - before)
    assert [g.steps for g in mmebm.capture.graphs()] == [6, 7]
    assert held[0] > 0 and held[3] <= held[1] + x.nbytes
    mmebm.capture.clear()
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before


def test_a_dead_energy_takes_its_graph_along(seed: int) -> None:
    energy = joint(seed)
    sampler().sample(energy, start(seed), 3)
    assert len(mmebm.capture.graphs()) == 1
    del energy
    gc.collect()
    assert mmebm.capture.graphs() == []


def test_two_streams(seed: int) -> None:
    """Calls from two streams on one graph do not overtake each other."""
    s, x = sampler(), points(seed, 512, 256)
    wanted = [s.replace(capture=False).sample(quartic, x + i, 40, seed=i).state for i in range(8)]
    s.sample(quartic, x, 40)
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    found = []
    for i in range(8):
        with torch.cuda.stream(streams[i % 2]):
            found.append(s.sample(quartic, x + i, 40, seed=i).state)
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert len(mmebm.capture.graphs()) == 1


def test_other_threads_may_allocate_meanwhile(seed: int) -> None:
    """A capture does not forbid another thread's cudaMalloc, nor is it broken by it."""
    stop = threading.Event()
    failed: list[BaseException] = []

    def allocate() -> None:
        stream = torch.cuda.Stream()
        try:
            with torch.cuda.stream(stream):
                while not stop.is_set():
                    torch.empty(1 << 22, device=DEVICE).zero_()
                    stream.synchronize()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=allocate)
    thread.start()
    try:
        for steps in range(1, 7):
            check(sampler(), quartic, points(seed), steps, seed=seed)
    finally:
        stop.set()
        thread.join()
    assert not failed


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_under_grad_modes(around: Any, seed: int) -> None:
    energy, s = joint(seed), sampler()
    with around():
        out = s.sample(energy, start(seed), 4, seed=seed)
    same(out, s.replace(capture=False).sample(energy, start(seed), 4, seed=seed))
    check(s, energy, start(seed + 1), 4, seed=seed)
    assert len(mmebm.capture.graphs()) == 1


@pytest.mark.parametrize("own", [False, True], ids=["default generator", "own generator"])
def test_dropout_in_train_mode(own: bool, seed: int) -> None:
    """The device's random numbers go on from replay to replay as in the loop, those of a generator of one's own too."""
    generator = torch.Generator(DEVICE)
    layer, out = nn.Linear(5, 64).to(DEVICE), nn.Linear(64, 1).to(DEVICE)

    class Drop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.out, self.drop = layer, out, nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.layer(x))
            if own:
                return self.out(h * (torch.rand(h.shape, device=DEVICE, generator=generator) > 0.5))
            return self.out(self.drop(h))

    energy, found = Drop(), {}
    for capture in (True, False):
        torch.manual_seed(seed)
        generator.manual_seed(seed)
        s = sampler(mode="train", capture=capture)
        found[capture] = [s.sample(energy, points(0), 4, seed=5) for _ in range(3)]
    assert found[True][0].info["op"] == "langevin_graph", found[True][0].info["reason"]
    for a, b in zip(found[True], found[False], strict=True):
        same(a, b)
    assert not torch.equal(found[True][0].state, found[True][1].state)


def test_batch_statistics_in_train_mode(seed: int) -> None:
    """Written in place by the graph, and not once more by the warm-up."""
    found = []
    for capture in (True, False):
        torch.manual_seed(seed)
        energy = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1)).to(DEVICE)
        s = sampler(mode="train", capture=capture)
        states = [s.sample(energy, points(i), 4, seed=i).state for i in range(3)]
        found.append([*states, *(b.clone() for b in energy.buffers())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_spectral_norm_follows_its_weight(seed: int) -> None:
    """Parametrized weights are computed inside the graph, from the weights of the day."""
    energy, s = joint(seed), sampler()
    for m in energy.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            nn.utils.parametrizations.spectral_norm(m)
    for i in range(2):
        check(s, energy, start(seed), 4, seed=i)
        with torch.no_grad():
            for p in energy.parameters():
                p.mul_(1.5)
    assert len(mmebm.capture.graphs()) == 1


def test_autocast(seed: int) -> None:
    """A chain in bfloat16, with weights that autocast may have cast before; the states stay float32."""
    energy, s = joint(seed), sampler()
    with torch.autocast("cuda", torch.bfloat16):
        for i in range(2):
            energy(start(seed)).sum()
            check(s, energy, start(seed), 4, seed=i)
            with torch.no_grad():
                for p in energy.parameters():
                    p.mul_(1.1)
            torch.clear_autocast_cache()
    out = check(s, energy, start(seed), 4, seed=1)
    assert len(mmebm.capture.graphs()) == 2 and out.state["image"].dtype == torch.float32


def test_inside_the_users_graph(seed: int) -> None:
    """A chain in somebody's own capture is part of it, and reads a seed on the device."""
    s, x = sampler(capture="auto"), points(seed)
    seeds = torch.tensor(seed, device=DEVICE)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        s.replace(capture=False).sample(quartic, x, 3, seed=seeds)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = s.sample(quartic, x, 3, seed=seeds)
    assert "inside another capture" in out.info["reason"]
    for i in range(2):
        seeds.fill_(seed + i)
        graph.replay()
        assert torch.equal(out.state, s.replace(capture=False).sample(quartic, x, 3, seed=seed + i).state)
