"""Commands that take --config: `train`, `cache` and `bench`. Flags override the config's keys."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from imgtune_jax.cli.startup import configure_process, report_user_errors, with_checkout_hint
from imgtune_jax.disk_space import explain_full_disk

TRAIN_HELP = """\
usage: imgtune train --config=FILE.py[:ARG] --workdir=DIR [--config.KEY=VALUE ...]

Train a model. If DIR already contains this run, resume it from its newest checkpoint.

  --config=FILE.py[:ARG] the experiment, such as configs/lit_emoji.py; its get_config receives ARG
  --workdir=DIR          the folder for checkpoints, metrics and report.html
  --allow_changed_data   resume on other training data than the run was trained on
  --config.KEY=VALUE     change a setting: --config.batch_size=64 --config.lock.image=False
                         (configs/base.py lists all keys with their defaults)
"""

CACHE_HELP = """\
usage: imgtune cache --config=FILE.py[:ARG] [--config.KEY=VALUE ...]

Fill the feature cache: compute the outputs of the locked towers on the training data before
training. This is optional, since training fills the cache too. If the command is interrupted, run
it again to continue. The settings are those of imgtune train.
"""

BENCH_HELP = """\
usage: imgtune bench data --config=FILE.py[:ARG] [--config.KEY=VALUE ...]

Measure the speed of each stage of the input pipeline and of the training step, and name the
bottleneck. Writes no files.
"""

# Errors that may occur when a config file is loaded or one of its keys is set.
LOAD_ERRORS = (AttributeError, ImportError, LookupError, SyntaxError, TypeError, ValueError)


@dataclass(frozen=True)
class Command:
    """A command: its --help text, the function that runs it, its required flags and switches."""

    usage: str
    run: Callable[[Any], None]
    required: tuple[str, ...] = ()
    switches: tuple[str, ...] = ()  # boolean flags, False by default


def train(argv: Sequence[str] | None = None) -> None:
    """Run `imgtune train`, the entry point of `train.py`. `argv[0]` is the program's name."""
    run_with_config(list(sys.argv if argv is None else argv), COMMANDS["train"])


def run_with_config(arguments: list[str], command: Command) -> None:
    """Parse the flags with absl and run the command. `arguments[0]` is the program's name."""
    from absl import app, flags

    if {"-h", "--help"} & set(arguments):
        print(command.usage)
        return
    parse = partial(parse_flags, flags.FLAGS, required=command.required, switches=command.switches)

    def main(remaining: Sequence[str]) -> None:
        if len(remaining) > 1:
            raise SystemExit(
                f"imgtune: unknown arguments {remaining[1:]}; write a setting as --config.seed=1"
            )
        configure_process()
        with report_user_errors():
            command.run(flags.FLAGS)

    app.run(main, argv=arguments, flags_parser=parse)


def parse_flags(
    values: Any,
    arguments: list[str],
    *,
    required: Sequence[str] = (),
    switches: Sequence[str] = (),
) -> list[str]:
    """Set `values.config`, `values.workdir` and the switches; return the remaining arguments.

    `values` is an absl FlagValues. Raises SystemExit with one message for an unknown config file
    or key, or an invalid value.
    """
    from absl import flags
    from ml_collections import config_flags

    config_help = "the experiment, such as configs/lit_emoji.py"
    config_flags.DEFINE_config_file(
        "config", None, config_help, flag_values=values, sys_argv=arguments
    )
    flags.DEFINE_string("workdir", None, "the run's folder; a run in it is resumed", values)
    for name in switches:
        flags.DEFINE_bool(name, False, "see the command's --help", values)
    flags.mark_flags_as_required(["config", *required], values)
    for argument in arguments:
        if argument.startswith("--config="):
            path = argument.removeprefix("--config=").partition(":")[0]
            if not Path(path).is_file():
                error = f"no config at {path!r}; expected a file such as configs/debug.py"
                raise SystemExit(f"imgtune: {with_checkout_hint(error)}")
            # With this path, a config can import its neighbors (`from configs import base`).
            sys.path[:0] = [str(Path.cwd()), str(Path(path).resolve().parent.parent)]
    try:
        return values(arguments)
    except (flags.Error, *LOAD_ERRORS) as error:
        message = _one_line(error)
        if isinstance(error, ImportError):
            message = with_checkout_hint(message)
        raise SystemExit(f"imgtune: {message}") from None


def _one_line(error: Exception) -> str:
    """Return the error's message on one line.

    For an unknown key, ml_collections raises a KeyError, or another error that contains one.
    """
    cause = error.args[0] if error.args and isinstance(error.args[0], KeyError) else error
    message = f"no setting {cause.args[0]}" if isinstance(cause, KeyError) else str(error)
    return " ".join(message.split())


def _train(flags: Any) -> None:
    import jax

    from imgtune_jax import config, report
    from imgtune_jax.training import loop

    workdir = Path(flags.workdir)
    parsed = config.parse_config(flags.config)
    predictor = loop.train(parsed, workdir, allow_changed_data=flags.allow_changed_data)
    with explain_full_disk(workdir, "report.html"):
        page = report.write_run_report(workdir, predictor)
    if jax.process_index() == 0:
        print(f"\n{report.summary(workdir)}\n\nReport: {page}")
    report.check_evaluations(workdir)


def _cache(flags: Any) -> None:
    from imgtune_jax import config
    from imgtune_jax.training import feature_cache
    from imgtune_jax.training.experiment import build_experiment

    experiment = build_experiment(config.parse_config(flags.config))
    for tower, store in feature_cache.fill_cache(experiment).items():
        print(f"{tower}: {store.num_rows} rows, {store.bytes / 1e6:.1f} MB in {store.folder}")


def _bench(flags: Any) -> None:
    from imgtune_jax import bench, config

    parsed = config.parse_config(flags.config)
    print(bench.format_table(bench.measure(parsed), parsed))


COMMANDS = {
    "train": Command(TRAIN_HELP, _train, required=("workdir",), switches=("allow_changed_data",)),
    "cache": Command(CACHE_HELP, _cache),
    "bench data": Command(BENCH_HELP, _bench),
}
