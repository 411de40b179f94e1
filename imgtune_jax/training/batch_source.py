"""What brings batches to the step. The plain one is here; `imgtune_jax.cache` has another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from imgtune_jax import data
from imgtune_jax.partition import Partitioner
from imgtune_jax.training.experiment import Experiment
from imgtune_jax.types import Batch, Params


class Feed(Protocol):
    """Batches on the mesh. Batch t is a pure function of the config and t."""

    @property
    def pipeline(self) -> data.Pipeline:
        """Where the batches come from."""
        ...

    @property
    def store_paths(self) -> dict[str, str]:
        """Where features are kept, by tower."""
        ...

    def batches(self, start: int) -> Iterator[Batch]:
        """Batches start, start + 1, … without end."""
        ...

    def flush(self) -> None:
        """Make what was computed on the way durable: a checkpoint is about to be saved."""
        ...

    def needs_param(self, path: str) -> bool:
        """Does the step need this parameter, given what the batches bring?"""
        ...


MakeFeed = Callable[[Experiment, Params, data.Pipeline], Feed]  # Params: all that are locked


@dataclass(frozen=True)
class PlainFeed:
    """Batches as the pipeline gives them."""

    pipeline: data.Pipeline
    partitioner: Partitioner

    @classmethod
    def make(cls, exp: Experiment, locked: Params, pipeline: data.Pipeline) -> PlainFeed:
        """A MakeFeed."""
        del locked
        return cls(pipeline, exp.partitioner)

    def batches(self, start: int) -> Iterator[Batch]:
        """Batches start, start + 1, … without end."""
        return map(self.partitioner.put_batch, self.pipeline.batches(start))

    @property
    def store_paths(self) -> dict[str, str]:
        """Nowhere."""
        return {}

    def flush(self) -> None:
        """Nothing was computed."""

    def needs_param(self, path: str) -> bool:
        """All of them."""
        del path
        return True
