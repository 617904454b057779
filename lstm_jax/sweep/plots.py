"""Draw the pictures of a sweep's report as SVG.

Optuna's own plots (`optuna.visualization.matplotlib`) don't fit this report: they omit pruned and
diverged trials, one outlier compresses the axis for all other losses, labels of logarithmic axes
overlap, names with $ become formulas, and each plot warns that it is experimental.
"""

import io
import math
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState

from lstm_jax.sweep.table import format_value

# Okabe and Ito's colors, which color-blind readers can distinguish.
_BLUE, _ORANGE, _GRAY = "#0072B2", "#D55E00", "#999999"
# Names are text, not formulas.
_as_text = matplotlib.rc_context({"text.parse_math": False})


@_as_text
def draw_losses(trials: Sequence[FrozenTrial], name: str | None = None, width: float = 4) -> str:
    """Draw losses against a parameter, or against trial numbers with the best loss so far.

    The picture is `width` inches wide; the page shows it at this size, or smaller if it must.
    """
    figure = Figure(figsize=(width, 3), layout="constrained")
    axes = figure.add_subplot(xlabel=name or "trial", ylabel="validation loss")
    axes.grid(alpha=0.3)
    top = _get_top(trials)
    positions = {trial.number: float(trial.number) for trial in trials}
    if name:
        positions, ticks = _get_axis(trials, name)
        axes.set_xticks(list(ticks), ticks.values())
        axes.margins(x=0.1)
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    others = [trial for trial in trials if trial.state != TrialState.COMPLETE]
    kinds = ((others, "pruned or diverged", _GRAY), (complete, "complete", _BLUE))
    for part, label, color in kinds:
        points = [(positions[t.number], t.values[0]) for t in part if t.number in positions]
        x, losses = np.array(points).reshape(-1, 2).T
        is_above = losses > top
        axes.plot(x[~is_above], losses[~is_above], "o", markersize=4, color=color, label=label)
        axes.plot(x[is_above], np.full(is_above.sum(), top), "^", markersize=4, color=color)
    if not name:
        best = np.minimum.accumulate([min(t.values[0], top) for t in complete])
        numbers = [t.number for t in complete]
        axes.step(numbers, best, where="post", color=_ORANGE, label="best so far")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    return _to_svg(figure)


@_as_text
def draw_parallel_coordinates(trials: Sequence[FrozenTrial], names: Sequence[str]) -> str:
    """Draw a line for each trial across an axis for each parameter and one for the loss."""
    figure = Figure(figsize=(1.4 * (len(names) + 1), 4.2), layout="constrained")
    axes = figure.add_subplot(xlim=(-0.4, len(names) + 0.4), ylim=(-0.1, 1.1))
    ranked = sorted(trials, key=lambda t: t.values[0], reverse=True)
    losses = {t.number: t.values[0] for t in ranked if t.values[0] <= _get_top(trials)}
    ticks = {loss: f"{loss:.3f}" for loss in (min(losses.values()), max(losses.values()))}
    heights: list[dict[int, float]] = []
    for values, labels in [*(_get_axis(ranked, name) for name in names), (losses, ticks)]:
        low, span = min(labels), max(labels) - min(labels) or 1.0
        axes.axvline(len(heights), 1 / 12, 11 / 12, color="#444444", linewidth=1)
        for value, text in labels.items():
            place = len(heights), (value - low) / span
            axes.annotate(text, place, (3, 3), textcoords="offset points", fontsize=8)
        heights.append({number: (value - low) / span for number, value in values.items()})
    for rank, trial in enumerate(ranked, 1):
        points = [(i, h[trial.number]) for i, h in enumerate(heights) if trial.number in h]
        color, alpha = _BLUE, 0.08 + 0.8 * (rank / len(ranked)) ** 3
        axes.plot(*zip(*points, strict=True), color=color, alpha=alpha)
    axes.lines[-1].set_color(_ORANGE)  # The best trial.
    axis_names = [name.rpartition(".")[2].replace("_", "\n") for name in names]
    axes.set_xticks(range(len(names) + 1), [*axis_names, "loss"], fontsize=9)
    axes.yaxis.set_visible(False)
    axes.spines[:].set_visible(False)
    return _to_svg(figure)


def _to_svg(figure: Figure) -> str:
    text = io.StringIO()
    FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None})
    return "<svg" + text.getvalue().partition("<svg")[2]


def _get_top(trials: Sequence[FrozenTrial]) -> float:
    """Return the highest loss to show, so that outliers don't compress the axis."""
    complete = sorted(t.values[0] for t in trials if t.state == TrialState.COMPLETE)
    losses = complete or sorted(t.values[0] for t in trials)
    low, middle, high = losses[0], losses[len(losses) // 2], losses[-1]
    return min(high, low + 4 * max(middle - low, 1e-3)) + 0.1 * (middle - low) + 1e-4


def _get_axis(
    trials: Sequence[FrozenTrial], name: str
) -> tuple[dict[int, float], dict[float, str]]:
    """Return the position of each trial on the axis of a parameter, and the labels of its ticks."""
    drawn = [t for t in trials if name in t.params]
    distribution = drawn[0].distributions[name]
    if isinstance(distribution, CategoricalDistribution):
        choices = [str(choice) for choice in distribution.choices]
        positions = {t.number: float(choices.index(str(t.params[name]))) for t in drawn}
        return positions, {float(i): choice for i, choice in enumerate(choices)}
    is_log = getattr(distribution, "log", False)
    positions = {t.number: math.log(t.params[name]) if is_log else t.params[name] for t in drawn}
    low, high = min(positions.values()), max(positions.values())
    ticks = (low, (low + high) / 2, high)
    return positions, {tick: format_value(math.exp(tick) if is_log else tick) for tick in ticks}
