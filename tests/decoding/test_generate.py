"""What holds of every method: prompts, rows, lengths, stop tokens, buckets, devices."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imgtune_jax import config, decoding
from imgtune_jax.decoding import (
    BeamSearch,
    GenerationConfig,
    Generator,
    Greedy,
    Sampling,
    pad_prompts,
)
from imgtune_jax.decoding.prefill import prefill
from imgtune_jax.partition import Partitioner, make_mesh

STOP = (0, 3)
METHODS = {
    "greedy": Greedy(),
    "beam": BeamSearch(width=3, n=2),
    "sample": Sampling(n=2, top_k=6, top_p=0.9),
}
KEYS = {"greedy": None, "beam": None, "sample": jax.random.key(5)}
PROMPTS = [[5], [5, 2, 7], [5, 1], [5, 6, 1, 2], [5, 5], [5], [5, 7, 7], [5, 4]]
each_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(scope="module")
def model(toy):
    return toy(11, seed=3)


def run(model, method, prompts=PROMPTS, image=None, fields=None, **settings):
    settings = GenerationConfig(
        **{"stop_ids": STOP, "max_new_tokens": 7, "pad_id": 9, **settings}, method=METHODS[method]
    )
    generator = Generator(model.start, model.step, settings, **(fields or {}))
    image = model.images(8)[: len(prompts)] if image is None else image
    return generator(model.params, image, *pad_prompts(prompts), key=KEYS[method])


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@each_method
def test_rows_do_not_influence_one_another(model, method, texts):
    """Ragged prompts in one batch give what every row gives alone."""
    whole = run(model, method)
    if method == "sample":  # the key knows the row's place in the batch
        first = run(model, method, prompts=PROMPTS[:3])
        assert texts(first) == texts(whole)[:3]
        return
    for i, prompt in enumerate(PROMPTS):
        alone = run(model, method, prompts=[prompt], image=model.images(8)[i : i + 1])
        assert texts(alone)[0] == texts(whole)[i]
        np.testing.assert_allclose(alone.logprob[0], whole.logprob[i], rtol=1e-5)
        np.testing.assert_allclose(alone.score[0], whole.score[i], rtol=1e-5)


@each_method
def test_texts_end_with_a_stop_token_or_at_the_longest_and_are_padded(model, method, texts):
    out = run(model, method, max_new_tokens=5, min_new_tokens=2)
    lengths = set()
    for text in itertools.chain(*texts(out)):
        stops = [i for i, token in enumerate(text) if token in STOP]
        assert (stops == [] and len(text) == 5) or stops == [len(text) - 1]
        assert len(text) > 2
        lengths.add(len(text))
    assert len(lengths) > 1  # the test saw both ends
    assert out.tokens.shape == (8, METHODS[method].n, 5)
    tokens, mask = np.asarray(out.tokens), np.asarray(out.mask)
    assert (tokens[~mask] == 9).all()
    assert (mask[..., :-1] >= mask[..., 1:]).all()


@each_method
def test_logprob_is_the_models_own(model, method, texts):
    """Neither penalty nor temperature is in it, and the end of one text freezes it."""
    out = run(model, method, repetition_penalty=1.5, no_repeat_ngram_size=2)
    for i, row in enumerate(texts(out)):
        for j, text in enumerate(row):
            want = sum(model.logp(model.images(8)[i], PROMPTS[i], text))
            np.testing.assert_allclose(out.logprob[i, j], want, rtol=1e-5)


@each_method
def test_the_bucket_of_a_length_changes_nothing(model, method, texts):
    """7 and 8 share a program; 9 has the next. Texts that end early are the same in all."""
    short, exact, longer = (run(model, method, max_new_tokens=m) for m in (7, 8, 9))
    for a, b in ((short, exact), (exact, longer)):
        limit = a.tokens.shape[-1]
        same = [
            (x, y)
            for x, y in zip(texts(a), texts(b), strict=True)
            if all(len(t) < limit for t in y)
        ]
        assert same and all(x == y for x, y in same)
    wide = [np.pad(x, ((0, 0), (0, 4))) for x in pad_prompts(PROMPTS)]
    settings = GenerationConfig(stop_ids=STOP, max_new_tokens=7, pad_id=9, method=METHODS[method])
    generator = Generator(model.start, model.step, settings)
    padded = generator(model.params, model.images(8), *wide, key=KEYS[method])
    assert_equal(padded, short)


def test_lengths_of_one_bucket_share_a_program(model):
    traced = []

    def step(params, cache, token):
        traced.append(token.shape)
        return model.step(params, cache, token)

    def run_with(max_new_tokens):
        settings = GenerationConfig(stop_ids=STOP, max_new_tokens=max_new_tokens)
        generator = Generator(model.start, step, settings)
        return generator(model.params, model.images(8), *pad_prompts(PROMPTS))

    run_with(5)
    once = len(traced)
    run_with(8)
    assert len(traced) == once
    run_with(9)
    assert len(traced) > once


@each_method
def test_one_device_and_eight_give_the_same_and_keep_the_batch_sharded(model, method):
    part = Partitioner(make_mesh(config.MeshConfig(4, 2, 1)))
    one = run(model, method)
    image = part.shard_rows(np.asarray(model.images(8)))
    sharded = run(model, method, image=image, fields={"constrain": part.constrain})
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(sharded), strict=True):
        assert b.sharding.is_equivalent_to(part.batch_sharding, b.ndim)
        if a.dtype == jnp.float32:
            np.testing.assert_allclose(a, b, rtol=1e-6)
        else:
            np.testing.assert_array_equal(a, b)


@each_method
def test_no_device_needs_the_cache_of_another(model, method):
    """Of one step, devices exchange whether all texts have ended, and nothing else."""
    part = Partitioner(make_mesh(config.MeshConfig(8, 1, 1)))
    settings = GenerationConfig(stop_ids=STOP, max_new_tokens=8, method=METHODS[method])

    def program(image, prompt, mask):
        cache = model.start(model.params, image, length=prompt.shape[1] + 8)
        return decoding.generate(
            lambda cache, token: model.step(model.params, cache, token),
            cache,
            prompt,
            mask,
            settings,
            key=KEYS[method],
        )

    arguments = [part.shard_rows(np.asarray(x)) for x in (model.images(8), *pad_prompts(PROMPTS))]
    text = jax.jit(program).lower(*arguments).compile().as_text()
    assert "all-gather" not in text and "all-to-all" not in text
    assert "all-reduce" in text  # the program is spread: it asks whether all have ended


def test_stops_as_soon_as_all_rows_have_ended(model):
    """The loop is left early: a step costs nothing that is not run."""
    steps = []

    def step(params, cache, token):
        jax.debug.callback(lambda: steps.append(1))
        logits, cache = model.step(params, cache, token)
        return logits.at[:, 3].set(jnp.where(cache["position"] >= 4, 1e4, -1e4)), cache

    settings = GenerationConfig(stop_ids=(3,), max_new_tokens=64)
    generator = Generator(model.start, step, settings)
    out = generator(model.params, model.images(2), *pad_prompts([[5], [5]]))
    jax.effects_barrier()
    assert np.asarray(out.mask).sum(-1).tolist() == [[4], [4]]
    assert len(steps) == 4


def test_what_a_step_leaves_alone_is_kept_once_a_row(model):
    """Keys and values of an image exist once, however many beams look at it."""

    def step(cache, token):
        return model.step(model.params, cache, token)

    cache = model.start(model.params, model.images(2), length=9)
    prompts = map(jnp.asarray, pad_prompts([[5], [5]]))
    begin = prefill(step, cache, *prompts, n=5, max_new_tokens=8)
    assert sorted(x.shape for x in begin.cache) == [(10,), (10, 6), (10, 9)]
    assert len(cache) == 4  # and the image


@each_method
def test_the_same_call_gives_the_same(model, method):
    assert_equal(run(model, method), run(model, method))


def test_a_prompt_needs_room_for_the_text(model):
    """Of 6 positions, a prompt of 3 leaves room for 4 new tokens: the last one is not read."""
    prompts = pad_prompts([[5, 1, 1], [5]])
    for max_new_tokens in (4, 5):
        generator = Generator(
            model.start,
            model.step,
            GenerationConfig(stop_ids=STOP, max_new_tokens=max_new_tokens),
            max_positions=6,
        )
        if max_new_tokens == 4:
            generator(model.params, model.images(2), *prompts)
            continue
        with pytest.raises(ValueError, match="a max_new_tokens of at most 4 fits"):
            generator(model.params, model.images(2), *prompts)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: GenerationConfig(stop_ids=()), "stop is empty"),
        (lambda: GenerationConfig(stop_ids=(1,), max_new_tokens=0), "max_new_tokens = 0"),
        (
            lambda: GenerationConfig(stop_ids=(1,), max_new_tokens=4, min_new_tokens=4),
            "0 <= min_new_tokens < 4",
        ),
        (
            lambda: GenerationConfig(stop_ids=(1,), repetition_penalty=0.0),
            "repetition_penalty = 0.0",
        ),
        (
            lambda: GenerationConfig(stop_ids=(1,), no_repeat_ngram_size=0),
            "no_repeat_ngram_size = 0",
        ),
        (lambda: BeamSearch(width=2, n=3), "n = 3 of width = 2"),
        (lambda: Sampling(temperature=0.0), "the greedy method"),
        (lambda: Sampling(top_p=0.0, top_k=0), "top_k = 0.*top_p = 0.0"),
        (
            lambda: decoding.build_generation_config(
                {"method": {"name": "nucleus"}}, stop_ids=(1,), pad_id=0
            ),
            "greedy, beam",
        ),
        (
            lambda: decoding.build_generation_config({"beam": 4}, stop_ids=(1,), pad_id=0),
            r"no \['beam'\]; known: max_new_tokens",
        ),
        (lambda: pad_prompts([[1], []]), r"prompts \[1\] are empty"),
    ],
)
def test_wrong_settings_are_errors_that_say_what_is_wanted(make, error):
    with pytest.raises(ValueError, match=error):
        make()


def test_a_key_is_for_sampling_alone(model):
    for method, key in ((Greedy(), jax.random.key(0)), (Sampling(), None)):
        generator = Generator(
            model.start, model.step, GenerationConfig(stop_ids=STOP, method=method)
        )
        with pytest.raises(ValueError, match="key"):
            generator(model.params, model.images(1), *pad_prompts([[5]]), key=key)


def test_build_reads_a_plain_mapping():
    cfg = {"method": {"name": "beam", "width": 3}, "max_new_tokens": 9}
    want = GenerationConfig(stop_ids=(2,), pad_id=1, max_new_tokens=9, method=BeamSearch(width=3))
    assert decoding.build_generation_config(cfg, stop_ids=(2,), pad_id=1) == want
