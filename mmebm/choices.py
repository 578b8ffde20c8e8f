"""Names that networks and settings choose among; without torch, so that the command line can list them at once."""

from __future__ import annotations

from typing import Literal

Net = Literal["mlp", "conv", "resnet"]
Activation = Literal["relu", "leaky_relu", "silu", "gelu", "softplus", "tanh", "elu"]
Joint = Literal["mixture", "product", "product_without_prior", "mixture_of_products"]
# What the prior of the latent is (mmebm.models.latent_prior)
PriorKind = Literal["energy", "mixture", "flow"]
# Whose samples a prior learns from, and completions start from: q(z | X) as configured, or another joint
FittedTo = Literal["inference", "mixture", "product", "product_without_prior", "mixture_of_products"]
# What a validation picks the best checkpoint by (mmebm.evaluation.heldout)
Metric = Literal["bound", "mse", "cross_mse", "retrieval", "kernel"]
