"""Layout strings: read, written back, checked; every mistake is one line that says where."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.layout import Layout, StageLayout, check, describe, edges, make_layout, parse


def stages(*sizes: int, mtp: int = 0) -> Layout:
    return make_layout(sizes, mtp)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("EtL", stages(1)),
        ("Et*3|(tt|)*28tt|mL", stages(3, *[2] * 29, 0, mtp=1)),
        ("E t*3 | ( t t | ) * 2 , mm L", stages(3, 2, 2, 0, mtp=2)),
        ("E|tt|tt|L", stages(0, 2, 2, 0)),
        ("Et|*3tL", stages(1, 0, 0, 1)),
        ("E((t|)*2|)*2L", stages(0 + 1, 1, 0, 1, 1, 0, 0)),
        ("(Ett|)t*02m*1L", stages(2, 2, mtp=1)),
        ("E\n|tL", stages(0, 1)),
    ],
)
def test_read(text: str, expected: Layout) -> None:
    assert parse(text) == expected


def test_stages_written_out() -> None:
    assert parse("Et|tt|mL") == (
        StageLayout(embedding=True, layers=1),
        StageLayout(layers=2),
        StageLayout(mtp=1, output=True),
    )
    assert edges(parse("Et||tt|mL")) == [(0, 1), (1, 1), (1, 3), (3, 3)]
    assert parse("EmL") == (StageLayout(True, 0, 1, True),)


@pytest.mark.parametrize(
    ("text", "position", "found"),
    [
        ("", 1, "nothing"),
        (" ,", 3, "nothing"),
        ("tE", 1, "'t' is the first item"),
        ("|EtL", 1, "'|' is the first item"),
        ("Et|EtL", 4, "'E' is not the first item"),
        ("(E)*2L", 2, "'E' is not the first item"),
        ("Et", 3, "the last stage ends without L"),
        ("EtL|", 4, "'|' after L"),
        ("EtLt", 4, "'t' after L"),
        ("E(tL)*2", 3, "'t' after L"),
        ("Et|m|L", 5, "a stage ends after m without L"),
        ("Ettm", 5, "a stage ends after m without L"),
        ("EtmtL", 4, "'t' after m"),
        ("Et*0L", 3, "'*0'"),
        ("Et*L", 3, "'*'"),
        ("Et*-1L", 3, "'*'"),
        ("Et*1234567890123L", 3, "'*1234567890123'"),
        ("Et*200000L", 2, "more than 100000 items"),
        ("E((t*1000)*1000)*1000L", 3, "more than 100000 items"),
        ("*3", 1, "'*' repeats nothing"),
        ("Et*2*2L", 5, "'*' repeats nothing"),
        ("E(t|L", 2, "'(' is never closed"),
        ("Et)L", 3, "')' without '('"),
        ("EdL", 2, "'d'"),
        ("E" + "(" * 3000, 52, "more than 50 brackets open"),
    ],
)
def test_mistakes_say_where(text: str, position: int, found: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse(text)
    message = str(caught.value)
    assert f", position {position}: found {found}; allowed: " in message and "\n" not in message


@pytest.mark.parametrize(
    ("text", "numbers", "found"),
    [
        ("Et|tL", (3, 2, 0), "found 2 stages, allowed 3"),
        ("Et|tL", (2, 3, 0), "found 2 transformer layers (t), allowed 3"),
        ("Et|tmmL", (2, 2, 1), "found 2 MTP depths (m), allowed 1"),
    ],
)
def test_numbers_are_checked(text: str, numbers: tuple[int, int, int], found: str) -> None:
    with pytest.raises(ValueError) as caught:
        check(parse(text), *numbers)
    assert str(caught.value) == f"layout '{text}': {found}"
    layout = parse(text)
    check(layout, len(layout), sum(stage.layers for stage in layout), layout[-1].mtp)


SIZES = st.lists(st.sampled_from([0, 0, 1, 2, 2, 3, 3, 17]), min_size=1, max_size=20)


@given(SIZES, st.integers(0, 5))
def test_written_and_read_back(sizes: list[int], mtp: int) -> None:
    layout = make_layout(sizes, mtp)
    text = describe(layout)
    assert parse(text) == layout
    assert describe(parse(text)) == text
    check(layout, len(sizes), sum(sizes), mtp)


@given(st.text("EtmL|()*23 ,", max_size=16))
def test_any_text_is_a_layout_or_one_line(text: str) -> None:
    try:
        layout = parse(text)
    except ValueError as error:
        assert "\n" not in str(error) and f"layout '{text}', position " in str(error)
    else:
        assert parse(describe(layout)) == layout
        assert layout[0].embedding and layout[-1].output
        assert not any(stage.embedding for stage in layout[1:]) and not any(stage.output for stage in layout[:-1])


def test_described_shortly() -> None:
    assert describe(stages(3, *[2] * 14, 30, mtp=1)) == "Et*3|(tt|)*14t*30mL"
    assert describe(stages(1, 0, 0, 0, 2, 2, mtp=3)) == "Et||*3tt|ttm*3L"
    assert describe(stages(1, 0, 0, 0)) == "Et|||L"
