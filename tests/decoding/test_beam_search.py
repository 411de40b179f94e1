"""Beam search: exhaustive when wide enough, greedy when one wide, its order and its end."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imgtune_jax.decoding import BeamSearch, GenerationConfig, Generator, Greedy, pad_prompts

PROMPTS = [[1], [1, 2, 2], [1, 3]]


def run(model, settings, prompts=PROMPTS):
    generator = Generator(model.start, model.step, settings)
    return generator(model.params, model.images(len(prompts)), *pad_prompts(prompts))


def all_texts(vocabulary, stop, longest, shortest=0):
    """Every text that ends with its only stop token, or is as long as may be."""
    words = [t for t in range(vocabulary) if t not in stop]
    for length in range(1, longest + 1):
        ends = range(vocabulary) if length == longest else stop
        for body in itertools.product(words, repeat=length - 1):
            for end in ends:
                if end not in stop or length > shortest:
                    yield [*body, end]


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0, -0.5])
@pytest.mark.parametrize("exhaustive", [True, False])
def test_wide_beam_is_exhaustive_search(toy, texts, length_penalty, exhaustive):
    """At width vocabulary ** length nothing is ever cut, so the n best are the n best of all.

    With either end rule: so many finished texts never exist that the heuristic could stop it.
    """
    model = toy(4, seed=1)
    stop, longest, n = (0,), 3, 5
    method = BeamSearch(width=64, n=n, length_penalty=length_penalty, exhaustive=exhaustive)
    out = run(
        model,
        GenerationConfig(stop_ids=stop, max_new_tokens=longest, min_new_tokens=1, method=method),
    )
    got = texts(out)
    for i, prompt in enumerate(PROMPTS):
        scored = [
            (sum(model.logp(model.images(3)[i], prompt, text)) / len(text) ** length_penalty, text)
            for text in all_texts(4, stop, longest, shortest=1)
        ]
        best = sorted(scored, reverse=True)[:n]
        assert got[i] == [text for _, text in best]
        np.testing.assert_allclose(out.score[i], [s for s, _ in best], rtol=1e-5)
        np.testing.assert_allclose(
            out.logprob[i], [s * len(t) ** length_penalty for s, t in best], rtol=1e-5
        )


@pytest.mark.parametrize("rules", [{}, {"repetition_penalty": 2.0}, {"no_repeat_ngram_size": 2}])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_a_beam_of_one_is_greedy(toy, texts, rules, length_penalty):
    model = toy(12, seed=4)
    common = dict(stop_ids=(0, 5), max_new_tokens=10, **rules)
    prompts = [[1], [1, 2, 7], [1, 3], [1, 1], [2], [3], [4], [6]]
    method = BeamSearch(width=1, length_penalty=length_penalty)
    beam = run(model, GenerationConfig(method=method, **common), prompts)
    greedy = run(model, GenerationConfig(method=Greedy(), **common), prompts)
    assert texts(beam) == texts(greedy)
    np.testing.assert_allclose(beam.logprob, greedy.logprob, rtol=1e-6)
    assert len({len(t[0]) for t in texts(greedy)}) > 2


def beam_by_hand(model, image, prompt, settings, *, early):
    """Lists of hypotheses, as in Transformers' BeamSearchScorer."""
    m, stop = settings.method, settings.stop_ids
    live, ended = [(0.0, [])], []
    for count in range(1, settings.max_new_tokens + 1):
        found = [
            (score + float(logp), [*text, token])
            for score, text in live
            for token, logp in enumerate(model.next_logp(image, [*prompt, *text]))
        ]
        found.sort(key=lambda x: -x[0])
        for score, text in found[: m.width]:
            if text[-1] in stop:
                ended.append((score / count**m.length_penalty, text))
        ended = sorted(ended, key=lambda x: -x[0])[: m.width]
        live = [x for x in found if x[1][-1] not in stop][: m.width]
        reach = count if early else settings.max_new_tokens
        full = len(ended) == m.width
        if full and ended[-1][0] >= found[0][0] / reach**m.length_penalty:
            return ended[: m.n]
    ended += [(score / settings.max_new_tokens**m.length_penalty, text) for score, text in live]
    return sorted(ended, key=lambda x: -x[0])[: m.n]


@pytest.mark.parametrize("exhaustive", [True, False])
@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 1.0])
def test_narrow_beam_is_the_search_by_lists(toy, texts, length_penalty, exhaustive):
    model = toy(7, seed=6, sharpness=0.7)
    method = BeamSearch(width=3, n=3, length_penalty=length_penalty, exhaustive=exhaustive)
    settings = GenerationConfig(stop_ids=(0, 4), max_new_tokens=6, method=method)
    out = run(model, settings)
    for i, prompt in enumerate(PROMPTS):
        want = beam_by_hand(model, model.images(3)[i], prompt, settings, early=not exhaustive)
        assert texts(out)[i] == [text for _, text in want]
        np.testing.assert_allclose(out.score[i], [s for s, _ in want], rtol=1e-5)


def test_the_exhaustive_end_finds_what_the_heuristic_misses(toy):
    """Its best score is at least the heuristic's on every row, and better on some."""
    model = toy(7, seed=6, sharpness=0.7)
    prompts = [[t] for t in range(1, 7)]
    best = {}
    for exhaustive in (True, False):
        method = BeamSearch(width=2, length_penalty=2.0, exhaustive=exhaustive)
        out = run(
            model, GenerationConfig(stop_ids=(0, 4), max_new_tokens=6, method=method), prompts
        )
        best[exhaustive] = np.asarray(out.score[:, 0])
    assert (best[True] >= best[False] - 1e-6).all()
    assert (best[True] > best[False] + 1e-3).any()


def test_a_row_that_is_done_waits_unchanged(toy, texts):
    """The heuristic end of a row does not move with the rows beside it."""
    model = toy(7, seed=6, sharpness=0.7)
    prompts = [[t] for t in range(1, 7)]
    settings = GenerationConfig(stop_ids=(0, 4), max_new_tokens=20, method=BeamSearch(width=2, n=2))
    whole = run(model, settings, prompts)
    generator = Generator(model.start, model.step, settings)
    for i, prompt in enumerate(prompts):
        alone = generator(model.params, model.images(6)[i : i + 1], *pad_prompts([prompt]))
        assert texts(alone)[0] == texts(whole)[i]
        np.testing.assert_allclose(alone.score[0], whole.score[i], rtol=1e-5)


def test_texts_that_do_not_exist_are_empty_and_score_minus_infinity(toy, texts):
    """Two tokens, one of them the stop token: of length one there are two texts."""
    model = toy(2)
    settings = GenerationConfig(stop_ids=(0,), max_new_tokens=1, method=BeamSearch(width=4, n=4))
    out = run(model, settings, [[1]])
    assert sorted(texts(out)[0][:2]) == [[0], [1]]
    assert texts(out)[0][2:] == [[], []]
    assert np.isneginf(out.score[0, 2:]).all() and np.isneginf(out.logprob[0, 2:]).all()
    assert np.isfinite(out.score[0, :2]).all()


def test_beams_of_one_row_are_different_texts(toy, texts):
    model = toy(9, seed=5)
    settings = GenerationConfig(stop_ids=(0,), max_new_tokens=8, method=BeamSearch(width=6, n=6))
    for row in texts(run(model, settings)):
        assert len({tuple(t) for t in row}) == 6


def test_search_never_sees_nan(toy):
    """A model that forbids tokens outright (-inf logits) is searched like any other."""
    model = toy(5, seed=2)

    def step(params, cache, token):
        logits, cache = model.step(params, cache, token)
        return logits.at[:, 2:4].set(-jnp.inf), cache

    settings = GenerationConfig(
        stop_ids=(0,), max_new_tokens=5, method=BeamSearch(width=3, n=3), repetition_penalty=1.5
    )
    out = Generator(model.start, step, settings)(
        model.params, model.images(2), *pad_prompts([[1], [1]])
    )
    tokens, mask = np.asarray(out.tokens), np.asarray(out.mask)
    assert not set(tokens[mask].tolist()) & {2, 3}
    jax.tree.map(lambda x: np.testing.assert_equal(np.isnan(x).any(), False), out)
