import base64
import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

import commands
import models
from lstm_jax import cells
from lstm_jax.errors import UserError
from lstm_jax.inspect import activations, features, report
from lstm_jax.model import LanguageModel
from lstm_jax.run import metrics, workdir
from lstm_jax.vocabulary import FILE_END, Vocabulary

NASTY = '</script><script>document.title="owned"</script><!-- & <b>"x"</b>\u2028ﷺ\n'


class _OwnGRU(cells.GRUCell):
    def activation(self, carry: Any) -> jax.Array:
        return carry.hidden**3


@pytest.mark.parametrize(
    ("cell", "name"),
    [
        (cells.CELLS["peephole"], "tanh of the cell state"),
        (cells.GRUCell, "the hidden state"),
        (_OwnGRU, "as its cell defines it"),
        (nn.GRUCell, "tanh of the outputs"),
    ],
)
def test_the_activation_of_a_cell_has_a_name(cell: type, name: str) -> None:
    assert report._describe_activation(cell) == name


def read_data(page: bytes) -> dict[str, Any]:
    """Return the data that the script of the page reads."""
    line = next(line for line in page.decode().splitlines() if line.startswith("const data = {"))
    return json.loads(line.removeprefix("const data = ").removesuffix(";"))


def unpack(packed: dict[str, str]) -> np.ndarray:
    dtype = np.dtype(packed["type"].removesuffix("Array").lower()).newbyteorder("<")
    return np.frombuffer(gzip.decompress(base64.b64decode(packed["base64"])), dtype)


def read_page(vocabulary: Vocabulary, text: str, directory: Path, **fields: Any) -> dict[str, Any]:
    """Return the data of the page of a model with random parameters."""
    model = LanguageModel(len(vocabulary), 4, 6, **fields)
    untrained = workdir.Trained(ConfigDict(), vocabulary, model, models.draw_params(model), 0)
    return read_data(report.make_page(untrained, text, "text", directory))


def run(*arguments: str, given: str = "") -> commands.Done:
    return commands.run("inspect", *arguments, given=given)


def test_the_command_reads_the_validation_split_and_writes_into_the_working_directory(
    trained: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    shutil.copytree(trained, directory)
    done = run("--workdir", str(directory), "--length", "900")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{directory / 'report.html'} (")
    assert "reading the first 900 characters" in done.stderr
    data = read_data((directory / "report.html").read_bytes())
    assert data["text"] == "the validation split" and data["layers"] == [24]
    assert len(unpack(data["tokens"])) == 900


def test_the_page_contains_the_recorded_data(trained: Path, text_file: Path) -> None:
    loaded = workdir.load_trained(trained)
    text = text_file.read_text()[:3000] + NASTY
    page = report.make_page(loaded, text, "<i>name</i>", trained)
    assert b"</script><script>doc" not in page and b"<i>name" not in page
    assert b"Content-Security-Policy\" content=\"default-src 'none'" in page
    data = read_data(page)
    tokens = unpack(data["tokens"])
    assert "".join(data["table"][token] for token in tokens) == text
    assert tokens.max() >= data["known"], "the page keeps unknown tokens"
    ids = loaded.vocabulary.encode(text)
    reading = activations.record_activations(loaded.model, loaded.params, ids)
    held = unpack(data["beginning_values"]).reshape(24, len(ids))
    np.testing.assert_array_equal(held, reading.activations)
    np.testing.assert_allclose(unpack(data["bits"]) / 1000, reading.bits, atol=6e-4)
    np.testing.assert_array_equal(unpack(data["guesses"]), reading.guesses.ravel())
    np.testing.assert_allclose(
        unpack(data["probabilities"]) / 255, reading.probabilities.ravel(), atol=2.1e-3
    )
    forget = unpack(data["saturation"][0]["forget"]).reshape(2, 24) / 1000
    np.testing.assert_allclose(forget, reading.saturation[0]["forget"], atol=6e-4)
    present = features.select_present(features.compute_text_features(text))
    assert data["features"] == list(present)
    assert len(unpack(data["correlations"])) == 24 * len(present)
    rows = metrics.read_metrics(trained / workdir.METRICS)
    validation = [[row["step"], row["loss"]] for row in rows if row["split"] == "validation"]
    assert data["curves"]["validation"] == validation[1:]
    assert [sample["title"].split(",")[0] for sample in data["samples"]] == [
        f"step {step}" for step, _ in validation
    ]


def test_a_large_model_keeps_only_its_best_hidden_units_for_the_whole_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(report, "_BUDGET", 4000)
    values = np.random.default_rng(0).integers(-127, 128, (20, 1000)).astype(np.int8)
    followers = [
        [features.Follower(0, 7, 0.9, 0.9, 0.1), features.Follower(0, 5, 0.2, 0.9, 0.1)],
        [features.Follower(1, 3, -0.5, -0.9, 0.1), features.Follower(1, 7, 0.4, 0.9, 0.1)],
    ]
    packed = report._pack_activations(values, followers)
    assert packed["beginning"] == 100 and packed["whole"] == [7, 3]
    beginning = unpack(packed["beginning_values"]).reshape(20, 100)
    np.testing.assert_array_equal(beginning, values[:, :100])
    np.testing.assert_array_equal(unpack(packed["whole_values"]).reshape(2, 1000), values[[7, 3]])


def test_a_byte_model_with_another_cell_and_no_history(tmp_path: Path) -> None:
    vocabulary = Vocabulary.from_text("", "bytes")
    data = read_page(vocabulary, "Né\udcff!\0が\x9b\xad", tmp_path, cell="gru")
    tokens, shown = ([data["table"][i] for i in unpack(data[k])] for k in ("tokens", "shown"))
    assert tokens[:6] == ["N", "\\xc3", "\\xa9", "\\xff", "!", "\\x00"]
    assert tokens[6:9] == ["\\xe3", "\\x81", "\\x8c"]
    several = ["が", "", "", "\\x9b", "", "\xad", ""]
    assert shown == ["N", "é", "", "\\xff", "!", "\\x00", *several]
    assert data["features"] == [] and data["samples"] == [] and data["token_name"] == "byte"
    assert set(data["saturation"][0]) == {"reset", "update"}


def test_the_bytes_of_documents_are_shown_as_characters(tmp_path: Path) -> None:
    text = f"é\r\n{FILE_END}が{FILE_END}"
    vocabulary = Vocabulary.from_text(text, "bytes", stop=FILE_END)
    data = read_page(vocabulary, text, tmp_path)
    shown = [data["table"][i] for i in unpack(data["shown"])]
    assert shown == ["é", "", "\r", "\n", "␄\n", "が", "", "", "␄\n"]


def test_characters_that_tokens_divide_are_shown_whole(tmp_path: Path) -> None:
    known = Vocabulary.from_text("", "bpe").tokens
    vocabulary = Vocabulary([*known, "\udce2\udc80", " \udce2\udc80"], "bpe")
    data = read_page(vocabulary, "a —“", tmp_path)
    tokens, shown = ([data["table"][i] for i in unpack(data[k])] for k in ("tokens", "shown"))
    assert tokens == ["a", " \\xe2\\x80", "\\x94", "\\xe2\\x80", "\\x9c"]
    assert shown == ["a", " —", "", "“", ""]


def test_the_page_names_standard_input(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    done = run("--workdir", str(trained), "--text", "-", "--out", str(out), given="To be, or not")
    assert done.returncode == 0, done.stderr
    assert read_data(out.read_bytes())["text"] == "standard input"


def test_a_diverged_model_raises_an_error(tmp_path: Path) -> None:
    vocabulary = Vocabulary.from_text("", "bytes")
    model = LanguageModel(len(vocabulary), 4, 6, cell="gru")
    params = jax.tree.map(lambda x: x * np.nan, models.draw_params(model))
    diverged = workdir.Trained(ConfigDict(), vocabulary, model, params, 0)
    with pytest.raises(UserError, match="its training diverged"):
        report.make_page(diverged, "abc", "text", tmp_path)


@pytest.mark.parametrize(
    ("run", "text", "out", "message"),
    [
        ("/nowhere", None, None, "there is no trained model in /nowhere"),
        ("RUN", "/nowhere/a.txt", None, "can't read /nowhere/a.txt (--text)"),
        ("RUN", "SHORT", None, "is too short: --text must name a file of two"),
        ("RUN", "LATIN", None, "is not UTF-8 at byte 1"),
        ("RUN", None, "/nowhere/a.html", "there is no directory /nowhere"),
        ("RUN", None, "RUN", "is a directory: --out must name a file"),
    ],
)
def test_mistakes_give_a_one_line_error(
    run: str, text: str | None, out: str | None, message: str, trained: Path, tmp_path: Path
) -> None:
    (tmp_path / "short").write_text("a")
    (tmp_path / "latin").write_bytes(b"a\xe9b")
    paths = {"RUN": trained, "SHORT": tmp_path / "short", "LATIN": tmp_path / "latin"}
    directory, text, path = (name and str(paths.get(name, name)) for name in (run, text, out))
    with pytest.raises(UserError) as error:
        report.write_report(
            Path(str(directory)), text, None, out=Path(path) if path else None, length=1000
        )
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not list(trained.glob("report*"))


@pytest.mark.process
def test_the_page_in_a_browser(
    browser: Any, trained: Path, text_file: Path, tmp_path: Path
) -> None:
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.wait import WebDriverWait

    loaded = workdir.load_trained(trained)
    text = NASTY + text_file.read_text()[:4000]
    page = tmp_path / "report.html"
    page.write_bytes(report.make_page(loaded, text, "<i>name</i>", trained))
    reading = activations.record_activations(
        loaded.model, loaded.params, loaded.vocabulary.encode(text)
    )
    browser.get(page.as_uri())

    def find(selector: str) -> Any:
        return browser.find_element("css selector", selector)

    def script(code: str) -> Any:
        return browser.execute_script(f"return {code}")

    WebDriverWait(browser, 30).until(lambda _: find("body").get_attribute("data-ready"))
    assert browser.title == "What tiny has learned"
    assert "<i>name</i>, 4,0" in find("#about").text

    # The page shows the text in parts, and markup in it stays text.
    assert script("document.querySelectorAll('#text b').length") == 0
    shown = script("Array.from(document.querySelectorAll('#text > span'), s => s.textContent)")
    assert len(shown) == 3000 and "".join(shown).replace("↵", "") == text[:3000]

    def alpha(position: int) -> float:
        color = script(
            f"document.querySelector('#text').children[{position}].style.backgroundColor"
        )
        return float(color.rpartition("/")[2].rstrip("); "))

    # Choose a hidden unit by its number.
    find("#unit").send_keys(Keys.CONTROL, "a")
    find("#unit").send_keys("11")
    assert "Activation of hidden unit 11 after" in find("#what").text
    for position in (0, 100, 2999):
        expected = abs(reading.activations[11, position]) / 127
        assert alpha(position) == pytest.approx(expected, abs=0.01)

    # Move through the text with the keyboard; the five most likely tokens are shown.
    area = find("#text")
    area.send_keys(Keys.HOME, *[Keys.ARROW_RIGHT] * 10)
    assert "character 11 of" in find("#now").text
    assert f"surprisal {reading.bits[10]:.2f} bits" in find("#now").text
    tokens = loaded.vocabulary.tokens
    guesses = [element.text for element in browser.find_elements("css selector", "#now code")]
    assert guesses[0] == {" ": "␣", "\n": "↵"}.get(*[tokens[reading.guesses[10, 0]]] * 2)
    assert len(guesses) == 5
    area.send_keys(Keys.ARROW_DOWN, Keys.ARROW_UP)
    assert "character 11 of" in find("#now").text
    area.send_keys(Keys.PAGE_DOWN)
    assert (
        "character 3,011 of" in find("#now").text
        and script("+document.querySelector('#part').value") == 2
    )

    # Move through the hidden units that follow a feature with the keyboard.
    followers = find("#found")
    followers.send_keys(Keys.HOME, Keys.ARROW_DOWN)
    chosen = find("#found [aria-selected=true]")
    assert (
        chosen.get_attribute("id") == followers.get_attribute("aria-activedescendant") == "found-1"
    )
    assert f"hidden unit {chosen.get_attribute('data-unit')} after" in find("#what").text
    outline = script("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid", "the focus is visible"
    last = script("document.querySelector('#found').lastElementChild.dataset.unit")
    find("#unit").send_keys(Keys.CONTROL, "a")
    find("#unit").send_keys(last)
    assert find("#found [aria-selected=true]").get_attribute("data-unit") == last

    # Color by surprisal.
    find("#color").send_keys("s")
    assert "Surprisal of each character" in find("#what").text
    assert alpha(5) == pytest.approx(min(reading.bits[3005] / 8, 1), abs=0.01)

    assert len(browser.find_elements("css selector", "#gates circle")) == 3 * 24
    assert len(browser.find_elements("css selector", "#curves path")) > 5
    labels = {element.text for element in browser.find_elements("css selector", "#curves text")}
    assert {"0", "50", "100"} <= labels
    assert script("ticks(1.57, 8.93).map(([, label]) => label)") == ["2", "4", "6", "8"]
    assert script("ticks(1.44, 1.6).map(([, label]) => label)") == ["1.45", "1.50", "1.55", "1.60"]
    assert script("ticks(0, 1957, 1).map(([, label]) => label)") == ["0", "500", "1,000", "1,500"]
    assert script("ticks(0, 2, 1).map(([, label]) => label)") == ["0", "1", "2"]
    # Losses on validation and test text are always inside the plot.
    heights = [
        float(dot.get_attribute("cy"))
        for dot in browser.find_elements("css selector", "#curves circle")
    ]
    assert heights and min(heights) >= 20
    assert find("#written").text

    # The address keeps the state of the page.
    address = browser.current_url
    assert "color=bits" in address and "at=3010" in address
    browser.get("about:blank")
    browser.get(address)
    WebDriverWait(browser, 30).until(lambda _: find("body").get_attribute("data-ready"))
    assert "character 3,011 of" in find("#now").text

    # On a phone, nothing is wider than the screen.
    phone = {"width": 360, "height": 780, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    assert script("document.documentElement.scrollWidth") <= 360
    assert not browser.get_log("browser"), "no error, and no request to the network"
