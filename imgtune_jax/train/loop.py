"""The one imperative loop. It names no objective, tower or data set."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from imgtune_jax import config as config_lib
from imgtune_jax import data, evals, objectives
from imgtune_jax.config import Config
from imgtune_jax.train import calibrate, checkpoint, experiment, lock, optim, state
from imgtune_jax.train.step import Step, make_train_step
from imgtune_jax.train.watch import Watch
from imgtune_jax.types import Params, TrainState

log = logging.getLogger("imgtune_jax.train")

Features = Callable[
    [experiment.Experiment, Params, data.Source], tuple[np.ndarray, np.ndarray]
]  # -> (image features [views n d], valid [n])

# A resumed run may change these: they do not change what is learnt.
FREE_ON_RESUME = (
    "baselines",
    "cache.dir",
    "checkpoint.",
    "data.num_threads",
    "data.num_workers",
    "data.prefetch",
    "eval_every.",
    "evals",
    "log_every",
    "mesh.",
)


class NotFiniteError(RuntimeError):
    """The loss became NaN or infinite."""


@dataclass
class Run:
    """A run under way: what the loop carries from step to step, and where it writes."""

    workdir: Path
    experiment: experiment.Experiment
    frozen: Params
    frozen_digest: str
    state: TrainState
    total: int
    evaluators: Mapping[str, evals.Evaluator]
    encoders: evals.ModelEncoders
    checkpoints: checkpoint.Checkpoints
    watch: Watch
    objective: objectives.Objective
    last_metrics: dict[str, float] = field(default_factory=dict)
    stopping: bool = False

    @property
    def config(self) -> Config:
        """The run's config."""
        return self.experiment.config


def run(config: Config, workdir: Path, *, features: Features | None = None) -> evals.ModelEncoders:
    """Train, or go on training, and return the encoders of the final model.

    With `config.cache.enabled`, `features` computes the locked image tower's outputs once.
    Raises ValueError when `workdir` holds another run, NotFiniteError when the loss is not finite,
    data.TooManyBadRecords when the data is.
    """
    _refuse_another_run(config, workdir)
    exp = experiment.build(config)
    exp.partitioner.check_batch_size(config.batch_size // config.accumulation, "microbatch")
    source = data.build_source(config.data.source)
    steps = {
        name: d.in_steps(batch_size=config.batch_size, num_examples=len(source))
        for name, d in _durations(config).items()
    }
    total = steps["total"] or 0
    optimizer = optim.build(
        config.optim,
        list(exp.is_frozen),
        total=total,
        warmup=steps["warmup"] or 0,
        cooldown=steps["cooldown"] or 0,
    )
    _claim(config, workdir)  # only now: a config that cannot be built leaves no folder behind
    checkpoints = checkpoint.Checkpoints(workdir, config.checkpoint)
    factory = state.StateFactory(
        optimizer, exp.partitioner, with_ema=config.optim.ema_decay is not None
    )
    step_saved = checkpoints.latest_step()
    if step_saved is None:
        params = exp.init_params()
        pipeline = _pipeline(exp, source, params, features)
        train_state, frozen, digest = _start(exp, factory, params, pipeline, workdir)
    else:
        train_state, frozen, digest = _resume(exp, factory, checkpoints, step_saved, workdir)
        pipeline = _pipeline(exp, source, frozen, features)
    start = int(train_state.step)
    objective = objectives.build(config.objectives)
    r = Run(
        workdir=workdir,
        experiment=exp,
        frozen=frozen,
        frozen_digest=digest,
        state=train_state,
        total=total,
        evaluators=exp.evaluators(config.evals),
        encoders=exp.encoders(state.eval_params(train_state, frozen)),
        checkpoints=checkpoints,
        watch=Watch(
            workdir,
            start=start,
            total=total,
            batch_size=config.batch_size,
            active=jax.process_index() == 0,
            config=config.to_dict(),
        ),
        objective=objective,
    )
    checkpoint.truncate_jsonl(workdir / "results.jsonl", start if step_saved is not None else -1)
    if step_saved is None:
        _run_baselines(r)
    step = _compile_step(r, optimizer)
    try:
        _loop(r, step, pipeline, start, steps)
    finally:
        r.watch.close()
        r.checkpoints.close()
    return r.encoders.with_params(state.eval_params(r.state, frozen))


def _loop(
    r: Run, step: Step, pipeline: data.Pipeline, start: int, steps: Mapping[str, int | None]
) -> None:
    previous_handler = signal.signal(signal.SIGTERM, lambda *_: setattr(r, "stopping", True))
    # The compiled step holds no locked tower when its features are cached.
    frozen = r.frozen
    if pipeline.features is not None:
        frozen = {k: v for k, v in frozen.items() if k != "image"}
    put = r.experiment.partitioner.put
    batches = pipeline.batches(start)
    pending: tuple[int, Any] | None = None
    try:
        for n in range(start + 1, r.total + 1):
            waited = time.perf_counter()
            batch = next(batches)
            r.watch.waited(time.perf_counter() - waited)
            r.state, metrics = step(r.state, frozen, put(batch))
            if pending is not None:
                _read(r, *pending)  # one step behind: the device is never waited for
            pending = (n, metrics)
            last, stop = n == r.total, _should_stop(r, n)
            judge = bool(r.evaluators) and (last or _due(n, steps["eval_every"]))
            save = last or stop or _due(n, steps["checkpoint_every"])
            if judge or save:
                _read(r, *pending)
                pending = None
            if judge:
                _judge(r, n)
            if save:
                _save(r, n, pipeline)
            if stop and not last:
                log.warning("stopped by SIGTERM; saved step %d; the same command resumes", n)
                raise SystemExit(143)
    finally:
        signal.signal(signal.SIGTERM, previous_handler)


def _read(r: Run, step: int, metrics: Mapping[str, Any]) -> None:
    """Fetch a step's metrics; log them when due; stop the run when the loss is not finite."""
    loss = float(metrics["loss"])
    if not math.isfinite(loss):
        r.checkpoints.wait()
        # The parameters saved at step - 1 are those that gave this loss, so they are not good.
        good = [s for s in checkpoint.saved_steps(r.workdir) if s < step - 1]
        raise NotFiniteError(
            f"loss is {loss} at step {step}; last good checkpoint: "
            f"{r.workdir / 'checkpoints' / str(good[-1]) if good else 'none yet'}. "
            f"Lower config.optim.lr, lengthen config.optim.warmup or set config.optim.clip_norm; "
            f"changed settings want a new --workdir"
        )
    r.watch.advance(step)
    if step % r.config.log_every == 0 or step == r.total:
        r.watch.train(step, {k: float(v) for k, v in metrics.items()})


def _judge(r: Run, step: int) -> None:
    began = time.perf_counter()
    encoders = r.encoders.with_params(state.eval_params(r.state, r.frozen))
    r.last_metrics = {}
    for name, evaluator in r.evaluators.items():
        values = evaluator(encoders)
        r.last_metrics |= evals.in_loop_names(values, prefix=f"val/{name}/")
        if jax.process_index() == 0:
            evals.append_result(
                r.workdir / "results.jsonl",
                evals.result_record(name, evaluator, values, model=r.config.name, step=step),
            )
    r.watch.evaluated(step, r.last_metrics, time.perf_counter() - began)


def _run_baselines(r: Run) -> None:
    for name, evaluator in r.experiment.evaluators(r.config.baselines).items():
        began = time.perf_counter()
        values = evaluator(r.encoders)
        r.watch.evaluated(0, {}, time.perf_counter() - began)
        if jax.process_index() == 0:
            model = r.config.baselines[name]["name"]
            record = evals.result_record(name, evaluator, values, model=model, step=0)
            evals.append_result(r.workdir / "results.jsonl", record)


def _save(r: Run, step: int, pipeline: data.Pipeline) -> None:
    best = r.config.checkpoint.best_metric
    if best is not None and r.last_metrics and best not in r.last_metrics:
        raise ValueError(
            f"config.checkpoint.best_metric = {best!r} is not reported; "
            f"reported: {', '.join(sorted(r.last_metrics))}"
        )
    record = {
        "step": step,
        "frozen": r.frozen_digest,
        "metrics": r.last_metrics,
        "has_ema": r.state.ema_params is not None,
        "bad_records": pipeline.bad_records(),
    }
    r.checkpoints.save(step, r.state, record)
    r.last_metrics = {}


def _should_stop(r: Run, step: int) -> bool:
    if jax.process_count() > 1:  # all hosts must agree on the step
        return multihost_utils.reached_preemption_sync_point(step)
    return r.stopping


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _durations(c: Config) -> dict[str, config_lib.Duration]:
    return {
        "total": c.total,
        "warmup": c.optim.warmup,
        "cooldown": c.optim.cooldown,
        "eval_every": c.eval_every,
        "checkpoint_every": c.checkpoint.every,
    }


def _refuse_another_run(config: Config, workdir: Path) -> None:
    path = workdir / "config.json"
    if not path.exists():
        return
    changed = {
        k: v
        for k, v in config_lib.differences(config_lib.read(path), config).items()
        if not k.startswith(FREE_ON_RESUME)
    }
    if changed:
        lines = [f"{k}: {old!r} there, {new!r} now" for k, (old, new) in changed.items()]
        raise ValueError(
            f"{workdir} holds a run with other settings; resume it with its own, or choose a new "
            f"--workdir:\n  " + "\n  ".join(lines)
        )


def _claim(config: Config, workdir: Path) -> None:
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        temporary = workdir / "config.json.tmp"
        config_lib.save(config, temporary)
        temporary.replace(workdir / "config.json")


def _start(
    exp: experiment.Experiment,
    factory: state.StateFactory,
    params: Params,
    pipeline: data.Pipeline,
    workdir: Path,
) -> tuple[TrainState, Params, str]:
    """(state at step 0, frozen parameters, their digest); what a run keeps once is saved here."""
    batches = map(exp.partitioner.put, pipeline.batches(0))
    params = calibrate.calibrate(exp.model, params, batches, exp.partitioner)
    trainable, frozen = lock.split(params, exp.is_frozen)
    if not trainable:
        raise ValueError("every parameter is locked (config.lock): there is nothing to train")
    digest = checkpoint.save_frozen(workdir, frozen)
    exp.tokenizer.save(workdir / "tokenizer")
    return factory.create(trainable), frozen, digest


def _resume(
    exp: experiment.Experiment,
    factory: state.StateFactory,
    checkpoints: checkpoint.Checkpoints,
    step: int,
    workdir: Path,
) -> tuple[TrainState, Params, str]:
    """(state, frozen parameters, their digest) of a saved step, laid out on today's mesh."""
    trainable, frozen_target = abstract_split(exp)
    restored, record = checkpoints.restore(step, factory.abstract(trainable))
    frozen = checkpoint.read_frozen(workdir, record["frozen"], frozen_target)
    log.info("resuming %s at step %d", workdir, step)
    return restored, frozen, record["frozen"]


def abstract_split(exp: experiment.Experiment) -> tuple[Params, Params]:
    """(trainable, frozen) trees of ShapeDtypeStructs with shardings."""
    shardings = exp.partitioner.shardings(exp.abstract_params)
    placed = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        exp.abstract_params,
        shardings,
    )
    return lock.split(placed, exp.is_frozen)


def _pipeline(
    exp: experiment.Experiment, source: data.Source, frozen: Params, features: Features | None
) -> data.Pipeline:
    c = exp.config
    values, valid = None, None
    if c.cache.enabled and exp.image_is_locked():
        if features is None:
            raise ValueError("config.cache.enabled, and run() was given no way to compute features")
        values, valid = features(exp, frozen, source)
    return data.Pipeline(
        source=source,
        transform=data.build_transform(c.data.transforms or c.preprocess),
        tokenizer=exp.tokenizer,
        captions=c.data.captions,
        batch_size=c.batch_size,
        seed=c.seed,
        shuffle=True,
        host_index=jax.process_index(),
        host_count=jax.process_count(),
        num_threads=c.data.num_threads,
        num_workers=c.data.num_workers,
        prefetch=c.data.prefetch,
        max_bad_fraction=c.data.max_bad_fraction,
        min_records=c.data.min_records,
        features=values,
        valid=valid,
    )


def _compile_step(r: Run, optimizer: optim.Optimizer) -> Step:
    def forward(params: Params, batch: Any, rng: jax.Array) -> Any:
        return r.experiment.model.apply(params, batch, rng=rng, train=True)

    c = r.config
    step = make_train_step(
        forward,
        r.objective,
        optimizer,
        key=r.experiment.key,
        accumulation=c.accumulation,
        ema_decay=c.optim.ema_decay,
    )
    layout = jax.tree.map(lambda x: x.sharding, r.state)
    return jax.jit(
        step, donate_argnums=0, out_shardings=(layout, r.experiment.partitioner.replicated)
    )
