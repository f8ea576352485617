"""`mmllm scaling fit`, `plan`, `rates` and `emergence`: known laws come back, optima are those of brute force."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmllm.cli.main import main
from mmllm.studies.scaling import FitConfig, Law, check_points, fit_law, huber_sum
from mmllm.studies.scaling_emergence import emergence, emergence_lines
from mmllm.studies.scaling_isoflop import isoflop_fit
from mmllm.studies.scaling_optimum import optimum, plan
from mmllm.studies.scaling_points import Points, read_points
from mmllm.studies.scaling_rates import fit_rates
from mmllm.studies.scaling_report import fit_lines, fit_points

pytest.importorskip("scipy", reason="fits need scipy: pip install 'mmllm[studies]'")

HOFFMANN = Law(1.69, 406.4, 410.7, 0.34, 0.28)
BESIROGLU = Law(1.817, 477.8, 2143, 0.347, 0.367)
SMALL = Law(0.5, 100, 500, 0.4, 0.45)
FAST = FitConfig(num_resamples=0)


def drawn(law: Law, num_sizes: int = 8, num_lengths: int = 8, noise: float = 0.005, seed: int = 0) -> Points:
    """A grid of sizes and lengths, with noise."""
    n_P = np.repeat(np.geomspace(1e6, 1e9, num_sizes), num_lengths)
    d_P = np.tile(np.geomspace(2e7, 2e10, num_lengths), num_sizes)
    noise_P = np.exp(np.random.default_rng(seed).normal(0, noise, len(n_P)))
    return Points(n_P, d_P, law.loss(n_P, d_P) * noise_P)


def write(path: Path, points: Points, **more: Any) -> Path:
    rows = [{"parameters": n, "tokens": d, "loss": loss, **more} for n, d, loss in points.rows()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ---- the fit


@pytest.mark.parametrize("law", [HOFFMANN, BESIROGLU, SMALL], ids=["hoffmann", "besiroglu", "small"])
@pytest.mark.parametrize("seed", [0, 1])
def test_known_laws_come_back_within_five_percent(law: Law, seed: int) -> None:
    fit = fit_law(drawn(law, seed=seed), FAST)
    for name in ("E", "alpha", "beta"):
        assert getattr(fit.law, name) == pytest.approx(getattr(law, name), rel=0.05), name
    assert fit.warnings == []
    assert fit.error == pytest.approx(0.005, rel=0.3)


def test_without_noise_all_numbers_come_back() -> None:
    fit = fit_law(drawn(BESIROGLU, 5, 5, noise=0.0), FAST)
    for name, value in vars(BESIROGLU).items():
        assert getattr(fit.law, name) == pytest.approx(value, rel=2e-3), name


def test_intervals_hold_the_law_and_narrow_with_points() -> None:
    few, many = (fit_law(drawn(BESIROGLU, n, n), FitConfig(60)) for n in (5, 12))
    for name in ("E", "alpha", "beta"):
        low, high = many.intervals[name]
        assert low < getattr(BESIROGLU, name) < high
        wide_low, wide_high = few.intervals[name]
        assert high - low < wide_high - wide_low
    again = fit_law(drawn(BESIROGLU, 5, 5), FitConfig(60))
    assert again.intervals == few.intervals, "the seed decides"


def test_the_gradient_is_that_of_differences() -> None:
    points = drawn(SMALL, 3, 4, noise=0.01)
    given = np.log(points.parameters_P), np.log(points.tokens_P), np.log(points.loss_P), 1e-3
    values = np.array([4.0, 6.0, -0.7, 0.35, 0.5])
    _, gradient = huber_sum(values, *given)
    for place in range(5):
        step = np.zeros(5)
        step[place] = 1e-6
        slope = (huber_sum(values + step, *given)[0] - huber_sum(values - step, *given)[0]) / 2e-6
        assert gradient[place] == pytest.approx(slope, rel=1e-5, abs=1e-9)


def test_the_loss_is_summed_huber_of_log_loss() -> None:
    """By a plain loop over points."""
    points = drawn(SMALL, 3, 4, noise=0.01)
    values = np.array([4.0, 6.0, -0.7, 0.35, 0.5])
    total = 0.0
    for n, d, loss in points.rows():
        told = math.exp(4.0) / n**0.35 + math.exp(6.0) / d**0.5 + math.exp(-0.7)
        error = abs(math.log(told) - math.log(loss))
        total += 0.5 * error**2 if error <= 1e-3 else 1e-3 * (error - 0.5e-3)
    given = np.log(points.parameters_P), np.log(points.tokens_P), np.log(points.loss_P), 1e-3
    assert huber_sum(values, *given)[0] == pytest.approx(total, rel=1e-12)


def test_a_planted_bug_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a wrong slope of one exponent the law doesn't come back."""
    from mmllm.studies import scaling

    def planted(values: np.ndarray, *rest: Any) -> tuple[float, np.ndarray]:
        value, gradient = huber_sum(values, *rest)
        return value, gradient * np.array([1, 1, 1, 1, 0.0])

    monkeypatch.setattr(scaling, "huber_sum", planted)
    with pytest.raises(AssertionError):
        test_without_noise_all_numbers_come_back()


# ---- points that can't tell


def test_too_few_points_or_values_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match="5 points can't tell a law of 5 numbers"):
        check_points([1e6, 1e6, 1e7, 1e7, 1e8], [1e7, 1e8, 1e7, 1e8, 1e7])
    with pytest.raises(ValueError, match="2 different sizes, from which no exponent"):
        check_points([1e6, 1e7] * 4, np.geomspace(1e7, 1e9, 8))
    with pytest.raises(ValueError, match="1 different numbers of tokens"):
        check_points(np.geomspace(1e6, 1e9, 8), [1e7] * 8)
    sizes = np.geomspace(1e6, 1e9, 8)
    with pytest.raises(ValueError, match="one budget of compute"):
        check_points(sizes, 1e15 / sizes)


def test_seeds_of_one_size_and_length_are_no_further_points() -> None:
    """Nor are lengths that differ by a step."""
    sizes, lengths = [1e6, 1e7, 1e8, 1e6, 1e7] * 3, [1e7, 1e8, 1e9, 1e8, 1e7] * 3
    nearly = [length * factor for length, factor in zip(lengths, [1.0] * 5 + [1.01] * 5 + [0.99] * 5, strict=True)]
    for given in (lengths, nearly):
        with pytest.raises(ValueError, match="15 points of 5 different pairs of size and number of tokens can't tell"):
            check_points(sizes, given)
    check_points([*sizes, 1e8], [*nearly, 1e7])


def test_lengths_that_are_a_power_of_the_size_are_refused_or_warned_of() -> None:
    """Along D ~ N both terms are powers of N: nobody knows which is which."""
    n_P = np.repeat(np.geomspace(1e6, 1e9, 8), 2)
    for exponent in (1.0, 0.5, -0.7):
        with pytest.raises(ValueError, match=rf"D ~ N\^{exponent:.2f}\), so that A and alpha can't be told"):
            fit_law(Points(n_P, 20 * n_P**exponent, HOFFMANN.loss(n_P, 20 * n_P**exponent)), FAST)
    d_P = 20 * n_P * np.tile([0.7, 1.4], 8)
    warnings = fit_law(Points(n_P, d_P, HOFFMANN.loss(n_P, d_P)), FAST).warnings
    assert any("tokens go with sizes (the correlation of log N and log D is 0.98" in each for each in warnings)
    assert not any("tokens go with" in each for each in fit_law(drawn(HOFFMANN), FAST).warnings)


def test_points_that_cannot_tell_are_warned_of() -> None:
    n_P, d_P = (np.repeat([1e8, 1.3e8, 1.6e8], 3), np.tile([1e9, 1.3e9, 1.6e9], 3))
    noise_P = np.exp(np.random.default_rng(0).normal(0, 0.01, 9))
    narrow = Points(n_P, d_P, HOFFMANN.loss(n_P, d_P) * noise_P)
    warnings = "; ".join(fit_law(narrow, FitConfig(20)).warnings)
    assert "the sizes differ by a factor of 1.6 at most" in warnings
    assert "is likely: more points, or wider ranges" in warnings
    no_tokens = drawn(Law(2.0, 300, 1e-9, 0.3, 0.3))
    assert any("beta" in warning for warning in fit_law(no_tokens, FitConfig(20)).warnings), "D does nothing here"


def test_points_far_from_the_law_are_named() -> None:
    points = drawn(HOFFMANN, 6, 6, noise=0.001)
    points.loss_P[7] *= 1.4
    fit = fit_law(points, FAST)
    assert any("1 points lie far from the law" in warning and "by +" in warning for warning in fit.warnings)
    assert fit.law.alpha == pytest.approx(HOFFMANN.alpha, rel=0.03), "and Huber's loss bears with it"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"parameters": 1, "tokens": 2}', r"p\.jsonl:1 has loss None; it must be a positive number"),
        ('{"parameters": "1", "tokens": 2, "loss": 3}', "has parameters '1'"),
        ('{"parameters": 1, "tokens": -2, "loss": 3}', "has tokens -2"),
        ('{"parameters": 1, "tokens": 2, "loss": NaN}', "has loss nan"),
        (f'{{"parameters": 1{"0" * 400}, "tokens": 2, "loss": 3}}', "has parameters too large a whole number"),
        ('{"parameters": 1, "tokens": 2, "loss": 3, "epochs": "2"}', r"p\.jsonl:1 has epochs '2'"),
        ("[1, 2]", "wanted an object"),
        ("nonsense", "is no JSON"),
        ("", "has no points"),
    ],
)
def test_bad_points_are_named(line: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=said):
        read_points(tmp_path / "p.jsonl")


# ---- isoFLOP curves


def test_isoflop_curves_find_the_best_sizes() -> None:
    """Beside the closed form of the law that drew them."""
    parts = []
    for flops in (1e17, 1e18, 1e19, 1e20):
        middle = optimum(BESIROGLU, flops).parameters
        sizes = middle * np.geomspace(0.4, 2.5, 7)
        parts.append((sizes, flops / (6 * sizes)))
    n_P, d_P = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    found = isoflop_fit(Points(n_P, d_P, BESIROGLU.loss(n_P, d_P)))
    assert found is not None and len(found["curves"]) == 4 and found["warnings"] == []
    exponent = BESIROGLU.beta / (BESIROGLU.alpha + BESIROGLU.beta)
    assert found["parameters"]["exponent"] == pytest.approx(exponent, abs=0.01)
    assert found["tokens"]["exponent"] == pytest.approx(1 - exponent, abs=0.01)
    for curve in found["curves"]:
        best = optimum(BESIROGLU, curve["flops"])
        assert curve["parameters"] == pytest.approx(best.parameters, rel=0.1)
        assert curve["loss"] == pytest.approx(best.loss, rel=1e-3)


def test_curves_without_a_lowest_point_are_not_used() -> None:
    sizes = np.geomspace(1e9, 1e10, 5)  # all too large
    n_P = np.concatenate([sizes, sizes])
    d_P = np.concatenate([1e18 / (6 * sizes), 1e19 / (6 * sizes)])
    assert isoflop_fit(Points(n_P, d_P, BESIROGLU.loss(n_P, d_P))) is None
    assert isoflop_fit(drawn(SMALL, 4, 2)) is None, "no budget has three sizes"


# ---- plans


@pytest.mark.parametrize("law", [HOFFMANN, BESIROGLU, SMALL, Law(1.0, 50, 80, 1.3, 0.2)])
@pytest.mark.parametrize("inference", [0.0, 1e9, 1e12, 1e15])
def test_optima_are_those_of_brute_force(law: Law, inference: float) -> None:
    flops = 1e21
    most = flops / (2 * inference) if inference else 1e14
    sizes = np.geomspace(1e2, most * 0.999999, 400_001)
    tokens = (flops / sizes - 2 * inference) / 6
    losses = law.loss(sizes, tokens)
    best = optimum(law, flops, inference)
    assert 6 * best.parameters * best.tokens + 2 * best.parameters * inference == pytest.approx(flops, rel=1e-9)
    assert best.loss <= losses.min() * (1 + 1e-12)
    assert best.loss == pytest.approx(losses.min(), rel=1e-7)
    assert best.parameters == pytest.approx(sizes[losses.argmin()], rel=0.02)


def test_inference_makes_models_smaller_and_trained_longer() -> None:
    plain, used = optimum(BESIROGLU, 1e21), optimum(BESIROGLU, 1e21, 1e12)
    assert used.parameters < plain.parameters and used.tokens / used.parameters > plain.tokens / plain.parameters
    barely = optimum(BESIROGLU, 1e21, 1.0)
    assert barely.parameters == pytest.approx(plain.parameters, rel=1e-5)


def test_plans_say_how_far_they_go_beyond_the_points(tmp_path: Path) -> None:
    write(tmp_path / "p.jsonl", drawn(BESIROGLU, 5, 5))
    values = fit_points(tmp_path / "p.jsonl", FAST)
    (tmp_path / "fit.json").write_text(json.dumps({**values, "warnings": ["odd"]}))
    near, far = plan(tmp_path / "fit.json", 1e17), plan(tmp_path / "fit.json", 1e24)
    assert near.warnings == ["of the fit: odd"]
    assert any("times beyond the largest that was measured, 1e+09" in warning for warning in far.warnings)


@pytest.mark.parametrize(
    ("flops", "tokens", "said"),
    [
        (0, 0, "flops is 0"),
        (-1e20, 0, "flops is -1e"),
        (math.nan, 0, "flops is nan"),
        (math.inf, 0, "flops is inf"),
        (1e20, -1, "inference_tokens is -1"),
        (1e20, math.nan, "inference_tokens is nan"),
        (1e20, math.inf, "inference_tokens is inf"),
        (1.0, 0, "1 FLOPs pay for less than one parameter, or one token"),
        (5e-324, 0, "pay for less than one parameter"),
        (1e20, 1e20, r"1e\+20 FLOPs with 1e\+20 tokens of inference pay for less than one parameter"),
        (1e3, 499.9, "or lower inference_tokens"),
    ],
)
def test_plans_refuse_what_is_no_budget(flops: float, tokens: float, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        optimum(BESIROGLU, flops, tokens)


@pytest.mark.parametrize("flops", [1e3, 1e12, 1e100, 1e300])
@pytest.mark.parametrize("tokens", [0.0, 5e-324, 1.0, 1e250])
def test_plans_of_any_budget_are_numbers_or_errors(flops: float, tokens: float) -> None:
    for law in (BESIROGLU, Law(0, 1e-9, 1e9, 2.9, 0.011), Law(0, 1e300, 1e-300, 0.011, 2.9)):
        try:
            best = optimum(law, flops, tokens)
        except ValueError as error:
            assert "less than one parameter" in str(error)
            continue
        assert 1 <= best.parameters < math.inf and 1 <= best.tokens < math.inf and 0 < best.loss < math.inf


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"alpha": None}, "has alpha None, wanted a finite number"),
        ({"E": "1.7"}, "has E '1.7'"),
        ({"B": True}, "has B True"),
        ({"A": math.nan}, "has A nan"),
        ({"A": -1.0}, "A, B, alpha and beta must be positive"),
        ({"B": 0}, "A, B, alpha and beta must be positive"),
        ({"E": -1.0}, "and E 0 or more"),
        ({"alpha": 0.01}, "has alpha 0.01, at or beyond the bounds of fits"),
        ({"beta": 3.0}, "has beta 3, at or beyond the bounds of fits"),
        ({"alpha": 0}, "has alpha 0, at or beyond"),
        ({"ranges": {"parameters": [0, 1e9]}}, r"has ranges\.parameters \[0, 10{9}\.0\]"),
        ({"ranges": {"tokens": [1e9]}}, r"has ranges\.tokens \[1"),
        ({"ranges": {"tokens": ["1", 2]}}, r"has ranges\.tokens \['1', 2\], wanted two positive numbers"),
        ({"ranges": [1, 2]}, r"has ranges \[1, 2\], wanted an object"),
        ({"warnings": "odd"}, "warnings that are no list"),
        ({"size": 3}, "a size that is no text"),
        ({"E": 10**400}, "wanted a finite number"),
        ({"intervals": {"E": [1]}}, "has intervals {'E': .1.}, wanted two numbers of each name"),
        ({"check": [{"parameters": 1}]}, "has check .*, wanted objects with parameters, tokens, predicted"),
        ({"points": "9"}, "has points or an error that are no numbers"),
    ],
)
def test_plans_refuse_what_is_no_fit(changed: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "fit.json").write_text(json.dumps({**vars(BESIROGLU), **changed}))
    with pytest.raises(ValueError, match=said):
        plan(tmp_path / "fit.json", 1e20)


def test_plans_need_no_more_than_a_law(tmp_path: Path) -> None:
    (tmp_path / "fit.json").write_text(json.dumps({**vars(BESIROGLU), "ranges": {"odd": [1, 2]}}))
    assert plan(tmp_path / "fit.json", 1e20).warnings == []
    for text in ("[1]", "nonsense", "null"):
        (tmp_path / "fit.json").write_text(text)
        with pytest.raises(ValueError, match=r"fit\.json (has E None|is no JSON)"):
            plan(tmp_path / "fit.json", 1e20)


def test_plans_say_that_a_fit_is_not_of_active_parameters(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", drawn(BESIROGLU, 5, 5), total_parameters=1.0)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**row, "total_parameters": 4 * row["parameters"]}) + "\n" for row in rows))
    for size, count in (("parameters", 0), ("total_parameters", 1)):
        values = fit_points(path, FAST, size)
        assert values["size"] == size and values["loss_key"] == "loss"
        (tmp_path / "fit.json").write_text(json.dumps(values))
        warnings = plan(tmp_path / "fit.json", 1e17).warnings
        assert sum("the fit is of total_parameters, and C is 6·N·D" in warning for warning in warnings) == count


# ---- checks, repeated documents, rates, emergence


def test_larger_trainings_check_the_law_and_are_no_part_of_it(tmp_path: Path) -> None:
    points = drawn(BESIROGLU, 6, 6, noise=0.002)
    path = write(tmp_path / "p.jsonl", points)
    plain = fit_points(path, FAST)
    with path.open("a") as stream:
        right = float(BESIROGLU.loss(8e9, 1e11))
        for loss in (right, right * 1.2):
            stream.write(json.dumps({"parameters": 8e9, "tokens": 1e11, "loss": loss, "check": True}) + "\n")
        stream.write(json.dumps({"parameters": 1e8, "tokens": 1e9, "loss": 9.0, "epochs": 8.0}) + "\n")
    values = fit_points(path, FAST)
    assert {name: values[name] for name in ("E", "alpha", "points")} == {
        name: plain[name] for name in ("E", "alpha", "points")
    }
    assert [row["is_right"] for row in values["check"]] == [True, False]
    assert values["check"][0]["times_larger"] == pytest.approx(8)
    assert values["repeated"][0]["loss"] == 9.0 and values["repeated"][0]["as_new"] < 9.0


def test_one_law_is_fitted_to_what_is_chosen(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", drawn(BESIROGLU, 5, 5, noise=0), variant="dense", loss_by_source={"text": 1.0})
    other = drawn(SMALL, 5, 5, noise=0)
    with path.open("a") as stream:
        for n, d, loss in other.rows():
            row = {"parameters": 1.0, "active": n, "tokens": d, "loss": 1.0, "loss_by_source": {"text": loss}}
            stream.write(json.dumps({**row, "variant": "experts"}) + "\n")
    values = fit_points(path, FAST, "active", "loss_by_source.text", {"variant": "experts"})
    assert values["alpha"] == pytest.approx(SMALL.alpha, rel=0.01)
    assert values["only"] == {"variant": "experts"}
    with pytest.raises(ValueError, match=r"has points of dense, experts, of which each has a law.*variant=dense"):
        fit_points(path, FAST)
    with pytest.raises(ValueError, match="no points where variant is none"):
        fit_points(path, FAST, only={"variant": "none"})


def test_the_best_rate_and_batch_of_each_size_and_length_are_fitted(tmp_path: Path) -> None:
    """The others move nothing; what isn't everywhere is told."""
    points = drawn(BESIROGLU, 5, 5, noise=0)
    lines = [
        {"parameters": n, "tokens": d * (1.01 if batch == 4 else 1.0), "loss": loss * times, "rate": rate,
         "batch_size": batch}
        for n, d, loss in points.rows()
        for rate, batch, times in ((1, 2, 1.0), (2, 2, 1.1), (0.5, 2, 1.05), (1, 4, 1.2))
    ]  # fmt: skip
    path = tmp_path / "p.jsonl"

    def fitted(rows: list[dict[str, Any]]) -> dict[str, Any]:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return fit_points(path, FAST)

    values = fitted(lines)
    assert values["points"] == 25 and values["not_best"] == 75 and values["warnings"] == []
    assert values["alpha"] == pytest.approx(BESIROGLU.alpha, rel=0.01)
    assert "left out: 75 points whose rate or batch isn't the best" in "\n".join(fit_lines(values | {"intervals": {}}))
    some = [row for row in lines if row["batch_size"] == 2 and (row["rate"] == 1 or row["parameters"] > 1e8)]
    assert any("are of rate 0.5, 1, 2, and not all sizes" in warning for warning in fitted(some)["warnings"])
    shared = [{**row, "share": share} for row in lines for share in (0.5, 1.0)]
    assert any("are of share 0.5, 1.0" in warning for warning in fitted(shared)["warnings"])


def test_points_of_repeated_documents_alone_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", drawn(BESIROGLU, 5, 5), epochs=2.5)
    with pytest.raises(ValueError, match=r"points of more than 1\.05 epochs alone, 25 of them"):
        fit_points(path, FAST)
    write(path, drawn(BESIROGLU, 5, 5), epochs="two")
    with pytest.raises(ValueError, match=r"p\.jsonl:1 has epochs 'two'"):
        fit_points(path, FAST)


def test_the_best_rate_of_a_larger_model_is_that_of_the_rule(tmp_path: Path) -> None:
    """Losses with a lowest point at 0.5·N^-0.3, and one size whose best rate was not reached."""
    lines = []
    for n in (1e5, 4e5, 1.6e6):
        for factor in (0.25, 0.5, 1.0, 2.0, 4.0):
            lr = 0.45 * n**-0.3 * factor
            lines.append(
                {"parameters": n, "tokens": 1e7, "loss": 3 + 0.1 * math.log(lr / (0.5 * n**-0.3)) ** 2, "lr": lr}
            )
    for lr in (0.1, 0.2, 0.4):
        lines.append({"parameters": 9e6, "tokens": 1e7, "loss": lr, "lr": lr})
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    values = fit_rates(path, parameters=1.28e7)
    assert values["exponent"] == pytest.approx(-0.3, abs=1e-6)
    assert values["predicted"]["lr"] == pytest.approx(0.5 * 1.28e7**-0.3, rel=1e-6)
    assert len(values["warnings"]) == 1 and "at the end of those tried" in values["warnings"][0]
    two = [
        {**line, "variant": name, "lr": line["lr"] * by} for name, by in (("adamw", 1), ("sgd", 9)) for line in lines
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in two))
    mixed = fit_rates(path, parameters=1.28e7)
    assert mixed["exponent"] is mixed["predicted"] is None and "adamw, sgd have a best lr each" in mixed["warnings"][-1]
    alone = fit_rates(path, parameters=1.28e7, only={"variant": "sgd"})
    assert alone["predicted"]["lr"] == pytest.approx(9 * values["predicted"]["lr"], rel=1e-6)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines[-3:]))
    with pytest.raises(ValueError, match="no best lr is told"):
        fit_rates(path)


def test_an_exact_score_comes_at_once_where_its_parts_come_evenly(tmp_path: Path) -> None:
    """Whole answers of 12 parts: parts grow evenly, whole ones (their 12th power) late and steeply."""
    lines = []
    for place, share in enumerate(np.linspace(0.3, 0.99, 8)):
        for wobble in (-0.001, 0.001):
            scores = {"exact_match": (share + wobble) ** 12, "attribute_accuracy": share + wobble}
            lines.append({"parameters": 10.0**place, "tokens": 1e6, "loss": 2.0 - share, "scores": scores})
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    values = emergence(path, "exact_match", "attribute_accuracy")
    assert len(values["rows"]) == 8
    assert values["sharpness"]["attribute_accuracy"] == pytest.approx(1 / 7, rel=1e-6)
    assert values["sharpness"]["exact_match"] > 0.5
    assert "sharpness of exact_match" in "\n".join(emergence_lines(values))
    assert emergence(path, "exact_match", "loss")["sharpness"]["loss"] == pytest.approx(1 / 7, rel=1e-6)
    with pytest.raises(ValueError, match="has wer None; its scores are exact_match, attribute_accuracy"):
        emergence(path, "wer", "loss")
    two = [{**line, "variant": name} for name in ("dense", "experts") for line in lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in two))
    with pytest.raises(ValueError, match="has points of dense, experts; choose one: --only variant=dense"):
        emergence(path, "exact_match", "attribute_accuracy")
    assert emergence(path, "exact_match", "loss", {"variant": "dense"})["sharpness"] == pytest.approx(
        {"exact_match": values["sharpness"]["exact_match"], "loss": 1 / 7}, rel=1e-6
    )


# ---- the command line


def test_fit_and_plan_by_the_command_line(tmp_path: Path, capsys: Any) -> None:
    points, fit, planned = (str(tmp_path / name) for name in ("p.jsonl", "fit.json", "plan.json"))
    write(Path(points), drawn(BESIROGLU, 6, 6))
    assert main(["scaling", "fit", points, "--json", fit, "--resamples", "20"]) == 0
    values = json.loads(Path(fit).read_text())
    assert {"E", "A", "B", "alpha", "beta", "intervals", "warnings"} <= set(values)
    assert main(["scaling", "plan", fit, "--flops", "1e17", "--inference_tokens", "1e9", "--json", planned]) == 0
    values = json.loads(Path(planned).read_text())
    assert 6 * values["parameters"] * values["tokens"] + 2 * values["parameters"] * 1e9 == pytest.approx(1e17)
    assert "alpha" in capsys.readouterr().out
    Path(points).write_text("".join(Path(points).read_text().splitlines(keepends=True)[:4]))
    assert main(["scaling", "fit", points]) == 2
    assert "4 points can't tell a law" in capsys.readouterr().err
    assert main(["scaling", "plan", points, "--flops", "1e17"]) == 2
    assert main(["scaling", "fit", points, "--only", "variant"]) == 2
    assert "give KEY=VALUE" in capsys.readouterr().err
