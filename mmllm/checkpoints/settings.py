"""How ids are drawn: the settings of sampling, and the defaults that a model folder keeps."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sampling:
    """How one id is drawn from the decoder's probabilities."""

    temperature: float = 0.0
    """0 takes the most probable id."""
    top_k: int | None = None
    """Draw among the `top_k` most probable ids; None: among all."""
    top_p: float | None = None
    """Draw among the fewest ids whose probability exceeds `top_p`; None: among all."""
    seed: int = 0
    """Of the generator; the same seed and prompts give the same draws."""

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 1, or None for no limit")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be in (0, 1], or None for no limit")


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
    """Longer sounds are refused: training's sequences held no such; None: not known."""
    voices: tuple[str, ...] = ()
    """Speakers that the model speaks as and that can be asked for by name; empty: not known."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "max_seconds", "batch_size"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        if self.max_heard_seconds is not None and not self.max_heard_seconds > 0:
            raise ValueError(f"max_heard_seconds is {self.max_heard_seconds}; it must be positive, or null")

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
