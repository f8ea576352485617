"""The command line. Each command's code is imported when it is run; only this file prints.

Exit codes: 0 done, 1 a fault of ours, 2 something in the user's hands (bad input, key or file), 130 interrupted,
141 nobody reads what is printed (`| head`), 143 terminated.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NoReturn

from mmllm.cli.adapters import add_adapters, add_upcycle
from mmllm.cli.chat import add_chat
from mmllm.cli.command import near
from mmllm.cli.completion import add_completion
from mmllm.cli.configs import add_configs
from mmllm.cli.data import add_data
from mmllm.cli.drafting import add_drafting
from mmllm.cli.evaluation import add_evaluation
from mmllm.cli.incremental import add_incremental
from mmllm.cli.inference import add_inference
from mmllm.cli.interop import add_interop
from mmllm.cli.merging import add_merging
from mmllm.cli.prefer import add_prefer
from mmllm.cli.quickstart import add_quickstart
from mmllm.cli.reasoning import add_reasoning
from mmllm.cli.scaling import add_scaling
from mmllm.cli.serving import add_serving
from mmllm.cli.study import add_study
from mmllm.cli.tokenizer import add_tokenizer
from mmllm.cli.tour import add_tour
from mmllm.cli.training import TRAINING, add_training, run_training
from mmllm.cli.ui import add_ui

_NO_PREDICT = (
    "mmllm has no predict: caption, transcribe, speak, answer, generate and chat run a model folder, "
    "eval writes predictions for a manifest"
)


class _Parser(argparse.ArgumentParser):
    """Raises ValueError on bad usage instead of leaving the process, and says what may have been meant."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see `{self.prog} --help`")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, but a misspelt option is named rather than that it is missing."""
        try:
            return super().parse_known_args(args, namespace)
        except ValueError:
            unknown = [each for each in args or () if self._is_unknown(each)]
            if unknown and self._subparsers is None:
                self.error(f"unrecognized arguments: {self.with_hints(unknown)}")
            raise

    def with_hints(self, unknown: Sequence[str]) -> str:
        """Unknown arguments, with the options that they may be meant for."""
        return " ".join(f"{each}{near(each.partition('=')[0], self._option_string_actions)}" for each in unknown)

    def _is_unknown(self, argument: str) -> bool:
        return argument.startswith("--") and argument.partition("=")[0] not in self._option_string_actions

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = [str(each) for each in action.choices]
            raise argparse.ArgumentError(
                action, f"invalid choice: {value!r}{near(str(value), known)} (choose from {', '.join(known)})"
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the command and its options; None: the process's own.

    Returns:
        The exit code. Nothing is raised and the process is not left, so that a program can call this many times.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    is_debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        with _restored_signals():
            return _run(arguments)
    except KeyboardInterrupt:
        return _complain("interrupted", 130)
    except SystemExit as leaving:
        return _exit_code(leaving)
    except BrokenPipeError:
        return _nobody_reads()
    except Exception as error:
        if is_debug:
            raise
        if hasattr(error, "exit_code"):
            return _complain(_said(error), error.exit_code)  # pyright: ignore[reportAttributeAccessIssue]
        if _is_users(error):
            return _complain(_said(error), 2)
        return _complain(f"{type(error).__name__}: {_said(error)} (a fault in mmllm; --debug shows where)", 1)


def _run(arguments: list[str]) -> int:
    if arguments[:1] == ["predict"]:
        raise ValueError(_NO_PREDICT)
    if arguments and arguments[0] in TRAINING:
        return _print(run_training(arguments))
    parser = _parser()
    parsed = _parsed(parser, arguments)
    if not hasattr(parsed, "run"):
        parser.print_help()
        return 0
    return _print(parsed.run(parsed))


def _parsed(parser: _Parser, arguments: Sequence[str]) -> argparse.Namespace:
    parsed, unknown = parser.parse_known_args([_underscored(argument) for argument in arguments])
    if unknown:
        of_command = getattr(parsed, "parser", parser)
        raise ValueError(f"unrecognized arguments: {of_command.with_hints(unknown)}; see `{of_command.prog} --help`")
    return parsed


def _check_command(arguments: Sequence[str]) -> None:
    """Raises ValueError where a command has an unknown word or option; nothing is run."""
    try:
        is_whole = hasattr(_parsed(_parser(), arguments), "run")
    except SystemExit as error:
        raise ValueError("it prints help or a version, and does nothing") from error
    if not is_whole:
        raise ValueError("it is no whole command; see `mmllm --help`")


def _print(lines: Iterable[str]) -> int:
    """Prints a command's lines while it runs; gives 141 where nobody reads them (`| head`)."""
    for line in lines:
        try:
            print(line, flush=True)
        except BrokenPipeError:
            return _nobody_reads()
    return 0


def _nobody_reads() -> int:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is flushed at the exit goes nowhere
    return 141


def _parser() -> _Parser:
    parser = _Parser(
        prog="mmllm",
        description="Train, measure and run one model that sees, hears, reads and speaks.",
        epilog="--debug after any command shows where an error comes from.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"mmllm {_version()}")
    commands = parser.add_subparsers(metavar="COMMAND", parser_class=_Parser)
    add_training(commands)
    add_data(commands)
    add_tokenizer(commands)
    add_inference(commands)
    add_chat(commands)
    add_serving(commands)
    add_ui(commands)
    add_study(commands, _check_command)
    add_drafting(commands)
    add_evaluation(commands)
    add_reasoning(commands)
    add_incremental(commands)
    add_prefer(commands)
    add_scaling(commands)
    add_interop(commands)
    add_adapters(commands)
    add_upcycle(commands)
    add_merging(commands)
    add_configs(commands)
    add_quickstart(commands, run_command=main)
    add_tour(commands)
    add_completion(commands, make_parser=_parser)
    return parser


def _underscored(argument: str) -> str:
    """`--max-steps` is taken for `--max_steps`."""
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + value


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("mmllm")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _is_users(error: Exception) -> bool:
    """Whether an error is in the user's hands."""
    if isinstance(error, (ValueError, OSError, ModuleNotFoundError)):
        return True
    return type(error).__name__ in ("MisconfigurationException", "ArgumentError")


def _said(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text or type(error).__name__


def _complain(message: str, code: int) -> int:
    sys.stdout.flush()
    print(f"mmllm: {'error: ' if code in (1, 2) else ''}{message}", file=sys.stderr)
    return code


def _exit_code(leaving: SystemExit) -> int:
    if isinstance(leaving.code, str):
        return _complain(leaving.code, 1)
    if type(leaving).__name__ == "SIGTERMException":  # Lightning's, without a code
        return _complain("terminated", 143)
    if isinstance(leaving.__context__, KeyboardInterrupt):  # Lightning turns it into an exit
        return _complain("interrupted", 130)
    return int(leaving.code or 0)


@contextlib.contextmanager
def _restored_signals() -> Iterator[None]:
    """Lightning installs handlers of its own, and ignores SIGINT after one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [signal.SIGINT, signal.SIGTERM]
    before: list[Any] = [signal.getsignal(number) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def run_process() -> NoReturn:
    """The process's entry point: logs to stderr, exit code from `main`."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    sys.exit(main())
