"""Run the notebook of the lesson and check its results."""

import math
import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

pytestmark = pytest.mark.process  # Of Jupyter.

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "lstm_and_sequence_generation.ipynb"


def get_printed_text(notebook: nbformat.NotebookNode) -> dict[str, str]:
    """Return the standard output of each code cell, by the id of the cell."""
    return {
        cell.id: "".join(output.text for output in cell.outputs if output.get("name") == "stdout")
        for cell in notebook.cells
        if cell.cell_type == "code"
    }


def list_images(notebook: nbformat.NotebookNode) -> list[str]:
    """Return the PNG images among the outputs, in base 64."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [o.data["image/png"] for o in outputs if "image/png" in o.get("data", {})]


@pytest.fixture(scope="module")
def lesson(
    tmp_path_factory: pytest.TempPathFactory, data_dir: Path, shakespeare: dict[str, str]
) -> Iterator[nbformat.NotebookNode]:
    """Run the notebook at the small size; a cell that fails raises an error."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    folder = tmp_path_factory.mktemp("notebook")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LSTM_JAX_LESSON", "small")
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "False")  # It trains for half a minute.
        patch.setenv("TFDS_DATA_DIR", str(data_dir))
        client = NotebookClient(
            notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": folder}}
        )
        yield client.execute()


def test_it_runs_and_draws(lesson: nbformat.NotebookNode) -> None:
    assert not [o for c in lesson.cells for o in c.get("outputs", []) if o.get("name") == "stderr"]
    assert len(list_images(lesson)) == 10


def test_its_numbers_are_right(lesson: nbformat.NotebookNode) -> None:
    text = get_printed_text(lesson)
    assert "agree: True" in text["run-lstm"]
    assert "the same logits? True" in text["make-model"]
    assert text["write-step"].startswith("ROMEO:") and "the same text? True" in text["write-whole"]
    (loss,) = re.findall(r"untrained loss ([\d.]+)", text["untrained-loss"])
    assert float(loss) == pytest.approx(math.log(67), abs=0.02)
    (trained,) = re.findall(r"validation ([\d.]+) nats", text["train-lstm"])
    assert float(trained) < 3


def test_the_gradient_of_the_trained_rnn_vanishes_faster(lesson: nbformat.NotebookNode) -> None:
    found = re.findall(r"k = (\d+): .* is (\S+) times", get_printed_text(lesson)["gradient-ratio"])
    ratios = {int(k): float(ratio) for k, ratio in found}
    assert 1 < ratios[20] < ratios[50] < ratios[100] < math.inf
    assert ratios[50] > 100


def test_it_is_stored_with_its_outputs_and_small() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert len(list_images(notebook)) == 10
    assert "the same text? True" in get_printed_text(notebook)["write-whole"]
    assert NOTEBOOK.stat().st_size < 1.5e6
