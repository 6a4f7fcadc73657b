"""NAC modules taught among the latents they will work with: our variant of m2mKD's pairs.

In the paper's pairs a module runs alone, under one random code (`m2mkd.models.nac_stages`). Here
the read-in fills the input latents, a propagator's mediators hear the meta model's tokens and,
along the circuit, each other, and the read-out's latents hear the tokens. Latents keep the codes,
signatures and first states that the student starts with; none of them is trained in a pair.

Letters: B batch, T tokens, U latents, D state width, C code width, S signature width, M meta width.
"""

import torch
from torch import Tensor, nn

from m2mkd import ops
from m2mkd.models.nac import NAC
from m2mkd.nn import Edges
from m2mkd.ops import Circuit


class _LatentStage(nn.Module):
    """A module with latents of its own.

    Attributes:
        codes: [U, C].
        states: First states, [U, D].
    """

    codes: Tensor
    states: Tensor

    def __init__(self, codes_UC: Tensor, states_UD: Tensor) -> None:
        super().__init__()
        # They follow from the student's seed, so checkpoints need not hold them.
        self.register_buffer("codes", codes_UC.detach().clone(), persistent=False)
        self.register_buffer("states", states_UD.detach().clone(), persistent=False)

    def _expanded(self, batch: int) -> Tensor:
        return self.states.expand(batch, -1, -1)


class CircuitReadInStage(_LatentStage):
    """Images [B, channels, H, W] to one token for each input latent, [B, U, M]."""

    def __init__(self, nac: NAC, stitch_dim: int) -> None:
        codes, states = _first_codes_and_states(nac, "input")
        super().__init__(codes, states)
        self.tokenizer = nac.tokenizer
        self.read_in = nac.read_in
        self.post_stitch = nn.Linear(nac.options.state_dim, stitch_dim)

    def forward(self, images: Tensor) -> Tensor:
        """States of the input latents after reading the images, [B, U, M]."""
        states = self._expanded(images.shape[0])
        tokens: Tensor = self.post_stitch(self.read_in(states, self.codes, self.tokenizer(images)))
        return tokens


class CircuitMediatorStage(_LatentStage):
    """Tokens [B, T, M] to one token for each mediator, [B, U, M].

    The tokens stand in the place of the input latents, under their codes in turn, and speak to
    every mediator; mediators speak to each other along the circuit of their signatures.
    """

    signatures: Tensor
    token_codes: Tensor

    def __init__(self, nac: NAC, layer: int, stitch_dim: int) -> None:
        codes, states = _first_codes_and_states(nac, "mediator", layer)
        super().__init__(codes, states)
        signatures = nac.mediator_latents.signatures.detach().clone()
        self.register_buffer("signatures", signatures, persistent=False)
        token_codes = nac.input_latents.codes_of(0).detach().clone()
        self.register_buffer("token_codes", token_codes, persistent=False)
        self.kernel_options = nac.kernel(layer).options
        self.pre_stitch = nn.Linear(stitch_dim, nac.options.state_dim)
        self.propagator = nac.block(layer)
        self.post_stitch = nn.Linear(nac.options.state_dim, stitch_dim)
        self._circuits: dict[tuple[int, torch.device], Circuit] = {}

    def forward(self, tokens_BTM: Tensor) -> Tensor:
        """States of the mediators after one round of messages, [B, U, M]."""
        batch, num_tokens, _ = tokens_BTM.shape
        mediators = self._expanded(batch)
        senders = torch.cat([self.pre_stitch(tokens_BTM), mediators.to(tokens_BTM.dtype)], dim=1)
        turn = torch.arange(num_tokens, device=tokens_BTM.device) % self.token_codes.shape[0]
        codes = torch.cat([self.token_codes[turn], self.codes])
        edges = self._edges(num_tokens, batch)
        out: Tensor = self.post_stitch(
            self.propagator(mediators, self.codes, senders, codes, edges)
        )
        return out

    def _edges(self, num_tokens: int, batch: int) -> Edges:
        """All links from tokens, at full strength, and those between mediators."""
        options = self.kernel_options
        circuit, between = self._circuit(num_tokens), self._circuit(0)
        log_affinity = ops.edge_log_affinity(
            self.signatures,
            self.signatures,
            between,
            options.bandwidth,
            sampling=options.sampling if self.training else options.eval_sampling,
            temperature=options.temperature,
            batch_size=batch,
            normalise=False,
        )
        bias = log_affinity.new_zeros(*log_affinity.shape[:-1], circuit.num_edges)
        bias[..., circuit.sender >= num_tokens] = log_affinity
        return Edges(circuit, bias)

    def _circuit(self, num_tokens: int) -> Circuit:
        """Mediators as receivers; tokens before mediators as senders."""
        key = (num_tokens, self.signatures.device)
        if key not in self._circuits:
            self._circuits[key] = self._build(num_tokens)
        return self._circuits[key]

    def _build(self, num_tokens: int) -> Circuit:
        truncation = self.kernel_options.truncation
        between = ops.circuit_from_signatures(
            self.signatures, self.signatures, 2.0 if truncation is None else truncation
        )
        mask_UV = between.to_dense()
        from_tokens = mask_UV.new_ones(mask_UV.shape[0], num_tokens)
        return Circuit.from_dense(torch.cat([from_tokens, mask_UV], dim=1))


class CircuitReadOutStage(_LatentStage):
    """Tokens [B, T, M] to logits [B, classes]; tokens come under the mediators' codes in turn."""

    sender_codes: Tensor

    def __init__(self, nac: NAC, stitch_dim: int) -> None:
        codes, states = _first_codes_and_states(nac, "output")
        super().__init__(codes, states)
        sender_codes = nac.mediator_latents.codes_of(-1).detach().clone()
        self.register_buffer("sender_codes", sender_codes, persistent=False)
        self.pre_stitch = nn.Linear(stitch_dim, nac.options.state_dim)
        self.read_out = nac.read_out
        self.pooling = nac.pooling

    def forward(self, tokens_BTM: Tensor) -> Tensor:
        """Logits of the output latents after hearing the tokens."""
        turn = torch.arange(tokens_BTM.shape[1], device=tokens_BTM.device)
        codes = self.sender_codes[turn % self.sender_codes.shape[0]]
        states = self._expanded(tokens_BTM.shape[0])
        heard = self.read_out(states, self.codes, self.pre_stitch(tokens_BTM), codes)
        logits: Tensor = self.pooling(heard)
        return logits


@torch.no_grad()
def _first_codes_and_states(nac: NAC, kind: str, layer: int = 0) -> tuple[Tensor, Tensor]:
    """Codes [U, C] and mean first states [U, D] of one kind of latents."""
    latents = getattr(nac, f"{kind}_latents")
    if nac.seeder is None:
        return latents.codes_of(layer), latents.states
    was_training = nac.seeder.training
    states_BUD = nac.seeder.eval()(latents.codes_of(0), 1)
    nac.seeder.train(was_training)
    return latents.codes_of(layer), states_BUD[0]
