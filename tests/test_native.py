"""The C++ and CUDA extensions against mmebm.noise, and what they say when something is missing."""

from __future__ import annotations

import importlib.metadata
import json
import sys

import numpy as np
import pytest
import torch

from mmebm import build_record, native, noise
from mmebm.backends import NAMES, Backend, backends, describe, require_backends

# noise.py's contract. Measured worst cases on x86-64: 0.90e-6 over 2^28 words (csrc/common/philox.h).
from mmebm.ops.parity import NORMAL_TOLERANCE as TOLERANCE

SHAPES = [(1, 1), (3, 1), (1, 3), (2, 4), (5, 7), (64, 63), (7, 65), (129, 2), (2, 1000)]


@pytest.fixture
def cpu(need):
    need("cpp")
    return native.cpu()


@pytest.fixture
def cuda_extension(need):
    """The CUDA extension, which needs no device to load."""
    try:
        return native.cuda()
    except native.BackendError as error:
        if "cuda" in require_backends() or "extension not built" not in str(error):
            pytest.fail(str(error))
        pytest.skip(str(error))


def coordinates(seed: int) -> dict[str, int]:
    """Random coordinates that use all bits; the offset wraps within the first chains."""
    rng = np.random.default_rng(seed)
    return {
        "seed": int(rng.integers(2**63)) * 2 + 1,
        "step": int(rng.integers(2**32)),
        "stream": int(rng.integers(2**32)),
        "chain_offset": 2**32 - 1 - int(rng.integers(3)),
    }


def call_words(function, chains: int, blocks: int, at: dict[str, int], *more) -> np.ndarray:
    out = np.full((chains, blocks, 4), 0xDEADBEEF, dtype=np.uint32)
    function(out.ctypes.data, chains, blocks, at["seed"], at["step"], at["stream"], at["chain_offset"], *more)
    return out


def call_normal(function, chains: int, numel: int, at: dict[str, int], *more) -> np.ndarray:
    guard = np.full(chains * numel + 16, np.nan, dtype=np.float32)  # 16 elements that must stay untouched
    function(guard.ctypes.data, chains, numel, at["seed"], at["step"], at["stream"], at["chain_offset"], *more)
    assert np.isnan(guard[chains * numel :]).all(), "wrote past the end"
    return guard[: chains * numel].reshape(chains, numel)


@pytest.mark.parametrize("shape", SHAPES)
def test_cpp_words_are_bit_equal(cpu, shape, seed):
    at = coordinates(seed)
    expected = noise.words(*shape, **at).numpy()
    for isa in cpu.isas():
        for threads in (1, 3):
            np.testing.assert_array_equal(call_words(cpu.philox_words, *shape, at, threads, isa), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_cpp_normals(cpu, shape, seed):
    at = coordinates(seed)
    expected = noise.normal(shape, dtype=torch.float64, **at).numpy()
    for isa in cpu.isas():
        got = call_normal(cpu.normal, *shape, at, 1, isa)
        np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE, err_msg=isa)


@pytest.mark.parametrize("numel", [1, 3, 4, 1001])
def test_cpp_threads_and_batch_split_do_not_change_a_bit(cpu, numel, seed):
    at = coordinates(seed)
    chains = 100_000 // numel + 5  # enough blocks for the threads to be used
    whole = call_normal(cpu.normal, chains, numel, at, 1)
    np.testing.assert_array_equal(call_normal(cpu.normal, chains, numel, at, 4), whole)
    tail = {**at, "chain_offset": (at["chain_offset"] + 3) % 2**32}
    np.testing.assert_array_equal(call_normal(cpu.normal, chains - 3, numel, tail, 2), whole[3:])


def words_that_hurt(rng: np.random.Generator) -> np.ndarray:
    """uint32 words where a fast log or sine goes wrong: both ends, powers of two, quarter turns, and random ones."""
    centres = np.concatenate(([0, 2**32 - 1], 2 ** np.arange(32), np.arange(1, 8) * 2**29))
    near = centres[:, None] + np.concatenate((np.arange(-40, 41), rng.integers(-(2**12), 2**12, 40)))
    return np.concatenate((near.ravel() % 2**32, rng.integers(0, 2**32, 20_000))).astype(np.uint32)


def test_cpp_box_muller_on_adversarial_words(cpu, seed):
    rng = np.random.default_rng(seed)
    words = words_that_hurt(rng)
    blocks = np.stack([rng.permutation(words) for _ in range(4)], axis=-1)
    blocks = np.concatenate((blocks, np.stack((np.zeros_like(words), words) * 2, axis=-1)))  # the largest radius
    blocks = np.ascontiguousarray(blocks)
    expected = noise.box_muller(torch.from_numpy(blocks.astype(np.int64))).numpy()
    for isa in cpu.isas():
        got = np.full(blocks.shape, np.nan, dtype=np.float32)
        cpu.box_muller(blocks.ctypes.data, got.ctypes.data, len(blocks), isa)
        np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE, err_msg=isa)


@pytest.mark.slow
def test_cpp_every_radius(cpu):
    """Every u there is: fl32(w) takes each w up to 2^24, then every 2nd, 4th, ... value."""
    for exponent in range(24, 33):
        first, stride = (0, 1) if exponent == 24 else (2 ** (exponent - 1), 2 ** (exponent - 24))
        words = np.arange(first, 2**exponent, stride, dtype=np.uint64)
        words = np.append(words, 2**exponent - 1).astype(np.uint32)
        blocks = np.zeros((len(words), 4), dtype=np.uint32)  # angle 0: the cosine is 1
        blocks[:, 0] = words
        got = np.empty(blocks.shape, dtype=np.float32)
        cpu.box_muller(blocks.ctypes.data, got.ctypes.data, len(blocks))
        u = (words.astype(np.float32) * np.float32(2.0**-32) + np.float32(2.0**-33)).astype(np.float64)
        # the radius alone is held to half of the tolerance: sine and cosine need the rest
        np.testing.assert_allclose(got[:, 0], np.sqrt(-2 * np.log(u)), rtol=0, atol=TOLERANCE / 2)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1,), (6,), (3, 4, 5)])
def test_normal_fills_tensors_of_any_shape(cpu, shape, seed):
    out = torch.full(shape, float("nan"))
    assert native.normal_(out, seed=seed, step=2, stream=3, chain_offset=4) is out
    expected = noise.normal(shape, seed=seed, step=2, stream=3, chain_offset=4, dtype=torch.float64)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=TOLERANCE)


def test_normal_takes_negative_seeds_and_numpy_integers(cpu):
    a, b = torch.empty(2, 5), torch.empty(2, 5)
    native.normal_(a, seed=-1, step=np.int64(3))
    native.normal_(b, seed=2**64 - 1, step=3)
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("out", "kwargs", "error", "named"),
    [
        ([1.0], {}, TypeError, "out must be a tensor"),
        (torch.zeros(3, dtype=torch.float64), {}, ValueError, "out must be float32"),
        (torch.zeros(()), {}, ValueError, "chain dimension"),
        (torch.zeros(4, 6).t(), {}, ValueError, "out must be contiguous"),
        (torch.zeros(4, 6)[:, ::2], {}, ValueError, "out must be contiguous"),
        (torch.zeros(4, 6).to_sparse(), {}, ValueError, "out must be contiguous"),
        (torch.zeros(4, device="meta"), {}, ValueError, "out must be on the CPU or a CUDA device"),
        (torch.zeros(4, requires_grad=True), {}, ValueError, "out must not require grad"),
        (torch.zeros(4), {"seed": 1.0}, TypeError, "seed must be an int"),
        (torch.zeros(4), {"seed": True}, TypeError, "seed must be an int"),
        (torch.zeros(4), {"seed": 2**64}, ValueError, "seed must be in"),
        (torch.zeros(4), {"step": -1}, ValueError, "step must be in"),
        (torch.zeros(4), {"stream": 2**32}, ValueError, "stream must be in"),
        (torch.zeros(4), {"chain_offset": torch.tensor(1)}, TypeError, "chain_offset must be an int"),
    ],
)
def test_normal_names_what_is_wrong(out, kwargs, error, named):
    with pytest.raises(error, match=named):
        native.normal_(out, **{"seed": 0, **kwargs})


def test_pointer_functions_refuse_what_they_can_see(cpu):
    with pytest.raises(ValueError, match="negative"):
        cpu.normal(8, -1, 4, 0, 0, 0, 0)
    with pytest.raises(ValueError, match="null"):
        cpu.normal(0, 1, 4, 0, 0, 0, 0)
    with pytest.raises(ValueError, match="isa"):
        cpu.normal(0, 0, 0, 0, 0, 0, 0, 1, "sse9")


def test_versions_come_from_one_place(cpu):
    try:
        expected = importlib.metadata.version("mmebm")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("mmebm is not installed: there is no version to compare with")
    assert cpu.__version__ == expected


@pytest.mark.parametrize("shape", SHAPES)
def test_cuda_device_functions_on_the_host(cuda_extension, shape, seed):
    """The functions that the kernels are made of, run on the CPU by the same object file."""
    at = coordinates(seed)
    got = call_words(cuda_extension.host_philox_words, *shape, at)
    np.testing.assert_array_equal(got, noise.words(*shape, **at).numpy())
    expected = noise.normal(shape, dtype=torch.float64, **at).numpy()
    normals = call_normal(cuda_extension.host_normal, *shape, at)
    np.testing.assert_allclose(normals, expected, rtol=0, atol=TOLERANCE)


def test_cuda_extension_without_a_device_says_so(cuda_extension):
    count, code = cuda_extension.device_count()
    if count:
        pytest.skip(f"{count} device(s) here")
    assert code != 0
    available, reason = native.available("cuda")
    assert not available
    assert "no device" in reason and f"CUDA error {code}" in reason
    # a launch reports the error instead of crashing; the pointer is never touched
    assert cuda_extension.normal(256, 1, 4, 0, 0, 0, 0) != 0
    with pytest.raises(native.BackendError, match=r"cuda: test failed with CUDA error"):
        native.check_cuda(code, "test")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, (1000, 4099)])
def test_cuda_on_the_device(need, shape, seed):
    need("cuda")
    at = coordinates(seed)
    words = torch.zeros(*shape, 4, dtype=torch.int32, device="cuda")
    arguments = (at["seed"], at["step"], at["stream"], at["chain_offset"])
    queue = torch.cuda.current_stream().cuda_stream
    code = native.cuda().philox_words(words.data_ptr(), *shape, *arguments, words.device.index, queue)
    native.check_cuda(code, "philox_words")
    np.testing.assert_array_equal(words.cpu().numpy().view(np.uint32), noise.words(*shape, **at).numpy())
    out = native.normal_(torch.full(shape, float("nan"), device="cuda"), **at)
    expected = noise.normal(shape, dtype=torch.float64, **at)
    torch.testing.assert_close(out.cpu().double(), expected, rtol=0, atol=TOLERANCE)


def test_backends_reports_every_backend_with_a_reason():
    report = backends()
    assert tuple(report) == NAMES
    assert report["torch"].available
    assert all(backend.reason for backend in report.values())
    text = "\n".join(describe())
    assert torch.__version__ in text
    assert all(name in text for name in NAMES)


def test_a_missing_extension_gives_the_reason_and_the_remedy(monkeypatch, tmp_path):
    """As on a machine without nvcc: setup.py left a record, and the module is not there."""
    (tmp_path / "_build.json").write_text('{"mmebm._gone": {"built": false, "reason": "at install: nvcc not found"}}')
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    monkeypatch.setitem(native._EXTENSIONS, "cuda", "mmebm._gone")
    native._load.cache_clear()
    try:
        available, reason = native.available("cuda")
        assert not available
        assert "at install: nvcc not found" in reason and "MMEBM_BUILD_CUDA=1 pip install" in reason
        with pytest.raises(native.BackendError, match="cuda: extension not built"):
            native.cuda()
    finally:
        native._load.cache_clear()


def test_an_extension_of_other_sources_is_not_used(monkeypatch, tmp_path):
    """As after git pull in an editable install: the module is the old one."""
    package, source = tmp_path / "mmebm", tmp_path / "csrc" / "noise" / "philox.h"
    for folder in (package, source.parent):
        folder.mkdir(parents=True)
    source.write_text("old")
    (package / "_old.py").write_text("")
    record = {"mmebm._old": {"built": True, "with": "c++", "sources": build_record.digest(tmp_path / "csrc")}}
    (package / "_build.json").write_text(json.dumps(record))
    monkeypatch.setattr(native, "__file__", str(package / "native.py"))
    monkeypatch.setattr("mmebm.__path__", [str(package)])
    monkeypatch.setitem(native._EXTENSIONS, "cuda", "mmebm._old")
    try:
        for text, there in (("old", True), ("new", False), ("old", True), (None, True)):
            source.unlink(missing_ok=True) if text is None else source.write_text(text)
            native._load.cache_clear()
            module, reason = native._load("cuda")
            assert (module is not None) == there, reason
            assert there or "pip install -e ." in reason
    finally:
        native._load.cache_clear()
        sys.modules.pop("mmebm._old", None)


def test_available_names_what_it_knows():
    with pytest.raises(ValueError, match="name must be one of"):
        native.available("metal")


def test_required_backends_are_checked_names(monkeypatch):
    monkeypatch.setenv("MMEBM_REQUIRE_BACKENDS", "cpp, cuda,")
    assert require_backends() == {"cpp", "cuda"}
    monkeypatch.setenv("MMEBM_REQUIRE_BACKENDS", "cpp,gpu")
    with pytest.raises(ValueError, match="MMEBM_REQUIRE_BACKENDS"):
        require_backends()


def test_a_required_backend_fails_instead_of_skipping(need, monkeypatch):
    # sys.modules, because the attribute `backends` of the package is the function
    monkeypatch.setattr(sys.modules["mmebm.backends"], "_triton", lambda: Backend(False, "taken away"))
    with pytest.raises(pytest.skip.Exception, match="taken away"):
        need("triton")
    monkeypatch.setenv("MMEBM_REQUIRE_BACKENDS", "triton")
    with pytest.raises(pytest.fail.Exception, match="taken away"):
        need("triton")


def test_poison_reaches_mmebm_and_only_mmebm():
    namespace = {"__name__": "mmebm.pretend", "torch": torch}
    exec("def allocate(): return torch.empty(3), torch.empty(3, dtype=torch.int32)", namespace)
    floats, integers = namespace["allocate"]()
    assert floats.isnan().all() and (integers > 2**30).all()
    zeros = torch.zeros(3)
    namespace["__name__"] = "somebody.else"
    exec("def reuse(x): return torch.empty_like(x).zero_()", namespace)
    assert torch.equal(namespace["reuse"](zeros), zeros)
