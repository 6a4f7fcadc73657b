"""What every test shares: fixed seeds, one thread, no network, and the one place GPU tests skip."""

import os
import random

# Before the first import of torch, and inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import hypothesis
import numpy as np
import pytest
import torch

# Tests run in several processes at once, so each keeps to one core.
torch.set_num_threads(1)

# Derandomised, so a failure can be repeated; no deadline, because nothing here judges by time.
hypothesis.settings.register_profile("m2mkd", derandomize=True, deadline=None)
hypothesis.settings.load_profile("m2mkd")


def _why_no_gpu() -> str | None:
    """Returns why tests marked `gpu` cannot run here, or None where they can."""
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return "this build of torch has no CUDA"
    return f"torch (CUDA {torch.version.cuda}) finds no GPU"


def pytest_report_header() -> str:
    """Says at the top of a run whether the GPU tests take part."""
    reason = _why_no_gpu()
    return f"gpu tests: skipped, {reason}" if reason else f"gpu: {torch.cuda.get_device_name()}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests marked `gpu` where there is no GPU."""
    reason = _why_no_gpu()
    if reason is None:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=f"gpu test: {reason}"))


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Starts each test from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
