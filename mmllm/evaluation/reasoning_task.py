"""Ways to reason beside one another: accuracy and cost of each on questions about interleaved pictures and sounds."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from mmllm.checkpoints.settings import Sampling
from mmllm.data.rows.bad_rows import BadRows, ManifestError
from mmllm.data.rows.column_names import ColumnNames
from mmllm.data.rows.forms import read_rows
from mmllm.data.rows.readable import readable_rows
from mmllm.data.rows.rows import Row
from mmllm.evaluation.answer_task import prompt_segments
from mmllm.evaluation.metrics import exact_match, text_meaning
from mmllm.evaluation.scoring import causes, mean_scores
from mmllm.evaluation.tasks import short_enough
from mmllm.inference.api import Model
from mmllm.inference.reasoning.asking import Reasoned, Shot
from mmllm.inference.reasoning.effort import (
    SureConfig,
    ThresholdPoint,
    by_difficulty,
    choose_threshold,
    effort_trials,
    threshold_curve,
)
from mmllm.inference.reasoning.shots import few_shot
from mmllm.inference.reasoning.thoughts import ThinkConfig, think
from mmllm.inference.reasoning.tree import TreeConfig, tree_search
from mmllm.inference.reasoning.votes import self_consistency
from mmllm.inference.voting import Vote, VotingConfig

Method = Literal["direct", "vote", "adaptive", "difficulty", "tree", "cot", "few_shot"]
METHODS: tuple[Method, ...] = get_args(Method)


@dataclass(frozen=True)
class ReasoningConfig:
    """How the methods are run.

    Attributes:
        num_votes: of `vote`, `adaptive` and `difficulty` at most.
        temperature: of votes.
        confidence: at which `adaptive` ends a vote.
        sure: of `difficulty`; where there are validation rows its threshold is chosen on them.
        tree: of `tree`.
        tree_temperature: likewise.
        think: of `cot`.
        max_length: positions of a prompt and its answer, for `few_shot` and `cot`; None: as the model says.
        seed: of all that is drawn.
    """

    num_votes: int = 8
    temperature: float = 0.5
    confidence: float = 0.95
    sure: SureConfig = field(default_factory=SureConfig)
    tree: TreeConfig = field(default_factory=lambda: TreeConfig(budget=48, branches=4, step_tokens=4))
    tree_temperature: float = 0.7
    think: ThinkConfig = field(default_factory=lambda: ThinkConfig(max_thought_tokens=32))
    max_length: int | None = None
    seed: int = 0

    @property
    def voting(self) -> VotingConfig:
        """Of votes."""
        return VotingConfig(self.num_votes, Sampling(temperature=self.temperature, seed=self.seed))


@dataclass(frozen=True)
class MethodScore:
    """What a method reaches, and what it costs.

    Attributes:
        method: its name.
        accuracy: share of right answers.
        accuracy_ci: its interval.
        num_rows: questions.
        num_tokens: that are drawn for a question, on average.
        num_prompt_tokens: positions of a question's prompts.
        num_computed_tokens: of these, those that weren't in the engine's cache.
        seconds: of all questions together, with this machine's load.
        num_gained: questions that it has right, and the first method wrong.
        num_lost: the other way round.
        decided: what the method decided, in numbers of its own.
    """

    method: str
    accuracy: float
    accuracy_ci: list[float]
    num_rows: int
    num_tokens: float
    num_prompt_tokens: float
    num_computed_tokens: float
    seconds: float
    num_gained: int
    num_lost: int
    decided: dict[str, float]


@dataclass(frozen=True)
class ReasoningResult:
    """All methods' scores.

    Attributes:
        scores: one a method.
        curve: of `difficulty`, where its threshold was chosen: what thresholds give on the validation rows.
        predictions: one a row: its id, question, reference, and each method's answer.
    """

    scores: list[MethodScore]
    curve: list[ThresholdPoint]
    predictions: list[dict[str, str]]

    def save(self, path: str | Path) -> None:
        """Writes it as JSON; creates the folder."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Questions:
    """Rows as a model is asked them."""

    rows: Sequence[Row]

    @property
    def parts(self) -> list[Any]:
        """What each question is about."""
        return [prompt_segments(row) for row in self.rows]

    @property
    def questions(self) -> list[str]:
        """What is asked."""
        return [str(row.metadata["question"]) for row in self.rows]

    @property
    def references(self) -> list[str]:
        """The answers."""
        return [str(row.metadata["answer"]) for row in self.rows]

    def shots(self, num_shots: int, seed: int) -> list[Shot]:
        """Some of them with their answers, drawn at random.

        Raises:
            ValueError: there are not as many.
        """
        if len(self.rows) < num_shots:
            raise ValueError(f"{num_shots} shots are asked for, and there are {len(self.rows)} rows; ask for fewer")
        drawn = random.Random(f"shots {seed}").sample(range(len(self.rows)), num_shots)
        parts, questions, references = self.parts, self.questions, self.references
        return [(parts[place], questions[place], references[place]) for place in drawn]


def read_questions(
    path: str | Path,
    model: Model,
    limit: int | None = None,
    seed: int = 0,
    max_bad_fraction: float = 0.05,
    form: str = "auto",
    columns: ColumnNames | None = None,
) -> Questions:
    """A manifest's rows that ask something.

    Args:
        path: input of any form.
        model: that is to hear their sounds.
        limit: at most so many, drawn at random.
        seed: of that draw.
        max_bad_fraction: more unusable rows than this are an error.
        form: of the input; "auto": told from it.
        columns: what its columns are called here.

    Raises:
        ValueError: there are none, or too many can't be read.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1, or None for all rows")
    bad = BadRows(max_bad_fraction)
    rows = [row for row in read_rows(path, bad, form, columns=columns) if row.kind == "interleaved"]
    rows = [row for row in rows if "question" in row.metadata and "answer" in row.metadata]
    if not rows:
        raise ManifestError(f"{path} has no rows with segments, a question and an answer; give another manifest")
    if limit is not None and limit < len(rows):
        rows = [rows[place] for place in sorted(random.Random(f"limit {seed}").sample(range(len(rows)), limit))]
    unreadable = BadRows(max_bad_fraction)
    rows = readable_rows(rows, unreadable, str(path))
    return Questions(short_enough(rows, model.generation.max_heard_seconds, unreadable, str(path)))


def score_methods(
    model: Model,
    questions: Questions,
    methods: Sequence[Method],
    config: ReasoningConfig | None = None,
    validation: Questions | None = None,
    shots: Sequence[Shot] = (),
    note: Callable[[str], None] | None = None,
) -> ReasoningResult:
    """Answers all questions by each method. Each has an engine of its own, so that none finds another's cache.

    Args:
        model: that answers.
        questions: test rows.
        methods: the first one is what gains and losses are counted against.
        config: how they are run.
        validation: rows to choose the threshold of `difficulty` on; None: it is as `config.sure` says.
        shots: of `few_shot`.
        note: called with what is being done.

    Raises:
        ValueError: a method is unknown or given twice, or lacks what it needs.
    """
    config = config or ReasoningConfig()
    for place, method in enumerate(methods):
        if method not in METHODS or method in methods[:place]:
            raise ValueError(f"method {method!r} is unknown or given twice; choose among {', '.join(METHODS)}")
    if "few_shot" in methods and not shots:
        raise ValueError("few_shot needs shots, and there are none; give a manifest of answered questions")
    settings = {"max_new_tokens": _room(model, questions)}
    curve: list[ThresholdPoint] = []
    if validation is not None and "difficulty" in methods:
        _note(note, f"choosing a threshold on {len(validation.rows)} validation rows")
        curve = threshold_curve(_trials(_anew(model), validation, config, settings))
        config = replace(config, sure=replace(config.sure, threshold=choose_threshold(curve).threshold))
    answers: dict[str, tuple[list[Any], float]] = {}
    for method in methods:
        _note(note, f"{method}: {len(questions.rows)} questions")
        fresh, began = _anew(model), time.perf_counter()
        answers[method] = _answers(fresh, questions, method, config, shots, settings), time.perf_counter() - began
    right = {method: _right(questions, made) for method, (made, _) in answers.items()}
    scores = [
        _score(questions, method, made, seconds, right[method], right[methods[0]], config)
        for method, (made, seconds) in answers.items()
    ]
    predictions = [
        {
            "id": row.id,
            "question": str(row.metadata["question"]),
            "reference": str(row.metadata["answer"]),
            **{method: str(made[place]) for method, (made, _) in answers.items()},
        }
        for place, row in enumerate(questions.rows)
    ]
    return ReasoningResult(scores, curve, predictions)


def _answers(
    model: Model, questions: Questions, method: Method, config: ReasoningConfig, shots: Sequence[Shot],
    settings: dict[str, Any],
) -> list[Any]:  # fmt: skip
    parts, asked, greedy = questions.parts, questions.questions, {**settings, "temperature": 0.0}
    match method:
        case "direct":
            return few_shot(model, (), parts, asked, **greedy)
        case "few_shot":
            return few_shot(model, shots, parts, asked, max_length=config.max_length, **greedy)
        case "cot":
            return think(model, parts, asked, config=config.think, max_length=config.max_length, **greedy)
        case "vote":
            return self_consistency(model, parts, asked, config.voting, meaning=text_meaning, **settings)
        case "adaptive":
            return self_consistency(
                model, parts, asked, config.voting, meaning=text_meaning, confidence=config.confidence, **settings
            )
        case "difficulty":
            return by_difficulty(model, parts, asked, config.sure, config.voting, meaning=text_meaning, **settings)
        case "tree":
            return tree_search(
                model, parts, asked, config.tree, temperature=config.tree_temperature, seed=config.seed, **settings
            )


def _trials(model: Model, validation: Questions, config: ReasoningConfig, settings: dict[str, Any]) -> list[Any]:
    references = validation.references
    return effort_trials(
        model,
        validation.parts,
        validation.questions,
        lambda place, text: exact_match(text, references[place]),
        config.sure,
        config.voting,
        meaning=text_meaning,
        **settings,
    )


def _score(
    questions: Questions, method: str, answers: Sequence[Reasoned | Vote], seconds: float, right: Sequence[bool],
    first: Sequence[bool], config: ReasoningConfig,
) -> MethodScore:  # fmt: skip
    num_rows, scores = len(answers), mean_scores("accuracy", right, config.seed, causes(questions.rows))
    num_prompt = sum(one.num_prompt_tokens for one in answers)
    num_cached = sum(one.num_cached_tokens for one in answers)
    return MethodScore(
        method,
        scores["accuracy"],
        scores["accuracy_ci"],
        num_rows,
        sum(one.num_tokens for one in answers) / num_rows,
        num_prompt / num_rows,
        (num_prompt - num_cached) / num_rows,
        seconds,
        sum(mine and not theirs for mine, theirs in zip(right, first, strict=True)),
        sum(theirs and not mine for mine, theirs in zip(right, first, strict=True)),
        _decided(method, answers, config),
    )


def _decided(method: str, answers: Sequence[Any], config: ReasoningConfig) -> dict[str, float]:
    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    match method:
        case "vote" | "adaptive":
            return {
                "votes": mean([one.num_votes for one in answers]), "agreement": mean([one.agreement for one in answers])
            }  # fmt: skip
        case "difficulty":
            return {"threshold": config.sure.threshold, "at once": mean([one.is_sure for one in answers])}
        case "tree":
            return {
                "nodes": mean([one.num_nodes for one in answers]), "ended": mean([one.is_finished for one in answers]),
                "most tokens": max(one.num_tokens for one in answers),
            }  # fmt: skip
        case "few_shot":
            return {"shots": mean([len(one.shots) for one in answers])}
        case "cot":
            return {"found": mean([one.is_found for one in answers])}
    return {}


def score_table(result: ReasoningResult) -> list[str]:
    """The scores as lines to print."""
    first = result.scores[0].method
    lines = [
        f"{'method':<12}{'accuracy':>9}  {'95% interval':<16}{f'beside {first}':>16}{'tokens':>9}{'prompt':>9}"
        f"{'computed':>9}{'seconds':>9}  decided"
    ]
    for one in result.scores:
        low, high = one.accuracy_ci
        gains = f"+{one.num_gained} -{one.num_lost}"
        decided = ", ".join(f"{name} {value:.4g}" for name, value in one.decided.items())
        lines.append(
            f"{one.method:<12}{one.accuracy:>9.3f}  {f'[{low:.3f}, {high:.3f}]':<16}{gains:>16}{one.num_tokens:>9.1f}"
            f"{one.num_prompt_tokens:>9.0f}{one.num_computed_tokens:>9.0f}{one.seconds:>9.1f}  {decided}".rstrip()
        )
    return [*lines, f"{result.scores[0].num_rows} questions; tokens are those drawn for one, prompt positions likewise"]


def _right(questions: Questions, answers: Sequence[Reasoned | Vote]) -> list[bool]:
    return [exact_match(one.text, reference) for one, reference in zip(answers, questions.references, strict=True)]


def _room(model: Model, questions: Questions) -> int:
    """Twice the longest reference, as `mmllm eval` gives, so that a model that rambles is stopped."""
    longest = max(len(model.tokenizer.text.encode(reference)) for reference in questions.references)
    return max(16, 2 * longest + 2)


def _anew(model: Model) -> Model:
    """The same weights with an empty cache."""
    return Model(model.model, model.tokenizer, model.image_transform, model.generation, model.engine.config)


def _note(note: Callable[[str], None] | None, text: str) -> None:
    if note is not None:
        note(text)
