"""Checkpoints with Orbax: atomic and asynchronous; the newest n and the best n are retained.

A checkpoint holds the TrainState (step, trainable parameters, optimizer state, moving average) and
a small JSON record (digest of the frozen parameters, counts of bad records). The step is also the
position in the data, since a batch is a function of seed and step. Frozen parameters are saved once
per run, outside the checkpoints, in a folder named after their digest.

A checkpoint that cannot be read, or that has a number that is not finite, is damaged: reading the
newest checkpoint passes over it.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from imgtune_jax import config as config_lib
from imgtune_jax.disk_space import explain_full_disk, is_disk_full
from imgtune_jax.errors import MissingFileError, UserError
from imgtune_jax.param_tree import params_digest
from imgtune_jax.training import workdir_files
from imgtune_jax.training.retention import RetentionPolicy, retained_steps
from imgtune_jax.training.state import non_finite_paths
from imgtune_jax.types import Params, PyTree, TrainState

log = logging.getLogger("imgtune_jax.training")
T = TypeVar("T")

REQUIRED_FILES = ("state/_METADATA", "record/metadata")  # in the folder of a checkpoint
TMP_DIR_SUFFIX = ".orbax-checkpoint-tmp"  # Orbax's name of a folder that is being written
DAMAGED_SUFFIX = ".damaged"  # of a folder in `checkpoints` that is set aside


class SavedState(NamedTuple):
    """A restored checkpoint."""

    step: int
    state: TrainState
    record: dict[str, Any]


class Checkpointer:
    """Saves the checkpoints of a run, and deletes those that are not to be retained."""

    def __init__(self, workdir: Path, cfg: config_lib.CheckpointConfig) -> None:
        self._folder, self._cfg = workdir / workdir_files.CHECKPOINTS, cfg
        self._step, self._num_bytes = 0, 0  # of the newest save
        self._best_values: dict[int, float] = {}  # of `cfg.best_metric`, by step
        if cfg.best_metric is not None:
            self._best_values = workdir_files.read_metric(workdir, cfg.best_metric)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=RetentionPolicy(cfg, self._best_values),
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def save(self, step: int, state: TrainState, record: Mapping[str, Any]) -> None:
        """Start saving in the background. A damaged checkpoint of this step is replaced.

        The arrays are copied before this method returns, so the caller may donate them. Raises
        DiskFullError if this save, or the one before, does not fit on the disk.
        """
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state), record=ocp.args.JsonSave(dict(record))
        )
        self.wait()
        # The size on disk depends on the compression. It changes little from step to step.
        newest = self._manager.latest_step()
        wanted = _num_bytes(state) if newest is None else _size_on_disk(self._folder / str(newest))
        self._step, self._num_bytes = step, wanted
        with self._explain_full_disk():
            if shutil.disk_usage(self._folder).free < wanted:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._manager.save(step, args=args)
        if jax.process_index() == 0:
            shutil.rmtree(self._folder / f"{step}{DAMAGED_SUFFIX}", ignore_errors=True)

    def add_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Note the metrics that were evaluated after the save of a step, for retention."""
        best_metric = self._cfg.best_metric
        if best_metric is None:
            return
        if best_metric in metrics:
            self._best_values[step] = metrics[best_metric]
        else:
            log.warning(
                "config.checkpoint.best_metric = %r was not reported at step %d, so its checkpoint "
                "is not retained as one of the best; reported: %s",
                best_metric,
                step,
                ", ".join(sorted(metrics)) or "nothing",
            )

    def delete_old(self) -> None:
        """Delete the checkpoints that are not to be retained after the last evaluation."""
        self.wait()
        steps = self._manager.all_steps()
        for step in set(steps) - retained_steps(steps, self._cfg, self._best_values):
            self._manager.delete(step)

    def wait(self) -> None:
        """Block until all saves that have started are on disk.

        Raises DiskFullError if one does not fit on the disk.
        """
        with self._explain_full_disk():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait until all saves are on disk, then close the checkpoint manager."""
        self.wait()
        self._manager.close()

    def _explain_full_disk(self) -> contextlib.AbstractContextManager[None]:
        name = f"the checkpoint of step {self._step}"
        return _explain_full_disk(self._folder / str(self._step), name, self._num_bytes)


@contextlib.contextmanager
def _explain_full_disk(folder: Path, name: str, num_bytes: int) -> Iterator[None]:
    """If saving to `folder` fails on a full disk, raise DiskFullError, and leave no files.

    Orbax saves to a temporary folder, and renames it when it is complete.
    """
    with explain_full_disk(folder.parent, name, wanted=num_bytes):
        try:
            yield
        except Exception as error:
            if is_disk_full(error):
                for path in folder.parent.glob(f"{folder.name}{TMP_DIR_SUFFIX}*"):
                    shutil.rmtree(path, ignore_errors=True)
            raise


def _num_bytes(tree: PyTree) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def _size_on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def read_record(workdir: Path, step: int) -> dict[str, Any]:
    """Return the JSON record of a saved step."""
    options = ocp.CheckpointManagerOptions(read_only=True)
    folder = workdir / workdir_files.CHECKPOINTS
    with ocp.CheckpointManager(folder, options=options) as manager:
        args = ocp.args.Composite(record=ocp.args.JsonRestore())
        return manager.restore(step, args=args)["record"]


def restore_newest(workdir: Path, target: TrainState) -> SavedState | None:
    """Restore the newest checkpoint that is not damaged, with the shardings of `target`.

    The damaged ones after it are named in the log. Returns None without checkpoints. Raises
    UserError if all are damaged.
    """

    def restore(step: int) -> SavedState:
        with _open_manager(workdir) as manager:
            args = ocp.args.Composite(state=_restore_args(target), record=ocp.args.JsonRestore())
            restored = manager.restore(step, args=args)
        if paths := non_finite_paths(restored["state"]):
            raise UserError(f"{paths[0]} is not finite")
        return SavedState(step, restored["state"], restored["record"])

    steps = saved_steps(workdir)
    return _first_undamaged(workdir, steps, restore) if steps else None


def restore_params(workdir: Path, step: int | None, target: Params) -> tuple[Params, str, int]:
    """Restore for inference: return (trainable parameters, digest of the frozen ones, step).

    If the run has an exponential moving average (EMA) of the parameters, the average is returned
    instead. The optimizer state is not read. `step=None` means the newest checkpoint that can be
    read. If there is no such checkpoint, raises MissingFileError, which lists the saved steps.
    Raises UserError if the checkpoint of `step`, or every checkpoint, is damaged.
    """
    folder = workdir / workdir_files.CHECKPOINTS
    steps = saved_steps(workdir)
    if not steps or (step is not None and step not in steps):
        expected = "checkpoint" if step is None else f"checkpoint of step {step}"
        advice = "choose one of them" if steps else "train until the first one"
        raise MissingFileError(
            f"{folder} has no {expected}; saved steps: {steps or 'none'}; {advice}"
        )

    def restore(step: int) -> tuple[Params, str, int]:
        with _open_manager(workdir) as manager:
            args = ocp.args.Composite(record=ocp.args.JsonRestore())
            record = manager.restore(step, args=args)["record"]
            name = "ema_params" if record["has_ema"] else "params"
            args = ocp.args.Composite(state=_restore_args({name: target}, partial_restore=True))
            return manager.restore(step, args=args)["state"][name], record["frozen"], step

    return _first_undamaged(workdir, steps if step is None else [step], restore)


def _first_undamaged(workdir: Path, steps: list[int], restore: Callable[[int], T]) -> T:
    """Return `restore` of the newest of `steps` with which it succeeds.

    Raises UserError, naming the damage of each, if it succeeds with none.
    """
    errors: dict[str, Exception] = {}
    for step in reversed(steps):
        folder = workdir / workdir_files.CHECKPOINTS / str(step)
        try:
            for name in REQUIRED_FILES:
                if not (folder / name).exists():
                    raise MissingFileError(f"{name} is missing")
            restored = restore(step)
        except Exception as error:  # Orbax raises many kinds, depending on the damaged file
            errors[f"{folder}: {_first_line(error)}"] = error
            continue
        for damage in errors:
            log.warning("passed over a damaged checkpoint; the one before is used: %s", damage)
        return restored
    others = sorted(set(saved_steps(workdir)) - set(steps))
    advice = f"choose another step, one of {others}" if others else "restore one from a backup"
    raise UserError(f"no checkpoint can be read; {advice}:\n  " + "\n  ".join(errors)) from list(
        errors.values()
    )[-1]


def set_damaged_aside(workdir: Path, step: int) -> None:
    """Rename the checkpoints after `step`, which are damaged, so that training can save theirs."""
    damaged = [s for s in saved_steps(workdir) if s > step]
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("damaged checkpoints are known")
    if jax.process_index() == 0:
        for path in (workdir / workdir_files.CHECKPOINTS / str(s) for s in damaged):
            aside = path.with_name(f"{path.name}{DAMAGED_SUFFIX}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("damaged checkpoints are set aside")


def _first_line(error: BaseException) -> str:
    """Return the first line of the error that caused `error`, shortened."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).split("\n")[0] or type(error).__name__)[:200]


def _open_manager(workdir: Path) -> Any:
    options = ocp.CheckpointManagerOptions(read_only=True)
    return ocp.CheckpointManager(workdir / workdir_files.CHECKPOINTS, options=options)


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
    """Save the frozen parameters in `frozen/<digest>` if they are not there; return the digest.

    Those with another digest, of a run that stopped before its first checkpoint, are deleted.
    """
    digest = _short_digest(frozen)
    folder = workdir / workdir_files.FROZEN / digest
    if frozen and not folder.exists():
        with (
            _explain_full_disk(folder, "the frozen parameters", _num_bytes(frozen)),
            ocp.StandardCheckpointer() as checkpointer,
        ):
            checkpointer.save(folder, frozen)
    if jax.process_index() == 0:
        others = [path for path in folder.parent.glob("*") if path.name != digest]
        for path in others if frozen else [folder.parent]:
            shutil.rmtree(path, ignore_errors=True)
    return digest


def restore_frozen(workdir: Path, digest: str, target: PyTree) -> Params:
    """Restore the frozen parameters of a run, with the shardings of `target`.

    Raises UserError if they cannot be read, or do not have this digest.
    """
    if not jax.tree.leaves(target):
        return {}
    folder = workdir / workdir_files.FROZEN / digest
    if not folder.is_dir():
        raise MissingFileError(
            f"no frozen parameters at {folder}; restore the folder from a backup"
        )
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            frozen = checkpointer.restore(folder, target)
    except Exception as error:  # as in `_first_undamaged`
        raise UserError(
            f"{folder} is damaged: {_first_line(error)}; restore the folder from a backup"
        ) from error
    if (actual := _short_digest(frozen)) != digest:
        raise UserError(
            f"{folder} has the digest {actual}; expected {digest}, since frozen parameters do not "
            f"change after the start of training; restore the folder from a backup"
        )
    return frozen


def _short_digest(params: Params) -> str:
    return params_digest(params)[:16]
