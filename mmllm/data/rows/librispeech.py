"""LibriSpeech: transcripts of a chapter beside its sounds."""

from __future__ import annotations

from pathlib import Path

from mmllm.data.rows.bad_rows import ManifestError
from mmllm.data.rows.media_files import SOUNDS
from mmllm.data.rows.records import Found


def librispeech_rows(path: Path, folder: Path) -> Found:
    """`SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt` beside the sounds."""
    for transcript in sorted(path.rglob("*.trans.txt")):
        lines = transcript.read_bytes().splitlines()
        for number, data in enumerate(lines, start=1):
            try:
                line = data.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                yield f"{transcript}:{number}", ManifestError(f"not UTF-8: {error}")
                continue
            name, _, text = line.strip().partition(" ")
            if not name:
                continue
            sounds = [transcript.with_name(name + ending) for ending in SOUNDS]
            sound = next((item for item in sounds if item.is_file()), sounds[0])
            speaker, _, rest = name.partition("-")
            row = {"id": name, "text": text, "audio": str(sound.absolute()), "speaker": speaker}
            yield f"{transcript}:{number}", {**row, "chapter": rest.partition("-")[0]}
