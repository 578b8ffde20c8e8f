"""Priors of the latent: N(0, I), and what corrects it: p(z) = exp(-E(z)) N(z; 0, I) / Z.

They let the generator start from the aggregated posterior, which N(0, I) is not. E is a network, as in Pang et al.,
"Learning latent space energy-based prior model", NeurIPS 2020; or what makes p a mixture of Gaussians, fitted to the
posterior's samples after the fact, as in Ghosh et al., "From variational to deterministic autoencoders", ICLR 2020.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor, nn

from mmebm import noise
from mmebm.models.nets import mlp
from mmebm.ops import noise as drawn
from mmebm.samplers import Langevin


def standard_normal(n: int, latent: int, *, seed: int, device: torch.device, chain_offset: int = 0) -> Tensor:
    """z ~ N(0, I), (n, latent), by this library's noise: row i depends on (seed, chain_offset + i) only."""
    return drawn.normal(
        (n, latent), seed=seed, stream=noise.stream(0, noise.INITIAL), chain_offset=chain_offset, device=device
    )


class GaussianPrior(nn.Module):
    """N(0, I): its energy correction is zero, and no chain is needed to draw from it."""

    mmebm_pure = True
    steps = 0

    def __init__(self, latent: int) -> None:
        super().__init__()
        self.latent = latent

    def forward(self, z: Tensor) -> Tensor:
        """(n, latent) -> zeros (n,)."""
        return z.new_zeros(z.shape[0])

    def draw(
        self, n: int, *, seed: int, device: torch.device, steps: int | None = None, chain_offset: int = 0
    ) -> Tensor:
        """``n`` samples (n, latent), of which the first has the global index ``chain_offset``. ``steps`` is for priors
        that need a chain."""
        return standard_normal(n, self.latent, seed=seed, device=device, chain_offset=chain_offset)


class LatentPrior(nn.Module):
    """The correction E(z) as an MLP latent -> width -> ... -> 1; the Gaussian factor is the sampler's ``prior_std=1``.

    Args:
        latent: size of z.
        sampler, steps: the short chain that draws from it, started at N(0, I).
    """

    mmebm_pure = True

    def __init__(
        self, latent: int, sampler: Langevin, steps: int, *, width: int = 128, depth: int = 2, act: str = "silu"
    ) -> None:
        super().__init__()
        self.latent: int = latent
        self.sampler: Langevin = sampler
        self.steps: int = steps
        self.net: nn.Sequential = mlp([latent, *[width] * depth, 1], act)

    def forward(self, z: Tensor) -> Tensor:
        """(n, latent) -> (n,)."""
        return self.net(z).squeeze(1)

    def draw(
        self, n: int, *, seed: int, device: torch.device, steps: int | None = None, chain_offset: int = 0
    ) -> Tensor:
        """``n`` samples (n, latent) after ``steps`` Langevin steps (None: as many as in training), of which the first
        has the global index ``chain_offset``."""
        start = standard_normal(n, self.latent, seed=seed, device=device, chain_offset=chain_offset)
        steps = self.steps if steps is None else steps
        return self.sampler.sample(self, start, steps, seed=seed, chain_offset=chain_offset).state


class OwnPrior(LatentPrior):
    """:class:`LatentPrior` with a network of the user's own: z (n, latent) -> (n,)."""

    def __init__(self, latent: int, sampler: Langevin, steps: int, net: nn.Module) -> None:
        nn.Module.__init__(self)
        self.latent: int = latent
        self.sampler: Langevin = sampler
        self.steps: int = steps
        self.net: nn.Module = net

    def forward(self, z: Tensor) -> Tensor:
        """(n, latent) -> (n,)."""
        return self.net(z)


class MixturePrior(nn.Module):
    """A mixture of Gaussians with full covariances, p(z) = sum_k w_k N(z; m_k, L_k L_k^T), drawn from exactly.

        E(z) = -log p(z) + log N(z; 0, I) = -logsumexp_k (log w_k - log |L_k| - |L_k^-1 (z - m_k)|^2 / 2) - |z|^2 / 2

    so that with the Gaussian factor of the chain nothing but p is left, and Z = 1. All of it is buffers, N(0, I) until
    :meth:`fit`: nothing else needs scikit-learn.

    Args:
        latent: size of z.
        components: K.

    Example:
        >>> prior = MixturePrior(2, 3)
        >>> bool(prior(torch.randn(5, 2)).abs().max() < 1e-5)
        True
    """

    mmebm_pure = True
    steps = 0
    log_weights: Tensor
    means: Tensor
    factors: Tensor
    whitening: Tensor
    offsets: Tensor

    def __init__(self, latent: int, components: int) -> None:
        super().__init__()
        self.latent: int = latent
        self.components: int = components
        eye = torch.eye(latent).repeat(components, 1, 1)
        self.register_buffer("log_weights", torch.full((components,), -math.log(components)))
        self.register_buffer("means", torch.zeros(components, latent))
        self.register_buffer("factors", eye)  # L_k
        # L_k^-1 one above the other, and -L_k^-1 m_k: all components are whitened by one linear layer
        self.register_buffer("whitening", eye.flatten(0, 1).clone())
        self.register_buffer("offsets", torch.zeros(components * latent))

    def forward(self, z: Tensor) -> Tensor:
        """(n, latent) -> E (n,)."""
        # differences of large squares: not for 16 bits
        with torch.autocast(z.device.type, enabled=False):
            z = z.float() if z.dtype in (torch.float16, torch.bfloat16) else z
            white = nn.functional.linear(z, self.whitening, self.offsets)
            square = white.square().unflatten(1, (self.components, self.latent)).sum(2)
            heights = self.log_weights - self.factors.diagonal(dim1=1, dim2=2).log().sum(1)
            return -(heights - 0.5 * square).logsumexp(1) - 0.5 * z.square().sum(1)

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z), (n,)."""
        return -self(z) - 0.5 * (z.square().sum(1) + self.latent * math.log(2 * math.pi))

    def draw(
        self, n: int, *, seed: int, device: torch.device, steps: int | None = None, chain_offset: int = 0
    ) -> Tensor:
        """``n`` exact samples (n, latent), of which the first has the global index ``chain_offset``; ``steps`` is for
        priors that need a chain."""
        normal = standard_normal(n, self.latent, seed=seed, device=device, chain_offset=chain_offset)
        at = drawn.uniform(
            (n, 1), seed=seed, stream=noise.stream(1, noise.INITIAL), chain_offset=chain_offset, device=device
        )
        k = torch.searchsorted(self.log_weights.exp().cumsum(0), at.squeeze(1), right=True)
        k = k.clamp(max=self.components - 1)
        return self.means[k] + torch.einsum("nij,nj->ni", self.factors[k], normal.to(self.means.dtype))

    def fit(self, z: Tensor, *, regularisation: float = 1e-3, seed: int = 0) -> None:
        """Expectation maximisation (scikit-learn's, from k-means++ centres) on samples z (n, latent).

        Args:
            z: at least as many as there are components.
            regularisation: added to the variances.
            seed: of the centres.

        Raises:
            ModuleNotFoundError: without scikit-learn.
            ValueError: for too few samples.
        """
        try:
            from sklearn.mixture import GaussianMixture
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "a latent prior that is a mixture is fitted by scikit-learn: pip install 'mmebm[digits]'",
                name="sklearn",
            ) from error
        if len(z) < self.components:
            raise ValueError(f"z must have at least {self.components} rows, one per component, got {len(z)}")
        found = GaussianMixture(
            self.components,
            covariance_type="full",
            reg_covar=regularisation,
            max_iter=40,
            init_params="k-means++",
            random_state=seed % 2**32,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that 40 rounds did not converge to its tolerance is of no weight here
            found.fit(z.detach().double().cpu().numpy())
        weights, means, covariances = map(torch.from_numpy, (found.weights_, found.means_, found.covariances_))
        factors = torch.linalg.cholesky(covariances)
        self.set(weights, means, factors)

    @torch.no_grad()
    def set(self, weights: Tensor, means: Tensor, factors: Tensor) -> None:
        """w (K,), m (K, latent) and lower triangular L (K, latent, latent) of the mixture."""
        eye = torch.eye(self.latent, dtype=factors.dtype, device=factors.device)
        whitening = torch.linalg.solve_triangular(factors, eye.expand_as(factors), upper=False)
        self.log_weights.copy_(weights.log())
        self.means.copy_(means)
        self.factors.copy_(factors)
        self.whitening.copy_(whitening.flatten(0, 1))
        self.offsets.copy_(-torch.einsum("kij,kj->ki", whitening, means.to(whitening.dtype)).flatten())


class FlowPrior(nn.Module):
    """Where dz/dt = v(z, t) takes N(0, I) from t = 0 to 1; v is an MLP, learned without simulating it by :meth:`loss`.

    What it is drawn from is known and its density is not: :meth:`forward` is zero, so that the latent chain has N(0, I)
    as the paper's. Flow matching on straight ways (Lipman et al., ICLR 2023; Liu, Gong and Liu, ICLR 2023).

    Args:
        latent: size of z.
        steps: of Heun's rule, each two evaluations of v.
        width, depth, act: of the MLP latent + 1 -> width -> ... -> latent.
    """

    mmebm_pure = True

    def __init__(self, latent: int, steps: int, *, width: int = 128, depth: int = 2, act: str = "silu") -> None:
        super().__init__()
        self.latent: int = latent
        self.steps: int = steps
        self.net: nn.Sequential = mlp([latent + 1, *[width] * depth, latent], act)

    def forward(self, z: Tensor) -> Tensor:
        """(n, latent) -> zeros (n,)."""
        return z.new_zeros(z.shape[0])

    def velocity(self, z: Tensor, t: Tensor) -> Tensor:
        """v: z (n, latent) at t (n,) -> (n, latent)."""
        return self.net(torch.cat([z, t[:, None]], dim=1))

    def loss(self, z: Tensor, rng: torch.Generator) -> Tensor:
        """mean |v((1 - t) z_0 + t z, t) - (z - z_0)|^2 over elements, z_0 ~ N(0, I), t uniform in [0, 1]."""
        start = torch.randn(z.shape, generator=rng, device=z.device, dtype=z.dtype)
        t = torch.rand(len(z), generator=rng, device=z.device, dtype=z.dtype)
        at = start + t[:, None] * (z - start)
        return (self.velocity(at, t) - (z - start)).square().mean()

    @torch.no_grad()
    def draw(
        self, n: int, *, seed: int, device: torch.device, steps: int | None = None, chain_offset: int = 0
    ) -> Tensor:
        """``n`` samples (n, latent) after ``steps`` of Heun's rule (None: as many as in training), of which the first
        has the global index ``chain_offset``."""
        z = standard_normal(n, self.latent, seed=seed, device=device, chain_offset=chain_offset)
        steps = self.steps if steps is None else steps
        for k in range(steps):
            here, there = (z.new_full((n,), j / steps) for j in (k, k + 1))
            v = self.velocity(z, here)
            z = z + (v + self.velocity(z + v / steps, there)) / (2 * steps)
        return z


Prior = GaussianPrior | LatentPrior | MixturePrior | FlowPrior
