"""Curves as SVG that takes its colours from the page, so it follows light and dark mode."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
import matplotlib.ticker
import numpy as np
from matplotlib.figure import Figure

from imgtune_jax.report.run_data import Series, metric_label

# matplotlib wants literal colours: these stand for the page's CSS variables, and are replaced.
INK, GRID = "#010101", "#020202"
LINES = tuple(f"#0303{i:02x}" for i in range(6))
VARIABLES = {INK: "var(--muted)", GRID: "var(--line)"} | {
    colour: f"var(--series-{i + 1})" for i, colour in enumerate(LINES)
}
DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)))
MAX_POINTS = 600
CAPTION_SCORES = ("Bleu_4", "ROUGE_L", "CIDEr", "METEOR", "exact_match")  # the table has the rest


@dataclass(frozen=True)
class Curve:
    """One line of a panel."""

    label: str
    points: Series
    colour: int = 0
    dash: int = 0


@dataclass(frozen=True)
class Panel:
    """One small chart."""

    title: str
    curves: list[Curve]
    percent: bool = False


def panels(series: Mapping[str, Series]) -> list[Panel]:
    """The charts a run's metrics make: the losses, one per evaluator, then one per other metric."""
    rest = dict(series)

    def take(wanted) -> dict[str, Series]:
        return {name: rest.pop(name) for name in list(rest) if wanted(name)}

    losses = take(lambda n: n == "train/loss" or re.fullmatch(r"val/(.*/)?loss", n))
    made = [_panel("Loss", losses)]
    optimizer = [take(name.__eq__) for name in ("train/lr", "train/logit_scale")]
    evaluators = dict.fromkeys(n.rsplit("/", 1)[0] for n in rest if n.startswith("val"))
    for evaluator in evaluators:
        own = take(lambda n, e=evaluator: n.rsplit("/", 1)[0] == e)
        made += _evaluator_panels(evaluator.removeprefix("val").strip("/") or "validation", own)
    made += [
        _panel(_metric_title(n), {n: points}) for own in optimizer for n, points in own.items()
    ]
    made += [_panel(_metric_title(n), {n: rest[n]}) for n in sorted(rest)]
    return [panel for panel in made if panel.curves]


def svg(panel: Panel, *, ident: str) -> str:
    """Draw a panel; `ident` keeps the element names of different panels apart."""
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
            _draw(axes, curve)
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
        empty = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=empty)
    return _inline_svg(file.getvalue(), alt_text(panel))


def alt_text(panel: Panel) -> str:
    """The chart in words, for those who do not see it."""

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
        Curve(_metric_title(name), points, colour=i % len(LINES))
        for i, (name, points) in enumerate(series.items())
    ]
    percent = all(_is_fraction(name) for name in series)
    return Panel(title[:1].upper() + title[1:], curves, percent)


def _metric_title(metric: str) -> str:
    """`train/lr` is `learning rate`, `val/coco/loss` is `validation on coco`."""
    parts = metric.split("/")
    if parts[0] == "val" and parts[-1] == "loss":
        return " on ".join(["validation", *parts[1:-1]])
    return "training" if metric == "train/loss" else metric_label("/".join(parts[1:]))


def _evaluator_panels(name: str, series: Mapping[str, Series]) -> list[Panel]:
    """Recalls (colour: k; dashed: text to image), accuracies, and every other metric by itself."""
    short = {n.rsplit("/", 1)[-1]: points for n, points in series.items()}
    short = dict(sorted(short.items(), key=lambda item: _is_text_to_image(item[0])))
    recalls = {n: p for n, p in short.items() if re.search(r"(recall|R)@\d+$", n)}
    ks = sorted({int(n.rsplit("@", 1)[1]) for n in recalls})
    shares = {n: p for n, p in short.items() if n not in recalls and _is_fraction(n)}
    ranks = {n: p for n, p in short.items() if n.endswith("median_rank")}
    captions = {n: short[n] for n in CAPTION_SCORES if n in short}
    taken = recalls | shares | ranks | captions
    others = {n: p for n, p in short.items() if n not in taken and not _is_in_table_only(n)}
    curves = [
        Curve(
            metric_label(n),
            points,
            colour=ks.index(int(n.rsplit("@", 1)[1])) % len(LINES),
            dash=_is_text_to_image(n),
        )
        for n, points in recalls.items()
    ]
    made = [Panel(f"{name}: retrieval", curves, percent=True)]
    for title, group in (("accuracy", shares), ("captions", captions)):
        curves = [
            Curve(metric_label(n), p, colour=i % len(LINES))
            for i, (n, p) in enumerate(group.items())
        ]
        made.append(Panel(f"{name}: {title}", curves, percent=True))
    median = [
        Curve(metric_label(n), points, dash=_is_text_to_image(n)) for n, points in ranks.items()
    ]
    made.append(Panel(f"{name}: median rank", median))
    for n, points in others.items():
        changes = len({value for _, value in points}) > 1
        if changes:  # the sizes of a data set make no chart
            made.append(Panel(f"{name}: {metric_label(n)}", [Curve(metric_label(n), points)]))
    return made


def _is_fraction(metric: str) -> bool:
    return any(part in metric for part in ("acc", "f1", "recall", "precision", "R@"))


def _is_in_table_only(metric: str) -> bool:
    return metric.endswith("mean_rank") or metric.startswith(("Bleu_", "chrF"))


def _is_text_to_image(metric: str) -> int:
    return int(metric.startswith(("image_retrieval", "text_to_image")))


def _draw(axes, curve: Curve) -> None:
    steps, values = (np.array(column, float) for column in zip(*curve.points, strict=True))
    style = {"color": LINES[curve.colour], "linestyle": DASHES[curve.dash], "linewidth": 1.6}
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
    """Inline SVG: no prolog, no fixed size, CSS variables for colours, words for screen readers."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"font: (?:\d+ )?([\d.]+px) [^;\"]*", r"font: \1 system-ui, sans-serif", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, variable)
    words = f'<svg role="img" aria-label="{escape(description, quote=True)}"'
    return text.replace("<svg", words, 1)


def legend(panel: Panel) -> Sequence[tuple[str, int, int]]:
    """(label, colour number from 1, dash) for each curve, for the page to draw."""
    return [(curve.label, curve.colour + 1, curve.dash) for curve in panel.curves]
