"""Retrieval evaluation: seconds and memory, ours and CLIP_benchmark's, with equal recalls.

.venv-peers/bin/python benchmarks/retrieval.py [--images 5000] [--rounds 3] [--output FILE.json]

Both variants compute R@1, R@5 and R@10 in both directions. Every image has five captions, as in
COCO's test set. The embeddings are random unit vectors of 512 numbers, correlated between an image
and its captions. Both variants start from the embeddings: CLIP_benchmark's
`zeroshot_retrieval.evaluate` gets a model that returns its inputs.

Every round runs both variants in turn, each in a new process. Our time includes compilation. Memory
is the peak of the process minus the peak before the evaluation. Raises AssertionError if the
recalls differ.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import side_by_side

EMBED_DIM, CAPTIONS_PER_IMAGE, BATCH_SIZE, KS = 512, 5, 64, (1, 5, 10)
VARIANTS = ("ours", "CLIP_benchmark")
Metrics = dict[str, float]


def embeddings(images: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (image embeddings, text embeddings, index of each text's image)."""
    rng = np.random.default_rng(0)
    image_of_text = np.repeat(np.arange(images), CAPTIONS_PER_IMAGE)
    image = rng.standard_normal((images, EMBED_DIM), np.float32)
    text = image[image_of_text] + 6 * rng.standard_normal(
        (len(image_of_text), EMBED_DIM), np.float32
    )
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, text)]
    return unit[0], unit[1], image_of_text


def ours(image: np.ndarray, text: np.ndarray, image_of_text: np.ndarray) -> Callable[[], Metrics]:
    """Build our evaluation, from embeddings to metrics."""
    from imgtune_jax.evals.retrieval import retrieval_metrics

    return lambda: retrieval_metrics(image, text, image_of_text, ks=KS)


def clip_benchmark(
    image: np.ndarray, text: np.ndarray, image_of_text: np.ndarray
) -> Callable[[], Metrics]:
    """Build CLIP_benchmark's evaluation, with its default batch size, without mixed precision."""
    import torch
    from clip_benchmark.metrics import zeroshot_retrieval

    class Identity:
        """A model whose inputs are embeddings."""

        def encode_image(self, x: Any) -> Any:
            return x

        def encode_text(self, x: Any) -> Any:
            return x

    captions = torch.from_numpy(text).split(np.bincount(image_of_text).tolist())
    images = torch.from_numpy(image)
    batches = [
        (images[i : i + BATCH_SIZE], captions[i : i + BATCH_SIZE])
        for i in range(0, len(image), BATCH_SIZE)
    ]
    return lambda: zeroshot_retrieval.evaluate(
        Identity(), batches, torch.stack, "cpu", amp=False, recall_k_list=list(KS)
    )


def measure(variant: str, images: int) -> dict[str, Any]:
    """Build a variant, run it once, and return its seconds, memory and recalls."""
    arrays = embeddings(images)
    run = (ours if variant == "ours" else clip_benchmark)(*arrays)
    before = side_by_side.peak_memory()
    start = time.perf_counter()
    metrics = run()
    seconds = time.perf_counter() - start
    recalls = {k: v for k, v in metrics.items() if "recall" in k}
    return {"seconds": seconds, "GB": side_by_side.peak_memory() - before, "recalls": recalls}


def main() -> None:
    """Run both variants in every round, compare their recalls, and print a table."""
    parser = side_by_side.build_parser(__doc__, rounds=3)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--one", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return print(json.dumps(measure(args.one, args.images)))
    results: dict[str, list[dict[str, Any]]] = {variant: [] for variant in VARIANTS}
    for _ in range(args.rounds):
        for variant in VARIANTS:
            arguments = ("--one", variant, "--images", str(args.images))
            results[variant].append(side_by_side.run_script(__file__, *arguments))
    recalls = {variant: rounds[0]["recalls"] for variant, rounds in results.items()}
    assert recalls["ours"].keys() == recalls["CLIP_benchmark"].keys()
    for name, value in recalls["ours"].items():
        # CLIP_benchmark averages in float32.
        np.testing.assert_allclose(recalls["CLIP_benchmark"][name], value, rtol=2e-7, err_msg=name)
    median_of = {
        variant: {k: statistics.median(r[k] for r in rounds) for k in ("seconds", "GB")}
        for variant, rounds in results.items()
    }
    num_texts = CAPTIONS_PER_IMAGE * args.images
    print(f"\n{args.images} images, {num_texts} texts; recalls equal: {recalls['ours']}")
    print("\n| | median s | relative to ours | GB |\n|---|---|---|---|")
    for variant, values in median_of.items():
        ratio = values["seconds"] / median_of["ours"]["seconds"]
        print(f"| {variant} | {values['seconds']:.2f} | {ratio:.1f} | {values['GB']:.2f} |")
    side_by_side.write_results(args.output, images=args.images, cases=results)


if __name__ == "__main__":
    main()
