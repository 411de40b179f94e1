"""The choice of checkpoints to retain: the newest ones, and the best ones by a metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orbax.checkpoint.checkpoint_managers import preservation_policy

from imgtune_jax import evals
from imgtune_jax.config import CheckpointConfig


def retained_steps(
    steps: Sequence[int], cfg: CheckpointConfig, values: Mapping[int, float]
) -> set[int]:
    """Return the steps to retain of all saved `steps`.

    These are the newest `cfg.keep_last` (at least one) and, of those evaluated, the
    `cfg.keep_best` best. `values` maps evaluated steps to `cfg.best_metric`. Of steps with equal
    values, the later is better.
    """
    newest = sorted(steps)[-max(cfg.keep_last, 1) :]
    if cfg.best_metric is None or not cfg.keep_best:
        return set(newest)
    sign = -1 if lower_is_better(cfg) else 1
    ranked = sorted((s for s in steps if s in values), key=lambda s: (sign * values[s], s))
    return {*newest, *ranked[-cfg.keep_best :]}


def lower_is_better(cfg: CheckpointConfig) -> bool:
    """Whether the lowest value of `cfg.best_metric` is the best.

    `cfg.best_mode` determines it or, if that is None, the name of the metric.
    """
    if cfg.best_mode is not None:
        return cfg.best_mode == "min"
    assert cfg.best_metric is not None, "only the best of a metric has a mode"
    metric = cfg.best_metric.split("/", 2)[-1]  # without "val/" and the evaluator's name
    return evals.metric_sign(metric) < 0


class RetentionPolicy(preservation_policy.PreservationPolicy):
    """`retained_steps` as Orbax's policy. The caller adds to `values` after each evaluation."""

    def __init__(self, cfg: CheckpointConfig, values: Mapping[int, float]) -> None:
        self._cfg, self._values = cfg, values

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """Return, for each checkpoint, whether to retain it."""
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        retained = retained_steps(steps, self._cfg, self._values)
        return [step in retained for step in steps]
