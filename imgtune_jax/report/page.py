"""Rendering of `report.html`."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jinja2
import numpy as np
from markupsafe import Markup, escape
from PIL import Image

from imgtune_jax import config as config_lib
from imgtune_jax import evals
from imgtune_jax.data import Source, decode_image
from imgtune_jax.evals.captioning import Captioning
from imgtune_jax.evals.retrieval import Retrieval
from imgtune_jax.report import figures
from imgtune_jax.report.caption_examples import CaptionExamples, sample_caption_examples
from imgtune_jax.report.class_tables import class_tables
from imgtune_jax.report.retrieval_examples import RetrievalData, sample_examples
from imgtune_jax.report.run_data import RunData, read_run_data
from imgtune_jax.report.tables import key_numbers, result_tables

THUMBNAIL_SIZE = 96  # pixels of the longer side; sharp at 48 CSS pixels on a 2x display
MAX_TEXT = 300  # characters of a caption or a class name that the page shows


def write_report(
    workdir: str | Path,
    *,
    retrieval: Sequence[RetrievalData] = (),
    captions: Sequence[CaptionExamples] = (),
    seed: int = 0,
) -> Path:
    """Write `workdir/report.html` from the files in `workdir`, and return its path.

    The example queries are sampled from `retrieval` with `seed`. The page names `seed` for the
    caption examples too, so sample `captions` with the same seed. Instead of a section without data
    (such as results before the first evaluation), the page has a line that names what is missing.
    """
    workdir = Path(workdir)
    run = read_run_data(workdir)
    tables = result_tables(run.results, model=run.name)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("imgtune_jax.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["cut"] = cut
    page = environment.get_template("report.html").render(
        run=run,
        charts=_charts(run),
        tables=tables,
        numbers=key_numbers(run, tables),
        class_tables=class_tables(run.results),
        retrieval=[sample_examples(data, seed=seed) for data in retrieval],
        captions=captions,
        seed=seed,
    )
    path = workdir / "report.html"
    temporary = path.with_suffix(".html.tmp")
    temporary.write_text(page, encoding="utf-8", errors="replace")  # captions may have surrogates
    temporary.replace(path)
    return path


def write_run_report(workdir: str | Path, predictor: evals.Predictor) -> Path:
    """Write the report with examples from the run's retrieval and captioning evaluators.

    Evaluators that failed have no examples. Call it on every host, since encoding is sharded over
    all hosts. Only the first host writes.
    """
    workdir = Path(workdir)
    config = config_lib.load_config(workdir / "config.json")
    kinds = ("retrieval", "captioning")
    failed = {result["dataset"] for result in read_run_data(workdir).failures}
    evaluators = evals.build_evaluators(
        {k: v for k, v in config.evals.items() if v.get("name") in kinds and k not in failed}
    )
    retrieval = [
        retrieval_data(name, evaluator, predictor)
        for name, evaluator in evaluators.items()
        if isinstance(evaluator, Retrieval)
    ]
    captions = sample_caption_examples(
        {k: e for k, e in evaluators.items() if isinstance(e, Captioning)},
        predictor,
        thumbnail=thumbnail,
    )
    if jax.process_index() == 0:
        return write_report(workdir, retrieval=retrieval, captions=captions)
    return workdir / "report.html"


def retrieval_data(name: str, evaluator: Retrieval, predictor: evals.Predictor) -> RetrievalData:
    """Embed the readable images and the captions of a retrieval evaluator."""
    image_emb, valid = predictor.embed_images(evaluator.source)
    captions, image_of_text, image_group = evaluator.captions_and_groups(valid)
    return RetrievalData(
        dataset=name,
        thumbnails=Thumbnails(evaluator.source, tuple(np.flatnonzero(valid).tolist())),
        captions=captions,
        image_emb=image_emb[valid],
        text_emb=predictor.embed_texts(captions),
        image_of_text=image_of_text,
        image_group=image_group,
        language=evaluator.language,
    )


def cut(text: str) -> Markup:
    """Return at most MAX_TEXT characters of a text as HTML; a title has the full text."""
    if len(text) <= MAX_TEXT:
        return escape(text)
    return Markup('<span title="{}">{}…</span>').format(text, text[:MAX_TEXT])


@dataclass(frozen=True)
class Thumbnails(Sequence[bytes]):
    """WebP thumbnails of a source's images at `indices`, created on access."""

    source: Source
    indices: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Any:
        return thumbnail(self.source[self.indices[index]].image)


def thumbnail(image: Any) -> bytes:
    """Return the image as a WebP file, at most THUMBNAIL_SIZE pixels wide and high."""
    opened = Image.fromarray(decode_image(image))
    opened.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE))
    file = io.BytesIO()
    opened.save(file, "WEBP", quality=82)
    return file.getvalue()


@dataclass(frozen=True)
class Chart:
    """A rendered panel and its legend, which is as in `figures.legend`."""

    title: str
    svg: Markup
    legend: Sequence[tuple[str, int, int]]


def _charts(run: RunData) -> list[Chart]:
    return [
        # Markup: matplotlib escapes text, and `figures.svg` escapes the alternative text.
        Chart(panel.title, Markup(figures.svg(panel, ident=f"chart{i}")), figures.legend(panel))
        for i, panel in enumerate(figures.panels(run.series))
    ]
