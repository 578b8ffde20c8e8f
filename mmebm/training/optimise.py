"""One network's optimiser: Adam as configured, gradient clipping, a learning-rate factor, averaged gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmebm.training.config import AdamConfig
from mmebm.training.parallel import Processes


class Optimiser:
    """Adam on the parameters of ``module``.

    Args:
        module: whose parameters learn.
        config: Adam's numbers.
        accumulate: an update is made at every ``accumulate``-th call, with the mean of their gradients.
        processes: over which the gradients are averaged.
        weight: of this process's gradients among them (:meth:`Processes.weight`).
    """

    def __init__(
        self,
        module: nn.Module,
        config: AdamConfig,
        *,
        accumulate: int = 1,
        processes: Processes | None = None,
        weight: float = 1.0,
    ) -> None:
        self.config: AdamConfig = config
        self.accumulate: int = accumulate
        self.processes: Processes = processes or Processes()
        self.weight: float = weight
        self.parameters: list[nn.Parameter] = [p for p in module.parameters() if p.requires_grad]
        self.adam: torch.optim.Adam = torch.optim.Adam(
            self.parameters,
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
            fused=True,
        )
        self._calls = 0

    def step(self, loss: Tensor, lr: float = 1.0) -> None:
        """Backward of ``loss`` and one update; gradients of other networks are not touched."""
        self.apply(torch.autograd.grad(loss, self.parameters, allow_unused=True), lr)

    def apply(self, grads: Sequence[Any], lr: float = 1.0) -> None:
        """One update with ``grads`` at ``lr`` times the configured rate (or a part of it, see ``accumulate``)."""
        self._calls += 1
        for p, g in zip(self.parameters, grads, strict=True):
            if g is not None:
                p.grad = g if p.grad is None else p.grad + g
        if self._calls < self.accumulate:
            return
        self._calls = 0
        held = [p.grad for p in self.parameters if p.grad is not None]
        if self.accumulate > 1:
            torch._foreach_div_(held, float(self.accumulate))
        self.processes.average(held, weight=self.weight)
        if self.config.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm)
        for group in self.adam.param_groups:
            group["lr"] = self.config.lr * lr
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Adam's state of the same parameters, as ``adam.state_dict()`` gives it; gradients in hand are dropped.

        Raises:
            ValueError: where it is of other parameters or of another configuration: torch would not say.
        """
        own, groups = self.adam.state_dict()["param_groups"][0], state["param_groups"]
        for name in ("params", "betas", "eps", "weight_decay", "amsgrad", "maximize"):
            if len(groups) != 1 or _plain(groups[0][name]) != _plain(own[name]):
                raise ValueError(f"Adam has {name}={own[name]!r:.80} here, and {groups[0].get(name)!r:.80} there")
        for at, of in state["state"].items():
            if at not in range(len(self.parameters)):
                raise ValueError(f"Adam's state is of parameter {at}, of {len(self.parameters)} there are")
            shape = self.parameters[at].shape
            if of["exp_avg"].shape != shape or of["exp_avg_sq"].shape != shape or of["step"].shape != ():
                raise ValueError(f"Adam's state of parameter {at} has not its shape {tuple(shape)}")
        self._calls = 0
        self.adam.load_state_dict(dict(state))
        self.adam.zero_grad(set_to_none=True)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
