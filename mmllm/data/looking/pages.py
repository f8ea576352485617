"""HTML pages without any file beside them: a step's contents, and a recipe's statistics as plots.

Everything that comes from data is escaped; pictures and sounds are embedded.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Any

import numpy as np
from PIL import Image

from mmllm.batch import Modality
from mmllm.data.samples.decode import decode_image
from mmllm.data.samples.document import Document
from mmllm.data.samples.sample import Sample
from mmllm_tokenizers.folder import TokenizerFolder

_THUMBNAIL = 160
_WIDTH = 640
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1c2733}
h1{font-size:1.4rem}h2{font-size:1.05rem;margin-top:2rem}code{font-size:.85em;color:#5a6572}
section{border:1px solid #dcdfe2;border-radius:8px;padding:.6rem 1rem;margin:.6rem 0;background:#fff}
mark{background:#d9ecd4}.slot{color:#8a94a0}.error{color:#a3261b}img{max-height:10rem;border-radius:4px;margin:.2rem}
p{white-space:pre-wrap;overflow-wrap:anywhere;margin:.4rem 0}svg{display:block;margin:.5rem 0}td{padding-right:1.5rem}
"""

Shown = tuple[dict[str, Any], Any, Sample | None, list[str]]
"""A document's name, the document (or the gap that it left), its sample, and what failed."""


def _page(title: str, body: str) -> str:
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style><h1>{escape(title)}</h1>{body}</html>\n"
    )


def step_page(
    shown: Mapping[str, Any], sequences: Sequence[tuple[Mapping[str, Any], Sequence[Shown]]], folder: TokenizerFolder
) -> str:
    """A step as a page: what is to be predicted is marked."""
    parts = [f"<p>recipe <code>{escape(str(shown['recipe_hash']))}</code>, {shown['global_batch']} sequences</p>"]
    for number, (told, documents) in enumerate(sequences):
        parts.append(
            f"<h2>Sequence {number}: {told['tokens']} tokens, {len(documents)} documents "
            f"<code>{escape(told['hash'])}</code></h2>"
        )
        parts += [_document(item, folder) for item in documents]
    return _page(f"Step {shown['step']}", "".join(parts))


def _document(shown: Shown, folder: TokenizerFolder) -> str:
    named, document, sample, errors = shown
    head = f"<b>{escape(named['source'])}</b> as {escape(named['task'])}, {named['tokens']} tokens "
    head += f"<code>{escape(named['shard'])}:{escape(named['key'])} at byte {named['offset']}</code>"
    body = "".join(f'<p class="error">{escape(error)}</p>' for error in errors)
    if isinstance(document, Document):
        body += f"<p>{_text(document, folder)}</p>"
    return f"<section>{head}{body}{_media(sample) if sample is not None else ''}</section>"


def _text(document: Document, folder: TokenizerFolder) -> str:
    """Text with targets marked; runs of slots and units by their number."""
    kinds_T = document.modality_T * 2 + document.targets_T
    bounds = [0, *(np.flatnonzero(np.diff(kinds_T)) + 1).tolist(), len(kinds_T)]
    parts = []
    for start, stop in pairwise(bounds):
        if start == stop:
            continue
        modality, is_target = Modality(int(document.modality_T[start])), bool(document.targets_T[start])
        if modality is Modality.TEXT:
            text = escape(folder.text.decode(document.token_ids_T[start:stop].tolist()))
        else:
            text = f'<span class="slot">[{modality.name.lower()} × {stop - start}]</span>'
        parts.append(f"<mark>{text}</mark>" if is_target else text)
    return "".join(parts)


def _media(sample: Sample) -> str:
    pictures = [sample.image, *(segment.image for segment in sample.segments)]
    sounds = [sample.audio, *(segment.audio for segment in sample.segments)]
    parts = [_thumbnail(picture) for picture in pictures if isinstance(picture, bytes)]
    parts += [_player(sound) for sound in sounds if isinstance(sound, bytes)]
    return "".join(parts)


def _thumbnail(data: bytes) -> str:
    try:
        picture = decode_image(data)
    except ValueError as error:
        return f'<p class="error">{escape(str(error))}</p>'
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BICUBIC)
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=85)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}">'


def _player(data: bytes) -> str:
    kind = {b"fLaC": "flac", b"RIFF": "wav", b"OggS": "ogg"}.get(data[:4], "mpeg")
    return f'<audio controls src="data:audio/{kind};base64,{base64.b64encode(data).decode()}"></audio>'


def stats_page(told: Mapping[str, Any]) -> str:
    """A recipe's statistics as plots: what `commands.stats` returned."""
    shares = [
        (name, share, f"{100 * share:.2f}% (wanted {100 * told['wanted_share'].get(name, 0.0):.2f}%)")
        for name, share in told["share"].items()
    ]
    facts = [
        ("steps", told["steps"]),
        ("padding", f"{100 * told['padding']:.2f}%"),
        ("mean tokens a document", f"{told['mean_document_tokens']:.1f}"),
        ("documents drawn more than once", told["repeated_documents"]),
    ]
    table = "".join(f"<tr><td>{escape(name)}</td><td>{escape(str(value))}</td></tr>" for name, value in facts)
    tokens = [(task, float(count), f"{count:,} tokens") for task, count in told["tokens_by_task"].items()]
    parts = [
        f"<p>recipe <code>{escape(told['recipe_hash'])}</code></p><table>{table}</table>",
        "<h2>Share of the tokens by source</h2>", bars(shares), "<h2>Tokens by task</h2>", bars(tokens),
    ]  # fmt: skip
    for name, lengths in told["lengths"].items():
        rows = [(f"{low}–{high}", float(count), f"{count:,}") for low, high, count in lengths]
        parts += [f"<h2>Tokens of a document: {escape(name)}</h2>", bars(rows)]
    parts += ["<h2>How full the sequences are, by step</h2>", line(told["fill_by_step"])]
    return _page("What a recipe draws", "".join(parts))


def bars(rows: Sequence[tuple[str, float, str]]) -> str:
    """Labelled bars as SVG: (label, value, what is written beside it)."""
    top = max((value for _, value, _ in rows), default=0.0) or 1.0
    parts = []
    for number, (label, value, said) in enumerate(rows):
        y, width = 22 * number, max(1.0, 300 * value / top)
        parts.append(
            f'<text x="150" y="{y + 14}" text-anchor="end" font-size="13">{escape(label)}</text>'
            f'<rect x="158" y="{y + 2}" width="{width:.1f}" height="16" fill="#3d7ea6"/>'
            f'<text x="{164 + width:.1f}" y="{y + 14}" font-size="13" fill="#5a6572">{escape(said)}</text>'
        )
    return f'<svg width="{_WIDTH}" height="{22 * len(rows) + 4}" role="img">{"".join(parts)}</svg>'


def line(values: Sequence[float]) -> str:
    """A line as SVG, from 0 to 1."""
    step = (_WIDTH - 60) / max(1, len(values) - 1)
    points = " ".join(f"{50 + step * number:.1f},{110 - 100 * value:.1f}" for number, value in enumerate(values))
    return (
        f'<svg width="{_WIDTH}" height="120" role="img">'
        f'<text x="44" y="14" text-anchor="end" font-size="12">100%</text>'
        f'<text x="44" y="114" text-anchor="end" font-size="12">0%</text>'
        f'<polyline points="{points}" fill="none" stroke="#3d7ea6" stroke-width="1.5"/></svg>'
    )
