"""Times the Langevin update on a GPU: Triton and CUDA C++ against eager PyTorch, torch.compile and a copy of the bytes.

    python benchmarks/gpu.py [--out FILE] [--quick] [--rehearse]

Every candidate does the same work on the same tensors: ``x <- clamp(x - a g + s xi)`` with fresh noise for every
tensor of the state. The floor is measured, not looked up: a device copy of as many bytes as the update has to move (x
in, g in, x out). Times are medians, with the 20th and 80th percentile, of CUDA events around batches of calls long
enough to hide the clock of the events; the first batches warm the device up and are dropped; the candidates take
turns, so that a slow change of the clocks meets all of them. The time a call takes on the host (nothing waited for)
and the first call (compilation) stand beside them. A candidate that gives a wrong result is reported with the error
instead of a time. Last come whole chains: on a convolutional energy by hand, in the library's loop, and captured; and
that of a latent prior, eager, compiled and in one launch of Triton or CUDA C++, each also as a replayed graph; and a
whole training iteration of five convolutional modalities, with the chains by hand and by the library.

Writes one JSON file with the device, driver, versions and commit, and ends in a table of what docs/kernels.md
predicts beside what was measured. ``--rehearse`` goes without a device: the same code on the CPU where the CPU can, a
round each, no time recorded.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, get_args

import torch
import triton

from mmebm import Langevin, Samples
from mmebm.kernels import langevin_mlp as mlp_room
from mmebm.kernels.langevin_step import TritonStepper
from mmebm.models import JointEnergy
from mmebm.ops.common.params import StepParams
from mmebm.ops.langevin_mlp import MlpChain, Precision, constants_of
from mmebm.ops.langevin_mlp import cuda as mlp_cuda_room
from mmebm.ops.langevin_mlp import run as run_in
from mmebm.ops.langevin_step import CudaStepper, StepOptions, TorchStepper
from mmebm.ops.terms import Scalar, Stack

ROOT = Path(__file__).resolve().parent.parent
DEVICE = torch.device("cuda")
A, S, LOW, HIGH = 0.01, 0.05, -4.0, 4.0

# name: shapes of the tensors of the state
STATES: dict[str, list[tuple[int, ...]]] = {
    "latent 100 x 64": [(100, 64)],
    "toy 100,000 x 2": [(100_000, 2)],
    "images 64 x 3 x 32 x 32": [(64, 3, 32, 32)],
    "images 256 x 3 x 64 x 64": [(256, 3, 64, 64)],
    "MNIST 128 x 784 + SVHN 128 x 3,072 + text 128 x 88": [(128, 784), (128, 3, 32, 32), (128, 88)],
    "PolyMNIST 5 x (128 x 3 x 28 x 28)": [(128, 3, 28, 28)] * 5,
    "faces 64 x 3 x 128 x 128 + attributes 64 x 40": [(64, 3, 128, 128), (64, 40)],
    "16M": [(1024, 16384)],
    "256M": [(4096, 65536)],
    "odd 1,024 x 16,381": [(1024, 16381)],
}
QUICK = ("latent 100 x 64", "images 64 x 3 x 32 x 32", "16M")

# What docs/kernels.md counts, and what a multiprocessor does (H100, H200): lanes a cycle, and cycles a second, a guess
# between the data sheet's clock and the highest
LANES, CLOCK = 128, 1.7e9
BANDWIDTH = 3.0e12  # bytes a second, of an H100's copy, where none was measured
# of an update, without statistics and norm clip: instructions an element
INSTRUCTIONS = {
    ("cuda", "float32"): 59,
    ("triton", "float32"): 57,
    ("cuda", "bfloat16"): 59,
    ("triton", "bfloat16"): 58,
}
# of the latent prior's chain: warp instructions of a block and step; a multiprocessor issues LANES / 32 a cycle
CHAIN_INSTRUCTIONS = {
    "cuda, fp32": 14_569,
    "cuda, tf32x3": 11_370,
    "cuda, bf16": 8_055,
    "triton, fp32": 18_916,
    "triton, tf32x3": 18_916,
    "triton, bf16": 11_980,
}


def shell(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown ({type(error).__name__})"


def wait() -> None:
    """For the device."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def environment() -> dict[str, object]:
    if DEVICE.type != "cuda":
        return {"device": "none (a rehearsal)", "multiprocessors": 132, "torch": torch.__version__}
    properties = torch.cuda.get_device_properties(DEVICE)
    return {
        "device": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "driver": shell("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": shell("git", "rev-parse", "HEAD"),
        "uncommitted_changes": bool(shell("git", "status", "--porcelain")),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def eager(x: list[torch.Tensor], g: list[torch.Tensor]) -> list[torch.Tensor]:
    """What a hand-written loop does, in place."""
    for xi, gi in zip(x, g, strict=True):
        xi.add_(gi, alpha=-A)
        xi.add_(torch.randn_like(xi), alpha=S)
        xi.clamp_(LOW, HIGH)
    return x


def compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False) if DEVICE.type == "cuda" else function


def candidates(shapes: list[tuple[int, ...]]) -> dict[str, Callable[[list[torch.Tensor], list[torch.Tensor]], object]]:
    count = len(shapes)
    params = [StepParams(step_size=A, noise_scale=S, low=LOW, high=HIGH)] * count
    options = StepOptions(seed=1, streams=tuple(range(count)), noisy=(True,) * count)
    stepper, small = TritonStepper(options), TritonStepper(options, tile=512)
    clipped = [StepParams(step_size=A, noise_scale=S, low=LOW, high=HIGH, grad_norm_clip=10.0)] * count

    def cuda(constants: list[StepParams], stats: bool) -> Callable[[list[torch.Tensor], list[torch.Tensor]], object]:
        made: list[CudaStepper] = []  # at the first call: where the extension is missing, the error is the result

        def step(x: list[torch.Tensor], g: list[torch.Tensor]) -> object:
            if not made:
                made.append(CudaStepper(options, x))
            return made[0].step(x, g, constants, 3, with_noise=True, stats=stats)

        return step

    return {
        "triton": lambda x, g: stepper.step(x, g, params, 3, with_noise=True, stats=False),
        "triton, one group a thread": lambda x, g: small.step(x, g, params, 3, with_noise=True, stats=False),
        "triton, statistics": lambda x, g: stepper.step(x, g, params, 3, with_noise=True, stats=True),
        "triton, norm clip": lambda x, g: stepper.step(x, g, clipped, 3, with_noise=True, stats=False),
        "cuda": cuda(params, False),
        "cuda, statistics": cuda(params, True),
        "cuda, norm clip": cuda(clipped, False),
        "eager": eager,
        "torch.compile": compiled(eager),
    }


def correct(name: str, call: Callable, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> str | None:
    """The reason why a candidate must not be timed, if there is one."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    x = [torch.randn(s, generator=generator, device=DEVICE).to(dtype) for s in shapes]
    g = [torch.randn(s, generator=generator, device=DEVICE).to(dtype) for s in shapes]
    out = [xi.clone() for xi in x]
    call(out, g)
    for xi, gi, oi in zip(x, g, out, strict=True):
        # the noise differs between generators: compare its moments; inner values only, as the clamp bends the tails
        inner = oi.float().abs() < 3
        xi32 = ((oi.float() - xi.float() + A * gi.float()) / S)[inner]
        if dtype == torch.float32 and xi.numel() > 10_000:
            mean, variance = xi32.mean().item(), xi32.var().item()
            if abs(mean) > 6 * xi32.numel() ** -0.5 or abs(variance - 1) > 12 * xi32.numel() ** -0.5 + 0.02:
                return f"noise of mean {mean:.4f}, variance {variance:.4f}"
        if not torch.isfinite(oi).all():
            return "not finite"
    if name in ("triton", "cuda") and dtype == torch.float32 and sum(xi.numel() for xi in x) <= 1 << 24:
        count = len(shapes)
        params = [StepParams(step_size=A, noise_scale=S, low=LOW, high=HIGH)] * count
        options = StepOptions(seed=1, streams=tuple(range(count)), noisy=(True,) * count)
        wanted, _ = TorchStepper(options).step(x, g, params, 3, with_noise=True, stats=False)
        worst = max((a - b).abs().max().item() for a, b in zip(out, wanted, strict=True))
        if worst > 4e-6:
            return f"differs from the reference by {worst}"
    return None


def batch_time(call: Callable[[], object], calls: int) -> float:
    """Seconds of device time a call, of one batch of ``calls``."""
    if DEVICE.type != "cuda":
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) * 1e-3 / calls


def graphed(call: Callable[[], object], calls: int) -> torch.cuda.CUDAGraph:
    if DEVICE.type != "cuda":
        raise RuntimeError("a rehearsal has no graphs")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    return graph


def summary(times: list[float]) -> dict[str, float]:
    times = sorted(times)
    return {
        "median_us": 1e6 * statistics.median(times),
        "p20_us": 1e6 * times[int(0.2 * (len(times) - 1))],
        "p80_us": 1e6 * times[int(0.8 * (len(times) - 1))],
    }


def host_time(call: Callable[[], object]) -> float:
    """Seconds the host spends on a call; the device is given time to keep up between batches."""
    times = []
    for _ in range(20):
        wait()
        start = time.perf_counter()
        for _ in range(10):
            call()
        times.append((time.perf_counter() - start) / 10)
    wait()
    return statistics.median(times)


def measure(shapes: list[tuple[int, ...]], dtype: torch.dtype, rounds: int) -> dict[str, object]:
    torch._dynamo.reset()
    elements = sum(torch.Size(s).numel() for s in shapes)
    # in, in, out
    moved = 3 * elements * dtype.itemsize
    x = [torch.randn(s, device=DEVICE).to(dtype) for s in shapes]
    g = [torch.randn(s, device=DEVICE).to(dtype) for s in shapes]
    # a copy reads and writes: half of the bytes each
    source = torch.zeros(moved // 2, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)

    calls: dict[str, Callable[[], object]] = {"copy of the same bytes": lambda: target.copy_(source)}
    out: dict[str, object] = {"elements": elements, "bytes": moved, "results": {}}
    results: dict[str, dict[str, object]] = {}
    for name, function in candidates(shapes).items():
        wait()
        start = time.perf_counter()
        try:
            function([xi.clone() for xi in x], g)
            wait()
            first = time.perf_counter() - start
            wrong = correct(name, function, shapes, dtype)
        except Exception as error:
            results[name] = {"error": f"{type(error).__name__}: {error}"[:500]}
            continue
        if wrong is not None:
            results[name] = {"error": wrong}
            continue
        results[name] = {"first_call_s": first}
        calls[name] = lambda function=function: function(x, g)

    # graphs take the host out of the measurement; a small state would else time Python
    many = max(1, min(50, int(2e8 // moved)))
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    for name, call in calls.items():
        results.setdefault(name, {})["host_us"] = 1e6 * host_time(call)
        try:
            graphs[name] = graphed(call, many)
        except Exception as error:
            wait()
            results[name]["graph_error"] = f"{type(error).__name__}: {error}"[:500]
    times: dict[str, list[float]] = {name: [] for name in calls}
    replayed: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in range(rounds + 3):
        for name, call in calls.items():
            t = batch_time(call, many)
            if turn >= 3:
                times[name].append(t)
        for name, graph in graphs.items():
            t = batch_time(graph.replay, 1) / many
            if turn >= 3:
                replayed[name].append(t)
    for name in calls:
        results[name]["loop"] = summary(times[name])
        if name in replayed:
            results[name]["graph"] = summary(replayed[name])
            results[name]["graph_gigabytes_per_s"] = moved / statistics.median(replayed[name]) * 1e-9
    out["results"] = results
    return out


class Chain:
    """30 steps on a convolutional energy of an image and a text vector, batch 64: what a replayed graph saves."""

    name, steps, batch = "conv joint energy, batch 64, 30 steps", 30, 64
    shapes: ClassVar[dict[str, tuple[int, ...]]] = {"image": (3, 32, 32), "text": (88,)}

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.energy = JointEnergy(self.shapes, net="conv").to(DEVICE)
        self.x = {name: torch.randn(self.batch, *shape, device=DEVICE) for name, shape in self.shapes.items()}
        self.loop = Langevin(A, S, bounds=(LOW, HIGH), capture=False)

    def by_hand(self) -> dict[str, torch.Tensor]:
        """The loop people write."""
        x = {name: t.clone() for name, t in self.x.items()}
        for _ in range(self.steps):
            for t in x.values():
                t.requires_grad_()
            grads = torch.autograd.grad(self.energy(x).sum(), list(x.values()))
            x = {name: t.detach() for name, t in x.items()}
            eager(list(x.values()), list(grads))
        return x

    def sampled(self, capture: bool) -> Samples:
        return self.loop.replace(capture=capture).sample(self.energy, self.x, self.steps, seed=1)

    def measure(self, rounds: int) -> dict[str, object]:
        calls: dict[str, Callable[[], object]] = {
            "by hand": self.by_hand,
            "loop": lambda: self.sampled(False),
            "captured": lambda: self.sampled(DEVICE.type == "cuda"),
        }
        start = time.perf_counter()
        replayed, wanted = self.sampled(DEVICE.type == "cuda"), self.sampled(False)
        wait()
        found: dict[str, object] = {"first_calls_s": time.perf_counter() - start, "reason": replayed.info["reason"]}
        if not all(torch.equal(replayed.state[name], wanted.state[name]) for name in self.shapes):
            return {**found, "error": "the captured chain differs from the loop"}
        times: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(rounds + 3):
            for name, call in calls.items():
                t = batch_time(call, 5)
                if turn >= 3:
                    times[name].append(t)
        return {**found, "results": {name: summary(t) for name, t in times.items()}}


class LatentChain:
    """The latent prior's chain, 100 x 64 on 64-200-200-1: what one launch saves over a captured loop of launches."""

    name, steps = "latent prior, 100 x 64 on 64-200-200-1, 60 steps", 60
    precisions: ClassVar[tuple[Precision, ...]] = get_args(Precision)

    def __init__(self) -> None:
        torch.manual_seed(0)
        sizes = [64, 200, 200, 1]
        layers = [torch.nn.Linear(i, o, device=DEVICE).requires_grad_(False) for i, o in pairwise(sizes)]
        self.net = torch.nn.Sequential(layers[0], torch.nn.SiLU(), layers[1], torch.nn.SiLU(), layers[2])
        stack = Stack.mlp(tuple(layer.weight for layer in layers), tuple(layer.bias for layer in layers), "silu")
        params = [[StepParams(step_size=A, noise_scale=S, prior_std=1.0)]]
        table = constants_of(params, 100, torch.float32, DEVICE)
        assert not isinstance(table, str)
        self.problems = {
            precision: MlpChain(
                terms=(Scalar(stack),),
                widths=(64,),
                streams=(0,),
                noisy=(True,),
                moving=(True,),
                constants=table[0],
                present=table[1],
                seed=1,
                precision=precision,
            )
            for precision in self.precisions
        }
        self.x = torch.randn(100, 64, device=DEVICE)
        self.compiled = compiled(self.step)

    def step(self, x: torch.Tensor) -> torch.Tensor:
        grad = torch.func.grad(lambda z: self.net(z).sum())(x)
        return x - A * (grad + x) + S * torch.randn_like(x)

    def loop(self, step: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        x = self.x
        for _ in range(self.steps):
            x = step(x)
        return x

    def torchebm(self) -> Callable[[], torch.Tensor]:
        core, samplers = import_module("torchebm.core"), import_module("torchebm.samplers")
        net = self.net

        class Model(core.BaseModel):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return net(x)[:, 0] + 0.5 * x.square().sum(1)

        relative = S / (2 * A) ** 0.5
        sampler = samplers.LangevinDynamics(Model(), step_size=A, noise_scale=relative, device=DEVICE)
        return lambda: sampler.sample(x=self.x, n_steps=self.steps)

    def measure(self, rounds: int) -> dict[str, object]:
        calls: dict[str, Callable[[], torch.Tensor]] = {
            "eager": lambda: self.loop(self.step),
            "torch.compile": lambda: self.loop(self.compiled),
        }
        if find_spec("torchebm") is not None:
            calls["torchebm"] = self.torchebm()
        found: dict[str, object] = {}
        wanted = run_in(None, self.problems["fp32"], self.x, 5, 0).x
        for precision, problem in self.problems.items():
            for name, room in (("triton", mlp_room), ("cuda", mlp_cuda_room)):
                reason = room.supports(problem, self.x)
                if reason is not None:
                    found[f"{name}, {precision}"] = {"error": reason}
                    continue
                off = (room.run(problem, self.x, 5, 0).x - wanted).abs().max().item()
                found[f"{name}, {precision}, off after 5 steps"] = off
                if off > (1e-3 if precision == "bf16" else 2e-5):
                    return {**found, "error": f"{name}, {precision}, differs from the reference by {off}"}
                calls[f"{name}, {precision}"] = lambda room=room, problem=problem: (
                    room.run(problem, self.x, self.steps, 0).x
                )
        # torchebm's loop waits for the device
        kept = [name for name in calls if name != "torchebm" and DEVICE.type == "cuda"]
        graphs = {f"{name}, in a graph": graphed(calls[name], 1).replay for name in kept}
        timed: dict[str, Callable[[], object]] = {**calls, **graphs}
        times: dict[str, list[float]] = {name: [] for name in timed}
        for turn in range(rounds + 3):
            for name, call in timed.items():
                t = batch_time(call, 5)
                if turn >= 3:
                    times[name].append(t)
        return {**found, "results": {name: summary(t) for name, t in times.items()}}


def training_iteration(rounds: int) -> dict[str, object]:
    """One iteration of `polymnist-5k`, convolutional, batch 128, against the same with every chain written by hand."""
    import bench_training_iteration as bench

    bench.gate("polymnist-5k", DEVICE)
    times: dict[str, list[float]] = {}
    for implementation in ("eager", "mmebm"):
        with bench.chains(implementation):
            one = bench.iterations("polymnist-5k", DEVICE)
            for turn in range(rounds + 3):
                started = time.perf_counter()
                one()
                if turn >= 3:
                    times.setdefault(implementation, []).append(time.perf_counter() - started)
    return {name: summary(t) for name, t in times.items()}


def table(case: str, found: dict) -> str:
    lines = [f"{case}: {found['elements']:,} elements, {found['bytes'] / 1e6:,.1f} MB moved"]
    for name, r in found["results"].items():
        if "error" in r:
            lines.append(f"  {name:28} {r['error']}")
            continue
        graph = r.get("graph", {}).get("median_us", float("nan"))
        rate = r.get("graph_gigabytes_per_s", float("nan"))
        lines.append(
            f"  {name:28} graph {graph:9.2f} us ({rate:7.0f} GB/s)   loop {r['loop']['median_us']:9.2f} us"
            f"   host {r['host_us']:7.2f} us"
        )
    return "\n".join(lines)


def predictions(report: dict[str, Any]) -> str:
    """A line for each time that docs/kernels.md says something about, and the peers beside them: microseconds."""
    issued = report["environment"]["multiprocessors"] * LANES * CLOCK
    rows: list[tuple[str, float | None, float | None]] = []

    def measured(result: dict[str, Any], *keys: str) -> float | None:
        for key in keys:
            result = result.get(key, {})
        return result.get("median_us")  # type: ignore[return-value]

    for case, found in report["cases"].items():
        results = found["results"]
        copy = measured(results["copy of the same bytes"], "graph")
        for room in ("cuda", "triton"):
            arithmetic = 1e6 * found["elements"] * INSTRUCTIONS[room, case.rpartition(", ")[2]] / issued
            memory = 1e6 * found["bytes"] / BANDWIDTH if copy is None else copy
            rows.append((f"{room}: {case}", max(memory, arithmetic), measured(results.get(room, {}), "graph")))
    latent = report["latent_chain"].get("results", {})
    for name in [f"{room}, {precision}" for precision in LatentChain.precisions for room in ("cuda", "triton")]:
        count = CHAIN_INSTRUCTIONS.get(name)
        bound = None if count is None else 1e6 * LatentChain.steps * count / (LANES / 32 * CLOCK)
        rows.append((f"latent prior: {name}, at least", bound, measured(latent, f"{name}, in a graph")))
    for name in ("eager", "torchebm", "torch.compile", "torch.compile, in a graph"):
        rows.append((f"latent prior: {name}", None, measured(latent, name)))
    for name in ("by hand", "captured"):
        rows.append((f"{Chain.name}: {name}", None, measured(report["chain"].get("results", {}), name)))
    if report["environment"]["device"].startswith("none"):
        rows = [(name, predicted, None) for name, predicted, _ in rows]
    number = lambda value: "-" if value is None else f"{value:,.1f}"
    lines = [f"{'microseconds':64} {'predicted':>12} {'measured':>12}"]
    return "\n".join(lines + [f"{name:64} {number(a):>12} {number(b):>12}" for name, a, b in rows])


def main() -> int:
    global DEVICE
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/gpu-<device>-<date>.json")
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}")
    parser.add_argument("--rounds", type=int, default=21, help="batches that count (default 21)")
    parser.add_argument("--rehearse", action="store_true", help="without a device: see above")
    arguments = parser.parse_args()
    if arguments.rehearse:
        DEVICE = torch.device("cpu")
        arguments.rounds = 1
    elif not torch.cuda.is_available():
        print("no CUDA device: torch.cuda.is_available() is False", file=sys.stderr)
        return 1
    report: dict[str, Any] = {"environment": environment(), "rounds": arguments.rounds, "cases": {}}
    device = str(report["environment"]["device"]).lower().replace(" ", "-")
    out = arguments.out or ROOT / "benchmarks" / "results" / f"gpu-{device}-{datetime.now():%Y%m%d-%H%M%S}.json"

    def save() -> None:
        # after every part: whoever runs this may be cut off
        if not arguments.rehearse:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(report, indent=1) + "\n")

    names = QUICK[:2] if arguments.rehearse else QUICK if arguments.quick else tuple(STATES)
    for name in names:
        for dtype in (torch.float32, torch.bfloat16):
            case = f"{name}, {str(dtype).removeprefix('torch.')}"
            report["cases"][case] = found = measure(STATES[name], dtype, arguments.rounds)
            print(table(case, found), flush=True)
            save()
            if DEVICE.type == "cuda":
                torch.cuda.empty_cache()
    chains = {"chain": Chain, "latent_chain": LatentChain}
    for part, kind in chains.items():
        report[part] = {"case": kind.name, **kind().measure(arguments.rounds)}
        print(json.dumps(report[part], indent=1), flush=True)
        save()
    if not (arguments.quick or arguments.rehearse):
        case = "polymnist-5k, convolutional, batch 128"
        report["training_iteration"] = whole = {"case": case, **training_iteration(arguments.rounds)}
        print(json.dumps(whole, indent=1), flush=True)
        save()
    print(predictions(report), flush=True)
    if not arguments.rehearse:
        print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
