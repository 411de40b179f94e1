"""Generate `evals_clip_benchmark.npz`: metrics of random embeddings by CLIP_benchmark 1.6.2.

    python -m venv peers && peers/bin/pip install torch==2.13.0 "numpy<2.4" scikit-learn tqdm
    peers/bin/pip install --no-deps clip-benchmark==1.6.2
    peers/bin/python tests/golden/evals_clip_benchmark.py

The file has the inputs and the outputs, so the tests need neither torch nor CLIP_benchmark.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
from sklearn.metrics import precision_recall_fscore_support


class Lookup:
    """A fake CLIP model: inputs are embeddings, not of unit norm, and are returned unchanged."""

    def encode_image(self, images):
        return images

    def encode_text(self, texts):
        return texts


def retrieval(seed: int, n: int, batch_size: int) -> dict[str, np.ndarray]:
    """Return the inputs and metrics of retrieval; 1 to 6 captions per image, smaller last batch."""
    rng = np.random.default_rng(seed)
    captions = rng.integers(1, 7, n)
    image_of_text = np.repeat(np.arange(n), captions)
    image_emb = rng.normal(size=(n, 12)).astype(np.float32)
    text_emb = image_emb[image_of_text] + 1.5 * rng.normal(size=(captions.sum(), 12))
    text_emb = text_emb.astype(np.float32)
    rows = torch.from_numpy(text_emb).split(captions.tolist())
    batches = [
        (torch.from_numpy(image_emb[i : i + batch_size]), rows[i : i + batch_size])
        for i in range(0, n, batch_size)
    ]
    metrics = zeroshot_retrieval.evaluate(
        Lookup(), batches, torch.stack, "cpu", amp=False, recall_k_list=[1, 5, 10]
    )
    return {
        "image_emb": image_emb,
        "text_emb": text_emb,
        "image_of_text": image_of_text,
        **{name: np.float64(value) for name, value in metrics.items()},
    }


def classification(seed: int, n: int, num_classes: int, prompts: int) -> dict[str, np.ndarray]:
    """Return the inputs and metrics of classification; the last class has no examples."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes - 1, n) // rng.integers(1, 3, n)
    text_emb = rng.normal(size=(num_classes, prompts, 10)).astype(np.float32)
    image_emb = text_emb[labels, 0] + 1.5 * rng.normal(size=(n, 10)).astype(np.float32)

    class Data:
        classes = tuple(str(i) for i in range(num_classes))

    class Batches(list):
        dataset = Data

    batches = Batches(
        (torch.from_numpy(image_emb[i : i + 16]), torch.from_numpy(labels[i : i + 16]))
        for i in range(0, n, 16)
    )
    prompts_of = {c: [(i, p) for p in range(prompts)] for i, c in enumerate(Data.classes)}

    def tokenizer(texts):
        return torch.from_numpy(np.stack([text_emb[i, p] for i, p in texts]))

    args = Lookup(), tokenizer, Data.classes, prompts_of, "cpu"
    class_emb = zeroshot_classification.zero_shot_classifier(*args, amp=False)
    metrics = zeroshot_classification.evaluate(
        args[0], batches, tokenizer, Data.classes, prompts_of, "cpu", amp=False
    )
    unit = image_emb / np.linalg.norm(image_emb, axis=1, keepdims=True)
    predicted = (unit @ class_emb.numpy()).argmax(1)
    scores = precision_recall_fscore_support(
        labels, predicted, labels=np.arange(num_classes), zero_division=0
    )
    macro = precision_recall_fscore_support(labels, predicted, average="macro", zero_division=0)
    return {
        "image_emb": image_emb,
        "prompt_emb": text_emb,
        "labels": labels,
        "class_emb": class_emb.numpy().T,
        "per_class": np.stack(scores),
        "macro_precision": np.float64(macro[0]),
        "macro_f1": np.float64(macro[2]),
        **{name: np.float64(value) for name, value in metrics.items() if value == value},
    }


if __name__ == "__main__":
    cases = {
        "retrieval_small": retrieval(0, 23, 8),
        "retrieval": retrieval(1, 61, 16),
        "classes_12": classification(2, 90, 12, 3),
        "classes_4": classification(3, 50, 4, 1),
    }
    arrays = {f"{case}/{k}": v for case, values in cases.items() for k, v in values.items()}
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **arrays)
