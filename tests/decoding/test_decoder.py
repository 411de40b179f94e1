"""Generation and scoring with the caption decoders of `imgtune_jax.models`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imgtune_jax import config, decoding, models
from imgtune_jax.decoding import BeamSearch, GenerationConfig, Generator, Greedy, pad_prompts
from imgtune_jax.decoding.prefill import prefill
from imgtune_jax.partition import Partitioner, make_mesh

SIZES = dict(width=16, depth=2, mlp_dim=24, num_heads=2)
VOCAB, MAX_LENGTH = 24, 12
CAP = dict(
    image=dict(name="vit", patch_size=4, **SIZES),
    decoder=dict(name="transformer", vocab_size=VOCAB, max_length=MAX_LENGTH, **SIZES),
    image_size=8,
)
TEXT = dict(name="text_transformer", vocab_size=VOCAB, max_length=MAX_LENGTH, pool="class", **SIZES)
COCA = CAP | dict(
    text=TEXT, embed_dim=8, decoder={**CAP["decoder"], "input_from": "text_tower", "cross": "block"}
)
PROMPTS = [[1], [1, 4, 5], [1, 6], [1], [1, 4], [1], [1, 5, 5], [1, 2]]
STOP = (0, 3)


@pytest.fixture(scope="module", params=["cap", "coca"])
def captioner(request):
    """Return (model, parameters, image tokens)."""
    model = models.build_model({"cap": CAP, "coca": COCA}[request.param])
    rng = np.random.default_rng(0)
    shapes = model.abstract_params()
    params = jax.tree.map(lambda x: jnp.asarray(0.5 * rng.normal(size=x.shape), "f4"), shapes)
    image = jnp.asarray(rng.integers(0, 256, (8, 8, 8, 3)), jnp.uint8)
    return model, params, model.image_tokens(params, image)


def make_generator(model, method, **options):
    # With no_repeat_ngram_size=None, random models repeat one token.
    settings = GenerationConfig(
        stop_ids=STOP, max_new_tokens=9, min_new_tokens=2, no_repeat_ngram_size=1, method=method
    )
    max_positions = model.decoder.max_length
    return Generator(
        model.decoder_cache, model.decode_step, settings, max_positions=max_positions, **options
    )


def test_greedy_is_the_argmax_of_uncached_logits(captioner, to_lists):
    """Prompts have different lengths. The longest one plus 9 new tokens has the maximum length."""
    model, params, tokens = captioner
    logits = jax.jit(lambda text, mask: model.caption_logits(params, tokens, text, mask))
    rows = [list(prompt) for prompt in PROMPTS]
    for count in range(9):
        text, mask = np.zeros((8, MAX_LENGTH), np.int32), np.zeros((8, MAX_LENGTH), bool)
        for i, row in enumerate(rows):
            text[i, : len(row)], mask[i, : len(row)] = row, True
        next_logits = np.array(logits(jnp.asarray(text), jnp.asarray(mask)))
        if count < 2:
            next_logits[..., STOP] = -np.inf
        for i, row in enumerate(rows):
            if row[-1] not in STOP:
                scores = next_logits[i, len(row) - 1]
                scores[row] = -np.inf
                row.append(int(scores.argmax()))
    expected = [[row[len(prompt) :]] for row, prompt in zip(rows, PROMPTS, strict=True)]
    out = make_generator(model, Greedy())(params, tokens, *pad_prompts(PROMPTS))
    assert to_lists(out) == expected
    assert len({len(row[0]) for row in expected}) > 2


def test_logprob_of_generated_sequences_equals_their_caption_score(captioner, to_lists):
    """Cached decoding and teacher forcing agree."""
    model, params, tokens = captioner
    out = make_generator(model, BeamSearch(width=3, n=3))(params, tokens, *pad_prompts(PROMPTS))
    for j in range(3):
        rows = [[*prompt, *row[j]] for prompt, row in zip(PROMPTS, to_lists(out), strict=True)]
        ids, mask = (x[:, :MAX_LENGTH] for x in pad_prompts(rows))
        scores = model.caption_scores(params, tokens, jnp.asarray(ids), jnp.asarray(mask))
        for i, row in enumerate(rows):
            expected = scores.log_prob[i, len(PROMPTS[i]) - 1 : len(row) - 1].sum()
            # rtol: cached decoding sums in another order.
            np.testing.assert_allclose(out.logprob[i, j], expected, rtol=1e-4)


def test_score_texts_equals_caption_scores(captioner):
    model, params, tokens = captioner
    answers, mask = (jnp.asarray(x) for x in pad_prompts([[1, 4, 0], [1, 5, 6, 7, 0], [1, 0]]))
    target = mask & (jnp.arange(answers.shape[1]) > 0)[None]
    actual = decoding.score_texts(
        lambda *args: model.caption_scores(params, *args).log_prob,
        tokens,
        answers,
        mask,
        target,
        block=2,
    )
    for j in range(3):
        rows = [jnp.repeat(x[j : j + 1], 8, 0) for x in (answers, mask)]
        log_prob = model.caption_scores(params, tokens, *rows).log_prob
        expected = jnp.where(target[j, 1:][None], log_prob, 0).sum(1)
        np.testing.assert_allclose(actual[:, j], expected, rtol=1e-5)


def test_keys_and_values_of_the_image_are_shared_by_all_beams(captioner):
    model, params, tokens = captioner
    cache = model.decoder_cache(params, tokens, length=MAX_LENGTH)
    prompts = map(jnp.asarray, pad_prompts(PROMPTS))

    def step(cache, token):
        return model.decode_step(params, cache, token)

    prefilled = prefill(step, cache, *prompts, n=3, max_new_tokens=4)
    num_image_leaves = 2 * model.decoder.depth
    assert len(prefilled.cache) == len(jax.tree.leaves(cache)) - num_image_leaves
    assert {x.shape[2] for x in prefilled.cache if x.ndim > 1} == {MAX_LENGTH}


def test_sharding_does_not_change_beams_or_gather_a_cache(captioner, to_lists):
    model, params, tokens = captioner
    partitioner = Partitioner(make_mesh(config.MeshConfig(8, 1, 1)))
    prompts = pad_prompts(PROMPTS)
    expected = make_generator(model, BeamSearch(width=3))(params, tokens, *prompts)
    sharded = partitioner.shard_rows(np.asarray(tokens))
    generate = make_generator(model, BeamSearch(width=3), constrain=partitioner.constrain)
    actual = generate(jax.device_put(params, partitioner.replicated), sharded, *prompts)
    assert to_lists(actual) == to_lists(expected)
    assert actual.tokens.sharding.is_equivalent_to(partitioner.batch_sharding, 3)
    compiled = jax.jit(lambda p, x: generate(p, x, *prompts)).lower(params, sharded).compile()
    assert "all-gather" not in compiled.as_text()
