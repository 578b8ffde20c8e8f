"""No implementation is used before it agrees with the reference: faults put into the extension, and the case itself."""

from __future__ import annotations

import ctypes
import os
import random
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import mmebm
from mmebm import native, noise
from mmebm.cli.main import main
from mmebm.ops import dispatch, parity
from mmebm.ops.common.params import StepParams
from mmebm.ops.langevin_mlp import op as mlp
from mmebm.ops.langevin_step import op as step
from mmebm.ops.langevin_step import reference as rule
from mmebm.ops.mlp_energy import mlp_energy
from mmebm.ops.net import op as net
from mmebm.ops.net.graph import Activation, Input, Linear, Map, Net
from mmebm.ops.net.op import net_energy
from mmebm.ops.residual import residual

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _fresh(need: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No verdict from before, and none that stays."""
    need("cpp")
    for name in ("MMEBM_BACKEND", "MMEBM_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    parity.clear()
    yield
    parity.clear()


# -- faults


def _wrong(place: int, by: float) -> None:
    """One float32 at an address, changed a little."""
    ctypes.c_float.from_address(place).value *= 1 + by


class _Extension:
    """``mmebm._cpu`` with a fault in one function: ``of(arguments)`` is the address of a result that comes out wrong by
    a factor; without it the function raises."""

    def __init__(self, function: str, of: Callable[[Any], int] | None, by: float = 1e-4) -> None:
        self._real, self._function, self._of, self._by = native.cpu(), function, of, by

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._real, name)
        if name == "LangevinStep" and self._function in ("step", "perturb"):
            return lambda **arguments: _Step(real(**arguments), self)
        return self.faulty(real) if name == self._function else real

    def faulty(self, real: Any) -> Any:
        def call(*arguments: Any) -> Any:
            if self._of is None:
                raise RuntimeError("the kernel is broken")
            out = real(*arguments)
            place = self._of(arguments)
            if place is not None:
                _wrong(place, self._by)
            return out

        return call


class _Step:
    def __init__(self, real: Any, extension: _Extension) -> None:
        self._real, self._extension = real, extension

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._real, name)
        hit = name.startswith(self._extension._function)
        return self._extension.faulty(real) if hit else real


def _normals(backend: str) -> Tensor:
    # MMEBM_BACKEND is how the noise is asked for by name
    return native.normal_(torch.zeros(4, 9), seed=5, step=2)


def _one_step(backend: str) -> Tensor:
    x = torch.linspace(-1, 1, 12).reshape(3, 4)
    return step.langevin_step([x], [x], step_size=0.1, noise_scale=0.1, seed=3, backend=backend)[0]


def _terms() -> list[Any]:
    return parity._terms(parity._Numbers(9))[:1]


def _chain(backend: str) -> Tensor:
    return mlp.langevin_mlp(
        [torch.linspace(-1, 1, 24).reshape(4, 6)],
        _terms(),
        steps=2,
        step_size=0.1,
        noise_scale=0.1,
        seed=3,
        backend=backend,
    ).x[0]


def _energy(backend: str) -> Tensor:
    return mlp_energy(torch.linspace(-1, 1, 24).reshape(4, 6), _terms(), backend=backend)[1]


def _likelihood(backend: str) -> Tensor:
    y = torch.linspace(-1, 1, 24).reshape(4, 6)
    return residual([y], [y.flip(0)], backend=backend)


def _net() -> Any:
    linear = Linear(0, torch.linspace(-1, 1, 24).reshape(4, 6))
    return Net((Input(0, (6,)), linear, Activation(1, "silu"), Map((2,), (1,), torch.arange(4).reshape(1, 4))))


def _net_gradient(backend: str) -> Tensor:
    return net_energy(torch.linspace(-1, 1, 24).reshape(4, 6), _net(), backend=backend)[1]


def _net_chain(backend: str) -> Tensor:
    x = torch.linspace(-1, 1, 24).reshape(4, 6)
    table = mlp.constants_of([[StepParams(0.1, 0.1)]], 4, torch.float32, x.device)
    assert not isinstance(table, str)
    chain = net.NetChain(
        net=_net(),
        widths=(6,),
        streams=(0,),
        noisy=(True,),
        moving=(True,),
        constants=table[0],
        present=table[1],
        seed=3,
    )
    return net.run(net.room(backend, chain, x)[0], chain, x, 2, 0).x


# op: (a call, the function of the extension, the address of a result among its arguments)
FAULTS: dict[str, tuple[Callable[[str], Tensor], str, Callable[[Any], int]]] = {
    "noise": (_normals, "normal", lambda a: a[0] + 4),
    "langevin_step": (_one_step, "step", lambda a: a[0][-1]),
    "langevin_mlp": (_chain, "langevin_mlp", lambda a: a[0]["out"]),
    "mlp_energy": (_energy, "mlp_energy", lambda a: a[0]["gradient"]),
    "residual": (_likelihood, "residual", lambda a: a[0]["value"]),
    "net_energy": (_net_gradient, "net_energy", lambda a: a[0]["energy"]),
    "langevin_net": (_net_chain, "langevin_net", lambda a: a[0]["out"]),
}
MORE = {
    "words": ("noise", "philox_words", lambda a: a[0]),
    "perturb": ("langevin_step", "perturb", lambda a: a[0][0]),
    "grad_norm": ("langevin_step", "step", lambda a: a[6] and a[6]["grad_norm"]),
    "chain's energy": ("langevin_mlp", "langevin_mlp", lambda a: a[0]["energy"]),
    "value": ("mlp_energy", "mlp_energy", lambda a: a[0]["energy"]),
    "gradient": ("residual", "residual", lambda a: a[0]["modalities"][2]["grad"]),
}


@pytest.mark.parametrize("raises", [False, True])
def test_a_fault_in_the_steps_of_exact_samplers(raises: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have no argument ``backend``; MMEBM_BACKEND asks by name."""
    sampler = mmebm.ParallelTempering(0.1, temperatures=(1.0, 2.0, 4.0))
    x = torch.linspace(-1, 1, 24).reshape(4, 6)

    def call() -> Tensor:
        return sampler.sample(lambda x: 0.5 * x.square().sum(1), x, 4, seed=3).state

    expected = call()
    parity.clear()
    broken = _Extension("exchange", None if raises else lambda a: a[0]["tensors"][0]["values"])
    monkeypatch.setattr(native, "cpu", lambda: broken)
    with pytest.warns(RuntimeWarning, match="cpp is not used for dynamics on cpu"):
        got = call()
    # the same noise; sums of four steps in another order
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    monkeypatch.setenv("MMEBM_BACKEND", "cpp")
    with pytest.raises(mmebm.BackendError, match="cpp: dynamics: it failed its parity case"):
        call()
    monkeypatch.undo()
    parity.clear()


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("op", FAULTS)
def test_a_fault_falls_back_with_one_warning_and_raises_where_asked_for(
    op: str, raises: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call, function, of = FAULTS[op]
    monkeypatch.setenv("MMEBM_BACKEND", "torch")
    expected = call("torch")
    if op == "noise":
        expected = noise.normal((4, 9), seed=5, step=2)
    monkeypatch.delenv("MMEBM_BACKEND")
    parity.clear()
    broken = _Extension(function, None if raises else of)
    monkeypatch.setattr(native, "cpu", lambda: broken)
    with pytest.warns(RuntimeWarning, match=f"cpp is not used for {op} on cpu.*backends --check") as caught:
        got = call("auto")
        assert torch.equal(got, expected)
        assert torch.equal(call("auto"), expected)
    assert len(caught) == 1
    reason = "the kernel is broken" if raises else "is off by|differ from the reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setenv("MMEBM_BACKEND", "cpp")
        with pytest.raises(mmebm.BackendError, match=f"cpp: {op}: it failed its parity case .*({reason})"):
            call("cpp")
        monkeypatch.delenv("MMEBM_BACKEND")
    # what is not broken goes on
    for other, (again, *_) in FAULTS.items():
        if other != op:
            again("cpp")
    assert main(["backends", "--check"]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if "FAILED" in line]
    assert len(lines) == len(native.cpu().isas()) and all(line.startswith(op) for line in lines)


@pytest.mark.parametrize("name", MORE)
def test_every_result_is_compared(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op, function, of = MORE[name]
    broken = _Extension(function, of, by=1e-3)
    monkeypatch.setattr(native, "cpu", lambda: broken)
    verdict = parity.check(op, "cpp", CPU)
    assert verdict.reason is not None
    assert parity.check(op, "cpp", CPU).reason == verdict.reason


def test_a_sampler_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(3, 4)
    energy = lambda x: x.cos().sum(1)
    expected = mmebm.Langevin(0.1, backend="torch").sample(energy, x, 3, seed=1).state
    broken = _Extension("step", FAULTS["langevin_step"][2])
    monkeypatch.setattr(native, "cpu", lambda: broken)
    with pytest.warns(RuntimeWarning, match="langevin_step"):
        out = mmebm.Langevin(0.1).sample(energy, x, 3, seed=1)
    assert out.info["backend"] == "torch" and "parity case" in out.info["reason"]
    assert torch.equal(out.state, expected)


def test_all_pass_here_and_the_command_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["backends", "--check"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if " passed " in line]
    for op in dispatch.OPS:
        for isa in native.cpu().isas():
            assert sum(line.split()[:4] == [op, "cpp", "cpu", isa] for line in lines) == 1


# -- the case is run once, in a context of its own


def test_one_case_for_two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, start, found = [], threading.Barrier(4), []
    real = parity.check

    def check(*arguments: Any) -> parity.Verdict:
        calls.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(parity, "check", check)

    def first_use() -> None:
        start.wait()
        found.append(_one_step("cpp"))

    threads = [threading.Thread(target=first_use) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(timeout=60)
    assert len(found) == 4 and all(torch.equal(found[0], other) for other in found)
    assert calls == [("langevin_step", "cpp", CPU, "auto", "")]
    # another instruction set is another implementation
    monkeypatch.setenv("MMEBM_CPU_ISA", "baseline")
    _one_step("cpp")
    _one_step("cpp")
    assert calls[1:] == [("langevin_step", "cpp", CPU, "generic", "")]


class _Forbidden(TorchDispatchMode):
    """No operation of torch may be seen from here."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} ran in the caller's mode")


def _vmapped(function: Callable[[], None]) -> None:
    torch.vmap(lambda t: (function(), t)[1])(torch.zeros(2, 3))


def _differentiated(function: Callable[[], None]) -> None:
    torch.func.grad(lambda t: (function(), t.sum())[1])(torch.zeros(3))


def _inside(context: Callable[[], Any]) -> Callable[[Callable[[], None]], None]:
    def run(function: Callable[[], None]) -> None:
        with context():
            function()

    return run


class _Default:
    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __enter__(self) -> None:
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *error: object) -> None:
        torch.set_default_dtype(self.before)


CONTEXTS: dict[str, Callable[[Callable[[], None]], None]] = {
    "inference": _inside(torch.inference_mode),
    "autocast": _inside(lambda: torch.autocast("cpu", torch.bfloat16)),
    "fake": _inside(FakeTensorMode),
    "mode": _inside(_Forbidden),
    "meta": _inside(lambda: torch.device("meta")),
    "vmap": _vmapped,
    "grad": _differentiated,
    "float64": _inside(lambda: _Default(torch.float64)),
    "bfloat16": _inside(lambda: _Default(torch.bfloat16)),
    "float16": _inside(lambda: _Default(torch.float16)),
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_the_caller_s_context_is_not_the_case_s(name: str) -> None:
    plain = {op: parity.check(op, "cpp", CPU) for op in parity.CASES}

    def all_ops() -> None:
        for op, verdict in plain.items():
            again = parity.check(op, "cpp", CPU)
            assert again[:2] == verdict[:2] and again.reason is None

    CONTEXTS[name](all_ops)


def test_functions_that_a_program_replaced_are_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference computes with them too; once they are torch's again, the case is run again."""
    plain = torch.tanh
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with monkeypatch.context() as patch:
            patch.setattr(torch, "tanh", lambda x: 0.5 * plain(x))
            assert "torch.tanh is not torch's own" in str(parity.failure("mlp_energy", "cpp", CPU))
        assert parity.failure("mlp_energy", "cpp", CPU) is None


def test_no_random_number_is_drawn() -> None:
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    for op in parity.CASES:
        assert parity.check(op, "cpp", CPU).reason is None
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert str(np.random.get_state()) == str(states[2])


def test_nothing_runs_at_import() -> None:
    code = "import mmebm; from mmebm.ops import parity; assert not parity._verdicts"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_child_of_a_fork_does_not_wait_for_its_parent_s_lock() -> None:
    code = """
import os, torch
from mmebm.ops import parity
with parity._lock:  # as if another thread were in the middle of a case
    child = os.fork()
    if child == 0:
        os._exit(0 if parity.failure("noise", "cpp", torch.device("cpu")) is None else 1)
    assert os.waitpid(child, 0)[1] == 0
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_an_instruction_set_that_is_not_here_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMEBM_CPU_ISA", "sse9")
    with pytest.raises(ValueError, match=r"MMEBM_CPU_ISA must be one of .*sse9"):
        _one_step("auto")


# -- the numbers of the case: nothing that a last bit decides


def test_no_decision_of_a_step_is_near() -> None:
    """Clips, bounds and stochastic rounding come out alike where every normal is moved by its tolerance."""
    numbers = parity._Numbers(1)
    for case in parity._step_cases(numbers):
        grad = [numbers.normal(*t.shape) for t in case.x]
        thresholds = step.TorchStepper(case.options).thresholds(case.x, 7, noise.ROUNDING)
        results = []
        for shift in (0.0, 2 * parity.NORMAL_TOLERANCE, -2 * parity.NORMAL_TOLERANCE):
            xi = [
                noise.normal(t.shape, seed=parity._SEED, step=7, stream=i, chain_offset=2**32 - 2) + shift
                for t, i in zip(case.x, case.options.streams, strict=True)
            ]
            y, stats = rule.langevin_step(
                case.x,
                grad,
                xi,
                case.params,
                outside=case.options.outside,
                observed=case.options.observed or None,
                thresholds=thresholds,
                stats=True,
            )
            assert stats is not None
            stays = [(a == b).flatten(1).all(1) for a, b in zip(case.x, y, strict=True)]
            narrow = [t for t in y if t.dtype != torch.float32]
            results.append([stats.clipped, *stays, *narrow])
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True)), case.name
        if case.options.outside == "reject":
            assert 0 < int(results[0][1].sum()) < 5  # both decisions are there


def test_no_kink_is_near(margin: Callable[..., Tensor]) -> None:
    numbers = parity._Numbers(2)
    terms = parity._terms(numbers)
    assert margin(numbers.normal(parity._CHAINS, 6), terms).min() > 1e-5
    numbers = parity._Numbers(3)
    terms = parity._terms(numbers)
    x = numbers.normal(parity._CHAINS, 6)
    for _, chain, steps in parity._chains(numbers, tuple(terms)):
        for k in range(steps):
            at = mlp.run_reference(replace(chain, freeze=False), x, k, 7).x if k else x
            assert margin(at, chain.terms).min() > 1e-5
