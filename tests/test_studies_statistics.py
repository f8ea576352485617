"""A study's statistics: intervals, paired tests, samples for an equal score, joules."""

import math
from pathlib import Path

import numpy as np
import pytest

from mmllm.studies.energy import EnergyMeter
from mmllm.studies.statistics import (
    holm,
    interval_of,
    paired_p,
    said_chance,
    said_p,
    samples_for,
    student_interval,
    verdict_of,
)


def test_holm_multiplies_the_smallest_by_all_and_keeps_the_order():
    assert holm([0.01, 0.04, None, 0.03, 0.005]) == pytest.approx([0.03, 0.06, None, 0.06, 0.02])
    assert holm([0.02]) == [0.02] and holm([None]) == [None] and holm([]) == []
    assert holm([0.6, 0.9, 0.5]) == [1.0, 1.0, 1.0]


def test_families_of_equal_levels_rarely_have_a_p_below_the_claims():
    rng = np.random.default_rng(0)
    families = rng.uniform(size=(2000, 7))
    alone = np.mean([min(family) < 0.05 for family in families])
    adjusted = np.mean([min(p for p in holm(family.tolist()) if p is not None) < 0.05 for family in families])
    assert alone > 0.28 and 0.03 < adjusted < 0.06
    assert said_chance([0.5, None, *[0.1] * 13]).startswith("14 tests, of which 0.7 would have p < 0.05")
    assert said_chance([0.5]).startswith("1 test, of") and said_chance([None]) == "no tests"


def test_paired_p_is_students():
    scores = {0: 0.51, 1: 0.62, 2: 0.58, 7: 0.9}
    others = {0: 0.50, 1: 0.58, 2: 0.55, 8: 0.1}
    differences = np.array([0.01, 0.04, 0.03])
    t = differences.mean() / (differences.std(ddof=1) / math.sqrt(3))
    # P(|T| > t) with two degrees of freedom, in closed form.
    assert paired_p(scores, others) == pytest.approx(1 - t / math.sqrt(2 + t * t))
    assert paired_p({0: 1.0}, {0: 0.0}) is None  # one seed proves nothing
    assert paired_p({0: 1.0, 1: 2.0}, {0: 0.0, 1: 1.0}) is None  # nor do differences without spread


def test_differences_that_only_rounding_parts_prove_nothing():
    others = {0: 181 / 300, 1: 190 / 300, 2: 201 / 300}
    scores = {0: 182 / 300, 1: 191 / 300, 2: 202 / 300}
    assert len({scores[seed] - others[seed] for seed in others}) > 1, "floats differ in their last digit"
    assert paired_p(scores, others) is None
    p = paired_p({**scores, 2: 203 / 300}, others)
    assert p is not None and 0.01 < p < 0.2


def test_interval_covers_the_mean_of_new_seeds_and_rows():
    """Of trainings with a known mean, some 95 in a hundred intervals hold it; over rows alone, far fewer would."""
    generator = np.random.default_rng(0)
    num_seeds, num_rows, inside, inside_rows = 3, 60, 0, 0
    for _ in range(120):
        levels = generator.normal(0.5, 0.1, num_seeds)
        table = levels[:, None] + generator.normal(0, 0.3, (num_seeds, num_rows))
        rows = [{str(place): float(value) for place, value in enumerate(row)} for row in table]
        low, high, _ = interval_of([float(row.mean()) for row in table], rows)
        inside += low <= 0.5 <= high
        low, high, _ = interval_of([float(table[0].mean())], rows[:1])
        inside_rows += low <= 0.5 <= high
    assert inside >= 111
    assert inside_rows < inside - 15


def test_interval_without_rows_is_students():
    scores = [0.2, 0.3, 0.4]
    found = interval_of(scores, [{}, {}, {}])
    assert found.over == "seeds" and found[:2] == pytest.approx(student_interval(scores))
    low, high = student_interval(scores)
    assert (low + high) / 2 == pytest.approx(0.3)
    assert (high - low) / 2 == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-5)
    assert student_interval([0.7]) == (0.7, 0.7)


def test_interval_of_a_ratio_has_the_rows_that_its_evaluation_tells():
    scores, of_rows = [0.2, 0.3, 0.4], [[0.1, 0.3], [0.2, 0.4], [0.3, 0.7]]
    low, high, over = interval_of(scores, [{}, {}, {}], of_rows)
    of_seeds = 4.302653 * 0.1 / math.sqrt(3)
    assert over == "seeds and rows" and (low + high) / 2 == pytest.approx(0.3)
    assert (high - low) / 2 == pytest.approx(math.hypot(of_seeds, (0.1 + 0.1 + 0.2) / 3), rel=1e-5)
    assert interval_of(scores, [{}, {}, {}], [None, *of_rows[1:]]).over == "seeds", "one of them has none"
    alike = {str(row): 0.0 for row in range(300)}
    low, high, over = interval_of([0.0] * 3, [alike] * 3, [(0.0, 0.0126)] * 3)
    assert (high - low, over) == (pytest.approx(0.0126), "seeds and rows"), "all wrong isn't known to the last row"
    assert interval_of([0.5], [{"a": 0.5}]).over == "nothing", "one row has no spread"
    low, high, over = interval_of([0.2], [{}], of_rows[:1])
    assert (low, high) == pytest.approx((0.1, 0.3)) and over == "rows"
    assert interval_of([0.2], [{}]) == (0.2, 0.2, "nothing")


def test_samples_for_equal_score():
    curve = [(1000.0, 0.8), (100.0, 0.4), (10.0, 0.2)]

    def samples(target: float) -> float:
        found = samples_for(curve, target)
        assert found is not None and not found.is_bound
        return found.count

    assert samples(0.6) == pytest.approx(math.sqrt(100 * 1000))
    assert samples(0.8) == pytest.approx(1000)
    assert samples_for(curve, 0.1) == (10, True)  # already with the fewest: it may need fewer
    assert samples_for(curve, 0.81) is None  # nothing is extrapolated
    errors = [(samples, 1 - score) for samples, score in curve]
    found = samples_for(errors, 0.4, lower_is_better=True)
    assert found is not None and found.count == pytest.approx(math.sqrt(100 * 1000))
    assert samples_for([], 0.5) is None


def test_a_point_that_is_there_by_luck_before_one_that_is_not_does_not_count():
    curve = [(10.0, 0.7), (100.0, 0.4), (1000.0, 0.8), (10000.0, 0.75)]
    found = samples_for(curve, 0.6)
    assert found is not None and 100 < found.count < 1000
    assert samples_for(curve, 0.78) is None, "its last point isn't there"


def test_a_verdict_is_of_the_adjusted_p():
    assert verdict_of(0.1, 0.049, 3, lower_is_better=False) == verdict_of(-0.1, 0.01, 5, True) == "better"
    assert verdict_of(-0.1, 0.049, 3, False) == verdict_of(0.1, 0.049, 3, True) == "worse"
    for difference, p, pairs in ((0.1, 0.05, 3), (0.1, 0.01, 2), (0.1, None, 3), (None, 0.01, 3)):
        assert verdict_of(difference, p, pairs, False) == "unproved"


def test_joules_are_counted_over_a_counters_end(tmp_path: Path):
    zone = tmp_path / "intel-rapl:0"
    for folder, energy in ((zone, 900_000), (tmp_path / "intel-rapl:0:0", 5)):
        folder.mkdir()
        (folder / "energy_uj").write_text(str(energy))
        (folder / "max_energy_range_uj").write_text("1000000")
    with EnergyMeter(powercap=tmp_path) as meter:
        (zone / "energy_uj").write_text("300000")
    assert meter.joules == pytest.approx(0.4)
    with EnergyMeter(powercap=tmp_path / "none") as meter:
        pass
    assert meter.joules is None
    with EnergyMeter(is_on=False, powercap=tmp_path) as meter:
        pass
    assert meter.joules is None


def test_a_p_value_is_never_printed_as_nothing():
    assert [said_p(p) for p in (None, 0.0, 0.0004, 0.0006, 0.0494, 0.04996, 0.05, 1.0)] == [
        "–", "<0.001", "<0.001", "0.001", "0.049", "<0.05", "0.050", "1.000",
    ]  # fmt: skip
