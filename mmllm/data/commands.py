"""What `mmllm data build / index / verify / stats / show` do. They return dicts; the command line prints them."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mmllm.data.executors.stages import Executor, Stage
from mmllm.data.index.index import ShardIndex
from mmllm.data.index.make import write_indices
from mmllm.data.looking.pages import stats_page
from mmllm.data.looking.show import add_starts, show_step, write_step_page
from mmllm.data.looking.verify import verify_shards
from mmllm.data.plan.plan import Plan, open_plan
from mmllm.data.plan.recipe import load_recipe
from mmllm.data.rows.bad_rows import BadRows
from mmllm.data.rows.cleaning import CleaningConfig, choose, measure_rows
from mmllm.data.rows.column_names import ColumnNames
from mmllm.data.rows.forms import read_rows
from mmllm.data.rows.holdout import split_rows, without_shown
from mmllm.data.rows.media import Digests
from mmllm.data.rows.rows import Row, row_media, with_absolute_paths
from mmllm.data.rows.table import RowTable
from mmllm.data.samples.masked_spans import base_task
from mmllm.data.samples.stored import ImageEncoder
from mmllm.data.shards.encode import ShardsConfig
from mmllm.data.shards.find import find_shards
from mmllm.data.shards.remote import Shard
from mmllm.data.shards.write import rows_file, write_shards
from mmllm_tokenizers.folder import TokenizerFolder

_logger = logging.getLogger(__name__)
_NAMED, _SHOWN = 20, 5
"""Bad rows that are named in all, and in one message."""
Progress = Callable[[int, int], None]
"""Takes how much is done and how much there is in all."""


def build(
    manifest: str | Path | Sequence[str | Path],
    out: str | Path,
    tokenizer: str | Path | None = None,
    perturb: int = 0,
    holdout: str | None = None,
    part: str = "train",
    samples_per_shard: int = 10_000,
    max_seconds: float = 60.0,
    max_image_side: int = 1024,
    max_bad_fraction: float = 0.05,
    seed: int = 0,
    workers: int = 0,
    progress: Progress | None = None,
    form: str = "auto",
    media: str | Path | None = None,
    cleaning: CleaningConfig | None = None,
    executor: Executor | None = None,
    image_encoder: ImageEncoder | None = None,
    columns: ColumnNames | None = None,
) -> dict[str, Any]:
    """Manifests, and other people's data, to shards.

    Of each row some 40 bytes are held in memory; with `cleaning` or `holdout`, which compare rows, all of it is until
    they are chosen.

    Args:
        manifest: One input or several, of any form that `forms.FORMS` reads; kinds may be mixed.
        out: Folder of the shards: `caption-000000.tar`, `audio-000000.tar`, … and `shards.json`.
        tokenizer: With a tokenizer folder that has a codec, each sound's codes are stored with it.
        perturb: Altered copies of each sound row, marked `"perturbed": true`.
        holdout: `KEY=VALUE` or a fraction: which rows are held out.
        part: With `holdout`, whether the shards take the `train` or the `heldout` rows.
        samples_per_shard: At most this many.
        max_seconds: Longer sounds are skipped, counted and named.
        max_image_side: Larger pictures are scaled down.
        max_bad_fraction: More unusable rows than this are an error.
        seed: Of the altered copies, and of a holdout by fraction.
        workers: Processes that read and encode; 0: this one does. Without an `executor`.
        progress: Called with the numbers of rows done and in all.
        form: Of the inputs; `auto`: told from each.
        media: What their paths are relative to; by default each input's folder.
        cleaning: Which rows are left out, before the holdout is drawn: by quality, and repeated ones.
        executor: Where cleaning measures the rows and shards are written; by default this process and its workers.
            The shards are the same.
        image_encoder: With it, each picture's features are stored with it.
        columns: What the inputs' columns are called here, and their types.

    Returns:
        What `shards.json` holds: `bad` names the rows that can't be used, `left_out` counts what else isn't in the
        shards, by reason.

    Raises:
        FileNotFoundError, ValueError: The input can't be used; the message names file and row.
    """
    if part not in ("train", "heldout"):
        raise ValueError(f"part is {part!r}; it must be 'train' or 'heldout'")
    config = ShardsConfig(
        samples_per_shard=samples_per_shard, max_seconds=max_seconds, max_image_side=max_image_side,
        perturb=perturb, seed=seed, max_bad_fraction=max_bad_fraction,
    )  # fmt: skip
    executor = executor if executor is not None else Executor(workers=workers)
    bad = BadRows(max_bad_fraction)
    manifests = [manifest] if isinstance(manifest, str | Path) else list(manifest)
    cleaning = cleaning or CleaningConfig()
    with rows_file(Path(out), executor) as kept:
        table = RowTable(kept, perturb + 1)
        if cleaning.is_on or holdout is not None:
            rows = [row for path in manifests for row in read_rows(path, bad, form, media, columns)]
            executor.claim(Path(out))
            rows = [with_absolute_paths(row) for row in rows]
            table.extend(_chosen(rows, bad, cleaning, holdout, part, seed, executor, progress))
            del rows
        else:
            for path in manifests:
                table.read(path, bad, form, media, columns)
            executor.claim(Path(out))
        folder = TokenizerFolder.load(tokenizer) if tokenizer is not None else None
        told = write_shards(table, out, config, folder, bad, progress, executor, bad.left_out, image_encoder)
    if not executor.is_here:
        for stage in ("measure", "write"):
            Stage(stage, executor, {}).forget()
    return told


def _chosen(
    rows: list[Row],
    bad: BadRows,
    cleaning: CleaningConfig,
    holdout: str | None,
    part: str,
    seed: int,
    executor: Executor,
    progress: Progress | None,
) -> list[Row]:
    """The rows that are kept and not held out, or those that are; what else there is, is counted in `bad`."""
    left_out, digests = bad.left_out, Digests()
    if cleaning.is_on or not executor.is_here:
        measured = []
        for row, found in zip(rows, measure_rows(rows, cleaning, executor, progress), strict=True):
            if "error" in found:
                bad.add(row.where, found["error"])
                continue
            measured.append((row, found))
            for (_, item), digest in zip(row_media(row), found["files"], strict=True):
                digests.know(item, digest)
        rows = [row for row, _ in measured]
        if cleaning.is_on:
            rows, counts = choose(rows, [found for _, found in measured], cleaning)
            left_out.update(counts)
    if holdout is not None:
        train, heldout = split_rows(rows, holdout, seed, digests)
        rows = without_shown(train, heldout, digests) if part == "train" else heldout
        left_out.update({"train": len(train)} if part == "heldout" else {
            "held out": len(heldout), "shows what is held out": len(train) - len(rows),
        })  # fmt: skip
    return rows


def index(
    shards: str | Path | Sequence[str | Path],
    tokenizer: str | Path,
    progress: Progress | None = None,
    workers: int = 0,
    text_key: str | None = None,
    max_bad_fraction: float = 0.05,
) -> dict[str, Any]:
    """Writes the index beside each shard, where it is missing or out of date.

    Args:
        shards: Paths, globs, brace ranges, or folders of shards.
        tokenizer: The tokenizer folder whose tokens are counted.
        progress: Called with the numbers of shards done and in all.
        workers: Processes that share the shards; 0: this one alone.
        text_key: Where a sample has no `txt`, the key of its `json` that holds its text, such as `caption`.
        max_bad_fraction: More rows than this of which no document can be made are an error.

    Returns:
        Shards, documents, tokens by task; `bad`, how many rows no document is made of, and `errors`, which names them;
        `skipped`, members of the tars that are no sample's file, by what they are.

    Raises:
        FileNotFoundError, ValueError: A shard is missing or damaged, or too many rows are bad; the message names it.
    """
    folder = TokenizerFolder.load(tokenizer)
    indices = write_indices(_all_shards(shards), folder, progress, workers, text_key)
    counts = [index.bad for index in indices]
    errors = [f"{name}: {reason}" for _, named in counts for name, reason in named]
    for message in errors[:_NAMED]:
        _logger.warning("no document of %s", message)
    num_bad, totals = sum(count for count, _ in counts), _totals(indices)
    num_rows = totals["documents"] + sum(index.num_unread for index in indices)
    allowed = math.ceil(max_bad_fraction * num_rows)
    if num_bad and (num_bad > allowed or num_bad >= num_rows):
        raise ValueError(
            f"{num_bad} of {num_rows} rows become no document, at most {min(allowed, num_rows - 1)} may be: "
            f"{'; '.join(errors[:_SHOWN])}{'; …' if num_bad > _SHOWN else ''}. Mend them, or raise --max_bad_fraction "
            f"(now {max_bad_fraction})"
        )
    skipped = Counter[str]()
    for index in indices:
        skipped.update(index.num_skipped)
    return {"tokenizer": folder.hash, **totals, "bad": num_bad, "errors": errors[:_NAMED], "skipped": dict(skipped)}


def _all_shards(shards: str | Path | Sequence[str | Path]) -> list[Shard]:
    return find_shards([str(spec) for spec in ([shards] if isinstance(shards, str | Path) else shards)])


def _totals(indices: Sequence[ShardIndex]) -> dict[str, Any]:
    tokens: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    for item in indices:
        kinds[item.kind] += item.num_documents
        tokens.update({task: int(lengths.sum()) for task, lengths in item.lengths.items()})
    return {
        "shards": len(indices),
        "documents": sum(item.num_documents for item in indices),
        "by_kind": dict(kinds),
        "tokens": dict(tokens),
        "images": sum(int(item.num_images_N.sum()) for item in indices),
        "frames": sum(int(item.num_frames_N.sum()) for item in indices),
    }


def verify(
    shards: str | Path | Sequence[str | Path],
    tokenizer: str | Path,
    max_named: int = 20,
    workers: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Reads, decodes and tokenizes every sample of every task.

    Args:
        shards: Paths, globs, brace ranges, or folders of shards.
        tokenizer: The tokenizer folder.
        max_named: How many broken samples are named.
        workers: Processes that read; 0: this one does.
        progress: Called with the numbers of documents done and in all.

    Returns:
        `documents`, `broken` (a count) and `errors` (messages naming shard and key).

    Raises:
        FileNotFoundError: A shard is missing.
    """
    return verify_shards(_all_shards(shards), TokenizerFolder.load(tokenizer), max_named, workers, progress)


def stats(recipe: str | Path, steps: int = 100, batch_size: int = 8, html: str | Path | None = None) -> dict[str, Any]:
    """The realized mixture of a recipe's first steps, without reading the documents.

    Args:
        recipe: The YAML.
        steps: How many steps are planned.
        batch_size: Sequences a step.
        html: Also write them as a page of plots.

    Returns:
        The recipe hash; tokens, documents and share by source; padding; lengths; repeats.

    Raises:
        FileNotFoundError, ValueError: The recipe or its shards can't be used.
    """
    plan = open_plan(load_recipe(recipe), batch_size)
    tokens: Counter[str] = Counter()
    documents: Counter[str] = Counter()
    tasks: Counter[str] = Counter()
    seen: Counter[tuple[int, int, int, str, int]] = Counter()
    lengths: dict[str, list[int]] = {}
    fill_by_step: list[float] = []
    num_steps = num_sequences = 0
    for step in islice(plan.steps(), steps):
        num_steps += 1
        used = sum(item.num_tokens for sequence in step.sequences for item in sequence)
        fill_by_step.append(round(used / (len(step.sequences) * plan.recipe.sequence_length), 4))
        for sequence in step.sequences:
            num_sequences += 1
            for item in sequence:
                name = plan.sources[item.source].config.name
                tokens[name] += item.num_tokens
                documents[name] += 1
                lengths.setdefault(name, []).append(item.num_tokens)
                tasks[item.task] += item.num_tokens
                seen[item.source, item.shard, item.row, base_task(item.task), item.part] += 1
    total = sum(tokens.values())
    room = num_sequences * plan.recipe.sequence_length
    told = {
        "recipe_hash": plan.hash,
        "steps": num_steps,
        "tokens": dict(tokens),
        "documents": dict(documents),
        "tokens_by_task": dict(tasks),
        "share": {name: count / total for name, count in tokens.items()} if total else {},
        "wanted_share": dict(zip(tokens, _wanted(plan, list(tokens), num_steps), strict=True)),
        "padding": 1 - total / room if room else 0.0,
        "mean_document_tokens": total / max(1, sum(documents.values())),
        "repeated_documents": sum(1 for count in seen.values() if count > 1),
        "left_out": {
            source.config.name: {
                "filtered": source.num_filtered, "too_long": source.num_too_long, "over_budget": source.num_over_budget,
                "over_max_documents": source.num_over_cap, "held_out": source.num_held_out.total(),
            }
            for source in plan.sources
        },
        "task_types": {
            source.config.name: {"drawn_from": dict(source.num_by_type), "held_out": dict(source.num_held_out)}
            for source in plan.sources
            if source.num_by_type or source.num_held_out
        },
        "tell": _tell(plan, documents),
        "balance": _balance(plan, seen),
        "never_masked": {
            source.config.name: source.num_never_masked
            for source in plan.sources
            if source.config.masked_spans is not None
        },
        "lengths": {name: _histogram(values) for name, values in lengths.items()},
        "fill_by_step": fill_by_step,
    }  # fmt: skip
    if html is not None:
        Path(html).write_text(stats_page(told), encoding="utf-8")
    return told


def _tell(plan: Plan, documents: Counter[str]) -> dict[str, Any] | None:
    """Documents of a task, general ones for each of them, and how many the recipe wants; None: it has no `tell`."""
    tell = plan.recipe.tell
    if tell is None:
        return None
    count = documents[tell.task]
    return {
        "task": tell.task, "documents": count, "wanted_ratio": tell.ratio,
        "ratio": (documents.total() - count) / count if count else None,
    }  # fmt: skip


def _balance(plan: Plan, seen: Counter[tuple[int, int, int, str, int]]) -> dict[str, Any]:
    """Of each source that balances a column, by value: documents that there are, the share wanted, and that drawn."""
    told = {}
    for number, source in enumerate(plan.sources):
        if source.balance is None:
            continue
        drawn: Counter[str] = Counter()
        for (of, shard, row, _, part), count in seen.items():
            if of == number and part <= 0:  # of a text in parts the first, so that documents are counted
                drawn[source.balance_value(shard, row)] += count
        values = zip(source.balance.names, source.balance.counts_V, source.balance.shares_V, strict=True)
        told[source.config.name] = {
            "column": source.config.balance,
            "alpha": source.balance.alpha,
            "values": {
                name: {
                    "documents": int(there), "wanted_share": float(share),
                    "share": drawn[name] / drawn.total() if drawn else 0.0,
                }
                for name, there, share in values
            },
        }  # fmt: skip
    return told


def _histogram(values: Sequence[int]) -> list[tuple[int, int, int]]:
    """(from, to, count) by powers of two."""
    counts = Counter(value.bit_length() for value in values)
    return [(1 << bits - 1, (1 << bits) - 1, counts[bits]) for bits in sorted(counts) if bits]


def _wanted(plan: Plan, names: list[str], num_steps: int) -> list[float]:
    """Shares as the recipe has them, the mean over steps."""
    shares = np.mean([plan.recipe.shares(step) for step in range(max(1, num_steps))], axis=0)
    by_name = {source.config.name: float(share) for source, share in zip(plan.sources, shares, strict=True)}
    return [by_name[name] for name in names]


def show(
    recipe: str | Path,
    step: int = 0,
    batch_size: int = 8,
    text: bool = False,
    world_size: int = 1,
    num_workers: int = 0,
    html: str | Path | None = None,
    starts: bool = False,
) -> dict[str, Any]:
    """What a step holds, without training: exactly what every rank together would be given.

    Args:
        recipe: The YAML.
        step: Which step, from 0.
        batch_size: Sequences a step.
        text: Also read the documents, and give the text of each sequence and its number of targets.
        world_size: Read through that many ranks' loaders.
        num_workers: Read through loaders with that many workers each.
        html: Also write the step as a page, with texts, pictures and sounds.
        starts: Also give the start of each document's text, as `start`.

    Returns:
        `step`, `global_batch`, and `sequences`: `hash`, `tokens`, `documents`.

    Raises:
        FileNotFoundError, ValueError: The recipe can't be used, or has no such step.
    """
    if step < 0 or world_size < 1 or num_workers < 0:
        raise ValueError(
            f"step is {step}, world_size {world_size}, num_workers {num_workers}; they must be >= 0, >= 1 and >= 0"
        )
    read = load_recipe(recipe)
    folder = TokenizerFolder.load(read.tokenizer_folder())
    plan = open_plan(read, batch_size, folder)
    shown = show_step(plan, folder, step, text, world_size, num_workers)
    if starts:
        add_starts(shown, plan, folder)
    if html is not None:
        write_step_page(shown, plan, folder, html)
    return shown
