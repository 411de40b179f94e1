from __future__ import annotations

import jax
import numpy as np
import pytest

from imgtune_jax.evals import ranks as ranks_module
from imgtune_jax.evals.ranks import retrieval_ranks
from imgtune_jax.evals.retrieval import Retrieval, curve_names, retrieval_metrics


def sort_ranks(image_emb, text_emb, image_of_text, image_group=None):
    """Return ranks by the definition: a stable descending sort of the full score matrix."""
    group = np.arange(len(image_emb)) if image_group is None else np.asarray(image_group)
    scores = np.asarray(text_emb, np.float32) @ np.asarray(image_emb, np.float32).T
    positive = group[image_of_text][:, None] == group[None]

    def ranks(scores, positive):
        order = np.argsort(-scores, axis=1, kind="stable")
        hits = np.take_along_axis(positive, order, 1)
        return np.where(hits.any(1), hits.argmax(1), -1)

    return ranks(scores.T, positive.T), ranks(scores, positive)


def integer_embeddings(rng, n, m, d=3):
    """Return small integers as embeddings: products are exact, and there are many ties."""
    return rng.integers(-2, 3, (n, d)).astype(np.float32), rng.integers(-2, 3, (m, d)).astype(
        np.float32
    )


@pytest.mark.parametrize("case", ["retrieval_small", "retrieval"])
def test_recalls_equal_clip_benchmark_with_several_captions_per_image(golden, fakes, case):
    stored = golden("evals_clip_benchmark", case)
    got = retrieval_metrics(
        fakes.unit(stored["image_emb"]), fakes.unit(stored["text_emb"]), stored["image_of_text"]
    )
    names = [name for name in stored if "recall" in name]
    assert len(names) == 6
    for name in names:
        # CLIP_benchmark averages in float32; the hits themselves are the same.
        np.testing.assert_allclose(got[name], stored[name], rtol=2e-7, err_msg=name)


@pytest.mark.parametrize("chunk", [1, 4, 7, 64])
@pytest.mark.parametrize("grouped", [False, True])
def test_ranks_equal_a_stable_sort_for_any_block_size(chunk, grouped):
    rng = np.random.default_rng(chunk)
    image, text = integer_embeddings(rng, 17, 41)
    image_of_text = rng.integers(0, 17, 41)
    group = rng.integers(0, 9, 17) if grouped else None
    expected = sort_ranks(image, text, image_of_text, group)
    got = retrieval_ranks(image, text, image_of_text, image_group=group, chunk=chunk)
    np.testing.assert_array_equal(got.image_to_text, expected[0])
    np.testing.assert_array_equal(got.text_to_image, expected[1])


def test_ranks_do_not_depend_on_the_number_of_devices():
    devices = jax.devices()
    if len(devices) < 2:
        pytest.skip("one device; run with --xla_force_host_platform_device_count=8")
    rng = np.random.default_rng(0)
    image, text = integer_embeddings(rng, 13, 29)  # neither is a multiple of the number of devices
    image_of_text = rng.integers(0, 13, 29)
    mesh = jax.make_mesh((2, len(devices) // 2), ("data", "fsdp"))
    expected = retrieval_ranks(image, text, image_of_text)
    got = retrieval_ranks(image, text, image_of_text, mesh=mesh, chunk=10)
    np.testing.assert_array_equal(got.image_to_text, expected.image_to_text)
    np.testing.assert_array_equal(got.text_to_image, expected.text_to_image)


def test_no_block_of_scores_is_larger_than_a_chunk(monkeypatch):
    shapes = []
    scores = ranks_module._scores

    def spy(texts, images):
        out = scores(texts, images)
        shapes.append(out.shape)
        return out

    monkeypatch.setattr(ranks_module, "_scores", spy)
    ranks_module._compile_fns.cache_clear()
    rng = np.random.default_rng(0)
    retrieval_ranks(
        rng.normal(size=(70, 4)), rng.normal(size=(90, 4)), np.arange(90) % 70, chunk=16
    )
    ranks_module._compile_fns.cache_clear()
    assert shapes and all(max(shape) <= 16 for shape in shapes)


def test_ranks_without_ties_do_not_depend_on_the_order_of_images_and_texts():
    rng = np.random.default_rng(3)
    image, text = rng.normal(size=(20, 5)), rng.normal(size=(50, 5))
    image_of_text = np.r_[np.arange(20), rng.integers(0, 20, 30)]
    base = retrieval_ranks(image, text, image_of_text, chunk=8)
    image_order, text_order = rng.permutation(20), rng.permutation(50)
    permuted_image_of_text = np.argsort(image_order)[image_of_text[text_order]]
    got = retrieval_ranks(image[image_order], text[text_order], permuted_image_of_text, chunk=8)
    np.testing.assert_array_equal(got.image_to_text, base.image_to_text[image_order])
    np.testing.assert_array_equal(got.text_to_image, base.text_to_image[text_order])


def test_collapsed_embeddings_score_chance():
    n = 50
    ones = np.ones((n, 4), np.float32) / 2
    got = retrieval_metrics(ones, ones, np.arange(n))
    assert got["image_retrieval_recall@1"] == got["text_retrieval_recall@1"] == 1 / n
    assert got["image_retrieval_recall@10"] == 10 / n


def test_duplicates_in_different_blocks_tie():
    rng = np.random.default_rng(5)
    image = np.repeat(rng.normal(size=(1, 300)), 33, 0)
    got = retrieval_ranks(image, image, np.arange(33), chunk=10)
    np.testing.assert_array_equal(got.text_to_image, np.arange(33))
    np.testing.assert_array_equal(got.image_to_text, np.arange(33))


def test_any_caption_of_the_image_is_a_hit():
    image = np.eye(2, dtype=np.float32)
    text = np.array([[0.2, 0.9], [1, 0], [0.8, 0.1]], np.float32)
    got = retrieval_metrics(image, text, np.array([0, 0, 1]), ks=(1,))
    assert got["text_retrieval_recall@1"] == 0.5  # image 0 by its second caption
    assert got["image_retrieval_recall@1"] == 1 / 3


def test_image_without_a_caption_is_a_candidate_without_a_rank():
    image = np.eye(3, dtype=np.float32)
    got = retrieval_ranks(image, np.array([[0.0, 0.5, 1.0]], np.float32), np.array([1]))
    assert got.image_to_text.tolist() == [-1, 0, -1]
    assert got.text_to_image.tolist() == [1]


def test_embeddings_that_are_not_finite_raise():
    image, text = np.eye(3), np.eye(3)
    text[1, 1] = np.nan
    with pytest.raises(ValueError, match=r"1 of 3 text embeddings are not finite .* row 1"):
        retrieval_metrics(image, text, np.arange(3))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_scores_that_overflow_float32_raise(dtype):
    """An infinite or NaN score of a positive pair would have the best rank."""
    image, text = np.eye(3, dtype=dtype), np.eye(3, dtype=dtype)
    text[1] = [3e38, -3e38, 3e38]
    image[1] = [3e38, 3e38, 3e38]
    with pytest.raises(ValueError, match="scores overflow float32"):
        retrieval_metrics(image, text, np.arange(3))


@pytest.mark.parametrize("image_of_text", [[0, 1], [0, 1, 3], [0, 1, -1]])
def test_invalid_image_of_text_raises(image_of_text):
    with pytest.raises(ValueError, match="index of one of the 3 images"):
        retrieval_metrics(np.eye(3), np.eye(3), np.array(image_of_text))


def recall_of_clip_benchmark(scores, positive, k):
    """Transcribe `recall_at_k` of CLIP_benchmark 1.6.2 and its use: the fraction of hits > 0."""
    top = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    num_hits = np.take_along_axis(positive, top, 1).sum(1)
    with np.errstate(invalid="ignore"):
        return (num_hits / positive.sum(1) > 0).mean()


def test_recalls_equal_clip_benchmark_with_uneven_captions_and_images_without_any(fakes):
    rng = np.random.default_rng(4)
    num_captions = rng.integers(0, 4, 30)
    assert set(num_captions) == {0, 1, 2, 3}
    image_of_text = np.repeat(np.arange(30), num_captions)
    image = fakes.unit(rng.normal(size=(30, 6)))
    text = fakes.unit(image[image_of_text] + 0.3 * rng.normal(size=(len(image_of_text), 6)))
    got = retrieval_metrics(image, text, image_of_text)
    positive = image_of_text[:, None] == np.arange(30)
    scores = text @ image.T
    for k in (1, 5, 10):
        for name, args in {"image": (scores, positive), "text": (scores.T, positive.T)}.items():
            expected = recall_of_clip_benchmark(*args, k)
            assert got[f"{name}_retrieval_recall@{k}"] == pytest.approx(expected), (name, k)
    assert got["text_retrieval_recall@10"] <= (num_captions > 0).mean()
    assert got["text_retrieval_mean_rank"] >= 1


def test_k_above_the_number_of_candidates_is_omitted():
    got = retrieval_metrics(np.eye(7), np.eye(7)[:3], np.arange(3))
    assert "image_retrieval_recall@5" in got and "image_retrieval_recall@10" not in got
    assert "text_retrieval_recall@5" not in got


def test_curve_names_state_the_direction():
    got = curve_names({"text_retrieval_recall@1": 0.25, "image_retrieval_mean_rank": 3.0})
    assert got == {"val/image_to_text_R@1": 0.25, "val/text_to_image_mean_rank": 3.0}


def test_evaluator_excludes_unreadable_images_and_their_captions(fakes):
    rng = np.random.default_rng(0)
    vectors = fakes.unit(rng.normal(size=(6, 8)))
    source = [fakes.record(v, f"a{i}", f"b{i}") for i, v in enumerate(vectors)]
    texts = {f"{x}{i}": v + 0.01 for i, v in enumerate(vectors) for x in "ab"}
    source[2] = fakes.record(None, "a2", "b2")
    got = Retrieval(source)(fakes.Predictor(texts))
    assert (got["num_images"], got["num_texts"], got["num_broken"]) == (5, 10, 1)
    assert got["image_retrieval_recall@1"] == got["text_retrieval_recall@1"] == 1


def test_evaluator_uses_groups_only_if_set(fakes):
    vectors = np.eye(4)
    source = [fakes.record(vectors[i], f"c{i}", group=i // 2) for i in range(4)]
    # Each caption's embedding is that of the other image of its group.
    swapped = {f"c{i}": vectors[i ^ 1] for i in range(4)}
    assert Retrieval(source)(fakes.Predictor(swapped))["image_retrieval_recall@1"] == 0
    grouped = Retrieval(source, use_groups=True)(fakes.Predictor(swapped))
    assert grouped["image_retrieval_recall@1"] == grouped["text_retrieval_recall@1"] == 1


def test_missing_caption_set_error_lists_the_existing_ones(fakes):
    source = [fakes.record(np.ones(2), en=("one",))]
    with pytest.raises(ValueError, match=r"set 'caption'; the first record has the sets \['en'\]"):
        Retrieval(source)(fakes.Predictor())
