"""Writing `report.html`."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image

from imgtune_jax import config as config_lib
from imgtune_jax import evals
from imgtune_jax.data import Source, decode_image
from imgtune_jax.evals.captioning import Captioning
from imgtune_jax.evals.retrieval import Retrieval
from imgtune_jax.report import figures
from imgtune_jax.report.caption_examples import CaptionExamples, caption_views
from imgtune_jax.report.retrieval_examples import RetrievalData, sample_examples
from imgtune_jax.report.run_data import RunData, key_numbers, read_run_data, result_tables

THUMBNAIL = 96  # pixels of the longer side: sharp at 48 CSS pixels on a phone


def write_report(
    workdir: str | Path,
    *,
    galleries: Sequence[RetrievalData] = (),
    captions: Sequence[CaptionExamples] = (),
    seed: int = 0,
) -> Path:
    """Write `workdir/report.html` from what the run left there, and return its path.

    Queries are drawn from `galleries` with `seed`, never chosen, and so are the images of
    `captions`. A part that is missing (no results yet, say) is left out and named.
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
    page = environment.get_template("report.html").render(
        run=run,
        charts=_charts(run),
        tables=tables,
        numbers=key_numbers(run, tables),
        views=[sample_examples(gallery, seed=seed) for gallery in galleries],
        captions=captions,
        seed=seed,
    )
    path = workdir / "report.html"
    temporary = path.with_suffix(".html.tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)
    return path


def write_run_report(workdir: str | Path, encoders: evals.Predictor) -> Path:
    """Write the report with what the run's retrieval and captioning evaluators look at.

    To be called on every host, as encoding is everybody's work; the first one writes.
    """
    workdir = Path(workdir)
    config = config_lib.load_config(workdir / "config.json")
    shown = ("retrieval", "captioning")
    wanted = {k: v for k, v in config.evals.items() if v.get("name") in shown}
    evaluators = evals.build_evaluators(wanted)
    galleries = [
        retrieval_data(name, evaluator, encoders)
        for name, evaluator in evaluators.items()
        if isinstance(evaluator, Retrieval)
    ]
    captions = caption_views(
        {k: e for k, e in evaluators.items() if isinstance(e, Captioning)},
        encoders,
        thumbnail=thumbnail,
    )
    if jax.process_index() == 0:
        return write_report(workdir, galleries=galleries, captions=captions)
    return workdir / "report.html"


def retrieval_data(name: str, evaluator: Retrieval, encoders: evals.Predictor) -> RetrievalData:
    """What a retrieval evaluator looks at, as a gallery; broken images are left out as it does."""
    image_emb, valid = encoders.embed_images(evaluator.source)
    captions, image_of_text, image_group = evaluator.captions_and_groups(valid)
    return RetrievalData(
        dataset=name,
        thumbnails=Thumbnails(evaluator.source, tuple(np.flatnonzero(valid).tolist())),
        captions=captions,
        image_emb=image_emb[valid],
        text_emb=encoders.embed_texts(captions),
        image_of_text=image_of_text,
        image_group=image_group,
        language=evaluator.language,
    )


@dataclass(frozen=True)
class Thumbnails(Sequence[bytes]):
    """Small WebP copies of a source's images, made when asked for."""

    source: Source
    indices: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: Any) -> Any:
        return thumbnail(self.source[self.indices[place]].image)


def thumbnail(image: Any) -> bytes:
    """What the model is shown of an image, at most 96 pixels wide and high, as WebP."""
    opened = Image.fromarray(decode_image(image))
    opened.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    opened.save(file, "WEBP", quality=82)
    return file.getvalue()


@dataclass(frozen=True)
class Chart:
    """A drawn panel and its legend."""

    title: str
    svg: Markup
    legend: Sequence[tuple[str, int, int]]


def _charts(run: RunData) -> list[Chart]:
    return [
        # Markup: matplotlib escapes text, and the description is escaped where it is put in.
        Chart(panel.title, Markup(figures.svg(panel, ident=f"chart{i}")), figures.legend(panel))
        for i, panel in enumerate(figures.panels(run.series))
    ]
