"""Signatures fitted to graph priors, against those of the published code."""

import sys
from pathlib import Path

import pytest
import torch

from m2mkd.nn.signatures import fit_signatures, graph_mistakes

sys.path.insert(0, str(Path(__file__).parent))
from golden_files import Golden

VALUES = 2e-6  # measured: 5e-7 after 1000 steps


@pytest.mark.parametrize("steps", [20, 1000])
@pytest.mark.parametrize("graph", ["ba", "ring", "er", "planted"])
def test_published_steps_give_the_published_signatures(graph: str, steps: int) -> None:
    golden = Golden("signature_prior")
    edges = golden[f"{graph}/adjacency"] == 1
    truncation = golden.config["truncation"]
    fitted = fit_signatures(golden[f"{graph}/start"], edges, truncation, steps=steps, settle=False)
    torch.testing.assert_close(fitted, golden[f"{graph}/after_{steps}"], atol=VALUES, rtol=0)


@pytest.mark.parametrize("graph", ["ba", "ring", "er", "planted"])
def test_the_default_fit_reaches_the_graph_that_the_published_one_reaches(graph: str) -> None:
    golden = Golden("signature_prior")
    edges = golden[f"{graph}/adjacency"] == 1
    for fitted in (fit_signatures(golden[f"{graph}/start"], edges), golden[f"{graph}/after_1000"]):
        assert graph_mistakes(fitted, edges) == (0, 0)
