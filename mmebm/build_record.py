"""What setup.py leaves about the extensions that it compiled. Of the standard library alone: setup.py reads this file
before torch is there."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Final

NAME: Final = "_build.json"


def read(package: Path, extension: str) -> dict[str, Any]:
    """The record of one extension beside the package's files, {} if there is none."""
    try:
        return json.loads((package / NAME).read_text()).get(extension, {})
    except (OSError, ValueError):
        return {}


def digest(sources: Path) -> str:
    """Of the names and bytes of all C++ and CUDA files under ``sources``; "" if there are none, as where only a wheel
    was installed."""
    found = sorted(path for path in sources.rglob("*") if path.suffix in (".h", ".cpp", ".cu"))
    files = [(path.relative_to(sources).as_posix(), hashlib.sha256(path.read_bytes()).hexdigest()) for path in found]
    return hashlib.sha256(repr(files).encode()).hexdigest() if files else ""
