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
    train.add_argument("--preset", default=None, help="demo (default), paper, polymnist-14, polymnist-5k; /VARIANT")
    train.add_argument("--name", help="folder below --runs; default: the preset's name, numbered if taken")
    train.add_argument("--runs", default="runs", help="folder of all runs (default: runs)")
    train.add_argument("--resume", metavar="RUN", help="go on with the run in this folder")
    train.add_argument("--seed", type=int, default=None, help="of weights, batches and noise (default: the preset's)")
    train.add_argument("--data-path", help="folder of a data set on disk, e.g. PolyMNIST with --data polymnist")
    train.add_argument("--data", help="data set instead of the preset's: digits, polymnist-5k, polymnist")
    train.add_argument("--threads", type=int, default=None, help="CPU threads (default: all cores)")
    train.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="change one field of the configuration, e.g. --set data_chain.steps=60",
    )
    device(train)

    ablate = commands.add_parser(
        "ablate", help="train variants of a preset with several seeds, into one table",
        description="Train variants of a preset with several seeds and write one table.",
    )  # fmt: skip
    ablate.add_argument("--preset", default="demo", help="what the variants change (default: demo)")
    ablate.add_argument(
        "--variants",
        nargs="+",
        default=["components"],
        metavar="NAME",
        help="variants or grids of them: components (default), levers, starts, baselines, study",
    )
    ablate.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="default: 0 1")
    ablate.add_argument("--out", default="runs/ablation", help="folder of the runs and the table")
    ablate.add_argument("--scale", type=float, default=1.0, help="times the iterations of every stage (default: 1)")
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
        "--mode",
        default="data",
        choices=("decode", "latent", "data"),
        help="with --given: decode the inferred z; revise it first; revise the missing modalities too (default)",
    )
    sample.add_argument("--given", nargs="+", metavar="MODALITY", help="condition on these modalities of real tuples")
    sample.add_argument("--split", default="test", choices=("train", "test"), help="where --given takes them from")
    sample.add_argument(
        "--steps",
        type=_steps,
        default=None,
        help="steps of the data chain (default: as configured for samples); auto: until the mean energy is that of "
        "real tuples",
    )
    _prior_steps(sample)
    sample.add_argument("--seed", type=int, default=0, help="of the samples (default: 0)")
    device(sample)

    evaluate = commands.add_parser("evaluate", help="the numbers of a run", description="Print and write metrics.json.")
    evaluate.add_argument("run", help="the run's folder")
    evaluate.add_argument("--n", type=int, default=2000, help="samples per point (default: 2000)")
    evaluate.add_argument(
        "--steps", type=int, default=None, help="steps of the data chain (default: as configured for samples)"
    )
    _prior_steps(evaluate)
    evaluate.add_argument("--seed", type=int, default=0, help="of the samples (default: 0)")
    device(evaluate)

    more = evaluate.add_argument_group("more, each for its time")
    more.add_argument(
        "--features",
        nargs="+",
        default=[],
        metavar="NETWORK",
        help="distances on images by lite0 (the package is in the extra 'features') or by inception:FILE, your weights",
    )
    more.add_argument("--pairs", action="store_true", help="every modality from every single one, also itself")
    more.add_argument("--sweep", action="store_true", help="against the steps of the data chain: 0 to 100")
    more.add_argument("--latent", action="store_true", help="classes read off z, before and after the latent chain")
    more.add_argument("--likelihood", action="store_true", help="log p(X) of the generator, by annealing")

    report = commands.add_parser(
        "report", help="a run on one HTML page", description="Write report.html: numbers, pictures, configuration."
    )
    report.add_argument("run", help="the run's folder")
    report.add_argument("--out", default=None, help="the file to write (default: report.html in the run's folder)")
    report.add_argument("--mixing", action="store_true", help="examine the mixing of both chains (minutes; kept)")
    report.add_argument("--chains", type=int, default=64, help="with --mixing: chains per start (default: 64)")
    report.add_argument("--long", type=int, default=2000, help="with --mixing: steps of the long chains")
    report.add_argument("--seed", type=int, default=0, help="of the samples shown (default: 0)")
    device(report)

    backends = commands.add_parser(
        "backends", help="what can run here, and why not", description="Versions and backends."
    )
    backends.add_argument(
        "--check", action="store_true", help="compare every implementation of every op with the reference, a line each"
    )
    return top


def _prior_steps(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prior-steps", type=int, default=None,
        help="steps of the latent prior's chain (default: as configured for samples)",
    )  # fmt: skip


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
        if arguments.command == "report":
            from mmebm.cli.report import report

            return report(arguments)
        from mmebm.backends import check, describe

        print("\n".join(describe()))
        return check() if arguments.check else 0
    except (ValueError, TypeError, OSError, ModuleNotFoundError, RuntimeError) as error:
        print(f"mmebm {arguments.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"mmebm {arguments.command}: interrupted", file=sys.stderr)
        return 130
