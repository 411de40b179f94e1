"""Compare the training data of a resumed run with those that it was trained on.

Each checkpoint records which data the run reads. Other data would change the length of an epoch,
and with it the learning rate, without an error.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from imgtune_jax import data
from imgtune_jax.errors import UserError
from imgtune_jax.training.experiment import Experiment, StepCounts

log = logging.getLogger("imgtune_jax.training")

PATH_FIELDS = ("path", "table", "data_dir")  # fields of sources that are paths


def data_record(experiment: Experiment) -> dict[str, Any]:
    """Return what a checkpoint records of the training data, ready for JSON."""
    return {
        "num_records": len(experiment.source),
        "paths": list(_absolute_paths(experiment.config.data.source)),
        "fingerprint": data.listing_fingerprint(experiment.source),
    }


def check_same_data(
    experiment: Experiment, saved: Mapping[str, Any] | None, *, allow_changed: bool
) -> None:
    """Compare the training data with `saved`, the `data_record` of a checkpoint.

    Raises UserError if they differ, unless `allow_changed`. `saved` is None for a checkpoint that
    has no such record; then nothing is compared.
    """
    if saved is None:
        log.info("the checkpoint does not record its training data, so they are not compared")
        return
    current = data_record(experiment)
    if saved["fingerprint"] == current["fingerprint"]:
        return
    changes = "\n  ".join(
        f"{key}: {saved[key]} in the saved run, {value} now"
        for key, value in current.items()
        if saved[key] != value
    )
    if not allow_changed:
        raise UserError(
            f"config.data.source is not the data that the run was trained on:\n  {changes}\n"
            "Restore the data, choose a new --workdir, or continue on the new data with "
            "--allow_changed_data. The schedule, and all durations in epochs, then follow from the "
            "new number of records"
        )
    old_steps = StepCounts.from_config(experiment.config, saved["num_records"]).total
    log.warning(
        "continuing on other training data:\n  %s\n  steps in all: %d in the saved run, %d now",
        changes,
        old_steps,
        experiment.step_counts.total,
    )


def _absolute_paths(source: Any) -> Iterable[str]:
    """Yield the paths in a source's config, and in those of a mixture's sources."""
    for field, value in source.items():
        if field == "sources":
            for part in value:
                yield from _absolute_paths(part)
        elif field in PATH_FIELDS and value is not None:
            paths = [value] if isinstance(value, str) else value
            yield from (str(Path(path).absolute()) for path in paths)
