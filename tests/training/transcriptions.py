"""Literal transcriptions of the optimizers and schedules that configs cite.

Each function names its source. None of them uses the package.
"""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax


def path_mask(tree, pattern):
    """Return a tree of booleans: whether a parameter's path matches a regular expression."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: re.fullmatch(pattern, "/".join(k.key for k in path)) is not None, tree
    )


def big_vision_schedule(
    *, base, decay_type, total_steps, warmup_steps=0, cooldown_steps=0, timescale=10_000
):
    """Return step -> rate: `create_learning_rate_schedule` of big_vision/utils.py.

    "constant" is its decay_type "stair" without steps.
    """

    def schedule(step):
        lr, step = base, jnp.asarray(step, jnp.float32)
        progress = (step - warmup_steps) / float(total_steps - warmup_steps)
        progress = jnp.clip(progress, 0.0, 1.0)
        if decay_type == "linear":
            lr = lr * (1.0 - progress)
        elif decay_type == "cosine":
            lr = lr * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        elif decay_type == "rsqrt":
            in_decay = lr / jnp.sqrt(1 + (step - warmup_steps) / timescale)
            lr = jnp.where(warmup_steps <= step, in_decay, lr)
        if warmup_steps:
            lr = lr * jnp.minimum(1.0, step / warmup_steps)
        if cooldown_steps:
            lr = lr * jnp.minimum(1.0, (total_steps - step) / cooldown_steps)
        return jnp.asarray(lr, jnp.float32)

    return schedule


def big_vision_adafactor(beta2_cap=0.999):
    """Return `scale_by_adafactor` of big_vision/optax.py, with its default arguments."""

    def decay_rate_pow(i, exponent):
        t = jnp.array(i, jnp.float32) + 1.0
        return jnp.minimum(beta2_cap, 1.0 - t ** (-exponent))

    return optax.chain(
        optax.scale_by_factored_rms(
            factored=True,
            decay_rate=0.8,
            step_offset=0,
            min_dim_size_to_factor=32,
            epsilon=1e-30,
            decay_rate_fn=decay_rate_pow,
        ),
        optax.ema(0.9, debias=False, accumulator_dtype=jnp.bfloat16),
    )


def big_vision_optimizer(params, tx, *, lr, wd, grad_clip_norm, **schedule):
    """Return the chain of `make` of big_vision/optax.py: rate, then weight decay, then schedule."""
    return optax.chain(
        optax.clip_by_global_norm(grad_clip_norm),
        tx,
        optax.scale(lr),
        optax.add_decayed_weights(wd, path_mask(params, ".*/kernel")),
        optax.scale_by_schedule(big_vision_schedule(base=1.0, **schedule)),
        optax.scale(-1.0),
    )


class PraxisState(NamedTuple):
    """State of `praxis_adafactor`; a second moment is (mean over columns, over rows) or full."""

    count: jax.Array
    m: dict
    v: dict


def praxis_adafactor(params, *, schedule, weight_decay, beta1, decay_adam):
    """Return `sharded_adafactor` of praxis/optimizers.py with decay_method="adam".

    The two largest dimensions are factored if both are at least 32; there is no clip_threshold. Two
    differences: the learning rate multiplies the momentum, while Praxis takes the momentum of
    updates that are already multiplied, which is the same for a constant rate; and beta1 times the
    bfloat16 momentum is rounded to bfloat16, as in Optax.
    """
    decays = path_mask(params, ".*/kernel")

    def factored_dims(x):
        dims = sorted(range(x.ndim), key=lambda d: -x.shape[d])[:2]
        return dims if len(dims) == 2 and x.shape[dims[1]] >= 32 else None

    def init(params):
        def second_moment(x):
            dims = factored_dims(x)
            return tuple(jnp.zeros(np.delete(x.shape, d)) for d in dims) if dims else (x * 0,)

        m = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.bfloat16), params)
        return PraxisState(jnp.zeros([], jnp.int32), m, jax.tree.map(second_moment, params))

    def update_one(grad, m, v, param, decayed, count):
        t, learning_rate = count + 1.0, schedule(count)
        decay_rate = decay_adam * (1.0 - decay_adam ** (t - 1.0)) / (1.0 - decay_adam**t)
        squared, dims = jnp.square(grad) + 1e-30, factored_dims(grad)
        means = [squared.mean(d) for d in dims] if dims else [squared]
        v = tuple(decay_rate * a + (1 - decay_rate) * b for a, b in zip(v, means, strict=True))
        if dims:
            vr, vc = v
            r_factor = 1.0 / jnp.sqrt(vr / vr.mean(-1, keepdims=True))
            c_factor = 1.0 / jnp.sqrt(vc)
            x = grad * jnp.expand_dims(r_factor, dims[0]) * jnp.expand_dims(c_factor, dims[1])
        else:
            x = grad / jnp.sqrt(v[0])
        new_m = beta1 * m + (1 - beta1) * x
        subtrahend = learning_rate * new_m
        if decayed:
            subtrahend += weight_decay * learning_rate * param
        return -subtrahend, new_m.astype(jnp.bfloat16), v

    def update(grads, state, params):
        leaves, structure = jax.tree.flatten(grads)
        columns = (state.m, state.v, params, decays)
        rows = zip(leaves, *map(structure.flatten_up_to, columns), strict=True)
        results = [update_one(*row, state.count) for row in rows]
        updates, m, v = (structure.unflatten(column) for column in zip(*results, strict=True))
        return updates, PraxisState(state.count + 1, m, v)

    return optax.GradientTransformation(init, update)


def optax_adamw(params, *, multipliers, lr, warmup_steps, total_steps, weight_decay, b1, b2):
    """Return Optax's AdamW with its cosine schedule, for configs that do not cite another source.

    `multipliers` are (regular expression, factor of the updates). The rate of step t of a warm-up
    of w steps is lr (t + 1) / (w + 1).
    """
    schedule = optax.warmup_cosine_decay_schedule(
        lr / (warmup_steps + 1), lr, warmup_steps, total_steps
    )
    adamw = optax.adamw(
        schedule, b1=b1, b2=b2, weight_decay=weight_decay, mask=path_mask(params, ".*/kernel")
    )
    scales = [optax.masked(optax.scale(x), path_mask(params, regex)) for regex, x in multipliers]
    return optax.chain(optax.clip_by_global_norm(1.0), adamw, *scales)
