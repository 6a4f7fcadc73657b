"""Graph priors: which module may talk to which before training, and signatures that say so.

NAC (arXiv 2210.08031) shapes its circuits by drawing a graph of the mediators and moving their
signatures until near signatures mean an edge. Letters: U nodes, S signature width.
"""

import inspect
from collections.abc import Callable
from typing import Any

import networkx as nx
import torch
from torch import Tensor

from m2mkd.errors import ConfigError, did_you_mean
from m2mkd.nn.signatures import fit_signatures, orthogonal_start


def prior_signatures(
    name: str, num: int, width: int, *, seed: int, truncation: float = 0.8, **options: Any
) -> Tensor:
    """Draws a graph prior and returns signatures whose near pairs are its edges.

    The same seed gives the same graph and the same signatures. `complete` gives every node the
    same signature, as published. Where the width is too small for the graph (Erdős-Rényi and
    planted partition of 768 nodes in width 64), the result is as near as the published fit comes;
    `m2mkd.nn.signatures.graph_mistakes` counts what it missed.

    Args:
        name: One of `PRIORS`.
        num: Nodes, U.
        width: Signature width, S.
        seed: Of the graph and of the signatures' start.
        truncation: Largest distance (1 - cosine) of an edge; 0.8 as published, though the
            published models then link up to 0.9, which adds links that the graph does not have.
        options: Those of the prior, see `prior_options`.

    Returns:
        Signatures, [U, S], float32.

    Raises:
        ConfigError: An unknown prior or option, or a value that cannot work.
    """
    if width < 1:
        raise ConfigError(f"signature width {width}; it must be at least 1")
    edges_UU = prior_graph(name, num, seed=seed, **options)
    if name == "complete":
        return torch.eye(1, width).repeat(num, 1)
    return fit_signatures(orthogonal_start(num, width, seed=seed), edges_UU, truncation)


def prior_graph(name: str, num: int, *, seed: int, **options: Any) -> Tensor:
    """Draws a graph prior.

    Args:
        name: One of `PRIORS`.
        num: Nodes, U.
        seed: Of the random priors; the same seed gives the same graph.
        options: Those of the prior, see `prior_options`.

    Returns:
        Whether two nodes are neighbours, [U, U], bool; symmetric, no node is its own neighbour.

    Raises:
        ConfigError: An unknown prior or option, or a value that cannot work.
    """
    known = prior_options(name)
    for option in options:
        if option not in known:
            choices = ", ".join(known) or "none"
            raise ConfigError(
                f"graph prior {name}: unknown option {option!r}{did_you_mean(option, known)}; "
                f"its options are: {choices}"
            )
    _check_whole(name, "nodes", num, least=1)
    graph = _BUILDERS[name](num, seed, **options)
    edges_UU = torch.from_numpy(nx.to_numpy_array(graph, nodelist=sorted(graph), dtype=bool))
    return edges_UU.fill_diagonal_(False)


def prior_options(name: str) -> dict[str, Any]:
    """The options of a graph prior and their defaults, by name.

    Raises:
        ConfigError: An unknown prior.
    """
    if name not in _BUILDERS:
        raise ConfigError(
            f"unknown graph prior {name!r}{did_you_mean(name, PRIORS)}; use one of "
            f"{', '.join(PRIORS)}"
        )
    parameters = inspect.signature(_BUILDERS[name]).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def _barabasi_albert(num: int, seed: int, *, m: int = 2) -> nx.Graph:
    """Scale-free: every new node brings m edges, mostly to well-connected nodes."""
    _check_whole("barabasi_albert", "m", m, least=1)
    if m >= num:
        raise ConfigError(f"graph prior barabasi_albert: m={m} is not below the {num} nodes")
    return nx.barabasi_albert_graph(num, m, seed=seed)


def _erdos_renyi(num: int, seed: int, *, p: float = 0.1) -> nx.Graph:
    """Every pair of nodes is joined with probability p."""
    _check_probability("erdos_renyi", "p", p)
    return nx.gnp_random_graph(num, p, seed=seed)


def _planted_partition(
    num: int, seed: int, *, num_clusters: int = 8, p_in: float = 0.9, p_out: float = 0.2
) -> nx.Graph:
    """Equal clusters: pairs are joined with p_in within one and p_out between two."""
    size = _split("planted_partition", "num_clusters", num_clusters, num)
    _check_probability("planted_partition", "p_in", p_in)
    _check_probability("planted_partition", "p_out", p_out)
    return nx.planted_partition_graph(num_clusters, size, p_in, p_out, seed=seed)


def _ring_of_cliques(num: int, seed: int, *, num_cliques: int = 8) -> nx.Graph:
    """Complete clusters in a ring, one edge from each to the next."""
    del seed
    size = _split("ring_of_cliques", "num_cliques", num_cliques, num)
    if num_cliques < 2 or size < 2:
        raise ConfigError(
            f"graph prior ring_of_cliques: {num_cliques} cliques of {size}; it needs at least 2 "
            "cliques of at least 2 nodes"
        )
    return nx.ring_of_cliques(num_cliques, size)


def _watts_strogatz(num: int, seed: int, *, k: int | None = None, p: float = 0.4) -> nx.Graph:
    """Small world: a ring with k neighbours each, edges rewired with probability p.

    k is a tenth of the nodes where None; an odd k counts as the even number below it.
    """
    k = round(0.1 * num) if k is None else k
    _check_whole("watts_strogatz", "k", k, least=2)
    if k > num:
        raise ConfigError(f"graph prior watts_strogatz: k={k} is more than the {num} nodes")
    _check_probability("watts_strogatz", "p", p)
    return nx.watts_strogatz_graph(num, k, p, seed=seed)


def _complete(num: int, seed: int) -> nx.Graph:
    """Every pair of nodes is joined."""
    del seed
    return nx.complete_graph(num)


def _grid(num: int, seed: int, *, rows: int | None = None, periodic: bool = False) -> nx.Graph:
    """A rectangle, nodes by row; periodic joins opposite sides.

    Where rows is None it is the largest divisor of the nodes up to their square root.
    """
    del seed
    if rows is None:
        rows = next(r for r in range(int(num**0.5), 0, -1) if num % r == 0)
    columns = _split("grid", "rows", rows, num)
    return nx.grid_2d_graph(rows, columns, periodic=periodic)


def _balanced_tree(num: int, seed: int, *, branching: int = 2) -> nx.Graph:
    """A full tree, filled by level; the last level may be incomplete."""
    del seed
    _check_whole("balanced_tree", "branching", branching, least=1)
    return nx.full_rary_tree(branching, num)


def _barbell(num: int, seed: int, *, bridge: int = 0) -> nx.Graph:
    """Two complete halves joined by a path of `bridge` nodes, or by one edge."""
    del seed
    _check_whole("barbell", "bridge", bridge, least=0)
    if (num - bridge) % 2 or num - bridge < 4:
        raise ConfigError(
            f"graph prior barbell: {num} nodes less a bridge of {bridge} are not two halves of at "
            "least 2 nodes"
        )
    return nx.barbell_graph((num - bridge) // 2, bridge)


def _hypercube(num: int, seed: int) -> nx.Graph:
    """Corners of a cube in log2(U) dimensions."""
    del seed
    if num & (num - 1):
        raise ConfigError(f"graph prior hypercube: {num} nodes are not a power of 2")
    return nx.hypercube_graph(num.bit_length() - 1)


_BUILDERS: dict[str, Callable[..., nx.Graph]] = {
    "barabasi_albert": _barabasi_albert,
    "erdos_renyi": _erdos_renyi,
    "planted_partition": _planted_partition,
    "ring_of_cliques": _ring_of_cliques,
    "watts_strogatz": _watts_strogatz,
    "complete": _complete,
    "grid": _grid,
    "balanced_tree": _balanced_tree,
    "barbell": _barbell,
    "hypercube": _hypercube,
}
PRIORS = tuple(_BUILDERS)


def _check_whole(prior: str, name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(
            f"graph prior {prior}: {name}={value!r}; it must be a whole number of at least {least}"
        )


def _check_probability(prior: str, name: str, value: float) -> None:
    if not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ConfigError(f"graph prior {prior}: {name}={value!r} is not a probability in [0, 1]")


def _split(prior: str, name: str, parts: int, num: int) -> int:
    """Nodes per part; raises ConfigError unless they come out even."""
    _check_whole(prior, name, parts, least=1)
    if num % parts:
        raise ConfigError(
            f"graph prior {prior}: {num} nodes cannot be split into {name}={parts} equal parts"
        )
    return num // parts
