"""Commands that take a model: `eval`, `embed`, `search`, `classify`, `caption` and `info`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from imgtune_jax.errors import MissingFileError, UserError


def evaluate(options: argparse.Namespace) -> None:
    """Evaluate a run's model on the full test sets, and rewrite the run's report."""
    from imgtune_jax import api, evals, report
    from imgtune_jax.training.checkpoint import saved_steps

    workdir = Path(options.workdir)
    model = api.load(workdir, step=options.step, use_memo=True)
    config = model.experiment.config
    names = options.only or list(config.evals)
    if unknown := sorted(set(names) - set(config.evals)):
        raise UserError(f"--only: no evaluator {unknown}; expected {', '.join(config.evals)}")
    # `limit` makes evaluation during training cheap. This command evaluates the full data set.
    unlimited = {n: {k: v for k, v in config.evals[n].items() if k != "limit"} for n in names}
    for name, evaluator in model.experiment.build_evaluators(unlimited).items():
        record = evals.run_evaluator(
            name, evaluator, model.predictor, model=config.name, step=model.step
        )
        evals.append_result(workdir / "results.jsonl", record)
    print(report.summary(workdir, step=options.step))
    if model.step < max(saved_steps(workdir), default=model.step):
        print(f"\nReport: not rewritten, since step {model.step} is not the newest")
    else:
        print(f"\nReport: {report.write_run_report(workdir, model.predictor)}")
    report.check_evaluations(workdir)


def embed(options: argparse.Namespace) -> None:
    """Write the embeddings of images and texts as one .npz file."""
    import numpy as np

    from imgtune_jax import api

    if not options.images and options.texts is None:
        raise UserError("nothing to embed; expected images, --texts FILE, or both")
    model = api.load(options.model)
    arrays: dict[str, Any] = {}
    if options.images:
        paths = _image_paths(options.images)
        arrays["image_features"] = model.encode_image(paths)
        arrays["image_paths"] = np.array([str(path) for path in paths])
    if options.texts is not None:
        texts = options.texts.read_text(encoding="utf8").removesuffix("\n").split("\n")
        arrays["text_features"] = model.encode_text(texts)
        arrays["texts"] = np.array(texts)
    np.savez(options.output, **arrays)
    print(f"{options.output}: " + ", ".join(f"{k} {v.shape}" for k, v in arrays.items()))


def search(options: argparse.Namespace) -> None:
    """Print the images that are most similar to a text or an image."""
    import numpy as np

    from imgtune_jax import api

    model = api.load(options.model)
    if len(options.images) == 1 and options.images[0].endswith(".npz"):
        with np.load(options.images[0]) as stored:
            if "image_features" not in stored:
                raise UserError(
                    f"{options.images[0]} has no image_features; write it with imgtune embed"
                )
            names, gallery = list(stored["image_paths"]), stored["image_features"]
    else:
        names = _image_paths(options.images)
        gallery = model.encode_image(names)
    for hit in model.search(options.query, gallery, k=options.k):
        print(f"{hit.score:.3f}  {names[hit.index]}")


def classify(options: argparse.Namespace) -> None:
    """Print each image's labels, the most probable first."""
    from imgtune_jax import api

    paths = _image_paths(options.images)
    predictions = api.load(options.model).classify(paths, options.labels, options.templates)
    for path, labels in zip(paths, predictions, strict=True):
        print(f"{path}: " + ", ".join(f"{x.name} {x.probability:.1%}" for x in labels))


def caption(options: argparse.Namespace) -> None:
    """Print generated captions of each image."""
    from imgtune_jax import api

    paths = _image_paths(options.images)
    model = api.load(options.model)
    generated = model.caption(paths, language=options.language, n=options.n, beam=options.beam)
    for path, captions in zip(paths, generated, strict=True):
        if options.n == 1:
            print(f"{path}: {captions[0].text}")
        else:
            print(path, *(f"{c.score:8.3f}  {c.text}" for c in captions), sep="\n")


def info(options: argparse.Namespace) -> None:
    """Print a summary of a run."""
    from imgtune_jax.info import summarize_run

    print(summarize_run(Path(options.workdir)))


def _image_paths(arguments: Sequence[str]) -> list[Path]:
    """Return the image files among the arguments and, recursively, in their folders."""
    from imgtune_jax.data import IMAGE_SUFFIXES

    paths: list[Path] = []
    for path in map(Path, arguments):
        if path.is_dir():
            images = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
            if not images:
                raise UserError(
                    f"no image in the folder {path}; expected files {', '.join(IMAGE_SUFFIXES)}"
                )
            paths += images
        elif path.is_file():
            paths.append(path)
        else:
            raise MissingFileError(f"no image or folder at {path}")
    return paths
