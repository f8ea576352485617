"""What a step holds, for people and programs: by name from the plan, or as real loaders give it, or as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mmllm.batch import IGNORE, Modality
from mmllm.data.loading.loader import PackedLoader, StepDataset
from mmllm.data.loading.reader import SampleReader
from mmllm.data.looking.pages import step_page
from mmllm.data.looking.tables import start_of
from mmllm.data.plan.plan import Item, Plan, StepPlan
from mmllm.data.samples.decode import ImageTransform
from mmllm.data.samples.document import Document
from mmllm_tokenizers.folder import TokenizerFolder


def show_step(
    plan: Plan, folder: TokenizerFolder, step: int, text: bool, world_size: int = 1, num_workers: int = 0
) -> dict[str, Any]:
    """What every rank together is given at a step.

    Args:
        plan: The plan.
        folder: Its tokenizer folder.
        step: Which step, from 0.
        text: Also read the documents, and give the text of each sequence and its number of targets.
        world_size: Read through that many ranks' loaders.
        num_workers: Workers of each loader.

    Returns:
        `step`, `global_batch`, and `sequences`: `hash`, `tokens`, `documents`.

    Raises:
        ValueError: There is no such step, or the ranks can't share it.
    """
    if plan.batch_size % world_size:
        raise ValueError(f"world_size is {world_size}, which doesn't divide the global batch of {plan.batch_size}")
    found = plan.at(step)
    sequences = [
        {
            "hash": plan.sequence_hash(sequence),
            "tokens": sum(item.num_tokens for item in sequence),
            "documents": [{**plan.describe(item), "offset": _offset(plan, item)} for item in sequence],
        }
        for sequence in found.sequences
    ]
    shown = {"step": step, "global_batch": plan.batch_size, "recipe_hash": plan.hash, "sequences": sequences}
    if text or world_size > 1 or num_workers:
        _read_through_loaders(shown, plan, folder, found, text, world_size, num_workers)
    return shown


def _offset(plan: Plan, item: Item) -> int:
    return plan.sources[item.source].indices[item.shard].place(item.row).start


def _read_through_loaders(
    shown: dict[str, Any],
    plan: Plan,
    folder: TokenizerFolder,
    found: StepPlan,
    text: bool,
    world_size: int,
    num_workers: int,
) -> None:
    """Puts in what the loaders of all ranks gave: hashes, and with `text` texts, targets and errors."""
    before = plan.state_before(found.step)
    for rank in range(world_size):
        dataset = StepDataset(plan, folder, ImageTransform(folder.image_size), hashes=True, raises=False)
        loader = PackedLoader(plan, dataset, found.step + 1, rank, world_size, num_workers, is_bounded=False)
        loader.load_state_dict({**before, "position": found.step})
        batch = next(iter(loader))
        for row, (number, told) in enumerate(zip(loader.share(found), batch.state["hashes"], strict=True)):
            sequence = shown["sequences"][number]
            sequence["hash"] = told
            errors = batch.state["row_errors"][row]
            if errors:
                sequence["errors"] = errors
            if not text:
                continue
            is_text_T = (batch.modality_BT[row] == Modality.TEXT) & (batch.document_ids_BT[row] >= 0)
            sequence |= {
                "text": folder.text.decode(batch.token_ids_BT[row][is_text_T].tolist()),
                "targets": int((batch.labels_BT[row] != IGNORE).sum()),
                "trained": _trained_texts(batch.labels_BT[row], is_text_T, folder),
                "errors": errors,
            }


def _trained_texts(labels_T: Tensor, is_text_T: Tensor, folder: TokenizerFolder) -> list[str]:
    """Each run of text that is to be predicted: of a conversation, what the assistant says."""
    is_target_T = labels_T != IGNORE
    is_target_T[:-1] &= is_text_T[1:]  # labels are shifted: the target is the next token
    bounds = np.flatnonzero(np.diff(np.concatenate([[False], is_target_T.numpy(), [False]]))).reshape(-1, 2)
    texts = [folder.text.decode(labels_T[start:stop].tolist()) for start, stop in bounds.tolist()]
    return [text for text in texts if text]


def add_starts(shown: dict[str, Any], plan: Plan, folder: TokenizerFolder) -> None:
    """Puts in the start of each document's text; no picture or sound is decoded."""
    dataset = StepDataset(plan, folder, ImageTransform(folder.image_size), raises=False)
    read = SampleReader(plan, None)
    for sequence, told in zip(plan.at(shown["step"]).sequences, shown["sequences"], strict=True):
        for item, named in zip(sequence, told["documents"], strict=True):
            errors: list[str] = []
            if item.part > 0:  # where a part begins is counted in tokens
                document = dataset.document(item, errors)
                text = folder.text.decode(document.token_ids_T.tolist()) if isinstance(document, Document) else ""
            else:
                try:
                    sample = read(item)
                    text = sample.text or " ".join(segment.text for segment in sample.segments if segment.text)
                except (ValueError, OSError) as error:
                    text = f"can't be read: {error}"
            named["start"] = start_of(errors[0] if errors else text)
    read.close()


def write_step_page(shown: dict[str, Any], plan: Plan, folder: TokenizerFolder, path: str | Path) -> None:
    """The step as one HTML file: texts with their targets marked, thumbnails, players.

    Args:
        shown: What `show_step` gave.
        plan: The plan.
        folder: Its tokenizer folder.
        path: The file.
    """
    dataset = StepDataset(plan, folder, ImageTransform(folder.image_size), raises=False)
    read = SampleReader(plan, None)
    sequences = []
    for sequence, told in zip(plan.at(shown["step"]).sequences, shown["sequences"], strict=True):
        documents = []
        for item, named in zip(sequence, told["documents"], strict=True):
            errors: list[str] = []
            document = dataset.document(item, errors)
            try:
                sample = read(item)
            except (ValueError, OSError):
                sample = None  # what is wrong with it stands in `errors`
            documents.append((named, document, sample, errors))
        sequences.append((told, documents))
    read.close()
    Path(path).write_text(step_page(shown, sequences, folder), encoding="utf-8")
