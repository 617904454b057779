"""Assign trials to workers.

Each running trial names its worker, which increments a counter in the trial every few seconds. The
first worker that detects a dead one closes its trial and resumes it under a new number, with the
same working directory, parameters and reported losses. This needs no lock: if two workers resume
the same trial, or start one trial too many, the trial with the higher number is dropped.
"""

import contextlib
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.study import Study
from optuna.trial import BaseTrial, FrozenTrial, TrialState

from lstm_jax.data import files
from lstm_jax.errors import UserError
from lstm_jax.run import checkpoints, workdir
from lstm_jax.sweep import study as study_lib
from lstm_jax.sweep.study import is_closed, list_finished, list_running

# In the directory of a sweep: a file for each live worker, which holds a lock on it.
WORKERS = "workers"
# In the working directory of a trial: the attribute `study.ORIGIN` of all trials that may use it.
OWNER = "trial"

_BEAT_SECONDS = 10
# Longer than lock.STALE_SECONDS, so that the lock of the working directory is free by then, too.
_STALE_SECONDS = 90
# A trial fails if this many workers in a row die without progress, for lack of memory for example.
_MAX_DEATHS = 5


def make_directory(path: Path) -> None:
    """Make a directory; raise `UserError` if a file or a link has its name."""
    with contextlib.suppress(FileExistsError):
        path.mkdir()
    if path.is_symlink() or not path.is_dir():
        raise UserError(f"{path} must be a directory, but is a link or a file: move it away")


def claim_directory(directory: Path, trial: BaseTrial) -> None:
    """Make the working directory of a trial; raise `UserError` if another study's trial uses it."""
    make_directory(directory.parent)
    make_directory(directory)
    path, origin = directory / OWNER, trial.user_attrs[study_lib.ORIGIN].encode()
    if not os.path.lexists(path) and not os.path.lexists(directory / workdir.CONFIG):
        files.write_file(path, origin)
    elif not os.path.lexists(path) or files.read_bytes(path, 100) != origin:
        raise UserError(f"{directory} contains a trial of another study: use another --workdir")


class Worker:
    """A process that trains trials of a study.

    While it runs, it holds a lock on its own file in the sweep's directory. Workers on the same
    host detect its death by the lock, workers on other hosts by its counter.
    """

    def __init__(self, study: Study, directory: Path, trials: int) -> None:
        """Prepare to train trials in the sweep's directory until `trials` are finished in total."""
        self.study = study
        self._trials = trials
        self._directory = directory / WORKERS
        self._name = uuid.uuid4().hex
        self._own: dict[int, int] = {}  # The trials that it trains: number and id.
        self._seen: dict[tuple[int, object], float] = {}  # When each counter was first seen.
        self._done = threading.Event()

    def __enter__(self) -> Self:
        make_directory(self._directory)
        self._lock = files.open_append(self._directory / self._name)
        if not files.lock_file(self._lock, wait=True):
            (self._directory / self._name).unlink()  # Others then rely on the counter.
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()
        # If the study can't be written, the file remains without a lock, and others resume the
        # trials as those of a dead worker.
        with contextlib.suppress(UserError, OSError):
            for number in list(self._own):
                self.close(number, study_lib.GIVEN_BACK)
            (self._directory / self._name).unlink()
        self._lock.close()

    def _beat(self) -> None:
        beat = 0
        while not self._done.wait(_BEAT_SECONDS):
            beat += 1
            for trial_id in list(self._own.values()):
                # The database may be temporarily unreachable. If a trial was closed meanwhile, the
                # next report of its loss fails.
                with contextlib.suppress(Exception):
                    self.study._storage.set_trial_user_attr(trial_id, study_lib.BEAT, beat)

    def next(self) -> optuna.Trial | None:
        """Return a trial to train: one whose worker died, or a new one; None if none is left."""
        for trial in list_running(self.study):
            if trial.number not in self._own and self._is_dead(trial):
                self.close(trial.number)
        for orphan in self._find_orphans():
            if resumed := self._resume(orphan):
                return resumed
        if len(list_finished(self.study)) + len(list_running(self.study)) >= self._trials:
            return None
        new = self._add({study_lib.ORIGIN: uuid.uuid4().hex})
        if sum(not is_closed(trial) for trial in self._before(new)) >= self._trials:
            self.close(new.number, study_lib.DROPPED)
            return None
        return new

    def close(self, number: int, mark: str = "") -> None:
        """Close a trial without a result, unless it is finished; set `mark` if it is our own."""
        trial_id = self._own.pop(number, None)
        with contextlib.suppress(UpdateFinishedTrialError):
            if trial_id is not None:
                self.study._storage.set_trial_user_attr(trial_id, mark, True)
            self.study.tell(number, state=TrialState.FAIL, skip_if_finished=True)

    def tell(
        self, trial: optuna.Trial, state: TrialState, loss: float | None = None, reason: str = ""
    ) -> None:
        """Record the result of a trial; do nothing if another worker has taken it over."""
        with contextlib.suppress(UpdateFinishedTrialError):
            if reason:
                trial.set_user_attr(study_lib.REASON, reason)
            self.study.tell(trial, loss, state, skip_if_finished=True)
        self._own.pop(trial.number, None)

    def _add(self, user_attrs: Mapping[str, Any], like: FrozenTrial | None = None) -> optuna.Trial:
        """Add a trial that belongs to this worker from the start."""
        like = like or optuna.trial.create_trial(state=TrialState.RUNNING)
        system_attrs = {
            name: value
            for name, value in like.system_attrs.items()
            if name in ("grid_id", "search_space") or name.startswith("completed_rung_")
        }
        template = optuna.trial.create_trial(
            state=TrialState.RUNNING,
            params=like.params,
            distributions=like.distributions,
            intermediate_values=like.intermediate_values,
            user_attrs={**user_attrs, study_lib.WORKER: f"{socket.gethostname()}/{self._name}"},
            system_attrs=system_attrs,
        )
        storage = self.study._storage
        trial_id = storage.create_new_trial(self.study._study_id, template)
        number = storage.get_trial_number_from_id(trial_id)
        # Before the next write, which may fail: `__exit__` must know of the trial.
        self._own[number] = trial_id
        if study_lib.PLACE not in user_attrs:
            first = user_attrs.get(study_lib.WORKDIR, number)
            trials = self.study.get_trials(deepcopy=False)
            place = sum(t.number < first and study_lib.RESUMES not in t.user_attrs for t in trials)
            storage.set_trial_user_attr(trial_id, study_lib.PLACE, place)
        return optuna.Trial(self.study, trial_id)

    def _before(self, trial: optuna.Trial) -> list[FrozenTrial]:
        return [t for t in self.study.get_trials(deepcopy=False) if t.number < trial.number]

    def _is_dead(self, trial: FrozenTrial) -> bool:
        """Return whether the worker of a trial is dead."""
        host, name = trial.user_attrs[study_lib.WORKER].split("/")
        path = self._directory / name
        if host == socket.gethostname() and path.is_file():
            try:
                with files.open_append(path) as file:
                    if files.lock_file(file):
                        return True
            except BlockingIOError:
                return False
            except OSError:  # It is a link.
                pass
        # Only the clock of this process is used, so the clocks of hosts may differ.
        key, now = (trial.number, trial.user_attrs.get(study_lib.BEAT)), time.monotonic()
        return now - self._seen.setdefault(key, now) > _STALE_SECONDS

    def _find_orphans(self) -> Iterator[FrozenTrial]:
        """Yield the trials that were closed without a result and that no other trial resumes."""
        trials = self.study.get_trials(deepcopy=False)
        resumed: dict[int, int] = {}  # For each trial, the first one that resumes it.
        for trial in trials:
            resumed.setdefault(trial.user_attrs.get(study_lib.RESUMES, -1), trial.number)
        for trial in trials:
            # If two trials resume the same one, the second is a duplicate in any state.
            first = resumed.get(trial.user_attrs.get(study_lib.RESUMES, -2), trial.number)
            dropped = study_lib.DROPPED in trial.user_attrs or first < trial.number
            if is_closed(trial) and trial.number not in resumed and not dropped:
                yield trial

    def _resume(self, orphan: FrozenTrial) -> optuna.Trial | None:
        """Add a trial that resumes another; return None if another worker did, or if it fails."""
        old = orphan.user_attrs
        saved_in = study_lib.get_trial_directory(self._directory.parent, orphan)
        steps = checkpoints.list_steps(saved_in / workdir.CHECKPOINTS)
        progress = [len(orphan.intermediate_values), *steps[-1:]]
        deaths, before = old.get(study_lib.DEATHS, (0, None))
        deaths = (deaths if progress == before else 0) + (study_lib.GIVEN_BACK not in old)
        kept = (study_lib.OVERRIDES, study_lib.ORIGIN, study_lib.PLACE)
        attributes = {name: value for name, value in old.items() if name in kept} | {
            study_lib.RESUMES: orphan.number,
            study_lib.WORKDIR: old.get(study_lib.WORKDIR, orphan.number),
            study_lib.DEATHS: (deaths, progress),
        }
        trial = self._add(attributes, orphan)
        if any(t.user_attrs.get(study_lib.RESUMES) == orphan.number for t in self._before(trial)):
            self.close(trial.number, study_lib.DROPPED)
            return None
        if deaths >= _MAX_DEATHS:
            self.tell(trial, TrialState.FAIL, reason=f"{deaths} workers in a row died training it")
            return None
        return trial
