#!/usr/bin/env bash
# The tests in an environment of their own with the oldest, or with the newest, of what pyproject.toml asks for.
#
#     tests/floors.sh oldest [REQUIREMENT ...]      python3.10, torch and numpy as old as they may be
#     tests/floors.sh newest [REQUIREMENT ...]      this python3, the newest torch, numpy and Triton of the index
#
# A REQUIREMENT (torch==2.13.0, say) takes the place of the same package there, for an index that has not all of them;
# the last line says what was tested. PYTHON names another interpreter, TESTS other tests.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
which=${1:-}
[ "$which" = oldest ] || [ "$which" = newest ] || { sed -n '2,10p' "${BASH_SOURCE[0]}"; exit 2; }
shift
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

floor() { sed -n "s/^dependencies = .*\"$1>=\([0-9.]*\)\".*/\1/p" "$root/pyproject.toml"; }

if [ "$which" = oldest ]; then
    python=${PYTHON:-python3.10}
    wanted=("torch==$(floor torch).*" "numpy==$(floor numpy).*")
else
    python=${PYTHON:-python3}
    wanted=(torch numpy)
    [ "$(uname -sm)" = "Linux x86_64" ] && wanted+=(triton)
fi
requirements=()
for one in "${wanted[@]}"; do
    for given in "$@"; do
        [ "${given%%[=<>!~]*}" = "${one%%[=<>!~]*}" ] && one=$given
    done
    requirements+=("$one")
done

"$python" -m venv "$work/venv"
# shellcheck disable=SC1091
. "$work/venv/bin/activate"
pip install --quiet --upgrade pip
mkdir "$work/tree"
git -C "$root" archive HEAD | tar -x -C "$work/tree"
cd "$work/tree"
pip install --quiet "${requirements[@]}"
# what is there already stays: --upgrade-strategy only-if-needed is pip's default
MMEBM_BUILD_CUDA=0 pip install --quiet . 'pytest>=8' 'hypothesis>=6.100' scipy "${requirements[@]}"
rm -rf mmebm # the tests are to find what was installed
# shellcheck disable=SC2086
python -m pytest -q ${TESTS:-tests/test_noise.py tests/test_state.py tests/ops/langevin_step/test_reference.py tests/samplers/test_langevin.py tests/samplers/test_published_loops.py}
python - <<'END'
import platform, numpy, torch
print(f"tested: Python {platform.python_version()}, torch {torch.__version__}, numpy {numpy.__version__}")
END
