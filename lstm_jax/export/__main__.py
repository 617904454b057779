"""Make a web page about a trained model: `python -m lstm_jax.export --workdir DIR`.

The page shows what the model expects in a text, and what its hidden units follow; it generates text
if it can run the model's cell. It needs only a browser.
"""

from absl import flags

from lstm_jax.errors import UserError
from lstm_jax.run import command

_RUN, _TEXT_OF_RUN = command.define_run_flags(), command.define_text_flag()
_TEXT = flags.DEFINE_string(
    "text", None, "Text to read; - is standard input. [default: the run's validation split]"
)
_TO = flags.DEFINE_string("to", None, "Page to write. [default: page.html in --workdir]")


def main() -> None:
    """Write the page."""
    directories = _RUN()
    if len(directories) > 1:
        raise UserError("the page is about one model: give --workdir once")
    # Here, because it imports JAX, which --help does not need.
    from lstm_jax.export import page
    from lstm_jax.run.workdir import expand_path

    text = page.read_text(directories[0], _TEXT.value, _TEXT_OF_RUN.value)
    page.write_page(directories[0], text, expand_path(_TO.value) if _TO.value else None)


if __name__ == "__main__":
    command.run_command(main)
