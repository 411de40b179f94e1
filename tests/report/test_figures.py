from __future__ import annotations

import re

import pytest

from imgtune_jax.report.figures import MAX_POINTS, Curve, Panel, alt_text, panels, svg

POINTS = [(1, 2.0), (2, 1.0)]


def test_losses_share_a_chart_and_colors_are_variables_of_the_page():
    charts = panels(
        {
            "train/loss": POINTS,
            "val/coco/loss": POINTS,
            "val/coco/image_to_text_R@1": POINTS,
            "val/coco/text_to_image_R@1": POINTS,
            "val/coco/num_images": [(1, 5.0), (2, 5.0)],
            "train/grad_norm": POINTS,
        }
    )
    assert [p.title for p in charts] == ["Loss", "coco: retrieval", "Gradient norm"]
    assert [c.label for c in charts[0].curves] == ["training", "validation on coco"]
    assert [c.dash for c in charts[1].curves] == [0, 1] and charts[1].percent
    rendered = svg(charts[0], ident="x")
    assert "var(--series-1)" in rendered and "var(--series-2)" in rendered
    assert "#0" not in re.sub(r"(xlink:href|url\()=?\"?#\w+", "", rendered)
    assert rendered == svg(charts[0], ident="x")


def test_long_curve_is_averaged_and_its_alt_text_has_both_ends():
    points = [(i, 1.0) for i in range(20_000)]
    panel = Panel("Loss", [Curve("training", points)])
    assert len(svg(panel, ident="x")) < 120 * MAX_POINTS
    assert "from 1 at step 0 to 1 at step 19999" in alt_text(panel)


def test_caption_metrics_share_a_chart():
    names = ("Bleu_1", "Bleu_4", "ROUGE_L", "CIDEr", "chrF", "exact_match", "perplexity")
    charts = panels({f"val/toy/{name}": POINTS for name in names})
    assert [p.title for p in charts] == ["toy: captions", "toy: perplexity"]
    assert [c.label for c in charts[0].curves] == ["BLEU-4", "ROUGE-L", "CIDEr", "exact match"]


@pytest.mark.parametrize("prefix", ["per_class/", ""])  # without it in older runs
def test_metrics_of_classes_have_no_chart(prefix):
    names = [f"c{i}" for i in range(200)] + ["loss", "a/b", "R@1", "acc1"]
    by_class = {f"val/zs/{prefix}{x}/{n}": POINTS for x in ("f1", "support") for n in names}
    charts = panels({"val/zs/acc1": POINTS, **by_class, "val/f1/acc1": POINTS})
    assert [(p.title, len(p.curves)) for p in charts] == [("zs: accuracy", 1), ("f1: accuracy", 1)]
