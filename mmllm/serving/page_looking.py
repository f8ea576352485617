"""How an answer came about, as HTML: log-probabilities, where its words looked, and which experts took what.

Everything from a model or a user is escaped; what moves is in `page.js`, how it looks in `page.css`.

Shapes: L layers with experts, M modalities, E experts, y and x rows and columns of a picture's map.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from html import escape

import numpy as np
import soundfile
from PIL import Image

from mmllm.batch import Modality
from mmllm.evaluation.answer_traces import AnswerTrace, RoutingTrace, TracedToken
from mmllm.evaluation.attention_maps import SeenPicture, enlarged
from mmllm.evaluation.routing import load_by_modality
from mmllm.evaluation.speech_traces import SpeechTrace
from mmllm.inference.speaking import Waveform
from mmllm.inference.transcripts import Transcript, Word

ALL_LAYERS = "mean of all layers"
_HEAT_PIXELS = 56
_SMALL_PIXELS = 160
"""Pictures up to this side are shown with hard pixels."""
_HEAT = np.array([[20, 20, 30], [179, 49, 107], [242, 138, 50], [252, 231, 106]], dtype=np.float64)
"""Colours from where nothing is looked at to where most is."""
_HEAT_ALPHA = (0.32, 0.68)
_NAMES = {
    Modality.TEXT: "text", Modality.IMAGE: "picture", Modality.AUDIO: "sound heard", Modality.UNITS: "sound spoken",
}  # fmt: skip


def trace_html(trace: AnswerTrace, layer: str | None = None) -> str:
    """All there is to see of a trace.

    Args:
        trace: of an answer.
        layer: whose attention is shown, one of `layer_names`; None: the first of these.
    """
    parts = [tokens_html(trace), *(looks_html(trace, layer) if trace.pictures else ()), experts_html(trace.routing)]
    return "".join(f'<section class="mm-part">{part}</section>' for part in parts if part)


def speech_traces_html(traces: Sequence[SpeechTrace]) -> str:
    """All there is to see of speech: its words on the ground of their units' doubt, and the experts, by sentence."""
    parts = []
    for trace in traces:
        buttons = []
        for word, logprobs_K in trace.words:
            mean = float(logprobs_K.mean())
            by_codebook = ", ".join(f"{math.exp(each):.1%}" for each in logprobs_K)
            info = escape(f"{word}: its units are {math.exp(mean):.1%} probable (by codebook {by_codebook})")
            buttons.append(_token_button(word, mean, info))
        parts.append(
            f"<h3>How sure it was of each word's sound</h3>"
            f'<div class="mm-tokens">{"".join(buttons)}</div>'
            f'<div class="mm-info" aria-live="polite">Choose a word to see how sure it was in each codebook.</div>'
            f'<p class="mm-legend">0% <i class="mm-sure"></i> 100% probable: the geometric mean over a word\'s '
            f"{trace.logprobs_KF.shape[0]} units a frame, at temperature 1</p>"
        )
        parts.append(experts_html(trace.routing))
    return "".join(f'<section class="mm-part">{part}</section>' for part in parts if part)


def layer_names(trace: AnswerTrace) -> list[str]:
    """What can be chosen: each layer from the last to the first, and the mean of all.

    The last comes first: where the demo's captions name a colour and a shape, 94% and 86% of what that layer's words
    look at in the picture lies in the quarter that has the object (of all layers' mean 73% and 69%, by chance 25%).
    """
    return [*(f"layer {layer}" for layer in reversed(trace.attention.layers)), ALL_LAYERS]


def tokens_html(trace: AnswerTrace) -> str:
    """Each token on the ground of its doubt; chosen, it says its probability, the next best, and its experts."""
    first = len(trace.routing.modality_N) - len(trace.tokens)
    buttons = []
    for number, token in enumerate(trace.tokens):
        info = escape(f"{_token_info(token)}{_experts_of(trace.routing, first + number)}")
        buttons.append(_token_button(_shown(token.piece), token.logprob, info, token.is_end))
    total = sum(token.logprob for token in trace.tokens)
    return (
        f"<h3>How sure it was of each token</h3>"
        f'<div class="mm-tokens">{"".join(buttons)}</div>'
        f'<div class="mm-info" aria-live="polite">Choose a token to see what else it might have been.</div>'
        f'<p class="mm-legend">0% <i class="mm-sure"></i> 100% probable · all together {total:.2f} nats</p>'
    )


def _token_button(text: str, logprob: float, info: str, is_end: bool = False) -> str:
    """What was drawn, the more coloured the less probable it was; `info` is escaped."""
    colour = f"background: color-mix(in srgb, var(--mm-hot) {80 * (1 - math.exp(logprob)):.0f}%, transparent)"
    kind = ' class="mm-end"' if is_end else ""
    return f'<button type="button"{kind} style="{colour}" data-info="{info}" title="{info}">{escape(text)}</button>'


def _token_info(token: TracedToken) -> str:
    best = ", ".join(f"{_shown(piece)} {math.exp(logprob):.1%}" for piece, logprob in token.alternatives)
    chosen = f"{_shown(token.piece)}: {math.exp(token.logprob):.1%} ({token.logprob:.2f} nats)"
    return f"{chosen}; most probable: {best}"


def _experts_of(routing: RoutingTrace, place: int) -> str:
    """Which experts a token passed, by layer; "" in a model without."""
    chosen = [
        f"{layer}: {'+'.join(str(expert) for expert in experts_NK[place] if expert >= 0)}"
        for layer, experts_NK in zip(routing.layers, routing.experts_LNK, strict=True)
    ]
    return f"; experts by layer {', '.join(chosen)}" if chosen else ""


def _shown(piece: str) -> str:
    return piece.replace("\n", "↵").strip(" ") or ("␣" if piece else "·")


def looks_html(trace: AnswerTrace, layer: str | None = None) -> list[str]:
    """Each picture with a map over it of where the chosen word looked; first the word that looked most at one place."""
    if not trace.words:
        return []
    if not trace.attention.layers:
        return ["<h3>Where words looked</h3>with this adapter, or in such layers, it isn't known"]
    placed = [picture for picture in trace.pictures if picture.grid is not None]
    if not placed:
        return ["<h3>Where words looked</h3>this model's picture tokens are of no place in the picture"]
    layer = layer or layer_names(trace)[0]
    number = None if layer == ALL_LAYERS else int(layer.rpartition(" ")[2])
    looks = [trace.looks(word, number) for word in trace.words]
    maps = [[picture.map_yx(looks_N) for picture in placed] for looks_N in looks]
    first = int(np.argmax([max(float(map_yx.max()) for map_yx in each) for each in maps]))
    heats = [" ".join(_heat_uri(map_yx) for map_yx in each) for each in maps]
    infos = [
        f"“{word.text}”: {sum(picture.share(looks_N) for picture in placed):.0%} of its attention is on the picture"
        for word, looks_N in zip(trace.words, looks, strict=True)
    ]
    frames = [_picture_html(picture, heat) for picture, heat in zip(placed, heats[first].split(" "), strict=True)]
    buttons = [
        f'<button type="button" aria-pressed="{str(place == first).lower()}" data-heat="{heat}" '
        f'data-info="{escape(info)}">{escape(word.text)}</button>'
        for place, (word, info, heat) in enumerate(zip(trace.words, infos, heats, strict=True))
    ]
    html = (
        f"<h3>Where each word looked in the picture</h3>"
        f'<div class="mm-look"><div class="mm-pictures">{"".join(frames)}</div><div>'
        f'<div class="mm-looks">{"".join(buttons)}</div>'
        f'<div class="mm-info" aria-live="polite">{escape(infos[first])}</div>'
        f'<p class="mm-legend">least <i class="mm-warm"></i> most, for this word</p>'
        f'<p class="mm-note">Attention from the place that predicts the word: {escape(layer)}, mean over heads and the '
        f"word's tokens. The picture is shown as the model gets it.</p></div></div>"
    )
    return [html]


def _picture_html(picture: SeenPicture, heat: str) -> str:
    size = picture.pixels_3yx.shape[1:]
    small = ' class="mm-small"' if max(size) <= _SMALL_PIXELS else ""
    uri = png_uri(np.ascontiguousarray(picture.pixels_3yx.transpose(1, 2, 0)))
    return (
        f'<div class="mm-picture" style="aspect-ratio: {size[1]} / {size[0]}">'
        f'<img{small} src="{uri}" alt="the picture as the model gets it"><img class="mm-heat" src="{heat}" alt="">'
        f"</div>"
    )


def _heat_uri(map_yx: np.ndarray) -> str:
    """A map as a picture that lies over another: dark where little is looked at, bright where most is."""
    scaled = enlarged(map_yx, _HEAT_PIXELS)
    place = scaled * (len(_HEAT) - 1)
    channels = [np.interp(place, range(len(_HEAT)), _HEAT[:, channel]) for channel in range(3)]
    alpha = 255 * np.interp(scaled, (0, 1), _HEAT_ALPHA)
    return png_uri(np.stack([*channels, alpha], axis=-1).round().astype(np.uint8))


def png_uri(pixels_HWC: np.ndarray) -> str:
    """Pixels as a data URI."""
    file = io.BytesIO()
    Image.fromarray(pixels_HWC).save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def experts_html(routing: RoutingTrace) -> str:
    """For each modality, what share of its tokens went to each expert of each layer; "" in a model without."""
    if not len(routing.layers):
        return ""
    counts_LME = routing.counts_LME
    loads_LME = load_by_modality(counts_LME)
    maps = [
        _map_html(routing, modality, loads_LME[:, modality]) for modality in Modality if counts_LME[:, modality].any()
    ]
    top_k = routing.experts_LNK.shape[-1]
    return (
        f"<h3>Which experts took which tokens</h3>"
        f'<div class="mm-maps">{"".join(maps)}</div>'
        f'<p class="mm-legend">rows: layers; columns: experts; numbers: percent of a row\'s choices; each token passes '
        f"{top_k} of {routing.num_experts} experts, so that an even share is {100 / routing.num_experts:.3g}%</p>"
    )


def _map_html(routing: RoutingTrace, modality: Modality, loads_LE: np.ndarray) -> str:
    name, colour = _NAMES[modality], modality.name.lower()
    num_tokens = int((routing.modality_N == modality).sum())
    heads = "".join(f"<th>{expert}</th>" for expert in range(routing.num_experts))
    rows = []
    for layer, loads_E in zip(routing.layers, loads_LE, strict=True):
        cells = "".join(
            f'<td style="background: color-mix(in srgb, var(--mm-{colour}) {min(85, round(170 * load))}%, '
            f'transparent)" title="layer {layer}, expert {expert}: {load:.1%} of {name}">{100 * load:.0f}</td>'
            for expert, load in enumerate(loads_E)
        )
        rows.append(f"<tr><th>{layer}</th>{cells}</tr>")
    return (
        f'<div class="mm-map" style="--mm: var(--mm-{colour})"><table><caption>{name}: {num_tokens} tokens</caption>'
        f"<tr><th></th>{heads}</tr>{''.join(rows)}</table></div>"
    )


def transcript_html(transcript: Transcript, sound_url: str) -> str:
    """A sound with its transcript, whose words light up while they are heard."""
    if not transcript.text:
        return '<div class="mm-sound"><p class="mm-note">Nothing is said in this sound.</p></div>'
    words = " ".join(
        _words_html(segment.words, segment.doubtful) if segment.words else escape(segment.text)
        for segment in transcript.segments
    )
    note = '<p class="mm-note">Dotted: the model doubts that this is said.</p>' if transcript.doubtful else ""
    return (
        f'<div class="mm-sound"><audio controls preload="metadata" src="{escape(sound_url)}"></audio>'
        f'<div class="mm-said">{words or escape(transcript.text)}</div>{note}</div>'
    )


def speech_html(text: str, waveform: Waveform, has_more: bool) -> str:
    """A sentence that was spoken; its words light up while they are said.

    Args:
        text: what was to be said.
        waveform: the sound.
        has_more: another sentence follows, and is to be played behind it.
    """
    words = tuple(Word(word.word, word.start, word.end) for word in waveform.words)
    said = _words_html(words, False) if words else escape(text)
    note = "" if waveform.is_whole else '<p class="mm-note">It ends before its text does.</p>'
    more = " data-more" if has_more else ""
    return (
        f'<div class="mm-sound mm-sentence"{more}><audio controls src="{wav_uri(waveform)}"></audio>'
        f'<div class="mm-said">{said}</div>{note}</div>'
    )


def wav_uri(waveform: Waveform) -> str:
    """A sound as a data URI: nothing of it stays behind on a disk."""
    return f"data:audio/wav;base64,{base64.b64encode(wav_bytes([waveform])).decode()}"


def wav_bytes(waveforms: Sequence[Waveform]) -> bytes:
    """Sounds of one rate, one behind the other, as a 16-bit WAV."""
    file = io.BytesIO()
    samples_T = np.concatenate([waveform.samples for waveform in waveforms]).clip(-1.0, 1.0)
    soundfile.write(file, samples_T, waveforms[0].sample_rate, format="WAV", subtype="PCM_16")
    return file.getvalue()


def _words_html(words: tuple[Word, ...], is_doubtful: bool) -> str:
    kind = ' class="mm-doubt"' if is_doubtful else ""
    return " ".join(
        f'<span{kind} data-start="{word.start:.3f}" data-end="{word.end:.3f}">{escape(word.word)}</span>'
        for word in words
    )
