"""What `pretrained.py` measures of model folders, each command a process of its own.

`bits HELDOUT.jsonl --model DIR --json OUT [--adapter NAME]`
    the exact negative log-likelihood of held-out texts, as `mmllm.load(DIR).score` gives it.
`logits HELDOUT.jsonl --model DIR --exported LLAVA --decoder DECODER --json OUT [--pictures MANIFEST]`
    how far the logits of a model are from those of its exports in transformers, on texts and on pictures.
`trainable CONFIG … --json OUT`
    which share of its parameters each training moves.

Shapes: T positions, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from pretrained_text import SCORED_BEHIND, read_texts, write_json
from torch import Tensor

import mmllm
from mmllm.data.samples.document import Document, DocumentWriter
from mmllm.data.samples.documents import media_slots
from mmllm.data.samples.sample import Segment
from mmllm.inference.api import Model
from mmllm.inference.prompts import join, pad_left
from mmllm.training.lightning_cli import build_cli, quiet_lightning
from mmllm_tokenizers.vocab import IMAGE

NUM_COMPARED = 8
TEXT_TOKENS = 256


def bits(args: argparse.Namespace) -> dict[str, Any]:
    """Nats of each text, and bits a byte of all."""
    texts = read_texts(args.inputs[0])
    model = mmllm.load(args.model, adapter=args.adapter)
    nats = model.score([SCORED_BEHIND] * len(texts), texts)
    num_bytes = sum(len(text.encode()) for text in texts)
    return {"bits_per_byte": -sum(nats) / math.log(2) / num_bytes, "nats": nats, "bytes": num_bytes}


def trainable(args: argparse.Namespace) -> dict[str, Any]:
    """By the names of the configs: parameters in all, those that move, and their share."""
    found: dict[str, Any] = {}
    for path in args.inputs:
        with quiet_lightning():
            module: Any = build_cli(["-c", str(path), "--trainer.strategy", "auto"], run=False).model
        module.configure_model()
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in module.model.parameters()]
        total, moved = sum(size for size, _ in sizes), sum(size for size, is_moved in sizes if is_moved)
        found[path.stem] = {"parameters": total, "trainable": moved, "share": moved / total}
    return found


# --- exports ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def logits(args: argparse.Namespace) -> dict[str, Any]:
    """The largest differences of logits, and the largest logit."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model, found = mmllm.load(args.model), {}
    texts = read_texts(args.inputs[0])[:NUM_COMPARED]
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(args.decoder))
    decoder = transformers.AutoModelForCausalLM.from_pretrained(str(args.decoder)).eval()
    rows = [tokenizer(text, return_tensors="pt")["input_ids"][:, :TEXT_TOKENS] for text in texts]
    pairs = [(decoder(ids_1T).logits[0], _ours(model, ids_1T[0].tolist(), [])) for ids_1T in rows]
    found["decoder, text"] = _difference(pairs)
    if args.exported is not None:
        processor = transformers.AutoProcessor.from_pretrained(str(args.exported))
        llava = transformers.AutoModelForImageTextToText.from_pretrained(str(args.exported)).eval()
        pairs = [(llava(input_ids=ids_1T).logits[0], _ours(model, ids_1T[0].tolist(), [])) for ids_1T in rows]
        found["llava, text"] = _difference(pairs)
        pairs = []
        for picture, text in zip(_pictures(args.pictures), texts, strict=False):
            inputs = processor(
                text=f"{text[:40]}{processor.image_token}{text[40:80]}", images=picture, return_tensors="pt"
            )
            pairs.append((llava(**inputs).logits[0], _ours(model, inputs["input_ids"][0].tolist(), [picture])))
        found["llava, pictures"] = _difference(pairs)
    return found


def _pictures(manifest: Path) -> list[PIL.Image.Image]:
    rows = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    paths = [manifest.parent / row["image"] for row in rows if row.get("image")][:NUM_COMPARED]
    return [PIL.Image.open(path).convert("RGB") for path in paths]


def _ours(model: Model, ids: list[int], pictures: list[PIL.Image.Image]) -> Tensor:
    """Logits [T, V] of ids as transformers' processor wrote them; runs of `<|image|>` are the pictures."""
    image_id, slots = model.tokenizer.text.id(IMAGE), model.tokenizer.num_image_tokens
    documents: list[Document] = []
    waiting = list(pictures)
    while ids:
        if ids[0] == image_id:
            documents.append(media_slots(Segment(image=waiting.pop(0)), model.tokenizer, model.image_transform))
            ids = ids[slots:]
            continue
        run = ids[: ids.index(image_id)] if image_id in ids else ids
        writer = DocumentWriter(model.tokenizer)
        writer.ids(run, is_target=False)
        documents.append(writer.finish())
        ids = ids[len(run) :]
    return model.model.logits(pad_left([join(documents)]))[0]


def _difference(pairs: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Over the ids that both have."""
    apart = max(float((theirs_TV - ours_TV[:, : theirs_TV.shape[1]]).abs().max()) for theirs_TV, ours_TV in pairs)
    return {"max_difference": apart, "max_logit": max(float(theirs_TV.abs().max()) for theirs_TV, _ in pairs)}


def main(argv: Sequence[str] | None = None) -> None:
    """One of the three commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = {"bits": bits, "logits": logits, "trainable": trainable}
    parser.add_argument("command", choices=commands)
    parser.add_argument("inputs", nargs="+", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--adapter")
    parser.add_argument("--exported", type=Path)
    parser.add_argument("--decoder", type=Path)
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args(argv)
    found = commands[args.command](args)
    write_json(args.json, found)
    print(json.dumps({key: value for key, value in found.items() if key != "nats"}, indent=1))


if __name__ == "__main__":
    main()
