"""The one imperative loop. It names no objective, tower or data set."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from imgtune_jax import evals, objectives, param_tree, xla_cpu
from imgtune_jax.config import Config
from imgtune_jax.errors import NonFiniteLossError
from imgtune_jax.training import batch_source, checkpoint, experiment, optim, run, state
from imgtune_jax.training.metric_logger import MetricLogger
from imgtune_jax.training.step import TrainStep, make_train_step
from imgtune_jax.types import Params, TrainState

log = logging.getLogger("imgtune_jax.training")


@dataclass
class Run:
    """A run under way: what the loop carries from step to step, and where it writes."""

    workdir: Path
    prepared: run.Prepared
    state: TrainState
    evaluators: Mapping[str, evals.Evaluator]
    encoders: evals.ModelPredictor
    watch: MetricLogger
    last_metrics: dict[str, float] = field(default_factory=dict)
    preempted: bool = False

    @property
    def config(self) -> Config:
        """The run's config."""
        return self.prepared.experiment.config


def train(
    config: Config, workdir: Path, *, make_feed: batch_source.MakeFeed = batch_source.PlainFeed.make
) -> evals.ModelPredictor:
    """Train, or go on training, and return the encoders of the final model.

    `make_feed` brings the batches: `cache.feed` computes what is locked once.
    Raises ValueError when `workdir` holds another run, NotFiniteError when the loss is not finite,
    data.TooManyBadRecords when the data is.
    """
    workdir = workdir.absolute()  # Orbax takes no other
    p = run.prepare(config, workdir, make_feed)
    start, is_first_host = int(p.state.step), jax.process_index() == 0
    checkpoint.truncate_jsonl(workdir / "results.jsonl", start if p.resumed else -1)
    r = Run(
        workdir=workdir,
        prepared=p,
        state=p.state,
        evaluators=p.experiment.evaluators(config.evals),
        encoders=p.experiment.predictor(state.eval_params(p.state, p.frozen)),
        watch=MetricLogger(
            workdir,
            start=start,
            total=p.steps.total,
            batch_size=config.batch_size,
            active=is_first_host,
            config=config.to_dict(),
        ),
    )
    try:
        if not p.resumed:
            _evaluate_baselines(r)
        _train_steps(r, compile_step(p.experiment, p.optimizer, p.state), start)
    finally:
        r.watch.close()
        p.checkpoints.close()
    return r.encoders.with_params(state.eval_params(r.state, p.frozen))


def _train_steps(r: Run, step: TrainStep, start: int) -> None:
    p = r.prepared
    previous_handler = signal.signal(signal.SIGTERM, lambda *_: setattr(r, "stopping", True))
    # The compiled step holds no locked tower whose features the batches bring.
    frozen = param_tree.select(p.frozen, p.batch_source.needs_param)
    pending: tuple[int, Any] | None = None
    try:
        for n in range(start + 1, p.steps.total + 1):
            waited = time.perf_counter()
            batch = next(p.batches)
            r.watch.add_wait_time(time.perf_counter() - waited)
            r.state, metrics = step(r.state, frozen, batch)
            if pending is not None:
                _fetch_metrics(r, *pending)  # one step behind: the device is never waited for
            pending = (n, metrics)
            last, stop = n == p.steps.total, _is_preempted(r, n)
            judge = bool(r.evaluators) and (last or _is_due(n, p.steps.eval_every))
            save = last or stop or _is_due(n, p.steps.checkpoint_every)
            if judge or save:
                _fetch_metrics(r, *pending)
                pending = None
            if judge:
                _evaluate(r, n)
            if save:
                _save_checkpoint(r, n)
            if stop and not last:
                log.warning("stopped by SIGTERM; saved step %d; the same command resumes", n)
                raise SystemExit(143)
    finally:
        signal.signal(signal.SIGTERM, previous_handler)


def _fetch_metrics(r: Run, step: int, metrics: Mapping[str, Any]) -> None:
    """Fetch a step's metrics; log them when due; stop the run when the loss is not finite."""
    loss = float(metrics["loss"])
    if not math.isfinite(loss):
        r.prepared.checkpoints.wait()
        # The parameters saved at step - 1 are those that gave this loss, so they are not good.
        good = [s for s in checkpoint.saved_steps(r.workdir) if s < step - 1]
        raise NonFiniteLossError(
            f"loss is {loss} at step {step}; last good checkpoint: "
            f"{r.workdir / 'checkpoints' / str(good[-1]) if good else 'none yet'}. "
            f"Lower config.optim.lr, lengthen config.optim.warmup or set config.optim.clip_norm; "
            f"changed settings want a new --workdir"
        )
    r.watch.update_progress(step)
    if step % r.config.log_every == 0 or step == r.prepared.steps.total:
        r.watch.log_train(step, {k: float(v) for k, v in metrics.items()})


def _evaluate(r: Run, step: int) -> None:
    began = time.perf_counter()
    encoders = r.encoders.with_params(state.eval_params(r.state, r.prepared.frozen))
    r.last_metrics = {}
    for name, evaluator in r.evaluators.items():
        values = evaluator(encoders)
        r.last_metrics |= evals.curve_names(values, prefix=f"val/{name}/")
        if jax.process_index() == 0:
            evals.append_result(
                r.workdir / "results.jsonl",
                evals.evaluator_result(name, evaluator, values, model=r.config.name, step=step),
            )
    r.watch.log_eval(step, r.last_metrics, time.perf_counter() - began)


def _evaluate_baselines(r: Run) -> None:
    for name, evaluator in r.prepared.experiment.evaluators(r.config.baselines).items():
        began = time.perf_counter()
        values = evaluator(r.encoders)
        r.watch.log_eval(0, {}, time.perf_counter() - began)
        if jax.process_index() == 0:
            model = r.config.baselines[name]["name"]
            record = evals.evaluator_result(name, evaluator, values, model=model, step=0)
            evals.append_result(r.workdir / "results.jsonl", record)


def _save_checkpoint(r: Run, step: int) -> None:
    best = r.config.checkpoint.best_metric
    if best is not None and r.last_metrics and best not in r.last_metrics:
        raise ValueError(
            f"config.checkpoint.best_metric = {best!r} is not reported; "
            f"reported: {', '.join(sorted(r.last_metrics))}"
        )
    record = {
        "step": step,
        "frozen": r.prepared.frozen_digest,
        "metrics": r.last_metrics,
        "has_ema": r.state.ema_params is not None,
        "bad_records": r.prepared.batch_source.pipeline.bad_records(),
    }
    r.prepared.batch_source.flush()
    r.prepared.checkpoints.save(step, r.state, record)
    r.last_metrics = {}


def _is_preempted(r: Run, step: int) -> bool:
    if jax.process_count() > 1:  # all hosts must agree on the step
        return multihost_utils.reached_preemption_sync_point(step)
    return r.preempted


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def compile_step(
    exp: experiment.Experiment, optimizer: optim.Optimizer, start: TrainState
) -> TrainStep:
    """The jitted step of an experiment, which takes over `start` and states laid out like it."""
    c = exp.config

    def forward(params: Params, batch: Any, rng: jax.Array) -> Any:
        return exp.model.apply(params, batch, rng=rng, train=True)

    step = make_train_step(
        forward,
        objectives.build_objective(c.objectives, mesh=exp.partitioner.mesh),
        optimizer,
        key=exp.key,
        accumulation=c.accumulation,
        ema_decay=c.optim.ema_decay,
    )
    layout = jax.tree.map(lambda x: x.sharding, start)
    return jax.jit(
        step,
        donate_argnums=0,
        out_shardings=(layout, exp.partitioner.replicated),
        compiler_options=xla_cpu.compiler_options(exp.partitioner.mesh),
    )
