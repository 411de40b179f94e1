"""From a config and a folder to a run that is ready for its next step, new or resumed."""

from __future__ import annotations

import collections
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax

from imgtune_jax import config as config_lib
from imgtune_jax import data, param_tree
from imgtune_jax.config import Config
from imgtune_jax.training import batch_source, calibrate, checkpoint, experiment, optim, state
from imgtune_jax.types import Batch, Params, TrainState

log = logging.getLogger("imgtune_jax.training")

# A resumed run may change these: they do not change what is learnt.
MUTABLE_KEYS = (
    "baselines",
    "cache.path",
    "checkpoint.",
    "data.num_threads",
    "data.num_workers",
    "data.prefetch",
    "eval_every.",
    "evals",
    "log_every",
    "mesh.",
)


@dataclass(frozen=True)
class Steps:
    """The config's durations in steps; None means never."""

    total: int
    warmup: int
    cooldown: int
    eval_every: int | None
    checkpoint_every: int | None

    @classmethod
    def from_config(cls, c: Config, num_examples: int) -> Steps:
        """Of a config, on a data set of so many examples."""

        def steps(d: config_lib.Duration) -> int | None:
            return d.in_steps(batch_size=c.batch_size, num_examples=num_examples)

        return cls(
            total=steps(c.total) or 0,
            warmup=steps(c.optim.warmup) or 0,
            cooldown=steps(c.optim.cooldown) or 0,
            eval_every=steps(c.eval_every),
            checkpoint_every=steps(c.checkpoint.every),
        )


@dataclass(frozen=True)
class Prepared:
    """All that the loop starts from."""

    experiment: experiment.Experiment
    optimizer: optim.Optimizer
    steps: Steps
    batch_source: batch_source.Feed
    batches: Iterator[Batch]
    checkpoints: checkpoint.Checkpointer
    state: TrainState
    frozen: Params
    frozen_digest: str
    resumed: bool


def prepare(config: Config, workdir: Path, make_feed: batch_source.MakeFeed) -> Prepared:
    """Build everything, then start at step 0 or at the newest checkpoint of `workdir`.

    Raises ValueError for a config whose parts do not fit, and when `workdir` holds another run.
    """
    _refuse_another_run(config, workdir)
    exp = experiment.build_experiment(config)
    exp.partitioner.check_batch_size(config.batch_size // config.accumulation, "microbatch")
    source = data.build_source(config.data.source)
    steps = Steps.from_config(config, len(source))
    optimizer = optim.build_optimizer(
        config.optim,
        list(exp.is_frozen),
        total=steps.total,
        warmup=steps.warmup,
        cooldown=steps.cooldown,
    )
    _claim(config, workdir)  # only now: a config that cannot be built leaves no folder behind
    checkpoints = checkpoint.Checkpointer(workdir, config.checkpoint)
    with_ema = config.optim.ema_decay is not None
    factory = state.StateFactory(optimizer, exp.partitioner, with_ema=with_ema)
    pipeline = training_pipeline(exp, source)
    saved = checkpoints.latest_step()
    if saved is None:
        params = exp.init_params()
        brought = make_feed(exp, param_tree.split(params, exp.is_frozen)[1], pipeline)
        batches, seen = brought.batches(0), collections.deque[Batch]()
        started = _init_params_and_state(
            exp, factory, params, record_batches(batches, seen), workdir
        )
        batches = replay_batches(seen, batches)
    else:
        started = _restore_params_and_state(exp, factory, checkpoints, saved, workdir)
        brought = make_feed(exp, started[1], pipeline)
        batches = brought.batches(saved)
    if brought.store_paths and jax.process_index() == 0:
        (workdir / "cache.json").write_text(json.dumps(brought.store_paths, indent=1) + "\n")
    at, frozen, digest = started
    return Prepared(
        experiment=exp,
        optimizer=optimizer,
        steps=steps,
        batch_source=brought,
        batches=batches,
        checkpoints=checkpoints,
        state=at,
        frozen=exp.model.cast_frozen_kernels(frozen),
        frozen_digest=digest,
        resumed=saved is not None,
    )


def _refuse_another_run(config: Config, workdir: Path) -> None:
    path = workdir / "config.json"
    if not path.exists():
        return
    changed = {
        k: v
        for k, v in config_lib.differences(config_lib.load_config(path), config).items()
        if not k.startswith(MUTABLE_KEYS)
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
        config_lib.save_config(config, temporary)
        temporary.replace(workdir / "config.json")


def _init_params_and_state(
    exp: experiment.Experiment,
    factory: state.StateFactory,
    params: Params,
    batches: Iterator[Batch],
    workdir: Path,
) -> tuple[TrainState, Params, str]:
    """(state at step 0, frozen parameters, their digest); what a run keeps once is saved here."""
    params = calibrate.calibrate(exp.model, params, batches, exp.partitioner)
    trainable, frozen = param_tree.split(params, exp.is_frozen)
    if not trainable:
        raise ValueError("every parameter is locked (config.lock): there is nothing to train")
    digest = checkpoint.save_frozen(workdir, frozen)
    exp.tokenizer.save(workdir / "tokenizer")
    return factory.create(trainable), frozen, digest


def record_batches(batches: Iterator[Batch], seen: collections.deque[Batch]) -> Iterator[Batch]:
    """The batches, each of which `seen` remembers."""
    for batch in batches:
        seen.append(batch)
        yield batch


def replay_batches(seen: collections.deque[Batch], batches: Iterator[Batch]) -> Iterator[Batch]:
    """What was seen, each let go of when it comes, then the rest."""
    while seen:
        yield seen.popleft()
    yield from batches


def _restore_params_and_state(
    exp: experiment.Experiment,
    factory: state.StateFactory,
    checkpoints: checkpoint.Checkpointer,
    step: int,
    workdir: Path,
) -> tuple[TrainState, Params, str]:
    """(state, frozen parameters, their digest) of a saved step, laid out on today's mesh."""
    trainable, frozen_target = abstract_split(exp)
    restored, record = checkpoints.restore(step, factory.abstract(trainable))
    frozen = checkpoint.restore_frozen(workdir, record["frozen"], frozen_target)
    log.info("resuming %s at step %d", workdir, step)
    return restored, frozen, record["frozen"]


def abstract_split(exp: experiment.Experiment) -> tuple[Params, Params]:
    """(trainable, frozen) trees of ShapeDtypeStructs with shardings."""
    shardings = exp.partitioner.param_shardings(exp.abstract_params)
    placed = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        exp.abstract_params,
        shardings,
    )
    return param_tree.split(placed, exp.is_frozen)


def training_pipeline(exp: experiment.Experiment, source: data.Source) -> data.Pipeline:
    """The pipeline that a config's training reads."""
    c = exp.config
    return data.Pipeline(
        source=source,
        transform=data.build_transform(c.data.transforms or c.preprocess),
        tokenizer=exp.tokenizer,
        caption_weights=c.data.caption_weights,
        prefixes=c.data.prefixes,
        length_buckets=c.data.length_buckets,
        batch_size=c.batch_size,
        seed=c.seed,
        shuffle=True,
        host_index=jax.process_index(),
        host_count=jax.process_count(),
        num_threads=c.data.num_threads,
        num_workers=c.data.num_workers,
        prefetch=c.data.prefetch,
        max_bad_fraction=c.data.max_bad_fraction,
        max_bad_fraction_after=c.data.max_bad_fraction_after,
    )
