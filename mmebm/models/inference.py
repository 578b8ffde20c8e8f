"""Joint inference: one Gaussian expert per modality, joined as a mixture, a product, or a mixture of products."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from mmebm.models.nets import Net, encoder
from mmebm.reference.langevin_step import widen

Joint = Literal["mixture", "product", "mixture_of_products"]


class Expert(NamedTuple):
    """A diagonal Gaussian over z: mean and log-variance, each (n, latent)."""

    mean: Tensor
    logvar: Tensor

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """A reparameterised sample (n, latent)."""
        noise = torch.randn(
            self.mean.shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype
        )
        return self.mean + (0.5 * self.logvar).exp() * noise

    def log_prob(self, z: Tensor) -> Tensor:
        """log N(z; mean, exp(logvar)): (n,)."""
        square = (z - self.mean).square() * (-self.logvar).exp()
        return -0.5 * (square + self.logvar + math.log(2 * math.pi)).sum(1)

    def kl(self) -> Tensor:
        """KL(self || N(0, I)): (n,)."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1 - self.logvar).sum(1)


def product(experts: list[Expert]) -> Expert:
    """The normalised product of Gaussian experts and the prior N(0, I)."""
    precision = torch.stack([(-e.logvar).exp() for e in experts]).sum(0) + 1
    mean = torch.stack([e.mean * (-e.logvar).exp() for e in experts]).sum(0) / precision
    return Expert(mean, -precision.log())


class JointInference(nn.Module):
    """q(z | X) from one expert q_m(z | x_m) = N(mu_m(x_m), diag Sigma_m(x_m)) per modality.

    Args:
        shapes: modality name -> shape without the batch dimension.
        latent: size of z.
        joint: "mixture" (1/M) sum_m q_m (the paper's); "product" of the experts and the prior; or the
            "mixture_of_products" over all non-empty subsets. Missing modalities are left out of each.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], latent: int, *, net: Net = "mlp", width: int = 256, depth: int = 2,
        act: str = "silu", joint: Joint = "mixture",
    ) -> None:  # fmt: skip
        super().__init__()
        if joint not in ("mixture", "product", "mixture_of_products"):
            raise ValueError(f"joint must be 'mixture', 'product' or 'mixture_of_products', got {joint!r}")
        self.shapes, self.latent, self.joint = dict(shapes), latent, joint
        self.experts = nn.ModuleDict({
            name: encoder(shape, 2 * latent, net=net, width=width, depth=depth, act=act)
            for name, shape in shapes.items()
        })  # fmt: skip

    def forward(self, x: Mapping[str, Tensor]) -> list[Expert]:
        """The components of q(z | X) for the modalities that ``x`` holds, equally weighted."""
        if not x:
            raise ValueError("x must hold at least one modality, got none")
        experts = []
        for name, value in x.items():
            mean, logvar = widen(self.experts[name](value)).chunk(2, dim=1)  # densities are not for 16 bits
            # a variance outside e^-10 .. e^4 is a net gone astray, not a posterior
            experts.append(Expert(mean, logvar.clamp(-10.0, 4.0)))
        if self.joint == "product":
            return [product(experts)]
        if self.joint == "mixture_of_products":
            sizes = range(1, len(experts) + 1)
            return [product(list(s)) for size in sizes for s in itertools.combinations(experts, size)]
        return experts

    def sample(self, x: Mapping[str, Tensor], generator: torch.Generator | None = None) -> Tensor:
        """One sample per row (n, latent), each row from a component picked uniformly."""
        components = self(x)
        samples = torch.stack([c.sample(generator) for c in components])
        n = samples.shape[1]
        pick = torch.randint(len(components), (n,), generator=generator, device=samples.device)
        return samples[pick, torch.arange(n, device=samples.device)]

    def log_prob(self, z: Tensor, x: Mapping[str, Tensor], *, per_expert: bool = False) -> Tensor:
        """log q(z | X), (n,); with ``per_expert`` its lower bound, the mean of the components' log densities."""
        parts = torch.stack([c.log_prob(z) for c in self(x)])
        return parts.mean(0) if per_expert else parts.logsumexp(0) - math.log(len(parts))
