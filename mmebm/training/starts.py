"""Where the two chains start: the initialisers by name, in training and at test.

The data chain, ``start.data``:

    generator     x0 = g(z0), z0 from the prior: the paper's
    independent   each modality decoded from a z0 of its own, as separate generators would give: no agreement
    aggregated    x0 = g(z), z ~ q(z | X) of training tuples: where the generator was taught to decode
    noise         uniform in [-1, 1]: the short-run EBM, no other network
    data+noise    training tuples plus normal noise, as in contrastive divergence
    shuffled      modalities of training tuples of different rows: the right marginals, no agreement
    buffer        persistent chains (:class:`mmebm.ReplayBuffer`), fresh ones from the generator, or from noise

The latent chain, ``start.latent``:

    inference                                  a sample of q(z | X) as it is configured: the paper's is the mixture
    mixture, product, mixture_of_products      a sample of that joint of the same experts; also product_without_prior
    unimodal:NAME                              the expert of one modality alone
    prior                                      z ~ p(z): no inference network
    persistent                                 where the chain of this training tuple ended the last time
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmebm import noise
from mmebm.models import standard_normal
from mmebm.ops import noise as drawn
from mmebm.samplers.buffer import Handle, ReplayBuffer
from mmebm.state import Batch
from mmebm.training.config import DATA_STARTS, StartConfig
from mmebm.training.system import System

Latents = Tensor | dict[str, Tensor]


class Start(NamedTuple):
    """Where a batch of data chains starts.

    ``z``: the latents that ``x`` was decoded from, (n, latent), one such tensor per modality where they differ, or
    None where ``x`` came from elsewhere: then there is no pair (X_k, z) to teach the generator with.
    """

    x: dict[str, Tensor]
    z: Latents | None
    handle: Handle | None = None


class DataStarts:
    """The starts of the data chain of one system; holds the buffer of persistent chains."""

    def __init__(self, system: System, config: StartConfig, *, seed: int) -> None:
        self.system: System = system
        self.config: StartConfig = config
        self.seed: int = seed
        self._buffer: ReplayBuffer | None = None

    @property
    def buffer(self) -> ReplayBuffer:
        """The persistent chains, begun at the first use."""
        if self._buffer is None:

            def fresh(n: int, generator: torch.Generator) -> dict[str, Tensor]:
                seed = noise.draw_seed(generator)
                return self.uniform(n, seed) if self.config.fresh == "noise" else self.system.generate(n, seed=seed)

            self._buffer = ReplayBuffer(
                self.config.buffer, fresh, reinit=self.config.reinit, device=self.system.device, seed=self.seed
            )
        return self._buffer

    @torch.no_grad()
    def __call__(self, n: int, *, seed: int, x: Batch, name: str | None = None, offset: int = 0) -> Start:
        """``n`` starts.

        Args:
            n: number of chains.
            seed: of everything drawn; chain ``i`` depends on ``seed`` and ``offset + i`` only, where it is decoded from
                the prior.
            x: real tuples, at least one, for the starts that are made of them.
            name: instead of the configured start.
            offset: global index of the first chain.
        """
        s, name = self.system, name or self.config.data
        if name not in DATA_STARTS:
            raise ValueError(f"the data chain starts by one of {list(DATA_STARTS)}, got {name!r}")
        rng = torch.Generator(s.device).manual_seed((seed + offset) % 2**63)
        if name == "generator":
            z: Latents = s.prior.draw(n, seed=seed, device=s.device, chain_offset=offset)
            return Start(s.decode(z), z)
        if name == "independent":
            z = {
                m: s.prior.draw(n, seed=(seed + i) % 2**63, device=s.device, chain_offset=offset)
                for i, m in enumerate(s.generator.shapes)
            }
            return Start(s.decode(z), z)
        if name == "noise":
            return Start(self.uniform(n, seed, offset), None)
        if name == "buffer":
            state, handle = self.buffer.draw(n)
            return Start(dict(state), None, handle)
        real = _rows(x, n)
        if name == "aggregated":
            z = s.inference.sample(real, rng)
            return Start(s.decode(z), z)
        if name == "data+noise":

            def noisy(value: Tensor) -> Tensor:
                added = torch.randn(value.shape, generator=rng, device=value.device, dtype=value.dtype)
                return (value + self.config.noise * added).clamp_(-1, 1)

            return Start({m: noisy(value) for m, value in real.items()}, None)
        shuffled = {m: value[torch.randperm(n, generator=rng, device=value.device)] for m, value in real.items()}
        return Start(shuffled, None)

    def uniform(self, n: int, seed: int, offset: int = 0) -> dict[str, Tensor]:
        """Noise in [-1, 1) of the shapes of the modalities; chain ``i`` depends on ``seed`` and ``offset + i``."""
        return {
            m: 2
            * drawn.uniform(
                (n, *shape),
                seed=seed,
                stream=noise.stream(i, noise.INITIAL),
                chain_offset=offset,
                device=self.system.device,
            )
            - 1
            for i, (m, shape) in enumerate(self.system.generator.shapes.items())
        }

    def keep(self, start: Start, end: Mapping[str, Tensor]) -> None:
        """Stores where persistent chains ended."""
        if start.handle is not None:
            self.buffer.write(start.handle, {name: value.detach() for name, value in end.items()})

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint: the persistent chains, if there are any."""
        return {} if self._buffer is None else {"buffer": self._buffer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self._buffer = None
        if "buffer" in state:
            self.buffer.load_state_dict(state["buffer"])


class LatentStarts:
    """The starts of the latent chain; holds where the chain of each training tuple ended."""

    def __init__(self, system: System, config: StartConfig, tuples: int) -> None:
        self.system: System = system
        self.config: StartConfig = config
        self.ends: Tensor | None = None
        if config.latent == "persistent":
            self.ends = torch.full((tuples, system.latent), float("nan"), device=system.device)

    @torch.no_grad()
    def __call__(
        self,
        x: Batch,
        rng: torch.Generator,
        *,
        rows: Tensor | None = None,
        present: Mapping[str, Tensor] | None = None,
        name: str | None = None,
    ) -> Tensor:
        """One z (n, latent) per row of ``x``; ``rows`` are the tuples' numbers in the training set."""
        s, name = self.system, name or self.config.latent
        if name == "prior":
            n = next(iter(x.values())).shape[0]
            return standard_normal(n, s.latent, seed=noise.draw_seed(rng), device=s.device)
        joint: Any = None if name in ("inference", "persistent") else name
        z = s.inference.sample(x, rng, joint=joint, present=present)
        if name == "persistent" and self.ends is not None and rows is not None:
            last = self.ends[rows]
            z = torch.where(last.isnan().any(1, keepdim=True), z, last)
        return z

    def keep(self, rows: Tensor | None, z: Tensor) -> None:
        """Stores where the chains of the tuples ``rows`` ended."""
        if self.ends is not None and rows is not None:
            self.ends[rows] = z.detach()

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {} if self.ends is None else {"ends": self.ends.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`.

        Raises:
            ValueError: where the state is of another number of tuples, or of another latent.
        """
        if self.ends is not None and "ends" in state:
            if state["ends"].shape != self.ends.shape:
                raise ValueError(
                    f"the persistent latent chains are {tuple(state['ends'].shape)} there, "
                    f"{tuple(self.ends.shape)} here"
                )
            self.ends.copy_(state["ends"])


def _rows(x: Batch, n: int) -> dict[str, Tensor]:
    """``n`` rows of ``x``, from the first on, over again where there are fewer."""
    held = next(iter(x.values())).shape[0]
    if held >= n:
        return {name: value[:n] for name, value in x.items()}
    at = torch.arange(n, device=next(iter(x.values())).device) % held
    return {name: value[at] for name, value in x.items()}
