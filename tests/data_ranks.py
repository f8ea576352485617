"""One rank of a run that only reads: `python tests/data_ranks.py JSON`. Started and killed by test_data_resume.py.

Ranks meet by gloo after each step; rank 0 notes the hashes of all ranks' rows and saves the state, as checkpoints do.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mmllm.batch import PackedBatch
from mmllm.data.loading.loader import PackedLoader, StepDataset
from mmllm.data.plan.plan import open_plan
from mmllm.data.plan.recipe import load_recipe
from mmllm.data.samples.decode import ImageTransform
from mmllm_tokenizers.folder import TokenizerFolder

STEP_SECONDS = 0.05
"""So that who kills a run still finds it at work."""


def rows(batch: PackedBatch) -> list[str]:
    """A hash of all that each row holds."""
    digests = []
    length = batch.token_ids_BT.shape[1]
    for row in range(batch.token_ids_BT.shape[0]):
        parts = [tensor[row] for name, tensor in vars(batch).items() if "_BT" in name and len(tensor)]
        for slots, values in (
            (batch.image_slots_NS, batch.images_NCHW),
            (batch.clip_slots_CS, batch.clip_codes_CFK),
        ):
            here = (slots[:, 0] // length == row) if len(slots) else torch.zeros(0, dtype=torch.bool)
            parts += [value[value >= 0] for value in values[here]]
        digests.append(hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest())
    return digests


def run(
    recipe: str, batch_size: int, rank: int, world_size: int, workers: int, steps: int, out: str, meet: str
) -> None:
    """Reads steps from the saved state on, until `steps` are done."""
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=world_size)
    read = load_recipe(recipe)
    folder = TokenizerFolder.load(read.tokenizer_folder())
    dataset = StepDataset(open_plan(read, batch_size, folder), folder, ImageTransform(folder.image_size))
    loader = PackedLoader(open_plan(read, batch_size, folder), dataset, steps, rank, world_size, workers)
    state_path, log_path = Path(out) / "state.json", Path(out) / "log.jsonl"
    if state_path.is_file():
        loader.load_state_dict(json.loads(state_path.read_text()))
    done = int(loader.state_dict()["step"])
    dist.barrier()
    for batch in [] if done == steps else loader:
        weight = torch.ones(1)
        dist.all_reduce(weight)
        gathered: list[Any] = [None] * world_size
        dist.all_gather_object(gathered, rows(batch))
        if rank == 0:
            hashes = sorted(digest for share in gathered for digest in share)
            with log_path.open("a") as stream:
                stream.write(json.dumps({"step": batch.state["step"], "hashes": hashes}) + "\n")
                stream.flush()
                os.fsync(stream.fileno())
            partial = state_path.with_suffix(".partial")
            partial.write_text(json.dumps(loader.state_dict()))
            partial.replace(state_path)
        time.sleep(STEP_SECONDS)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    run(**json.loads(sys.argv[1]))
