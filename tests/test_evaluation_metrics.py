"""Scores, intervals, scene captions and routing, against values worked out by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmllm.evaluation.captions import (
    caption_matches,
    count_attributes,
    names_heldout_pairs,
    order_is_right,
    reference_scene,
)
from mmllm.evaluation.metrics import (
    Edits,
    bootstrap_interval,
    character_edits,
    cider_d,
    error_rate,
    exact_match,
    normalize_text,
    wilson_interval,
    word_edits,
)
from mmllm.evaluation.routing import (
    dead_experts,
    load_by_modality,
    load_divergence_bits,
    max_violation,
    mutual_information_bits,
    routing_summary,
)
from mmllm.evaluation.scoring import mean_scores, rate_scores


def test_text_is_compared_without_case_punctuation_and_spacing():
    assert normalize_text("  Don’t  stop,\tAnn!\n") == "dont stop ann"
    assert normalize_text("Ä-ö 3½ C++") == "ä ö 3½ c++"
    assert normalize_text("e\u0301") == "é"
    assert exact_match("A red   circle.", "a Red circle")
    assert not exact_match("a red circles", "a red circle")
    assert not exact_match("", "?!")  # nothing is left of either, and yet they differ
    assert exact_match("?!", " ?! ")


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_normalizing_twice_changes_nothing(text: str):
    assert normalize_text(normalize_text(text)) == normalize_text(text)


@pytest.mark.parametrize(
    ("prediction", "reference", "errors", "length"),
    [
        ("a b c", "a b c", 0, 3),
        ("a x c", "a b c", 1, 3),
        ("a c", "a b c", 1, 3),
        ("a b b c", "a b c", 1, 3),
        ("", "a b", 2, 2),
        ("a b", "...", 2, 0),
        ("", "", 0, 0),
    ],
)
def test_word_edits(prediction: str, reference: str, errors: int, length: int):
    assert word_edits(prediction, reference) == Edits(errors, length)


def test_error_rates_are_of_the_corpus_not_the_mean_of_rows():
    edits = [word_edits("x", "a"), word_edits("a b c d e f g h i", "a b c d e f g h i")]
    assert error_rate(edits) == pytest.approx(1 / 10)
    assert character_edits("abd", "abc") == Edits(1, 3)
    assert error_rate([word_edits("a b c", "z")]) == 3.0
    with pytest.raises(ValueError, match="no rows"):
        error_rate([])


def test_cider_of_two_disjoint_captions_said_exactly_is_ten():
    captions = ["a red cat sleeps", "the old dog runs"]
    assert cider_d(captions, [[c] for c in captions]) == pytest.approx([10.0, 10.0])


def test_cider_by_hand():
    # Two rows, so the IDF of a word in one of them is log 2, of one in both log 1 = 0.
    # Row 1 says "red cat" for "red dog": n=1 shares "red" alone: clipped dot = log2², norms = √2·log2 each: 1/2.
    # n=2 shares nothing; n=3, 4 don't exist. The mean over four n is 1/8; no length penalty; times 10.
    # "cat" is in no reference: its document frequency counts as 1, so its IDF is log 2 too.
    scores = cider_d(["red cat", "blue sky"], [["red dog"], ["blue sky"]])
    assert scores == pytest.approx([10 / 8, 10 / 2])  # two words have no 3- or 4-grams


def test_cider_clips_repeats_and_penalises_length():
    # "red red red" for "red": n=1 vectors 3·log2 and log2: min is log2: dot log2², norms 3·log2 and log2: 1/3.
    # Two words too many cost exp(-2² / (2·6²)).
    scores = cider_d(["red red red", "sky"], [["red"], ["sky"]])
    assert scores[0] == pytest.approx(10 / 4 / 3 * math.exp(-4 / 72))
    assert scores[1] == pytest.approx(10 / 4)


def test_cider_ignores_what_every_reference_says_and_averages_references():
    assert cider_d(["a", "a"], [["a cat"], ["a dog"]]) == [0.0, 0.0]
    assert cider_d(["a cat sat down"], [["a cat sat down"]]) == [0.0]  # one row: every IDF is log 1
    both = cider_d(["cat", "fish"], [["cat", "dog"], ["fish"]])
    assert both[0] == pytest.approx(10 / 4 / 2)
    with pytest.raises(ValueError, match="at least one reference"):
        cider_d(["a"], [[]])


def test_bootstrap_agrees_with_the_normal_interval_and_repeats():
    values_N = np.random.default_rng(3).random(400) < 0.3
    lower, upper = bootstrap_interval(values_N, seed=1)
    half = 1.96 * values_N.std() / math.sqrt(400)
    assert lower == pytest.approx(values_N.mean() - half, abs=0.012)
    assert upper == pytest.approx(values_N.mean() + half, abs=0.012)
    assert bootstrap_interval(values_N, seed=1) == [lower, upper] != bootstrap_interval(values_N, seed=2)


def test_bootstrap_of_a_rate_draws_errors_and_words_together():
    errors_N, words_N = np.arange(1, 51), 2.0 * np.arange(1, 51)
    assert bootstrap_interval(errors_N, words_N) == pytest.approx([0.5, 0.5])
    assert bootstrap_interval([1.0]) == [1.0, 1.0]
    with pytest.raises(ValueError, match="equally long"):
        bootstrap_interval([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_interval([])


def test_whole_clusters_are_drawn():
    """Against drawing them one by one; rows of a cluster that agree make the interval as wide as so few clusters do."""
    rng = np.random.default_rng(5)
    clusters_N = rng.integers(0, 12, 300).tolist()
    rate_C = rng.random(12)
    values_N = rng.random(300) < rate_C[clusters_N]
    weights_N = rng.integers(1, 4, 300)
    lower, upper = bootstrap_interval(values_N, weights_N, num_resamples=4000, clusters_N=clusters_N)
    ratios = []
    for _ in range(4000):
        rows = np.concatenate([np.flatnonzero(np.array(clusters_N) == c) for c in rng.integers(0, 12, 12)])
        ratios.append(values_N[rows].sum() / weights_N[rows].sum())
    assert [lower, upper] == pytest.approx(np.quantile(ratios, [0.025, 0.975]), abs=0.012)
    narrow = bootstrap_interval(values_N, weights_N)
    assert upper - lower > 1.5 * (narrow[1] - narrow[0])


def test_rows_that_stand_alone_are_clusters_of_one():
    values_N, weights_N = [1.0, 0, 3, 2, 0], [2.0, 1, 3, 5, 1]
    assert bootstrap_interval(values_N, weights_N, clusters_N="abcde") == bootstrap_interval(values_N, weights_N)
    assert bootstrap_interval(values_N, clusters_N=[7] * 5) == bootstrap_interval(values_N), "nothing else to draw"
    with pytest.raises(ValueError, match="4 clusters for 5 rows"):
        bootstrap_interval(values_N, clusters_N="abcd")


def wilson_by_search(share: float, num_rows: int) -> list[float]:
    """The shares p whose normal test does not reject what was seen: the definition, found by looking at many p."""
    p = np.linspace(0, 1, 200_001)
    fits = np.abs(share - p) <= 1.959964 * np.sqrt(p * (1 - p) / num_rows)
    return [float(p[fits].min()), float(p[fits].max())]


@pytest.mark.parametrize(("share", "num_rows"), [(0.0, 20), (1.0, 145), (0.3, 7), (1.0, 1)])
def test_wilson_interval(share: float, num_rows: int):
    assert wilson_interval(share, num_rows) == pytest.approx(wilson_by_search(share, num_rows), abs=1e-5)


def test_a_share_that_is_the_same_in_all_rows_has_an_interval_all_the_same():
    for value in (0.0, 1.0):
        found = bootstrap_interval([value] * 145, is_share=True)
        assert found == wilson_interval(value, 145) and found[1] - found[0] == pytest.approx(0.0258, abs=1e-3)
    clusters = [number % 12 for number in range(504)]
    assert bootstrap_interval([1.0] * 504, clusters_N=clusters, is_share=True) == wilson_interval(1.0, 12)
    assert bootstrap_interval([1.0] * 504, clusters_N=[0] * 504, is_share=True) == wilson_interval(1.0, 504)
    counts_N = np.arange(1, 51)
    assert bootstrap_interval(counts_N, 2 * counts_N, is_share=True) == wilson_interval(0.5, 50)
    assert bootstrap_interval(0 * counts_N, counts_N, is_share=True) == wilson_interval(0.0, 50)
    differs = [1.0] * 144 + [0.0]
    assert bootstrap_interval(differs, is_share=True) == bootstrap_interval(differs)
    assert bootstrap_interval([2.5, 2.5]) == [2.5, 2.5], "no share"


def test_which_scores_are_shares():
    assert mean_scores("right", [True] * 10, 0)["right_ci"] == wilson_interval(1.0, 10)
    assert mean_scores("cider", [0.0] * 10, 0, is_share=False)["cider_ci"] == [0.0, 0.0]
    assert rate_scores("wer", [Edits(0, 4)] * 10, 0)["wer_ci"] == wilson_interval(0.0, 10)
    assert rate_scores("wer", [Edits(4, 4)] * 10, 0)["wer_ci"] == [1.0, 1.0], "a rate may be above 1"


SCENE = {
    "objects": [
        {"size": "small", "colour": "red", "shape": "circle"},
        {"size": "large", "colour": "blue", "shape": "star"},
    ],
    "relations": [[0, "left of", 1]],
}


@pytest.mark.parametrize(
    ("caption", "matches", "right", "total"),
    [
        ("a small red circle left of a large blue star", True, 7, 7),
        ("A large blue star to the right of a small red circle.", True, 7, 7),
        ("a small red circle right of a large blue star", False, 6, 7),
        ("a small red circle left of a large green star", False, 6, 7),
        ("a large blue star in the centre", False, 3, 7),  # one of the two objects, no relation
        ("a small red circle, a large blue star and a large pink ring from left to right", False, 7, 10),
        ("something small", False, 0, 7),
        ("", False, 0, 7),
    ],
)
def test_scene_captions(caption: str, matches: bool, right: int, total: int):
    scene = reference_scene(SCENE)
    assert scene is not None
    assert caption_matches(caption, "any wording", scene) is matches
    assert count_attributes(caption, scene) == (right, total)


THREE = {
    "objects": [*SCENE["objects"], {"size": "small", "colour": "pink", "shape": "ring"}],
    "relations": [[0, "left of", 1], [1, "left of", 2]],
}
NAMES = ("a small red circle", "a large blue star", "a small pink ring")


@pytest.mark.parametrize(
    ("caption", "order"),
    [
        ("a small red circle left of a large blue star", True),
        ("a large blue star to the right of a small red circle", True),
        ("a large blue star left of a small red circle", False),
        ("a small red circle above a large blue star", False),  # the axis is wrong
        ("a small red circle left of a large blue ring", None),  # another object
        ("a small red circle left of a small red circle", None),  # one of them twice
        ("a small red circle, a small red circle and a large blue star from left to right", None),
        ("a small red circle, a large blue star and a small pink ring from left to right", None),
        ("a small red circle in the centre", None),
        ("no grammar", None),
    ],
)
def test_order_of_two_where_both_are_named(caption: str, order: bool | None):
    scene = reference_scene(SCENE)
    assert scene is not None
    assert order_is_right(caption, scene) is order


def test_order_of_three_is_right_in_one_of_six():
    scene = reference_scene(THREE)
    assert scene is not None
    said = {names: order_is_right("{}, {} and {} from left to right".format(*names), scene)
            for names in itertools.permutations(NAMES)}  # fmt: skip
    assert [names for names, order in said.items() if order] == [NAMES] and len(said) == 6
    turned = "{2}, {1} and {0} from right to left".format(*NAMES)
    assert order_is_right(turned, scene) is True and caption_matches(turned, "", scene)
    assert order_is_right("{1} with {0} to its left and {2} to its left".format(*NAMES), scene) is False


def test_attributes_match_objects_as_favourably_as_possible():
    scene = reference_scene(SCENE)
    assert scene is not None
    # The circle is said to be blue and the star red: matched by shape, colours are wrong and the rest is right.
    assert count_attributes("a small blue circle left of a large red star", scene) == (5, 7)


def test_rows_without_a_scene_of_our_form_are_compared_as_text():
    assert reference_scene({"speaker": "ann"}) is None
    assert reference_scene({"objects": ["chair"], "relations": []}) is None
    assert reference_scene({"objects": 3}) is None
    assert caption_matches("A photo of a dog!", "a photo of a dog", None)


def test_heldout_pairs_need_shape_and_colour_on_one_object():
    assert names_heldout_pairs("a small red circle left of a large blue star", [["circle", "red"]])
    assert not names_heldout_pairs("a small red circle left of a large blue star", [["circle", "blue"]])
    assert not names_heldout_pairs("no grammar", [["circle", "red"]])


def test_mutual_information_by_hand():
    counts_LME = np.zeros((4, 4, 2))
    counts_LME[0, :2] = [[50, 0], [0, 50]]  # the expert tells the modality: 1 bit
    counts_LME[1, :2] = [[25, 25], [25, 25]]  # it tells nothing
    counts_LME[2, :2] = [[30, 10], [10, 30]]  # 1 - H(1/4) bits
    counts_LME[3, :2] = [[90, 10], [9, 1]]  # uneven experts and modalities, and yet it tells nothing
    quarter = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))
    assert mutual_information_bits(counts_LME) == pytest.approx([1.0, 0.0, 1 - quarter, 0.0])


def test_violation_and_divergence_by_hand():
    counts_LME = np.zeros((3, 4, 4))
    counts_LME[0, 0], counts_LME[0, 1] = [10, 0, 0, 10], [0, 10, 10, 0]
    counts_LME[1, 2] = [8, 0, 0, 0]
    assert max_violation(counts_LME).tolist() == [0.0, 3.0, 0.0]  # even; one of four has all; nobody came
    other_LME = np.roll(counts_LME, 1, axis=2)
    assert load_divergence_bits(counts_LME, other_LME) == pytest.approx([0.0, 1.0, 0.0])
    half_LME = counts_LME.copy()
    half_LME[1, 0] = [0, 8, 0, 0]
    # p = (1, 0), q = (1/2, 1/2): the mean is (3/4, 1/4)
    expected = (np.log2(4 / 3) + 0.5 * np.log2(2 / 3) + 0.5 * np.log2(2)) / 2
    assert load_divergence_bits(counts_LME, half_LME)[1] == pytest.approx(expected)
    with pytest.raises(ValueError, match="checkpoints of one shape"):
        load_divergence_bits(counts_LME, counts_LME[:2])


def test_entropy_of_the_router_is_a_mean_over_tokens():
    counts_LME = np.ones((1, 4, 2))
    summary = routing_summary(counts_LME, [0], np.log(2) * np.array([[10.0, 3, 0, 4]]), np.array([10, 6, 0, 4]))
    assert summary["router_entropy_bits"] == [pytest.approx(17 / 20)]
    assert summary["router_entropy_bits_by_modality"] == [[1.0, 0.5, 0.0, 1.0]]


def test_load_and_dead_experts():
    counts_LME = np.zeros((1, 4, 4))
    counts_LME[0, 0] = [600, 300, 99, 1]
    counts_LME[0, 3] = [0, 1000, 0, 0]
    load_LME = load_by_modality(counts_LME)
    assert load_LME[0, 0].tolist() == [0.6, 0.3, 0.099, 0.001]
    assert load_LME[0, 1].sum() == 0  # no image was seen
    assert dead_experts(counts_LME) == [[3]]  # 1 of 2000 tokens, an even share is 500
    summary = routing_summary(counts_LME, layers=[5])
    assert summary["layers"] == [5] and summary["modalities"] == ["text", "units"]
    assert summary["num_dead_experts"] == 1
    assert summary["max_load_ratio"] == [pytest.approx(1300 / 500)]
    assert summary["modality_entropy_bits"] == [pytest.approx(1.0)]
    assert "router_entropy_bits" not in summary, "of an earlier routing.json it isn't known"
    with pytest.raises(ValueError, match="one for each"):
        routing_summary(counts_LME, layers=[1, 2])
    with pytest.raises(ValueError, match="layers, modalities, experts"):
        routing_summary(counts_LME[0])
