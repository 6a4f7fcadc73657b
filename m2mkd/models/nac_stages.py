"""NAC modules as m2mKD teaches them: alone, between the widths of a meta model, without a circuit.

m2mKD (arXiv 2402.16918 section 3): the read-in, each propagator and the read-out are one module
each. In a pair there are no latents: a module sees the meta model's tokens under one fixed random
code, and where it needs states of its own, one fixed random state.

Letters: B batch, T tokens, U latents, D state width, C code width, M meta width.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from m2mkd.errors import ConfigError, ShapeError
from m2mkd.models.nac import NAC
from m2mkd.models.nac_circuit_stages import (
    CircuitMediatorStage,
    CircuitReadInStage,
    CircuitReadOutStage,
)
from m2mkd.nn import (
    ConfidencePooling,
    ConvNeXtTokenizer,
    FirstLatent,
    Propagator,
    ReadIn,
    ReadOut,
)

Context = Literal["alone", "circuit"]


class _Stage(nn.Module):
    """A module with the code and states it is taught under.

    Attributes:
        codes: One code for all tokens, [1, C], or one each.
        states: States that meet the tokens, [1, U, D], or [B, U, D] for batches of exactly B;
            None for modules whose tokens meet each other.
    """

    codes: Tensor
    states: Tensor | None

    def __init__(self, code_dim: int, state_dim: int | None) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randn(1, code_dim))
        states = None if state_dim is None else torch.randn(1, 1, state_dim)
        self.register_buffer("states", states)

    def set_latents(self, codes: Tensor | None = None, states: Tensor | None = None) -> None:
        """Replaces the random code [1, C] and states [1, U, D] or [B, U, D]; None keeps them.

        Raises:
            ShapeError: Another width, or states for a module without.
        """
        for name, given in (("codes", codes), ("states", states)):
            if given is None:
                continue
            own = getattr(self, name)
            if own is None or given.dim() != own.dim() or given.shape[-1] != own.shape[-1]:
                shape = None if own is None else tuple(own.shape)
                raise ShapeError(f"student module: {name} {tuple(given.shape)} instead of {shape}")
            setattr(self, name, given.to(own.device, own.dtype))

    def _states_for(self, batch: int) -> Tensor:
        assert self.states is not None
        if self.states.shape[0] not in (1, batch):
            raise ShapeError(
                f"student module: states for batches of {self.states.shape[0]} images met one of "
                f"{batch}; give states of [1, U, D] for any batch"
            )
        return self.states.expand(batch, -1, -1)


class ReadInStage(_Stage):
    """Images [B, channels, H, W] to tokens [B, U, M] of the meta model's width."""

    def __init__(self, tokenizer: ConvNeXtTokenizer, read_in: ReadIn, stitch_dim: int) -> None:
        options = read_in.options
        super().__init__(options.code_dim, options.state_dim)
        self.tokenizer = tokenizer
        self.read_in = read_in
        self.post_stitch = nn.Linear(options.state_dim, stitch_dim)

    def forward(self, images: Tensor) -> Tensor:
        """States of the fixed latents after reading the images, [B, U, M]."""
        states = self._states_for(images.shape[0])
        tokens: Tensor = self.post_stitch(self.read_in(states, self.codes, self.tokenizer(images)))
        return tokens


class MediatorStage(_Stage):
    """Tokens [B, T, M] to tokens [B, T, M]; each hears all others."""

    def __init__(self, propagator: Propagator, stitch_dim: int) -> None:
        options = propagator.options
        super().__init__(options.code_dim, None)
        self.pre_stitch = nn.Linear(stitch_dim, options.state_dim)
        self.propagator = propagator
        self.post_stitch = nn.Linear(options.state_dim, stitch_dim)

    def forward(self, tokens_BTM: Tensor) -> Tensor:
        """Tokens [B, T, M] after one round of messages."""
        states = self.pre_stitch(tokens_BTM)
        states = self.propagator(states, self.codes, states, self.codes, receivers_send=True)
        tokens: Tensor = self.post_stitch(states)
        return tokens


class ReadOutStage(_Stage):
    """Tokens [B, T, M] to logits [B, classes]; stitched on the senders' side only."""

    def __init__(
        self, read_out: ReadOut, pooling: ConfidencePooling | FirstLatent, stitch_dim: int
    ) -> None:
        options = read_out.options
        super().__init__(options.code_dim, options.state_dim)
        self.pre_stitch = nn.Linear(stitch_dim, options.state_dim)
        self.read_out = read_out
        self.pooling = pooling

    def forward(self, tokens_BTM: Tensor) -> Tensor:
        """Logits of the fixed latents after hearing the tokens."""
        states = self._states_for(tokens_BTM.shape[0])
        logits: Tensor = self.pooling(
            self.read_out(states, self.codes, self.pre_stitch(tokens_BTM), self.codes)
        )
        return logits


def split_nac(nac: NAC, stitch_dim: int, context: Context = "alone") -> nn.ModuleList:
    """Cuts a NAC into its read-in, propagators and read-out, each between new stitches.

    The stages share the NAC's parameters under local names (`read_in`, `propagator`, `read_out`),
    so training them trains the NAC; stitches, codes and states are the stages' own.

    Args:
        nac: With a propagator for each layer.
        stitch_dim: M.
        context: `alone`, as published, or `circuit`: among the NAC's latents.

    Raises:
        ConfigError: All layers are one propagator.
    """
    if nac.options.share_propagators:
        raise ConfigError(
            "a NAC whose layers share one propagator cannot be taught module by module; set "
            "share_propagators: false"
        )
    layers = range(nac.depth)
    if context == "circuit":
        return nn.ModuleList(
            [
                CircuitReadInStage(nac, stitch_dim),
                *(CircuitMediatorStage(nac, layer, stitch_dim) for layer in layers),
                CircuitReadOutStage(nac, stitch_dim),
            ]
        )
    return nn.ModuleList(
        [
            ReadInStage(nac.tokenizer, nac.read_in, stitch_dim),
            *(MediatorStage(nac.block(layer), stitch_dim) for layer in layers),
            ReadOutStage(nac.read_out, nac.pooling, stitch_dim),
        ]
    )
