"""Byte-pair encoding: learn the tokens of a text, and split its words into them.

Sennrich et al. 2016, with bytes as the smallest tokens. To learn, merge the most frequent pair of
neighboring tokens within words to a new token, and repeat. To split a word, start from its bytes
and merge neighbors, always those whose merged token was learned first.
"""

import itertools
from collections.abc import Iterator, Mapping

import regex

from lstm_jax.background import call_in_thread
from lstm_jax.errors import UserError

# The words, whose ends no token crosses, much as in GPT-2 (Radford et al. 2019): letters with their
# accents, digits or other characters, each with the space before them; line breaks with the white
# space before them; and other white space. They have 32 characters at most, to bound the time of
# `split_word` in texts without spaces. JavaScript reads the same pattern (`export`), but its `\s`
# matches other characters than Python's.
WORDS = regex.compile(
    r"'(?:s|t|re|ve|m|ll|d)| ?[\p{L}\p{M}]{1,32}| ?\p{N}{1,32}"
    r"| ?[^\p{White_Space}\p{L}\p{M}\p{N}]{1,32}|\p{White_Space}{0,31}[\r\n]"
    r"|\p{White_Space}{1,32}(?!\P{White_Space})|\p{White_Space}{1,32}"
)
_END = "\u0100"  # Between words; the characters up to U+00FF are the 256 bytes.
_REPEATED = 1000  # Copies of a word passed to the trainer at a time.


def learn_tokens(counts: Mapping[str, int], number: int, min_count: int) -> list[str]:
    """Learn up to `number` tokens of two or more bytes, in the order of their merges.

    Args:
      counts: the number of occurrences of each word.
      number: the maximum number of tokens.
      min_count: the minimum number of occurrences of a pair that becomes a token.

    Raises:
      UserError: if the package `tokenizers` is missing.
    """
    if number <= 0:
        return []
    try:
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    except ImportError:
        raise UserError(
            "data.units=bpe needs the package tokenizers to learn the tokens of a text: "
            "pip install 'lstm-jax[bpe]'"
        ) from None

    def repeat_words() -> Iterator[str]:
        for word, count in counts.items():
            spelled = word.encode().decode("latin-1") + _END
            for start in range(0, count, _REPEATED):
                yield spelled * min(_REPEATED, count - start)

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.CharDelimiterSplit(_END)
    alphabet = list(map(chr, range(256)))
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + number,
        min_frequency=min_count,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    call_in_thread(tokenizer.train_from_iterator, repeat_words(), trainer)
    ids = tokenizer.get_vocab()
    learned = sorted(ids.keys() - set(alphabet), key=ids.__getitem__)
    return [token.encode("latin-1").decode("utf-8", "surrogateescape") for token in learned]


def split_word(word: str, ids: Mapping[bytes, int]) -> tuple[str, ...]:
    """Split a word into its tokens.

    `ids` maps the bytes of each token to its id; a lower id was learned earlier.
    A byte that is not part of a complete character is a surrogate.
    """
    tokens = [bytes([byte]) for byte in word.encode("utf-8", "surrogateescape")]
    none = len(ids)
    merged = [ids.get(a + b, none) for a, b in itertools.pairwise(tokens)]
    while merged and (first := min(merged)) < none:
        at = merged.index(first)
        tokens[at : at + 2] = [tokens[at] + tokens[at + 1]]
        del merged[at]
        for i in range(max(at - 1, 0), min(at + 1, len(merged))):
            merged[i] = ids.get(tokens[i] + tokens[i + 1], none)
    return tuple(token.decode("utf-8", "surrogateescape") for token in tokens)
