"""Published samplers by the name of their paper: ``mmebm.presets.igebm().sample(energy, x0, steps=60)``.

Each returns a :class:`mmebm.Langevin` with the constants of the published code; keywords change any of its options, as
in ``jem(noise_scale=0.02)``. "a" and "s" are step_size and noise_scale, "T" the implied temperature s^2 / (2a): the
chain's law is close to exp(-E / T). "Steps" is what the code runs in training. The start of the chain (a buffer, data,
noise) is the caller's. Presets of models that give f = -E or a score say so, and set ``log_prob`` or ``score``.
docs/replace-your-loop.md compares them and lists the traps.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mmebm.samplers.langevin import Langevin
from mmebm.samplers.options import LangevinKeywords, LangevinOptions, Setting
from mmebm.samplers.schedules import geometric, linear, polynomial, table
from mmebm.samplers.settings import check_leaves
from mmebm.state import check_setting, integer, items, one_number, square

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "coopnets",
    "dual_mcmc_data",
    "dual_mcmc_latent",
    "ebm_anatomy",
    "energy_matching",
    "hat_ebm",
    "ibc",
    "igebm",
    "improved_cd",
    "ired",
    "jem",
    "latent_ebm_posterior",
    "latent_ebm_prior",
    "lsd",
    "masked_multimodal",
    "nae",
    "nae_data",
    "ncsn",
    "recovery_likelihood",
    "sada_jem",
    "short_run",
    "uva",
    "vaebm",
]


def _made(changes: LangevinKeywords, **published: Unpack[LangevinOptions]) -> Langevin:
    options: dict[str, Any] = {**published, **changes}
    return Langevin(**options)


def _sgld(changes: LangevinOptions, scale: Setting, **published: Unpack[LangevinKeywords]) -> Langevin:
    """a = s^2 / 2, whatever of it is changed afterwards."""
    return Langevin.from_sgld(scale, **published).replace(**changes)


# -- of data, decoupled step and noise: gradient descent with a little noise


def jem(**changes: Unpack[LangevinOptions]) -> Langevin:
    """JEM (Grathwohl et al. 2020, wgrathwohl/JEM): a 1, s 0.01, T 5e-5. Steps 20.

    The network gives f = -E: the log-sum-exp of the logits, or one logit for a class (``args=(labels,)``). Start: a
    buffer of 10,000 images written back in place, 5 % of each batch anew from U(-1, 1).
    """
    return _made(changes, step_size=1.0, noise_scale=0.01, log_prob=True)


def short_run(**changes: Unpack[LangevinOptions]) -> Langevin:
    """Short-run MCMC (Nijkamp et al. 2019, enijkamp/short_run): the update of :func:`jem`, T 5e-5. Steps 100.

    The network gives f = -E. Start: U(-1, 1) every time, no buffer; the chain is the generator, not its stationary law.
    """
    return jem(**changes)


def sada_jem(**changes: Unpack[LangevinOptions]) -> Langevin:
    """SADA-JEM (sndnyang/SADAJEM): a 1, no noise, gradient in +-1, images in [-1, 1], T 0. Steps 10 (readme: 5).

    The network gives f = -E. Batch norm is in train mode while the chain runs, so that modules stay as they are
    (``mode="keep"``); its JEM++ relatives too. Start: JEM's buffer, its new images from Gaussians of the classes.
    """
    return _made(changes, step_size=1.0, noise_scale=0.0, grad_clip=1.0, bounds=(-1.0, 1.0), log_prob=True, mode="keep")


def igebm(**changes: Unpack[LangevinOptions]) -> Langevin:
    """IGEBM (Du and Mordatch 2019; rosinality/igebm-pytorch): noise 0.005 before the gradient, then 10 times the
    gradient in +-0.01, clamp to [0, 1]. T 1.25e-6. Steps 60.

    The network gives E. Start: a FIFO buffer of 10,000, 5 % anew from U(0, 1). The original TensorFlow code clips the
    norm of the whole batch's gradient instead: ``grad_clip=None, grad_norm_clip=c, norm_over="tensor"``.
    """
    return _made(changes, step_size=10.0, noise_scale=0.005, noise_at="before", grad_clip=0.01, bounds=(0.0, 1.0))


def uva(**changes: Unpack[LangevinOptions]) -> Langevin:
    """UvA deep learning tutorial 8: :func:`igebm` on [-1, 1] with gradients in +-0.03 and a clamp after the noise too.
    T 1.25e-6. Steps 60 in training, 256 to draw.

    The network gives f = -E. Start: a buffer of 8,192, 5 % anew from U(-1, 1).
    """
    return _made(
        changes,
        step_size=10.0,
        noise_scale=0.005,
        noise_at="before",
        clamp_noise=True,
        grad_clip=0.03,
        bounds=(-1.0, 1.0),
        log_prob=True,
    )


def improved_cd(steps: int | None = None, **changes: Unpack[LangevinOptions]) -> Langevin:
    """Improved contrastive divergence (Du et al. 2021, yilundu/improved_contrastive_divergence): a 100, noise 0.001
    before the gradient, clamp to [0, 1]. T 5e-9. Steps 40.

    Args:
        steps: with it the noise falls linearly to 0 (that code's ``anneal``): at step k it is 0.001 (1 - (k+1)/steps).

    The network gives E. The KL term needs the last step's graph: ``differentiable=1``. Start: a reservoir of 10,000
    8-bit images, augmented when drawn, 0.1 % anew.
    """
    noise = 0.001
    fall = noise if steps is None else linear(noise * (1 - 1 / integer("steps", steps, 1)), 0.0, steps)
    return _made(changes, step_size=100.0, noise_scale=fall, noise_at="before", bounds=(0.0, 1.0))


def ebm_anatomy(**changes: Unpack[LangevinOptions]) -> Langevin:
    """Anatomy of MCMC learning (Nijkamp et al. 2020, point0bar1/ebm-anatomy): a 1, s 0.01, T 5e-5. Steps 150.

    The network gives E; the paper's own form is exp(-E / T) with these a and s. Start: U(-1, 1), data with noise of
    0.03, or a persistent bank. The gradient norm that it watches is ``record=("grad_norm",)``.
    """
    return _made(changes, step_size=1.0, noise_scale=0.01)


def dual_mcmc_data(**changes: Unpack[LangevinOptions]) -> Langevin:
    """Dual-MCMC teaching (Cui and Han 2023, jcui1224/dual-MCMC), images: a 0.5^2 / 2, s 0.001, T 4e-6. Steps 30.

    The network gives E. Start: the generator's samples. Their spectral norm goes on iterating along the chain: that is
    ``mode="keep"`` with the network in train mode.
    """
    return _made(changes, step_size=0.5**2 / 2, noise_scale=0.001)


def lsd(steps: int = 100, **changes: Unpack[LangevinOptions]) -> Langevin:
    """LSD (Grathwohl et al. 2020, wgrathwohl/LSD): the step falls from 1 to 0.01 in equal ratios, s 0.01. T 5e-5 at the
    start, 5e-3 at the end. Steps 100; that code's logarithmic steps are 50 whatever it is asked for.

    The network gives f = -E, with the base distribution's log density in it (or ``prior_std``, if it is N(0, std^2)).
    Start: noise every time.
    """
    return _made(changes, step_size=geometric(1.0, 0.01, steps), noise_scale=0.01, log_prob=True)


def coopnets(**changes: Unpack[LangevinOptions]) -> Langevin:
    """CoopNets (Xie et al. 2018, jianwen-xie/CoopNets), descriptor: s 0.002, a s^2 / 2, reference N(0, 0.016^2), T 1.
    Steps 15.

    The network gives f = -E without the reference. Start: the generator's samples. The generator's own chain is
    :func:`latent_ebm_posterior` with its decoder alone.
    """
    return _sgld(changes, 0.002, prior_std=0.016, log_prob=True)


# -- of latent variables, tied: T 1


def latent_ebm_prior(**changes: Unpack[LangevinOptions]) -> Langevin:
    """Latent-space EBM prior (Pang et al. 2020, bpucla/latent-space-EBM-prior): s 0.4, a s^2 / 2, N(0, 1), T 1.
    Steps 60.

    The network gives E of z without the Gaussian. Start: N(0, 1) every time.
    """
    return _sgld(changes, 0.4, prior_std=1.0)


def latent_ebm_posterior(**changes: Unpack[LangevinOptions]) -> Langevin:
    """The same paper's posterior chain: s 0.1, a s^2 / 2, N(0, 1), T 1. Steps 20.

    The energy is one sum, E(z) + |x - G(z)|^2 / (2 0.3^2), with the images as ``args=(x,)``: one backward, where that
    code takes two. Start: N(0, 1).
    """
    return _sgld(changes, 0.1, prior_std=1.0)


def dual_mcmc_latent(**changes: Unpack[LangevinOptions]) -> Langevin:
    """Dual-MCMC teaching, latents: s 0.1, a s^2 / 2, N(0, 1), T 1. Steps 10.

    The energy is |x - G(z)|^2 / 0.3^2, without the 1/2 of a Gaussian: its deviation is 0.3 / sqrt(2). Start: the
    inference network.
    """
    return latent_ebm_posterior(**changes)


def vaebm(**changes: Unpack[LangevinOptions]) -> Langevin:
    """VAEBM (Xiao et al. 2021, NVlabs/VAEBM): eta 8e-5 (CIFAR-10), a eta / 2, s sqrt(eta), T 1. Steps 10, 16 to draw.

    The state is one flat list, eps_x and each group of eps_z, with one joint gradient; the energy holds the Gaussians.
    There it is a mean times the batch size of the options, here a sum, so that a last, smaller batch takes the same
    steps. Start: N(0, 1), or a buffer of latents.
    """
    return _made(changes, step_size=8e-5 / 2)


def hat_ebm(**changes: Unpack[LangevinOptions]) -> Langevin:
    """HAT-EBM (Hill et al. 2022, point0bar1/hat-ebm, cifar10_refine): latents ``"z"`` with s 5e-3 and residual images
    ``"r"`` with s 1e-4, a s^2 / 2, the residual gradient's norm limited to 2.5, T 1. Steps 250.

    The state is {"z": ..., "r": ...}, the energy is the network's at G(z) + r divided by 1e-3, and ``sample`` is called
    with ``blocks=("z", "r")``: the residual moves at the new latent. Start: the generator's latents, residual 0.
    """
    return _sgld(changes, {"z": 5e-3, "r": 1e-4}, grad_norm_clip={"r": 2.5})


def masked_multimodal(**changes: Unpack[LangevinOptions]) -> Langevin:
    """Energy-based multimodal diffusion with a GNN-MRF (foubari/Energy-Based-Multimodal-Diffusion-with-GNN-MRF):
    a 0.01, s sqrt(2a), gradient in +-1, T 1. Steps 20, 50 to draw.

    The network gives E of the latents of all modalities. Given modalities: ``observed=``, with their values in the
    state. Start: N(0, 1), a buffer of 10,000 with 5 % anew in training.
    """
    return _made(changes, step_size=0.01, grad_clip=1.0)


# -- with constants of the caller's


def _divided(by: Any, x: Tensor) -> Tensor:
    if isinstance(by, Tensor) and by.numel() not in (1, len(x)):
        raise ValueError(f"alpha must be a number or one per chain ({len(x)},), got shape {tuple(by.shape)}")
    return x / (by.reshape(-1, *[1] * (x.dim() - 1)) if isinstance(by, Tensor) and by.dim() else by)


def recovery_likelihood(scale: Any, alpha: Any = None, **changes: Unpack[LangevinOptions]) -> Langevin:
    """Diffusion recovery likelihood (Gao et al. 2021, ruiqigao/recovery_likelihood): a scale^2 / 2, s scale, a number
    for each chain by its noise level, T 1. Steps 30.

    Args:
        scale: (chains,), b c_t sigma_t with b^2 = 2e-4.
        alpha: what the result is divided by, (chains,); None: not at all.

    The callable gives log p = f(y) / scale^2 - |y - x|^2 / (2 sigma^2), with the noisy x and sigma as ``args``.
    Start: the noisy x. To draw, that code takes 0.99 of the noise.
    """
    if alpha is not None:
        alpha = check_setting("alpha", alpha, low=-math.inf, kinds="a number or a tensor")
    return _sgld(changes, scale, log_prob=True, finish=None if alpha is None else functools.partial(_divided, alpha))


def ncsn(
    sigmas: Sequence[float] | None = None,
    steps_each: int = 100,
    epsilon: float = 2e-5,
    **changes: Unpack[LangevinOptions],
) -> Langevin:
    """NCSN (Song and Ermon 2019, ermongroup/ncsn): a = epsilon (sigma / sigma_last)^2, s sqrt(2a), T 1. Steps 100 for
    each of ten levels in equal ratios from 1 to 0.01.

    The network gives the score at (x, sigma): ``args=(mmebm.presets.levels(sigmas, steps_each),)`` passes each step's
    sigma. Start: U(0, 1). NCSNv2's denoising at the end: ``finish=lambda x: x + sigma_last**2 * score(x, sigma_last)``.
    """
    epsilon = one_number("epsilon", epsilon)
    given = levels(sigmas, steps_each).values
    for sigma in given:
        one_number("sigmas", sigma, strict=True)
    each = [float(sigma) for sigma in given]
    sizes = [epsilon * square("sigmas over the last", sigma / each[-1]) for sigma in each]
    return _made(changes, step_size=table(sizes), score=True)


def levels(sigmas: Sequence[float] | None = None, steps_each: int = 100) -> table:
    """Each step's noise level in :func:`ncsn`, for the network: by default ten from 1 to 0.01."""
    if sigmas is None:
        down = geometric(1.0, 0.01, 10)
        sigmas = [down(k) for k in range(10)]
    given, steps_each = items("sigmas", sigmas), integer("steps_each", steps_each, 1)
    if not given:
        raise ValueError(f"sigmas must hold one level at least, got {sigmas!r:.80}")
    for i, sigma in enumerate(given):
        check_setting(f"sigmas[{i}]", sigma, kinds="a number or a tensor")
    return table([sigma for sigma in given for _ in range(steps_each)])


def ibc(low: Any, high: Any, steps: int = 100, **changes: Unpack[LangevinOptions]) -> Langevin:
    """Implicit behavioural cloning (Florence et al. 2021, google-research/ibc): eta falls from 0.1 to 1e-5 as a square,
    a eta / 2, s eta; the update, noise included, is limited to a tenth of half the box. T eta. Steps 100 in its
    configurations, 25 in its code.

    Args:
        low, high: the box of the actions, numbers or one per dimension.

    The network gives E of the action, the observation goes as ``args``. Start: uniform in the box.
    """
    eta = polynomial(0.1, 1e-5, steps)
    half = polynomial(0.1 / 2, 1e-5 / 2, steps)
    low = check_setting("low", low, low=-math.inf, kinds="a number or a tensor")
    high = check_setting("high", high, low=-math.inf, kinds="a number or a tensor")
    try:
        limit = 0.1 * 0.5 * (high - low)
    except RuntimeError:
        raise ValueError(
            f"low and high must be numbers or tensors that broadcast, got {low!r:.80} and {high!r:.80}"
        ) from None
    check_setting("0.05 (high - low)", limit)
    return _made(changes, step_size=half, noise_scale=eta, max_update=limit, bounds=(low, high))


def _to_sphere(z: Tensor) -> Tensor:
    return z / z.flatten(1).norm(dim=1).reshape(-1, *[1] * (z.dim() - 1))


def nae(**changes: Unpack[LangevinOptions]) -> Langevin:
    """Normalised autoencoder (Yoon et al. 2021, swyoon/normalized-autoencoders, MNIST), latents: a 0.2, s 0.05, each
    step back to the unit sphere. T 6.25e-3. Steps 10.

    The energy is the reconstruction error of the decoded z, a mean over its elements. Start: a buffer of latents on the
    sphere, 5 % anew. Its images then go through :func:`nae_data`.
    """
    return _made(changes, step_size=0.2, noise_scale=0.05, project=_to_sphere)


def _annealed(noise: float, k: int) -> float:
    # that code divides after its step, so that the first two have the same noise
    return noise / max(k, 1)


def nae_data(**changes: Unpack[LangevinOptions]) -> Langevin:
    """Normalised autoencoder, images: a 10, s 0.05 / max(k, 1), gradient norm 0.01, clamp to [0, 1]. T 1.25e-4 at the
    start. Steps 50.

    The energy is the reconstruction error, a mean. That code's norm is over the last dimension: of a flat state's
    chains, but of an image's rows. ``outside="reject"`` is its ``reject_boundary``. Start: the decoded latents.
    """
    return _made(
        changes, step_size=10.0, noise_scale=functools.partial(_annealed, 0.05), grad_norm_clip=0.01, bounds=(0.0, 1.0)
    )


def energy_matching(epsilon: Any = 0.01, **changes: Unpack[LangevinOptions]) -> Langevin:
    """Energy matching (Balcerak et al. 2025, m1balcerak/EnergyMatching): a 0.01, s sqrt(2 a epsilon), clamp to [-1, 1]
    at the end. T epsilon. Steps by its settings, 200 for proteins.

    Args:
        epsilon: the temperature: a number, one per chain, or a function of the step (a ramp in time).

    The network gives E. Start: half noise, half data, in one batch with an epsilon for each chain.
    """
    check_leaves("epsilon", epsilon)
    return _made(changes, step_size=0.01, temperature=epsilon, bounds=(-1.0, 1.0), bounds_at="end")


def ired(step_size: Any, limit: Any, **changes: Unpack[LangevinKeywords]) -> Langevin:
    """IRED (Du et al. 2024, yilundu/ired_code_release): gradient descent, a step taken only where the energy falls, in
    +-limit. T 0. Steps 5 for each noise level, 20 for sudoku.

    Args:
        step_size: of the level, beta_t / sqrt(1 - alpha_bar_t); a number or one per chain.
        limit: sqrt(alpha_bar_t), times 2 for continuous tasks.

    The network gives E of the answer; question and level go as ``args``, given parts of the answer as ``observed``.
    Start: noise, then the level before. That code takes steps of equal energy too.
    """
    limit = check_setting("limit", limit, kinds="a number or a tensor")
    return _made(changes, step_size=step_size, noise_scale=0.0, bounds=(-limit, limit), accept="descent")
