"""Optimizers built on Optax, with multipliers by parameter path.

Numbers such as 2106.04560 are arXiv identifiers.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from imgtune_jax import config as config_lib
from imgtune_jax import locking, param_tree
from imgtune_jax.errors import UserError
from imgtune_jax.training.schedules import Schedule, make_schedule
from imgtune_jax.types import MODALITIES, PyTree

# Kernels that Muon leaves to Adam: those into the vocabulary, as in 2502.16982, and those into
# classes and into the embedding space, which are our choice.
ADAM_PATHS = (r".*/vocabulary/kernel", r".*/classifier/kernel", r"(image|text)_head/.*")


def adafactor(
    b1: float | None = 0.9,
    b2: float | None = None,
    decay_rate: float = 0.8,
    beta2_cap: float | None = 0.999,
    clipping_threshold: float | None = None,
    min_dim_size_to_factor: int = 32,
) -> optax.GradientTransformation:
    """Return Adafactor (1804.04235) with momentum and without relative steps, as in big_vision.

    At step t, counted from 1, the decay of the second moment is min(beta2_cap, 1 - t^-decay_rate)
    (2106.04560, section 3.4). With `b2`, it is that of Adam with bias correction instead,
    b2 (1 - b2^(t-1)) / (1 - b2^t), as in Praxis. `clipping_threshold` limits the root mean square
    (RMS) of each parameter's update. None means without momentum, cap or clipping.
    """

    def decay(steps_before: Any, exponent: Any) -> jax.Array:
        t = jnp.asarray(steps_before + 1, jnp.float32)
        if b2 is not None:
            return b2 * (1 - b2 ** (t - 1)) / (1 - b2**t)
        beta2 = 1.0 - t ** (-exponent)
        return beta2 if beta2_cap is None else jnp.minimum(beta2_cap, beta2)

    transforms = [
        optax.scale_by_factored_rms(
            decay_rate=decay_rate,
            min_dim_size_to_factor=min_dim_size_to_factor,
            decay_rate_fn=decay,
        )
    ]
    if clipping_threshold is not None:
        transforms.append(optax.clip_by_block_rms(clipping_threshold))
    if b1 is not None:
        transforms.append(optax.ema(b1, debias=False, accumulator_dtype=jnp.bfloat16))
    return optax.chain(*transforms)


def muon(
    beta: float = 0.95,
    ns_steps: int = 5,
    nesterov: bool = True,
    b1: float = 0.9,
    b2: float = 0.999,
    adam_paths: Sequence[str] = ADAM_PATHS,
) -> optax.GradientTransformation:
    """Return Muon (2502.16982) for kernels [m n], and Adam for all other parameters.

    Adam also updates the kernels whose full path matches one of the regular expressions
    `adam_paths`. Muon's updates are scaled to the root mean square (RMS) of Adam's. `ns_steps` is
    the number of Newton-Schulz iterations. The momentum is bias-corrected, as in Optax.
    """

    def label(path: str, x: jax.Array) -> str:
        is_matrix = path.endswith("/kernel") and x.ndim == 2
        return "adam" if not is_matrix or _matches(path, adam_paths) else "muon"

    return optax.partition(
        {
            "muon": optax.chain(
                contrib.scale_by_muon(
                    beta=beta,
                    ns_steps=ns_steps,
                    nesterov=nesterov,
                    weight_dimension_numbers=lambda updates: jax.tree.map(
                        lambda _: contrib.MuonDimensionNumbers(), updates
                    ),
                ),
                optax.stateless(_scale_to_adam_rms),
            ),
            "adam": optax.scale_by_adam(b1=b1, b2=b2),
        },
        lambda params: param_tree.map_with_path(label, params),
    )


def _matches(path: str, patterns: Sequence[str]) -> bool:
    return any(re.fullmatch(pattern, path) for pattern in patterns)


def _scale_to_adam_rms(updates: PyTree, params: PyTree | None) -> PyTree:
    """Scale orthogonal updates [m n] to Adam's RMS, by 0.2 √max(m, n) (2502.16982, eq. 4)."""
    return jax.tree.map(lambda u: u * 0.2 * math.sqrt(max(u.shape)), updates)


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": optax.scale_by_adam,
    "adafactor": adafactor,
    "lion": optax.scale_by_lion,
    "muon": muon,
}


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """A gradient transformation, and its learning-rate schedule, which is logged."""

    tx: optax.GradientTransformation
    schedule: Schedule


def build_optimizer(
    cfg: config_lib.OptimConfig,
    paths: Sequence[str],
    *,
    total: int,
    warmup: int,
    cooldown: int,
    timescale: int | None = None,
) -> Optimizer:
    """Build the optimizer of a config, as a chain of gradient transformations.

    The chain clips by the global norm, preconditions (as Adam does, for example), scales, and adds
    decoupled weight decay (AdamW, 1711.05101). With the multipliers m and d of a parameter p, and a
    schedule s(t) from 0 to 1, step t subtracts
      lr s(t) m (update + weight_decay d p)    for weight_decay_scaled_by = "learning_rate" (Optax),
      s(t) (lr m update + weight_decay d p)    for weight_decay_scaled_by = "schedule" (big_vision).

    `paths` are the paths of all parameters, including frozen ones. So the same multiplier rules are
    valid whatever the config locks.
    Raises UserError for an unknown name or argument and for rules that do not fit the paths.
    """
    schedule = functools.partial(
        make_schedule,
        cfg.schedule,
        total=total,
        warmup=warmup,
        cooldown=cooldown,
        timescale=timescale,
        warmup_from_zero=cfg.warmup_from_zero,
    )
    tx = optax.chain(
        optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm else optax.identity(),
        _precondition(cfg),
        *_scale_and_decay(cfg, paths, schedule),
    )
    return Optimizer(tx, schedule(lr=cfg.lr))


def _precondition(cfg: config_lib.OptimConfig) -> optax.GradientTransformation:
    """Return the transformation `cfg.name`, built with `cfg.args`."""
    if cfg.name not in OPTIMIZERS:
        raise UserError(
            f"config.optim.name = {cfg.name!r}; expected one of {', '.join(OPTIMIZERS)}"
        )
    build = OPTIMIZERS[cfg.name]
    known = list(inspect.signature(build).parameters)
    if unknown := sorted(set(cfg.args) - set(known)):
        raise UserError(
            f"config.optim.args has unknown keys {unknown}; {cfg.name} takes {', '.join(known)}"
        )
    return build(**cfg.args)


def _scale_and_decay(
    cfg: config_lib.OptimConfig, paths: Sequence[str], schedule: Callable[..., Schedule]
) -> tuple[optax.GradientTransformation, ...]:
    """Return the transformations that scale an update and add weight decay.

    `schedule(lr=…)` is the schedule with that peak.
    """
    lr_of = param_tree.match_rules(cfg.lr_multipliers, paths, "config.optim.lr_multipliers")
    scale_of = {p: lr_of[p] * factor for p, factor in layer_decay(cfg.layer_decay, paths).items()}
    decay_of = param_tree.match_rules(
        cfg.weight_decay_multipliers, paths, "config.optim.weight_decay_multipliers"
    )
    decay_of = {p: cfg.weight_decay * multiplier for p, multiplier in decay_of.items()}
    if cfg.weight_decay_scaled_by == "learning_rate":
        return (
            _add_weight_decay(decay_of),
            _scale_by_path(scale_of),
            optax.scale_by_learning_rate(schedule(lr=cfg.lr)),
        )
    if cfg.weight_decay_scaled_by == "schedule":
        _check_decayed_paths_learn(scale_of, decay_of)
        return (
            _scale_by_path({p: cfg.lr * scale for p, scale in scale_of.items()}),
            _add_weight_decay(decay_of),
            optax.scale_by_learning_rate(schedule(lr=1.0)),
        )
    raise UserError(
        f"config.optim.weight_decay_scaled_by = {cfg.weight_decay_scaled_by!r}; expected "
        "'learning_rate' or 'schedule'"
    )


def _check_decayed_paths_learn(scale_of: dict[str, float], decay_of: dict[str, float]) -> None:
    """Raise UserError for a path whose weights would decay to zero without being trained."""
    decayed_only = [p for p, scale in scale_of.items() if not scale and decay_of[p]]
    if decayed_only:
        raise UserError(
            f"config.optim.lr_multipliers has 0 for {decayed_only[:5]} ({len(decayed_only)} in "
            "total), whose weights still decay, since weight_decay_scaled_by = 'schedule'; lock "
            "them with config.lock.patterns instead"
        )


def layer_decay(factor: float, paths: Sequence[str]) -> dict[str, float]:
    """Return layer-wise learning-rate multipliers by path (BEiT, 2106.08254).

    In a tower or decoder of n layers, layer i = 0, …, n - 1 has the multiplier factor^(n - i), and
    modules before the layers have factor^(n + 1). All other parameters have 1, such as those of
    modules after the layers and of heads. A layer of a CNN is a block. The decoder's layers count
    on their own, also if it reads the output of a text tower.
    """
    multipliers = dict.fromkeys(paths, 1.0)
    for component in (*MODALITIES, "decoder"):
        depths = locking.layer_depths(locking.tower_paths(paths, component))
        num_layers = locking.num_layers(depths)
        for path, depth in depths.items():
            multipliers[f"{component}/{path}"] = factor ** (num_layers + 1 - depth)
    return multipliers


def _add_weight_decay(decay_of: dict[str, float]) -> optax.GradientTransformation:
    """Add `decay_of[path]` times the parameter to each update."""

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, Any]:
        decay = param_tree.map_with_path(lambda path, _: decay_of[path], params)
        return jax.tree.map(lambda u, d, p: u + d * p if d else u, updates, decay, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _scale_by_path(scale_of: dict[str, float]) -> optax.GradientTransformation:
    """Multiply each update by `scale_of[path]`."""

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, Any]:
        scales = param_tree.map_with_path(lambda path, _: scale_of[path], updates)
        return jax.tree.map(lambda u, s: u * s if s != 1.0 else u, updates, scales), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
