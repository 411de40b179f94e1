"""Learning-rate schedules: a linear warm-up, a decay, and a linear cool-down at the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from imgtune_jax.errors import UserError

Schedule = Callable[[Any], Any]


# A decay returns a factor of the learning rate. `t` is the number of steps after the warm-up so
# far, `length` the number of all steps after the warm-up.
def cosine(t: jax.Array, length: int, timescale: int) -> jax.Array:
    """Fall from 1 to 0 along half a period of a cosine."""
    return 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(t / length, 0, 1)))


def rsqrt(t: jax.Array, length: int, timescale: int) -> jax.Array:
    """Return 1 / √(1 + t / timescale) (2106.04560, section 3.5)."""
    return jnp.sqrt(timescale / (timescale + t))


def constant(t: jax.Array, length: int, timescale: int) -> jax.Array:
    """Return 1. With a cool-down, this is a warmup-stable-decay schedule (2405.18392)."""
    return jnp.ones_like(t)


def linear(t: jax.Array, length: int, timescale: int) -> jax.Array:
    """Fall linearly from 1 to 0."""
    return jnp.clip(1 - t / length, 0, 1)


DECAYS: dict[str, Callable[[jax.Array, int, int], jax.Array]] = {
    "cosine": cosine,
    "linear": linear,
    "rsqrt": rsqrt,
    "constant": constant,
}


def make_schedule(
    name: str,
    *,
    lr: float,
    total: int,
    warmup: int,
    cooldown: int,
    timescale: int | None = None,
    warmup_from_zero: bool = False,
) -> Schedule:
    """Return step -> learning rate: the product of `lr`, warm-up, the named decay and cool-down.

    Steps count from 0, and all lengths are in steps. In a warm-up of w steps, step t has the factor
    (t + 1) / (w + 1), so that the first update is not zero. With `warmup_from_zero` it is t / w, as
    in big_vision and Optax. In both cases, step w is the first with the full rate. In the last c
    steps before `total`, a cool-down of c steps has the factor (total - t) / c. `timescale` is that
    of `rsqrt`; None means the length of the warm-up.

    Raises UserError for an unknown name, if warm-up and cool-down exceed the total, and for a
    timescale that is missing or has no effect.
    """
    _check(name, total=total, warmup=warmup, cooldown=cooldown, timescale=timescale)
    decay, offset = DECAYS[name], 0 if warmup_from_zero else 1
    length = max(total - warmup, 1)

    def schedule(step: Any) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        t = jnp.maximum(step - warmup, 0)
        factor = decay(t, length, timescale or warmup)
        if cooldown:
            factor = factor * jnp.clip((length - t) / cooldown, 0, 1)
        ramp = jnp.minimum(1.0, (step + offset) / (warmup + offset)) if warmup else 1.0
        return lr * ramp * factor

    return schedule


def _check(name: str, *, total: int, warmup: int, cooldown: int, timescale: int | None) -> None:
    if name not in DECAYS:
        raise UserError(f"config.optim.schedule = {name!r}; expected one of {', '.join(DECAYS)}")
    if warmup + cooldown > total:
        raise UserError(
            f"config.optim.warmup = {warmup} and cooldown = {cooldown} steps exceed the total of "
            f"{total}; shorten them or lengthen config.total"
        )
    if name != "rsqrt" and timescale is not None:
        raise UserError(
            f"config.optim.timescale = {timescale} steps has no effect with schedule = {name!r}; "
            "set it to None, or the schedule to 'rsqrt'"
        )
    if name == "rsqrt" and not (warmup if timescale is None else timescale):
        raise UserError(
            f"config.optim.schedule = 'rsqrt' got a timescale of {timescale} and a warm-up of "
            f"{warmup} steps; set config.optim.timescale to 1 step or more, such as 10 000"
        )
