"""The net ops in Triton on a GPU: against float64, as a captured graph, and what "auto" says.

``python -m pytest -m gpu``; skipped with the reason where there is no CUDA device.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import mmebm
from mmebm.energies.trace import trace
from mmebm.ops import langevin_mlp as mlp
from mmebm.ops import parity
from mmebm.ops.common.params import StepParams
from mmebm.ops.net import op, reference
from mmebm.ops.net.graph import Net

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: torch.cuda.is_available() is False"),
]
if torch.cuda.is_available():
    from mmebm.ops.net import triton as room

DEVICE = torch.device("cuda")
SHAPE = (3, 17, 14)
# as in tests/ops/net/test_triton_interpret.py
FLOAT_TOLERANCE = 5e-7


def narrow() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 12, 4, 2, 1),
        nn.SiLU(),
        nn.Conv2d(12, 20, 3),
        nn.SiLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(20 * 3 * 2, 32),
        nn.Tanh(),
        nn.Linear(32, 1),
    )


@pytest.fixture
def net(seed: int, monkeypatch: pytest.MonkeyPatch) -> Net:
    torch.manual_seed(seed)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return trace(narrow().to(DEVICE), torch.randn(2, *SHAPE, device=DEVICE)).net


def chain_of(net: Net, chains: int, **options: object) -> op.NetChain:
    width = int(torch.Size(SHAPE).numel())
    table = mlp.constants_of([[StepParams(3.0, 0.1, grad_clip=0.5, low=-3.0)]], chains, torch.float32, DEVICE)
    assert not isinstance(table, str)
    return op.NetChain(
        net=net,
        widths=(width,),
        streams=(0,),
        noisy=(True,),
        moving=(True,),
        constants=table[0],
        present=table[1],
        seed=11,
        **options,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("name", ["net_energy", "langevin_net"])
def test_parity(name: str) -> None:
    verdict = parity.check(name, "triton", DEVICE)
    assert verdict.reason is None, verdict


@pytest.mark.parametrize("chains", [1, 7, 1000])
def test_energy_and_gradient(net: Net, chains: int) -> None:
    x = torch.randn(chains, int(torch.Size(SHAPE).numel()), device=DEVICE)
    single, exact = (
        reference.energy_and_gradient(x, net),
        reference.energy_and_gradient(x.double(), parity._double(net)),
    )
    for _ in range(3):  # as launches, captured, replayed
        for a, b, c in zip(room.energy_and_gradient(net, x), single, exact, strict=True):
            assert float((a.double() - c).abs().max()) <= parity.limit(b, c, 0.0, FLOAT_TOLERANCE)


@pytest.mark.parametrize("precision", ["fp32", "tf32x3"])
@pytest.mark.parametrize("freeze", [False, True])
def test_chain_is_one_graph_a_step(net: Net, precision: mlp.Precision, freeze: bool) -> None:
    room._workspaces.clear()
    chain = chain_of(net, 64, precision=precision, freeze=freeze)
    x = torch.randn(64, chain.widths[0], device=DEVICE)
    ours, exact = room.run(chain, x, 5, 3), op.run(None, parity._double(chain), x.double(), 5, 3)
    single = op.run(None, chain, x, 5, 3)
    (workspace,) = room._workspaces.values()
    assert type(workspace.graph.__self__).__name__ == "CUDAGraph"
    allowed = parity.limit(single.x, exact.x, 5 * parity.NORMAL_TOLERANCE * 0.1, 4 * FLOAT_TOLERANCE)
    assert float((ours.x.double() - exact.x).abs().max()) <= allowed
    # other numbers, the same graph: equal to launches one by one
    again = room.run(replace(chain, seed=5), x + 1, 4, 0).x
    workspace.graph = workspace.launch
    assert torch.equal(room.run(replace(chain, seed=5), x + 1, 4, 0).x, again)


def test_auto(seed: int) -> None:
    x = torch.randn(64, 3, 16, 16, device=DEVICE)
    small = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.SiLU(), nn.Flatten(), nn.Linear(256, 1)).to(DEVICE)
    out = mmebm.Langevin(0.1).sample(small, x, 3, seed=seed)
    assert (out.info["op"], out.info["backend"]) == ("langevin_net", "triton"), out.info["reason"]
    wide = nn.Sequential(
        nn.Conv2d(3, 256, 3, 1, 1), nn.SiLU(), nn.Conv2d(256, 256, 3, 2, 1), nn.Flatten(), nn.Linear(256 * 64, 1)
    ).to(DEVICE)
    assert "cuDNN" in mmebm.Langevin(0.1).sample(wide, x, 3, seed=seed).info["reason"]
