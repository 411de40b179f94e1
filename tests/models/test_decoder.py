"""Properties of captioning: attention, invariances, and equality of cached and uncached logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imgtune_jax import models, param_tree
from imgtune_jax.models import components
from imgtune_jax.types import Batch

SIZES = dict(width=16, depth=2, mlp_dim=24, num_heads=2)
VOCAB, LENGTH = 20, 6
CAP = dict(
    image=dict(name="vit", patch_size=4, **SIZES),
    decoder=dict(name="transformer", vocab_size=VOCAB, max_length=LENGTH, **SIZES),
    image_size=8,
)
TEXT = dict(name="text_transformer", vocab_size=VOCAB, max_length=LENGTH, pool="class", **SIZES)
CASES = {
    "cap": CAP,
    "cap tied, context norm": {
        **CAP,
        "decoder": {**CAP["decoder"], "tied": True, "context_norm": True},
    },
    "cap, blocks": {**CAP, "decoder": {**CAP["decoder"], "cross": "block"}},
    "cap without biases": {
        **CAP,
        "decoder": {**CAP["decoder"], "use_bias": False, "vocab_bias": True},
    },
    "coca": {
        **CAP,
        "text": TEXT,
        "embed_dim": 12,
        "decoder": {**CAP["decoder"], "input_from": "text_tower", "cross": "block"},
    },
}
CAPPA = {**CAP, "decoder": {**CAP["decoder"], "parallel_fraction": 0.5}}


def random_params(model, seed=0):
    """Return random parameters, since initial zeros could hide a bug."""
    rng = np.random.default_rng(seed)
    shapes = model.abstract_params()
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32), shapes)


def build(cfg, **decoder_fields):
    model = models.build_model({**cfg, "decoder": {**cfg["decoder"], **decoder_fields}})
    return model, random_params(model)


def batch(lengths=(6, 3, 4), seed=0, pad=0):
    rng = np.random.default_rng(seed)
    b = len(lengths)
    mask = np.arange(LENGTH) < np.array(lengths)[:, None]
    text = np.where(mask, rng.integers(1, VOCAB, (b, LENGTH)), pad)
    image = rng.integers(0, 256, (b, 8, 8, 3))
    return Batch(
        example_mask=jnp.ones(b, bool),
        image=jnp.asarray(image, jnp.uint8),
        text=jnp.asarray(text, jnp.int32),
        text_mask=jnp.asarray(mask),
    )


def logits_of_embeddings(model, params, b, length=LENGTH, **options):
    """Return a function from one token embedding per position to logits, and its argument for b."""
    component = "decoder" if model.decoder.input_from == "ids" else "text"
    table = params[component]["token_embed"]["embedding"]
    tokens = model.image_tokens(params, b.image)
    ids = jnp.arange(b.text.size).reshape(b.text.shape)  # each position reads another row
    mask = b.text_mask[:, :length]

    def logits(rows):
        rows = jnp.concatenate([rows, table[len(rows) :]])
        tree = {**params, component: {**params[component], "token_embed": {"embedding": rows}}}
        return model.caption_logits(tree, tokens, ids[:, :length], mask, **options)

    return logits, table[b.text].reshape(-1, table.shape[1])


@pytest.mark.parametrize("name", ["cap", "cap, blocks", "coca"])
def test_caption_ignores_future_tokens(name):
    model, params = build(CASES[name])
    logits, rows = logits_of_embeddings(model, params, batch((6, 6)))
    for i in (0, 2, 5):
        g = jax.grad(lambda rows, i=i: jnp.square(logits(rows)[0, i]).sum())(rows)
        influence = np.abs(g).sum(1).reshape(2, LENGTH)
        assert (influence[0, : i + 1] > 1e-6).all()
        np.testing.assert_array_equal(influence[0, i + 1 :], 0)
        np.testing.assert_array_equal(influence[1], 0)  # of the other caption


def test_parallel_rows_ignore_the_text():
    model, params = build(CAPPA)
    rows_parallel = jnp.asarray([True, False])
    logits, rows = logits_of_embeddings(
        model, params, batch((6, 6)), parallel=rows_parallel, length=LENGTH - 1
    )
    g = jax.grad(lambda rows: jnp.square(logits(rows)[0]).sum())(rows)
    np.testing.assert_array_equal(g, 0)
    g = jax.grad(lambda rows: jnp.square(logits(rows)[1]).sum())(rows)
    assert np.abs(g).sum() > 1e-3  # the autoregressive row reads the text


def test_parallel_rows_attend_in_both_directions():
    model, params = build(CAPPA)
    b = batch((6,))
    tokens = model.image_tokens(params, b.image)

    def squared_first_logits(positions):
        tree = {**params, "decoder": {**params["decoder"], "pos_embed": positions}}
        text, mask = b.text[:, :-1], b.text_mask[:, :-1]
        parallel = jnp.ones(1, bool)
        return jnp.square(model.caption_logits(tree, tokens, text, mask, parallel=parallel)[0, 0])

    g = jax.grad(lambda x: squared_first_logits(x).sum())(params["decoder"]["pos_embed"])
    assert (np.abs(g[: LENGTH - 1]).sum(1) > 1e-6).all()


def test_parallel_fraction_is_the_fraction_of_parallel_rows():
    model, params = build(CAPPA, parallel_fraction=0.75)
    b = batch((6,) * 400)
    run = jax.jit(lambda key: model.apply(params, b, rng=key, train=True).token_scores.log_prob)
    causal = model.apply(params, b).token_scores.log_prob
    fractions = [(np.abs(run(jax.random.key(i)) - causal) > 1e-5).any(1).mean() for i in (0, 1)]
    np.testing.assert_allclose(fractions, 0.75, atol=0.08)  # 4 standard deviations of a mean of 400


@pytest.mark.parametrize("name", CASES)
def test_padding_and_other_rows_do_not_change_scores(name):
    """Scores depend neither on the ids and the length of the padding, nor on other rows."""
    model, params = build(CASES[name])
    b = batch((4, 3))
    want = model.apply(params, b)
    other_padding = model.apply(params, batch((4, 3), pad=7))
    shorter = model.apply(params, b.replace(text=b.text[:, :4], text_mask=b.text_mask[:, :4]))
    alone = model.apply(params, jax.tree.map(lambda x: x[:1], b))
    for row, t in ((0, 3), (1, 2)):
        for got in (other_padding, shorter):
            np.testing.assert_allclose(
                got.token_scores.log_prob[row, :t], want.token_scores.log_prob[row, :t], atol=1e-5
            )
    np.testing.assert_allclose(
        alone.token_scores.log_prob[0, :3], want.token_scores.log_prob[0, :3], atol=1e-5
    )
    if want.text_emb is not None:
        for got in (other_padding, shorter):
            np.testing.assert_allclose(got.text_emb, want.text_emb, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_captions_depend_on_their_image_only(name):
    model, params = build(CASES[name])
    b = batch((6, 6))
    tokens = model.image_tokens(params, b.image)

    def logits_of_first_row(tokens):
        return model.caption_logits(params, tokens, b.text, b.text_mask)[0]

    g = jax.grad(lambda x: jnp.square(logits_of_first_row(x)).sum())(tokens)
    assert np.abs(g[0]).max() > 1e-4
    np.testing.assert_array_equal(g[1], 0)


@pytest.mark.parametrize("name", CASES)
def test_cached_decoding_returns_the_uncached_logits(name):
    model, params = build(CASES[name])
    b = batch((6, 6, 6))
    tokens = model.image_tokens(params, b.image)
    want = model.caption_logits(params, tokens, b.text, b.text_mask)
    cache = model.decoder_cache(params, tokens, length=LENGTH)
    assert all(leaf.shape[0] == 3 for leaf in jax.tree.leaves(cache))
    step = jax.jit(model.decode_step)
    for i in range(LENGTH):
        got, cache = step(params, cache, b.text[:, i])
        np.testing.assert_allclose(got, want[:, i], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["cap", "coca"])
def test_logits_after_an_id_outside_the_vocabulary_are_nan(name):
    model, params = build(CASES[name])
    tokens = model.image_tokens(params, batch().image)
    cache = model.decoder_cache(params, tokens, length=LENGTH)
    logits, _ = model.decode_step(params, cache, jnp.array([1, -1, VOCAB]))
    assert np.isfinite(logits[0]).all() and np.isnan(logits[1:]).all()


@pytest.mark.parametrize("name", ["cap", "coca"])
def test_rows_of_a_cache_can_be_gathered_and_have_separate_positions(name):
    model, params = build(CASES[name])
    b = batch((6, 6, 6))
    tokens = model.image_tokens(params, b.image)
    want = model.caption_logits(params, tokens, b.text, b.text_mask)
    cache = model.decoder_cache(params, tokens, length=LENGTH)
    for i in range(2):
        _, cache = model.decode_step(params, cache, b.text[:, i])
    order = jnp.asarray([2, 0, 0, 1])
    cache = jax.tree.map(lambda x: x[order], cache)
    cache = cache.replace(position=cache.position - jnp.asarray([0, 1, 0, 2]))  # some rows go back
    positions = np.asarray(cache.position)
    got, _ = model.decode_step(params, cache, b.text[order, positions])
    np.testing.assert_allclose(got, want[order, positions], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_caption_scores_equal_those_of_unchunked_logits(name):
    for chunk in (2, 16):
        model, params = build(CASES[name], chunk=chunk)
        b = batch((6, 4))
        tokens = model.image_tokens(params, b.image)
        logits = model.caption_logits(params, tokens, b.text, b.text_mask)[:, :-1]
        log_probs = jax.nn.log_softmax(logits)
        want = jnp.take_along_axis(log_probs, b.text[:, 1:, None], axis=2)[..., 0]
        for got in (
            model.apply(params, b).token_scores,
            model.caption_scores(params, tokens, b.text, b.text_mask),
        ):
            np.testing.assert_allclose(got.log_prob, want, rtol=1e-5, atol=1e-5)
            np.testing.assert_array_equal(got.correct, logits.argmax(-1) == b.text[:, 1:])


@pytest.mark.parametrize(
    "options", [dict(scan=True), dict(remat=True), dict(scan=True, remat=True)]
)
def test_scan_and_remat_do_not_change_gradients(options):
    b = batch()
    plain, params = build(CASES["cap, blocks"])
    other, _ = build(CASES["cap, blocks"], **options)

    def loss(model):
        return lambda params: model.apply(params, b).token_scores.log_prob.sum()

    want, got = jax.grad(loss(plain))(params), jax.grad(loss(other))(params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), got, want)


def test_biases_of_the_decoder_are_those_of_cap():
    """big_vision's cappa.py has two with decoder_bias=False, of the last norm and the logits."""
    _, params = build(CASES["cap without biases"])
    biases = {p for p in param_tree.param_paths(params["decoder"]) if p.endswith("bias")}
    assert biases == {"final_norm/bias", "vocabulary/bias"}


def test_vocabulary_bias_is_added_to_the_logits():
    model, params = build(CASES["cap without biases"])
    b, bias = batch(), jnp.arange(VOCAB, dtype=jnp.float32)

    def logits(bias):
        vocabulary = {**params["decoder"]["vocabulary"], "bias": bias}
        tree = {**params, "decoder": {**params["decoder"], "vocabulary": vocabulary}}
        tokens = model.image_tokens(tree, b.image)
        return model.caption_logits(tree, tokens, b.text, b.text_mask)

    shift = logits(bias) - logits(jnp.zeros(VOCAB))
    np.testing.assert_allclose(shift, jnp.broadcast_to(bias, shift.shape), rtol=1e-5, atol=1e-5)


def test_a_captioner_has_no_embeddings_and_coca_has_them():
    model, params = build(CASES["cap"])
    out = model.apply(params, batch())
    assert out.image_emb is None and out.logit_scale is None and "logit_scale" not in params
    assert model.components() == ("image", "decoder")
    model, params = build(CASES["coca"])
    out = model.apply(params, batch())
    assert out.image_emb.shape == out.text_emb.shape == (3, 12)
    assert set(model.components()) == set(components.COMPONENTS) - {"image_pooler"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(text=dict(TEXT, causal=False, pool="mean")), "needs a causal text tower"),
        (dict(text=None, decoder=None), "neither text nor decoder"),
        (dict(embed_dim=None), "no embed_dim"),
        (dict(decoder=dict(CAP["decoder"], chunks=3)), "no field 'chunks'; did you mean 'chunk'"),
    ],
)
def test_invalid_models_are_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        models.build_model({**CASES["coca"], **changes})


def test_a_tied_decoder_with_a_vocabulary_bias_is_an_error():
    with pytest.raises(ValueError, match="tied=True has no vocabulary matrix"):
        build(CASES["cap tied, context norm"], vocab_bias=True)


def test_invalid_lengths_are_errors():
    model, params = build(CASES["cap"])
    with pytest.raises(ValueError, match="length = 7; this decoder generates 1 to 6 tokens"):
        model.decoder_cache(params, jnp.zeros((1, 4, 16)), length=7)
    cappa, params = build(CAPPA)
    b = batch((4, 4))
    b = b.replace(text=b.text[:, :4], text_mask=b.text_mask[:, :4])
    with pytest.raises(ValueError, match="padded to exactly max_length=6; got 4"):
        cappa.apply(params, b, rng=jax.random.key(0), train=True)
