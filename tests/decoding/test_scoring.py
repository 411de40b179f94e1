"""`score_texts` returns the log probabilities of given texts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imgtune_jax import config, decoding
from imgtune_jax.partition import Partitioner, make_mesh

# Each row: the begin token, one prefix token, the answer.
ANSWERS = [[1, 2, 4, 0], [1, 2, 5, 5, 3, 0], [1, 2, 0], [1, 2, 6, 1, 0], [1, 2, 3, 0]]


@pytest.fixture(scope="module")
def model(toy_model):
    return toy_model(8, seed=7)


def token_log_probs(model):
    """Return a `TokenLogProbs` of the model."""

    def log_probs(image, text, mask):
        cache = model.init_cache(model.params, image, length=text.shape[1])

        def read_token(cache, token):
            logits, cache = model.step(model.params, cache, token)
            return cache, jax.nn.log_softmax(logits)

        _, logp = jax.lax.scan(read_token, cache, text.T)
        return jnp.take_along_axis(logp[:-1], text.T[1:, :, None], -1)[..., 0].T

    return log_probs


def answer_arrays():
    """Return (text, text_mask, target_mask) of ANSWERS."""
    text, mask = decoding.pad_prompts(ANSWERS)
    return text, mask, mask & (np.arange(text.shape[1]) >= 2)[None]


def score_answers(model, image, **options):
    def score(image):
        arrays = map(jnp.asarray, answer_arrays())
        return decoding.score_texts(token_log_probs(model), image, *arrays, **options)

    return jax.jit(score)(image)


@pytest.mark.parametrize("normalize_length", [False, True])
@pytest.mark.parametrize("block", [1, 2, 8])
def test_scores_are_the_log_probabilities_of_the_answers(model, normalize_length, block):
    """The begin token and the prefix do not count. The block size does not matter."""
    images = model.images(3)
    actual = score_answers(model, images, normalize_length=normalize_length, block=block)
    for i, image in enumerate(images):
        for j, answer in enumerate(ANSWERS):
            logp = model.logp(image, answer[:2], answer[2:])
            expected = np.mean(logp) if normalize_length else np.sum(logp)
            np.testing.assert_allclose(actual[i, j], expected, rtol=1e-5)


def test_scores_keep_the_batch_sharded(model):
    partitioner = Partitioner(make_mesh(config.MeshConfig(8, 1, 1)))
    images = np.asarray(model.images(8))
    actual = score_answers(model, partitioner.shard_rows(images))
    assert actual.sharding.is_equivalent_to(partitioner.batch_sharding, actual.ndim)
    np.testing.assert_allclose(actual, score_answers(model, images), rtol=1e-6)
