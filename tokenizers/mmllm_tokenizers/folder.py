"""The tokenizer folder: all that fixes how text, images and sound become positions.

    tokenizer.json         text tokens
    templates.json         how each task is written
    tokenizer_config.json  `TokenizerConfig`
    chat_template.jinja    how a checkpoint's own conversations are written, where it was imported
    codec/                 the audio tokenizer, where there is sound

A model, an index and a plan's state store its `hash` and refuse another.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mmllm_tokenizers.audio import AudioTokenizer, load_audio_tokenizer
from mmllm_tokenizers.audio_tokenizer import NO_SPEECH
from mmllm_tokenizers.patterns import PATTERNS, apply_pattern, invert_pattern, num_positions
from mmllm_tokenizers.pointer import PointerRule
from mmllm_tokenizers.text import ForeignText, TextTokenizer
from mmllm_tokenizers.tiling import TileGrid, Tiling, choose_grid
from mmllm_tokenizers.vocab import TEMPLATES, Vocabulary

FORMAT_VERSION = 1
TEXT_FILE = "tokenizer.json"
TEMPLATES_FILE = "templates.json"
CONFIG_FILE = "tokenizer_config.json"
CODEC_FOLDER = "codec"
CHAT_FILE = "chat_template.jinja"
_OPTIONAL = ("tiling", "text", "pointer", "heard_codebooks")
"""Keys that are written only where they say something: older folders and their hashes have none."""


@dataclass(frozen=True)
class TokenizerConfig:
    """How images and sound become positions. What only a codec knows is filled in by `TokenizerFolder`."""

    image_tokens: int = 16
    """`<|image|>` slots an image; of one that is cut, a tile."""
    image_size: int = 64
    """Pixels, both sides; of one that is cut, of a tile."""
    audio_pool: int = 2
    """Frames an `<|audio|>` slot."""
    pattern: str = "delay"
    """Codebook pattern of predicted units: parallel, delay or flatten."""
    num_codebooks: int = 0
    """K that are spoken; 0: as the codec's folder says."""
    codebook_size: int = 0
    frame_rate: float = 0.0
    sample_rate: int = 0
    codec: str | None = None
    """Folder of the audio tokenizer, relative to this one."""
    tiling: Tiling | None = None
    """How pictures are cut into tiles; None: they aren't, and neither file nor hash speaks of it."""
    text: ForeignText | None = None
    """Of a checkpoint's own text tokenizer; None: one that was trained here."""
    pointer: PointerRule | None = None
    """Speech that is predicted has a pointer into its text; None: it hasn't, and neither file nor hash speaks of it."""
    heard_codebooks: int | None = None
    """Of a sound that is heard, where these are more than are spoken: hearing is as easy with more, speaking isn't.
    None: as many as are spoken, and neither file nor hash speaks of it."""

    def __post_init__(self) -> None:
        for name in ("image_tokens", "image_size", "audio_pool"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("num_codebooks", "codebook_size", "sample_rate", "frame_rate"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")
        if self.pattern not in PATTERNS:
            raise ValueError(f"pattern is {self.pattern!r}; it must be one of {', '.join(PATTERNS)}")
        if self.tiling is not None:
            self.tiling.limit(self.image_tokens)
        if self.heard_codebooks is not None:
            self._check_heard(self.heard_codebooks)
        if self.pointer is not None and self.pattern == "flatten":
            raise ValueError(
                "pattern is flatten, which spreads a frame over several positions, and pointer is set, which says one "
                "letter a position; choose delay or parallel, or leave the pointer out"
            )

    def _check_heard(self, heard_codebooks: int) -> None:
        if heard_codebooks < max(self.num_codebooks, 1):
            raise ValueError(
                f"heard_codebooks is {heard_codebooks} and num_codebooks {self.num_codebooks}; what is spoken is heard "
                f"as well: give at least as many, or leave heard_codebooks out"
            )
        if self.pattern == "flatten" and heard_codebooks != self.num_codebooks:
            raise ValueError(
                f"pattern is flatten, whose units are one long codebook, but {heard_codebooks} codebooks are heard and "
                f"{self.num_codebooks or 'other'} spoken; choose delay or parallel, or give both the same number"
            )

    def to_dict(self) -> dict[str, Any]:
        """As JSON-serializable values."""
        values = dataclasses.asdict(dataclasses.replace(self, text=None))
        if self.text is not None:
            values["text"] = self.text.to_dict()
        return {key: value for key, value in values.items() if key not in _OPTIONAL or value is not None}

    @staticmethod
    def from_dict(values: Mapping[str, Any], where: str) -> TokenizerConfig:
        """The inverse of `to_dict`.

        Args:
            values: all of its keys; `tiling`, `text`, `pointer` and `heard_codebooks` may be left out.
            where: what errors call them.

        Raises:
            ValueError: a key is missing or unknown, or has no possible value.
        """
        wrong = (set(values) ^ {field.name for field in dataclasses.fields(TokenizerConfig)}) - set(_OPTIONAL)
        for name, kind in (("tiling", Tiling), ("pointer", PointerRule)):
            given = values.get(name)
            if isinstance(given, Mapping):
                wrong |= {f"{name}.{key}" for key in set(given) ^ {field.name for field in dataclasses.fields(kind)}}
            elif given is not None:
                wrong.add(name)
        if wrong:
            raise ValueError(f"{where} has unknown or missing keys: {', '.join(sorted(wrong))}; build the folder again")
        tiling, text, pointer = (values.get(name) for name in ("tiling", "text", "pointer"))
        return TokenizerConfig(
            **{
                **values,
                "tiling": None if tiling is None else Tiling(**tiling),
                "text": None if text is None else ForeignText.from_dict(text, where),
                "pointer": None if pointer is None else PointerRule(**pointer),
            }
        )


class TokenizerFolder:
    """A tokenizer folder in memory.

    Args:
        text: the text tokenizer.
        audio: the audio tokenizer, or None for a model without sound.
        config: how images and sound become positions.
        templates: how each task is written.
        chat_template: how conversations are written, in transformers' form (Jinja); None: as the task `chat`.

    Raises:
        ValueError: the configuration asks for more codebooks than the audio tokenizer has, or for a pointer of speech
            with one that can't speak.
    """

    def __init__(
        self,
        text: TextTokenizer,
        audio: AudioTokenizer | None = None,
        config: TokenizerConfig | None = None,
        templates: Mapping[str, Mapping[str, str]] = TEMPLATES,
        chat_template: str | None = None,
    ) -> None:
        config = dataclasses.replace(config or TokenizerConfig(), text=text.foreign)
        if audio is None:
            config = dataclasses.replace(
                config, num_codebooks=0, codebook_size=0, frame_rate=0.0, sample_rate=0, codec=None, pointer=None,
                heard_codebooks=None,
            )  # fmt: skip
        else:
            if config.pointer is not None and not audio.keeps_durations:
                raise ValueError(f"pointer is set, which is of speech, but {NO_SPEECH}; or leave the pointer out")
            num_codebooks, heard_codebooks = _codebooks_in_use(config, audio)
            audio.use_codebooks(heard_codebooks)
            config = dataclasses.replace(
                config,
                num_codebooks=num_codebooks,
                heard_codebooks=heard_codebooks if heard_codebooks != num_codebooks else None,
                codebook_size=audio.codebook_size,
                frame_rate=audio.frame_rate,
                sample_rate=audio.sample_rate,
                codec=CODEC_FOLDER,
            )
        self._init(text, audio, config, templates, None, chat_template)

    def _init(
        self,
        text: TextTokenizer,
        audio: AudioTokenizer | None,
        config: TokenizerConfig,
        templates: Mapping[str, Mapping[str, str]],
        folder: Path | None,
        chat_template: str | None,
    ) -> None:
        self.text = text
        self.chat_template = chat_template
        self.config = config
        self.templates = {task: dict(parts) for task, parts in templates.items()}
        self._audio = audio
        self._folder = folder
        self._hash: str | None = None

    @classmethod
    def load(cls, folder: str | Path) -> TokenizerFolder:
        """Reads a folder; the audio tokenizer is read when it is first used.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged, foreign or of a newer release.
        """
        folder = Path(folder)
        config = _read_json(folder / CONFIG_FILE)
        version = config.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise ValueError(f"{folder} has format version {version}; this release reads {FORMAT_VERSION}")
        read = TokenizerConfig.from_dict(config, str(folder / CONFIG_FILE))
        templates = _read_json(folder / TEMPLATES_FILE)
        new = cls.__new__(cls)
        text = TextTokenizer.load(folder / TEXT_FILE, read.text)
        chat = folder / CHAT_FILE
        new._init(text, None, read, templates, folder, chat.read_text(encoding="utf-8") if chat.is_file() else None)
        if new.config.codec is not None and not (folder / new.config.codec).is_dir():
            raise FileNotFoundError(f"{folder / new.config.codec} does not exist; the tokenizer's codec is missing")
        return new

    def save(self, folder: str | Path) -> None:
        """Writes all files."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        audio = self.audio  # read before its folder may be overwritten
        self.text.save(folder / TEXT_FILE)
        _write_json(folder / TEMPLATES_FILE, self.templates)
        _write_json(folder / CONFIG_FILE, {"format_version": FORMAT_VERSION, **self.config.to_dict()})
        if self.chat_template is not None:
            (folder / CHAT_FILE).write_text(self.chat_template, encoding="utf-8")
        else:
            (folder / CHAT_FILE).unlink(missing_ok=True)
        if audio is not None and self.config.codec is not None:
            audio.save(folder / self.config.codec)

    @property
    def path(self) -> Path | None:
        """The folder that was read; None for one that was made in memory."""
        return self._folder

    @property
    def audio(self) -> AudioTokenizer | None:
        """The audio tokenizer, limited to the codebooks that are heard; None without sound."""
        if self._audio is None and self.config.codec is not None and self._folder is not None:
            audio = load_audio_tokenizer(self._folder / self.config.codec)
            found, expected = (audio.sample_rate, audio.codebook_size), (self.sample_rate, self.config.codebook_size)
            if found != expected:
                raise ValueError(
                    f"{self._folder / self.config.codec} has sample rate and codebook size {found}, the folder's "
                    f"configuration says {expected}; the codec belongs to another tokenizer"
                )
            audio.use_codebooks(self.heard_codebooks)
            self._audio = audio
        return self._audio

    def require_audio(self) -> AudioTokenizer:
        """The audio tokenizer.

        Raises:
            ValueError: there is none.
        """
        if self.audio is None:
            raise ValueError(
                "this tokenizer has no codec, so its model neither hears nor speaks; build one with a codec"
            )
        return self.audio

    @property
    def keeps_durations(self) -> bool:
        """Whether each code of a sound lasts one frame; else codes are counted in stored ones, and can't be spoken."""
        return self.audio is None or self.audio.keeps_durations

    def check_speech(self) -> None:
        """Refuses to speak where codes have no durations.

        Raises:
            ValueError: they haven't.
        """
        if not self.keeps_durations:
            raise ValueError(NO_SPEECH)

    @property
    def vocabulary(self) -> Vocabulary:
        """The id space. A flat stream (pattern flatten) is one codebook of K times the size."""
        num_codebooks, size = self.config.num_codebooks, self.config.codebook_size
        if self.config.pattern == "flatten" and num_codebooks:
            num_codebooks, size = 1, num_codebooks * size
        return Vocabulary(self.text.vocab_size, num_codebooks, size)

    @property
    def codebooks_KVD(self) -> Tensor:
        """The codec's codebooks as the vocabulary numbers them: one long codebook where the stream is flat."""
        codebooks_KVD = self.require_audio().codebooks_KVD[: self.num_codebooks]
        return codebooks_KVD.reshape(self.vocabulary.num_codebooks, self.vocabulary.codebook_size, -1)

    @property
    def heard_codebooks_KVD(self) -> Tensor:
        """The codebooks of a sound that is heard; first those that are spoken."""
        return self.codebooks_KVD if self.config.heard_codebooks is None else self.require_audio().codebooks_KVD

    @property
    def hash(self) -> str:
        """SHA-256 of the contents: text tokens, templates, configuration, codec. Not of the path."""
        if self._hash is None:
            parts: dict[str, Any] = {
                "text": self.text.hash,
                "templates": self.templates,
                "config": self.config.to_dict(),
                "audio": None if self.audio is None else self.audio.hash,
            }
            if self.chat_template is not None:
                parts["chat_template"] = self.chat_template
            self._hash = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        return self._hash

    @property
    def num_image_tokens(self) -> int:
        """`<|image|>` slots an image; of one that is cut, a tile."""
        return self.config.image_tokens

    @property
    def image_size(self) -> int:
        """Pixels, both sides; of one that is cut, of a tile."""
        return self.config.image_size

    def tile_grid(self, width: int, height: int) -> TileGrid:
        """How a picture is cut; 1 x 1 where it isn't.

        Args:
            width: of the upright picture, in pixels.
            height: likewise.
        """
        tiling = self.config.tiling
        if tiling is None:
            return TileGrid()
        rows, columns = choose_grid(width, height, self.image_size, tiling.limit(self.num_image_tokens))
        return TileGrid(rows, columns, tiling.thumbnail and rows * columns > 1)

    def num_image_slots(self, width: int, height: int) -> int:
        """`<|image|>` slots of a picture of so many pixels, all tiles together."""
        return self.tile_grid(width, height).num_tiles * self.num_image_tokens

    @property
    def audio_pool(self) -> int:
        """Frames an `<|audio|>` slot."""
        return self.config.audio_pool

    @property
    def pattern(self) -> str:
        """Codebook pattern of predicted units."""
        return self.config.pattern

    @property
    def num_codebooks(self) -> int:
        """K that are spoken; 0 without sound."""
        return self.config.num_codebooks

    @property
    def heard_codebooks(self) -> int:
        """K of a sound that is heard; 0 without sound."""
        return self.config.heard_codebooks or self.config.num_codebooks

    @property
    def frame_rate(self) -> float:
        """Frames a second; 0 without sound. Where codes have no durations, there are at most so many codes."""
        return self.config.frame_rate

    @property
    def sample_rate(self) -> int:
        """Samples a second that the codec works on; 0 without sound."""
        return self.config.sample_rate

    def id(self, token: str) -> int:
        """Id of a token such as `"<|image|>"`; ValueError if there is none."""
        return self.text.id(token)

    def num_audio_slots(self, num_frames: int) -> int:
        """`<|audio|>` slots of a sound that is heard."""
        return -(-num_frames // self.audio_pool)

    def num_unit_positions(self, num_frames: int) -> int:
        """Positions of a sound that is spoken, under the pattern."""
        return num_positions(num_frames, self.num_codebooks, self.pattern)

    def apply_pattern(self, codes_KF: Tensor) -> Tensor:
        """Codes as the positions that the decoder predicts: [K, P], or [1, P] when flat."""
        return apply_pattern(codes_KF, self.pattern, self.vocabulary.filler)

    def invert_pattern(self, patterned_KP: Tensor) -> Tensor:
        """Codes [K, F] of predicted positions."""
        return invert_pattern(patterned_KP, self.pattern, self.vocabulary.filler, self.num_codebooks)


def _codebooks_in_use(config: TokenizerConfig, audio: AudioTokenizer) -> tuple[int, int]:
    """How many codebooks are spoken, and how many heard: as the codec's folder says where the config says neither."""
    if config.num_codebooks == 0 and config.heard_codebooks is None:
        return audio.spoken_codebooks, audio.num_codebooks
    num_codebooks = config.num_codebooks or audio.spoken_codebooks
    return num_codebooks, config.heard_codebooks or num_codebooks


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; a tokenizer folder needs it")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(content).__name__}")
    return content


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
