r"""Examples of tasks and several wordings of each, of which every example gets one: FLAN's instruction mixtures.

Beside `examples.jsonl` lies `examples.templates.yaml`:

    templates:
      nli:
        - ["{premise}\nDoes it follow that {hypothesis}?\n{options}", "{answer}"]
        - ["Is it true that {hypothesis}, if {premise}?", "{answer}"]

An example names its task (`task`) and has the fields. Which wording it gets depends on its id and the table's `seed`
alone. Longpre et al. 2023, https://arxiv.org/abs/2301.13688.
"""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import yaml

from mmllm.data.rows.bad_rows import ManifestError
from mmllm.data.rows.conversations import conversation, is_conversation
from mmllm.data.rows.holdout import even_hash
from mmllm.data.rows.inputs import Found, Input, each_record, record_id

_KEYS = ("templates", "seed", "column")
Wording = tuple[str, str]
"""Question and answer, with fields in braces."""


def table_path(path: Path) -> Path:
    """Where a file's table of wordings lies."""
    return path.with_suffix(".templates.yaml")


def wording_rows(given: Input) -> Found:
    """Each record as a conversation, in one of its task's wordings.

    Raises:
        ManifestError: There is no table of wordings, or it can't be read.
    """
    table = _Table(table_path(given.path))
    return each_record(given, "example", lambda record, number: table.row(record, number, given))


class _Table:
    """The wordings of tasks.

    Args:
        path: The YAML.

    Raises:
        ManifestError: It isn't such a table; the message names file and key.
    """

    def __init__(self, path: Path) -> None:
        try:
            told = yaml.safe_load(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ManifestError(f"{path}: no such table of wordings; write it, or name another form") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ManifestError(f"{path}: not YAML: {error}") from error
        if not isinstance(told, dict) or not isinstance(told.get("templates"), dict) or not told["templates"]:
            raise ManifestError(f"{path}: has no 'templates'; give a list of wordings for each task")
        unknown = [key for key in told if key not in _KEYS]
        if unknown:
            raise ManifestError(f"{path}: has the unknown key {unknown[0]!r}; known are {', '.join(_KEYS)}")
        self._path, self._seed, self._column = path, told.get("seed", 0), told.get("column", "task")
        self._wordings = {str(task): self._read(task, found) for task, found in told["templates"].items()}

    def _read(self, task: Any, found: Any) -> list[Wording]:
        wordings = []
        for item in found if isinstance(found, list) else [found]:
            match item:
                case [str() as prompt, str() as target] | {"prompt": str() as prompt, "target": str() as target}:
                    wordings.append((prompt, target))
                case _:
                    raise ManifestError(f"{self._path}: templates.{task} has {item!r}; give [question, answer] each")
        for wording in wordings:
            for text in wording:
                try:
                    fields = [field for _, *field in string.Formatter().parse(text) if field[0] is not None]
                except ValueError as error:
                    raise ManifestError(
                        f"{self._path}: templates.{task} has {text!r}: {error}; write {{{{ and }}}} for braces"
                    ) from error
                if not all(str(name).isidentifier() and not (spec or how) for name, spec, how in fields):
                    raise ManifestError(
                        f"{self._path}: templates.{task} has {text!r}; a field is the name of a key, without a format"
                    )
        if not wordings:
            raise ManifestError(f"{self._path}: templates.{task} is empty; give one wording at least")
        return wordings

    def row(self, record: dict[str, Any], number: int, given: Input) -> dict[str, Any]:
        """An example as a row."""
        task = record.get(self._column)
        if task is None or str(task) not in self._wordings:
            if is_conversation(record):  # `inputs` and `targets`: worded already
                return conversation(record, number, given)
            raise ManifestError(
                f"{self._column!r} is {task!r}, for which {self._path.name} has no wordings; it has "
                f"{', '.join(self._wordings)}"
            )
        name = record_id(record, f"example{number}")
        wordings = self._wordings[str(task)]
        chosen = int(even_hash(f"{self._seed}:{task}:{name}") * len(wordings))
        asked, answer = (_filled(text, record) for text in wordings[chosen])
        talk = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        others = {key: value for key, value in record.items() if key != "messages"}
        return conversation({**others, "id": name, "template": chosen, "messages": talk}, number, given)


def _filled(text: str, record: dict[str, Any]) -> str:
    pieces = []
    for literal, name, _, _ in string.Formatter().parse(text):
        pieces.append(literal)
        if name is not None:
            pieces.append(_value(record.get(name), name))
    return "".join(pieces)


def _value(value: Any, name: str) -> str:
    """A field as text; options one a line."""
    match value:
        case bool() | None:
            raise ManifestError(f"lacks {name!r}, which its wording reads, or it is {value!r}; give a text or a number")
        case str() | int() | float():
            return str(value)
        case list() if value and all(isinstance(item, (str, int, float)) for item in value):
            return "\n".join(f"- {item}" for item in value)
    raise ManifestError(f"{name!r} is {value!r}; a wording reads texts, numbers and lists of these")
