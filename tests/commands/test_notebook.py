"""Run the notebook of the lesson with the answers of its exercises, and check the results."""

import math
import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "lstm_and_sequence_generation.ipynb"


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


def insert_answers(notebook: nbformat.NotebookNode) -> None:
    """Insert the code of each answer after its exercise, as a cell with the id answer-..."""
    cells = []
    for cell in notebook.cells:
        cells.append(cell)
        if cell.id.startswith("exercise-"):
            (code,) = re.findall(r"<details>.*?```python\n(.*?)```.*</details>", cell.source, re.S)
            cell_id = cell.id.replace("exercise", "answer")
            cells.append(nbformat.v4.new_code_cell(code, id=cell_id))
    notebook.cells = cells


@pytest.fixture(scope="module")
def lesson(
    tmp_path_factory: pytest.TempPathFactory, data_dir: Path, shakespeare: dict[str, str]
) -> Iterator[nbformat.NotebookNode]:
    """Run the notebook at the small size, with fewer steps; a cell that fails raises an error."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    insert_answers(notebook)
    (imports,) = (cell for cell in notebook.cells if cell.id == "imports")
    imports.source += "\nconfig.max_steps = 60"
    folder = tmp_path_factory.mktemp("notebook")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LSTM_JAX_LESSON", "small")
        patch.setenv("TFDS_DATA_DIR", str(data_dir))
        client = NotebookClient(
            notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": folder}}
        )
        yield client.execute()


@pytest.mark.process
def test_its_numbers_are_right(lesson: nbformat.NotebookNode) -> None:
    outputs = [output for cell in lesson.cells for output in cell.get("outputs", [])]
    errors = "".join(output.text for output in outputs if output.get("name") == "stderr")
    # Warnings of JAX and Orbax, if another test is writing what they read, or a thread is late.
    known = ("persistent compilation cache", "Metadata file does not exist")
    assert not [line for line in errors.splitlines() if not any(map(line.count, known))]
    assert len(list_images(lesson)) == 12
    text = get_printed_text(lesson)
    assert "agree: True" in text["run-lstm"]
    assert "the same logits? True" in text["make-model"]
    assert text["write-step"].startswith("ROMEO:") and "the same text? True" in text["write-whole"]
    (loss,) = re.findall(r"untrained loss ([\d.]+)", text["untrained-loss"])
    assert float(loss) == pytest.approx(math.log(67), abs=0.02)
    (trained,) = re.findall(r"validation ([\d.]+) nats", text["train-lstm"])
    assert float(trained) < 3

    # The loop and the package have the same losses.
    rows = re.findall(r"(\w+) +(\d\.\d+) +(\d\.\d+)", text["loop-compared"])
    assert [name for name, *_ in rows] == ["50", "100", "150", "200", "250", "300", "validation"]
    for _, ours, theirs in rows:
        assert float(ours) == pytest.approx(float(theirs), abs=0.01)

    # The gradient of the trained RNN vanishes faster. At the small size, the GRU has not learned to
    # remember.
    rows = re.findall(r"k = (\d+): the (\w+)'s .* is (\S+) times", text["gradient-ratio"])
    ratios = {(name, int(k)): float(ratio) for k, name, ratio in rows}
    assert 1 < ratios["LSTM", 20] < ratios["LSTM", 50] < ratios["LSTM", 100] < math.inf
    assert ratios["LSTM", 50] > 100 and all(ratios["GRU", k] > 0 for k in (20, 50, 100))


@pytest.mark.process
def test_the_answers_are_right(lesson: nbformat.NotebookNode) -> None:
    text = get_printed_text(lesson)
    exercises = [cell.id for cell in lesson.cells if cell.id.startswith("exercise-")]
    assert len(exercises) == 6
    assert "0.500 of the number is left" in text["answer-forget"]
    assert "'words': '5.8%', 'characters': '0.0%'" in text["answer-words"]
    assert re.findall(r"[\d.]+(?= nats)", text["answer-pairs"]) == ["3.333", "2.474"]
    kept, zero = map(float, re.findall(r"\d\.\d+", text["answer-carry"]))
    assert kept < zero
    assert "the same text? True" in text["answer-top-k"]
    near, far = (float(x) for x in re.findall(r"(\S+) at k = 50", text["answer-bias"]))
    assert near < far


@pytest.mark.parametrize(
    ("checkout", "gpu", "package"),
    [
        (True, False, ".."),
        (True, True, "..[cuda]"),
        (False, False, "lstm-jax @ git+https://example.org/lstm"),
        (False, True, "lstm-jax[cuda] @ git+https://example.org/lstm"),
    ],
)
def test_the_first_cell_installs_the_package(
    checkout: bool, gpu: bool, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (source,) = (cell.source for cell in notebook.cells if cell.id == "install")
    installed: list[str] = []
    specs: list[object] = [None, None, "installed"]  # Neither the package nor libtpu.
    monkeypatch.setattr("importlib.util.find_spec", lambda name: specs.pop(0))
    monkeypatch.setattr("shutil.which", lambda name: "nvidia-smi" if gpu else None)
    monkeypatch.delenv("TPU_ACCELERATOR_TYPE", raising=False)
    if checkout:
        (tmp_path / "lstm_jax").mkdir()
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    source = source.replace('%pip install --quiet "{package}"', "installed.append(package)")
    exec(source, {"installed": installed, "input": lambda prompt: "https://example.org/lstm\n"})
    assert installed == [package]


def test_it_is_stored_with_its_outputs_and_small() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert len(list_images(notebook)) == 12
    assert "the same text? True" in get_printed_text(notebook)["write-whole"]
    assert NOTEBOOK.stat().st_size < 1.5e6
