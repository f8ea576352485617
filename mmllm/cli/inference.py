"""`mmllm caption`, `transcribe`, `speak`, `generate` and `chat`: what a model folder can do."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

from mmllm.cli.command import add_command, check_model, check_there

_SETTINGS = (
    "max_new_tokens", "max_seconds", "temperature", "top_k", "top_p", "seed", "rate", "max_letter_seconds", "variation",
    "best_of",
)  # fmt: skip


def add_inference(commands: Any) -> None:
    """Adds the commands that run a model folder."""
    _add_caption(commands)
    _add_transcribe(commands)
    _add_speak(commands)
    _add_generate(commands)
    _add_chat(commands)


def _add_caption(commands: Any) -> None:
    parser = add_command(commands, "caption", "say what is in pictures", _caption)
    parser.add_argument("images", nargs="+", help="image files")
    _add_text_settings(parser)


def _caption(args: argparse.Namespace) -> Iterable[str]:
    check_model(args.model)
    check_there("image", *args.images)
    return _loaded(args).caption(args.images, **_settings(args))


def _add_transcribe(commands: Any) -> None:
    parser = add_command(commands, "transcribe", "write down what is said in recordings", _transcribe)
    parser.add_argument("sounds", nargs="+", help="sound files")
    _add_text_settings(parser)


def _transcribe(args: argparse.Namespace) -> Iterable[str]:
    check_model(args.model)
    check_there("sound", *args.sounds)
    return _loaded(args).transcribe(args.sounds, **_settings(args))


def _add_speak(commands: Any) -> None:
    parser = add_command(commands, "speak", "say a text", _speak)
    parser.add_argument("text")
    parser.add_argument("--out", required=True, metavar="WAV", help="the file to write, .wav or .flac")
    parser.add_argument("--voice", help="a speaker that the model speaks as")
    parser.add_argument("--max_seconds", type=float, help="at most so long, pauses apart")
    parser.add_argument(
        "--recording", metavar="FILE", help="a few seconds of a voice, in which the text is said; no --voice"
    )
    parser.add_argument("--recording_text", metavar="TEXT", help="what is said in the recording")
    parser.add_argument("--best_of", type=int, help="tries, of which the one is kept that the model hears best")
    parser.add_argument(
        "--rate", type=float, help="2: twice as fast, at the same pitch; this and what follows need a pointer"
    )
    parser.add_argument(
        "--pause", action="append", default=[], metavar="WORD=SECONDS",
        help="silence behind a word, by its number from 0; before the first: --pause=-1=SECONDS; may be repeated",
    )  # fmt: skip
    parser.add_argument("--max_letter_seconds", type=float, help="a letter lasts so long at most")
    parser.add_argument("--variation", type=float, help="how much the time of each letter is left to chance, 0 to 1")
    _add_settings(parser, several_temperatures=True)


def _speak(args: argparse.Namespace) -> Iterable[str]:
    check_model(args.model)
    check_there("recording", args.recording)
    settings = _settings(args)
    if args.pause:
        settings["pauses"] = dict(_pause(text) for text in args.pause)
    said = _loaded(args).speak(
        args.text, args.out, voice=args.voice, recording=args.recording, recording_text=args.recording_text, **settings
    )
    units = " x ".join(str(size) for size in reversed(said.codes_KF.shape))
    notes = [f"{args.out}: {said.seconds:.2f} s at {said.sample_rate} Hz, {units} units"]
    if said.num_bounded:
        notes.append(f"letters that would have lasted longer than they may: {said.num_bounded}")
    if not said.is_whole:
        notes.append("it ends before its text does: it ran into the bound of seconds")
    return notes


def _pause(text: str) -> tuple[int, float]:
    word, _, seconds = text.partition("=")
    try:
        return int(word), float(seconds)
    except ValueError:
        raise ValueError(f"--pause is {text!r}; give a word's number and seconds, such as 2=0.5") from None


def _add_generate(commands: Any) -> None:
    parser = add_command(commands, "generate", "continue any order of text, pictures and sounds", _generate)
    parser.add_argument("parts", nargs="+", help="text, and files that are told by their suffix")
    parser.add_argument("--image", action="append", help="fills an <|image|> slot of the text; may be repeated")
    parser.add_argument("--audio", action="append", help="fills an <|audio|> slot of the text; may be repeated")
    _add_text_settings(parser)


def _generate(args: argparse.Namespace) -> Iterable[str]:
    images, sounds = args.image or (), args.audio or ()
    check_model(args.model)
    check_there("image", *images)
    check_there("sound", *sounds)
    return [_loaded(args).generate(args.parts, images=images, sounds=sounds, **_settings(args))]


def _add_chat(commands: Any) -> None:
    parser = add_command(commands, "chat", "answer a message of text, pictures and sounds", _chat)
    parser.add_argument("parts", nargs="+", help="text, and files that are told by their suffix")
    parser.add_argument("--system", help="text before the conversation")
    _add_text_settings(parser)


def _chat(args: argparse.Namespace) -> Iterable[str]:
    check_model(args.model)
    messages = [{"role": "system", "content": args.system}] if args.system else []
    return [_loaded(args).chat([*messages, {"role": "user", "content": args.parts}], **_settings(args))]


def _add_text_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max_new_tokens", type=int, help="at most so many tokens")
    _add_settings(parser)


def _add_settings(parser: argparse.ArgumentParser, several_temperatures: bool = False) -> None:
    parser.add_argument("--model", required=True, metavar="DIR", help="model folder")
    parser.add_argument("--adapter", metavar="NAME", help="of the model's adapters; without it the model alone")
    if several_temperatures:
        parser.add_argument(
            "--temperature", type=_temperatures, metavar="T[,T…]", help="0: the most probable; one, or one a codebook"
        )
    else:
        parser.add_argument("--temperature", type=float, help="0 takes the most probable")
    parser.add_argument("--top_k", type=int, help="draw among so many")
    parser.add_argument("--top_p", type=float, help="draw among the fewest of this probability")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same output")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")


def _temperatures(text: str) -> float | list[float]:
    numbers = [float(number) for number in text.split(",")]
    return numbers if len(numbers) > 1 else numbers[0]


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """What was given: the rest is the model's own."""
    given = {name: getattr(args, name, None) for name in _SETTINGS}
    return {name: value for name, value in given.items() if value is not None}


def _loaded(args: argparse.Namespace) -> Any:
    from mmllm.inference.api import load

    return load(args.model, args.device, adapter=args.adapter)
