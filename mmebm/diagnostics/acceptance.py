"""The bias of the unadjusted step, seen as the probability that a Metropolis test would accept it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmebm.samplers.arguments import parts_like, resolve
from mmebm.samplers.gradient import Target, one_per_chain
from mmebm.samplers.langevin import Langevin
from mmebm.samplers.metropolis import log_ratio, refusal
from mmebm.samplers.settings import langevin_rows
from mmebm.samplers.user_modules import modules_of, sampling
from mmebm.state import State, check_setting


def mala_acceptance(
    energy: Callable[..., Any],
    state: State,
    sampler: Langevin,
    *,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    observed: Any = None,
    temperature: float | Tensor | None = None,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    chain_offset: int = 0,
    first_step: int = 0,
) -> Tensor:
    """The probability with which a Metropolis test would accept the sampler's next step, chain by chain.

    Near 1 the unadjusted chain is nearly exact; 1 minus its mean over chains at equilibrium is a bound on the total
    variation that one step moves the law away from the target. It costs a step and two gradients, and the chain it
    looks at goes on as if it had not. A prior set by ``prior_std`` is part of the target.

    Args:
        energy, state, args, kwargs, observed, seed, generator, chain_offset, first_step: as for
            :meth:`mmebm.Langevin.sample`; with the chain's own seed and next step it is the very step that comes next.
            The state must be float32 or float64.
        sampler: a :class:`mmebm.Langevin` of an energy (no score) whose step is Gaussian: without noise before the
            gradient, bounds at every step, max_update, project, and norm_over="tensor".
        temperature: of the target exp(-E / T), a number or one per chain; ``sampler.temperature`` unless given. Of a
            sampler with its own noise_scale, ``sampler.implied_temperature`` asks about the law that it has for small
            steps, and 1 about exp(-E).

    Returns:
        (chains,), in [0, 1]; 0 where the step or its energy is not finite.

    Raises:
        TypeError, ValueError: naming the argument, the value and what would do.
    """
    if not isinstance(sampler, Langevin):
        raise TypeError(f"sampler must be a Langevin, got {type(sampler).__name__}")
    why = "score=True, without energies" if sampler.score else refusal(sampler)
    if why is not None:
        raise ValueError(f"mala_acceptance needs an energy and a step that is Gaussian; sampler has {why}")
    target_temperature = sampler.temperature if temperature is None else temperature
    if isinstance(target_temperature, Mapping) or callable(target_temperature):
        raise TypeError(
            "temperature must be given, a number or one per chain, where the sampler's is a mapping or a function, got "
            f"{target_temperature!r:.80}"
        )
    check_setting("temperature", target_temperature, strict=True)
    step = sampler.replace(accept=None, on_nonfinite="ignore")
    p, tensors, _ = resolve(
        step.replace(rng="philox"),
        energy,
        state,
        1,
        args=args,
        kwargs=kwargs,
        observed=observed,
        seed=seed,
        generator=generator,
        chain_offset=chain_offset,
        first_step=first_step,
    )
    chains, device = tensors[0].shape[0], tensors[0].device
    if any(t.dtype not in (torch.float32, torch.float64) for t in tensors):
        raise TypeError(f"state must be float32 or float64, got {[t.dtype for t in tensors]}")
    if isinstance(target_temperature, Tensor) and target_temperature.numel() not in (1, chains):
        raise ValueError(
            f"temperature must be a number or one per chain ({chains},), got shape {tuple(target_temperature.shape)}"
        )
    if isinstance(target_temperature, Tensor):
        t = target_temperature.to(device, torch.float64).reshape(-1)
    else:
        t = float(target_temperature)
    after = step.sample(
        energy,
        state,
        1,
        args=args,
        kwargs=kwargs,
        observed=observed,
        seed=p.seed,
        chain_offset=p.chain_offset,
        first_step=p.first_step,
    ).state
    modules = modules_of(energy, *p.calls[0])
    with torch.inference_mode(False), torch.no_grad(), sampling(modules, sampler.mode):
        if not chains:
            return torch.ones(0, dtype=tensors[0].dtype, device=device)
        target = Target.of(p, masked=True)
        params = langevin_rows(step, p.keys, tensors, p.first_step, 1)[0][0]
        x = [t.detach().clone() for t in tensors]
        y = [part.clone() for part in parts_like("state", after, p, tensors)]
        (e, g), (e_new, g_new) = target(x, 0), target(y, 0)
        ratio = log_ratio(
            [x[i] for i in p.moving],
            [y[i] for i in p.moving],
            g,
            g_new,
            one_per_chain("mala_acceptance", e),
            one_per_chain("mala_acceptance", e_new),
            [params[i] for i in p.moving],
            [p.mask(i) for i in p.moving],
            t,
            sampler.norm_over,
        )
        return torch.nan_to_num(ratio.clamp(max=0.0).exp(), nan=0.0, posinf=0.0).to(x[0].dtype)
