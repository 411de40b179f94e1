from __future__ import annotations

import dataclasses
import html.parser
import io
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from imgtune_jax.evals.captioning import Captioning
from imgtune_jax.evals.protocol import GeneratedCaption
from imgtune_jax.evals.results import append_result, make_result
from imgtune_jax.report import RetrievalData, write_report
from imgtune_jax.report import page as page_module
from imgtune_jax.report.caption_examples import caption_views
from imgtune_jax.report.figures import MAX_POINTS, Curve, Panel, alt_text, panels, svg
from imgtune_jax.report.retrieval_examples import sample_examples
from imgtune_jax.report.run_data import (
    MetricColumn,
    key_numbers,
    metric_label,
    read_run_data,
    result_tables,
)

NASTY = "<script>alert(\"x\")</script> & 'quotes' {{ 7 * 7 }}"


def picture(colour) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, "PNG")
    return file.getvalue()


def gallery(**changes) -> RetrievalData:
    """Three images, caption i for image i, but image 2's caption looks like image 0."""
    eye = np.eye(3, dtype=np.float32)
    made = RetrievalData(
        dataset="toy",
        thumbnails=[picture(c) for c in ("red", "green", "blue")],
        captions=["red", "green", NASTY],
        image_emb=eye,
        text_emb=np.stack([eye[0], eye[1], [0.9, 0.1, 0.2]]).astype(np.float32),
        image_of_text=np.arange(3),
    )
    return dataclasses.replace(made, **changes)


@pytest.fixture
def workdir(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"name": "lit", "optim": {"lr": 0.1}, "text": NASTY})
    )
    lines = [
        {"step": s, "train/loss": 3.0 / s, "train/lr": 0.1, "val/S/text_retrieval_recall@1": s / 9}
        for s in range(1, 6)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    for model, value in (("lit", 0.25), ("lit", 0.5), ("ridge", 0.3125)):
        metrics = {
            "text_retrieval_recall@1": value,
            "text_retrieval_median_rank": 9 * value,
            "num_images": 40.0,
            "f1/cat": 0.5,
        }
        record = make_result(
            dataset="S", model=model, pretrained="p", task="zeroshot_retrieval", metrics=metrics
        )
        append_result(tmp_path / "results.jsonl", record)
    return tmp_path


class Page(html.parser.HTMLParser):
    """Every tag with its attributes, and the text outside of <style>."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self._open = [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "style":
            self._open.append(tag)

    def handle_endtag(self, tag):
        if tag == "style":
            self._open.pop()

    def handle_data(self, data):
        if not self._open:
            self.words += data


def test_page_asks_the_network_for_nothing_and_runs_no_script(workdir):
    text = write_report(workdir, galleries=[gallery()]).read_text("utf-8")
    page = Page(text)
    for tag, attrs in page.tags:
        assert tag not in ("script", "link", "iframe", "object") or attrs.get("rel") == "icon"
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            if name in attrs:
                assert attrs[name].startswith(("data:", "#")), (tag, attrs)
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    assert not re.search(r"https?://(?!www\.w3\.org/)", text)  # w3.org: SVG's namespace names


def test_captions_and_settings_are_escaped(workdir):
    page = Page(write_report(workdir, galleries=[gallery()]).read_text("utf-8"))
    assert "script" not in [tag for tag, _ in page.tags]
    assert page.words.count(NASTY) >= 3  # query, heat map row, settings: shown as it is
    assert any(attrs.get("alt") == NASTY for _, attrs in page.tags)


def test_every_picture_and_chart_has_words(workdir):
    page = Page(write_report(workdir, galleries=[gallery()]).read_text("utf-8"))
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    charts = [attrs for tag, attrs in page.tags if tag == "svg" and "aria-hidden" not in attrs]
    assert images and all(attrs["alt"] for attrs in images)
    assert charts and all(a["role"] == "img" and a["aria-label"] for a in charts)


def test_hits_and_misses_are_marked_right():
    v = sample_examples(gallery(), queries=3, answers=2)
    by_caption = {q.caption: q for q in v.text_queries}
    assert [a.hit for a in by_caption["red"].answers] == [True, False]
    assert by_caption["red"].first_positive is None and by_caption["red"].rank == 1
    missed = by_caption[NASTY]  # its image comes second, then third when only two are shown
    assert [a.hit for a in missed.answers] == [False, True] and missed.rank == 2
    one = sample_examples(gallery(), queries=3, answers=1)
    missed = next(q for q in one.text_queries if q.caption == NASTY)
    assert missed.first_positive is not None and (
        missed.first_positive.rank,
        missed.first_positive.hit,
    ) == (2, True)
    assert {q.picture.alt: q.rank for q in v.image_queries} == {"red": 1, "green": 1, NASTY: 1}
    assert v.recalls["image_retrieval_recall@1"] == pytest.approx(2 / 3)
    assert [[c.right for c in row] for row in v.heatmap.cells] == np.eye(3, dtype=bool).tolist()


def test_the_head_of_the_page_begins_with_english():
    common = dict(model="m", pretrained="", task="captioning", metrics={"CIDEr": 0.5})
    records = [make_result(dataset=f"s_{x}", language=x, **common) for x in ("ar", "en", "zh")]
    run = SimpleNamespace(last_step=None, series={})
    numbers = key_numbers(run, result_tables(records, model="m"))
    assert [n.label for n in numbers] == ["s_en: CIDEr", "s_ar: CIDEr", "s_zh: CIDEr"]


def test_marks_are_a_colour_and_a_symbol(workdir):
    page = Page(write_report(workdir, galleries=[gallery()]).read_text("utf-8"))
    classes = [attrs.get("class", "") for tag, attrs in page.tags if tag == "li"]
    hits, misses = classes.count("hit"), classes.count("miss")
    assert (hits, misses) == (6, 12)  # 3 captions and 3 images, each with 3 answers
    assert page.words.count("✓hit") == hits and page.words.count("✗miss") == misses


def test_images_of_one_group_are_all_right():
    v = sample_examples(gallery(image_group=np.array([0, 1, 0])), queries=3)
    query = next(q for q in v.text_queries if q.caption == NASTY)
    assert query.rank == 1 and sum(a.hit for a in query.answers) == 2


def test_queries_are_drawn_by_the_seed_and_not_chosen():
    rng = np.random.default_rng(0)
    n = 60
    emb = rng.normal(size=(n, 8))
    big = RetrievalData(
        "d", [picture("red")] * n, [f"c{i}" for i in range(n)], emb, emb, np.arange(n)
    )

    def drawn(seed):
        return [q.caption for q in sample_examples(big, queries=5, seed=seed).text_queries]

    assert drawn(0) == drawn(0) != drawn(1)
    flipped = dataclasses.replace(big, image_emb=-emb)  # now every query misses
    assert [q.caption for q in sample_examples(flipped, queries=5).text_queries] == drawn(0)


def test_only_thumbnails_that_are_shown_are_made():
    asked = []

    class Lazy:
        def __len__(self):
            return 500

        def __getitem__(self, i):
            asked.append(i)
            return picture("red")

    emb = np.random.default_rng(0).normal(size=(500, 8))
    sample_examples(
        RetrievalData("d", Lazy(), ["c"] * 500, emb, emb, np.arange(500)), queries=2, pairs=2
    )
    assert len(asked) <= 2 * 6 + 2 + 2


def test_empty_run_says_what_is_missing(tmp_path):
    words = Page(write_report(tmp_path).read_text("utf-8")).words
    for part in ("No evaluation has finished yet", "No metrics yet", "No retrieval gallery"):
        assert part in words
    assert "{{" not in words and "None" not in words


def test_missing_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run in"):
        write_report(tmp_path / "nowhere")


def test_half_a_last_line_is_skipped_and_a_broken_one_named(workdir):
    path = workdir / "metrics.jsonl"
    text = path.read_text()
    path.write_text(text + '{"step": 6, "train/lo')
    assert read_run_data(workdir).last_step == 5
    path.write_text("nonsense\n" + text)
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1 is not JSON: 'nonsense'"):
        read_run_data(workdir)


def test_table_keeps_the_newest_result_and_marks_the_best_of_a_data_set(workdir):
    (table,) = result_tables(read_run_data(workdir).results, model="lit")
    assert table.columns == ["image → text R@1", "image → text median rank", "images"]
    ours, baseline = table.rows
    assert (ours.model, ours.ours, baseline.model, baseline.ours) == ("lit", True, "ridge", False)
    assert [c.text for c in ours.cells] == ["50.0", "4.5", "40"]
    assert [c.best for c in ours.cells] == [True, False, False]
    assert [c.best for c in baseline.cells] == [False, True, False]  # a lower rank is better


def test_names_are_those_a_reader_knows():
    assert metric_label("image_retrieval_recall@5") == "text → image R@5"
    assert (
        metric_label("image_to_text_R@1")
        == metric_label("text_retrieval_recall@1")
        == "image → text R@1"
    )
    assert MetricColumn("loss").sign == MetricColumn("text_retrieval_mean_rank").sign == -1
    assert MetricColumn("acc5").sign == 1 and MetricColumn("num_images").sign == 0


def test_charts_pair_losses_and_take_their_colours_from_the_page():
    points = [(1, 2.0), (2, 1.0)]
    made = panels(
        {
            "train/loss": points,
            "val/coco/loss": points,
            "val/coco/image_to_text_R@1": points,
            "val/coco/text_to_image_R@1": points,
            "val/coco/num_images": [(1, 5.0), (2, 5.0)],
            "train/grad_norm": points,
        }
    )
    assert [p.title for p in made] == ["Loss", "coco: retrieval", "Gradient norm"]
    assert [c.label for c in made[0].curves] == ["training", "validation on coco"]
    assert [c.dash for c in made[1].curves] == [0, 1] and made[1].percent
    drawn = svg(made[0], ident="x")
    assert "var(--series-1)" in drawn and "var(--series-2)" in drawn
    assert "#0" not in re.sub(r"(xlink:href|url\()=?\"?#\w+", "", drawn)
    assert drawn == svg(made[0], ident="x")


def test_a_long_curve_keeps_its_ends_and_is_thinned():
    points = [(i, 1.0) for i in range(20_000)]
    long = Panel("Loss", [Curve("training", points)])
    assert len(svg(long, ident="x")) < 120 * MAX_POINTS
    assert "from 1 at step 0 to 1 at step 19999" in alt_text(long)


def test_gallery_of_unequal_lengths_is_refused():
    with pytest.raises(ValueError, match=r"'toy' has 3 image and 3 text .* 3 thumbnails, 2 capt"):
        gallery(captions=["a", "b"])


def test_thumbnails_are_small_webp_on_white():
    clear = io.BytesIO()
    Image.new("RGBA", (300, 150), (255, 0, 0, 0)).save(clear, "PNG")
    for image in (clear.getvalue(), np.full((300, 150, 3), 255, np.uint8)):
        made = Image.open(io.BytesIO(page_module.thumbnail(image)))
        assert made.format == "WEBP" and max(made.size) == page_module.THUMBNAIL
        assert np.asarray(made.convert("RGB")).min() > 250


def test_report_run_shows_the_retrieval_evaluators_sources(workdir, monkeypatch):
    from imgtune_jax import evals
    from imgtune_jax.evals.retrieval import Retrieval

    def record(i):
        captions = {"caption": (f"caption {i}",)}
        image = None if i == 1 else picture("red")
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
        evals, "build_evaluators", lambda cfg: {name: Retrieval(source) for name in cfg}
    )
    words = Page(page_module.write_run_report(workdir, predictor).read_text("utf-8")).words
    assert "Retrieval on toy" in words and "Retrieval on zs" not in words
    assert "3 of 3 captions and 3 of 3 images" in words and "caption 1" not in words


def test_captions_are_shown_beside_their_references_one_card_an_image(workdir):
    record = SimpleNamespace(image=picture("red"), captions={"en": ("red",), "de": (NASTY, "rot")})
    broken = SimpleNamespace(image=None, captions={"en": ("gone",), "de": ("weg",)})

    class Source(list):
        fingerprint = "toy"

    class Predictor:
        def generate_captions(self, source, *, prefix, decoding):
            images = [source[i].image for i in range(len(source))]
            written = [[GeneratedCaption(prefix + "red", -1.0)] if x else [] for x in images]
            return written, np.array([x is not None for x in images])

    source = Source([record, broken, record])
    evaluators = {
        "toy_en": Captioning(source, caption_set="en", limit=1),
        "toy_de": Captioning(source, caption_set="de", language="de", prefix="<b>"),
    }
    (shown,) = caption_views(evaluators, Predictor(), thumbnail=page_module.thumbnail)
    assert (shown.dataset, shown.num_images, len(shown.images)) == ("toy", 3, 2)
    lines = shown.images[0].lines
    assert [(x.language, x.prediction, x.hit) for x in lines] == [
        ("en", "red", True),
        ("de", "<b>red", False),
    ]
    text = write_report(workdir, captions=[shown]).read_text("utf-8")
    page = Page(text)
    assert page.words.count("<b>red") == 2 and page.words.count(f"{NASTY} · rot") == 2
    assert "Captions of toy" in page.words and "No retrieval gallery" not in page.words
    classes = [attrs.get("class", "") for tag, attrs in page.tags if tag == "li"]
    assert classes.count("hit") == classes.count("miss") == 2


def test_caption_scores_are_named_and_compared_as_papers_do():
    assert (metric_label("Bleu_4"), metric_label("ROUGE_L"), metric_label("exact_match")) == (
        "BLEU-4",
        "ROUGE-L",
        "exact match",
    )
    assert (
        MetricColumn("CIDEr").format(1.4189) == "141.9"
        and MetricColumn("chrF").format(61.234) == "61.2"
    )
    assert (
        MetricColumn("CIDEr").sign == MetricColumn("chrF").sign == 1
        and MetricColumn("perplexity").sign == -1
    )
    points = [(1, 0.1), (2, 0.2)]
    names = ("Bleu_1", "Bleu_4", "ROUGE_L", "CIDEr", "chrF", "exact_match", "perplexity")
    made = panels({f"val/toy/{name}": points for name in names})
    assert [p.title for p in made] == ["toy: captions", "toy: perplexity"]
    assert [c.label for c in made[0].curves] == ["BLEU-4", "ROUGE-L", "CIDEr", "exact match"]
