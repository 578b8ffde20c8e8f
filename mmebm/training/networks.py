"""Networks of the user's own in place of the built-in ones: found, checked by one forward, and told apart in chains."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmebm.models import LatentPrior
from mmebm.plugins import by_path
from mmebm.samplers import Samples
from mmebm.training.config import Config, ModelConfig, NetworkConfig

if TYPE_CHECKING:
    from mmebm.training.system import System

Networks = dict[str, nn.Module]


def flat_networks(networks: Mapping[str, Any] | None, modalities: Mapping[str, Any]) -> Networks:
    """``{"decoders": {"photo": module}, "energy": module}`` as ``{"decoders.photo": module, "energy": module}``.

    Raises:
        TypeError: for what is no module.
        ValueError: for an unknown key or modality.
    """
    out: Networks = {}
    for key, value in (networks or {}).items():
        if key in ("encoders", "decoders"):
            if not isinstance(value, Mapping):
                raise TypeError(f"networks[{key!r}] must map modalities to modules, got {type(value).__name__}")
            unknown = sorted(set(value) - set(modalities))
            if unknown:
                raise ValueError(f"networks[{key!r}] names {unknown}; the modalities are {list(modalities)}")
            out.update({f"{key}.{name}": module for name, module in value.items()})
        elif key in ("energy", "prior"):
            out[key] = value
        else:
            raise ValueError(f"networks must have some of 'encoders', 'decoders', 'energy', 'prior', got {key!r}")
    for name, module in out.items():
        if not isinstance(module, nn.Module):
            raise TypeError(f"network {name!r} must be a torch.nn.Module, got {type(module).__name__}")
    return out


def class_name(module: nn.Module) -> str:
    """Where a module's class is: "package.module:Class"."""
    return f"{type(module).__module__}:{type(module).__qualname__}"


def built(config: Config, shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[str, int]) -> Networks:
    """The networks that the configuration names by import path, made anew.

    A class is called with its ``arguments`` and, of the following, with what its signature names: a decoder with
    ``latent`` and ``shape``, an encoder with ``shape`` and ``out`` (twice the latent), an energy with ``shapes`` and a
    prior with ``latent``.

    Args:
        config: whose ``model`` names them.
        shapes: of the modalities.
        sizes: of the latent that each modality's networks see.

    Raises:
        ValueError, TypeError, ModuleNotFoundError: for a path that is none, a class that is no ``torch.nn.Module``, or
            arguments that it does not take.
    """
    m, out = config.model, {}
    for kind in ("encoders", "decoders"):
        for name, spec in getattr(m, kind).items():
            if name not in shapes:
                raise ValueError(f"model.{kind} names {name!r}; the modalities are {list(shapes)}")
            size = {"out": 2 * sizes[name]} if kind == "encoders" else {"latent": sizes[name]}
            out[f"{kind}.{name}"] = _make(f"model.{kind}.{name}", spec, {"shape": shapes[name], **size})
    if m.energy is not None:
        out["energy"] = _make("model.energy", m.energy, {"shapes": dict(shapes)})
    if m.prior is not None:
        out["prior"] = _make("model.prior", m.prior, {"latent": m.latent})
    return out


def _make(where: str, spec: str | NetworkConfig, offer: Mapping[str, Any]) -> nn.Module:
    spec = NetworkConfig(spec) if isinstance(spec, str) else spec
    kind = by_path(spec.path)
    # nothing but a network's class is called: a configuration may come from elsewhere
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise TypeError(f"{where} = {spec.path!r} must be a class of torch.nn.Module, got {kind!r:.80}")
    taken = inspect.signature(kind).parameters
    every = any(p.kind is p.VAR_KEYWORD for p in taken.values())
    arguments = {**{key: value for key, value in offer.items() if every or key in taken}, **spec.arguments}
    try:
        return kind(**arguments)
    except TypeError as error:
        said = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise TypeError(
            f"{where}: {spec.path}({said}) fails: {error}; its own arguments stand under {where}.arguments"
        ) from error


def check_shapes(system: System, own: Mapping[str, nn.Module]) -> None:
    """One forward of every network in ``own`` on two rows.

    Raises:
        ValueError: naming the network, what it was given, what it returned and what it should.
    """
    g = system.generator
    for name, module in own.items():
        kind, _, modality = name.partition(".")
        with _aside(module) as (device, rng):
            z = torch.randn(2, system.latent, generator=rng, device=device)
            x = {m: 2 * torch.rand(2, *shape, generator=rng, device=device) - 1 for m, shape in g.shapes.items()}
            if kind == "decoders":
                z = z[:, : len(g.columns[modality])]
                _forward(name, module, z, (2, *g.shapes[modality]), {"z": z})
            elif kind == "encoders":
                columns = len(g.columns[modality])
                _forward(
                    name,
                    module,
                    x[modality],
                    (2, 2 * columns),
                    {modality: x[modality]},
                    f": mean and log-variance of {columns} latents",
                )
            elif kind == "energy":
                _forward(name, module, x, (2,), x)
            else:
                _forward(name, module, z, (2,), {"z": z})


def _forward(
    name: str, module: nn.Module, given: Any, expected: tuple[int, ...], inputs: dict[str, Tensor], why: str = ""
) -> None:
    said = ", ".join(f"{key} {tuple(value.shape)}" for key, value in inputs.items())
    for value in inputs.values():
        value.requires_grad_()
    try:
        out = module(given)
    except Exception as error:
        raise ValueError(f"network {name!r} fails on {said}: {type(error).__name__}: {error}") from error
    shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
    if shape != expected:
        raise ValueError(f"network {name!r} returns {shape} for {said}; it must return {expected}{why}")
    if not out.is_floating_point() or not torch.isfinite(out).all():
        raise ValueError(f"network {name!r} returns {out.dtype} values that are not all finite numbers, for {said}")
    slopes = torch.autograd.grad(out.sum(), list(inputs.values()), allow_unused=True) if out.requires_grad else []
    still = [key for key, slope in zip(inputs, slopes, strict=False) if slope is None] if slopes else list(inputs)
    if still:
        raise ValueError(f"network {name!r} has no gradient in {', '.join(still)}: its chain would not move there")
    for key, slope in zip(inputs, slopes, strict=True):
        if not torch.isfinite(slope).all():
            raise ValueError(f"network {name!r} has a gradient in {key} that is not finite")


@contextlib.contextmanager
def _aside(module: nn.Module) -> Iterator[tuple[torch.device, torch.Generator]]:
    """Where ``module`` is, in eval mode, with everything random put back afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    first = next(module.parameters(), None)
    device = torch.device("cpu") if first is None else first.device
    devices = [device] if device.type == "cuda" else []
    try:
        module.eval()
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            yield device, torch.Generator(device).manual_seed(0)
    finally:
        for part, mode in modes:
            part.training = mode


def chain_reports(system: System, batch: int) -> dict[str, str]:
    """How each chain of the system runs here, and why: a line for each, found out by two steps of ``batch`` chains."""
    g, device = system.generator, system.device
    rng = torch.Generator(device).manual_seed(0)
    z = torch.randn(batch, system.latent, generator=rng, device=device)
    x = {m: 2 * torch.rand(batch, *shape, generator=rng, device=device) - 1 for m, shape in g.shapes.items()}
    chains: dict[str, Callable[[], Samples]] = {
        "data chain": lambda: system.revise_data(x, seed=0, steps=2),
        "latent chain": lambda: system.revise_latent(z, x, seed=0, steps=2),
    }
    prior = system.prior
    if isinstance(prior, LatentPrior):
        chains["chain of the latent prior"] = lambda: prior.sampler.sample(prior, z, 2, seed=0)
    out = {}
    for name, run in chains.items():
        info = run().info
        how = {"langevin_step": "a fused update after each gradient", "langevin_graph": "a captured graph"}.get(
            info["op"], "one fused call"
        )
        out[name] = f"{how} ({info['op']}, {info['backend']}): {info['reason']}"
    return out


def own_names(model: ModelConfig) -> list[str]:
    """The networks that a configuration names by import path, as :func:`flat_networks` calls them."""
    by_modality = [f"{kind}.{name}" for kind in ("encoders", "decoders") for name in getattr(model, kind)]
    return by_modality + [kind for kind in ("energy", "prior") if getattr(model, kind) is not None]
