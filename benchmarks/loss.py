"""Contrastive losses alone: seconds and memory, forward and backward, beside the peers' own.

.venv-peers/bin/python benchmarks/loss.py [--sizes 4096 16384] [--rounds 3]
    [--big-vision CHECKOUT] [--output FILE.json]

Unit vectors of 512 numbers in float32; the gradients are those of both embeddings, the scale and,
for the sigmoid, the bias. Every case runs in a process of its own, one round after another: once to
compile and to touch its memory, then timed. Memory is the process's peak less what it held before
its first run. All must give one loss and one gradient norm. Of open_clip there is, beside
`SigLipLoss` and `ClipLoss`, `SigLipLoss` in the square pieces that 8 ranks would compute, one after
another. Of a big_vision checkout, its own functions are read from its files.
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

D, SCALE, BIAS, PIECES = 512, 20.0, -10.0, 8
ARMS = (
    "ours sigmoid",
    "open_clip sigmoid",
    "open_clip sigmoid, 8 ranks' pieces",
    "big_vision sigmoid",
    "ours softmax",
    "open_clip softmax",
    "big_vision softmax",
)
Run = Callable[[], tuple[float, Any]]  # -> (loss, the images' gradient)


def inputs(n: int) -> tuple[np.ndarray, np.ndarray]:
    """n pairs of correlated unit vectors."""
    rng = np.random.default_rng(0)
    image, noise = rng.standard_normal((2, n, D), np.float32)
    text = noise + 0.3 * image
    return tuple(x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, text))


def ours(n: int, *, sigmoid: bool) -> Run:
    """The objective, as a training step differentiates it."""
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
    return jax_run(jax.value_and_grad(loss, (0, 1, 2)), image, text, scalars)


def big_vision(n: int, checkout: Path, *, sigmoid: bool) -> Run:
    """Its functions alone: the modules around them want TensorFlow, and jax.tree_map of old."""
    import jax
    import jax.numpy as jnp

    image, text = map(jnp.asarray, inputs(n))
    names: dict[str, Any] = {"jax": jax, "jnp": jnp}
    if not sigmoid:
        loss = function(checkout / "big_vision/utils.py", "bidirectional_contrastive_loss", names)
        mean = functools.partial(loss, reduction=True)
        mean_and_grad = jax.value_and_grad(lambda *args: mean(*args)[0], (0, 1, 2))
        return jax_run(mean_and_grad, image, text, jnp.float32(SCALE))

    class Model:
        """In the place of the towers, within the trainer's `loss_fn`."""

        def apply(self, variables: Any, *_: Any, **__: Any) -> Any:
            image, text, t, b = variables["params"]
            return image, text, {"t": t, "b": b}

    names |= {"model": Model(), "images": None, "labels": None, "rng_model": None}
    trainer = checkout / "big_vision/trainers/proj/image_text/siglip.py"
    loss = function(trainer, "loss_fn", names)
    params = (image, text, jnp.float32(SCALE), jnp.float32(BIAS))
    return jax_run(jax.value_and_grad(lambda *params: loss(params), (0, 1, 2, 3)), *params)


def function(path: Path, name: str, names: dict[str, Any]) -> Any:
    """A function of a file, wherever it is defined there, with `names` for its globals."""
    found = [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name == name
    ]
    module = types.ModuleType(name)
    module.__dict__.update(names)
    exec(compile(ast.Module(found, []), str(path), "exec"), module.__dict__)
    return getattr(module, name)


def jax_run(value_and_grad: Any, *args: Any) -> Run:
    """Compile, then loss and the first gradient."""
    import jax

    program = jax.jit(value_and_grad).lower(*args).compile()

    def run() -> tuple[float, Any]:
        value, grads = jax.block_until_ready(program(*args))
        return float(value), grads[0]

    return run


def open_clip(n: int, *, sigmoid: bool, pieces: int) -> Run:
    """`ClipLoss` or `SigLipLoss`; in pieces, as its ring over ranks computes them."""
    import torch

    peer = peers.open_clip()

    image, text = (torch.from_numpy(x).requires_grad_() for x in inputs(n))
    scale = torch.tensor(SCALE, requires_grad=True)
    bias = torch.tensor(BIAS, requires_grad=True)
    loss = peer.loss.SigLipLoss() if sigmoid else peer.loss.ClipLoss()

    def run() -> tuple[float, Any]:
        for x in (image, text, scale, bias):
            x.grad = None
        if pieces == 1:
            value = loss(image, text, scale, bias) if sigmoid else loss(image, text, scale)
            value.backward()
            return value.item(), image.grad
        total = 0.0
        for i, image_i in enumerate(image.split(n // pieces)):
            for j, text_j in enumerate(text.split(n // pieces)):
                # A rank's loss is a mean over its own images; the job's is the mean of the ranks'.
                value = loss._loss(image_i, text_j, scale, bias, negative_only=i != j) / pieces
                value.backward()
                total += value.item()
        return total, image.grad

    return run


def one(arm: str, n: int, checkout: Path | None) -> dict[str, Any]:
    """Build an arm, run it once, time it."""
    sigmoid = "sigmoid" in arm
    if arm.startswith("ours"):
        run = ours(n, sigmoid=sigmoid)
    elif arm.startswith("open_clip"):
        run = open_clip(n, sigmoid=sigmoid, pieces=PIECES if "pieces" in arm else 1)
    else:
        assert checkout is not None
        run = big_vision(n, checkout, sigmoid=sigmoid)
    before = side_by_side.peak_memory()
    run()
    began = time.perf_counter()
    loss, gradient = run()
    seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "GB": side_by_side.peak_memory() - before,
        "loss": loss,
        "norm": float(np.linalg.norm(np.asarray(gradient, np.float64))),
    }


def main() -> None:
    """Run all cases in turn, check that they agree, print a table."""
    parser = side_by_side.arguments(__doc__, rounds=3)
    parser.add_argument("--sizes", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--big-vision", type=Path, metavar="CHECKOUT")
    parser.add_argument("--one", nargs=2, metavar=("ARM", "SIZE"), help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.one:
        return print(json.dumps(one(o.one[0], int(o.one[1]), o.big_vision)))
    arms = [a for a in o.arms if o.big_vision or not a.startswith("big_vision")]
    found: dict[str, list[dict[str, Any]]] = {}
    for _ in range(o.rounds):
        for n in o.sizes:
            for arm in arms:
                peer = ["--big-vision", str(o.big_vision)] if o.big_vision else []
                result = side_by_side.in_a_new_process(__file__, "--one", arm, str(n), *peer)
                found.setdefault(f"{n} {arm}", []).append(result)
    print_table(found)
    side_by_side.write(o.output, dimension=D, cases=found)


def print_table(found: dict[str, list[dict[str, Any]]]) -> None:
    """Medians by case. Raises AssertionError where two arms disagree."""
    print("\n| batch | loss | median s | times ours | GB | nats |\n|---|---|---|---|---|---|")
    for case, results in found.items():
        n, _, arm = case.partition(" ")
        m = {k: statistics.median(r[k] for r in results) for k in results[0]}
        base = found.get(f"{n} ours {'sigmoid' if 'sigmoid' in arm else 'softmax'}", results)
        for key in ("loss", "norm"):
            np.testing.assert_allclose(m[key], base[0][key], rtol=1e-4, err_msg=f"{case}: {key}")
        times = m["seconds"] / statistics.median(r["seconds"] for r in base)
        columns = f"{m['seconds']:.2f} | {times:.2f} | {m['GB']:.2f} | {m['loss']:.4f}"
        print(f"| {n} | {arm} | {columns} |")


if __name__ == "__main__":
    main()
