"""Compiles every kernel of the Triton net ops for GPUs that need not be there; fails where one needs more registers,
stack or shared memory than it is known to.

A few for each target; everything with ``MMEBM_COMPILE_ALL=1``. Triton 3.7.1, 2026-12-01; registers and stack bytes of a
thread, shared bytes of a program. A product has 256 threads, sums over 32 at a time in three stages; "update" is the
kernel with the update behind the gradient of a first layer:

    outputs x positions         sm_80              sm_90              sm_100
    ieee    16 x 128            128   0  36,864    128   0  36,864    128  16  36,864
    ieee    16 x 128  update    128   0  36,864    128   0  36,864    138   0  36,864
    ieee    32 x 128            162   0  40,960    128  16  40,960    159   0  40,960
    ieee    32 x 128  update    198   0  40,960    201   0  40,960    179   0  40,960
    ieee    64 x 64             156   0  32,768    158   0  32,768    156   0  32,768
    ieee    64 x 64   update    200   0  32,768    203   0  32,768    188   0  32,768
    tf32x3  16 x 128            148   0  36,864    147   0  36,864    145   0  36,864
    tf32x3  16 x 128  update    190   0  36,864    192   0  36,864    191   0  36,864
    tf32x3  32 x 128            212   0  40,960    214   0  40,960    187   0  40,960
    tf32x3  32 x 128  update    255   0  40,960    255   0  40,960    255  24  40,960
    tf32x3  64 x 64             236   0  32,768    180   0  49,152    128   0  49,160
    tf32x3  64 x 64   update    253   0  32,768    200   0  49,152    154   0  49,160

The others have 128 threads, 26 to 90 registers, no stack but 8 bytes of scatter and rule on sm_100, and 2 KB or less.
Not taken, sm_90: products of 128 threads and addresses of 64 bits had 255 registers and 56 to 480 bytes of stack.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from mmebm.kernels import net as kernels  # noqa: E402
from tests.ops import compiling  # noqa: E402

pytestmark = compiling.MARKS

TARGETS = {f"sm_{n}": GPUTarget("cuda", n, 32) for n in (80, 90, 100)}
# A thread's registers: of a product what 256 threads may have, of the others 128 (512 threads of 64 K registers)
REGISTERS = {"product": 255, "others": 128}
# Bytes a thread: ptxas gives a few numbers up where that lets two programs of 256 threads share a multiprocessor
STACK = {"product": 24, "others": 8}
# Bytes: three stages of DEPTH rows of positions and of weights in fp32, for tf32x3 without the last; of the others sums
# over warps, of Triton 3.6.0 twice. Below a third of sm_80's 163 KB.
SHARED = {"product": 50_000, "others": 4_096}
POINTERS = {"numbers": "*i64", "observed": "*u8", **dict.fromkeys(("counts", "alive", "lists", "table"), "*i32")}

Case = tuple[str, dict[str, Any]]
PRODUCTS: dict[str, Case] = {
    f"product {outputs} {mode}{' update' if update else ''}": (
        "product_kernel",
        {"BN": outputs, "BM": positions, "BK": kernels.DEPTH, "MODE": mode, "UPDATE": update},
    )
    for outputs, (_, positions) in kernels.TILES.items()
    for mode in ("ieee", "tf32x3")
    for update in (False, True)
}
OTHERS: dict[str, Case] = {
    **{f"gather {terms}": ("gather_kernel", {"BO": o, "BK": terms}) for o, terms in kernels.FORMS.values()},
    **{
        name.removesuffix("_kernel"): (name, {"B": kernels.BLOCK})
        for name in ("scatter_kernel", "pointwise_kernel", "norm_kernel", "perturb_kernel", "rule_kernel")
    },
}
QUICK = {
    "sm_80": ("product 32 ieee update", "rule"),
    "sm_90": ("product 16 ieee", "product 64 tf32x3 update", *OTHERS),
    "sm_100": ("product 64 ieee", "scatter"),
}


def figures(target: GPUTarget, case: Case) -> dict[str, int]:
    """Registers, shared memory and stack, as a launch asks for it."""
    name, constants = case
    kernel = getattr(kernels, name)
    signature = {
        p.name: "constexpr" if p.is_constexpr else p.annotation_type or POINTERS.get(p.name, "*fp32")
        for p in kernel.params
    }
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] == "*"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    product = name == "product_kernel"
    options = {"num_warps": kernels.WARPS["product" if product else "others"], "enable_fp_fusion": True}
    made = triton.compile(source, target=target, options={**options, **({"num_stages": 3} if product else {})})
    return compiling.figures(made)


CASES = {**PRODUCTS, **OTHERS}
EVERYTHING = bool(os.environ.get("MMEBM_COMPILE_ALL"))
WANTED = [(target, case) for target in TARGETS for case in CASES if EVERYTHING or case in QUICK[target]]


@pytest.mark.parametrize(("target", "case"), WANTED)
def test_compiles_within_budget(target: str, case: str) -> None:
    found, kind = figures(TARGETS[target], CASES[case]), case.split()[0] if case in PRODUCTS else "others"
    print(target, case, found)
    assert found["registers"] <= REGISTERS[kind], found
    assert found["stack"] <= STACK[kind], found
    assert found["shared"] <= SHARED[kind], found
