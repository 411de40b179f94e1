"""Greedy decoding and sampling: the argmax, the support, the frequencies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imgtune_jax.decoding import GenerationConfig, Generator, Greedy, Sampling, pad_prompts
from imgtune_jax.decoding.sampling import filter_logits


@pytest.fixture(scope="module")
def model(toy):
    return toy(9, seed=2)


def greedy_by_hand(model, image, prompt, settings):
    """An argmax a step, over the rules written as sets and loops."""
    context, text = list(prompt), []
    while len(text) < settings.max_new_tokens:
        logp = model.next_logp(image, context).copy()
        for token in set(context):
            logp[token] *= settings.repetition_penalty
        if n := settings.no_repeat_ngram_size:
            grams = {tuple(context[i : i + n]) for i in range(len(context) - n + 1)}
            for token in range(len(logp)):
                if (*context[len(context) - n + 1 :], token) in grams:
                    logp[token] = -np.inf
        if len(text) < settings.min_new_tokens:
            logp[list(settings.stop_ids)] = -np.inf
        text.append(int(logp.argmax()))
        context.append(text[-1])
        if text[-1] in settings.stop_ids:
            break
    return text


@pytest.mark.parametrize(
    "rules",
    [
        {},
        {"min_new_tokens": 5},
        {"repetition_penalty": 3.0},
        {"no_repeat_ngram_size": 1, "max_new_tokens": 4},
        {"no_repeat_ngram_size": 2},
        {"no_repeat_ngram_size": 3, "min_new_tokens": 11},
    ],
)
def test_greedy_is_the_argmax_loop(model, rules, texts):
    prompts = [[4], [4, 6, 4, 6, 2], [4, 1, 1], [4, 7]]
    settings = GenerationConfig(
        **{"stop_ids": (0, 3), "max_new_tokens": 12, **rules}, method=Greedy()
    )
    out = Generator(model.start, model.step, settings)(
        model.params, model.images(4), *pad_prompts(prompts)
    )
    want = [
        [greedy_by_hand(model, image, prompt, settings)]
        for image, prompt in zip(model.images(4), prompts, strict=True)
    ]
    assert texts(out) == want
    np.testing.assert_allclose(out.score, out.logprob / np.asarray(out.mask).sum(-1), rtol=1e-6)


def test_the_rules_bind(model, texts):
    """Without them, the texts of the test above are others."""
    plain, *ruled = (
        texts(
            Generator(
                model.start,
                model.step,
                GenerationConfig(stop_ids=(0, 3), max_new_tokens=12, **rules),
            )(
                model.params,
                model.images(4),
                *pad_prompts([[4], [4, 6, 4, 6, 2], [4, 1, 1], [4, 7]]),
            )
        )
        for rules in (
            {},
            {"min_new_tokens": 5},
            {"repetition_penalty": 3.0},
            {"no_repeat_ngram_size": 2},
        )
    )
    assert all(plain != other for other in ruled)


def test_an_offset_of_the_logits_changes_nothing(model, texts):
    """Also under a repetition penalty: it acts on probabilities."""

    def shifted(params, cache, token):
        logits, cache = model.step(params, cache, token)
        return logits + 40, cache

    settings = GenerationConfig(stop_ids=(0, 3), max_new_tokens=12, repetition_penalty=2.0)
    a, b = (
        Generator(model.start, step, settings)(
            model.params, model.images(4), *pad_prompts([[4]] * 4)
        )
        for step in (model.step, shifted)
    )
    assert texts(a) == texts(b)


LOGP = jnp.log(jnp.asarray([[0.05, 0.3, 0.1, 0.3, 0.25]], jnp.float32))


@pytest.mark.parametrize(
    ("method", "want"),
    [
        (Sampling(), {0: 0.05, 1: 0.3, 2: 0.1, 3: 0.3, 4: 0.25}),
        (Sampling(top_k=1), {1: 1.0}),
        (Sampling(top_k=3), {1: 0.3, 3: 0.3, 4: 0.25}),
        (Sampling(top_k=99), {0: 0.05, 1: 0.3, 2: 0.1, 3: 0.3, 4: 0.25}),
        (Sampling(top_p=0.1), {1: 0.3}),
        (Sampling(top_p=0.59), {1: 0.3, 3: 0.3}),
        (Sampling(top_p=0.61), {1: 0.3, 3: 0.3, 4: 0.25}),
        (Sampling(top_p=0.94), {1: 0.3, 3: 0.3, 4: 0.25, 2: 0.1}),
        # Renormalised over three tokens, two of them hold 0.6 / 0.85 = 0.71.
        (Sampling(top_k=3, top_p=0.7), {1: 0.3, 3: 0.3}),
        (Sampling(top_k=3, top_p=0.72), {1: 0.3, 3: 0.3, 4: 0.25}),
        # At temperature 1/2 probabilities are squared: 0.09 + 0.09 of 0.255.
        (Sampling(temperature=0.5, top_p=0.7), {1: 0.09, 3: 0.09}),
    ],
)
def test_candidates_are_exactly_those_of_top_k_and_top_p(method, want):
    logits, tokens = filter_logits(LOGP, method)
    p = np.asarray(jax.nn.softmax(logits))[0]
    got = {int(t): x for t, x in zip(tokens[0], p, strict=True) if x > 0}
    total = sum(want.values())
    assert got == pytest.approx({t: x / total for t, x in want.items()}, rel=1e-5)


@pytest.mark.parametrize(
    "method", [Sampling(n=4000, temperature=1.5), Sampling(n=4000, top_k=4, top_p=0.8)]
)
def test_frequencies_are_those_of_the_distribution(model, method):
    """First tokens, and second ones given the first. 4000 draws, five standard deviations."""
    settings = GenerationConfig(stop_ids=(0,), max_new_tokens=2, min_new_tokens=1, method=method)
    image = model.images(1)
    out = Generator(model.start, model.step, settings)(
        model.params, image, *pad_prompts([[4]]), key=jax.random.key(0)
    )
    tokens = np.asarray(out.tokens[0])
    likely = np.bincount(tokens[:, 0]).argmax()
    second = tokens[tokens[:, 0] == likely, 1]
    for context, drawn, banned in (([4], tokens[:, 0], [0]), ([4, likely], second, [])):
        logp = model.next_logp(image[0], context).copy()
        logp[banned] = -np.inf
        logits, index = filter_logits(jnp.asarray(logp)[None], method)
        p = np.zeros(9)
        p[np.asarray(index[0])] = np.asarray(jax.nn.softmax(logits))[0]
        got = np.bincount(drawn, minlength=9) / len(drawn)
        assert (got[p == 0] == 0).all()
        assert (np.abs(got - p) <= 5 * np.sqrt(p * (1 - p) / len(drawn)) + 1e-9).all()


def test_draws_differ_between_keys_rows_and_samples(model, texts):
    settings = GenerationConfig(
        stop_ids=(0,), max_new_tokens=12, method=Sampling(n=2, temperature=2.0)
    )
    generator = Generator(model.start, model.step, settings)
    image = jnp.repeat(model.images(1), 2, 0)
    a, b = (
        texts(generator(model.params, image, *pad_prompts([[4], [4]]), key=jax.random.key(seed)))
        for seed in (0, 1)
    )
    drawn = [tuple(text) for out in (a, b) for row in out for text in row]
    assert len(set(drawn)) == len(drawn)
