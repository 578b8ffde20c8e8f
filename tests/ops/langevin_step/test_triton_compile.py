"""Compiles every specialisation of the Triton ``langevin_step`` for GPUs that need not be there.

Fails where registers spill, where a kernel needs more shared memory or registers than it is known to, and where the map
kernel loses its 16-byte accesses. Compiles all of sm_90 and, for the other targets, the corners of the table (narrowest
and widest tuples, fp32 and bf16); everything with ``MMEBM_COMPILE_ALL=1``.

The limits and where they come from stand with REGISTERS, STACK and SHARED below; Triton 3.7.1, 2026-11-22.
"""

from __future__ import annotations

import multiprocessing
import os
import re
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import pytest

triton = pytest.importorskip("triton")

import torch  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.compiler import ASTSource, make_backend  # noqa: E402
from triton.runtime.jit import create_function_from_signature  # noqa: E402

from mmebm.kernels import langevin_step as room  # noqa: E402
from mmebm.ops.common.params import StepParams  # noqa: E402
from mmebm.ops.langevin_step import StepOptions  # noqa: E402
from tests.ops import compiling  # noqa: E402

pytestmark = compiling.MARKS

TARGETS = compiling.TARGETS
KERNELS = {"map": room._map_kernel, "chain": room._chain_kernel, "norm": room._norm_kernel}
DTYPES = {"fp32": tl.float32, "fp16": tl.float16, "bf16": tl.bfloat16}
# The registers of one thread; 128 threads a program. 96 leave an SM of 64K registers 20 warps of the map kernel with
# four 16-byte loads a thread in flight, 40 KB; 3.3 TB/s over 132 SMs at 600 ns need 15.
REGISTERS = {"map": 96, "chain": 224, "norm": 64}
# Bytes of local memory a thread: 32 is what a library sine takes. ptxas gives up a few registers of the chain kernel
# where that lets one more program fit on an SM: constants hoisted out of its loops.
STACK = {"map": 0, "chain": 32, "norm": 0}
# Bytes. The map kernel shares nothing; Triton 3.6.0 doubles what the chain kernel needs.
SHARED = {"map": 0, "chain": 512, "norm": 256}


@dataclass(frozen=True)
class Spec:
    """One specialisation: what :mod:`mmebm.kernels.langevin_step` leaves constant."""

    kernel: str
    dtype: str
    grad: str
    tensors: int
    vector: bool = True
    rows: int = 1

    def __str__(self) -> str:
        kind = "tensors" if self.vector else "floats"
        extra = f"-{kind}" if self.kernel == "map" else f"-rows{self.rows}"
        return f"{self.kernel}-{self.dtype}-grad_{self.grad}-{self.tensors}{extra}"


def specs() -> list[Spec]:
    pairs = [("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "fp16")]
    out = []
    for dtype, grad in pairs:
        for width in room._WIDTHS["map"]:
            out += [Spec("map", dtype, grad, width, vector) for vector in (False, True)]
        for width in room._WIDTHS["chain"]:
            for rows in (1, room._SHORT_CHAINS):
                out += [Spec(kernel, dtype, grad, width, rows=rows) for kernel in ("chain", "norm")]
    # a gradient wider than the state's 16 bits
    out += [Spec("map", "bf16", "fp32", 1, False), Spec("chain", "bf16", "fp32", 1)]
    return out


def corner(spec: Spec) -> bool:
    """The narrowest and the widest of each kernel, in fp32 and in one 16-bit format: fp16 only rounds differently."""
    widest = room._WIDTHS["map"][-1]
    if spec.dtype == "fp16" or spec.dtype != spec.grad:
        return False
    if spec.kernel == "map":
        return (spec.tensors, spec.vector) in ((1, False), (widest, True))
    return spec.tensors == widest


CASES = [(name, spec) for name in TARGETS for spec in specs()]
QUICK = [case for case in CASES if case[0] == "sm_90" or corner(case[1])]


def source(spec: Spec, ptx: bool) -> ASTSource:
    """The specialisation as a launch would ask for it: annotated scalars, tuples of odd integers and of floats."""
    kernel = KERNELS[spec.kernel]
    group = 4 if spec.dtype == "fp32" else 8
    block = room._groups(room._TILE, group, spec.vector, ptx)
    constants = {"GDTYPE": DTYPES[spec.grad], "T": spec.tensors, "G": group, "PTX": ptx}
    if spec.kernel == "map":
        constants |= {"DTYPE": DTYPES[spec.dtype], "VECTOR": spec.vector, "B": block}
    elif spec.kernel == "chain":
        constants |= {"DTYPE": DTYPES[spec.dtype], "R": spec.rows, "C": room._THREADS // spec.rows}
    else:
        constants |= {"C": room._THREADS // spec.rows}
    tuples = {name: ("i64",) * spec.tensors for name in ("xs", "gs", "ms")}
    tuples |= {name: ("i32",) * spec.tensors for name in ("ns", "metas", "streams")}
    tuples |= {"fs": ("fp32",) * (8 * spec.tensors), "vs": ("i64",) * (8 * spec.tensors)}
    signature = {}
    for parameter in kernel.params:
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
        else:
            signature[parameter.name] = tuples.get(parameter.name) or parameter.annotation_type
    return ASTSource(fn=kernel, signature=signature, constexprs=constants)


def figures(case: tuple[str, Spec]) -> dict[str, int] | str:
    """Registers, shared memory, stack and vector accesses of one case, or what went wrong. Runs in its own process."""
    target, spec = case
    try:
        ptx = TARGETS[target].backend == "cuda"
        options = {"num_warps": room._THREADS // TARGETS[target].warp_size, "enable_fp_fusion": True}
        if spec.kernel == "map":
            options |= room.map_options(ptx)
        made = triton.compile(source(spec, ptx), target=TARGETS[target], options=options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    # of one number with itself
    squares = r"\bfma\.rn\.(?:ftz\.)?f32\s+%\w+, (%\w+), \1, %"
    if "amdgcn" in made.asm:
        squares = r"\bv_fma\w*\s+v\d+, (v\d+), \1(?:, v|$)"
    code = made.asm["amdgcn" if "amdgcn" in made.asm else "ptx"]
    fused = len(re.findall(squares, code, re.MULTILINE))
    xors = len(re.findall(r"\bxor\.b32", made.asm.get("ptx", "")))
    return {**compiling.figures(made), "vectors": compiling.vectors(made), "fused squares": fused, "xors": xors}


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> dict[tuple[str, Spec], dict[str, int] | str]:
    """The figures of all selected cases, compiled on all cores."""
    name = test_compiles_within_budget.__name__
    wanted = [
        item.callspec.params["case"]
        for item in request.session.items
        if item.path == request.path and getattr(item, "originalname", "") == name
    ]
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(os.cpu_count() or 1, mp_context=context) as pool:
        return dict(zip(wanted, pool.map(figures, wanted), strict=True))


def parameters():
    for case in CASES:
        if case in QUICK or os.environ.get("MMEBM_COMPILE_ALL") == "1":
            yield pytest.param(case, id=f"{case[0]}-{case[1]}")


@pytest.mark.parametrize("case", list(parameters()))
def test_compiles_within_budget(case, compiled) -> None:
    _, spec = case
    found = compiled[case]
    assert isinstance(found, dict), found
    assert found["stack"] <= STACK[spec.kernel], found
    assert found["registers"] <= REGISTERS[spec.kernel], found
    assert found["shared"] <= SHARED[spec.kernel], found
    # of two squares whose sum a butterfly makes, one would be added without being rounded, in each lane another one
    assert found["fused squares"] == 0, found
    if spec.kernel == "map":
        # at least: load x, load g, store x
        assert found["vectors"] >= 3, found
        # of two words; a Philox call has twenty of three, each one instruction (gfx942's compiler finds them)
        assert found.get("xors", 0) < 20, found


class Recorder:
    """Stands for a kernel: keeps what Triton's own binder makes of each launch, runs nothing."""

    def __init__(self, kernel) -> None:
        self.binder = create_function_from_signature(kernel.signature, kernel.params, make_backend(TARGETS["sm_90"]))
        self.names = [parameter.name for parameter in kernel.params]
        self.seen: list[dict[str, object]] = []

    def __getitem__(self, grid):
        assert len(grid) == 1 and 0 < grid[0] < 2**31
        return self.launch

    def launch(self, **arguments) -> None:
        _, specialization, _ = self.binder(**arguments)
        self.seen.append(dict(zip(self.names, specialization, strict=True)))


def launches(monkeypatch: pytest.MonkeyPatch, cases) -> dict[str, list[dict[str, object]]]:
    """The bindings of steps of all kinds: (shapes, dtype, params, step, seed, chain_offset) each."""
    recorders = {name: Recorder(kernel) for name, kernel in KERNELS.items()}
    for name, recorder in recorders.items():
        monkeypatch.setattr(room, f"_{name}_kernel", recorder)
    for shapes, params, step, seed, offset in cases:
        count = len(shapes)
        for outside in ("clamp", "reject"):
            opt = StepOptions(
                seed=seed, streams=tuple(range(count)), noisy=(True,) * count, chain_offset=offset, outside=outside
            )
            for splits, stats in ((None, False), (None, True), (3, True)):
                x, grad = [torch.zeros(s) for s in shapes], [torch.zeros(s) for s in shapes]
                stepper = room.TritonStepper(opt, splits=splits)
                stepper.step(x, grad, [params] * count, step, with_noise=True, stats=stats)
                stepper.perturb(x, [params] * count, step)
    return {name: recorder.seen for name, recorder in recorders.items()}


def test_no_value_compiles_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes, addresses, options, seeds and steps are arguments that Triton sees nothing special in."""
    plain = StepParams(step_size=1, noise_scale=0)
    full = StepParams(0.1, 1.0, grad_clip=16, grad_norm_clip=1, max_update=2.0, prior_std=1, low=-1, high=1)
    cases = [
        ([(200, 1), (200, 1)], plain, 0, 0, 0),
        ([(1, 16), (1, 5000)], full, 1, 1, 1),
        ([(16, 3, 32, 32), (16, 7)], full, 16, 16, 16),
        ([(2, 64), (2, 129)], plain, 2**32 - 1, 2**64 - 1, 2**31),
        ([(3, 64), (3, 129)], plain, torch.tensor([7]), torch.tensor([9]), 0),
    ]
    for name, seen in launches(monkeypatch, cases).items():
        # the tile of the chain kernel is meant to differ
        kinds = {tuple((k, str(v)) for k, v in launch.items() if k not in ("R", "C")) for launch in seen}
        assert len(seen) > 5 and len(kinds) == 1, (name, kinds)


def test_launches_are_the_ones_compiled_here(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [([(4, 8)] * count, StepParams(0.1, 0.1, grad_norm_clip=1.0, low=0.0), 0, 0, 0) for count in (1, 2, 5, 9)]
    for name, seen in launches(monkeypatch, cases).items():
        shipped = [source(spec, True) for spec in specs() if spec.kernel == name and spec.dtype == spec.grad == "fp32"]
        for launch in seen:
            types = {k: v[0] for k, v in launch.items()}
            constants = {k: v[1] for k, v in launch.items() if v[0] == "constexpr"}
            index = {k: (i,) for i, k in enumerate(launch)}
            assert any(
                types == built.signature and all(built.constants[index[k]] == v for k, v in constants.items())
                for built in shipped
            ), (name, launch)
