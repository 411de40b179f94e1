"""Optimizer and schedule from Optax, with per-path multipliers."""

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
from imgtune_jax.types import MODALITIES, Params, PyTree

Schedule = Callable[[Any], Any]


def adafactor(
    b1: float | None = 0.9,
    decay_rate: float = 0.8,
    clipping_threshold: float | None = 1.0,
    min_dim_size_to_factor: int = 32,
) -> optax.GradientTransformation:
    """Adafactor without relative steps, as used for ViT-G (2106.04560, section 3.4)."""
    parts = [
        optax.scale_by_factored_rms(
            decay_rate=decay_rate, min_dim_size_to_factor=min_dim_size_to_factor
        )
    ]
    if clipping_threshold is not None:
        parts.append(optax.clip_by_block_rms(clipping_threshold))
    if b1 is not None:
        parts.append(optax.ema(b1, debias=False, accumulator_dtype=jnp.bfloat16))
    return optax.chain(*parts)


def muon(
    beta: float = 0.95, ns_steps: int = 5, nesterov: bool = True, b1: float = 0.9, b2: float = 0.999
) -> optax.GradientTransformation:
    """Muon (2502.16982) for kernels, scaled to Adam's update size; Adam for all else."""

    def labels(params: Params) -> Params:
        flat = param_tree.flatten(params)
        kinds = {
            p: "muon" if p.endswith("/kernel") and x.ndim == 2 else "adam" for p, x in flat.items()
        }
        return param_tree.unflatten(kinds)

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
    """Orthogonal [m n] updates · 0.2 √max(m, n): the RMS of Adam's (2502.16982, equation 4)."""
    return jax.tree.map(lambda u: u * 0.2 * math.sqrt(max(u.shape)), updates)


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": optax.scale_by_adam,
    "adafactor": adafactor,
    "lion": optax.scale_by_lion,
    "muon": muon,
}


def cosine(t: jax.Array, length: jax.Array, warmup: int, cooldown: int) -> jax.Array:
    """Half a cosine from 1 to 0."""
    return 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(t / length, 0, 1)))


def rsqrt(t: jax.Array, length: jax.Array, warmup: int, cooldown: int) -> jax.Array:
    """1/sqrt, flat over one warm-up's length (2106.04560), with a linear cool-down to 0."""
    timescale = max(warmup, 1)
    return jnp.sqrt(timescale / (timescale + t)) * constant_rate(t, length, warmup, cooldown)


def constant_rate(t: jax.Array, length: jax.Array, warmup: int, cooldown: int) -> jax.Array:
    """1, with a linear cool-down to 0."""
    return jnp.clip((length - t) / max(cooldown, 1), 0, 1) if cooldown else jnp.ones_like(t)


def linear_decay(t: jax.Array, length: jax.Array, warmup: int, cooldown: int) -> jax.Array:
    """A line from 1 to 0."""
    return jnp.clip(1 - t / length, 0, 1)


SCHEDULES: dict[str, Callable[..., jax.Array]] = {
    "cosine": cosine,
    "linear": linear_decay,
    "rsqrt": rsqrt,
    "constant": constant_rate,
}


def make_schedule(name: str, *, lr: float, total: int, warmup: int, cooldown: int) -> Schedule:
    """step -> learning rate: linear warm-up from 0, then the named shape over what is left.

    Raises ValueError for an unknown name, or when warm-up and cool-down exceed the total.
    """
    if name not in SCHEDULES:
        raise ValueError(f"config.optim.schedule = {name!r}; known: {', '.join(SCHEDULES)}")
    if warmup + cooldown > total:
        raise ValueError(
            f"warm-up {warmup} + cool-down {cooldown} steps exceed the total of {total}"
        )

    def schedule(step: Any) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        shape = SCHEDULES[name](
            jnp.maximum(step - warmup, 0), max(total - warmup, 1), warmup, cooldown
        )
        # step + 1: the first update is not a no-op, and the last warm-up step has the full rate.
        return lr * jnp.minimum(1.0, (step + 1) / (warmup + 1)) * shape

    return schedule


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """A gradient transformation and the schedule it follows (for reporting)."""

    tx: optax.GradientTransformation
    schedule: Schedule


def build_optimizer(
    cfg: config_lib.OptimConfig, paths: Sequence[str], *, total: int, warmup: int, cooldown: int
) -> Optimizer:
    """clip → precondition → + weight decay · param → · multiplier · (-lr).

    Weight decay is decoupled and scaled by the learning rate (AdamW, 1711.05101). `paths` are all
    parameters' paths, locked ones included, so that one set of rules serves every locking.
    Raises ValueError for unknown names or arguments and for rules that do not fit the paths.
    """
    if cfg.name not in OPTIMIZERS:
        raise ValueError(f"config.optim.name = {cfg.name!r}; known: {', '.join(OPTIMIZERS)}")
    make = OPTIMIZERS[cfg.name]
    known = list(inspect.signature(make).parameters)
    if unknown := sorted(set(cfg.args) - set(known)):
        raise ValueError(f"config.optim.args has {unknown}; {cfg.name} takes {', '.join(known)}")
    schedule = make_schedule(cfg.schedule, lr=cfg.lr, total=total, warmup=warmup, cooldown=cooldown)
    lr_of = param_tree.match_rules(cfg.lr_multipliers, paths, "config.optim.lr_multipliers")
    decay_of = param_tree.match_rules(
        cfg.weight_decay_multipliers, paths, "config.optim.weight_decay_multipliers"
    )
    scale_of = {p: lr_of[p] * f for p, f in layer_decay(cfg.layer_decay, paths).items()}
    tx = optax.chain(
        optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm else optax.identity(),
        make(**cfg.args),
        _add_weight_decay({p: cfg.weight_decay * m for p, m in decay_of.items()}),
        _scale_by_path(scale_of),
        optax.scale_by_learning_rate(schedule),
    )
    return Optimizer(tx, schedule)


def layer_decay(factor: float, paths: Sequence[str]) -> dict[str, float]:
    """Layer-wise rate decay (BEiT, 2106.08254): factor^(depth - layer) for layer `blocks_<layer>`,
    factor^(depth + 1) for what feeds the layers, 1 for heads and what follows the layers."""
    out = dict.fromkeys(paths, 1.0)
    for tower in MODALITIES:
        in_tower = [p.removeprefix(f"{tower}/") for p in paths if p.startswith(f"{tower}/")]
        depth = locking.num_layers(in_tower)
        for path in in_tower:
            layer = locking.layer_index(path)
            if layer is not None:
                out[f"{tower}/{path}"] = factor ** (depth - layer)
            elif locking.is_embedding(path):
                out[f"{tower}/{path}"] = factor ** (depth + 1)
    return out


def _add_weight_decay(decay_of: dict[str, float]) -> optax.GradientTransformation:
    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, Any]:
        decay = param_tree.map_with_path(lambda p: decay_of[p], params)
        return jax.tree.map(lambda u, d, p: u + d * p if d else u, updates, decay, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _scale_by_path(scale_of: dict[str, float]) -> optax.GradientTransformation:
    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, Any]:
        scales = param_tree.map_with_path(lambda p: scale_of[p], updates)
        return jax.tree.map(lambda u, s: u * s if s != 1.0 else u, updates, scales), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
