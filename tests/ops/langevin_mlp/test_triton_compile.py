"""Compiles every kernel of the Triton ``langevin_mlp`` and ``mlp_energy`` for GPUs that need not be there.

There are nine, three a precision (``TILES``), whatever the network. Fails where registers spill, and where a kernel
needs more shared memory than it is known to. Compiles all nine for sm_90 and three for each other target; everything
with ``MMEBM_COMPILE_ALL=1``.

Triton 3.7.1, 2026-11-22; registers of a thread, stack bytes of a thread (of gfx942: spilled registers), shared bytes
of a program; 256 threads (128 with one chain; 2026-11-30), 128 columns at a time, sums over 32, three stages (two with
one chain):

    precision, chains    sm_80              sm_90            sm_100           gfx942
    fp32       1         236   0   2,048    224  0   2,048   224  0   2,048   169  0   1,024
    bf16       1         205   0   9,216    196  0   9,216   191  0   9,216   271  0  16,384
    fp32       8         128  96  34,816    186  0  34,816   176  0  34,816   180  0  34,816
    fp32      32         255  16  40,960    183  0  40,960   178  0  40,960   300  0  40,960
    tf32x3    16         224   0  36,864    238  0  36,864   232  0  36,864   (not there)
    tf32x3    32         255  24  40,960    236  0  40,960   239  0  40,960
    bf16      16         220   0  20,480    228  0  20,480   214  0  20,480   193  0  20,480
    bf16      32         248   0  24,576    255  0  24,576   250  0  24,576   276  0  24,576

With one chain Triton 3.6.0 and 3.9.0 need no stack either (2026-11-30). Beyond, 3.6.0 compiles them too, and gives up
registers where it has no more than 255: 16 to 72 bytes of stack on sm_90 and sm_100, 344 for bf16 with 32 chains on
sm_80, so that these limits hold for the version in constraints.txt.

What was not taken, sm_90: bf16 with 64 chains spills 240 bytes, with sums over 64 columns 104; fp32 with 16 chains and
64 columns in 8 warps gets 128 registers and 136 bytes of stack.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from typing import Any

import pytest

triton = pytest.importorskip("triton")

import torch  # noqa: E402
from triton.compiler import ASTSource, make_backend  # noqa: E402
from triton.runtime.jit import create_function_from_signature  # noqa: E402

from mmebm.kernels import langevin_mlp as room  # noqa: E402
from mmebm.ops.common.params import StepParams  # noqa: E402
from mmebm.ops.langevin_mlp import MlpChain, constants_of  # noqa: E402
from mmebm.ops.terms import Quadratic, Residual, Scalar, Stack, Term  # noqa: E402
from tests.ops import compiling  # noqa: E402

pytestmark = compiling.MARKS

TARGETS = compiling.TARGETS
# Bytes a thread. ptxas of sm_80 gives a few registers up where that lets a second program fit on a multiprocessor
# (fp32, 8 chains: 128 of them instead of 186), or at the limit of 255; of constants hoisted out of the loops. That of
# Triton 3.9.0 gives up four at the limit of 255 on sm_90 too (bf16, many chains).
STACK = {"sm_80": 128, "sm_90": 16, "sm_100": 0, "gfx942": 0}
# Bytes: three stages of a block of weights (32 x 128) in fp32, or bf16, and of values (chains x 32) in fp32, less one
# where two are enough. Far below 227 KB (sm_90), 163 KB (sm_80) and 64 KB (gfx942): two programs fit.
SHARED = {"fp32": 41_000, "tf32x3": 41_000, "bf16": 25_000}
ALIGNED = ("w", "v", "scratch", "table")  # own allocations; whatever else is a pointer is not looked at
POINTERS = {
    **dict.fromkeys(("x", "out", "v", "target", "constants", "energy", "norms", "scratch"), "*fp32"),
    **dict.fromkeys(("masks", "observed", "frozen"), "*u8"),
    "table": "*i32",
}
KERNEL = room._chain_kernel
MODES = {"fp32": "ieee", "tf32x3": "tf32x3", "bf16": "bf16"}

Case = tuple[str, str, int]  # target, precision, 0, 1 or 2: one, few or many chains
CASES: list[Case] = [
    (target, precision, i)
    for target in TARGETS
    for precision in MODES
    for i in (0, 1, 2)
    if not (target == "gfx942" and precision == "tf32x3")
]
QUICK = {("fp32", 0), ("fp32", 1), ("bf16", 2)}


def source(precision: str, tile: room.Tile) -> ASTSource:
    """The kernel as a launch asks for it."""
    types = {**POINTERS, "w": "*bf16" if precision == "bf16" else "*fp32"}
    signature = {
        p.name: "constexpr" if p.is_constexpr else types.get(p.name) or p.annotation_type for p in KERNEL.params
    }
    constants = {"BM": tile.chains, "NB": tile.outputs, "KB": tile.depth, "MODE": MODES[precision]}
    aligned = {(i,): [["tt.divisibility", 16]] for i, p in enumerate(KERNEL.params) if p.name in ALIGNED}
    return ASTSource(fn=KERNEL, signature=signature, constexprs=constants, attrs=aligned)


def figures(case: Case) -> dict[str, int] | str:
    """Registers, shared memory and stack of one case, or what went wrong. Runs in its own process."""
    name, precision, i = case
    target, tile = TARGETS[name], room.TILES[precision][i]
    try:
        options = room.compile_options(tile, target.warp_size)
        return compiling.figures(triton.compile(source(precision, tile), target=target, options=options))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> dict[Case, dict[str, int] | str]:
    """The figures of all selected cases, compiled on all cores."""
    name = test_compiles_without_spills.__name__
    wanted = [
        item.callspec.params["case"]  # type: ignore[attr-defined]
        for item in request.session.items
        if getattr(item, "originalname", "") == name and item.path == request.path
    ]
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(os.cpu_count() or 1, mp_context=context) as pool:
        return dict(zip(wanted, pool.map(figures, wanted), strict=True))


def selected() -> list[Case]:
    everything = os.environ.get("MMEBM_COMPILE_ALL") == "1"
    return [case for case in CASES if everything or case[0] == "sm_90" or case[1:] in QUICK]


@pytest.mark.parametrize("case", selected(), ids=lambda case: f"{case[0]}-{case[1]}-{('one', 'few', 'many')[case[2]]}")
def test_compiles_without_spills(case: Case, compiled) -> None:
    found = compiled[case]
    assert isinstance(found, dict), found
    assert found["stack"] <= STACK[case[0]], found
    assert found["shared"] <= SHARED[case[1]], found


# -- launches


class Recorder:
    """Stands for the kernel: keeps what Triton's own binder makes of each launch, runs nothing."""

    def __init__(self, kernel) -> None:
        self.binder = create_function_from_signature(kernel.signature, kernel.params, make_backend(TARGETS["sm_90"]))
        self.names = [parameter.name for parameter in kernel.params]
        self.seen: list[dict[str, Any]] = []

    def __getitem__(self, grid):
        assert len(grid) == 1 and 0 < grid[0] < 2**31
        return self.launch

    def launch(self, **arguments) -> None:
        _, specialization, _ = self.binder(**arguments)
        self.seen.append(dict(zip(self.names, specialization, strict=True)))


def zeros(*sizes: int, **kinds: Any) -> Stack:
    weights = tuple(torch.zeros(o, i) for i, o in pairwise(sizes))
    return Stack.mlp(weights, tuple(None for _ in weights), **kinds)


def problems() -> list[tuple[tuple[Term, ...], tuple[int, ...], int, dict[str, Any]]]:
    """Terms, widths, chains and options of all kinds, and numbers that Triton sees something special in."""
    return [
        ((Scalar(zeros(1, 1, 1)),), (1,), 1, {"seed": 1, "chain_offset": 1}),
        ((Scalar(zeros(64, 200, 200, 1), -1.0),), (64,), 100, {"seed": 16, "precision": "fp32"}),
        ((Quadratic(torch.zeros(16), torch.zeros(16)),), (16,), 16, {"seed": torch.tensor([3]), "freeze": True}),
        (
            (
                Scalar(zeros(33, 8, 8, 8, 8, 1, activation="elu", slope=1.0)),
                Residual(
                    zeros(33, 256, 784, activation="relu"),
                    torch.zeros(7, 784),
                    1.0,
                    "laplace",
                    True,
                    observed=torch.ones(1, 784, dtype=torch.bool),
                ),
            ),
            (16, 17),
            7,
            {"noise_at": "before", "clamp_noise": True, "observed": torch.zeros(7, 33, dtype=torch.uint8)},
        ),
    ]


@pytest.mark.parametrize("precision", MODES)
def test_no_value_compiles_anew(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks, options, seeds, steps and sizes are arguments that Triton sees nothing special in, and every launch is
    one of those compiled here."""
    recorder = Recorder(KERNEL)
    monkeypatch.setattr(room, "_chain_kernel", recorder)
    monkeypatch.setattr(room, "_programs", lambda tiles, device: tiles)
    full = StepParams(1.0, 0.0, 1.0, 1.0, 1.0, 1.0, -1.0, 1.0)
    for terms, widths, chains, options in problems():
        for params in ([full] * len(widths), [StepParams(torch.ones(chains, 1), 0.5)] * len(widths)):
            table = constants_of([params], chains, torch.float32, torch.device("cpu"))
            assert not isinstance(table, str)
            count = len(widths)
            chain = MlpChain(
                terms=terms,
                widths=widths,
                streams=tuple(range(count)),
                noisy=(True,) * count,
                moving=(True,) * count,
                constants=table[0],
                present=table[1],
                **{**options, "precision": precision},
            )
            # not aligned to 16 bytes
            x = torch.zeros(chains * sum(widths) + 1)[1:].reshape(chains, -1)
            for steps, first in ((1, 0), (16, 1), (60, torch.tensor([5]))):
                room.run(chain, x, steps, first, energy=steps == 16, grad_norm=steps == 60)
        if precision == "fp32":
            room.gradient(terms, torch.zeros(chains, sum(widths)))
    kinds = {tuple((name, str(value)) for name, value in launch.items()) for launch in recorder.seen}
    assert len(recorder.seen) > 20 and len(kinds) == 1, kinds

    built = source(precision, room.TILES[precision][0])
    index = {name: (i,) for i, name in enumerate(recorder.names)}
    for name, (kind, special) in recorder.seen[0].items():
        assert kind == built.signature[name], name
        if kind == "constexpr":
            assert special == built.constants[index[name]], name
        else:
            assert bool(special) == (name in ALIGNED), (name, special)


def test_the_tile_is_one_of_three() -> None:
    for precision, (alone, few, many) in room.TILES.items():
        sizes = [
            {room.tile_of(chains, precision) for chains in range_} for range_ in ((1, 128), (129, 256 * few.chains))
        ]
        assert sizes == [{alone}, {few}] and room.tile_of(256 * few.chains + 1, precision) == many
        assert dataclasses.replace(many, chains=few.chains) == few
        # padding is the same, and but for Triton 3.6 columns are
        assert alone.depth == few.depth and (room.OLD or alone.outputs == few.outputs)
