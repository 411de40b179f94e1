"""`imgtune train | cache | bench | eval | embed | search | classify | caption | info`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from imgtune_jax.cli import model_commands
from imgtune_jax.cli.config_commands import COMMANDS, parse_flags, run_with_config, train
from imgtune_jax.cli.startup import configure_process, report_user_errors

__all__ = ["main", "parse_flags", "train"]

IMAGE_HELP = "image files, or folders of images (searched recursively)"
MODEL_HELP = "a run's folder (as --workdir), or one that TunedModel.save wrote"


def main(argv: Sequence[str] | None = None) -> None:
    """Entry of the console script."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for command, entry in COMMANDS.items():  # absl parses --config.key=value
        n = len(command.split())
        if arguments[:n] == command.split():
            return run_with_config([f"imgtune {command}", *arguments[n:]], entry)
    options = _parser().parse_args(arguments)
    configure_process()
    with report_user_errors():
        options.run(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="imgtune", description="Tune an image tower and a text tower together, and use them."
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    commands.add_parser("train", help="train, or resume: imgtune train --config=… --workdir=DIR")
    commands.add_parser("cache", help="compute locked towers ahead: imgtune cache --config=…")
    p = commands.add_parser("bench", help="time a training: imgtune bench data --config=…")
    p.add_argument("what", choices=["data"], help="its input, and what limits it")

    p = _command(
        commands,
        "eval",
        model_commands.evaluate,
        "run a trained model's evaluators and rewrite its report",
    )
    p.add_argument("--workdir", required=True, help="the run's folder")
    p.add_argument("--step", type=int, help="a saved step; default: the newest")
    p.add_argument("--only", nargs="+", metavar="NAME", help="these of the config's evaluators")

    p = _command(
        commands, "embed", model_commands.embed, "write embeddings of images and texts as .npz"
    )
    p.add_argument("--model", required=True, help=MODEL_HELP)
    p.add_argument("--texts", type=Path, help="a file with one text a line")
    p.add_argument("--output", type=Path, required=True, help=".npz to write")
    p.add_argument("images", nargs="*", help=IMAGE_HELP)

    p = _command(
        commands,
        "search",
        model_commands.search,
        "find the images that fit a text or another image",
    )
    p.add_argument("--model", required=True, help=MODEL_HELP)
    p.add_argument("--query", required=True, help="a text, or an image's path")
    p.add_argument("-k", type=int, default=5, help="how many results (default 5)")
    p.add_argument("images", nargs="+", help=f"{IMAGE_HELP}, or one .npz written by `embed`")

    p = _command(
        commands,
        "classify",
        model_commands.classify,
        "name what is in images, among labels you give",
    )
    p.add_argument("--model", required=True, help=MODEL_HELP)
    p.add_argument("--labels", required=True, nargs="+", help="the labels to choose from")
    p.add_argument("--templates", nargs="+", default=["{}"], help='e.g. "a photo of a {}."')
    p.add_argument("--images", required=True, nargs="+", help=IMAGE_HELP)

    p = _command(commands, "caption", model_commands.caption, "write captions of images")
    p.add_argument("--model", required=True, help=MODEL_HELP)
    p.add_argument("--language", help="one that the model was trained on; default: its main one")
    p.add_argument("--n", type=int, default=1, help="captions an image, best first (default 1)")
    p.add_argument("--beam", type=int, default=1, help="hypotheses to keep (default 1: greedy)")
    p.add_argument("images", nargs="+", help=IMAGE_HELP)

    p = _command(
        commands,
        "info",
        model_commands.describe,
        "what a run is: parameters, locking, checkpoints, results",
    )
    p.add_argument("workdir", help="the run's folder")
    return parser


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], None], what: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=what, description=what[0].upper() + what[1:] + ".")
    parser.set_defaults(run=run)
    return parser
