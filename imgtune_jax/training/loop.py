"""The training loop: batch → step → log → evaluate → save, for any loss, tower and data set."""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from imgtune_jax import evals, param_tree
from imgtune_jax.config import Config
from imgtune_jax.disk_space import explain_full_disk
from imgtune_jax.errors import DiskFullError, NonFiniteLossError, UserError
from imgtune_jax.training import checkpoint, data_check, workdir_files
from imgtune_jax.training.experiment import build_experiment
from imgtune_jax.training.run import Run, build_run

log = logging.getLogger("imgtune_jax.training")

EXIT_SIGTERM = 143  # the exit status that a shell reports for a process ended by SIGTERM


def train(
    config: Config, workdir: Path, *, allow_changed_data: bool = False
) -> evals.ModelPredictor:
    """Train from step 0, or from the newest checkpoint in `workdir`; return the final model.

    With `allow_changed_data`, a run may be resumed on other training data than it was trained on.

    Raises UserError if parts of the config do not fit each other, or if `workdir` holds a run with
    another config or other training data. Raises NonFiniteLossError if the loss becomes NaN or
    infinite, data.TooManyBadRecordsError if too many records are unreadable, and DiskFullError.
    """
    experiment = build_experiment(config)
    with _name_last_step(workdir):
        run = build_run(experiment, workdir, allow_changed_data=allow_changed_data)
        try:
            if not run.is_resumed:
                _evaluate_baselines(run)
            _train_steps(run)
        finally:
            run.close()
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


def _train_steps(run: Run) -> None:
    """Run the steps after `run.start`; log, evaluate and save as often as the config says."""
    train_step, steps = run.experiment.train_step, run.experiment.step_counts
    previous_handler = signal.signal(signal.SIGTERM, lambda *_: setattr(run, "preempted", True))
    # The step does not read the parameters of a cached frozen prefix, so they are left out.
    frozen = param_tree.select(run.frozen, run.batch_source.needs_param)
    pending: tuple[int, Any] | None = None
    try:
        for n in range(run.start + 1, steps.total + 1):
            wait_start = time.perf_counter()
            batch, run.bad_records = next(run.batches)
            run.logger.add_wait_time(time.perf_counter() - wait_start)
            run.state, metrics = train_step(run.state, frozen, batch)
            if pending is not None:
                # Metrics of step n - 1 are fetched after step n starts, so the device stays busy.
                _fetch_metrics(run, *pending)
            pending = (n, metrics)
            is_last, is_preempted = n == steps.total, _is_preempted(run, n)
            evaluate = bool(run.experiment.evaluators) and (is_last or _is_due(n, steps.eval_every))
            save = is_last or is_preempted or _is_due(n, steps.checkpoint_every)
            if evaluate or save:
                _fetch_metrics(run, *pending)
                pending = None
            if evaluate:
                _evaluate(run, n)
            if save:
                _save_checkpoint(run, n)
            if is_preempted and not is_last:
                log.warning("stopped by SIGTERM; saved step %d; the same command resumes", n)
                raise SystemExit(EXIT_SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, previous_handler)


def _fetch_metrics(run: Run, step: int, metrics: Mapping[str, Any]) -> None:
    """Fetch the metrics of a step; log those of every `log_every`-th step and of the last.

    Raises NonFiniteLossError if the loss is NaN or infinite.
    """
    loss = float(metrics["loss"])
    if not math.isfinite(loss):
        run.checkpointer.wait()
        # The parameters saved at step - 1 are those that produced this loss, so they are bad too.
        good_steps = [s for s in checkpoint.saved_steps(run.workdir) if s < step - 1]
        folder = run.workdir / workdir_files.CHECKPOINTS
        raise NonFiniteLossError(
            f"loss is {loss} at step {step}; last good checkpoint: "
            f"{folder / str(good_steps[-1]) if good_steps else 'none yet'}. "
            f"Lower config.optim.lr, lengthen config.optim.warmup or set config.optim.clip_norm; "
            f"a run with changed settings needs a new --workdir"
        )
    run.logger.update_progress(step)
    total, log_every = run.experiment.step_counts.total, run.experiment.config.log_every
    if step % log_every == 0 or step == total:
        run.logger.log_train(step, {k: float(v) for k, v in metrics.items()})


def _evaluate(run: Run, step: int) -> None:
    """Run all evaluators; log their metrics, and append them to results.jsonl."""
    start_time = time.perf_counter()
    predictor = run.predictor()
    run.last_metrics = {}
    for name, evaluator in run.experiment.evaluators.items():
        values = evaluator(predictor)
        run.last_metrics |= evals.curve_names(values, prefix=f"val/{name}/")
        _append_result(run, name, evaluator, values, model=run.experiment.config.name, step=step)
    run.logger.log_eval(step, run.last_metrics, time.perf_counter() - start_time)


def _evaluate_baselines(run: Run) -> None:
    """Run the baselines on the initial model; append their metrics to results.jsonl."""
    predictor = run.predictor()
    for name, evaluator in run.experiment.baselines.items():
        start_time = time.perf_counter()
        values = evaluator(predictor)
        # Baselines have no curves. The call excludes their time from the training speed.
        run.logger.log_eval(0, {}, time.perf_counter() - start_time)
        model = run.experiment.config.baselines[name]["name"]
        _append_result(run, name, evaluator, values, model=model, step=0)


def _append_result(
    run: Run,
    name: str,
    evaluator: evals.Evaluator,
    values: Mapping[str, float],
    *,
    model: str,
    step: int,
) -> None:
    if jax.process_index() == 0:
        result = evals.evaluator_result(name, evaluator, values, model=model, step=step)
        evals.append_result(run.workdir / workdir_files.RESULTS, result)


def _save_checkpoint(run: Run, step: int) -> None:
    """Save the state, and the metrics that were evaluated after the last checkpoint."""
    best_metric = run.experiment.config.checkpoint.best_metric
    if best_metric is not None and run.last_metrics and best_metric not in run.last_metrics:
        raise UserError(
            f"config.checkpoint.best_metric = {best_metric!r} is not reported by any evaluator; "
            f"expected one of: {', '.join(sorted(run.last_metrics))}"
        )
    record = {
        "step": step,
        "frozen": run.frozen_digest,
        # A NaN has no place in the order of the best checkpoints, and JSON has none.
        "metrics": {k: v for k, v in run.last_metrics.items() if math.isfinite(v)},
        "has_ema": run.state.ema_params is not None,
        "bad_records": run.bad_records,
        "data": data_check.data_record(run.experiment),
    }
    run.batch_source.flush()
    run.checkpointer.save(step, run.state, record)
    run.last_metrics = {}


def _is_preempted(run: Run, step: int) -> bool:
    """Whether to save and stop after this step; all hosts agree on the step."""
    if jax.process_count() > 1:
        return multihost_utils.reached_preemption_sync_point(step)
    return run.preempted


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
