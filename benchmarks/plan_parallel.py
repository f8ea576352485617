"""Where more GPUs stop helping, by arithmetic: `python benchmarks/plan_parallel.py [--json F] [--config FILE]`.

For a decoder, numbers of GPUs and meshes: bytes that a GPU sends in a step, the step's time, in what share of it it
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
from mmllm.model.decoder_config import DecoderConfig
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
COLUMNS = (
    "GPUs", "mesh", "GB sent: weights / experts / tensor", "step, s", "computes", "tokens/s a GPU", "M tokens a step",
    "memory, GB",
)  # fmt: skip
HEADER = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"


def layouts(num_gpus: int, decoder: DecoderConfig) -> dict[str, ParallelConfig]:
    """What is compared: one copy over all GPUs, or copies over 64 each, experts or heads spread in a machine."""
    shards = min(num_gpus, 64)
    choices = {"one copy": ParallelConfig(fsdp=num_gpus)}
    if num_gpus > 64:
        choices["copies of 64"] = ParallelConfig(data=num_gpus // 64, fsdp=64)
    if decoder.moe is not None and decoder.moe.num_experts % 8 == 0:
        choices["copies of 64, experts over 8"] = ParallelConfig(num_gpus // shards, shards, expert=8)
    if decoder.kv_heads % 4 == 0:
        choices["copies of 64, tensor 4"] = ParallelConfig(num_gpus // shards, shards // 4, tensor=4)
    return choices


def limits(decoder: DecoderConfig, sequences: int) -> dict[str, int]:
    """For each layout up to how many GPUs one of them gives at least 80% of what it gives among 64."""
    found: dict[str, int] = {}
    for label in layouts(128, decoder):
        speeds = {}
        for num_gpus in (64 * 2**power for power in range(11)):
            mesh = layouts(num_gpus, decoder).get(label, ParallelConfig(fsdp=num_gpus))
            step = plan(decoder, mesh, SEQUENCE_LENGTH, sequences * mesh.tensor)
            speeds[num_gpus] = step.tokens / step.seconds / num_gpus
        found[label] = max(num_gpus for num_gpus, speed in speeds.items() if speed >= 0.8 * speeds[64])
    return found


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
        print(HEADER)
        for num_gpus in NUM_GPUS:
            for mesh in layouts(num_gpus, decoder).values():
                step = plan(decoder, mesh, SEQUENCE_LENGTH, args.sequences * mesh.tensor)
                print(_line(num_gpus, mesh, step))
                sizes_of_axes = {axis: getattr(mesh, axis) for axis in AXES}
                rows.append({"decoder": name, "gpus": num_gpus, **sizes_of_axes, **_values(step)})
        beyond = ", ".join(f"{label} {limit:,}" for label, limit in limits(decoder, args.sequences).items())
        print(f"\nA GPU gives 80% of what it gives among 64, and stops scaling, beyond: {beyond} GPUs.")
    print(f"\n{Hardware()}")
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def _line(num_gpus: int, mesh: ParallelConfig, step: Step) -> str:
    label = " x ".join(f"{axis} {getattr(mesh, axis)}" for axis in AXES if getattr(mesh, axis) > 1)
    sent = " / ".join(f"{each / 1e9:.1f}" for each in (step.fsdp_bytes, step.expert_bytes, step.tensor_bytes))
    memory = f"{step.memory_bytes / 1e9:.0f}" + ("" if step.fits else " (too much)")
    speed = f"{step.tokens / step.seconds / num_gpus:,.0f}"
    times = f"{step.seconds:.2f} | {step.efficiency:.0%} | {speed} | {step.tokens / 1e6:.2f}"
    return f"| {num_gpus:,} | {label} | {sent} | {times} | {memory} |"


def _values(step: Step) -> dict[str, Any]:
    return {**vars(step), "seconds": step.seconds, "efficiency": step.efficiency}


if __name__ == "__main__":
    main()
