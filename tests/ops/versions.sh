#!/bin/bash
# Compiles the Triton kernels with the range of Triton versions that a user meets: 3.6.0 (beside torch 2.11), 3.7.1
# (what constraints.txt pins) and 3.9.0. Registers, stack and shared memory must keep their budgets in all of them.
#
#     tests/ops/versions.sh [version ...]     in the environment of the tests; MMEBM_COMPILE_ALL=1: every target
#
# Each version is installed beside the environment's own, in a folder that is removed again, with its own cache.
set -u
cd "$(dirname "$0")/../.."
[ $# -gt 0 ] || set -- 3.6.0 3.7.1 3.9.0
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
failed=()
for version in "$@"; do
  if ! python -m pip install -q --no-deps --target "$folder/$version" "triton==$version"; then
    failed+=("$version (not installed)")
    continue
  fi
  export PYTHONPATH="$folder/$version:$PWD" TRITON_CACHE_DIR="$folder/cache-$version"
  found=$(python -c 'import triton; print(triton.__version__)')
  echo "== triton $found, torch $(python -c 'import torch; print(torch.__version__)')"
  [ "$found" = "$version" ] || { failed+=("$version (imported was $found)"); continue; }
  python -m pytest -q -m compile tests/ops --deselect tests/ops/test_cuda_compile.py || failed+=("$version")
done
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}"
  exit 1
fi
