"""`mmllm caption`, `transcribe`, `answer`, `speak`, `generate` and `embed`: what a model folder can do, file by file.

Results are printed in the order of the inputs, as they come. What can't be read is named on stderr and ends nothing but
itself; the exit code is then 2.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from mmllm.cli.command import add_command, check_model, check_there
from mmllm.ticker import draw_line, end_line

_SETTINGS = (
    "max_new_tokens", "max_seconds", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "stop",
    "rate", "max_letter_seconds", "variation", "best_of", "choices", "regex",
    "num_beams", "length_penalty",
)  # fmt: skip
_MOST_AT_ONCE = 64
STDIN = "-"


def add_inference(commands: Any) -> None:
    """Adds the commands that run a model folder."""
    _add_caption(commands)
    _add_transcribe(commands)
    _add_answer(commands)
    _add_speak(commands)
    _add_generate(commands)
    _add_embed(commands)


def _add_caption(commands: Any) -> None:
    parser = add_command(commands, "caption", "say what is in pictures", _caption)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files; -: their names from stdin, one a line")
    add_json_option(parser)
    add_text_settings(parser)


def _caption(args: argparse.Namespace) -> Iterable[str]:
    files = _files("image", args.images, args.model)
    model, settings = load_model(args), given_settings(args)
    line = _line_of_text(args.json)
    return _each(files, lambda some: model.caption(some, on_error="return", **settings), line, args.json)


def _add_transcribe(commands: Any) -> None:
    parser = add_command(commands, "transcribe", "write down what is said in recordings of any length", _transcribe)
    parser.add_argument("sounds", nargs="+", metavar="SOUND", help="sound files; -: their names from stdin, one a line")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--srt", action="store_true", help="subtitles as SubRip")
    form.add_argument("--vtt", action="store_true", help="subtitles as WebVTT")
    form.add_argument("--json", action="store_true", help="a JSON object a line, with segments, words and their times")
    parser.add_argument("--out", metavar="DIR", help="a file for each sound goes there, in place of the terminal")
    parser.add_argument(
        "--vad", choices=("energy", "silero"), default="energy", help="how pauses of long sounds are found"
    )
    add_text_settings(parser)


def _transcribe(args: argparse.Namespace) -> Iterable[str]:
    if (args.srt or args.vtt) and args.out is None and (len(args.sounds) > 1 or STDIN in args.sounds):
        raise ValueError("subtitles of several sounds need a folder for their files; give --out DIR, or one sound")
    files = _files("sound", args.sounds, args.model)
    if args.out is not None:
        Path(args.out).mkdir(parents=True, exist_ok=True)
    model, settings = load_model(args), given_settings(args)
    from mmllm.inference.long_sound import LongSoundSettings

    timed = args.srt or args.vtt or args.json
    more = {"timestamps": timed, "long_sound": LongSoundSettings(vad=args.vad), "on_error": "return"}
    line, as_lines = _line_of_transcript(args), args.json and args.out is None
    return _each(files, lambda some: model.transcribe(some, **more, **settings), line, as_lines)


def _line_of_transcript(args: argparse.Namespace) -> Callable[[str, Any], str]:
    from mmllm.inference.subtitles import to_srt, to_verbose_json, to_vtt

    suffix = "srt" if args.srt else "vtt" if args.vtt else "json" if args.json else "txt"

    def line(file: str, said: Any) -> str:
        match suffix:
            case "srt":
                text = to_srt(said)
            case "vtt":
                text = to_vtt(said)
            case "json":
                text = _json_line({"input": file, **to_verbose_json(said)})
            case _:
                text = said.text
        if args.out is None:
            return text.removesuffix("\n")
        path = Path(args.out) / f"{Path(file).stem}.{suffix}"
        path.write_text(text.removesuffix("\n") + "\n", encoding="utf-8")
        return str(path)

    return line


def _add_answer(commands: Any) -> None:
    parser = add_command(commands, "answer", "answer a question about text, pictures and sounds", _answer)
    parser.add_argument(
        "parts", nargs="+", metavar="PART", help="text, and files that are told by their suffix; -: text from stdin"
    )
    parser.add_argument("--question", required=True, metavar="TEXT", help="what is asked about them")
    add_json_option(parser)
    add_text_settings(parser)


def _answer(args: argparse.Namespace) -> Iterable[str]:
    check_model(args.model)
    parts = read_parts(args.parts)
    said = load_model(args).answer(parts, args.question, **given_settings(args))
    return [_line_of_text(args.json)(args.question, said)]


def _add_speak(commands: Any) -> None:
    parser = add_command(commands, "speak", "say a text", _speak)
    parser.add_argument("text", metavar="TEXT", help="what to say; -: from stdin")
    parser.add_argument("--out", required=True, metavar="FILE", help="the file to write, .wav, .flac or .ogg")
    parser.add_argument("--voice", metavar="NAME", help="a speaker that the model speaks as")
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
    text = read_text() if args.text == STDIN else args.text
    settings = given_settings(args)
    if args.pause:
        settings["pauses"] = dict(_pause(pause) for pause in args.pause)
    said = load_model(args).speak(
        text, args.out, voice=args.voice, recording=args.recording, recording_text=args.recording_text, **settings
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
    parser.add_argument(
        "parts", nargs="+", metavar="PART", help="text, and files that are told by their suffix; -: text from stdin"
    )
    parser.add_argument(
        "--image", action="append", metavar="FILE", help="fills an <|image|> slot of the text; may be repeated"
    )
    parser.add_argument(
        "--audio", action="append", metavar="FILE", help="fills an <|audio|> slot of the text; may be repeated"
    )
    add_json_option(parser)
    add_text_settings(parser)


def _generate(args: argparse.Namespace) -> Iterable[str]:
    images, sounds = args.image or (), args.audio or ()
    check_model(args.model)
    check_there("image", *images)
    check_there("sound", *sounds)
    parts = read_parts(args.parts)
    said = load_model(args).generate(parts, images=images, sounds=sounds, **given_settings(args))
    return [_line_of_text(args.json)(" ".join(args.parts), said)]


def _add_embed(commands: Any) -> None:
    parser = add_command(commands, "embed", "pictures, sounds and texts as vectors, a JSON object a line", _embed)
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="text, and files that are told by their suffix; -: from stdin, one "
        "a line",
    )  # fmt: skip
    parser.add_argument("--space", choices=("decoder", "clip"), default="decoder")
    parser.add_argument("--clip", metavar="DIR", help="of space clip: the CLIP whose image side the model has")
    parser.add_argument("--pooling", choices=("mean", "last"), default="mean", help="in the decoder's space")
    parser.add_argument("--not_normalized", action="store_true", help="vectors keep their length")
    _add_model(parser)


def _embed(args: argparse.Namespace) -> Iterable[str]:
    check_model(args.model)
    check_there("CLIP folder", args.clip)
    model = load_model(args)
    settings = {"space": args.space, "pooling": args.pooling, "normalize": not args.not_normalized}
    return _each(
        _inputs(args.inputs),
        lambda some: model.embed(some, on_error="return", **settings),
        lambda given, vector: _json_line({"input": given, "embedding": vector.tolist()}),
        as_json=True,
    )


# ---- results, one by one


def _each(
    items: Iterable[str], ask: Callable[[list[str]], list[Any]], line: Callable[[str, Any], str], as_json: bool
) -> Iterator[str]:
    """A line for each item: the first at once, then more and more together, which is faster.

    Args:
        items: that are asked about.
        ask: gives an outcome for each of several items.
        line: of an item and what came of it.
        as_json: items that fail have a line too.

    Raises:
        ValueError: at the end, if some failed; each is named on stderr when it has.
    """
    rest, at_once, num_done, failed = iter(items), 1, 0, []
    while some := list(itertools.islice(rest, at_once)):
        at_once = min(2 * at_once, _MOST_AT_ONCE)
        for item, outcome in zip(some, ask(some), strict=True):
            num_done += 1
            if isinstance(outcome, Exception):
                failed.append(item)
                note(f"{item}: {said_of(outcome)}" if item not in str(outcome) else said_of(outcome))
                if as_json:
                    yield _json_line({"input": item, "error": said_of(outcome)})
            else:
                yield line(item, outcome)
        _tick(num_done)
    if failed:
        named = ", ".join(failed[:5]) + (", …" if len(failed) > 5 else "")
        raise ValueError(f"{len(failed)} of {num_done} failed: {named}")


def _tick(num_done: int) -> None:
    """How far it is, where the results don't say so themselves."""
    if sys.stderr.isatty() and not sys.stdout.isatty():
        draw_line(sys.stderr, f"{num_done:,} done", True)


def note(text: str) -> None:
    """A line on stderr."""
    end_line()
    sys.stderr.write(f"mmllm: {text}\n")
    sys.stderr.flush()


def said_of(error: Exception) -> str:
    """An error in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _line_of_text(as_json: bool) -> Callable[[str, Any], str]:
    if not as_json:
        return lambda _, said: said.text
    return lambda given, said: _json_line({
        "input": given, "text": said.text, "finish_reason": said.finish_reason, "confidence": said.confidence,
        "num_tokens": len(said.ids), "seconds": round(said.seconds, 4),
    })  # fmt: skip


def _json_line(values: dict[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False)


# ---- what is given


def _files(what: str, names: list[str], model: str) -> Iterable[str]:
    """Names of files, those of stdin included; looked for before anything is imported.

    Raises:
        FileNotFoundError: there is no model, or none of the files.
    """
    check_model(model)
    if STDIN not in names and not any(Path(name).exists() for name in names):
        check_there(what, *names)
    return _inputs(names)


def _inputs(names: list[str]) -> Iterator[str]:
    for name in names:
        if name == STDIN:
            yield from (line.rstrip("\r\n") for line in sys.stdin if line.strip())
        else:
            yield name


def read_parts(parts: list[str]) -> list[str]:
    """Parts of a prompt, text from stdin in the place of `-`."""
    return [read_text() if part == STDIN else part for part in parts]


def read_text() -> str:
    """All of stdin.

    Raises:
        ValueError: there is nothing, or no UTF-8.
    """
    try:
        text = sys.stdin.read().strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"stdin is no text in UTF-8: {error}") from None
    if not text:
        raise ValueError("stdin has no text; pipe some in, or give it in the place of -")
    return text


# ---- options


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Adds `--json`."""
    parser.add_argument(
        "--json", action="store_true", help="a JSON object a line: input, text, finish_reason, confidence and more"
    )


def add_text_settings(parser: argparse.ArgumentParser) -> None:
    """Adds what all commands that write text have."""
    parser.add_argument("--max_new_tokens", type=int, help="at most so many tokens")
    parser.add_argument("--min_p", type=float, help="draw among those at least so probable beside the best one")
    parser.add_argument("--repetition_penalty", type=float, help="above 1: repeat less")
    parser.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")
    parser.add_argument(
        "--choice", action="append", dest="choices", metavar="TEXT", help="a text that may be the answer; may be "
        "repeated",
    )  # fmt: skip
    parser.add_argument("--regex", metavar="PATTERN", help="what all of the text must match")
    parser.add_argument("--json_schema", metavar="FILE", help="JSON schema that the text must follow")
    parser.add_argument("--best_of", type=int, help="answers drawn, of which the one that is likeliest is given")
    parser.add_argument("--num_beams", type=int, help="beam search: texts that are gone on with side by side")
    parser.add_argument("--length_penalty", type=float, help="of a beam search: above 1 favours long texts")
    _add_settings(parser)


def _add_settings(parser: argparse.ArgumentParser, several_temperatures: bool = False) -> None:
    _add_model(parser)
    if several_temperatures:
        parser.add_argument(
            "--temperature", type=_temperatures, metavar="T[,T…]", help="0: the most probable; one, or one a codebook"
        )
    else:
        parser.add_argument("--temperature", type=float, help="0 takes the most probable")
    parser.add_argument("--top_k", type=int, help="draw among so many")
    parser.add_argument("--top_p", type=float, help="draw among the fewest of this probability")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same output")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="DIR", help="model folder")
    parser.add_argument("--adapter", metavar="NAME", help="of the model's adapters; without it the model alone")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights; else as saved")
    parser.add_argument("--quantize", choices=("int8", "int4"), help="weights in fewer bits, on the CPU")
    parser.add_argument("--draft", metavar="DIR", help="a smaller model that `mmllm draft` made, which speeds this up")
    parser.add_argument(
        "--speculation", choices=("lookup",), help="guess what the prompt or the text has had before: quicker where "
        "it repeats itself",
    )  # fmt: skip


def _temperatures(text: str) -> float | list[float]:
    numbers = [float(number) for number in text.split(",")]
    return numbers if len(numbers) > 1 else numbers[0]


def given_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What was given: the rest is the model's own.

    Raises:
        ValueError: the schema's file is no JSON.
        FileNotFoundError: it isn't there.
    """
    given = {name: getattr(args, name, None) for name in _SETTINGS}
    settings = {name: value for name, value in given.items() if value is not None}
    schema = getattr(args, "json_schema", None)
    if schema is not None:
        check_there("schema", schema)
        try:
            settings["json_schema"] = json.loads(Path(schema).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{schema} is no JSON: {error}") from None
    return settings


def load_model(args: argparse.Namespace) -> Any:
    """The model of `--model`."""
    check_there("draft model", args.draft, hint="give the folder that `mmllm draft` wrote")
    if args.draft is not None and args.speculation is not None:
        raise ValueError(f"--draft and --speculation {args.speculation} are given; a model has one of them: choose")
    from mmllm.inference.api import load
    from mmllm.inference.engine.requests import EngineConfig

    engine = None if args.speculation is None else EngineConfig(speculation=args.speculation)

    return load(
        args.model, args.device, args.dtype, args.adapter, quantize=args.quantize, draft=args.draft, engine=engine,
        clip=getattr(args, "clip", None),
    )  # fmt: skip
