"""Captions that are preferred because they are shorter and still right: the data of stages `dpo`, `kto` and `rm`.

The pictures are new ones, of the kind that the model was trained on: none of them is in its data, and no scene of the
test is among them. The model says several captions of each, and the shortest wording is put beside them; a reward,
`shorter_and_right`, says which of two is the better one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mmllm.checkpoints.folder import load_model
from mmllm.data.loading.answers import AnswerDocument, pack_answers
from mmllm.data.loading.preference_rows import AnswerWriter, read_row
from mmllm.data.samples.documents import default_transform
from mmllm.evaluation.rewards import shorter_and_right
from mmllm.evaluation.scenes import SceneObject, short_caption
from mmllm.losses.answers import target_logprobs
from mmllm.quickstart.scenes import make_scenes
from mmllm.quickstart.tour.stage import Tour

REWARD = "shorter_and_right"
NUM_SCENES = 1500
NUM_HELD_OUT = 60
"""Of the scenes, for validation."""
NUM_DRAWN = 3
SCENE_SEED = 77
"""Beside the tour's: other pictures than the demo's."""


def num_scenes(tour: Tour) -> int:
    """Fewer where a trial run has a limit."""
    return NUM_SCENES if tour.limit is None else min(NUM_SCENES, 6 * tour.limit)


def drawn_captions(tour: Tour, num_drawn: int = NUM_DRAWN) -> Path:
    """Captions of new pictures by the tour's model: runs `mmllm prefer sample`."""
    folder = tour.out / "data" / "preference_scenes"
    manifests = make_scenes(folder, num_scenes(tour), 0, 0, SCENE_SEED + tour.seed)
    rows = [json.loads(line) for line in manifests["train"].read_text(encoding="utf-8").splitlines()]
    rows = [{**row, "image": f"preference_scenes/{row['image']}"} for row in rows if not row["plain"]]
    manifest = tour.write_rows("preference_scenes", rows)
    out = tour.out / "data" / f"captions_{num_drawn}.jsonl"
    command = ("prefer", "sample", "--model", str(tour.model), "--task", "caption", "--manifest", str(manifest),
               "--n", str(num_drawn), "--seed", str(tour.seed), "--out", str(out))  # fmt: skip
    return tour.make(f"prefer sample {num_drawn}", out, *command, inputs=[tour.model, manifest])


def with_shortest(tour: Tour, drawn: Path) -> Path:
    """The candidates, and beside those of each picture the shortest wording of its scene, as an editor has it."""
    lines = []
    for line in drawn.read_text(encoding="utf-8").splitlines():
        value = json.loads(line)
        row = value["row"]
        things = [SceneObject(each["size"], each["colour"], each["shape"]) for each in row["objects"]]
        short = short_caption(things, row["relations"][0][2 if len(things) == 1 else 1])
        if all(candidate["text"] != short for candidate in value["candidates"]):
            value["candidates"].append({"text": short, "num_tokens": len(short.split())})
        lines.append(value)
    return tour.write_rows(f"{drawn.stem}_and_shortest", lines)


def exported(tour: Tour, candidates: Path, form: str = "pairs", per_row: int | None = None) -> tuple[Path, Path]:
    """Labels and exports candidates; gives a file to train on, and one of the last pictures, which are held out."""
    labels = candidates.with_suffix(".labels.jsonl")
    tour.make(f"prefer label {candidates.stem}", labels, "prefer", "label", str(candidates), "--reward", REWARD,
              "--labels", str(labels), inputs=[candidates])  # fmt: skip
    path = candidates.with_name(f"{candidates.stem}_{form}.jsonl")
    more = () if per_row is None else ("--max_pairs_per_row", str(per_row))
    tour.make(f"prefer export {path.stem}", path, "prefer", "export", str(candidates), "--labels", str(labels),
              "--form", form, "--out", str(path), *more, inputs=[labels])  # fmt: skip
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    last = _images(lines)[-max(1, round(len(_images(lines)) * NUM_HELD_OUT / NUM_SCENES)) :]
    parts: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
    for line in lines:
        parts[_image(line) in last].append(line)
    return tour.write_rows(f"{path.stem}_train", parts[False]), tour.write_rows(f"{path.stem}_val", parts[True])


def _images(lines: Sequence[dict[str, Any]]) -> list[str]:
    """Of each picture once, in order."""
    return list(dict.fromkeys(map(_image, lines)))


def _image(line: dict[str, Any]) -> str:
    return os.path.basename(line["prompt"][-1]["content"][0]["image"])


def caption_scores(tour: Tour, name: str, model: Path, adapter: str | None = None) -> dict[str, float]:
    """Of the test scenes: words a caption, share that is right, and the mean reward."""
    found = tour.eval_json(f"{name}_caption", model, "caption", tour.test_manifest, adapter=adapter)
    rows = [row for row in found["predictions"] if row["group"] == "test"]
    words = [len(row["prediction"].split()) for row in rows]
    rewards = [1 + 1 / max(count, 1) if row["correct"] else 0.0 for row, count in zip(rows, words, strict=True)]
    return {
        "words": sum(words) / len(words),
        "exact": sum(row["correct"] for row in rows) / len(rows),
        "reward": sum(rewards) / len(rewards),
    }


def drawn_test_captions(tour: Tour, name: str, model: Path, num_drawn: int, limit: int) -> Path:
    """Captions of the test's pictures, drawn at temperature 1."""
    out = tour.out / "data" / f"test_captions_{name}_{num_drawn}.jsonl"
    command = ("prefer", "sample", "--model", str(model), "--task", "caption", "--manifest", str(tour.test_manifest),
               "--n", str(num_drawn), "--seed", str(tour.seed), "--limit", str(limit), "--out", str(out))  # fmt: skip
    return tour.make(f"prefer sample {out.stem}", out, *command, inputs=[model, tour.test_manifest])


def drawn_reward(tour: Tour, name: str, model: Path, num_rows: int) -> float:
    """The mean reward of captions that a model draws of the test's pictures."""
    limit = num_rows if tour.limit is None else min(num_rows, tour.limit)
    drawn = drawn_test_captions(tour, name, model, 1, limit)
    lines = [json.loads(line) for line in drawn.read_text(encoding="utf-8").splitlines()]
    texts = [line["candidates"][0]["text"] for line in lines]
    return sum(shorter_and_right(texts, [line["row"] for line in lines])) / len(lines)


def divergence(tour: Tour, name: str, model: Path, num_rows: int) -> float:
    """KL(model‖start) of a caption, in nats: the mean log-ratio of captions that the model draws."""
    limit = num_rows if tour.limit is None else min(num_rows, tour.limit)
    drawn = drawn_test_captions(tour, name, model, 1, limit)
    lines = [json.loads(line) for line in drawn.read_text(encoding="utf-8").splitlines()]
    policy, start = load_model(model), load_model(tour.model)
    transform = policy.image_transform or default_transform(policy.tokenizer)
    writer = AnswerWriter(policy.tokenizer, transform, 1 << 20)
    total = 0.0
    for line in lines:
        answer = [{"role": "assistant", "content": line["candidates"][0]["text"]}]
        value = {"task": "caption", "prompt": line["prompt"], "completion": answer, "label": True}
        row = read_row(json.dumps(value), line["id"], drawn.parent)
        document = writer.document(row, row.answers[0])
        batch = pack_answers([[AnswerDocument(document, 0)]], document.num_tokens)
        with torch.no_grad():
            models = policy.model, start.model
            nats = [target_logprobs(model, model(batch.packed), batch).logprobs_M.sum() for model in models]
        total += float(nats[0] - nats[1])
    return total / len(lines)
