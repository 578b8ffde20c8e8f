"""Which implementation draws (:mod:`mmebm.ops.noise`); that they agree is tested where each of them is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmebm import native, noise
from mmebm.ops import noise as drawn
from mmebm.ops import parity

CUDA = torch.device("cuda", 0)


@pytest.fixture
def passing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every implementation had passed its case on a GPU."""
    pytest.importorskip("triton")
    monkeypatch.setattr(parity, "failure", lambda *_: None)
    monkeypatch.setattr(native, "loaded", lambda name: True)
    monkeypatch.delenv("MMEBM_BACKEND", raising=False)


def test_a_gpu_draws_by_triton_and_where_that_fails_by_cuda(passing: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmebm.kernels import noise as kernel

    assert drawn._module(CUDA, 3) is kernel
    monkeypatch.setattr(parity, "failure", lambda op, backend, device: "no" if backend == "triton" else None)
    assert drawn._module(CUDA, 3) is native
    monkeypatch.setattr(parity, "failure", lambda *_: "no")
    assert drawn._module(CUDA, 3) is None


def test_what_is_asked_for_by_name(passing: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmebm.kernels import noise as kernel

    for name, module in (("torch", None), ("cuda", native), ("triton", kernel), ("cpp", None)):
        monkeypatch.setenv("MMEBM_BACKEND", name)
        assert drawn._module(CUDA, 3) is module


def test_a_seed_on_a_device_is_the_definitions(passing: None) -> None:
    assert drawn._module(CUDA, torch.zeros((), dtype=torch.int64, device="meta")) is None


@pytest.mark.parametrize("draw", [drawn.normal, drawn.uniform])
def test_a_shape_without_chains_is_an_error(draw) -> None:
    with pytest.raises(ValueError, match="leading chain dimension"):
        draw((), seed=1)


def test_numbers_beyond_a_word_wrap_as_in_the_definition(need) -> None:
    need("cpp")
    at: dict[str, Any] = {"seed": -5, "step": 2**32 + 3, "chain_offset": 2**32 - 1}
    assert torch.equal(drawn.uniform((3, 5), **at), noise.uniform((3, 5), **at))
    assert torch.equal(drawn.words(3, 2, **at), noise.words(3, 2, **at))
