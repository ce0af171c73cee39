"""Expert dispatch by all-to-all: scatter and gather, each the transpose of the other; one rank needs no communication.

Every movement is one all-to-all of bytes: FP8 codes, scales, expert ids and router weights of a row travel together.

Shape letters: T tokens, K experts per token, D width, S rows sent, V rows received, X expanded rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from kernels.quantize import Quantized
from parallel.expert.contract import Pending, Work
from parallel.expert.layout import ReceiveLayout, receive_layout, send_layout

Rows = torch.Tensor | Quantized


@dataclass
class Route:
    """Where the tokens of one layer and chunk go; made by `plan`, used by dispatch, combine and both backwards."""

    tokens: int
    expert_index_TK: torch.Tensor
    rows_S: torch.Tensor
    counts: Pending[tuple[list[int], list[int]]] | None
    give: list[int]
    take: list[int]
    received: ReceiveLayout | None = None

    def resolve(self) -> None:
        """The one place where the host blocks on other ranks."""
        if self.counts is not None:
            self.give, self.take = self.counts.wait()
            self.counts = None

    @property
    def layout(self) -> ReceiveLayout:
        if self.received is None:
            raise RuntimeError("a route was used before its first scatter was waited for")
        return self.received


@dataclass(frozen=True)
class Received:
    """Expanded rows by local expert. rows: [X, D] tensor or FP8 rows; weights_X: their router weights, when sent
    along."""

    rows: Rows
    weights_X: torch.Tensor | None
    counts: list[int]


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8).flatten(1)


class _Packer:
    """Columns of several tensors as one byte matrix, and back."""

    def __init__(self, columns: Sequence[torch.Tensor]) -> None:
        self.forms = [(c.dtype, c.shape[1:]) for c in columns]
        self.packed = torch.cat([_bytes(c) for c in columns], 1) if len(columns) > 1 else _bytes(columns[0])

    def unpack(self, packed: torch.Tensor) -> list[torch.Tensor]:
        out, at = [], 0
        for dtype, shape in self.forms:
            width = shape.numel() * dtype.itemsize
            column = packed[:, at : at + width]
            # One row, or none, is contiguous where it lies, but may lie off its dtype's alignment: always copied.
            column = column.clone(memory_format=torch.contiguous_format) if at else column.contiguous()
            out.append(column.view(dtype).reshape(len(packed), *shape))
            at += width
        return out


class AllToAllDispatcher:
    """Flat all-to-all over one expert-parallel group (`group` None: this rank alone holds every expert)."""

    def __init__(self, experts: int, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.ranks = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        if experts % self.ranks:
            raise ValueError(f"{experts} experts do not divide over {self.ranks} expert-parallel ranks")
        self.experts = experts
        self.local_experts = experts // self.ranks

    def _exchange(self, sent: torch.Tensor, give: list[int], take: list[int]) -> tuple[torch.Tensor, list[Work]]:
        if self.group is None:
            return sent, []
        out = sent.new_empty(sum(take), *sent.shape[1:])
        work = dist.all_to_all_single(out, sent.contiguous(), take, give, group=self.group, async_op=True)
        return out, [work]

    def plan(self, expert_index_TK: torch.Tensor) -> Route:
        """Start the exchange of counts for [T, K] expert ids; resolved by the first scatter."""
        layout = send_layout(expert_index_TK, self.local_experts, self.ranks)
        ones = [1] * self.ranks
        counts_R = layout.counts_R
        received, works = self._exchange(counts_R, ones, ones)
        pending = Pending(works, lambda: (counts_R.tolist(), received.tolist()))
        return Route(len(expert_index_TK), expert_index_TK, layout.rows_S, pending, [], [])

    def scatter(
        self, route: Route, rows: Rows, weights_TK: torch.Tensor | None = None, after: object = None
    ) -> Pending[Received]:
        """[T, D] rows -> expanded rows by local expert. The first scatter of a route carries ids and router weights."""
        if after is not None:
            raise ValueError("events order streams; this dispatcher moves host tensors and has none")
        route.resolve()
        quantized = isinstance(rows, Quantized)
        columns = [rows.data.view(torch.uint8), rows.scale] if isinstance(rows, Quantized) else [rows]
        if weights_TK is not None:
            columns += [route.expert_index_TK, weights_TK]
        packer = _Packer([column[route.rows_S] for column in columns])
        packed_V, works = self._exchange(packer.packed, route.give, route.take)

        def finish() -> Received:
            parts = packer.unpack(packed_V)
            weights_X = None
            if weights_TK is not None:
                index_VK, weights_VK = parts[-2:]
                route.received = receive_layout(index_VK, self.rank * self.local_experts, self.local_experts)
                weights_X = weights_VK[route.received.rows_X, route.received.slots_X]
            layout = route.layout
            if quantized:
                data = parts[0].view(torch.float8_e4m3fn)
                return Received(Quantized(data, parts[1]).index_rows(layout.rows_X), weights_X, layout.counts)
            return Received(parts[0][layout.rows_X], weights_X, layout.counts)

        return Pending(works, finish)

    def gather(
        self, route: Route, rows: torch.Tensor, weight_grads: torch.Tensor | None = None, after: object = None
    ) -> Pending[tuple[torch.Tensor, torch.Tensor | None]]:
        """Expanded [X, D] rows -> ([T, D] sums, [T, K] gradients of the router weights when `weight_grads` [X] is
        given)."""
        if after is not None:
            raise ValueError("events order streams; this dispatcher moves host tensors and has none")
        layout = route.layout
        promoted = torch.promote_types(rows.dtype, torch.float32)
        received = sum(route.take)
        sums_VD = torch.zeros(received, rows.shape[-1], dtype=promoted).index_add_(0, layout.rows_X, rows.to(promoted))
        columns = [sums_VD.to(rows.dtype)]
        if weight_grads is not None:
            dense_VK = weight_grads.new_zeros(received, route.expert_index_TK.shape[1])
            columns.append(dense_VK.index_put_((layout.rows_X, layout.slots_X), weight_grads))
        packer = _Packer(columns)
        packed_S, works = self._exchange(packer.packed, route.take, route.give)

        def place(x: torch.Tensor) -> torch.Tensor:
            high = torch.promote_types(x.dtype, torch.float32)
            total = torch.zeros(route.tokens, x.shape[-1], dtype=high).index_add_(0, route.rows_S, x.to(high))
            return total.to(x.dtype)

        def finish() -> tuple[torch.Tensor, torch.Tensor | None]:
            parts = packer.unpack(packed_S)
            return place(parts[0]), place(parts[1]) if weight_grads is not None else None

        return Pending(works, finish)
