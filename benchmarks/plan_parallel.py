"""Where more GPUs stop helping, by arithmetic: `python benchmarks/plan_parallel.py [--json F] [--config FILE]`.

For a decoder, numbers of GPUs and meshes: bytes that a GPU sends in a step, the step's time, in what share of it the GPU
computes, memory. The batch grows with the GPUs, four sequences of 4,096 tokens each; what is assumed is told in
mmllm/parallel/plan.py. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import yaml

from mmllm.model.config import config_from_dict
from mmllm.model.decoder import DecoderConfig
from mmllm.model.router import MoEConfig
from mmllm.parallel.mesh import AXES, ParallelConfig
from mmllm.parallel.plan import Hardware, Sizes, Step, plan

ROOT = Path(__file__).resolve().parents[1]
SEVEN_B = ROOT / "configs" / "eight_gpus" / "decoder_7b.yaml"
SEVENTY_B = DecoderConfig(
    vocab_size=128_256,
    hidden_size=4096,
    num_hidden_layers=48,
    num_attention_heads=32,
    num_key_value_heads=8,
    moe=MoEConfig(num_experts=64, num_experts_per_tok=6, moe_intermediate_size=1792),
    tie_word_embeddings=False,
    gradient_checkpointing="full",
)
NUM_GPUS = (8, 64, 256, 1024, 4096)
SEQUENCE_LENGTH = 4096
HEADER = """| GPUs | mesh | GB sent: weights / experts / tensor | step, s | computes | tokens/s a GPU | M tokens a step | memory, GB |
|---|---|---|---|---|---|---|---|"""


def layouts(num_gpus: int, decoder: DecoderConfig) -> list[ParallelConfig]:
    """What is compared: one model over all GPUs, or copies over 64 each, experts or heads spread in a machine."""
    shards = min(num_gpus, 64)
    choices = [ParallelConfig(fsdp=num_gpus)]
    if num_gpus > 64:
        choices.append(ParallelConfig(data=num_gpus // 64, fsdp=64))
    if decoder.moe is not None and decoder.moe.num_experts % 8 == 0:
        choices.append(ParallelConfig(num_gpus // shards, shards, expert=8))
    if decoder.kv_heads % 4 == 0:
        choices.append(ParallelConfig(num_gpus // shards, shards // 4, tensor=4))
    return choices


def main() -> None:
    """See --help."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--config", type=Path, default=SEVEN_B, help="a decoder's training YAML")
    parser.add_argument("--sequences", type=int, default=4, help="of 4,096 tokens, a GPU")
    args = parser.parse_args()
    values = yaml.safe_load(args.config.read_text(encoding="utf-8"))["model"]["init_args"]["decoder"]
    decoders = {args.config.stem: config_from_dict(DecoderConfig, values, "decoder"), "decoder_70b": SEVENTY_B}
    rows: list[dict[str, Any]] = []
    for name, decoder in decoders.items():
        sizes = Sizes.of(decoder)
        print(f"\n{name}: {sizes.total / 1e9:.1f}B parameters, {sizes.active / 1e9:.2f}B active\n")
        print(
            "| GPUs | layout | sent GB (weights / tokens / tensor) | step s | computes | 1,000 tokens/s | memory GB |"
        )
        print("|---|---|---|---|---|---|---|")
        for num_gpus in NUM_GPUS:
            for mesh in layouts(num_gpus, decoder):
                step = plan(decoder, mesh, SEQUENCE_LENGTH, args.sequences * mesh.tensor)
                print(_line(num_gpus, mesh, step))
                sizes_of_axes = {axis: getattr(mesh, axis) for axis in AXES}
                rows.append({"decoder": name, "gpus": num_gpus, **sizes_of_axes, **_values(step)})
    print(f"\n{Hardware()}")
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def _line(num_gpus: int, mesh: ParallelConfig, step: Step) -> str:
    label = " x ".join(f"{axis} {getattr(mesh, axis)}" for axis in AXES if getattr(mesh, axis) > 1)
    sent = " / ".join(f"{each / 1e9:.1f}" for each in (step.fsdp_bytes, step.expert_bytes, step.tensor_bytes))
    memory = f"{step.memory_bytes / 1e9:.0f}" + ("" if step.fits else " (too much)")
    speed = f"{step.tokens / step.seconds / num_gpus:,.0f}"
    batch = f"{step.tokens / 1e6:.2f}"
    return f"| {num_gpus:,} | {label} | {sent} | {step.seconds:.2f} | {step.efficiency:.0%} | {speed} | {batch} | {memory} |"


def _values(step: Step) -> dict[str, Any]:
    return {**vars(step), "seconds": step.seconds, "efficiency": step.efficiency}


if __name__ == "__main__":
    main()
