"""The training step: one pure function for every objective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from imgtune_jax.objectives import Objective
from imgtune_jax.param_tree import merge
from imgtune_jax.training.optim import Optimizer
from imgtune_jax.types import Batch, Metrics, Outputs, Params, TrainState, metric_value

Forward = Callable[[Params, Batch, jax.Array], Outputs]
Scalars = dict[str, Float[Array, ""]]
TrainStep = Callable[[TrainState, Params, Batch], tuple[TrainState, Scalars]]


def make_train_step(
    forward: Forward,
    objective: Objective,
    optimizer: Optimizer,
    *,
    key: jax.Array,
    accumulation: int = 1,
    ema_decay: float | None = None,
) -> TrainStep:
    """Return the pure function step(state, frozen, batch) -> (state, metrics).

    `forward(params, batch, rng)` gets all parameters; gradients are computed for those in
    `state.params`, not for the frozen ones.
    The random key of a step is fold_in(key, step), so resuming needs no RNG state. Metrics are
    scalars of the global batch: the loss, each term of the objective before its weight, the
    gradient norm, the learning rate, and the logit scale and bias if the model has them.
    """

    def step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, Scalars]:
        """Compute gradients, update parameters and their moving average, and report metrics."""
        rng = jax.random.fold_in(key, state.step)

        def trainable_forward(params: Params, batch: Batch, rng: jax.Array) -> Outputs:
            return forward(merge(params, frozen), batch, rng)

        grads, loss, metrics, outputs = loss_and_grads(
            trainable_forward, objective, state.params, batch, rng, accumulation=accumulation
        )
        updates, opt_state = optimizer.tx.update(grads, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        ema: Any = state.ema_params
        if ema_decay is not None:
            ema = optax.incremental_update(params, ema, 1 - ema_decay)
        scalars = {"loss": loss, "lr": optimizer.schedule(state.step)}
        scalars |= {name: metric_value(metric) for name, metric in metrics.items()}
        scalars["grad_norm"] = optax.tree.norm(grads)
        for name in ("logit_scale", "logit_bias"):
            if getattr(outputs, name) is not None:
                scalars[name] = getattr(outputs, name)
        return TrainState(state.step + 1, params, opt_state, ema), scalars

    return step


def loss_and_grads(
    forward: Forward,
    objective: Objective,
    params: Params,
    batch: Batch,
    rng: jax.Array,
    *,
    accumulation: int = 1,
) -> tuple[Params, Float[Array, ""], Metrics, Outputs]:
    """Return (gradients, loss, metrics, outputs) of the full batch, in `accumulation` microbatches.

    Accumulation is exact for every objective, contrastive ones included (GradCache, arXiv
    2101.06983). The outputs of all microbatches are computed first, and the loss of the full batch
    is differentiated with respect to them. Each microbatch then runs again, with the same random
    key, and its vector-Jacobian product maps its part of these gradients to the parameters. So
    negatives come from the full batch, and the gradients of logit scale and bias do not grow with
    the number of microbatches.
    """
    if accumulation > 1:
        return _accumulate(forward, objective, params, batch, rng, accumulation)

    def loss_of_params(params: Params) -> tuple[Any, Any]:
        outputs = forward(params, batch, rng)
        loss, metrics = objective(outputs, batch)
        return loss, (metrics, outputs)

    value_and_grad = jax.value_and_grad(loss_of_params, has_aux=True)
    (loss, (metrics, outputs)), grads = value_and_grad(params)
    return grads, loss, metrics, outputs


def _accumulate(
    forward: Forward,
    objective: Objective,
    params: Params,
    batch: Batch,
    rng: jax.Array,
    num_microbatches: int,
) -> tuple[Params, Float[Array, ""], Metrics, Outputs]:
    """Compute `loss_and_grads` in several microbatches."""
    microbatches = jax.tree.map(lambda x: _split_microbatches(x, num_microbatches), batch)
    rngs = jax.vmap(lambda i: jax.random.fold_in(rng, i))(jnp.arange(num_microbatches))

    def forward_one(carry: None, xs: tuple[Batch, jax.Array]) -> tuple[None, Outputs]:
        return carry, forward(params, *xs)

    _, stacked = jax.lax.scan(forward_one, None, (microbatches, rngs))

    def loss_of_outputs(stacked: Outputs) -> tuple[Any, Any]:
        outputs = jax.tree.map(_merge_microbatches, stacked)
        loss, metrics = objective(outputs, batch)
        return loss, (metrics, outputs)

    value_and_grad = jax.value_and_grad(loss_of_outputs, has_aux=True)
    (loss, (metrics, outputs)), cotangents = value_and_grad(stacked)

    def backward_one(grads: Params, xs: tuple[Batch, jax.Array, Outputs]) -> tuple[Params, None]:
        microbatch, microbatch_rng, cotangent = xs
        _, vjp = jax.vjp(lambda p: forward(p, microbatch, microbatch_rng), params)
        return jax.tree.map(jnp.add, grads, vjp(cotangent)[0]), None

    zeros = jax.tree.map(jnp.zeros_like, params)
    grads, _ = jax.lax.scan(backward_one, zeros, (microbatches, rngs, cotangents))
    return grads, loss, metrics, outputs


def _split_microbatches(x: jax.Array, k: int) -> jax.Array:
    """Split [b …] into k microbatches [k b/k …].

    Microbatch i has rows i, i + k, i + 2k, …, so that each device splits the rows that it holds.
    """
    return x.reshape(x.shape[0] // k, k, *x.shape[1:]).swapaxes(0, 1)


def _merge_microbatches(x: jax.Array) -> jax.Array:
    """Undo `_split_microbatches` on per-example outputs [k b/k …]; average scalars [k]."""
    return x.mean(0) if x.ndim == 1 else x.swapaxes(0, 1).reshape(-1, *x.shape[2:])
