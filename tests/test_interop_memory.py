"""How much memory an import takes: a checkpoint of 2 GB passes through, in one file and in shards."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmllm.checkpoints.weights import Checkpoint, TensorSpec, write_weights
from mmllm.interop.decoder_names import decoder_layout
from mmllm.interop.families import decoder_config
from tests.pretrained_fixtures import saved_kind

CONFIG = {
    "model_type": "llama", "vocab_size": 32_000, "hidden_size": 2048, "num_hidden_layers": 20,
    "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 5632, "hidden_act": "silu",
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False, "max_position_embeddings": 2048,
    "attention_bias": False, "mlp_bias": False, "head_dim": 64, "architectures": ["LlamaForCausalLM"],
}  # fmt: skip
"""About TinyLlama's, of 2 GB in bfloat16."""
MAX_RATIO = 1.15


def write_checkpoint(folder: Path, max_shard_bytes: int) -> int:
    saved_kind("byte_fallback", folder)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    layout = decoder_layout(decoder_config(CONFIG), "llama")
    specs = {name: TensorSpec(torch.bfloat16, shape) for name, shape in layout.theirs.items()}
    tensors = ((name, torch.full(spec.shape, 0.5, dtype=spec.dtype)) for name, spec in specs.items())
    write_weights(folder, specs, tensors, max_shard_bytes)
    return Checkpoint.open(folder).num_bytes


def peak_bytes(*lines: str) -> int:
    """Peak memory of a process that runs some lines of Python."""
    code = "\n".join(["import resource, sys", *lines, "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1]) * 1024


@pytest.mark.proof
@pytest.mark.timeout(900)
@pytest.mark.parametrize("max_shard_bytes", [10**10, 5 * 10**8])
def test_two_gigabytes_are_imported_in_the_memory_of_one_tensor(tmp_path: Path, max_shard_bytes: int, record_property):
    num_bytes = write_checkpoint(tmp_path / "theirs", max_shard_bytes)
    assert 2e9 < num_bytes < 2.3e9
    imports = "import mmllm.interop.importing, transformers"
    empty = peak_bytes("from mmllm.cli.main import main", imports)
    run = (
        f"sys.exit(1) if main(['import', {str(tmp_path / 'theirs')!r}, '--out', {str(tmp_path / 'ours')!r}]) else None"
    )
    peak = peak_bytes("from mmllm.cli.main import main", imports, run)
    ratio = (peak - empty) / num_bytes
    record_property(f"peak above an empty process of {num_bytes / 1e9:.2f} GB", f"{ratio:.3f} of it")
    assert ratio <= MAX_RATIO
    assert ratio <= 0.35, "it is that of embedding and grown embedding, not of the checkpoint"
