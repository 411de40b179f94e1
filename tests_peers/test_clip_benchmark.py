"""Our metrics against CLIP_benchmark 1.6.2's own functions, on random embeddings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval

from imgtune_jax.evals import zeroshot
from imgtune_jax.evals.ranks import retrieval_ranks
from imgtune_jax.evals.retrieval import retrieval_metrics


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


class Lookup:
    """A CLIP whose images and texts are embeddings already."""

    def encode_image(self, images):
        return images

    def encode_text(self, texts):
        return texts


def coco_like(seed, n, d=24, noise=2.0):
    """Images with 1 to 7 captions each."""
    rng = np.random.default_rng(seed)
    captions = rng.integers(1, 8, n)
    owner = np.repeat(np.arange(n), captions)
    image = rng.normal(size=(n, d)).astype(np.float32)
    text = image[owner] + noise * rng.normal(size=(len(owner), d)).astype(np.float32)
    return image, text.astype(np.float32), owner, captions


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("batch_size", [7, 64])  # neither divides the images
def test_recalls_equal_clip_benchmarks_evaluate(seed, batch_size):
    image, text, owner, captions = coco_like(seed, 90)
    rows = torch.from_numpy(text).split(captions.tolist())
    batches = [
        (torch.from_numpy(image[i : i + batch_size]), rows[i : i + batch_size])
        for i in range(0, len(image), batch_size)
    ]
    ks = [1, 5, 10, 50]
    want = zeroshot_retrieval.evaluate(
        Lookup(), batches, torch.stack, "cpu", amp=False, recall_k_list=ks
    )
    got = retrieval_metrics(unit(image), unit(text), owner, ks=ks, chunk=64)
    assert len(want) == 8
    for name, value in want.items():
        # CLIP_benchmark averages in float32.
        np.testing.assert_allclose(got[name], value, rtol=2e-7, err_msg=name)


@pytest.mark.parametrize("k", [1, 5, 10])
def test_every_querys_hit_equals_recall_at_k(k):
    image, text, owner, _ = coco_like(9, 120)
    image, text = unit(image), unit(text)
    scores = torch.from_numpy(text @ image.T)
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(len(text)), torch.from_numpy(owner)] = True
    ranks = retrieval_ranks(image, text, owner)
    for got, s, p in (
        (ranks.text_to_image, scores, positive),
        (ranks.image_to_text, scores.T, positive.T),
    ):
        hits = zeroshot_retrieval.batchify(zeroshot_retrieval.recall_at_k, s, p, 33, "cpu", k=k)
        np.testing.assert_array_equal(got < k, hits.numpy() > 0)


@pytest.mark.parametrize("num_classes", [5, 40])
def test_accuracies_equal_clip_benchmarks(num_classes, monkeypatch):
    # NumPy 2.4 no longer makes a float of an array with one entry, on which `accuracy` relies.
    monkeypatch.setattr(
        zeroshot_classification, "float", lambda x: np.asarray(x).item(), raising=False
    )
    rng = np.random.default_rng(num_classes)
    classes = unit(rng.normal(size=(num_classes, 16))).astype(np.float32)
    labels = rng.integers(0, num_classes, 301)
    image = unit(classes[labels] + 0.5 * rng.normal(size=(301, 16))).astype(np.float32)
    predicted, ranks = zeroshot.true_class_ranks(image, classes, labels, chunk=100)
    got = zeroshot.classification_metrics(predicted, ranks, labels, num_classes=num_classes)
    logits = torch.from_numpy(100 * image @ classes.T)
    want = zeroshot_classification.accuracy(logits, torch.from_numpy(labels), topk=(1, 5))
    np.testing.assert_allclose([got["acc1"], got["acc5"]], want, rtol=1e-12)
    recall = zeroshot_classification.balanced_accuracy_score(labels, logits.argmax(1))
    np.testing.assert_allclose(got["mean_per_class_recall"], recall, rtol=1e-12)


def test_prompt_ensembles_equal_clip_benchmarks():
    rng = np.random.default_rng(0)
    names, templates = ["cat", "dog", "emu"], ["a {c}", "the {c}", "one {c}."]
    table = {t.format(c=n): rng.normal(size=8).astype(np.float32) for n in names for t in templates}

    class Encoders:
        def texts(self, texts):
            return unit(np.stack([table[t] for t in texts]))

    def tokenizer(texts):
        return torch.from_numpy(np.stack([table[t] for t in texts]))

    want = zeroshot_classification.zero_shot_classifier(
        Lookup(), tokenizer, names, templates, "cpu", amp=False
    )
    got = zeroshot.class_embeddings(Encoders(), names, templates)
    np.testing.assert_allclose(got, want.numpy().T, rtol=1e-5, atol=1e-7)
