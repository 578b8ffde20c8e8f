"""Compiles the Triton ``residual`` for GPUs that need not be there; fails where registers spill.

Also where a kernel needs more registers or shared memory than it is known to, or loses its 16-byte accesses.
"""

from __future__ import annotations

import re

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from mmebm.kernels import residual as room  # noqa: E402
from tests.ops import compiling  # noqa: E402

pytestmark = compiling.MARKS

TARGETS = compiling.TARGETS
GAUSSIAN, LAPLACE, CATEGORICAL = 0, 1, 2
# (likelihood, dtype of predictions, of targets, mask, scale, weight, classes, positions) of each modality
WORDS = (CATEGORICAL, "fp32", "i64", 0, 0, 0, 33, 1)
CASES = {
    "image": [(GAUSSIAN, "fp32", "fp32", 0, 0, 0, 1, 2352)],
    "image-bf16-masked": [(LAPLACE, "bf16", "fp32", 2, 2, 1, 1, 2352)],
    "word": [WORDS],
    "text-fp16-masked": [(CATEGORICAL, "fp16", "i64", 1, 0, 2, 2000, 40)],
    "digit": [(CATEGORICAL, "fp32", "i64", 0, 0, 0, 10, 1)],  # sums inside a warp
    "five": [(GAUSSIAN, "fp32", "fp32", 0, 0, 0, 1, 2352)] * 5,
    "eight": [
        (GAUSSIAN, "fp32", "fp32", 0, 0, 0, 1, 784),
        (LAPLACE, "bf16", "fp32", 2, 2, 1, 1, 2352),
        (GAUSSIAN, "fp16", "fp16", 1, 1, 2, 1, 64),
        WORDS,
        (CATEGORICAL, "bf16", "i64", 2, 0, 1, 71, 16),
        (LAPLACE, "fp32", "fp32", 0, 1, 0, 1, 10),
        (GAUSSIAN, "fp32", "fp32", 2, 0, 0, 1, 3072),
        WORDS,
    ],
}
# Registers of one thread, of 128; of a CDNA thread's 512 a wave of 64 uses more.
REGISTERS = {"cuda": 128, "hip": 256}
SHARED = 4096  # bytes, for sums over warps and a change of layout between sums
# Bytes of local memory a thread. Beside logits ptxas keeps up to six numbers of the whole program there (addresses,
# weights), written and read once outside the loops, to fit one more program on an SM: 16 seen on sm_90 with Triton
# 3.7.1, 24 on sm_100 with 3.9.0.
STACK = {"elements": 0, "logits": 24}


def source(case: str) -> ASTSource:
    modalities = CASES[case]
    kinds, ys, ts, masks, scales, weights, classes, positions = zip(*modalities, strict=True)
    count = len(modalities)
    signature = {
        "ys": tuple(f"*{y}" for y in ys),
        "ts": tuple(f"*{t}" for t in ts),
        "ms": tuple("*u8" if form else f"*{y}" for form, y in zip(masks, ys, strict=True)),
        "gs": tuple(f"*{y}" for y in ys),
        "scales": ("*fp32",) * count,
        "weights": ("*fp32",) * count,
        "scale_numbers": ("fp32",) * count,
        "weight_numbers": ("fp32",) * count,
        "sizes": ("i32",) * count,
        "classes": ("i32",) * count,
        "value": "*fp32",
    }
    tiles = [room._tile(k, n) for k, n in zip(classes, positions, strict=True)]
    constants = {
        "KINDS": kinds,
        "MASKS": masks,
        "SCALES": scales,
        "WEIGHTS": weights,
        "BKS": tuple(k for k, _ in tiles),
        "BPS": tuple(p for _, p in tiles),
        "T": count,
        "ADD": True,
        "GRAD": True,
        "TILE": room._TILE,
    }
    for name in constants:
        signature[name] = "constexpr"
    names = [parameter.name for parameter in room._residual_kernel.params]
    assert set(names) == set(signature)
    # addresses and sizes divisible by 16, where the modality's size is
    attrs = {}
    for i, n in enumerate(positions):
        at = [names.index(name) for name in ("ys", "ts", "gs", *(["ms"] if masks[i] else []))]
        at += [names.index("sizes")] * (n % 16 == 0)
        attrs |= {(index, i): [["tt.divisibility", 16]] for index in at}
    return ASTSource(
        fn=room._residual_kernel, signature={name: signature[name] for name in names}, constexprs=constants, attrs=attrs
    )


def figures(target: GPUTarget, case: str) -> dict[str, int]:
    """Registers, spills, shared memory and vector accesses."""
    warps = room._THREADS // target.warp_size
    made = triton.compile(source(case), target=target, options={"num_warps": warps, "enable_fp_fusion": True})
    return {**compiling.figures(made), "vectors": compiling.vectors(made)}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("target", TARGETS)
def test_compiles_within_budget(target: str, case: str) -> None:
    found = figures(TARGETS[target], case)
    logits = any(modality[0] == CATEGORICAL for modality in CASES[case])
    assert found["stack"] <= STACK["logits" if logits else "elements"], found
    assert found["registers"] <= REGISTERS[TARGETS[target].backend], found
    assert found["shared"] <= SHARED, found
    if case in ("image", "five"):
        # load y, load target, store the gradient, of each modality
        assert found["vectors"] >= 3 * len(CASES[case]), found


@pytest.mark.parametrize("case", CASES)
def test_what_is_added_to_is_read_by_all_before_it_is_stored(case: str) -> None:
    options = {"num_warps": room._THREADS // 32, "enable_fp_fusion": True}
    code = triton.compile(source(case), target=TARGETS["sm_90"], options=options).asm["ptx"]
    assert re.search(r"\bbar(?:rier)?\.(?:cta\.)?sync", code) is not None
