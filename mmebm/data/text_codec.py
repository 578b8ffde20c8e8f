"""Captions as continuous codes: a small text autoencoder whose codes Langevin can move.

Words have no gradient; the code of a caption has. A bidirectional GRU reads the caption into a code in (-1, 1)^D, a
second GRU writes words from it, the likeliest first. In training the code carries Gaussian noise, so that the writer
learns a ball around each code and not a point: a Langevin step, or a generator that is a little off, still reads well.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

from mmebm.data.base import check_count
from mmebm.data.words import END, UNKNOWN, Vocabulary, join, tokens
from mmebm.files import read_archive, write_archive

__all__ = ["TextAutoencoder", "TextSettings", "fit_text_autoencoder", "reading_accuracy"]

FORMAT: Final = "mmebm-text-1"
CHUNK: Final = 1024  # captions that are encoded or decoded at a time
JUDGES: Final = 2000  # captions that a round is judged on, at most
LEAST_JUDGES: Final = 20  # fewer say nothing: all captions are trained on and judge, too


@dataclass(frozen=True)
class TextSettings:
    """What a text autoencoder is made and trained with.

    Args:
        dim: size ``D`` of the code.
        length: places for words, the end of the caption included; longer captions are cut.
        least: a word that occurs less often in the captions becomes ``<unk>``.
        embedding: size of a word's embedding.
        hidden: units of each GRU.
        noise: standard deviation of the noise on the code in training, where the code lies in (-1, 1).
        word_dropout: share of the words that the writer does not see in training, so that it must read the code.
        swap: share of the words that are replaced by random ones in training, in the caption and in what is to be
            written alike: the codec must give back any words in any order, not recognise the captions it knows.
        batch: captions in an update.
        learning_rate: of Adam.
        round: updates between two looks at the held-out captions, or one pass over the captions, whichever is more.
        rounds: at most so many.
        patience: training stops after so many rounds without a better result on the held-out captions.
        held_out: share of the captions that only judge when to stop; none if that were fewer than 20.
        cool_down: rounds after that, as a share of the rounds so far, on all captions with a falling learning rate.

    Raises:
        TypeError, ValueError: for a value outside its range.
    """

    dim: int = 64
    length: int = 32
    least: int = 1
    embedding: int = 64
    hidden: int = 160
    noise: float = 0.2
    word_dropout: float = 0.3
    swap: float = 0.3
    batch: int = 64
    learning_rate: float = 4e-3
    round: int = 100
    rounds: int = 30
    patience: int = 3
    held_out: float = 0.1
    cool_down: float = 0.5

    def __post_init__(self) -> None:
        for name in ("dim", "least", "embedding", "hidden", "batch", "round", "rounds", "patience"):
            check_count(name, getattr(self, name))
        check_count("length", self.length, least=2)
        ranges = {
            "noise": (0, 1),
            "word_dropout": (0, 1),
            "swap": (0, 1),
            "held_out": (0, 0.5),
            "cool_down": (0, 10),
            "learning_rate": (0, 1),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise TypeError(f"{name} must be a number in [{low:g}, {high:g}], got {value!r}")
            if not low <= value <= high:
                raise ValueError(f"{name} must lie in [{low:g}, {high:g}], got {value!r}")


class TextAutoencoder(nn.Module):
    """The network, its vocabulary, and both ways between strings and codes (a ``TextCodec``).

    Args:
        vocabulary: the words it knows; all others become ``<unk>``.
        settings: the sizes.
        info: how it was trained and how well it reads: plain values.
    """

    def __init__(self, vocabulary: Vocabulary, settings: TextSettings, info: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.vocabulary: Vocabulary = vocabulary
        self.settings: TextSettings = settings
        self.info: dict[str, Any] = dict(info or {})
        sizes = settings
        self.words: nn.Embedding = nn.Embedding(len(vocabulary), sizes.embedding)
        nn.init.normal_(self.words.weight, std=sizes.embedding**-0.5)  # its rows are the output layer's, too
        self.reader: nn.GRU = nn.GRU(sizes.embedding, sizes.hidden, batch_first=True, bidirectional=True)
        self.to_code: nn.Linear = nn.Linear(2 * sizes.hidden, sizes.dim)
        self.to_state: nn.Linear = nn.Linear(sizes.dim, sizes.hidden)
        self.writer: nn.GRU = nn.GRU(sizes.embedding + sizes.dim, sizes.hidden, batch_first=True)
        self.to_word: nn.Linear = nn.Linear(sizes.hidden, sizes.embedding)
        self.bias: nn.Parameter = nn.Parameter(torch.zeros(len(vocabulary)))

    @property
    def dim(self) -> int:
        """Size ``D`` of the code."""
        return self.settings.dim

    def read(self, numbers: Tensor) -> Tensor:
        """Numbers of words ``(n, length)`` to codes ``(n, D)`` in (-1, 1)."""
        # up to and with the end, so that an empty caption has one word
        lengths = ((numbers != 0).sum(1) + 1).clamp_(max=numbers.shape[1]).cpu()
        packed = pack_padded_sequence(self.words(numbers), lengths, batch_first=True, enforce_sorted=False)
        _, state = self.reader(packed)
        return torch.tanh(self.to_code(torch.cat([state[0], state[1]], dim=1)))

    def write(self, codes: Tensor, numbers: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Scores of the next word, ``(n, length, words)``, after the words before it.

        Args:
            codes: ``(n, D)``.
            numbers: ``(n, length)``, what is to be written; place ``t`` sees places before ``t`` only.
            hidden: bool ``(n, length)``, True where a word is not shown to later places; None shows all.
        """
        before = self.words(numbers[:, :-1])
        if hidden is not None:
            before = before.masked_fill(hidden[:, :-1, None], 0)
        before = F.pad(before, (0, 0, 1, 0))
        inputs = torch.cat([before, codes[:, None].expand(-1, before.shape[1], -1)], dim=2)
        states, _ = self.writer(inputs, self._start(codes))
        return self._scores(states)

    def _start(self, codes: Tensor) -> Tensor:
        return torch.tanh(self.to_state(codes))[None]

    def _scores(self, states: Tensor) -> Tensor:
        return F.linear(self.to_word(states), self.words.weight, self.bias)

    @torch.no_grad()
    def greedy(self, codes: Tensor) -> Tensor:
        """The likeliest word at each place, given those before: numbers of words ``(n, length)``, 0 after the end."""
        n, length = len(codes), self.settings.length
        numbers = torch.zeros(n, length, dtype=torch.int64, device=codes.device)
        state, word = self._start(codes), codes.new_zeros(n, 1, self.settings.embedding)
        going = torch.ones(n, dtype=torch.bool, device=codes.device)
        # the last place is the end's: what is cut there would not be read back either
        for place in range(length - 1):
            states, state = self.writer(torch.cat([word, codes[:, None]], dim=2), state)
            chosen = self._scores(states)[:, 0].argmax(1).masked_fill(~going, 0)
            numbers[:, place] = chosen
            going = going & (chosen != 0)
            if not going.any():
                break
            word = self.words(chosen)[:, None]
        return numbers

    @torch.no_grad()
    def encode(self, texts: Sequence[str], /) -> Tensor:
        """Captions to codes, float32 ``(n, D)`` in (-1, 1), on the CPU.

        Unknown words become ``<unk>``, and captions of more than ``length - 1`` words are cut.

        Raises:
            TypeError: if ``texts`` is one string, or holds something else than strings.
        """
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"texts must be a sequence of strings, got {texts!r:.80}")
        device = self.bias.device
        codes = [
            self.read(self.vocabulary.numbers(texts[at : at + CHUNK], self.settings.length).to(device)).cpu()
            for at in range(0, len(texts), CHUNK)
        ]
        return torch.cat([torch.empty(0, self.dim), *codes])

    @torch.no_grad()
    def decode(self, codes: Tensor, /) -> list[str]:
        """Codes ``(n, D)``, any floating dtype and device, to captions. Values outside [-1, 1] count as -1 or 1.

        Raises:
            ValueError: for another shape.
        """
        if codes.dim() != 2 or codes.shape[1] != self.dim:
            raise ValueError(f"codes must have shape (n, {self.dim}), got {tuple(codes.shape)}")
        codes = codes.detach().to(self.bias).clamp(-1, 1)
        return [caption for part in codes.split(CHUNK) for caption in self.vocabulary.captions(self.greedy(part))]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the network, its vocabulary and settings to ``path``; the file appears whole or not at all."""
        content = {
            "format": FORMAT,
            "words": list(self.vocabulary.words),
            "settings": asdict(self.settings),
            "info": self.info,
            "weights": {k: v.cpu() for k, v in self.state_dict().items()},
        }
        write_archive(Path(path), content)

    def same_as(self, path: str | os.PathLike[str]) -> bool:
        """Whether the file at ``path`` has these words and weights; not where it cannot be read."""
        try:
            other = TextAutoencoder.load(path)
        except (OSError, ValueError):
            return False
        own, stored = self.state_dict(), other.state_dict()
        if (other.vocabulary.words, other.settings) != (self.vocabulary.words, self.settings):
            return False
        return all(torch.equal(own[name].cpu(), stored[name]) for name in own)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TextAutoencoder:
        """Reads what :meth:`save` wrote; nothing in it is executed. Frozen, on the CPU.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is something else.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"no text autoencoder at {path}: TextAutoencoder.save writes one, and a caption "
                "set that is loaded without codec= fits its own"
            )
        try:
            content, _ = read_archive(path)
            if content["format"] != FORMAT:
                raise ValueError(f"its format is {content['format']!r}, not {FORMAT!r}")
            model = cls(Vocabulary(tuple(content["words"])), TextSettings(**content["settings"]), content["info"])
            model.load_state_dict(content["weights"])
            if not all(bool(value.isfinite().all()) for value in model.state_dict().values()):
                raise ValueError("its weights are not finite")
        except (RuntimeError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a text autoencoder of this library: {error}") from error
        return model.eval().requires_grad_(False)


@torch.no_grad()
def reading_accuracy(
    model: TextAutoencoder, captions: Sequence[str], *, noise: float = 0.0, generator: torch.Generator | None = None
) -> tuple[float, float]:
    """How well a text autoencoder gives captions back.

    Args:
        model: the autoencoder.
        captions: at least one.
        noise: standard deviation of Gaussian noise on the codes before they are decoded.
        generator: of that noise, on the CPU.

    Returns:
        The share of words, each caption's end included, that come back at their place, and the share of captions that
        come back whole. A word that the vocabulary lacks counts as lost, and so does what is cut.
    """
    codes = model.encode(captions)
    if noise:
        codes = codes + noise * torch.randn(codes.shape, generator=generator)
    right = total = whole = 0
    for caption, decoded in zip(captions, model.decode(codes), strict=True):
        # END is no word of any caption; it closes both, so that a caption too long loses a word, too
        truth, said = [*tokens(caption), END], [*tokens(decoded), END]
        same = sum(a == b and a != UNKNOWN for a, b in zip(truth, said, strict=False))
        right, total, whole = right + same, total + len(truth), whole + (same == len(truth))
    return right / total, whole / len(captions)


def fit_text_autoencoder(
    captions: Sequence[str],
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    log: Callable[[str], object] | None = None,
    **settings: Any,
) -> TextAutoencoder:
    """Trains a text autoencoder on captions, each different one once, and freezes it.

    A share of them is held out to say when to stop: training goes back to the state that gave most of their words back.
    Then they join the others for the cool-down. The same arguments give the same weights on one machine.

    Args:
        captions: one string for each, at least one with a word.
        seed: of the weights, the order, the noise and the choice of the held-out ones.
        device: where to train; the result is on the CPU.
        log: called with a line after each round.
        settings: fields of :class:`TextSettings`.

    Returns:
        The autoencoder. Its ``info`` says how many captions, words and rounds there were, and the accuracies of
        :func:`reading_accuracy`: on the held-out captions before they joined (None without), and on up to 2,000 of all
        at the end.

    Raises:
        TypeError, ValueError: for captions or settings outside what is said above.
    """
    if isinstance(captions, str) or not all(isinstance(caption, str) for caption in captions):
        raise TypeError(f"captions must be a sequence of strings, got {captions!r:.80}")
    seed = check_count("seed", seed, least=0)
    chosen = TextSettings(**settings)
    different = list(dict.fromkeys(words for caption in captions if (words := join(tokens(caption)))))
    if not different:
        raise ValueError(f"captions must hold at least one word, got {len(captions)} captions without")
    vocabulary = Vocabulary.of(captions, least=chosen.least)
    draw = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TextAutoencoder(vocabulary, chosen).to(device)

    # One thread: more gain nothing on networks so small, and would let the number of cores into the sums
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model.info = _fit(model, different, draw, device, log) | {"seed": seed}
    finally:
        torch.set_num_threads(threads)
    return model


def _fit(
    model: TextAutoencoder,
    different: list[str],
    draw: torch.Generator,
    device: torch.device | str,
    log: Callable[[str], object] | None,
) -> dict[str, Any]:
    """Trains ``model`` in place and freezes it on the CPU; what its ``info`` will say."""
    vocabulary, chosen = model.vocabulary, model.settings
    order = torch.randperm(len(different), generator=draw).tolist()
    share = min(round(chosen.held_out * len(different)), JUDGES)
    judges = [different[k] for k in order[: share if share >= LEAST_JUDGES else 0]]
    pupils = [different[k] for k in order[len(judges) :]]
    train = _Training(model, draw)
    best, best_state, since, rounds = -1.0, {}, 0, 0
    numbers = vocabulary.numbers(pupils, chosen.length).to(device)
    updates = max(chosen.round, math.ceil(len(pupils) / chosen.batch))
    result = (0.0, 0.0)
    while rounds < chosen.rounds and since < chosen.patience:
        loss = train.updates(numbers, [chosen.learning_rate] * updates)
        rounds, since = rounds + 1, since + 1
        now = reading_accuracy(model, judges or pupils[:JUDGES])
        if log is not None:
            log(f"round {rounds}: loss {loss:.3f}, {now[0]:.3f} of the words back, {now[1]:.3f} of the captions")
        if now[0] > best:
            best, since, result = now[0], 0, now
            best_state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(best_state)

    rest = math.ceil(chosen.cool_down * (rounds - since)) * updates
    rates = [chosen.learning_rate * (1 - step / rest) for step in range(rest)]
    train.updates(vocabulary.numbers(different, chosen.length).to(device), rates)
    model.cpu().eval().requires_grad_(False)
    at_end = reading_accuracy(model, [different[k] for k in order[-JUDGES:]])
    return {
        "captions": len(different),
        "words": len(vocabulary),
        "rounds": rounds,
        "updates": train.count,
        "held_out": len(judges),
        "held_out_words": result[0] if judges else None,
        "held_out_captions": result[1] if judges else None,
        "words_back": at_end[0],
        "captions_back": at_end[1],
    }


class _Training:
    """The optimiser of one fit, through its two stages."""

    def __init__(self, model: TextAutoencoder, draw: torch.Generator) -> None:
        self.model, self.draw, self.count = model, draw, 0
        self.adam = torch.optim.Adam(model.parameters(), lr=model.settings.learning_rate)

    def updates(self, numbers: Tensor, rates: Sequence[float]) -> float:
        """One update for each learning rate, on captions in a random order: the mean loss of a word."""
        sizes, total = self.model.settings, 0.0
        n, device = len(numbers), numbers.device
        order = torch.empty(0, dtype=torch.int64)
        for rate in rates:
            if len(order) < min(sizes.batch, n):
                order = torch.cat([order, torch.randperm(n, generator=self.draw)])
            rows, order = order[: sizes.batch], order[sizes.batch :]
            batch = numbers[rows.to(device)]
            batch = batch[:, : int((batch != 0).sum(1).max()) + 1]  # the end of the longest is the last place
            if len(self.model.vocabulary) > 2:
                other = torch.randint(2, len(self.model.vocabulary), batch.shape, generator=self.draw).to(device)
                swapped = torch.rand(batch.shape, generator=self.draw).to(device) < sizes.swap
                batch = torch.where(swapped & (batch != 0), other, batch)
            codes = self.model.read(batch)
            codes = codes + sizes.noise * torch.randn(codes.shape, generator=self.draw).to(device)
            hidden = torch.rand(batch.shape, generator=self.draw).to(device) < sizes.word_dropout
            scores = self.model.write(codes, batch, hidden)
            # every word and one end
            counted = F.pad(batch[:, :-1] != 0, (1, 0), value=True)
            loss = F.cross_entropy(scores[counted], batch[counted])
            for group in self.adam.param_groups:
                group["lr"] = rate
            self.adam.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.adam.step()
            self.count, total = self.count + 1, total + float(loss.detach())
        return total / max(len(rates), 1)
