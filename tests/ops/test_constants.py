"""The constants of a step have one order, in Python, in C++ and CUDA, and in Triton."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from mmebm.ops.common.params import FIELDS, StepOptions

HEADER = Path(__file__).parents[2] / "csrc" / "common" / "langevin.h"


def names(enum: str) -> list[str]:
    """The enumerators of the header, in order, with the values that are written beside them."""
    found = re.search(rf"^enum {enum}(?: : uint32_t)? {{(.*?)}};", HEADER.read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None, f"no enum {enum} in {HEADER}"
    text = re.sub(r"//.*", "", found[1])
    return [name.strip() for name in text.split(",") if name.strip()]


def test_cpp_and_cuda_have_the_fields_of_step_params() -> None:
    assert names("Slot") == [*(field.upper() for field in FIELDS), "SLOTS"]


def test_cpp_and_cuda_have_the_bits_of_step_options() -> None:
    plain = StepOptions(seed=0, streams=(0,), noisy=(True,))
    assert plain.bits == 0
    switches = {"REJECT_OUTSIDE": {"outside": "reject"}, "CLAMP_NOISE": {"clamp_noise": True}}
    switches |= {"NORM_OF_TENSOR": {"norm_over": "tensor"}, "SCORE": {"score": True}}
    assert names("Option") == [f"{name} = {replace(plain, **on).bits}" for name, on in switches.items()]


def test_triton_has_the_fields_of_step_params() -> None:
    pytest.importorskip("triton")
    from mmebm.kernels import langevin_step as kernels
    from mmebm.kernels import rule

    others = {"grad_norm_clip": "NORM_CLIP", "low": "LOWER", "high": "UPPER"}
    assert [getattr(rule, others.get(field, field.upper())).value for field in FIELDS] == list(range(len(FIELDS)))
    bits = [getattr(kernels, name).value for name in ("_NOISE", "_GRAD", "_SCORE", "_MASK", "_MASK_ROWS", "_ALIGNED")]
    fields = [1 << k for k in range(len(FIELDS))]
    tensors = [1 << (kernels._TENSOR.value + k) for k in range(len(FIELDS))]
    rows = [1 << (kernels._ROWS.value + k) for k in range(len(FIELDS))]
    every = [*fields, *bits, *tensors, *rows]
    # one bit each, in an int32
    assert len(set(every)) == len(every) and max(every) < 1 << 31
