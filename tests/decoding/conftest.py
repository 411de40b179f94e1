"""A small recurrent model whose next token depends on its image and all previous tokens."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

WIDTH = 6


def make_toy_model(vocabulary, *, seed=0, sharpness=2.0):
    """Return the model's functions. `sharpness` scales its logits."""
    rng = np.random.default_rng(seed)
    params = {
        "embed": jnp.asarray(rng.normal(size=(vocabulary, WIDTH)), jnp.float32),
        "mix": jnp.asarray(rng.normal(size=(WIDTH, WIDTH)), jnp.float32),
        "out": jnp.asarray(sharpness * rng.normal(size=(WIDTH, vocabulary)), jnp.float32),
    }

    def init_cache(params, image, *, length):
        b = len(image)
        return {
            "image": image,
            "hidden": jnp.zeros((b, WIDTH)),
            "seen": jnp.full((b, length), -1, jnp.int32),
            "position": jnp.zeros(b, jnp.int32),
        }

    def step(params, cache, token):
        position = cache["position"]
        hidden = jnp.tanh(cache["hidden"] @ params["mix"] + params["embed"][token])
        logits = (hidden + cache["image"]) @ params["out"]
        seen = jax.vmap(lambda row, i, x: row.at[i].set(x))(cache["seen"], position, token)
        return logits, cache | {"hidden": hidden, "seen": seen, "position": position + 1}

    def images(b, seed=1):
        rng = np.random.default_rng(seed)
        return jnp.asarray(rng.normal(size=(b, WIDTH)), jnp.float32)

    def next_logp(image, context):
        """Return log p of the next token, computed in NumPy as the reference."""
        weights = {name: np.asarray(x) for name, x in params.items()}
        hidden = np.zeros(WIDTH, np.float32)
        for token in context:
            hidden = np.tanh(hidden @ weights["mix"] + weights["embed"][token])
        logits = (hidden + np.asarray(image)) @ weights["out"]
        return logits - np.logaddexp.reduce(logits)

    def logp(image, prompt, sequence):
        """Return log p of every token of a sequence that continues the prompt."""
        return [next_logp(image, [*prompt, *sequence[:i]])[t] for i, t in enumerate(sequence)]

    return SimpleNamespace(
        params=params,
        init_cache=init_cache,
        step=step,
        images=images,
        logp=logp,
        next_logp=next_logp,
    )


@pytest.fixture(scope="session")
def toy_model():
    """Return the constructor, `toy_model(vocabulary, seed=…, sharpness=…)`."""
    return make_toy_model


@pytest.fixture(scope="session")
def to_lists():
    """Return a function that converts GeneratedTokens to lists: token ids by row and sequence."""

    def convert(out):
        rows = zip(np.asarray(out.tokens), np.asarray(out.mask), strict=True)
        return [[ids[m].tolist() for ids, m in zip(*row, strict=True)] for row in rows]

    return convert
