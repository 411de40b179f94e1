"""Types that several packages share.

Axis letters, in all of the code: b batch, l length, h height, w width, c channels, d width of
features, k heads, v vocabulary, n examples of a data set, t = l - 1 predicted tokens.
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

# Constrains the sharding of an activation, given the logical axis of each dimension: a key of
# `partition.ACTIVATION_AXES`, such as "batch", or None.
Constrain = Callable[[jax.Array, tuple[str | None, ...]], jax.Array]

MODALITIES = ("image", "text")


def no_constraint(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """Return x unchanged: the default `Constrain`, with which the compiler chooses the sharding."""
    del axes
    return x


@struct.dataclass
class Batch:
    """One global batch, on device. A field that a run does not use is None.

    `image` is uint8 RGB; the model normalizes it on the device, since mean and std belong to the
    weights. If a tower's frozen prefix is cached, `image_features` or `text_features` is the output
    of the prefix: pooled features [b d] if only the head remains, else tokens [b l d].

    Rows with `example_mask == False` are padding or unreadable records. No loss, metric or gradient
    may depend on them.
    """

    example_mask: Bool[Array, " b"]
    image: UInt8[Array, "b h w c"] | None = None
    image_features: Float[Array, "b ..."] | None = None
    text_features: Float[Array, "b ..."] | None = None
    text: Int[Array, "b l"] | None = None
    text_mask: Bool[Array, "b l"] | None = None
    target_mask: Bool[Array, "b l"] | None = None  # text_mask without begin token and prefix
    group: Int[Array, " b"] | None = None  # rows with one value are positives of each other


class TokenScores(NamedTuple):
    """Scores of each token of a caption under the decoder, from the second token on; t = l - 1.

    All are float32. `log_prob` is the token's log probability in nats, given all earlier tokens.
    `logsumexp` is that of the v logits of the vocabulary, and `mean_log_prob` the mean of their log
    probabilities, in nats. `correct` is 1 if no token has a higher logit, else 0.
    """

    log_prob: Float[Array, "b t"]
    logsumexp: Float[Array, "b t"]
    mean_log_prob: Float[Array, "b t"]
    correct: Float[Array, "b t"]


@struct.dataclass
class Outputs:
    """The outputs of a model on one batch. Embeddings are float32 with unit L2 norm.

    A field is None if the model lacks its component or the batch lacks its input.
    """

    image_emb: Float[Array, "b d"] | None = None
    text_emb: Float[Array, "b d"] | None = None
    logit_scale: Float[Array, ""] | None = None  # exp(parameter), multiplies cosine similarities
    logit_bias: Float[Array, ""] | None = None
    token_scores: TokenScores | None = None


@struct.dataclass
class TrainState:
    """The arrays that a step updates. They are sharded, donated and saved as one tree.

    `params` are the trainable parameters; the frozen ones are an argument of the step.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: PyTree
    ema_params: Params | None = None


class ExpMean(NamedTuple):
    """A metric that is the exponential of a mean (total / count), such as perplexity."""

    total: jax.Array
    count: jax.Array


# A metric is (total, count), so that it can be summed over microbatches before the division.
Metric = tuple[jax.Array, jax.Array] | ExpMean
Metrics = dict[str, Metric]


def metric_value(metric: Metric) -> jax.Array:
    """Return a metric's total / count, or exp(total / count) for an `ExpMean`."""
    total, count = metric
    mean = total / jnp.maximum(count, 1)
    return jnp.exp(mean) if isinstance(metric, ExpMean) else mean
