"""The house's decoders, written with and scored: what the laws of this room are for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imgtune_jax import config, decoding, models
from imgtune_jax.decoding import BeamSearch, GenerationConfig, Generator, Greedy, pad_prompts
from imgtune_jax.decoding.prefill import prefill
from imgtune_jax.partition import Partitioner, make_mesh

SIZES = dict(width=16, depth=2, mlp_dim=24, num_heads=2)
VOCAB, LONGEST = 24, 12
CAP = dict(
    image=dict(name="vit", patch_size=4, **SIZES),
    decoder=dict(name="transformer", vocab_size=VOCAB, max_length=LONGEST, **SIZES),
    image_size=8,
)
TEXT = dict(name="text_transformer", vocab_size=VOCAB, max_length=LONGEST, pool="class", **SIZES)
COCA = CAP | dict(
    text=TEXT, embed_dim=8, decoder={**CAP["decoder"], "input_from": "text_tower", "cross": "block"}
)
PROMPTS = [[1], [1, 4, 5], [1, 6], [1], [1, 4], [1], [1, 5, 5], [1, 2]]
STOP = (0, 3)


@pytest.fixture(scope="module", params=["cap", "coca"])
def writer(request):
    """(model, parameters, image tokens)."""
    model = models.build_model({"cap": CAP, "coca": COCA}[request.param])
    rng = np.random.default_rng(0)
    shapes = model.abstract_params()
    params = jax.tree.map(lambda x: jnp.asarray(0.5 * rng.normal(size=x.shape), "f4"), shapes)
    image = jnp.asarray(rng.integers(0, 256, (8, 8, 8, 3)), jnp.uint8)
    return model, params, model.image_tokens(params, image)


def generator(model, method, **options):
    # No token twice: random models write one token over and over.
    settings = GenerationConfig(
        stop_ids=STOP, max_new_tokens=9, min_new_tokens=2, no_repeat_ngram_size=1, method=method
    )
    longest = model.decoder.max_length
    return Generator(
        model.decoder_cache, model.decode_step, settings, max_positions=longest, **options
    )


def test_greedy_is_the_argmax_of_uncached_logits(writer, texts):
    """With ragged prompts, token by token; the longest prompt fills the model to its last place."""
    model, params, tokens = writer
    logits = jax.jit(lambda text, mask: model.caption_logits(params, tokens, text, mask))
    rows = [list(prompt) for prompt in PROMPTS]
    for count in range(9):
        text, mask = np.zeros((8, LONGEST), np.int32), np.zeros((8, LONGEST), bool)
        for i, row in enumerate(rows):
            text[i, : len(row)], mask[i, : len(row)] = row, True
        found = np.array(logits(jnp.asarray(text), jnp.asarray(mask)))
        if count < 2:
            found[..., STOP] = -np.inf
        for i, row in enumerate(rows):
            if row[-1] not in STOP:
                scores = found[i, len(row) - 1]
                scores[row] = -np.inf
                row.append(int(scores.argmax()))
    want = [[row[len(p) :]] for row, p in zip(rows, PROMPTS, strict=True)]
    assert texts(generator(model, Greedy())(params, tokens, *pad_prompts(PROMPTS))) == want
    assert len({len(row[0]) for row in want}) > 2


def test_logprob_of_what_was_written_is_its_score(writer, texts):
    """What a beam says of its texts is what teacher forcing says of them."""
    model, params, tokens = writer
    out = generator(model, BeamSearch(width=3, n=3))(params, tokens, *pad_prompts(PROMPTS))
    for j in range(3):
        rows = [[*p, *row[j]] for p, row in zip(PROMPTS, texts(out), strict=True)]
        ids, mask = (x[:, :LONGEST] for x in pad_prompts(rows))
        found = model.caption_scores(params, tokens, jnp.asarray(ids), jnp.asarray(mask)).log_prob
        for i, row in enumerate(rows):
            want = found[i, len(PROMPTS[i]) - 1 : len(row) - 1].sum()
            np.testing.assert_allclose(out.logprob[i, j], want, rtol=1e-4)  # cached = uncached


def test_answers_are_scored_as_captions_are(writer):
    model, params, tokens = writer
    answers, mask = (jnp.asarray(x) for x in pad_prompts([[1, 4, 0], [1, 5, 6, 7, 0], [1, 0]]))
    target = mask & (jnp.arange(answers.shape[1]) > 0)[None]
    got = decoding.score_texts(
        lambda *given: model.caption_scores(params, *given).log_prob,
        tokens,
        answers,
        mask,
        target,
        block=2,
    )
    for j in range(3):
        rows = [jnp.repeat(x[j : j + 1], 8, 0) for x in (answers, mask)]
        found = model.caption_scores(params, tokens, *rows).log_prob
        want = jnp.where(target[j, 1:][None], found, 0).sum(1)
        np.testing.assert_allclose(got[:, j], want, rtol=1e-5)


def test_no_beam_moves_the_keys_of_the_image(writer):
    model, params, tokens = writer
    cache = model.decoder_cache(params, tokens, length=LONGEST)
    prompts = map(jnp.asarray, pad_prompts(PROMPTS))

    def step(cache, token):
        return model.decode_step(params, cache, token)

    begin = prefill(step, cache, *prompts, n=3, max_new_tokens=4)
    image_keys = 2 * model.decoder.depth
    assert len(begin.cache) == len(jax.tree.leaves(cache)) - image_keys
    assert {x.shape[2] for x in begin.cache if x.ndim > 1} == {LONGEST}


def test_beams_on_eight_devices_are_those_of_one_and_no_cache_is_gathered(writer, texts):
    model, params, tokens = writer
    part = Partitioner(make_mesh(config.MeshConfig(8, 1, 1)))
    prompts = pad_prompts(PROMPTS)
    one = generator(model, BeamSearch(width=3))(params, tokens, *prompts)
    spread = part.shard_rows(np.asarray(tokens))
    write = generator(model, BeamSearch(width=3), constrain=part.constrain)
    many = write(jax.device_put(params, part.replicated), spread, *prompts)
    assert texts(one) == texts(many)
    assert many.tokens.sharding.is_equivalent_to(part.batch_sharding, 3)
    compiled = jax.jit(lambda p, x: write(p, x, *prompts)).lower(params, spread).compile()
    assert "all-gather" not in compiled.as_text()
