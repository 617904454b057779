"""Measure an exported page in headless Chromium: its speed, and its error by rounded weights.

    python benchmarks/page.py --workdir runs/quick

It needs Chromium, its driver and Selenium (the extra `dev`). The page is opened and generates
--length tokens --rounds times; the medians are printed, with the size of the page relative to that
of its weights, and the largest difference between a probability in the page and in Python, both in
float32, over the first --length characters of the test text.
"""

import shutil
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from selenium import webdriver

from frame import parse_flags
from lstm_jax import model
from lstm_jax.data import texts
from lstm_jax.export import page
from lstm_jax.run import workdir


def main() -> None:
    """Print a line for each number of bits of the weights."""
    options = parse_flags(__doc__, workdir=Path, length=2000, rounds=5)
    trained = workdir.load_trained(options.workdir, "float32")
    text = texts.read_splits(trained.config.data)["test"][: options.length]
    ids = np.asarray(trained.vocabulary.encode(text))
    carry = trained.model.initial_carry(1)
    logits, _ = model.apply(trained.model, trained.params, ids[None], carry)
    expected = np.asarray(jax.nn.softmax(logits[0]))
    count = sum(array.size for array in jax.tree.leaves(trained.params))
    settings = webdriver.ChromeOptions()
    settings.binary_location = shutil.which("chromium") or "google-chrome"
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        settings.add_argument(argument)
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    with (
        webdriver.Chrome(settings, service) as browser,
        tempfile.TemporaryDirectory() as directory,
    ):
        for bits in (16, 8):
            path = Path(directory, f"{bits}.html")
            path.write_bytes(page.make_page(trained, "page", bits))
            size, weights = path.stat().st_size, count * bits // 8
            pairs = [measure(browser, path, options.length) for _ in range(options.rounds)]
            probabilities = browser.execute_script(
                "return computeProbabilities(arguments[0])", text
            )
            opened, speed = (statistics.median(values) for values in zip(*pairs, strict=True))
            print(
                f"{bits} bits: opened in {opened:.2f} s, {speed:,.0f} tokens per second, "
                f"{size / 1e6:.1f} MB, {size / weights:.2f} of its weights, "
                f"probabilities differ by at most {np.abs(probabilities - expected).max():.1e}"
            )


def measure(browser: webdriver.Chrome, path: Path, length: int) -> tuple[float, float]:
    """Return the seconds until the page is ready, and the tokens that it generates a second."""
    start = time.perf_counter()
    browser.get(path.as_uri())
    while browser.execute_script("return document.body.dataset.ready") != "yes":
        time.sleep(0.01)
    opened = time.perf_counter() - start
    browser.execute_script(f"byId('length').value = {length}; generate()")
    while browser.execute_script("return scheduled || queue.length || remaining"):
        time.sleep(0.05)
    status = str(browser.execute_script("return byId('status').textContent"))
    return opened, float("".join(filter(str.isdigit, status)))


if __name__ == "__main__":
    main()
