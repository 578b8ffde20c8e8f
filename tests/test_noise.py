"""mmebm.noise against the published Philox vectors, an independent NumPy version, and statistics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from mmebm import noise

# Known answers of philox4x32-10 in the Random123 distribution (kat_vectors): counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
# Each statistical test below has this chance of failing on correct code; the seed is fresh in every run.
FALSE_ALARM = 1e-7


def numpy_words(chains: int, blocks: int, seed: int, step: int, stream: int, offset: int = 0) -> np.ndarray:
    """uint32 (chains, blocks, 4), written from the paper with uint64 arithmetic, apart from mmebm.noise."""
    mask = np.uint64(0xFFFFFFFF)
    chain, block = np.meshgrid(np.arange(chains, dtype=np.uint64), np.arange(blocks, dtype=np.uint64), indexing="ij")
    full = [block, (chain + np.uint64(offset)) & mask, np.full_like(block, step), np.full_like(block, stream)]
    key = [np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32 & 0xFFFFFFFF)]
    for _ in range(10):
        a, b = full[0] * np.uint64(0xD2511F53), full[2] * np.uint64(0xCD9E8D57)
        shift = np.uint64(32)
        full = [(b >> shift) ^ full[1] ^ key[0], b & mask, (a >> shift) ^ full[3] ^ key[1], a & mask]
        key = [(key[0] + np.uint64(0x9E3779B9)) & mask, (key[1] + np.uint64(0xBB67AE85)) & mask]
    return np.stack(full, axis=-1).astype(np.uint32)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter, key, expected):
    got = noise.philox4x32([torch.tensor(word) for word in counter], key)
    assert [hex(int(word)) for word in got] == [hex(word) for word in expected]


def test_the_first_known_answer_is_the_first_block_of_seed_0():
    assert noise.words(1, 1, seed=0)[0, 0].tolist() == list(KNOWN[0][2])


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (64, 17), (5, 1000)])
def test_words_equal_numpy(shape, seed):
    rng = np.random.default_rng(seed)
    big_seed, step, stream = int(rng.integers(2**63)), int(rng.integers(2**32)), int(rng.integers(2**32))
    offset = int(rng.integers(2**32))
    got = noise.words(*shape, seed=big_seed, step=step, stream=stream, chain_offset=offset)
    np.testing.assert_array_equal(got.numpy(), numpy_words(*shape, big_seed, step, stream, offset))


def test_seed_uses_64_bits_and_negative_seeds_are_their_bits():
    high = noise.words(2, 3, seed=1 << 32)
    assert not torch.equal(high, noise.words(2, 3, seed=0))
    assert torch.equal(noise.words(2, 3, seed=-1), noise.words(2, 3, seed=2**64 - 1))


@pytest.mark.parametrize("numel", [1, 2, 3, 4, 5, 7, 784])
def test_batch_split_does_not_change_a_chain(numel, seed):
    whole = noise.normal((10, numel), seed=seed, step=4, stream=2)
    parts = [noise.normal((n, numel), seed=seed, step=4, stream=2, chain_offset=o) for o, n in ((0, 3), (3, 1), (4, 6))]
    assert torch.equal(whole, torch.cat(parts))


def test_shape_of_a_chain_does_not_matter_only_its_elements(seed):
    flat = noise.normal((4, 60), seed=seed)
    assert torch.equal(flat, noise.normal((4, 3, 4, 5), seed=seed).reshape(4, 60))
    assert torch.equal(flat[:, :7], noise.normal((4, 7), seed=seed))


@pytest.mark.parametrize("other", [{"step": 1}, {"stream": 1}, {"seed": 1}, {"chain_offset": 1}])
def test_neighbouring_coordinates_are_independent(other, seed):
    # Under independence the correlation of n pairs is about normal with variance 1/n.
    n = 100_000
    base = {"seed": seed, "step": 0, "stream": 0, "chain_offset": 0}
    moved = {name: base[name] + other.get(name, 0) for name in base}
    a = noise.normal((1, n), dtype=torch.float64, **base)
    b = noise.normal((1, n), dtype=torch.float64, **moved)
    limit = stats.norm.isf(FALSE_ALARM / 2) / math.sqrt(n)
    for x, y in ((a, b), (a**2 - 1, (b**2 - 1) / 2)):
        assert abs(float((x * y).mean() / x.std() / y.std())) < limit


def test_seed_plus_one_does_not_shift_the_steps(seed):
    """With the key seed + step instead of a step in the counter these two would be the same numbers."""
    a = noise.normal((4, 64), seed=seed + 1, step=0)
    b = noise.normal((4, 64), seed=seed, step=1)
    assert not torch.equal(a, b)


def test_normal_moments(seed):
    n = 2_000_000
    x = noise.normal((1000, n // 1000), seed=seed, dtype=torch.float64).flatten()
    z = stats.norm.isf(FALSE_ALARM / 8)  # two sides, four moments
    # mean, E x^2, E x^3, E x^4 of a standard normal and the variances of x, x^2, x^3, x^4
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((x**power).mean()) - expected) < z * math.sqrt(variance / n), f"moment {power}"


def test_normal_distribution(seed):
    x = noise.normal((500, 1000), seed=seed, dtype=torch.float64).flatten().numpy()
    for part in (x, x[0::4], x[1::4], x[2::4], x[3::4]):  # each word of a block by itself too
        assert stats.kstest(part, "norm").pvalue > FALSE_ALARM / 5


def test_uniform_distribution(seed):
    x = noise.uniform((500, 1000), seed=seed, dtype=torch.float64)
    assert 0 <= float(x.min()) and float(x.max()) < 1
    assert stats.kstest(x.flatten().numpy(), "uniform").pvalue > FALSE_ALARM


def test_extreme_words_give_finite_normals_and_the_stated_tail():
    extremes = torch.tensor([0, 1, 2**24 - 1, 2**24, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 2**7, 2**32 - 1])
    every = torch.cartesian_prod(extremes, extremes)
    normals = noise.box_muller(torch.cat((every, every), dim=-1))
    assert torch.isfinite(normals).all()
    # the smallest u is 2^-33
    tail = math.sqrt(66 * math.log(2))
    assert float(normals.abs().max()) == pytest.approx(tail, rel=1e-12)
    # the largest u is 1: radius 0
    assert noise.box_muller(torch.tensor([2**32 - 1, 0, 2**32 - 1, 5])).abs().tolist() == [0.0] * 4


def test_box_muller_is_what_the_module_says():
    w = torch.tensor([0x12345678, 0x9ABCDEF0, 0x0FEDCBA9, 0x76543210])
    expected = []
    for radius_word, angle_word in ((0x12345678, 0x9ABCDEF0), (0x0FEDCBA9, 0x76543210)):
        u = np.float32(np.float32(radius_word) * np.float32(2.0**-32) + np.float32(2.0**-33))
        signed = angle_word - 2**32 if angle_word >= 2**31 else angle_word
        angle = math.pi * float(np.float32(signed)) * 2.0**-31
        radius = math.sqrt(-2 * math.log(float(u)))
        expected += [radius * math.cos(angle), radius * math.sin(angle)]
    # float64 functions of two libraries: a few units in the last place of numbers below 2
    assert noise.box_muller(w).tolist() == pytest.approx(expected, abs=1e-14)


def test_tensor_seed_and_step_equal_ints(seed):
    expected = noise.normal((3, 10), seed=seed << 31, step=7, stream=1)
    got = noise.normal((3, 10), seed=torch.tensor(seed << 31), step=torch.tensor([7]), stream=1)
    assert torch.equal(expected, got)


def test_streams_are_disjoint_and_stable():
    """The numbers themselves are the contract: changing one changes everybody's chains."""
    purposes = (noise.DRIFT, noise.INITIAL, noise.ACCEPT, noise.REINIT, noise.ROUNDING)
    assert purposes == (0, 1, 2, 3, 4)
    tags = [noise.stream(index, purpose) for purpose in purposes for index in (0, 1, 2**24 - 1)]
    assert len(set(tags)) == len(tags)
    assert noise.stream(3, noise.ACCEPT) == 0x02000003


@pytest.mark.parametrize(
    ("arguments", "named"), [((-1,), "tensor_index"), ((2**24,), "tensor_index"), ((0, 256), "purpose")]
)
def test_stream_names_what_is_wrong(arguments, named):
    with pytest.raises(ValueError, match=named):
        noise.stream(*arguments)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_words_do_not_fit_sixteen_bits(dtype: torch.dtype) -> None:
    """A uniform of float16 was infinite: its 24 bits were converted before they were scaled."""
    with pytest.raises(ValueError, match="dtype must be one of"):
        noise.uniform((4, 3), seed=0, dtype=dtype)
    if dtype == torch.int64:
        with pytest.raises(ValueError, match="dtype must be floating"):
            noise.normal((4, 3), seed=0, dtype=dtype)


def test_scalar_shape_is_refused():
    with pytest.raises(ValueError, match="chain dimension"):
        noise.normal((), seed=0)


def test_empty_shapes():
    assert noise.normal((0, 5), seed=0).shape == (0, 5)
    assert noise.normal((5, 0), seed=0).shape == (5, 0)
    assert noise.normal((5,), seed=0).shape == (5,)


def test_manual_seed_rules_drawn_seeds():
    torch.manual_seed(5)
    first = [noise.draw_seed(), noise.draw_seed()]
    torch.manual_seed(5)
    assert [noise.draw_seed(), noise.draw_seed()] == first
    assert first[0] != first[1]
    generator = torch.Generator().manual_seed(5)
    assert noise.draw_seed(generator) == first[0]


def test_rounding_fraction_is_uniform_and_never_0_or_1(seed):
    x = noise.rounding_fraction((100, 999), seed=seed, step=1)
    assert 0 < float(x.min()) and float(x.max()) < 1
    # 2^-17 is the step's half width: the lattice is that far from continuous
    distance = stats.kstest(x.double().flatten().numpy(), "uniform").statistic - 2.0**-17
    assert stats.kstwo.sf(max(distance, 0), x.numel()) > FALSE_ALARM


def test_rounding_fraction_takes_the_halves_in_the_stated_order(seed):
    got = noise.rounding_fraction((2, 19), seed=seed, step=3, stream=noise.stream(5, noise.ROUNDING))
    words = numpy_words(2, 3, seed, 3, noise.stream(5, noise.ROUNDING))
    for element in range(19):
        word = words[:, element // 8, element % 8 // 2]
        half = word & 0xFFFF if element % 2 == 0 else word >> 16
        np.testing.assert_array_equal(got[:, element].numpy(), ((half + 0.5) * 2.0**-16).astype(np.float32))
