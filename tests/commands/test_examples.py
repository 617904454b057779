"""Run the files of examples/ with a tiny model, as their docstrings say."""

import ast
import copy
import http.client
import os
import random
import re
import threading
import urllib.parse
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import classify
import commands
import lstm_jax
import novelty
import runs
from commands import get_output
from lstm_jax import ops
from lstm_jax.data.standard_texts import SPLITS

EXAMPLES = Path(__file__).parents[2] / "examples"
QUICK = EXAMPLES.parent / "experiments" / "quick.py"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_every_example_is_short_and_says_how_to_run_it(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert source.count("\n") < 100
    assert f"    python examples/{path.name} " in source.split('"""')[1]
    page = (EXAMPLES.parent / "docs" / "examples.md").read_text(encoding="utf-8")
    assert f"(../examples/{path.name})" in page


@pytest.mark.slow
def test_sentences_are_sorted_by_their_score(
    trained: Path, run: lstm_jax.Run, tmp_path: Path
) -> None:
    sentences = ["¿xqz jvk wq", "the people and the city", "The gods be with you all"]
    path = tmp_path / "sentences.txt"
    path.write_text("\n\n".join(sentences), encoding="utf-8")
    output = get_output("examples/score.py", trained, path)
    rows = [line.split("  ", 1) for line in output.splitlines()]
    assert sorted(sentence for _, sentence in rows) == sorted(sentences)
    assert rows[-1][1] == sentences[0]
    for bits, sentence in rows:
        whole = run.score(f"\n\n{sentence}\n").log_probs[1:]
        # What the model does not know counts eight bits more for its two bytes and their end.
        total = -whole.sum() / np.log(2) + 24 * sentence.count("¿")
        assert float(bits) == pytest.approx(total / (len(sentence) + 1), abs=1e-3)


@pytest.mark.slow
def test_a_chat_continues_all_that_was_read(trained: Path, run: lstm_jax.Run) -> None:
    lines = ("/next", "ROMEO:", "", "/undo", "/undo", "/undo", "ROMEO:", "/reset", "/next")
    flags = "--length=20", "--temperature=0"
    output = get_output("examples/chat.py", trained, *flags, stdin="\n".join(lines))
    likely = "".join(f"{share:.4f}  {token!r}\n" for token, share in run.next("", n=5))
    whole = run.generate("ROMEO:", length=40, temperature=0).removeprefix("ROMEO:")
    first, second = whole[:20], whole[20:]
    assert output == f"{likely}{first}\n{second}\n{first}\n{likely}"
    for mistake, message in (("--temperature=-1", "is -1"), ("--length=0", "is 0"), ("a b", "a b")):
        result = commands.run("examples/chat.py", trained, mistake)
        (line,) = result.stderr.splitlines()
        assert result.returncode == 2 and message in line


@pytest.mark.slow
def test_the_speaker_is_classified(trained: Path, text_file: Path) -> None:
    output = get_output("examples/classify.py", trained, text_file, "First Citizen", "MENENIUS")
    assert re.fullmatch(r"\d+ speeches: accuracy 0\.\d+; the majority class 0\.\d+\n", output)
    labels = np.arange(40) % 2
    assert classify.cross_validate(labels[:, None] + 0.0, labels) == 1


@pytest.mark.slow
def test_the_server_streams_to_two_readers_at_once(run: lstm_jax.Run) -> None:
    uvicorn = pytest.importorskip("uvicorn", reason="uvicorn isn't installed (extra 'examples')")
    pytest.importorskip("fastapi", reason="fastapi isn't installed (extra 'examples')")
    from server import make_app

    server = uvicorn.Server(uvicorn.Config(make_app(run), port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            thread.join(0.05)
            assert thread.is_alive()
        port = server.servers[0].sockets[0].getsockname()[1]

        def request(**query: object) -> http.client.HTTPResponse:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            connection.request("GET", f"/generate?{urllib.parse.urlencode(query)}")
            return connection.getresponse()

        responses = [request(prompt="The ", length=300, seed=seed) for seed in (1, 2)]
        first = [response.read1().decode() for response in responses]
        rest = [response.read().decode() for response in reversed(responses)][::-1]
        for seed, beginning, end in zip((1, 2), first, rest, strict=True):
            assert beginning and end, "the text came in one piece"
            assert f"The {beginning}{end}" == run.generate("The ", length=300, seed=seed)
        refused = request(temperature=-1)
        assert refused.status == 400 and b"temperature is -1" in refused.read()
    finally:
        server.should_exit = True
        thread.join()


@pytest.mark.slow
def test_the_compressor_writes_what_the_loss_promises_and_detects_damage(
    run: lstm_jax.Run, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("constriction", reason="constriction isn't installed (extra 'examples')")
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))  # The import changes it.
    from compress import pack, unpack

    text = text_file.read_bytes()[:1000]
    whole, data = pack(run, text), pack(run, text, block_length=300)
    assert unpack(run, whole) == unpack(run, data) == text and len(whole) < len(data)
    loss = -run.score(text.decode()).log_probs.sum(dtype=np.float64) + np.log(len(run.vocabulary))
    # 16 bytes of the header, 4 for the number of blocks and 12 for each; whole words of 4 bytes.
    assert abs(len(whole) - 32 - loss / np.log(2) / 8) < 0.002 * len(whole) + 8
    damaged = [data[:-1], data[:20], b""]
    for at in (7, 13, 16, 19, 25, -90):
        damaged.append(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    for wrong in damaged:
        with pytest.raises(lstm_jax.UserError, match="damaged, or of another model or"):
            unpack(run, wrong)
    for unknown in (b"", "é".encode()):
        with pytest.raises(lstm_jax.UserError, match="characters that the model lacks"):
            pack(run, unknown)


def interpolate(text: str, context: str, character: str, size: int) -> float:
    """Return the probability of a character after a context, by the equation of ngrams.py."""
    ends = range(len(context), len(text))
    after = [text[i] for i in ends if text[i - len(context) : i] == context]
    types = len(set(after))
    shorter = interpolate(text, context[1:], character, size) if context else 1 / size
    return (after.count(character) + types * shorter) / (len(after) + types) if after else shorter


def test_the_probabilities_of_n_grams_sum_to_one() -> None:
    from ngrams import NGrams

    text, read = "abracadabra cabbage abba", "abbr abcab"
    size = len(set(text)) + 1  # One character is any other.
    for n in range(1, 5):
        ngrams, whole = NGrams(size, n), text + read
        places = range(len(text), len(whole))
        ngrams.read(text)
        expected = [interpolate(whole[:i], whole[i - n + 1 : i], whole[i], size) for i in places]
        np.testing.assert_allclose(ngrams.read(read)[0], expected, rtol=1e-12)
        ends = [copy.deepcopy(ngrams).read(end)[0] for end in [*set(text), "?"]]
        np.testing.assert_allclose(np.sum(ends), 1, rtol=1e-12)


def test_the_weights_of_a_mixture_are_the_best() -> None:
    from ngrams import fit_weights

    rng = np.random.default_rng(0)
    experts, lengths = rng.uniform(0.01, 1, [2, 400]), rng.integers(2, size=400)
    weights = fit_weights(experts, lengths, 3)
    share = np.linspace(0, 1, 101)[:, None]
    for length in range(2):
        first, second = experts[:, lengths == length]
        grid = -np.log(share * first + (1 - share) * second).mean(axis=1)
        mixed = weights[length] @ experts[:, lengths == length]
        assert -np.log(mixed).mean() == pytest.approx(grid.min(), abs=1e-4)
    np.testing.assert_array_equal(weights[2], [1, 0])


def test_n_grams_are_mixed_with_a_model(trained: Path, text_file: Path, tmp_path: Path) -> None:
    text, paths = text_file.read_text(encoding="utf-8"), [tmp_path / name for name in "abc"]
    for path, part in zip(paths, (text[:9000], text[9000:9500], text[9500:9900]), strict=True):
        path.write_text(part, encoding="utf-8")
    for more in ([], ["--dynamic", "1e-3", "0.003", "50"]):
        output = get_output("examples/ngrams.py", f"{trained},{trained}", *paths, *more)
        for line in output.splitlines():
            model, *ngrams, mixed = map(float, re.findall(r"\d\.\d{4}", line))
            assert mixed < min(model, *ngrams)


@pytest.mark.slow
def test_a_loop_of_your_own_trains_like_the_package(text_file: Path, tmp_path: Path) -> None:
    flags = [*runs.TINY, f"--config.data.path={text_file}", "--config.num_epochs=1"]
    flags += ["--config.model.dtype=float32"]
    flags += ["--config.regularization.embedding_dropout=0.0"]  # `main` draws a table's rows.
    command = "examples/training_loop.py", f"--config={QUICK}", *flags
    losses = ast.literal_eval(get_output(*command))
    get_output("main", f"--config={QUICK}", f"--workdir={tmp_path}", *flags)
    rows = {split: loss for _, split, loss in runs.read_losses(tmp_path)}
    for split in ("validation", "test"):
        assert losses[split] == pytest.approx(rows[split], abs=2e-4)
    others = ["--optimizer=ademamix", "--batches=8x32x1,16x16x1", "--decode_past=0.1"]
    others += ["--config.optimizer.max_gradient_norm=0.0"]  # Off.
    assert ast.literal_eval(get_output(*command, *others))["train"] < 3


@pytest.mark.slow
def test_a_student_learns_from_what_its_teachers_wrote(text_file: Path, tmp_path: Path) -> None:
    flags = [f"--config={QUICK}", *runs.TINY, f"--config.data.path={text_file}"]
    flags += ["--config.max_steps=30", "--teachers=2", "--epochs=1", f"--out={tmp_path}"]
    for _ in range(2):  # The second time, all is done.
        get_output("examples/student.py", *flags)
    student = lstm_jax.load(tmp_path / "student")
    assert student.config.init_from == str(tmp_path / "teacher_1") and student.step <= 30
    text = text_file.read_text(encoding="utf-8")
    train, validation, test = (
        (tmp_path / f"{name}.txt").read_text(encoding="utf-8") for name in SPLITS
    )
    read = text[: len(text) - len(validation + test)]
    assert text == read + validation + test and train.count(read) == 2 and train.endswith(read)
    assert 5.9 * len(read) < len(train) < 6.1 * len(read) + 256


def test_novelty_is_that_of_a_brute_force_search() -> None:
    rng = random.Random(0)
    training_text = "".join(rng.choices("ab\n", k=2000))
    text = "".join(rng.choices("ab\n", k=100))
    for length in (19, 20, 21, 22, 60):
        start = rng.randrange(1900)
        text += training_text[start : start + length] + rng.choice(["", "c"])
    runs_of = [
        (i, j)
        for i in range(len(text))
        for j in range(i, len(text) + 1)
        if text[i:j] in training_text
    ]
    copied = {k for i, j in runs_of if j - i > novelty.COMMON for k in range(i, j)}
    longest, share = novelty.measure_novelty(text, training_text)
    assert len(longest) == max(j - i for i, j in runs_of) and longest in training_text
    assert share == len(copied) / len(text) > 0.2
    assert novelty.measure_novelty("", "a") == ("", 0)


@pytest.mark.slow
def test_a_text_and_the_most_probable_one(trained: Path, text_file: Path) -> None:
    output = get_output("examples/novelty.py", trained, text_file, "--length", 200)
    longest = output.partition("the longest passage has ")[2].partition(": ")[2]
    assert ast.literal_eval(longest) in text_file.read_text(encoding="utf-8")
    output = get_output("examples/beam_search.py", trained, "ROMEO:", "--length=9", "--beams=3")
    assert output.count("'ROMEO:") == output.count("\n") == 3


@pytest.mark.slow
def test_a_policy_with_memory_recalls_the_cue() -> None:
    import recall

    inputs, first, last, cue = map(np.asarray, recall.draw_steps(jax.random.key(0)))
    assert np.array_equal(inputs[..., :4].sum(axis=-1), first)
    assert np.array_equal(inputs[..., :4][first].argmax(axis=-1), cue[first])
    changed = (np.diff(cue, axis=1) != 0).any(axis=0)
    assert changed.any() and not changed[:3].any()
    assert np.array_equal(last[:, :-1], first[:, 1:])
    assert recall.train(0, 150, has_memory=True) > 0.8
    assert 0.2 < recall.train(0, 150, has_memory=False) < 0.3


@pytest.mark.slow
def test_an_agent_learns_from_the_probabilities_that_it_acted_with() -> None:
    import actor_critic

    key, ones = jax.random.key(1), np.ones(actor_critic.ENVIRONMENTS, int)
    head = jax.random.normal(key, [actor_critic.HIDDEN, 4])
    params = {"lstm": ops.LSTMParams.init(key, 2, actor_critic.HIDDEN), "head": head}
    before: Any = ones, 0 * ones, ones == 1, ops.LSTMCarry.zeros(len(ones), actor_critic.HIDDEN)
    before, _ = actor_critic.play(params, before, key)
    _, steps = actor_critic.play(params, before, key)
    assert 0 < steps[1][:, 1:].mean() < 0.5, "episodes begin within the steps"
    _, log_prob = actor_critic.compute_loss(params, before[-1], steps)
    np.testing.assert_allclose(log_prob, steps[3], atol=1e-5)
    shares = actor_critic.train(seed=0, updates=50)
    assert shares[:10].mean() < 0.6 and shares[-5:].mean() > 0.95


@pytest.mark.slow
def test_a_forecast_reads_no_later_year() -> None:
    pytest.importorskip("statsmodels", reason="statsmodels isn't installed (extra 'examples')")
    import forecast

    output = get_output("examples/forecast.py", "--steps", 100, "--seeds", 2, "--until", 249)
    errors = re.findall(r"error ([\d.]+) sunspots", output)
    numbers = forecast.sunspots.load_pandas().endog.to_numpy()[:249]
    naive = np.abs(np.diff(numbers))[-60:].mean()
    assert float(errors[0]) == pytest.approx(naive, abs=0.06)
    assert float(errors[2]) < 0.8 * naive
    series = np.sin(np.arange(40, dtype=np.float32))
    params = forecast.fit(jax.random.key(0), jax.numpy.asarray(series), 2)
    full, part = (forecast.predict(params, jax.numpy.asarray(x)) for x in (series, series[:30]))
    np.testing.assert_allclose(full[:29], part, atol=1e-6)
    later = forecast.fit_autoregression(np.append(series[:30], np.zeros(10)), 30)
    np.testing.assert_allclose(later[:21], forecast.fit_autoregression(series, 30)[:21], atol=1e-5)
