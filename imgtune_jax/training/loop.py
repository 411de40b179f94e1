"""The training loop: batch → step → log → save → evaluate, for any loss, tower and data set."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from imgtune_jax import evals, param_tree
from imgtune_jax.config import Config
from imgtune_jax.disk_space import explain_full_disk
from imgtune_jax.errors import DiskFullError, NonFiniteLossError, NonFiniteParamsError
from imgtune_jax.training import checkpoint, data_check, workdir_files
from imgtune_jax.training.experiment import build_experiment, is_due
from imgtune_jax.training.run import Run, open_run
from imgtune_jax.training.state import non_finite_paths
from imgtune_jax.training.stop_signals import StopSignals

log = logging.getLogger("imgtune_jax.training")


def train(
    config: Config, workdir: Path, *, allow_changed_data: bool = False
) -> evals.ModelPredictor:
    """Train from step 0, or from the newest checkpoint in `workdir`; return the final model.

    With `allow_changed_data`, a run may be resumed on other training data than it was trained on.
    An evaluator that raises an exception costs its own metrics only: `results.jsonl` names it.
    SIGINT and SIGTERM save the current step and raise SystemExit with status 130 or 143.

    Raises UserError if parts of the config do not fit each other, or if `workdir` holds a run with
    another config, with other training data, or that of another process. Raises NonFiniteLossError
    or NonFiniteParamsError if the loss or the parameters become NaN or infinite,
    data.TooManyBadRecordsError if too many records are unreadable, and DiskFullError.
    """
    experiment = build_experiment(config)
    with (
        StopSignals() as stop,
        _name_last_step(workdir),
        open_run(experiment, workdir, allow_changed_data=allow_changed_data) as run,
    ):
        if not run.is_resumed:
            _evaluate_baselines(run)
        elif run.evaluation_is_missing:
            _evaluate(run, run.start)
        with stop.deferred():
            _train_steps(run, stop)
        run.checkpointer.delete_old()
        return run.predictor()


@contextlib.contextmanager
def _name_last_step(workdir: Path) -> Iterator[None]:
    """If any file of a run cannot be written to a full disk, name the last saved step."""
    try:
        with explain_full_disk(workdir, "a file of the run"):
            yield
    except DiskFullError as error:
        step = checkpoint.latest_step(workdir)
        last = "no step is saved" if step is None else f"the last saved step is {step}"
        raise DiskFullError(
            f"{error}; {last}. Free some space, and resume the run with the same command"
        ) from error


def _train_steps(run: Run, stop: StopSignals) -> None:
    """Run the steps after `run.start`; log, save and evaluate as often as the config says.

    A step is saved before its evaluation. If the process ends between them, the next one evaluates.
    """
    train_step, steps = run.experiment.train_step, run.experiment.step_counts
    # The step does not read the parameters of a cached frozen prefix, so they are left out.
    frozen = param_tree.select(run.frozen, run.batch_source.needs_param)
    pending: tuple[int, Any] | None = None
    for n in range(run.start + 1, steps.total + 1):
        wait_start = time.perf_counter()
        batch, run.bad_records = next(run.batches)
        run.logger.add_wait_time(time.perf_counter() - wait_start)
        run.state, metrics = train_step(run.state, frozen, batch)
        if pending is not None:
            # Metrics of step n - 1 are fetched after step n starts, so the device stays busy.
            _fetch_metrics(run, *pending)
        pending = (n, metrics)
        evaluate, must_stop = run.experiment.evaluates_after(n), _must_stop(stop, n)
        save = must_stop or _is_saved_after(run, n)
        if evaluate or save:
            _fetch_metrics(run, *pending)
            pending = None
        if save:
            _save_checkpoint(run, n)
        if must_stop:
            log.warning("saved step %d", n)
            stop.exit()
        if evaluate:
            _evaluate_or_save(run, n, stop, is_saved=save)


def _is_saved_after(run: Run, step: int) -> bool:
    """Whether the config wants a checkpoint of this step."""
    steps, cfg = run.experiment.step_counts, run.experiment.config.checkpoint
    # To retain the best of all evaluated models, each of them has to be saved.
    is_candidate = cfg.best_metric is not None and cfg.keep_best > 0
    return (
        step == steps.total
        or is_due(step, steps.checkpoint_every)
        or (is_candidate and run.experiment.evaluates_after(step))
    )


def _evaluate_or_save(run: Run, step: int, stop: StopSignals, *, is_saved: bool) -> None:
    """Evaluate; if a signal stops the evaluation, save the step unless it is saved."""
    try:
        with stop.immediate():
            _evaluate(run, step)
    except SystemExit:
        if not is_saved:
            _save_checkpoint(run, step)
        raise


def _fetch_metrics(run: Run, step: int, metrics: Mapping[str, Any]) -> None:
    """Fetch the metrics of a step; log those of every `log_every`-th step and of the last.

    Raises NonFiniteLossError if the loss is NaN or infinite.
    """
    loss = float(metrics["loss"])
    if not math.isfinite(loss):
        # The parameters saved at step - 1 are those that produced this loss, so they are bad too.
        raise NonFiniteLossError(f"loss is {loss} at step {step}; {_advice(run, before=step - 1)}")
    run.logger.update_progress(step)
    total, log_every = run.experiment.step_counts.total, run.experiment.config.log_every
    if step % log_every == 0 or step == total:
        run.logger.log_train(step, {k: float(v) for k, v in metrics.items()})


def _advice(run: Run, *, before: int) -> str:
    """Return the end of an error about numbers that are not finite: what is saved, what to do."""
    run.checkpointer.wait()
    good_steps = [s for s in checkpoint.saved_steps(run.workdir) if s < before]
    folder, optim = run.workdir / workdir_files.CHECKPOINTS, run.experiment.config.optim
    clip_norm = "a" if optim.clip_norm is None else f"a lower (now {optim.clip_norm})"
    return (
        f"last good checkpoint: {folder / str(good_steps[-1]) if good_steps else 'none yet'}. "
        f"The same command would fail at the same step: start a new run, in a new --workdir, with "
        f"a lower config.optim.lr (now {optim.lr}), a longer config.optim.warmup or {clip_norm} "
        f"config.optim.clip_norm"
    )


def _evaluate(run: Run, step: int) -> None:
    """Run all evaluators; append their results to results.jsonl, then log their metrics."""
    start_time = time.perf_counter()
    predictor = run.predictor()
    metrics: dict[str, float] = {}
    for name, evaluator in run.experiment.evaluators.items():
        model = run.experiment.config.name
        result = evals.run_evaluator(name, evaluator, predictor, model=model, step=step)
        finite = {k: v for k, v in result["metrics"].items() if v is not None}
        metrics |= evals.curve_names(finite, prefix=f"val/{name}/")
        _append_result(run, result)
    # The metrics are logged last: their record in the log marks the evaluation as complete.
    run.logger.log_eval(step, metrics, time.perf_counter() - start_time)
    run.checkpointer.add_metrics(step, metrics)


def _evaluate_baselines(run: Run) -> None:
    """Run the baselines on the initial model; append their results to results.jsonl."""
    predictor = run.predictor()
    for name, evaluator in run.experiment.baselines.items():
        start_time = time.perf_counter()
        model = run.experiment.config.baselines[name]["name"]
        result = evals.run_evaluator(name, evaluator, predictor, model=model, step=0)
        # Baselines have no curves. The call excludes their time from the training speed.
        run.logger.log_eval(0, {}, time.perf_counter() - start_time)
        _append_result(run, result)


def _append_result(run: Run, result: Mapping[str, Any]) -> None:
    if jax.process_index() == 0:
        evals.append_result(run.workdir / workdir_files.RESULTS, result)


def _save_checkpoint(run: Run, step: int) -> None:
    """Save the state. Raises NonFiniteParamsError if it is not finite."""
    if paths := non_finite_paths(run.state):
        raise NonFiniteParamsError(
            f"{paths[0]} is not finite after step {step}, so this step is not saved; "
            f"{_advice(run, before=step)}"
        )
    record = {
        "step": step,
        "frozen": run.frozen_digest,
        "has_ema": run.state.ema_params is not None,
        "bad_records": run.bad_records,
        "data": data_check.data_record(run.experiment),
    }
    run.batch_source.flush()
    run.checkpointer.save(step, run.state, record)


def _must_stop(stop: StopSignals, step: int) -> bool:
    """Whether to save and stop after this step; all hosts agree on the step."""
    if jax.process_count() > 1:
        return multihost_utils.reached_preemption_sync_point(step)
    return stop.received is not None
