"""Commands that take a trained model: `eval`, `embed`, `search`, `classify`, `caption`, `info`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def evaluate(options: argparse.Namespace) -> None:
    """Run evaluators on all of their data, and rewrite the report."""
    from imgtune_jax import api, evals, report

    workdir = Path(options.workdir)
    model = api.load(workdir, step=options.step, use_memo=True)
    config = model.experiment.config
    chosen = options.only or list(config.evals)
    if unknown := sorted(set(chosen) - set(config.evals)):
        raise ValueError(f"no evaluator {unknown}; the run has: {', '.join(config.evals)}")
    # A limit is for judging while training: here all of a data set counts.
    whole = {n: {k: v for k, v in config.evals[n].items() if k != "limit"} for n in chosen}
    for name, evaluator in model.experiment.build_evaluators(whole).items():
        values = evaluator(model.predictor)
        record = evals.evaluator_result(name, evaluator, values, model=config.name, step=model.step)
        evals.append_result(workdir / "results.jsonl", record)
    page = report.write_run_report(workdir, model.predictor)
    print(f"{report.summary(workdir)}\n\nReport: {page}")


def embed(options: argparse.Namespace) -> None:
    """Write embeddings as .npz."""
    import numpy as np

    from imgtune_jax import api

    if not options.images and options.texts is None:
        raise ValueError("nothing to embed; give images, or --texts FILE")
    model = api.load(options.model)
    arrays: dict[str, Any] = {}
    if options.images:
        paths = _image_paths(options.images)
        arrays["image_features"] = model.encode_image(paths)
        arrays["image_paths"] = np.array([str(p) for p in paths])
    if options.texts is not None:
        texts = options.texts.read_text(encoding="utf8").splitlines()
        arrays["text_features"] = model.encode_text(texts)
        arrays["texts"] = np.array(texts)
    np.savez(options.output, **arrays)
    print(f"{options.output}: " + ", ".join(f"{k} {v.shape}" for k, v in arrays.items()))


def search(options: argparse.Namespace) -> None:
    """Print the images nearest to a text or an image."""
    import numpy as np

    from imgtune_jax import api

    model = api.load(options.model)
    if len(options.images) == 1 and options.images[0].endswith(".npz"):
        with np.load(options.images[0]) as stored:
            if "image_features" not in stored:
                raise ValueError(f"{options.images[0]} holds no image_features; see imgtune embed")
            names, gallery = list(stored["image_paths"]), stored["image_features"]
    else:
        names = _image_paths(options.images)
        gallery = model.encode_image(names)
    for hit in model.search(options.query, gallery, k=options.k):
        print(f"{hit.score:.3f}  {names[hit.index]}")


def classify(options: argparse.Namespace) -> None:
    """Print the labels of each image by probability."""
    from imgtune_jax import api

    paths = _image_paths(options.images)
    found = api.load(options.model).classify(paths, options.labels, options.templates)
    for path, labels in zip(paths, found, strict=True):
        print(f"{path}: " + ", ".join(f"{x.name} {x.probability:.1%}" for x in labels))


def caption(options: argparse.Namespace) -> None:
    """Print what the model writes of each image."""
    from imgtune_jax import api

    paths = _image_paths(options.images)
    model = api.load(options.model)
    found = model.caption(paths, language=options.language, n=options.n, beam=options.beam)
    for path, captions in zip(paths, found, strict=True):
        if options.n == 1:
            print(f"{path}: {captions[0].text}")
        else:
            print(path, *(f"{c.score:8.3f}  {c.text}" for c in captions), sep="\n")


def describe(options: argparse.Namespace) -> None:
    """Print what a run is."""
    from imgtune_jax import info

    print(info.summarize_run(Path(options.workdir)))


def _image_paths(given: Sequence[str]) -> list[Path]:
    from imgtune_jax.api import IMAGE_SUFFIXES

    paths: list[Path] = []
    for path in map(Path, given):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
            if not inside:
                raise ValueError(f"{path} holds no image ({', '.join(IMAGE_SUFFIXES)})")
            paths += inside
        elif path.is_file():
            paths.append(path)
        else:
            raise FileNotFoundError(f"no image or folder at {path}")
    return paths
