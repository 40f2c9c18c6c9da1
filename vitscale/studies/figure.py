"""Accuracy against pre-training data, as in figures 3 and 4 of the ViT paper."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vitscale.durable import published
from vitscale.studies.tables import Score

# Okabe and Ito's colours, which colour-blind readers can tell apart; black and yellow left out.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = "osD^vP"


def draw_scaling(path: Path, curves: Mapping[str, Mapping[str, list[tuple[int, Score]]]], *, shots: int) -> None:
    """Draw one panel for each measure.

    Args:
        path: PNG to write.
        curves: by measure ("fewshot", "finetuned") and model, scores by the number of pre-training images.
        shots: of the few-shot measure.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    titles = {"fewshot": f"Linear {shots}-shot accuracy", "finetuned": "Fine-tuned accuracy"}
    figure = Figure(figsize=(5.2 * len(curves), 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    for number, (measure, by_model) in enumerate(curves.items(), 1):
        axes = figure.add_subplot(1, len(curves), number)
        sizes = sorted({size for points in by_model.values() for size, _ in points})
        for index, (model, points) in enumerate(by_model.items()):
            deviations = [score.deviation for _, score in points if score.deviation is not None]
            axes.errorbar(
                [size for size, _ in points],
                [score.mean for _, score in points],
                # A bar of no length would claim that seeds agree.
                yerr=deviations if len(deviations) == len(points) else None,
                label=model,
                color=COLOURS[index % len(COLOURS)],
                marker=MARKERS[index % len(MARKERS)],
                capsize=3,
            )
        axes.set_xscale("log")
        axes.set_xticks(sizes)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:,.0f}"))
        axes.set_title(titles[measure])
        axes.set_xlabel("pre-training images (log scale)")
        axes.set_ylabel("top-1 (%)")
        axes.grid(visible=True, alpha=0.3)
        axes.legend(frameon=False)
    with published(path) as file:
        figure.savefig(file, format="png")
