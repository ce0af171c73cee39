"""The whole model on one device, in plain torch: its definition, and the oracle of every faster path.

Shape letters: B sequences, T positions, d hidden, V vocabulary rows, D MTP depths, P rotary pairs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from model.balance import BalanceWeights
from model.cache import Cache
from model.config import ModelConfig
from model.layer import MoEStatistics, TransformerLayer
from model.mtp import MultiTokenPrediction
from model.norm import promoted, rms_norm
from model.rope import Rotary

IGNORE = -100


@dataclass(frozen=True)
class Output:
    """logits [B, T, V]; mtp_logits: one [B, T, V] per depth; moe: statistics by MoE layer name (`layers.3`,
    `mtp.0.layer`).
    """

    logits_BTV: torch.Tensor
    mtp_logits: list[torch.Tensor] = field(default_factory=list)
    moe: dict[str, MoEStatistics] = field(default_factory=dict)


@dataclass(frozen=True)
class Losses:
    """total = main + mtp_weight / D * sum(mtp) + balance; each term already divided by its own denominator.

    balance: sum over kinds and MoE layers (MTP's included) of weight times the mean over sequences.
    """

    total: torch.Tensor
    main: torch.Tensor
    mtp: tuple[torch.Tensor, ...]
    balance: torch.Tensor


class Transformer(nn.Module):
    """embed [V, d], layers, norm [d], head [V, d] (None where `embed` is the head), mtp. Parameters are uninitialised;
    see `model.initialize`.
    """

    head: nn.Parameter | None

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.config = config
        V, d = config.vocab_size, config.hidden_size
        self.embed = nn.Parameter(torch.empty(V, d, dtype=dtype, device=device))
        self.layers = nn.ModuleList(
            TransformerLayer(config, moe=config.is_moe(layer), dtype=dtype, device=device)
            for layer in range(config.num_layers)
        )
        self.norm = nn.Parameter(torch.empty(d, dtype=dtype, device=device))
        tied = config.tie_embeddings
        self.head = None if tied else nn.Parameter(torch.empty(V, d, dtype=dtype, device=device))
        self.mtp = nn.ModuleList(
            MultiTokenPrediction(config, dtype=dtype, device=device) for _ in range(config.mtp_depth)
        )

    def states(
        self,
        tokens_BT: torch.Tensor,
        *,
        rotary: Rotary,
        real_BT: torch.Tensor | None = None,
        caches: list[Cache] | None = None,
        first_position: int = 0,
    ) -> tuple[torch.Tensor, dict[str, MoEStatistics]]:
        """The states [B, T, d] that the head and the first MTP depth read, normed, and the main layers' statistics."""
        positions_T = torch.arange(first_position, first_position + tokens_BT.shape[1], device=tokens_BT.device)
        cos_TP, sin_TP = rotary.tables(positions_T, self.embed.dtype)
        moe: dict[str, MoEStatistics] = {}
        x_BTd = F.embedding(tokens_BT, self.embed)
        for i, layer in enumerate(self.layers):
            cache = caches[i] if caches is not None else None
            x_BTd, statistics = layer(x_BTd, cos_TP, sin_TP, rotary.softmax_scale, real_BT, cache)
            if statistics is not None:
                moe[f"layers.{i}"] = statistics
        return rms_norm(x_BTd, self.norm, self.config.rms_norm_eps), moe

    def logits(self, hidden_BTd: torch.Tensor) -> torch.Tensor:
        """[..., V] of normed states, the main model's or an MTP depth's: they share the head."""
        return F.linear(hidden_BTd, self.embed if self.head is None else self.head)

    def forward(
        self,
        tokens_BT: torch.Tensor,
        mtp_tokens_DBT: torch.Tensor | None = None,
        *,
        rotary: Rotary,
        real_BT: torch.Tensor | None = None,
        caches: list[Cache] | None = None,
        first_position: int = 0,
    ) -> Output:
        """Logits of the main model and, given mtp_tokens (depth k: the token k + 1 ahead, k from 0), of each MTP depth.

        real_BT: False on padding, which then counts in no statistic. caches: one per layer, for decoding from
        `first_position` on. MTP layers take the same `real_BT` as the main ones.
        """
        hidden_BTd, moe = self.states(
            tokens_BT, rotary=rotary, real_BT=real_BT, caches=caches, first_position=first_position
        )
        logits_BTV = self.logits(hidden_BTd)
        mtp_logits: list[torch.Tensor] = []
        if mtp_tokens_DBT is not None:
            positions_T = torch.arange(first_position, first_position + tokens_BT.shape[1], device=tokens_BT.device)
            cos_TP, sin_TP = rotary.tables(positions_T, self.embed.dtype)
            for k, depth in enumerate(self.mtp):
                embedded_BTd = F.embedding(mtp_tokens_DBT[k], self.embed)
                hidden_BTd, statistics = depth(hidden_BTd, embedded_BTd, cos_TP, sin_TP, rotary.softmax_scale, real_BT)
                if statistics is not None:
                    moe[f"mtp.{k}.layer"] = statistics
                mtp_logits.append(self.logits(hidden_BTd))
        return Output(logits_BTV, mtp_logits, moe)


def cross_entropy_sum(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Sum over positions whose label is not IGNORE of -log p(label), natural logarithm, in promoted precision."""
    wide = logits_BTV.to(promoted(logits_BTV.dtype))
    return F.cross_entropy(wide.flatten(0, -2), labels_BT.flatten(), ignore_index=IGNORE, reduction="sum")


def loss(
    output: Output,
    labels_BT: torch.Tensor,
    mtp_labels_DBT: torch.Tensor | None = None,
    *,
    main_count: int,
    mtp_counts: tuple[int, ...] = (),
    sequences: int,
    mtp_weight: float,
    balance_weights: BalanceWeights,
) -> Losses:
    """The training loss of one micro-batch's share of a step (V3 eq. 17, 24, 25), each term over the *step's*
    denominator.

    main_count, mtp_counts: labels that count in the whole step, per depth for MTP; sequences: sequences of the whole
    step. mtp_weight: lambda. A term whose denominator is 0 has no labels and is 0.
    """
    main = cross_entropy_sum(output.logits_BTV, labels_BT) / max(main_count, 1)
    mtp: tuple[torch.Tensor, ...] = ()
    total = main
    if output.mtp_logits:
        if mtp_labels_DBT is None or len(mtp_counts) != len(output.mtp_logits):
            raise ValueError(f"loss: {len(output.mtp_logits)} MTP depths, but labels or counts for {len(mtp_counts)}")
        mtp = tuple(
            cross_entropy_sum(logits, mtp_labels_DBT[k]) / max(mtp_counts[k], 1)
            for k, logits in enumerate(output.mtp_logits)
        )
        total = total + mtp_weight / len(mtp) * torch.stack(mtp).sum()
    balance = torch.zeros_like(main)
    for statistics in output.moe.values():
        for kind, weight in vars(balance_weights.over(sequences)).items():
            balance = balance + weight * statistics.balance[kind].sum()
    return Losses(total + balance, main, mtp, balance)
