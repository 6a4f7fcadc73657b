"""Compares the default fit of signatures to a graph prior with the published one.

    python benchmarks/bench_priors.py

The published fit is kept here as its code does it: 1000 Adam steps through autograd. For every
prior at its published sizes (width 64), from the same start: wrong pairs at truncation 0.8 (edges
missed and edges too many, both directions counted), density of the mediators' circuit at the
kernel's truncation 0.9, how far the two fits agree on that circuit (links of both over links of
either), and seconds.
"""

import argparse
import json
import time

import torch
from torch import Tensor

from m2mkd.nn.graphs import prior_graph
from m2mkd.nn.signatures import fit_signatures, graph_mistakes, orthogonal_start
from m2mkd.ops import circuit_from_signatures

PRIORS = [
    ("barabasi_albert", 256, {"m": 2}),
    ("planted_partition", 256, {"num_clusters": 8}),
    ("ring_of_cliques", 256, {"num_cliques": 8}),
    ("erdos_renyi", 256, {"p": 0.1}),
    ("watts_strogatz", 256, {}),
    ("barabasi_albert", 768, {"m": 6}),
    ("planted_partition", 768, {"num_clusters": 12}),
    ("ring_of_cliques", 768, {"num_cliques": 12}),
    ("erdos_renyi", 768, {"p": 0.1}),
]


def published(start_US: Tensor, edges_UU: Tensor) -> Tensor:
    """The published fit, literally."""
    signature_US = start_US.clone().requires_grad_()
    adam = torch.optim.Adam([signature_US], lr=1e-3)
    for _ in range(1000):
        unit_US = torch.nn.functional.normalize(signature_US, dim=1)
        distance_UU = 1 - unit_US @ unit_US.T
        edge_UU = distance_UU.clamp(min=0.8)
        loss = torch.where(edges_UU, edge_UU, (-distance_UU).clamp(min=-0.8)).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    return signature_US.detach()


def links(signature_US: Tensor) -> Tensor:
    """The mediators' circuit as the published models cut it."""
    return circuit_from_signatures(signature_US, signature_US, 0.9).to_dense()


def main() -> None:
    """Prints one JSON line per prior."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name, num, options in PRIORS:
        edges_UU = prior_graph(name, num, seed=args.seed, **options)
        start_US = orthogonal_start(num, 64, seed=args.seed)
        line: dict[str, object] = {"prior": name, "nodes": num, "edges": int(edges_UU.sum())}
        circuits = []
        for fit in (published, fit_signatures):
            began = time.process_time()
            fitted_US = fit(start_US, edges_UU)
            seconds = time.process_time() - began
            circuits.append(links(fitted_US))
            line[fit.__name__] = {
                "mistakes": graph_mistakes(fitted_US, edges_UU),
                "density_0.9": round(float(circuits[-1].float().mean()), 3),
                "cpu_seconds": round(seconds, 2),
            }
        both, either = circuits[0] & circuits[1], circuits[0] | circuits[1]
        line["agreement"] = round(int(both.sum()) / int(either.sum()), 3)
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
