"""What several commands print: a text, the parameters of a model, a loss."""

import math

import jax
from flax.traverse_util import flatten_dict

from lstm_jax import loss as loss_lib
from lstm_jax import model as model_lib
from lstm_jax.vocabulary import FILE_END, TextSize

# Control characters, which a terminal executes, as escapes; bytes that are not UTF-8 as U+FFFD.
_PRINTABLE = {n: f"\\x{n:02x}" for n in (*range(32), *range(127, 160)) if chr(n) not in "\t\n\r"}
_PRINTABLE |= {**dict.fromkeys(range(0xD800, 0xE000), "\ufffd"), ord(FILE_END): "\n\n"}


def make_printable(text: str) -> str:
    r"""Return a text that a terminal shows: \x1b is an escape, the end of a file a blank line."""
    return text.translate(_PRINTABLE)


def format_parameters(params: model_lib.Params) -> str:
    """Return a table of the shapes and sizes of all parameters, with a sum for each layer."""
    rows: list[tuple[str, str, int]] = []
    for layer in sorted(
        params, key=lambda name: (name != "embedding", name == "dense", len(name), name)
    ):
        arrays = flatten_dict(params[layer], sep="/")
        rows.append((layer, "", sum(array.size for array in arrays.values())))
        rows += [(f"  {name}", str([*array.shape]), array.size) for name, array in arrays.items()]
    rows.append(("total", "", sum(array.size for array in jax.tree.leaves(params))))
    width = max(len(name) for name, _, _ in rows)
    return "\n".join(f"{name:<{width}}  {shape:>14}  {count:>12,}" for name, shape, count in rows)


def describe_loss(loss: float, token_name: str, size: TextSize) -> str:
    """Return a loss in nats and bits per token, as a perplexity, and in bits per character."""
    bits = loss_lib.compute_bits_per_character(loss, [size])
    is_character = token_name == "character"  # Then bits are printed once.
    described = (
        f"{loss:.4f} nats per {token_name}, "
        f"{bits if is_character else loss / math.log(2):.4f} bits per {token_name}, "
        f"perplexity {loss_lib.compute_perplexity(loss):.3f}"
    )
    return described if is_character else f"{described}, {bits:.4f} bits per character"
