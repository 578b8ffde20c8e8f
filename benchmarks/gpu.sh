#!/usr/bin/env bash
# The GPU suite, then the GPU timings: one JSON file under benchmarks/results/ (or $1). No timing where a test fails.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python}

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "no CUDA device: torch.cuda.is_available() is False" >&2
    exit 1
fi

# a backend that is expected here and missing is a failure, not a skip
MMEBM_REQUIRE_BACKENDS=${MMEBM_REQUIRE_BACKENDS:-triton,cuda} "$python" -m pytest -m gpu -q tests
PYTHONPATH=. "$python" benchmarks/gpu.py ${1:+--out "$1"}
