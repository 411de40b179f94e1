from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from imgtune_jax.report import RetrievalData
from imgtune_jax.report.retrieval_examples import sample_examples
from tests.report.toy_report import UNSAFE, png, retrieval_data


def test_queries_have_hits_ranks_and_first_positives():
    examples = sample_examples(retrieval_data(), queries=3, answers=2)
    by_caption = {q.caption: q for q in examples.text_queries}
    assert [a.hit for a in by_caption["red"].answers] == [True, False]
    assert by_caption["red"].first_positive is None and by_caption["red"].rank == 1
    missed = by_caption[UNSAFE]  # its image has rank 2
    assert [a.hit for a in missed.answers] == [False, True] and missed.rank == 2
    single = sample_examples(retrieval_data(), queries=3, answers=1)
    missed = next(q for q in single.text_queries if q.caption == UNSAFE)
    assert missed.first_positive is not None
    assert (missed.first_positive.rank, missed.first_positive.hit) == (2, True)
    ranks = {q.image.alt: q.rank for q in examples.image_queries}
    assert ranks == {"red": 1, "green": 1, UNSAFE: 1}
    assert examples.recalls["image_retrieval_recall@1"] == pytest.approx(2 / 3)
    positives = [[c.positive for c in row] for row in examples.heatmap.cells]
    assert positives == np.eye(3, dtype=bool).tolist()


def test_all_images_of_a_group_are_positives():
    examples = sample_examples(retrieval_data(image_group=np.array([0, 1, 0])), queries=3)
    query = next(q for q in examples.text_queries if q.caption == UNSAFE)
    assert query.rank == 1 and sum(a.hit for a in query.answers) == 2


def test_sampled_queries_depend_on_the_seed_and_not_on_the_embeddings():
    n = 60
    emb = np.random.default_rng(0).normal(size=(n, 8))
    captions = [f"c{i}" for i in range(n)]
    data = RetrievalData("d", [png("red")] * n, captions, emb, emb, np.arange(n))

    def sampled(data, seed):
        return [q.caption for q in sample_examples(data, queries=5, seed=seed).text_queries]

    assert sampled(data, 0) == sampled(data, 0) != sampled(data, 1)
    all_missed = dataclasses.replace(data, image_emb=-emb)
    assert sampled(all_missed, 0) == sampled(data, 0)


def test_only_shown_thumbnails_are_read():
    accessed = []

    class LazyThumbnails:
        def __len__(self):
            return 500

        def __getitem__(self, i):
            accessed.append(i)
            return png("red")

    emb = np.random.default_rng(0).normal(size=(500, 8))
    data = RetrievalData("d", LazyThumbnails(), ["c"] * 500, emb, emb, np.arange(500))
    sample_examples(data, queries=2, pairs=2)
    assert len(accessed) <= 2 * 6 + 2 + 2  # text queries, image queries, heat map


def test_fields_of_different_lengths_raise():
    with pytest.raises(ValueError, match=r"'toy' has 3 image and 3 text .* 3 thumbnails, 2 capt"):
        retrieval_data(captions=["a", "b"])
