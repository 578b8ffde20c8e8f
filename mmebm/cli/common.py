"""What several commands do."""

from __future__ import annotations

import torch


def pick_device(name: str) -> torch.device:
    """The device of ``--device``: "auto", "cpu", "cuda", or one of several, "cuda:1".

    Raises:
        ValueError: for a device that torch does not have here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device takes auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            raise ValueError(f"--device {name}: torch sees no GPU here; use --device cpu or auto")
        if device.index is not None and device.index >= count:
            raise ValueError(f"--device {name}: torch sees {count} GPUs here, cuda:0 to cuda:{count - 1}")
    elif device.type != "cpu":
        raise ValueError(f"--device takes auto, cpu, cuda or cuda:N, got {name!r}")
    return device
