"""Compute lower bounds of the time of a training step; print the tables of docs/scale.md.

    python benchmarks/limits.py

All times follow from published peaks; nothing is measured. For a model of P parameters in L
layers of H hidden units, with kernels of K numbers, a vocabulary of V, and batches of B windows of
T tokens, on n devices with a batch of b = B / n each:

- matmuls: 6 b T (K + H V) operations (one matmul forward, two backward), divided by the peak.
- memory: the optimizer reads parameters, two moments and gradient and writes three of them (28 P
  bytes, and 4 P for the gradient); the loops read each kernel once per position, forward and
  backward (2 T K numbers), and write and read 16 numbers per hidden unit and token; divided by the
  bandwidth.
- collectives: a ring all-reduce of the gradient, 2 (n - 1) / n * 4 P bytes over a device's link.
- input: 8 bytes per token at 16 GB/s, the rate of PCI Express 3.0 x16.

Not included: the latency of the 2 T L sequential positions of the loops, a few microseconds each on
accelerators, where it is often the largest part.
"""

from typing import NamedTuple


class Model(NamedTuple):
    """Sizes of a model and its batches."""

    name: str
    layers: int
    hidden: int
    batch: int
    time: int
    embedding: int = 256
    vocabulary: int = 67

    @property
    def kernels(self) -> int:
        """Return the number of weights in the kernels of all layers."""
        first = 4 * self.hidden * (self.embedding + self.hidden)
        return first + (self.layers - 1) * 8 * self.hidden**2

    @property
    def parameters(self) -> int:
        """Return the number of parameters of the model."""
        biases = 4 * self.hidden * self.layers + self.vocabulary
        dense = self.hidden * self.vocabulary
        return self.vocabulary * self.embedding + self.kernels + dense + biases


class Device(NamedTuple):
    """Peaks of one device: operations, bytes, and bytes between devices, each per second."""

    name: str
    operations: float
    bandwidth: float
    link: float
    number_bytes: int  # Bytes of each operand of a matmul.


class Machine(NamedTuple):
    """A number of identical devices."""

    device: Device
    number: int


MODELS = (Model("1 x 1024", 1, 1024, 64, 100), Model("3 x 1840", 3, 1840, 128, 200))
# AMD's figures for EPYC 9654: two 256-bit multiply-adds a cycle at 3.7 GHz, and 460.8 GB/s for 96
# cores, of which two get at least their share. Both cores count as one device.
CPU = Device("2 cores, EPYC 9654", 2 * 32 * 3.7e9, 2 / 96 * 460.8e9, float("inf"), 4)
# NVIDIA's H100 SXM data sheet: bfloat16 without sparsity; NVLink 900 GB/s, half of it each way.
H100 = Device("H100", 989e12, 3.35e12, 450e9, 2)
# Google Cloud's TPU v5e page; 1,600 Gbit/s between chips, half of it each way.
V5E = Device("TPU v5e", 197e12, 819e9, 100e9, 2)
MACHINES = (Machine(CPU, 1), Machine(H100, 1), Machine(H100, 8), Machine(V5E, 16))


def times(model: Model, machine: Machine, batch: float) -> dict[str, float]:
    """Return the milliseconds of each part of a step with a global batch."""
    device, n = machine
    tokens = batch / n * model.time
    head = model.hidden * model.vocabulary
    loops = 2 * model.time * model.kernels * device.number_bytes
    activations = 16 * 4 * tokens * model.hidden * model.layers
    seconds = {
        "matmuls": 6 * tokens * (model.kernels + head) / device.operations,
        "memory": (32 * model.parameters + loops + activations) / device.bandwidth,
        "collectives": 2 * (n - 1) / n * 4 * model.parameters / device.link,
        "input": 8 * tokens / 16e9,
    }
    return {name: 1e3 * value for name, value in seconds.items()}


def tokens_per_second(model: Model, machine: Machine, batch: float) -> float:
    """Return the highest rate: matmuls and memory overlap, collectives come after."""
    parts = times(model, machine, batch)
    step = max(parts["matmuls"], parts["memory"], parts["input"]) + parts["collectives"]
    return batch * model.time / step * 1e3


def main() -> None:
    """Print both tables."""
    print("| model | machine | matmuls | memory | collectives | input | the limit |")
    print("| --- | --- | ---: | ---: | ---: | ---: | --- |")
    for model in MODELS:
        for machine in MACHINES:
            parts = times(model, machine, model.batch)
            cells = " | ".join(f"{value:.3g} ms" for value in parts.values())
            limit = max(parts, key=lambda name: parts[name])
            print(
                f"| {model.name} | {machine.number} x {machine.device.name} | {cells} | {limit} |"
            )
    print("\n| model | device | batch | 1 | 2 | 4 | 8 | 16 |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for model in MODELS:
        for device in (H100, V5E):
            one = tokens_per_second(model, Machine(device, 1), model.batch)
            for kind in (f"{model.batch} in all", f"{model.batch} per device"):
                ratios = []
                for n in (1, 2, 4, 8, 16):
                    batch = model.batch * (n if kind.endswith("device") else 1)
                    ratios.append(tokens_per_second(model, Machine(device, n), batch) / one)
                cells = " | ".join(f"{ratio:.2f}" for ratio in ratios)
                print(f"| {model.name} | {device.name} | {kind} | {cells} |")


if __name__ == "__main__":
    main()
