"""From a pretrained language model to one that sees and hears, and out again: `make pretrained`.

`python benchmarks/pretrained.py [--out runs/pretrained] [--minutes 28] [--seed 0] [--max_steps N]`

 1. Texts: Shakespeare, of the folder that $MMLLM_DATA names, or else the demo's prose; some are held out.
 2. A language model that transformers trains on them, with a tokenizer of its own (pretrained_text.py).
 3. Eyes and ears: a CLIP tower and a codec, trained on the demo's pictures and speech.
 4. `mmllm import` joins the three. All that was pretrained is intact, to the last bit.
 5. Alignment: projectors and added ids learn, the language model is frozen; its texts cost the very same bits.
 6. LoRA on pictures and speech, with some text; merged.
 7. Export, and the same logits in transformers.
 8. The same recipe from nothing, for as many minutes as 5 and 6 took.
 9. Held-out pictures and speech, and `report.json`.

Every stage is a command, shown as it would be typed; run again, what is done is skipped. Nothing that is scored was
trained on. --max_steps N is a try-out of the whole way with few rows and N steps of each training: its scores mean
nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pretrained_plan import CLIP_CONTEXT, CLIP_IDS, IMAGE_SIZE, NAME, Plan
from pretrained_stages import Stages

from mmllm.checkout import commit
from mmllm.quickstart.machine import num_cores
from mmllm.quickstart.prose import make_prose

HELDOUT_SHARE, PIECE_CHARACTERS = 0.08, 800
MAX_OBJECTS = 2
"""Of a picture: a third is more than so short a training learns to say."""
MODELS = ("aligned", "adapted", "from_nothing")
TOLERANCE = 1e-4


def main(argv: Sequence[str] | None = None) -> None:
    """The whole way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/pretrained"))
    parser.add_argument("--minutes", type=float, default=28.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max_steps", type=int)
    args = parser.parse_args(argv)
    is_tryout = args.max_steps is not None
    plan = Plan(args.out, args.minutes, args.max_steps, args.seed, 1 if is_tryout else min(2, num_cores()))
    settings = {"minutes": args.minutes, "seed": args.seed, "max_steps": args.max_steps}
    stages = Stages(args.out, settings, 1 if is_tryout else num_cores(), shares_process=is_tryout)
    try:
        source = texts(plan)
        plan.write_configs()
        language_model(plan, stages)
        eyes_and_ears(plan, stages)
        joined(plan, stages)
        aligned(plan, stages)
        adapted(plan, stages)
        exported(plan, stages)
        from_nothing(plan, stages)
        evaluated(plan, stages)
        report(plan, stages, source)
    finally:
        stages.processes.end_all()


# --- 1 ----------------------------------------------------------------------------------------------------------------


def texts(plan: Plan) -> str:
    """Writes `texts/train.jsonl` and the pieces of `texts/heldout.jsonl`; says where they are from."""
    folder, data = plan.path("texts"), os.environ.get("MMLLM_DATA")
    shakespeare = Path(data, "shakespeare", "manifest.jsonl") if data else None
    if shakespeare is not None:
        if not shakespeare.is_file():
            raise SystemExit(
                f"MMLLM_DATA is {data}, where there is no shakespeare/manifest.jsonl; unset it, or mend it"
            )
        documents = [row["text"] for row in read_rows(shakespeare)]
        random.Random(f"texts {plan.seed}").shuffle(documents)
        num_heldout = round(HELDOUT_SHARE * len(documents))
        train, heldout, source = documents[num_heldout:], documents[:num_heldout], "Shakespeare"
    else:
        made = make_prose(folder / "prose", plan.seed)
        train, heldout = ([row["text"] for row in read_rows(made[split])] for split in ("train", "test"))
        source = "the demo's prose, the help texts of Python, since MMLLM_DATA is unset"
    pieces = [piece for text in heldout for piece in cut(text, PIECE_CHARACTERS)]
    if plan.max_steps is not None:
        train, pieces = train[:60], pieces[:8]
    for name, rows in (("train", train), ("heldout", pieces)):
        write_rows(folder / f"{name}.jsonl", [{"id": f"{name}-{i:05d}", "text": row} for i, row in enumerate(rows)])
    print(f"1. Texts: {source}; {len(train):,} documents, {len(pieces)} held-out pieces")
    return source


def cut(text: str, max_characters: int) -> list[str]:
    """A text in pieces of whole paragraphs, of so many characters at most; a longer paragraph is cut at spaces."""
    pieces: list[str] = []
    for paragraph in re.split(r"\n\n+", text):
        while len(paragraph) > max_characters:
            place = paragraph.rfind(" ", 1, max_characters)
            place = place if place > 0 else max_characters
            pieces.append(paragraph[:place])
            paragraph = paragraph[place:]
        if pieces and len(pieces[-1]) + 2 + len(paragraph) <= max_characters:
            pieces[-1] += "\n\n" + paragraph
        else:
            pieces.append(paragraph)
    return [piece for piece in pieces if piece.strip()]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Of a manifest."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes a manifest."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# --- 2 ----------------------------------------------------------------------------------------------------------------


def language_model(plan: Plan, stages: Stages) -> None:
    """Somebody's language model, and what it needs for the held-out texts."""
    stages.title("2. A language model by transformers")
    length = ["--seconds", plan.seconds("text_model")] if plan.max_steps is None else ["--max_steps", plan.max_steps]
    stages.run("text model", "pretrained_text.py", "train", plan.path("texts/train.jsonl"), "--out",
               plan.path("text_model"), *map(str, length), "--seed", str(plan.seed))  # fmt: skip
    stages.run("bits: transformers", "pretrained_text.py", "bits", plan.path("texts/heldout.jsonl"), "--model",
               plan.path("text_model"), "--json", plan.path("bits/transformers.json"))  # fmt: skip


# --- 3 ----------------------------------------------------------------------------------------------------------------


def eyes_and_ears(plan: Plan, stages: Stages) -> None:
    """A CLIP tower and a codec, on rows that are parted first."""
    stages.title("3. Eyes and ears")
    seed, workers = str(plan.seed), str(min(2, stages.num_cores))
    data, rows, first = plan.path("data"), plan.path("rows"), plan.path("shards/first")
    stages.run("demo data", "demo-data", "--out", data, "--share", str(plan.data_share), "--seed", seed,
               "--workers", workers)  # fmt: skip
    for split in ("train", "test"):
        scenes = [row for row in read_rows(data / f"scenes/{split}.jsonl") if len(row["objects"]) <= MAX_OBJECTS]
        write_rows(data / f"scenes/few_{split}.jsonl", scenes)
    stages.run("rows", "data", "split", data / "scenes/few_train.jsonl", data / "speech/train.jsonl",
               plan.path("texts/train.jsonl"), "--test", data / "scenes/few_test.jsonl", "--test",
               data / "speech/test.jsonl", "--out", rows, "--seed", seed)  # fmt: skip
    stages.run("shards for tower and codec", "data", "build", rows / "train-caption.jsonl", rows / "train-audio.jsonl",
               "--out", first, "--seed", seed, "--workers", workers)  # fmt: skip
    stages.run("codec", "fit", "-c", plan.config("codec"), "--overwrite")
    stages.run("tokenizer of captions", "tokenizer", "train-text", rows / "train-caption.jsonl", "--vocab_size",
               str(CLIP_IDS), "--out", plan.path("clip_tokenizer"), "--image_size", str(IMAGE_SIZE))  # fmt: skip
    stages.run("clip", "fit", "-c", plan.config("clip"), "--overwrite", "--data.init_args.context_length",
               str(CLIP_CONTEXT))  # fmt: skip


# --- 4 ----------------------------------------------------------------------------------------------------------------


def joined(plan: Plan, stages: Stages) -> None:
    """The three as one model folder, and shards in its ids."""
    stages.title("4. Joined")
    imported, rows = plan.path("imported"), plan.path("rows")
    stages.run("import", "import", plan.path("text_model"), "--vision", plan.path("clip"), "--codec",
               plan.path("codec"), "--parts", plan.config("parts"), "--out", imported)  # fmt: skip
    stages.run("bits: imported", *bits_command(plan, "imported"))
    manifests = [rows / f"train-{kind}.jsonl" for kind in ("caption", "audio", "text")]
    stages.run("shards", "data", "build", *manifests, "--out", plan.path("shards/train"), "--tokenizer", imported,
               "--seed", str(plan.seed), "--workers", str(min(2, stages.num_cores)))  # fmt: skip
    stages.run("index", "data", "index", plan.path("shards/train"), "--tokenizer", imported)


def bits_command(plan: Plan, model: str) -> list[str | Path]:
    """What measures a model's held-out texts."""
    return ["pretrained_scores.py", "bits", plan.path("texts/heldout.jsonl"), "--model", plan.path(model), "--json",
            plan.path(f"bits/{model}.json")]  # fmt: skip


# --- 5, 6 -------------------------------------------------------------------------------------------------------------


def aligned(plan: Plan, stages: Stages) -> None:
    """Projectors, audio front end, tower and added ids learn; of the language model nothing."""
    stages.title("5. Alignment, the language model frozen")
    stages.run("aligned", "fit", "-c", plan.config("aligned"), "--overwrite")
    stages.run("bits: aligned", *bits_command(plan, "aligned"))


def adapted(plan: Plan, stages: Stages) -> None:
    """LoRA on attention and MLPs, with text among pictures and speech so that words stay as they were."""
    stages.title("6. LoRA, merged")
    stages.run("adapted", "fit", "-c", plan.config("adapted"), "--overwrite")
    stages.run("merge", "adapter", "merge", "--model", plan.path("adapted"), "--adapter", NAME, "--out",
               plan.path("merged"))  # fmt: skip
    stages.run("bits: adapted", *bits_command(plan, "merged"))


# --- 7 ----------------------------------------------------------------------------------------------------------------


def exported(plan: Plan, stages: Stages) -> None:
    """Out again: with pictures as LLaVA, and the language model alone in its family's form."""
    stages.title("7. Out again")
    merged, llava, decoder = plan.path("merged"), plan.path("exported"), plan.path("exported_decoder")
    stages.run("export", "export", "--model", merged, "--out", llava)
    stages.run("export of the decoder", "export", "--model", merged, "--out", decoder, "--format", "decoder")
    stages.run("logits", "pretrained_scores.py", "logits", plan.path("texts/heldout.jsonl"), "--model", merged,
               "--exported", llava, "--decoder", decoder, "--pictures", plan.path("rows/test.jsonl"), "--json",
               plan.path("logits.json"))  # fmt: skip


# --- 8, 9 -------------------------------------------------------------------------------------------------------------


def from_nothing(plan: Plan, stages: Stages) -> None:
    """The same shape, tower, data and minutes, but no pretrained words: everything is trained."""
    stages.title("8. From nothing")
    stages.run("from nothing", "fit", "-c", plan.config("from_nothing"), "--overwrite")
    stages.run("bits: from nothing", *bits_command(plan, "from_nothing"))


def evaluated(plan: Plan, stages: Stages) -> None:
    """Captions and transcripts of held-out rows, and which share of its parameters each training moved."""
    stages.title("9. What they say of held-out pictures and speech")
    folders = {name: "merged" if name == "adapted" else name for name in MODELS}
    stages.side_by_side([
        (f"eval {task}: {name}", (
            "eval", "--model", plan.path(folder), "--task", task, "--manifest", plan.path("rows/test.jsonl"),
            "--limit", str(plan.num_evaluated), "--json", plan.path(f"eval/{name}-{task}.json"),
        ))
        for name, folder in folders.items() for task in ("caption", "transcribe")
    ])  # fmt: skip
    stages.run("trainable shares", "pretrained_scores.py", "trainable", *(plan.config(name) for name in MODELS),
               "--json", plan.path("trainable.json"))  # fmt: skip


# --- report -----------------------------------------------------------------------------------------------------------


def report(plan: Plan, stages: Stages, source: str) -> None:
    """Writes report.json and shows its numbers."""
    found = {name: read_json(plan.path(f"bits/{name}.json")) for name in ("transformers", "imported", "aligned")}
    found |= {name: read_json(plan.path(f"bits/{folder}.json"))
              for name, folder in (("adapted", "merged"), ("from_nothing", "from_nothing"))}  # fmt: skip
    bits = {name: values["bits_per_byte"] for name, values in found.items()}
    values: dict[str, Any] = {
        "texts": source,
        "language_model": read_json(plan.path("text_model.json")),
        "text_bits_per_byte": bits,
        "equal_to_the_bit": found["imported"]["nats"] == found["aligned"]["nats"],
        "relative_to_transformers": bits["imported"] / bits["transformers"] - 1,
        "adapted_relative": bits["adapted"] / bits["imported"] - 1,
        "captions": {name: scores(plan, name, "caption") for name in MODELS},
        "transcripts": {name: scores(plan, name, "transcribe") for name in MODELS},
        "trainable": read_json(plan.path("trainable.json")),
        "logits": read_json(plan.path("logits.json")),
        "minutes": {
            "stages": {name: round(seconds / 60, 3) for name, seconds in stages.seconds.items()},
            "total": round(sum(stages.seconds.values()) / 60, 2),
        },
        "seed": plan.seed,
        "max_steps": plan.max_steps,
        "commit": commit(),
    }
    values["holds"] = {
        "imported as in transformers (1e-4)": abs(values["relative_to_transformers"]) <= TOLERANCE,
        "aligned equal to the last bit": values["equal_to_the_bit"],
        "adapted no more than 1% worse": values["adapted_relative"] <= 0.01,
        "logits in transformers (1e-4)": all(
            found["max_difference"] <= TOLERANCE * max(1.0, found["max_logit"]) for found in values["logits"].values()
        ),
    }
    plan.path("report.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    for line in table(values):
        print(line)
    print(f"\n{plan.path('report.json')}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object."""
    return json.loads(path.read_text(encoding="utf-8"))


def scores(plan: Plan, name: str, task: str) -> dict[str, Any]:
    """What `mmllm eval` found."""
    return read_json(plan.path(f"eval/{name}-{task}.json"))[task]


def table(values: dict[str, Any]) -> list[str]:
    """The report's numbers for people."""
    head = f"{'':14}{'bits a byte':>12}{'captions right':>16}{'attributes':>12}{'WER':>8}{'trained':>9}"
    lines = ["", f"Texts: {values['texts']}.", "", head]
    for name, bits in values["text_bits_per_byte"].items():
        line = f"{name.replace('_', ' '):14}{bits:12.4f}"
        if name in MODELS:
            caption, heard = values["captions"][name], values["transcripts"][name]
            line += f"{caption['exact_match']:16.1%}{caption['attribute_accuracy']:12.1%}{heard['wer']:8.1%}"
            line += f"{values['trainable'][name]['share']:9.1%}"
        lines.append(line)
    lines += ["", *(f"{'yes' if holds else 'NO ':4} {what}" for what, holds in values["holds"].items())]
    lines += [f"     logits, {what}: {found['max_difference']:.1e}" for what, found in values["logits"].items()]
    return [*lines, "", f"{values['minutes']['total']:.1f} minutes"]


if __name__ == "__main__":
    main()
