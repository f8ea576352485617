"""`mmllm caption`, `transcribe`, `speak`, `generate` and `chat`: what a model folder can do."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

from mmllm.cli.command import add_command, check_model, check_there

_SETTINGS = ("max_new_tokens", "max_seconds", "temperature", "top_k", "top_p", "seed")


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
    parser.add_argument("--voice", help="a speaker of the training data")
    parser.add_argument("--max_seconds", type=float, help="at most so long")
    _add_settings(parser)


def _speak(args: argparse.Namespace) -> Iterable[str]:
    check_model(args.model)
    said = _loaded(args).speak(args.text, args.out, voice=args.voice, **_settings(args))
    units = " x ".join(str(size) for size in reversed(said.codes_KF.shape))
    return [f"{args.out}: {said.seconds:.2f} s at {said.sample_rate} Hz, {units} units"]


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


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="DIR", help="model folder")
    parser.add_argument("--adapter", metavar="NAME", help="of the model's adapters; without it the model alone")
    parser.add_argument("--temperature", type=float, help="0 takes the most probable")
    parser.add_argument("--top_k", type=int, help="draw among so many")
    parser.add_argument("--top_p", type=float, help="draw among the fewest of this probability")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same output")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """What was given: the rest is the model's own."""
    given = {name: getattr(args, name, None) for name in _SETTINGS}
    return {name: value for name, value in given.items() if value is not None}


def _loaded(args: argparse.Namespace) -> Any:
    from mmllm.inference.api import load

    return load(args.model, args.device, adapter=args.adapter)
