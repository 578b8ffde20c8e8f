"""The objectives against closed forms: linear decoders and affine experts, restated in NumPy.

With x_m = A_m z + b_m + sigma noise and a Gaussian q, expected log-likelihoods and divergences are closed forms, and so
is log p(X); only E log(q_mix / q_m) of the mixtures is an integral, taken by quadrature. An objective's value is an
average of samples: it has to meet its expectation within 7 standard errors, which are measured from 40 calls (Student's
t with 39 degrees of freedom exceeds 7 with probability 2e-8).
"""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor, nn

from mmebm.models import JointInference, SharedGenerator
from mmebm.models.inference import Experts
from mmebm.training.objectives import JOINT_OF, OBJECTIVES, contrastive, objective

SIZES = {"a": 2, "b": 1, "c": 3}
SIGMA = 0.8
CONSTANT = math.log(SIGMA * math.sqrt(2 * math.pi))  # of -log p(x | z), for each element; the objectives leave it out
CALLS, COPIES, ERRORS = 40, 200, 7.0

Array = np.ndarray


class Linear:
    """The two networks with linear decoders and affine experts in float64, a batch, and their numbers in NumPy."""

    def __init__(
        self,
        seed: int,
        *,
        latent: int = 2,
        private: int = 0,
        sizes: dict[str, int] | None = None,
        n: int = 4,
        slope: float = 1.0,
    ) -> None:
        sizes = sizes or SIZES
        self.random = np.random.default_rng(seed)
        shapes = {name: (size,) for name, size in sizes.items()}
        self.names, self.n, self.latent, self.private = list(sizes), n, latent, private
        self.shared = latent - private * len(sizes)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.generator = SharedGenerator(shapes, latent, width=4, sigma=SIGMA, private=private).double()
            self.inference = JointInference(shapes, latent, width=4, private=private).double()
        self.A, self.b, self.mean, self.var, self.own = {}, {}, {}, {}, {}
        self.x = {name: self.random.normal(size=(n, size)) for name, size in sizes.items()}
        for m, (name, size) in enumerate(sizes.items()):
            own = [*range(self.shared), *range(self.shared + m * private, self.shared + (m + 1) * private)]
            A = np.zeros((size, latent))
            A[:, own] = slope * self.random.normal(size=(size, len(own)))
            b = self.random.normal(size=size)
            self.A[name], self.b[name] = A, b
            self.generator.decoders[name] = affine(A, b)
            to_mean = 0.5 * self.random.normal(size=(len(own), size))
            offset = 0.5 * self.random.normal(size=len(own))
            logvar = self.random.uniform(-2, 0.5, size=len(own))
            self.inference.experts[name] = affine(
                np.concatenate([to_mean, np.zeros_like(to_mean)]), np.concatenate([offset, logvar])
            )
            # where expert m says nothing it is the prior
            self.mean[name], self.var[name] = np.zeros((n, latent)), np.ones((n, latent))
            self.mean[name][:, own] = self.x[name] @ to_mean.T + offset
            self.var[name][:, own] = np.exp(logvar)
            self.own[name] = np.isin(np.arange(latent), own)
        if self.inference.auxiliary is not None:
            self.inference.auxiliary.data = torch.as_tensor(self.random.uniform(-1.5, 1, size=(len(sizes), private)))

    def rows(self, present: dict[str, Array] | None) -> list[list[str]]:
        """The modalities that each row has."""
        return [[name for name in self.names if present is None or present[name][i]] for i in range(self.n)]

    def missing(self) -> dict[str, Array]:
        """Which rows have which modality: row 0 all, the others some, at least one."""
        has = self.random.random((self.n, len(self.names))) < 0.5
        has[np.arange(self.n), self.random.integers(len(self.names), size=self.n)] = True
        has[0] = True
        return dict(zip(self.names, has.T, strict=True))

    def log_likelihood(self, i: int, names: list[str], mean: Array, var: Array) -> float:
        """E log p(x_i | z) over z ~ N(mean, diag var), without the constant."""
        value = 0.0
        for name in names:
            off = self.x[name][i] - self.A[name] @ mean - self.b[name]
            value -= ((off**2).sum() + (self.A[name] ** 2 @ var).sum()) / (2 * SIGMA**2)
        return value

    def product(self, i: int, names: list[str], prior: float = 1.0) -> tuple[Array, Array]:
        """Mean and variance of the product of the experts ``names`` and the prior (to the power ``prior``)."""
        precision = prior + sum(self.own[m] / self.var[m][i] for m in names)
        return sum(self.own[m] * self.mean[m][i] / self.var[m][i] for m in names) / precision, 1 / precision

    def evidence(self, i: int, names: list[str], prior_var: Array | None = None) -> float:
        """log p(x_i) of the modalities ``names``, plus the constant that the objectives leave out."""
        A, b = np.concatenate([self.A[m] for m in names]), np.concatenate([self.b[m] for m in names])
        x = np.concatenate([self.x[m][i] for m in names])
        covariance = (A * (np.ones(self.latent) if prior_var is None else prior_var)) @ A.T + SIGMA**2 * np.eye(len(x))
        return float(stats.multivariate_normal(b, covariance).logpdf(x)) + len(x) * CONSTANT

    def estimate(
        self,
        name: str,
        seed: int,
        *,
        beta: float = 1.0,
        present: dict[str, Array] | None = None,
        drop: bool = False,
        **options,
    ) -> tuple[float, float]:
        """Mean and standard error of an objective; what a row lacks is NaN, or left out of the batch with ``drop``."""
        x, masks = {}, None
        for m in self.names:
            value = self.x[m].copy()
            if present is not None:
                if drop and not present[m].any():
                    continue
                value[~present[m]] = np.nan
            x[m] = torch.as_tensor(value).repeat(COPIES, 1)
        if present is not None and not drop:
            masks = {m: torch.as_tensor(present[m]).repeat(COPIES) for m in self.names}
        rng, values = torch.Generator().manual_seed(seed), []
        with torch.no_grad():
            for _ in range(CALLS):
                bound, z = objective(name, **options)(self.generator, self.inference, x, rng, beta=beta, present=masks)
                assert bound.shape == () and z.shape == (self.n * COPIES, self.latent) and z.isfinite().all()
                values.append(bound.item())
        return float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(CALLS))


def affine(weight: Array, bias: Array) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=torch.float64)
    layer.weight.data, layer.bias.data = torch.as_tensor(weight), torch.as_tensor(bias)
    return layer


def kl(mean: Array, var: Array, mean2: Array | float = 0.0, var2: Array | float = 1.0) -> float:
    return float(0.5 * ((var + (mean - mean2) ** 2) / var2 - 1 + np.log(var2) - np.log(var)).sum())


# -- what each objective is in expectation, for row i with the modalities that it has


def single_expert(model: Linear, i: int, has: list[str], beta: float) -> float:
    return float(
        np.mean(
            [
                model.log_likelihood(i, has, model.mean[m][i], model.var[m][i])
                - beta * kl(model.mean[m][i], model.var[m][i])
                for m in has
            ]
        )
    )


def mvae(model: Linear, i: int, has: list[str], beta: float, subsets: int = 1) -> float:
    def elbo(names: list[str]) -> float:
        mean, var = model.product(i, names)
        return model.log_likelihood(i, names, mean, var) - beta * kl(mean, var)

    return subset_average(has, elbo, subsets)


def subset_average(has: list[str], value, subsets: int = 1) -> float:
    """``value`` of all, of each alone, and of coin flips: an empty flip is all."""
    flips = [[m for m, on in zip(has, flip, strict=True) if on] for flip in itertools.product([0, 1], repeat=len(has))]
    total = value(has) + sum(value([m]) for m in has) + subsets * float(np.mean([value(s or has) for s in flips]))
    return total / (1 + len(has) + subsets)


def mopoe(model: Linear, i: int, has: list[str], beta: float) -> float:
    values = []
    for size in range(1, len(has) + 1):
        for subset in itertools.combinations(has, size):
            mean, var = model.product(i, list(subset))
            values.append(model.log_likelihood(i, has, mean, var) - beta * kl(mean, var))
    return float(np.mean(values))


def mvtcae(model: Linear, i: int, has: list[str], beta: float, alpha: float = 5 / 6) -> float:
    """As published, divided by the weight of its reconstruction."""
    mean, var = model.product(i, has, prior=0.0)
    m = len(has)
    conditional = sum(kl(mean, var, model.mean[k][i], model.var[k][i]) for k in has)
    published = (m - alpha) / m * model.log_likelihood(i, has, mean, var) - beta * (
        (1 - alpha) * kl(mean, var) + alpha / m * conditional
    )
    return published / ((m - alpha) / m)


def mixed(model: Linear, i: int, has: list[str], beta: float, auxiliary: Array | None) -> float:
    """mmvae (auxiliary None) and mmvae+ of a one-dimensional u: strata, with E log(q_mix / q_m) by quadrature.

    That integral is about -.15. Decoders with small slopes keep the errors of the likelihoods below .01.
    """
    values = []
    for m in has:
        mean, var = model.mean[m][i], model.var[m][i]
        drawn = var if auxiliary is None else np.where(model.own[m], var, auxiliary)
        laws = [stats.norm(model.mean[k][i][0], model.var[k][i][0] ** 0.5) for k in has]
        own = stats.norm(mean[0], var[0] ** 0.5)

        def integrand(u: float, laws=laws, own=own) -> float:
            mixture = np.logaddexp.reduce([law.logpdf(u) for law in laws]) - math.log(len(laws))
            return own.pdf(u) * (mixture - own.logpdf(u))

        width = 10 * var[0] ** 0.5  # beyond it the density is below e^-50
        gap = integrate.quad(integrand, mean[0] - width, mean[0] + width, limit=200)[0]
        values.append(model.log_likelihood(i, has, mean, drawn) - beta * (kl(mean, var) + gap))
    return float(np.mean(values))


EXPECTED = {"single_expert": single_expert, "mvae": mvae, "mopoe": mopoe, "mvtcae": mvtcae}


@pytest.mark.parametrize("lacking", [False, True], ids=["whole", "missing"])
@pytest.mark.parametrize("name", EXPECTED)
def test_value_is_that_of_the_formula(name: str, lacking: bool, seed: int) -> None:
    model = Linear(seed)
    present = model.missing() if lacking else None
    wanted = np.mean([EXPECTED[name](model, i, has, 0.7) for i, has in enumerate(model.rows(present))])
    value, error = model.estimate(name, seed, beta=0.7, present=present)
    assert abs(value - wanted) < ERRORS * error


@pytest.mark.parametrize("lacking", [False, True], ids=["whole", "missing"])
def test_mixture_value_is_that_of_the_formula(lacking: bool, seed: int) -> None:
    model = Linear(seed, latent=1, slope=0.1)
    present = model.missing() if lacking else None
    wanted = np.mean([mixed(model, i, has, 0.7, None) for i, has in enumerate(model.rows(present))])
    value, error = model.estimate("mmvae", seed, beta=0.7, present=present)
    assert abs(value - wanted) < ERRORS * error


@pytest.mark.parametrize("lacking", [False, True], ids=["whole", "missing"])
def test_private_mixture_value_is_that_of_the_formula(lacking: bool, seed: int) -> None:
    model = Linear(seed, latent=7, private=2, slope=0.1)
    assert model.inference.auxiliary is not None
    auxiliary = np.concatenate([[1.0], np.exp(model.inference.auxiliary.detach().numpy().ravel())])
    present = model.missing() if lacking else None
    wanted = np.mean([mixed(model, i, has, 0.7, auxiliary) for i, has in enumerate(model.rows(present))])
    value, error = model.estimate("mmvae+", seed, beta=0.7, present=present)
    assert abs(value - wanted) < ERRORS * error


@pytest.mark.parametrize("options", [{"subsets": 0}, {"subsets": 3}])
def test_mvae_takes_as_many_subsets_as_asked(options: dict[str, int], seed: int) -> None:
    model = Linear(seed)
    wanted = np.mean([mvae(model, i, model.names, 1.0, **options) for i in range(model.n)])
    value, error = model.estimate("mvae", seed, **options)
    assert abs(value - wanted) < ERRORS * error


@pytest.mark.parametrize("name", OBJECTIVES)
def test_one_modality_makes_it_the_plain_bound(name: str, seed: int) -> None:
    """E_q log p(x | z) - beta KL(q || N(0, I)), q the expert, or its product with the prior as the objective has it."""
    model = Linear(seed, latent=3, private=1 if name == "mmvae+" else 0, sizes={"a": 2})
    wanted = []
    for i in range(model.n):
        mean, var = model.mean["a"][i], model.var["a"][i]
        if name in ("mvae", "mopoe"):
            mean, var = mean / (1 + var), var / (1 + var)
        wanted.append(model.log_likelihood(i, ["a"], mean, var) - 0.7 * kl(mean, var))
    value, error = model.estimate(name, seed, beta=0.7)
    assert abs(value - np.mean(wanted)) < ERRORS * error


@pytest.mark.parametrize("name", ["single_expert", "mvae", "mmvae", "mopoe", "mmvae+"])
def test_bound_stays_below_the_evidence(name: str, seed: int) -> None:
    """Of X; for mvae of the subsets it averages over; for mmvae+ of the models with r_n as the prior of w_n."""
    model = Linear(seed, latent=5 if name == "mmvae+" else 2, private=1 if name == "mmvae+" else 0)
    present = model.missing()
    wanted = []
    for i, has in enumerate(model.rows(present)):
        if name == "mvae":
            wanted.append(subset_average(has, lambda s, i=i: model.evidence(i, s)))
        elif name == "mmvae+":
            assert model.inference.auxiliary is not None
            auxiliary = np.concatenate([np.ones(2), np.exp(model.inference.auxiliary.detach().numpy().ravel())])
            wanted.append(np.mean([model.evidence(i, has, np.where(model.own[m], 1.0, auxiliary)) for m in has]))
        else:
            wanted.append(model.evidence(i, has))
    value, error = model.estimate(name, seed, present=present)
    assert value < np.mean(wanted) + ERRORS * error


def test_products_of_exact_experts_reach_the_evidence(seed: int) -> None:
    """With expert m proportional to p(x_m | z) every product with the prior is the posterior: no gap is left."""
    model = Linear(seed, latent=1, sizes={"a": 1, "b": 1, "c": 1})
    for name in model.names:
        model.A[name] = np.sign(model.A[name]) * (0.3 + np.abs(model.A[name]))  # variances within the clamp
        a, b = model.A[name].item(), model.b[name].item()
        model.generator.decoders[name] = affine(model.A[name], model.b[name])
        model.inference.experts[name] = affine(
            np.array([[1 / a], [0.0]]), np.array([-b / a, 2 * math.log(SIGMA / abs(a))])
        )
    present = model.missing()
    wanted = np.mean(
        [subset_average(has, lambda s, i=i: model.evidence(i, s)) for i, has in enumerate(model.rows(present))]
    )
    value, error = model.estimate("mvae", seed, present=present)
    assert abs(value - wanted) < ERRORS * error


def test_more_samples_tighten_the_mixture_bound(seed: int) -> None:
    """Burda et al. 2016: E log of a mean of K weights does not fall with K, and stays below the evidence."""
    model = Linear(seed)
    evidence = np.mean([model.evidence(i, model.names) for i in range(model.n)])
    one, error_one = model.estimate("mmvae", seed)
    many, error_many = model.estimate("mmvae", seed + 1, samples=8)
    margin = ERRORS * math.hypot(error_one, error_many)
    assert many > one - margin
    assert many < evidence + ERRORS * error_many
    # one expert alone is a proposal: with one modality K samples are the importance-weighted bound, by quadrature
    alone = Linear(seed, latent=1, sizes={"a": 1}, n=1)
    q = stats.norm(alone.mean["a"].item(), alone.var["a"].item() ** 0.5)
    nodes, masses = np.polynomial.hermite_e.hermegauss(120)
    z = q.mean() + q.std() * nodes
    mean = alone.A["a"].item() * z + alone.b["a"].item()
    weight = stats.norm(mean, SIGMA).logpdf(alone.x["a"].item()) + stats.norm.logpdf(z) - q.logpdf(z)
    masses = masses / masses.sum()
    pairs = np.logaddexp(weight[:, None], weight[None]) - math.log(2)
    wanted = masses @ pairs @ masses + CONSTANT
    value, error = alone.estimate("mmvae", seed, samples=2)
    assert abs(value - wanted) < ERRORS * error


@pytest.mark.parametrize("name", OBJECTIVES)
def test_masks_that_are_alike_equal_a_batch_without_the_modality(name: str, seed: int) -> None:
    model = Linear(seed, latent=5, private=1 if name == "mmvae+" else 0)
    gone = model.names[seed % 3]
    present = {m: np.full(model.n, m != gone) for m in model.names}
    masked, error = model.estimate(name, seed, present=present)
    dropped, other = model.estimate(name, seed + 1, present=present, drop=True)
    assert abs(masked - dropped) < ERRORS * math.hypot(error, other)


SHAPES = {"grey": (1, 8, 8), "vector": (5,), "word": (3,)}


def networks(
    seed: int, private: int = 0, net: str = "mlp", n: int = 12
) -> tuple[SharedGenerator, JointInference, dict[str, Tensor]]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        generator = SharedGenerator(SHAPES, 9, width=8, private=private, net=net)  # type: ignore[arg-type]
        inference = JointInference(SHAPES, 9, width=8, private=private, net=net)  # type: ignore[arg-type]
        return generator, inference, {name: torch.rand(n, *shape) * 2 - 1 for name, shape in SHAPES.items()}


@pytest.mark.parametrize("net", ["mlp", "conv"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradient_reaches_every_parameter(name: str, net: str, seed: int) -> None:
    """All of them learn; with missing modalities too, where NaN in what is missing does not show."""
    # rows that pick one expert at random all miss a given one with probability (2/3)^200 = 6e-36
    generator, inference, x = networks(seed, private=2 if name == "mmvae+" else 0, net=net, n=200)
    parameters = [*generator.parameters(), *inference.parameters()]
    rng = torch.Generator().manual_seed(seed)
    gone = torch.arange(200) % 4
    present = {m: gone != i for i, m in enumerate(SHAPES)}
    holes = {m: v.clone() for m, v in x.items()}
    for m, rows in present.items():
        holes[m][~rows] = torch.nan
    for batch, masks in ((x, None), (holes, present)):
        bound, z = objective(name)(generator, inference, batch, rng, beta=1.0, present=masks)
        assert not z.requires_grad
        grads = torch.autograd.grad(bound, parameters)
        assert all(g.isfinite().all() for g in grads)
        # a bias may have none where its units are off, but every tensor of weights is heard
        assert all(g.abs().max() > 0 for g in grads)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_a_row_lacks_does_not_matter(name: str, seed: int) -> None:
    """Bit for bit: neither in the bound nor in its gradients."""
    generator, inference, x = networks(seed, private=2 if name == "mmvae+" else 0)
    parameters = [*generator.parameters(), *inference.parameters()]
    gone = torch.arange(12) % 4
    present = {m: gone != i for i, m in enumerate(SHAPES)}
    found = []
    for filling in (0.0, 1e30, torch.nan):
        batch = {m: v.clone() for m, v in x.items()}
        for m, rows in present.items():
            batch[m][~rows] = filling
        rng = torch.Generator().manual_seed(seed)
        bound, z = objective(name)(generator, inference, batch, rng, beta=1.0, present=present)
        found.append([bound, z, *torch.autograd.grad(bound, parameters)])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_draw_is_a_function_of_its_generator(name: str, seed: int) -> None:
    generator, inference, x = networks(seed, private=2 if name == "mmvae+" else 0)
    seeds = (torch.Generator().manual_seed(s) for s in (seed, seed, seed + 1))
    a, b, c = (objective(name)(generator, inference, x, rng, beta=1.0) for rng in seeds)
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    assert not torch.equal(a[1], c[1])


@pytest.mark.parametrize("name", ["mvae", "mopoe", "mvtcae", "mmvae", "mmvae+"])
def test_every_baseline_has_its_joint(name: str, seed: int) -> None:
    joint = JOINT_OF[name]
    assert joint is not None
    inference = JointInference(SHAPES, 9, width=8, joint=joint)
    x = networks(seed)[2]
    assert inference.sample(x, torch.Generator().manual_seed(seed)).shape == (12, 9)


def test_bad_input_is_refused(seed: int) -> None:
    generator, inference, x = networks(seed)
    rng = torch.Generator().manual_seed(seed)
    with pytest.raises(ValueError, match=r"objective must be one of 'single_expert', .*, got 'vae'"):
        objective("vae")
    with pytest.raises(ValueError, match=r"mmvae\+ needs private latents, got private=0 in the generator"):
        objective("mmvae+")(generator, inference, x, rng, beta=1.0)
    for name, options, message in (
        ("mvae", {"subsets": -1}, "subsets must be an int of at least 0, got -1"),
        ("mmvae", {"samples": "3"}, "samples must be an int of at least 1, got '3'"),
        ("mmvae", {"samples": 1.5}, "samples must be an int of at least 1, got 1.5"),
        ("mvtcae", {"alpha": "1"}, "alpha must be a number, got '1'"),
        ("mmvae", {"samples": 0}, "samples must be an int of at least 1, got 0"),
        ("mvtcae", {"alpha": 1.0}, r"alpha must lie in \[0, 1\), got 1.0"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            objective(name, **options)(generator, inference, x, rng, beta=1.0)
    nothing = {m: torch.arange(12) != 5 for m in SHAPES}
    with pytest.raises(ValueError, match="present must leave every row at least one modality of x, but row 5 has none"):
        objective("mmvae")(generator, inference, x, rng, beta=1.0, present=nothing)


def _experts(means: Tensor, has: Tensor) -> Experts:
    says = has[..., None].expand_as(means)
    names = tuple("abcdef"[: len(means)])
    return Experts(names, torch.where(says, means, 0.0), torch.zeros_like(means), says, has)


@pytest.mark.parametrize("missing", [False, True])
def test_contrastive_is_the_formula(missing: bool) -> None:
    """Against the definition, row by row: pairs of modalities that a row has, among the rows that have both."""
    rng = torch.Generator().manual_seed(0)
    count, n, shared, t = 3, 6, 4, 0.2
    means = torch.randn(count, n, 7, generator=rng)
    has = torch.rand(count, n, generator=rng) < 0.6 if missing else torch.ones(count, n, dtype=torch.bool)
    has[0] |= ~has.any(0)
    terms = []
    for a in range(count):
        for b in range(count):
            rows = [i for i in range(n) if has[a, i] and has[b, i]]
            for i in rows if a != b else []:
                u = means[a, i, :shared] / means[a, i, :shared].norm()
                against = [float(u @ means[b, j, :shared] / means[b, j, :shared].norm()) / t for j in rows]
                own = against[rows.index(i)]
                terms.append(math.log(sum(math.exp(s) for s in against)) - own)
    found = contrastive(_experts(means, has), shared=shared, temperature=t)
    assert found.item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_contrastive_of_rows_with_one_modality_is_nothing() -> None:
    means = torch.randn(2, 4, 3, requires_grad=True)
    has = torch.tensor([[True, True, False, False], [False, False, True, True]])
    value = contrastive(_experts(means, has))
    (grad,) = torch.autograd.grad(value, means)
    assert value.item() == 0 and grad.abs().max() == 0
    with pytest.raises(ValueError, match="temperature must be above 0"):
        contrastive(_experts(means, has), temperature=0.0)


def test_detached_self_reconstruction_cuts_one_path() -> None:
    """The value is the formula's; the likelihood of a modality teaches the shared part of its own expert nothing, the
    shared parts of the others and every private part what it did."""
    shapes = {"a": (3,), "b": (4,)}
    torch.manual_seed(0)
    generator = SharedGenerator(shapes, 8, width=8, depth=1, private=2)
    inference = JointInference(shapes, 8, width=8, depth=1, private=2, joint="product")
    x = {name: torch.randn(5, *shape) for name, shape in shapes.items()}

    def grads(option: str, target: str) -> tuple[Tensor, Tensor]:
        weights = {name: float(name == target) for name in shapes}
        one = SharedGenerator(shapes, 8, width=8, depth=1, private=2, weights=weights)
        one.load_state_dict(generator.state_dict())
        experts = inference.encode(x)
        mean = experts.mean.detach().requires_grad_()
        bound, _ = objective("single_expert", self_reconstruction=option)(
            one,
            inference,
            x,
            torch.Generator().manual_seed(1),
            beta=0.0,
            experts=dataclasses.replace(experts, mean=mean, logvar=experts.logvar.detach()),
        )
        return bound.detach(), torch.autograd.grad(bound, mean)[0]

    for m, target in enumerate(shapes):
        (value, full), (same, cut) = grads("full", target), grads("detached", target)
        torch.testing.assert_close(value, same)
        assert full[m, :, :4].abs().max() > 0 and cut[m, :, :4].abs().max() == 0
        other = full.clone()
        other[m, :, :4] = 0
        torch.testing.assert_close(cut, other)
    with pytest.raises(ValueError, match="self_reconstruction must be 'full' or 'detached', got 'of'"):
        grads("of", "a")
