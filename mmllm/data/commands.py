"""What `mmllm data build / index / verify / stats / show` do. They return dicts; the command line prints them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from mmllm.batch import IGNORE, Modality
from mmllm.data.decode import ImageTransform
from mmllm.data.documents import build_document
from mmllm.data.index import ShardIndex, index_path, sidecar_path, write_indices
from mmllm.data.loader import PackedLoader, SampleReader, StepDataset
from mmllm.data.manifest import BadRows, read_manifest, split_rows
from mmllm.data.plan import Plan, Source, StepPlan, open_plan
from mmllm.data.recipe import Recipe, SourceConfig, load_recipe
from mmllm.data.shards import ShardsConfig, find_shards, write_shards
from mmllm.data.storage import Shard, is_remote
from mmllm_tokenizers.folder import TokenizerFolder

_logger = logging.getLogger(__name__)
Progress = Callable[[int], None]


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
) -> dict[str, Any]:
    """Manifests to shards.

    Args:
        manifest: One manifest or several; kinds may be mixed.
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
        workers: Processes that read and encode; 0: this one does. The shards are the same.
        progress: Called with the number of rows done.

    Returns:
        What `shards.json` holds.

    Raises:
        FileNotFoundError, ValueError: The input can't be used; the message names file and row.
    """
    if part not in ("train", "heldout"):
        raise ValueError(f"part is {part!r}; it must be 'train' or 'heldout'")
    config = ShardsConfig(
        samples_per_shard=samples_per_shard, max_seconds=max_seconds, max_image_side=max_image_side,
        perturb=perturb, seed=seed, max_bad_fraction=max_bad_fraction,
    )  # fmt: skip
    bad = BadRows(max_bad_fraction)
    manifests = [manifest] if isinstance(manifest, str | Path) else list(manifest)
    rows = [row for path in manifests for row in read_manifest(path, bad)]
    if holdout is not None:
        train, heldout = split_rows(rows, holdout, seed)
        rows = train if part == "train" else heldout
    folder = TokenizerFolder.load(tokenizer) if tokenizer is not None else None
    return write_shards(rows, out, config, folder, bad, progress, workers)


def index(
    shards: str | Path | Sequence[str | Path], tokenizer: str | Path, progress: Progress | None = None
) -> dict[str, Any]:
    """Writes the index beside each shard, where it is missing or out of date.

    Args:
        shards: Paths, globs, brace ranges, or folders of shards.
        tokenizer: The tokenizer folder whose tokens are counted.
        progress: Called with the number of shards done.

    Returns:
        Shards, documents, tokens by task.

    Raises:
        FileNotFoundError, ValueError: A shard is missing or damaged; the message names it.
    """
    folder = TokenizerFolder.load(tokenizer)
    indices = write_indices(_all_shards(shards), folder, progress)
    return {"tokenizer": folder.hash, **_totals(indices)}


def _all_shards(shards: str | Path | Sequence[str | Path]) -> list[Shard]:
    specs = [str(spec) for spec in ([shards] if isinstance(shards, str | Path) else shards)]
    return find_shards([f"{spec}/*.tar" if not is_remote(spec) and Path(spec).is_dir() else spec for spec in specs])


def _totals(indices: Sequence[ShardIndex]) -> dict[str, Any]:
    tokens: Counter[str] = Counter()
    for item in indices:
        tokens.update({task: int(lengths.sum()) for task, lengths in item.lengths.items()})
    return {
        "shards": len(indices),
        "documents": sum(item.num_documents for item in indices),
        "by_kind": dict(Counter(item.kind for item in indices for _ in range(item.num_documents))),
        "tokens": dict(tokens),
        "images": sum(int(item.num_images_N.sum()) for item in indices),
        "frames": sum(int(item.num_frames_N.sum()) for item in indices),
    }


def verify(shards: str | Path | Sequence[str | Path], tokenizer: str | Path, max_named: int = 20) -> dict[str, Any]:
    """Reads, decodes and tokenises every sample of every task.

    Args:
        shards: Paths, globs, brace ranges, or folders of shards.
        tokenizer: The tokenizer folder.
        max_named: How many broken samples are named.

    Returns:
        `documents`, `broken` (a count) and `errors` (messages naming shard and key).

    Raises:
        FileNotFoundError: A shard is missing.
    """
    folder = TokenizerFolder.load(tokenizer)
    transform = ImageTransform(folder.image_size)
    num_documents, num_broken, errors = 0, 0, []
    for path in _all_shards(shards):
        try:
            (indexed,) = write_indices([path], folder)
        except ValueError as error:
            num_broken += 1
            errors.append(str(error))
            continue
        for message in _broken(indexed, folder, transform):
            num_documents += 1
            if message:
                num_broken += 1
                errors.append(message)
    return {"documents": num_documents, "broken": num_broken, "errors": errors[:max_named]}


def _broken(indexed: ShardIndex, folder: TokenizerFolder, transform: ImageTransform) -> list[str]:
    """For each document, what is wrong with it, or ""."""
    tasks = list(indexed.lengths)
    config = SourceConfig("verify", indexed.kind, str(indexed.path), tasks=tasks)  # pyright: ignore[reportArgumentType]
    recipe = Recipe("", 2**40, [config])
    plan = Plan(recipe, [Source(config, 0, [indexed], recipe)], 1, folder.hash)
    read = SampleReader(plan, folder.audio.hash if folder.audio is not None else None)
    messages = []
    for number in range(plan.sources[0].num_items):
        item = plan.sources[0].item(number)
        try:
            found = build_document(read(item), item.task, folder, transform).num_tokens
            wrong = f"{found} tokens, indexed as {item.num_tokens}" if found != item.num_tokens else ""
        except (ValueError, OSError) as error:
            wrong = str(error)
        messages.append(f"{indexed.path}:{indexed.keys[item.row]} as {item.task}: {wrong}" if wrong else "")
    read.close()
    return messages


def stats(recipe: str | Path, steps: int = 100, batch_size: int = 8) -> dict[str, Any]:
    """The realised mixture of a recipe's first steps, without reading the documents.

    Args:
        recipe: The YAML.
        steps: How many steps are planned.
        batch_size: Sequences a step.

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
    num_steps = num_sequences = 0
    for step in islice(plan.steps(), steps):
        num_steps += 1
        for sequence in step.sequences:
            num_sequences += 1
            for item in sequence:
                name = plan.sources[item.source].config.name
                tokens[name] += item.num_tokens
                documents[name] += 1
                tasks[item.task] += item.num_tokens
                seen[item.source, item.shard, item.row, item.task, item.part] += 1
    total = sum(tokens.values())
    room = num_sequences * plan.recipe.sequence_length
    return {
        "recipe_hash": plan.hash,
        "steps": num_steps,
        "tokens": dict(tokens),
        "documents": dict(documents),
        "tokens_by_task": dict(tasks),
        "share": {name: count / total for name, count in tokens.items()} if total else {},
        "wanted_share": dict(zip(tokens, _wanted(plan, list(tokens)), strict=True)),
        "padding": 1 - total / room if room else 0.0,
        "mean_document_tokens": total / max(1, sum(documents.values())),
        "repeated_documents": sum(1 for count in seen.values() if count > 1),
        "left_out": {
            source.config.name: {"filtered": source.num_filtered, "too_long": source.num_too_long}
            for source in plan.sources
        },
    }


def _wanted(plan: Plan, names: list[str]) -> list[float]:
    shares = {source.config.name: share for source, share in zip(plan.sources, plan.recipe.shares(), strict=True)}
    return [shares[name] for name in names]


def show(
    recipe: str | Path,
    step: int = 0,
    batch_size: int = 8,
    text: bool = False,
    world_size: int = 1,
    num_workers: int = 0,
) -> dict[str, Any]:
    """What a step holds, without training: exactly what every rank together would be given.

    Args:
        recipe: The YAML.
        step: Which step, from 0.
        batch_size: Sequences a step.
        text: Also read the documents, and give the text of each sequence and its number of targets.
        world_size: With `text`, read through that many ranks' loaders.
        num_workers: With `text`, workers of each loader.

    Returns:
        `step`, `global_batch`, and `sequences`: `hash`, `tokens`, `documents`.

    Raises:
        FileNotFoundError, ValueError: The recipe can't be used, or has no such step.
    """
    if step < 0:
        raise ValueError(f"step is {step}; it must not be negative")
    folder = TokenizerFolder.load(load_recipe(recipe).tokenizer_folder())
    plan = open_plan(load_recipe(recipe), batch_size, folder)
    if batch_size % world_size:
        raise ValueError(f"world_size is {world_size}, which doesn't divide the global batch of {batch_size}")
    found = plan.at(step)
    shown: dict[str, Any] = {
        "step": step,
        "global_batch": batch_size,
        "recipe_hash": plan.hash,
        "sequences": [
            {
                "hash": plan.sequence_hash(sequence),
                "tokens": sum(item.num_tokens for item in sequence),
                "documents": [plan.describe(item) for item in sequence],
            }
            for sequence in found.sequences
        ],
    }
    if text:
        _add_text(shown, plan, folder, found, world_size, num_workers)
    return shown


def _add_text(
    shown: dict[str, Any], plan: Plan, folder: TokenizerFolder, found: StepPlan, world_size: int, num_workers: int
) -> None:
    before = plan.state_before(found.step)
    for rank in range(world_size):
        dataset = StepDataset(plan, folder, ImageTransform(folder.image_size))
        loader = PackedLoader(plan, dataset, found.step + 1, rank, world_size, num_workers)
        loader.load_state_dict({**before, "position": found.step})
        batch = next(iter(loader))
        for row in range(batch.token_ids_BT.shape[0]):
            is_text_T = (batch.modality_BT[row] == Modality.TEXT) & (batch.document_ids_BT[row] >= 0)
            shown["sequences"][row * world_size + rank] |= {
                "text": folder.text.decode(batch.token_ids_BT[row][is_text_T].tolist()),
                "targets": int((batch.labels_BT[row] != IGNORE).sum()),
                "errors": list(batch.state.get("errors", ())),
            }


def remove_indices(shards: str | Path | Sequence[str | Path]) -> int:
    """Removes the indices beside shards; how many there were.

    Args:
        shards: Paths, globs, brace ranges, or folders of shards.
    """
    found = _all_shards(shards)
    num_existing = sum(index_path(shard).is_file() for shard in found)
    for shard in found:
        index_path(shard).unlink(missing_ok=True)
        sidecar_path(shard).unlink(missing_ok=True)
    return num_existing
