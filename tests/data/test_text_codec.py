"""The text autoencoder: captions come back, also beside their codes; files, seeds, words it does not know."""

from __future__ import annotations

import importlib
import itertools
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from mmebm.data.text_codec import TextAutoencoder, TextSettings, fit_text_autoencoder, reading_accuracy
from mmebm.data.words import UNKNOWN, Vocabulary

CAPTIONS = [
    f"{a} {b} {c} {d}."
    for a, b, c, d in itertools.product(
        ("a", "one"), ("small", "large", "grey"), ("bird", "cat", "fish"), ("sings", "sleeps", "eats")
    )
]
SMALL: dict[str, Any] = {"dim": 16, "embedding": 24, "hidden": 48, "length": 8, "batch": 32, "learning_rate": 5e-3}
QUICK = SMALL | {"round": 4, "rounds": 1}


@pytest.fixture(scope="module")
def fitted(session_seed: int) -> TextAutoencoder:
    return fit_text_autoencoder(CAPTIONS, seed=session_seed, **SMALL, round=80, rounds=6)


@pytest.fixture
def fresh() -> TextAutoencoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return TextAutoencoder(Vocabulary.of(CAPTIONS), TextSettings(**SMALL)).eval()


def test_captions_come_back_word_for_word(fitted: TextAutoencoder) -> None:
    codes = fitted.encode(CAPTIONS)
    assert codes.shape == (54, 16) and codes.dtype == torch.float32 and codes.abs().max() < 1
    whole = sum(a == b for a, b in zip(fitted.decode(codes), CAPTIONS)) / 54
    assert whole > 0.95  # thirteen seeds gave 1
    assert fitted.info["captions_back"] == pytest.approx(whole) and fitted.info["captions"] == 54


def test_codes_nearby_decode_alike(fitted: TextAutoencoder, seed: int) -> None:
    # At the noise of its training. Thirteen seeds gave at least .99 of the words.
    generator = torch.Generator().manual_seed(seed)
    assert reading_accuracy(fitted, CAPTIONS, noise=0.2, generator=generator)[0] > 0.95
    # what was moved outside the cube of codes counts as its surface
    outside = fitted.encode(CAPTIONS[:5]).sign()
    assert fitted.decode(outside * 7) == fitted.decode(outside)


def test_different_captions_have_different_codes(fitted: TextAutoencoder) -> None:
    distances = torch.cdist(fitted.encode(CAPTIONS), fitted.encode(CAPTIONS)).fill_diagonal_(torch.inf)
    assert distances.min() > 0.2  # noise of .2 in 16 directions has length .8, and would confuse closer ones


def test_the_same_seed_gives_the_same_weights_whatever_was_drawn_before(seed: int) -> None:
    first = fit_text_autoencoder(CAPTIONS, seed=seed, **QUICK)
    torch.rand(3)
    state = torch.get_rng_state()
    second = fit_text_autoencoder(CAPTIONS, seed=seed, **QUICK)
    assert torch.equal(torch.get_rng_state(), state)
    other = fit_text_autoencoder(CAPTIONS, seed=seed + 1, **QUICK)
    a, b, c = (model.state_dict() for model in (first, second, other))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["to_code.weight"], c["to_code.weight"])
    assert first.info == second.info
    assert not any(parameter.requires_grad for parameter in first.parameters()) and not first.training


def test_saved_and_loaded_it_is_the_same(fitted: TextAutoencoder, tmp_path: Path) -> None:
    file = tmp_path / "new" / "codec.pt"
    fitted.save(str(file))
    loaded = TextAutoencoder.load(str(file))
    assert loaded.vocabulary == fitted.vocabulary and loaded.settings == fitted.settings and loaded.info == fitted.info
    assert torch.equal(loaded.encode(CAPTIONS), fitted.encode(CAPTIONS))
    assert [entry.name for entry in file.parent.iterdir()] == ["codec.pt"]
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("broken", ["cut", "text", "other", "weights", "code"])
def test_a_broken_file_is_named(fresh: TextAutoencoder, tmp_path: Path, broken: str) -> None:
    file = tmp_path / "codec.pt"
    fresh.save(file)
    if broken == "cut":
        file.write_bytes(file.read_bytes()[:-500])
    elif broken == "text":
        file.write_text("no zip")
    elif broken == "other":
        torch.save({"format": "something"}, file)
    elif broken == "weights":
        content = torch.load(file, weights_only=True)
        del content["weights"]["bias"]
        torch.save(content, file)
    else:
        torch.save({"format": "mmebm-text-1", "words": zipfile.ZipFile}, file)  # a class, which weights_only refuses
    with pytest.raises(ValueError, match=r"codec\.pt is not a text autoencoder"):
        TextAutoencoder.load(file)
    with pytest.raises(FileNotFoundError, match=r"absent\.pt"):
        TextAutoencoder.load(tmp_path / "absent.pt")


def test_words_it_does_not_know_become_one_word(fitted: TextAutoencoder) -> None:
    codes = fitted.encode(["a small walrus sings.", "a small newt sings.", f"A small {UNKNOWN}   SINGS ."])
    assert torch.allclose(codes[0], codes[1]) and torch.allclose(codes[0], codes[2])
    assert not torch.allclose(codes[0], fitted.encode(["a small bird sings."])[0])


def test_what_is_cut_does_not_reach_the_code(fresh: TextAutoencoder) -> None:
    # length 8: seven words and the end
    codes = fresh.encode(["a a a a a a a cat", "a a a a a a a bird sings", "a a a a a a cat"])
    assert torch.allclose(codes[0], codes[1]) and not torch.allclose(codes[0], codes[2])


def test_a_code_depends_on_its_caption_alone(fresh: TextAutoencoder, seed: int) -> None:
    captions = ["", "a", *CAPTIONS[:6], "a small grey large bird cat fish"]
    order = torch.randperm(len(captions), generator=torch.Generator().manual_seed(seed)).tolist()
    together = fresh.encode([captions[k] for k in order])
    alone = torch.cat([fresh.encode([captions[k]]) for k in order])
    # float32 sums of 48 terms in another order, through eight steps of a contraction: some hundred roundings of 6e-8
    assert torch.allclose(together, alone, rtol=0, atol=2e-5)


def test_decoding_word_by_word_is_what_training_scores(fresh: TextAutoencoder, seed: int) -> None:
    # An untrained writer, so that nothing is easy; its greedy words must be the likeliest given its own words before.
    codes = torch.rand(20, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    with torch.no_grad():
        said = fresh.greedy(codes)
        scores = fresh.write(codes, said)
    for words, score in zip(said, scores):
        going = int((words != 0).sum())
        for place in range(min(going + 1, 7)):
            best = score[place].max()
            # within the rounding of two orders of summation
            assert score[place, words[place]] >= best - 1e-5
        assert (words[going:] == 0).all()


def test_scores_see_no_later_word_and_no_hidden_one(fresh: TextAutoencoder) -> None:
    codes, numbers = torch.zeros(1, 16), fresh.vocabulary.numbers([CAPTIONS[0]], 8)
    with torch.no_grad():
        plain = fresh.write(codes, numbers)
        later, other = numbers.clone(), numbers.clone()
        later[0, 3:] = 4
        other[0, 1] = 4
        hidden = torch.zeros(1, 8, dtype=torch.bool)
        hidden[0, 1] = True
        assert torch.equal(fresh.write(codes, later)[:, :4], plain[:, :4])
        assert not torch.allclose(fresh.write(codes, other)[:, 2], plain[:, 2])
        assert torch.equal(fresh.write(codes, other, hidden), fresh.write(codes, numbers, hidden))


def test_accuracy_of_known_mistakes() -> None:
    class Fixed:
        def encode(self, texts: list[str]) -> torch.Tensor:
            return torch.zeros(len(texts), 2)

        def decode(self, codes: torch.Tensor) -> list[str]:
            return ["a red bird", "a bird", "a red red bird", "a <unk>"]

    truth = ["A red bird", "a red bird", "a red bird", "a newt"]
    # 4 of 4 with the end; "a" of 4; "a", "red" of 4; "a" and the end of 3, an unknown word being lost
    words, whole = reading_accuracy(Fixed(), truth)  # type: ignore[arg-type]
    assert words == pytest.approx((4 + 1 + 2 + 2) / 15) and whole == 0.25


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="at least one word, got 2 captions"):
        fit_text_autoencoder(["", "  "])
    with pytest.raises(TypeError, match="captions must be a sequence of strings"):
        fit_text_autoencoder("a bird")
    with pytest.raises(TypeError, match="depth"):
        fit_text_autoencoder(["a bird"], depth=3)
    with pytest.raises(ValueError, match=r"noise must lie in \[0, 1\], got -0\.1"):
        TextSettings(noise=-0.1)
    with pytest.raises(TypeError, match="swap must be a number"):
        TextSettings(swap="much")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="length must be at least 2, got 1"):
        TextSettings(length=1)


def test_bad_input_is_named(fresh: TextAutoencoder) -> None:
    with pytest.raises(TypeError, match="texts must be a sequence of strings, got 'a bird'"):
        fresh.encode("a bird")
    with pytest.raises(ValueError, match=r"codes must have shape \(n, 16\), got \(3, 15\)"):
        fresh.decode(torch.zeros(3, 15))
    assert fresh.encode([]).shape == (0, 16) and fresh.decode(torch.zeros(0, 16)) == []


def test_the_old_name_works_and_says_that_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "mmebm.models.text", raising=False)
    with pytest.warns(DeprecationWarning, match=r"mmebm\.data\.text_codec"):
        old = importlib.import_module("mmebm.models.text")
    assert old.TextAutoencoder is TextAutoencoder and old.fit_text_autoencoder is fit_text_autoencoder
