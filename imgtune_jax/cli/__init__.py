"""The `imgtune` command: train, cache, bench, eval, embed, search, classify, caption, info."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from imgtune_jax.cli import model_commands
from imgtune_jax.cli.config_commands import COMMANDS, run_with_config, train
from imgtune_jax.cli.config_flags import parse_flags
from imgtune_jax.cli.startup import (
    configure_process,
    escape_unencodable_output,
    report_user_errors,
)
from imgtune_jax.paths import user_path

__all__ = ["main", "parse_flags", "train"]

IMAGE_HELP = "image files, or folders of images (searched recursively, without hidden files)"
MODEL_HELP = "the folder of a run (its --workdir), or a folder that TunedModel.save wrote"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command in `argv` (default: sys.argv[1:]). Entry point of the console script."""
    escape_unencodable_output()
    arguments = list(sys.argv[1:] if argv is None else argv)
    for name, command in COMMANDS.items():  # absl, not argparse, parses --config.key=value
        words = name.split()
        if arguments[: len(words)] == words:
            return run_with_config([f"imgtune {name}", *arguments[len(words) :]], command)
    options = _build_parser().parse_args(arguments)
    configure_process()
    with report_user_errors():
        options.run(options)


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="imgtune", description="Tune an image tower together with a text model, and use both."
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    commands.add_parser(
        "train", help="train or resume a run: imgtune train --config=… --workdir=DIR"
    )
    commands.add_parser("cache", help="fill the feature cache: imgtune cache --config=…")
    bench = commands.add_parser("bench", help="measure the speed: imgtune bench data --config=…")
    bench.add_argument("what", choices=["data"], help="the input pipeline and the training step")
    _add_eval(commands)
    _add_embed(commands)
    _add_search(commands)
    _add_classify(commands)
    _add_caption(commands)
    info = _add_command(
        commands,
        "info",
        model_commands.info,
        "summarize a run: parameters, locking, checkpoints, feature cache, results",
    )
    info.add_argument("workdir", type=user_path, help="the run's folder")
    return parser


def _add_eval(commands: Any) -> None:
    parser = _add_command(
        commands,
        "eval",
        model_commands.evaluate,
        "run a trained model's evaluators and rewrite its report",
    )
    parser.add_argument("--workdir", type=user_path, required=True, help="the run's folder")
    parser.add_argument(
        "--step",
        type=int,
        help="a saved step (default: the newest); for an older one, the report is not rewritten",
    )
    parser.add_argument("--coordinator", help="HOST:PORT of process 0, if several processes run")
    parser.add_argument("--processes", type=int, help="the number of processes")
    parser.add_argument("--process", type=int, help="the number of this process, from 0")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="run only these evaluators of the config"
    )


def _add_embed(commands: Any) -> None:
    parser = _add_command(
        commands, "embed", model_commands.embed, "write the embeddings of images and texts as .npz"
    )
    parser.add_argument("--model", type=user_path, required=True, help=MODEL_HELP)
    parser.add_argument("--texts", type=user_path, help="a file with one text per line")
    parser.add_argument("--output", type=user_path, required=True, help="the new .npz file")
    parser.add_argument("images", type=user_path, nargs="*", help=IMAGE_HELP)


def _add_search(commands: Any) -> None:
    parser = _add_command(
        commands,
        "search",
        model_commands.search,
        "find the images that are most similar to a text or an image",
    )
    parser.add_argument("--model", type=user_path, required=True, help=MODEL_HELP)
    parser.add_argument("--query", required=True, help="a text, or the path of an image")
    parser.add_argument("-k", type=_count, default=5, help="number of results (default: 5)")
    parser.add_argument(
        "images", type=user_path, nargs="+", help=f"{IMAGE_HELP}, or one .npz written by `embed`"
    )


def _add_classify(commands: Any) -> None:
    parser = _add_command(
        commands,
        "classify",
        model_commands.classify,
        "classify images zero-shot among the given labels",
    )
    parser.add_argument("--model", type=user_path, required=True, help=MODEL_HELP)
    parser.add_argument("--labels", required=True, nargs="+", help="the labels to choose from")
    parser.add_argument(
        "--templates",
        nargs="+",
        default=["{}"],
        help='prompts around a label, such as "a photo of a {}."',
    )
    parser.add_argument("--images", type=user_path, required=True, nargs="+", help=IMAGE_HELP)


def _add_caption(commands: Any) -> None:
    parser = _add_command(
        commands, "caption", model_commands.caption, "generate captions of images"
    )
    parser.add_argument("--model", type=user_path, required=True, help=MODEL_HELP)
    parser.add_argument(
        "--language", help="a language of the training captions (default: the most frequent)"
    )
    parser.add_argument(
        "--n", type=_count, default=1, help="captions per image, best first (default: 1)"
    )
    parser.add_argument(
        "--beam", type=_count, default=1, help="width of the beam search (default: 1, greedy)"
    )
    parser.add_argument("images", type=user_path, nargs="+", help=IMAGE_HELP)


def _add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], None], summary: str
) -> argparse.ArgumentParser:
    description = f"{summary[0].upper()}{summary[1:]}."
    parser = commands.add_parser(name, help=summary, description=description)
    parser.set_defaults(run=run)
    parser.register("action", None, _StoreOnce)
    return parser


class _StoreOnce(argparse.Action):
    """Store the value of an option. A second value is an error, since it would hide the first."""

    is_given = False

    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        if self.is_given:
            parser.error(f"{option} is given twice; expected it once")
        self.is_given = option is not None
        setattr(namespace, self.dest, values)


def _count(text: str) -> int:
    """Return a number of at least 1. Raises the error that argparse reports."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; expected an integer of 1 or more")
    return int(text)
