"""Settings wherever text is written: what may be given by keyword, checked, and the requests that it makes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

from mmllm.checkpoints.settings import GenerationConfig, Sampling
from mmllm.data.samples.document import Document
from mmllm.inference import arguments
from mmllm.inference.engine.requests import MAX_BEAMS, ConstraintMaker, EarlyStopping, TextRequest
from mmllm_tokenizers.folder import TokenizerFolder

STRIDE = 2_654_435_761
"""2**32 over the golden ratio: multiples of it fall far apart among 2**32 numbers (Knuth, volume 3, section 6.4)."""
MAX_TRIES = 1024
MAX_STOPS = 256
MAX_SEED = 2**32 - 1
"""More than this PyTorch's generator doesn't keep of a seed."""
_CONSTRAINTS = ("choices", "regex", "json_schema")
_MOVED = {
    "batch_size": "how many are answered at once is the engine's: mmllm.load(folder, engine=EngineConfig(max_rows=8))",
    "blind": "it is evaluation's: see `mmllm eval`",
    "num_logprobs": "give logprobs",
}


class TextSettings(TypedDict, total=False):
    """Keyword arguments wherever text is written; what is left out comes from the model's `generation`.

    How tokens are drawn: `temperature` 0 takes the most probable one; `top_k` draws among so many, `top_p` among the
    fewest of this probability together, `min_p` among those at least so probable in relation to the best one,
    `typical_p` among those nearest to what is expected (arXiv:2202.00666). `repetition_penalty` divides or multiplies
    the logits of what was there before (arXiv:1909.05858); `frequency_penalty` and `presence_penalty` are taken from
    the logits of what was written, the first for each time. `logit_bias` is added to the logits of token ids.
    What is drawn depends on the prompt and `seed` alone, whatever is answered beside it.

    Where it ends: `max_new_tokens` at most, the end included; no end before `min_new_tokens`; before a text of `stop`,
    or with a token id of `stop_ids`.

    What it may be: one of the texts `choices`, a text that all of the pattern `regex` matches, or JSON that follows
    `json_schema`.

    What is told of it: `logprobs` 0 (the default) gives the log-probability of each token, 5 those of the five most
    probable ones beside it, None nothing, and no confidence either; `prompt_logprobs` those of the prompt.
    `best_of` answers are drawn to each prompt, of which the one of the highest mean log-probability is given.

    `num_beams` above 1 searches in the place of drawing: so many texts are gone on with side by side, as transformers
    does. A text's log-probability is divided by its length to the power `length_penalty`; `early_stopping` True ends
    the search with `num_beams` texts that have ended, False when none that goes on is better now, "never" when none
    can become better.
    """

    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    seed: int
    max_new_tokens: int
    min_new_tokens: int
    stop: str | Sequence[str]
    stop_ids: Sequence[int]
    logit_bias: Mapping[int, float]
    logprobs: int | None
    prompt_logprobs: bool
    choices: Sequence[str] | None
    regex: str | None
    json_schema: Mapping[str, Any] | None
    best_of: int
    num_beams: int
    length_penalty: float
    early_stopping: bool | Literal["never"]


@dataclass(frozen=True)
class TextOptions:
    """`TextSettings`, checked and with the model's defaults.

    Attributes:
        sampling: how ids are drawn.
        max_new_tokens: at most so many, the end included.
        min_new_tokens: no end before so many.
        stop: strings before which the text ends.
        stop_ids: ids that end it.
        logit_bias: by id.
        num_logprobs: as of a `TextRequest`.
        prompt_logprobs: likewise.
        constraint: the setting that says what the text may be, and its value.
        num_texts: completions that are given of each prompt.
        num_tries: completions that are drawn of each prompt.
        num_beams: as of a `TextRequest`.
        length_penalty: likewise.
        early_stopping: likewise.
    """

    sampling: Sampling
    max_new_tokens: int
    min_new_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    num_logprobs: int | None = 0
    prompt_logprobs: bool = False
    constraint: tuple[str, Any] | None = None
    num_texts: int = 1
    num_tries: int = 1
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False

    def requests(self, prompt: Document, maker: ConstraintMaker | None) -> list[TextRequest]:
        """One for each try at a prompt."""
        first = TextRequest(
            prompt,
            self.sampling,
            self.max_new_tokens,
            self.min_new_tokens,
            0,
            self.stop,
            self.stop_ids,
            self.logit_bias,
            maker,
            self.num_logprobs,
            self.prompt_logprobs,
            self.num_beams,
            self.length_penalty,
            self.early_stopping,
        )
        return [first] + [dataclasses.replace(first, number=try_number(place)) for place in range(1, self.num_tries)]

    def compiled(self, tokenizer: TokenizerFolder) -> ConstraintMaker | None:
        """What the text may be, told token by token.

        Raises:
            ValueError: no text could be so.
        """
        if self.constraint is None:
            return None
        from mmllm.inference import constraints  # compilers of grammars aren't imported where nobody asks for them

        name, value = self.constraint
        match name:
            case "choices":
                return constraints.choices(tokenizer, value)
            case "regex":
                return constraints.regex(tokenizer, value)
        return constraints.json_schema(tokenizer, value)


def text_options(
    settings: Mapping[str, Any], defaults: GenerationConfig, tokenizer: TokenizerFolder, n: int | None = None
) -> TextOptions:
    """The options that settings make, with a model's defaults.

    Args:
        settings: see `TextSettings`.
        defaults: of the model.
        tokenizer: of the model, whose ids are meant.
        n: completions of each prompt that are asked for.

    Raises:
        ValueError: a setting is unknown, of a wrong type or value; it is named.
    """
    check_names(settings, TextSettings)
    num_ids = tokenizer.vocabulary.num_text
    sampling = sampling_of(settings, defaults.text)
    given = dict(settings)
    most = arguments.whole("max_new_tokens", given.get("max_new_tokens", defaults.max_new_tokens), 1)
    least = arguments.whole("min_new_tokens", given.get("min_new_tokens", 0), 0, most)
    logprobs = given.get("logprobs", 0)
    if logprobs is not None:
        logprobs = arguments.whole("logprobs", logprobs, 0, num_ids)
    num_texts = 1 if n is None else arguments.whole("n", n, 1, MAX_TRIES)
    num_tries = arguments.whole("best_of", given.get("best_of", num_texts), num_texts, MAX_TRIES)
    if num_tries > 1 and (sampling.temperature == 0 or sampling.top_k == 1):
        name, value = ("n", num_texts) if num_texts > 1 else ("best_of", num_tries)
        raise ValueError(
            f"{name} is {value}, but nothing is left to chance, so that all are the same; give a temperature above 0"
        )
    beams = _beams(given)
    if beams[0] > 1 and num_tries > 1:
        raise ValueError(f"num_beams is {beams[0]} and {num_tries} answers are drawn; a search gives one: choose")
    if num_tries > num_texts and logprobs is None:
        raise ValueError(f"best_of is {num_tries}, which is told by logprobs, and logprobs is None; leave that out")
    return TextOptions(
        sampling,
        most,
        least,
        _stops(given.get("stop", ())),
        tuple(_ids("stop_ids", given.get("stop_ids", ()), num_ids)),
        _bias(given.get("logit_bias", {}), num_ids),
        logprobs,
        arguments.flag("prompt_logprobs", given.get("prompt_logprobs", False)),
        _constraint(given),
        num_texts,
        num_tries,
        *beams,
    )


def check_names(settings: Mapping[str, Any], wanted: type) -> None:
    """Refuses what isn't a setting.

    Raises:
        ValueError: an unknown name.
    """
    known = list(wanted.__annotations__)
    for name in settings:
        if name in known:
            continue
        hint = f"; {_MOVED[name]}" if name in _MOVED else arguments.near(name, known)
        raise ValueError(f"unknown setting {name!r}{hint}; wanted one of {', '.join(known)}")


def sampling_of(settings: Mapping[str, Any], default: Sampling) -> Sampling:
    """How ids are drawn, by settings of a `Sampling`'s names; what is left out is as by default.

    Raises:
        ValueError: one is of a wrong type or value.
    """
    given = {each.name: settings[each.name] for each in dataclasses.fields(Sampling) if each.name in settings}
    for name, value in given.items():
        match name:
            case "seed":
                given[name] = arguments.whole(name, value, 0, MAX_SEED)
            case "top_k":
                given[name] = None if value is None else arguments.whole(name, value, 1)
            case "top_p" | "min_p" | "typical_p":
                given[name] = None if value is None else arguments.real(name, value)
            case _:
                given[name] = arguments.real(name, value)
    return dataclasses.replace(default, **given)


def try_number(place: int) -> int:
    """The number by which a prompt's try draws: that of the first is 0.

    Below 2**32, since of a seed PyTorch's generator keeps no more: numbers that differ above would draw the same.
    """
    return place * STRIDE % 2**32


def _beams(given: Mapping[str, Any]) -> tuple[int, float, EarlyStopping]:
    num_beams = arguments.whole("num_beams", given.get("num_beams", 1), 1, MAX_BEAMS)
    penalty = arguments.real("length_penalty", given.get("length_penalty", 1.0))
    stopping = given.get("early_stopping", False)
    if stopping != "never":
        stopping = arguments.flag("early_stopping", stopping)
    others = [name for name in ("length_penalty", "early_stopping") if name in given]
    if num_beams == 1 and others:
        raise ValueError(f"{' and '.join(others)} is of a beam search; give num_beams, or leave it out")
    return num_beams, penalty, stopping


def _stops(value: Any) -> tuple[str, ...]:
    stops = arguments.texts("stop", value)
    if len(stops) > MAX_STOPS:
        raise ValueError(f"stop has {len(stops)} texts; give at most {MAX_STOPS}")
    if "" in stops:
        raise ValueError("stop holds an empty text; leave it out")
    return stops


def _ids(name: str, value: Any, num_ids: int) -> list[int]:
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise arguments.wrong(name, value, "a list of token ids")
    return [arguments.whole(f"{name}[{place}]", each, 0, num_ids - 1) for place, each in enumerate(value)]


def _bias(value: Any, num_ids: int) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise arguments.wrong("logit_bias", value, "a dict of token ids and numbers")
    ids = _ids("logit_bias", list(value), num_ids)
    return {key: arguments.real(f"logit_bias[{key}]", each) for key, each in zip(ids, value.values(), strict=True)}


def _constraint(settings: Mapping[str, Any]) -> tuple[str, Any] | None:
    given = [name for name in _CONSTRAINTS if settings.get(name) is not None]
    if not given:
        return None
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are given; a text can follow one of them: leave the others out")
    (name,), value = given, settings[given[0]]
    match name:
        case "choices":
            value = arguments.texts(name, value)
        case "regex":
            value = arguments.text(name, value)
        case _ if not isinstance(value, (Mapping, bool)):
            raise arguments.wrong(name, value, "a JSON schema as a dict")
    return name, value
