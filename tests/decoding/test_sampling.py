"""Greedy decoding equals a loop, and samples have the expected support and frequencies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imgtune_jax.decoding import GenerationConfig, Generator, Greedy, Sampling, pad_prompts
from imgtune_jax.decoding.sampling import filter_logits


@pytest.fixture(scope="module")
def model(toy_model):
    return toy_model(9, seed=2)


def reference_greedy(model, image, prompt, settings):
    """Take the argmax at every step, with the settings applied by sets and loops."""
    context, sequence = list(prompt), []
    while len(sequence) < settings.max_new_tokens:
        logp = model.next_logp(image, context).copy()
        for token in set(context):
            logp[token] *= settings.repetition_penalty
        if n := settings.no_repeat_ngram_size:
            ngrams = {tuple(context[i : i + n]) for i in range(len(context) - n + 1)}
            for token in range(len(logp)):
                if (*context[len(context) - n + 1 :], token) in ngrams:
                    logp[token] = -np.inf
        if len(sequence) < settings.min_new_tokens:
            logp[list(settings.stop_ids)] = -np.inf
        sequence.append(int(logp.argmax()))
        context.append(sequence[-1])
        if sequence[-1] in settings.stop_ids:
            break
    return sequence


@pytest.mark.parametrize(
    "processors",
    [
        {},
        {"min_new_tokens": 5},
        {"repetition_penalty": 3.0},
        {"no_repeat_ngram_size": 1, "max_new_tokens": 4},
        {"no_repeat_ngram_size": 2},
        {"no_repeat_ngram_size": 3, "min_new_tokens": 11},
    ],
)
def test_greedy_equals_the_argmax_loop(model, processors, to_lists):
    prompts = [[4], [4, 6, 4, 6, 2], [4, 1, 1], [4, 7]]
    settings = GenerationConfig(
        **{"stop_ids": (0, 3), "max_new_tokens": 12, **processors}, method=Greedy()
    )
    out = Generator(model.init_cache, model.step, settings)(
        model.params, model.images(4), *pad_prompts(prompts)
    )
    expected = [
        [reference_greedy(model, image, prompt, settings)]
        for image, prompt in zip(model.images(4), prompts, strict=True)
    ]
    assert to_lists(out) == expected
    np.testing.assert_allclose(out.score, out.logprob / np.asarray(out.mask).sum(-1), rtol=1e-6)


def test_every_processor_changes_some_sequence(model, to_lists):
    """Otherwise, the test above would not test it."""
    prompts = pad_prompts([[4], [4, 6, 4, 6, 2], [4, 1, 1], [4, 7]])

    def generate(**processors):
        settings = GenerationConfig(stop_ids=(0, 3), max_new_tokens=12, **processors)
        generator = Generator(model.init_cache, model.step, settings)
        return to_lists(generator(model.params, model.images(4), *prompts))

    unprocessed = generate()
    assert generate(min_new_tokens=5) != unprocessed
    assert generate(repetition_penalty=3.0) != unprocessed
    assert generate(no_repeat_ngram_size=2) != unprocessed


def test_offset_of_the_logits_has_no_effect(model, to_lists):
    """The repetition penalty is applied to log probabilities, so this holds with a penalty too."""

    def shifted(params, cache, token):
        logits, cache = model.step(params, cache, token)
        return logits + 40, cache

    settings = GenerationConfig(stop_ids=(0, 3), max_new_tokens=12, repetition_penalty=2.0)
    a, b = (
        Generator(model.init_cache, step, settings)(
            model.params, model.images(4), *pad_prompts([[4]] * 4)
        )
        for step in (model.step, shifted)
    )
    assert to_lists(a) == to_lists(b)


LOGP = jnp.log(jnp.asarray([[0.05, 0.3, 0.1, 0.3, 0.25]], jnp.float32))


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (Sampling(), {0: 0.05, 1: 0.3, 2: 0.1, 3: 0.3, 4: 0.25}),
        (Sampling(top_k=1), {1: 1.0}),
        (Sampling(top_k=3), {1: 0.3, 3: 0.3, 4: 0.25}),
        (Sampling(top_k=99), {0: 0.05, 1: 0.3, 2: 0.1, 3: 0.3, 4: 0.25}),
        (Sampling(top_p=0.1), {1: 0.3}),
        (Sampling(top_p=0.59), {1: 0.3, 3: 0.3}),
        (Sampling(top_p=0.61), {1: 0.3, 3: 0.3, 4: 0.25}),
        (Sampling(top_p=0.94), {1: 0.3, 3: 0.3, 4: 0.25, 2: 0.1}),
        # Renormalized over three tokens, the first two have probability 0.6 / 0.85 = 0.71.
        (Sampling(top_k=3, top_p=0.7), {1: 0.3, 3: 0.3}),
        (Sampling(top_k=3, top_p=0.72), {1: 0.3, 3: 0.3, 4: 0.25}),
        # Temperature 1/2 squares the probabilities: 0.09 + 0.09 of 0.255.
        (Sampling(temperature=0.5, top_p=0.7), {1: 0.09, 3: 0.09}),
    ],
)
def test_filter_logits_retains_exactly_the_tokens_of_top_k_and_top_p(method, expected):
    logits, tokens = filter_logits(LOGP, method)
    probs = np.asarray(jax.nn.softmax(logits))[0]
    actual = {int(t): p for t, p in zip(tokens[0], probs, strict=True) if p > 0}
    total = sum(expected.values())
    assert actual == pytest.approx({t: p / total for t, p in expected.items()}, rel=1e-5)


@pytest.mark.parametrize(
    "method", [Sampling(n=4000, temperature=1.5), Sampling(n=4000, top_k=4, top_p=0.8)]
)
def test_frequencies_match_the_distribution(model, method):
    """Compare the first token, and the second given the first: 4000 samples, 5 standard errors."""
    settings = GenerationConfig(stop_ids=(0,), max_new_tokens=2, min_new_tokens=1, method=method)
    image = model.images(1)
    out = Generator(model.init_cache, model.step, settings)(
        model.params, image, *pad_prompts([[4]]), key=jax.random.key(0)
    )
    tokens = np.asarray(out.tokens[0])
    likely = np.bincount(tokens[:, 0]).argmax()
    second = tokens[tokens[:, 0] == likely, 1]
    for context, sampled, excluded in (([4], tokens[:, 0], [0]), ([4, likely], second, [])):
        logp = model.next_logp(image[0], context).copy()
        logp[excluded] = -np.inf
        logits, index = filter_logits(jnp.asarray(logp)[None], method)
        probs = np.zeros(9)
        probs[np.asarray(index[0])] = np.asarray(jax.nn.softmax(logits))[0]
        frequency = np.bincount(sampled, minlength=9) / len(sampled)
        standard_error = np.sqrt(probs * (1 - probs) / len(sampled))
        assert (frequency[probs == 0] == 0).all()
        assert (np.abs(frequency - probs) <= 5 * standard_error + 1e-9).all()


def test_samples_differ_between_keys_rows_and_sequences(model, to_lists):
    settings = GenerationConfig(
        stop_ids=(0,), max_new_tokens=12, method=Sampling(n=2, temperature=2.0)
    )
    generator = Generator(model.init_cache, model.step, settings)
    image = jnp.repeat(model.images(1), 2, 0)
    a, b = (
        to_lists(generator(model.params, image, *pad_prompts([[4], [4]]), key=jax.random.key(seed)))
        for seed in (0, 1)
    )
    sequences = [tuple(sequence) for out in (a, b) for row in out for sequence in row]
    assert len(set(sequences)) == len(sequences)
