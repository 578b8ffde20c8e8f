"""Arguments of the command line; each command's work stands in its own module, imported when it runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def parser() -> argparse.ArgumentParser:
    """The argument parser of all commands."""
    top = argparse.ArgumentParser(
        prog="mmebm", description="Multimodal energy-based models with fused Langevin samplers."
    )
    commands = top.add_subparsers(dest="command", required=True)

    def device(p: argparse.ArgumentParser) -> None:
        p.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="default: cuda if any")

    train = commands.add_parser("train", help="train a model and evaluate it", description="Train, draw, evaluate.")
    train.add_argument("--preset", default=None, help="demo (default), paper, polymnist-5k; or PRESET/VARIANT")
    train.add_argument("--name", help="folder below --runs; default: the preset's name, numbered if taken")
    train.add_argument("--runs", default="runs", help="folder of all runs (default: runs)")
    train.add_argument("--resume", metavar="RUN", help="go on with the run in this folder")
    train.add_argument("--seed", type=int, default=None, help="of weights, batches and noise (default: the preset's)")
    train.add_argument("--data-path", help="folder of a data set on disk, e.g. PolyMNIST with --data polymnist")
    train.add_argument("--data", help="data set instead of the preset's: digits, polymnist-5k, polymnist")
    train.add_argument("--threads", type=int, default=None, help="CPU threads (default: all cores)")
    train.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE",
        help="change one field of the configuration, e.g. --set data_chain.steps=60",
    )
    device(train)

    ablate = commands.add_parser(
        "ablate", help="train variants of a preset with several seeds, into one table",
        description="Train variants of a preset with several seeds and write one table.",
    )  # fmt: skip
    ablate.add_argument("--preset", default="demo", help="what the variants change (default: demo)")
    ablate.add_argument(
        "--variants", nargs="+", default=["components"], metavar="NAME",
        help="variants or grids of them: components (default), levers, starts, baselines, study",
    )
    ablate.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="default: 0 1")
    ablate.add_argument("--out", default="runs/ablation", help="folder of the runs and the table")
    ablate.add_argument("--n", type=int, default=2000, help="samples per point (default: 2000)")
    ablate.add_argument("--data", help="data set instead of the preset's")
    ablate.add_argument("--data-path", help="its folder")
    ablate.add_argument("--threads", type=int, default=None, help="CPU threads (default: all cores)")
    ablate.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="as in train")
    device(ablate)

    sample = commands.add_parser("sample", help="draw samples from a run", description="Draw into an .npz file.")
    sample.add_argument("run", help="the run's folder")
    sample.add_argument("--n", type=int, default=1000, help="number of tuples (default: 1000)")
    sample.add_argument("--out", default="samples.npz", help="the .npz file to write (default: samples.npz)")
    sample.add_argument(
        "--point", default="xk", choices=("vae", "frozen", "x0", "xk"),
        help="VAE after the warm-up; an energy's chain on top of it, where one was trained; generator; its revision by "
        "Langevin (default)",
    )  # fmt: skip
    sample.add_argument("--start", help="where the data chain starts, e.g. generator, noise, independent (default: as "
                                        "trained)")  # fmt: skip
    sample.add_argument(
        "--mode", default="data", choices=("decode", "latent", "data"),
        help="with --given: decode the inferred z; revise it first; revise the missing modalities too (default)",
    )
    sample.add_argument("--given", nargs="+", metavar="MODALITY", help="condition on these modalities of real tuples")
    sample.add_argument("--split", default="test", choices=("train", "test"), help="where --given takes them from")
    sample.add_argument(
        "--steps", type=_steps, default=None,
        help="steps of the data chain (default: as trained); auto: until the mean energy is that of real tuples",
    )
    sample.add_argument("--seed", type=int, default=0, help="of the samples (default: 0)")
    device(sample)

    evaluate = commands.add_parser("evaluate", help="the numbers of a run", description="Print and write metrics.json.")
    evaluate.add_argument("run", help="the run's folder")
    evaluate.add_argument("--n", type=int, default=2000, help="samples per point (default: 2000)")
    evaluate.add_argument("--steps", type=int, default=None, help="steps of the data chain (default: as trained)")
    evaluate.add_argument("--seed", type=int, default=0, help="of the samples (default: 0)")
    device(evaluate)

    commands.add_parser("backends", help="what can run here, and why not", description="Versions and backends.")
    return top


def _steps(text: str) -> int | str:
    return text if text == "auto" else int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, 1 for an error the user can mend, 130 after Ctrl-C."""
    arguments = parser().parse_args(argv)
    try:
        if arguments.command == "train":
            from mmebm.cli.train import train

            return train(arguments)
        if arguments.command == "ablate":
            from mmebm.cli.ablate import ablate

            return ablate(arguments)
        if arguments.command == "sample":
            from mmebm.cli.sample import sample

            return sample(arguments)
        if arguments.command == "evaluate":
            from mmebm.cli.evaluate import evaluate

            return evaluate(arguments)
        from mmebm.backends import describe

        print("\n".join(describe()))
        return 0
    except (ValueError, TypeError, FileNotFoundError, ModuleNotFoundError, RuntimeError) as error:
        print(f"mmebm {arguments.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"mmebm {arguments.command}: interrupted", file=sys.stderr)
        return 130
