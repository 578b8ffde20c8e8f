"""Priors of the latent beside an energy: a mixture of Gaussians (density, draws, chains on it), and a flow."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from mmebm import Langevin
from mmebm.models import FlowPrior, MixturePrior, SharedGenerator
from mmebm.training.system import Posterior

CPU = torch.device("cpu")


def made(seed: int = 0, components: int = 3, latent: int = 4) -> tuple[MixturePrior, MixtureSameFamily]:
    rng = torch.Generator().manual_seed(seed)
    weights = torch.rand(components, generator=rng) + 0.2
    weights /= weights.sum()
    means = 2 * torch.randn(components, latent, generator=rng)
    factors = (0.4 * torch.randn(components, latent, latent, generator=rng)).tril(-1)
    factors += torch.diag_embed(torch.rand(components, latent, generator=rng) + 0.3)
    prior = MixturePrior(latent, components)
    prior.set(weights, means, factors)
    return prior, MixtureSameFamily(Categorical(weights), MultivariateNormal(means, scale_tril=factors))


def test_density_is_that_of_torch_distributions() -> None:
    prior, same = made()
    z = 3 * torch.randn(50, 4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(prior.log_prob(z), same.log_prob(z), rtol=1e-4, atol=1e-3)
    # exp(-E) N(z; 0, I) is the mixture itself: Z = 1
    log_normal = -0.5 * (z.square().sum(1) + 4 * math.log(2 * math.pi))
    torch.testing.assert_close(log_normal - prior(z), same.log_prob(z), rtol=1e-4, atol=1e-3)


def test_nothing_fitted_is_a_standard_normal() -> None:
    z = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    assert MixturePrior(5, 7)(z).abs().max() < 1e-5


def test_draws_are_exact_and_keep_their_global_index() -> None:
    prior, same = made()
    z = prior.draw(40_000, seed=5, device=CPU)
    torch.testing.assert_close(z.mean(0), same.mean, rtol=0, atol=0.05)
    torch.testing.assert_close(z.var(0), same.variance, rtol=0.05, atol=0.0)
    # the mean responsibility of a component under the mixture is its weight
    each = torch.stack([c.log_prob(z) for c in _components(prior)]) + prior.log_weights[:, None]
    torch.testing.assert_close(each.softmax(0).mean(1), prior.log_weights.exp(), rtol=0, atol=0.01)
    torch.testing.assert_close(prior.draw(7, seed=5, device=CPU, chain_offset=100), z[100:107])


def _components(prior: MixturePrior) -> list[MultivariateNormal]:
    pairs = zip(prior.means, prior.factors, strict=True)
    return [MultivariateNormal(mean, scale_tril=factor) for mean, factor in pairs]


def test_fit_finds_the_mixture() -> None:
    pytest.importorskip("sklearn")
    _, same = made(3)
    torch.manual_seed(0)
    z, fresh = same.sample((6000,)), same.sample((6000,))
    prior = MixturePrior(4, 3)
    prior.fit(z, seed=1)
    # of fresh samples: no better than the truth, and nearly as good
    gap = (same.log_prob(fresh) - prior.log_prob(fresh)).mean()
    assert -0.01 < gap < 0.05


def test_fit_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="at least 3 rows"):
        MixturePrior(4, 3).fit(torch.zeros(2, 4))
    monkeypatch.setitem(sys.modules, "sklearn.mixture", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'mmebm\[digits\]'"):
        MixturePrior(4, 3).fit(torch.zeros(20, 4))


def test_bfloat16_changes_nothing() -> None:
    prior, _ = made()
    z = torch.randn(6, 4, generator=torch.Generator().manual_seed(2))
    plain = prior(z)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(prior(z), plain)


def test_chain_without_data_keeps_the_mixture() -> None:
    """Langevin on E with the chain's own Gaussian factor: one component keeps its mean and its covariance."""
    prior, _ = made(components=1)
    start = prior.draw(4000, seed=1, device=CPU)
    sampler = Langevin(step_size=0.005, noise_scale=math.sqrt(0.01), prior_std=1.0)
    z = sampler.sample(prior, start, 300, seed=3).state
    cov = prior.factors[0] @ prior.factors[0].T
    torch.testing.assert_close(z.mean(0), prior.means[0], rtol=0, atol=0.1)
    torch.testing.assert_close(torch.cov(z.T), cov, rtol=0.1, atol=0.05)


def test_latent_chain_is_the_loop() -> None:
    """The posterior with this prior, by whatever runs it here, against the plain update written out."""
    prior, _ = made()
    torch.manual_seed(0)
    generator = SharedGenerator({"a": (3,), "b": (2, 2)}, 4, width=8, depth=1)
    x = {"a": torch.randn(5, 3), "b": torch.randn(5, 2, 2)}
    energy = Posterior(generator, prior, x)
    z, size = torch.randn(5, 4), 0.01

    def target(at: Tensor) -> Tensor:
        return (energy(at) + 0.5 * at.square().sum(1)).sum()

    by_hand = z
    for _ in range(4):
        at = by_hand.detach().requires_grad_()
        by_hand = at.detach() - size * torch.autograd.grad(target(at), at)[0]
    out = Langevin(step_size=size, noise_scale=0.0, prior_std=1.0).sample(energy, z, 4, seed=0)
    torch.testing.assert_close(out.state, by_hand, rtol=1e-4, atol=1e-4)


def test_flow_is_heuns_rule_on_its_velocity() -> None:
    """v(z, t) = a z + t b by hand: against the exact solution, with the error of second order."""
    flow = FlowPrior(2, 10, width=4, depth=1)
    b = torch.tensor([1.0, -2.0])
    flow.velocity = lambda z, t: 0.5 * z + t[:, None] * b  # type: ignore[method-assign]
    z0 = FlowPrior(2, 0).draw(6, seed=3, device=CPU)
    # z(1) = e^a z0 + b (e^a - 1 - a) / a^2
    exact = math.exp(0.5) * z0 + b * (math.exp(0.5) - 1.5) / 0.25
    errors = [(flow.draw(6, seed=3, device=CPU, steps=k) - exact).abs().max().item() for k in (10, 20)]
    assert errors[0] < 5e-3 and 3.5 < errors[0] / errors[1] < 4.5
    torch.testing.assert_close(flow.draw(2, seed=3, device=CPU, chain_offset=4), flow.draw(6, seed=3, device=CPU)[4:])


def test_flow_learns_a_mixture() -> None:
    _, same = made(2, components=2, latent=2)
    torch.manual_seed(0)
    flow, rng = FlowPrior(2, 20, width=64), torch.Generator().manual_seed(0)
    adam = torch.optim.Adam(flow.parameters(), lr=3e-3)
    first = flow.loss(same.sample((4000,)), rng).item()
    for _ in range(500):
        loss = flow.loss(same.sample((256,)), rng)
        adam.zero_grad()
        loss.backward()
        adam.step()
    z = flow.draw(4000, seed=1, device=CPU)
    assert loss.item() < first
    torch.testing.assert_close(z.mean(0), same.mean, rtol=0, atol=0.25)
    torch.testing.assert_close(z.std(0), same.variance.sqrt(), rtol=0.12, atol=0.0)
    # where the mixture is improbable the flow does not go: as often beyond a height as the mixture's own samples
    low = same.log_prob(same.sample((4000,))).quantile(0.1)
    assert (same.log_prob(z) < low).float().mean() < 0.2
