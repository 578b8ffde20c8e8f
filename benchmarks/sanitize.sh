#!/usr/bin/env bash
# The kernels under compute-sanitizer: memcheck (addresses), racecheck (shared memory), initcheck (memory read before it
# was written) and synccheck (barriers), over a small part of the GPU tests. Minutes: every access is instrumented.
#
#     benchmarks/sanitize.sh [expression for pytest -k]
#
# Skips with a message where the tool or a device is missing. PYTHON names the environment, COMPUTE_SANITIZER the tool.
# torch is told not to cache memory, so that an access behind a tensor is one behind an allocation.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python}
selected=${1:-"(each_option and (all or grad_norm_clip)) or addresses or many_tensors or perturb"}

sanitizer=$(command -v "${COMPUTE_SANITIZER:-compute-sanitizer}" ||
    command -v "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer" || true)
if [ -z "$sanitizer" ]; then
    echo "not run: compute-sanitizer not found; it is part of the CUDA toolkit (set CUDA_HOME or COMPUTE_SANITIZER)"
    exit 0
fi
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "not run: no CUDA device: torch.cuda.is_available() is False"
    exit 0
fi

export MMEBM_REQUIRE_BACKENDS=${MMEBM_REQUIRE_BACKENDS:-triton,cuda} PYTORCH_NO_CUDA_MEMORY_CACHING=1
for tool in memcheck racecheck initcheck synccheck; do
    printf '\n== %s\n' "$tool"
    "$sanitizer" --tool "$tool" --error-exitcode 1 --target-processes all \
        "$python" -m pytest -m gpu -q -x -p no:cacheprovider -k "$selected" tests/ops/langevin_step/test_gpu.py
done
