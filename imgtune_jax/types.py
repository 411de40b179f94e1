"""The values that travel between rooms.

Axis letters, everywhere in the house: b batch, l length, h height, w width, c channels,
d width of features, k heads, v vocabulary, n examples of a whole data set.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, UInt8

PyTree = Any
Params = dict[str, Any]

# Pins the layout of an activation, given the logical axis of each dimension.
Constrain = Callable[[jax.Array, tuple[str | None, ...]], jax.Array]

MODALITIES = ("image", "text")


def no_constraint(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """Return x unchanged, the default `Constrain`: the compiler chooses the layout."""
    del axes
    return x


@struct.dataclass
class Batch:
    """One global batch, on device. A field that a run does not use is None.

    `image` is uint8 RGB: normalisation happens on the device, inside the model, because mean and
    std belong to the weights. Where a locked tower is cached, `image_features` or `text_features`
    come in: its pooled output before the head or, if its last layers train, the tokens that the
    locked ones gave. Rows with `example_mask == False` are padding or
    broken records: no loss, metric or gradient may depend on them.
    """

    example_mask: Bool[Array, " b"]
    image: UInt8[Array, "b h w c"] | None = None
    image_features: Float[Array, "b ..."] | None = None
    text_features: Float[Array, "b ..."] | None = None
    text: Int[Array, "b l"] | None = None
    text_mask: Bool[Array, "b l"] | None = None
    target_mask: Bool[Array, "b l"] | None = None  # the text's tokens but begin and prompt
    group: Int[Array, " b"] | None = None  # same value: any of the group's captions is right


class TokenScores(NamedTuple):
    """What a captioner says of each token but the first, given those before it; t = l - 1.

    Float32, in nats, over the vocabulary v: the token's log probability, the logsumexp of the
    logits, the mean log probability of all v tokens, and 1 where none has a higher logit, else 0.
    """

    log_prob: Float[Array, "b t"]
    logsumexp: Float[Array, "b t"]
    mean_log_prob: Float[Array, "b t"]
    correct: Float[Array, "b t"]


@struct.dataclass
class Outputs:
    """What a model says of one batch. Embeddings have unit L2 norm, in float32.

    Each is None where the model lacks the part, or the batch its input.
    """

    image_emb: Float[Array, "b d"] | None = None
    text_emb: Float[Array, "b d"] | None = None
    logit_scale: Float[Array, ""] | None = None  # the multiplier itself, after exp
    logit_bias: Float[Array, ""] | None = None
    token_scores: TokenScores | None = None


@struct.dataclass
class TrainState:
    """All that a step changes, arrays only: it shards, donates and saves as one tree.

    `params` holds the trainable parameters alone; the frozen ones are an argument of the step.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: PyTree
    ema_params: Params | None = None


class ExpMean(NamedTuple):
    """A metric that is the exponential of a mean, such as perplexity."""

    total: jax.Array
    count: jax.Array


# A metric is (sum, count): summed over microbatches, hosts and log intervals, divided last.
Metric = tuple[jax.Array, jax.Array] | ExpMean
Metrics = dict[str, Metric]


def metric_value(metric: Metric) -> jax.Array:
    """A metric's value: its sum over its count, and the exponential of that for an Exp."""
    total, count = metric
    mean = total / jnp.maximum(count, 1)
    return jnp.exp(mean) if isinstance(metric, ExpMean) else mean
