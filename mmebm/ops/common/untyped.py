"""Torch without its types, for what its stubs leave open or call private, and the registration of ops that needs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

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


def gradients(
    outputs: Sequence[tuple[Tensor, Tensor | None]], leaves: Sequence[Tensor], *, create_graph: bool
) -> list[Tensor | None]:
    """In a backward pass, of pairs of an output and its gradient: the gradient of each leaf, None for one that wants
    none or that no output depends on."""
    wanted = [t for t in leaves if t.requires_grad]
    pairs = [(o, d) for o, d in outputs if d is not None and o.requires_grad]
    found: Sequence[Tensor | None] = [None] * len(wanted)
    if wanted and pairs:
        values, slopes = zip(*pairs, strict=True)
        found = torch.autograd.grad(values, wanted, slopes, create_graph=create_graph, allow_unused=True)
    each = iter(found)
    return [next(each) if t.requires_grad else None for t in leaves]
