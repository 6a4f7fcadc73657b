"""Pictures of circuits: files are written, and the layout shows what it should."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from m2mkd.errors import CheckpointError, ShapeError
from m2mkd.nn.circuit_statistics import circuit_statistics
from m2mkd.nn.graphs import prior_graph
from m2mkd.ops import Circuit
from m2mkd.train.circuit_pictures import layout, plot_circuit, plot_circuit_history


def small_circuit(num_inputs: int) -> Circuit:
    edges = prior_graph("ring_of_cliques", 12, seed=0, num_cliques=3).fill_diagonal_(True)
    return Circuit.from_dense(torch.cat([torch.ones(12, num_inputs).bool(), edges], dim=1))


def count(path: Path, red: int, green: int, blue: int) -> int:
    """Pixels of one colour."""
    image = Image.open(path).convert("RGB")
    found = image.getcolors(maxcolors=1 << 24) or []
    return sum(number for number, colour in found if colour == (red, green, blue))


def test_a_picture_shows_inputs_in_a_colour_of_their_own(tmp_path: Path) -> None:
    orange = 0xD9, 0x5F, 0x02
    plot_circuit(small_circuit(3), tmp_path / "with.png")
    plot_circuit(small_circuit(0), tmp_path / "without.png")
    assert count(tmp_path / "with.png", *orange) > 0
    assert count(tmp_path / "without.png", *orange) == 0


@pytest.mark.parametrize("mask", [torch.zeros(1, 1), torch.zeros(3, 5), torch.eye(40)])
def test_circuits_without_links_can_be_drawn(mask: torch.Tensor, tmp_path: Path) -> None:
    plot_circuit(Circuit.from_dense(mask), tmp_path / "circuit.png")
    assert count(tmp_path / "circuit.png", 255, 255, 255) > 500_000


def test_layout_puts_cliques_apart() -> None:
    links = prior_graph("ring_of_cliques", 24, seed=0, num_cliques=4)
    distance = torch.cdist(*[layout(links)] * 2)
    same = torch.arange(24)[:, None] // 6 == torch.arange(24) // 6
    assert distance[same].max() < distance[~same].min()


def test_layout_is_the_same_every_time() -> None:
    links = prior_graph("barabasi_albert", 30, seed=0)
    assert torch.equal(layout(links), layout(links))


def test_history_draws_the_epochs_that_have_a_circuit(tmp_path: Path) -> None:
    lines = [
        {"epoch": epoch, "validation": {"circuit": circuit_statistics(small_circuit(3))}}
        for epoch in range(3)
    ]
    other = [{"step": 1, "loss": 2.0}, {"epoch": 0, "validation": {"top1": 50.0}}]
    plot_circuit_history(lines + other, tmp_path / "history.png")
    plot_circuit_history(other, tmp_path / "empty.png")
    first_line = 0x1F, 0x77, 0xB4
    assert count(tmp_path / "history.png", *first_line) > 1000
    assert not (tmp_path / "empty.png").exists()


def test_a_circuit_that_is_not_a_propagators_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ShapeError, match="2 senders for 3 receivers"):
        plot_circuit(Circuit.from_dense(torch.ones(3, 2)), tmp_path / "circuit.png")


def test_a_picture_that_cannot_be_written_says_where(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot write .*missing/circuit\.png"):
        plot_circuit(small_circuit(0), tmp_path / "missing" / "circuit.png")
