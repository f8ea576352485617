"""Tokenizers of pretrained checkpoints: their ids, special tokens and chat template, with ours behind them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from mmllm.interop.foreign_config import read_json_if_there
from mmllm.interop.library import quiet, transformers_library
from mmllm_tokenizers.text import ForeignText, TextTokenizer, unreadable
from mmllm_tokenizers.vocab import IMAGE, SPECIAL_TOKENS, TEMPLATES

TOKENIZER = "tokenizer.json"
TOKENIZER_FILES = (
    TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer.model", "chat_template.jinja", "chat_template.json", "spiece.model", "sentencepiece.bpe.model",
    "vocab.txt", "tekken.json", "additional_chat_templates",
)  # fmt: skip
"""Of a checkpoint's tokenizer, files and a folder: kept to the letter, so that it can go out as it came."""
_SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class ImportedTokenizer:
    """A checkpoint's tokenizer as one of ours."""

    text: TextTokenizer
    templates: Mapping[str, Mapping[str, str]]
    """Ours, each prompt behind what the checkpoint begins every text with; `text` written as it writes texts."""
    chat_template: str | None
    shared: tuple[str, ...] = ()
    """Our special tokens for which it has one of the same meaning."""
    added: tuple[str, ...] = ()
    """Our special tokens that lie behind its ids."""
    left_out: tuple[str, ...] = ()
    """What of it isn't used."""


def read_tokenizer(folder: str | Path, num_rows: int, image_id: int | None = None) -> ImportedTokenizer:
    """The tokenizer of a checkpoint, whose ids stay as they are.

    Args:
        folder: with `tokenizer.json`.
        num_rows: of the checkpoint's embedding, padding included. Our special tokens lie behind them.
        image_id: what the checkpoint writes where a picture is, which is then our `<|image|>`.

    Raises:
        FileNotFoundError: there is no tokenizer.
        ValueError: it isn't in a form that is read here, or gives ids that the embedding has no row for.
        ModuleNotFoundError: without transformers.
    """
    folder = Path(folder)
    ends = _told_ends(folder, num_rows)
    theirs, backend, written = _load(folder)
    num_ids = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    num_ids = max([num_ids, *(token_id + 1 for token_id in backend.encode("a").ids)])  # of what frames a text too
    if num_ids > num_rows:
        token = backend.id_to_token(num_ids - 1)
        raise ValueError(
            f"{folder / TOKENIZER} has the id {num_ids - 1} ({token!r}) but the embedding has {num_rows} rows; "
            f"tokenizer and weights don't belong together: give those of one checkpoint"
        )
    special = {token.content: i for i, token in backend.get_added_tokens_decoder().items() if token.special}
    ids = {name: special[name] for name in SPECIAL_TOKENS if name in special}
    if image_id is not None:
        if image_id not in special.values():
            raise ValueError(
                f"{folder / 'config.json'} has image_token_id {image_id}, which is no special token of {TOKENIZER}; "
                f"tokenizer and weights don't belong together"
            )
        ids[IMAGE] = image_id
    if num_ids == num_rows and ids == {name: number for number, name in enumerate(SPECIAL_TOKENS)}:
        return ImportedTokenizer(
            TextTokenizer(backend), TEMPLATES, _default(theirs.chat_template, folder)[0], SPECIAL_TOKENS
        )
    shared = tuple(ids)
    missing = [name for name in SPECIAL_TOKENS if name not in ids]
    added = tuple(sorted(missing, key=lambda name: name != IMAGE))  # the picture's first: it may go out alone
    ids |= {name: num_rows + number for number, name in enumerate(added)}
    named = {key: str(value) for key, value in theirs.special_tokens_map.items() if isinstance(value, str)}
    if isinstance(theirs.eos_token_id, int):
        ends = tuple(dict.fromkeys((*ends, theirs.eos_token_id)))
    foreign = ForeignText(num_rows + len(added), ids, ends, named)
    template, others = _default(theirs.chat_template, folder)
    begin = _beginning(backend)
    return ImportedTokenizer(
        TextTokenizer(backend, foreign, written),
        _templates(begin, theirs.eos_token),
        template,
        shared,
        added,
        (*others, *_sampling(folder)),
    )


def reference_encoder(folder: str | Path) -> Tokenizer:
    """What transformers' own tokenizer of a checkpoint encodes text with.

    Raises:
        FileNotFoundError, ValueError, ModuleNotFoundError: as `read_tokenizer`.
    """
    return _load(Path(folder))[1]


def _load(folder: Path) -> tuple[Any, Tokenizer, str]:
    """The tokenizer of transformers, what it encodes with, and its `tokenizer.json`."""
    path = folder / TOKENIZER
    if not path.is_file():
        pieces = sorted(p.name for p in folder.glob("*.model")) if folder.is_dir() else []
        if pieces:
            raise ValueError(
                f"{folder} has its tokenizer in {pieces[0]} alone; wanted {TOKENIZER}: load it with transformers and "
                f"sentencepiece, and save it with save_pretrained"
            )
        raise FileNotFoundError(f"{path} doesn't exist; give a checkpoint with its tokenizer")
    config = read_json_if_there(folder / "tokenizer_config.json")
    if config.get("auto_map"):
        raise ValueError(
            f"{folder / 'tokenizer_config.json'} has auto_map {config['auto_map']!r}: a tokenizer of its own code, "
            f"which is never run; give a checkpoint whose tokenizer is one of transformers'"
        )
    if config.get("split_special_tokens"):
        raise ValueError(
            f"{folder / 'tokenizer_config.json'} has split_special_tokens true: texts then never hold a special token, "
            f"nor do conversations; set it to false"
        )
    transformers = transformers_library()
    with _read(path), quiet(transformers):
        theirs = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    backend = getattr(theirs, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ValueError(f"{folder}: its tokenizer, {type(theirs).__name__}, has no {TOKENIZER} that it works by")
    backend = Tokenizer.from_str(backend.to_str())
    backend.no_truncation()
    backend.no_padding()
    with _read(path):
        backend.encode("a", add_special_tokens=True)  # what frames a text is looked up only now
        written = path.read_text(encoding="utf-8")
        if not _is_alike(written, backend):
            written = backend.to_str(pretty=True)
    return theirs, backend, written


def _read(path: Path) -> contextlib.AbstractContextManager[None]:
    """Reading a tokenizer; whatever a damaged file makes of it is told as an error about the file."""
    return unreadable(
        lambda error: ValueError(
            f"{path}, with the configs beside it, can't be read as a tokenizer: {error}; copy the checkpoint again"
        )
    )


def _is_alike(written: str, backend: Tokenizer) -> bool:
    """Whether a file gives the very tokenizer; transformers builds some anew, with another pipeline than the file's."""
    from_file = Tokenizer.from_str(written)
    from_file.no_truncation()
    from_file.no_padding()
    return json.loads(from_file.to_str()) == json.loads(backend.to_str())


def _beginning(backend: Tokenizer) -> str:
    """What stands before every text: the special tokens that encoding puts there."""
    plain = backend.encode("a", add_special_tokens=False).ids
    framed = backend.encode("a", add_special_tokens=True).ids
    if framed == plain:
        return ""
    starts = [start for start in range(len(framed)) if framed[start : start + len(plain)] == plain]
    before = framed[: starts[0]] if starts else []
    return "".join(backend.id_to_token(token_id) or "" for token_id in before)


def _told_ends(folder: Path, num_rows: int) -> tuple[int, ...]:
    """What ends a text, as the generation config and the config say."""
    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        values = read_json_if_there(folder / name)
        text = values.get("text_config")
        for holder in (values, text if isinstance(text, Mapping) else {}):
            given = holder.get("eos_token_id")
            ids = given if isinstance(given, list) else [] if given is None else [given]
            if not all(type(token_id) is int and 0 <= token_id < num_rows for token_id in ids):
                raise ValueError(
                    f"{folder / name} has eos_token_id {given!r} but the embedding has {num_rows} rows; wanted the id "
                    f"of one, or a list of such; tokenizer and weights don't belong together"
                )
            found += ids
    return tuple(dict.fromkeys(found))


def _sampling(folder: Path) -> tuple[str, ...]:
    """What the generation config says of sampling: a model folder's texts are the most probable unless it is asked."""
    values = read_json_if_there(folder / "generation_config.json")
    told = [key for key in _SAMPLING if values.get(key) is not None]
    return (f"generation_config.json: {', '.join(told)}",) if told else ()


def _default(template: Any, folder: Path) -> tuple[str | None, tuple[str, ...]]:
    """The template of conversations, with line breaks as files have them, and what others there are."""
    others: tuple[str, ...] = ()
    if isinstance(template, Mapping):
        others = tuple(f"chat template {name!r}" for name in template if name != "default")
        template = template.get("default")
    if template is None:
        return None, others
    if not isinstance(template, str) or not _is_unicode(template):
        raise ValueError(
            f"{folder / 'tokenizer_config.json'} has chat_template {str(template)[:40]!a}; wanted text in Jinja: copy "
            f"the checkpoint again"
        )
    return template.replace("\r\n", "\n").replace("\r", "\n"), others


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _templates(begin: str, end: str | None) -> dict[str, dict[str, str]]:
    begin, end = _literal(begin), _literal(end or "")
    templates = {
        task: {"prompt": begin + parts["prompt"], "target": parts["target"]} for task, parts in TEMPLATES.items()
    }
    templates["text"] = {"prompt": begin, "target": "{text}" + (end or "<|end|>")}
    return templates


def _literal(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")
