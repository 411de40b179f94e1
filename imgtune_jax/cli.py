"""`imgtune train | cache | bench | eval | embed | search | classify | caption | info`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

IMAGE_HELP = "image files, or folders of images (searched recursively)"
MODEL_HELP = "a run's folder (as --workdir), or one that TunedModel.save wrote"

TRAIN_HELP = """\
usage: imgtune train --config=FILE.py[:ARG] --workdir=DIR [--config.KEY=VALUE ...]

Train, or go on training: the same command resumes the run in DIR.

  --config=FILE.py       the experiment, e.g. configs/lit_emoji.py; ARG goes to its get_config
  --workdir=DIR          where checkpoints, metrics and report.html go
  --config.KEY=VALUE     change a setting: --config.batch_size=64 --config.lock.image=False
                         (all keys and their defaults: configs/base.py)
"""

CACHE_HELP = """\
usage: imgtune cache --config=FILE.py[:ARG] [--config.KEY=VALUE ...]

Compute what the locked towers give on the training data, ahead of training. Not needed: training
fills the cache on its way. Stopped, the same command goes on. Settings as for imgtune train.
"""

BENCH_HELP = """\
usage: imgtune bench data --config=FILE.py[:ARG] [--config.KEY=VALUE ...]

Time a training's input, stage by stage, and its step, and say which limits it. Writes nothing.
"""


def train(argv: Sequence[str] | None = None) -> None:
    """Entry of `train.py` and `imgtune train`: flags → config → train.loop.run → report."""
    _with_config(list(sys.argv if argv is None else argv), TRAIN_HELP, _train, ["workdir"])


def _with_config(
    arguments: list[str], usage: str, run: Callable[[Any], None], required: Sequence[str] = ()
) -> None:
    from absl import app, flags

    if {"-h", "--help"} & set(arguments):
        print(usage)
        return
    parse = partial(parse_flags, flags.FLAGS, required=required)

    def main(rest: Sequence[str]) -> None:
        if len(rest) > 1:
            raise SystemExit(f"unknown arguments {rest[1:]}; settings look like --config.seed=1")
        _set_up()
        with _clear_errors():
            run(flags.FLAGS)

    app.run(main, argv=arguments, flags_parser=parse)


def parse_flags(values: Any, arguments: list[str], *, required: Sequence[str] = ()) -> list[str]:
    """Set absl's `values.config` and `values.workdir`; return what is left of the arguments.

    Raises SystemExit with one message when the config's file, or a key, does not exist.
    """
    from absl import flags
    from ml_collections import config_flags

    example = "the experiment, e.g. configs/lit_emoji.py"
    config_flags.DEFINE_config_file("config", None, example, flag_values=values, sys_argv=arguments)
    flags.DEFINE_string("workdir", None, "this run's folder; a run in it is resumed", values)
    flags.mark_flags_as_required(["config", *required], values)
    for argument in arguments:
        if argument.startswith("--config="):
            path = argument.removeprefix("--config=").partition(":")[0]
            if not Path(path).is_file():
                raise SystemExit(f"imgtune: no config at {path!r}; try configs/debug.py")
    try:
        return values(arguments)
    except (flags.Error, AttributeError, KeyError, SyntaxError, TypeError, ValueError) as error:
        raise SystemExit(f"imgtune: {' '.join(str(error).split())}") from None


def _train(given: Any) -> None:
    import jax

    from imgtune_jax import cache, config, report
    from imgtune_jax.train import loop

    workdir = Path(given.workdir)
    encoders = loop.run(config.parse(given.config), workdir, make_feed=cache.feed)
    page = report.report_run(workdir, encoders)
    if jax.process_index() == 0:
        print(f"\n{report.summary(workdir)}\n\nReport: {page}")


def _cache(given: Any) -> None:
    from imgtune_jax import cache, config, data
    from imgtune_jax.train import experiment, lock, setup

    exp = experiment.build(config.parse(given.config))
    pipeline = setup.training_pipeline(exp, data.build_source(exp.config.data.source))
    locked = lock.split(exp.init_params(), exp.is_frozen)[1]
    for tower, store in cache.build(exp, locked, pipeline).items():
        print(f"{tower}: {store.computed} rows, {store.bytes / 1e6:.1f} MB in {store.folder}")


def _bench(given: Any) -> None:
    from imgtune_jax import bench, config

    c = config.parse(given.config)
    print(bench.describe(bench.measure(c), c))


def main(argv: Sequence[str] | None = None) -> None:
    """Entry of the console script."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    with_config = {
        "train": (TRAIN_HELP, _train, ["workdir"]),
        "cache": (CACHE_HELP, _cache, []),
        "bench data": (BENCH_HELP, _bench, []),
    }
    for command, entry in with_config.items():  # absl parses --config.key=value
        n = len(command.split())
        if arguments[:n] == command.split():
            return _with_config([f"imgtune {command}", *arguments[n:]], *entry)
    options = _parser().parse_args(arguments)
    _set_up()
    with _clear_errors():
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

    p = _command(commands, "eval", _eval, "run a trained model's evaluators and rewrite its report")
    p.add_argument("--workdir", required=True, help="the run's folder")
    p.add_argument("--step", type=int, help="a saved step; default: the newest")
    p.add_argument("--only", nargs="+", metavar="NAME", help="these of the config's evaluators")

    p = _command(commands, "embed", _embed, "write embeddings of images and texts as .npz")
    p.add_argument("--model", required=True, help=MODEL_HELP)
    p.add_argument("--texts", type=Path, help="a file with one text a line")
    p.add_argument("--output", type=Path, required=True, help=".npz to write")
    p.add_argument("images", nargs="*", help=IMAGE_HELP)

    p = _command(commands, "search", _search, "find the images that fit a text or another image")
    p.add_argument("--model", required=True, help=MODEL_HELP)
    p.add_argument("--query", required=True, help="a text, or an image's path")
    p.add_argument("-k", type=int, default=5, help="how many results (default 5)")
    p.add_argument("images", nargs="+", help=f"{IMAGE_HELP}, or one .npz written by `embed`")

    p = _command(commands, "classify", _classify, "name what is in images, among labels you give")
    p.add_argument("--model", required=True, help=MODEL_HELP)
    p.add_argument("--labels", required=True, nargs="+", help="the labels to choose from")
    p.add_argument("--templates", nargs="+", default=["{}"], help='e.g. "a photo of a {}."')
    p.add_argument("--images", required=True, nargs="+", help=IMAGE_HELP)

    p = _command(commands, "caption", _caption, "write captions of images")
    p.add_argument("--model", required=True, help=MODEL_HELP)
    p.add_argument("--language", help="one that the model was trained on; default: its main one")
    p.add_argument("--n", type=int, default=1, help="captions an image, best first (default 1)")
    p.add_argument("--beam", type=int, default=1, help="hypotheses to keep (default 1: greedy)")
    p.add_argument("images", nargs="+", help=IMAGE_HELP)

    p = _command(
        commands, "info", _info, "what a run is: parameters, locking, checkpoints, results"
    )
    p.add_argument("workdir", help="the run's folder")
    return parser


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], None], what: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=what, description=what[0].upper() + what[1:] + ".")
    parser.set_defaults(run=run)
    return parser


def _eval(options: argparse.Namespace) -> None:
    from imgtune_jax import api, evals, report

    workdir = Path(options.workdir)
    model = api.load(workdir, step=options.step, keep=True)
    config = model.experiment.config
    chosen = options.only or list(config.evals)
    if unknown := sorted(set(chosen) - set(config.evals)):
        raise ValueError(f"no evaluator {unknown}; the run has: {', '.join(config.evals)}")
    # A limit is for judging while training: here all of a data set counts.
    whole = {n: {k: v for k, v in config.evals[n].items() if k != "limit"} for n in chosen}
    for name, evaluator in model.experiment.evaluators(whole).items():
        values = evaluator(model.encoders)
        record = evals.result_record(name, evaluator, values, model=config.name, step=model.step)
        evals.append_result(workdir / "results.jsonl", record)
    page = report.report_run(workdir, model.encoders)
    print(f"{report.summary(workdir)}\n\nReport: {page}")


def _embed(options: argparse.Namespace) -> None:
    import numpy as np

    from imgtune_jax import api

    if not options.images and options.texts is None:
        raise ValueError("nothing to embed; give images, or --texts FILE")
    model = api.load(options.model)
    arrays: dict[str, Any] = {}
    if options.images:
        paths = _image_paths(options.images)
        arrays["image_features"] = model.encode_image(paths)
        arrays["image_paths"] = np.array([str(p) for p in paths])
    if options.texts is not None:
        texts = options.texts.read_text(encoding="utf8").splitlines()
        arrays["text_features"] = model.encode_text(texts)
        arrays["texts"] = np.array(texts)
    np.savez(options.output, **arrays)
    print(f"{options.output}: " + ", ".join(f"{k} {v.shape}" for k, v in arrays.items()))


def _search(options: argparse.Namespace) -> None:
    import numpy as np

    from imgtune_jax import api

    model = api.load(options.model)
    if len(options.images) == 1 and options.images[0].endswith(".npz"):
        with np.load(options.images[0]) as stored:
            if "image_features" not in stored:
                raise ValueError(f"{options.images[0]} holds no image_features; see imgtune embed")
            names, gallery = list(stored["image_paths"]), stored["image_features"]
    else:
        names = _image_paths(options.images)
        gallery = model.encode_image(names)
    for hit in model.search(options.query, gallery, k=options.k):
        print(f"{hit.score:.3f}  {names[hit.index]}")


def _classify(options: argparse.Namespace) -> None:
    from imgtune_jax import api

    paths = _image_paths(options.images)
    found = api.load(options.model).classify(paths, options.labels, options.templates)
    for path, labels in zip(paths, found, strict=True):
        print(f"{path}: " + ", ".join(f"{x.name} {x.probability:.1%}" for x in labels))


def _caption(options: argparse.Namespace) -> None:
    from imgtune_jax import api

    paths = _image_paths(options.images)
    model = api.load(options.model)
    found = model.caption(paths, language=options.language, n=options.n, beam=options.beam)
    for path, captions in zip(paths, found, strict=True):
        if options.n == 1:
            print(f"{path}: {captions[0].text}")
        else:
            print(path, *(f"{c.score:8.3f}  {c.text}" for c in captions), sep="\n")


def _info(options: argparse.Namespace) -> None:
    from imgtune_jax import info

    print(info.describe(Path(options.workdir)))


def _image_paths(given: Sequence[str]) -> list[Path]:
    from imgtune_jax.api import IMAGE_SUFFIXES

    paths: list[Path] = []
    for path in map(Path, given):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
            if not inside:
                raise ValueError(f"{path} holds no image ({', '.join(IMAGE_SUFFIXES)})")
            paths += inside
        elif path.is_file():
            paths.append(path)
        else:
            raise FileNotFoundError(f"no image or folder at {path}")
    return paths


def _set_up() -> None:
    import jax

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("imgtune_jax").setLevel(logging.INFO)
    logging.getLogger("jax").setLevel(logging.WARNING)
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns of every read-only folder
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "imgtune_jax" / "xla"
    jax.config.update(
        "jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR", str(default))
    )


class _clear_errors:
    """A user's mistake ends in one message, not in a traceback; anything else stays loud."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        from imgtune_jax.data import TooManyBadRecords
        from imgtune_jax.train.loop import NotFiniteError

        users = (ValueError, FileNotFoundError, FileExistsError, TooManyBadRecords, NotFiniteError)
        if isinstance(error, users) and not os.environ.get("IMGTUNE_TRACEBACK"):
            raise SystemExit(f"imgtune: {error}\n(IMGTUNE_TRACEBACK=1 shows where)") from None
