"""Reading the golden vectors: arrays by group, and the JSON config."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

FOLDER = Path(__file__).parent


class Golden:
    """One golden file."""

    def __init__(self, name: str) -> None:
        self.arrays = np.load(FOLDER / f"{name}.npz")
        names = self.arrays.files
        self.config: dict[str, Any] = (
            json.loads(bytes(self.arrays["config"])) if "config" in names else {}
        )

    def __getitem__(self, key: str) -> torch.Tensor:
        return torch.from_numpy(self.arrays[key])

    def group(self, prefix: str) -> dict[str, np.ndarray]:
        """Arrays under `prefix/`, by the rest of their name."""
        start = f"{prefix}/"
        return {
            name.removeprefix(start): self.arrays[name]
            for name in self.arrays.files
            if name.startswith(start)
        }
