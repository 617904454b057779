"""Make pages of models, and use the pages in a browser."""

import base64
import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import commands
import lstm_jax
from lstm_jax import generation
from lstm_jax.errors import UserError
from lstm_jax.export import features, page
from lstm_jax.generation import Controls, adjust_logits, make_control_arrays
from lstm_jax.vocabulary import FILE_END
from models import make_run, predict_text

# Words of several scripts, numbers, contractions, several spaces, emoji of several code points.
TEXT = (
    "3월 15일에 AI가 K팝을 ใช้Python ทำ ๑๒๓ "
    "It can't be 3.14  or won\u2019t,\n\n it? naïve e\u0301 한국어 日本語のテキスト "
    # Hebrew acronyms, and numbers in digits of Arabic and of full width.
    '\u05e6\u05d4\u05f4\u05dc \u05e6\u05d4"\u05dc \u0663\u066b\u0661\u0664 '
    "\u0661\u066c\u0660\u0660\u0660 O\u2018Neill \uff11\uff12\uff13\uff0e\uff14 "
    # A last apostrophe, a geresh, an invisible space, katakana of half width, a narrow space.
    "\u05e2\u05de' \u05e2\u05de'5 \u05d2\u05f3' "
    "\u05d2\u05f3\u05d9\u05e8 ខ្មែរ\u200bខ្មែរ \uff76\uff9e\uff70\uff84\uff9e oui\u202f! "
    "スマートフォンアプリ ภาษาไทย Ελληνικά кошка_2 👩‍👩‍👧 🇫🇷🇩🇪 </script><b>&amp; \t\x07 x"
)


def record(trained: lstm_jax.Run, text: str) -> page.Reading:
    ids = trained.vocabulary.encode(text)
    return page.record_activations(trained.model, trained.params, ids)


class Page:
    """A page in a browser."""

    def __init__(self, browser: Any, path: Path, trained: lstm_jax.Run, text: str = TEXT):
        """Make the page of a model, and open it."""
        path.write_bytes(page.make_page(trained, "<i>name</i>", text))
        browser.get(path.as_uri())
        self.browser, self.trained = browser, trained
        assert self("document.body.dataset.ready") == "yes"

    def __call__(self, expression: str, *arguments: Any) -> Any:
        """Return the value of an expression of JavaScript."""
        return self.browser.execute_script(f"return {expression}", *arguments)

    def find(self, selector: str) -> Any:
        """Return the first element that a selector of CSS matches."""
        return self.browser.find_element("css selector", selector)

    def wait(self) -> None:
        """Wait until the page has read, or generated, all of the text."""
        commands.wait_until(lambda: self("!(scheduled || queue.length || remaining)"))

    def read(self, text: str) -> None:
        """Put a text into the text area, and wait until it is read."""
        self("(area.value = arguments[0], readText())", text)
        self.wait()

    def get_each(self, field: str) -> list[Any]:
        """Return a field of each token of the text."""
        return list(self(f"records.slice(0, accepted).map((record) => record.{field})"))

    def get_spans(self, kind: str = "span") -> list[str]:
        """Return the parts of the colored text."""
        spans = "Array.from(document.querySelectorAll(arguments[0]), (span) => span.textContent)"
        return list(self(spans, f"#colored {kind}"))

    def check_alphas(self, expected: np.ndarray) -> None:
        """Assert how strongly each token is colored."""
        styles = self.get_each("span.style.background")
        alphas = [float(style.rpartition("/")[2].rstrip(")")) for style in styles]
        np.testing.assert_allclose(alphas, expected, atol=0.01)

    def get_bars(self) -> dict[int, float]:
        """Return the probabilities of the next token, by id."""
        bars = self.browser.find_elements("css selector", "#next button:not([hidden])")
        texts = {int(x.get_attribute("value")): x.text.rpartition("%")[0] for x in bars}
        return {token: float(text.split()[-1]) / 100 for token, text in texts.items()}

    def check_bars(self) -> None:
        """Assert that the page shows the probabilities after the text, without special tokens."""
        self.wait()
        expected = np.exp(predict_text(self.trained, self("area.value"))[-1])
        expected = np.where(np.arange(len(expected)) > 1, expected, 0) / expected[2:].sum()
        bars = self.get_bars()
        assert len(bars) == 8 and min(bars.values()) >= np.sort(expected)[-8] - 2e-3
        assert bars == pytest.approx({i: expected[i] for i in bars}, abs=2e-3)

    def check_names_and_width(self) -> None:
        """Assert that controls have names, and that on a phone nothing is wider than the screen."""
        controls = self.browser.find_elements("css selector", "button, input, select, #text")
        assert all(control.accessible_name for control in controls if control.is_displayed())
        phone = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
        assert self("document.documentElement.scrollWidth") <= 390
        self.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        assert not self.browser.get_log("browser"), "no error, and no request to the network"


MODELS: dict[str, dict[str, Any]] = {
    "lstm, documents": {"kind": "characters", "num_layers": 3, "stop": "\n\n"},
    "gru with skip connections": {
        **{"kind": "words", "cell": "gru", "num_layers": 3, "skip_connections": True}
    },
    "gru, tied": {"kind": "bytes", "cell": "gru", "tie_embeddings": True},
    "rnn, bytes of documents": {"kind": "bytes", "cell": "rnn", "stop": FILE_END},
    "gru, subwords of documents": {"kind": "bpe", "cell": "gru", "stop": FILE_END},
}


@pytest.mark.process
@pytest.mark.parametrize("name", MODELS)
def test_probabilities_and_activations_in_a_browser_equal_those_in_python(
    browser: Any, name: str, tmp_path: Path
) -> None:
    trained = make_run(TEXT, **MODELS[name])
    text = TEXT + "an unknown ¿ ≈\n\nend" + trained.vocabulary.stop + "x\udce9\udcff"
    view = Page(browser, tmp_path / "page.html", trained)
    ids = trained.vocabulary.encode(text)
    read = "encode(JSON.parse(arguments[0])).map(({id}) => id)"
    np.testing.assert_array_equal(view(read, json.dumps(text)), ids)
    each = "ids.map((id) => Array.from(softmax(step(state, id))))"
    actual = view(f"((ids, state) => {each})(arguments[0], zeroState())", ids.tolist())
    expected = np.exp(predict_text(trained, text))
    assert expected.max(axis=1).std() > 0.005, "a model whose predictions vary"
    np.testing.assert_allclose(actual, expected, atol=1e-3)
    if not trained.vocabulary.stop:  # Otherwise the page reads a stop token first.
        view.read(TEXT[:40])
        actual = np.array([values.split(",") for values in view.get_each("values.join()")], int)
        np.testing.assert_allclose(actual, record(trained, TEXT[:40]).activations, atol=1)
    assert not browser.get_log("browser")


@pytest.mark.process
@pytest.mark.parametrize("kind", ["characters", "words", "bytes", "bpe"])
def test_line_breaks_of_windows_are_read_as_in_python(
    browser: Any, kind: str, tmp_path: Path
) -> None:
    text = "a line\r\n\r\nanother\r\n"
    trained = make_run(text, kind)
    view = Page(browser, tmp_path / "page.html", trained, text)
    ids = view("encode(arguments[0]).map(({id}) => id)", text.replace("\r", ""))
    np.testing.assert_array_equal(ids, trained.vocabulary.encode(text))
    view.read("a\nb\n")
    assert view("area.value") == "".join(view.get_each("text")) == "a\nb\n"
    for text in ("a", "a line"):  # Without the line breaks.
        view.read(text)
    np.testing.assert_array_equal(view.get_each("id"), trained.vocabulary.encode(text))


@pytest.mark.process
def test_the_page_of_a_model_that_runs_in_it(browser: Any, trained: Path, tmp_path: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    loaded = lstm_jax.load(trained)
    text = page.read_text(trained, None, None)
    view = Page(browser, tmp_path / "page.html", loaded, text)
    find, area = view.find, view.find("#text")
    assert browser.title == "<i>name</i>: a language model in a page"
    # It begins with the start of the text. The cursor is at its end; gray text follows.
    view.wait()
    assert view("area.value") == text[:300]
    assert browser.switch_to.active_element.get_attribute("id") == "text"
    find("#clear").click()
    view.wait()
    assert view("area.value") == "" and len("".join(view.get_spans(".ahead"))) == 80
    view("(byId('temperature').value = 1, byId('temperature').dispatchEvent(new Event('input')))")
    area.send_keys("ROMEO:¿")
    view.check_bars()
    assert "".join(view.get_spans(".typed")) == "ROMEO:¿"
    assert view.get_spans(".unknown") == ["¿"]
    assert find("#count").text.startswith("7 characters, ")
    # A change in the middle is read from there; the token at the cursor is marked.
    area.send_keys(Keys.BACKSPACE, "\nBut, soft! what light", *[Keys.ARROW_LEFT] * 6, "X")
    view.wait()
    assert view("area.value") == "ROMEO:\nBut, soft! whatX light"
    assert view.get_spans(".at") == ["X"]
    area.send_keys(Keys.BACKSPACE, Keys.END, Keys.CONTROL, Keys.END)
    area.send_keys(Keys.NULL)
    view.check_bars()
    # The keyboard takes a word of the text ahead, and generates; the text is what was ahead.
    ahead = "".join(view.get_spans(".ahead"))
    area.send_keys(Keys.ARROW_RIGHT)
    taken = view("area.value").removeprefix("ROMEO:\nBut, soft! what light")
    assert taken and ahead.startswith(taken)
    view("byId('length').value = 150")
    area.send_keys(Keys.CONTROL, Keys.ENTER)
    area.send_keys(Keys.NULL)
    view.check_bars()
    text = view("area.value")
    assert text.startswith("ROMEO:\nBut, soft! what light" + ahead)
    assert len(text) == len("ROMEO:\nBut, soft! what light" + taken) + 150
    assert "characters per second" in find("#status").text
    assert "".join(view.get_spans("span:not(.ahead)")) == text
    # Colors: surprisal in bits; then a hidden unit by its number, and one of the list.
    reading = record(loaded, text)
    mean = float(find("#count").text.split(", ")[1].split()[0])
    assert mean == pytest.approx(reading.bits[1:].mean(), abs=0.01)
    view.check_alphas(np.minimum(reading.bits / 8, 1))
    find("#unit").send_keys(Keys.CONTROL, "a")
    find("#unit").send_keys("11")
    view.check_alphas(abs(reading.activations[:, 11] / 127))
    button = find("#followers button:nth-child(2)")
    button.send_keys(Keys.ENTER)
    assert button.get_attribute("aria-pressed") == "true"
    view.check_alphas(abs(reading.activations[:, int(button.get_attribute("value"))] / 127))
    # A likely token is appended by its button; then another continuation of what was typed.
    find("#next button:nth-child(2)").send_keys(Keys.ENTER)
    view.check_bars()
    typed = view("area.value")
    assert len(typed) == len(text) + 1
    find("#another").click()
    view.wait()
    assert view("area.value").startswith(typed) and len(view("area.value")) == len(typed) + 150
    view.check_names_and_width()


@pytest.mark.process
def test_the_page_of_another_cell_shows_a_recorded_text(browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    trained, text = make_run(TEXT, "words", cell="mogrifier", num_layers=2), TEXT + "¿"
    view = Page(browser, tmp_path / "page.html", trained, text)
    view.wait()
    assert view("area.value") == "".join(view.get_spans()) == text
    assert view.get_spans(".unknown") == ["¿"]
    reading = record(trained, text)
    view.check_alphas(np.minimum(reading.bits / 8, 1))
    view("(byId('layer').value = 1, byId('layer').dispatchEvent(new Event('change')))")
    view.check_alphas(abs(reading.activations[:, 7] / 127))
    assert view.get_bars(), "predictions after the first token"
    # The cursor moves by keyboard, and the text stays as it is.
    keys = (Keys.CONTROL, Keys.HOME, Keys.NULL, *[Keys.ARROW_RIGHT] * 2, "x", Keys.DELETE)
    view.find("#text").send_keys(*keys)
    view.wait()
    assert view("area.value") == text
    at = len(trained.vocabulary.encode(text[:2])) - 1
    expected = dict(zip(reading.guesses[at].tolist(), reading.probabilities[at], strict=True))
    assert view.get_bars() == pytest.approx(expected, abs=6e-4)
    value = view.find("#now").text.split()[-1].rstrip(".").replace("\N{MINUS SIGN}", "-")
    assert float(value) == pytest.approx(reading.activations[at, 7] / 127, abs=6e-3)
    view.check_names_and_width()


@pytest.mark.process
def test_draws_follow_the_probabilities_and_a_stop_token_ends_the_text(
    browser: Any, tmp_path: Path
) -> None:
    trained = make_run(TEXT, "characters", stop="\n\n")
    stop_id, bias = trained.vocabulary.stop_id, trained.params["dense"]["bias"]
    bias = trained.params["dense"]["bias"] = bias.at[:2].set(30).at[stop_id].set(-30)
    view = Page(browser, tmp_path / "page.html", trained)
    view.read("")
    logits = jnp.float32(view("[...logits]"))
    for temperature, top_p in ((0, 1), (0.8, 1), (1.5, 0.5), (1, 1)):
        view("([controls.temperature, controls.topP] = arguments)", temperature, top_p)
        arrays = make_control_arrays(Controls(temperature, top_p=top_p))
        adjusted = adjust_logits(logits[None], arrays)
        shares = view("[...distribution(logits)]")
        np.testing.assert_allclose(shares, jax.nn.softmax(adjusted)[0], atol=1e-5)
    many = view("Array.from({length: 20000}, (_, k) => (seed = k, draw()))")
    np.testing.assert_allclose(np.bincount(many, minlength=len(shares)) / 20000, shares, atol=0.02)
    trained.params["dense"]["bias"] = bias.at[stop_id].set(60)
    view = Page(browser, tmp_path / "page.html", trained)
    view.read("It")
    view.find("#generate").click()
    view.wait()
    assert view("area.value") == "It"
    assert view.find("#status").text.endswith("the text has ended.")
    # A document begins as in `sample`. A stop token may be typed in parts.
    for text in ("It", "It\n", "It\n\n", "It\n\nx", ""):
        view.read(text)
        expected = generation.encode_prompt(trained.vocabulary, text)
        np.testing.assert_array_equal(view.get_each("id"), expected)


@pytest.mark.process
def test_a_model_of_parts_of_characters_shows_characters(browser: Any, tmp_path: Path) -> None:
    # The first two bytes of the three of each character, and words, are tokens.
    text = TEXT + " water waters 日 旦 旧 早 旬 時" * 9
    trained = make_run(text, "bpe")
    tokens = trained.vocabulary.tokens
    view = Page(browser, tmp_path / "page.html", trained)
    view("(controls.temperature = 1)")
    view.read("It")
    # What is typed changes the tokens of the word, and of the space before it.
    for more in (" wa", "ter", "s", " ", " wat", "ers\n", "\n x", "日旦", "旧 é", "👍"):
        view.read(view("area.value") + more)
        view.check_bars()
    text = view("area.value")
    np.testing.assert_array_equal(view.get_each("id"), trained.vocabulary.encode(text))
    assert "".join(view.get_spans(".typed")) == text
    view("(byId('length').value = 300, generate())")
    view.wait()
    generated = view("area.value")
    assert generated.startswith(text)
    view.find("#text").send_keys("x")
    view.wait()
    assert view("area.value") == generated + "x"
    # A part of a character that is clicked is accepted with the rest.
    view.read("x")
    click = "((b) => (b.value = arguments[0], b.click()))(byId('next').firstChild)"
    for token in [t for t in tokens[2:] if "\udcc2" <= t[-1] <= "\udcf4"][:3]:
        view(click, tokens.index(token))
        view.wait()
        spelled = "".join(tokens[i] for i in view.get_each("id"))
        spelled = spelled.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        assert view("area.value") == spelled


def unpack(packed: dict[str, str]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(packed["values"]), packed["dtype"])


@pytest.mark.parametrize("cell", ["lstm", "mogrifier"])
def test_the_page_contains_what_was_measured(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "_RECORDED_ACTIVATIONS", 7 * 50)
    trained = make_run(TEXT, "characters", cell=cell)
    text = "</script><b>¿\n" + TEXT * 9
    content = page.make_page(trained, "<i>name</i>", text)
    assert b"</script><b>" not in content and b"<i>name" not in content
    assert b"Content-Security-Policy\" content=\"default-src 'none'" in content
    (line,) = (x for x in content.decode().splitlines() if x.startswith("const data = "))
    data = json.loads(line.removeprefix("const data = ").removesuffix(";"))
    reading = record(trained, text)
    computed = features.compute_features(text, trained.vocabulary)
    followers, correlations = features.find_followers(
        reading.activations.T, np.stack([*computed.values()]), 3
    )
    assert data["features"] == list(computed)
    assert [*map(tuple, data["followers"])] == followers
    expected, packed = {"correlations": correlations}, {"correlations": data["correlations"]}
    assert (data["model"] is None, data["record"] is None) == (cell != "lstm", cell == "lstm")
    if recorded := data["record"]:
        assert recorded["unknown"] == ["¿"]
        packed |= recorded
        expected |= {"ids": trained.vocabulary.encode(text)[:50], "bits": reading.bits[:50]}
        expected |= {"activations": reading.activations[:50], "guesses": reading.guesses[:50]}
    for name, values in expected.items():
        np.testing.assert_array_equal(unpack(packed[name]), np.ravel(values).astype("f4"))


def test_the_command_reads_the_validation_split_or_standard_input(
    trained: Path, tmp_path: Path
) -> None:
    directory = shutil.copytree(trained, tmp_path / "run")
    result = commands.run("export", f"--workdir={directory}")
    path = directory / "page.html"
    size = f"{path.stat().st_size / 1e6:.1f}"
    assert re.fullmatch(
        rf"The model of {directory}, step \d+, reads [\d,]+ characters\n"
        rf"Wrote {path} \({size} MB\): open it in a browser\n",
        result.stderr,
    )
    flags = [f"--workdir={directory}", "--text=-", "--to=other.html"]
    commands.get_output("export", *flags, cwd=tmp_path, stdin="To be, or not")
    assert b'"text": "To be, or not"' in (tmp_path / "other.html").read_bytes()


def test_mistakes_give_a_one_line_error(trained: Path, tmp_path: Path) -> None:
    loaded = make_run(TEXT, "characters")
    loaded.params["dense"]["bias"] *= np.nan
    with pytest.raises(UserError, match="its training diverged"):
        page.make_page(loaded, "name", "To be, or not")
    with pytest.raises(UserError, match="is too short: --text must name a file of two tokens"):
        page.write_page(trained, "a")
    with pytest.raises(UserError, match="can't write /nowhere/a.html"):
        page.write_page(trained, "To be, or not", Path("/nowhere/a.html"))
    result = commands.run("export", f"--workdir={trained}", f"--workdir={trained}")
    assert result.returncode == 2
    assert result.stderr == "error: the page is about one model: give --workdir once\n"
