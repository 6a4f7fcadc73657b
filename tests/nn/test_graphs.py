"""Graph priors: their shapes and errors, and signatures fitted to them."""

from pathlib import Path

import pytest
import torch

from m2mkd.errors import ConfigError, ShapeError
from m2mkd.nn.graphs import PRIORS, prior_graph, prior_options, prior_signatures
from m2mkd.nn.signatures import fit_signatures, graph_mistakes, orthogonal_start


def degrees(name: str, num: int, **options: object) -> list[int]:
    return prior_graph(name, num, seed=0, **options).sum(dim=1).tolist()


@pytest.mark.parametrize("name", PRIORS)
def test_a_prior_is_symmetric_without_loops_and_the_same_for_the_same_seed(name: str) -> None:
    edges = prior_graph(name, 64, seed=3)
    assert edges.shape == (64, 64) and edges.dtype == torch.bool
    assert torch.equal(edges, edges.T) and not edges.diagonal().any()
    assert torch.equal(edges, prior_graph(name, 64, seed=3))


@pytest.mark.parametrize(
    "name", ["barabasi_albert", "erdos_renyi", "planted_partition", "watts_strogatz"]
)
def test_another_seed_draws_another_random_graph(name: str) -> None:
    assert not torch.equal(prior_graph(name, 64, seed=0), prior_graph(name, 64, seed=1))


def test_barabasi_albert_has_m_edges_for_each_node_after_the_first_m() -> None:
    assert sum(degrees("barabasi_albert", 50, m=3)) == 2 * 3 * (50 - 3)


def test_erdos_renyi_of_probability_one_is_complete() -> None:
    assert degrees("erdos_renyi", 6, p=1.0) == degrees("complete", 6) == [5] * 6


def test_planted_partition_without_outside_edges_is_cliques() -> None:
    edges = prior_graph("planted_partition", 6, seed=0, num_clusters=3, p_in=1.0, p_out=0.0)
    assert edges.nonzero().tolist() == [[0, 1], [1, 0], [2, 3], [3, 2], [4, 5], [5, 4]]


def test_ring_of_cliques_joins_each_clique_to_the_next_by_one_edge() -> None:
    edges = prior_graph("ring_of_cliques", 12, seed=0, num_cliques=3)
    blocks = edges.reshape(3, 4, 3, 4).sum(dim=(1, 3))
    assert blocks.tolist() == [[12, 1, 1], [1, 12, 1], [1, 1, 12]]


def test_watts_strogatz_without_rewiring_is_a_ring_of_k_neighbours() -> None:
    assert degrees("watts_strogatz", 10, k=4, p=0.0) == [4] * 10


def test_grid_counts_nodes_by_row() -> None:
    edges = prior_graph("grid", 6, seed=0, rows=2)  # 0 1 2 over 3 4 5
    assert edges[0].nonzero().flatten().tolist() == [1, 3]
    assert edges[4].nonzero().flatten().tolist() == [1, 3, 5]
    assert degrees("grid", 9, periodic=True) == [4] * 9


def test_balanced_tree_gives_every_node_its_children() -> None:
    assert degrees("balanced_tree", 7) == [2, 3, 3, 1, 1, 1, 1]
    assert degrees("balanced_tree", 5, branching=4) == [4, 1, 1, 1, 1]


def test_barbell_is_two_cliques_and_a_bridge() -> None:
    assert degrees("barbell", 6) == [2, 2, 3, 3, 2, 2]
    assert degrees("barbell", 7, bridge=1) == [2, 2, 3, 2, 3, 2, 2]


def test_hypercube_joins_corners_that_differ_in_one_bit() -> None:
    edges = prior_graph("hypercube", 8, seed=0)
    assert edges[5].nonzero().flatten().tolist() == [1, 4, 7]


@pytest.mark.parametrize(
    ("name", "num", "options", "message"),
    [
        ("barabasi", 16, {}, "unknown graph prior 'barabasi'; did you mean 'barabasi_albert'"),
        ("barabasi_albert", 16, {"n": 16}, "unknown option 'n'; its options are: m"),
        ("complete", 16, {"p": 0.1}, "unknown option 'p'; its options are: none"),
        ("barabasi_albert", 16, {"m": 16}, "m=16 is not below the 16 nodes"),
        ("barabasi_albert", 16, {"m": 2.5}, "m=2.5; it must be a whole number"),
        ("erdos_renyi", 16, {"p": 1.5}, "p=1.5 is not a probability"),
        (
            "planted_partition",
            16,
            {"num_clusters": 3},
            "16 nodes cannot be split into num_clusters",
        ),
        ("ring_of_cliques", 16, {"num_cliques": 16}, "16 cliques of 1"),
        ("watts_strogatz", 16, {"k": 17}, "k=17 is more than the 16 nodes"),
        ("watts_strogatz", 12, {}, "k=1; it must be a whole number of at least 2"),
        ("grid", 16, {"rows": 5}, "16 nodes cannot be split into rows=5"),
        ("barbell", 7, {}, "7 nodes less a bridge of 0 are not two halves"),
        ("hypercube", 12, {}, "12 nodes are not a power of 2"),
        ("complete", 0, {}, "nodes=0"),
    ],
)
def test_a_prior_that_cannot_be_drawn_says_why(
    name: str, num: int, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        prior_graph(name, num, seed=0, **options)


def test_options_come_with_their_defaults() -> None:
    assert prior_options("planted_partition") == {"num_clusters": 8, "p_in": 0.9, "p_out": 0.2}


@pytest.mark.parametrize("name", [name for name in PRIORS if name != "complete"])
def test_near_signatures_are_the_edges_of_the_prior(name: str) -> None:
    signatures = prior_signatures(name, 64, 32, seed=5)
    assert signatures.shape == (64, 32)
    assert graph_mistakes(signatures, prior_graph(name, 64, seed=5)) == (0, 0)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("barabasi_albert", {"m": 2}),
        ("ring_of_cliques", {"num_cliques": 8}),
        ("planted_partition", {}),
        ("erdos_renyi", {"p": 0.1}),
    ],
)
def test_published_sizes_reach_their_graph(name: str, options: dict[str, object]) -> None:
    signatures = prior_signatures(name, 256, 64, seed=0, **options)
    assert graph_mistakes(signatures, prior_graph(name, 256, seed=0, **options)) == (0, 0)


def test_signatures_of_the_complete_prior_are_all_the_same() -> None:
    signatures = prior_signatures("complete", 5, 3, seed=0)
    assert signatures.tolist() == [[1.0, 0.0, 0.0]] * 5


def test_signatures_are_the_same_for_the_same_seed_only() -> None:
    first, again, other = (
        prior_signatures("ring_of_cliques", 16, 8, seed=seed, num_cliques=4) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.allclose(first, other)


def test_gradients_of_the_fit_are_those_of_the_published_hinge() -> None:
    start = orthogonal_start(12, 6, seed=0).double()
    edges = prior_graph("watts_strogatz", 12, seed=0, k=4)
    by_hand = fit_signatures(start, edges, steps=30, settle=False)
    signatures = start.clone().requires_grad_()
    adam = torch.optim.Adam([signatures], lr=1e-3)
    for _ in range(30):
        unit = signatures / signatures.norm(dim=1, keepdim=True)
        distance = 1 - unit @ unit.T
        hinge = torch.where(edges, distance.clamp(min=0.8), (-distance).clamp(min=-0.8)).mean()
        adam.zero_grad()
        hinge.backward()
        adam.step()
    torch.testing.assert_close(by_hand, signatures.detach())


def test_a_fit_that_settles_ends_where_the_published_one_first_has_the_graph() -> None:
    start = orthogonal_start(16, 16, seed=0)
    edges = prior_graph("barabasi_albert", 16, seed=0)
    settled = fit_signatures(start, edges)
    for steps in range(200):
        published = fit_signatures(start, edges, steps=steps, settle=False)
        if graph_mistakes(published, edges) == (0, 0):
            break
    torch.testing.assert_close(settled, published)


def test_a_graph_the_signatures_already_have_leaves_them_as_they_are() -> None:
    start = torch.eye(4)
    fitted = fit_signatures(start, torch.zeros(4, 4, dtype=torch.bool))
    assert torch.equal(fitted, start) and fitted.data_ptr() != start.data_ptr()


def test_mistakes_count_missing_and_surplus_edges_in_both_directions() -> None:
    signatures = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
    edges = torch.tensor([[0, 0, 1], [0, 0, 0], [1, 0, 0]]).bool()
    assert graph_mistakes(signatures, edges) == (2, 2)


@pytest.mark.parametrize(
    ("start", "edges", "truncation", "message"),
    [
        (torch.eye(3).long(), torch.zeros(3, 3).bool(), 0.8, "start is torch.int64"),
        (torch.eye(3), torch.zeros(2, 2).bool(), 0.8, r"edges are torch.bool \(2, 2\)"),
        (torch.eye(3), torch.ones(3, 3).triu().bool(), 0.8, "edges are not symmetric"),
        (torch.eye(3), torch.zeros(3, 3).bool(), 2.5, "truncation=2.5"),
    ],
)
def test_a_fit_that_cannot_be_made_says_why(
    start: torch.Tensor, edges: torch.Tensor, truncation: float, message: str
) -> None:
    with pytest.raises(ShapeError, match=message):
        fit_signatures(start, edges, truncation)


def test_a_signature_width_of_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match="signature width 0"):
        prior_signatures("complete", 4, 0, seed=0)


@pytest.mark.parametrize("name", PRIORS)
def test_the_guide_has_every_prior_with_its_options(name: str) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "circuits.md").read_text()
    options = ", ".join(f"`{option}={value}`" for option, value in prior_options(name).items())
    assert f"| `{name}` | {options}{' ' if options else ''}| " in guide
