"""The three networks: shapes, densities and what they promise, for modalities of any shape."""

import math

import pytest
import torch

from mmebm.models import Expert, GaussianPrior, JointEnergy, JointInference, LatentPrior, SharedGenerator
from mmebm.models.inference import product
from mmebm.samplers import Langevin

SHAPES = {"grey": (1, 28, 28), "colour": (3, 14, 14), "vector": (7,)}
NETS = ("mlp", "conv")


def batch(n: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(n, *shape, generator=generator) * 2 - 1 for name, shape in SHAPES.items()}


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("shapes", [SHAPES, {"odd": (2, 9, 13), "tall": (1, 32, 8)}, {"only": (4,)}])
def test_unequal_shapes(net: str, shapes: dict[str, tuple[int, ...]], seed: int) -> None:
    torch.manual_seed(seed)
    generator = SharedGenerator(shapes, 5, net=net, width=8)  # type: ignore[arg-type]
    z = torch.randn(3, 5)
    x = generator(z)
    assert {name: tuple(v.shape) for name, v in x.items()} == {name: (3, *shape) for name, shape in shapes.items()}
    assert all(v.abs().max() <= 1 for v in x.values())
    inference = JointInference(shapes, 5, net=net, width=8)  # type: ignore[arg-type]
    assert inference.sample(x).shape == (3, 5)
    energy = JointEnergy(shapes, net=net, width=8, trunk_width=4, features=6)  # type: ignore[arg-type]
    whole = energy(x)
    rows = torch.cat([energy({name: v[i : i + 1] for name, v in x.items()}) for i in range(3)])
    # one value per tuple, each from its own row; tolerance: fp32 sums of at most 2,000 terms of order 1
    torch.testing.assert_close(whole, rows, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("net", NETS)
def test_energy_hears_every_modality(net: str, seed: int) -> None:
    torch.manual_seed(seed)
    energy = JointEnergy(SHAPES, net=net, width=16)  # type: ignore[arg-type]
    x = {name: v.requires_grad_() for name, v in batch(2, seed).items()}
    grads = torch.autograd.grad(energy(x).sum(), list(x.values()))
    assert all(g.abs().max() > 0 for g in grads)


def test_spectral_energy_is_lipschitz(seed: int) -> None:
    """Unit spectral norms and SiLU (slope <= 1.1) bound the slope by 1.1^2 times the scale."""
    torch.manual_seed(seed)
    energy = JointEnergy(SHAPES, spectral=True, scale=10.0)
    for _ in range(50):  # power iterations in train mode
        energy(batch(2, seed))
    energy.eval()
    a, b = batch(64, seed + 1), batch(64, seed + 2)
    distance = torch.cat([(a[n] - b[n]).flatten(1) for n in SHAPES], 1).norm(dim=1)
    slope = (energy(a) - energy(b)).abs() / distance
    # the power iteration approaches the norm from below: 5 % are left to it
    assert slope.max() <= 10 * 1.1**2 * 1.05


@pytest.mark.parametrize("likelihood", ["gaussian", "laplace"])
def test_likelihood_is_that_of_torch(likelihood: str, seed: int) -> None:
    torch.manual_seed(seed)
    generator = SharedGenerator(
        {"a": (3,), "b": (2,)}, 4, width=8, sigma=0.3, likelihood=likelihood, weights={"b": 6.0}  # type: ignore[arg-type]
    )
    z, x = torch.randn(5, 4), {"a": torch.randn(5, 3), "b": torch.randn(5, 2)}
    mean = generator(z)
    family = torch.distributions.Normal if likelihood == "gaussian" else torch.distributions.Laplace
    constant = math.log(0.3 * math.sqrt(2 * math.pi)) if likelihood == "gaussian" else math.log(2 * 0.3)
    expected = sum(
        w * (-family(mean[m], 0.3).log_prob(x[m]) - constant).sum(1) for m, w in (("a", 1.0), ("b", 6.0))
    )
    torch.testing.assert_close(generator.negative_log_likelihood(x, z), expected, rtol=1e-4, atol=1e-4)
    # a missing modality is left out
    only = generator.negative_log_likelihood({"a": x["a"]}, z)
    expected = (-family(mean["a"], 0.3).log_prob(x["a"]) - constant).sum(1)
    torch.testing.assert_close(only, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("likelihood", ["gaussian", "laplace"])
def test_likelihood_has_the_gradients_of_its_formula(likelihood: str, seed: int) -> None:
    """In z and in the decoders, for the mean over the batch; the curvature in z; and in x, in float64."""
    torch.manual_seed(seed)
    generator = SharedGenerator(
        {"a": (3,), "b": (2,)}, 4, width=8, sigma=0.3, weights={"b": 6.0},
        likelihood=likelihood,  # type: ignore[arg-type]
    ).double()  # fmt: skip
    z = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    x = {"a": torch.randn(5, 3, dtype=torch.float64), "b": torch.randn(5, 2, dtype=torch.float64)}

    def formula(x: dict[str, torch.Tensor], z: torch.Tensor) -> torch.Tensor:
        r = {m: x[m] - mean for m, mean in generator(z).items()}
        term = {m: v.square() / 0.18 if likelihood == "gaussian" else v.abs() / 0.3 for m, v in r.items()}
        return term["a"].sum(1) + 6 * term["b"].sum(1)

    ours, expected = generator.negative_log_likelihood(x, z).mean(), formula(x, z).mean()
    torch.testing.assert_close(ours, expected)
    variables = [z, *generator.parameters()]
    first, wanted = (torch.autograd.grad(v, variables, create_graph=True) for v in (ours, expected))
    torch.testing.assert_close(first, wanted)
    second, wanted = (torch.autograd.grad(g[0].square().sum(), z)[0] for g in (first, wanted))
    torch.testing.assert_close(second, wanted)
    for value in x.values():
        value.requires_grad_()
    ours, expected = generator.negative_log_likelihood(x, z).mean(), formula(x, z).mean()
    variables = [z, *x.values(), *generator.parameters()]
    torch.testing.assert_close(torch.autograd.grad(ours, variables), torch.autograd.grad(expected, variables))
    assert generator.negative_log_likelihood({}, z).tolist() == [0.0] * 5


def test_weights_of_unknown_modalities_are_refused() -> None:
    with pytest.raises(ValueError, match=r"weights name \['c'\], but the modalities are \['a'\]"):
        SharedGenerator({"a": (3,)}, 4, weights={"c": 1.0})


def test_mixture_density_against_torch(seed: int) -> None:
    torch.manual_seed(seed)
    inference = JointInference(SHAPES, 4, width=8)
    x, z = batch(6, seed), torch.randn(6, 4)
    components = inference(x)
    assert len(components) == 3
    stacked = torch.distributions.Independent(
        torch.distributions.Normal(
            torch.stack([c.mean for c in components], 1), torch.stack([(0.5 * c.logvar).exp() for c in components], 1)
        ), 1,
    )  # fmt: skip
    mixture = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(torch.ones(6, 3)), stacked)
    torch.testing.assert_close(inference.log_prob(z, x), mixture.log_prob(z), rtol=1e-4, atol=1e-4)
    # Jensen: the per-expert form is a lower bound, and strictly so for experts that differ
    assert (inference.log_prob(z, x, per_expert=True) < inference.log_prob(z, x)).all()


def test_mixture_samples_come_from_every_expert(seed: int) -> None:
    torch.manual_seed(seed)
    inference = JointInference({"a": (1,), "b": (1,)}, 1, width=4)
    for name, mean in (("a", -50.0), ("b", 50.0)):
        last = inference.experts[name][-1]
        torch.nn.init.zeros_(last.weight)
        last.bias.data = torch.tensor([mean, 0.0])
    n = 4000
    share = (inference.sample({"a": torch.zeros(n, 1), "b": torch.zeros(n, 1)}) > 0).float().mean().item()
    # binomial(4000, 1/2): 6 standard errors, false alarm 2e-9
    assert abs(share - 0.5) < 6 * 0.5 / n**0.5
    assert (inference.sample({"b": torch.zeros(100, 1)}) > 0).all()


def test_product_of_experts_is_the_normalised_product(seed: int) -> None:
    """log of the product of densities (prior included) differs from the product expert by a constant in z."""
    torch.manual_seed(seed)
    experts = [Expert(torch.randn(1, 3), torch.randn(1, 3)) for _ in range(3)]
    joined, prior = product(experts), Expert(torch.zeros(1, 3), torch.zeros(1, 3))
    z = torch.randn(50, 3)
    total = sum(e.log_prob(z) for e in [*experts, prior])
    difference = total - joined.log_prob(z)
    torch.testing.assert_close(difference, difference[:1].expand(50), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("joint, count", [("mixture", 3), ("product", 1), ("mixture_of_products", 7)])
def test_joint_kinds(joint: str, count: int, seed: int) -> None:
    torch.manual_seed(seed)
    inference = JointInference(SHAPES, 4, width=8, joint=joint)  # type: ignore[arg-type]
    assert len(inference(batch(2, seed))) == count


def test_kl_against_torch(seed: int) -> None:
    torch.manual_seed(seed)
    e = Expert(torch.randn(5, 3), torch.randn(5, 3))
    q = torch.distributions.Normal(e.mean, (0.5 * e.logvar).exp())
    expected = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(e.kl(), expected, rtol=1e-4, atol=1e-5)


def test_latent_prior_draws_from_its_own_law(seed: int) -> None:
    """With a linear E(z) = b z the prior exp(-E) N(0, 1) is N(-b, 1), and the chain finds it."""
    torch.manual_seed(seed)
    prior = LatentPrior(1, Langevin(0.05, prior_std=1.0), steps=120, depth=0)
    prior.net[0].weight.data.fill_(1.5)
    z = prior.draw(4000, seed=seed, device=torch.device("cpu"))
    # mean decays as (1 - .05)^120 = .002 of the distance; unadjusted variance 1 / (1 - .05/2); 6 standard errors
    assert abs(z.mean().item() + 1.5) < 6 / 4000**0.5 + 0.004
    assert abs(z.var().item() - 1 / (1 - 0.025)) < 6 * 1.03 * (2 / 4000) ** 0.5


def test_priors_are_split_free(seed: int) -> None:
    device = torch.device("cpu")
    for prior in (GaussianPrior(4), LatentPrior(4, Langevin(0.02, prior_std=1.0), steps=3)):
        whole = prior.draw(6, seed=seed, device=device)
        torch.testing.assert_close(prior.draw(3, seed=seed, device=device), whole[:3], rtol=1e-5, atol=1e-6)
