"""Contrastive losses of ours, open_clip and big_vision: seconds and memory of loss and gradients.

.venv-peers/bin/python benchmarks/loss.py [--sizes 4096 16384] [--rounds 3]
    [--variants VARIANT ...] [--big-vision CHECKOUT] [--output FILE.json]

The inputs are unit vectors of 512 numbers in float32. The gradients are with respect to both
embeddings, the scale and, for the sigmoid loss, the bias. A case is a variant and a batch size.
Every round runs all cases in turn, each in a new process. The process computes the loss once, to
compile and to allocate memory, and then once more, which is timed. Memory is the peak of the
process minus the peak before the first computation. All variants must agree in loss and gradient
norm.

`SigLipLoss` of open_clip is also timed with the batch split into the blocks that 8 ranks would
compute, one after another. The losses of big_vision are read from the files of its checkout.
"""

import argparse
import ast
import functools
import json
import statistics
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peers
import side_by_side

EMBED_DIM, SCALE, BIAS, NUM_RANKS = 512, 20.0, -10.0, 8
VARIANTS = (
    "ours sigmoid",
    "open_clip sigmoid",
    "open_clip sigmoid, blocks of 8 ranks",
    "big_vision sigmoid",
    "ours softmax",
    "open_clip softmax",
    "big_vision softmax",
)
Run = Callable[[], tuple[float, Any]]  # () -> (loss, gradient with respect to image embeddings)


def inputs(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return n pairs of correlated unit vectors."""
    rng = np.random.default_rng(0)
    image, noise = rng.standard_normal((2, n, EMBED_DIM), np.float32)
    text = noise + 0.3 * image
    return tuple(x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, text))


def ours(n: int, *, sigmoid: bool) -> Run:
    """Build our objective with its gradients, as in a training step."""
    import jax
    import jax.numpy as jnp

    from imgtune_jax import objectives
    from imgtune_jax.types import Batch, Outputs

    objective = objectives.build_objective({"sigmoid" if sigmoid else "softmax": {}})
    scalars = jnp.float32(SCALE), jnp.float32(BIAS) if sigmoid else None
    batch = Batch(jnp.ones(n, bool))

    def loss(image: Any, text: Any, scalars: Any) -> Any:
        return objective(Outputs(image, text, *scalars), batch)[0]

    image, text = map(jnp.asarray, inputs(n))
    return compile_run(jax.value_and_grad(loss, (0, 1, 2)), image, text, scalars)


def big_vision(n: int, checkout: Path, *, sigmoid: bool) -> Run:
    """Build big_vision's loss from the source of its function.

    The modules that contain it cannot be imported without TensorFlow and an older jax.
    """
    import jax
    import jax.numpy as jnp

    image, text = map(jnp.asarray, inputs(n))
    names: dict[str, Any] = {"jax": jax, "jnp": jnp}
    if not sigmoid:
        loss = load_function(
            checkout / "big_vision/utils.py", "bidirectional_contrastive_loss", names
        )
        mean = functools.partial(loss, reduction=True)
        mean_and_grad = jax.value_and_grad(lambda *args: mean(*args)[0], (0, 1, 2))
        return compile_run(mean_and_grad, image, text, jnp.float32(SCALE))

    class Model:
        """Replacement of the towers in the trainer's `loss_fn`: the parameters are its outputs."""

        def apply(self, variables: Any, *_: Any, **__: Any) -> Any:
            image, text, scale, bias = variables["params"]
            return image, text, {"t": scale, "b": bias}

    names |= {"model": Model(), "images": None, "labels": None, "rng_model": None}
    trainer = checkout / "big_vision/trainers/proj/image_text/siglip.py"
    loss = load_function(trainer, "loss_fn", names)
    params = (image, text, jnp.float32(SCALE), jnp.float32(BIAS))
    return compile_run(jax.value_and_grad(lambda *params: loss(params), (0, 1, 2, 3)), *params)


def load_function(path: Path, name: str, names: dict[str, Any]) -> Any:
    """Return a function that is defined anywhere in a file; `names` are its globals."""
    definitions: list[ast.stmt] = [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name == name
    ]
    module = types.ModuleType(name)
    module.__dict__.update(names)
    exec(compile(ast.Module(definitions, []), str(path), "exec"), module.__dict__)
    return getattr(module, name)


def compile_run(value_and_grad: Any, *args: Any) -> Run:
    """Compile `value_and_grad(*args)`; return a function that computes loss and first gradient."""
    import jax

    program = jax.jit(value_and_grad).lower(*args).compile()

    def run() -> tuple[float, Any]:
        value, grads = jax.block_until_ready(program(*args))
        return float(value), grads[0]

    return run


def open_clip(n: int, *, sigmoid: bool, ranks: int) -> Run:
    """Build `ClipLoss` or `SigLipLoss`; with ranks > 1, in blocks, as that many ranks would."""
    import torch

    peer = peers.open_clip()

    image, text = (torch.from_numpy(x).requires_grad_() for x in inputs(n))
    scale = torch.tensor(SCALE, requires_grad=True)
    bias = torch.tensor(BIAS, requires_grad=True)
    loss = peer.loss.SigLipLoss() if sigmoid else peer.loss.ClipLoss()

    def run() -> tuple[float, Any]:
        for x in (image, text, scale, bias):
            x.grad = None
        if ranks == 1:
            value = loss(image, text, scale, bias) if sigmoid else loss(image, text, scale)
            value.backward()
            return value.item(), image.grad
        total = 0.0
        for i, image_i in enumerate(image.split(n // ranks)):
            for j, text_j in enumerate(text.split(n // ranks)):
                # A rank's loss is the mean over its images; the total is the mean over ranks.
                value = loss._loss(image_i, text_j, scale, bias, negative_only=i != j) / ranks
                value.backward()
                total += value.item()
        return total, image.grad

    return run


def measure(variant: str, n: int, checkout: Path | None) -> dict[str, Any]:
    """Build a variant and run it twice: first untimed, then timed."""
    sigmoid = "sigmoid" in variant
    if variant.startswith("ours"):
        run = ours(n, sigmoid=sigmoid)
    elif variant.startswith("open_clip"):
        run = open_clip(n, sigmoid=sigmoid, ranks=NUM_RANKS if "ranks" in variant else 1)
    else:
        assert checkout is not None
        run = big_vision(n, checkout, sigmoid=sigmoid)
    before = side_by_side.peak_memory()
    run()
    start = time.perf_counter()
    loss, gradient = run()
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "GB": side_by_side.peak_memory() - before,
        "loss": loss,
        "norm": float(np.linalg.norm(np.asarray(gradient, np.float64))),
    }


def main() -> None:
    """Run all cases, one after another in every round, check that they agree, and print a table."""
    parser = side_by_side.build_parser(__doc__, rounds=3)
    parser.add_argument("--sizes", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--big-vision", type=Path, metavar="CHECKOUT")
    parser.add_argument("--one", nargs=2, metavar=("VARIANT", "SIZE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return print(json.dumps(measure(args.one[0], int(args.one[1]), args.big_vision)))
    variants = [v for v in args.variants if args.big_vision or not v.startswith("big_vision")]
    results: dict[str, list[dict[str, Any]]] = {}
    for _ in range(args.rounds):
        for n in args.sizes:
            for variant in variants:
                checkout = ["--big-vision", str(args.big_vision)] if args.big_vision else []
                result = side_by_side.run_script(__file__, "--one", variant, str(n), *checkout)
                results.setdefault(f"{n} {variant}", []).append(result)
    print_table(results)
    side_by_side.write_results(args.output, dimension=EMBED_DIM, cases=results)


def print_table(results: dict[str, list[dict[str, Any]]]) -> None:
    """Print the medians of every case. Raises AssertionError if two variants disagree."""
    print(
        "\n| batch | variant | median s | relative to ours | GB | loss, nats |\n"
        "|---|---|---|---|---|---|"
    )
    for case, rounds in results.items():
        n, _, variant = case.partition(" ")
        median_of = {k: statistics.median(r[k] for r in rounds) for k in rounds[0]}
        loss = "sigmoid" if "sigmoid" in variant else "softmax"
        reference = results.get(f"{n} ours {loss}", rounds)
        for key in ("loss", "norm"):
            np.testing.assert_allclose(
                median_of[key], reference[0][key], rtol=1e-4, err_msg=f"{case}: {key}"
            )
        ratio = median_of["seconds"] / statistics.median(r["seconds"] for r in reference)
        columns = f"{median_of['seconds']:.2f} | {ratio:.2f}"
        columns += f" | {median_of['GB']:.2f} | {median_of['loss']:.4f}"
        print(f"| {n} | {variant} | {columns} |")


if __name__ == "__main__":
    main()
