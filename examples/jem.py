"""JEM: a classifier as an energy-based model (Grathwohl et al., ICLR 2020), on 8x8 digits.

The logits f(x)[y] define E(x) = -logsumexp_y f(x)[y] and E(x | y) = -f(x)[y]. The loss is cross-entropy plus the
maximum likelihood of x, whose negatives are persistent chains in a replay buffer with a block of slots per class.
"""

from __future__ import annotations

import copy

import torch
from shared import compare, digits, options, picture
from torch import Tensor, nn

import mmebm
from mmebm import initial

STEPS, STEP_SIZE, NOISE = 20, 1.0, 0.01


def by_hand(net: nn.Module, x: Tensor) -> Tensor:
    """The loop that one call of ours replaces."""
    net.eval()
    x = x.detach().clone().requires_grad_()
    for _ in range(STEPS):
        gradient = torch.autograd.grad(net(x).logsumexp(1).sum(), x)[0]
        x.data += STEP_SIZE * gradient + NOISE * torch.randn_like(x)
    net.train()
    return x.detach()


class LogSumExp(nn.Module):
    """f(x) = log p(x) + const, or of one class per chain."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        logits = self.net(x)
        return logits.logsumexp(1) if y is None else logits.gather(1, y[:, None])[:, 0]


def main() -> None:
    o = options("JEM on 8x8 digits")
    x, y = digits("train", "optdigits")
    test_x, test_y = digits("test", "optdigits")
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU(), nn.Linear(256, 10))
    f = LogSumExp(net)
    sampler = mmebm.Langevin(STEP_SIZE, NOISE, log_prob=True)
    print(f"JEM: {STEPS} steps of {STEP_SIZE} with noise {NOISE}, temperature {sampler.implied_temperature:.0e}")

    iterations = 20 if o.quick else 2000
    buffer = mmebm.ReplayBuffer(5000, initial.uniform((1, 8, 8), -1, 1), reinit=0.05, classes=10, seed=o.seed)
    optimiser = torch.optim.Adam(net.parameters(), lr=3e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda k: 1 - k / iterations)
    for k in range(iterations):
        rows = torch.randint(len(x), (64,))
        real = x[rows] + 0.03 * torch.randn(64, 1, 8, 8)
        start, handle = buffer.draw(64, y[rows])
        fake = sampler.sample(f, start, STEPS, args=(y[rows],), seed=o.seed, first_step=k * STEPS).state
        buffer.write(handle, fake)

        logits = net(real)
        log_real, log_fake = logits.logsumexp(1), f(fake)
        loss = nn.functional.cross_entropy(logits, y[rows]) - log_real.mean() + log_fake.mean()
        loss = loss + 0.01 * (log_real.square().mean() + log_fake.square().mean())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if k % 500 == 0:
            print(f"iteration {k}: loss {loss.item():.3f}, log p gap {(log_real - log_fake).mean().item():.3f}")

    accuracy = (net(test_x).argmax(1) == test_y).float().mean()
    print(f"accuracy on {len(test_x)} test digits: {accuracy:.3f}")
    classes = torch.arange(10).repeat(8)
    start, _ = buffer.draw(80, classes)
    samples = sampler.sample(f, start, STEPS, args=(classes,), seed=o.seed + 1).state
    picture(samples, o.out / "jem.png")

    start, _ = buffer.draw(64)
    double = copy.deepcopy(f).double()
    ported = sampler.replace(rng="torch")
    compare(
        lambda: by_hand(net, start),
        lambda: sampler.sample(f, start, STEPS).state,
        lambda: by_hand(double.net, start.double()),
        lambda: ported.sample(double, start.double(), STEPS).state,
    )


if __name__ == "__main__":
    main()
