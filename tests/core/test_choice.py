"""Test where the recurrence in C is chosen, for processors that are not here."""

import runpy
from typing import Any

import jax
import pytest

from lstm_jax import config
from lstm_jax.devices import parallel
from lstm_jax.ops import choice, native, processor

AVX512 = "avx512f", "avx512bw", "avx512dq", "avx512vl"
SKYLAKE = *AVX512, "GenuineIntel"
AMD = *AVX512, "avx512_bf16"
INTEL = *AMD, "GenuineIntel"


def simulate(patch: pytest.MonkeyPatch, *features: str, permitted: bool = True) -> None:
    """Make the choice as on a processor with these features."""
    patch.setattr(processor, "read_cpu_features", lambda: frozenset(features))
    patch.setattr(native, "read_cpu_features", lambda: frozenset(features))
    uses_amx = "amx_bf16" in features and permitted
    found = native.Library("lstm", uses_amx) if native.is_supported() else None
    patch.setattr(native, "load_library", lambda: found)


CHOICES = {  # With AVX-512 BF16 on AMD, on Intel, and with AMX.
    ("windows", "bfloat16", 4096): (True, False, True),
    ("windows", "bfloat16", 256): (True, True, True),
    ("windows", "bfloat16", 500): (True, False, True),
    ("windows", "float32", 1024): (True, True, True),
    ("windows", "float32", 1100): (True, False, False),
    ("windows", "float32", 1300): (False, False, False),
    ("windows", "float64", 256): (False, False, False),
    ("steps", "bfloat16", 4096): (True, True, True),
    ("steps", "float32", 1024): (True, True, True),
    ("steps", "float32", 1300): (False, False, False),
    ("losses", "bfloat16", 0): (True, False, True),
    ("losses", "float32", 0): (False, False, False),
    ("windows", "bfloat16", 512, "gru"): (True, False, False),
    ("windows", "float32", 1024, "rnn"): (True, False, False),
    ("windows", "float32", 512, "gru"): (True, False, False),
    ("windows", "float32", 528, "gru"): (False, False, False),
    ("steps", "float32", 512, "peephole_lstm"): (True, False, False),
    ("steps", "float32", 512, "gru"): (False, False, False),
}


def test_each_row_of_the_table_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    case: Any
    for case, (on_amd, on_intel, with_amx) in CHOICES.items():
        for features, permitted, expected in (
            (("avx2",), True, False),
            (("avx512f",), True, False),
            (SKYLAKE, True, on_intel and case[1] == "float32"),
            (AMD, True, on_amd),
            (INTEL, True, on_intel),
            ((*INTEL, "amx_bf16"), True, with_amx),
            ((*INTEL, "amx_bf16"), False, on_intel),
        ):
            simulate(monkeypatch, *features, permitted=permitted)
            assert choice.runs_in_c(*case) == expected, (case, features)


@pytest.mark.parametrize("features", [("avx2",), SKYLAKE, AMD, INTEL, (*INTEL, "amx_bf16")])
def test_the_command_prints_what_is_used(
    features: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    simulate(monkeypatch, *features)
    runpy.run_module("lstm_jax.ops", run_name="__main__")
    printed = capsys.readouterr().out
    assert ("of lstm in float32, up to" in printed) == ("GenuineIntel" in features)
    assert ("with AMX" in printed) == ("amx_bf16" in features)
    assert ("with AVX-512 of Intel" in printed) == (features in (SKYLAKE, INTEL))
    in_bfloat16 = features == AMD or "amx_bf16" in features
    assert f"auto is {'bfloat16' if in_bfloat16 else 'float32'} for gated layers" in printed
    assert choice.choose_dtype(False) == "float32"
    assert ("library in C: none" in printed) == (len(features) == 1)


def test_threads_are_those_of_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "count_cores", lambda: 8)
    assert native.count_threads() == 8
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((4,), ("data",))):
        assert native.count_threads() == 2


def test_devices_share_only_what_the_library_does_not_share_better(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parallel, "count_cores", lambda: 2)

    def count(**fields: Any) -> int:
        settings = config.default()
        settings.batches.batch_size = 32
        settings.model.update({"dtype": "auto", "hidden_size": 512, **fields})
        return parallel._count_useful_cores(config.complete_config(settings))

    simulate(monkeypatch, *AMD)
    assert count() == count(dtype="bfloat16") == count(dtype="float32") == 1
    others: Any = {"hidden_size": 256, "cell": "mogrifier", "recurrence": "scan"}
    for field, value in {**others, "block": "residual"}.items():
        assert count(**{field: value}) == 2
    assert count(hidden_size=500) == 1 and count(recurrence="xla") == 2
    gru: Any = {"cell": "gru", "dtype": "float32"}
    assert count(**gru) == 1 and count(hidden_size=640, **gru) == 2
    simulate(monkeypatch, *INTEL)
    assert count(hidden_size=640) == 1 and count(hidden_size=640, dtype="bfloat16") == 2
    monkeypatch.setattr(native, "load_library", lambda: None)
    assert count() == 2


def test_the_library_is_not_loaded_where_it_can_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """To load it may compile it, or warn that there is no compiler."""
    monkeypatch.setattr(native, "load_library", lambda: pytest.fail("it was loaded"))
    parallel.use_cores(config.Config())  # Before it is known which devices there are.
    assert not choice.runs_in_c("windows", "float64", 512)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not choice.runs_in_c("windows", "bfloat16", 512) and choice.list_rows() == []
