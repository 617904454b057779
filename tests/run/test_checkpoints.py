"""Test which checkpoints are kept, restored, and refused if they are damaged."""

import os
import shutil
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lstm_jax.errors import UserError
from lstm_jax.run import checkpoints, workdir

PARAMS = {"w": jnp.zeros(3)}
KEY = jax.random.key(0)
STATE = {"key": KEY, "count": jnp.int32(0)}


def save(writer: checkpoints.CheckpointWriter, step: int) -> None:
    params = {"w": jnp.full(3, float(step))}
    state = {"key": jax.random.key(step), "count": jnp.int32(step)}
    writer.save(step, params, state)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return checkpoints of steps 1 and 2; step 1 has a validation loss."""
    directory = tmp_path_factory.mktemp("saved")
    writer = checkpoints.CheckpointWriter(directory)
    save(writer, 1)
    writer.record_validation(1, 2.5)
    save(writer, 2)
    return directory


def test_the_latest_two_and_the_best_are_kept_and_restored(tmp_path: Path) -> None:
    losses = {1: 3.0, 2: 1.0, 3: None, 4: 2.0, 5: float("nan"), 6: 2.5}
    directory = tmp_path / workdir.CHECKPOINTS
    writer = checkpoints.CheckpointWriter(directory)
    for step, loss in losses.items():
        (tmp_path / workdir.METRICS).write_bytes(bytes(step))
        save(writer, step)
        if loss is not None:
            writer.record_validation(step, loss)
    assert workdir.list_steps(directory) == [2, 5, 6]
    assert sorted(path.name for path in directory.iterdir()) == ["2", "5", "6"]
    params, step = checkpoints.restore_best_params(directory, PARAMS)
    assert step == 2
    np.testing.assert_array_equal(params["w"], np.full(3, 2.0))
    step, items, is_validated, sizes = checkpoints.restore_latest(directory, PARAMS, STATE)
    assert (step, is_validated, sizes) == (6, True, {"metrics.jsonl": 6})
    np.testing.assert_array_equal(items.params["w"], np.full(3, 6.0))
    assert int(items.state["count"]) == 6
    np.testing.assert_array_equal(
        jax.random.key_data(items.state["key"]), jax.random.key_data(jax.random.key(6))
    )


def test_a_checkpoint_is_on_the_disk_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: set[int] = set()
    unflushed: list[Path] = []
    sync, rename = os.fsync, Path.rename

    def note(descriptor: int) -> None:
        sync(descriptor)
        flushed.add(os.fstat(descriptor).st_ino)

    def check(path: Path, target: Path) -> Path:
        files = (file for file in path.rglob("*") if file.is_file())
        unflushed.extend(file for file in files if file.stat().st_ino not in flushed)
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(Path, "rename", check)
    writer = checkpoints.CheckpointWriter(tmp_path)
    save(writer, 1)
    assert (tmp_path / "1").is_dir() and not unflushed
    assert tmp_path.stat().st_ino in flushed, "its name, too"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x01
    path.write_bytes(content)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_skipped_for_the_one_before_it(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [path.relative_to(saved) for path in saved.glob("2/**/*") if path.is_file()]
    assert len(names) > 15
    for number, name in enumerate(names):
        directory = tmp_path / str(number)
        shutil.copytree(saved, directory)
        (truncate, flip_bit, Path.unlink)[number % 3](directory / name)
        before = snapshot(directory)

        # If the best checkpoint is damaged, a reader uses another one and changes nothing.
        (directory / "1" / checkpoints.VALIDATION).unlink()
        del before[f"1/{checkpoints.VALIDATION}"]
        params, step = checkpoints.restore_best_params(directory, PARAMS)
        assert step == 1 and float(params["w"][0]) == 1
        errors = capsys.readouterr().err
        assert f"{directory / '2'} is damaged" in errors and len(errors.splitlines()) == 1
        assert snapshot(directory) == before

        step, items, *_ = checkpoints.restore_latest(directory, PARAMS, STATE)
        assert step == 1 and float(items.params["w"][0]) == 1
        errors = capsys.readouterr().err
        assert "it is now 2.damaged" in errors and len(errors.splitlines()) == 1
        moved = {name.replace("2/", "2.damaged/"): content for name, content in before.items()}
        assert snapshot(directory) == moved, "renamed, and nothing lost"


def test_a_damaged_validation_loss_is_named(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(saved, tmp_path / "copy")
    path = tmp_path / "copy" / "1" / checkpoints.VALIDATION
    flip_bit(path)
    assert checkpoints.restore_best_params(tmp_path / "copy", PARAMS)[1] == 2
    assert f"{path} is damaged" in capsys.readouterr().err


def snapshot(directory: Path) -> dict[str, bytes]:
    """Return the content of every file."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_if_all_checkpoints_are_damaged_an_error_names_each_and_nothing_changes(
    saved: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "checkpoints"
    shutil.copytree(saved, directory)
    for step in (1, 2):
        flip_bit(directory / str(step) / "params" / "_METADATA")
    before = snapshot(directory)
    match = "step 2: params/_METADATA has changed; step 1: params/_METADATA"
    with pytest.raises(UserError, match=match):
        checkpoints.restore_latest(directory, PARAMS, STATE)
    match = "step 1: params/_METADATA has changed; step 2"
    with pytest.raises(UserError, match=match):
        checkpoints.restore_best_params(directory, PARAMS)
    assert snapshot(directory) == before
    with pytest.raises(UserError, match="no checkpoint in .* yet"):
        checkpoints.restore_best_params(tmp_path / "none", PARAMS)


def test_a_checkpoint_of_another_model_raises_an_error(saved: Path) -> None:
    for other in ({"w": jnp.zeros(4)}, {"v": jnp.zeros(3)}):
        with pytest.raises(UserError, match="does not hold the arrays of this model"):
            checkpoints.restore_best_params(saved, other)
        with pytest.raises(UserError, match="does not hold the arrays of this model"):
            checkpoints.restore_latest(saved, other, STATE)


def test_an_unfinished_save_is_deleted_and_never_read(saved: Path, tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    shutil.copytree(saved, directory)
    for name in ("3.unfinished", "4.unfinished.orbax-checkpoint-tmp"):
        shutil.copytree(saved / "2", directory / name)
    (directory / "notes.txt").write_text("of the user's")
    assert workdir.list_steps(directory) == [1, 2]
    checkpoints.CheckpointWriter(directory)
    assert {path.name for path in directory.iterdir()} == {"1", "2", "notes.txt"}


@pytest.mark.process
def test_sha256sum_can_check_the_seal(saved: Path) -> None:
    sha256sum = shutil.which("sha256sum")
    if sha256sum is None:
        pytest.skip("there is no sha256sum here")
    command = [sha256sum, "--check", "--strict", "--quiet", checkpoints.SEAL]
    subprocess.run(command, cwd=saved / "2", check=True)


@pytest.mark.slow
def test_a_reader_sees_only_whole_checkpoints_while_training_saves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    end, steps = threading.Event(), list[int]()

    def read() -> None:
        while not end.is_set():
            params, step = checkpoints.restore_best_params(tmp_path, PARAMS)
            np.testing.assert_array_equal(params["w"], np.full(3, float(step)))
            steps.append(step)

    writer = checkpoints.CheckpointWriter(tmp_path)
    save(writer, 1)
    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(read)
        for step in range(2, 20):
            save(writer, step)
            if step % 3 == 0:
                writer.record_validation(step, 1 / step)
        end.set()
        reader.result()
    assert len(set(steps)) > 3 and steps == sorted(steps)
    assert capsys.readouterr().err == "", "no checkpoint counts as damaged"


@pytest.mark.slow
def test_runs_in_one_process_save_at_the_same_time(tmp_path: Path) -> None:
    def save_all(name: str) -> list[int]:
        for number in range(8):
            save(checkpoints.CheckpointWriter(tmp_path / name), number)
        return workdir.list_steps(tmp_path / name)

    with ThreadPoolExecutor(2) as pool:
        assert [*pool.map(save_all, "ab")] == [[6, 7]] * 2
