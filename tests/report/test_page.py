from __future__ import annotations

import io
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from imgtune_jax.evals.results import append_result, make_result
from imgtune_jax.evals.retrieval import Retrieval, curve_names
from imgtune_jax.report import page as page_module
from imgtune_jax.report import write_report
from tests.report.toy_report import UNSAFE, Page, png, retrieval_data


def count(path, tag):
    """Return the number of elements with a tag in a page."""
    return [name for name, _ in Page(path.read_text("utf-8")).tags].count(tag)


def test_page_loads_nothing_from_the_network_and_has_no_script(workdir):
    text = write_report(workdir, retrieval=[retrieval_data()]).read_text("utf-8")
    page = Page(text)
    for tag, attrs in page.tags:
        assert tag not in ("script", "link", "iframe", "object") or attrs.get("rel") == "icon"
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            if name in attrs:
                assert attrs[name].startswith(("data:", "#")), (tag, attrs)
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    assert not re.search(r"https?://(?!www\.w3\.org/)", text)  # w3.org: SVG namespaces, not loaded


def test_captions_and_settings_are_escaped(workdir):
    page = Page(write_report(workdir, retrieval=[retrieval_data()]).read_text("utf-8"))
    assert "script" not in [tag for tag, _ in page.tags]
    assert page.words.count(UNSAFE) >= 3  # in a query, a row of the heat map, and the settings
    assert any(attrs.get("alt") == UNSAFE for _, attrs in page.tags)


def test_long_texts_are_cut_and_their_title_is_the_full_text(workdir):
    long = "<b>" + "x" * 5000
    data = retrieval_data(captions=["red", "green", long])
    text = write_report(workdir, retrieval=[data]).read_text("utf-8")
    page = Page(text)
    cut = long[: page_module.MAX_TEXT]
    assert cut + "…" in page.words and cut + "x" not in page.words
    titles = [attrs["title"] for _, attrs in page.tags if "title" in attrs]
    assert titles and set(titles) == {long}
    alternatives = [attrs["alt"] for _, attrs in page.tags if "alt" in attrs]
    assert max(map(len, alternatives)) == page_module.MAX_TEXT
    assert page_module.cut("a & b") == "a &amp; b"


def test_classes_have_a_table_and_no_charts(workdir):
    num_charts = count(write_report(workdir), "figure")
    by_class = {
        f"per_class/{score}/{name}": value
        for name in [UNSAFE, *(f"class {i}" for i in range(200))]
        for score, value in {"f1": float(name == UNSAFE), "support": 4.0}.items()
    }
    fields = dict(dataset="zs", model="lit", pretrained="step 5", task="zeroshot_classification")
    append_result(workdir / "results.jsonl", make_result(**fields, metrics=by_class))
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 5} | curve_names(by_class, prefix="val/zs/")) + "\n")
    path = write_report(workdir)
    page = Page(path.read_text("utf-8"))
    assert count(path, "figure") == num_charts and "script" not in [tag for tag, _ in page.tags]
    assert "The 10 best and the 10 worst of 201 classes" in page.words
    assert f"{UNSAFE}100.0––4" in page.words.replace("\n", "").replace(" " * 6, "")


def test_every_image_and_chart_has_a_text_alternative(workdir):
    page = Page(write_report(workdir, retrieval=[retrieval_data()]).read_text("utf-8"))
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    charts = [attrs for tag, attrs in page.tags if tag == "svg" and "aria-hidden" not in attrs]
    assert images and all(attrs["alt"] for attrs in images)
    assert charts and all(a["role"] == "img" and a["aria-label"] for a in charts)


def test_hits_and_misses_are_marked_by_class_and_symbol(workdir):
    page = Page(write_report(workdir, retrieval=[retrieval_data()]).read_text("utf-8"))
    classes = [attrs.get("class", "") for tag, attrs in page.tags if tag == "li"]
    hits, misses = classes.count("hit"), classes.count("miss")
    assert (hits, misses) == (6, 12)  # 3 captions and 3 images, each with 3 answers
    assert page.words.count("✓hit") == hits and page.words.count("✗miss") == misses


def test_first_positive_after_the_answers_is_shown(workdir):
    similarity = np.array([0.1, *[0.9] * 6, 0.0], np.float32)
    data = retrieval_data(
        thumbnails=[png("red")] * 7,
        captions=["red"],
        image_emb=similarity[:7, None],
        text_emb=np.ones((1, 1), np.float32),
        image_of_text=np.zeros(1, int),
    )
    words = Page(write_report(workdir, retrieval=[data]).read_text("utf-8")).words
    assert "✗ match at rank 7" in words and "matching image, at rank 7," in words


def test_page_of_an_empty_run_names_what_is_missing(tmp_path):
    words = Page(write_report(tmp_path).read_text("utf-8")).words
    for line in ("No evaluation has finished yet", "No metrics yet", "No retrieval examples"):
        assert line in words
    assert "{{" not in words and "None" not in words


def test_missing_workdir_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist; expected the --workdir"):
        write_report(tmp_path / "nowhere")


def test_thumbnails_are_small_webp_on_white():
    transparent = io.BytesIO()
    Image.new("RGBA", (300, 150), (255, 0, 0, 0)).save(transparent, "PNG")
    for image in (transparent.getvalue(), np.full((300, 150, 3), 255, np.uint8)):
        opened = Image.open(io.BytesIO(page_module.thumbnail(image)))
        assert opened.format == "WEBP" and max(opened.size) == page_module.THUMBNAIL_SIZE
        assert np.asarray(opened.convert("RGB")).min() > 250


def test_run_report_shows_the_sources_of_retrieval_evaluators(workdir, monkeypatch):
    def record(i):
        captions = {"caption": (f"caption {i}",)}
        image = None if i == 1 else png("red")
        return SimpleNamespace(image=image, captions=captions, label=None, group=None)

    source = [record(i) for i in range(4)]
    eye = np.eye(4, dtype=np.float32)
    predictor = SimpleNamespace(
        embed_images=lambda s: (eye, np.array([True, False, True, True])),
        embed_texts=lambda t: np.stack([eye[int(x.split()[1])] for x in t]),
    )
    config = SimpleNamespace(evals={"toy": {"name": "retrieval"}, "zs": {"name": "zeroshot"}})
    monkeypatch.setattr(page_module.config_lib, "load_config", lambda path: config)
    monkeypatch.setattr(
        page_module.evals,
        "build_evaluators",
        lambda cfg: {name: Retrieval(source) for name in cfg},
    )
    words = Page(page_module.write_run_report(workdir, predictor).read_text("utf-8")).words
    assert "Retrieval on toy" in words and "Retrieval on zs" not in words
    assert "3 of 3 captions and 3 of 3 images" in words and "caption 1" not in words
