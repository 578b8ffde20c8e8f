"""Triton kernels compiled for GPUs that need not be there, and what is said of the result. Import it after a look
whether Triton is installed."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Final

import pytest
import triton
from triton.backends.compiler import GPUTarget

MARKS: Final = [
    pytest.mark.compile,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1 replaces the compiler"),
]
TARGETS: Final = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_TOOLS: Final = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def said(compiled: Any, tool: str, option: str) -> str:
    """What a tool of CUDA says of a kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run([_TOOLS / tool, option, file.name], capture_output=True, text=True, check=True).stdout


def figures(compiled: Any) -> dict[str, int]:
    """A thread's registers and bytes of stack (AMD: spilled registers), a program's bytes of shared memory."""
    if "amdgcn" in compiled.asm:
        text, registers, stack = compiled.asm["amdgcn"], r"\.vgpr_count:\s*", r"\.vgpr_spill_count:\s*"
    else:
        text, registers, stack = said(compiled, "cuobjdump", "--dump-resource-usage"), "REG:", "STACK:"
    number = lambda what: int(re.search(rf"{what}(\d+)", text).group(1))  # type: ignore[union-attr]
    return {"registers": number(registers), "stack": number(stack), "shared": compiled.metadata.shared}


def vectors(compiled: Any) -> int:
    """Accesses of 16 bytes in the code."""
    if "amdgcn" in compiled.asm:
        return len(re.findall(r"global_(?:load|store)_dwordx4", compiled.asm["amdgcn"]))
    return len(re.findall(r"\b(?:LDG|STG)\.E(?:\.\w+)*\.128\b", said(compiled, "nvdisasm", "-c")))
