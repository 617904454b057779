"""Shared fixtures: the text, and a tiny trained model."""

import fcntl
import importlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import jax
import jaxlib
import jaxtyping
import pytest
import tensorflow_datasets as tfds
from ml_collections import ConfigDict

import commands
import draws
import lstm_jax
import runs
from lstm_jax import config as config_lib
from lstm_jax import errors, training
from lstm_jax.data import files, texts
from lstm_jax.ops import native

# A shell that runs the tests in the background ignores SIGINT, and all processes that they start
# would inherit this.
signal.signal(signal.SIGINT, signal.default_int_handler)

errors.show_log()  # As in commands, so that tests of functions find warnings there, too.

# Compiled programs are kept for the next run of the tests: compiling takes most of their time.
# `pytest --cache-clear` removes them.
_COMPILED = Path(__file__).parents[1] / ".pytest_cache" / "d" / f"compiled-{jaxlib.__version__}"
_MOST_BYTES = 2**31
_TEXT = _COMPILED.with_name("input.txt")  # The name that a user's copy must have.
_SETTINGS = {
    # JAX warns of a GPU for which it isn't installed.
    "jax_platforms": os.environ.get("JAX_PLATFORMS", "cpu"),
    "jax_compilation_cache_dir": str(_COMPILED),
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": 0,
    # Tiny models run no faster if XLA optimizes them, which takes longer than to run them. Before a
    # release, `make thorough` tests the programs that users run.
    "jax_disable_most_optimizations": draws.TIMES == 1,
}
for _name, _value in _SETTINGS.items():
    jax.config.update(_name, _value)
    os.environ[_name.upper()] = str(_value)
if draws.TIMES == 1 and jaxlib.__version__.startswith("0.10."):
    # Without these emitters, which later versions always use, XLA compiles a step in a third of the
    # time; and in a tenth less without dividing a program among threads.
    _faster = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_faster}".strip()


hypothesis.settings.register_profile(
    "lstm_jax",
    max_examples=60 * draws.TIMES,
    deadline=None,
    derandomize=draws.TIMES == 1,
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.load_profile("lstm_jax")

# The cache directory of the user, with the library in C.
_is_worker = "PYTEST_XDIST_WORKER" in os.environ  # It inherits the directory.
if not _is_worker:
    _cache = tempfile.TemporaryDirectory(prefix="lstm-jax-cache-")
    os.environ["XDG_CACHE_HOME"] = _cache.name
# Matplotlib keeps its list of fonts there. Making it starts a process, so no test may be the first.
os.environ["MPLCONFIGDIR"] = str(_COMPILED.with_name("matplotlib"))
importlib.import_module("matplotlib.font_manager")
native.load_library()  # Compiling it starts a process, too.
jax.devices()  # One CPU device: the first command would make more.


# Events of starting a process: a test that causes one needs the marker `process`.
_STARTS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.exec", "os.system"}
_may_start = True


def _audit(event: str, arguments: tuple[object, ...]) -> None:
    if event in _STARTS and not _may_start:
        raise AssertionError(f"{event} of {arguments[:2]} in a test without the marker `process`")


sys.addaudithook(_audit)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Let only tests with the marker `process` start processes."""
    global _may_start
    _may_start = item.get_closest_marker("process") is not None
    try:
        return (yield)
    finally:
        _may_start = True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the slowest tests first, so that no worker runs one alone at the end.

    The lesson takes longest, and another worker would have to run it again for its tests.
    """

    def rank(item: pytest.Item) -> int:
        is_slow = any(map(item.get_closest_marker, ("process", "slow")))
        return 0 if item.path.name == "test_notebook.py" else 1 if is_slow else 2

    items.sort(key=rank)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Remove the compiled programs when there are too many."""
    if hasattr(session.config, "workerinput"):
        return
    for path in _COMPILED.parent.glob("compiled-*"):
        if sum(file.stat().st_size for file in path.iterdir()) > _MOST_BYTES:
            shutil.rmtree(path)


# Tests of the numeric core that pass NaN, or arrays of other ranks, on purpose or to Flax.
_NOT_STRICT = "accelerator", "activations", "layers", "ops"


@pytest.fixture(autouse=True)
def strict_core(request: pytest.FixtureRequest) -> Iterator[None]:
    """In tests of the numeric core, raise an error at NaN, and if shapes differ in rank."""
    path = request.path
    if path.parent.name != "core" or path.stem.removeprefix("test_") in _NOT_STRICT:
        yield
        return
    with jax.numpy_rank_promotion("raise"), jax.debug_nans(True):
        yield


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Do not check arrays against annotations: a user's arrays aren't."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def make_once(
    name: str, tmp_path_factory: pytest.TempPathFactory, make: Callable[[Path], object]
) -> Path:
    """Return a path that one of the workers of pytest-xdist makes, for all of them to read."""
    root = tmp_path_factory.getbasetemp()
    path = (root.parent if _is_worker else root) / name
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            make(path)
    return path


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a data directory in which the text is prepared once, and found after the first run."""
    directory = tmp_path_factory.mktemp("tensorflow_datasets")
    if _TEXT.exists():
        shutil.copy(_TEXT, directory)
    return directory


@pytest.fixture(scope="session")
def shakespeare(data_dir: Path) -> dict[str, str]:
    """Return the splits of Tiny Shakespeare."""
    splits = texts.read_splits(config_lib.DataConfig(directory=str(data_dir)))
    if not _TEXT.exists():
        _TEXT.parent.mkdir(parents=True, exist_ok=True)
        files.write_file(_TEXT, "".join(splits.values()).encode())
    return splits


@pytest.fixture(scope="session")
def tfds_dir(tmp_path_factory: pytest.TempPathFactory, shakespeare: dict[str, str]) -> Path:
    """Return a data directory in which TFDS has prepared Tiny Shakespeare."""

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        """TFDS's tiny_shakespeare 1.0.0, whose own builder needs TensorFlow."""

        name = "tiny_shakespeare"
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> tfds.core.DatasetInfo:
            features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {name: iter([(name, {"text": text})]) for name, text in shakespeare.items()}

        def _generate_examples(self, **kwargs: Any) -> Any:
            raise NotImplementedError

    directory = tmp_path_factory.mktemp("tfds")
    Builder(data_dir=directory, file_format="array_record").download_and_prepare()
    return directory


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory, shakespeare: dict[str, str]) -> Path:
    """Return a file with the first 20,000 characters of Tiny Shakespeare."""
    text = shakespeare["train"][:20_000]
    return make_once("text.txt", tmp_path_factory, lambda path: path.write_text(text, "utf-8"))


@pytest.fixture
def tiny_config(text_file: Path) -> ConfigDict:
    """Return a config whose run takes one or two seconds."""
    return make_tiny_config(text_file)


def make_tiny_config(text_file: Path) -> ConfigDict:
    """Return the config of `tiny_config`."""
    config = config_lib.default()
    config.data.path = str(text_file)
    config.batches.update(kind="streams", batch_size=8, window_length=32)
    config.model.update(embedding_size=8, hidden_size=24)
    config.optimizer.update(learning_rate=0.02, warmup_steps=10, schedule="cosine")
    config.optimizer.max_gradient_norm = 1.0
    config.num_epochs = 2
    config.sample.length = 40
    return config


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """Return the working directory of a finished tiny run."""

    def make(directory: Path) -> None:
        training.train(make_tiny_config(text_file), directory)

    return make_once("tiny", tmp_path_factory, make)


@pytest.fixture(scope="session")
def run(trained: Path) -> lstm_jax.Run:
    """Return the model of a finished tiny run."""
    return lstm_jax.load(trained)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """Return the working directory of `runs.make_arguments`, never interrupted."""

    def make(directory: Path) -> None:
        commands.get_output("main", *runs.make_arguments(text_file, directory))

    return make_once("whole", tmp_path_factory, make)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Start Chromium without a window and without a network."""
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium isn't installed")
    programs = [
        next(filter(None, map(shutil.which, names)), None)
        for names in (("chromium", "chromium-browser", "google-chrome"), ("chromedriver",))
    ]
    if None in programs:
        pytest.skip("there is no Chromium with its chromedriver (apt install chromium-driver)")
    options = selenium.ChromeOptions()
    options.binary_location = programs[0]
    for argument in ("--headless=new", "--disable-dev-shm-usage", "--window-size=1280,900"):
        options.add_argument(argument)
    if os.getuid() == 0:  # Chromium's sandbox does not run as root.
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = selenium.ChromeService(programs[1])
    with selenium.Chrome(options=options, service=service) as driver:
        driver.execute_cdp_cmd("Network.enable", {})
        driver.set_network_conditions(offline=True, latency=0, throughput=0)
        yield driver
