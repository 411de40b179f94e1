"""Beam search: all sequences at full width, greedy at width 1, ranking, and when a row ends."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imgtune_jax.decoding import BeamSearch, GenerationConfig, Generator, Greedy, pad_prompts

PROMPTS = [[1], [1, 2, 2], [1, 3]]


def generate(model, settings, prompts=PROMPTS):
    generator = Generator(model.init_cache, model.step, settings)
    return generator(model.params, model.images(len(prompts)), *pad_prompts(prompts))


def all_sequences(vocabulary, stop, max_length, min_length=0):
    """Yield all sequences that end with their only stop token or have the maximum length."""
    other_tokens = [t for t in range(vocabulary) if t not in stop]
    for length in range(1, max_length + 1):
        ends = range(vocabulary) if length == max_length else stop
        for body in itertools.product(other_tokens, repeat=length - 1):
            for end in ends:
                if end not in stop or length > min_length:
                    yield [*body, end]


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0, -0.5])
@pytest.mark.parametrize("exhaustive", [True, False])
def test_wide_beam_searches_all_sequences(toy_model, to_lists, length_penalty, exhaustive):
    """At width vocabulary ** length, no hypothesis is dropped, so the n best of all are found.

    The setting `exhaustive` decides how early a row may end. It does not matter here: a row ends
    early only if it has `width` finished sequences, and fewer than `width` sequences exist.
    """
    model = toy_model(4, seed=1)
    stop, max_length, n = (0,), 3, 5
    method = BeamSearch(width=64, n=n, length_penalty=length_penalty, exhaustive=exhaustive)
    out = generate(
        model,
        GenerationConfig(stop_ids=stop, max_new_tokens=max_length, min_new_tokens=1, method=method),
    )
    actual = to_lists(out)
    for i, prompt in enumerate(PROMPTS):
        scored = [
            (sum(model.logp(model.images(3)[i], prompt, x)) / len(x) ** length_penalty, x)
            for x in all_sequences(4, stop, max_length, min_length=1)
        ]
        best = sorted(scored, reverse=True)[:n]
        assert actual[i] == [sequence for _, sequence in best]
        np.testing.assert_allclose(out.score[i], [score for score, _ in best], rtol=1e-5)
        np.testing.assert_allclose(
            out.logprob[i], [score * len(x) ** length_penalty for score, x in best], rtol=1e-5
        )


@pytest.mark.parametrize(
    "processors", [{}, {"repetition_penalty": 2.0}, {"no_repeat_ngram_size": 2}]
)
@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_beam_of_width_one_is_greedy(toy_model, to_lists, processors, length_penalty):
    model = toy_model(12, seed=4)
    common = dict(stop_ids=(0, 5), max_new_tokens=10, **processors)
    prompts = [[1], [1, 2, 7], [1, 3], [1, 1], [2], [3], [4], [6]]
    method = BeamSearch(width=1, length_penalty=length_penalty)
    beam = generate(model, GenerationConfig(method=method, **common), prompts)
    greedy = generate(model, GenerationConfig(method=Greedy(), **common), prompts)
    assert to_lists(beam) == to_lists(greedy)
    np.testing.assert_allclose(beam.logprob, greedy.logprob, rtol=1e-6)
    assert len({len(t[0]) for t in to_lists(greedy)}) > 2


def reference_beam_search(model, image, prompt, settings, *, early):
    """Search with lists of (score, sequence), as in Transformers' BeamSearchScorer.

    `early`: a row ends as with `exhaustive=False`.
    """
    method, stop = settings.method, settings.stop_ids
    alive, finished = [(0.0, [])], []
    for count in range(1, settings.max_new_tokens + 1):
        candidates = [
            (score + float(logp), [*sequence, token])
            for score, sequence in alive
            for token, logp in enumerate(model.next_logp(image, [*prompt, *sequence]))
        ]
        candidates.sort(key=lambda x: -x[0])
        for score, sequence in candidates[: method.width]:
            if sequence[-1] in stop:
                finished.append((score / count**method.length_penalty, sequence))
        finished = sorted(finished, key=lambda x: -x[0])[: method.width]
        alive = [x for x in candidates if x[1][-1] not in stop][: method.width]
        best_length = count if early else settings.max_new_tokens
        best_possible = candidates[0][0] / best_length**method.length_penalty
        if len(finished) == method.width and finished[-1][0] >= best_possible:
            return finished[: method.n]
    penalty = settings.max_new_tokens**method.length_penalty
    finished += [(score / penalty, sequence) for score, sequence in alive]
    return sorted(finished, key=lambda x: -x[0])[: method.n]


@pytest.mark.parametrize("exhaustive", [True, False])
@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 1.0])
def test_narrow_beam_equals_the_reference_search(toy_model, to_lists, length_penalty, exhaustive):
    model = toy_model(7, seed=6, sharpness=0.7)
    method = BeamSearch(width=3, n=3, length_penalty=length_penalty, exhaustive=exhaustive)
    settings = GenerationConfig(stop_ids=(0, 4), max_new_tokens=6, method=method)
    out = generate(model, settings)
    for i, prompt in enumerate(PROMPTS):
        expected = reference_beam_search(
            model, model.images(3)[i], prompt, settings, early=not exhaustive
        )
        assert to_lists(out)[i] == [sequence for _, sequence in expected]
        np.testing.assert_allclose(out.score[i], [score for score, _ in expected], rtol=1e-5)


def test_exhaustive_search_finds_better_sequences_than_the_heuristic(toy_model):
    """Its best score is at least that of `exhaustive=False` in every row, and higher in some."""
    model = toy_model(7, seed=6, sharpness=0.7)
    prompts = [[t] for t in range(1, 7)]
    best = {}
    for exhaustive in (True, False):
        method = BeamSearch(width=2, length_penalty=2.0, exhaustive=exhaustive)
        out = generate(
            model, GenerationConfig(stop_ids=(0, 4), max_new_tokens=6, method=method), prompts
        )
        best[exhaustive] = np.asarray(out.score[:, 0])
    assert (best[True] >= best[False] - 1e-6).all()
    assert (best[True] > best[False] + 1e-3).any()


def test_finished_row_stays_unchanged_while_others_continue(toy_model, to_lists):
    """A row generated alone equals the same row of a batch."""
    model = toy_model(7, seed=6, sharpness=0.7)
    prompts = [[t] for t in range(1, 7)]
    settings = GenerationConfig(stop_ids=(0, 4), max_new_tokens=20, method=BeamSearch(width=2, n=2))
    batched = generate(model, settings, prompts)
    generator = Generator(model.init_cache, model.step, settings)
    for i, prompt in enumerate(prompts):
        alone = generator(model.params, model.images(6)[i : i + 1], *pad_prompts([prompt]))
        assert to_lists(alone)[0] == to_lists(batched)[i]
        np.testing.assert_allclose(alone.score[0], batched.score[i], rtol=1e-5)


def test_missing_sequences_are_empty_with_score_minus_infinity(toy_model, to_lists):
    """With a vocabulary of two tokens, there are only two sequences of length one."""
    model = toy_model(2)
    settings = GenerationConfig(stop_ids=(0,), max_new_tokens=1, method=BeamSearch(width=4, n=4))
    out = generate(model, settings, [[1]])
    assert sorted(to_lists(out)[0][:2]) == [[0], [1]]
    assert to_lists(out)[0][2:] == [[], []]
    assert np.isneginf(out.score[0, 2:]).all() and np.isneginf(out.logprob[0, 2:]).all()
    assert np.isfinite(out.score[0, :2]).all()


def test_beams_of_one_row_are_distinct(toy_model, to_lists):
    model = toy_model(9, seed=5)
    settings = GenerationConfig(stop_ids=(0,), max_new_tokens=8, method=BeamSearch(width=6, n=6))
    for row in to_lists(generate(model, settings)):
        assert len({tuple(sequence) for sequence in row}) == 6


def test_logits_of_minus_infinity_cause_no_nan(toy_model):
    """Tokens that the model excludes are never generated."""
    model = toy_model(5, seed=2)

    def step(params, cache, token):
        logits, cache = model.step(params, cache, token)
        return logits.at[:, 2:4].set(-jnp.inf), cache

    settings = GenerationConfig(
        stop_ids=(0,), max_new_tokens=5, method=BeamSearch(width=3, n=3), repetition_penalty=1.5
    )
    out = Generator(model.init_cache, step, settings)(
        model.params, model.images(2), *pad_prompts([[1], [1]])
    )
    tokens, mask = np.asarray(out.tokens), np.asarray(out.mask)
    assert not set(tokens[mask].tolist()) & {2, 3}
    jax.tree.map(lambda x: np.testing.assert_equal(np.isnan(x).any(), False), out)
