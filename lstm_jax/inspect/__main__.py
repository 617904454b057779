"""What a model has learnt, as one page: `python -m lstm_jax.inspect --workdir DIR --text FILE`.

After Karpathy, Johnson & Fei-Fei 2015, "Visualizing and Understanding Recurrent Networks". The
page, `report.html` with its data put in, needs nothing but a browser.
"""

if __name__ == "__main__":
    from lstm_jax.run import interrupts

    interrupts.exit_at_once()  # While the rest is imported, which takes seconds.

import sys
from pathlib import Path

from absl import flags

from lstm_jax import command
from lstm_jax.data import sources, texts
from lstm_jax.errors import UserError
from lstm_jax.inspect import report
from lstm_jax.run import files, workdir


def main() -> None:
    """Writes the page."""
    values = flags.FLAGS
    if values.workdir is None:
        raise UserError("name the trained model: --workdir DIR")
    directory = Path(values.workdir)
    out = Path(values.out) if values.out else directory / report.REPORT
    _check_out(out, given=bool(values.out))
    trained = workdir.load_trained(directory)
    any_bytes = trained.vocabulary.kind == "bytes"
    if values.text:
        text = sources.read_argument(values.text, "--text", any_bytes)
        name = "standard input" if values.text == "-" else Path(values.text).name
    else:
        splits = texts.load_texts_of_run(
            trained.config.data, values.data_path, values.dataset, values.data_directory
        )
        text = next(splits["validation"].pieces(0))
        name = "the validation split"
    units = trained.vocabulary.split(text)
    if len(units) < 2:
        raise UserError(f"{name} is too short: --text must name a file of two units or more")
    if len(units) > values.length:
        print(
            f"reading the first {values.length:,} of {len(units):,} {trained.vocabulary.kind} "
            "(--length)",
            file=sys.stderr,
        )
        text = "".join(units[: values.length])
        if any_bytes:  # A character may have been cut.
            raw = text.encode("utf-8", "surrogateescape")
            text = raw.decode("utf-8", "surrogateescape")
    page = report.make_page(trained, text, name, directory)
    try:
        files.write_file(out, page)
    except OSError as error:
        raise UserError(f"can't write {out} (--out): {error.strerror}") from None
    print(f"{out} ({len(page) / 1e6:.1f} MB): open it in a browser")


def _check_out(out: Path, given: bool) -> None:
    """A page that could not be written is refused before the model reads."""
    if out.is_dir():
        raise UserError(
            f"{out} is a directory: --out must name a file, such as {out / report.REPORT}"
        )
    # Without --out the page goes to the working directory; if that is missing, loading tells so.
    if given and not out.parent.is_dir():
        raise UserError(f"there is no directory {out.parent}: make it, or name another --out")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Working directory of a training run.")
    flags.DEFINE_string("text", None, "The text to read; the run's validation split by default.")
    flags.DEFINE_string(
        "out", None, f"The page; {report.REPORT} in the working directory by default."
    )
    flags.DEFINE_integer(
        "length",
        100_000,
        "How many characters, words or bytes to read at most; it takes as many bytes of memory for "
        "each cell.",
        lower_bound=2,
        upper_bound=10**6,
    )
    command.define_text_flags()
    command.run_command(main)
