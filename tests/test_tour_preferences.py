"""The data of the tour's stages on preferences: what is put beside the model's captions, and what is held out."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

from mmllm.evaluation.rewards import shorter_and_right
from mmllm.quickstart.tour import caption_pairs
from mmllm.quickstart.tour.stage import Tour

OBJECTS = [{"size": "small", "colour": "red", "shape": "circle"}, {"size": "large", "colour": "blue", "shape": "star"}]
LONG = "a small red circle that is above a large blue star"


def candidates(tour: Tour, count: int) -> Path:
    lines = []
    for number in range(count):
        row = {"id": f"s{number}", "objects": OBJECTS, "relations": [[0, "above", 1]], "text": LONG}
        prompt = [{"role": "user", "content": [{"type": "image", "image": f"images/{number}.png"}]}]
        drawn = [{"text": "a small red circle above a large blue star", "num_tokens": 9}]
        lines.append({"id": row["id"], "task": "caption", "prompt": prompt, "candidates": drawn, "row": row})
    return tour.write_rows("captions", lines)


def test_the_shortest_wording_stands_beside_the_models(tmp_path: Path) -> None:
    tour = Tour(tmp_path / "model", tmp_path / "data", tmp_path)
    path = caption_pairs.with_shortest(tour, candidates(tour, 2))
    for line in path.read_text().splitlines():
        value = json.loads(line)
        texts = [each["text"] for each in value["candidates"]]
        assert texts == ["a small red circle above a large blue star", "small red circle above large blue star"]
        rewards = shorter_and_right(texts, [value["row"]] * 2)
        assert rewards[1] > rewards[0] > 1, "both are right"


def test_the_last_pictures_are_held_out(tmp_path: Path) -> None:
    def run(command: Sequence[str]) -> int:
        """As `mmllm prefer label` and `export` would, but each candidate is a pair."""
        named = dict(itertools.pairwise(command))
        if command[1] == "label":
            Path(named["--labels"]).write_text("{}\n")
            return 0
        lines = [json.loads(line) for line in Path(command[2]).read_text().splitlines()]
        Path(named["--out"]).write_text("".join(json.dumps({"prompt": each["prompt"]}) + "\n" for each in lines * 2))
        return 0

    tour = Tour(tmp_path / "model", tmp_path / "data", tmp_path, run_command=run)
    train, val = caption_pairs.exported(tour, candidates(tour, 20))
    names = [
        {json.loads(line)["prompt"][0]["content"][0]["image"] for line in path.read_text().splitlines()}
        for path in (train, val)
    ]
    assert names[1] == {"images/19.png"} and len(names[0]) == 19 and not names[0] & names[1]
