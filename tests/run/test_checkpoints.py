"""Test which checkpoints are kept, restored, and refused if they are damaged."""

import errno
import gc
import json
import os
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import disks
import runs
from lstm_jax import model as model_lib
from lstm_jax.errors import UserError
from lstm_jax.run import checkpoints, seal

PARAMS = {"w": jnp.zeros(3)}
KEY = jax.random.key(0)
STATE = {"key": KEY, "count": jnp.int32(0)}


def save(writer: checkpoints.CheckpointWriter, step: int) -> None:
    params = {"w": jnp.full(3, float(step))}
    state = {"key": jax.random.key(step), "count": jnp.int32(step)}
    writer.save(step, params, state, {"metrics.jsonl": step})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return checkpoints of steps 1 and 2; step 1 has a validation loss."""
    directory = tmp_path_factory.mktemp("saved")
    with checkpoints.CheckpointWriter(directory) as writer:
        save(writer, 1)
        writer.record_validation(1, 2.5)
        save(writer, 2)
    return directory


def test_the_latest_two_and_the_best_are_kept_and_restored(tmp_path: Path) -> None:
    losses = {1: 3.0, 2: 1.0, 3: None, 4: 2.0, 5: float("nan"), 6: 2.5}
    with checkpoints.CheckpointWriter(tmp_path) as writer:
        for step, loss in losses.items():
            save(writer, step)
            if loss is not None:
                writer.record_validation(step, loss)
    assert checkpoints.list_steps(tmp_path) == [2, 5, 6]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "5", "6"]
    params, step = checkpoints.restore_best_params(tmp_path, PARAMS)
    assert step == 2
    np.testing.assert_array_equal(params["w"], np.full(3, 2.0))
    restored = checkpoints.restore_latest(tmp_path, PARAMS, STATE)
    assert restored is not None
    step, items = restored
    assert step == 6 and items.history == {"metrics.jsonl": 6}
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
    with checkpoints.CheckpointWriter(tmp_path) as writer:
        save(writer, 1)
    assert (tmp_path / "1").is_dir() and not unflushed
    assert tmp_path.stat().st_ino in flushed, "its name, too"


def test_a_checkpoint_that_can_not_be_deleted_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On network disks, a directory stays while a reader has one of its files open."""

    def refuse(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError(errno.ENOTEMPTY, "Directory not empty")

    monkeypatch.setattr(checkpoints.shutil, "rmtree", refuse)
    for first in (1, 4):
        with checkpoints.CheckpointWriter(tmp_path) as writer:
            for step in range(first, first + 3):
                save(writer, step)
    assert checkpoints.list_steps(tmp_path) == [5, 6]


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

        restored = checkpoints.restore_latest(directory, PARAMS, STATE)
        assert restored is not None and restored[0] == 1 and float(restored[1].params["w"][0]) == 1
        errors = capsys.readouterr().err
        assert "it is now 2.damaged" in errors and len(errors.splitlines()) == 1
        moved = {name.replace("2/", "2.damaged/"): content for name, content in before.items()}
        assert snapshot(directory) == moved, "renamed, and nothing lost"


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
        flip_bit(directory / str(step) / "params" / "w" / ".zarray")
    before = snapshot(directory)
    match = "step 2: params/w/.zarray has changed; step 1: params/w/.zarray"
    with pytest.raises(UserError, match=match):
        checkpoints.restore_latest(directory, PARAMS, STATE)
    match = "step 1: params/w/.zarray has changed; step 2"
    with pytest.raises(UserError, match=match):
        checkpoints.restore_best_params(directory, PARAMS)
    assert snapshot(directory) == before
    assert checkpoints.restore_latest(tmp_path / "none", PARAMS, STATE) is None
    with pytest.raises(UserError, match="no checkpoint in .* yet"):
        checkpoints.restore_best_params(tmp_path / "none", PARAMS)


def test_damaged_checkpoints_get_unique_names(saved: Path, tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    shutil.copytree(saved, directory)
    for _ in range(2):
        shutil.copytree(saved / "2", directory / "2", dirs_exist_ok=True)
        (directory / "2" / seal.SEAL).write_text("")
        checkpoints.restore_latest(directory, PARAMS, STATE)
    assert {path.name for path in directory.iterdir()} == {"1", "2.damaged", "2.damaged-2"}


def test_a_checkpoint_of_another_model_raises_an_error(saved: Path) -> None:
    for other in ({"w": jnp.zeros(4)}, {"v": jnp.zeros(3)}):
        with pytest.raises(UserError, match="does not hold the model that the config describes"):
            checkpoints.restore_best_params(saved, other)
        with pytest.raises(UserError, match="does not hold the model that the config describes"):
            checkpoints.restore_latest(saved, other, STATE)


def test_a_checkpoint_of_other_code_names_what_differs(saved: Path) -> None:
    more = {**STATE, "optimizer": (optax.EmptyState(), optax.TraceState({"w": jnp.zeros(3)}))}
    for state, message in ((more, r"lacks optimizer\.1\.trace\.w"), ({"key": KEY}, "has count")):
        with pytest.raises(UserError, match=f"2 {message}, unlike that of this code: .*init_from"):
            checkpoints.restore_latest(saved, PARAMS, state)


def test_an_array_that_was_masked_is_missing(tmp_path: Path) -> None:
    with checkpoints.CheckpointWriter(tmp_path) as writer:
        state: dict[str, Any] = {**STATE, "optimizer": optax.TraceState({"w": optax.MaskedNode()})}
        writer.save(1, PARAMS, state, {"metrics.jsonl": 1})
    state["optimizer"] = optax.TraceState({"w": jnp.zeros(3)})
    with pytest.raises(UserError, match="1 lacks optimizer.trace.w, unlike that of this code"):
        checkpoints.restore_latest(tmp_path, PARAMS, state)


def test_an_unfinished_save_is_deleted_and_never_read(saved: Path, tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    shutil.copytree(saved, directory)
    for name in ("3.unfinished", "4.unfinished.orbax-checkpoint-tmp"):
        shutil.copytree(saved / "2", directory / name)
    (directory / "notes.txt").write_text("of the user's")
    assert checkpoints.list_steps(directory) == [1, 2]
    checkpoints.CheckpointWriter(directory)
    assert {path.name for path in directory.iterdir()} == {"1", "2", "notes.txt"}


@pytest.mark.process
def test_sha256sum_can_check_the_seal(saved: Path) -> None:
    sha256sum = shutil.which("sha256sum")
    if sha256sum is None:
        pytest.skip("there is no sha256sum here")
    command = [sha256sum, "--check", "--strict", "--quiet", seal.SEAL]
    subprocess.run(command, cwd=saved / "2", check=True)


@pytest.mark.slow
def test_a_reader_sees_only_whole_checkpoints_while_training_saves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = threading.Event()
    seen: list[int] = []
    failures: list[BaseException] = []

    def read() -> None:
        try:
            while not done.is_set():
                params, step = checkpoints.restore_best_params(tmp_path, PARAMS)
                np.testing.assert_array_equal(params["w"], np.full(3, float(step)))
                seen.append(step)
        except BaseException as error:
            failures.append(error)

    with checkpoints.CheckpointWriter(tmp_path) as writer:
        save(writer, 1)
        writer.wait()
        reader = threading.Thread(target=read)
        reader.start()
        for step in range(2, 20):
            save(writer, step)
            if step % 3 == 0:
                writer.record_validation(step, 1 / step)
        done.set()
        reader.join()
    assert not failures
    assert len(set(seen)) > 3 and seen == sorted(seen)
    assert capsys.readouterr().err == "", "no checkpoint counts as damaged"


def test_a_modified_validation_loss_is_ignored(saved: Path, tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    shutil.copytree(saved, directory)
    assert checkpoints.find_best_step(directory) == 1
    path = directory / "1" / checkpoints.VALIDATION
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "loss": 0.5}))
    assert checkpoints.find_best_step(directory) == 2


@pytest.mark.parametrize("name", ["5.unfinished", "7", "2147483648", "9" * 100])
def test_a_file_in_the_place_of_a_checkpoint_raises_an_error(
    name: str, saved: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "checkpoints"
    shutil.copytree(saved, directory)
    (directory / name).write_text("mine")
    with pytest.raises(UserError, match=f"{directory / name} is not a checkpoint: move it away"):
        checkpoints.CheckpointWriter(directory)
    assert (directory / name).read_text() == "mine"
    assert checkpoints.list_steps(directory) == [1, 2]


def test_a_checkpoint_with_nonfinite_parameters_is_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs.save_params(tmp_path, 1, {"w": jnp.ones(3)})
    runs.save_params(tmp_path, 2, {"w": jnp.array([1, jnp.inf, 0])})
    _, step = checkpoints.restore_best_params(tmp_path, PARAMS)
    assert step == 1
    assert "2 is damaged (its parameters are not finite)" in capsys.readouterr().err


def test_a_small_checkpoint_does_not_decompress_to_a_large_one(tmp_path: Path) -> None:
    many = jnp.zeros((5000, 5000))
    runs.save_params(tmp_path, 1, {"w": many})
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 10**5
    with pytest.raises(UserError, match="can't hold the 100,000,000 bytes of the expected"):
        checkpoints.restore_best_params(tmp_path, jax.eval_shape(lambda: {"w": many}))


def save_and_change(directory: Path, changes: dict[str, bytes]) -> str:
    """Save an array `w` of zeros, change files, seal it; return the damage that is found."""
    runs.save_params(directory, 1, PARAMS)
    for name, content in changes.items():
        (directory / "1" / "params" / name).write_bytes(content)
    seal.seal_checkpoint(directory / "1")
    return str(seal.find_damage(directory / "1", PARAMS))


def make_metadata(**changes: Any) -> bytes:
    metadata = {"shape": [3], "chunks": [3], "dtype": "<f4", "zarr_format": 2, "order": "C"}
    also = {"compressor": {"id": "zstd", "level": 1}, "filters": None, "fill_value": None}
    return json.dumps({**metadata, **also, **changes}).encode()


@pytest.mark.parametrize(
    ("changes", "damage"),
    [
        ({}, "None"),
        ({"other": b"1"}, "None"),
        ({"w/.zarray": make_metadata(chunks=[4])}, "chunks of params/w are larger than the array"),
        ({"w/.zarray": make_metadata(shape=[2**40], chunks=[2**40])}, "its arrays are too large"),
        ({"w/.zarray": make_metadata(shape=[2**17], chunks=[1])}, "params/w has too many chunks"),
        ({"w/.zarray": make_metadata(compressor=None)}, "w is not compressed by zstd"),
        ({"w/.zarray": make_metadata(compressor={"id": "blosc"})}, "w is not compressed by zstd"),
        ({"w/.zarray": make_metadata() + 2**24 * b" "}, "w/.zarray is too large"),
        ({"_METADATA": b'{"use_ocdbt": true}'}, "params is not in directories of Zarr 2"),
        ({"manifest.ocdbt": b""}, "params is not in directories of Zarr 2"),
    ],
)  # fmt: skip
def test_arrays_that_could_fill_the_memory_are_damage(
    changes: dict[str, bytes], damage: str, tmp_path: Path
) -> None:
    assert damage in save_and_change(tmp_path, changes)


@pytest.mark.slow
def test_arrays_of_any_kind_are_no_damage(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    text = np.tile(np.frombuffer(Path(__file__).read_bytes()[:8000], np.uint8), 500)
    arrays = {
        "noise": draw.normal(size=10**6).astype(np.float32),
        "zeros": np.zeros((3, 10**6), np.float32),
        "mixed": np.where(np.arange(10**6) // 10_000 % 2, draw.normal(size=10**6), 0.0),
        "text": text,
        "small": np.arange(51, dtype=np.float32),
        "scalar": np.float32(1),
        "half": jnp.ones(1000, jnp.bfloat16),
        **{f"{i}": np.full(300, i, np.float32) for i in range(500)},
    }
    runs.save_params(tmp_path, 1, arrays)
    assert seal.find_damage(tmp_path / "1", arrays) is None


def test_hidden_files_are_checked_but_need_no_checksum(tmp_path: Path) -> None:
    runs.save_params(tmp_path, 1, PARAMS)
    hidden = tmp_path / "1" / "params" / ".DS_Store"
    hidden.write_bytes(b"of a file manager")
    assert seal.find_damage(tmp_path / "1", PARAMS) is None
    with hidden.open("r+b") as file:
        file.truncate(2**34)
    assert "is too large" in str(seal.find_damage(tmp_path / "1", PARAMS))
    hidden.unlink()
    hidden.symlink_to(__file__)
    assert "is not a regular file" in str(seal.find_damage(tmp_path / "1", PARAMS))


def test_more_bytes_than_such_a_model_can_have_are_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs.save_params(tmp_path, 1, PARAMS)
    monkeypatch.setattr(seal, "_BYTES_BEYOND", 0)
    with pytest.raises(UserError, match="too large for such a model"):
        checkpoints.restore_best_params(tmp_path, PARAMS)


def test_large_finite_parameters_are_saved_and_restored(tmp_path: Path) -> None:
    # The sum of the squares overflows float32, no single square does.
    params = {"w": jnp.full(10_000, 9e17)}
    assert model_lib.is_finite(params)
    runs.save_params(tmp_path, 1, params)
    _, step = checkpoints.restore_best_params(tmp_path, params)
    assert step == 1


@pytest.mark.slow
def test_runs_in_one_process_save_at_the_same_time(tmp_path: Path) -> None:
    errors: list[UserError] = []

    def save_all(directory: Path) -> None:
        try:
            for number in range(8):
                with checkpoints.CheckpointWriter(directory) as writer:
                    save(writer, number)
        except UserError as error:
            errors.append(error)

    for name in "ab":
        (tmp_path / name).mkdir()
    threads = [
        threading.Thread(target=save_all, args=(tmp_path / name,), daemon=True) for name in "ab"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    assert [checkpoints.list_steps(tmp_path / name) for name in "ab"] == [[6, 7]] * 2


@pytest.mark.process
def test_a_save_that_fails_prints_nothing_and_says_what_to_do(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        disks.mounted(tmp_path / "disk", "-o", "size=1m") as disk,
        checkpoints.CheckpointWriter(disk / "checkpoints") as writer,
    ):
        save(writer, 1)
        writer.wait()
        for step, advice in (
            (2, "the last good one is step 1: .*, then resume from there with the same command$"),
            (3, "there is none before it: .*, then start again with the same command$"),
        ):
            disks.fill(disk)
            with pytest.raises(UserError, match=advice):
                save(writer, step)
                writer.wait()
            shutil.rmtree(disk / "checkpoints" / "1", ignore_errors=True)
    gc.collect()  # asyncio logs the exception of a future that nobody asked for.
    assert not caplog.records
