"""Put a trained model into a web page: `python -m lstm_jax.export --workdir DIR --to page.html`.

The page contains the weights and generates text in the browser, without a server or a network.
"""

if __name__ == "__main__":
    from lstm_jax.run import interrupts

    interrupts.exit_at_once()  # While the rest is imported, which takes seconds.

from pathlib import Path

from absl import flags

from lstm_jax.errors import UserError
from lstm_jax.run import command

_WORKDIR = flags.DEFINE_string("workdir", None, f"{command.TRAINED}.")
flags.DEFINE_alias("model", "workdir")
_TO = flags.DEFINE_string("to", None, "Page to write, for example page.html.")
_BITS = flags.DEFINE_enum("bits", "16", ["8", "16"], "Bits of each weight in the page.")


def main() -> None:
    """Write the page."""
    if _WORKDIR.value is None:
        raise UserError("specify the trained model: --workdir DIR")
    if _TO.value is None:
        raise UserError("specify the page to write: --to page.html")
    # Here, because it imports JAX, which --help does not need.
    from lstm_jax.export import page

    page.write_page(Path(_WORKDIR.value), Path(_TO.value), int(_BITS.value))


if __name__ == "__main__":
    command.run_command(main)
