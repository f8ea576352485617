"""LibriSpeech: transcripts of a chapter beside its sounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmllm.data.rows.bad_rows import ManifestError
from mmllm.data.rows.inputs import Found, Input
from mmllm.data.rows.media_files import SOUNDS, visible_files

TRANSCRIPT = ".trans.txt"


def librispeech_rows(given: Input) -> Found:
    """`SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt` beside the sounds; a sound without a line in it is named."""
    files = visible_files(given.path, given.bad)
    sounds = {item.with_suffix(""): item for item in files if item.suffix.lower() in SOUNDS}
    told: set[Path] = set()
    for transcript in files:
        if not transcript.name.endswith(TRANSCRIPT):
            continue
        for number, data in enumerate(transcript.read_bytes().splitlines(), start=1):
            where = f"{transcript}:{number}"
            try:
                line = data.decode("utf-8-sig").strip()
            except UnicodeDecodeError as error:
                yield where, ManifestError(f"not UTF-8: {error}")
                continue
            if line:
                name, *texts = line.split(maxsplit=1)
                told.add(transcript.with_name(name))
                yield where, _row(name, "".join(texts), transcript.with_name(name), sounds)
    for sound in (item for item in files if item.suffix.lower() in SOUNDS):
        if (stem := sound.with_suffix("")) not in told:
            yield str(sound), ManifestError(f"no {TRANSCRIPT[1:]} beside it has a line for {stem.name}; add one")


def _row(name: str, text: str, stem: Path, sounds: dict[Path, Path]) -> dict[str, Any]:
    speaker, _, rest = name.partition("-")
    sound = sounds.get(stem, stem.with_name(name + SOUNDS[0]))
    row = {"id": name, "text": text, "audio": str(sound.absolute()), "speaker": speaker}
    return {**row, "chapter": rest.partition("-")[0]}
