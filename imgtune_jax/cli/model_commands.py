"""Commands that take a model: `eval`, `embed`, `search`, `classify`, `caption` and `info`."""

from __future__ import annotations

import argparse
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imgtune_jax.errors import ExistingFileError, MissingFileError, UserError

if TYPE_CHECKING:
    import numpy as np

    from imgtune_jax.api import TunedModel


def evaluate(options: argparse.Namespace) -> None:
    """Evaluate a run's model on the full test sets, and rewrite the run's report."""
    import jax

    from imgtune_jax import api, distributed, evals, report
    from imgtune_jax.training.checkpoint import saved_steps

    distributed.initialize(options.coordinator, options.processes, options.process)
    workdir = options.workdir
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
        if jax.process_index() == 0:
            evals.append_result(workdir / "results.jsonl", record)
    if model.step < max(saved_steps(workdir), default=model.step):
        outcome = f"not rewritten, since step {model.step} is not the newest"
    else:
        outcome = str(report.write_run_report(workdir, model.predictor))
    if jax.process_index() == 0:
        print(f"{report.summary(workdir, step=options.step)}\n\nReport: {outcome}")
        report.check_evaluations(workdir)


def embed(options: argparse.Namespace) -> None:
    """Write the embeddings of images and texts as one new .npz file."""
    import numpy as np

    from imgtune_jax import api

    if not options.images and options.texts is None:
        raise UserError("nothing to embed; expected images, --texts FILE, or both")
    output = _new_npz_path(options.output)
    paths = _image_paths(options.images)
    texts = [] if options.texts is None else _read_lines(options.texts)
    model = api.load(options.model)
    arrays: dict[str, Any] = {}
    if paths:
        paths, arrays["image_features"] = _encode_readable(model, paths)
        arrays["image_paths"] = np.array([str(path) for path in paths])
    if texts:
        arrays["text_features"], arrays["texts"] = model.encode_text(texts), np.array(texts)
    try:
        np.savez(output, **arrays)
    except OSError as error:
        output.unlink(missing_ok=True)
        raise UserError(f"{output} cannot be written: {error.strerror}") from error
    print(f"{output}: " + ", ".join(f"{k} {v.shape}" for k, v in arrays.items()))


def search(options: argparse.Namespace) -> None:
    """Print the images that are most similar to a text or an image."""
    from imgtune_jax import api

    if len(options.images) == 1 and options.images[0].suffix == ".npz":
        paths, gallery = _read_gallery(options.images[0])
        model = api.load(options.model)
    else:
        paths = _image_paths(options.images)
        model = api.load(options.model)
        paths, gallery = _encode_readable(model, paths)
    for hit in model.search(options.query, gallery, k=options.k):
        print(f"{hit.score:.3f}  {paths[hit.index]}")


def classify(options: argparse.Namespace) -> None:
    """Print each image's labels, the most probable first."""
    from imgtune_jax import api

    paths = _image_paths(options.images)
    model = api.load(options.model)
    predictions = model.classify(paths, options.labels, options.templates, skip_unreadable=True)
    print(f"Probabilities: {model.probability_kind.value}")
    for path, labels in zip(paths, predictions, strict=True):
        if labels:
            print(f"{path}: " + ", ".join(f"{x.name} {100 * x.probability:.3g}%" for x in labels))


def caption(options: argparse.Namespace) -> None:
    """Print generated captions of each image."""
    from imgtune_jax import api

    paths = _image_paths(options.images)
    model = api.load(options.model)
    generated = model.caption(
        paths, language=options.language, n=options.n, beam=options.beam, skip_unreadable=True
    )
    for path, captions in zip(paths, generated, strict=True):
        if captions and options.n == 1:
            print(f"{path}: {captions[0].text}")
        elif captions:
            print(path, *(f"{c.score:8.3f}  {c.text}" for c in captions), sep="\n")


def info(options: argparse.Namespace) -> None:
    """Print a summary of a run."""
    from imgtune_jax.info import summarize_run

    print(summarize_run(options.workdir))


def _image_paths(arguments: Sequence[Path]) -> list[Path]:
    """Return the image files among the arguments and, recursively, in their folders.

    A path occurs once. Hidden files and folders inside a folder, such as macOS's `._a.jpg`, are
    left out.
    """
    from imgtune_jax.data import IMAGE_SUFFIXES

    paths: list[Path] = []
    for path in arguments:
        if os.path.isdir(path):
            images = [p for p in _visible_files(path) if p.suffix.lower() in IMAGE_SUFFIXES]
            if not images:
                raise UserError(
                    f"no image in the folder {path}; expected files {', '.join(IMAGE_SUFFIXES)}"
                )
            paths += images
        elif os.path.isfile(path):
            paths.append(path)
        else:
            raise MissingFileError(f"no image or folder at {path}")
    return list(dict.fromkeys(paths))


def _visible_files(folder: Path) -> list[Path]:
    """Return the files in a folder and its sub-folders, sorted, without the hidden ones."""
    files: list[Path] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(parent, name) for name in names if not name.startswith(".")]
    return sorted(files)


def _encode_readable(model: TunedModel, paths: Sequence[Path]) -> tuple[list[Path], np.ndarray]:
    """Return the paths of the readable images, and their embeddings."""
    import numpy as np

    embeddings = model.encode_image(paths, skip_unreadable=True)
    is_readable: Any = ~np.isnan(embeddings).any(1)
    readable = [path for path, ok in zip(paths, is_readable, strict=True) if ok]
    return readable, embeddings[is_readable]


def _new_npz_path(output: Path) -> Path:
    """Return the path of the file that `embed` writes, whose name ends in .npz.

    Raises UserError if it exists, or if its folder does not exist or is not writable.
    """
    path = output if output.suffix == ".npz" else output.with_name(f"{output.name}.npz")
    if os.path.isdir(output):
        raise UserError(f"--output {output} is a folder; expected the path of a new file")
    if os.path.lexists(path):
        raise ExistingFileError(f"{path} exists; remove it, or choose another --output")
    if not os.path.isdir(path.parent):
        raise MissingFileError(f"no folder {path.parent}; create it, or choose another --output")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"the folder {path.parent} is not writable; choose another --output")
    return path


def _read_gallery(path: Path) -> tuple[list[str], np.ndarray]:
    """Return the image paths and the embeddings of a file that `embed` wrote."""
    import numpy as np

    try:
        with np.load(path) as stored:
            return list(stored["image_paths"]), stored["image_features"]
    except FileNotFoundError as error:
        raise MissingFileError(f"no file at {path}; write it with imgtune embed") from error
    except KeyError as error:
        raise UserError(f"{path} has no image_features; write it with imgtune embed") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read: {error}; write it with imgtune embed") from error


def _read_lines(path: Path) -> list[str]:
    """Return the lines of a UTF-8 file. Only a newline (or CR LF) ends a line.

    Raises UserError if the file is missing, unreadable, empty or not UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise MissingFileError(f"no file at {path}; expected a text file") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; expected a text file") from error
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path}, line {line}: the text is not UTF-8; convert the file, for example with iconv"
        ) from error
    if not text:
        raise UserError(f"{path} is empty; expected one text per line")
    return text.removesuffix("\n").split("\n")
