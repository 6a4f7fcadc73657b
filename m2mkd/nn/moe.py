"""Mixture-of-experts MLP: tokens choose experts (V-MoE, arXiv 2106.05974; FastMoE's naive gate)
or experts choose tokens (arXiv 2202.09368).

Letters: T tokens, D width, H hidden width of an expert, E experts, K experts per token.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from m2mkd import ops
from m2mkd.errors import ConfigError, did_you_mean
from m2mkd.nn.precision import without_autocast

GateMode = Literal["softmax_selected", "softmax_all", "softmax_all_renorm", "expert_choice"]
GATE_MODES = get_args(GateMode)
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")


class MoEMlp(nn.Module):
    """A transformer MLP whose hidden layer is one of E experts, chosen per token.

    Output = sum over the K chosen experts e of gate_e(x) * MLP_e(x) (V-MoE eq. 1). Expert weights
    are [E, out, in]. In training mode `auxiliary_loss` holds the weighted sum of the importance,
    load and z losses of the last forward pass.

    Args:
        dim: Width D of the tokens.
        hidden_dim: Width H inside an expert.
        num_experts: E.
        num_selected: K, at most E.
        gate: How weights come from router logits; `softmax_selected` (softmax over the K kept
            logits) is the m2mKD student, `softmax_all` (no renormalisation) is V-MoE. With
            `expert_choice` every expert takes as many tokens as its capacity allows, those with
            the largest softmax over all experts, which is also their weight; K is then the mean
            number of experts per token, and what a token gets depends on the rest of its batch.
        activation: `gelu`, `gelu_tanh`, `relu` or `silu`.
        bias: Whether experts have biases.
        router_noise: Standard deviation of the training noise on logits, in units of 1/E (V-MoE
            uses 1).
        capacity_factor: Rows an expert may take in training, as a multiple of the even share
            K*T/E; None drops nothing (expert choice: takes the even share).
        eval_capacity_factor: The same at evaluation.
        prioritise: Fill capacity by descending gate weight (batch prioritised routing, V-MoE
            section 2.4) instead of token order.
        importance_weight: Weight of the squared coefficient of variation of summed gate mass.
        load_weight: Weight of the same of the smooth number of tokens per expert; needs noise.
        z_weight: Weight of the mean squared log-partition of the router (ST-MoE eq. 5).

    Raises:
        ConfigError: num_selected exceeds num_experts, load_weight without router_noise, an unknown
            gate or activation, an option that is not a number, or one that expert choice lacks.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        *,
        num_experts: int = 8,
        num_selected: int = 2,
        gate: GateMode = "softmax_selected",
        activation: str = "gelu",
        bias: bool = True,
        router_noise: float = 0.0,
        capacity_factor: float | None = None,
        eval_capacity_factor: float | None = None,
        prioritise: bool = False,
        importance_weight: float = 0.0,
        load_weight: float = 0.0,
        z_weight: float = 0.0,
    ) -> None:
        super().__init__()
        _check_choice("gate", gate, GATE_MODES)
        _check_choice("activation", activation, ACTIVATIONS)
        _check_numbers(
            num_experts=num_experts,
            num_selected=num_selected,
            router_noise=router_noise,
            capacity_factor=capacity_factor,
            eval_capacity_factor=eval_capacity_factor,
            importance_weight=importance_weight,
            load_weight=load_weight,
            z_weight=z_weight,
        )
        if not 1 <= num_selected <= num_experts:
            raise ConfigError(
                f"moe: num_selected={num_selected} is not between 1 and num_experts={num_experts}"
            )
        if load_weight and not router_noise:
            raise ConfigError("moe: load_weight needs router_noise above 0 (V-MoE appendix A)")
        if gate == "expert_choice" and (prioritise or load_weight):
            option = "prioritise" if prioritise else "load_weight"
            raise ConfigError(
                f"moe: {option} means nothing with gate='expert_choice', where every expert takes "
                "its best tokens and all take equally many; leave it out"
            )
        self.num_experts = num_experts
        self.num_selected = num_selected
        self.gate: GateMode = gate
        self.activation = activation
        self.router_noise = router_noise
        self.capacity_factor = capacity_factor
        self.eval_capacity_factor = eval_capacity_factor
        self.prioritise = prioritise
        self.importance_weight = importance_weight
        self.load_weight = load_weight
        self.z_weight = z_weight
        self.auxiliary_loss: Tensor | None = None

        self.router = nn.Linear(dim, num_experts)
        self.fc1_weight = nn.Parameter(torch.empty(num_experts, hidden_dim, dim))
        self.fc2_weight = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
        self.fc1_bias = nn.Parameter(torch.empty(num_experts, hidden_dim)) if bias else None
        self.fc2_bias = nn.Parameter(torch.empty(num_experts, dim)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws expert weights as nn.Linear does; the router is left to the model's initialiser."""
        layers = ((self.fc1_weight, self.fc1_bias), (self.fc2_weight, self.fc2_bias))
        for weight, bias in layers:
            bound = 1.0 / math.sqrt(weight.shape[-1])
            nn.init.uniform_(weight, -bound, bound)
            if bias is not None:
                nn.init.uniform_(bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Applies the chosen experts to every token.

        Args:
            x: Tokens [..., D].

        Returns:
            [..., D] in x's dtype, under autocast in the region's. Tokens whose choices were all
            dropped by capacity, or that no expert chose, give zeros.

        Raises:
            ConfigError: A capacity factor that rounds to no row at all.
        """
        tokens_TD = x.reshape(-1, x.shape[-1])
        clean_TE, noisy_TE = self._logits(tokens_TD)
        weights_TK, plan = self._route(noisy_TE)
        out_TD = self._apply_experts(tokens_TD, weights_TK, plan)
        if self.training:
            self.auxiliary_loss = self._auxiliary_loss(clean_TE, noisy_TE)
        return out_TD.reshape(x.shape)

    def capacity(self, num_tokens: int) -> int | None:
        """Rows each expert may take for `num_tokens` tokens; None means no limit, or no tokens.

        V-MoE eq. 2: round(K * T * C / E).
        """
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        if factor is None and self.gate == "expert_choice":
            factor = 1.0
        if factor is None or num_tokens == 0:
            return None
        capacity = round(self.num_selected * num_tokens * factor / self.num_experts)
        if capacity < 1:
            enough = math.ceil(100 * self.num_experts / (self.num_selected * num_tokens)) / 100
            raise ConfigError(
                f"moe: capacity 0 from num_tokens={num_tokens}, num_experts={self.num_experts}, "
                f"num_selected={self.num_selected}, capacity_factor={factor}; "
                f"raise the factor to {enough} or use fewer experts"
            )
        return capacity

    @torch.no_grad()
    def expert_rows(self, x: Tensor) -> Tensor:
        """Counts the tokens that each expert takes, after capacity; training noise is left out.

        Args:
            x: Tokens [..., D], as `forward` takes them.

        Returns:
            [E], int64, on x's device.
        """
        clean_TE, _ = self._logits(x.reshape(-1, x.shape[-1]))
        _, plan = self._route(clean_TE)
        return plan.offsets.diff().long()

    def _route(self, logits_TE: Tensor) -> tuple[Tensor, ops.MoEPlan]:
        """Combine weights, and which rows of the sorted batch they belong to."""
        capacity = self.capacity(logits_TE.shape[0])
        if self.gate == "expert_choice":
            return ops.expert_choice(logits_TE, capacity or 1)  # no capacity: there are no tokens
        weights_TK, experts_TK = ops.topk_gate(logits_TE, self.num_selected, self.gate)
        priority_T = weights_TK.detach().amax(dim=1) if self.prioritise else None
        return weights_TK, ops.moe_plan(experts_TK, self.num_experts, capacity, priority_T)

    def _apply_experts(self, tokens_TD: Tensor, weights_TK: Tensor, plan: ops.MoEPlan) -> Tensor:
        """What the experts return for the routed tokens, combined, [T, D]."""
        return ops.moe_mlp(
            tokens_TD,
            weights_TK,
            plan,
            self.fc1_weight,
            self.fc1_bias,
            self.fc2_weight,
            self.fc2_bias,
            self.activation,
        )

    def _logits(self, tokens_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Router logits in float32 or better, without and with training noise."""
        dtype = torch.promote_types(tokens_TD.dtype, torch.float32)
        with without_autocast(tokens_TD):
            clean_TE = nn.functional.linear(
                tokens_TD.to(dtype), self.router.weight.to(dtype), self.router.bias.to(dtype)
            )
        if not (self.training and self.router_noise):
            return clean_TE, clean_TE
        noise_TE = torch.randn_like(clean_TE) * (self.router_noise / self.num_experts)
        return clean_TE, clean_TE + noise_TE

    def _auxiliary_loss(self, clean_TE: Tensor, noisy_TE: Tensor) -> Tensor | None:
        losses = []
        if self.importance_weight:
            importance_E = clean_TE.softmax(dim=1).sum(dim=0)
            losses.append(self.importance_weight * _squared_variation(importance_E))
        if self.load_weight:
            losses.append(self.load_weight * self._load_loss(clean_TE, noisy_TE))
        if self.z_weight:
            losses.append(self.z_weight * clean_TE.logsumexp(dim=1).square().mean())
        if losses and clean_TE.shape[0] == 0:
            return clean_TE.sum()  # zero: means over no tokens would be NaN
        return torch.stack(losses).sum() if losses else None

    def _load_loss(self, clean_TE: Tensor, noisy_TE: Tensor) -> Tensor:
        """V-MoE appendix A: how often fresh noise would lift each logit over the K-th one."""
        deviation = self.router_noise / self.num_experts
        threshold_T1 = noisy_TE.topk(self.num_selected, dim=1).values[:, -1:]
        chance_TE = torch.special.ndtr((clean_TE - threshold_T1) / deviation)
        return _squared_variation(chance_TE.mean(dim=0))


def expert_copies(mlp: Mapping[str, Tensor], num_experts: int) -> dict[str, Tensor]:
    """State of an `MoEMlp`'s experts, all equal to one dense MLP (arXiv 2212.05055 section 2.1).

    Args:
        mlp: State dict of a timm `Mlp`: fc1.weight [H, D], fc1.bias [H], fc2.weight [D, H] and
            fc2.bias [D]; biases may be absent. Other entries keep their names.
        num_experts: E.

    Returns:
        fc1_weight [E, H, D], and so on, for `MoEMlp.load_state_dict(..., strict=False)`; the router
        is not among them.
    """
    copies = {}
    for name, value in mlp.items():
        layer, _, part = name.partition(".")
        is_expert = layer in ("fc1", "fc2")
        copies[f"{layer}_{part}" if is_expert else name] = (
            value.expand(num_experts, *value.shape) if is_expert else value
        )
    return copies


def _check_choice(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        hint = did_you_mean(str(value), known)
        raise ConfigError(f"moe: {name}={value!r} is none of {', '.join(known)}{hint}")


def _check_numbers(**values: Any) -> None:
    for name, value in values.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise ConfigError(f"moe: {name}={value!r} is not a number")


def _squared_variation(values_E: Tensor) -> Tensor:
    return values_E.var(unbiased=False) / values_E.mean().square()
