"""The project's own judges: classifiers of one modality each, trained on that modality alone, of two kinds.

    convolutional   a small network on the pixels, whose last layer is also what Frechet and kernel distances are of
    gradients       histograms of oriented gradients, random Fourier features of them, and a ridge regression: no pixel
                    and no learned feature in common with the first

A model may learn to please one kind of judge, by chance or by a weakness that it shares with it; a coherence that both
kinds see is one. Each kind learns from another half of the training items (``half``).

Coherence asks whether the modalities of a sample show the same class, and only a classifier can say which class a
generated image shows. Each one here sees the unpaired instances of the train split's pool, never a tuple, so that it
cannot have learned agreement itself. Two rules come from what makes published numbers incomparable: the networks are
always in eval mode when they judge (several reference evaluations leave dropout on), and the accuracy on real test
instances, the ceiling of every coherence, is part of the result (:meth:`Classifiers.tested`).

A text modality whose words are the class names needs no network: the largest entry of a code *is* its class. It gets
the same interface, and its accuracy of 1 holds by construction.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmebm.data.base import Modality, MultimodalDataset, check_count
from mmebm.files import read_archive, write_archive
from mmebm.noise import MASK32, philox4x32

__all__ = ["Classifiers", "Judge", "fit_classifiers"]

Judge = Literal["convolutional", "gradients"]

FORMAT: Final = 1
BATCH: Final = 100
CHUNK: Final = 1_000  # rows judged at a time: bounds the memory of the first convolution's activations
FEATURES: Final = 64
WIDTHS: Final = (16, 32, 64)
LEARNING_RATE: Final = 4e-3
ORIENTATIONS: Final = 9
RANDOM_FEATURES: Final = 2000
VIEWS: Final = 4  # of an image, moved a little, that the second kind learns from beside itself
# Chosen on PolyMNIST-14's m0 and m1, among training items of the half that this kind does not learn from.
RIDGE: Final = 0.1
BANDWIDTH: Final = 2.0


class Network(nn.Module):
    """Features and a linear head: ``(n, *shape)`` in model space to ``(n, size)`` and ``(n, classes)``."""

    def __init__(self, features: nn.Module, classes: int, size: int = FEATURES) -> None:
        super().__init__()
        self.features = features
        self.head: nn.Linear = nn.Linear(size, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def image_network(shape: tuple[int, ...], classes: int) -> Network:
    """3x3 convolutions, each followed by 2x2 pooling, until the shorter side is at most 4 pixels."""
    channels, height, width = shape
    layers: list[nn.Module] = []
    while not layers or min(height, width) > 4:
        out = WIDTHS[min(len(layers) // 4, len(WIDTHS) - 1)]
        layers += [
            nn.Conv2d(channels, out, 3, padding=1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(),
            nn.MaxPool2d(2, ceil_mode=True),
        ]
        channels, height, width = out, -(-height // 2), -(-width // 2)
    layers += [nn.Flatten(), nn.Linear(channels * height * width, FEATURES), nn.BatchNorm1d(FEATURES), nn.ReLU()]
    return Network(nn.Sequential(*layers), classes)


def vector_network(size: int, classes: int) -> Network:
    """Two hidden layers. The first normalisation only standardises: vectors come in whatever units the data has."""
    layers = [
        nn.BatchNorm1d(size, affine=False),
        nn.Linear(size, 128, bias=False),
        nn.BatchNorm1d(128),
        nn.ReLU(),
        nn.Linear(128, FEATURES, bias=False),
        nn.BatchNorm1d(FEATURES),
        nn.ReLU(),
    ]
    return Network(nn.Sequential(*layers), classes)


class Gradients(nn.Module):
    """Histograms of the directions of gradients: images ``(n, C, H, W)`` to ``(n, ORIENTATIONS * g * g)``.

    At each pixel the colour whose gradient is largest; its direction modulo pi (an inverted image has the same) is
    shared between the two nearest of nine, weighted by its size; sums over a grid of ``g x g`` overlapping cells, each
    normalised by itself and its neighbours (Dalal and Triggs, "Histograms of oriented gradients", CVPR 2005, with other
    cells).
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.grid: int = min(7, max(min(shape[1:]) // 2, 1))
        self.size: int = ORIENTATIONS * self.grid**2

    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
        dy, dx = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1], padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]
        strongest = (dx.square() + dy.square()).argmax(1, keepdim=True)
        dy, dx = dy.gather(1, strongest), dx.gather(1, strongest)
        place = torch.atan2(dy, dx).remainder(math.pi) * (ORIENTATIONS / math.pi)
        weight = (dx.square() + dy.square()).sqrt()
        low, share = place.floor(), place - place.floor()
        maps = x.new_zeros(len(x), ORIENTATIONS, *x.shape[2:])
        maps.scatter_add_(1, low.long() % ORIENTATIONS, weight * (1 - share))
        maps.scatter_add_(1, (low.long() + 1) % ORIENTATIONS, weight * share)
        cells = F.adaptive_avg_pool2d(F.avg_pool2d(maps, 3, 1, 1), self.grid)
        around = F.avg_pool2d(cells.square().sum(1, keepdim=True), 3, 1, 1, count_include_pad=False)
        return (cells / (around + 1e-4).sqrt()).flatten(1)


class Fourier(nn.Module):
    """Standardised values ``(n, d)`` to ``(n, RANDOM_FEATURES)`` cosines, whose products are a Gaussian kernel of
    bandwidth ``BANDWIDTH sqrt(d)`` (Rahimi and Recht, NIPS 2007)."""

    mean: Tensor
    spread: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        for name, value in (("mean", torch.zeros(size)), ("spread", torch.ones(size))):
            self.register_buffer(name, value)
        self.register_buffer("directions", torch.randn(size, RANDOM_FEATURES) / (BANDWIDTH * math.sqrt(size)))
        self.register_buffer("phases", torch.rand(RANDOM_FEATURES) * (2 * math.pi))

    def forward(self, x: Tensor) -> Tensor:
        angles = ((x - self.mean) / self.spread) @ self.get_buffer("directions") + self.get_buffer("phases")
        return angles.cos() * math.sqrt(2 / RANDOM_FEATURES)


def gradient_network(shape: tuple[int, ...], classes: int) -> Network:
    """Images by :class:`Gradients`, vectors as they are, and then :class:`Fourier`; only the head learns by labels."""
    first: nn.Module = Gradients(shape) if len(shape) == 3 else nn.Identity()
    size = first.size if isinstance(first, Gradients) else shape[0]
    return Network(nn.Sequential(first, Fourier(size)), classes, RANDOM_FEATURES)


def build(modality: Modality, classes: tuple[str, ...], seed: int = 0, kind: Judge = "convolutional") -> Network | None:
    """The untrained network of one modality on the CPU in eval mode; None where decoding the code is exact."""
    if modality.kind == "text" and modality.words == classes:
        return None
    # Layers draw their initial weights from the global CPU generator: lend it to them, then put it back as it was.
    # Not torch.manual_seed, which would seed every GPU's generator as well.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if kind == "gradients":
            network = gradient_network(modality.shape, len(classes))
        elif modality.kind == "image":
            network = image_network(modality.shape, len(classes))
        else:
            network = vector_network(modality.shape[0], len(classes))
    return network.eval()


def jitter(x: Tensor, generator: torch.Generator) -> Tensor:
    """Images ``(n, C, H, W)`` shifted, turned and scaled a little: up to 7 % of the side, .2 rad and 10 %.

    Small enough to keep every digit what it is (a 6 never becomes a 9); generated digits are off-centre too.
    """
    # Drawn on the CPU, so that the augmentation is the same on every device.
    a, size, dx, dy = (torch.rand(4, len(x), generator=generator) * 2 - 1).mul_(
        torch.tensor([0.2, 0.1, 0.14, 0.14])[:, None]  # affine_grid measures in half sides: .14 is 7 % of the side
    )
    cos, sin = (1 + size) * a.cos(), (1 + size) * a.sin()
    affine = torch.stack([torch.stack([cos, -sin, dx], 1), torch.stack([sin, cos, dy], 1)], 1).to(x.device)
    grid = F.affine_grid(affine, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def prepare(modality: Modality, x: Tensor) -> Tensor:
    """What a network sees: float32, images and codes clamped to [-1, 1], where Langevin samples stray from."""
    x = x.to(torch.float32)
    return x if modality.kind == "vector" else x.clamp(-1, 1)


class Classifiers:
    """One judge per modality. :func:`fit_classifiers` trains them, :meth:`load` reads them back.

    Attributes:
        classes: class names; a predicted ``c`` stands for ``classes[c]``.
        modalities: what is judged, in the order of the columns of :meth:`predict`.
        kind: "convolutional" or "gradients".
        accuracy: modality name -> share judged right of the instances that they were tested on, in eval mode: the
            ceiling of any coherence. Exactly 1 by construction for a text modality whose words are the class names.
        device: where the networks are; batches are moved there.
    """

    def __init__(
        self,
        classes: tuple[str, ...],
        modalities: tuple[Modality, ...],
        networks: Mapping[str, Network | None],
        accuracy: Mapping[str, float],
        device: torch.device | str = "cpu",
        kind: Judge = "convolutional",
    ) -> None:
        self.classes = classes
        self.kind: Judge = kind
        self.modalities = modalities
        self.accuracy: dict[str, float] = dict(accuracy)
        self.device: torch.device = torch.device(device)
        self._networks = {
            name: None if net is None else net.to(self.device).eval().requires_grad_(False)
            for name, net in networks.items()
        }

    @property
    def learned(self) -> tuple[str, ...]:
        """The modalities judged by a trained network, whose features mean something; the others are decoded exactly."""
        return tuple(name for name, network in self._networks.items() if network is not None)

    def predict(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The class each modality shows.

        Args:
            batch: modality name -> ``(n, *shape)`` in model space, all modalities or some of them; any floating dtype
                and device. Values may lie outside [-1, 1].

        Returns:
            int64 ``(n, M)`` on the classifiers' device, ``M`` the modalities given, columns in the order of
            ``self.modalities`` (not of ``batch``).

        Raises:
            ValueError: for an unknown modality, a wrong shape, different ``n``, or values that are inf or NaN.
        """
        return torch.stack(
            [
                # Before clamping: two entries above 1 would become a tie.
                x.to(self.device).argmax(1) if net is None else self._map(net, modality, x).argmax(1)
                for modality, net, x in self._given(batch)
            ],
            dim=1,
        )

    def features(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What each judge sees in its modality: the layer before the head, the basis of the Frechet distances.

        Args:
            batch: as in :meth:`predict`.

        Returns:
            modality name -> float32 ``(n, 64)`` on the classifiers' device, ``(n, 2000)`` of gradients; for a text
            modality that is decoded the code itself, clamped to [-1, 1], ``(n, words)``.

        Raises:
            ValueError: as in :meth:`predict`.
        """
        return {
            modality.name: prepare(modality, x).to(self.device) if net is None else self._map(net.features, modality, x)
            for modality, net, x in self._given(batch)
        }

    def tested(self, data: MultimodalDataset) -> dict[str, float]:
        """Share of the labelled instances in ``data``'s pools that are judged right, by modality.

        Raises:
            ValueError: for other modalities, or one without a labelled instance.
        """
        return {modality.name: self._share(data, modality.name) for modality in self.modalities}

    def _share(self, data: MultimodalDataset, name: str) -> float:
        judged = _labelled(data, name)
        if not len(judged):
            raise ValueError(f"{data.split} needs at least one labelled instance of {name!r}, got none")
        right = []
        for chunk in judged.split(CHUNK):
            pred = self.predict({name: data.instances(name, chunk)})[:, 0].cpu()
            right.append(pred == data.pool_labels[name].cpu()[chunk])
        return torch.cat(right).double().mean().item()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes everything to ``path`` (atomically), readable by :meth:`load` and torch.load(weights_only=True)."""
        write_archive(Path(path), self.state_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Classifiers:
        """Reads what :meth:`save` wrote. Leaves torch's global random state alone.

        Raises:
            ValueError: if the file holds something else, or another version of the format.
        """
        return cls.from_state_dict(read_archive(Path(path))[0], device)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only; :meth:`from_state_dict` is its inverse."""
        return {
            "format": FORMAT,
            "classes": list(self.classes),
            "modalities": [
                {"name": m.name, "shape": list(m.shape), "kind": m.kind, "words": list(m.words)}
                for m in self.modalities
            ],
            "kind": self.kind,
            "accuracy": dict(self.accuracy),
            "networks": {
                name: None if net is None else {k: v.cpu() for k, v in net.state_dict().items()}
                for name, net in self._networks.items()
            },
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], device: torch.device | str = "cpu") -> Classifiers:
        """The classifiers a :meth:`state_dict` describes, on ``device``.

        Raises:
            ValueError: if ``state`` is something else, or another version of the format.
        """
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        if found != FORMAT:
            raise ValueError(f"state must be classifiers of format {FORMAT}, got {found!r}")
        classes = tuple(state["classes"])
        modalities = tuple(
            Modality(m["name"], tuple(m["shape"]), m["kind"], tuple(m["words"])) for m in state["modalities"]
        )
        kind = state.get("kind", "convolutional")
        networks = {modality.name: build(modality, classes, kind=kind) for modality in modalities}
        for name, network in networks.items():
            if network is not None:
                network.load_state_dict(state["networks"][name])
        return cls(classes, modalities, networks, state["accuracy"], device, kind)

    def __repr__(self) -> str:
        return f"<Classifiers {', '.join(f'{name} {share:.3f}' for name, share in self.accuracy.items())}>"

    def _given(self, batch: Mapping[str, Tensor]) -> list[tuple[Modality, Network | None, Tensor]]:
        """The checked modalities of ``batch`` in this object's order, each with its network."""
        known = [modality.name for modality in self.modalities]
        if not batch or set(batch) - set(known):
            raise ValueError(f"batch must have some of the modalities {known}, got {sorted(batch)}")
        counts = {name: len(x) for name, x in batch.items() if x.dim()}
        if len(set(counts.values())) > 1:
            raise ValueError(f"batch must have as many rows in every modality, got {counts}")
        given = []
        for modality in self.modalities:
            if modality.name not in batch:
                continue
            x = batch[modality.name].detach()
            if x.dim() != len(modality.shape) + 1 or x.shape[1:] != modality.shape:
                raise ValueError(
                    f"batch[{modality.name!r}] must have shape (n, {', '.join(map(str, modality.shape))}),"
                    f" got {tuple(x.shape)}"
                )
            # A network would judge NaN as some class, and a diverged chain would pass for a sample.
            bad = int((~x.isfinite()).flatten(1).any(1).sum())
            if bad:
                raise ValueError(f"batch[{modality.name!r}] must be finite, got {bad} of {len(x)} rows with inf or NaN")
            given.append((modality, self._networks[modality.name], x))
        return given

    def _map(self, function: nn.Module, modality: Modality, x: Tensor) -> Tensor:
        """``function`` in eval mode and without autograd over chunks of rows, float32 also under autocast."""
        function.eval()
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            parts = [function(prepare(modality, chunk.to(self.device))) for chunk in x.split(CHUNK)]
        return torch.cat(parts)


def fit_classifiers(
    train: MultimodalDataset,
    test: MultimodalDataset,
    *,
    kind: Judge = "convolutional",
    half: Literal[0, 1] | None = None,
    seed: int = 0,
    steps: int | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[str], None] | None = None,
) -> Classifiers:
    """Trains one classifier per modality on the instances of ``train``'s pools, and tests it on those of ``test``.

    The networks: AdamW, one cycle, batches of 100, label smoothing .05; images are shifted, turned and scaled a little.
    The other kind is solved for, on each instance and four views of it that are moved in the same way. Deterministic
    for a seed, a device and a number of threads; torch's global random state, on every device, stays as it was.
    Instances without a label (-1) are left out.

    Args:
        train: the pools to learn from.
        test: the pools behind ``accuracy``; the same modalities and classes.
        kind: see the top of this file.
        half: learn from this half of the items alone, whichever modality shows them, and from instances of no item;
            None from all.
        seed: rules the weights, the order, the augmentation and the halves.
        steps: batches per modality of a network; by default ten passes, but at least 300 and at most 2,000.
        device: where to train; the result stays there.
        progress: called with one line of text after each modality.

    Returns:
        The classifiers, in eval mode.

    Raises:
        ValueError: if the two sets differ in modalities or classes, if they have no classes, or if a train pool has
            fewer than two labelled instances, or a test pool none.
        TypeError: if ``steps`` or ``seed`` is no integer.
    """
    if steps is not None:
        check_count("steps", steps)
    check_count("seed", seed, least=0)
    if train.modalities != test.modalities or train.classes != test.classes:
        raise ValueError(f"train and test must have the same modalities and classes, got {train!r} and {test!r}")
    if not train.classes:
        raise ValueError(
            f"classifiers need classes, and {train.name!r} has none: evaluate it without them, by "
            "distances on features="
        )
    networks: dict[str, Network | None] = {}
    # One seed for each modality, drawn in order: a modality appended later leaves the earlier ones as they are.
    seeds = torch.Generator().manual_seed(seed)
    result = Classifiers(train.classes, train.modalities, {}, {}, device, kind)
    for modality in train.modalities:
        own = int(torch.randint(2**62, (), generator=seeds))
        start = time.perf_counter()
        network = build(modality, train.classes, own, kind)
        rows = _labelled(train, modality.name)
        if half is not None and network is not None:
            of = _half(train, modality.name, seed)[rows]
            rows = rows[(of == half) | (of < 0)]
        batches = steps or min(max(10 * len(rows) // BATCH, 300), 2000)
        if network is not None:
            generator = torch.Generator().manual_seed(own)
            if kind == "gradients":
                solve(network.to(device), modality, train, rows, generator=generator)
            else:
                fit(network.to(device), modality, train, rows, steps=batches, generator=generator)
        networks[modality.name] = network
        result = Classifiers(train.classes, train.modalities, networks, result.accuracy, device, kind)
        share = result._share(test, modality.name)
        result.accuracy[modality.name] = share
        if progress is not None:
            progress(
                f"classifier {modality.name}: test accuracy {share:.3f}, "
                + ("by construction" if network is None else f"{batches} steps, {time.perf_counter() - start:.1f} s")
            )
    return result


def _labelled(data: MultimodalDataset, name: str) -> Tensor:
    """The instances of a pool that have a class: int64 on the CPU."""
    return (data.pool_labels[name].cpu() >= 0).nonzero().flatten()


def _half(data: MultimodalDataset, name: str, seed: int) -> Tensor:
    """0 or 1 for each instance of a pool, the same for all that show one item: a bit of the item's number, mixed. -1
    for an instance of no item, such as a word that all tuples of a class share: both learn from it."""
    numbers = torch.arange(len(data.pools[name])) if data.items is None else data.items[name].cpu()
    words = philox4x32([numbers & MASK32, numbers >> 32, torch.zeros_like(numbers), numbers * 0], (seed & MASK32, 1))
    return torch.where(numbers < 0, -1, words[0] & 1)


@torch.no_grad()
def solve(
    network: Network, modality: Modality, data: MultimodalDataset, instances: Tensor, *, generator: torch.Generator
) -> None:
    """The head of ``network`` by ridge regression on +1 at the class and -1 elsewhere; ends in eval mode."""
    if len(instances) < 2:
        raise ValueError(f"train needs at least two instances of {modality.name!r}, got {len(instances)}")
    assert isinstance(network.features, nn.Sequential)
    first, second = network.features
    assert isinstance(second, Fourier)
    device = network.head.weight.device
    labels = data.pool_labels[modality.name]
    values, classes = [], []
    for rows in instances.split(CHUNK):
        x = prepare(modality, data.instances(modality.name, rows).to(device))
        views = [x, *(jitter(x, generator) for _ in range(VIEWS))] if modality.kind == "image" else [x]
        values += [first(view) for view in views]
        classes += [labels[rows.to(labels.device)].to(device)] * len(views)
    flat, of = torch.cat(values), torch.cat(classes)
    second.mean.copy_(flat.mean(0))
    deviation = flat.std(0)
    second.spread.copy_(torch.where(deviation > 1e-6, deviation, 1.0))
    size = RANDOM_FEATURES + 1  # the last is the bias
    gram = torch.zeros(size, size, dtype=torch.float64, device=device)
    sums = torch.zeros(size, network.head.out_features, dtype=torch.float64, device=device)
    for part, classes_of in zip(flat.split(CHUNK), of.split(CHUNK), strict=True):
        phi = F.pad(second(part), (0, 1), value=1.0).double()
        gram += phi.T @ phi
        sums += phi.T @ (2.0 * F.one_hot(classes_of, network.head.out_features) - 1).double()
    gram.diagonal().add_(RIDGE * len(flat) / RANDOM_FEATURES)
    weight = torch.linalg.solve(gram, sums).float()
    network.head.weight.copy_(weight[:-1].T)
    network.head.bias.copy_(weight[-1])
    network.eval()


def fit(
    network: Network,
    modality: Modality,
    data: MultimodalDataset,
    instances: Tensor,
    *,
    steps: int,
    generator: torch.Generator,
) -> None:
    """Trains ``network`` in place on ``instances``, rows of the modality's pool; ends in eval mode."""
    if len(instances) < 2:
        raise ValueError(f"train needs at least two instances of {modality.name!r}, got {len(instances)}")
    labels = data.pool_labels[modality.name]
    device = network.head.weight.device
    network.train()
    optimiser = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=max(steps, 2))
    size = min(BATCH, len(instances))
    order = torch.empty(0, dtype=torch.int64)
    with torch.enable_grad():
        for _ in range(steps):
            if len(order) < size:  # the rest of one pass begins the next: every batch is full
                order = torch.cat([order, torch.randperm(len(instances), generator=generator)])
            rows, order = instances[order[:size]], order[size:]
            images = prepare(modality, data.instances(modality.name, rows).to(device))
            if modality.kind == "image":
                images = jitter(images, generator)
            loss = F.cross_entropy(network(images), labels[rows.to(labels.device)].to(device), label_smoothing=0.05)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    network.eval()
