"""Test the loop and its observers one by one, without a training."""

import dataclasses
import functools
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from lstm_jax import config as config_lib
from lstm_jax import training
from lstm_jax.devices import hosts
from lstm_jax.run import interrupts, observers, progress
from lstm_jax.run.loop import Loop, Observer
from lstm_jax.run.plan import Plan
from lstm_jax.run.profiler import Profiler
from lstm_jax.run.signals import Pacer, Stopped, StopRequest
from lstm_jax.train_step import TrainState


def make_state(**counters: float) -> TrainState:
    """Return a state without parameters, whose counters are 0 unless given."""
    names = ("loss_sum", "norm_sum", "loss_steps", "skipped", "first_skipped", "step")
    values: dict[str, Any] = {name: jnp.asarray(counters.get(name, 0)) for name in names}
    return TrainState({}, None, (), (), jax.random.key(0), **values)


def make_loop(step: int, **counters: float) -> Loop:
    return Loop(make_state(**counters), step, last_step=140)


@dataclasses.dataclass
class _FakeRun:
    """The part of a `Session` that observers use; it has 70 steps per epoch."""

    directory: Path
    fields: dict[str, Any]
    is_validated: bool = False
    is_saving: bool = False

    def __post_init__(self) -> None:
        self.config = config_lib.complete_config({"num_epochs": 2, **self.fields})
        self.plan = Plan(self.config, 70)
        self.loop = make_loop(0)
        self.ids = {"validation": [0, 1, 2, 3]}
        self.model, self.mesh, self.vocabulary = None, None, ()
        self.checkpoints = SimpleNamespace(
            check=lambda: self.is_saving,
            wait=lambda: self.log.append("waited"),
            record_validation=lambda step, loss: self.log.append(("validated", step, loss)),
        )
        self.log: list[Any] = []

    def print(self, text: str) -> None:
        assert text == "validation"

    def save(self, step: int, state: TrainState) -> None:
        self.log.append(("saved", step))

    def record(
        self, step: int, split: str, loss: float, sample: str = "", **numbers: float
    ) -> None:
        self.log.append((step, split, loss, *numbers.values()))

    def ends_early(self) -> bool:
        return False


def make_run(directory: Path, **fields: Any) -> Any:
    """Return a run whose `log` lists what observers write."""
    return _FakeRun(directory, fields)


class _Note(Observer):
    """Notes the steps at which it is called, and ends the loop at one of them."""

    def __init__(self, notes: list[Any], name: str, end: int = 1000) -> None:
        self.notes, self.name, self.end = notes, name, end

    def before_first_step(self, loop: Loop) -> None:
        self.notes.append((self.name, loop.step, "first"))

    def after_step(self, loop: Loop) -> None:
        self.notes.append((self.name, loop.step))
        loop.last_step = min(loop.last_step, self.end)


def take_steps(last_step: int, end: int = 1000) -> list[Any]:
    """Return the calls of two observers, and the batches, of steps that count batches."""
    notes: list[Any] = []
    plan = Plan(config_lib.Config(), 70)
    state: Any = make_state()
    loop = Loop(state._replace(step=0), 0, last_step)
    watching = [_Note(notes, "a"), _Note(notes, "b", end)]

    def next_batch(steps: int) -> int:
        notes.append(steps)
        return steps

    def train_step(state: TrainState, batch: Any) -> TrainState:
        return state._replace(step=state.step + batch)

    training.take_steps(loop, train_step, next_batch, plan, watching)
    assert loop.state.step == loop.step == min(last_step, end)
    return notes


def test_observers_are_called_in_their_order_before_the_first_step_and_after_each() -> None:
    first = [("a", 0, "first"), ("b", 0, "first")]
    assert take_steps(2) == [*first, 1, ("a", 1), ("b", 1), 1, ("a", 2), ("b", 2)]
    assert take_steps(0) == first
    assert take_steps(5, end=1) == [*first, 1, ("a", 1), ("b", 1)], "an observer ended it"


class Clock:
    """A clock that is set by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_the_speed_is_that_of_the_steps_after_the_first_call(clock: Clock) -> None:
    measured = progress.Progress(10, 140, 70, True)
    clock.now += 50  # It compiles.
    measured.after_step(make_loop(11))
    assert measured.measure_speed(11) == 0
    clock.now += 2
    measured.after_step(make_loop(15))
    assert measured.measure_speed(15) == 2
    measured.start_clock(15)  # After a validation.
    clock.now += 1
    assert measured.measure_speed(18) == 3


def test_a_row_has_the_means_since_the_last_one(tmp_path: Path, clock: Clock) -> None:
    run = make_run(tmp_path, optimizer={"warmup_steps": 20})
    display = progress.Progress(0, 140, 70, True)
    log = observers.Log(run, display)
    loop = make_loop(9, loss_sum=6.0, norm_sum=3.0, loss_steps=3, skipped=1)
    log.after_step(loop)
    assert run.log == [] and float(loop.state.loss_sum) == 6
    loop.step = 10
    clock.now += 5
    log.after_step(loop)
    tokens_per_second = 2 * run.config.batches.batch_size * run.config.batches.window_length
    rate = pytest.approx(0.4 * run.config.optimizer.learning_rate)  # One of ten was skipped.
    assert run.log == [(10, "train", 2.0, rate, 1.0, tokens_per_second)]
    assert (
        float(loop.state.loss_sum) == float(loop.state.norm_sum) == int(loop.state.loss_steps) == 0
    )
    loop.step = 20
    log.after_step(loop)
    assert len(run.log) == 1, "all steps were skipped"
    display.close()


def test_a_checkpoint_is_saved_before_validations_and_when_the_time_is_over(
    tmp_path: Path, clock: Clock
) -> None:
    run = make_run(tmp_path, checkpoint_every_seconds=60.0)
    save = observers.Save(run)

    def saves(step: int, seconds: float = 0, is_saving: bool = False, in_step: bool = True) -> bool:
        clock.now += seconds
        run.is_saving, before = is_saving, len(run.log)
        loop = make_loop(step)
        loop.in_step = in_step
        save.after_step(loop)
        return run.log[before:] == [("saved", step)]

    assert not saves(1, 59)
    assert not saves(2, 1, is_saving=True) and not saves(3, in_step=False)
    assert saves(4)
    assert not saves(5, 59) and saves(6, 1)
    assert saves(70, in_step=False, is_saving=True), "before the validation"
    save.save_once(make_loop(70))
    assert run.log[-1] == ("saved", 70) != run.log[-2], "only once"


@pytest.fixture
def validated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the measurement of a loss and the generation of a text."""
    monkeypatch.setattr(observers.parallel, "gather_on_one_device", lambda tree, mesh: tree)
    monkeypatch.setattr(observers.loss_lib, "compute_loss", lambda *unused: 1.5)
    monkeypatch.setattr(observers, "generate_sample", lambda *unused: "text")
    monkeypatch.setattr(observers.messages, "describe_validation", lambda run, *row: "validation")
    monkeypatch.setattr(observers, "plot_curves", lambda run: run.log.append("plotted"))
    monkeypatch.setattr(observers.advice, "find_suspicion", lambda *unused: None)


def make_validate(run: Any, stop: StopRequest) -> observers.Validate:
    display = progress.Progress(0, 140, 70, True)
    return observers.Validate(run, display, stop)


@pytest.mark.usefixtures("validated")
def test_a_loop_is_validated_when_it_is_due_and_when_its_checkpoint_was(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    validate = make_validate(run, StopRequest())
    validate.before_first_step(make_loop(33))
    validate.after_step(make_loop(69))
    assert run.log == []
    validate.before_first_step(make_loop(0))
    assert run.log == ["waited", (0, "validation", 1.5), ("validated", 0, 1.5)]
    validate.after_step(make_loop(70))
    noted = [(70, "validation", 1.5), ("validated", 70, 1.5), "plotted"]
    assert run.log[3:] == ["waited", *noted], "the row is of a complete checkpoint"
    assert (tmp_path / "samples.txt").read_text().count("text") == 2
    run.is_validated, run.log = True, []
    validate.before_first_step(make_loop(33))
    assert run.log[1] == (33, "validation", 1.5)


@pytest.mark.usefixtures("validated")
def test_a_signal_aborts_a_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, stop = make_run(tmp_path), StopRequest()

    def interrupt(*unused: Any) -> None:
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("it is measured to the end")

    monkeypatch.setattr(observers.loss_lib, "compute_loss", interrupt)
    with interrupts.handle_signals(stop.handle_signal), pytest.raises(Stopped, match="143"):
        make_validate(run, stop).after_step(make_loop(70))
    assert run.log == []


def test_a_signal_stops_a_loop_only_where_processes_agree() -> None:
    stop = StopRequest()
    with interrupts.handle_signals(stop.handle_signal):
        stop.before_first_step(make_loop(0))
        signal.raise_signal(signal.SIGINT)
        loop = make_loop(5)
        loop.in_step = False
        stop.after_step(loop)
        with pytest.raises(Stopped, match="130"):
            stop.after_step(make_loop(6))
        loop.step = loop.last_step
        with pytest.raises(Stopped, match="130"):
            stop.after_step(loop)


def test_processes_agree_only_when_they_have_waited_for_the_device(
    monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    pacer = Pacer(0)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(hosts, "max_over_processes", lambda value: max(value, 250))
    agreed = []
    loop = make_loop(0)
    for loop.step in range(1, 14):
        pacer.after_step(loop)
        agreed += [loop.step] * loop.in_step
    assert agreed == [1, 5], "a step took 250 ms, then 4 steps 250 ms"
    monkeypatch.setattr(jax, "process_count", lambda: 1)
    pacer.after_step(loop)
    assert loop.in_step, "one process agrees with itself"


def test_few_steps_are_in_flight_on_several_cpu_devices(
    monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    waits: list[int] = []
    loop = make_loop(0)
    monkeypatch.setattr(jax, "block_until_ready", lambda array: waits.append(loop.step))
    monkeypatch.setattr(hosts, "max_over_processes", lambda value: 1)
    device = jax.devices("cpu")[0]
    for devices, expected in (([device], [1, 1001]), ([device, device], [1, 17, 33, 49])):
        waits.clear()
        monkeypatch.setattr(jax, "local_devices", functools.partial(list, devices))
        pacer = Pacer(0)
        for loop.step in range(1, expected[-1] + 10):
            pacer.after_step(loop)
        assert waits == expected


def test_five_steps_are_traced_after_three(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int]] = []
    loop = make_loop(20)
    monkeypatch.setattr(jax.profiler, "start_trace", lambda path: calls.append((path, loop.step)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append(("stop", loop.step)))
    for directory in (None, tmp_path):
        profiler = Profiler(directory, 20)
        for loop.step in range(21, 40):
            profiler.after_step(loop)
        profiler.close()
    assert calls == [(str(tmp_path), 23), ("stop", 28)]
