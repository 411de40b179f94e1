"""Retrieval evaluation: seconds and memory, beside CLIP_benchmark's own code; equal recalls.

.venv-peers/bin/python benchmarks/retrieval.py [--images 5000] [--rounds 3] [--output FILE.json]

Images with five captions each, as in COCO's test set, as correlated random unit vectors of 512
numbers; R@1, R@5 and R@10 both ways. Both get the vectors and begin with them: CLIP_benchmark runs
its `zeroshot_retrieval.evaluate` with a model that returns its inputs. Each case runs in a process
of its own, one round after another; ours compiles within its time. Memory is the process's peak
less what it held before. Raises AssertionError where the recalls differ.
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
ARMS = ("ours", "CLIP_benchmark")
Metrics = dict[str, float]


def embeddings(images: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(images, texts, image of each text)."""
    rng = np.random.default_rng(0)
    owner = np.repeat(np.arange(images), CAPTIONS)
    image = rng.standard_normal((images, D), np.float32)
    text = image[owner] + 6 * rng.standard_normal((len(owner), D), np.float32)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, text)]
    return unit[0], unit[1], owner


def ours(image: np.ndarray, text: np.ndarray, owner: np.ndarray) -> Callable[[], Metrics]:
    """The evaluator's metrics, from the embeddings on."""
    from imgtune_jax.evals.retrieval import retrieval_metrics

    return lambda: retrieval_metrics(image, text, owner, ks=KS)


def clip_benchmark(image: np.ndarray, text: np.ndarray, owner: np.ndarray) -> Callable[[], Metrics]:
    """Its `evaluate`, in batches as its command line makes them, without mixed precision."""
    import torch
    from clip_benchmark.metrics import zeroshot_retrieval

    class Same:
        """A model whose images and texts are embeddings already."""

        def encode_image(self, x: Any) -> Any:
            return x

        def encode_text(self, x: Any) -> Any:
            return x

    rows = torch.from_numpy(text).split(np.bincount(owner).tolist())
    images = torch.from_numpy(image)
    batches = [(images[i : i + BATCH], rows[i : i + BATCH]) for i in range(0, len(image), BATCH)]
    return lambda: zeroshot_retrieval.evaluate(
        Same(), batches, torch.stack, "cpu", amp=False, recall_k_list=list(KS)
    )


def one(arm: str, images: int) -> dict[str, Any]:
    """Build an arm and time its one run."""
    arrays = embeddings(images)
    run = (ours if arm == "ours" else clip_benchmark)(*arrays)
    before = side_by_side.peak_memory()
    began = time.perf_counter()
    metrics = run()
    seconds = time.perf_counter() - began
    recalls = {k: v for k, v in metrics.items() if "recall" in k}
    return {"seconds": seconds, "GB": side_by_side.peak_memory() - before, "recalls": recalls}


def main() -> None:
    """Run both in turn, compare, print a table."""
    parser = side_by_side.arguments(__doc__, rounds=3)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--one", choices=ARMS, help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.one:
        return print(json.dumps(one(o.one, o.images)))
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    for _ in range(o.rounds):
        for arm, results in found.items():
            results.append(
                side_by_side.in_a_new_process(__file__, "--one", arm, "--images", str(o.images))
            )
    recalls = {arm: results[0]["recalls"] for arm, results in found.items()}
    assert recalls["ours"].keys() == recalls["CLIP_benchmark"].keys()
    for name, value in recalls["ours"].items():
        # CLIP_benchmark averages in float32.
        np.testing.assert_allclose(recalls["CLIP_benchmark"][name], value, rtol=2e-7, err_msg=name)
    m = {
        arm: {k: statistics.median(r[k] for r in results) for k in ("seconds", "GB")}
        for arm, results in found.items()
    }
    print(f"\n{o.images} images, {CAPTIONS * o.images} texts; recalls equal: {recalls['ours']}")
    print("\n| | median s | times ours | GB |\n|---|---|---|---|")
    for arm, x in m.items():
        times = x["seconds"] / m["ours"]["seconds"]
        print(f"| {arm} | {x['seconds']:.2f} | {times:.1f} | {x['GB']:.2f} |")
    side_by_side.write(o.output, images=o.images, cases=found)


if __name__ == "__main__":
    main()
