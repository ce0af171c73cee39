"""Rows to owners: everything covered once, in order, in whole units, and as even as a contiguous split can be."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.optimizer.assignment import ROW_UNIT, assign_rows, canonical_key

SHAPES = st.lists(st.tuples(st.integers(1, 700), st.integers(1, 40)), min_size=1, max_size=12)


def loads(shapes, assigned):
    return [sum((r.last - r.first) * shapes[r.index][1] for r in owned) for owned in assigned]


@settings(max_examples=200, deadline=None)
@given(SHAPES, st.integers(1, 9))
def test_every_row_has_one_owner_in_order_and_units_stay_whole(shapes, owners):
    assigned = assign_rows(shapes, owners)
    assert len(assigned) == owners
    ranges = [r for owned in assigned for r in owned]
    expected = [(index, row) for index, (rows, _) in enumerate(shapes) for row in range(rows)]
    assert [(r.index, row) for r in ranges for row in range(r.first, r.last)] == expected
    for r in ranges:
        assert r.first % ROW_UNIT == 0
        assert r.last % ROW_UNIT == 0 or r.last == shapes[r.index][0]
    largest_unit = max(min(rows, ROW_UNIT) * columns for rows, columns in shapes)
    found = loads(shapes, assigned)
    assert max(found) < sum(found) / owners + largest_unit


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=7), st.integers(1, 4))
def test_no_contiguous_split_has_a_smaller_largest_owner(sizes, owners):
    shapes = [(1, size) for size in sizes]
    best = sum(sizes)
    for cuts in itertools.combinations_with_replacement(range(len(sizes) + 1), owners - 1):
        edges = [0, *cuts, len(sizes)]
        best = min(best, max(sum(sizes[a:b]) for a, b in itertools.pairwise(edges)))
    assert max(loads(shapes, assign_rows(shapes, owners))) == best


def test_a_large_model_layer_is_nearly_even():
    shapes = [
        (1536, 7168),
        (24576, 1536),
        (576, 7168),
        (32768, 512),
        (7168, 16384),
        (7168, 1),
        (36864, 7168),
        (7168, 18432),
    ]
    found = loads(shapes, assign_rows(shapes, 16))
    assert max(found) / (sum(found) / 16) < 1.04


def test_empty_tensors_are_refused():
    with pytest.raises(ValueError, match="shape \\(0, 4\\)"):
        assign_rows([(0, 4)], 2)


def test_numbers_in_names_compare_as_numbers():
    names = ["layers.10.w", "layers.9.w", "embed.weight", "layers.9.a"]
    assert sorted(names, key=canonical_key) == ["embed.weight", "layers.9.a", "layers.9.w", "layers.10.w"]
