"""Make tests/fixtures: tiny models of PyTorch, and their logits for a text.

    pip install -e '.[bench,convert]'
    python tests/make_convert_fixtures.py

The weights are random and large, so that no gate is near its initial value.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

FIXTURES = Path(__file__).with_name("fixtures")
TEXT = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n"
TOKENS = ["", "[UNK]", *sorted(set(TEXT))]
IDS = np.array([[TOKENS.index(character) for character in TEXT]], np.int32)
HIDDEN, FEATURES = 5, 4


def main() -> None:
    """Write all files."""
    FIXTURES.mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    logits = {}
    torch_layers = {
        "torch_lstm.safetensors": torch.nn.LSTM(FEATURES, HIDDEN, num_layers=3, batch_first=True),
        "torch_gru.safetensors": torch.nn.GRU(FEATURES, HIDDEN, num_layers=2, batch_first=True),
    }
    for name, layers in torch_layers.items():
        embedding = torch.nn.Embedding(len(TOKENS), FEATURES)
        linear = torch.nn.Linear(HIDDEN, len(TOKENS))
        modules = {"embedding": embedding, "layers": layers, "linear": linear}
        torch_model = torch.nn.ModuleDict(modules)
        with torch.no_grad():
            for parameter in torch_model.parameters():
                parameter.copy_(torch.from_numpy(random.normal(size=tuple(parameter.shape))))
            outputs, _ = layers(embedding(torch.from_numpy(IDS.astype(np.int64))))
            logits[name] = linear(outputs).numpy()
        safetensors.torch.save_file(torch_model.state_dict(), FIXTURES / name)
    fields = {"kind": "characters", "stop": "", "units": TOKENS}
    (FIXTURES / "vocabulary.json").write_text(json.dumps(fields) + "\n")
    (FIXTURES / "text.txt").write_text(TEXT)
    # Keep every tenth position for a small file. Each depends on all positions before it.
    tenth: dict[str, Any] = {
        name: array[0, ::10].astype(np.float32) for name, array in logits.items()
    }
    np.savez_compressed(FIXTURES / "logits.npz", **tenth)


if __name__ == "__main__":
    main()
