"""Benchmarks run at a small size, and treat other libraries like this one."""

import argparse
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import commands
import runs

ROOT = Path(__file__).parents[2]
SIZES = {
    **{"batch_size": 2, "window_length": 3, "num_samples": 2, "length": 3},
    **{"embedding_size": 4, "hidden_size": 5, "num_layers": 2, "vocabulary_size": 7},
    "tie_embeddings": 0,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cell", "dtype"),
    [("gru", "float32"), ("peephole", "float32"), ("lstm", "bfloat16"), ("rnn", "bfloat16")],
)
def test_every_library_runs_the_same_layer(cell: str, dtype: str) -> None:
    import layers
    from lstm_jax.ops import choice

    sizes = {"batch_size": 2, "window_length": 3, "hidden_size": 16}
    options = argparse.Namespace(**sizes, dtype=dtype, work="gradients")
    gates = {"lstm": 4, "peephole": 4, "gru": 3, "rnn": 1}[cell]
    ours: list[Any] = []
    for name, make in layers.list_contestants().items():
        needs_c = name.endswith(" c") and not choice.is_available(dtype)
        if needs_c or not name.startswith(f"{cell} "):
            continue
        try:
            results: Any = make(options).run()
        except ModuleNotFoundError:
            continue
        outputs, (d_params, d_inputs) = results
        assert outputs.shape == d_inputs.shape == (2, 3, 16), name
        kernels = [x for x in jax.tree.leaves(d_params) if x.ndim == 2 and len(x) > 3]
        assert sum(kernel.size for kernel in map(np.asarray, kernels)) == 2 * 16 * gates * 16, name
        for gradient in (*kernels, d_inputs):
            assert np.isfinite(np.asarray(gradient)).all() and np.asarray(gradient).any(), name
        if name.split()[1] in ("c", "xla", "scan"):
            ours.append(results)
    compare = functools.partial(
        np.testing.assert_allclose, atol=1e-4 if dtype == "float32" else 0.1
    )
    for results in ours[1:]:
        jax.tree.map(compare, results, ours[0])


@pytest.mark.slow
def test_the_steps_of_a_peer_read_like_its_sequences() -> None:
    import peers

    options = argparse.Namespace(**SIZES, dtype="float32")
    init, apply, carry = peers.MODELS["Flax LSTMCell"](options, 2)
    ids = np.array([[1, 2, 3], [4, 5, 6]])
    params = init(jax.random.key(0), ids, carry)
    expected, _ = apply(params, ids, carry)
    for i in range(3):
        logits, carry = apply(params, ids[:, i : i + 1], carry)
        np.testing.assert_allclose(logits[:, 0], expected[:, i], atol=1e-6)


@pytest.mark.slow
def test_a_row_of_results_is_trained_and_compared(
    tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import frame
    import results

    def run_python(option: str, module: str, *flags: object) -> str:
        return commands.get_output(module.removeprefix("lstm_jax."), *flags)

    page = tmp_path / "page.md"
    rows = "| `quick.py`: tiny | 3.0 ± 1.0 |\n| `quick.py` | 9.0 ± 0.1 |\n"
    page.write_text(f"| x | test |\n| --- | --- |\n{rows}")
    monkeypatch.setattr(frame, "run_python", run_python)
    fields = [
        field for field in runs.make_arguments(text_file, tmp_path) if field.startswith("--config.")
    ]
    fields += ["--config.max_steps=3", "--rows=quick.py", "--seeds=2", f"--page={page}"]
    fields.append(f"--workdir={tmp_path / 'runs'}")
    output = commands.get_output("benchmarks/results.py", *fields)
    head, _, measured, stated, within = output.splitlines()
    assert head == "| quick.py | test | minutes |"
    assert 2 < float(measured.split("|")[2].split()[0]) < 4.5
    assert stated.startswith("| stated | 3.000 ± 1.000 |")
    assert within.startswith("| within the spread | yes")
    known = results.Stated(3.0, 0.2)
    assert results.compare((3.5,), known) == "no, 2.5 deviations away"
    assert results.compare((3.2, 3.8), known) == "yes, 1.2 deviations away"
