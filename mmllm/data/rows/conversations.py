"""Conversations: LLaVA's, ShareGPT's, OpenAI's and Qwen-VL's turns, the_cauldron's, swift's, Alpaca's, FLAN's pairs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mmllm.data.rows.bad_rows import ManifestError
from mmllm.data.rows.inputs import TALKS, Found, Input, each_record, record_id
from mmllm.data.rows.marks import KINDS, Marked
from mmllm.data.rows.media import Embedded
from mmllm.data.rows.media_files import drop_embedded, gathered, local_image, refuse_videos
from mmllm.data.rows.records import is_null
from mmllm.data.rows.tools import call_text, calls_text, parsed, tools_text

_ROLES = {
    "human": "user", "user": "user", "system": "system", "developer": "system", "gpt": "assistant",
    "assistant": "assistant", "tool": "tool", "function": "tool", "observation": "tool", "tool_response": "tool",
    "function_response": "tool", "function_call": "assistant", "tool_call": "assistant",
}  # fmt: skip
_IS_CALL = ("function_call", "tool_call")
"""Roles of turns whose content is a call of a tool: ShareGPT's."""
_PAIRS = (
    ("query", "response"), ("instruction", "output"), ("prompt", "completion"), ("prompt", "response"),
    ("inputs", "targets"),
)  # fmt: skip
"""Keys of a question and its answer: swift's, Alpaca's, OpenAI's, others' and FLAN's."""
_PREFERENCES = ("chosen", "rejected", "rejected_response", "rejected_messages", "chosen_messages")
SIGNS = frozenset({*TALKS, *_PREFERENCES, *(question for question, _ in _PAIRS), "texts"})
"""One of these keys is in every conversation."""
_WHO, _WHAT = ("from", "role"), ("value", "content")
_MEANT = ("id", "text", "image", "audio", "segments", "question", "answer")
"""Keys that mean something in a row: another's column of that name gets `source_` before it."""
_OF_OTHER_READERS = (
    "detail", "min_pixels", "max_pixels", "resized_height", "resized_width", "cache_control", "format", "media_type",
)  # fmt: skip
"""Keys of parts that say how others read, scale or cache it: they change nothing here."""


@dataclass
class _Turn:
    role: str
    content: Any
    is_trained: bool = True
    others: dict[str, Any] = field(default_factory=dict)
    """Its other keys."""

    @property
    def is_system(self) -> bool:
        """Whether it is the system's."""
        return self.role == "system"


def conversation_rows(given: Input) -> Found:
    """A record is a conversation; see `conversation`."""
    return each_record(given, "conversation", lambda record, number: conversation(record, number, given))


def is_conversation(record: Any) -> bool:
    """Whether a record is one, as its keys have it."""
    if not isinstance(record, dict):
        return False
    if record.keys().isdisjoint(SIGNS):
        return False
    keys = {key for key, value in record.items() if not is_null(value)}
    is_pair = "text" not in keys and any(keys.issuperset(pair) for pair in _PAIRS)
    return is_pair or not keys.isdisjoint((*TALKS, *_PREFERENCES)) or _has_pairs(record.get("texts"))


def _has_pairs(texts: Any) -> bool:
    return isinstance(texts, list) and bool(texts) and isinstance(texts[0], dict) and "user" in texts[0]


def empty_talk(record: dict[str, Any]) -> str:
    """What a record says of a key that should hold a conversation and is null or empty; "" where there is none."""
    asked = (key for pair in _PAIRS if pair[0] in record for key in pair)
    for key in (*TALKS, "texts", *asked):
        if key in record and (is_null(record[key]) or record[key] in ([], "")):
            return (
                f"no conversation: {key!r} is {'null' if is_null(record[key]) else 'empty'}; leave it out, or fill it"
            )
    return ""


def conversation(record: dict[str, Any], number: int, given: Input) -> dict[str, Any]:
    """A conversation as a row of segments, each with its role.

    `system`, a content like any other, is a first turn, and so are `tools`, as text (`tools.py`). `<image>` in a text
    stands for the next picture of `image` or `images` (see `Marked`); pictures without a mark come first. A content may
    be a list of parts: `text`, `image_url` and `input_audio` (data URLs, base64, or files in the media folder), and
    `image` or `audio`, which stand for the next one, or that of their `index` from 0, where they name none. A turn with
    `loss: false` or `weight: 0` isn't trained on. Other keys are metadata.

    Raises:
        ManifestError: It holds what has no place in a conversation, or nobody answers.
    """
    others = dict(record)
    _refuse(others)
    _refuse_loss(others)
    turns = _turns(others)
    files = {kind: gathered(others, kind) for kind in KINDS}
    refuse_videos(others)
    contents = [_content(turn.content, number, given.folder) for number, turn in enumerate(turns)]
    texts = [item for content in contents for item in content if isinstance(item, str)]
    marked = Marked(texts, files, lambda kind, path: _local_file(path, kind, given.folder))
    unmarked: list[dict[str, Any]] = [{kind: file} for kind in KINDS for file in marked.unmarked[kind]]
    segments: list[dict[str, Any]] = []
    for place, (turn, content) in enumerate(zip(turns, contents, strict=True)):
        pieces = [piece for item in content for piece in (marked.pieces(item) if isinstance(item, str) else [item])]
        if unmarked and not turn.is_system:  # before all that isn't the system's
            pieces = unmarked + pieces if turn.role == "user" else pieces
            segments += [] if turn.role == "user" else [{**piece, "role": "user"} for piece in unmarked]
            unmarked = []
        is_asked = bool(segments) and segments[-1]["role"] == "system"
        if not pieces and not (turn.is_system or (turn.role == "user" and is_asked)):
            raise ManifestError(f"turn {place} ({turn.role}) says nothing; leave it out, or give it a text")
        _add(segments, pieces, turn)
    name = record_id(others, f"chat{number}")
    others.pop("id", None)
    has_media = any(kind in segment for segment in segments for kind in KINDS)
    return {"id": name, "segments": segments, **drop_embedded(_metadata(others, turns), has_media, given.bad)}


def _add(segments: list[dict[str, Any]], pieces: Sequence[dict[str, Any]], turn: _Turn) -> None:
    """Appends a turn; where it is of the role of the one before, it says that it is another."""
    role: dict[str, Any] = {"role": turn.role}
    if turn.role == "assistant" and not turn.is_trained:
        role["loss"] = False
    is_another = bool(segments) and segments[-1]["role"] == turn.role
    segments += [
        {**piece, **role, **({"new_turn": True} if is_another and not number else {})}
        for number, piece in enumerate(pieces)
    ]


def _refuse(record: dict[str, Any]) -> None:
    """Raises ManifestError where a record or a turn holds what has no place; keys that hold nothing leave it."""
    for key in _PREFERENCES:
        if record.get(key) in (None, "", [], {}, "[]", "{}", "null"):
            record.pop(key, None)
        else:
            raise ManifestError(
                f"is a preference pair ({key!r}), which trains by mmllm.training.posttraining's preferences; to learn "
                f"the answer itself, give it as the last turn"
            )
    refused = next((key for key in ("label", "kto_tag") if record.get(key) is False), None)
    if refused:
        raise ManifestError(f"its answer is one that is refused ({refused!r} is false); give answers to learn")


def _refuse_loss(record: dict[str, Any]) -> None:
    """Raises ManifestError where a record says of itself how much it is trained on, which only turns can."""
    for key in ("loss", "weight"):
        value = record.get(key)
        if not is_null(value) and value != 1:
            raise ManifestError(
                f"has the {key} {_shown(value)} beside its turns; give each answer its own {key}, leave the record "
                f"out, or keep it as metadata: --columns source_{key}={key}"
            )


# --------------------------------------------------------------------------------------------------------------- turns
def _turns(record: dict[str, Any]) -> list[_Turn]:
    """Who says what; the keys that say it leave the record."""
    empty = empty_talk(record)
    tools = tools_text(record)
    turns = _system(record) + _history(record)
    talks = [(key, record.pop(key)) for key in TALKS if not is_null(record.get(key))]
    pair = next((pair for pair in _PAIRS if all(not is_null(record.get(key)) for key in pair)), None)
    if len(talks) > 1 and talks[0][1] != talks[1][1]:
        raise ManifestError(f"has both {TALKS[0]!r} and {TALKS[1]!r}; give one of the two")
    if talks:
        told = _told_turns(talks[0][1], talks[0][0])
        systems = [turn.content for turn in turns if turn.is_system]
        if systems and any(turn.is_system and turn.content not in systems for turn in told):
            raise ManifestError("has 'system' and another turn of the system; give one of the two")
        turns += [turn for turn in told if not (turn.is_system and systems)]
    elif _has_pairs(record.get("texts")):
        for item in record.pop("texts"):
            turns += _asked_and_answered(item, "user", "assistant")
    elif pair is not None:
        turns += _asked_and_answered(record, *pair)
        for key in pair:
            del record[key]
        if pair[0] == "instruction":
            record.pop("input", None)
    if empty and all(turn.is_system for turn in turns):
        raise ManifestError(empty)
    if not turns:
        raise ManifestError(f"no conversation: it needs {TALKS[0]!r} or {TALKS[1]!r}; it has {', '.join(record)}")
    return turns if tools is None else _behind_tools(tools, turns)


def _behind_tools(tools: str, turns: list[_Turn]) -> list[_Turn]:
    """Turns behind the tools, which begin what the system says: many chat templates know one turn of it alone."""
    first, *others = turns
    if not first.is_system:
        return [_Turn("system", tools), *turns]
    return [replace(first, content=_below(tools, first.content)), *others]


def _system(record: dict[str, Any]) -> list[_Turn]:
    turns: list[_Turn] = []
    for key in ("system", "system_prompt"):
        value = record.pop(key, None)
        if is_null(value) or value == [] or (isinstance(value, str) and not value.strip()):
            continue
        if not isinstance(value, (str, list)):
            raise ManifestError(f"{key!r} is {_shown(value)}; give a text or a list of parts")
        turns.append(_Turn("system", value))
    return turns


def _history(record: dict[str, Any]) -> list[_Turn]:
    """Swift's and Alpaca's earlier turns: pairs of question and answer."""
    turns: list[_Turn] = []
    for item in record.pop("history", None) or ():
        if not isinstance(item, list) or len(item) != 2:
            raise ManifestError(f"'history' has {_shown(item)}; each item is a question and its answer")
        turns += [_Turn("user", item[0]), _Turn("assistant", item[1])]
    return turns


def _asked_and_answered(record: dict[str, Any], question: str, answer: str) -> list[_Turn]:
    asked = record[question]
    if question == "instruction" and record.get("input"):
        asked = f"{asked}\n{record['input']}" if asked else record["input"]
    both = (asked, record[answer])
    if all(isinstance(value, list) for value in both):  # of turns
        return [turn for value in both for turn in _told_turns(value, question)]
    others = {key: value for key, value in record.items() if key not in (question, answer)}
    return [_Turn("user", asked), _Turn("assistant", both[1], others=others if question == "user" else {})]


def _told_turns(turns: Any, key: str) -> list[_Turn]:
    if isinstance(turns, dict) and turns and all(isinstance(value, list) for value in turns.values()):
        # as datasets stores a sequence of structs
        turns = [dict(zip(turns, values, strict=True)) for values in zip(*turns.values(), strict=True)]
    if not isinstance(turns, list):
        raise ManifestError(f"no conversation: {key!r} is {_shown(turns)}; a list of turns is wanted")
    return [_told_turn(turn, number) for number, turn in enumerate(turns)]


def _told_turn(turn: Any, number: int) -> _Turn:
    if not isinstance(turn, dict):
        raise ManifestError(f"turn {number} is {_shown(turn)}; an object with 'role' and 'content' is wanted")
    others = {key: value for key, value in turn.items() if not is_null(value) and key not in (*_WHO, *_WHAT)}
    _refuse(others)
    named = next((turn[key] for key in _WHO if turn.get(key) is not None), None)
    if named not in _ROLES:
        raise ManifestError(f"turn {number} has the unknown role {named!r}; known are {', '.join(_ROLES)}")
    files = [key for kind in (*KINDS, "video") for key in (kind, f"{kind}s") if others.get(key)]
    if files:
        raise ManifestError(f"turn {number} has {files[0]!r} of its own; put it beside the turns, or into the content")
    content = next((turn[key] for key in _WHAT if turn.get(key) is not None), None)
    if named in _IS_CALL:
        calls = parsed(content, f"turn {number}")
        content = "\n".join(call_text(call, number) for call in (calls if isinstance(calls, list) else [calls]))
    is_trained, calls = _is_trained(others, number, _ROLES[named]), calls_text(others, number)
    if calls and _ROLES[named] != "assistant":
        raise ManifestError(f"turn {number} ({_ROLES[named]}) calls tools; only the assistant does")
    return _Turn(_ROLES[named], _below(content, calls) if calls else content, is_trained, others)


def _below(above: Any, below: Any) -> Any:
    """Two contents as one, of which one at least is a text; a line break parts texts that meet."""
    above, below = _as_parts(above), _as_parts(below)
    match above, below:
        case (None | "" | [], told) | (told, None | "" | []):
            return told
        case [*parts, {"type": "text", "text": str() as text, **others}], str():
            return [*parts, {**others, "type": "text", "text": f"{text}\n{below}"}]
        case str(), [{"type": "text", "text": str() as text, **others}, *parts]:
            return [{**others, "type": "text", "text": f"{above}\n{text}"}, *parts]
        case list(), str():
            return [*above, below]
        case str(), list():
            return [above, *below]
    return f"{above}\n{below}"


def _as_parts(content: Any) -> Any:
    """A list's texts as parts; other contents as they are."""
    if not isinstance(content, list):
        return content
    return [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]


def _is_trained(turn: dict[str, Any], number: int, role: str) -> bool:
    """Whether an answer is trained on, as `loss`, `weight` or `train` says."""
    said = {key: turn.pop(key) for key in ("loss", "weight", "train") if key in turn}
    for key, value in said.items():
        if value not in (0, 1):
            raise ManifestError(f"turn {number} has the {key} {value!r}; 0 (isn't trained on) and 1 are read")
        if value and role != "assistant":
            raise ManifestError(f"turn {number} ({role}) has the {key} {value!r}; only answers are trained on")
    return all(said.values())


# ------------------------------------------------------------------------------------------------------------- content
def _content(value: Any, number: int, folder: Path) -> list[str | dict[str, Any]]:
    """What is said in a turn: texts, with marks for the next picture or sound among them, and named files.

    Raises:
        ManifestError: It says nothing, or has a part that isn't read.
    """
    if isinstance(value, (str, int, float)):
        return [str(value)]
    if not isinstance(value, list) or not value:
        raise ManifestError(f"turn {number}: a turn's content is {_shown(value)}; give a text or a list of parts")
    return [_part(part, folder) for part in value]


def _part(part: Any, folder: Path) -> str | dict[str, Any]:
    """A text, a mark, or a named file. Whatever else a part holds would be lost, so it is refused."""
    if isinstance(part, dict):
        part = {key: value for key, value in part.items() if not is_null(value)}
    found: str | dict[str, Any]
    match part:
        case str():
            return part
        case {"type": "text", "text": str() as found, **left} | {"type": "text", "content": str() as found, **left}:
            pass
        case {"type": "image_url" | "audio_url" as key, **left}:
            url = left.pop(key, None)
            if isinstance(url, dict) and "url" in url:
                left |= {name: value for name, value in url.items() if name != "url"}
                url = url["url"]
            found = _named(url, key.removesuffix("_url"), folder, key)
        case {"type": "input_audio", "input_audio": {"data": Embedded() as data, **within}, **left}:
            found, left = {"audio": data}, left | within
        case {"type": "image", "source": {"data": Embedded() as data, **within}, **left}:
            within.pop("type", None)
            found, left = {"image": data}, left | within
        case {"type": "image" | "audio" as kind, **left}:
            found = _file_or_mark(kind, left, folder)
        case _:
            raise ManifestError(
                f"a turn has the part {_shown(part)}; those of type text, image, image_url, audio and input_audio are "
                f"read"
            )
    for key, value in left.items():
        if key not in _OF_OTHER_READERS and not is_null(value) and value not in ("", []):
            raise ManifestError(
                f"a part of type {part['type']} also has {key!r}: {_shown(value)}; give it a part of its own, or leave "
                f"it out"
            )
    return found


def _file_or_mark(kind: str, left: dict[str, Any], folder: Path) -> str | dict[str, Any]:
    """The file that a part names, else a mark for the next one or for that of its `index`; takes the key it used."""
    for key in (kind, "url", "path", f"{kind}_url", "file"):
        if left.get(key):
            return _named(left.pop(key), kind, folder, kind)
    index = left.get("index")
    if isinstance(index, int) and index >= 0:
        return f"<{kind}{left.pop('index') + 1}>"
    return f"<{kind}>"


def _named(url: Any, kind: str, folder: Path, part: str) -> dict[str, Any]:
    match url:
        case Embedded() | {"bytes": _} | {"array": _}:
            return {kind: url}
        case str() if not url.startswith("data:"):
            return {kind: _local_file(url, kind, folder)}
    raise ManifestError(f"the part {part} has {_shown(url)}, which is no picture or sound; is its base64 whole?")


def _local_file(url: str, kind: str, folder: Path) -> str:
    found = local_image(url.removeprefix("file://"), folder)
    if found is None:
        what = "picture" if kind == "image" else "sound"
        raise ManifestError(f"{kind} {_shown(url)} names no {what} in {folder}; save it there, and name its path")
    return str(found.absolute())


def _metadata(others: dict[str, Any], turns: Sequence[_Turn]) -> dict[str, Any]:
    """What the record says beside the conversation, and its turns: once where all say the same, else as `turns`."""
    found = {f"source_{key}" if key in _MEANT else key: value for key, value in others.items() if not is_null(value)}
    told = [turn.others for turn in turns if turn.others]
    if not told:
        return found
    if all(other == told[0] for other in told) and found.keys().isdisjoint(told[0]):
        return {**found, **{f"source_{key}" if key in _MEANT else key: value for key, value in told[0].items()}}
    return {**found, "turns": [turn.others for turn in turns]}


def _shown(value: Any) -> str:
    """The beginning of a value, for messages."""
    text = json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, (dict, list)) else repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
