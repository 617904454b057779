"""What comes out of a sweep: trials.jsonl, best.py, and a page with pictures in one HTML file."""

import functools
import html
import io
import json
import math
import shlex
import statistics
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import matplotlib
import numpy as np
import optuna
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from ml_collections import ConfigDict
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from lstm_jax import config as config_lib
from lstm_jax.errors import UserError, visible
from lstm_jax.run import files, workdir
from lstm_jax.sweep import space as space_lib
from lstm_jax.sweep import study
from lstm_jax.sweep.table import describe_progress, describe_settings, describe_state, format_value

TRIALS = "trials.jsonl"
BEST = "best.py"
PAGE = "report.html"

# Okabe and Ito's colours, told apart by colour-blind readers too.
_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#999999"

# The page is text and pictures: nothing in it runs, and nothing is fetched.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"

# Complete trials from which on importances are more than a hint.
_RELIABLE = 30

_CARETS = "<p>Carets stand for trials with losses above the picture.</p>"

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; margin: 0 auto; max-width: 68rem;
  padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
svg { width: 100%; height: auto; display: block; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(18rem, 100%), 1fr));
  gap: 0.5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 0.2rem 0.7rem 0.2rem 0; border-bottom: 1px solid #ddd;
  vertical-align: top; white-space: nowrap; }
td.reason { white-space: normal; min-width: 26rem; }
@media (max-width: 40rem) { td.reason { min-width: 60rem; } }
tr.best { background: #e8f3fa; }
pre { background: #f4f4f4; padding: 0.7rem; overflow-x: auto; font-size: 0.85rem; }
"""


def check_places(directory: Path) -> None:
    """Raises `UserError` if a file that is to be written is a directory; a link is replaced."""
    for name in (TRIALS, BEST, PAGE):
        path = directory / name
        if path.is_dir() and not path.is_symlink():
            raise UserError(f"{path} is a directory, where a file is to be: move it away")


def write_report(
    record: Study, directory: Path, experiment: ConfigDict, searched: space_lib.Space
) -> None:
    """Writes all that a sweep leaves behind, as far as it is."""
    write_trials(record, directory)
    best = find_best_trial(record)
    if best and not _is_of_seeds(_complete(record)):
        # What the user's own space makes of the trial's parameters, not what the study says.
        settled = space_lib.change_fields(experiment, searched.replay(best))
        _write(directory / BEST, _best_file(best, settled, directory))
    # Names are text, not formulas. Nobody needs to be warned of characters that a font lacks, or of
    # losses that are all the same.
    with matplotlib.rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        page = _page(record, directory)
    _write(directory / PAGE, page)


def _write(path: Path, text: str) -> None:
    files.write_file(path, text.encode("utf-8", "backslashreplace"))


def write_trials(record: Study, directory: Path) -> None:
    """Writes a line of JSON for each trial: how it ended, its settings, losses and directory."""
    lines = []
    for trial in list_trials(record):
        attributes = trial.user_attrs
        lines.append(
            {
                "trial": trial.number,
                "state": describe_state(trial),
                "validation_loss": trial.value,
                "test_loss": attributes.get(study.TEST_LOSS),
                "losses_by_epoch": trial.intermediate_values,
                "overrides": attributes.get(study.OVERRIDES, trial.params),
                "seconds": round(trial.duration.total_seconds(), 1) if trial.duration else None,
                "reason": attributes.get(study.REASON),
                "workdir": str(study.get_trial_directory(directory, trial)),
            }
        )
    text = "".join(json.dumps(line) + "\n" for line in lines)
    _write(directory / TRIALS, text)


def list_trials(record: Study) -> list[FrozenTrial]:
    """All trials but those that another goes on with."""
    return [trial for trial in record.get_trials(deepcopy=False) if describe_state(trial)]


def find_best_trial(record: Study) -> FrozenTrial | None:
    """The complete trial with the least validation loss; None before there is one."""
    complete = _complete(record)
    return min(complete, key=lambda trial: trial.values[0]) if complete else None


def summarize_sweep(record: Study, directory: Path) -> str:
    """What the command prints at its end."""
    best = find_best_trial(record)
    if best is None:
        return f"No trial is complete. What there is of them: {directory / TRIALS}"
    lines = []
    complete = _complete(record)
    if _is_of_seeds(complete):
        for name, losses in _losses(complete):
            lines.append(f"{name} loss of {len(losses)} seeds: {_mean_and_spread(losses)}")
    else:
        lines.append(
            f"Best of {len(list_trials(record))} trials: trial {best.number}, validation loss "
            f"{best.value:.4f}: {visible(describe_settings(best))}"
        )
        trained = shlex.quote(str(study.get_trial_directory(directory, best)))
        lines += [
            f"Train it: {_command(best, directory)}",
            f"Let it write: python -m lstm_jax.sample --workdir {trained}",
        ]
    lines.append(f"Report: {directory / PAGE}; all trials: {directory / TRIALS}")
    return "\n".join(lines)


def _command(best: FrozenTrial, directory: Path) -> str:
    """How the best trial is trained anew, in a working directory that no other best one has."""
    config, own = directory / BEST, directory / f"best-{best.number:04}"
    return (
        f"python -m lstm_jax.main --config {shlex.quote(str(config))} "
        f"--workdir {shlex.quote(str(own))}"
    )


def _complete(record: Study) -> list[FrozenTrial]:
    return [trial for trial in list_trials(record) if trial.state == TrialState.COMPLETE]


def _is_of_seeds(trials: Sequence[FrozenTrial]) -> bool:
    """Whether nothing but the seed was varied."""
    return all(set(trial.params) == {"seed"} for trial in trials)


def _losses(trials: Sequence[FrozenTrial]) -> list[tuple[str, list[float]]]:
    """The validation and the test losses of trials."""
    test = [t.user_attrs[study.TEST_LOSS] for t in trials if study.TEST_LOSS in t.user_attrs]
    return [("validation", [t.values[0] for t in trials]), ("test", test)]


def _mean_and_spread(losses: Sequence[float]) -> str:
    if not losses:
        return "none was measured"
    spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
    return (
        f"mean {statistics.mean(losses):.4f}, standard deviation {spread:.4f}, from "
        f"{min(losses):.4f} to {max(losses):.4f}"
    )


def _best_file(best: FrozenTrial, settled: ConfigDict, directory: Path) -> str:
    """The experiment file of the best trial: all that differs from the defaults."""
    settled.data.sha256 = ""
    default = dict(config_lib.flatten(config_lib.default()))
    fields = [(f, v) for f, v in config_lib.flatten(settled) if v != default[f]]
    lines = "\n".join(f"    config.{field} = {value!r}" for field, value in fields)
    command = _command(best, directory)
    return f'''"""The best trial of a sweep, trial {best.number}."""
# {command if command.isprintable() else ascii(command)}
#
# Validation {best.value:.4f} nats per token, as the sweep measured it.

from ml_collections import ConfigDict

from lstm_jax import config as config_lib


def get_config() -> ConfigDict:
    """What the sweep found."""
    config = config_lib.default()

{lines}
    return config
'''


def _page(record: Study, directory: Path) -> str:
    trials = list_trials(record)
    complete, best = _complete(record), find_best_trial(record)
    parts = [
        f"<h1>Sweep {html.escape(record.study_name)}</h1>",
        f"<p>{html.escape(describe_progress(trials, len(trials)))}</p>",
    ]
    is_of_seeds = bool(complete) and _is_of_seeds(complete)
    if best and not is_of_seeds:
        rows = "".join(
            f"<tr><td>{html.escape(name)}</td><td>{html.escape(format_value(value))}</td></tr>"
            for name, value in best.user_attrs.get(study.OVERRIDES, best.params).items()
        )
        test = best.user_attrs.get(study.TEST_LOSS)
        also = f", test loss {test:.4f}" if test is not None else ""
        parts.append(
            f"<h2>Best</h2><p>Trial {best.number}: validation loss {best.value:.4f}{also}, in nats "
            f"per token.</p><div class=wide><table>{rows}</table></div>"
            f"<pre>{html.escape(_command(best, directory))}</pre>"
        )
    if is_of_seeds:
        lines = "".join(
            f"<li>{name}: {_mean_and_spread(losses)}</li>" for name, losses in _losses(complete)
        )
        parts.append(f"<h2>Spread over {len(complete)} seeds</h2><ul>{lines}</ul>")
    ended = [t for t in trials if t.value is not None and math.isfinite(t.value)]
    if ended:
        parts.append(
            f"<h2>History</h2>{_CARETS}{_draw(lambda axes: _history(axes, ended), 6.5, 3.2)}"
        )
    names = sorted({name for trial in ended for name in trial.params})
    varied = [n for n in names if len({str(t.params[n]) for t in ended if n in t.params}) > 1]
    if importance := _importance(record, complete):
        picture = _draw(lambda axes: _bars(axes, importance), 6.5, 0.7 + 0.35 * len(importance))
        caution = ": too few for more than a hint" if len(complete) < _RELIABLE else ""
        parts.append(
            "<h2>Importance</h2><p>How far the best tenth of the complete trials is told from all "
            "of them by each setting (PED-ANOVA, Watanabe et al. 2023), from "
            f"{len(complete)} complete trials{caution}.</p>{picture}"
        )
    if varied:
        pictures = "".join(
            _draw(functools.partial(_scatter, trials=ended, name=name), 4, 3) for name in varied
        )
        parts.append(f"<h2>Loss against each</h2><div class=pictures>{pictures}</div>")
    if len(varied) > 1:
        width = 1.0 * (len(varied) + 1)
        picture = _draw(lambda axes: _parallel(axes, ended, varied), width, 4.2)
        parts.append(
            "<h2>Parallel coordinates</h2><p>A line is a trial: the darker, the lower its loss."
            f"</p><div class=wide><div style='min-width: {width:.1f}in'>{picture}"
            "</div></div>"
        )
    parts.append(f"<h2>Trials</h2><div class=wide>{_table(trials, best, directory)}</div>")
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        f'<meta http-equiv=Content-Security-Policy content="{_POLICY}">'
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<title>Sweep {html.escape(record.study_name)}</title><style>{_STYLE}</style></head>"
        f"<body>{''.join(parts)}</body></html>\n"
    )


def _table(trials: Sequence[FrozenTrial], best: FrozenTrial | None, directory: Path) -> str:
    """All trials, the best first, those without a loss last."""
    ordered = sorted(trials, key=lambda t: (_loss(t), t.number))
    head = ("trial", "state", "epochs", "validation", "test", "seconds", "settings", "directory")
    rows = ["".join(f"<th>{name}</th>" for name in head)]
    for trial in ordered:
        test = trial.user_attrs.get(study.TEST_LOSS)
        where = study.get_trial_directory(directory, trial).relative_to(directory)
        what = describe_settings(trial)
        if reason := trial.user_attrs.get(study.REASON):
            what += f" ({reason})"
        cells = (
            str(trial.number),
            describe_state(trial),
            str(max(trial.intermediate_values, default=0)),
            "" if _loss(trial) == math.inf else f"{_loss(trial):.4f}",
            "" if test is None else f"{test:.4f}",
            f"{trial.duration.total_seconds():.0f}" if trial.duration else "",
        )
        mark = " class=best" if best and trial.number == best.number else ""
        rows.append(
            f"</tr><tr{mark}>"
            + "".join(f"<td>{cell}</td>" for cell in cells)
            + f"<td class=reason>{html.escape(what)}</td>"
            f"<td><a href='{quote(f'{where}/{workdir.METRICS}')}'>{html.escape(str(where))}</a>"
            "</td>"
        )
    return f"<table><tr>{''.join(rows)}</tr></table>"


def _loss(trial: FrozenTrial) -> float:
    """The loss by which trials are ordered, infinite without one."""
    value = trial.value
    return value if value is not None and math.isfinite(value) else math.inf


def _importance(record: Study, complete: Sequence[FrozenTrial]) -> dict[str, float]:
    """The share of each parameter, the greatest first; empty if there are too few trials."""
    if len(complete) < 4:
        return {}
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    try:
        found = optuna.importance.get_param_importances(record, evaluator=evaluator)
    except Exception:  # No parameter that all have, none that varies, or whatever else there is.
        return {}
    return {name: share for name, share in found.items() if math.isfinite(share)}


def _draw(plot: Callable[[Axes], None], width: float, height: float) -> str:
    """A picture as SVG, to stand in a page."""
    figure = Figure(figsize=(width, height), layout="constrained")
    plot(figure.add_subplot())
    text = io.StringIO()
    FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None})
    return text.getvalue().partition("<svg")[2].join(["<svg", ""])


def _history(axes: Axes, trials: Sequence[FrozenTrial]) -> None:
    """Losses in the order of the trials, and the best so far."""
    for name, colour in (("complete", _BLUE), ("pruned", _GREY), ("diverged", _GREY)):
        part = [t for t in trials if describe_state(t) == name]
        if part:
            _plot(axes, part, [t.number for t in part], _top(trials), color=colour, label=name)
    complete = sorted(
        (t for t in trials if describe_state(t) == "complete"), key=lambda t: t.number
    )
    if complete:
        best = np.minimum.accumulate([_loss(t) for t in complete])
        numbers = [t.number for t in complete]
        shown_best = np.minimum(best, _top(trials))
        axes.step(numbers, shown_best, where="post", color=_ORANGE, label="best so far")
    axes.set_xlabel("trial")
    axes.set_ylabel("validation loss")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)


def _top(trials: Sequence[FrozenTrial]) -> float:
    """The greatest loss that pictures show; the others would press the rest against an edge."""
    complete = sorted(_loss(t) for t in trials if t.state == TrialState.COMPLETE)
    losses = complete or sorted(_loss(t) for t in trials)
    low, middle, high = losses[0], losses[len(losses) // 2], losses[-1]
    return min(high, low + 4 * max(middle - low, 1e-3)) + 0.1 * (middle - low) + 1e-4


def _plot(
    axes: Axes, trials: Sequence[FrozenTrial], values: Sequence[float], top: float, **style: Any
) -> None:
    """A dot for each loss; a caret at the upper edge where it is beyond that."""
    points = [(value, _loss(t)) for t, value in zip(trials, values, strict=True)]
    inside = [(value, loss) for value, loss in points if loss <= top]
    beyond = [value for value, loss in points if loss > top]
    axes.plot(*zip(*inside, strict=True) if inside else ([], []), "o", markersize=4, **style)
    axes.plot(beyond, [top] * len(beyond), "^", markersize=4, color=style["color"])


def _bars(axes: Axes, importance: dict[str, float]) -> None:
    names = list(importance)[::-1]
    bars = axes.barh(names, [importance[name] for name in names], color=_BLUE)
    axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    axes.set_xlim(right=1.1 * max([*importance.values(), 0.01]))


def _scatter(axes: Axes, trials: Sequence[FrozenTrial], name: str) -> None:
    own = [t for t in trials if name in t.params]
    for which, colour in ((False, _GREY), (True, _BLUE)):
        part = [t for t in own if (t.state == TrialState.COMPLETE) == which]
        values: list[Any] = [t.params[name] for t in part]
        if _is_categorical(own[0], name):
            labels = _choices(own[0], name)
            values = [labels.index(str(value)) for value in values]
            axes.set_xticks(range(len(labels)), labels)
            axes.set_xlim(-0.5, len(labels) - 0.5)
        _plot(axes, part, values, _top(trials), color=colour)
    if getattr(own[0].distributions[name], "log", False):
        axes.set_xscale("log")
        values = [trial.params[name] for trial in own]
        decades = math.log10(max(values) / min(values))
        axes.xaxis.set_major_locator(LogLocator(subs=(1,) if decades > 1.5 else (1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(name)
    axes.set_ylabel("validation loss")
    axes.grid(alpha=0.3)


def _is_categorical(trial: FrozenTrial, name: str) -> bool:
    return isinstance(trial.distributions[name], optuna.distributions.CategoricalDistribution)


def _choices(trial: FrozenTrial, name: str) -> list[str]:
    distribution = trial.distributions[name]
    assert isinstance(distribution, optuna.distributions.CategoricalDistribution)
    return [str(choice) for choice in distribution.choices]


def _parallel(axes: Axes, trials: Sequence[FrozenTrial], names: Sequence[str]) -> None:
    """An axis for each parameter and one for the loss, each from its least to its greatest."""
    columns: list[dict[int, float]] = []
    for place, name in enumerate(names):
        own = [t for t in trials if name in t.params]
        if _is_categorical(own[0], name):
            choices = _choices(own[0], name)
            numbers = {t.number: float(choices.index(str(t.params[name]))) for t in own}
            marks = {float(i): choice for i, choice in enumerate(choices)}
        else:
            log = getattr(own[0].distributions[name], "log", False)
            numbers = {t.number: math.log(t.params[name]) if log else t.params[name] for t in own}
            ends = min(numbers.values()), max(numbers.values())
            marks = {end: format_value(math.exp(end) if log else end) for end in ends}
        columns.append(_column(axes, place, numbers, marks))
    ranked = sorted(trials, key=_loss, reverse=True)
    losses = {t.number: _loss(t) for t in ranked if _loss(t) <= _top(trials)}
    marks = {end: f"{end:.3f}" for end in (min(losses.values()), max(losses.values()))}
    columns.append(_column(axes, len(names), losses, marks))
    for rank, trial in enumerate(ranked):
        points = [(i, c[trial.number]) for i, c in enumerate(columns) if trial.number in c]
        share = (rank + 1) / len(ranked)
        colour = _ORANGE if rank == len(ranked) - 1 else _BLUE
        axes.plot(*zip(*points, strict=True), color=colour, alpha=0.08 + 0.8 * share**3)
    axes.set_xticks(
        range(len(names) + 1),
        [*(name.rpartition(".")[2].replace("_", "\n") for name in names), "loss"],
        fontsize=8,
    )
    axes.set_yticks([])
    axes.set_xlim(-0.4, len(names) + 0.4)
    axes.set_ylim(-0.1, 1.1)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)


def _column(
    axes: Axes, place: int, numbers: dict[int, float], marks: dict[float, str]
) -> dict[int, float]:
    """Draws one axis with its marks; the heights of the trials on it, from 0 to 1."""
    low, high = min([*numbers.values(), *marks]), max([*numbers.values(), *marks])
    span = high - low or 1.0
    axes.axvline(place, 1 / 12, 11 / 12, color="#444444", linewidth=1)
    for value, text in marks.items():
        axes.annotate(
            text, (place, (value - low) / span), (3, 3), textcoords="offset points", fontsize=7
        )
    return {number: (value - low) / span for number, value in numbers.items()}
