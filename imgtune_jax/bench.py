"""Measure the speed of a config's training input, stage by stage, and of its training step.

The input is measured without cached features. A run with a feature cache has this input speed only
while it fills the cache; later epochs read features instead of images.
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

from imgtune_jax import data
from imgtune_jax.config import Config
from imgtune_jax.data import image
from imgtune_jax.errors import UserError
from imgtune_jax.training.experiment import Experiment, build_experiment
from imgtune_jax.types import Batch

NUM_RECORDS = 256  # number of records that each stage is timed on
PIPELINE_SECONDS = 10.0  # minimum time for which the full pipeline is timed
NUM_STEPS = 3  # number of timed steps, after a first one that compiles


@dataclass(frozen=True)
class Throughput:
    """Records per second of each stage (alone, in one thread), full pipeline and training step."""

    stages: dict[str, float]
    pipeline: float
    step: float

    @property
    def bottleneck(self) -> str:
        """The slower of "input" (full pipeline) and "compute" (training step)."""
        return "input" if self.pipeline < self.step else "compute"


def measure(config: Config) -> Throughput:
    """Time the input of a config's training, and its step on one batch.

    Raises UserError if parts of the config do not fit each other or no record of a batch is valid.
    """
    experiment = build_experiment(config)
    pipeline = experiment.pipeline
    stages = time_stages(pipeline)
    pipeline_speed, local = time_pipeline(pipeline)
    if not local["example_mask"].any():
        raise UserError("no record of the batch could be read; see the warnings above")
    batch, seconds = _timed(lambda: jax.block_until_ready(experiment.partitioner.put_batch(local)))
    stages["put on the device"] = config.batch_size / seconds
    return Throughput(
        stages, pipeline_speed * jax.process_count(), step=time_step(experiment, batch)
    )


def time_stages(pipeline: data.Pipeline) -> dict[str, float]:
    """Return the records per second of each stage, timed one after another in this thread.

    Image and caption stages are timed on the records that have images and captions.
    """
    build_row, size = pipeline.row_builder(), pipeline.batch_size
    collate = pipeline.collator()
    positions = range(min(NUM_RECORDS, len(pipeline.source)))
    speeds: dict[str, float] = {}

    def timed(stage: str, function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        results, seconds = _timed(lambda: [function(item) for item in items])
        if items:
            speeds[stage] = len(items) / seconds
        return results

    records = timed("read", lambda i: pipeline.source[build_row.locate(i)[1]], positions)
    images = _readable([record.image for record in records])
    timed("decode", image.decode_image, images)
    if pipeline.transform is not None:
        transform, rngs = pipeline.transform, map(np.random.default_rng, itertools.count())
        timed("decode and transform", lambda x: transform(image.open_image(x), next(rngs)), images)
    rows = timed("full row", build_row, positions)
    batch = list(itertools.islice(itertools.cycle(rows), size))
    if pipeline.tokenizer is not None:
        texts = [row["caption"].text for row in batch if "caption" in row]
        _, seconds = _timed(lambda: pipeline.tokenizer and pipeline.tokenizer(texts))
        speeds["tokenize"] = len(texts) / seconds
    _, seconds = _timed(lambda: collate(batch))
    speeds["tokenize and batch"] = size / seconds
    return speeds


def time_pipeline(pipeline: data.Pipeline) -> tuple[float, data.NumpyBatch]:
    """Return (records per second of this host with the config's parallelism, a batch)."""
    num_parallel = max(1, pipeline.num_threads) * max(1, pipeline.num_workers)
    batches = pipeline.batches()
    # About `num_parallel` batches become ready at a time, so count in multiples of that number.
    for _ in range(num_parallel):
        batch = next(batches)
    start_time, count = time.perf_counter(), 0
    while count % num_parallel or time.perf_counter() - start_time < PIPELINE_SECONDS:
        batch, count = next(batches), count + 1
    speed = count * len(batch["index"]) / (time.perf_counter() - start_time)
    return speed, batch


def time_step(experiment: Experiment, batch: Batch) -> float:
    """Return the records per second of the compiled step, without cached features."""
    trainable, frozen = experiment.split_params(experiment.init_params())
    state = experiment.create_state(trainable)
    times = []
    for _ in range(NUM_STEPS + 1):
        start_time = time.perf_counter()
        state, metrics = experiment.train_step(state, frozen, batch)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - start_time)
    return experiment.config.batch_size / statistics.median(times[1:])  # the first step compiles


def format_table(speeds: Throughput, config: Config) -> str:
    """Format the speeds as a table, followed by the bottleneck."""
    d, lines = config.data, [f"{'stage, one thread':24} records/s"]
    lines += [f"{stage:24} {speed:9.0f}" for stage, speed in speeds.stages.items()]
    lines += [
        f"\nfull pipeline            {speeds.pipeline:9.0f}   "
        f"data.num_threads = {d.num_threads}, data.num_workers = {d.num_workers}",
        f"training step            {speeds.step:9.0f}   "
        f"batch {config.batch_size}, no cached features",
        f"\n{speeds.bottleneck} limits this run: "
        f"the pipeline is {speeds.pipeline / speeds.step:.2g} times as fast as the step.",
    ]
    if jax.default_backend() == "cpu":
        lines += ["On a CPU, pipeline and step share the cores, so a run is slower than either."]
    return "\n".join(lines)


def _timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """Return (result of a call, seconds that it took)."""
    start_time = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start_time


def _readable(images: Sequence[Any]) -> list[Any]:
    """Return the images that can be decoded."""
    readable = []
    for candidate in images:
        try:
            image.decode_image(candidate)
        except data.BadRecord:
            continue
        readable.append(candidate)
    return readable
