"""Accuracies of one recipe over several seeds: mean and spread of every number in summary.json.

for s in 0 1 2; do m2mkd train quickstart --set seed=$s --out runs/quickstart-$s; done
python benchmarks/seeds.py runs/quickstart-0 runs/quickstart-1 runs/quickstart-2
"""

import json
import statistics
import sys
from pathlib import Path


def accuracies(run: Path) -> dict[str, float]:
    """Top-1 in per cent by name; hybrids get one entry per module."""
    found = json.loads((run / "summary.json").read_text())["accuracy"]
    flat: dict[str, float] = {}
    for name, value in found.items():
        if isinstance(value, list):
            flat |= {f"{name}[{i}]": x for i, x in enumerate(value)}
        else:
            flat[name] = value
    return flat


def main(runs: list[str]) -> None:
    """Prints one line per number: mean, smallest, largest, and the gain of m2mKD over it."""
    if not runs:
        sys.exit(__doc__)
    table = [accuracies(Path(run)) for run in runs]
    print(f"{'top-1, %':<22}{'mean':>7}{'min':>7}{'max':>7}   m2mKD minus it (per seed)")
    for name in table[0]:
        values = [row[name] for row in table]
        gains = "  ".join(f"{row['m2mkd'] - row[name]:+.2f}" for row in table)
        print(
            f"{name:<22}{statistics.mean(values):7.2f}{min(values):7.2f}{max(values):7.2f}   "
            f"{gains if name != 'm2mkd' else ''}"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
