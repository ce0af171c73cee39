"""A layer in segments against `TransformerLayer.forward` and autograd, in float64, on one process."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from kernels import norm
from model.attention_core import Geometry
from model.balance import BalanceWeights
from model.initialize import initialize
from model.layer import TransformerLayer
from model.operands import Box
from model.ops import Ops
from model.recompute import Cell
from model.rope import Rotary
from model.segments import ChunkContext, LayerState, SegmentedLayer
from parallel.expert.all_to_all import AllToAllDispatcher
from parallel.expert.contract import Pending
from parallel.pipeline.contract import Program
from parallel.pipeline.store import Bag, WeightGradStore
from tests.model.models import model_config

SEQUENCES, LENGTH = 2, 6
BALANCE = BalanceWeights(sequence=0.7, expert=0.3, device=0.5, communication=0.2)
GQA = {"attention": "gqa", "num_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "rope_interleaved": False}
SOFTMAX = {"score_function": "softmax", "group_rule": "max", "renormalise": False, "router_bias": False}
CASES: dict[str, dict[str, Any]] = {
    "dense": {"moe": False},
    "dense, queries not compressed": {"moe": False, "q_lora_rank": 0},
    "moe": {"moe": True},
    "moe, padding": {"moe": True, "padding": True},
    "moe, queries not compressed": {"moe": True, "q_lora_rank": 0},
    "moe, two shared experts": {"moe": True, "num_shared_experts": 2},
    "moe, softmax over devices (V2)": {"moe": True, **SOFTMAX},
    "moe, grouped queries, softmax (DeepSeekMoE)": {
        "moe": True,
        **GQA,
        **SOFTMAX,
        "num_expert_groups": 1,
        "groups_per_token": 1,
    },
    "dense, grouped queries (LLM)": {"moe": False, **GQA},
    "dense, multi-head, adjacent pairs": {"moe": False, **GQA, "num_key_value_heads": 6, "rope_interleaved": True},
    "moe, no balance loss": {"moe": True, "balance": BalanceWeights()},
    "dense, latent, rotary halves": {"moe": False, "rope_interleaved": False},
    "moe, all tokens to one expert": {"moe": True, "experts_per_token": 1, "favourite": 5},
}


class Sink:
    """Sums gradients by parameter."""

    def __init__(self) -> None:
        self.grads: dict[nn.Parameter, torch.Tensor] = {}

    def accumulate(self, parameter: nn.Parameter, grad: torch.Tensor) -> None:
        assert grad.dtype == torch.float64
        self.grads[parameter] = self.grads.get(parameter, 0) + grad


@dataclass
class Setting:
    layer: TransformerLayer
    segmented: SegmentedLayer
    context: ChunkContext
    x_BTd: torch.Tensor
    dy_BTd: torch.Tensor
    sink: Sink


def setting(
    moe: bool, padding: bool = False, favourite: int | None = None, balance: BalanceWeights = BALANCE, **changes: Any
) -> Setting:
    config = model_config("tiny", **changes)
    layer = TransformerLayer(config, moe, dtype=torch.float64)
    initialize(layer, config, seed=5, prefix="layers.1." if moe else "layers.0.")
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    with torch.no_grad():
        for name, value in layer.named_parameters():
            if name.endswith("norm"):
                value.add_(0.2 * draw(*value.shape))
        if moe:
            if config.router_bias:
                layer.router.bias.copy_(0.3 * draw(config.num_routed_experts))
            if favourite is not None:
                layer.router.bias[favourite] = 100.0
    sink = Sink()
    ops = Ops(WeightGradStore(sink), torch.float64, False, config.rms_norm_eps)
    dispatcher = AllToAllDispatcher(config.num_routed_experts, None)
    rotary = Rotary(config, LENGTH)
    cos, sin = rotary.tables(torch.arange(LENGTH), torch.float64)
    real = torch.ones(SEQUENCES, LENGTH, dtype=torch.bool)
    if padding:
        real[0, 4:] = False
        real[1, 1] = False
    geometry = Geometry(SEQUENCES, LENGTH, cos, sin, rotary.softmax_scale)
    context = ChunkContext(geometry, real.flatten(), balance)
    segmented = SegmentedLayer(layer, "layers.1", ops, dispatcher)
    shape = SEQUENCES, LENGTH, config.hidden_size
    return Setting(layer, segmented, context, draw(*shape), draw(*shape), sink)


def drain(program: Program, steps: list[str] | None = None) -> Any:
    """The program's return value; `steps` receives what it yields."""
    while True:
        try:
            step = next(program)
        except StopIteration as stop:
            return stop.value
        if steps is not None:
            steps.append(step)


def forward(s: Setting, state: LayerState, steps: list[str] | None = None) -> torch.Tensor:
    x = s.x_BTd.flatten(0, 1).clone()
    return drain(s.segmented.forward(Pending((), lambda: x), s.context, state), steps).wait()


def backward(s: Setting, state: LayerState, split: bool = False) -> torch.Tensor:
    """dx; with `split` the weight gradients are queued first, and run when dx has been returned."""
    bags: list[Bag] = []
    store = s.segmented.ops.store
    entering = s.segmented.enter(s.dy_BTd.flatten(0, 1).clone())
    program = s.segmented.backward(entering, state, bags.append if split else store.run, lambda dx: dx)
    dx = drain(program)
    if split:
        assert s.sink.grads == {}
        store.defer("chunk", bags)
        store.run_oldest("chunk")
    return dx


def close(got: torch.Tensor, want: torch.Tensor, what: str) -> None:
    """Largest difference by largest value, 1e-12; a zero must be exactly zero."""
    size = want.abs().max().item()
    assert got.shape == want.shape and got.dtype == want.dtype, what
    assert (got - want).abs().max().item() <= 1e-12 * size, what


@pytest.mark.parametrize("case", CASES)
def test_equals_the_plain_layer_and_autograd(case: str) -> None:
    s, state = setting(**CASES[case]), LayerState()
    out, dx = forward(s, state), backward(s, state)

    x = s.x_BTd.clone().requires_grad_()
    g = s.context.geometry
    real_BT = s.context.real_N.view(SEQUENCES, LENGTH)
    plain, statistics = s.layer(x, g.cos_TP, g.sin_TP, g.softmax_scale, real_BT)
    loss = (plain * s.dy_BTd).sum()
    if statistics is not None:
        weights = vars(s.context.balance)
        balance = sum(weights[kind] * loss_B.sum() for kind, loss_B in statistics.balance.items())
        loss = loss + balance
    loss.backward()

    close(out, plain.detach().flatten(0, 1), "output")
    close(dx, x.grad.flatten(0, 1), "input gradient")
    named = dict(s.layer.named_parameters())
    assert set(s.sink.grads) == set(named.values())
    zero = []
    for name, parameter in named.items():
        close(s.sink.grads[parameter], parameter.grad, name)
        zero += [name] * (parameter.grad.abs().max().item() == 0)
    # One expert per token has weight 1 whatever its score, and the scores still enter the balance loss.
    assert zero == []
    if statistics is not None:
        assert s.segmented.balance == pytest.approx(balance.item(), rel=1e-12)
        assert torch.equal(s.segmented.load_E, statistics.load_E)


@pytest.mark.parametrize("case", CASES)
def test_results_kept_instead_of_recomputed_change_nothing(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recomputed, kept = setting(**CASES[case]), setting(**CASES[case])
    kept.segmented.ops.recompute = False
    found = [(forward(s, state), backward(s, state)) for s, state in ((recomputed, LayerState()), (kept, LayerState()))]
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    pairs = zip(recomputed.layer.parameters(), kept.layer.parameters(), strict=True)
    assert all(torch.equal(recomputed.sink.grads[one], kept.sink.grads[other]) for one, other in pairs)
    calls: list[torch.Tensor] = []
    plain = norm.rmsnorm
    monkeypatch.setattr(norm, "rmsnorm", lambda x, *rest: calls.append(x) or plain(x, *rest))
    state = LayerState()
    forward(kept, state)
    before = len(calls)
    backward(kept, state)
    assert before and len(calls) == before


def test_all_tokens_to_one_expert() -> None:
    s, state = setting(**CASES["moe, all tokens to one expert"]), LayerState()
    forward(s, state)
    backward(s, state)
    assert s.segmented.load_E.tolist() == [0, 0, 0, 0, 0, SEQUENCES * LENGTH, 0, 0]
    sizes = s.sink.grads[s.layer.experts.gate_up].abs().flatten(1).amax(1)
    assert (sizes > 0).tolist() == [False] * 5 + [True] + [False] * 2


def test_padding_enters_no_statistic() -> None:
    s, state = setting(**CASES["moe, padding"]), LayerState()
    forward(s, state)
    assert s.segmented.load_E.sum() == 2 * s.context.real_N.sum() == 2 * 9
    s.segmented.new_step()
    assert s.segmented.load_E.sum() == 0 and s.segmented.balance == 0


@pytest.mark.parametrize("case", CASES)
def test_split_backward_equals_whole(case: str) -> None:
    whole, split = setting(**CASES[case]), setting(**CASES[case])
    states = LayerState(), LayerState()
    forward(whole, states[0])
    forward(split, states[1])
    assert torch.equal(backward(whole, states[0]), backward(split, states[1], split=True))
    for name, parameter in whole.layer.named_parameters():
        assert torch.equal(whole.sink.grads[parameter], split.sink.grads[dict(split.layer.named_parameters())[name]])


@pytest.mark.parametrize("case", ["dense", "moe"])
def test_two_chunks_in_flight_add_up(case: str) -> None:
    """Chunk states are apart; running both backwards in either order gives twice the gradients."""
    once, twice = setting(**CASES[case]), setting(**CASES[case])
    state = LayerState()
    forward(once, state)
    backward(once, state)
    first, second = LayerState(), LayerState()
    forward(twice, first)
    forward(twice, second)
    backward(twice, second)
    backward(twice, first)
    for name, parameter in once.layer.named_parameters():
        close(twice.sink.grads[dict(twice.layer.named_parameters())[name]], 2 * once.sink.grads[parameter], name)


def test_steps_in_order_and_the_input_gradient_before_the_last_weight_gradients() -> None:
    expected = {
        "dense": ("attn(F) mlp(F)", "mlp(B) mlp(W) attn(B) attn(W)"),
        "moe": ("attn(F) dispatch(F) mlp(F) combine(F)", "combine(B) mlp(B) dispatch(B) mlp(W) attn(B) attn(W)"),
    }
    for case, names in expected.items():
        s, state, steps = setting(**CASES[case]), LayerState(), list[str]()
        forward(s, state, steps)
        assert " ".join(steps) == names[0]
        steps, emitted = [], list[torch.Tensor]()

        def emit(dx: torch.Tensor, s: Setting = s, emitted: list[torch.Tensor] = emitted) -> torch.Tensor:
            assert s.layer.attn_norm not in s.sink.grads
            assert s.layer.mlp_norm not in s.sink.grads  # its gradient belongs to the attention segment
            emitted.append(dx)
            return dx

        entering = s.segmented.enter(s.dy_BTd.flatten(0, 1))
        program = s.segmented.backward(entering, state, s.segmented.ops.store.run, emit)
        dx = drain(program, steps)
        assert " ".join(steps) == names[1]
        assert len(emitted) == 1 and emitted[0] is dx
        assert s.layer.attn_norm in s.sink.grads


# Recompute ------------------------------------------------------------------------------------------------------------


def test_a_cell_is_filled_once_and_dies_with_its_last_holder() -> None:
    filled = []

    def compute() -> torch.Tensor:
        filled.append(torch.is_grad_enabled())
        return torch.ones(3)

    cell = Cell(compute)
    holders = [lambda cell=cell: cell().sum(), lambda cell=cell: cell().sum()]
    del cell
    assert filled == []
    value = StorageWeakRef(holders[0].__defaults__[0]().untyped_storage())
    for _ in range(2):
        assert not value.expired()
        holders.pop()()
    assert filled == [False]
    assert value.expired()


def test_a_filled_cell_drops_what_it_was_made_from() -> None:
    source = torch.ones(3)
    reference = StorageWeakRef(source.untyped_storage())
    cell = Cell(lambda source=source: source * 2)
    del source
    assert not reference.expired()
    cell()
    assert reference.expired()


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Reference counts alone must free: a cycle would wait for the collector with a chunk's activations."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("split", [False, True], ids=["B", "I_then_W"])
@pytest.mark.parametrize("case", ["dense", "moe"])
def test_norms_are_computed_again_once_per_backward_and_freed(
    case: str, split: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The normed inputs of attention and MLP, each shared by several products (q_a and kv_a; router and MLP)."""
    s, state = setting(**CASES[case]), LayerState()
    forward(s, state)
    calls: Counter[str] = Counter()
    results: list[StorageWeakRef] = []
    gains = {s.layer.attn_norm.data_ptr(): "attn_norm", s.layer.mlp_norm.data_ptr(): "mlp_norm"}
    original = norm.rmsnorm

    def counted(x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
        y = original(x, gain, eps)
        if gain.data_ptr() in gains:
            calls[gains[gain.data_ptr()]] += 1
            results.append(StorageWeakRef(y.untyped_storage()))
        return y

    monkeypatch.setattr(norm, "rmsnorm", counted)
    backward(s, state, split)
    assert calls == {"attn_norm": 1, "mlp_norm": 1}
    assert len(results) == 2 and all(reference.expired() for reference in results)


def test_the_mlp_norm_lives_until_the_routers_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cell is shared across segments: by the MLP's products and, in the attention segment, the router's."""
    s, state = setting(**CASES["moe"]), LayerState()
    original, cells, alive, bags = Ops.rmsnorm_linear, list[Any](), list[bool](), list[Bag]()

    def kept(self: Ops, x: torch.Tensor, gain: torch.nn.Parameter, others: bool) -> Any:
        found = original(self, x, gain, others)
        cells.append(found[1])
        return found

    monkeypatch.setattr(Ops, "rmsnorm_linear", kept)
    forward(s, state)
    cell = cells.pop()
    cells.clear()
    drain(s.segmented.backward(s.segmented.enter(s.dy_BTd.flatten(0, 1)), state, bags.append, lambda dx: None))
    value = StorageWeakRef(cell().untyped_storage())
    del cell
    for bag in bags:  # shared expert, routed experts, attention
        alive.append(not value.expired())
        s.segmented.ops.store.run(bag)
    assert alive == [True, True, True]
    assert value.expired()


def test_a_promised_gradient_that_does_not_come_is_an_error() -> None:
    """Its stand-in is zeros: taken for the gradient, it would train nothing and say nothing."""
    box = Box()
    assert box.take() is None
    box.promise()
    with pytest.raises(RuntimeError, match="promised"):
        box.take()
