"""Torch without its types, for what its stubs leave open or call private, and the registration of ops that needs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

TORCH: Any = torch
# For isinstance: what passes stays Any, where list, tuple and dict by name would make it one of unknown parts
LISTS: tuple[type[Any], ...] = (list, tuple)
DICT: type[Any] = dict


def register(schema: str, op: Callable[..., Any], fake: Callable[..., Any], *autograd: Callable[..., Any]) -> Any:
    """Makes ``op`` one of ``torch.ops.mmebm``, unless it is there already; the library, which must live as long.

    ``autograd``: nothing, or the backward pass and what sets its context up.
    """
    library, name = TORCH.library.Library("mmebm", "FRAGMENT"), schema.partition("(")[0]
    if not hasattr(torch.ops.mmebm, name):
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, op, "CompositeExplicitAutograd")
        TORCH.library.register_fake(f"mmebm::{name}", fake, lib=library)
        if autograd:
            backward, setup = autograd
            TORCH.library.register_autograd(f"mmebm::{name}", backward, setup_context=setup, lib=library)
    return library
