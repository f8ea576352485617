"""Filters: three-valued logic over rows that lack a value, and texts that are no numbers."""

from __future__ import annotations

import itertools

import pytest

from mmllm.data.expressions import compile_filter, filter_names, kept_rows

HAS = {"score": 0.7, "width": 64, "speaker": "bob"}


@pytest.mark.parametrize("lacking", [{}, {"score": None}, {"score": float("nan")}])
@pytest.mark.parametrize(
    "expression",
    [
        "score < 0.5", "not (score < 0.5)", "not not (score < 0.5)", "score >= 0.5", "score == 0.5", "score != 0.5",
        "not (score == 0.5)", "score in [0.5, 1]", "score not in [0.5, 1]", "not (score in [0.5])", "score + 1 > 0",
        "not (-score > 0)", "0 < score < 1", "not (0 < score < 1)", "score > 0 and width > 0",
        "not (score > 0 and width > 0)", "not (score > 0 or width < 0)", "score > 0 or width < 0",
        "not (not (score > 0) and width > 0)", "(score > 0) == (width > 0)", "score / 0 > 1",
    ],
)  # fmt: skip
def test_a_comparison_with_a_missing_score_is_unknown_and_so_is_its_opposite(expression, lacking):
    keeps = compile_filter(expression)
    assert keeps({"width": 64, **lacking}) is False, expression
    assert compile_filter(f"not ({expression})")({"width": 64, **lacking}) is False, expression


def test_what_is_known_decides_whatever_is_unknown():
    row = {"width": 64}
    for expression, kept in {
        "score > 0 or width > 0": True, "width > 0 or score > 0": True, "not (score > 0 and width < 0)": True,
        "score == None": True, "score != None": False, "not (score == None)": False, "width != None": True,
        "not score": True, "score": False, "not perturbed and width > 0": True,
    }.items():  # fmt: skip
        assert compile_filter(expression)(row) is kept, expression


def test_compounds_follow_kleene():
    """Every pair of true, false and unknown, against the tables."""
    values = {"t": True, "f": False, "u": None}
    row = {"t": 1, "f": -1}
    for one, other in itertools.product(values, repeat=2):
        left, right = values[one], values[other]
        both = False if False in (left, right) else None if None in (left, right) else True
        either = True if True in (left, right) else None if None in (left, right) else False
        for text, wanted in ((f"{one} > 0 and {other} > 0", both), (f"{one} > 0 or {other} > 0", either)):
            assert compile_filter(text)(row) is (wanted is True), text
            assert compile_filter(f"not ({text})")(row) is (wanted is False), text


@pytest.mark.parametrize(
    ("expression", "row"),
    [
        ("width >= 64", {"width": "0640"}),
        ("width == 64", {"width": "64"}),
        ("not (width < 64)", {"width": "64"}),
        ("width in [64, 32]", {"width": "64"}),
        ("0 < width < 100", {"width": "64"}),
        ("width >= '64'", {"width": 64}),
        ("'64' in width", {"width": 64}),
        ("width * 2 > 1", {"width": "64"}),
        ("-width < 1", {"width": "64"}),
        ("not width", {"width": "False"}),
        ("width and height > 3", {"width": "1", "height": 2}),
        ("width < 3", {"width": [1]}),
    ],
)
def test_a_text_is_never_taken_for_a_number(expression, row):
    with pytest.raises(ValueError, match=r"'width'.*--columns width:float") as caught:
        compile_filter(expression)(row)
    assert repr(expression) in str(caught.value)


def test_texts_are_not_written_by_percent():
    with pytest.raises(ValueError, match="with the text '%d', which is no number"):
        compile_filter("'%d' % width == '64'")(HAS)


def test_what_is_decided_before_a_text_is_looked_at_is_no_error():
    assert compile_filter("width == None or width == 'wide'")({"width": "wide"})
    assert not compile_filter("kind == 'a' and score > 5")({"kind": "b", "score": "high"})


def test_texts_and_lists():
    row = {"speaker": "bob", "tags": ["cat", "dog"], "perturbed": False, "empty": []}
    for expression, kept in {
        "speaker == 'bob'": True, "'o' in speaker": True, "speaker < 'c'": True, "'cat' in tags": True,
        "'cow' not in tags": True, "perturbed == False": True, "not perturbed": True, "speaker": True,
        "tags == ['cat', 'dog']": True, "'a' in empty": False, "speaker in ['bob', 5]": True,
    }.items():  # fmt: skip
        assert compile_filter(expression)(row) is kept, expression


def test_columns_are_looked_at_once_a_value():
    assert filter_names("not (score < 0.5) and width > 3") == ["score", "width"]
    columns = {"score": [0.7, None, 0.2, 0.7], "other": [1, 2, 3, 4]}
    assert kept_rows("not (score < 0.5)", columns, 4) == [True, False, False, True]
    with pytest.raises(ValueError, match="'score'"):
        kept_rows("score < 1", {"score": [0.7, "high"]}, 2)
