"""Joint inference: one Gaussian expert per modality, joined as a mixture, a product, or a mixture of products."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, get_args

import torch
from torch import Tensor, nn

from mmebm.choices import Joint, Net
from mmebm.models.generator import latent_columns, rows_with
from mmebm.models.nets import encoder
from mmebm.ops.common.layout import widen

JOINTS: tuple[Joint, ...] = get_args(Joint)


class Expert(NamedTuple):
    """A diagonal Gaussian over z: mean and log-variance, each (n, latent), or (..., n, latent) for several of them."""

    mean: Tensor
    logvar: Tensor

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """A reparameterised sample (n, latent)."""
        noise = torch.randn(self.mean.shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype)
        return self.mean + (0.5 * self.logvar).exp() * noise

    def log_prob(self, z: Tensor) -> Tensor:
        """log N(z; mean, exp(logvar)): (n,)."""
        square = (z - self.mean).square() * (-self.logvar).exp()
        return -0.5 * (square + self.logvar + math.log(2 * math.pi)).sum(-1)

    def kl(self, other: Expert | None = None) -> Tensor:
        """KL(self || other), (n,); ``None`` stands for N(0, I)."""
        if other is None:
            return 0.5 * (self.mean.square() + self.logvar.exp() - 1 - self.logvar).sum(-1)
        ratio = self.logvar - other.logvar
        square = (self.mean - other.mean).square() * (-other.logvar).exp()
        return 0.5 * (square + ratio.exp() - 1 - ratio).sum(-1)


def subsets(count: int) -> list[tuple[int, ...]]:
    """The non-empty subsets of ``range(count)``, small ones first."""
    return [s for size in range(1, count + 1) for s in itertools.combinations(range(count), size)]


@dataclass(frozen=True)
class Experts:
    """The experts of some modalities on the same rows.

    ``mean``, ``logvar``: (M, n, latent), those of N(0, I) where an expert says nothing: on the private elements of
    other modalities, and on rows that lack its modality. ``says``: bool, the same shape, where it does say something.
    ``has``: bool (M, n), which rows have which modality.
    """

    names: tuple[str, ...]
    mean: Tensor
    logvar: Tensor
    says: Tensor
    has: Tensor

    @property
    def each(self) -> Expert:
        """All of them, stacked."""
        return Expert(self.mean, self.logvar)

    def product(self, members: Tensor, *, prior: bool = True) -> Expert:
        """Normalised products of Gaussian experts, (T, n, latent): precisions add up, an expert that says nothing has
        none.

        Args:
            members: bool (T, M), or (T, n, M) where they differ by row: which experts each of T products takes.
            prior: with N(0, I) as one more factor; without it, N(0, I) where no other factor says anything.
        """
        # autocast would take the sums in 16 bits
        with torch.autocast(self.mean.device.type, enabled=False):
            precision = torch.where(self.says, (-self.logvar).exp(), 0.0)
            taken = members.to(precision.dtype)
            rule = "tnm,mnd->tnd" if members.dim() == 3 else "tm,mnd->tnd"
            total = torch.einsum(rule, taken, precision)
            weighted = torch.einsum(rule, taken, precision * self.mean)
            total = total + 1 if prior else torch.where(total > 0, total, 1.0)
            return Expert(weighted / total, -total.log())


def product(experts: list[Expert]) -> Expert:
    """The normalised product of Gaussian experts and the prior N(0, I)."""
    mean, logvar = (torch.stack(parts) for parts in zip(*experts, strict=True))
    everywhere = torch.ones_like(mean, dtype=torch.bool)
    names = tuple(map(str, range(len(experts))))
    joined = Experts(names, mean, logvar, everywhere, everywhere[..., 0]).product(everywhere[:, 0, 0][None])
    return Expert(joined.mean[0], joined.logvar[0])


class JointInference(nn.Module):
    """q(z | X) from one expert q_m(z | x_m) = N(mu_m(x_m), diag Sigma_m(x_m)) per modality.

    Args:
        shapes: modality name -> shape without the batch dimension.
        latent: size of z.
        joint: "mixture" (1/M) sum_m q_m (the paper's); "product" of the experts and the prior, or of the experts alone,
            "product_without_prior"; or the "mixture_of_products" (with the prior) over all non-empty subsets, of which
            there are 2^M - 1. Missing modalities are left out of each.
        private: size of the part of z that one modality has for itself, as in :class:`SharedGenerator`: expert m speaks
            of u and w_m. In a mixture it leaves the other w at their prior N(0, I), in a product to their own experts.
        encoders: modality name -> a module of the user's own, (n, *shape) -> (n, 2 k), mean and log-variance of the k
            latents that the expert speaks of, instead of the built-in one.

    ``auxiliary`` (only where ``private``): log-variances (M, private) of N(0, .), from which the objective "mmvae+"
    draws the w of a modality that another one's u reconstructs; nothing else reads them.
    """

    auxiliary: nn.Parameter | None
    positions: Tensor

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        latent: int,
        *,
        net: Net = "mlp",
        width: int = 256,
        depth: int = 2,
        act: str = "silu",
        joint: Joint = "mixture",
        private: int = 0,
        encoders: Mapping[str, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if joint not in JOINTS:
            raise ValueError(f"joint must be one of {', '.join(map(repr, JOINTS))}, got {joint!r}")
        self.shapes: dict[str, tuple[int, ...]] = dict(shapes)
        self.latent: int = latent
        self.joint = joint
        self.private: int = private
        self.columns: dict[str, list[int]] = latent_columns(list(shapes), latent, private)
        self.shared: int = latent - len(shapes) * private
        own = dict(encoders or {})
        self.experts: nn.ModuleDict = nn.ModuleDict(
            {
                name: own[name]
                if name in own
                else encoder(shape, 2 * len(self.columns[name]), net=net, width=width, depth=depth, act=act)
                for name, shape in shapes.items()
            }
        )
        self.auxiliary = nn.Parameter(torch.zeros(len(shapes), private)) if private else None
        self.register_buffer("positions", torch.tensor(list(self.columns.values())), persistent=False)

    def encode(self, x: Mapping[str, Tensor], present: Mapping[str, Tensor] | None = None) -> Experts:
        """The experts of the modalities that ``x`` holds.

        Args:
            x: {modality: (n, *shape)}, at least one; what a row lacks may hold anything.
            present: {modality: bool (n,)}, which rows have it; None, or a modality left out, where all do. Every row
                has one at least.
        """
        if not x:
            raise ValueError("x must hold at least one modality, got none")
        means, logvars, says, has = [], [], [], []
        for (name, value), rows in zip(x.items(), rows_with(x, present).values(), strict=True):
            if rows is not None:
                value = torch.where(rows.reshape(-1, *[1] * (value.dim() - 1)), value, 0.0)
            mean, logvar = widen(self.experts[name](value)).chunk(2, dim=1)  # densities are not for 16 bits
            # a variance outside e^-10 .. e^4 is a net gone astray, not a posterior
            logvar = logvar.clamp(-10.0, 4.0)
            spoken = torch.ones_like(mean, dtype=torch.bool)
            if rows is not None:
                spoken = spoken & rows[:, None]
                mean, logvar = torch.where(spoken, mean, 0.0), torch.where(spoken, logvar, 0.0)
            if self.private:
                columns = self.positions[list(self.shapes).index(name)]
                wide = mean.new_zeros(mean.shape[0], self.latent)
                mean, logvar = wide.index_copy(1, columns, mean), wide.index_copy(1, columns, logvar)
                spoken = wide.bool().index_copy(1, columns, spoken)
            means.append(mean)
            logvars.append(logvar)
            says.append(spoken)
            has.append(rows if rows is not None else spoken.new_ones(mean.shape[0]))
        experts = Experts(tuple(x), torch.stack(means), torch.stack(logvars), torch.stack(says), torch.stack(has))
        # elsewhere looking would make the host wait for the device
        if present is not None and experts.has.device.type == "cpu" and not bool(experts.has.any(0).all()):
            lacking = int((~experts.has.any(0)).nonzero()[0])
            raise ValueError(f"present must leave every row at least one modality of x, but row {lacking} has none")
        return experts

    def join(self, experts: Experts, joint: str | None = None) -> tuple[Expert, Tensor]:
        """The components of the joint, (C, n, latent), and each row's probabilities of them, (C, n).

        Args:
            experts: of :meth:`encode`.
            joint: instead of the configured one; also "unimodal:NAME", the expert of one modality alone (the prior
                where a row lacks it).

        Raises:
            ValueError: for an unknown joint, or a modality that ``experts`` has not.
        """
        joint = self.joint if joint is None else joint
        count, n = experts.has.shape
        device, dtype = experts.mean.device, experts.mean.dtype
        if joint == "mixture":
            components, available = experts.each, experts.has
        elif joint in ("product", "product_without_prior"):
            members = torch.ones(1, count, dtype=torch.bool, device=device)
            components = experts.product(members, prior=joint == "product")
            available = torch.ones(1, n, dtype=torch.bool, device=device)
        elif joint == "mixture_of_products":
            members = membership(count, device)
            components = experts.product(members)
            available = (experts.has | ~members[:, :, None]).all(1)
        elif joint.startswith("unimodal:"):
            name = joint.removeprefix("unimodal:")
            if name not in experts.names:
                raise ValueError(f"joint={joint!r} names a modality that x lacks; it holds {list(experts.names)}")
            m = experts.names.index(name)
            components = Expert(experts.mean[m : m + 1], experts.logvar[m : m + 1])
            available = torch.ones(1, n, dtype=torch.bool, device=device)
        else:
            raise ValueError(f"joint must be one of {', '.join(map(repr, JOINTS))} or 'unimodal:NAME', got {joint!r}")
        return components, available.to(dtype) / available.sum(0)

    def components(
        self, x: Mapping[str, Tensor], joint: str | None = None, present: Mapping[str, Tensor] | None = None
    ) -> list[Expert]:
        """The components of q(z | X), or of another joint of the same experts (see :meth:`join`).

        Equally weighted; with ``present`` over those that a row has, see :meth:`join` for the weights.
        """
        stacked, _ = self.join(self.encode(x, present), joint)
        return [Expert(*parts) for parts in zip(*stacked, strict=True)]

    def forward(self, x: Mapping[str, Tensor], present: Mapping[str, Tensor] | None = None) -> list[Expert]:
        """:meth:`components` of the configured joint."""
        return self.components(x, present=present)

    def sample(
        self,
        x: Mapping[str, Tensor],
        generator: torch.Generator | None = None,
        *,
        joint: str | None = None,
        present: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """One sample per row (n, latent), each row from a component picked uniformly of those that it has.

        Args:
            x, present: as :meth:`encode` takes them.
            generator: of the draw.
            joint: another joint than the configured one, see :meth:`join`.
        """
        components, weights = self.join(self.encode(x, present), joint)
        samples = torch.stack([Expert(*parts).sample(generator) for parts in zip(*components, strict=True)])
        chosen = pick(weights, generator, uniform=present is None)
        return samples[chosen, torch.arange(samples.shape[1], device=samples.device)]

    def log_prob(
        self,
        z: Tensor,
        x: Mapping[str, Tensor],
        *,
        per_expert: bool = False,
        present: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """log q(z | X), (n,); with ``per_expert`` its lower bound, the mean of the components' log densities."""
        components, weights = self.join(self.encode(x, present))
        parts = components.log_prob(z)
        return (weights * parts).sum(0) if per_expert else (parts + weights.log()).logsumexp(0)


def membership(count: int, device: torch.device) -> Tensor:
    """:func:`subsets` as a table, bool (2^count - 1, count)."""
    table = torch.zeros(2**count - 1, count, dtype=torch.bool)
    for row, subset in enumerate(subsets(count)):
        table[row, list(subset)] = True
    return table.to(device)


def pick(weights: Tensor, generator: torch.Generator | None = None, *, uniform: bool = False) -> Tensor:
    """A component per row by the probabilities ``weights`` (C, n): (n,). ``uniform``: they are all the same."""
    if uniform:
        return torch.randint(weights.shape[0], weights.shape[1:], generator=generator, device=weights.device)
    return torch.multinomial(weights.T, 1, generator=generator).squeeze(1)
