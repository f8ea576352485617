"""What a run does with the rows it is given: which stages, and the configs and recipe it writes."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mmllm.data.rows.forms import read_rows
from mmllm.data.rows.media import sound_seconds
from mmllm.data.rows.rows import Row
from mmllm.evaluation.results import KIND_OF_TASK
from mmllm.paths import config_path
from mmllm.quickstart.budget import EVALUATION_SECONDS
from mmllm.quickstart.presets import DEMO, Preset
from mmllm.quickstart.synthesis import voices

STATE_FILE = "quickstart.json"
OUTPUT_OF_STAGE = {"codec": "codec", "decoder": "model"}
"""The trainings, and what each writes into the run's folder."""
TEMPLATE_DIR = "runs/demo"
"""The folder that the shipped quickstart configs name; it is replaced by the run's."""

Speaker = str | int | float


@dataclass(frozen=True)
class Contents:
    """What the training rows hold."""

    kinds: tuple[str, ...]
    has_images: bool
    has_sounds: bool
    num_rows: int
    num_characters: int
    audio_seconds: float
    names_sides: bool
    """Some text says left or right, so pictures may not be mirrored."""
    is_single_words: bool
    """Every transcript is one word."""
    num_captions: int
    long_seconds: float
    """Nineteen sounds in twenty are no longer than this."""
    has_plain: bool = False
    """Of the demo's rows: pictures have a second caption in plain wording, in a row marked `plain`."""
    speakers: tuple[Speaker, ...] = ()
    """Of the sounds, those that are heard longest first."""
    has_joined: bool = False
    """Of the demo's rows: sounds are several sentences, in rows marked `joined`, too long to learn to speak from."""
    has_spoken_only: bool = False
    """Of the demo's rows: sounds are there to learn to speak from alone, in rows marked `spoken_only`."""

    @classmethod
    def of(cls, rows: list[Row], is_demo: bool = False) -> Contents:
        """Looks through the rows, and at the sounds' headers.

        Args:
            rows: those that are trained on.
            is_demo: they are quickstart's own, whose marks say what they are for; in other people's rows a column of
                the same name means what they mean by it.

        Raises:
            ValueError: documents hold sounds, but no row is a sound with its text; or there are more speakers than a
                model learns to speak like, and some of them are texts, some numbers.
        """
        kinds = tuple(sorted({row.kind for row in rows}))
        spoken = [row for row in rows if row.kind == "audio"]
        seconds = [0.0 if row.audio is None else sound_seconds(row.audio) for row in spoken]
        lengths = sorted(length for row, length in zip(spoken, seconds, strict=True) if row.audio is not None)
        segments = [segment for row in rows for segment in row.segments]
        texts = [row.text for row in rows] + [segment["text"] for segment in segments if "text" in segment]
        texts += [str(row.metadata[key]) for row in rows for key in ("question", "answer") if key in row.metadata]
        if not spoken and any("audio" in segment for segment in segments):
            raise ValueError(
                "interleaved rows hold sounds, but no row is a sound with its text, from which the codec is learnt; "
                "add rows with `audio` and `text`"
            )
        return cls(
            kinds=kinds,
            has_images="caption" in kinds or any("image" in segment for segment in segments),
            has_sounds="audio" in kinds,
            num_rows=len(rows),
            num_characters=sum(len(text) for text in texts),
            audio_seconds=sum(lengths),
            names_sides=any(re.search(r"\b(left|right)\b", text, re.IGNORECASE) for text in texts),
            is_single_words=bool(spoken) and all(len(row.text.split()) == 1 for row in spoken),
            num_captions=sum(row.kind == "caption" for row in rows),
            long_seconds=lengths[int(0.95 * len(lengths))] if lengths else 0.0,
            has_plain=is_demo and any(row.metadata.get("plain") is True for row in rows if row.kind == "caption"),
            speakers=_speakers(spoken, seconds),
            has_joined=is_demo and any(row.metadata.get("joined") is True for row in spoken),
            has_spoken_only=is_demo and any(row.metadata.get("spoken_only") is True for row in spoken),
        )


def _speakers(spoken: Sequence[Row], seconds: Sequence[float]) -> tuple[Speaker, ...]:
    """Who speaks, by name or by number: those first that are heard longest."""
    totals: dict[Speaker, float] = {}
    for row, length in zip(spoken, seconds, strict=True):
        speaker = row.metadata.get("speaker")
        if isinstance(speaker, str | int | float) and not isinstance(speaker, bool) and speaker != "":
            totals[speaker] = totals.get(speaker, 0.0) + length
    names = [speaker for speaker in totals if isinstance(speaker, str)]
    numbers = [speaker for speaker in totals if not isinstance(speaker, str)]
    if names and numbers and len(totals) > NUM_VOICES:  # one filter can't ask for both
        raise ValueError(
            f"`speaker` is a text in some rows ({names[0]!r}) and a number in others ({numbers[0]!r}); write all of "
            f"them as texts, or all as numbers"
        )
    return tuple(sorted(totals, key=lambda speaker: (-totals[speaker], isinstance(speaker, str), str(speaker))))


def read_contents(folder: Path, is_demo: bool = False) -> Contents:
    """Of the `train-*.jsonl` manifests in a folder; see `Contents.of`."""
    return Contents.of([row for path in sorted(folder.glob("train-*.jsonl")) for row in read_rows(path)], is_demo)


@dataclass(frozen=True)
class Choices:
    """The sizes that fit the rows."""

    vocab_size: int
    perturb: int
    sequence_length: int
    batch_size: int
    decoder: dict[str, Any]
    """Keys of the decoder's config that differ from the shipped one."""
    weights: dict[str, float] = field(default_factory=lambda: WEIGHTS)
    """Of the recipe's sources; those that the rows lack are left out."""
    image_tokens: int = 16
    image_size: int = 64
    audio_pool: int = 2
    max_images: int | None = None
    """Of a sequence, which bounds the tower's memory."""
    align: bool = False
    """Speech gets word times before it is built."""
    pointer: int = 0
    """Letters a frame that speech's pointer into its text passes at most; 0: it has none."""
    heard_codebooks: int = 0
    """Of the codec, of which the config's are spoken; 0: all are spoken."""
    voices: tuple[Speaker, ...] = ()
    """That it learns to speak with; empty: of those that are heard longest."""


FRAME_RATE = 50
"""Of the quickstart codec, frames a second: as many positions does speech take."""
ROOM_FOR_TEXT = 62
MAX_SEQUENCE = 2048

SMALL_DECODER = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "dropout": 0.1,
}
SMALL_MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
TEXT_DECODER = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "dropout": 0.15,
}
TEXT_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256}


WEIGHTS = {"caption": 0.42, "interleaved": 0.14, "text": 0.04, "heard": 0.28, "spoken": 0.12}
DEMO_WEIGHTS = {"caption": 0.41, "interleaved": 0.20, "text": 0.04, "heard": 0.15, "spoken": 0.20}
"""Synthetic speech is easily heard, and what is said of scenes is long: it takes more of the tokens to speak."""


GPU_SEQUENCE, GPU_IMAGES = 4096, 32
PLAIN_STEPS, PLAIN_SHARE = 0.7, 0.2
"""Captions in plain wording make way for all wordings along a line that would end at this share of the steps, and that
stops at this share of the captions. Which object is left of which is one word among forty of wording, and is learnt
where there is one wording."""
RELATION_WEIGHT = 6.0
RELATION_WORDS = ("left", "right", "above", "below", "over", "under", "top", "bottom")
"""What they weigh wherever text is predicted: one word in ten of a caption, on which it hangs whether it is right."""
NUM_VOICES = 4
"""Voices that a model learns to speak with, however many it hears, of somebody's own rows: four were understood better
than 36 after as many steps. The demo has rows enough for all."""
HEARD_CODEBOOKS = 12
"""Of somebody's own sounds, mostly of few speakers: what four codebooks blur is missed where a voice was never heard.
The demo, with its many voices, hears what it speaks."""
MAX_ADVANCE = 2
"""Letters that speech passes between two frames, at most."""


def choose(contents: Contents, is_demo: bool, preset: Preset = DEMO) -> Choices:
    """Sizes for the demo or for somebody's rows.

    The vocabulary grows with the text; few sounds get more altered copies; captions and transcripts need less of a
    decoder than prose does, and gain from the steps that a smaller one has time for.
    """
    vocab_size = 640 if contents.num_characters < 400_000 else 1024
    speech: dict[str, Any] = {"align": True, "pointer": MAX_ADVANCE} if contents.has_sounds else {}
    if is_demo:
        return Choices(
            vocab_size, perturb=0, sequence_length=512, batch_size=8, decoder={}, weights=DEMO_WEIGHTS,
            voices=tuple(voices(heldout=False)), **speech,
        )  # fmt: skip
    perturb = int(min(10, max(1, 4000 // max(contents.audio_seconds, 1.0)))) if contents.has_sounds else 0
    if preset.on_gpu:
        return Choices(
            vocab_size=32_768, perturb=perturb, sequence_length=GPU_SEQUENCE, batch_size=8, decoder={},
            image_tokens=49, image_size=224, audio_pool=4, max_images=GPU_IMAGES, **speech,
        )  # fmt: skip
    decoder: dict[str, Any] = {}
    if contents.kinds == ("text",):
        decoder = {**TEXT_DECODER, "moe": TEXT_MOE}
    elif "text" not in contents.kinds and "interleaved" not in contents.kinds:
        decoder = {**SMALL_DECODER, "moe": SMALL_MOE}
    sequence_length = 512
    while sequence_length < min(MAX_SEQUENCE, FRAME_RATE * contents.long_seconds + ROOM_FOR_TEXT):
        sequence_length *= 2
    batch_size = 8 if contents.kinds == ("text",) else max(2, 4 * 512 // sequence_length)
    heard = HEARD_CODEBOOKS if contents.has_sounds else 0
    return Choices(vocab_size, perturb, sequence_length, batch_size, decoder, heard_codebooks=heard, **speech)


def recipe_dict(out: Path, contents: Contents, choices: Choices, seed: int, num_steps: int | None) -> dict[str, Any]:
    """The recipe over the run's shards.

    Args:
        out: the run's folder.
        contents: what the rows hold.
        choices: sizes.
        seed: of the order.
        num_steps: of the training; None: it is bounded by the clock, and nothing comes later than at its start.
    """
    shards, sources = glob.escape(str(out / "shards")), []
    weights = choices.weights
    for kind in ("caption", "interleaved", "text"):
        if kind in contents.kinds:
            source = {"name": kind, "kind": kind, "shards": f"{shards}/train/{kind}-*.tar", "weight": weights[kind]}
            sources += _plain_first(source, num_steps) if kind == "caption" and contents.has_plain else [source]
    if contents.has_sounds:
        speech = {"kind": "audio", "shards": f"{shards}/train/audio-*.tar"}
        heard = {"name": "heard", **speech, "weight": weights["heard"], "tasks": ["transcribe"]}
        sources.append({**heard, "filter": "not spoken_only"} if contents.has_spoken_only else heard)
        spoken = {"name": "spoken", **speech, "weight": weights["spoken"], "tasks": ["speak"]}
        conditions = ["not perturbed", *(["aligned"] if choices.pointer else [])]
        conditions += ["not joined"] if contents.has_joined else []
        speakers = choices.voices or contents.speakers[:NUM_VOICES]
        if set(contents.speakers) - set(speakers):
            conditions.append(f"speaker in [{', '.join(map(repr, speakers))}]")
        sources.append({**spoken, "filter": " and ".join(conditions)})
    recipe: dict[str, Any] = {
        "seed": seed,
        "tokenizer": str(out / "tokenizer"),
        "sequence_length": choices.sequence_length,
        "mixture": {"unit": "tokens", "on_exhausted": "repeat"},
        "sources": sources,
        "packing": {"algorithm": "best_fit", "window": 1024, "long_documents": "split"},
    }
    if choices.max_images is not None:
        recipe["packing"]["max_images"] = choices.max_images
    if contents.has_sounds and not contents.is_single_words and num_steps is not None:
        steps = max(1, num_steps // 2)
        recipe["curriculum"] = {
            "metric": "num_tokens", "pacing": "root", "start": 0.3, "steps": steps, "sources": ["heard"],
        }  # fmt: skip
    return recipe


def _plain_first(source: dict[str, Any], num_steps: int | None) -> list[dict[str, Any]]:
    """A source of captions as two: in plain wording first, in all wordings from then on."""
    weight = source["weight"]
    plain, source = {**source, "name": "plain", "filter": "plain"}, {**source, "filter": "not plain"}
    if num_steps is None:
        return [{**plain, "weight": PLAIN_SHARE * weight}, {**source, "weight": (1 - PLAIN_SHARE) * weight}]
    del plain["weight"]
    bend = round((1 - PLAIN_SHARE) * PLAIN_STEPS * num_steps)
    shares = [[0, 1.0], [bend, PLAIN_SHARE], [num_steps, PLAIN_SHARE]]
    source = {key: value for key, value in source.items() if key != "weight"}
    return [
        {**plain, "weight_schedule": [[step, round(share * weight, 4)] for step, share in shares]},
        {**source, "weight_schedule": [[step, round((1 - share) * weight, 4)] for step, share in shares]},
    ]


def write_yaml(path: Path, values: Mapping[str, Any], header: str) -> None:
    """Writes a YAML file under a comment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    comment = "".join(f"# {line}\n" for line in header.splitlines())
    path.write_text(comment + yaml.safe_dump(dict(values), sort_keys=False, width=110), encoding="utf-8")


def stage_config(stage: str, out: Path, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A shipped quickstart config with the run's folder and some keys changed.

    Args:
        stage: a config of `configs/quickstart/`: `codec`, `decoder`, `one_gpu`.
        out: the run's folder.
        overrides: dotted keys to values; None removes the key.
    """
    config = _moved(yaml.safe_load(config_path(f"quickstart/{stage}.yaml").read_text(encoding="utf-8")), str(out))
    for dotted, value in overrides.items():
        *parents, last = dotted.split(".")
        place = config
        for key in parents:
            place = place.setdefault(key, {})
        if value is None:
            place.pop(last, None)
        else:
            place[last] = value
    return config


def _moved(value: Any, out: str) -> Any:
    """A config with the template's folder replaced; in globs what `out` holds stands for itself."""
    if isinstance(value, dict):
        return {key: _moved(item, out) for key, item in value.items()}
    if isinstance(value, list):
        return [_moved(item, out) for item in value]
    if isinstance(value, str) and value.startswith(f"{TEMPLATE_DIR}/"):
        return (glob.escape(out) if "*" in value else out) + value.removeprefix(TEMPLATE_DIR)
    return value


def evaluation_tasks(test: Path, contents: Contents) -> tuple[dict[str, list[int]], list[str]]:
    """Tasks that the test rows allow, with the number of rows of each set that is scored apart; what is not scored."""
    rows = read_rows(test)
    kinds = {"caption": contents.has_images, "transcribe": contents.has_sounds, "speak": contents.has_sounds,
             "interleaved": "interleaved" in contents.kinds, "text": "text" in contents.kinds}  # fmt: skip
    tasks, left_out = {}, []
    for task in EVALUATION_SECONDS:
        kind = KIND_OF_TASK[task]
        chosen = of_kind = [row for row in rows if row.kind == kind]
        if not of_kind and kind in contents.kinds:
            left_out.append(f"{task} is not scored: no {kind} row is held out")
        if of_kind and not kinds[task]:
            left_out.append(f"{task} is not scored on {len(of_kind)} {kind} rows: no training row teaches it")
            continue
        if task == "interleaved":
            chosen = [row for row in of_kind if "question" in row.metadata]
            if len(chosen) < len(of_kind):
                left_out.append(f"{len(of_kind) - len(chosen)} interleaved rows are not scored: they have no question")
        apart = [row for row in chosen if row.metadata.get("heldout_pairs") or row.metadata.get("heldout_voice")]
        sets = [len(chosen) - len(apart), len(apart)]
        if task == "speak" and sets[0]:
            sets = sets[:1]
        if any(sets):
            tasks[task] = [count for count in sets if count]
    return tasks, left_out


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
