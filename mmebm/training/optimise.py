"""One network's optimiser: Adam as configured, gradient clipping, a learning-rate factor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmebm.training.config import AdamConfig


class Optimiser:
    """Adam on the parameters of ``module``."""

    def __init__(self, module: nn.Module, config: AdamConfig) -> None:
        self.config = config
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.adam = torch.optim.Adam(
            self.parameters, lr=config.lr, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay,
            fused=True,
        )  # fmt: skip

    def step(self, loss: Tensor, lr: float = 1.0) -> None:
        """Backward of ``loss`` and one update; gradients of other networks are not touched."""
        grads = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        self.apply(grads, lr)

    def apply(self, grads: Any, lr: float = 1.0) -> None:
        """One update with ``grads`` at ``lr`` times the configured rate."""
        for p, g in zip(self.parameters, grads, strict=True):
            p.grad = g
        if self.config.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm)
        for group in self.adam.param_groups:
            group["lr"] = self.config.lr * lr
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
