"""Charts as SVG. Their colors are CSS variables of the page, for light and dark mode."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
import matplotlib.ticker
import numpy as np
from matplotlib.figure import Figure

from imgtune_jax.evals.per_class import SCORES
from imgtune_jax.report.run_data import Series
from imgtune_jax.report.tables import metric_label

# matplotlib needs literal colors. These are placeholders that `_inline_svg` replaces by variables.
INK, GRID = "#010101", "#020202"
LINES = tuple(f"#0303{i:02x}" for i in range(6))
VARIABLES = {INK: "var(--muted)", GRID: "var(--line)"} | {
    color: f"var(--series-{i + 1})" for i, color in enumerate(LINES)
}
DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)))  # line styles
MAX_POINTS = 600  # per curve; longer curves are averaged
# Caption metrics in the chart; the result table has all of them.
CAPTION_SCORES = ("Bleu_4", "ROUGE_L", "CIDEr", "METEOR", "exact_match")
# Metrics of a class have no chart; `class_tables` has them. Older runs lack `per_class/`.
PER_CLASS = re.compile(rf"val/.+?/(?:per_class/)?(?:{'|'.join(SCORES)})/")


@dataclass(frozen=True)
class Curve:
    """One line of a panel; `color` and `dash` are indices into LINES and DASHES."""

    label: str
    points: Series
    color: int = 0
    dash: int = 0


@dataclass(frozen=True)
class Panel:
    """One chart; with `percent`, the values are fractions and the axis is in percent."""

    title: str
    curves: list[Curve]
    percent: bool = False


def panels(series: Mapping[str, Series]) -> list[Panel]:
    """Return the charts of a run: losses, each evaluator's metrics, then all other metrics."""
    remaining = {name: points for name, points in series.items() if not PER_CLASS.match(name)}

    def take(condition: Callable[[str], Any]) -> dict[str, Series]:
        return {name: remaining.pop(name) for name in list(remaining) if condition(name)}

    losses = take(lambda n: n == "train/loss" or re.fullmatch(r"val/(.*/)?loss", n))
    charts = [_panel("Loss", losses)]
    optimizer = [take(name.__eq__) for name in ("train/lr", "train/logit_scale")]
    evaluators = dict.fromkeys(n.rsplit("/", 1)[0] for n in remaining if n.startswith("val"))
    for evaluator in evaluators:
        metrics = take(lambda n, e=evaluator: n.rsplit("/", 1)[0] == e)
        title = evaluator.removeprefix("val").strip("/") or "validation"
        charts += _evaluator_panels(title, metrics)
    charts += [_panel(_metric_title(n), {n: x}) for group in optimizer for n, x in group.items()]
    charts += [_panel(_metric_title(n), {n: remaining[n]}) for n in sorted(remaining)]
    return [panel for panel in charts if panel.curves]


def svg(panel: Panel, *, ident: str) -> str:
    """Render a panel as SVG; `ident` makes its element ids unique in the page."""
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": ident,
        "svg.id": ident,
        "font.size": 9,
        "axes.edgecolor": GRID,
        "axes.labelcolor": INK,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(4.4, 2.5), layout="constrained")
        axes = figure.add_subplot()
        for curve in panel.curves:
            _plot_curve(axes, curve)
        axes.grid(axis="y", color=GRID, linewidth=0.6)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0)
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))
        axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
        if panel.percent:
            axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0, decimals=0))
            axes.set_ylim(bottom=0)
        axes.set_xlabel("step")
        file = io.StringIO()
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)
    return _inline_svg(file.getvalue(), alt_text(panel))


def alt_text(panel: Panel) -> str:
    """Return a description of the chart for screen readers."""

    def number(value: float) -> str:
        return f"{100 * value:.1f} %" if panel.percent else f"{value:.4g}"

    parts = [
        f"{curve.label} goes from {number(curve.points[0][1])} at step {curve.points[0][0]} to "
        f"{number(curve.points[-1][1])} at step {curve.points[-1][0]}"
        for curve in panel.curves
    ]
    return f"{panel.title}: " + "; ".join(parts) + "."


def _panel(title: str, series: Mapping[str, Series]) -> Panel:
    curves = [
        Curve(_metric_title(name), points, color=i % len(LINES))
        for i, (name, points) in enumerate(series.items())
    ]
    percent = all(_is_fraction(name) for name in series)
    return Panel(title[:1].upper() + title[1:], curves, percent)


def _metric_title(metric: str) -> str:
    """Return a title: `learning rate` for `train/lr`, `validation on coco` for `val/coco/loss`."""
    parts = metric.split("/")
    if parts[0] == "val" and parts[-1] == "loss":
        return " on ".join(["validation", *parts[1:-1]])
    return "training" if metric == "train/loss" else metric_label("/".join(parts[1:]))


def _evaluator_panels(name: str, series: Mapping[str, Series]) -> list[Panel]:
    """Return panels of recalls, accuracies, captions and ranks, and one per other metric.

    Recalls have one color per k; curves of text → image are dashed. Metrics that never change, such
    as the size of a data set, have no panel.
    """
    by_metric = {n.rsplit("/", 1)[-1]: points for n, points in series.items()}
    by_metric = dict(sorted(by_metric.items(), key=lambda item: _is_text_to_image(item[0])))
    recalls = {n: points for n, points in by_metric.items() if re.search(r"(recall|R)@\d+$", n)}
    fractions = {
        n: points for n, points in by_metric.items() if n not in recalls and _is_fraction(n)
    }
    ranks = {n: points for n, points in by_metric.items() if n.endswith("median_rank")}
    captions = {n: by_metric[n] for n in CAPTION_SCORES if n in by_metric}
    grouped = recalls | fractions | ranks | captions
    others = {
        n: points
        for n, points in by_metric.items()
        if n not in grouped and not _is_in_table_only(n)
    }
    k_of = {n: int(n.rsplit("@", 1)[1]) for n in recalls}
    color_of_k = {k: i % len(LINES) for i, k in enumerate(sorted(set(k_of.values())))}
    recall_curves = [
        Curve(metric_label(n), points, color=color_of_k[k_of[n]], dash=_is_text_to_image(n))
        for n, points in recalls.items()
    ]
    rank_curves = [
        Curve(metric_label(n), points, dash=_is_text_to_image(n)) for n, points in ranks.items()
    ]
    return [
        Panel(f"{name}: retrieval", recall_curves, percent=True),
        Panel(f"{name}: accuracy", _numbered_curves(fractions), percent=True),
        Panel(f"{name}: captions", _numbered_curves(captions), percent=True),
        Panel(f"{name}: median rank", rank_curves),
        *(
            Panel(f"{name}: {metric_label(n)}", [Curve(metric_label(n), points)])
            for n, points in others.items()
            if len({value for _, value in points}) > 1
        ),
    ]


def _numbered_curves(series: Mapping[str, Series]) -> list[Curve]:
    """Return one curve per metric, each in another color."""
    return [
        Curve(metric_label(name), points, color=i % len(LINES))
        for i, (name, points) in enumerate(series.items())
    ]


def _is_fraction(metric: str) -> bool:
    return any(part in metric for part in ("acc", "f1", "recall", "precision", "R@"))


def _is_in_table_only(metric: str) -> bool:
    return metric.endswith("mean_rank") or metric.startswith(("Bleu_", "chrF", "same_"))


def _is_text_to_image(metric: str) -> int:
    return int(metric.startswith(("image_retrieval", "text_to_image")))


def _plot_curve(axes, curve: Curve) -> None:
    """Plot a curve. A long one is plotted as the mean of each bin over a band from min to max."""
    steps, values = (np.array(column, float) for column in zip(*curve.points, strict=True))
    style = {"color": LINES[curve.color], "linestyle": DASHES[curve.dash], "linewidth": 1.6}
    if len(steps) > MAX_POINTS:
        bins = np.array_split(np.arange(len(steps)), MAX_POINTS)
        means = np.array([values[b].mean() for b in bins])
        axes.fill_between(
            [steps[b].mean() for b in bins],
            [values[b].min() for b in bins],
            [values[b].max() for b in bins],
            color=style["color"],
            alpha=0.18,
            linewidth=0,
        )
        steps, values = np.array([steps[b].mean() for b in bins]), means
    marker = {"marker": "o", "markersize": 3} if len(steps) <= 12 else {}
    axes.plot(steps, values, **style, **marker)


def _inline_svg(text: str, description: str) -> str:
    """Remove the prolog and the fixed size; insert CSS variables and a description."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"font: (?:\d+ )?([\d.]+px) [^;\"]*", r"font: \1 system-ui, sans-serif", text)
    for color, variable in VARIABLES.items():
        text = text.replace(color, variable)
    start = f'<svg role="img" aria-label="{escape(description, quote=True)}"'
    return text.replace("<svg", start, 1)


def legend(panel: Panel) -> Sequence[tuple[str, int, int]]:
    """Return (label, color number from 1, index into DASHES) of each curve."""
    return [(curve.label, curve.color + 1, curve.dash) for curve in panel.curves]
