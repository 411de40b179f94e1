"""Properties of every decoding method: prompts, rows, lengths, stop tokens, buckets, devices."""

import itertools
import math

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
from imgtune_jax.errors import UserError
from imgtune_jax.partition import Partitioner, make_mesh

STOP = (0, 3)
METHODS = {
    "greedy": Greedy(),
    "beam": BeamSearch(width=3, n=2),
    "sample": Sampling(n=2, top_k=6, top_p=0.9),
}
KEYS = {"greedy": None, "beam": None, "sample": jax.random.key(5)}
PROMPTS = [[5], [5, 2, 7], [5, 1], [5, 6, 1, 2], [5, 5], [5], [5, 7, 7], [5, 4]]
for_each_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(scope="module")
def model(toy_model):
    return toy_model(11, seed=3)


def generate(model, method, prompts=PROMPTS, image=None, fields=None, **settings):
    settings = GenerationConfig(
        **{"stop_ids": STOP, "max_new_tokens": 7, "pad_id": 9, **settings}, method=METHODS[method]
    )
    generator = Generator(model.init_cache, model.step, settings, **(fields or {}))
    image = model.images(8)[: len(prompts)] if image is None else image
    return generator(model.params, image, *pad_prompts(prompts), key=KEYS[method])


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@for_each_method
def test_rows_do_not_influence_each_other(model, method, to_lists):
    """A batch of prompts of different lengths equals each row generated alone."""
    batched = generate(model, method)
    if method == "sample":  # a row's key depends on its index in the batch
        first = generate(model, method, prompts=PROMPTS[:3])
        assert to_lists(first) == to_lists(batched)[:3]
        return
    for i, prompt in enumerate(PROMPTS):
        alone = generate(model, method, prompts=[prompt], image=model.images(8)[i : i + 1])
        assert to_lists(alone)[0] == to_lists(batched)[i]
        np.testing.assert_allclose(alone.logprob[0], batched.logprob[i], rtol=1e-5)
        np.testing.assert_allclose(alone.score[0], batched.score[i], rtol=1e-5)


@for_each_method
def test_sequences_end_with_a_stop_token_or_at_the_limit_and_are_padded(model, method, to_lists):
    out = generate(model, method, max_new_tokens=5, min_new_tokens=2)
    lengths = set()
    for sequence in itertools.chain(*to_lists(out)):
        stops = [i for i, token in enumerate(sequence) if token in STOP]
        assert (stops == [] and len(sequence) == 5) or stops == [len(sequence) - 1]
        assert len(sequence) > 2
        lengths.add(len(sequence))
    assert len(lengths) > 1  # some end with a stop token, others at the limit
    assert out.tokens.shape == (8, METHODS[method].n, 5)
    tokens, mask = np.asarray(out.tokens), np.asarray(out.mask)
    assert (tokens[~mask] == 9).all()
    assert (mask[..., :-1] >= mask[..., 1:]).all()


@for_each_method
def test_logprob_is_that_of_the_model(model, method, to_lists):
    """Penalties do not affect `logprob`, nor do steps after the end of a sequence."""
    out = generate(model, method, repetition_penalty=1.5, no_repeat_ngram_size=2)
    for i, row in enumerate(to_lists(out)):
        for j, sequence in enumerate(row):
            expected = sum(model.logp(model.images(8)[i], PROMPTS[i], sequence))
            np.testing.assert_allclose(out.logprob[i, j], expected, rtol=1e-5)


@for_each_method
def test_length_bucket_does_not_change_the_result(model, method, to_lists):
    """Lengths 7 and 8 share a bucket, 9 has the next one. Sequences that end early are equal."""
    short, exact, longer = (generate(model, method, max_new_tokens=m) for m in (7, 8, 9))
    for a, b in ((short, exact), (exact, longer)):
        limit = a.tokens.shape[-1]
        ended_early = [
            (x, y)
            for x, y in zip(to_lists(a), to_lists(b), strict=True)
            if all(len(sequence) < limit for sequence in y)
        ]
        assert ended_early and all(x == y for x, y in ended_early)
    padded_prompts = [np.pad(x, ((0, 0), (0, 4))) for x in pad_prompts(PROMPTS)]
    settings = GenerationConfig(stop_ids=STOP, max_new_tokens=7, pad_id=9, method=METHODS[method])
    generator = Generator(model.init_cache, model.step, settings)
    padded = generator(model.params, model.images(8), *padded_prompts, key=KEYS[method])
    assert_equal(padded, short)


def test_lengths_of_one_bucket_share_a_compiled_program(model):
    traced = []

    def step(params, cache, token):
        traced.append(token.shape)
        return model.step(params, cache, token)

    def generate_up_to(max_new_tokens):
        settings = GenerationConfig(stop_ids=STOP, max_new_tokens=max_new_tokens)
        generator = Generator(model.init_cache, step, settings)
        return generator(model.params, model.images(8), *pad_prompts(PROMPTS))

    generate_up_to(5)
    num_traces = len(traced)
    generate_up_to(8)
    assert len(traced) == num_traces
    generate_up_to(9)
    assert len(traced) > num_traces


@for_each_method
def test_sharding_does_not_change_the_result_and_outputs_stay_sharded(model, method):
    partitioner = Partitioner(make_mesh(config.MeshConfig(4, 2, 1)))
    expected = generate(model, method)
    image = partitioner.shard_rows(np.asarray(model.images(8)))
    sharded = generate(model, method, image=image, fields={"constrain": partitioner.constrain})
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(sharded), strict=True):
        assert b.sharding.is_equivalent_to(partitioner.batch_sharding, b.ndim)
        if a.dtype == jnp.float32:
            np.testing.assert_allclose(a, b, rtol=1e-6)
        else:
            np.testing.assert_array_equal(a, b)


@for_each_method
def test_devices_do_not_exchange_caches(model, method):
    """In a step, devices only communicate whether all sequences are finished."""
    partitioner = Partitioner(make_mesh(config.MeshConfig(8, 1, 1)))
    settings = GenerationConfig(stop_ids=STOP, max_new_tokens=8, method=METHODS[method])

    def program(image, prompt, mask):
        cache = model.init_cache(model.params, image, length=prompt.shape[1] + 8)
        return decoding.generate(
            lambda cache, token: model.step(model.params, cache, token),
            cache,
            prompt,
            mask,
            settings,
            key=KEYS[method],
        )

    arguments = [
        partitioner.shard_rows(np.asarray(x)) for x in (model.images(8), *pad_prompts(PROMPTS))
    ]
    text = jax.jit(program).lower(*arguments).compile().as_text()
    assert "all-gather" not in text and "all-to-all" not in text
    assert "all-reduce" in text  # the program is sharded, and checks whether all are finished


def test_loop_stops_when_all_sequences_are_finished(model):
    steps = []

    def step(params, cache, token):
        jax.debug.callback(lambda: steps.append(1))
        logits, cache = model.step(params, cache, token)
        return logits.at[:, 3].set(jnp.where(cache["position"] >= 4, 1e4, -1e4)), cache

    settings = GenerationConfig(stop_ids=(3,), max_new_tokens=64)
    generator = Generator(model.init_cache, step, settings)
    out = generator(model.params, model.images(2), *pad_prompts([[5], [5]]))
    jax.effects_barrier()
    assert np.asarray(out.mask).sum(-1).tolist() == [[4], [4]]
    assert len(steps) == 4


def test_unchanged_cache_leaves_are_stored_once_per_row(model):
    """Keys and values of an image are not repeated for its beams."""

    def step(cache, token):
        return model.step(model.params, cache, token)

    cache = model.init_cache(model.params, model.images(2), length=9)
    prompts = map(jnp.asarray, pad_prompts([[5], [5]]))
    prefilled = prefill(step, cache, *prompts, n=5, max_new_tokens=8)
    assert sorted(x.shape for x in prefilled.cache) == [(10,), (10, 6), (10, 9)]
    assert len(cache) == 4  # the fourth is the image


@for_each_method
def test_generation_is_deterministic(model, method):
    assert_equal(generate(model, method), generate(model, method))


def test_prompt_and_new_tokens_must_fit_the_models_positions(model):
    """With 6 positions, 4 tokens can follow a prompt of 3: the model does not read the last one."""
    prompts = pad_prompts([[5, 1, 1], [5]])
    for max_new_tokens in (4, 5):
        generator = Generator(
            model.init_cache,
            model.step,
            GenerationConfig(stop_ids=STOP, max_new_tokens=max_new_tokens),
            max_positions=6,
        )
        if max_new_tokens == 4:
            generator(model.params, model.images(2), *prompts)
            continue
        with pytest.raises(ValueError, match="a max_new_tokens of at most 4 for"):
            generator(model.params, model.images(2), *prompts)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: GenerationConfig(stop_ids=()), r"stop_ids = \(\); expected at least one"),
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
        (lambda: BeamSearch(width=2, n=3), "n = 3, width = 2"),
        (lambda: Sampling(temperature=0.0), "the method 'greedy'"),
        (lambda: Sampling(top_p=0.0, top_k=0), "top_k = 0.*top_p = 0.0"),
        (
            lambda: decoding.build_generation_config(
                {"method": {"name": "nucleus"}}, stop_ids=(1,), pad_id=0
            ),
            "greedy, beam",
        ),
        (
            lambda: decoding.build_generation_config({"beam": 4}, stop_ids=(1,), pad_id=0),
            r"unknown fields \['beam'\]; known: max_new_tokens",
        ),
        (lambda: pad_prompts([[1], []]), r"prompts \[1\] are empty"),
    ],
)
def test_errors_for_invalid_settings_state_the_expected_values(make, error):
    with pytest.raises(ValueError, match=error):
        make()


def test_sampling_requires_a_key_and_other_methods_reject_one(model):
    for method, key in ((Greedy(), jax.random.key(0)), (Sampling(), None)):
        generator = Generator(
            model.init_cache, model.step, GenerationConfig(stop_ids=STOP, method=method)
        )
        with pytest.raises(ValueError, match="key"):
            generator(model.params, model.images(1), *pad_prompts([[5]]), key=key)


def test_build_generation_config_accepts_a_mapping():
    cfg = {"method": {"name": "beam", "width": 3}, "max_new_tokens": 9}
    expected = GenerationConfig(
        stop_ids=(2,), pad_id=1, max_new_tokens=9, method=BeamSearch(width=3)
    )
    assert decoding.build_generation_config(cfg, stop_ids=(2,), pad_id=1) == expected


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"repetition_penalty": math.nan}, "decoding: repetition_penalty = nan; expected a finite"),
        ({"repetition_penalty": math.inf}, "repetition_penalty = inf"),
        ({"max_new_tokens": 2.5}, "max_new_tokens = 2.5; expected a finite int"),
        ({"max_new_tokens": True}, "max_new_tokens = True"),
        ({"no_repeat_ngram_size": "2"}, "no_repeat_ngram_size = '2'; .* finite int or None"),
        ({"method": "beam"}, "decoding method = 'beam'; expected {'name'"),
        ({"method": {"name": "beam", "length_penalty": math.nan}}, "beam: length_penalty = nan"),
        ({"method": {"name": "sample", "temperature": math.nan}}, "sample: temperature = nan"),
        ({"method": {"name": "sample", "top_p": None}}, "sample: top_p = None; .* finite float"),
    ],
)
def test_settings_of_a_wrong_type_or_not_finite_are_refused(settings, error):
    with pytest.raises(UserError, match=error):
        decoding.build_generation_config(settings, stop_ids=(1,), pad_id=0)


def test_settings_may_be_integers_for_floats_and_numpy_scalars():
    settings = {
        "repetition_penalty": 2,
        "max_new_tokens": np.int64(3),
        "no_repeat_ngram_size": None,
    }
    built = decoding.build_generation_config(settings, stop_ids=(1,), pad_id=0)
    assert (built.repetition_penalty, built.max_new_tokens) == (2, 3)
