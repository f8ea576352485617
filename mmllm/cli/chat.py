"""`mmllm chat`: one message, or a conversation line by line with pictures and sounds."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from mmllm.cli.command import add_command, check_model, check_there
from mmllm.cli.inference import add_text_settings, given_settings, load_model, note, read_parts, said_of

_HELP = "/image FILE and /audio FILE put a picture or a sound before the next line, /reset begins anew, /quit ends it."


def add_chat(commands: Any) -> None:
    """Adds `mmllm chat`."""
    parser = add_command(
        commands, "chat", "answer a message of text, pictures and sounds; without one, talk line by line", _chat
    )
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help="text, and files that are told by their suffix; -: text from stdin"
    )
    parser.add_argument("--system", metavar="TEXT", help="text before the conversation")
    add_text_settings(parser)


def _chat(args: argparse.Namespace) -> Iterable[str]:
    check_model(args.model)
    beginning = [{"role": "system", "content": args.system}] if args.system else []
    if not args.parts:
        return _talk(load_model(args), beginning, given_settings(args))
    parts = read_parts(args.parts)
    said = load_model(args).chat([*beginning, {"role": "user", "content": parts}], **given_settings(args))
    return [said.text]


def _talk(model: Any, beginning: list[dict[str, Any]], settings: dict[str, Any]) -> Iterator[str]:
    """A conversation; its replies are written as they come."""
    messages, waiting = list(beginning), []
    if sys.stdin.isatty():
        yield _HELP
    for line in _lines():
        command, _, rest = line.partition(" ")
        match command:
            case "/quit":
                return
            case "/reset":
                messages, waiting = list(beginning), []
            case "/image" | "/audio":
                waiting += _medium(command[1:], rest.strip())
            case _ if line.startswith("/"):
                note(f"there is no {command}; {_HELP}")
            case _ if line or waiting:
                from mmllm.data.samples.sample import Segment

                # what is typed is text, whatever file's name it may be
                asked = {"role": "user", "content": [*waiting, *([Segment(text=line)] if line else [])]}
                reply = _reply(model, [*messages, asked], settings)
                if reply is not None:
                    messages, waiting = [*messages, asked, {"role": "assistant", "content": reply}], []


def _medium(kind: str, name: str) -> list[Any]:
    """A picture or a sound that goes before the next line; nothing where it can't be read, which is said."""
    from mmllm.data.samples.sample import Segment
    from mmllm.inference.inputs import as_audio, as_image

    try:
        check_there(kind, name)
        if not name:
            raise ValueError(f"/{kind} needs a file's name")
        if kind == "image":
            return [Segment(image=as_image(name))]
        return [as_audio(name)]
    except (ValueError, OSError) as error:
        note(said_of(error))
        return []


def _reply(model: Any, messages: list[dict[str, Any]], settings: dict[str, Any]) -> str | None:
    """The reply, on stdout piece by piece; None: there is none, and why is said on stderr."""
    settings = dict(settings)
    try:
        if settings.get("best_of", 1) > 1:
            text = model.chat(messages, **settings).text
            sys.stdout.write(text)
        else:
            with model.stream("chat", messages, **settings) as pieces:
                for piece in pieces:
                    sys.stdout.write(piece.text)
                    sys.stdout.flush()
            text = pieces.result.text
    except BrokenPipeError:
        raise
    except KeyboardInterrupt:
        note("stopped; the message is taken back")
        return None
    except (ValueError, OSError) as error:
        note(said_of(error))
        return None
    sys.stdout.write("\n")
    sys.stdout.flush()
    return text


def _lines() -> Iterator[str]:
    """What is typed, with a prompt and a history where somebody types."""
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin)
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # lines can be edited, and come back
    while True:
        try:
            yield input("> ").strip()
        except EOFError:
            return
