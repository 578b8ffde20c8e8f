"""Where cuDNN in a captured graph is likely faster than :mod:`mmebm.ops.net.triton`: an estimate by counting.

Nothing here has been measured: the page docs/kernels.md has the counts and what they lead to.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from mmebm.ops.net.graph import Activation, Conv, Input, Linear, Net, View, reads, shapes_of

__all__ = ["estimates", "slower"]

# What the estimates assume of a device, from an H100's data sheet: 67 TFLOP/s of fp32 and 3.35 TB/s, of which a stream
# of large arrays reaches 90 %; a kernel of a captured graph takes 2 us at least. The shares of the peak are guesses
# until somebody measures them: a plain implicit product in Triton, and cuDNN's in fp32 and in TF32, which torch allows
# for convolutions unless told otherwise.
_BYTES: Final = 0.9 * 3.35e12
_KERNEL: Final = 2e-6
_PEAK: Final = 67e12
_SHARES: Final = {"fp32": 0.35, "tf32x3": 0.9, "cudnn": 0.7, "cudnn, tf32": 3.0}


def _padded(n: int) -> float:
    """How many times the work of ``n`` outputs the tiles of a product do."""
    tile = min(64, max(16, 1 << (n - 1).bit_length()))
    return -(-n // tile) * tile / n


def estimates(net: Net, chains: int, precision: str = "fp32", tf32: bool = True) -> tuple[float, float]:
    """Seconds of a step here and in autograd with cuDNN, both captured: docs/kernels.md says what is counted."""
    shapes, users = shapes_of(net), [0] * len(net.nodes)
    for node in net.nodes:
        for r in reads(node):
            users[r] += 1
    here = there = 2 * _KERNEL  # the update, and the records or the noise
    for node, shape in zip(net.nodes, shapes, strict=True):
        if isinstance(node, (Input, View)):
            continue
        before = [shapes[r] for r in reads(node)]
        out, into = 4 * chains * math.prod(shape), 4 * chains * sum(map(math.prod, before))
        if isinstance(node, (Conv, Linear)):
            convolves = isinstance(node, Conv)
            transposed, groups = (node.transposed, node.groups) if isinstance(node, Conv) else (False, 1)
            first, second = node.weight.shape[0] // groups, node.weight.shape[1]
            outputs, inputs = (second, first) if transposed else (first, second)
            # of each output of a convolution, or input of a transposed one
            flops = 2.0 * chains * node.weight.numel() * math.prod((before[0] if transposed else shape)[1:])
            library = _SHARES["cudnn, tf32" if tf32 and convolves else "cudnn"] * _PEAK
            moved = (out + into) / _BYTES
            for side in (outputs, inputs):
                here += max(_KERNEL, _padded(side) * flops / (_SHARES[precision] * _PEAK), moved)
            # torch adds the bias by a kernel of its own
            there += 2 * max(_KERNEL, flops / library, moved) + max(_KERNEL, 2 * out / _BYTES)
        elif isinstance(node, Activation) and users[node.x] == 1 and isinstance(net.nodes[node.x], (Conv, Linear)):
            here += 2 * out / _BYTES  # the slope, written and read
            there += max(_KERNEL, 2 * out / _BYTES) + max(_KERNEL, 3 * out / _BYTES)
        else:
            both = 2 * max(_KERNEL, (out + into) / _BYTES)
            here, there = here + both, there + both
    return here, there


def slower(net: Net, x: Tensor, precision: str = "fp32") -> str | None:
    """Why "auto" had better leave ``net`` to autograd with cuDNN in a captured graph, or None."""
    try:
        tf32 = torch.backends.cudnn.allow_tf32
    except RuntimeError:  # set by the names of a newer interface: as torch has it by itself
        tf32 = True
    here, there = estimates(net, x.shape[0], precision, tf32)
    if here <= there:
        return None
    wide = [node.weight.shape[:2] for node in net.nodes if isinstance(node, Conv)]
    widest = max((max(shape) for shape in wide), default=0)
    return (
        f"cuDNN in a captured graph is likely faster on layers up to {widest} wide (by operations and bytes "
        f"{there * 1e6:.0f} us a step, here {here * 1e6:.0f})"
    )
