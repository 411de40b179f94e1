"""Checkpoints: one Orbax item set a step, atomic, asynchronous, keep-best and keep-last-n.

A checkpoint holds the TrainState (trainable parameters, optimizer, step) and a small JSON record.
The data position is the step itself (a batch is a function of seed and step), so nothing else is
needed to resume. Frozen parameters are saved once a run, beside the checkpoints, under a digest.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep

from imgtune_jax import config as config_lib
from imgtune_jax.param_tree import params_digest
from imgtune_jax.types import Params, PyTree, TrainState

log = logging.getLogger("imgtune_jax.training")


class Checkpointer:
    """The folder `checkpoints/` of a run."""

    def __init__(self, workdir: Path, cfg: config_lib.CheckpointConfig) -> None:
        policies: list[Any] = [keep.LatestN(max(cfg.keep_last, 1))]
        if cfg.best_metric is not None and cfg.keep_best:
            best = cfg.best_metric
            policies.append(
                keep.BestN(
                    get_metric_fn=lambda m: m.get(best, -math.inf),
                    n=cfg.keep_best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep.AnyPreservationPolicy(policies), cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(workdir / "checkpoints", options=options)
        self._best_metric = cfg.best_metric

    def save(self, step: int, state: TrainState, record: Mapping[str, Any]) -> None:
        """Start saving; the arrays are copied before this returns. A step already saved stays."""
        if step in self._manager.all_steps():
            return
        metrics = record.get("metrics") or None
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state), record=ocp.args.JsonSave(dict(record))
        )
        self._manager.save(step, args=args, metrics=metrics)

    def restore(self, step: int, target: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The state, laid out as `target` says, and the record of a step."""
        args = ocp.args.Composite(state=_restore_args(target), record=ocp.args.JsonRestore())
        found = self._manager.restore(step, args=args)
        return found["state"], found["record"]

    def wait(self) -> None:
        """Return when all saves that were started are on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, and let go of the folder."""
        self.wait()
        self._manager.close()


def restore_params(workdir: Path, step: int | None, target: Params) -> tuple[Params, str, int]:
    """For use rather than training: (trainable parameters, digest of the frozen ones, step).

    The moving average is read where the run kept one; the optimizer's state is not read. `step`
    None means the newest. Raises FileNotFoundError naming the steps that there are.
    """
    folder = workdir / "checkpoints"
    steps = saved_steps(workdir)
    if not steps or (step is not None and step not in steps):
        wanted = "any checkpoint" if step is None else f"step {step}"
        raise FileNotFoundError(f"{folder} holds no {wanted}; saved steps: {steps or 'none'}")
    chosen = steps[-1] if step is None else step
    with ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(read_only=True)) as m:
        record = m.restore(chosen, args=ocp.args.Composite(record=ocp.args.JsonRestore()))["record"]
        name = "ema_params" if record["has_ema"] else "params"
        args = ocp.args.Composite(state=_restore_args({name: target}, partial_restore=True))
        return m.restore(chosen, args=args)["state"][name], record["frozen"], chosen


def _restore_args(target: PyTree, **options: Any) -> Any:
    restore_args = ocp.checkpoint_utils.construct_restore_args(target)
    return ocp.args.PyTreeRestore(target, restore_args=restore_args, **options)


def saved_steps(workdir: Path) -> list[int]:
    """Steps of the complete checkpoints, ascending."""
    folder = workdir / "checkpoints"
    if not folder.is_dir():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if p.is_dir() and p.name.isdigit())


def latest_step(workdir: Path) -> int | None:
    """Return the step of the newest complete checkpoint, None if there is none."""
    return max(saved_steps(workdir), default=None)


def save_frozen(workdir: Path, frozen: Params) -> str:
    """Save the locked parameters once under `frozen/<digest>`; returns the digest."""
    name = params_digest(frozen)[:16]
    folder = workdir / "frozen" / name
    if frozen and not folder.exists():
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder, frozen)
    return name


def restore_frozen(workdir: Path, name: str, target: PyTree) -> Params:
    """The locked parameters of a run, laid out as `target` says. Raises ValueError if altered."""
    if not jax.tree.leaves(target):
        return {}
    with ocp.StandardCheckpointer() as checkpointer:
        frozen = checkpointer.restore(workdir / "frozen" / name, target)
    if (found := params_digest(frozen)[:16]) != name:
        raise ValueError(
            f"{workdir}/frozen/{name} has digest {found}: the locked weights were altered since "
            f"training; restore the folder from a copy"
        )
    return frozen
