"""Lanes of torch.profiler traces (`export_chrome_trace`), as DeepSeek's published `profile-data/train.json` is one.

What is an all-to-all is told by kernels' names (dispatch, combine, notify, deep_ep, all_to_all) and by NCCL's own
description of its collectives, never by a stream's number. A stream whose time goes to such kernels all but entirely
is a communication stream, and whatever else runs on it (a layout kernel, a copy) counts as communication. Other NCCL
kernels are neither compute nor all-to-all. A trace without GPU work is read by its CPU operators in the same way.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from parallel.trace.intervals import intervals
from parallel.trace.lanes import OTHER, Lanes, by_label, innermost, is_all_to_all, step_of
from parallel.trace.reader import Span

KERNELS = frozenset({"kernel", "gpu_memcpy", "gpu_memset", "memcpy", "memset"})
LAUNCHES = frozenset({"cuda_runtime", "cuda_driver", "runtime"})
COMMUNICATION_SHARE = 0.9  # of a stream's time that makes it a communication stream

_ALL_TO_ALL = re.compile(r"(?<![A-Za-z])(dispatch|combine|notify)(?![a-z])|deep_ep::|[Aa]ll_?[Tt]o_?[Aa]ll")
# Split-KV attention has a kernel that combines its parts.
_COMPUTE = re.compile(r"flash|fmha|attn|attention|splitkv", re.IGNORECASE)
_OTHER_COMMUNICATION = re.compile(r"nccl|gloo:|c10d::|record_param_comms|nvshmem", re.IGNORECASE)


@dataclass
class TorchEvents:
    """What is kept of a torch.profiler trace while it is read."""

    kernels: list[Span] = field(default_factory=list)
    gpu_annotations: list[Span] = field(default_factory=list)
    annotations: list[Span] = field(default_factory=list)
    operators: list[Span] = field(default_factory=list)
    launched: dict[Any, float] = field(default_factory=dict)  # correlation -> when the host launched it

    def keep(self, span: Span) -> bool:
        """Take the span if it is of use; whether its category is one of torch.profiler's."""
        category = span.category.lower()
        if category in KERNELS:
            self.kernels.append(span)
        elif category in ("gpu_user_annotation", "user_annotation"):
            if step_of(span.name):
                (self.gpu_annotations if category.startswith("gpu") else self.annotations).append(span)
            if _ALL_TO_ALL.search(span.name) and _OTHER_COMMUNICATION.search(span.name):
                self.operators.append(span)  # gloo marks its collectives as annotations
        elif category == "cpu_op":
            span.args = {}
            self.operators.append(span)
        elif category in LAUNCHES:
            if "correlation" in span.args:
                self.launched[span.args["correlation"]] = span.start
        else:
            return category in ("python_function", "overhead", "ac2g", "fwdbwd", "trace")
        return True


def is_all_to_all_name(name: str) -> bool:
    """Whether a kernel or operator of this name moves rows, or counts, between expert-parallel ranks."""
    function = name.partition("<")[0] or name  # template arguments may name anything
    return bool(_ALL_TO_ALL.search(function)) and not _COMPUTE.search(function)


def torch_lanes(events: TorchEvents, rank: int) -> list[Lanes]:
    """One `Lanes` per GPU of the trace, numbered from `rank`; one for the CPU if it has no GPU work."""
    if not events.kernels:
        return [_of_cpu(events, rank)] if events.operators or events.annotations else []
    devices = defaultdict(list)
    for span in events.kernels:
        devices[_device(span)].append(span)
    order = sorted(devices, key=lambda device: (isinstance(device, str), device))
    return [_of_gpu(devices[device], device, events, rank + i) for i, device in enumerate(order)]


def _of_gpu(kernels: list[Span], device: Any, events: TorchEvents, rank: int) -> Lanes:
    annotations = [span for span in events.gpu_annotations if _device(span) == device]
    owners = _owners(kernels, annotations, events)
    streams: dict[Any, list[int]] = defaultdict(list)
    for index, span in enumerate(kernels):
        streams[_stream(span)].append(index)
    compute, rows, others = [], [], []
    instances: dict[str, set[int]] = defaultdict(set)
    for indices in streams.values():
        kinds = [_kind(kernels[i], owners[i][0]) for i in indices]
        lengths = [kernels[i].end - kernels[i].start for i in indices]
        moving = sum(length for kind, length in zip(kinds, lengths) if kind == "all-to-all")
        only_moves = moving > 0 and moving >= COMMUNICATION_SHARE * sum(lengths)
        for i, kind in zip(indices, kinds):
            span, (step, instance) = kernels[i], owners[i]
            if kind == "all-to-all" or (only_moves and kind == "compute"):
                label = step if step is not None and is_all_to_all(step) else _short(span.name)
                rows.append((label, span.start, span.end))
                instances[label].add(instance if label == step else -2 - i)
            elif kind == "compute":
                compute.append((step or OTHER, span.start, span.end))
            else:
                others.append((span.start, span.end))
    return Lanes(
        rank=rank,
        source="torch.profiler, GPU",
        compute=by_label(compute),
        all_to_all=by_label(rows),
        occurrences={label: len(found) for label, found in instances.items()},
        steps=_launch_order(events.annotations or annotations),
        others=intervals(others),
    )


def _of_cpu(events: TorchEvents, rank: int) -> Lanes:
    owners = _by_time([(s.start + s.end) / 2 for s in events.operators], events.annotations)
    compute, rows, others = [], [], []
    for span, owner in zip(events.operators, owners):
        step = step_of(events.annotations[owner].name) if owner >= 0 else None
        if is_all_to_all_name(span.name):
            rows.append((step if step is not None and is_all_to_all(step) else span.name, span.start, span.end))
        elif _OTHER_COMMUNICATION.search(span.name):
            others.append((span.start, span.end))
        else:
            compute.append((step or OTHER, span.start, span.end))
    labelled = by_label(rows)
    return Lanes(
        rank=rank,
        source="torch.profiler, CPU",
        compute=by_label(compute),
        all_to_all=labelled,
        occurrences={label: len(times) for label, times in labelled.items()},
        steps=_launch_order(events.annotations),
        others=intervals(others),
    )


def _owners(kernels: list[Span], annotations: list[Span], events: TorchEvents) -> list[tuple[str | None, int]]:
    """(step, which run of it) of each kernel: by the annotation around it on its stream, else by when the host
    launched it."""
    found: list[tuple[str | None, int]] = [(None, -1)] * len(kernels)
    of_stream: dict[Any, list[int]] = defaultdict(list)
    for index, span in enumerate(kernels):
        of_stream[_stream(span)].append(index)
    on_stream: dict[Any, list[int]] = defaultdict(list)
    for index, span in enumerate(annotations):
        on_stream[_stream(span)].append(index)
    for stream, indices in of_stream.items():
        middles = [(kernels[i].start + kernels[i].end) / 2 for i in indices]
        around = _by_time(middles, [annotations[j] for j in on_stream[stream]])
        for i, inner in zip(indices, around):
            if inner >= 0:
                annotation = on_stream[stream][inner]
                found[i] = step_of(annotations[annotation].name), annotation
    lost = [i for i, (step, _) in enumerate(found) if step is None and kernels[i].args.get("correlation") is not None]
    lost = [i for i in lost if kernels[i].args["correlation"] in events.launched]
    launches = [events.launched[kernels[i].args["correlation"]] for i in lost]
    for i, host in zip(lost, _by_time(launches, events.annotations)):
        if host >= 0:
            found[i] = step_of(events.annotations[host].name), len(annotations) + host
    return found


def _by_time(points: list[float], annotations: list[Span]) -> list[int]:
    return innermost(points, [(span.start, span.end) for span in annotations])


def _kind(span: Span, step: str | None) -> str:
    described = str(span.args.get("Collective name", ""))
    if described:
        return "all-to-all" if _ALL_TO_ALL.search(described) else "other"
    if is_all_to_all_name(span.name):
        return "all-to-all"
    if _OTHER_COMMUNICATION.search(span.name):
        # Without a description, grouped sends and receives are an all-to-all if a dispatch or combine issued them.
        return "all-to-all" if "sendrecv" in span.name.lower() and is_all_to_all(step) else "other"
    return "compute"


def _launch_order(annotations: list[Span]) -> list[list[str]]:
    """Steps by start; an annotation inside one of the same name is that step still."""
    order: list[str] = []
    last: dict[str, float] = {}
    for span in sorted(annotations, key=lambda span: (span.start, -span.end)):
        step = step_of(span.name)
        if step is not None and span.end > last.get(step, float("-inf")):
            order.append(step)
            last[step] = span.end
    return [order] if order else []


def _stream(span: Span) -> str:
    stream = span.args.get("stream")
    text = str(span.tid if stream is None else stream)
    return text.removeprefix("stream").strip()


def _device(span: Span) -> Any:
    device = span.args.get("device")
    found = span.pid if device is None else device
    return found if isinstance(found, int) else str(found)


def _short(name: str) -> str:
    """A kernel's function without template arguments, return type and namespaces."""
    function = name.partition("<")[0].partition("(")[0].split()
    return function[-1].rpartition("::")[2] if function else name
