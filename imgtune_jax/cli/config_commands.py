"""Commands that take --config: `train`, `cache` and `bench`. Flags override the config's keys."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from imgtune_jax.cli.config_flags import parse_flags
from imgtune_jax.cli.startup import (
    configure_process,
    escape_unencodable_output,
    report_user_errors,
)
from imgtune_jax.disk_space import explain_full_disk
from imgtune_jax.errors import UserError
from imgtune_jax.paths import user_path

TRAIN_HELP = """\
usage: imgtune train --config=FILE.py[:ARG] --workdir=DIR [--config.KEY=VALUE ...]

Train a model. If DIR already contains this run, resume it from its newest checkpoint.

  --config=FILE.py[:ARG] the experiment, such as configs/lit_emoji.py; its get_config receives ARG
  --workdir=DIR          the folder for checkpoints, metrics and report.html
  --allow_changed_data   resume on other training data than the run was trained on
  --config.KEY=VALUE     change a setting: --config.batch_size=64 --config.lock.image=False
                         (configs/base.py lists all keys with their defaults)

A program of several processes, one per host, needs these flags in each of them:

  --coordinator=HOST:PORT  the address at which process 0 listens
  --processes=N            the number of processes
  --process=I              the number of this process, from 0

VALUE None unsets a setting or empties a group: --config.cache.path=None --config.evals=None.
A length has one unit, so a new one replaces the others: --config.total.steps=10 or
--config.total.epochs=2. Relative paths are relative to the current folder.
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
    escape_unencodable_output()
    if {"-h", "--help"} & set(arguments):
        print(command.usage)
        return
    from absl import app, flags

    parse = partial(
        _parse_or_exit, flags.FLAGS, required=command.required, switches=command.switches
    )

    def main(remaining: Sequence[str]) -> None:
        configure_process()
        with report_user_errors():
            _connect(flags.FLAGS)
            if len(remaining) > 1:
                raise UserError(
                    f"unknown arguments {remaining[1:]}; write a setting as --config.seed=1"
                )
            command.run(flags.FLAGS)

    app.run(main, argv=arguments, flags_parser=parse)


def _connect(flags: Any) -> None:
    from imgtune_jax import distributed

    distributed.initialize(flags.coordinator, flags.processes, flags.process)


def _parse_or_exit(values: Any, arguments: list[str], **options: Any) -> list[str]:
    with report_user_errors():
        return parse_flags(values, arguments, **options)


def _train(flags: Any) -> None:
    import jax

    from imgtune_jax import config, report
    from imgtune_jax.training import loop

    workdir = user_path(flags.workdir)
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
