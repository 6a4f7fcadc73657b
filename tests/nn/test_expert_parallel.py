"""Experts spread over processes give what the whole layer gives, forward and backward."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import m2mkd
from m2mkd.errors import ConfigError
from m2mkd.nn import MoEMlp, shard_experts

WORKER = Path(__file__).with_name("expert_parallel_worker.py")
# Sums over the same float64 rows in blocks of other sizes; bfloat16 is compared with bfloat16.
TOLERANCE = 1e-12
TOLERANCE_BFLOAT16 = 2e-2
CASES = [
    "softmax_selected",
    "softmax_all",
    "softmax_all_renorm",
    "an expert that gets nothing",
    "a rank that keeps nothing",
    "a rank without tokens",
    "no tokens at all",
    "capacity",
    "expert choice",
    "compiled",
    "state dict",
    "deep copy",
]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of three processes reports, by the number of ranks of a group."""
    folder = tmp_path_factory.mktemp("ranks")
    ranks = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), str(folder)],
            cwd=Path(m2mkd.__file__).parents[1],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    try:
        errors = [process.communicate(timeout=300)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0, 0], "\n".join(errors)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(3)]


@pytest.fixture(params=[2, 3], ids=["2 processes", "3 processes"])
def results(request: pytest.FixtureRequest, reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The reports of a group's ranks."""
    return [report[str(request.param)] for report in reports[: request.param]]


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_every_gradient_equal_those_of_the_whole_layer(
    case: str, results: list[dict[str, Any]]
) -> None:
    assert max(rank[case] for rank in results) < TOLERANCE


def test_autocast_values_are_those_of_the_whole_layer(results: list[dict[str, Any]]) -> None:
    assert max(rank["bfloat16 autocast"] for rank in results) < TOLERANCE_BFLOAT16


def test_experts_that_cannot_be_shared_are_refused(results: list[dict[str, Any]]) -> None:
    for rank in results:
        assert f"num_experts={2 * len(results) + 1}" in rank["odd"]
        assert f"{len(results)} ranks cannot share evenly" in rank["odd"]
        assert "sharded already" in rank["twice"]


def test_without_a_process_group_it_says_how_to_get_one() -> None:
    with pytest.raises(ConfigError, match="torchrun"):
        shard_experts(MoEMlp(4, 4))
