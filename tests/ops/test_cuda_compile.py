"""What ptxas made of ``langevin_step.cu`` and ``langevin_mlp.cu`` in the extension as built: registers, stack, wide
accesses, tensor cores.

Reads the machine code in ``mmebm/_cuda*.so`` with cuobjdump and nvdisasm of the CUDA toolkit or, where that has none,
those in Triton's package. No GPU is needed.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from mmebm import native
from mmebm.backends import require_backends

pytestmark = pytest.mark.compile

# Registers of a thread, 256 threads a block, 128 of the map kernel, of 64K an SM (CUDA's table of compute capabilities,
# 8.0 to 10.0):
#   map     128: 4 blocks, so 512 threads with four 16-byte loads in flight are 32 KB; an H100 needs 15 (3.35 TB/s over
#           132 SMs at 600 ns)
#   chain   128: 2 blocks
#   others  64: 4 blocks
#   mlp     128: 2 blocks, where shared memory has room for two
# By the kernel's name, and what its mangled name ends with.
REGISTERS = {
    "map_kernel": 128,
    "chain_kernel": 128,
    "norm_kernel": 64,
    "fold_kernel": 64,
    "finish_kernel": 64,
    "chain_kernel<Fp32>": 128,
    "chain_kernel<Tf32x3>": 128,
    "chain_kernel<Bf16>": 128,
}
# Matrix instructions of each langevin_mlp kernel: none on the FMA units, else m16n8k8 or m16n8k16 of these operands.
MATRIX = {"Fp32": None, "Tf32x3": r"\bHMMA\.1688\.F32\.TF32\b", "Bf16": r"\bHMMA\.16816\.F32\.BF16\b"}
# Fewest 16-byte accesses in the map kernel: load and store of x for each of three storages, an fp32 gradient's loads
# (one for fp32 states, two for each 16-bit one) and a 16-bit gradient's (one for each 16-bit state).
WIDE = {"load": 3 + 1 + 2 * 2 + 2, "store": 3}


@pytest.fixture(scope="module")
def library() -> Path:
    try:
        return Path(str(native.cuda().__file__))
    except native.BackendError as error:
        if "cuda" in require_backends() or "extension not built" not in str(error):
            pytest.fail(str(error))
        pytest.skip(str(error))


def tool(name: str) -> str:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which(name) or shutil.which(str(Path(home, "bin", name)))
    spec = find_spec("triton")
    if found is None and spec is not None and spec.origin is not None:
        found = shutil.which(str(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name))
    if found is None:
        pytest.skip(f"no {name}: neither in the CUDA toolkit ({home}) nor in Triton")
    return found


def kernel_of(mangled: str) -> str | None:
    """The kernel of :data:`REGISTERS` that a function is, if it is one."""
    # names and template arguments are in the mangled name after their lengths
    for kernel in REGISTERS:
        name, _, mode = kernel.rstrip(">").partition("<")
        owner = f"{len(mode)}{mode}EEEvNS_11DeviceChain" if mode else "StepTable"
        if f"{len(name)}{name}" in mangled and owner in mangled:
            return kernel
    return None


@functools.cache
def resources(library: Path) -> dict[tuple[str, str], dict[str, int]]:
    """(architecture, kernel): registers and bytes of stack."""
    text = subprocess.run(
        [tool("cuobjdump"), "--dump-resource-usage", str(library)], capture_output=True, text=True, check=True
    ).stdout
    out, arch = {}, ""
    for line, following in zip(text.splitlines(), [*text.splitlines()[1:], ""], strict=True):
        if found := re.search(r"arch = (sm_\d+)", line):
            arch = found.group(1)
        if found := re.search(r"Function (\S+):", line):
            usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", following))
            if kernel := kernel_of(found.group(1)):
                out[arch, kernel] = {name: int(number) for name, number in usage.items()}
    return out


def architectures(library: Path) -> list[str]:
    return [f"sm_{arch.removesuffix('+PTX')}" for arch in str(native.cuda().architectures).split(";")]


@pytest.mark.parametrize("kernel", REGISTERS)
def test_kernels_keep_to_their_registers(kernel: str, library: Path) -> None:
    found = resources(library)
    for arch in architectures(library):
        usage = found[arch, kernel]
        assert usage["STACK"] == 0 and usage["LOCAL"] == 0, f"{arch}: registers spill, {usage}"
        assert usage["REG"] <= REGISTERS[kernel], f"{arch}: {usage}"


def sections(library: Path, folder: Path) -> Iterator[tuple[str, str, str]]:
    """(architecture, kernel, machine code) of every kernel in the extension."""
    subprocess.run(
        [tool("cuobjdump"), "--extract-elf", "all", str(library)], cwd=folder, capture_output=True, check=True
    )
    for cubin in folder.glob("*.cubin"):
        code = subprocess.run([tool("nvdisasm"), "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
        arch = re.search(r"sm_\d+", cubin.name)
        assert arch is not None, cubin.name
        for section in re.split(r"(?m)^\s*\.section\s+", code)[1:]:
            name = section.split(",", 1)[0]
            if name.startswith(".text.") and (kernel := kernel_of(name)):
                yield arch.group(0), kernel, section


def test_wide_accesses_and_tensor_cores(library: Path, tmp_path: Path) -> None:
    seen = set()
    for arch, kernel, section in sections(library, tmp_path):
        loads, mode = len(re.findall(r"\bLDG?\.E(?:\.\w+)*\.128\b", section)), kernel.rstrip(">").partition("<")[2]
        seen.add((arch, kernel))
        if kernel == "map_kernel":
            stores = len(re.findall(r"\bSTG\.E(?:\.\w+)*\.128\b", section))
            assert loads >= WIDE["load"] and stores >= WIDE["store"], (arch, loads, stores)
        if not mode:
            continue
        # of a matrix that is read where it lies: eight bytes a lane for bf16
        wide = loads if mode != "Bf16" else len(re.findall(r"\bLDG?\.E(?:\.\w+)*\.64\b", section))
        assert wide >= 2, (arch, kernel, wide)
        # shared memory that stays: rows and columns by ldmatrix, for the second transposed
        matrices = {bool("T" in name) for name in re.findall(r"\bLDSM\.16\.(\w+)\.4\b", section)}
        assert matrices == ({False, True} if mode == "Bf16" else set()), (arch, kernel, matrices)
        # barriers of clusters
        assert (("UCGABAR_WAIT" in section) or ("UCGABAR_ARV" in section)) == (arch != "sm_80"), (arch, kernel)
        wanted = MATRIX[mode]
        assert bool(re.search(wanted or r"\bHMMA\b", section)) == (wanted is not None), (arch, kernel)
    assert seen == {(arch, kernel) for arch in architectures(library) for kernel in REGISTERS}
