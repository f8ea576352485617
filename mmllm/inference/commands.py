"""The commands `mmllm caption`, `transcribe`, `speak`, `generate` and `chat`: text in, text to print out."""

from __future__ import annotations

from mmllm.inference.api import SpeechSettings, TextSettings, load


def caption(
    model: str,
    images: list[str],
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    device: str = "auto",
) -> list[str]:
    """Says what is in each image, one line an image.

    Args:
        model: a model folder.
        images: image files.
        max_new_tokens: at most so many tokens a caption.
        temperature: 0 takes the most probable token.
        top_k: draw among so many tokens.
        top_p: draw among the fewest tokens of this probability.
        seed: the same seed gives the same text.
        device: "auto", "cpu" or "cuda".
    """
    settings = _text_settings(max_new_tokens, temperature, top_k, top_p, seed)
    return load(model, device).caption(list(images), **settings)


def transcribe(
    model: str,
    sounds: list[str],
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    device: str = "auto",
) -> list[str]:
    """Writes down what is said in each sound, one line a sound.

    Args:
        model: a model folder.
        sounds: sound files.
        max_new_tokens: at most so many tokens a transcript.
        temperature: 0 takes the most probable token.
        top_k: draw among so many tokens.
        top_p: draw among the fewest tokens of this probability.
        seed: the same seed gives the same text.
        device: "auto", "cpu" or "cuda".
    """
    settings = _text_settings(max_new_tokens, temperature, top_k, top_p, seed)
    return load(model, device).transcribe(list(sounds), **settings)


def speak(
    model: str,
    text: str,
    out: str,
    voice: str | None = None,
    max_seconds: float | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    device: str = "auto",
) -> str:
    """Says a text into a sound file.

    Args:
        model: a model folder.
        text: what to say.
        out: the file to write, `.wav` or `.flac`.
        voice: a speaker of the training data.
        max_seconds: at most so long.
        temperature: 0 takes the most probable unit.
        top_k: draw among so many units.
        top_p: draw among the fewest units of this probability.
        seed: the same seed gives the same speech.
        device: "auto", "cpu" or "cuda".
    """
    settings: SpeechSettings = {"seed": seed}
    if max_seconds is not None:
        settings["max_seconds"] = max_seconds
    if temperature is not None:
        settings["temperature"] = temperature
    if top_k is not None:
        settings["top_k"] = top_k
    if top_p is not None:
        settings["top_p"] = top_p
    waveform = load(model, device).speak(text, out, voice=voice, **settings)
    num_codebooks, num_frames = waveform.codes_KF.shape
    return f"{out}: {waveform.seconds:.2f} s at {waveform.sample_rate} Hz, {num_frames} x {num_codebooks} units"


def generate(
    model: str,
    parts: list[str],
    images: list[str] | None = None,
    sounds: list[str] | None = None,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    device: str = "auto",
) -> str:
    """Continues a prompt of text, image files and sound files in any order.

    Args:
        model: a model folder.
        parts: text, and files that are told by their suffix.
        images: files that fill the text's `<|image|>` slots.
        sounds: files that fill the text's `<|audio|>` slots.
        max_new_tokens: at most so many tokens.
        temperature: 0 takes the most probable token.
        top_k: draw among so many tokens.
        top_p: draw among the fewest tokens of this probability.
        seed: the same seed gives the same text.
        device: "auto", "cpu" or "cuda".
    """
    settings = _text_settings(max_new_tokens, temperature, top_k, top_p, seed)
    return load(model, device).generate(list(parts), images=images or (), sounds=sounds or (), **settings)


def chat(
    model: str,
    parts: list[str],
    system: str | None = None,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    device: str = "auto",
) -> str:
    """Answers one message of text, image files and sound files; `Model.chat` takes a whole conversation.

    Args:
        model: a model folder.
        parts: text, and files that are told by their suffix.
        system: text before the conversation.
        max_new_tokens: at most so many tokens.
        temperature: 0 takes the most probable token.
        top_k: draw among so many tokens.
        top_p: draw among the fewest tokens of this probability.
        seed: the same seed gives the same text.
        device: "auto", "cpu" or "cuda".
    """
    messages = [{"role": "system", "content": system}] if system else []
    settings = _text_settings(max_new_tokens, temperature, top_k, top_p, seed)
    return load(model, device).chat([*messages, {"role": "user", "content": list(parts)}], **settings)


def _text_settings(
    max_new_tokens: int | None, temperature: float | None, top_k: int | None, top_p: float | None, seed: int
) -> TextSettings:
    """Only what was given: the rest is the model's own."""
    settings: TextSettings = {"seed": seed}
    if max_new_tokens is not None:
        settings["max_new_tokens"] = max_new_tokens
    if temperature is not None:
        settings["temperature"] = temperature
    if top_k is not None:
        settings["top_k"] = top_k
    if top_p is not None:
        settings["top_p"] = top_p
    return settings
