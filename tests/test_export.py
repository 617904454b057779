"""Export models as pages, and run the pages in a browser."""

import base64
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import commands
import models
import runs
from lstm_jax import config as config_lib
from lstm_jax import generation
from lstm_jax.controls import Controls, adjust_logits, make_control_arrays
from lstm_jax.errors import UserError
from lstm_jax.export import page
from lstm_jax.model import LanguageModel
from lstm_jax.run import workdir
from lstm_jax.vocabulary import FILE_END, Vocabulary

# Words of several scripts, numbers, contractions, several spaces, emoji of several code points.
TEXT = (
    "3월 15일에 AI가 K팝을 ใช้Python ทำ ๑๒๓ "
    "It can't be 3.14  or won\u2019t,\n\n it? naïve e\u0301 한국어 日本語のテキスト "
    "スマートフォンアプリ ภาษาไทย Ελληνικά кошка_2 👩‍👩‍👧 🇫🇷🇩🇪 </script><b>&amp; \t\x07 x"
)


def make_trained(kind: str, stop: str = "", text: str = TEXT, **fields: Any) -> workdir.Trained:
    """Return a model with random parameters, large enough for predictions that vary."""
    vocabulary = Vocabulary.from_text(text + stop + text, kind, stop=stop)
    model = LanguageModel(len(vocabulary), 5, 7, stop_id=vocabulary.stop_id, **fields)
    return workdir.Trained(ConfigDict(), vocabulary, model, models.draw_params(model, 1.0), 7)


def compute_probabilities(trained: workdir.Trained, text: str) -> np.ndarray:
    """Return the probabilities after each token of a text: float32 [n, vocabulary]."""
    ids = trained.vocabulary.encode(text)
    padded = np.pad(ids[None], ((0, 0), (0, -len(ids) % 512)))  # What follows has no effect.
    carry = trained.model.initial_carry(1)
    logits, _ = models.apply(trained.model, trained.params, padded, carry)
    return np.asarray(jax.nn.softmax(logits[0]))[: len(ids)]


# The probabilities of all tokens after each token of a text.
COMPUTE = """
const state = zeroState();
return encode(arguments[0]).map(({ id }) => Array.from(softmax(step(state, id))));
"""


def open_page(browser: Any, trained: workdir.Trained, path: Path, bits: int = 16) -> None:
    path.write_bytes(page.make_page(trained, "<i>name</i>", bits))
    browser.get(path.as_uri())
    assert browser.execute_script("return document.body.dataset.ready") == "yes"


def wait_until_idle(browser: Any) -> None:
    """Wait until the page has read, or generated, all of the text."""
    script = "return !(scheduled || queue.length || remaining)"
    commands.wait_until(lambda: browser.execute_script(script))


MODELS: dict[str, dict[str, Any]] = {
    "lstm, documents": {"kind": "characters", "num_layers": 3, "stop": "\n\n"},
    "lstm with layer_norm": {"kind": "graphemes", "layer_norm": True, "num_layers": 2},
    "gru with skip connections": {
        **{"kind": "words", "cell": "gru", "num_layers": 3, "skip_connections": True}
    },
    "gru with layer_norm, tied": {
        **{"kind": "bytes", "cell": "gru", "layer_norm": True, "tie_embeddings": True}
    },
    "rnn, bytes of documents": {"kind": "bytes", "cell": "rnn", "stop": FILE_END},
    "gru, parts of words of documents": {"kind": "bpe", "cell": "gru", "stop": FILE_END},
}


@pytest.mark.process
@pytest.mark.parametrize("name", MODELS)
def test_probabilities_in_a_browser_equal_those_in_python(
    browser: Any, name: str, tmp_path: Path
) -> None:
    trained = make_trained(**MODELS[name])
    text = TEXT + "an unknown ¿ ≈\n\nend" + trained.vocabulary.stop + "x"
    open_page(browser, trained, tmp_path / "page.html")
    ids = browser.execute_script("return encode(arguments[0]).map(({id}) => id)", text)
    np.testing.assert_array_equal(ids, trained.vocabulary.encode(text))
    found = browser.execute_script(COMPUTE, text)
    expected = compute_probabilities(trained, text)
    assert expected.max(axis=1).std() > 0.005, "a model whose predictions vary"
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert not browser.get_log("browser")


@pytest.mark.process
def test_eight_bits_have_a_scale_for_each_row(browser: Any, tmp_path: Path) -> None:
    trained = make_trained("characters")
    # One large row must not cost the others their precision.
    trained.params["dense"]["kernel"] = trained.params["dense"]["kernel"].at[:, 5].multiply(1000)
    open_page(browser, trained, tmp_path / "page.html", bits=8)
    found = browser.execute_script(COMPUTE, TEXT[:20])
    np.testing.assert_allclose(found, compute_probabilities(trained, TEXT[:20]), atol=0.1)
    matrix = np.array([[3.0, -1.5, 0.0], [0.0, 0.0, 0.0], [1e-3, 1e-4, -1e-3]], np.float32)
    packed: Any = page.pack_rows(matrix, 8)
    integers = np.frombuffer(base64.b64decode(packed["values"]), np.int8).reshape(3, 3)
    np.testing.assert_array_equal(integers, [[127, -64, 0], [0, 0, 0], [127, 13, -127]])


def read_bars(browser: Any) -> dict[int, float]:
    """Return the probabilities that the page shows, by id."""
    return {
        int(bar.get_attribute("value")): float(bar.text.split()[-2]) / 100
        for bar in browser.find_elements("css selector", "#next button:not([hidden])")
    }


def check_bars(browser: Any, trained: workdir.Trained) -> None:
    """Assert that the page shows the probabilities after the text, without special tokens."""
    wait_until_idle(browser)
    text = browser.execute_script("return area.value")
    expected = compute_probabilities(trained, text)[-1] * (np.arange(len(trained.vocabulary)) > 1)
    expected /= expected.sum()
    bars = read_bars(browser)
    assert len(bars) == 8 and min(bars.values()) >= np.sort(expected)[-8] - 2e-3
    for token, probability in bars.items():
        assert probability == pytest.approx(expected[token], abs=2e-3)


@pytest.mark.process
def test_the_page_in_a_browser(browser: Any, trained: Path, tmp_path: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    loaded = workdir.load_trained(trained)
    done = commands.run("export", "--workdir", trained, "--to", "page.html", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    size = (tmp_path / "page.html").stat().st_size
    assert done.stdout.startswith(f"page.html ({size / 1e6:.1f} MB)")
    started = time.monotonic()
    browser.get((tmp_path / "page.html").as_uri())
    assert time.monotonic() - started < 20
    assert browser.title == "tiny: a language model in a page"

    def find(selector: str) -> Any:
        return browser.find_element("css selector", selector)

    def script(code: str) -> Any:
        return browser.execute_script(f"return {code}")

    def colored(kind: str) -> list[str]:
        shown = f"[...document.querySelectorAll('#colored {kind}')].map(s => s.textContent)"
        spans: list[str] = script(shown)
        return spans

    # The cursor is in the text at once; gray text is ahead of what is typed.
    area = browser.switch_to.active_element
    assert area.get_attribute("id") == "text"
    script("byId('temperature').value = 1, byId('temperature').dispatchEvent(new Event('input'))")
    area.send_keys("ROMEO:¿")
    check_bars(browser, loaded)
    assert "".join(colored(".typed")) == "ROMEO:¿" and colored(".unknown") == ["¿"]
    ahead = "".join(colored(".ahead"))
    assert len(ahead) == 80
    assert find("#count").text.startswith("7 characters, ")

    # A change in the middle is read from there; predictions at the cursor are marked.
    area.send_keys(Keys.BACKSPACE, "\nBut, soft! what light", *[Keys.ARROW_LEFT] * 6, "X")
    wait_until_idle(browser)
    assert script("area.value") == "ROMEO:\nBut, soft! whatX light"
    assert find("#next-title").text == "Next character at the cursor"
    area.send_keys(Keys.BACKSPACE, Keys.END, Keys.CONTROL, Keys.END)
    area.send_keys(Keys.NULL)
    check_bars(browser, loaded)
    assert find("#next-title").text == "Next character"

    # The keyboard takes a word of the text ahead, and generates; the text is what was ahead.
    ahead = "".join(colored(".ahead"))
    area.send_keys(Keys.ARROW_RIGHT)
    taken = script("area.value").removeprefix("ROMEO:\nBut, soft! what light")
    assert taken and ahead.startswith(taken)
    script("byId('length').value = 150")
    area.send_keys(Keys.CONTROL, Keys.ENTER)
    area.send_keys(Keys.NULL)
    wait_until_idle(browser)
    text = script("area.value")
    assert text.startswith("ROMEO:\nBut, soft! what light" + ahead)
    assert len(text) == len("ROMEO:\nBut, soft! what light" + taken) + 150
    assert "characters per second" in find("#status").text
    assert "".join(colored("span:not(.ahead)")) == text
    check_bars(browser, loaded)

    # Colors: surprisal in bits, then a hidden unit.
    ids = loaded.vocabulary.encode(text)
    expected = compute_probabilities(loaded, text)
    bits = -np.log2(expected[np.arange(len(ids) - 1), ids[1:]])
    mean = float(find("#count").text.split(", ")[1].split()[0])
    assert mean == pytest.approx(bits.mean(), abs=0.01)

    def alphas() -> list[float]:
        styles = script("records.slice(0, accepted).map(r => r.span.style.background)")
        return [float(style.rpartition("/")[2].rstrip(")")) for style in styles]

    np.testing.assert_allclose(alphas()[1:], np.minimum(bits / 8, 1), atol=0.01)
    find("#unit").send_keys(Keys.CONTROL, "a")
    find("#unit").send_keys("11")
    _, carry = models.apply(loaded.model, loaded.params, ids[None], loaded.model.initial_carry(1))
    assert alphas()[-1] == pytest.approx(abs(float(np.tanh(carry[0].cell[0, 11]))), abs=0.01)
    wait_until_idle(browser)
    assert "Hidden unit 11 of layer 1" in find("#state").get_attribute("aria-label")
    script("byId('state').scrollIntoView()")
    find("[value='']").click()
    assert set(script("records.map(r => r.span.style.background)")) == {""}

    # A likely token is appended by its button, with the keyboard.
    find("#next button:nth-child(2)").send_keys(Keys.ENTER)
    wait_until_idle(browser)
    assert len(script("area.value")) == len(text) + 1
    check_bars(browser, loaded)
    # Another continuation of what was typed; then an empty text.
    typed = script("area.value")
    find("#another").click()
    wait_until_idle(browser)
    assert script("area.value").startswith(typed) and len(script("area.value")) == len(typed) + 150
    # Escape stops.
    script("byId('length').value = 20000")
    find("#generate").click()
    browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    wait_until_idle(browser)
    assert len(script("area.value")) < len(typed) + 20150
    find("#clear").click()
    wait_until_idle(browser)
    assert script("area.value") == "" and len("".join(colored(".ahead"))) == 80
    assert script("document.activeElement.id") == "text"

    # Every control has an accessible name; on a phone nothing is wider than the screen.
    controls = browser.find_elements("css selector", "button, input, select, textarea, canvas")
    assert all(control.accessible_name for control in controls if control.is_displayed())
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    assert script("document.documentElement.scrollWidth") <= 390
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert not browser.get_log("browser"), "no error, and no request to the network"


@pytest.mark.process
def test_draws_follow_the_probabilities_and_a_stop_token_ends_the_text(
    browser: Any, tmp_path: Path
) -> None:
    trained = make_trained("characters", stop="\n\n")
    stop_id = trained.vocabulary.stop_id
    likely = trained.params["dense"]["bias"].at[:2].set(30)
    trained.params["dense"]["bias"] = likely.at[stop_id].set(-30)
    open_page(browser, trained, tmp_path / "page.html")
    wait_until_idle(browser)
    logits = jnp.float32(browser.execute_script("return [...logits]"))
    for temperature, top_p in ((0, 1), (0.8, 1), (1.5, 1), (1.5, 0.5)):
        script = (
            "[controls.temperature, controls.topP] = arguments; return [...distribution(logits)]"
        )
        shares = browser.execute_script(script, temperature, top_p)
        arrays = make_control_arrays(Controls(temperature, top_p=top_p), len(logits))
        adjusted = adjust_logits(logits[None], jnp.full((1, len(logits)), 99), arrays)
        np.testing.assert_allclose(shares, jax.nn.softmax(adjusted)[0], atol=1e-5)
    many = browser.execute_script(
        "controls.temperature = 1; controls.topP = 1;"
        "return Array.from({length: 20000}, (_, k) => (seed = k, draw()))"
    )
    shares = browser.execute_script("return [...distribution(logits)]")
    frequencies = np.bincount(many, minlength=len(shares)) / len(many)
    np.testing.assert_allclose(frequencies, shares, atol=0.02)
    trained.params["dense"]["bias"] = likely.at[stop_id].set(60)
    open_page(browser, trained, tmp_path / "page.html")
    browser.find_element("css selector", "#text").send_keys("It")
    browser.find_element("css selector", "#generate").click()
    wait_until_idle(browser)
    assert browser.execute_script("return area.value") == "It"
    assert browser.find_element("css selector", "#status").text.endswith("the text has ended.")
    # A document begins as in `sample`. A stop token may be typed in parts.
    read = "return records.slice(0, accepted).map(({id}) => id)"
    assert browser.find_element("css selector", "#count").text.startswith("2 tokens, ")
    for text in ("It", "It\n", "It\n\n", "It\n\nx", ""):
        browser.execute_script("area.value = arguments[0]; readText()", text)
        wait_until_idle(browser)
        ids = generation.encode_prompt(trained.vocabulary, text)
        np.testing.assert_array_equal(browser.execute_script(read), ids)


# The first two bytes of the three of each character, and words, are tokens of "bpe".
@pytest.mark.process
@pytest.mark.parametrize(
    ("kind", "text"), [("bytes", TEXT), ("bpe", TEXT + " water waters 日 旦 旧 早 旬 時" * 9)]
)
def test_a_model_of_parts_of_characters_shows_characters(
    kind: str, text: str, browser: Any, tmp_path: Path
) -> None:
    trained = make_trained(kind, text=text)
    tokens = trained.vocabulary.tokens
    parts = any("\udc80" <= token[-1] <= "\udcff" and len(token) > 1 for token in tokens[2:])
    assert parts == (kind == "bpe")
    open_page(browser, trained, tmp_path / "page.html")
    area = browser.find_element("css selector", "#text")
    browser.execute_script("controls.temperature = 1; area.value = 'It'; readText()")
    # With bpe, what is typed changes the tokens of the word, and of the space before it.
    for more in (" wa", "ter", "s", " ", " wat", "ers\n", "\n x", "日旦", "旧 é", "👍"):
        browser.execute_script("area.value += arguments[0]; readText()", more)
        check_bars(browser, trained)
    text = browser.execute_script("return area.value")
    ids = browser.execute_script("return records.slice(0, accepted).map(({id}) => id)")
    np.testing.assert_array_equal(ids, trained.vocabulary.encode(text))
    spans = "[...document.querySelectorAll('#colored .typed')].map(s => s.textContent)"
    shown = browser.execute_script(f"return {spans}")
    assert "".join(shown) == text
    if kind == "bytes":
        assert shown[-7:] == [" ", "é", "", "👍", "", "", ""]
    browser.execute_script("byId('length').value = 300; generate()")
    wait_until_idle(browser)
    generated = browser.execute_script("return area.value")
    assert generated.startswith(text) and (kind == "bpe" or "\ufffd" in generated)
    area.send_keys("x")
    wait_until_idle(browser)
    assert browser.execute_script("return area.value") == generated + "x"
    # A part of a character that is clicked is accepted with the rest; then a slider moves.
    browser.execute_script("area.value = 'x'; readText()")
    move = "byId('temperature').dispatchEvent(new Event('input'));"
    click = "const b = byId('next').firstChild; b.value = arguments[0]; b.click();"
    for token in [t for t in tokens[2:] if "\udcc2" <= t[-1] <= "\udcf4"][:3]:
        for script in (click, move, move + move):
            wait_until_idle(browser)
            browser.execute_script(script, tokens.index(token))
        wait_until_idle(browser)
        ids = browser.execute_script("return records.slice(0, accepted).map(({id}) => id)")
        spelled = "".join(tokens[i] for i in ids).encode("utf-8", "surrogateescape")
        assert browser.execute_script("return area.value") == spelled.decode("utf-8", "replace")


@pytest.mark.process
@pytest.mark.parametrize(
    ("kind", "stop", "text"),
    [("bytes", "\n\n", "café, ok"), ("graphemes", "\r\n\r\n", "ab\r\n\r\ncd\r\nef")],
)
def test_what_is_typed_key_by_key_has_the_ids_of_the_text(
    kind: str, stop: str, text: str, browser: Any, tmp_path: Path
) -> None:
    trained = make_trained(kind, stop, text)
    open_page(browser, trained, tmp_path / "page.html")
    typed = text.replace("\r", "")  # As in every text area.
    for character in typed:
        browser.execute_script("area.value += arguments[0]; readText()", character)
        wait_until_idle(browser)
    assert browser.execute_script("return area.value") == typed
    ids = browser.execute_script("return records.slice(0, accepted).map(({id}) => id)")
    np.testing.assert_array_equal(ids, generation.encode_prompt(trained.vocabulary, text))


def test_a_diverged_model_gives_no_page(trained: Path, tmp_path: Path) -> None:
    runs.make_diverged_run(trained, tmp_path / "run")
    with pytest.raises(UserError, match="the parameters in .* are not finite"):
        page.write_page(tmp_path / "run", tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("fields", "to", "message"),
    [
        ({"cell": "mogrifier"}, "page.html", "the cells lstm, gru, rnn, not mogrifier"),
        ({"cell": "my.py:Cell"}, "page.html", "the cells lstm, gru, rnn, not my.py:Cell"),
        ({"block": "residual"}, "page.html", "the cells lstm, gru, rnn, not model.block=residual"),
        ({}, "page.txt", "it must end in .html"),
        ({}, "nowhere/page.html", "can't write"),
    ],
)
def test_mistakes_give_a_one_line_error(
    fields: dict[str, Any], to: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = config_lib.default()
    config.model.update(fields)
    monkeypatch.setattr(workdir, "load_config", lambda _: config)
    monkeypatch.setattr(workdir, "load_trained", lambda _: make_trained("characters"))
    with pytest.raises(UserError) as error:
        page.write_page(tmp_path, tmp_path / to)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())
