"""How ids are drawn: the settings of sampling, and the defaults that a model folder keeps."""

from __future__ import annotations

import dataclasses
import numbers
import sys
from dataclasses import dataclass
from typing import Any

_PENALTIES = ("repetition_penalty", "frequency_penalty", "presence_penalty")


def _check_number(name: str, value: Any, default: Any) -> None:
    if value is None and default is None:
        return
    is_whole = name in ("top_k", "seed")
    if isinstance(value, bool) or not isinstance(value, numbers.Integral if is_whole else int | float):
        raise ValueError(f"{name} is {value!r}; it must be a {'whole ' if is_whole else ''}number")
    if isinstance(value, int | float) and not is_whole and not abs(value) <= sys.float_info.max:
        raise ValueError(f"{name} is {value}; it must be finite")


@dataclass(frozen=True)
class Sampling:
    """How one id is drawn from the decoder's probabilities.

    Logits are changed in this order: repetition penalty, frequency and presence penalty, temperature, top_k, top_p,
    min_p, typical_p; each filter renormalizes what the one before it has left. The order is that of transformers'
    `generate`, which has no frequency and presence penalty.
    """

    temperature: float = 0.0
    """0 takes the most probable id."""
    top_k: int | None = None
    """Draw among the `top_k` most probable ids; None: among all."""
    top_p: float | None = None
    """Draw among the fewest ids whose probability exceeds `top_p`; None: among all."""
    seed: int = 0
    """Of the generator; the same seed and prompts give the same draws."""
    min_p: float | None = None
    """Draw among ids at least so probable in proportion to the most probable one (arXiv:2407.01082); None: among all.
    """
    typical_p: float | None = None
    """Draw among the ids whose information is nearest to what is expected, which together are so probable
    (arXiv:2202.00666); None: among all."""
    repetition_penalty: float = 1.0
    """Logits of ids that the prompt or the text has are divided by it where positive, else multiplied
    (arXiv:1909.05858); above 1 repeats less."""
    frequency_penalty: float = 0.0
    """Taken from an id's logit for each time that the text has it, as OpenAI's; above 0 repeats less."""
    presence_penalty: float = 0.0
    """Taken once from the logit of each id that the text has, as OpenAI's."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_number(field.name, getattr(self, field.name), field.default)
        if not self.temperature >= 0:
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 1, or None for no limit")
        for name in ("top_p", "typical_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name} is {value}; it must be in (0, 1], or None for no limit")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}; it must be in [0, 1], or None for no limit")
        if not 0.01 <= self.repetition_penalty <= 100:
            raise ValueError(
                f"repetition_penalty is {self.repetition_penalty}; it must be from 0.01 to 100, 1 for none"
            )
        for name in ("frequency_penalty", "presence_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be from -2 to 2, 0 for none")

    @property
    def has_penalties(self) -> bool:
        """Whether what is drawn depends on the ids before it, beside the model's own memory of them."""
        return (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) != (1, 0, 0)


@dataclass(frozen=True)
class GenerationConfig:
    """Defaults of a model: `generation_config.json`."""

    max_new_tokens: int = 128
    """Text tokens written at most, the end included."""
    max_seconds: float = 12.0
    """Speech at most."""
    batch_size: int = 64
    """Prompts that are answered at once."""
    text: Sampling = Sampling()
    speech: Sampling = Sampling(temperature=0.7, top_k=50)
    speech_temperatures: tuple[float, ...] = ()
    """Of each codebook; empty: that of `speech`."""
    max_heard_seconds: float | None = None
    """The longest sound that training heard. Longer ones are transcribed in windows, and refused elsewhere. None: not
    known."""
    usual_heard_seconds: float | None = None
    """Half of the time that training heard sounds, they were no longer than this: what windows are cut to. None: not
    known."""
    max_length: int | None = None
    """Positions of a prompt and its text together: training's sequences held no more. Models whose layers all have a
    window need no bound. None: not known."""
    voices: tuple[str, ...] = ()
    """Speakers that the model speaks as and that can be asked for by name; empty: not known."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "max_seconds", "batch_size"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        for name in ("max_heard_seconds", "usual_heard_seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}; it must be positive, or null")
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length is {self.max_length}; it must be at least 2, or null")
        if self.speech.has_penalties:
            raise ValueError(f"speech has {' or '.join(_PENALTIES)}, which are of text; leave them out")

    def to_dict(self) -> dict[str, Any]:
        """As JSON keeps it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GenerationConfig:
        """The inverse of `to_dict`.

        Raises:
            ValueError: an unknown key, or a bad value.
        """
        _check_keys(cls, values, "")
        values = dict(values)
        for name in ("text", "speech"):
            if name in values:
                _check_keys(Sampling, values[name], f"{name}.")
                values[name] = Sampling(**values[name])
        for name in ("voices", "speech_temperatures"):
            if name in values:
                values[name] = tuple(values[name])
        return cls(**values)


def _check_keys(config: type, values: Any, prefix: str) -> None:
    known = [f.name for f in dataclasses.fields(config)]
    if not isinstance(values, dict):
        raise ValueError(f"{prefix or 'the generation config'} is {values!r}; wanted an object with keys {known}")
    for name in values:
        if name not in known:
            raise ValueError(f"unknown key {prefix}{name}; wanted one of {known}")
