"""The measures of inference.py that write text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import eq
from pathlib import Path
from typing import TYPE_CHECKING, cast, get_args

import numpy as np
from inference_peers import Transformers, llama

import mmllm
from mmllm.checkpoints.folder import load_model
from mmllm.data.samples.document import Document, DocumentWriter
from mmllm.inference.api import Model
from mmllm.inference.engine.engine import Engine
from mmllm.inference.engine.requests import EngineConfig, TextRequest, TextResult
from mmllm.inference.inputs import ImagePart
from mmllm.inference.prompts import join
from mmllm.inference.quantize import quantize
from mmllm.inference.quantized_layers import WeightKind

if TYPE_CHECKING:
    from inference import Bench

PROMPT, NEW = 32, 128
BATCHES = (1, 8, 32)
FIRST = 512
"""Tokens of the prompts whose first token is waited for."""
BEHIND = 16
"""Tokens of a prompt behind what it has in common with another."""


def greedy_decode(bench: Bench) -> None:
    """Against transformers' `generate`: texts of fixed length, captions up to their end."""
    ours, peer = bench.twins
    batches, num_new = ((2,), 8) if bench.quick else (BATCHES, NEW)
    for batch in batches:
        prompts = text_prompts(bench, ours, batch, PROMPT, num_new)
        _decode(bench, "greedy decode", f"text, batch {batch}", ours, peer, prompts, num_new, ends=False)
    if ours.model.config.vision is None:
        bench.missing["greedy decode, captions"] = "the model does not see"
        return
    for batch in batches:
        pictures = [bench.material.pictures[number % len(bench.material.pictures)] for number in range(batch)]
        prompts = [ours.caption_prompt(picture) for picture in pictures]
        _decode(bench, "greedy decode", f"captions, batch {batch}", ours, peer, prompts, num_new, ends=True)


def decode_100m(bench: Bench) -> None:
    """A Llama-like import, bound by memory."""
    theirs, imported = llama(bench.work, bench.quick)
    ours = mmllm.load(imported, "cpu")
    peer = Transformers(theirs, ours)
    num_new = 4 if bench.quick else 64
    num_ids = ours.tokenizer.text.num_tokens
    ids = np.random.default_rng(0).integers(0, min(num_ids, 256), PROMPT).tolist()
    prompts = [_document(ours, ids)]
    size = sum(parameter.numel() for parameter in ours.model.parameters()) / 1e6
    case = f"{size:.0f}M parameters, batch 1"
    agrees = _decode(bench, "decode 100M", f"{case}, float32", ours, peer, prompts, num_new, ends=False)
    for kind in get_args(WeightKind):
        try:
            _decode_quantized(
                bench, f"{case}, {kind}", imported, kind, ours, peer if agrees else None, prompts, num_new
            )
        except (RuntimeError, ImportError, ValueError) as error:
            bench.missing[f"decode 100M, {kind}"] = f"{type(error).__name__}: {error}"


def first_token(bench: Bench) -> None:
    """A prompt with pictures; of the peer our tower and its forward."""
    ours, peer = bench.twins
    prompt = picture_prompt(bench, ours, 64 if bench.quick else FIRST)
    engine = Engine(ours.model, ours.tokenizer, EngineConfig(prefix_cache_bytes=0))
    request = TextRequest(prompt, max_new_tokens=1)
    case = f"{prompt.num_tokens} tokens, {len(prompt.images)} pictures"
    wanted, got = engine_first(engine, request), peer.first([prompt])
    if got != [wanted]:
        bench.missing[f"first token, {case}"] = f"NOT TIMED: transformers' first id is {got[0]}, ours {wanted}"
        return
    print(peer.fastest(lambda: peer.first([prompt]), bench.clock, bench.quick), flush=True)
    seconds = bench.alternate({"ours": lambda: engine.run([request]), "transformers": lambda: peer.first([prompt])}, 15)
    _add_milliseconds(bench, "first token", case, seconds)


def continuous(bench: Bench) -> None:
    """The same requests in the same engine, all at once or batch by batch.

    Rows of a static batch stay until the last of them ends; what they write beyond their own end is thrown away.
    """
    num_requests, rows, least, most = (6, 2, 2, 8) if bench.quick else (64, 16, 8, 256)
    engine = Engine(bench.model.model, bench.model.tokenizer, EngineConfig(max_rows=rows, prefix_cache_bytes=0))
    rng = np.random.default_rng(0)
    texts = bench.material.texts
    requests = []
    for number in range(num_requests):
        num_new = int(np.clip(np.exp(rng.normal(np.log(48), 0.8)), least, most))
        prompt = _text_prompt(bench.model, texts[number % len(texts)], int(rng.integers(8, 97)))
        requests.append(TextRequest(prompt, max_new_tokens=num_new, min_new_tokens=num_new))
    num_tokens = sum(request.max_new_tokens for request in requests)
    batches = [requests[first : first + rows] for first in range(0, num_requests, rows)]
    at_once = [_ids(result) for result in engine.run(requests)]
    in_batches = [_ids(result) for batch in batches for result in engine.run(batch)]
    if at_once != in_batches:
        num_other = sum(one != other for one, other in zip(at_once, in_batches, strict=True))
        print(f"continuous: {num_other} of {num_requests} texts differ in batches, by the last bits of logits")
    static = []
    for batch in batches:
        longest = max(request.max_new_tokens for request in batch)
        static.append([replace(each, max_new_tokens=longest, min_new_tokens=longest) for each in batch])
    functions: dict[str, Callable[[], object]] = {
        "ours": lambda: engine.run(requests),
        f"static batches of {rows}": lambda: [engine.run(batch) for batch in static],
        f"batches of {rows} that rows leave": lambda: [engine.run(batch) for batch in batches],
    }
    seconds = bench.alternate(functions, 7)
    case = f"{num_requests} requests of {least} to {most} new tokens, {rows} rows"
    _add_rates(bench, "continuous", case, seconds, num_tokens)


def speculative(bench: Bench) -> None:
    """Ids that are guessed: of the demo's texts, and of texts that the model copies."""
    num_prompts, num_new = (2, 8) if bench.quick else (8, NEW)
    own = text_prompts(bench, bench.model, num_prompts, PROMPT, num_new)
    prompts = {"demo text": own, "copied text": copied_prompts(bench, num_prompts, num_new)}
    kinds = {"look-up": Engine(bench.model.model, bench.model.tokenizer, _alone(speculation="lookup"))}
    if bench.draft is None:
        bench.missing["speculative, draft model"] = "give one by --draft, as `mmllm draft` makes it"
    else:
        small = load_model(bench.draft)
        kinds[f"draft {bench.draft.name}"] = Engine(
            bench.model.model, bench.model.tokenizer, _alone(speculation="draft"), small.model
        )
    plain = Engine(bench.model.model, bench.model.tokenizer, _alone())
    for what, documents in prompts.items():
        requests = [TextRequest(document, max_new_tokens=num_new) for document in documents]
        wanted = [_ids(result) for result in _one_by_one(plain, requests)]
        functions: dict[str, Callable[[], object]] = {"plain": lambda asked=requests: _one_by_one(plain, asked)}
        for kind, engine in kinds.items():
            got = [_ids(result) for result in _one_by_one(engine, requests)]
            if got != wanted:
                num_other = sum(one != other for one, other in zip(got, wanted, strict=True))
                bench.missing[f"speculative, {what}, {kind}"] = f"NOT TIMED: {num_other} texts have other ids"
                continue
            functions[kind] = lambda engine=engine, asked=requests: _one_by_one(engine, asked)
        seconds = bench.alternate(functions, 9)
        num_tokens = sum(map(len, wanted))
        for kind in functions:
            if kind != "plain":
                pair = {"ours": seconds[kind], "plain": seconds["plain"]}
                _add_rates(bench, "speculative", f"{what}, {kind}, batch 1", pair, num_tokens)


def shared_prefix(bench: Bench) -> None:
    """The second of two requests that begin alike."""
    length = 64 if bench.quick else FIRST
    _shared_prefix(bench, f"{length} tokens of text", lambda number: _long_text(bench, number, length))
    if bench.model.model.config.vision is None:
        bench.missing["shared prefix, pictures"] = "the model does not see"
        return
    _shared_prefix(
        bench,
        f"{length} tokens, pictures among them",
        lambda number: picture_prompt(bench, bench.model, length, number),
    )


def _shared_prefix(bench: Bench, case: str, prefix: Callable[[int], Document]) -> None:
    engine = Engine(bench.model.model, bench.model.tokenizer, EngineConfig())
    rounds, firsts, seconds = bench.num_rounds(15), [], []
    rng = np.random.default_rng(1)
    ids = bench.model.tokenizer.text.encode(bench.material.texts[0])
    for number in range(rounds + 1):
        begin = prefix(number)
        for place, found in enumerate((firsts, seconds)):
            behind = _document(bench.model, [*rng.permutation(ids)[: BEHIND - 1].tolist(), ids[place]])
            request = TextRequest(join([begin, behind]), max_new_tokens=1)
            with bench.seconds() as taken:
                (result,) = engine.run([request])
            cost = result.cost
            found += taken
            if place and not cost.num_cached_tokens:
                raise RuntimeError("the second request found nothing of the first one in the cache")
    _add_milliseconds(bench, "shared prefix", case, {"ours": seconds[1:], "the first request": firsts[1:]})


# --- decoding --------------------------------------------------------------------------------------------------------


def _decode(
    bench: Bench, measure: str, case: str, ours: Model, peer: Transformers, prompts: Sequence[Document], num_new: int,
    ends: bool,
) -> bool:  # fmt: skip
    """Tokens a second of prompts that are answered together; False: the peer writes other ids."""
    engine = Engine(ours.model, ours.tokenizer, _alone(len(prompts)))
    requests = _requests(prompts, num_new, ends, ours)
    wanted = [list(_ids(result)) for result in engine.run(requests)]
    problem = peer.agree(wanted, lambda: peer.generate(prompts, num_new, ends))
    if problem is not None:
        bench.missing[f"{measure}, {case}"] = f"NOT TIMED: transformers' {problem}"
        return False
    print(
        f"{case}: {peer.fastest(lambda: peer.generate(prompts, num_new, ends), bench.clock, bench.quick)}", flush=True
    )
    seconds = bench.alternate(
        {"ours": lambda: engine.run(requests), "transformers": lambda: peer.generate(prompts, num_new, ends)}, 9
    )
    # an end is an id that was drawn, too
    _add_rates(bench, measure, case, seconds, sum(len(ids) + ends for ids in wanted))
    return True


def _decode_quantized(
    bench: Bench, case: str, folder: Path, kind: WeightKind, ours: Model, peer: Transformers | None,
    prompts: Sequence[Document], num_new: int,
) -> None:  # fmt: skip
    """The same with quantized weights, whose ids may be others: as many, from the same prompts."""
    small = load_model(folder)
    quantize(small.model, kind)
    engine, whole = Engine(small.model, small.tokenizer, _alone()), Engine(ours.model, ours.tokenizer, _alone())
    requests = [TextRequest(prompt, max_new_tokens=num_new, min_new_tokens=num_new) for prompt in prompts]
    wanted, got = (_ids(each.run(requests)[0]) for each in (whole, engine))
    print(f"{case}: {sum(map(eq, wanted, got))} of {num_new} ids are those of float32", flush=True)
    functions: dict[str, Callable[[], object]] = {
        "ours": lambda: engine.run(requests),
        "ours in float32": lambda: whole.run(requests),
    }
    if peer is not None:
        functions["transformers in float32"] = lambda: peer.generate(prompts, num_new, False)
    _add_rates(bench, "decode 100M", case, bench.alternate(functions, 9), num_new * len(prompts))


def _alone(max_rows: int = 1, **more: str) -> EngineConfig:
    """Of an engine that keeps nothing between rounds."""
    return EngineConfig(max_rows=max_rows, prefix_cache_bytes=0, **more)  # pyright: ignore[reportArgumentType]


def _requests(prompts: Sequence[Document], num_new: int, ends: bool, model: Model) -> list[TextRequest]:
    least = 0 if ends or _go_on(model, prompts, num_new) else num_new
    return [TextRequest(prompt, max_new_tokens=num_new, min_new_tokens=least) for prompt in prompts]


def _go_on(model: Model, prompts: Sequence[Document], num_new: int) -> bool:
    """Whether no text ends before so many tokens by itself."""
    engine = Engine(model.model, model.tokenizer, _alone(64))
    results = engine.run([TextRequest(prompt, max_new_tokens=num_new) for prompt in prompts])
    return all(len(_ids(result)) == num_new for result in results)


def _one_by_one(engine: Engine, requests: Sequence[TextRequest]) -> list[TextResult]:
    return [cast(TextResult, engine.run([request])[0]) for request in requests]


def _ids(result: object) -> tuple[int, ...]:
    return cast(TextResult, result).ids


def engine_first(engine: Engine, request: TextRequest) -> int:
    """The first id of a request; -1: it is an end."""
    ids = _ids(engine.run([request])[0])
    return ids[0] if ids else -1


# --- prompts ---------------------------------------------------------------------------------------------------------


def text_prompts(bench: Bench, model: Model, count: int, length: int, num_new: int) -> list[Document]:
    """Prompts of one length, those first whose texts don't end before `num_new` tokens."""
    prompts = [_text_prompt(model, text, length) for text in bench.material.texts]
    prompts = [prompt for prompt in prompts if prompt.num_tokens == length][: 4 * count]
    if not prompts:
        raise ValueError(f"no text of {bench.material.source} has {length} tokens; give a run with longer ones")
    engine = Engine(model.model, model.tokenizer, _alone(64))
    results = engine.run([TextRequest(prompt, max_new_tokens=num_new) for prompt in prompts])
    order = sorted(range(len(prompts)), key=lambda place: -len(_ids(results[place])))
    return [prompts[order[number % len(order)]] for number in range(count)]


def copied_prompts(bench: Bench, count: int, num_new: int) -> list[Document]:
    """Prompts in which a text's beginning, with what the model wrote behind it, is followed by the same beginning.

    Those first behind which the model writes most of it once more.
    """
    model, engine = bench.model, Engine(bench.model.model, bench.model.tokenizer, _alone(64))
    begun = text_prompts(bench, model, 8 * count, PROMPT, num_new)
    empty = model.continuation_prompt([""]).num_tokens
    written = engine.run([TextRequest(prompt, max_new_tokens=num_new) for prompt in begun])
    twice = [
        join([prompt, _document(model, _ids(result)), prompt.part(empty, prompt.num_tokens)])
        for prompt, result in zip(begun, written, strict=True)
    ]
    again = engine.run([TextRequest(prompt, max_new_tokens=num_new) for prompt in twice])
    shares = [float(np.mean(list(map(eq, _ids(one), _ids(other))) or [0])) for one, other in
              zip(written, again, strict=True)]  # fmt: skip
    order = sorted(range(len(twice)), key=lambda place: -shares[place])[:count]
    share = np.mean([shares[place] for place in order])
    print(f"copied text: {100 * share:.0f}% of what the model writes is a copy of its own text before", flush=True)
    return [twice[place] for place in order]


def _text_prompt(model: Model, text: str, length: int) -> Document:
    """A text's first tokens, as the prompt of one that goes on."""
    prompt = model.prompter.continuation([text])
    return prompt.part(0, min(length, prompt.num_tokens))


def _long_text(bench: Bench, number: int, length: int) -> Document:
    """A text of so many tokens, another one for each number."""
    texts = bench.material.texts
    chosen = [texts[(number + place) % len(texts)] for place in range(len(texts))]
    prompt = _text_prompt(bench.model, f"{number} " + " ".join(chosen), length)
    if prompt.num_tokens < length:
        raise ValueError(f"all texts of {bench.material.source} have fewer than {length} tokens; give a larger run")
    return prompt


def picture_prompt(bench: Bench, model: Model, length: int, number: int = 0) -> Document:
    """A prompt of so many tokens: pictures, each with a text behind it, and text to its end."""
    pictures, texts = bench.material.pictures, bench.material.texts
    begin = model.prompter.continuation([f"{number} "])
    parts = [begin]
    while True:
        place = len(parts) - 1
        picture = ImagePart(pictures[(number + place) % len(pictures)])
        words = " ".join(texts[(number + place) % len(texts)].split()[:8])
        part = model.prompter.plain([picture, words])
        if sum(each.num_tokens for each in parts) + part.num_tokens > length:
            break
        parts.append(part)
    if len(parts) == 1:
        raise ValueError(f"a picture has more than {length} tokens")
    left = length - sum(each.num_tokens for each in parts)
    ids = model.tokenizer.text.encode(" ".join(texts))[:left]
    return join([*parts, _document(model, ids)]) if ids else join(parts)


def _document(model: Model, ids: Sequence[int]) -> Document:
    writer = DocumentWriter(model.tokenizer)
    writer.ids(ids, is_target=False)
    return writer.finish()


# --- rows ------------------------------------------------------------------------------------------------------------


def _add_rates(bench: Bench, measure: str, case: str, seconds: dict[str, list[float]], num_tokens: int) -> None:
    rates = {name: [num_tokens / each for each in values] for name, values in seconds.items()}
    unit = "tokens/s" if bench.clock == "wall" else "tokens/s of CPU"
    bench.report.add(measure, case, unit, rates.pop("ours"), rates)


def _add_milliseconds(bench: Bench, measure: str, case: str, seconds: dict[str, list[float]]) -> None:
    times = {name: [1e3 * each for each in values] for name, values in seconds.items()}
    bench.report.add(measure, case, "ms" if bench.clock == "wall" else "ms of CPU", times.pop("ours"), times)


MEASURES: dict[str, Callable[[Bench], None]] = {
    "greedy decode": greedy_decode,
    "decode 100M": decode_100m,
    "first token": first_token,
    "continuous": continuous,
    "speculative": speculative,
    "shared prefix": shared_prefix,
}
