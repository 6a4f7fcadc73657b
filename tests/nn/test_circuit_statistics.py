"""Statistics of circuits, on ones small enough to check by eye and against networkx."""

import json

import networkx as nx
import pytest
import torch

from m2mkd.errors import ShapeError
from m2mkd.nn.circuit_statistics import circuit_statistics
from m2mkd.nn.graphs import PRIORS, prior_graph
from m2mkd.ops import Circuit


def test_a_small_circuit_is_described_as_it_is() -> None:
    # Two inputs a, b and mediators 0 to 4: a -> 0 -> 1 -> 2, 2 <-> 0, 3 hears only itself, 4 none.
    mask = torch.tensor(
        [
            # a  b  0  1  2  3  4
            [1, 0, 1, 0, 1, 0, 0],
            [0, 0, 1, 1, 0, 0, 0],
            [0, 0, 1, 1, 1, 0, 0],
            [0, 0, 0, 0, 0, 1, 0],
            [0, 0, 0, 0, 0, 0, 0],
        ]
    )
    statistics = circuit_statistics(Circuit.from_dense(mask))
    assert statistics == {
        "receivers": 5,
        "inputs": 2,
        "edges": 9,
        "density": 9 / 35,
        "degree_min": 0,
        "degree_mean": 1.8,
        "degree_max": 3,
        "isolated": 1,
        "self_only": 1,
        "unheard": 2,  # b and 4
        "hub_share": 3 / 9,  # the busiest of 7 is mediator 0
        "reached": 3,
        "components": 3,
        "largest_component": 3,
        "reciprocity": 2 / 4,
        "clustering": 3 / 5,  # 0, 1 and 2 form a triangle
    }
    assert json.loads(json.dumps(statistics)) == statistics


@pytest.mark.parametrize("name", PRIORS)
def test_components_and_clustering_are_those_of_networkx(name: str) -> None:
    edges = prior_graph(name, 64, seed=0)
    graph = nx.from_numpy_array(edges.numpy())
    statistics = circuit_statistics(Circuit.from_dense(edges))
    assert statistics["components"] == nx.number_connected_components(graph)
    assert statistics["clustering"] == pytest.approx(nx.average_clustering(graph), abs=1e-6)
    assert statistics["reciprocity"] == 1 and statistics["reached"] == 64


def test_a_circuit_without_receivers_or_edges_has_statistics() -> None:
    empty = circuit_statistics(Circuit.from_dense(torch.zeros(0, 3)))
    assert (empty["edges"], empty["components"], empty["unheard"]) == (0, 0, 3)
    lonely = circuit_statistics(Circuit.from_dense(torch.zeros(2, 3)))
    assert (lonely["isolated"], lonely["reached"], lonely["clustering"]) == (2, 0, 0)


def test_a_circuit_whose_senders_lack_its_receivers_is_refused() -> None:
    with pytest.raises(ShapeError, match="2 senders for 3 receivers"):
        circuit_statistics(Circuit.from_dense(torch.ones(3, 2)))
