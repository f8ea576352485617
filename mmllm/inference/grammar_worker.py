"""A process that compiles grammars, so that one which takes forever or all memory can be ended: see `grammars`.

Requests come pickled on stdin, from the process that has started it; answers go to stdout as a line of JSON with a
length, and the compiled grammar behind it.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import tempfile
from collections.abc import Callable
from typing import Any, BinaryIO

MAX_MEMORY_BYTES = 2 * 2**30
"""That compiling may take beyond what the process has at its beginning."""
MAX_COMPILED_BYTES = 64 * 2**20
IDLE_SECONDS = 300
_MAX_TOKENIZERS = 4
_WHITESPACE = 8
"""Characters of white space at most between two parts of a JSON text: models that may write more write nothing else."""


def main() -> None:
    """Answers requests until there are no more, or none comes for a while."""
    answers = os.fdopen(os.dup(1), "wb")
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 1)  # what xgrammar's C++ says
        os.dup2(said.fileno(), 2)
        import xgrammar

        _limit_memory()
        _send(answers, {"ready": True})
        compilers: dict[str, Any] = {}
        while _is_asked():
            try:
                request = pickle.load(sys.stdin.buffer)
            except EOFError:
                return
            if request["vocab"] is not None:
                info = xgrammar.TokenizerInfo(
                    request["vocab"], xgrammar.VocabType.RAW, stop_token_ids=request["end_ids"]
                )
                if len(compilers) == _MAX_TOKENIZERS:
                    del compilers[next(iter(compilers))]
                compilers[request["key"]] = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
            compiler = compilers.get(request["key"])
            if compiler is None:
                _send(answers, {"unknown": True})
                continue
            _answer(answers, said, lambda made=compiler, r=request: _compile(made, r["kind"], r["grammar"]))


def _compile(compiler: Any, kind: str, grammar: str) -> Any:
    match kind:
        case "regex":
            return compiler.compile_regex(grammar)
        case "json_schema":
            return compiler.compile_json_schema(grammar, max_whitespace_cnt=_WHITESPACE)
    raise AssertionError(kind)


def _answer(answers: BinaryIO, said: Any, compile_: Callable[[], Any]) -> None:
    said.seek(0)
    said.truncate()
    try:
        compiled = compile_().serialize_json().encode()
    except (RuntimeError, ValueError, TypeError, MemoryError) as error:
        too_large = isinstance(error, MemoryError) or "bad_alloc" in str(error)
        _send(answers, {"error": "it takes too much memory" if too_large else str(error)})
        return
    said.seek(0)
    warnings = said.read().decode(errors="replace").strip()
    if warnings:  # it would have left something out
        _send(answers, {"error": warnings})
    elif len(compiled) > MAX_COMPILED_BYTES:
        _send(answers, {"error": "it takes too much memory"})
    else:
        _send(answers, {}, compiled)


def _send(answers: BinaryIO, head: dict[str, Any], body: bytes = b"") -> None:
    answers.write(json.dumps({**head, "num_bytes": len(body)}).encode() + b"\n" + body)
    answers.flush()


def _is_asked() -> bool:
    if os.name != "posix":
        return True
    import select

    return bool(select.select([sys.stdin.buffer], [], [], IDLE_SECONDS)[0])


def _limit_memory() -> None:
    if not sys.platform.startswith("linux"):
        return
    import resource

    with open("/proc/self/statm", encoding="ascii") as file:
        used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = used + MAX_MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


if __name__ == "__main__":
    main()
