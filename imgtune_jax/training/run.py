"""Build a run, new or resumed: an experiment with a workdir, parameters and a step."""

from __future__ import annotations

import collections
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import jax

from imgtune_jax import evals
from imgtune_jax.training import calibrate, checkpoint, feature_cache, preflight, workdir_files
from imgtune_jax.training.batch_source import BatchSource
from imgtune_jax.training.checkpoint import Checkpointer
from imgtune_jax.training.experiment import Experiment
from imgtune_jax.training.metric_logger import MetricLogger
from imgtune_jax.training.state import eval_params
from imgtune_jax.types import Batch, Params, TrainState

log = logging.getLogger("imgtune_jax.training")


@dataclass
class Run:
    """An experiment in a workdir, with parameters and a step.

    The training loop changes `state`, `last_metrics` and `preempted`, and no other field.
    """

    experiment: Experiment
    workdir: Path
    checkpointer: Checkpointer
    start: int  # the step that this process starts from: 0, or that of a checkpoint
    state: TrainState
    frozen: Params  # kernels cast to the dtype of matrix products
    frozen_digest: str
    batch_source: BatchSource
    batches: Iterator[Batch]  # batch `start` and all later ones
    last_metrics: dict[str, float] = field(default_factory=dict)  # evaluated since the last save
    preempted: bool = False

    def __post_init__(self) -> None:
        """Open the logs."""
        config = self.experiment.config
        self.logger = MetricLogger(
            self.workdir,
            start=self.start,
            total=self.experiment.step_counts.total,
            batch_size=config.batch_size,
            active=jax.process_index() == 0,
            config=config.to_dict(),
        )

    @property
    def is_resumed(self) -> bool:
        """Whether this run continues from a checkpoint."""
        return self.start > 0

    @cached_property
    def _predictor(self) -> evals.ModelPredictor:
        """The first predictor. Those of later steps reuse its compiled functions and memo."""
        return self.experiment.predictor(eval_params(self.state, self.frozen))

    def predictor(self) -> evals.ModelPredictor:
        """Return the model with the parameters of the current step."""
        return self._predictor.with_params(eval_params(self.state, self.frozen))

    def close(self) -> None:
        """Close the logs, and wait until all saves that have started are on disk."""
        self.logger.close()
        self.checkpointer.close()


def build_run(experiment: Experiment, workdir: Path) -> Run:
    """Build a run at step 0 or, if `workdir` has a checkpoint, at the newest one.

    Raises UserError, before anything is written, if parts of the config do not fit each other or
    `workdir` holds a run with another config.
    """
    config, workdir = experiment.config, workdir.absolute()  # Orbax needs an absolute path
    saved_step = checkpoint.latest_step(workdir)
    pretrained = preflight.check_experiment(experiment, is_new=saved_step is None)

    workdir_files.check_same_config(config, workdir)
    workdir_files.write_config(config, workdir)
    # If an earlier run stopped before its first checkpoint, baselines are evaluated again, so
    # their earlier records (step 0) are dropped.
    workdir_files.truncate_logs(workdir, -1 if saved_step is None else saved_step)
    checkpointer = Checkpointer(workdir, config.checkpoint)
    if saved_step is None:
        run = _new_run(experiment, workdir, checkpointer, pretrained)
    else:
        run = _resumed_run(experiment, workdir, checkpointer, saved_step)
    workdir_files.write_store_paths(run.batch_source.store_paths, workdir)
    return run


def _new_run(
    experiment: Experiment,
    workdir: Path,
    checkpointer: Checkpointer,
    pretrained: Mapping[str, Params],
) -> Run:
    """Initialize parameters and state; save the frozen parameters and the tokenizer."""
    params = experiment.init_params(pretrained)
    _, frozen = experiment.split_params(params)
    batch_source = feature_cache.build_batch_source(experiment, frozen)
    batches = batch_source.batches(0)
    # Calibration reads the first batches; training then starts with the same ones.
    recorded: collections.deque[Batch] = collections.deque()
    params = calibrate.calibrate(
        experiment.model, params, record_batches(batches, recorded), experiment.partitioner
    )
    trainable, frozen = experiment.split_params(params)
    digest = checkpoint.save_frozen(workdir, frozen)
    experiment.tokenizer.save(workdir / workdir_files.TOKENIZER)
    return Run(
        experiment=experiment,
        workdir=workdir,
        checkpointer=checkpointer,
        start=0,
        state=experiment.create_state(trainable),
        frozen=experiment.model.cast_frozen_kernels(frozen),
        frozen_digest=digest,
        batch_source=batch_source,
        batches=replay_batches(recorded, batches),
    )


def _resumed_run(
    experiment: Experiment, workdir: Path, checkpointer: Checkpointer, step: int
) -> Run:
    """Restore parameters and state of a saved step, laid out on the mesh of this process."""
    state, record = checkpointer.restore(step, experiment.abstract_state)
    digest = record["frozen"]
    frozen = checkpoint.restore_frozen(workdir, digest, experiment.abstract_split_params[1])
    log.info("resuming %s at step %d", workdir, step)
    batch_source = feature_cache.build_batch_source(experiment, frozen)
    return Run(
        experiment=experiment,
        workdir=workdir,
        checkpointer=checkpointer,
        start=step,
        state=state,
        frozen=experiment.model.cast_frozen_kernels(frozen),
        frozen_digest=digest,
        batch_source=batch_source,
        batches=batch_source.batches(step),
    )


def record_batches(batches: Iterator[Batch], recorded: collections.deque[Batch]) -> Iterator[Batch]:
    """Yield batches, appending each to `recorded`."""
    for batch in batches:
        recorded.append(batch)
        yield batch


def replay_batches(recorded: collections.deque[Batch], batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yield the recorded batches, removing each from `recorded`, and then `batches`."""
    while recorded:
        yield recorded.popleft()
    yield from batches
