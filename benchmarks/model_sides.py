"""The sides of `benchmarks/model_step.py`: one process each, stepped by the parent, so that memory is a side's own.

All train on the same batches from the same weights with `torch.optim.AdamW(fused=True)`.

Shape letters: B sequences, T positions.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.profiler import ProfilerActivity, profile

from model.config import ModelConfig
from model.huggingface_folder import ReleasedFolder
from model.names import load_canonical
from train.local import IGNORE, LocalStep

LEARNING_RATE, WEIGHT_DECAY = 1e-4, 0.1
BATCHES = 4  # in turn, so that the losses fall
# Matrix products of both sides by torch's names, attention's included.
PRODUCTS = {
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::baddbmm",
    "aten::_grouped_mm",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
}


@dataclass(frozen=True)
class Work:
    """What a side trains: the exported folder, and the shape of a step. threads: of torch."""

    folder: Path
    config: ModelConfig
    sequences: int
    length: int
    threads: int

    def batch(self, step: int) -> torch.Tensor:
        """Uniform tokens [B, T]."""
        generator = torch.Generator().manual_seed(step % BATCHES)
        return torch.randint(self.config.vocab_size, (self.sequences, self.length), generator=generator)


@dataclass(frozen=True)
class Stepped:
    """One step: seconds on the clock, processor seconds of all threads, mean cross-entropy before the update."""

    wall: float
    processor: float
    loss: float


class Build(Protocol):
    """Makes a side: the model with the folder's weights -> (parameters, a step's forward and backward)."""

    def __call__(self, work: Work) -> tuple[list[torch.nn.Parameter], Callable[[torch.Tensor], float]]: ...


@dataclass(frozen=True)
class Ours:
    """The chunk programs that training runs, one micro-batch, one rank."""

    recompute: bool

    def __call__(self, work: Work) -> tuple[list[torch.nn.Parameter], Callable[[torch.Tensor], float]]:
        local = LocalStep(work.config, torch.float32, self.recompute)
        load_canonical(local.model, ReleasedFolder(work.folder).read)

        def step(tokens_BT: torch.Tensor) -> float:
            labels_BT = torch.full_like(tokens_BT, IGNORE)
            labels_BT[:, :-1] = tokens_BT[:, 1:]
            return local.gradients(tokens_BT, labels_BT)

        return list(local.model.parameters()), step


@dataclass(frozen=True)
class Transformers:
    """transformers' DeepseekV3ForCausalLM with one of its implementations of experts and of attention."""

    experts: str
    attention: str

    def __call__(self, work: Work) -> tuple[list[torch.nn.Parameter], Callable[[torch.Tensor], float]]:
        from transformers import DeepseekV3ForCausalLM

        model = DeepseekV3ForCausalLM.from_pretrained(
            work.folder,
            dtype=torch.float32,
            attn_implementation=self.attention,
            experts_implementation=self.experts,
        ).train()

        def step(tokens_BT: torch.Tensor) -> float:
            loss = model(input_ids=tokens_BT, labels=tokens_BT, use_cache=False).loss
            loss.backward()
            return loss.item()

        return list(model.parameters()), step


class SideFailed(RuntimeError):
    """A side's process raised or ended; one line."""


class Side:
    """A side in a process of its own. Ends with `close`, or with its parent."""

    def __init__(self, build: Build, work: Work) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(build, work, other), daemon=True)
        self._process.start()
        other.close()
        self._answer()

    def _answer(self) -> Any:
        try:
            kind, value = self._pipe.recv()
        except EOFError:
            raise SideFailed("a side's process ended without a word (out of memory?)") from None
        if kind == "failed":
            raise SideFailed(value)
        return value

    def step(self, number: int) -> Stepped:
        """Step `number`: gradients of its batch, update, gradients dropped."""
        self._pipe.send(("step", number))
        return self._answer()

    def peak_bytes(self) -> int:
        """Resident memory at its highest since the model was loaded, above what there was before it was built."""
        self._pipe.send(("peak", None))
        return self._answer()

    def product_share(self, number: int) -> float:
        """Share of step `number` spent in matrix products (their own time by torch.profiler)."""
        self._pipe.send(("profile", number))
        return self._answer()

    def close(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()


def _serve(build: Build, work: Work, pipe: Connection) -> None:
    try:
        torch.set_num_threads(work.threads)
        import transformers  # both sides, so that neither counts it as its own memory

        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        ctypes.CDLL(None).malloc_trim(0)
        before = _resident("VmRSS")
        parameters, gradients = build(work)
        # Loading may need more than training; it is no part of the comparison.
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)

        def step(number: int) -> Stepped:
            tokens_BT = work.batch(number)
            started, spent = time.perf_counter(), time.process_time()
            loss = gradients(tokens_BT)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return Stepped(time.perf_counter() - started, time.process_time() - spent, loss)

        pipe.send(("done", None))
        while True:
            asked, number = pipe.recv()
            if asked == "step":
                pipe.send(("done", step(number)))
            elif asked == "peak":
                pipe.send(("done", _resident("VmHWM") - before))
            else:
                with profile(activities=[ProfilerActivity.CPU]) as profiled:
                    step(number)
                own = {event.key: event.self_cpu_time_total for event in profiled.key_averages()}
                pipe.send(("done", sum(own.get(name, 0.0) for name in PRODUCTS) / sum(own.values())))
    except EOFError:
        pass
    except Exception as error:
        pipe.send(("failed", " ".join(f"{type(error).__name__}: {error}".split())))


def _resident(field: str) -> int:
    """Bytes of this process by /proc/self/status."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
