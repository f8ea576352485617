"""report.json and report.html of a tour: what each stage had to reach, what it reached, and examples."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from mmllm.checkout import commit
from mmllm.evaluation.charts import MODALITY_COLORS, Chart, line_chart
from mmllm.evaluation.media import EmbeddedImage, EmbeddedSound, MediaBudget
from mmllm.evaluation.report import now
from mmllm.quickstart.tour.stage import NOTES, PAGE_KEYS

REPORT_JSON = "report.json"
REPORT_HTML = "report.html"


@dataclass(frozen=True)
class Target:
    """What a stage is to reach."""

    key: str
    """Of the stage's part of report.json."""
    label: str
    must: float | None
    reach: float | None = None
    unit: str = "share"
    """How it is shown: "share" in percent, "change" likewise with its sign, "points" with its sign, "number"."""
    is_least: bool = True
    """Whether the number has to be so large; else so small."""

    def verdict(self, value: float | None) -> str:
        """What a value is: "reached", "passed", "missed" (of what it must), "not reached", or "not measured"."""
        if value is None:
            return "not measured"
        sign = 1 if self.is_least else -1
        if self.must is not None and sign * (value - self.must) < 0:
            return "missed"
        if self.reach is not None and sign * (value - self.reach) >= 0:
            return "reached"
        return "not reached" if self.must is None else "passed"

    def shown(self, value: float | None) -> str:
        """A value as the page has it."""
        if value is None:
            return "–"
        match self.unit:
            case "share":
                return f"{100 * value:.1f}%"
            case "change":
                return f"{100 * value:+.1f}%"
            case "points":
                return f"{value:+.1f}"
        return f"{value:g}"


_KL = Target("kl", "KL from the start, nats a sequence", 10, None, "number", False)
TARGETS: dict[str, tuple[Target, ...]] = {
    "sft": (
        Target("accuracy_300", "answers right after 300 questions of new types", 0.45, 0.65),
        Target("accuracy_3000", "answers right after 3,000", 0.70, 0.90),
        Target("forgetting_points", "points lost of captions or of transcripts", 5, 1, "points", False),
    ),
    "lora": (Target("gain_share", "of full fine-tuning's gain, by at most 3% of the parameters", 0.9, 1.0),),
    "dpo": (
        Target("length_change", "words an answer", -0.25, -0.35, "change", False),
        Target("exact_change", "captions exact, points", -2, 0, "points"),
    ),
    "grpo": (Target("error_cut", "of the captions' errors cut", 0.15, 0.35),),
    "trap": (Target("noticed_at_step", "a reward that counts words is noticed, at step", 100, None, "number", False),),
    "speech": (Target("error_cut", "of the other judge's word errors cut", 0.0, 0.20),),
    "merge": (
        Target("best_share_of_gain", "least share of two specialists' gains kept", 0.80, 0.95),
        Target("evolved_points", "evolved over the best, points", None, 2, "points"),
    ),
    "ppo": (Target("reward_change", "reward over the start", 0.0, None, "number"), _KL),
    "kto": (Target("reward_gain", "reward over the start", 0.0, None, "number"), _KL),
    "rm": (Target("reward_gain", "true reward of what it chooses over what is drawn", 0.0, None, "number"),),
}  # fmt: skip
TITLES = {
    "sft": "Supervised fine-tuning",
    "lora": "LoRA",
    "dpo": "DPO",
    "grpo": "GRPO on captions",
    "trap": "A reward to hack",
    "speech": "GRPO on speech",
    "merge": "Merging",
    "ppo": "PPO",
    "kto": "KTO",
    "rm": "Reward model",
    "incremental": "One task after the other",
}


def write_report(out: Path, seed: int) -> list[str]:
    """Writes both from the results of the stages that are done; gives the lines of what was reached."""
    done = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted((out / "stages").glob("*.json"))}
    done = {name: done[name] for name in TITLES if name in done}
    notes = json.loads((out / NOTES).read_text(encoding="utf-8"))
    results = {name: one["result"] for name, one in done.items()}
    minutes = {name: round(one["seconds"] / 60, 2) for name, one in done.items()}
    report: dict[str, Any] = {name: {key: value for key, value in result.items() if key not in PAGE_KEYS}
                              for name, result in results.items()}  # fmt: skip
    report |= {"minutes": {**minutes, "total": round(sum(minutes.values()), 2)}, "seed": seed, "commit": commit()}
    (out / REPORT_JSON).write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    rows = list(target_rows(results))
    page = _render(results, rows, minutes, notes.get("commands", {}), seed)
    (out / REPORT_HTML).write_text(page, encoding="utf-8")
    return [f"  {row['name']:<28}{row['got']:>14}   must {row['must']}, reach {row['reach']}: {row['verdict']}"
            for row in rows]  # fmt: skip


def target_rows(results: Mapping[str, Mapping[str, Any]]) -> Iterable[dict[str, str]]:
    """The table: what each stage that is done had to reach, and has reached."""
    for stage, result in results.items():
        for number, target in enumerate(TARGETS.get(stage, ())):
            value = result.get(target.key)
            yield {
                "stage": TITLES[stage] if number == 0 else "",
                "name": f"{stage}.{target.key}",
                "label": target.label,
                "must": target.shown(target.must),
                "reach": target.shown(target.reach),
                "got": target.shown(value),
                "verdict": target.verdict(value),
            }


# --------------------------------------------------------------------------------------------------------- the page
@dataclass(frozen=True)
class Example:
    """What was shown and asked, what is right, and what each model answers."""

    parts: list[EmbeddedImage | EmbeddedSound | str]
    wanted: str
    answers: Mapping[str, str]
    group: str


def _render(
    results: Mapping[str, Mapping[str, Any]],
    rows: Sequence[Mapping[str, str]],
    minutes: Mapping[str, float],
    commands: Mapping[str, Mapping[str, Any]],
    seed: int,
) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mmllm.quickstart.tour", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    budget = MediaBudget()
    stages = [
        {
            "name": name,
            "title": TITLES[name],
            "minutes": minutes[name],
            "scores": list(_flat(result)),
            "notes": result.get("notes", ()),
            "charts": [_chart(plot) for plot in result.get("plots", ())],
            "examples": [_example(one, budget) for one in result.get("examples", ())],
        }
        for name, result in results.items()
    ]
    total = sum(minutes.values())
    return environment.get_template("report.html.j2").render(
        stages=stages, rows=rows, total=total, commands=commands, seed=seed, made_at=now()
    )


def _flat(result: Mapping[str, Any], before: str = "") -> Iterable[tuple[str, str]]:
    """A stage's numbers by their dotted names."""
    for key, value in result.items():
        if key in PAGE_KEYS and not before:
            continue
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", f"{value:.4g}" if isinstance(value, float) else str(value)


def _chart(plot: Mapping[str, Any]) -> Chart:
    return line_chart(plot["title"], {name: [(x, y) for x, y in points] for name, points in plot["curves"].items()})


def _example(one: Mapping[str, Any], budget: MediaBudget) -> Example:
    segments = list(one.get("segments", ()))
    segments += [{kind: one[kind]} for kind in ("image", "audio") if one.get(kind)]
    if one.get("prompt"):
        segments.append({"text": one["prompt"]})
    parts = [_part(segment, budget) for segment in segments]
    return Example([part for part in parts if part is not None], one.get("wanted", ""), one["answers"],
                   one.get("group", ""))  # fmt: skip


def _part(segment: Mapping[str, str], budget: MediaBudget) -> EmbeddedImage | EmbeddedSound | str | None:
    if "image" in segment:
        return budget.image(segment["image"])
    if "audio" in segment:
        return budget.sound(segment["audio"], MODALITY_COLORS["audio"])
    return segment["text"]
