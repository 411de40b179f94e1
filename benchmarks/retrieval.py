"""Retrieval evaluation: seconds and memory, ours and CLIP_benchmark's, with equal recalls.

.venv-peers/bin/python benchmarks/retrieval.py [--images 5000] [--rounds 3] [--output FILE.json]

Images with five captions each, as in COCO's test set, as correlated random unit vectors of 512
numbers; R@1, R@5 and R@10 in both directions. Both start from the vectors: CLIP_benchmark runs its
`zeroshot_retrieval.evaluate` with a model that returns its inputs. Each variant runs in its own
process, in interleaved rounds; our time includes compilation. Memory is the process's peak minus
that before the run. Raises AssertionError if the recalls differ.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import side_by_side

D, CAPTIONS, BATCH, KS = 512, 5, 64, (1, 5, 10)
VARIANTS = ("ours", "CLIP_benchmark")
Metrics = dict[str, float]


def embeddings(images: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (image embeddings, text embeddings, index of each text's image)."""
    rng = np.random.default_rng(0)
    owner = np.repeat(np.arange(images), CAPTIONS)
    image = rng.standard_normal((images, D), np.float32)
    text = image[owner] + 6 * rng.standard_normal((len(owner), D), np.float32)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, text)]
    return unit[0], unit[1], owner


def ours(image: np.ndarray, text: np.ndarray, owner: np.ndarray) -> Callable[[], Metrics]:
    """Build the evaluator's computation from embeddings to metrics."""
    from imgtune_jax.evals.retrieval import retrieval_metrics

    return lambda: retrieval_metrics(image, text, owner, ks=KS)


def clip_benchmark(image: np.ndarray, text: np.ndarray, owner: np.ndarray) -> Callable[[], Metrics]:
    """Build its `evaluate`, with the batches of its command line, without mixed precision."""
    import torch
    from clip_benchmark.metrics import zeroshot_retrieval

    class Identity:
        """A model whose inputs are embeddings."""

        def encode_image(self, x: Any) -> Any:
            return x

        def encode_text(self, x: Any) -> Any:
            return x

    rows = torch.from_numpy(text).split(np.bincount(owner).tolist())
    images = torch.from_numpy(image)
    batches = [(images[i : i + BATCH], rows[i : i + BATCH]) for i in range(0, len(image), BATCH)]
    return lambda: zeroshot_retrieval.evaluate(
        Identity(), batches, torch.stack, "cpu", amp=False, recall_k_list=list(KS)
    )


def measure(variant: str, images: int) -> dict[str, Any]:
    """Build a variant and time its single run."""
    arrays = embeddings(images)
    run = (ours if variant == "ours" else clip_benchmark)(*arrays)
    before = side_by_side.peak_memory()
    start = time.perf_counter()
    metrics = run()
    seconds = time.perf_counter() - start
    recalls = {k: v for k, v in metrics.items() if "recall" in k}
    return {"seconds": seconds, "GB": side_by_side.peak_memory() - before, "recalls": recalls}


def main() -> None:
    """Run both in interleaved rounds, compare their recalls, and print a table."""
    parser = side_by_side.build_parser(__doc__, rounds=3)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--one", choices=VARIANTS, help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.one:
        return print(json.dumps(measure(o.one, o.images)))
    results: dict[str, list[dict[str, Any]]] = {variant: [] for variant in VARIANTS}
    for _ in range(o.rounds):
        for variant in VARIANTS:
            arguments = ("--one", variant, "--images", str(o.images))
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
    print(f"\n{o.images} images, {CAPTIONS * o.images} texts; recalls equal: {recalls['ours']}")
    print("\n| | median s | times ours | GB |\n|---|---|---|---|")
    for variant, x in median_of.items():
        times = x["seconds"] / median_of["ours"]["seconds"]
        print(f"| {variant} | {x['seconds']:.2f} | {times:.1f} | {x['GB']:.2f} |")
    side_by_side.write_results(o.output, images=o.images, cases=results)


if __name__ == "__main__":
    main()
