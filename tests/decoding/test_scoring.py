"""The likelihood of given texts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imgtune_jax import config, decoding
from imgtune_jax.partition import Partitioner, make_mesh

# A begin token, a prompt token, the answer.
ANSWERS = [[1, 2, 4, 0], [1, 2, 5, 5, 3, 0], [1, 2, 0], [1, 2, 6, 1, 0], [1, 2, 3, 0]]


@pytest.fixture(scope="module")
def model(toy):
    return toy(8, seed=7)


def token_log_probs(model):
    def run(image, text, mask):
        cache = model.start(model.params, image, length=text.shape[1])

        def one(cache, token):
            logits, cache = model.step(model.params, cache, token)
            return cache, jax.nn.log_softmax(logits)

        _, logp = jax.lax.scan(one, cache, text.T)
        return jnp.take_along_axis(logp[:-1], text.T[1:, :, None], -1)[..., 0].T

    return run


def arrays():
    text, mask = decoding.pad_prompts(ANSWERS)
    return text, mask, mask & (np.arange(text.shape[1]) >= 2)[None]


def scores(model, image, **options):
    def run(image):
        return decoding.score_texts(
            token_log_probs(model), image, *map(jnp.asarray, arrays()), **options
        )

    return jax.jit(run)(image)


@pytest.mark.parametrize("normalize_length", [False, True])
@pytest.mark.parametrize("block", [1, 2, 8])
def test_scores_are_the_log_probabilities_of_the_answers(model, normalize_length, block):
    """Every image with every answer, begin token and prompt left out, whatever the block."""
    images = model.images(3)
    got = scores(model, images, normalize_length=normalize_length, block=block)
    for i, image in enumerate(images):
        for j, answer in enumerate(ANSWERS):
            logp = model.logp(image, answer[:2], answer[2:])
            want = np.mean(logp) if normalize_length else np.sum(logp)
            np.testing.assert_allclose(got[i, j], want, rtol=1e-5)


def test_scores_keep_the_batch_sharded(model):
    part = Partitioner(make_mesh(config.MeshConfig(8, 1, 1)))
    images = np.asarray(model.images(8))
    got = scores(model, part.shard_rows(images))
    assert got.sharding.is_equivalent_to(part.batch_sharding, got.ndim)
    np.testing.assert_allclose(got, scores(model, images), rtol=1e-6)
