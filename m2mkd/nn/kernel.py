"""Who may speak to whom in a NAC: circuits and link strengths from signatures.

SKMDPA of Neural Attentive Circuits (arXiv 2210.08031 section 3.2). Letters: B batch, U receivers,
V senders, N edges, S signature width.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from m2mkd import ops
from m2mkd.errors import ConfigError, did_you_mean
from m2mkd.ops import Circuit

Sampling = Literal["none", "relaxed_bernoulli", "threshold"]


class Edges(NamedTuple):
    """A circuit and what it adds to the attention scores.

    Attributes:
        circuit: U receivers by V senders.
        bias: Per edge, [N], or [B, N] where links were drawn per example.
    """

    circuit: Circuit
    bias: Tensor


class CircuitCache:
    """Keeps the circuit of two sets of signatures and rebuilds it when they changed.

    Signatures are compared by value, which takes microseconds and cannot miss a change, however it
    was made.

    Args:
        truncation: Largest distance 1 - cosine of a link; None links all pairs.
    """

    def __init__(self, truncation: float | None) -> None:
        self.truncation = truncation
        self._circuit: Circuit | None = None
        self._key: tuple[Tensor, Tensor] | None = None

    def get(self, receiver_sig_US: Tensor, sender_sig_VS: Tensor) -> Circuit:
        """The circuit for signatures [U, S] and [V, S], on their device."""
        key = (receiver_sig_US.detach(), sender_sig_VS.detach())
        if self._circuit is None or not self._is_known(*key):
            self._circuit = self._build(*key)
            self._key = (key[0].clone(), key[1].clone())
        return self._circuit

    def _is_known(self, receiver_sig_US: Tensor, sender_sig_VS: Tensor) -> bool:
        if self._key is None:
            return False
        pairs = zip(self._key, (receiver_sig_US, sender_sig_VS), strict=True)
        if any(old.device != new.device or old.shape != new.shape for old, new in pairs):
            return False
        return self.truncation is None or (
            torch.equal(self._key[0], receiver_sig_US) and torch.equal(self._key[1], sender_sig_VS)
        )

    def _build(self, receiver_sig_US: Tensor, sender_sig_VS: Tensor) -> Circuit:
        if self.truncation is not None:
            return ops.circuit_from_signatures(receiver_sig_US, sender_sig_VS, self.truncation)
        shape = (receiver_sig_US.shape[0], sender_sig_VS.shape[0])
        return Circuit.from_dense(receiver_sig_US.new_ones(shape, dtype=torch.bool))


@dataclass(frozen=True)
class KernelOptions:
    """How signatures turn into links.

    Attributes:
        truncation: Largest distance 1 - cosine of a link; None links all pairs.
        bandwidth: Initial value of the divisor of distances.
        learn_bandwidth: Whether it is a parameter.
        sampling: `relaxed_bernoulli` draws links per example in training; `none` does not.
        temperature: Of those draws.
        eval_sampling: The same in eval mode; `none` in the published models, or `threshold`.
    """

    truncation: float | None = None
    bandwidth: float = 1.0
    learn_bandwidth: bool = True
    sampling: Sampling = "none"
    temperature: float = 0.5
    eval_sampling: Sampling = "none"

    def __post_init__(self) -> None:
        for name in ("sampling", "eval_sampling"):
            value, known = getattr(self, name), get_args(Sampling)
            if value not in known:
                hint = did_you_mean(str(value), known)
                raise ConfigError(f"kernel: {name}={value!r} is none of {', '.join(known)}{hint}")
        if self.temperature <= 0.0:
            raise ConfigError(f"kernel: temperature={self.temperature} must be positive")


class SignatureKernel(nn.Module):
    """Strengths of a circuit's edges: exp(-(1 - cosine) / bandwidth), drawn or not."""

    bandwidth: Tensor

    def __init__(self, options: KernelOptions) -> None:
        super().__init__()
        self.options = options
        bandwidth = torch.tensor(float(options.bandwidth))
        if options.learn_bandwidth:
            self.bandwidth = nn.Parameter(bandwidth)
        else:
            self.register_buffer("bandwidth", bandwidth)

    def forward(
        self, receiver_sig_US: Tensor, sender_sig_VS: Tensor, circuit: Circuit, batch_size: int
    ) -> Tensor:
        """What attention adds to the scores of the edges: [N], or [B, N] where links are drawn.

        Not normalised over a receiver's senders: the softmax of attention does that.

        Args:
            receiver_sig_US: [U, S].
            sender_sig_VS: [V, S].
            circuit: U receivers by V senders.
            batch_size: B.
        """
        options = self.options
        return ops.edge_log_affinity(
            receiver_sig_US,
            sender_sig_VS,
            circuit,
            self.bandwidth,
            sampling=options.sampling if self.training else options.eval_sampling,
            temperature=options.temperature,
            batch_size=batch_size,
            normalise=False,
        )

    def log_affinity(
        self, receiver_sig_US: Tensor, sender_sig_VS: Tensor, circuit: Circuit
    ) -> Tensor:
        """Expected strengths of the edges, [N]: their exponentials sum to one over a receiver's."""
        return ops.edge_log_affinity(receiver_sig_US, sender_sig_VS, circuit, self.bandwidth)
