"""Checkpoints with Orbax: atomic and asynchronous; the newest n and the best n are retained.

A checkpoint holds the TrainState (step, trainable parameters, optimizer state, moving average) and
a small JSON record (metrics, digest of the frozen parameters, counts of bad records). The step is
also the position in the data, since a batch is a function of seed and step. Frozen parameters are
saved once per run, outside the checkpoints, in a folder named after their digest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from imgtune_jax import config as config_lib
from imgtune_jax.errors import MissingFileError, UserError
from imgtune_jax.param_tree import params_digest
from imgtune_jax.training import workdir_files
from imgtune_jax.types import Params, PyTree, TrainState


class Checkpointer:
    """Saves and restores the checkpoints of a run."""

    def __init__(self, workdir: Path, cfg: config_lib.CheckpointConfig) -> None:
        policies: list[Any] = [preservation_policy.LatestN(max(cfg.keep_last, 1))]
        if cfg.best_metric is not None and cfg.keep_best:
            best_metric = cfg.best_metric
            policies.append(
                preservation_policy.BestN(
                    get_metric_fn=lambda metrics: metrics.get(best_metric, -math.inf),
                    n=cfg.keep_best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager(workdir / workdir_files.CHECKPOINTS, options=options)

    def save(self, step: int, state: TrainState, record: Mapping[str, Any]) -> None:
        """Start saving in the background; do nothing if this step is already saved.

        The arrays are copied before this method returns, so the caller may donate them.
        """
        if step in self._manager.all_steps():
            return
        metrics = record.get("metrics") or None
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state), record=ocp.args.JsonSave(dict(record))
        )
        self._manager.save(step, args=args, metrics=metrics)

    def restore(self, step: int, target: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Return (state with the shardings of `target`, JSON record) of a saved step."""
        args = ocp.args.Composite(state=_restore_args(target), record=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=args)
        return restored["state"], restored["record"]

    def wait(self) -> None:
        """Block until all saves that have started are on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait until all saves are on disk, then close the checkpoint manager."""
        self.wait()
        self._manager.close()


def restore_params(workdir: Path, step: int | None, target: Params) -> tuple[Params, str, int]:
    """Restore for inference: return (trainable parameters, digest of the frozen ones, step).

    If the run has an exponential moving average (EMA) of the parameters, the average is returned
    instead. The optimizer state is not read. `step=None` means the newest checkpoint. If there is
    no such checkpoint, raises MissingFileError, which lists the saved steps.
    """
    folder = workdir / workdir_files.CHECKPOINTS
    steps = saved_steps(workdir)
    if not steps or (step is not None and step not in steps):
        expected = "checkpoint" if step is None else f"checkpoint of step {step}"
        advice = "choose one of them" if steps else "train until the first one"
        raise MissingFileError(
            f"{folder} has no {expected}; saved steps: {steps or 'none'}; {advice}"
        )
    chosen = steps[-1] if step is None else step
    options = ocp.CheckpointManagerOptions(read_only=True)
    with ocp.CheckpointManager(folder, options=options) as manager:
        args = ocp.args.Composite(record=ocp.args.JsonRestore())
        record = manager.restore(chosen, args=args)["record"]
        name = "ema_params" if record["has_ema"] else "params"
        args = ocp.args.Composite(state=_restore_args({name: target}, partial_restore=True))
        return manager.restore(chosen, args=args)["state"][name], record["frozen"], chosen


def _restore_args(target: PyTree, **options: Any) -> Any:
    restore_args = ocp.checkpoint_utils.construct_restore_args(target)
    return ocp.args.PyTreeRestore(target, restore_args=restore_args, **options)


def saved_steps(workdir: Path) -> list[int]:
    """Return the steps of the complete checkpoints, ascending."""
    folder = workdir / workdir_files.CHECKPOINTS
    if not folder.is_dir():
        return []
    return sorted(
        int(path.name) for path in folder.iterdir() if path.is_dir() and path.name.isdigit()
    )


def latest_step(workdir: Path) -> int | None:
    """Return the step of the newest complete checkpoint, or None without checkpoints."""
    return max(saved_steps(workdir), default=None)


def save_frozen(workdir: Path, frozen: Params) -> str:
    """Save the frozen parameters in `frozen/<digest>` if they are not there; return the digest."""
    digest = _short_digest(frozen)
    folder = workdir / workdir_files.FROZEN / digest
    if frozen and not folder.exists():
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder, frozen)
    return digest


def restore_frozen(workdir: Path, digest: str, target: PyTree) -> Params:
    """Restore the frozen parameters of a run, with the shardings of `target`.

    Raises UserError if they do not have this digest.
    """
    if not jax.tree.leaves(target):
        return {}
    folder = workdir / workdir_files.FROZEN / digest
    if not folder.is_dir():
        raise MissingFileError(
            f"no frozen parameters at {folder}; restore the folder from a backup"
        )
    with ocp.StandardCheckpointer() as checkpointer:
        frozen = checkpointer.restore(folder, target)
    if (actual := _short_digest(frozen)) != digest:
        raise UserError(
            f"{folder} has the digest {actual}; expected {digest}, since frozen parameters do not "
            f"change after the start of training; restore the folder from a backup"
        )
    return frozen


def _short_digest(params: Params) -> str:
    return params_digest(params)[:16]
