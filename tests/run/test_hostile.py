"""Run commands on folders of models from someone else: each works, or fails with one line.

No code from the folder runs, nothing outside of it changes, and time and memory are bounded.
Each case changes one thing in a folder and reads it with a command. Some cases always run;
`draws` says how many random cases there are.
"""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pytest
from ml_collections import ConfigDict

import draws
from lstm_jax import config as config_lib
from lstm_jax import model as model_lib
from lstm_jax.convert import transfer
from lstm_jax.data import files
from lstm_jax.run import model_file, workdir

pytestmark = pytest.mark.process


ROOT = Path(__file__).parents[2]
QUICK = str(ROOT / "experiments" / "quick.py")
DRAWN = 6 * draws.TIMES
SECONDS, MEGABYTES = 60, 2000

# Import everything once, then run each command in a forked process.
SERVER = """
import contextlib, json, os, runpy, sys, time, warnings
import tensorflow_datasets, grain, safetensors.numpy
import lstm_jax.training
import lstm_jax.export.page, lstm_jax.convert.transfer
run, outside, seen = sys.argv[1:]

def audit(event, arguments):
    # Record files of the run that are executed, and writes outside of it, even if they fail.
    text = repr(arguments)
    code = event in ("import", "exec", "compile", "ctypes.dlopen", "marshal.loads", "os.system",
                     "subprocess.Popen", "os.exec", "os.posix_spawn") and run in text
    written = event == "open" and outside in text and isinstance(arguments[2], int) and (
        arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    if event == "pickle.find_class" or code or written:
        with open(seen, "a") as file:
            file.write(f"{event} {text[:300]}\\n")

for line in sys.stdin:
    module, *arguments = json.loads(line)
    began = time.monotonic()
    child = os.fork()
    if not child:
        code = 1
        with contextlib.suppress(BaseException):
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(f"{seen}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            sys.stdout = open(1, "w", closefd=False)
            sys.stderr = open(2, "w", closefd=False, buffering=1, errors="backslashreplace")
            warnings.filterwarnings("ignore", ".*found in sys.modules after import")
            sys.argv = [f"{module}.py", *arguments]
            sys.addaudithook(audit)
            try:
                runpy.run_module(f"lstm_jax.{module}", run_name="__main__", alter_sys=True)
                code = 0
            except SystemExit as end:
                code = end.code or 0
            except BaseException:
                import traceback
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    while True:
        ended, status, usage = os.wait4(child, os.WNOHANG)
        if ended:
            break
        if time.monotonic() - began > 100:
            os.kill(child, 9)
        time.sleep(0.01)
    result = [os.waitstatus_to_exitcode(status), time.monotonic() - began, usage.ru_maxrss / 1000]
    print(json.dumps(result), flush=True)
"""


class Place(NamedTuple):
    """The directories and the server of all cases.

    Attributes:
      process: The server.
      run: The folder, replaced for each case.
      outside: A directory that no command may change.
      seen: The file in which the server records forbidden events.
    """

    process: subprocess.Popen[str]
    run: Path
    outside: Path
    seen: Path


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory, data_dir: Path, shakespeare: dict[str, str]
) -> Iterator[Place]:
    base = tmp_path_factory.mktemp("hostile")
    run, outside, seen = base / "run", base / "outside", base / "seen"
    environment = {
        **os.environ,
        "HOME": str(base / "home"),
        "XDG_CACHE_HOME": str(base / "cache"),
        "TFDS_DATA_DIR": str(data_dir),
    }
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(run), str(outside), str(seen)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    yield Place(process, run, outside, seen)
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def folder(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny trained model."""
    directory = tmp_path_factory.mktemp("folder") / "tiny"
    transfer.export_folder(trained, directory, "float32")
    return directory


def snapshot(directory: Path) -> dict[str, Any]:
    """Return every path below a directory with its content and modification time."""
    return {
        str(path.relative_to(directory)): (
            path.lstat().st_mtime_ns,
            path.read_bytes() if path.is_file() and not path.is_symlink() else None,
        )
        for path in sorted(directory.rglob("*"))
    }


# Replacements for a file of a run.


def fifo(path: Path, outside: Path) -> None:
    os.mkfifo(path)


def link_outside(path: Path, outside: Path) -> None:
    path.symlink_to(outside / "canary.txt")


def link_to_its_like(path: Path, outside: Path) -> None:
    """Link to the undamaged file of this name in another run."""
    path.symlink_to(outside / "other" / path.name)


def endless(path: Path, outside: Path) -> None:
    path.symlink_to("/dev/zero")


def sparse(path: Path, outside: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**33)


def directory(path: Path, outside: Path) -> None:
    path.mkdir()


def garbage(path: Path, outside: Path) -> None:
    path.write_bytes(random.Random(0).randbytes(3000))


def deep(path: Path, outside: Path) -> None:
    path.write_text("[" * 100_000)


Kind = Callable[[Path, Path], None]
KINDS: tuple[Kind, ...] = (
    fifo, link_outside, link_to_its_like, endless, sparse, directory, garbage, deep,
)  # fmt: skip
NAMES = (workdir.CONFIG, workdir.VOCABULARY, workdir.MODEL, workdir.CHECKPOINTS, "text.txt")

# Values of a JSON field.
VALUES: tuple[Any, ...] = (
    "../../outside/place", "/dev/zero", "FIFO", "/**/*x*", "a" * 300, "a\0b", '"""', "\x1b[31m",
    "\udcff", "http://localhost:1/x", "", None, True, -1, 0, 2**31, 2**70, 1e308, float("inf"), [],
    {}, ["a", "b"], [[1], 2, 3],
)  # fmt: skip
FIELDS = [field for field, _ in config_lib.flatten(config_lib.default())]


def replace(name: str, kind: Kind) -> Callable[[Place], None]:
    def change(place: Place) -> None:
        path = place.run / name
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.parent.mkdir(exist_ok=True)
        kind(path, place.outside)

    return change


def change_fields(changes: Mapping[str, Any]) -> Callable[[Place], None]:
    """Change fields of the config, with a valid checksum."""

    def change(place: Place) -> None:
        config = files.read_json(place.run / workdir.CONFIG, 2**20)
        for field, value in changes.items():
            *parents, last = field.split(".")
            at = config
            for parent in parents:
                at = at[parent]
            at[last] = value
            if value == "FIFO":
                at[last] = str(place.run / "pipe")
                os.mkfifo(place.run / "pipe")
            elif isinstance(value, str):
                at[last] = value.replace("../../outside", str(place.outside))
        if "data.dataset" in changes:
            config["data"]["path"] = ""
        files.write_json(place.run / workdir.CONFIG, config)

    return change


def change_vocabulary(edit: Callable[[dict[str, Any]], object]) -> Callable[[Place], None]:
    def change(place: Place) -> None:
        fields = files.read_json(place.run / workdir.VOCABULARY, 2**25)
        edit(fields)
        files.write_json(place.run / workdir.VOCABULARY, fields)

    return change


def change_model(change_file: Callable[[Path, Path], object]) -> Callable[[Place], object]:
    """Change the file of the parameters."""
    return lambda place: change_file(place.run / workdir.MODEL, place.outside)


def replace_file(kind: Kind) -> Callable[[Path, Path], None]:
    def change(path: Path, outside: Path) -> None:
        path.unlink()
        kind(path, outside)

    return change


def write_header(header: bytes, length: int | None = None) -> Callable[[Path, Path], None]:
    """Replace the header of a file of parameters, and perhaps only say that it has this length."""

    def change(path: Path, outside: Path) -> None:
        content = path.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        size = len(header) if length is None else length
        path.write_bytes(size.to_bytes(8, "little") + header + content[start:])

    return change


def grow(path: Path, outside: Path) -> None:
    """Let config and header describe a terabyte, which the file does not have."""
    config = files.read_json(path.with_name(workdir.CONFIG), 2**20)
    config["model"]["hidden_size"] = 2**18
    files.write_json(path.with_name(workdir.CONFIG), config)
    model = model_lib.make_model(
        config_lib.complete_config(config).model, len(workdir.load_vocabulary(path.parent))
    )
    params = jax.eval_shape(lambda: model_lib.init_params(model, jax.random.key(0)))
    header = {
        "__metadata__": {"step": "1", "sha256": ""},
        **model_file._describe(params, "float32"),
    }
    write_header(json.dumps(header).encode())(path, outside)


def write_infinity(path: Path, outside: Path) -> None:
    trained = workdir.load_trained(path.parent)
    params = jax.tree.map(lambda x: x.at[0].set(float("inf")), trained.params)
    model_file.write_params(path, params, 1, "float32")


COMMANDS: dict[str, list[str]] = {
    "sample": ["sample", "--length=9"],
    "evaluate": ["evaluate"],
    "export": ["export", "--length=200"],
    "convert": ["convert", "--to=OUT/model.safetensors"],
    "init_from": ["main", "--config", QUICK],
}

Change = Callable[[Place], object]
CASES: dict[str, tuple[Change, str]] = {
    "a token of 10 MB": (
        change_vocabulary(lambda v: v.update(kind="words", units=[*v["units"][:-1], "x" * 10**7])),
        "sample",
    ),
    "bytes with a surrogate": (
        change_vocabulary(lambda v: v.update(kind="bytes", units=["", "[UNK]", *"\ud800abc"])),
        "sample",
    ),
    **{
        f"model: {kind.__name__}": (change_model(replace_file(kind)), command)
        for kind, command in (
            (fifo, "sample"), (link_outside, "evaluate"), (endless, "init_from"),
            (sparse, "sample"), (directory, "convert"), (garbage, "export"),
        )
    },
    "model: deep": (change_model(write_header(b"[" * 100_000)), "sample"),
    "model: a list": (change_model(write_header(b"[1]")), "sample"),
    "model: metadata": (change_model(write_header(b'{"__metadata__": 1}')), "sample"),
    "model: a header of 2**63 bytes": (change_model(write_header(b"{}", 2**63)), "sample"),
    "model: a terabyte": (change_model(grow), "sample"),
    "model: not finite": (change_model(write_infinity), "evaluate"),
}  # fmt: skip


def add_rounds(rounds: int, layers: int) -> Change:
    fields = {"cell": "mogrifier", "options": {"rounds": rounds}, "num_layers": layers}
    return change_fields({f"model.{name}": value for name, value in fields.items()})


# What a few bytes of a config or a text may cost.
COMMANDS["sample 500"] = ["sample", "--length=500"]
CASES |= {
    "tokens of 30 MB": (
        change_vocabulary(
            lambda v: v.update(
                kind="words", units=[" " + "x" * (3 * 10**7) if u == " " else u for u in v["units"]]
            )
        ),
        "sample 500",
    ),
    "endless rounds": (add_rounds(10**5, 1), "sample"),
    "rounds and layers": (add_rounds(100, 100), "sample"),
}
_kind: Kind
_random = random.Random(draws.SEED)
for _name, _kind, _command in (
    (workdir.CONFIG, link_to_its_like, "sample"),
    (workdir.CONFIG, sparse, "sample"),
    (workdir.VOCABULARY, endless, "sample"),
    ("text.txt", endless, "export"),
):
    CASES[f"{_name}: {_kind.__name__}, {_command}"] = (replace(_name, _kind), _command)

for _number in range(DRAWN):
    _command = _random.choice(list(COMMANDS))
    if _random.random() < 0.5:
        _name, _kind = _random.choice(NAMES), _random.choice(KINDS)
        CASES[f"{_number}: {_name} {_kind.__name__}, {_command}"] = (
            replace(_name, _kind), _command,
        )  # fmt: skip
    else:
        _field, _value = _random.choice(FIELDS), _random.choice(VALUES)
        CASES[f"{_number}: {_field} {ascii(_value)[:20]}, {_command}"] = (
            change_fields({_field: _value}), _command,
        )  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.drawn
def test_a_hostile_folder(
    name: str, place: Place, folder: Path, text_file: Path, tmp_path: Path
) -> None:
    change, command = CASES[name]
    for path in (place.run, place.outside):
        shutil.rmtree(path, ignore_errors=True)
    place.seen.unlink(missing_ok=True)
    shutil.copytree(folder, place.run)
    place.outside.mkdir()
    (place.outside / "canary.txt").write_text("nobody may change this")
    shutil.copytree(folder, place.outside / "other")
    shutil.copy(text_file, place.run / "text.txt")
    change_fields({"data.path": str(place.run / "text.txt")})(place)
    flags = list_flags(workdir.load_config(place.run))
    change(place)
    before = snapshot(place.outside)

    module, *arguments = [word.replace("OUT", str(tmp_path)) for word in COMMANDS[command]]
    arguments.append(f"--workdir={tmp_path / 'new' if command == 'init_from' else place.run}")
    if command == "init_from":
        arguments.append(f"--init_from={place.run}")
    if module == "main":
        arguments += [*flags, "--config.num_epochs=3", "--config.max_steps=1"]
    code, seconds, megabytes = run_command(place, module, arguments)

    lines = Path(f"{place.seen}.err").read_text(errors="replace").splitlines()
    assert not place.seen.exists(), place.seen.read_text()
    assert snapshot(place.outside) == before
    errors = [line for line in lines if not line.startswith(("warning: ", "reading "))]
    assert code in (0, 2), lines
    assert len(errors) == (code == 2) and all(line.startswith("error: ") for line in errors), lines
    assert all(line.isprintable() for line in lines)
    assert seconds < SECONDS and megabytes < MEGABYTES
    if command == "evaluate" and code == 0:
        json.loads(
            Path(f"{place.seen}.out").read_text(), parse_constant=lambda word: pytest.fail(word)
        )


def run_command(place: Place, module: str, arguments: list[str]) -> list[Any]:
    """Run a command; return its exit code, seconds and megabytes."""
    assert place.process.stdin is not None and place.process.stdout is not None
    place.process.stdin.write(json.dumps([module, *arguments]) + "\n")
    place.process.stdin.flush()
    result: list[Any] = json.loads(place.process.stdout.readline())
    return result


def list_flags(config: ConfigDict) -> list[str]:
    """Return the fields of the run as flags."""
    fields = config_lib.flatten(config)
    return [f"--config.{name}={value}" for name, value in fields if name != "data.sha256"]
