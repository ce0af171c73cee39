"""The event-by-event reader against json.loads, cut at every place; broken files in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.trace import reader
from parallel.trace.load import load
from parallel.trace.reader import TraceError, TraceFile

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
EVENTS = st.lists(st.dictionaries(st.text(max_size=3), VALUES, max_size=4), max_size=4)


@given(
    before=st.dictionaries(st.sampled_from("abc"), VALUES),
    events=EVENTS,
    after=st.dictionaries(st.sampled_from("xyz"), VALUES),
    bare=st.booleans(),
    indent=st.sampled_from([None, 0, 2]),
    chunk=st.integers(1, 9),
)
def test_pieces_of_any_size(
    tmp_path_factory: pytest.TempPathFactory,
    before: dict[str, Any],
    events: list[dict[str, Any]],
    after: dict[str, Any],
    bare: bool,
    indent: int | None,
    chunk: int,
) -> None:
    whole: Any = events if bare else {**before, "traceEvents": events, **after}
    path = tmp_path_factory.mktemp("reader") / "trace.json"
    path.write_text(json.dumps(whole, indent=indent, ensure_ascii=False), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "CHUNK", chunk)
        trace = TraceFile(path)
        assert list(trace.events()) == events
    assert trace.about == ({} if bare else {**before, **after})


SPAN = '{"ph": "X", "cat": "kernel", "name": "k", "pid": 0, "tid": 7, "ts": 1, "dur": 2}'


@pytest.mark.parametrize("end", ["]", "", ",", "\n", ",\n]"[:2]])
def test_a_bare_list_may_end_early(tmp_path: Path, end: str) -> None:
    path = tmp_path / "trace.json"
    path.write_text(f"\ufeff[{SPAN},\n{SPAN}{end}", encoding="utf-8")
    assert [(span.start, span.end, span.tid) for span in TraceFile(path).spans()] == [(1.0, 3.0, 7)] * 2


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"hello", "neither a JSON object nor a list"),
        (b"17", "neither a JSON object nor a list"),
        (b'{"a": 1}', "no traceEvents"),
        (b'{"traceEvents": 3}', "not a list"),
        (b'{"traceEvents": [3]}', "an event is 3"),
        (f'{{"traceEvents": [{SPAN}, {SPAN}'.encode(), "the end of file"),
        (f'{{"traceEvents": [{SPAN}]'.encode(), "the end of file"),
        (f'{{"traceEvents": [{SPAN}, {{"ph": "X'.encode(), "broken JSON"),
        (f"[{SPAN} {SPAN}]".encode(), "broken JSON"),
        (b'{"traceEvents": []}', "neither a trace of ours nor of torch.profiler"),
        (b'[{"ph": "X", "cat": "cooking", "ts": 1, "dur": 1}]', "'cooking'"),
        (b"[" * 100_000, "nested too deeply"),
        (b"\x1f\x8b\x08\x00rubbish", "gzip"),
        (b'["\xff\xfe"]', "not text"),
    ],
)
def test_broken_files(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "trace.json"
    path.write_bytes(content)
    with pytest.raises(TraceError, match=says) as error:
        load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="cannot read: No such file"):
        load(tmp_path / "none.json")


def test_an_end_closes_the_innermost_begin(tmp_path: Path) -> None:
    def event(phase: str, ts: float, tid: int, **more: Any) -> dict[str, Any]:
        return {"ph": phase, "pid": "p", "tid": tid, "ts": ts, **more}

    path = tmp_path / "trace.json"
    begins = [event("B", 1, 0, name="outer", args={"a": 1}), event("B", 2, 0, name="inner"), event("B", 2, 1, name="x")]
    path.write_text(json.dumps([*begins, event("E", 3, 0), event("E", 5, 0, args={"b": 2}), event("E", 4, 1)]))
    spans = {span.name: (span.start, span.end, span.args) for span in TraceFile(path).spans()}
    assert spans == {"inner": (2, 3, {}), "outer": (1, 5, {"a": 1, "b": 2}), "x": (2, 4, {})}
