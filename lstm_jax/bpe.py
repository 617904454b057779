"""Byte-pair encoding: learn the tokens of a text, and split its words into them.

Sennrich et al. 2016, with bytes as the smallest tokens. To learn, merge the most frequent pair of
neighboring tokens within words to a new token, and repeat. To split a word, start from its bytes
and merge neighbors, always those whose merged token was learned first. The package `tokenizers`
does both; here, each byte is the character with its number.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import regex

from lstm_jax.errors import UserError

# The words, whose ends no token crosses, much as in GPT-2 (Radford et al. 2019): letters with their
# accents, digits or other characters, each with the space before them; line breaks with the white
# space before them; and other white space. They have 32 characters at most, to bound the time to
# split one in texts without spaces. JavaScript reads the same pattern (`export`), but its `\s`
# matches other characters than Python's.
WORDS = regex.compile(
    r"'(?:s|t|re|ve|m|ll|d)| ?[\p{L}\p{M}]{1,32}| ?\p{N}{1,32}"
    r"| ?[^\p{White_Space}\p{L}\p{M}\p{N}]{1,32}|\p{White_Space}{0,31}[\r\n]"
    r"|\p{White_Space}{1,32}(?!\P{White_Space})|\p{White_Space}{1,32}"
)
_LONGEST = 1 + 32 * 4  # Bytes of a word.
_ALPHABET = list(map(chr, range(256)))
_END = "\u0100"  # Between words; the characters up to U+00FF are the 256 bytes.
_REPEATED = 1000  # Copies of a word passed to the trainer at a time.


def learn_tokens(counts: Mapping[str, int], number: int, min_count: int) -> list[str]:
    """Learn up to `number` tokens of two or more bytes, in the order of their merges.

    `counts` are the occurrences of each word; a pair that occurs `min_count` times becomes a token.
    """
    if number <= 0:
        return []
    tokenizers = _import_tokenizers()
    corpus = (
        (_spell(word) + _END) * min(_REPEATED, count - start)
        for word, count in counts.items()
        for start in range(0, count, _REPEATED)
    )
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.CharDelimiterSplit(_END)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=len(_ALPHABET) + number,
        min_frequency=min_count,
        initial_alphabet=_ALPHABET,
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    ids = tokenizer.get_vocab()
    return list(map(_read, sorted(ids.keys() - set(_ALPHABET), key=ids.__getitem__)))


def make_splitter(subwords: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """Return a function that splits a word into its tokens, of `subwords`, in their order."""
    tokenizers = _import_tokenizers()
    ids = {token: i for i, token in enumerate([*_ALPHABET, *map(_spell, subwords)])}
    # All pairs that form a token, not only that which was merged to it.
    merges = [
        (token[:i], token[i:])
        for token in ids
        if len(token) <= _LONGEST  # A longer one is never part of a word.
        for i in range(1, len(token))
        if token[:i] in ids and token[i:] in ids
    ]
    model = tokenizers.models.BPE(ids, merges)
    return lambda word: tuple(_read(token.value) for token in model.tokenize(_spell(word)))


def _spell(word: str) -> str:
    """Return the bytes of a word, as the characters with their numbers."""
    return word.encode("utf-8", "surrogateescape").decode("latin-1")


def _read(characters: str) -> str:
    """Return the word; a byte that is not part of a complete character is a surrogate."""
    return characters.encode("latin-1").decode("utf-8", "surrogateescape")


def _import_tokenizers() -> Any:
    """Return the package `tokenizers`; raise `UserError` if it is missing."""
    try:
        import tokenizers
    except ImportError:
        raise UserError(
            "--config.data.units=bpe needs the package tokenizers: pip install tokenizers"
        ) from None
    return tokenizers
