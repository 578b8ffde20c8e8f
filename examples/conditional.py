"""Two modalities, one observed: 14x14 MNIST and the digit's word, under one joint energy.

A joint energy of (image, word) is trained once. Observing the word draws its images; observing the image draws its
word: the same call with another ``observed``.
"""

from __future__ import annotations

import copy

import torch
from shared import compare, digits, options, picture
from torch import Tensor, nn

import mmebm
import mmebm.energies
from mmebm import initial
from mmebm.data import load

STEPS = 40
STEP_SIZE = {"mnist": 10.0, "word": 10.0}
NOISE = {"mnist": 0.005, "word": 0.05}
CLIP = 0.01


class Joint(nn.Module):
    """E(image, word), an MLP of both."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mmebm.energies.MLP(206, (256, 256), "silu")

    def forward(self, state: dict[str, Tensor]) -> Tensor:
        return self.net(torch.cat([state["mnist"].flatten(1), state["word"]], dim=1))


def by_hand(energy: nn.Module, state: dict[str, Tensor], observed: str) -> dict[str, Tensor]:
    """The loop that one call of ours replaces."""
    energy.eval()
    state = {name: t.detach().clone() for name, t in state.items()}
    for _ in range(STEPS):
        for name in state:
            if name != observed:
                x = state[name].requires_grad_()
                gradient = torch.autograd.grad(energy(state).sum(), x)[0].clamp(-CLIP, CLIP)
                x = x.detach() - STEP_SIZE[name] * gradient + NOISE[name] * torch.randn_like(x)
                state[name] = x.clamp(-1, 1)
    energy.train()
    return state


def nearest_class(images: Tensor, train: Tensor, labels: Tensor) -> Tensor:
    return labels[torch.cdist(images.flatten(1), train.flatten(1)).argmin(1)]


def main() -> None:
    o = options("conditional sampling of image and word")
    data, test = load("digits", "train", size=14, seed=o.seed), load("digits", "test", size=14, seed=o.seed)
    energy = Joint()
    sampler = mmebm.Langevin(STEP_SIZE, NOISE, grad_clip=CLIP, bounds=(-1, 1))
    print(f"joint EBM: {STEPS} steps, temperatures {sampler.implied_temperature}")

    iterations = 20 if o.quick else 2000
    start_of = initial.each({"mnist": initial.uniform((1, 14, 14), -1, 1), "word": initial.uniform((10,), -1, 1)})
    buffer = mmebm.ReplayBuffer(10_000, start_of, reinit=0.05, seed=o.seed)
    optimiser = torch.optim.Adam(energy.parameters(), lr=1e-3, betas=(0.0, 0.999))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda k: 1 - k / iterations)
    for k in range(iterations):
        rows = torch.randint(len(data), (128,))
        batch = data.batch(rows)
        real = {name: batch[name] + 0.05 * torch.randn_like(batch[name]) for name in ("mnist", "word")}
        start, handle = buffer.draw(128)
        fake = sampler.sample(energy, start, STEPS, seed=o.seed, first_step=k * STEPS).state
        buffer.write(handle, fake)
        e_real, e_fake = energy(real), energy(fake)
        loss = e_real.mean() - e_fake.mean() + 0.1 * (e_real.square().mean() + e_fake.square().mean())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if k % 500 == 0:
            print(f"iteration {k}: loss {loss.item():.5f}, energy gap {(e_real - e_fake).mean().item():.5f}")

    classes = torch.arange(10).repeat(8)
    # from noise: a chain as cold as this one does not leave the digit that it starts from
    given = {"mnist": 2 * torch.rand(80, 1, 14, 14) - 1, "word": torch.eye(10)[classes] * 2 - 1}
    images = sampler.sample(energy, given, 10 * STEPS, observed={"word"}).state["mnist"]
    train, labels = digits("train")
    right = (nearest_class(images, train, labels) == classes).float().mean()
    print(f"images drawn from words: {right:.2f} of the class (by the nearest train digit)")
    picture(images, o.out / "conditional.png")

    batch = test.batch(torch.arange(500))
    given = {"mnist": batch["mnist"], "word": torch.zeros(500, 10)}
    words = sampler.sample(energy, given, 10 * STEPS, observed={"mnist"}).state["word"]
    print(f"words drawn from test images: {(words.argmax(1) == test.labels[:500]).float().mean():.2f} right")

    double, state = copy.deepcopy(energy).double(), {"mnist": batch["mnist"][:128], "word": torch.zeros(128, 10)}
    state64 = {name: t.double() for name, t in state.items()}
    ported = sampler.replace(rng="torch")
    compare(
        lambda: by_hand(energy, state, "mnist"),
        lambda: sampler.sample(energy, state, STEPS, observed={"mnist"}).state,
        lambda: by_hand(double, state64, "mnist"),
        lambda: ported.sample(double, state64, STEPS, observed={"mnist"}).state,
    )


if __name__ == "__main__":
    main()
