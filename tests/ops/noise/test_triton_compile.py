"""Compiles the Triton noise for GPUs that need not be there; fails where registers spill or stores are not vectors."""

from __future__ import annotations

import re

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from mmebm.kernels import noise as kernel  # noqa: E402
from tests.ops import compiling  # noqa: E402

pytestmark = compiling.MARKS

KINDS = {"words": (0, "*i32"), "normal": (1, "*fp32"), "uniform": (2, "*fp32"), "uniform64": (2, "*fp64")}
REGISTERS = 64  # of one thread: full occupancy needs 32 to 40, 64 keeps half


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_compiles_without_spills(kind: str, whole: bool, capability: int) -> None:
    number, out = KINDS[kind]
    signature = {"out": out, **dict.fromkeys(("seed", "step", "stream", "first", "calls", "numel", "total"), "i64")}
    constants = {"KIND": number, "WHOLE": whole, "LANES": 256}
    source = ASTSource(
        fn=kernel._noise_kernel,
        signature=signature | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        attrs={(0,): [["tt.divisibility", 16]]},
    )
    target = GPUTarget("cuda", capability, 32)
    made = triton.compile(source, target=target, options={"num_warps": kernel._WARPS})
    usage = compiling.said(made, "cuobjdump", "--dump-resource-usage")
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage)}
    assert found["STACK"] == 0 and found["LOCAL"] == 0, found
    assert found["REG"] <= REGISTERS, found
    assert bool(re.search(r"st\.global\.v[24]", made.asm["ptx"])) == whole
