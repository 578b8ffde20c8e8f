"""Fails where a public name of the package has no type that every checker reads alike: ``pyright --verifytypes``.

Not of :mod:`mmebm.adapters`, whose classes are those of packages that need not be installed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def main() -> int:
    command = ["pyright", "--verifytypes", "mmebm", "--ignoreexternal", "--outputjson"]
    # pyright reads no import hook, which is what an editable install may be; it reads PYTHONPATH
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    # its exit status is 1 for the adapters already
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    found = json.loads(run.stdout)
    if "typeCompleteness" not in found:
        print(found, file=sys.stderr)
        return 2
    symbols = [symbol for symbol in found["typeCompleteness"]["symbols"] if symbol["isExported"]]
    open_types = [s for s in symbols if not s["isTypeKnown"] and not s["name"].startswith("mmebm.adapters.")]
    for symbol in open_types:
        print(symbol["name"], *(d["message"].replace("\n", " ") for d in symbol["diagnostics"]), sep=": ")
    print(f"{len(open_types)} of {len(symbols)} public names have an incomplete type")
    if not symbols:
        print(*(d["message"] for d in found["generalDiagnostics"]), sep="\n", file=sys.stderr)
    return 1 if open_types or not symbols else 0


if __name__ == "__main__":
    sys.exit(main())
