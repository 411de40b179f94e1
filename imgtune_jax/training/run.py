"""Build a run, new or resumed: an experiment with a workdir, parameters and a step."""

from __future__ import annotations

import collections
import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import jax

from imgtune_jax import data, evals
from imgtune_jax.training import (
    calibrate,
    checkpoint,
    data_check,
    feature_cache,
    metric_logger,
    preflight,
    workdir_files,
    workdir_lock,
)
from imgtune_jax.training.batch_source import BatchSource
from imgtune_jax.training.checkpoint import Checkpointer, SavedState
from imgtune_jax.training.experiment import Experiment
from imgtune_jax.training.metric_logger import MetricLogger
from imgtune_jax.training.state import eval_params
from imgtune_jax.types import Batch, Params, TrainState

log = logging.getLogger("imgtune_jax.training")


class CountedBatch(NamedTuple):
    """A batch, and the counts of bad records up to it (`data.Pipeline.bad_records`)."""

    batch: Batch
    bad_records: dict[str, int]


@dataclass
class Run:
    """An experiment in a workdir, with parameters and a step.

    The training loop changes `state` and `bad_records`, and no other field.
    """

    experiment: Experiment
    workdir: Path
    checkpointer: Checkpointer
    start: int  # the step that this process starts from: 0, or that of a checkpoint
    state: TrainState
    frozen: Params  # kernels cast to the dtype of matrix products
    frozen_digest: str
    batch_source: BatchSource
    batches: Iterator[CountedBatch]  # batch `start` and all later ones
    bad_records: dict[str, int] = field(default_factory=dict)  # up to the current step
    evaluation_is_missing: bool = False  # that of step `start`, which the run did not finish

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
        try:
            self.logger.close()
        finally:
            self.checkpointer.close()


@contextlib.contextmanager
def open_run(
    experiment: Experiment, workdir: Path, *, allow_changed_data: bool = False
) -> Iterator[Run]:
    """Open a run: new, or resumed at the newest checkpoint in `workdir` that is not damaged.

    The run has the lock of `workdir` until the `with` statement ends. A run that stopped before its
    first checkpoint is replaced. Raises UserError, before anything is written, if parts of the
    config do not fit each other, if `workdir` holds a saved model or a run with another config, or
    if all of its checkpoints are damaged. So does a run on other training data, unless
    `allow_changed_data`.
    """
    config, workdir = experiment.config, workdir.absolute()  # Orbax needs an absolute path
    workdir_files.check_writable(workdir)
    is_new = not checkpoint.saved_steps(workdir)
    pretrained = preflight.check_experiment(experiment, is_new=is_new)
    if config.wandb_project is not None:
        metric_logger.import_wandb()
    if is_new:
        workdir_files.check_no_saved_model(workdir)
    else:
        workdir_files.check_same_config(config, workdir)
    with workdir_lock.hold_lock(workdir):
        workdir_files.delete_temporary_files(workdir)
        try:
            run = _build_run(experiment, workdir, pretrained, allow_changed_data=allow_changed_data)
            with contextlib.closing(run):
                yield run
        finally:
            if jax.process_count() == 1:  # other hosts may still be writing
                workdir_files.delete_temporary_files(workdir)


def _build_run(
    experiment: Experiment,
    workdir: Path,
    pretrained: Mapping[str, Params],
    *,
    allow_changed_data: bool,
) -> Run:
    """Build a run at step 0, from the pretrained towers, or at a checkpoint."""
    saved = checkpoint.restore_newest(workdir, experiment.abstract_state)
    if saved is None:
        workdir_files.delete_unsaved_run(workdir)
        workdir_files.write_config(experiment.config, workdir)
        run = _new_run(experiment, workdir, pretrained)
    else:
        saved_data = saved.record.get("data")
        data_check.check_same_data(experiment, saved_data, allow_changed=allow_changed_data)
        checkpoint.set_damaged_aside(workdir, saved.step)
        workdir_files.write_config(experiment.config, workdir)
        run = _resumed_run(experiment, workdir, saved)
    workdir_files.write_store_paths(run.batch_source.store_paths, workdir)
    return run


def _new_run(experiment: Experiment, workdir: Path, pretrained: Mapping[str, Params]) -> Run:
    """Initialize parameters and state; save the frozen parameters and the tokenizer."""
    params = experiment.init_params(pretrained)
    _, frozen = experiment.split_params(params)
    batch_source = feature_cache.build_batch_source(experiment, frozen)
    batches = with_counts(batch_source.batches(0), batch_source.pipeline)
    # Calibration reads the first batches; training then starts with the same ones.
    recorded: collections.deque[CountedBatch] = collections.deque()
    read = (counted.batch for counted in record_batches(batches, recorded))
    params = calibrate.calibrate(experiment.model, params, read, experiment.partitioner)
    trainable, frozen = experiment.split_params(params)
    digest = checkpoint.save_frozen(workdir, frozen)
    experiment.tokenizer.save(workdir / workdir_files.TOKENIZER)
    return Run(
        experiment=experiment,
        workdir=workdir,
        checkpointer=Checkpointer(workdir, experiment.config.checkpoint),
        start=0,
        state=experiment.create_state(trainable),
        frozen=experiment.model.cast_frozen_kernels(frozen),
        frozen_digest=digest,
        batch_source=batch_source,
        batches=replay_batches(recorded, batches),
    )


def _resumed_run(experiment: Experiment, workdir: Path, saved: SavedState) -> Run:
    """Resume at a checkpoint: truncate the logs to its step, and restore the frozen parameters."""
    step, digest = saved.step, saved.record["frozen"]
    frozen = checkpoint.restore_frozen(workdir, digest, experiment.abstract_split_params[1])
    log.info("resuming %s at step %d", workdir, step)
    workdir_files.truncate_logs(workdir, step)
    evaluation_is_missing = experiment.evaluates_after(step) and not workdir_files.has_evaluation(
        workdir, step, experiment.evaluators
    )
    if evaluation_is_missing:
        workdir_files.truncate_logs(workdir, step, keep_evaluation=False)
    bad_records = saved.record.get("bad_records", {})
    batch_source = feature_cache.build_batch_source(experiment, frozen, bad_records=bad_records)
    return Run(
        experiment=experiment,
        workdir=workdir,
        checkpointer=Checkpointer(workdir, experiment.config.checkpoint),
        start=step,
        state=saved.state,
        frozen=experiment.model.cast_frozen_kernels(frozen),
        frozen_digest=digest,
        batch_source=batch_source,
        batches=with_counts(batch_source.batches(step), batch_source.pipeline),
        bad_records=bad_records,
        evaluation_is_missing=evaluation_is_missing,
    )


def with_counts(batches: Iterable[Batch], pipeline: data.Pipeline) -> Iterator[CountedBatch]:
    """Yield batches, each with the counts of bad records up to it."""
    for batch in batches:
        yield CountedBatch(batch, pipeline.bad_records())


def record_batches(
    batches: Iterator[CountedBatch], recorded: collections.deque[CountedBatch]
) -> Iterator[CountedBatch]:
    """Yield batches, appending each to `recorded`."""
    for batch in batches:
        recorded.append(batch)
        yield batch


def replay_batches(
    recorded: collections.deque[CountedBatch], batches: Iterator[CountedBatch]
) -> Iterator[CountedBatch]:
    """Yield the recorded batches, removing each from `recorded`, and then `batches`."""
    while recorded:
        yield recorded.popleft()
    yield from batches
