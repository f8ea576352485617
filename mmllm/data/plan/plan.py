"""The plan: which documents make sequence n. A pure function of (recipe, shards, batch size).

A window of documents is drawn, always from the source that is furthest below its share; the window is packed; its
sequences are shuffled and numbered on. Every rank plans the same global stream and takes its own rows of it, so neither
ranks nor workers change what a step holds.

How far a source is, is counted in tokens (or samples) divided by its share: its clock. The next document comes from the
source whose clock is lowest, so drawing is a merge of the sources' next documents by the clocks at which they come.
Clocks instead of token counts let shares change: a schedule changes how fast a clock runs, and owes nothing.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mmllm.data.index.index import ShardIndex, load_indices
from mmllm.data.plan.best_fit import Budgets, pack_window
from mmllm.data.plan.items import Item
from mmllm.data.plan.recipe import METRICS, Recipe, SourceConfig, recipe_hash
from mmllm.data.plan.source import Drawn, Source
from mmllm.data.samples.documents import with_anchor
from mmllm.data.samples.lengths import conversation_tokens
from mmllm.data.samples.masked_spans import SpanMasking
from mmllm.data.samples.schema import read_sample
from mmllm.data.samples.templates import template_tokens
from mmllm.data.shards.find import find_shards
from mmllm.data.shards.reader import ShardReader
from mmllm.data.shards.remote import RemoteShard
from mmllm.data.shards.tar import read_members
from mmllm_tokenizers.folder import TokenizerFolder

__all__ = ["Item", "Plan", "Source", "StepPlan", "open_plan", "open_sources"]

_logger = logging.getLogger(__name__)

STATE_VERSION = 3
"""To be raised by whatever makes another stream of the same recipe."""
_TELL = 11
"""What random numbers are for; `source.py` and `single.py` have the others."""
AHEAD = 32
"""Sequences among which the next one is chosen."""


@dataclass(frozen=True)
class StepPlan:
    """What one step holds: the sequences of one rank (or of all), and the state after it."""

    step: int
    sequences: tuple[tuple[Item, ...], ...]
    state: dict[str, Any]
    num_global_sequences: int
    """Of all ranks."""
    numbers: tuple[int, ...] | None = None
    """Which of all ranks' sequences these are; `None`: all, in order."""


@dataclass(frozen=True)
class _Window:
    """Documents that were drawn together, and the sources' cursors after them."""

    sources: np.ndarray
    items: np.ndarray
    tokens: np.ndarray
    bins: list[list[int]]
    after: list[list[float]]


@dataclass(frozen=True)
class _Draw:
    """The documents that might come next, in order, and what is needed to move the cursors behind some of them."""

    sources: np.ndarray
    items: np.ndarray
    tokens: np.ndarray
    costs: np.ndarray
    drawn: dict[int, Drawn]
    shares: list[float]


class Plan:
    """The stream of steps of a recipe.

    Args:
        recipe: The recipe.
        sources: Its sources, opened (`open_sources`).
        batch_size: Sequences a step, of all ranks together.
        tokenizer_hash: The tokenizer folder's.
    """

    def __init__(self, recipe: Recipe, sources: list[Source], batch_size: int, tokenizer_hash: str) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1 sequence")
        self.recipe, self.sources, self.batch_size = recipe, sources, batch_size
        digests = [[index.sha256 for index in source.indices] for source in sources]
        self.hash = recipe_hash(recipe, digests, tokenizer_hash)
        limits = {"num_tiles": recipe.packing.max_images, "num_frames": recipe.packing.max_frames}
        self._budgets = [
            ([source.costs(name) for source in sources], limit) for name, limit in limits.items() if limit is not None
        ]

    def initial_state(self) -> dict[str, Any]:
        """The state before step 0.

        After `cursors`, a source's position and clock when the window was begun; `next` names the sequence that comes
        next (`None`: there is none, or it isn't known yet).
        """
        return {
            "version": STATE_VERSION,
            "recipe": self.hash[:16],
            "batch_size": self.batch_size,
            "step": 0,
            "window": 0,
            "offset": 0,
            "cursors": [[0, 0.0] for _ in self.sources],
            "next": None,
            "numpy": np.__version__,
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Refuse a state from which this plan doesn't go on exactly.

        Raises:
            ValueError: It belongs to another recipe, other shards, another batch size or an earlier version, or what
                comes next is not what came next when it was saved.
        """
        self._check_keys(state)
        following = next(self._sequences(state), None)
        self._check_next(state, None if following is None else following[1])

    def _check_keys(self, state: Mapping[str, Any]) -> None:
        wanted = self.initial_state()
        if state.get("version") != STATE_VERSION:
            raise ValueError(
                f"the saved data state has version {state.get('version')!r}, this mmllm writes {STATE_VERSION} and "
                f"draws the same recipe's documents in another order (until version 2, it went by sources' names); "
                f"finish that run with the mmllm that began it, or begin a new one"
            )
        for key in ("recipe", "batch_size"):
            if state.get(key) != wanted[key]:
                raise ValueError(
                    f"the saved data state has {key} {state.get(key)!r}, this run has {wanted[key]!r}; "
                    f"resume with the same recipe, shards, tokenizer and global batch size"
                )

    def _check_next(self, state: Mapping[str, Any], sequence: tuple[Item, ...] | None) -> None:
        then, now = state["next"], sequence_digest(sequence)
        if then is not None and then != now:
            raise ValueError(
                f"the saved data state goes on with sequence {then}, but here {now} comes next: random numbers are "
                f"drawn otherwise (NumPy {state['numpy']} then, {np.__version__} now) or the shards' indices changed; "
                f"resume with the NumPy and the indices of then"
            )

    def steps(self, state: Mapping[str, Any] | None = None) -> Iterator[StepPlan]:
        """Steps from a state on; ends only when a capped source runs out (see `mixture.on_exhausted`).

        The last step of a stream that ends is filled up with empty sequences.
        """
        state = dict(state) if state is not None else self.initial_state()
        self._check_keys(state)
        upcoming = self._sequences(state)
        following = next(upcoming, None)
        self._check_next(state, None if following is None else following[1])
        step, pending = state["step"], []
        while following is not None:
            here, sequence = following
            pending.append(sequence)
            following = next(upcoming, None)
            if following is None:
                pending += [()] * (self.batch_size - len(pending))
            if len(pending) == self.batch_size:
                step += 1
                told = {"step": step, "next": None if following is None else sequence_digest(following[1])}
                yield StepPlan(step - 1, tuple(pending), {**here, **told}, self.batch_size)
                pending = []

    def at(self, step: int) -> StepPlan:
        """Step number `step`, planned from the start.

        Raises:
            ValueError: The stream ends before it.
        """
        for plan in self.steps(self.state_before(step)):
            return plan
        raise ValueError(f"step is {step}; the recipe's documents last for {step} steps")

    def state_before(self, step: int) -> dict[str, Any]:
        """The state before a step, found without naming the documents of the windows that precede it.

        Raises:
            ValueError: The stream ends before it.
        """
        state, wanted = self.initial_state(), step * self.batch_size
        cursors, first, window = state["cursors"], 0, 0
        while wanted > first:
            drawn = self._window(cursors, first // self.batch_size, window)
            if drawn is None:
                last = -(-first // self.batch_size)
                if last == step:  # asked for the one behind the last
                    break
                raise ValueError(f"step is {step}; the recipe's documents last for {last} steps")
            if first + len(drawn.bins) > wanted:
                break
            first, cursors, window = first + len(drawn.bins), drawn.after, window + 1
        offset = max(0, wanted - first)
        return {**state, "step": step, "window": window, "offset": offset, "cursors": cursors}

    def _sequences(self, state: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], tuple[Item, ...]]]:
        """(state after it, sequence), on and on."""
        window, offset, cursors = state["window"], state["offset"], state["cursors"]
        base = {key: self.initial_state()[key] for key in ("version", "recipe", "batch_size", "numpy")}
        # The curriculum reads the step at which a window began; a resumed window must read the same one.
        first = state["step"] * self.batch_size - offset
        while True:
            drawn = self._window(cursors, max(0, first) // self.batch_size, window)
            if drawn is None:
                return
            items = self._named(drawn)
            order = self._order(drawn, window)
            for number in range(offset, len(order)):
                done = number + 1 == len(order)
                yield (
                    {
                        **base,
                        "window": window + done,
                        "offset": 0 if done else number + 1,
                        "cursors": drawn.after if done else cursors,
                    },
                    tuple([items[place] for place in drawn.bins[order[number]]]),
                )
            cursors = drawn.after
            first, offset, window = first + len(order), 0, window + 1

    def _order(self, drawn: _Window, window: int) -> list[int]:
        """The sequences of a window, shuffled, but always that one of the next few which keeps the shares best."""
        rng = np.random.default_rng([self.recipe.seed, 1, window])
        order = rng.permutation(len(drawn.bins)).tolist()
        if len(self.sources) == 1:
            return order
        rows = np.repeat(np.arange(len(drawn.bins)), [len(documents) for documents in drawn.bins])
        places = np.concatenate(drawn.bins)
        tokens_BS = np.zeros((len(drawn.bins), len(self.sources)))
        np.add.at(tokens_BS, (rows, drawn.sources[places]), drawn.tokens[places])
        over_BS = tokens_BS - tokens_BS.sum(axis=1, keepdims=True) * (tokens_BS.sum(axis=0) / tokens_BS.sum())
        return balanced(over_BS[order], order)

    def _named(self, window: _Window) -> list[Item]:
        items: list[Item | None] = [None] * len(window.items)
        for number, source in enumerate(self.sources):
            places = np.flatnonzero(window.sources == number)
            for place, item in zip(places.tolist(), source.items(window.items[places]), strict=True):
                items[place] = item
        return items  # pyright: ignore[reportReturnType]

    def _window(self, cursors: list[list[float]], step: int, window: int) -> _Window | None:
        """The documents drawn from the cursors on, packed; `None` where the stream ends."""
        draw = self._draw(cursors, step)
        if not len(draw.items):
            return None
        bins, count = pack_window(
            draw.tokens, self.recipe.sequence_length, self._costs(draw), seed=self._pack_seed(window)
        )
        after = self._moved(cursors, draw, count)
        return _Window(draw.sources[:count], draw.items[:count], draw.tokens[:count], bins, after)

    def _pack_seed(self, window: int) -> int:
        return (self.recipe.seed << 20) + window

    def _costs(self, draw: _Draw) -> Budgets:
        budgets = []
        for per_source, limit in self._budgets:
            values = np.zeros(len(draw.items), dtype=np.int64)
            for number, costs_M in enumerate(per_source):
                mine = draw.sources == number
                values[mine] = costs_M[draw.items[mine]]
            budgets.append((values, limit))
        return budgets

    def _draw(self, cursors: list[list[float]], step: int) -> _Draw:
        """The next documents, at most a window; those of sources at rest where no other has any left."""
        draw = self._drawn(cursors, step, self.recipe.shares(step))
        if not len(draw.items) and self.recipe.mixture.on_exhausted == "renormalize":
            shares = self.recipe.shares_at_rest(step)
            return draw if shares is None else self._drawn(cursors, step, shares)
        return draw

    def _drawn(self, cursors: list[list[float]], step: int, shares: list[float]) -> _Draw:
        """A merge of the sources' next documents by their clocks."""
        mixture, size = self.recipe.mixture, self.recipe.packing.window
        easiest = self._easiest(step)
        wanted = self._guess(shares, size)
        while True:
            drawn = {
                number: source.upcoming(int(cursors[number][0]), wanted[number], easiest[number], self._limit(source))
                for number, source in enumerate(self.sources)
                if shares[number] > 0
            }
            merged = self._merged(cursors, drawn, shares)
            taken = np.bincount(merged.sources[:size], minlength=len(self.sources))
            short = [n for n, found in drawn.items() if not found.is_all and taken[n] == len(found.items)]
            if not short:
                break
            for number in short:
                wanted[number] = wanted[number] * 2 + 16
        stop = min(size, len(merged.items))
        if mixture.on_exhausted == "stop":
            for number, found in drawn.items():
                if found.is_all:
                    places = np.flatnonzero(merged.sources == number)
                    stop = min(stop, int(places[-1]) + 1 if len(places) else 0)
        sources, items, tokens = merged.sources[:stop], merged.items[:stop], merged.tokens[:stop]
        return _Draw(sources, items, tokens, merged.costs[:stop], drawn, shares)

    def _limit(self, source: Source) -> int | None:
        return None if self.recipe.mixture.on_exhausted == "repeat" else source.limit

    def _easiest(self, step: int) -> list[int | None]:
        curriculum = self.recipe.curriculum
        if curriculum is None or (share := curriculum.share(step)) >= 1:
            return [None] * len(self.sources)
        return [
            max(1, math.ceil(share * source.num_items)) if curriculum.orders(source.config.name) else None
            for source in self.sources
        ]

    def _guess(self, shares: list[float], size: int) -> list[int]:
        """How many documents of each source a window will hold, or somewhat more."""
        rates = []
        for source, share in zip(self.sources, shares, strict=True):
            by_tokens = self.recipe.mixture.unit == "tokens"
            rates.append(share / (float(source.tokens_M[:100_000].mean()) if by_tokens else 1.0))
        total = sum(rates)
        return [int(1.2 * size * rate / total) + 16 for rate in rates]

    def _merged(self, cursors: list[list[float]], drawn: dict[int, Drawn], shares: list[float]) -> _Draw:
        columns: list[list[np.ndarray]] = [[], [], [], [], []]
        for number, found in drawn.items():
            tokens = self.sources[number].tokens_M[found.items].astype(np.int64)
            costs = tokens if self.recipe.mixture.unit == "tokens" else np.ones_like(tokens)
            clocks = cursors[number][1] + (np.cumsum(costs) - costs) / shares[number]
            if self.recipe.tell is not None:
                clocks += _places(self.recipe.seed, number, found.after) / shares[number]
            values = (clocks, np.full(len(tokens), number), found.items, tokens, costs)
            for column, value in zip(columns, values, strict=True):
                column.append(value)
        clocks, sources, items, tokens, costs = (np.concatenate(column) for column in columns)
        order = np.lexsort((sources, clocks))  # stable: within a source, its own order
        return _Draw(sources[order], items[order], tokens[order], costs[order], drawn, shares)

    def _moved(self, cursors: list[list[float]], draw: _Draw, count: int) -> list[list[float]]:
        """The cursors behind the first `count` documents of a draw; the lowest clock that runs is set to 0."""
        after: list[tuple[float, float | None]] = []
        for number, (position, clock) in enumerate(cursors):
            found = draw.drawn.get(number)
            if found is None:  # it rests, its weight is 0 now: later it starts level with the others
                after.append((position, None))
                continue
            mine = draw.sources[:count] == number
            used = int(mine.sum())
            is_at_end = found.is_all and used == len(found.items)
            if is_at_end:
                limit = self._limit(self.sources[number])
                position = position if limit is None else limit
            elif used:
                position = int(found.after[used - 1])
            clock += float(draw.costs[:count][mine].sum()) / draw.shares[number]
            after.append((int(position), None if is_at_end else clock))
        lowest = min((clock for _, clock in after if clock is not None), default=0.0)
        return [[position, 0.0 if clock is None else round(clock - lowest, 3)] for position, clock in after]

    def describe(self, item: Item) -> dict[str, Any]:
        """An item by name: source, shard, key, task, part, tokens."""
        index = self.sources[item.source].indices[item.shard]
        line = index.place(item.row).line
        return {
            "source": self.sources[item.source].config.name,
            "shard": index.path.name,
            "key": index.key(item.row) + (f"-{line}" if line >= 0 else ""),
            "task": item.task,
            "part": item.part,
            "tokens": item.num_tokens,
        }

    def sequence_hash(self, sequence: tuple[Item, ...]) -> str:
        """Names a sequence by what it holds: equal for equal documents in equal order, wherever they lie."""
        told = [{**self.describe(item), "source": item.source} for item in sequence]
        text = "\n".join("\t".join(map(str, document.values())) for document in told)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _places(seed: int, source: int, positions: np.ndarray) -> np.ndarray:
    """Where each document of a source comes between two of its turns, in [0, 1): random, and the same each time.

    A document's own turn is a stretch of one by its source's clock, so that the order within a source stays. Numbers
    are splitmix64's (Steele et al. 2014, https://doi.org/10.1145/2660193.2660195) of the position.
    """
    start = int(np.random.default_rng([seed, _TELL, source]).integers(2**63))
    with np.errstate(over="ignore"):
        mixed = np.uint64(start) + positions.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((mixed ^ (mixed >> np.uint64(31))) >> np.uint64(11)) / 2.0**53


def sequence_digest(sequence: tuple[Item, ...] | None) -> str | None:
    """Names a sequence by the numbers of its documents, for a state; no index is read."""
    if sequence is None:
        return None
    return hashlib.sha256(repr([tuple(item) for item in sequence]).encode()).hexdigest()[:16]


def balanced(over_BS: np.ndarray, names: list[int]) -> list[int]:
    """Names in an order in which every beginning has about the shares of the whole.

    Args:
        over_BS: What each row has too much of each source; the columns sum to 0.
        names: Of the rows.
    """
    pool = list(range(min(AHEAD, len(names))))
    waiting_PS = over_BS[pool].copy()
    coming = len(pool)
    total_S = np.zeros(over_BS.shape[1])
    order = []
    while pool:
        sums_PS = waiting_PS[: len(pool)] + total_S
        best = int(np.einsum("ps,ps->p", sums_PS, sums_PS).argmin())
        total_S = sums_PS[best]
        order.append(names[pool[best]])
        if coming < len(names):
            pool[best] = coming
            waiting_PS[best] = over_BS[coming]
            coming += 1
        else:
            pool[best] = pool[-1]
            waiting_PS[best] = waiting_PS[len(pool) - 1]
            pool.pop()
    return order


def open_sources(recipe: Recipe, tokenizer_hash: str, folder: TokenizerFolder | None = None) -> list[Source]:
    """A recipe's sources with their indices.

    Args:
        recipe: The recipe.
        tokenizer_hash: Of the tokenizer that the indices must have been made with.
        folder: The tokenizer folder; sources with templates of their own need it.

    Raises:
        FileNotFoundError: Shards or their indices are missing.
        ValueError: An index belongs to another tokenizer, a source is left without documents, its filter reads a key
            that no document has, no document has the curriculum's metric, or a source is to be spoken with units that
            can't be.
    """
    sources = []
    base = Path(recipe.folder) if recipe.folder is not None else None
    for number, config in enumerate(recipe.sources):
        try:
            shards = find_shards(config.shards, base)
            if config.remote == "shards":
                shards = [replace(shard, whole=True) if isinstance(shard, RemoteShard) else shard for shard in shards]
            indices = list(load_indices(shards, tokenizer_hash))
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"source {config.name!r}: {error}") from error
        if folder is not None and "speak" in config.task_names:
            try:
                folder.check_speech()
            except ValueError as error:
                raise ValueError(f"source {config.name!r} has the task speak: {error}, or set its tasks") from error
        if folder is not None and "chat" in config.task_names:  # a source's own template is counted on top of it
            for index in indices:
                index.check_chat(folder.chat_template is not None)
        more_tokens = None
        if config.templates or config.anchor_prompt is not None:
            assert folder is not None, "templates are counted with the tokenizer"
            more_tokens = partial(_more_tokens, config=config, folder=folder)
        masked_tokens = None
        if config.masked_spans is not None:
            assert folder is not None, "masked spans are counted with the tokenizer"
            masked_tokens = span_masking(config, folder).num_tokens
        sources.append(Source(config, number, indices, recipe, more_tokens, masked_tokens))
    _check_metric(recipe, sources)
    return sources


def span_masking(config: SourceConfig, folder: TokenizerFolder) -> SpanMasking:
    """How a source's documents get masked spans.

    Raises:
        ValueError: As `SpanMasking`, with the source's name.
    """
    (task,) = config.task_names
    assert config.masked_spans is not None
    try:
        return SpanMasking(config.masked_spans, task, folder, (config.templates or {}).get(task), config.anchor_prompt)
    except ValueError as error:
        raise ValueError(f"source {config.name!r}: {error}") from error


def _more_tokens(index: ShardIndex, config: SourceConfig, folder: TokenizerFolder) -> dict[str, int | np.ndarray]:
    """By task, how many tokens more a shard's documents have in this source than the index counted.

    A conversation has more for each of its turns, which no index counts: conversations are read.

    Raises:
        ValueError: The folder's chat template refuses a conversation behind the source's anchor.
    """
    templates, anchor = config.templates or {}, config.anchor_prompt
    more: dict[str, int | np.ndarray] = {}
    for task in config.task_names:
        more[task] = template_tokens(task, templates[task], folder) if task in templates else 0
        more[task] += len(folder.text.encode(anchor)) if anchor is not None else 0
    if "chat" in config.task_names and ("chat" in templates or anchor is not None):
        more_N = more["chat"] = np.zeros(index.num_documents, dtype=np.int64)
        reader = ShardReader()
        for row in np.flatnonzero(index.lengths["chat"]).tolist():
            place, key = index.place(row), index.key(row)
            name = f"{index.path}:{key}"
            _, files = read_members(reader.read(index.path, place.start, place.num_bytes), name)
            said = [segment.said for segment in read_sample(files, key, name).segments]
            if not any(segment.role for segment in said):
                more_N[row] = template_tokens("chat", templates["chat"], folder) if "chat" in templates else 0
                more_N[row] += len(folder.text.encode(anchor or ""))
                continue
            anchored = said if anchor is None else with_anchor(said, anchor)
            try:
                found = conversation_tokens(anchored, folder, templates.get("chat"))
            except ValueError as error:
                raise ValueError(f"source {config.name!r}: {name} behind the anchor_prompt: {error}") from error
            more_N[row] = found - conversation_tokens(said, folder)
        reader.close()
    return more


def _check_metric(recipe: Recipe, sources: list[Source]) -> None:
    """Some source may lack the curriculum's metric, and keeps its order; that none has it is a mistake."""
    if recipe.curriculum is None:
        return
    metric = recipe.curriculum.metric
    sources = [source for source in sources if recipe.curriculum.orders(source.config.name)]
    if any(source.has(metric) for source in sources):
        return
    columns = {
        name for source in sources for index in source.indices for name in index.column_names if source.has(name)
    }
    raise ValueError(
        f"curriculum.metric is {metric!r}, which no document of any source that it orders has as a number; known are "
        f"{', '.join(sorted({*METRICS, *columns}))}"
    )


def open_plan(recipe: Recipe, batch_size: int, folder: TokenizerFolder | None = None) -> Plan:
    """The plan of a recipe, its tokenizer and shards looked up.

    Args:
        recipe: The recipe.
        batch_size: Sequences a step, of all ranks together.
        folder: The recipe's tokenizer folder, if it is loaded already.

    Raises:
        FileNotFoundError, ValueError: As `open_sources`.
    """
    folder = folder or TokenizerFolder.load(recipe.tokenizer_folder())
    return Plan(recipe, open_sources(recipe, folder.hash, folder), batch_size, folder.hash)
