#!/usr/bin/env bash
# Everything that wants a GPU, by one command on a bare machine: install, the GPU tests, every implementation against its
# reference, timings beside peers, and at the end a table of what was predicted and what was measured.
#
#     benchmarks/gpu.sh [--rehearse] [--full] [--tests | --timings] [OUT.json]
#
# PYTHON    the interpreter (default: python), one that has torch with CUDA; nvcc on the path
# WHEELS    a folder of wheels, where the machine reaches no index: pybind11, pytest, hypothesis, torchebm, ...
# --full    all states and 21 rounds instead of three and 7
# --rehearse   on a machine without a device: every step up to what only a device can do
# --tests, --timings   one half, where a call may not take as long as both; timings are for after tests that passed
#
# Without --full the aim is eight minutes in all, which no device has confirmed: the times after each step's name say
# where they go.
#
# No timing where a test fails. The JSON file goes to OUT.json, or benchmarks/results/; it is written after every case.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python}
rehearse='' full='' only='' out=''
for argument in "$@"; do
    case $argument in
        --rehearse) rehearse=--rehearse ;;
        --full) full=1 ;;
        --tests | --timings) only=$argument ;;
        -*) echo "unknown option $argument" >&2; exit 2 ;;
        *) out=$argument ;;
    esac
done
step() { printf '\n== %s (after %d s)\n' "$1" "$SECONDS"; }

step "device"
if [ -z "$rehearse" ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "no CUDA device: torch.cuda.is_available() is False (--rehearse goes without)" >&2
    exit 1
fi
"$python" -c 'import sys, torch, triton; print("python", sys.version.split()[0], "torch", torch.__version__, "triton", triton.__version__)'

step "install"
# what the machine has stays as it is, torch and triton above all
needed=(numpy:numpy pybind11:pybind11 ninja:ninja setuptools:setuptools pytest:pytest hypothesis:hypothesis
        pydantic:pydantic safetensors:safetensors tomli_w:tomli-w sklearn:scikit-learn scipy:scipy skimage:scikit-image
        mlxtend:mlxtend matplotlib:matplotlib PIL:pillow shtab:shtab tqdm:tqdm)
[ -n "$rehearse" ] || needed+=(torchebm:torchebm)
mapfile -t missing < <("$python" - "${needed[@]}" << 'END'
import sys
from importlib.util import find_spec

for module, package in (pair.split(":") for pair in sys.argv[1:]):
    if find_spec(module) is None:
        print(package)
END
)
if [ ${#missing[@]} -gt 0 ]; then
    # torchebm asks for another torch than a machine may have: its own needs are above
    command=("$python" -m pip install -q --no-deps ${WHEELS:+--no-index --find-links "$WHEELS"} "${missing[@]}")
    if [ -n "$rehearse" ]; then echo "would run: ${command[*]}"; else "${command[@]}"; fi
fi
command -v nvcc > /dev/null || echo "no nvcc: mmebm._cuda cannot be built" >&2
arch=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability() if torch.cuda.is_available() else 90)')
build=(env "MMEBM_CUDA_ARCHS=$arch" "$python" setup.py -q build_ext --inplace)
if [ -n "$rehearse" ]; then echo "would run: ${build[*]}"; else "${build[@]}" > /dev/null; fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

if [ "$only" != --timings ]; then
step "tests"
# a backend that is expected here and missing is a failure, not a skip
export MMEBM_REQUIRE_BACKENDS=${MMEBM_REQUIRE_BACKENDS:-triton,cuda}
if [ -n "$rehearse" ]; then
    MMEBM_REQUIRE_BACKENDS='' "$python" -m pytest -m gpu -q --collect-only tests | tail -n 1
else
    "$python" -m pytest -m gpu -q -x tests
fi

step "every implementation against its reference"
if [ -n "$rehearse" ]; then "$python" -m mmebm backends; else "$python" -m mmebm backends --check; fi
fi

if [ "$only" != --tests ]; then
step "timings"
options=($rehearse ${out:+--out "$out"})
[ -n "$full" ] || options+=(--quick --rounds 7)
"$python" benchmarks/gpu.py "${options[@]}"
fi
step "done"
