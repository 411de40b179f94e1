"""Metrics equal those of CLIP_benchmark 1.6.2 on random embeddings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval

from imgtune_jax.evals import zeroshot
from imgtune_jax.evals.ranks import retrieval_ranks
from imgtune_jax.evals.retrieval import retrieval_metrics


def unit_norm(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


class IdentityModel:
    """A model with CLIP's interface whose inputs are embeddings, which it returns."""

    def encode_image(self, images):
        return images

    def encode_text(self, texts):
        return texts


def coco_like(seed, n, d=24, noise=2.0):
    """Return random embeddings of n images with 0 to 7 captions each; COCO has 5 to 7.

    The values are (image embeddings, text embeddings, index of each text's image, number of
    captions of each image).
    """
    rng = np.random.default_rng(seed)
    num_captions = rng.integers(0, 8, n)
    image_of_text = np.repeat(np.arange(n), num_captions)
    image = rng.normal(size=(n, d)).astype(np.float32)
    text = image[image_of_text] + noise * rng.normal(size=(len(image_of_text), d)).astype(
        np.float32
    )
    return image, text.astype(np.float32), image_of_text, num_captions


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("batch_size", [7, 64])  # neither divides the number of images
def test_recalls_equal_clip_benchmark(seed, batch_size):
    image, text, image_of_text, num_captions = coco_like(seed, 90)
    captions = torch.from_numpy(text).split(num_captions.tolist())
    batches = [
        (torch.from_numpy(image[i : i + batch_size]), captions[i : i + batch_size])
        for i in range(0, len(image), batch_size)
    ]
    ks = [1, 5, 10, 50]
    expected = zeroshot_retrieval.evaluate(
        IdentityModel(), batches, torch.stack, "cpu", amp=False, recall_k_list=ks
    )
    actual = retrieval_metrics(unit_norm(image), unit_norm(text), image_of_text, ks=ks, chunk=64)
    assert len(expected) == 8
    for name, value in expected.items():
        # CLIP_benchmark averages in float32.
        np.testing.assert_allclose(actual[name], value, rtol=2e-7, err_msg=name)


@pytest.mark.parametrize("k", [1, 5, 10])
def test_hits_of_every_query_equal_clip_benchmark(k):
    image, text, image_of_text, _ = coco_like(9, 120)
    image, text = unit_norm(image), unit_norm(text)
    scores = torch.from_numpy(text @ image.T)
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(len(text)), torch.from_numpy(image_of_text)] = True
    ranks = retrieval_ranks(image, text, image_of_text)
    for rank, query_scores, query_positive in (
        (ranks.text_to_image, scores, positive),
        (ranks.image_to_text, scores.T, positive.T),
    ):
        hits = zeroshot_retrieval.batchify(
            zeroshot_retrieval.recall_at_k, query_scores, query_positive, 33, "cpu", k=k
        )
        np.testing.assert_array_equal((rank >= 0) & (rank < k), hits.numpy() > 0)


@pytest.mark.parametrize("num_classes", [5, 40])
def test_accuracies_equal_clip_benchmark(num_classes, monkeypatch):
    # CLIP_benchmark's `accuracy` calls float() on an array of one entry, an error in NumPy 2.4.
    monkeypatch.setattr(
        zeroshot_classification, "float", lambda x: np.asarray(x).item(), raising=False
    )
    rng = np.random.default_rng(num_classes)
    classes = unit_norm(rng.normal(size=(num_classes, 16))).astype(np.float32)
    labels = rng.integers(0, num_classes, 301)
    image = unit_norm(classes[labels] + 0.5 * rng.normal(size=(301, 16))).astype(np.float32)
    predicted, ranks = zeroshot.true_class_ranks(image, classes, labels, chunk=100)
    actual = zeroshot.classification_metrics(predicted, ranks, labels, num_classes=num_classes)
    logits = torch.from_numpy(100 * image @ classes.T)
    expected = zeroshot_classification.accuracy(logits, torch.from_numpy(labels), topk=(1, 5))
    np.testing.assert_allclose([actual["acc1"], actual["acc5"]], expected, rtol=1e-12)
    recall = zeroshot_classification.balanced_accuracy_score(labels, logits.argmax(1))
    np.testing.assert_allclose(actual["mean_per_class_recall"], recall, rtol=1e-12)


def test_prompt_ensembles_equal_clip_benchmark():
    rng = np.random.default_rng(0)
    names, templates = ["cat", "dog", "emu"], ["a {c}", "the {c}", "one {c}."]
    embedding_of = {
        template.format(c=name): rng.normal(size=8).astype(np.float32)
        for name in names
        for template in templates
    }

    class LookupPredictor:
        def embed_texts(self, texts):
            return unit_norm(np.stack([embedding_of[text] for text in texts]))

    def tokenizer(texts):
        return torch.from_numpy(np.stack([embedding_of[text] for text in texts]))

    expected = zeroshot_classification.zero_shot_classifier(
        IdentityModel(), tokenizer, names, templates, "cpu", amp=False
    )
    actual = zeroshot.class_embeddings(LookupPredictor(), names, templates)
    np.testing.assert_allclose(actual, expected.numpy().T, rtol=1e-5, atol=1e-7)
