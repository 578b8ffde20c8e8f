"""Builds mmebm._cpu (C++) and mmebm._cuda (CUDA); everything else is in pyproject.toml.

torch is not imported, no GPU is looked for, nothing is downloaded. Settings, all environment variables:

    MMEBM_BUILD_CPU, MMEBM_BUILD_CUDA   auto (default): build if the tools are here, else say in one line what is not;
                                        1: fail if they are not here; 0: do not build
    MMEBM_CUDA_ARCHS                    default "80;90;100+PTX", less what this nvcc does not know
    CXX, CXXFLAGS                       the C++ compiler, and flags added to ours
    LDFLAGS                             flags added to ours where mmebm._cpu is linked (nvcc links mmebm._cuda)
    CUDA_HOME                           the CUDA toolkit (default: nvcc on PATH, else /usr/local/cuda)
    MAX_JOBS                            compilers that run at a time (default: ninja's, about one per core)

What was built, from which sources, and why something was not, is left in mmebm/_build.json (mmebm/build_record.py).
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import ClassVar

from setuptools import Distribution, Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# without the package, which imports torch
_spec = importlib.util.spec_from_file_location("build_record", ROOT / "mmebm" / "build_record.py")
assert _spec and _spec.loader, "mmebm/build_record.py is missing"
build_record = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(build_record)

if not (ROOT / "mmebm" / "kernels").is_dir():
    sys.exit(
        "this source tree lost the symbolic link mmebm/kernels -> ../kernels: use git clone or the .tar.gz, "
        "not a .zip, and on Windows enable git's core.symlinks"
    )

DEFAULT_ARCHS = "80;90;100+PTX"
CXX_FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-fvisibility=hidden", "-fPIC", "-Wall", "-Wextra"]
# Not -ffast-math anywhere: it turns the tests for NaN and infinity, which the samplers rely on, into nothing.
# csrc/*/cpu_kernel.cpp is compiled once for each, the first alone where the processor is no x86-64
ISA_FLAGS = {
    "generic": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"],
}
# csrc/net's once more: AVX-512 for batches of 8, AVX2 for batches of 4
NARROW_FLAGS = {
    "narrow512": [*ISA_FLAGS["avx512"], "-DMMEBM_NARROW"],
    "narrow256": [*ISA_FLAGS["avx2"], "-DMMEBM_NARROW"],
}
SWITCHES = {"mmebm._cpu": "MMEBM_BUILD_CPU", "mmebm._cuda": "MMEBM_BUILD_CUDA"}


class Missing(Exception):
    """A tool is absent; the message says which one and what would help."""


def tracked(*patterns: str) -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern))


EXTENSIONS = [
    Extension("mmebm._cpu", tracked("csrc/bind_cpu.cpp", "csrc/*/*.cpp"), depends=tracked("csrc/**/*.h")),
    Extension("mmebm._cuda", tracked("csrc/bind_cuda.cpp", "csrc/*/*.cu"), depends=tracked("csrc/**/*.h")),
]


def switch(name: str) -> str:
    value = os.environ.get(SWITCHES[name], "auto").strip().lower() or "auto"
    if value not in ("auto", "0", "1"):
        sys.exit(f"{SWITCHES[name]} must be auto, 0 or 1, got {value!r}")
    return value


def find_cxx() -> list[str]:
    for command in (os.environ.get("CXX"), sysconfig.get_config_var("CXX"), "c++", "g++", "clang++"):
        words = shlex.split(command or "")
        if words and shutil.which(words[0]):
            return words
    raise Missing("no C++ compiler found; install g++ or clang++, or set CXX")


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        places = [str(Path(home, "bin", "nvcc"))]  # what was asked for, and nothing else
    else:
        places = ["nvcc", "/usr/local/cuda/bin/nvcc"]
    for place in places:
        if found := shutil.which(place):
            return found
    raise Missing(f"nvcc not found ({' or '.join(places)}); install the CUDA toolkit or set CUDA_HOME")


def find_pybind11() -> str:
    try:
        import pybind11
    except ImportError:
        raise Missing("pybind11 is not installed (a build without isolation needs it); pip install pybind11") from None
    return pybind11.get_include()


def find_ninja() -> str:
    try:
        import ninja
    except ImportError:
        found = shutil.which("ninja")
    else:
        found = shutil.which("ninja", path=ninja.BIN_DIR) or shutil.which("ninja")
    if not found:
        raise Missing("ninja is not installed (a build without isolation needs it); pip install ninja")
    return found


def first_line(command: list[str], containing: str = "") -> str:
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return next((line.strip() for line in lines if containing in line), "")


class Tools:
    """The compilers for one extension; raises Missing if one of them is absent."""

    def __init__(self, name: str) -> None:
        if os.name != "posix":
            raise Missing("only Linux and macOS builds are supported; the PyTorch and Triton backends work without it")
        self.nvcc = find_nvcc() if name == "mmebm._cuda" else None
        self.cxx = find_cxx()
        self.host_cxx = next(word for word in self.cxx if Path(word).name not in ("ccache", "sccache", "distcc"))
        self.pybind11 = find_pybind11()
        self.ninja = find_ninja()

    def versions(self) -> str:
        versions = first_line([*self.cxx, "--version"])
        if self.nvcc:
            versions += "; nvcc " + first_line([self.nvcc, "--version"], "release")
        return versions

    def archs(self) -> list[str]:
        """Like ["80", "90", "100+PTX"]."""
        assert self.nvcc
        asked = os.environ.get("MMEBM_CUDA_ARCHS", "").replace(",", ";").replace(" ", ";")
        if archs := [arch for arch in asked.split(";") if arch]:
            for arch in archs:
                if not arch.removesuffix("+PTX").rstrip("af").isdigit():
                    sys.exit(f'MMEBM_CUDA_ARCHS must look like "{DEFAULT_ARCHS}", got {asked!r}')
            return archs
        listing = subprocess.run([self.nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
        known = [arch.removesuffix("+PTX") for arch in DEFAULT_ARCHS.split(";")]
        known = [arch for arch in known if f"compute_{arch}" in listing.split()]
        if not known:
            sys.exit(f"{self.nvcc} knows none of the architectures {DEFAULT_ARCHS}; set MMEBM_CUDA_ARCHS")
        return [*known[:-1], known[-1] + "+PTX"]

    def gencode(self) -> list[str]:
        flags = []
        for arch in self.archs():
            number = arch.removesuffix("+PTX")
            flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
            if arch.endswith("+PTX"):
                flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
        return flags


def ninja_path(path: Path | str) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja_command(words: list[str]) -> str:
    own = ("$in", "$out", "$out.d")  # ninja's variables, which it quotes for the shell itself
    return " ".join(word if word in own else shlex.quote(word).replace("$", "$$") for word in words)


@functools.cache
def plan() -> tuple[dict[str, Tools], dict[str, str]]:
    """The compilers of each extension that will be built, and why each of the others will not."""
    tools: dict[str, Tools] = {}
    reasons: dict[str, str] = {}
    for name in SWITCHES:
        if switch(name) == "0":
            reasons[name] = f"{SWITCHES[name]}=0"
            continue
        try:
            tools[name] = Tools(name)
        except Missing as missing:
            reasons[name] = str(missing)
    return tools, reasons


class BuiltDistribution(Distribution):
    """Without an extension it is pure Python: its wheel is py3-none-any."""

    def has_ext_modules(self) -> bool:
        return bool(plan()[0])


class Build(build):
    # build_ext runs also where it compiles nothing: it leaves the record
    sub_commands: ClassVar = [(name, None if name == "build_ext" else needed) for name, needed in build.sub_commands]


class BuildExtensions(build_ext):
    """Compiles with ninja: all files of both extensions side by side, again only what changed."""

    tools: dict[str, Tools]
    reasons: dict[str, str]

    def finalize_options(self) -> None:
        super().finalize_options()
        self.tools, self.reasons = plan()
        self.extensions = [extension for extension in self.extensions or [] if extension.name in self.tools]

    def run(self) -> None:
        for name, reason in self.reasons.items():
            if switch(name) == "1":
                sys.exit(f"{SWITCHES[name]}=1, but {name} cannot be built: {reason}")
            print(f"{name} is not built: {reason}", flush=True)
        record = {name: {"built": False, "reason": f"at install: {reason}"} for name, reason in self.reasons.items()}
        for name, tools in self.tools.items():
            record[name] = {"built": True, "with": tools.versions(), "sources": build_record.digest(ROOT / "csrc")}
        super().run()
        path = self._record_path()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")

    def _record_path(self) -> Path:
        return Path(self.get_ext_fullpath("mmebm._cpu")).with_name(build_record.NAME)

    def get_outputs(self) -> list[str]:
        return [*super().get_outputs(), *([] if self.inplace else [str(self._record_path())])]

    def build_extensions(self) -> None:
        work = Path(self.build_temp).resolve() / "ninja"
        work.mkdir(parents=True, exist_ok=True)
        lines, targets = [], []
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name)).resolve()
            target.parent.mkdir(parents=True, exist_ok=True)
            lines += self._statements(extension, self.tools[extension.name], target, work)
            targets.append(ninja_path(target))
        (work / "build.ninja").write_text("\n".join([*lines, "default " + " ".join(targets), ""]))
        jobs = os.environ.get("MAX_JOBS", "")
        if jobs and not jobs.isdigit():
            sys.exit(f"MAX_JOBS must be a positive number, got {jobs!r}")
        command = [next(iter(self.tools.values())).ninja, "-C", str(work), *(["-j", jobs] if jobs else [])]
        if subprocess.run(command).returncode != 0:
            sys.exit(
                "compiling the extensions failed (see above); MMEBM_BUILD_CPU=0 and MMEBM_BUILD_CUDA=0 go without them"
            )

    def _statements(self, extension: Extension, tools: Tools, target: Path, work: Path) -> list[str]:
        """The ninja statements that build one extension: a rule per kind of file, an edge per object, the link."""
        tag = extension.name.rpartition(".")[2]
        python_includes = {sysconfig.get_path("include"), sysconfig.get_path("platinclude")}
        common = [f"-I{ROOT / 'csrc'}", f'-DMMEBM_VERSION="{self.distribution.get_version()}"']
        system = [word for path in [tools.pybind11, *sorted(python_includes)] for word in ("-isystem", path)]
        cxx = [*tools.cxx, *CXX_FLAGS, *common, *system]
        if tools.nvcc:
            cxx.append(f'-DMMEBM_CUDA_ARCHS="{";".join(tools.archs())}"')
        cxx += [*shlex.split(os.environ.get("CXXFLAGS", "")), "-MMD", "-MF", "$out.d", "-c", "$in", "-o", "$out"]
        lines: list[str] = []

        def rule(name: str, command: list[str], depfile: bool = True) -> None:
            deps = "\n  depfile = $out.d\n  deps = gcc" if depfile else ""
            lines.append(f"rule {name}\n  command = {ninja_command(command)}\n  description = {name} $out{deps}")

        rule(f"cxx{tag}", cxx)
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        isas = ISA_FLAGS if x86 else {"generic": []}
        narrow = NARROW_FLAGS if x86 else {}
        for isa, flags in {**isas, **narrow}.items():
            rule(f"kernel{tag}_{isa}", [*tools.cxx, f"-DMMEBM_ISA={isa}", *flags, *cxx[len(tools.cxx) :]])
        if tools.nvcc:
            host = ["-Xcompiler", "-fPIC,-fvisibility=hidden,-fno-math-errno,-Wall"]
            nvcc = [tools.nvcc, "-ccbin", tools.host_cxx, "-std=c++17", "-O3", *tools.gencode(), *host, *common]
            rule(f"nvcc{tag}", [*nvcc, "-MD", "-MF", "$out.d", "-c", "$in", "-o", "$out"])
            link = [tools.nvcc, "-ccbin", tools.host_cxx, "-shared", "-cudart", "static"]
        elif sys.platform == "darwin":
            link = [*tools.cxx, "-bundle", "-undefined", "dynamic_lookup"]
        else:
            link = [*tools.cxx, "-shared", "-pthread"]
        added = [] if tools.nvcc else shlex.split(os.environ.get("LDFLAGS", ""))
        rule(f"link{tag}", [*link, "$in", "-o", "$out", *added], depfile=False)
        objects = []
        for source in extension.sources:
            kind = "nvcc" if source.endswith(".cu") else "cxx"
            rules = {f"{source}.o": f"{kind}{tag}"}
            if source.endswith("_kernel.cpp"):
                names = {**isas, **narrow} if source.startswith("csrc/net/") else isas
                rules = {f"{source}.{isa}.o": f"kernel{tag}_{isa}" for isa in names}
            for built, name in rules.items():
                objects.append(ninja_path(work / tag / built))
                lines.append(f"build {objects[-1]}: {name} {ninja_path(ROOT / source)}")
        lines.append(f"build {ninja_path(target)}: link{tag} {' '.join(objects)}")
        return lines


def long_description() -> str:
    """README.md with links that also work where only it is shown."""
    source = "https://github.com/mmebm/mmebm/blob/main/"
    return re.sub(r"\]\((?![a-z]+:|#)", f"]({source}", (ROOT / "README.md").read_text(encoding="utf-8"))


setup(
    ext_modules=EXTENSIONS,
    cmdclass={"build": Build, "build_ext": BuildExtensions},
    distclass=BuiltDistribution,
    long_description=long_description(),
    long_description_content_type="text/markdown",
)
