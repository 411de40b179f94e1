"""Commands on an experiment, `train`, `cache`, `bench`: their flags are the config's keys."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from imgtune_jax.cli.startup import configure_process, report_user_errors

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


@dataclass(frozen=True)
class Command:
    """A command: what --help prints, what it does with the flags, and those besides the config."""

    usage: str
    run: Callable[[Any], None]
    required: tuple[str, ...] = ()


def train(argv: Sequence[str] | None = None) -> None:
    """Entry of `train.py` and `imgtune train`: flags → config → train.loop.run → report."""
    run_with_config(list(sys.argv if argv is None else argv), COMMANDS["train"])


def run_with_config(arguments: list[str], command: Command) -> None:
    """Parse absl's flags, the program's name before them, and run the command."""
    from absl import app, flags

    if {"-h", "--help"} & set(arguments):
        print(command.usage)
        return
    parse = partial(parse_flags, flags.FLAGS, required=command.required)

    def main(rest: Sequence[str]) -> None:
        if len(rest) > 1:
            raise SystemExit(f"unknown arguments {rest[1:]}; settings look like --config.seed=1")
        configure_process()
        with report_user_errors():
            command.run(flags.FLAGS)

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
            # A config imports its neighbours, `from configs import base`, from wherever it is run.
            sys.path[:0] = [str(Path.cwd()), str(Path(path).resolve().parent.parent)]
    try:
        return values(arguments)
    except (
        flags.Error,
        AttributeError,
        ImportError,
        LookupError,
        SyntaxError,
        TypeError,
        ValueError,
    ) as error:
        raise SystemExit(f"imgtune: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    """On one line. Of an unknown key, ml_collections raises a KeyError, or one in another error."""
    key = error.args[0] if error.args and isinstance(error.args[0], KeyError) else error
    said = f"no setting {key.args[0]}" if isinstance(key, KeyError) else str(error)
    return " ".join(said.split())


def _train(given: Any) -> None:
    import jax

    from imgtune_jax import config, report
    from imgtune_jax.training import loop

    workdir = Path(given.workdir)
    encoders = loop.train(config.parse_config(given.config), workdir)
    page = report.write_run_report(workdir, encoders)
    if jax.process_index() == 0:
        print(f"\n{report.summary(workdir)}\n\nReport: {page}")


def _cache(given: Any) -> None:
    from imgtune_jax import config
    from imgtune_jax.training import experiment, feature_cache

    exp = experiment.build_experiment(config.parse_config(given.config))
    for tower, store in feature_cache.fill_cache(exp).items():
        print(f"{tower}: {store.computed} rows, {store.bytes / 1e6:.1f} MB in {store.folder}")


def _bench(given: Any) -> None:
    from imgtune_jax import bench, config

    c = config.parse_config(given.config)
    print(bench.format_table(bench.measure(c), c))


COMMANDS = {
    "train": Command(TRAIN_HELP, _train, required=("workdir",)),
    "cache": Command(CACHE_HELP, _cache),
    "bench data": Command(BENCH_HELP, _bench),
}
