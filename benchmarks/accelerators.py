"""Compile what GPUs and TPUs run, on a machine that has neither, and count what they would do.

    python benchmarks/accelerators.py --target tpu:v5e:2x2
    python benchmarks/accelerators.py --target h100:1 --config experiments/shakespeare_gpu.py
    python benchmarks/accelerators.py --target tpu:v5e:16x16 --programs "step,step gru"

XLA's own compilers run: that of libtpu (`pip install -e '.[tpu]'`) and that of the CUDA plugin
(`pip install -e '.[cuda]'`). Neither needs a device. A row says that a program compiles, and how
much memory, how many FLOP and how many collectives it needs on each device. It says nothing about
times, or whether results are right. Batches grow with the number of devices.
"""

import functools
import math
import os
import re
import runpy
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from frame import parse_flags, print_head, print_row
from lstm_jax import batches, generation, loss, model, ops, optimizer, train_step
from lstm_jax.config import Config, complete_config
from lstm_jax.devices.mesh import DATA, DIVIDED, EVERYWHERE
from lstm_jax.generation import DEFAULT_CONTROLS, make_control_arrays
from lstm_jax.ops.gates import GATINGS

# What XLA needs to know of a GPU.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84929347584 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "-1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}

# Changes of a config, for training steps of all kinds.
STEPS: dict[str, dict[str, Any]] = {
    "step": {},
    "step float32": {"model.dtype": "float32"},
    "step scan": {"model.recurrence": "scan"},
    "step minlstm": {"model.cell": "minlstm"},
    "step gru": {"model.cell": "gru"},
    "step residual block": {"model.block": "residual"},
    "step 2 microbatches": {"optimizer.microbatches": 2},
}
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
COLUMNS = ("MiB a device", "GFLOP of matmuls", "collectives")


def main() -> None:
    """Compile the programs and print the table."""
    given: dict[str, Any] = {"target": "tpu:v5e:2x2", "programs": "", "dtype": "bfloat16"}
    options = parse_flags(__doc__, config="experiments/quick.py", vocabulary_size=67, **given)
    devices = find_devices(options.target)
    settings = runpy.run_path(options.config)["get_config"]()
    settings.model.dtype = options.dtype
    settings.batches.batch_size *= len(devices)
    config = complete_config(settings)
    print(
        f"{options.config}, {options.dtype}, {len(devices)} x {options.target}, batches of "
        f"{config.batches.batch_size}; JAX {jax.__version__}\n"
    )
    print_head("program", *COLUMNS, "kernels in each step of each loop")
    platform = "tpu" if options.target.startswith("tpu") else "cuda"
    for name, trace in list_programs(config, options.vocabulary_size, devices).items():
        if not options.programs or name in options.programs.split(","):
            try:
                print_row(name, *describe(trace(), platform))
            except Exception as error:  # Of the compiler, or of a program for another device.
                print_row(name, " ".join(str(error).split())[:100])


def find_devices(target: str) -> list[Any]:
    """Return the devices of a target, and let the package choose what they run."""
    kind, _, topology = target.partition(":")
    # Autotuning would run kernels.
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"
    os.environ.update(ENVIRONMENT, XLA_FLAGS=flags)
    jax.config.update("jax_platforms", "cpu")
    backend = "tpu" if kind == "tpu" else "gpu"
    jax.default_backend = lambda: backend
    if kind == "tpu":
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    description = topologies.get_topology_desc(
        platform="cuda", topology_name="h100", target_config=H100, topology=f"1x1x{topology or 1}"
    )
    return list(description.devices)


def list_programs(
    config: Config, vocabulary_size: int, devices: list[Any]
) -> dict[str, Callable[[], Any]]:
    """Return a function for each program that these devices run, by name; it traces it."""
    mesh = Mesh(np.array(devices), DATA)
    lstm = model.make_model(config.model, vocabulary_size)
    place = functools.partial(place_all, lambda _: SingleDeviceSharding(devices[0]))
    programs = {
        name: functools.partial(trace_step, complete_config(config, fields), vocabulary_size, mesh)
        for name, fields in STEPS.items()
    }
    for kind, gating in GATINGS.items():
        sizes = config.batches.batch_size, config.batches.window_length, config.model.hidden_size
        programs[f"layer {gating.name}"] = functools.partial(
            trace_layer, kind, config.model.dtype, place, *sizes
        )
    return programs | {
        "evaluation": functools.partial(trace_evaluation, lstm, place),
        "generation of one text": functools.partial(trace_generation, lstm, place, 1),
        "generation of 64 texts": functools.partial(trace_generation, lstm, place, 64),
    }


def place_all(get_sharding: Callable[[Any], Any], tree: Any) -> Any:
    """Return the shapes of arrays with the sharding of each."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=get_sharding(x)), tree
    )


def trace_step(config: Config, vocabulary_size: int, mesh: Mesh) -> Any:
    """Trace a training step."""
    lstm = model.make_model(config.model, vocabulary_size)
    updates = optimizer.make_optimizer(config.optimizer, 1000)
    batch_size, length = config.batches.batch_size, config.batches.window_length
    state = jax.eval_shape(lambda: train_step.init_state(lstm, updates, config))

    def place(spec: PartitionSpec, tree: Any) -> Any:
        return place_all(lambda _: NamedSharding(mesh, spec), tree)

    carry = place(DIVIDED, state.carry)
    stored = place(EVERYWHERE, state._replace(carry=()))
    ids = place(DIVIDED, jax.ShapeDtypeStruct((batch_size, length), jnp.int32))
    reset = place(DIVIDED, jax.ShapeDtypeStruct((batch_size,), jnp.bool_))
    step: Any = train_step.make_train_step(lstm, updates, config, mesh)
    return step.trace(stored._replace(carry=carry), batches.Batch(ids, ids, reset))


def trace_layer(
    kind: Any, dtype: str, place: Callable[[Any], Any], batch: int, time: int, hidden: int
) -> Any:
    """Trace a layer of `ops`, forward and backward."""

    def sum_outputs(params: Any, inputs: jax.Array) -> jax.Array:
        return (ops.run(params, inputs, dtype=dtype)[1] ** 2).sum()

    params = jax.eval_shape(lambda: kind.init(jax.random.key(0), hidden, hidden))
    inputs = jax.ShapeDtypeStruct((batch, time, hidden), jnp.float32)
    return jax.jit(jax.grad(sum_outputs, (0, 1))).trace(*place((params, inputs)))


def trace_evaluation(lstm: model.LanguageModel, place: Callable[[Any], Any]) -> Any:
    """Trace the evaluation of a chunk of a long text."""
    chunk = next(loss.iterate_chunks(np.zeros(loss.LONGEST_IN_ONE + 2, np.int32)))
    carry = jax.eval_shape(lambda: lstm.initial_carry(len(chunk[0])))
    return loss.compute_chunk_losses.trace(
        lstm, *place((model.get_param_shapes(lstm), chunk, carry))
    )


def trace_generation(lstm: model.LanguageModel, place: Callable[[Any], Any], texts: int) -> Any:
    """Trace the generation of 1,024 tokens of each text."""
    arrays = jax.eval_shape(
        functools.partial(generation.prepare_params, lstm), model.get_param_shapes(lstm)
    )
    state = jax.eval_shape(functools.partial(generation.initial_state, lstm, arrays, texts))
    controls = make_control_arrays(DEFAULT_CONTROLS)
    scalar = np.int32(0)
    arguments = arrays, state, jax.random.key(0), controls, scalar, scalar
    return generation._generate.trace(lstm, *place(arguments))


def describe(traced: Any, platform: str) -> list[str]:
    """Return the columns of a row: memory, FLOP and collectives on each device, and kernels."""
    compiled = traced.lower(lowering_platforms=(platform,)).compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    size = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    devices = len(jax.tree.leaves(compiled.input_shardings)[0].device_set)
    flops = count_flops(traced.jaxpr.jaxpr) / devices
    collectives = len(re.findall(rf"= .*? (?:{'|'.join(_COLLECTIVES)})(?:-done)?\(", text))
    loops = ", ".join(f"{kernels} x {trips}" for trips, kernels in count_kernels(text))
    return [f"{size / 2**20:,.1f}", f"{flops / 1e9:,.1f}", str(collectives), loops or "-"]


def count_flops(jaxpr: Any) -> float:
    """Return the FLOP of all matmuls of a traced program. Loops have known lengths."""
    total = 0.0
    for equation in jaxpr.eqns:
        primitive, params, times = equation.primitive.name, equation.params, 1.0
        if primitive == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * depth * equation.outvars[0].aval.size
        elif primitive == "scan":
            times = params["length"]
        elif primitive == "shard_map":
            times = params["mesh"].size
        for value in jax.tree.leaves(list(params.values())):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += times * count_flops(inner)
    return total


def count_kernels(text: str) -> list[tuple[str, int]]:
    """Return the known number of steps of each loop of a compiled program, and its kernels."""
    bodies: dict[str, list[str]] = {}
    for line in text.splitlines():
        if header := re.match(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{", line):
            current = bodies.setdefault(header.group(1), [])
        elif bodies:
            current.append(line)
    loops = []
    for loop in re.finditer(r"while\(.*?\), condition=%?[\w.\-]+, body=%?([\w.\-]+)(.*)", text):
        started = re.compile(r"= (?:\([^=]*?\)|\S+) (?:fusion|custom-call|dot|copy|sort)\(")
        trips = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.group(2))
        kernels = sum(map(bool, map(started.search, bodies.get(loop.group(1), []))))
        loops.append((trips.group(1) if trips else "?", kernels))
    return loops


if __name__ == "__main__":
    main()
