"""``mmebm backends``: what can run here, and why the rest cannot."""

from __future__ import annotations

import argparse

from mmebm.backends import backends as found
from mmebm.backends import check, describe


def backends(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    print("\n".join(describe()))
    arguments.result = {name: backend._asdict() for name, backend in found().items()}
    return check() if arguments.check else 0
