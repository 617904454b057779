"""Test where the recurrence in C is chosen, for processors that are not here."""

from pathlib import Path
from typing import Any

import jax
import pytest

from lstm_jax import config
from lstm_jax.devices import setup
from lstm_jax.ops import choice, native, processor

AVX512 = "avx512f", "avx512bw", "avx512dq", "avx512vl"
AVX2 = "avx2", "fma"
NEON = ("asimd",)
SKYLAKE = *AVX512, "GenuineIntel"
AMD = *AVX512, "avx512_bf16"
INTEL = *AMD, "GenuineIntel"
AMX = *INTEL, "amx_bf16"


def simulate(patch: pytest.MonkeyPatch, *features: str, permitted: bool = True) -> None:
    """Make the choice as on a processor with these features."""
    patch.setattr(processor, "read_cpu_features", lambda: frozenset(features))
    patch.setattr(native, "read_cpu_features", lambda: frozenset(features))
    lanes = 16 if "avx512f" in features else 8 if "avx2" in features else 4
    uses_amx = "amx_bf16" in features and permitted
    library = native.Library("lstm", lanes, uses_amx) if native.list_flags() else None
    patch.setattr(native, "load_library", lambda: library)


@pytest.mark.parametrize(
    ("features", "permitted", "name", "dtypes"),
    [
        (("sse2",), True, None, ""),
        (("avx2",), True, None, ""),  # Without FMA.
        (("avx512f",), True, None, ""),
        (AVX2, True, "AVX2", "float32"),
        (NEON, True, "NEON", "float32"),
        ((*NEON, "bf16"), True, "NEON", "float32 bfloat16"),
        (SKYLAKE, True, "Intel", "float32"),
        (AMD, True, "AMD", "float32 bfloat16"),
        (INTEL, True, "Intel", "float32 bfloat16"),
        (AMX, True, "AMX", "float32 bfloat16"),
        (AMX, False, "Intel", "float32 bfloat16"),
    ],
    ids=str,
)
def test_the_library_runs_what_the_table_has_for_a_processor(
    features: tuple[str, ...],
    permitted: bool,
    name: str | None,
    dtypes: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    simulate(monkeypatch, *features, permitted=permitted)
    library = native.load_library()
    assert (library and choice.name_processor(library)) == name
    assert native.list_dtypes() == dtypes.split()
    row = choice.Row(f"VIA {name}", "windows losses", "float32", "lstm gru", 20)
    others = row._replace(dtype="bfloat16", largest=float("inf")), row._replace(processors="VIA")
    monkeypatch.setattr(choice, "TABLE", (row, *others))
    for dtype in ("float32", "bfloat16", "float64"):
        runs = dtype in dtypes.split()
        assert choice.runs_in_c("windows", dtype, 20, "gru") == runs
        assert choice.runs_in_c("windows", dtype, 21) == (runs and dtype == "bfloat16")
        assert not choice.runs_in_c("window", dtype, 20)
        assert not choice.runs_in_c("windows", dtype, 20, "rnn")
    in_bfloat16 = features == AMD or "amx_bf16" in features
    assert choice.choose_dtype(True) == ("bfloat16" if in_bfloat16 else "float32")
    assert choice.choose_dtype(False) == "float32"


def test_a_processor_with_avx512_can_be_used_as_one_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    everything = " ".join((*AVX2, *AMX, "avx512_fp16", "amx_tile"))
    monkeypatch.setattr(Path, "read_text", lambda self: everything)
    for value, expected in (("", everything.split()), ("avx2", [*AVX2, "GenuineIntel"])):
        monkeypatch.setenv("LSTM_JAX_CPU", value)
        processor.read_cpu_features.cache_clear()
        assert processor.read_cpu_features() == {*expected}
    processor.read_cpu_features.cache_clear()


def test_threads_are_those_of_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "count_cores", lambda: 8)
    assert native.count_threads() == 8
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((4,), ("data",))):
        assert native.count_threads() == 2


def test_devices_share_only_what_the_library_does_not_share_better(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(setup, "count_cores", lambda: 2)

    def count(**fields: Any) -> int:
        settings = config.default()
        settings.batches.batch_size = 32
        settings.model.update({"dtype": "auto", "hidden_size": 512, **fields})
        return setup.count_useful_cores(config.complete_config(settings))

    row = choice.Row("AMD", "windows", "bfloat16", "lstm")
    intel = row._replace(processors="Intel", dtype="float32", gatings="lstm gru", largest=512)
    monkeypatch.setattr(choice, "TABLE", (row, intel))
    simulate(monkeypatch, *AMD)
    assert count() == count(dtype="bfloat16") == count(hidden_size=500) == 1
    others: Any = {"hidden_size": 256, "cell": "mogrifier", "recurrence": "scan"}
    for field, value in {**others, "block": "residual", "dtype": "float32"}.items():
        assert count(**{field: value}) == 2
    assert count(recurrence="xla") == count(cell="gru") == 2
    simulate(monkeypatch, *INTEL)
    assert count() == count(cell="gru") == 1
    assert count(hidden_size=640) == count(dtype="bfloat16") == 2
    monkeypatch.setattr(native, "load_library", lambda: None)
    assert count() == 2


def test_the_library_is_not_loaded_where_it_can_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """To load it may compile it, or warn that there is no compiler."""
    monkeypatch.setattr(native, "load_library", lambda: pytest.fail("it was loaded"))
    setup.use_cores(config.Config())  # Before it is known which devices there are.
    assert not choice.runs_in_c("windows", "float64", 512)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not choice.runs_in_c("windows", "bfloat16", 512)
