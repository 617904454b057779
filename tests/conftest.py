"""Shared fixtures: the text, and a tiny trained model."""

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from ml_collections import ConfigDict

from lstm_jax import config as config_lib
from lstm_jax import train
from lstm_jax.data import datasets, sources

# A shell that runs the tests in the background ignores SIGINT, and all processes that they start
# would inherit this.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A compilation cache for all tests, the workers that run them, and the processes that they start:
# they compile the same tiny models many times.
_SHARED = "LSTM_JAX_TEST_CACHE"
if _SHARED not in os.environ:
    _compiled = tempfile.TemporaryDirectory(prefix="lstm-jax-compiled-")
    os.environ[_SHARED] = _compiled.name
_CACHE = {
    "jax_compilation_cache_dir": os.environ[_SHARED],
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": 0,
}
for _name, _value in _CACHE.items():
    jax.config.update(_name, _value)
    os.environ[_name.upper()] = str(_value)


# The cache directory of the user, with the key that seals prepared corpora.
_cache = tempfile.TemporaryDirectory(prefix="lstm-jax-cache-")
os.environ["XDG_CACHE_HOME"] = _cache.name


# These files take a minute or more, and partly wait for other processes.
_SLOW = ("hosts", "own_cells", "sweep", "docs", "cells", "train", "main", "hostile", "parallel")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the slowest files first, so that no worker runs one alone at the end."""
    files = {f"test_{name}.py": place for place, name in enumerate(_SLOW)}
    items.sort(key=lambda item: files.get(item.path.name, len(files)))


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an empty data directory, so that the text is fetched once."""
    return tmp_path_factory.mktemp("tensorflow_datasets")


@pytest.fixture(scope="session")
def shakespeare(data_dir: Path) -> dict[str, str]:
    """Return the splits of Tiny Shakespeare."""
    texts = datasets.read_dataset("tiny_shakespeare", "text", str(data_dir), (0.9, 0.05, 0.05))
    return dict(zip(sources.SPLITS, texts, strict=True))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory, shakespeare: dict[str, str]) -> Path:
    """Return a file with the first 20,000 characters of Tiny Shakespeare."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(shakespeare["train"][:20_000], encoding="utf-8")
    return path


@pytest.fixture
def tiny_config(text_file: Path) -> ConfigDict:
    """Return a config whose run takes one or two seconds."""
    return make_tiny_config(text_file)


def make_tiny_config(text_file: Path) -> ConfigDict:
    """Return the config of `tiny_config`."""
    config = config_lib.default()
    config.data.path = str(text_file)
    config.batches.kind = "streams"
    config.batches.batch_size = 8
    config.batches.window_length = 32
    config.model.embedding_size = 8
    config.model.hidden_size = 24
    config.optimizer.learning_rate = 0.02
    config.optimizer.warmup_steps = 10
    config.optimizer.schedule = "cosine"
    config.optimizer.max_gradient_norm = 1.0
    config.num_epochs = 2
    config.sample.length = 40
    return config


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """Return the working directory of a finished tiny run."""
    directory = tmp_path_factory.mktemp("runs") / "tiny"
    assert train.train(make_tiny_config(text_file), directory) == 0
    return directory


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
