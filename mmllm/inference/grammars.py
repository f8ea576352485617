"""Grammars compiled by xgrammar (arXiv:2411.15100), in a process that is ended where one takes too long.

Shapes: V ids of text.
"""

from __future__ import annotations

import atexit
import functools
import importlib.util
import json
import logging
import os
import pickle
import re
import subprocess
import sys
import threading
import uuid
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, Literal

import torch
from torch import Tensor

from mmllm.inference.engine.token_texts import token_texts
from mmllm_tokenizers.folder import TokenizerFolder

Kind = Literal["regex", "json_schema"]
MAX_CACHED_BYTES = 256 * 2**20
"""Of compiled grammars of one tokenizer, as they are sent."""
_START_SECONDS = 120.0
_SAID = re.compile(r"\[[\d:]+\] \S+:\d+: ")
"""What xgrammar puts before its messages: the time, and a place in its source."""
_LOGGER = logging.getLogger(__name__)


class Grammar:
    """A grammar that is compiled for a tokenizer; `begin` makes the state of one row."""

    def __init__(self, compiler: Compiler, compiled: Any, compiled_first: Any | None) -> None:
        self._compiler = compiler
        self._compiled = compiled
        self._compiled_first = compiled_first

    def begin(self) -> GrammarState:
        """At the text's beginning."""
        return GrammarState(self._compiler, self._compiled, self._compiled_first)


class GrammarState:
    """Where in a grammar a row's text is; a `Constraint`."""

    def __init__(self, compiler: Compiler, compiled: Any, compiled_first: Any | None) -> None:
        import xgrammar

        self._compiler = compiler
        self._matcher = xgrammar.GrammarMatcher(compiled)
        self._first = None if compiled_first is None else xgrammar.GrammarMatcher(compiled_first)

    def allowed(self) -> Tensor:
        """Bools [V]. Where the grammar asks for what no token has, the text can but end."""
        compiler = self._compiler
        allowed_V = self._allowed(self._matcher)
        if self._first is not None:
            has_more = bool(allowed_V.any())
            allowed_V = self._allowed(self._first)
            if has_more:
                allowed_V[compiler.texts.silent_first_ids] = True
        if not allowed_V.any():
            _LOGGER.warning("a grammar asks for characters that this tokenizer has no token for; the text ends there")
            allowed_V[compiler.end_ids] = True
        return allowed_V

    def _allowed(self, matcher: Any) -> Tensor:
        bits_W = torch.zeros(-(-self._compiler.num_text // 32), dtype=torch.int32)
        matcher.fill_next_token_bitmask(bits_W[None])
        return ((bits_W[:, None] >> self._compiler.shifts) & 1).bool().flatten()[: self._compiler.num_text]

    def accept(self, token_id: int) -> None:
        """Moves on by an id that was allowed."""
        if self._first is not None:
            self._first = None
            added = self._compiler.texts.first(token_id)
            is_accepted = not added or self._matcher.accept_string(added)
        else:
            is_accepted = self._matcher.accept_token(token_id)
        assert is_accepted, f"id {token_id} was not allowed here"


class Compiler:
    """Compiles grammars for one tokenizer, and keeps those that were used last. Use `compiler_of`."""

    def __init__(self, tokenizer: TokenizerFolder) -> None:
        if importlib.util.find_spec("xgrammar") is None:
            raise ModuleNotFoundError(
                "regular expressions and JSON schemas need xgrammar; pip install 'mmllm[constraints]'"
            )
        import xgrammar

        self.num_text = tokenizer.vocabulary.num_text
        self.texts = texts = token_texts(tokenizer.text)
        self.end_ids = list(tokenizer.text.end_ids)
        self.shifts = torch.arange(32, dtype=torch.int32)
        middle = [texts.middle(token_id) for token_id in range(self.num_text)]
        first = [texts.first(token_id) for token_id in range(self.num_text)]
        for vocab in (middle, first):
            for token_id in self.end_ids:
                vocab[token_id] = b""
        self._vocabs = {"middle": middle} if first == middle else {"middle": middle, "first": first}
        self._infos = {
            name: xgrammar.TokenizerInfo(vocab, xgrammar.VocabType.RAW, stop_token_ids=self.end_ids)
            for name, vocab in self._vocabs.items()
        }
        self._key = uuid.uuid4().hex
        self._lock = threading.Lock()
        self._made: OrderedDict[tuple[Kind, str], Grammar | str] = OrderedDict()
        self._sizes: dict[tuple[Kind, str], int] = {}

    def compile(self, kind: Kind, grammar: str, seconds: float) -> Grammar:
        """A grammar, from the cache where it was compiled before.

        Raises:
            ValueError: it is none, takes too long or too much memory; the same one is then refused at once.
            TimeoutError: others are being compiled, and this one wasn't begun in time.
        """
        key = (kind, grammar)
        with self._lock:
            made = self._made.get(key)
            if made is not None:
                self._made.move_to_end(key)
        if made is None:
            made, size = self._compile(kind, grammar, seconds)
            with self._lock:
                self._made[key], self._sizes[key] = made, size + len(grammar) + 1000
                while sum(self._sizes.values()) > MAX_CACHED_BYTES and len(self._made) > 1:
                    del self._sizes[self._made.popitem(last=False)[0]]
        if isinstance(made, str):
            raise ValueError(made)
        return made

    def _compile(self, kind: Kind, grammar: str, seconds: float) -> tuple[Grammar | str, int]:
        import xgrammar

        what = "the regular expression" if kind == "regex" else "the JSON schema"
        compiled: dict[str, Any] = {}
        size = 0
        for name, vocab in self._vocabs.items():
            request = {"key": f"{self._key} {name}", "end_ids": self.end_ids, "kind": kind, "grammar": grammar}
            head, body = _PROCESS.ask(request, vocab, seconds)
            if head.get("late"):
                return f"{what} was not compiled within {seconds:g} seconds; make it simpler", 0
            if head.get("gone"):
                return f"{what} can't be compiled: the compiler broke down; make it simpler", 0
            if "error" in head:
                said = " ".join(_SAID.sub("", head["error"]).split())
                return f"{what} can't be followed: {said}", 0
            size += len(body)
            compiled[name] = xgrammar.CompiledGrammar.deserialize_json(body.decode(), self._infos[name])
        return Grammar(self, compiled["middle"], compiled.get("first")), size


@functools.lru_cache(maxsize=4)
def compiler_of(tokenizer: TokenizerFolder) -> Compiler:
    """The compiler of a tokenizer, made once for the tokenizers that were used last.

    Raises:
        ModuleNotFoundError: without xgrammar.
    """
    return Compiler(tokenizer)


class _Process:
    """`grammar_worker`, started when it is needed, ended when it takes too long; one request at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._known_keys: set[str] = set()
        self._reader: ThreadPoolExecutor | None = None

    def ask(self, request: dict[str, Any], vocab: list[bytes], seconds: float) -> tuple[dict[str, Any], bytes]:
        """The answer's head and body. `late` or `gone` in the head: there is none."""
        if not self._lock.acquire(timeout=seconds):
            raise TimeoutError(f"other grammars have been compiled for {seconds:g} seconds; ask again later")
        try:
            head, body = {"unknown": True}, b""
            if request["key"] in self._known_keys:
                head, body = self._exchange(self._started(), {**request, "vocab": None}, seconds)
                if head.get("gone"):  # perhaps for want of work, just now
                    self._end()
                    head = {"unknown": True}
            if head.get("unknown"):
                head, body = self._exchange(self._started(), {**request, "vocab": vocab}, seconds)
                self._known_keys.add(request["key"])
            if head.get("late") or head.get("gone"):
                self._end()
            return head, body
        finally:
            self._lock.release()

    def close(self) -> None:
        """Ends the process; it is started again when it is needed."""
        with self._lock:
            self._end()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._end()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mmllm.inference.grammar_worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment,
        )  # fmt: skip
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        head, _ = self._exchange(self._process, None, _START_SECONDS)
        if not head.get("ready"):
            self._end()
            raise RuntimeError(f"the process that compiles grammars does not start: {head}")
        return self._process

    def _exchange(
        self, process: subprocess.Popen[bytes], request: dict[str, Any] | None, seconds: float
    ) -> tuple[dict[str, Any], bytes]:
        assert self._reader is not None
        try:
            return self._reader.submit(_talk, process, request).result(timeout=seconds)
        except FutureTimeoutError:
            return {"late": True}, b""
        except (OSError, EOFError):
            return {"gone": True}, b""

    def _end(self) -> None:
        self._known_keys = set()
        process, self._process = self._process, None
        reader, self._reader = self._reader, None
        if process is not None:
            process.kill()
            process.wait()
        if reader is not None:
            reader.shutdown()  # it reads the end of what the process wrote
        if process is not None:
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    try:
                        stream.close()
                    except OSError:  # what was written and not read
                        _LOGGER.debug("the process that compiles grammars was ended while it was told something")


def _talk(process: subprocess.Popen[bytes], request: dict[str, Any] | None) -> tuple[dict[str, Any], bytes]:
    assert process.stdin is not None and process.stdout is not None
    if request is not None:
        pickle.dump(request, process.stdin)
        process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise EOFError
    head = json.loads(line)
    body = process.stdout.read(head["num_bytes"])
    if len(body) < head["num_bytes"]:
        raise EOFError
    return head, body


_PROCESS = _Process()
close = _PROCESS.close
atexit.register(close)
