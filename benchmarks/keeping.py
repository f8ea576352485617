"""What a narrow fine-tuning costs a model, and what each cure keeps: `python -m benchmarks.keeping --run runs/demo`.

The demo's model is fine-tuned on questions of types that it was never asked (counts, comparisons, …) and on nothing
else, or with a cure. Each training has the same steps and rates; its looks are those of `TaskScores`. A table goes to
`OUT/keeping.md`, all numbers to `OUT/keeping.json`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from mmllm.data import commands
from mmllm.quickstart.tour.questions import make_questions
from mmllm.training.lightning_cli import run_lightning

CURES: dict[str, dict[str, Any]] = {
    "none": {},
    "replay 0.3": {},
    "kl": {"keep": {"kl": 1.0}},
    "ewc": {"keep": {"ewc": 300.0, "fisher_documents": 64}},
    "wise_ft 0.5": {"wise_ft": 0.5},
    "lora": {"adapter": {"r": 16, "lora_alpha": 32, "parts": ["attention", "experts"]}},
}
"""Settings of `DecoderModule`; replay is a source of the recipe."""
LORA_RATE = 2e-3
NUM_TRAIN, NUM_TEST = 1200, 150


def main() -> None:
    """Trains with each cure, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--run", type=Path, required=True, help="folder of `mmllm quickstart`")
    parser.add_argument("--out", type=Path, default=Path("runs/keeping"))
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--limit", type=int, default=100, help="rows of each held-out task")
    parser.add_argument("--cures", default=",".join(CURES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    questions, test = write_questions(args.run.resolve(), args.out.resolve())
    path = args.out / "keeping.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    for cure in args.cures.split(","):
        found[cure] = train(cure, args, questions, test)
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        table = as_table(found)
        (args.out / "keeping.md").write_text(table, encoding="utf-8")
        print(table, flush=True)


def write_questions(run: Path, out: Path) -> tuple[Path, Path]:
    """Shards of questions to train on, and a manifest of others about pictures of the test set."""
    shards, test = out / "shards", out / "test.jsonl"
    if not test.is_file():
        for split, count, path in (("train", NUM_TRAIN, out / "train.jsonl"), ("test", NUM_TEST, test)):
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = make_questions(run / "data", split, count, 0, out)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        commands.build(out / "train.jsonl", shards, tokenizer=run / "model")
        commands.index(shards, run / "model")
    return shards, test


def write_recipe(run: Path, shards: Path, replay: float, path: Path) -> Path:
    """The questions, and at the share `replay` what the model was trained on at the end of its training."""
    recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    recipe.pop("curriculum", None)
    sources = [
        {"name": "questions", "kind": "interleaved", "shards": f"{shards}/*.tar", "tasks": ["chat"],
         "weight": 1 - replay}
    ]  # fmt: skip
    for source in recipe["sources"] if replay else ():
        schedule = source.pop("weight_schedule", None)
        sources.append({**source, "weight": replay * (schedule[-1][1] if schedule else source["weight"])})
    path.write_text(yaml.safe_dump({**recipe, "sources": sources}, sort_keys=False), encoding="utf-8")
    return path


def train(cure: str, args: argparse.Namespace, shards: Path, test: Path) -> dict[str, Any]:
    """One training, as its looks before and after tell it."""
    run, name = args.run.resolve(), cure.replace(" ", "_")
    folder = args.out.resolve() / name
    folder.mkdir(parents=True, exist_ok=True)
    recipe = write_recipe(run, shards, 0.3 if cure.startswith("replay") else 0.0, folder / "recipe.yaml")
    settings = {**CURES[cure]}
    if settings.get("keep", {}).get("ewc"):
        settings["keep"] = {**settings["keep"], "fisher_recipe": str(run / "recipe.yaml")}
    rate = LORA_RATE if "adapter" in settings else args.lr
    tasks = [
        {"task": task, "manifest": str(manifest), "limit": args.limit}
        for task, manifest in (("chat", test), *((each, run / "manifests" / "test.jsonl") for each in
                                                ("caption", "transcribe")))
    ]  # fmt: skip
    looks = {"tasks": tasks, "directory": str(folder / "costs"), "num_answers": 32}
    config = {
        "seed_everything": 0,
        "trainer": {
            "accelerator": "cpu", "max_steps": args.steps, "gradient_clip_val": 1.0, "logger": False,
            "enable_checkpointing": False, "enable_progress_bar": False,
            "callbacks": [{"class_path": "mmllm.training.posttraining.costs.TaskScores", "init_args": looks}],
        },
        "model": {
            "class_path": "mmllm.training.decoder_module.DecoderModule",
            "init_args": {"init_from": str(run / "model"),
                          "optimizer": {"lr": rate, "warmup": 0.1, "muon": True, "tower_lr": 0.0}, **settings},
        },
        "data": {
            "class_path": "mmllm.data.loading.datamodules.PackedDataModule",
            "init_args": {"recipe": str(recipe), "batch_size": args.batch_size, "cache_mb": 128},
        },
    }  # fmt: skip
    if "adapter" in settings:
        del config["model"]["init_args"]["optimizer"]["tower_lr"]
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    begun = time.monotonic()
    run_lightning(["fit", "-c", str(path), "--overwrite"])
    told = json.loads((folder / "costs" / "forgetting.json").read_text())
    first, last = told["looks"][0], told["looks"][-1]
    return {"start": first["scores"], "end": last["scores"], "kl": last["kl"], "seconds": time.monotonic() - begun,
            "training_seconds": last["seconds"], "steps": last["step"]}  # fmt: skip


def as_table(found: dict[str, Any]) -> str:
    """Markdown: points of each task, gained or lost."""
    lines = ["| cure | questions right, % | captions lost | transcripts lost | KL, nats | training, s |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    start = next(iter(found.values()))["start"]
    lines.append(f"| start | {100 * start['chat']:.1f} | – | – | 0 | – |")
    for cure, one in found.items():
        lost = [100 * (one["start"][task] - one["end"][task]) for task in ("caption", "transcribe")]
        lines.append(
            f"| {cure} | {100 * one['end']['chat']:.1f} | {lost[0]:.1f} | {lost[1]:.1f} | {one['kl']:.1f} | "
            f"{one['training_seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
