"""Write the results of a sweep: trials.jsonl, best.py, and report.html, without scripts."""

import html
import json
import math
import shlex
import statistics
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import quote

import optuna
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from lstm_jax.config import FIELDS, Config, change_fields, flatten
from lstm_jax.data import files
from lstm_jax.errors import UserError, visible
from lstm_jax.run import cell_file, workdir
from lstm_jax.sweep import plots
from lstm_jax.sweep import study as study_lib
from lstm_jax.sweep import table as table_lib
from lstm_jax.sweep.space import Space

TRIALS = "trials.jsonl"
BEST = "best.py"
PAGE = "report.html"

# With fewer complete trials, importances are not computed, or are only a hint.
_MIN_TRIALS, _MIN_RELIABLE = 4, 30


def check_paths(directory: Path) -> None:
    """Raise `UserError` if a directory has the name of a result file; links are replaced."""
    for name in (TRIALS, BEST, PAGE):
        path = directory / name
        if path.is_dir() and not path.is_symlink():
            raise UserError(f"{path} must be a file, but is a directory: move it away")


def write_report(study: Study, directory: Path, experiment: Config, space: Space) -> str:
    """Write all results of a sweep, finished or not; return the text for the user."""
    write_trials(study, directory)
    trials = list_trials(study)
    best, spread = table_lib.find_best_trial(trials), _measure_spread(trials)
    if best is None:
        lines = ["No trial is complete."]
    elif spread:
        lines = [f"{split} loss of {number} seeds: {text}" for split, number, text in spread]
        complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
        members = [str(study_lib.get_trial_directory(directory, trial)) for trial in complete]
        if len(members) > 1:
            named = [argument for member in members for argument in ("--workdir", member)]
            command = shlex.join(["python", "-m", "lstm_jax.evaluate", *named])
            command += cell_file.make_flag(experiment.model)
            lines.append(f"Measure their ensemble: {command}")
    else:
        # The fields come from the user's own space, not from the study.
        config = change_fields(experiment, space.replay(best))
        _write(directory / BEST, _make_best_file(best, config, directory))
        trained = str(study_lib.get_trial_directory(directory, best))
        command = shlex.join(["python", "-m", "lstm_jax.sample", "--workdir", trained])
        lines = [
            f"Best of {len(trials)} trials: trial {best.number}, validation loss "
            f"{best.value:.4f}: {visible(table_lib.describe_settings(best))}",
            f"Train it: {_get_command(best, directory)}",
            f"Generate text: {command}{cell_file.make_flag(config.model)}",
        ]
    # Optuna warns that PED-ANOVA is experimental, Matplotlib about missing glyphs and about axes of
    # zero length.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        page = make_page(study, directory)
    _write(directory / PAGE, page)
    return "\n".join([*lines, f"Report: {directory / PAGE}; all trials: {directory / TRIALS}"])


def _write(path: Path, text: str) -> None:
    files.write_file(path, text.encode("utf-8", "backslashreplace"))


def write_trials(study: Study, directory: Path) -> None:
    """Write a line of JSON for each trial: its state, settings, losses and working directory."""
    lines = [
        {
            "trial": trial.number,
            "state": table_lib.describe_state(trial),
            "validation_loss": trial.value,
            "test_loss": trial.user_attrs.get(study_lib.TEST_LOSS),
            "losses_by_epoch": trial.intermediate_values,
            "overrides": trial.user_attrs.get(study_lib.OVERRIDES, trial.params),
            "seconds": round(trial.duration.total_seconds(), 1) if trial.duration else None,
            "reason": trial.user_attrs.get(study_lib.REASON),
            "workdir": str(study_lib.get_trial_directory(directory, trial)),
        }
        for trial in list_trials(study)
    ]
    _write(directory / TRIALS, "".join(json.dumps(line) + "\n" for line in lines))


def list_trials(study: Study) -> list[FrozenTrial]:
    """Return all trials except those that another one resumes."""
    return [trial for trial in study.get_trials(deepcopy=False) if table_lib.describe_state(trial)]


def _get_command(best: FrozenTrial, directory: Path) -> str:
    """Return the command that trains the best trial again, in a directory with its number."""
    given = "--config", directory / BEST, "--workdir", directory / f"best-{best.number:04}"
    return shlex.join(["python", "-m", "lstm_jax.main", *map(str, given)])


def _measure_spread(trials: Sequence[FrozenTrial]) -> list[tuple[str, int, str]]:
    """Return (split, number of losses, spread), or [] if trials differ in more than the seed."""
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    if any(set(trial.params) != {"seed"} for trial in complete):
        return []
    attributes = [trial.user_attrs for trial in complete]
    tests = [each[study_lib.TEST_LOSS] for each in attributes if study_lib.TEST_LOSS in each]
    spread = []
    for split, losses in (("validation", [trial.values[0] for trial in complete]), ("test", tests)):
        text = "none was measured"
        if losses:
            deviation = statistics.stdev(losses) if len(losses) > 1 else 0.0
            text = (
                f"mean {statistics.mean(losses):.4f}, standard deviation {deviation:.4f}, from "
                f"{min(losses):.4f} to {max(losses):.4f}"
            )
        spread.append((split, len(losses), text))
    return spread


def _make_best_file(best: FrozenTrial, config: Config, directory: Path) -> str:
    """Return the experiment file of the best trial: all fields that differ from the defaults."""
    default = {field.name: field.default for field in FIELDS}
    lines = "\n".join(
        f"    config.{name} = {value!r}"
        for name, value in flatten(config)
        if value != default[name] and name != "data.sha256"
    )
    command = _get_command(best, directory)
    return f'''"""The best trial of a sweep, trial {best.number}."""
# {command if command.isprintable() else ascii(command)}
#
# Validation loss in the sweep: {best.value:.4f} nats per token.

from ml_collections import ConfigDict

from lstm_jax import config as config_lib


def get_config() -> ConfigDict:
    """Return the best settings of the sweep."""
    config = config_lib.default()

{lines}
    return config
'''


def make_page(study: Study, directory: Path) -> str:
    """Return the page with the best trial, pictures and a table of all trials."""
    trials = list_trials(study)
    best, spread = table_lib.find_best_trial(trials), _measure_spread(trials)
    title = f"Sweep {html.escape(study.study_name)}"
    parts = [
        f"<h1>{title}</h1><p>{html.escape(table_lib.describe_progress(trials, len(trials)))}</p>"
    ]
    if best and spread:
        lines = "".join(f"<li>{split}: {text}</li>" for split, _, text in spread)
        parts.append(f"<h2>Spread over {spread[0][1]} seeds</h2><ul>{lines}</ul>")
    elif best:
        settings = best.user_attrs.get(study_lib.OVERRIDES, best.params).items()
        rows = [
            (html.escape(name), html.escape(table_lib.format_value(value)))
            for name, value in settings
        ]
        test = best.user_attrs.get(study_lib.TEST_LOSS)
        test_loss = f", test loss {test:.4f}" if test is not None else ""
        parts.append(
            f"<h2>Best</h2><p>Trial {best.number}: validation loss {best.value:.4f}{test_loss}, in "
            f"nats per token.</p>{_make_table(rows)}"
            f"<pre>{html.escape(_get_command(best, directory))}</pre>"
        )
    ended = [trial for trial in trials if trial.value is not None]
    if ended:
        parts.append(
            "<h2>History</h2><p>A triangle marks a trial whose loss is above the plot.</p>"
            f"<div class=large>{plots.draw_losses(ended, width=10.5)}</div>"
            f"<div class=small>{plots.draw_losses(ended)}</div>"
        )
    parts.append(_show_importances(study))
    names = sorted({name for trial in ended for name in trial.params})
    varied = [n for n in names if len({str(t.params[n]) for t in ended if n in t.params}) > 1]
    if varied:
        pictures = "".join(plots.draw_losses(ended, name) for name in varied)
        parts.append(f"<h2>Loss against each parameter</h2><div class=pictures>{pictures}</div>")
    if len(varied) > 1:
        parts.append(
            "<h2>Parallel coordinates</h2><p>Each line is a trial. Darker lines have lower losses."
            f"</p><div class=wide>{plots.draw_parallel_coordinates(ended, varied)}</div>"
        )
    ordered = sorted(trials, key=lambda t: (math.inf if t.value is None else t.value, t.number))
    rows = [_make_row(t, directory, t is best) for t in ordered]
    table = _make_table([row.values() for row in rows], rows[0] if rows else ())
    parts.append(f"<h2>Trials</h2>{table}")
    page = Path(__file__).with_name(PAGE).read_text("utf-8")
    return page.replace("<!--title-->", title).replace("<!--body-->", "".join(parts))


def _make_table(rows: Iterable[Iterable[object]], head: Iterable[str] = ()) -> str:
    """Return a table whose cells are HTML."""
    lines = ["".join(f"<th>{name}</th>" for name in head)]
    lines += ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines if line)
    return f"<div class=wide><table>{body}</table></div>"


def _make_row(trial: FrozenTrial, directory: Path, is_best: bool) -> dict[str, object]:
    """Return the cells of a trial by column; the style knows <strong> and <span>."""
    test, reason = map(trial.user_attrs.get, (study_lib.TEST_LOSS, study_lib.REASON))
    where = str(study_lib.get_trial_directory(directory, trial).relative_to(directory))
    settings = table_lib.describe_settings(trial) + (f" ({reason})" if reason else "")
    return {
        "trial": f"<strong>{trial.number}</strong>" if is_best else trial.number,
        "state": table_lib.describe_state(trial),
        "epochs": max(trial.intermediate_values, default=0),
        "validation": f"{trial.value:.4f}" if trial.value is not None else "",
        "test": f"{test:.4f}" if test is not None else "",
        "seconds": f"{trial.duration.total_seconds():.0f}" if trial.duration else "",
        "settings": f"<span>{html.escape(settings)}</span>",
        "directory": f"<a href='{quote(f'{where}/{workdir.METRICS}')}'>{html.escape(where)}</a>",
    }


def _show_importances(study: Study) -> str:
    """Return the section on the importance of each parameter, highest first, or ""."""
    number = len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))
    if number < _MIN_TRIALS:
        return ""
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    try:
        shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    except Exception:  # The trials share no parameter, or none varies, for example.
        return ""
    bars = [
        (html.escape(name), f"{share:.2f}", f"<meter value={share:.3f}></meter>")
        for name, share in shares.items()
        if math.isfinite(share)
    ]
    if not bars:
        return ""
    caution = ": too few to rely on" if number < _MIN_RELIABLE else ""
    return (
        "<h2>Importance</h2><p>How much each setting distinguishes the best tenth of the complete "
        "trials from all of them (PED-ANOVA, Watanabe et al. 2023), computed from "
        f"{number} complete trials{caution}.</p>{_make_table(bars)}"
    )
