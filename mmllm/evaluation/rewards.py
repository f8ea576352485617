"""Rewards of answers, for training from rewards and for labelling candidates: plain functions.

A reward is called with answers and their rows and gives a number each, larger ones for better answers. An answer in
text is a string, one in speech a `SpokenAnswer`; a row has a manifest row's keys (`text`, `objects`, `relations`,
`question`, `answer`, …). Rewards are named in configs: one of those here, or any importable "package.module:function",
with its settings:

>>> rewards = load_rewards([{"name": "words"}, {"name": "length", "weight": 0.5, "target": 20}])
>>> rewards.score(["a cat"], [{"text": "a cat"}]).totals
[-5.5]
"""

from __future__ import annotations

import importlib
import inspect
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
from torch import Tensor

from mmllm.evaluation.captions import caption_matches, count_attributes, reference_scene
from mmllm.evaluation.metrics import exact_match, normalize_text, word_edits
from mmllm.evaluation.speech_task import Judge

if TYPE_CHECKING:
    import torch

    from mmllm.inference.api import Model

_ALMOST = 0.9
"""Of `caption_attributes`: what a caption gets at most that isn't wholly right."""
_MOST = 1e30
"""Magnitude below which weights are."""


class SpokenAnswer(Protocol):
    """Speech that a model made of a text."""

    @property
    def text(self) -> str:
        """What was to be said."""
        ...

    @property
    def codes_KF(self) -> Tensor:
        """int64."""
        ...

    @property
    def wave_T(self) -> Tensor:
        """float32 on the CPU."""
        ...

    @property
    def sample_rate(self) -> int:
        """Samples a second."""
        ...


Answer = str | SpokenAnswer
RewardRow = Mapping[str, Any]
Reward = Callable[[Sequence[Answer], Sequence[RewardRow]], Sequence[float]]
GetModel = Callable[[], "Model"]
"""Gives the model that is trained, or that answered."""
Device = str | Callable[[], "torch.device"]
"""Where a reward computes; a function is asked each time."""


@dataclass(frozen=True)
class Scores:
    """What rewards say of answers."""

    totals: list[float]
    """Weighted sums."""
    by_name: dict[str, list[float]]
    """Each reward's own numbers, without its weight."""


@dataclass(frozen=True)
class Rewards:
    """Several rewards, whose weighted sum counts.

    Attributes:
        rewards: by name.
        weights: one each.
    """

    rewards: dict[str, Reward]
    weights: tuple[float, ...]

    def score(self, answers: Sequence[Answer], rows: Sequence[RewardRow]) -> Scores:
        """All rewards of each answer.

        Raises:
            ValueError: a reward fails, gives another count than there are answers, or something that is no finite
                number; the reward and the row are named.
        """
        by_name = {name: checked(name, reward, answers, rows) for name, reward in self.rewards.items()}
        columns = zip(*by_name.values(), strict=True)
        totals = [float(sum(map(operator.mul, self.weights, each))) for each in columns]
        endless = next((place for place, total in enumerate(totals) if not math.isfinite(total)), None)
        if endless is not None:
            raise ValueError(
                f"the weighted sum of the rewards {', '.join(self.rewards)} is {totals[endless]} for row "
                f"{row_name(rows, endless)}; give smaller weights, or rewards of smaller numbers"
            )
        return Scores(totals, by_name)


def checked(name: str, reward: Reward, answers: Sequence[Answer], rows: Sequence[RewardRow]) -> list[float]:
    """What a reward gives, as floats.

    Raises:
        ValueError: as `Rewards.score`.
    """
    try:
        given = reward(list(answers), list(rows))  # its own: what it changes in them changes nothing here
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"the reward {name!r} failed on {len(answers)} answers, the first to row {row_name(rows, 0)}: "
            f"{type(error).__name__}: {error}"
        ) from error
    values = given.tolist() if isinstance(given, np.ndarray | Tensor) else given
    if not isinstance(values, Sequence) or isinstance(values, str | bytes) or len(values) != len(answers):
        count = f"{len(values)} numbers" if isinstance(values, Sequence) else type(values).__name__
        raise ValueError(
            f"the reward {name!r} gave {count} for {len(answers)} answers, the first to row {row_name(rows, 0)}; it "
            f"must give a number for each"
        )
    numbers = []
    for place, value in enumerate(values):
        try:
            number = math.nan if isinstance(value, str | bytes) else float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):  # the last one is a tensor's of several numbers
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(
                f"the reward {name!r} gave {value!r} for the answer {shown(answers[place])} to row "
                f"{row_name(rows, place)}; it must be a finite number"
            )
        numbers.append(number)
    return numbers


def row_name(rows: Sequence[RewardRow], place: int) -> str:
    """A row's id, for messages."""
    return repr(rows[place].get("id", place)) if place < len(rows) else "none"


def shown(answer: Answer) -> str:
    """The beginning of an answer, for messages."""
    text = answer if isinstance(answer, str) else answer.text
    short = repr(text if len(text) <= 80 else text[:77] + "…")
    return short if isinstance(answer, str) else f"(spoken) {short}"


# ---- text


def caption_attributes(answers: Sequence[Answer], rows: Sequence[RewardRow]) -> list[float]:
    """Share of a scene's attributes that a caption has right (see `mmllm.evaluation.captions.count_attributes`).

    It is 1 for a caption that says the whole scene and nothing else, and at most 0.9 for any other. A row without
    `objects` has the text that is wanted: 1 for that, else 0.
    """
    rewards = []
    for answer, row in zip(texts_of(answers, "caption_attributes"), rows, strict=True):
        scene = reference_scene(row)
        if caption_matches(answer, str(row.get("text", "")), scene):
            rewards.append(1.0)
        elif scene is None:
            rewards.append(0.0)
        else:
            right, total = count_attributes(answer, scene)
            rewards.append(_ALMOST * right / max(total, 1))
    return rewards


def exact_answer(answers: Sequence[Answer], rows: Sequence[RewardRow]) -> list[float]:
    """1 where an answer is the row's `answer` (or else its `text`) after normalization, 0 elsewhere."""
    given = texts_of(answers, "exact_answer")
    return [float(exact_match(answer, reference_of(row))) for answer, row in zip(given, rows, strict=True)]


def length(answers: Sequence[Answer], rows: Sequence[RewardRow], target: int | None = None) -> list[float]:
    """How short an answer is: minus its characters (of speech its seconds), or minus their distance to `target`."""
    sizes = [len(answer) if isinstance(answer, str) else len(answer.wave_T) / answer.sample_rate for answer in answers]
    return [-abs(size - (0 if target is None else target)) for size in sizes]


def words(answers: Sequence[Answer], rows: Sequence[RewardRow]) -> list[float]:
    """Number of words: a trap, which a model satisfies by saying more and not better."""
    return [float(len(answer.split())) for answer in texts_of(answers, "words")]


def format(answers: Sequence[Answer], rows: Sequence[RewardRow], pattern: str) -> list[float]:
    """1 where the whole answer, spaces around it apart, matches a regular expression; 0 elsewhere."""
    expression = re.compile(pattern, re.DOTALL)
    return [float(expression.fullmatch(answer.strip()) is not None) for answer in texts_of(answers, "format")]


def shorter_and_right(answers: Sequence[Answer], rows: Sequence[RewardRow]) -> list[float]:
    """0 for a wrong answer; for a right one more, the fewer words it has: 1 + 1 / words.

    Right is a caption that says a row's scene, or else the row's `answer` or `text`.
    """
    rewards = []
    for answer, row in zip(texts_of(answers, "shorter_and_right"), rows, strict=True):
        is_right = caption_matches(answer, reference_of(row), reference_scene(row))
        rewards.append(1 + 1 / max(len(normalize_text(answer).split()), 1) if is_right else 0.0)
    return rewards


def reference_of(row: RewardRow) -> str:
    """What the answer to a row should be.

    Raises:
        ValueError: it doesn't say.
    """
    for key in ("answer", "text"):
        if row.get(key) is not None:
            return str(row[key])
    raise ValueError(f"row {row.get('id')!r} has neither 'answer' nor 'text', so that no answer to it can be right")


def texts_of(answers: Sequence[Answer], name: str) -> list[str]:
    """The answers, if all of them are in text.

    Raises:
        ValueError: one is spoken.
    """
    texts = [answer for answer in answers if isinstance(answer, str)]
    if len(texts) != len(answers):
        raise ValueError(f"{name} rewards text, but an answer is spoken; take own_wer, judge_wer or length")
    return texts


# ---- speech


def judge_wer(answers: Sequence[Answer], rows: Sequence[RewardRow], judge: Judge) -> list[float]:
    """1 − word error rate of speech as a judge writes it down, who shares nothing with the model; at least 0."""
    spoken = spoken_of(answers, "judge_wer")
    heard = judge.transcribe([(answer.wave_T, answer.sample_rate) for answer in spoken])
    return _word_rewards(heard, spoken)


def own_wer(answers: Sequence[Answer], rows: Sequence[RewardRow], get_model: GetModel) -> list[float]:
    """1 − word error rate of speech as the model itself writes it down, from its sound; at least 0.

    A model may come to hear what it says as it was meant, however it sounds: have a judge beside it.
    """
    spoken = spoken_of(answers, "own_wer")
    model = get_model()
    longest = max(len(model.tokenizer.text.encode(answer.text)) for answer in spoken) if spoken else 0
    sounds: list[Any] = [(answer.wave_T, answer.sample_rate) for answer in spoken]
    heard = model.transcribe(sounds, max_new_tokens=2 * longest + 8, temperature=0.0)
    return _word_rewards([str(text) for text in heard], spoken)


def _word_rewards(heard: Sequence[str], spoken: Sequence[SpokenAnswer]) -> list[float]:
    pairs = zip(heard, spoken, strict=True)
    return [max(0.0, 1.0 - word_edits(text, answer.text).rate) for text, answer in pairs]


def spoken_of(answers: Sequence[Answer], name: str) -> list[SpokenAnswer]:
    """The answers, if all of them are spoken.

    Raises:
        ValueError: one is text.
    """
    spoken = [answer for answer in answers if not isinstance(answer, str)]
    if len(spoken) != len(answers):
        raise ValueError(f"{name} rewards speech, but an answer is text; rewards of text are {', '.join(_TEXT)}")
    return spoken


# ---- by name

_TEXT: dict[str, Callable[..., list[float]]] = {
    "caption_attributes": caption_attributes,
    "exact_answer": exact_answer,
    "length": length,
    "words": words,
    "format": format,
    "shorter_and_right": shorter_and_right,
}
BUILT_IN = (*_TEXT, "own_wer", "judge_wer", "reward_model")


def load_rewards(
    configs: Sequence[Mapping[str, Any] | str], get_model: GetModel | None = None, device: Device = "cpu"
) -> Rewards:
    """Rewards as a config names them.

    Args:
        configs: of each its `name` (one of `BUILT_IN`, or "package.module:function"), its `weight` (1 unless given),
            and its settings, as keys beside them; a name alone is one without settings.
        get_model: for `own_wer`.
        device: for `reward_model`.

    Raises:
        ValueError: none is named, one is unknown or named twice, or a setting is missing or unknown.
    """
    if not configs:
        raise ValueError(f"no reward is named; give a list such as [{{name: exact_answer}}] of {', '.join(BUILT_IN)}")
    rewards, weights = {}, []
    for config in configs:
        if not isinstance(config, str | Mapping):
            raise ValueError(f"a reward is {config!r}; give its name, or a mapping with name, weight and its settings")
        settings = {"name": config} if isinstance(config, str) else dict(config)
        name, weight = settings.pop("name", None), settings.pop("weight", 1.0)
        if not isinstance(name, str):
            raise ValueError(f"a reward is {config!r}, which has no name; choose among {', '.join(BUILT_IN)}")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not -_MOST < weight < _MOST:
            raise ValueError(f"the reward {name!r} has the weight {weight!r}; give a finite number, below 1e30")
        if name in rewards:
            raise ValueError(f"the reward {name!r} is named twice; name it once, with its weight")
        rewards[name] = load_reward(name, settings, get_model, device)
        weights.append(float(weight))
    return Rewards(rewards, tuple(weights))


def load_reward(
    name: str, settings: Mapping[str, Any], get_model: GetModel | None = None, device: Device = "cpu"
) -> Reward:
    """One reward; see `load_rewards`."""
    if name in _TEXT:
        return _with_settings(name, _TEXT[name], settings)
    match name:
        case "own_wer":
            _check_settings(name, settings, ())
            if get_model is None:
                raise ValueError("own_wer needs the model that speaks, which is not at hand here; take judge_wer")
            return partial(own_wer, get_model=get_model)
        case "judge_wer":
            _check_settings(name, settings, ("folder",))
            return partial(judge_wer, judge=Judge.load(settings["folder"]))
        case "reward_model":
            _check_settings(name, settings, ("folder",))
            return _reward_model(settings["folder"], device)
    return _with_settings(name, _imported(name), settings)


def _reward_model(folder: str, device: Device) -> Reward:
    from mmllm.inference.reward_model import RewardModel

    model = RewardModel.load(folder, device if isinstance(device, str) else "cpu")

    def score(answers: Sequence[Answer], rows: Sequence[RewardRow]) -> list[float]:
        if not isinstance(device, str):
            model.to(device())
        if not all("document" in row for row in rows):
            return model.score_texts(rows, texts_of(answers, "reward_model"))
        other = next((row for row in rows if row["tokenizer"] != model.tokenizer.hash), None)
        if other is not None:
            raise ValueError(
                f"the reward model in {folder} has the tokenizer {model.tokenizer.hash[:12]}, the model that answers "
                f"{other['tokenizer'][:12]}; train a reward model from a model with the same tokenizer folder"
            )
        return model.score([row["document"] for row in rows])

    return score


def _imported(name: str) -> Callable[..., Sequence[float]]:
    module_name, colon, function_name = name.partition(":")
    if not colon or not all(part.isidentifier() for part in (*module_name.split("."), function_name)):
        raise ValueError(
            f"the reward {name!r} is unknown; choose among {', '.join(BUILT_IN)}, or name a function of your own as "
            f"package.module:function"
        )
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (Exception, SystemExit) as error:  # a module can raise anything while it is imported
        why = str(error) if isinstance(error, ImportError | AttributeError) else f"{type(error).__name__}: {error}"
        raise ValueError(
            f"the reward {name!r} can't be imported: {why}; its module must be importable from where the command "
            f"runs (PYTHONPATH)"
        ) from error
    if not callable(function):
        raise ValueError(f"the reward {name!r} is {type(function).__name__}; wanted a function of (answers, rows)")
    return cast("Callable[..., Sequence[float]]", function)


def _with_settings(name: str, function: Callable[..., Sequence[float]], settings: Mapping[str, Any]) -> Reward:
    """The function with its settings, which are checked now and not in the middle of a training."""
    try:
        inspect.signature(function).bind([], [], **settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the reward {name!r} with the settings {dict(settings)}: {error}") from error
    return partial(function, **settings)


def _check_settings(name: str, settings: Mapping[str, Any], wanted: tuple[str, ...]) -> None:
    missing = [key for key in wanted if key not in settings]
    unknown = [key for key in settings if key not in wanted]
    if missing or unknown:
        what = f"lacks {missing[0]!r}" if missing else f"has no setting {unknown[0]!r}"
        raise ValueError(f"the reward {name!r} {what}; its settings are {', '.join(wanted) or 'none'}")
