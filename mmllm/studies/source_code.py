"""Text of a few million characters that every machine has: the source code of Python's standard library.

Its loss falls smoothly with size and tokens, and there is enough of it that a sweep need not repeat any.
"""

from __future__ import annotations

import hashlib
import json
import re
import sysconfig
from pathlib import Path

MAX_CHARACTERS = 2000
"""Longest document: definitions of one file that follow each other, as many as fit."""
HELDOUT_EVERY = 20
"""One of so many files is held out, told by its path's digest."""
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data", "__pycache__"}
"""Folders of tests, of what was installed, of tables, and of the prose that `mmllm quickstart` reads."""


def documents_of(text: str, max_characters: int = MAX_CHARACTERS) -> list[str]:
    """A file's text in pieces: at blank lines before what isn't indented; what is longer, between lines."""
    pieces = []
    for block in re.split(r"\n\s*\n(?=\S)", text.strip("\n")):
        lines: list[str] = []
        for line in block.splitlines():
            if lines and sum(map(len, lines)) + len(lines) + len(line) > max_characters:
                pieces.append("\n".join(lines))
                lines = []
            lines.append(line[:max_characters])
        pieces.append("\n".join(lines))
    documents: list[str] = []
    for piece in pieces:
        if documents and len(documents[-1]) + 2 + len(piece) <= max_characters:
            documents[-1] += "\n\n" + piece
        else:
            documents.append(piece)
    return [document for document in documents if document.strip()]


def is_heldout(path: str) -> bool:
    """Whether a file, named relative to the library's folder, is held out: alike on every machine."""
    return int(hashlib.sha256(path.encode()).hexdigest(), 16) % HELDOUT_EVERY == 0


def write_source_code(out: Path, library: Path | None = None) -> list[str]:
    """Writes `train.jsonl` and `test.jsonl`; gives lines to print.

    Whole files are held out. Equal documents are kept once, held-out ones first, so that none was trained on. The text
    depends on the version of Python.

    Args:
        out: folder to write to; made where it is missing.
        library: folder of the sources; None: of the running Python's.

    Raises:
        ValueError: there are no sources, as where the library is an archive.
    """
    library = Path(sysconfig.get_path("stdlib")) if library is None else library
    files = sorted(path.relative_to(library) for path in library.rglob("*.py"))
    names = [path.as_posix() for path in files if not _LEFT_OUT & set(path.parts)]
    rows: dict[str, list[dict[str, str]]] = {"test": [], "train": []}
    seen: set[str] = set()
    for split, found in rows.items():
        for name in (name for name in names if is_heldout(name) == (split == "test")):
            text = (library / name).read_text(encoding="utf-8", errors="replace")
            for document in documents_of(text):
                if document not in seen:
                    seen.add(document)
                    found.append({"id": f"code_{split}_{len(found):05d}", "text": document, "file": name})
    if not all(rows.values()):
        raise ValueError(
            f"{library} has too few sources to hold some out ({len(names)} files); run this with a Python whose "
            f"standard library is a folder of .py files"
        )
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for split in ("train", "test"):
        path, found = out / f"{split}.jsonl", rows[split]
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found), encoding="utf-8")
        num_characters = sum(len(row["text"]) for row in found)
        num_files = len({row["file"] for row in found})
        lines.append(f"{path}: {len(found):,} documents, {num_characters:,} characters of {num_files} files")
    return lines
