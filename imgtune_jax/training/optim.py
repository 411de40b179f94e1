"""Optimizers and schedules built on Optax, with multipliers by parameter path.

Numbers such as 2106.04560 are arXiv identifiers.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from imgtune_jax import config as config_lib
from imgtune_jax import locking, param_tree
from imgtune_jax.errors import UserError
from imgtune_jax.types import MODALITIES, Params, PyTree

Schedule = Callable[[Any], Any]


def adafactor(
    b1: float | None = 0.9,
    decay_rate: float = 0.8,
    clipping_threshold: float | None = 1.0,
    min_dim_size_to_factor: int = 32,
) -> optax.GradientTransformation:
    """Return Adafactor without relative steps, as for ViT-G (2106.04560, section 3.4)."""
    transforms = [
        optax.scale_by_factored_rms(
            decay_rate=decay_rate, min_dim_size_to_factor=min_dim_size_to_factor
        )
    ]
    if clipping_threshold is not None:
        transforms.append(optax.clip_by_block_rms(clipping_threshold))
    if b1 is not None:
        transforms.append(optax.ema(b1, debias=False, accumulator_dtype=jnp.bfloat16))
    return optax.chain(*transforms)


def muon(
    beta: float = 0.95, ns_steps: int = 5, nesterov: bool = True, b1: float = 0.9, b2: float = 0.999
) -> optax.GradientTransformation:
    """Return Muon (2502.16982) for kernels [m n], and Adam for all other parameters.

    Muon's updates are scaled to the root mean square (RMS) of Adam's. `ns_steps` is the number of
    Newton-Schulz iterations.
    """

    def labels(params: Params) -> Params:
        return param_tree.map_with_path(
            lambda path, x: "muon" if path.endswith("/kernel") and x.ndim == 2 else "adam", params
        )

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
        labels,
    )


def _scale_to_adam_rms(updates: PyTree, params: PyTree | None) -> PyTree:
    """Scale orthogonal updates [m n] to Adam's RMS, by 0.2 √max(m, n) (2502.16982, eq. 4)."""
    return jax.tree.map(lambda u: u * 0.2 * math.sqrt(max(u.shape)), updates)


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": optax.scale_by_adam,
    "adafactor": adafactor,
    "lion": optax.scale_by_lion,
    "muon": muon,
}


# A schedule returns a factor of the learning rate. `t` is the number of steps after the warm-up so
# far, `length` the number of all steps after the warm-up.
def cosine(t: jax.Array, length: jax.Array, warmup: int, cooldown: int) -> jax.Array:
    """Fall from 1 to 0 along half a period of a cosine."""
    return 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(t / length, 0, 1)))


def rsqrt(t: jax.Array, length: jax.Array, warmup: int, cooldown: int) -> jax.Array:
    """Return √(w / (w + t)) for w warm-up steps (2106.04560), with a linear cool-down to 0."""
    timescale = max(warmup, 1)
    return jnp.sqrt(timescale / (timescale + t)) * constant_rate(t, length, warmup, cooldown)


def constant_rate(t: jax.Array, length: jax.Array, warmup: int, cooldown: int) -> jax.Array:
    """Return 1, with a linear cool-down to 0."""
    return jnp.clip((length - t) / max(cooldown, 1), 0, 1) if cooldown else jnp.ones_like(t)


def linear_decay(t: jax.Array, length: jax.Array, warmup: int, cooldown: int) -> jax.Array:
    """Fall linearly from 1 to 0."""
    return jnp.clip(1 - t / length, 0, 1)


SCHEDULES: dict[str, Callable[..., jax.Array]] = {
    "cosine": cosine,
    "linear": linear_decay,
    "rsqrt": rsqrt,
    "constant": constant_rate,
}


def make_schedule(name: str, *, lr: float, total: int, warmup: int, cooldown: int) -> Schedule:
    """Return step -> learning rate: linear warm-up, then the named schedule.

    All lengths are in steps. Raises UserError for an unknown name, or if warm-up and cool-down
    exceed the total.
    """
    if name not in SCHEDULES:
        raise UserError(f"config.optim.schedule = {name!r}; expected one of {', '.join(SCHEDULES)}")
    if warmup + cooldown > total:
        raise UserError(
            f"config.optim.warmup = {warmup} and cooldown = {cooldown} steps exceed the total of "
            f"{total}; shorten them or lengthen config.total"
        )

    def schedule(step: Any) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        factor = SCHEDULES[name](
            jnp.maximum(step - warmup, 0), max(total - warmup, 1), warmup, cooldown
        )
        # With step + 1 instead of step, the first update is not zero. Step `warmup` is the first
        # with the full rate.
        return lr * jnp.minimum(1.0, (step + 1) / (warmup + 1)) * factor

    return schedule


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """A gradient transformation, and its learning-rate schedule, which is logged."""

    tx: optax.GradientTransformation
    schedule: Schedule


def build_optimizer(
    cfg: config_lib.OptimConfig, paths: Sequence[str], *, total: int, warmup: int, cooldown: int
) -> Optimizer:
    """Build the optimizer of a config, as a chain of gradient transformations.

    The chain clips by the global norm, preconditions (as Adam does, for example), adds weight decay
    times the parameter, and multiplies by the path's multiplier and by the negative learning rate.
    So weight decay is decoupled and scaled by the learning rate (AdamW, 1711.05101).

    `paths` are the paths of all parameters, including frozen ones. So the same multiplier rules are
    valid whatever the config locks.
    Raises UserError for an unknown name or argument and for rules that do not fit the paths.
    """
    if cfg.name not in OPTIMIZERS:
        raise UserError(
            f"config.optim.name = {cfg.name!r}; expected one of {', '.join(OPTIMIZERS)}"
        )
    precondition = OPTIMIZERS[cfg.name]
    known = list(inspect.signature(precondition).parameters)
    if unknown := sorted(set(cfg.args) - set(known)):
        raise UserError(
            f"config.optim.args has unknown keys {unknown}; {cfg.name} takes {', '.join(known)}"
        )
    schedule = make_schedule(cfg.schedule, lr=cfg.lr, total=total, warmup=warmup, cooldown=cooldown)
    lr_of = param_tree.match_rules(cfg.lr_multipliers, paths, "config.optim.lr_multipliers")
    decay_of = param_tree.match_rules(
        cfg.weight_decay_multipliers, paths, "config.optim.weight_decay_multipliers"
    )
    layer_decay_of = layer_decay(cfg.layer_decay, paths)
    scale_of = {path: lr_of[path] * factor for path, factor in layer_decay_of.items()}
    tx = optax.chain(
        optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm else optax.identity(),
        precondition(**cfg.args),
        _add_weight_decay({path: cfg.weight_decay * m for path, m in decay_of.items()}),
        _scale_by_path(scale_of),
        optax.scale_by_learning_rate(schedule),
    )
    return Optimizer(tx, schedule)


def layer_decay(factor: float, paths: Sequence[str]) -> dict[str, float]:
    """Return layer-wise learning-rate multipliers by path (BEiT, 2106.08254).

    In a tower of `depth` layers, layer i has the multiplier factor^(depth - i), and the embeddings
    have factor^(depth + 1). All other parameters, such as those of modules after the layers and of
    heads, have 1.
    """
    multipliers = dict.fromkeys(paths, 1.0)
    for tower in MODALITIES:
        tower_paths = locking.tower_paths(paths, tower)
        depth = locking.num_layers(tower_paths)
        for path in tower_paths:
            layer = locking.layer_index(path)
            if layer is not None:
                multipliers[f"{tower}/{path}"] = factor ** (depth - layer)
            elif locking.is_embedding(path):
                multipliers[f"{tower}/{path}"] = factor ** (depth + 1)
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
