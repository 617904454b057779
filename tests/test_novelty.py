import random
import time

import pytest

from lstm_jax.sample import novelty


def measure_naively(text: str, training_text: str) -> tuple[int, float]:
    longest, copied = 0, set()
    for start in range(len(text)):
        end = start
        while end < len(text) and text[start : end + 1] in training_text:
            end += 1
        longest = max(longest, end - start)
        if end - start > 20:
            copied |= set(range(start, end))
    return longest, len(copied) / max(len(text), 1)


def test_matches_a_brute_force_search() -> None:
    rng = random.Random(0)
    for _ in range(10):
        training_text = "".join(rng.choices("ab\n", k=3000))
        text = "".join(rng.choices("ab\n", k=150))
        for length in (19, 20, 21, 22, 60):
            start = rng.randrange(2900)
            text += training_text[start : start + length] + rng.choice(["", "c"])
        found = novelty.measure_novelty(text, [training_text])
        assert (len(found.longest_run), found.copied_share) == measure_naively(text, training_text)
        assert found.longest_run in text and found.longest_run in training_text


@pytest.mark.parametrize("text", ["", "a", "x", "ab" * 12, "😀\ud800b"])
def test_short_texts(text: str) -> None:
    for training_text in ("", "b", "ab" * 11, "a😀\ud800"):
        found = novelty.measure_novelty(text, [training_text])
        assert (len(found.longest_run), found.copied_share) == measure_naively(text, training_text)


def test_a_megabyte_takes_less_than_a_second(shakespeare: dict[str, str]) -> None:
    training_text = shakespeare["train"]
    text = shakespeare["test"][:2000] + training_text[500_000:500_400]
    started = time.process_time()
    found = novelty.measure_novelty(text, [training_text])
    assert time.process_time() - started < 1
    assert len(found.longest_run) >= 400 and 400 / 2400 <= found.copied_share < 0.3
