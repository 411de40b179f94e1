from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from imgtune_jax.evals.captioning import Captioning
from imgtune_jax.evals.protocol import GeneratedCaption
from imgtune_jax.report import page as page_module
from imgtune_jax.report import write_report
from imgtune_jax.report.caption_examples import sample_caption_examples
from tests.report.toy_report import UNSAFE, Page, png


class Source(list):
    fingerprint = "toy"


class Predictor:
    """Generates the caption `red` after the prefix."""

    def generate_captions(self, source, *, prefix, decoding):
        images = [source[i].image for i in range(len(source))]
        captions = [[GeneratedCaption(prefix + "red", -1.0)] if x else [] for x in images]
        return captions, np.array([x is not None for x in images])


def test_each_image_has_its_captions_and_references_in_all_languages(workdir):
    record = SimpleNamespace(image=png("red"), captions={"en": ("red",), "de": (UNSAFE, "rot")})
    unreadable = SimpleNamespace(image=None, captions={"en": ("gone",), "de": ("weg",)})
    source = Source([record, unreadable, record])
    evaluators = {
        "toy_en": Captioning(source, caption_set="en", limit=1),
        "toy_de": Captioning(source, caption_set="de", language="de", prefix="<b>"),
    }
    (shown,) = sample_caption_examples(evaluators, Predictor(), thumbnail=page_module.thumbnail)
    assert (shown.dataset, shown.num_images, len(shown.examples)) == ("toy", 3, 2)
    lines = shown.examples[0].lines
    assert [(x.language, x.prediction, x.hit) for x in lines] == [
        ("en", "red", True),
        ("de", "<b>red", False),
    ]
    page = Page(write_report(workdir, captions=[shown]).read_text("utf-8"))
    assert page.words.count("<b>red") == 2 and page.words.count(f"{UNSAFE} · rot") == 2
    assert "Captions of toy" in page.words and "No retrieval examples" not in page.words
    classes = [attrs.get("class", "") for tag, attrs in page.tags if tag == "li"]
    assert classes.count("hit") == classes.count("miss") == 2
