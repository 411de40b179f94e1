"""How fast a config's input is, stage by stage, and whether input or the step limits its training.

What is timed is training that reads pictures: of a locked tower with a cache, the pass that fills
it. Once the cache is full, nothing is decoded.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from imgtune_jax import data, param_tree
from imgtune_jax.config import Config
from imgtune_jax.data import image
from imgtune_jax.training import experiment, loop, optim, run, state
from imgtune_jax.types import Batch

NUM_RECORDS = 256  # whose stages are timed one by one
PIPELINE_SECONDS = 10.0  # of the whole pipeline
NUM_STEPS = 3


@dataclass(frozen=True)
class Throughput:
    """Records a second: of each stage alone in one thread, of the whole pipeline, of the step."""

    stages: dict[str, float]
    pipeline: float
    step: float

    @property
    def bottleneck(self) -> str:
        """Which is slower, "input" or "compute"."""
        return "input" if self.pipeline < self.step else "compute"


def measure(config: Config) -> Throughput:
    """Time the input of a config's training, and its step on one batch.

    Raises ValueError for a config whose parts do not fit, and when none of the records is whole.
    """
    exp = experiment.build_experiment(config)
    source = data.build_source(config.data.source)
    pipeline = run.training_pipeline(exp, source)
    speeds = time_stages(pipeline)
    whole, local = time_pipeline(pipeline)
    if not local["example_mask"].any():
        raise ValueError("none of the batch's records could be read; see the warnings above")
    placed, seconds = _timed(lambda: jax.block_until_ready(exp.partitioner.put_batch(local)))
    speeds["put on the device"] = config.batch_size / seconds
    return Throughput(speeds, whole * jax.process_count(), time_step(exp, len(source), placed))


def time_stages(pipeline: data.Pipeline) -> dict[str, float]:
    """Records a second of each stage, one after another in this thread.

    Stages of pictures and captions are timed on the records that have them.
    """
    rows, size = pipeline.row_builder(), pipeline.batch_size
    collate, places = pipeline.collator(), range(min(NUM_RECORDS, len(pipeline.source)))
    speeds: dict[str, float] = {}

    def timed(stage: str, function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        out, seconds = _timed(lambda: [function(item) for item in items])
        if items:
            speeds[stage] = len(items) / seconds
        return out

    records = timed("read", lambda i: pipeline.source[rows.locate(i)[1]], places)
    images = _readable([record.image for record in records])
    timed("decode", image.decode_image, images)
    if pipeline.transform is not None:
        transform, rngs = pipeline.transform, map(np.random.default_rng, itertools.count())
        timed("decode and transform", lambda x: transform(image.open_image(x), next(rngs)), images)
    made = timed("all of a row", rows, places)
    batch = list(itertools.islice(itertools.cycle(made), size))
    if pipeline.tokenizer is not None:
        texts = [row["caption"].text for row in batch if "caption" in row]
        _, seconds = _timed(lambda: pipeline.tokenizer and pipeline.tokenizer(texts))
        speeds["tokenize"] = len(texts) / seconds
    _, seconds = _timed(lambda: collate(batch))
    speeds["tokenize and batch"] = size / seconds
    return speeds


def time_pipeline(pipeline: data.Pipeline) -> tuple[float, data.NumpyBatch]:
    """(this host's records a second with the config's threads and workers, a batch)."""
    at_once = max(1, pipeline.num_threads) * max(1, pipeline.num_workers)
    batches = pipeline.batches()
    for _ in range(at_once):  # they are ready together, at the start and later
        batch = next(batches)
    began, count = time.perf_counter(), 0
    while count % at_once or time.perf_counter() - began < PIPELINE_SECONDS:
        batch, count = next(batches), count + 1
    speed = count * len(batch["index"]) / (time.perf_counter() - began)
    return speed, batch


def time_step(exp: experiment.Experiment, num_records: int, batch: Batch) -> float:
    """Records a second of the compiled step, nothing of it cached."""
    c = exp.config
    total = run.Steps.from_config(c, num_records).total
    optimizer = optim.build_optimizer(
        c.optim, list(exp.is_frozen), total=total, warmup=0, cooldown=0
    )
    factory = state.StateFactory(optimizer, exp.partitioner, with_ema=c.optim.ema_decay is not None)
    trainable, frozen = param_tree.split(exp.init_params(), exp.is_frozen)
    current = factory.create(trainable)
    step = loop.compile_step(exp, optimizer, current)
    times = []
    for _ in range(NUM_STEPS + 1):  # the first one compiles
        began = time.perf_counter()
        current, metrics = step(current, frozen, batch)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - began)
    return c.batch_size / statistics.median(times[1:])


def format_table(speeds: Throughput, config: Config) -> str:
    """A table, and what limits the run."""
    d, lines = config.data, [f"{'stage, one thread':24} records/s"]
    lines += [f"{stage:24} {speed:9.0f}" for stage, speed in speeds.stages.items()]
    lines += [
        f"\nwhole pipeline           {speeds.pipeline:9.0f}   "
        f"data.num_threads = {d.num_threads}, data.num_workers = {d.num_workers}",
        f"training step            {speeds.step:9.0f}   batch {config.batch_size}, nothing cached",
        f"\n{speeds.bottleneck} limits this run: "
        f"the pipeline could bring {speeds.pipeline / speeds.step:.2g} times what the step takes.",
    ]
    if jax.default_backend() == "cpu":
        lines += ["On a CPU both share the cores, so a run is slower than either."]
    return "\n".join(lines)


def _timed(function: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    out = function()
    return out, time.perf_counter() - began


def _readable(images: Sequence[Any]) -> list[Any]:
    out = []
    for one in images:
        try:
            image.decode_image(one)
        except data.BadRecord:
            continue
        out.append(one)
    return out
