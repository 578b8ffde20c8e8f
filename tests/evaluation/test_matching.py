"""The score of texts and images: planted correlation, chance, collapse, and what it is fitted on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmebm.data.base import Modality, MultimodalDataset
from mmebm.evaluation.matching import (
    Words,
    fit_matching,
    fit_projection,
    match_report,
    match_table,
    plain_image_features,
    scores,
)

COLOURS = {"red": (0.8, 0.1, 0.1), "green": (0.1, 0.7, 0.2), "blue": (0.1, 0.2, 0.8), "white": (0.9, 0.9, 0.9)}
NAMES = list(COLOURS)
SIDES = ("left", "right")


class Places:
    """A codec without loss: the number of the text among all."""

    texts = tuple(f"a {colour} bird on the {side}" for colour in NAMES for side in SIDES)

    def encode(self, texts, /):
        numbers = torch.tensor([self.texts.index(text) for text in texts])
        return torch.nn.functional.one_hot(numbers, len(self.texts)).float() * 2 - 1

    def decode(self, codes, /):
        return [self.texts[k] for k in codes.argmax(1).tolist()]


def tuples(n: int, seed: int, split="train") -> tuple[MultimodalDataset, torch.Tensor]:
    """Birds, one half of the picture in the colour that the caption says; two captions an image."""
    rng = np.random.default_rng(seed)
    which = rng.integers(len(Places.texts), size=n)
    images = rng.uniform(0.3, 0.5, (n, 3, 16, 16))
    for k, w in enumerate(which):
        half = slice(0, 8) if w % 2 == 0 else slice(8, 16)
        images[k, :, :, half] = np.array(COLOURS[NAMES[w // 2]])[:, None, None] + rng.normal(0, 0.03, (3, 16, 8))
    modalities = (
        Modality("image", (3, 16, 16), "image"),
        Modality("caption", (len(Places.texts),), "caption", codec=Places()),
    )
    pools = {
        "image": modalities[0].model(images.clip(0, 1).astype(np.float32)),
        "caption": Places().encode([Places.texts[w] for w in which]),
    }
    index = torch.arange(n).repeat_interleave(2)[:, None].expand(-1, 2).contiguous()
    none = torch.full((n,), -1)
    data = MultimodalDataset(
        "birds", split, 0, modalities, (), pools, {"image": none, "caption": none}, index, none.repeat_interleave(2)
    )
    return data, torch.from_numpy(which)


def planted(n: int, shared: int, noise: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=g, dtype=torch.float64)
    z, of_a, of_b = draw(n, shared), torch.randn(shared, 12, dtype=torch.float64), torch.randn(shared, 9).double()
    return z @ of_a + noise * draw(n, 12), z @ of_b + noise * draw(n, 9)


def test_canonical_correlations_are_those_of_scikit_learn(seed: int) -> None:
    cca = pytest.importorskip("sklearn.cross_decomposition").CCA
    torch.manual_seed(seed)
    a, b = planted(400, 3, 1.0, seed)
    other = cca(n_components=3, max_iter=5000, tol=1e-10).fit(a.numpy(), b.numpy())
    x, y = other.transform(a.numpy(), b.numpy())
    theirs = [np.corrcoef(x[:, k], y[:, k])[0, 1] for k in range(3)]
    np.testing.assert_allclose(fit_projection(a, b, ridge=1e-12).correlations[:3], theirs, atol=1e-4)


def test_one_known_correlation() -> None:
    """x and rho x + sqrt(1 - rho^2) e: the correlation is rho, and the ridge r makes it rho / (1 + r)."""
    g = torch.Generator().manual_seed(0)
    x, e = torch.randn(2, 200_000, 1, generator=g, dtype=torch.float64)
    for ridge in (0.0, 0.5):
        found = fit_projection(x, 0.6 * x + 0.8 * e, ridge=ridge).correlations
        assert found.item() == pytest.approx(0.6 / (1 + ridge), abs=0.01)


@pytest.mark.parametrize("shared", [1, 4])
def test_planted_correlation_is_found_on_new_tuples(shared: int, seed: int) -> None:
    torch.manual_seed(seed)
    a, b = planted(1200, shared, 0.3, seed)
    projection = fit_projection(a[:1000], b[:1000])
    matched = scores(*projection(a[1000:], b[1000:]))
    chance = scores(*projection(a[1000:], b[1000:][torch.randperm(200)]))
    assert matched["correlation"] > 0.6 > 0.3 > abs(chance["correlation"])
    assert abs(matched["mismatched"]) < 0.1
    for way in ("a_to_b", "b_to_a"):
        assert matched[way]["median_rank"] < (70 if shared == 1 else 6)  # one component leaves its sign to a cosine
        assert chance[way]["median_rank"] > 75


def test_features_without_anything_in_common_are_at_chance(seed: int) -> None:
    """Also where there are more features than tuples, where the training tuples would correlate by 1."""
    g = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(600, 300, generator=g, dtype=torch.float64) for _ in range(2))
    found = scores(*fit_projection(a[:200], b[:200], seed=seed)(a[200:], b[200:]))
    assert abs(found["correlation"]) < 5 * found["correlation_error"] + 0.01
    assert found["a_to_b"]["first"] < 0.02 and 150 < found["b_to_a"]["median_rank"] < 250


def test_a_collapsed_model_is_at_chance() -> None:
    """All samples alike: no pair is better than another, and none counts as found."""
    one = torch.nn.functional.normalize(torch.randn(1, 5, generator=torch.Generator().manual_seed(1)), dim=1)
    found = scores(one.expand(100, 5), one.expand(100, 5))
    assert found["a_to_b"] == {"first": pytest.approx(0.01), "five": pytest.approx(0.05), "median_rank": 50.5}
    assert found["correlation"] == pytest.approx(found["mismatched"]) == pytest.approx(1.0)


def test_ranks_by_hand() -> None:
    a = torch.eye(3, dtype=torch.float64)
    b = a[[0, 2, 2]]  # the second pair is wrong, and 3's partner is 2's as well
    found = scores(a, b)
    # 1: alone at the top. 2: all three alike at 0. 3: two at the top
    assert found["a_to_b"]["first"] == pytest.approx((1 + 1 / 3 + 1 / 2) / 3)
    assert found["a_to_b"]["five"] == 1.0 and found["a_to_b"]["median_rank"] == 1.5
    assert found["correlation"] == pytest.approx(2 / 3) and found["mismatched"] == pytest.approx(1 / 6)


def test_plain_features_know_colours_and_words() -> None:
    grey = plain_image_features(np.full((2, 3, 9, 7), 0.5, np.float32))
    assert grey.shape == (2, 3 * 8 * 7 + 64) and grey[:, -64:].sum() == pytest.approx(2)
    assert plain_image_features(np.zeros((1, 1, 4, 4), np.float32)).shape == (1, 16 + 4)
    assert plain_image_features(np.zeros((1, 5, 4, 4), np.float32)).shape == (1, 80 + 4)
    words = Words(["a red bird", "a blue bird", "once"])
    assert set(words.number) == {"a", "bird"}
    assert words(np.array(["A bird!", "nothing of it"])).tolist() == [[1, 1], [0, 0]]


def shuffled(x: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    order = torch.randperm(len(x["caption"]), generator=torch.Generator().manual_seed(seed))
    return {"image": x["image"], "caption": x["caption"][order]}


def test_the_report_tells_models_apart(seed: int) -> None:
    """Samples that agree are near real tuples, shuffled ones at chance; completions likewise, in both directions; what
    is not finite is left out."""
    train, test = tuples(400, seed)[0], tuples(150, seed + 1, "test")[0]
    fresh = tuples(150, seed + 2)[0]
    right = fresh.batch(torch.arange(0, 300, 2))

    def knows(given, s):
        if "image" in given:
            x = given["image"]
            halves = torch.stack([x[:, :, :, :8].mean((2, 3)), x[:, :, :, 8:].mean((2, 3))], 1)  # (n, 2, C)
            far = (halves[:, :, None] - (torch.tensor(list(COLOURS.values())) * 2 - 1)).square().sum(3)
            right_half = far.amin(2).argmin(1)
            colour = far[torch.arange(len(x)), right_half].argmin(1)
            return {"caption": torch.nn.functional.one_hot(2 * colour + right_half, 8).float()}
        images = {text: fresh.batch(torch.tensor([2 * k])) for k, text in enumerate(said)}
        return {"image": torch.cat([images[text]["image"] for text in Places().decode(given["caption"])])}

    said = Places().decode(fresh.pools["caption"])  # the last of each text stays in the dict
    guess = lambda given, s: shuffled({**right, **given}, 3) if "image" in given else {"image": right["image"]}
    astray = {**right, "image": right["image"].clone().fill_(torch.nan)}
    report = match_report(
        {"good": right, "bad": shuffled(right, seed), "astray": astray},
        {"knows": knows, "guesses": guess, "astray": lambda given, s: astray},
        test,
        train,
        n=150,
    )
    assert set(report["image ~ caption"]["points"]) == {"good", "bad"}
    found = report["image ~ caption"]
    real, good, bad = found["real"], found["points"]["good"], found["points"]["bad"]
    assert real["n"] == 150 and found["fitted_to"] == 400
    assert real["correlation"] > 0.8 and abs(good["correlation"] - real["correlation"]) < 0.1
    assert abs(bad["correlation"]) < 0.25
    # 75 by chance with a standard deviation of 150 / 2 / sqrt(150) = 6, 10 at best; 300 seeds: 55 to 90, 10 to 33
    assert real["a_to_b"]["median_rank"] < 40 < 45 < bad["a_to_b"]["median_rank"]
    by_caption, by_image = found["given caption"], found["given image"]
    assert by_caption["knows"]["correlation"] > 0.8 and abs(by_caption["guesses"]["correlation"]) < 0.3
    assert by_image["knows"]["correlation"] > by_image["guesses"]["correlation"] + 0.3
    text = match_table(report)
    assert "400 training tuples; 150 rows" in text and "knows, given caption" in text and "chance" in text


def test_images_are_there_once(seed: int) -> None:
    """Ten captions of one image are no gallery: an image would have to be found among ten equal ones."""
    data, _ = tuples(60, seed)
    right = data.batch(torch.arange(120))
    report = match_report({"x": right}, {}, data, data)
    assert report["image ~ caption"]["real"]["n"] == 60 == report["image ~ caption"]["fitted_to"]


def test_features_of_the_user(seed: int) -> None:
    train = tuples(100, seed)[0]
    seen = {}

    def own(images):
        seen["images"] = (images.shape, float(images.min()), float(images.max()))
        return torch.as_tensor(images).flatten(1)[:, ::50]

    def words(texts):
        seen["texts"] = str(texts[0])
        return [[text.count(colour) for colour in NAMES] for text in texts]

    judge = fit_matching(train, train.modalities, {"image": own, "caption": words})
    assert seen["images"][0] == (100, 3, 16, 16) and 0 <= seen["images"][1] < seen["images"][2] <= 1
    assert seen["texts"].startswith("a ") and judge.projection.weights[1].shape == (4, 4)
    for wrong in (lambda x: np.zeros(len(x)), lambda x: np.zeros((3, 2)), lambda x: np.full((len(x), 2), np.nan)):
        with pytest.raises(ValueError, match="features of 'image' must be finite numbers \\(100, d\\)"):
            fit_matching(train, train.modalities, {"image": wrong})


def test_too_few_tuples_are_a_reason() -> None:
    few = tuples(10, 0)[0]
    report = match_report({"x": few.batch(torch.arange(20))}, {}, few, few)
    assert "10" in report["image ~ caption"]["skipped"] and "not measured" in match_table(report)
    with pytest.raises(ValueError, match="n >= 20"):
        fit_projection(torch.zeros(10, 2), torch.zeros(10, 2))
    with pytest.raises(ValueError, match="finite"):
        fit_projection(torch.full((30, 2), torch.nan), torch.zeros(30, 2))
