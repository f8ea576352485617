"""One id space: text tokens and special tokens, then K codebooks of audio units with a filler each."""

from __future__ import annotations

from dataclasses import dataclass

PAD = "<|pad|>"
END = "<|end|>"
TEXT = "<|text|>"
IMAGE = "<|image|>"
AUDIO = "<|audio|>"
CAPTION = "<|caption|>"
TRANSCRIBE = "<|transcribe|>"
SPEAK = "<|speak|>"
AUDIO_START = "<|audio_start|>"
AUDIO_END = "<|audio_end|>"
QUESTION = "<|question|>"
ANSWER = "<|answer|>"
USER = "<|user|>"
ASSISTANT = "<|assistant|>"

SPECIAL_TOKENS = (
    PAD, END, TEXT, IMAGE, AUDIO, CAPTION, TRANSCRIBE, SPEAK,
    AUDIO_START, AUDIO_END, QUESTION, ANSWER, USER, ASSISTANT,
)  # fmt: skip
"""In id order in tokenizers that are trained here. Everywhere they are looked up by name: a checkpoint's own tokenizer
has them behind its ids."""

TEMPLATES: dict[str, dict[str, str]] = {
    "caption": {"prompt": "{image}<|caption|>", "target": "{text}<|end|>"},
    "transcribe": {"prompt": "{audio}<|transcribe|>", "target": "{text}<|end|>"},
    "speak": {"prompt": "<|speak|>{voice}<|text|>{text}<|audio_start|>", "target": "{units}<|audio_end|>"},
    "text": {"prompt": "<|text|>", "target": "{text}<|end|>"},
    "interleaved": {"prompt": "", "target": "{segments}<|end|>"},
    "question": {"prompt": "{segments}<|question|>{question}<|answer|>", "target": "{answer}<|end|>"},
    "chat": {"prompt": "<|user|>{segments}<|assistant|>", "target": "{text}<|end|>"},
}
"""How each task is written. Only the target is learnt (of `interleaved`: all its text)."""


@dataclass(frozen=True)
class Vocabulary:
    """The id space: `[0, num_text)` special and text tokens, then a block for each codebook.

    Codebook k's block is its `codebook_size` units followed by its delay filler.
    """

    num_text: int
    num_codebooks: int = 0
    codebook_size: int = 0

    def __post_init__(self) -> None:
        if self.num_text < len(SPECIAL_TOKENS):
            raise ValueError(f"num_text is {self.num_text}; it must be at least {len(SPECIAL_TOKENS)} special tokens")
        if self.num_codebooks < 0 or (self.num_codebooks and self.codebook_size < 1):
            raise ValueError(
                f"num_codebooks is {self.num_codebooks} and codebook_size {self.codebook_size}; "
                f"give both, or neither for a model without sound"
            )

    @property
    def size(self) -> int:
        """Number of ids."""
        return self.num_text + self.num_codebooks * (self.codebook_size + 1)

    @property
    def filler(self) -> int:
        """The code (not id) of the delay filler in every codebook."""
        return self.codebook_size

    def codebook_start(self, codebook: int) -> int:
        """First id of a codebook's block of `codebook_size + 1` ids."""
        if not 0 <= codebook < self.num_codebooks:
            raise ValueError(f"codebook is {codebook}; this vocabulary has {self.num_codebooks}")
        return self.num_text + codebook * (self.codebook_size + 1)
