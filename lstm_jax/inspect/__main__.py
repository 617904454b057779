"""Show what a model has learned: `python -m lstm_jax.inspect --workdir DIR --text FILE`.

Write one page about the activations of the model while it reads a text, after Karpathy, Johnson &
Fei-Fei 2015, "Visualizing and Understanding Recurrent Networks". The page needs only a browser.
"""

if __name__ == "__main__":
    from lstm_jax.run import interrupts

    interrupts.exit_at_once()  # While the rest is imported, which takes seconds.

from pathlib import Path

from absl import flags

from lstm_jax.errors import UserError
from lstm_jax.run import command

_RUN, _TEXT_OF_RUN = command.define_run_flags(), command.define_text_flags()
_TEXT = flags.DEFINE_string(
    "text", None, "Text to read; - is standard input. [default: the run's validation split]"
)
_OUT = flags.DEFINE_string("out", None, "Page to write. [default: report.html in --workdir]")
_LENGTH = flags.DEFINE_integer(
    "length",
    100_000,
    "Maximum number of tokens to read. Each takes one byte of memory per hidden unit.",
    lower_bound=2,
    upper_bound=10**6,
)


def main() -> None:
    """Write the page."""
    directories, own_text = _RUN(), _TEXT_OF_RUN()
    # Here, because it imports JAX, which --help does not need.
    from lstm_jax.inspect import report

    if len(directories) > 1:
        raise UserError("the page is about one model: give --workdir once")
    out = Path(_OUT.value) if _OUT.value else None
    report.write_report(directories[0], _TEXT.value, *own_text, out=out, length=_LENGTH.value)


if __name__ == "__main__":
    command.run_command(main)
