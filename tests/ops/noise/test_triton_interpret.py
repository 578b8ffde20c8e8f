"""The Triton noise in Triton's interpreter against its definition in :mod:`mmebm.noise`.

Run with ``TRITON_INTERPRET=1 python -m pytest -m interpret``; it replaces the compiler for the whole process.
"""

from __future__ import annotations

import os
import random
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from mmebm import noise
from mmebm.kernels import noise as kernel
from mmebm.ops import parity

pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, of the interpreter: integers that wrap
]

CPU = torch.device("cpu")
SHAPES = [(1, 1), (1, 7), (3, 4), (5, 3, 3), (2, 1023), (300, 1), (1, 2048), (7, 5, 4, 4)]


@pytest.mark.parametrize("shape", SHAPES)
def test_is_the_definition(shape: tuple[int, ...], seed: int) -> None:
    rng = random.Random(seed)
    at: dict[str, Any] = {
        "seed": rng.choice([rng.getrandbits(64), 0, 2**64 - 1, 1]),
        "step": rng.choice([rng.getrandbits(32), 0, 2**32 - 1]),
        "stream": noise.stream(rng.randrange(5), rng.randrange(5)),
        "chain_offset": rng.choice([0, 2**32 - 2, rng.getrandbits(32)]),
    }
    out = torch.full(shape, float("nan"))
    kernel.fill_normal(out, **at)
    exact = noise.normal(shape, **at, dtype=torch.float64)
    assert (out.double() - exact).abs().max() <= parity.NORMAL_TOLERANCE
    for dtype in (torch.float32, torch.float64):
        out = torch.full(shape, float("nan"), dtype=dtype)
        kernel.fill_uniform(out, **at)
        assert torch.equal(out, noise.uniform(shape, **at, dtype=dtype))
    blocks = -(-out[0].numel() // 4)
    words = torch.full((shape[0], blocks, 4), -7, dtype=torch.int32)
    kernel.fill_words(words, **at)
    assert torch.equal(words.long() & noise.MASK32, noise.words(shape[0], blocks, **at))


def test_nothing_beside_a_row_is_written() -> None:
    memory = torch.full((4, 13), -3.0)
    kernel.fill_normal(memory[1:3], seed=1, step=2, stream=3, chain_offset=0)  # rows 1 and 2, contiguous
    assert (memory[0] == -3).all() and (memory[3] == -3).all() and (memory[1:3] != -3).all()


def test_an_empty_tensor_and_limits() -> None:
    kernel.fill_normal(torch.empty(0, 3), seed=1, step=0, stream=0, chain_offset=0)
    assert kernel.supports(torch.empty(2, 3)) is None
    assert "2^31" in str(kernel.supports(torch.empty(1).expand(1 << 20, 1 << 13)))


def test_its_parity_case_passes_and_sees_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parity.check("noise", "triton", CPU).reason is None
    right = kernel.fill_uniform

    def wrong(out: torch.Tensor, **at: int) -> None:
        right(out, **at)
        out[-1, -1] += 2.0**-24

    monkeypatch.setattr(kernel, "fill_uniform", wrong)
    assert "uniforms" in str(parity.check("noise", "triton", CPU).reason)
