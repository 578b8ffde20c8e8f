"""The three networks: shapes, densities and what they promise, for modalities of any shape."""

import math

import numpy as np
import pytest
import torch
from scipy import special, stats

from mmebm.energies import lower
from mmebm.models import Expert, GaussianPrior, JointEnergy, JointInference, LatentPrior, SharedGenerator
from mmebm.models.inference import JOINTS, product
from mmebm.ops.mlp_energy.reference import mlp_energy
from mmebm.samplers import Langevin
from mmebm.training.system import Posterior

SHAPES = {"grey": (1, 28, 28), "colour": (3, 14, 14), "vector": (7,)}
NETS = ("mlp", "conv", "resnet")


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
        {"a": (3,), "b": (2,)},
        4,
        width=8,
        sigma=0.3,
        likelihood=likelihood,
        weights={"b": 6.0},  # type: ignore[arg-type]
    )
    z, x = torch.randn(5, 4), {"a": torch.randn(5, 3), "b": torch.randn(5, 2)}
    mean = generator(z)
    family = torch.distributions.Normal if likelihood == "gaussian" else torch.distributions.Laplace
    constant = math.log(0.3 * math.sqrt(2 * math.pi)) if likelihood == "gaussian" else math.log(2 * 0.3)
    expected = sum(w * (-family(mean[m], 0.3).log_prob(x[m]) - constant).sum(1) for m, w in (("a", 1.0), ("b", 6.0)))
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
        {"a": (3,), "b": (2,)},
        4,
        width=8,
        sigma=0.3,
        weights={"b": 6.0},
        likelihood=likelihood,  # type: ignore[arg-type]
    ).double()
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
        ),
        1,
    )
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


def some(n: int, names: list[str], seed: int) -> dict[str, torch.Tensor]:
    """Which rows have which modality, at least one; row 0 has all, row 1 the first alone."""
    generator = torch.Generator().manual_seed(seed)
    has = torch.rand(n, len(names), generator=generator) < 0.5
    has[torch.arange(n), torch.randint(len(names), (n,), generator=generator)] = True
    has[0], has[1] = True, torch.arange(len(names)) == 0
    return dict(zip(names, has.unbind(1), strict=True))


@pytest.mark.parametrize("joint", [*JOINTS, "unimodal:grey"])
@pytest.mark.parametrize("private", [0, 2])
def test_missing_modalities_are_left_out_row_by_row(joint: str, private: int, seed: int) -> None:
    """A row's density is that of a batch that holds only what the row has, whatever stands in the rest."""
    torch.manual_seed(seed)
    start = "mixture" if joint.startswith("unimodal") else joint
    inference = JointInference(SHAPES, 8, width=8, joint=start, private=private)  # type: ignore[arg-type]
    x, z, present = batch(6, seed), torch.randn(6, 8), some(6, list(SHAPES), seed)
    holes = {name: v.masked_fill(~present[name].reshape(-1, *[1] * (v.dim() - 1)), torch.nan) for name, v in x.items()}
    density = {each: inference.log_prob(z, holes, per_expert=each, present=present) for each in (False, True)}
    stacked, weights = inference.join(inference.encode(holes, present), joint)
    # the same sums of less than 10^3 terms of order 1 in another order
    close = {"rtol": 1e-4, "atol": 1e-4}
    for i in range(6):
        row = {name: v[i : i + 1] for name, v in x.items() if present[name][i]}
        for each, value in density.items():
            alone = inference.log_prob(z[i : i + 1], row, per_expert=each)
            torch.testing.assert_close(value[i : i + 1], alone, **close)
        if joint.startswith("unimodal") and "grey" not in row:
            # nothing was said: the prior
            assert stacked.mean[:, i].abs().max() == 0 and stacked.logvar[:, i].abs().max() == 0
            continue
        alone = inference.components(row, joint)
        kept = weights[:, i] > 0
        torch.testing.assert_close(weights[kept, i], torch.full((len(alone),), 1 / len(alone)))
        torch.testing.assert_close(stacked.mean[kept, i], torch.cat([c.mean for c in alone]), **close)
        torch.testing.assert_close(stacked.logvar[kept, i], torch.cat([c.logvar for c in alone]), **close)


def test_samples_come_from_what_a_row_has(seed: int) -> None:
    """Experts far apart: shares of each are 1 / (what the row has), those it lacks are never drawn."""
    torch.manual_seed(seed)
    inference = JointInference({"a": (1,), "b": (1,), "c": (1,)}, 1, width=4)
    for name, mean in (("a", -50.0), ("b", 0.0), ("c", 50.0)):
        last = inference.experts[name][-1]
        torch.nn.init.zeros_(last.weight)
        last.bias.data = torch.tensor([mean, 0.0])
    n = 6000
    present = {"a": torch.ones(n, dtype=torch.bool), "b": torch.arange(n) < n // 3, "c": torch.arange(n) < 2 * n // 3}
    x = {name: torch.where(rows[:, None], torch.zeros(n, 1), torch.nan) for name, rows in present.items()}
    generator = torch.Generator().manual_seed(seed)
    thirds = inference.sample(x, generator, present=present).flatten().div(50).round().split(n // 3)
    for z, wanted in zip(thirds, ({-1: 1 / 3, 0: 1 / 3, 1: 1 / 3}, {-1: 1 / 2, 1: 1 / 2}, {-1: 1.0}), strict=True):
        assert set(z.tolist()) == set(wanted)
        for value, p in wanted.items():
            # binomial(2000, p): 6 standard errors, false alarm 2e-9
            assert abs((z == value).float().mean().item() - p) <= 6 * (p * (1 - p) / 2000) ** 0.5
    assert (inference.sample(x, generator, joint="unimodal:c", present=present)[: n // 3] > 25).all()
    assert (inference.sample(x, generator, joint="product", present=present)[: n // 3].abs() < 25).all()


@pytest.mark.parametrize("joint", ["product", "product_without_prior", "mixture_of_products", "mixture"])
def test_joints_with_private_latents_restated(joint: str, seed: int) -> None:
    """In NumPy: an expert counts on u and its own w; in a mixture it leaves the others at N(0, I)."""
    torch.manual_seed(seed)
    shapes = {"a": (3,), "b": (2,)}
    inference = JointInference(shapes, 7, width=8, private=2, joint=joint).double()  # type: ignore[arg-type]
    x = {name: torch.randn(4, *shape, dtype=torch.float64) for name, shape in shapes.items()}
    says = {"a": np.array([1, 1, 1, 1, 1, 0, 0]), "b": np.array([1, 1, 1, 0, 0, 1, 1])}
    # u, which three share, then two of w_a, then two of w_b
    mean, precision = {}, {}
    for name, rows in says.items():
        out = inference.experts[name](x[name]).detach().numpy()
        assert out.shape == (4, 10)  # as many outputs as a plain expert of latent 5
        mean[name], precision[name] = np.zeros((4, 7)), np.zeros((4, 7))
        mean[name][:, rows == 1], precision[name][:, rows == 1] = out[:, :5], np.exp(-np.clip(out[:, 5:], -10, 4))
    subsets = {"mixture": [["a"], ["b"]], "mixture_of_products": [["a"], ["b"], ["a", "b"]]}.get(joint, [["a", "b"]])
    components = inference(x)
    assert len(components) == len(subsets)
    z, densities = np.random.default_rng(seed).normal(size=(4, 7)), []
    for found, subset in zip(components, subsets, strict=True):
        total = sum(precision[m] for m in subset)
        if joint == "mixture":
            total = np.where(total > 0, total, 1.0)
        else:
            total = total + (joint != "product_without_prior")
        center = sum(precision[m] * mean[m] for m in subset) / total
        np.testing.assert_allclose(found.mean.detach(), center, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(found.logvar.detach(), -np.log(total), rtol=1e-10, atol=1e-12)
        densities.append(stats.norm(center, total**-0.5).logpdf(z).sum(1))
    ours = inference.log_prob(torch.as_tensor(z), x).detach()
    np.testing.assert_allclose(ours, special.logsumexp(densities, 0) - math.log(len(subsets)), rtol=1e-10)


@pytest.mark.parametrize("net", NETS)
def test_private_networks_have_the_parameters_of_plain_ones(net: str, seed: int) -> None:
    """A plain latent of u and one w: the same weights in every decoder and encoder, however many modalities."""
    torch.manual_seed(seed)

    def sizes(module: torch.nn.Module) -> list[tuple[str, torch.Size]]:
        return [(name, p.shape) for name, p in module.named_parameters() if name != "auxiliary"]

    kwargs = {"net": net, "width": 8}
    for kind in (SharedGenerator, JointInference):
        plain = kind(SHAPES, 5, **kwargs)  # type: ignore[arg-type]
        split = kind(SHAPES, 3 + 3 * 2, private=2, **kwargs)  # type: ignore[arg-type]
        assert sizes(plain) == sizes(split)
        assert plain.state_dict().keys() == split.state_dict().keys() - {"auxiliary"}


@pytest.mark.parametrize("net", NETS)
def test_a_decoder_reads_what_is_shared_and_its_own(net: str, seed: int) -> None:
    torch.manual_seed(seed)
    generator = SharedGenerator(SHAPES, 3 + 3 * 2, width=8, private=2, net=net)  # type: ignore[arg-type]
    z = torch.randn(2, 9, requires_grad=True)
    for m, x in enumerate(generator(z).values()):
        heard = torch.autograd.grad(x.square().sum(), z)[0].abs().sum(0) > 0
        assert heard.tolist() == [i < 3 or 3 + 2 * m <= i < 5 + 2 * m for i in range(9)]


@pytest.mark.parametrize("private", [0, 2])
def test_posterior_with_private_latents_is_lowered(private: int, seed: int) -> None:
    """The chain on z stays one fused call: the terms have the energy and gradient of autograd."""
    torch.manual_seed(seed)
    shapes = {"grey": (1, 4, 4), "vector": (7,)}
    generator = SharedGenerator(shapes, 7, width=8, private=private, weights={"vector": 3.0}).double()
    x = {name: torch.rand(5, *shape, dtype=torch.float64) for name, shape in shapes.items()}
    posterior, z = Posterior(generator, GaussianPrior(7), x), torch.randn(5, 7, dtype=torch.float64)
    value, grad = mlp_energy(z, lower(posterior, z).terms)
    live = z.requires_grad_()
    wanted = posterior(live)
    # float64: the same sums of less than 10^3 terms of order 1 in another order
    torch.testing.assert_close(value, wanted, rtol=0, atol=1e-10)
    torch.testing.assert_close(grad, torch.autograd.grad(wanted.sum(), live)[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("likelihood", ["gaussian", "laplace"])
@pytest.mark.parametrize("learns", ["z", "x"])
def test_likelihood_of_what_a_row_has(likelihood: str, learns: str, seed: int) -> None:
    """Row by row that of the modalities it has, with gradients; squared error per element of those."""
    torch.manual_seed(seed)
    shapes = {"a": (1, 2, 3), "b": (2,), "c": (4,)}
    generator = SharedGenerator(shapes, 4, width=8, likelihood=likelihood, weights={"b": 6.0}).double()  # type: ignore[arg-type]
    z = torch.randn(6, 4, dtype=torch.float64)
    x = {name: torch.randn(6, *shape, dtype=torch.float64) for name, shape in shapes.items()}
    present = some(6, list(shapes), seed)
    holes = {name: v.masked_fill(~present[name].reshape(-1, *[1] * (v.dim() - 1)), torch.nan) for name, v in x.items()}
    variables = [z] if learns == "z" else list(holes.values())
    for v in variables:
        v.requires_grad_()
    ours = generator.negative_log_likelihood(holes, z, present=present)
    grads = torch.autograd.grad(ours.sum(), variables)
    assert all(g.isfinite().all() for g in grads)
    error = generator.squared_error(holes, z, present)
    for i in range(6):
        row = {name: v[i : i + 1] for name, v in x.items() if present[name][i]}
        torch.testing.assert_close(ours[i : i + 1], generator.negative_log_likelihood(row, z[i : i + 1]))
        elements = torch.cat([(generator(z)[name][i] - v[0]).flatten() for name, v in row.items()])
        torch.testing.assert_close(error[i], elements.square().mean())
    if learns == "x":
        assert all((g[~present[name]] == 0).all() for name, g in zip(holes, grads, strict=True))
    # a modality that the mask does not name is there in every row
    everywhere = generator.negative_log_likelihood(x, z)
    torch.testing.assert_close(generator.negative_log_likelihood(x, z, present={}), everywhere)


def test_bad_masks_and_sizes_are_refused(seed: int) -> None:
    x, shapes = {"a": torch.zeros(4, 3)}, {"a": (3,)}
    generator, inference = SharedGenerator(shapes, 2, width=4), JointInference(shapes, 2, width=4)
    with pytest.raises(TypeError, match=r"present\['a'\] must be a boolean tensor, got torch.float32"):
        inference.log_prob(torch.zeros(4, 2), x, present={"a": torch.ones(4)})
    with pytest.raises(ValueError, match=r"present\['a'\] must hold one value for each of 4 rows, got \(3,\)"):
        generator.negative_log_likelihood(x, torch.zeros(4, 2), {"a": torch.ones(3, dtype=torch.bool)})
    with pytest.raises(ValueError, match="present must leave every row at least one modality of x, but row 2 has none"):
        inference.sample(x, present={"a": torch.arange(4) != 2})
    with pytest.raises(ValueError, match=r"joint='unimodal:b' names a modality that x lacks"):
        inference.sample(x, joint="unimodal:b")
    with pytest.raises(ValueError, match=r"joint must be one of 'mixture', .* or 'unimodal:NAME', got 'sum'"):
        inference.components(x, "sum")
    with pytest.raises(ValueError, match=r"joint must be one of 'mixture', .*, got 'unimodal:a'"):
        JointInference(shapes, 2, joint="unimodal:a")  # type: ignore[arg-type]
    for kind in (SharedGenerator, JointInference):
        with pytest.raises(ValueError, match="latent=6 must hold private=2 elements for each of 3 modalities"):
            kind(SHAPES, 6, private=2)


def test_kl_against_torch(seed: int) -> None:
    torch.manual_seed(seed)
    e = Expert(torch.randn(5, 3), torch.randn(5, 3))
    q = torch.distributions.Normal(e.mean, (0.5 * e.logvar).exp())
    expected = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(e.kl(), expected, rtol=1e-4, atol=1e-5)
    other = Expert(torch.randn(5, 3), torch.randn(5, 3))
    p = torch.distributions.Normal(other.mean, (0.5 * other.logvar).exp())
    expected = torch.distributions.kl_divergence(q, p).sum(1)
    torch.testing.assert_close(e.kl(other), expected, rtol=1e-4, atol=1e-4)


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
