"""Two gloo processes train one codebook: the same on both, and the same as one process with both batches."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as distributed

from mmllm_tokenizers.codec import CodecConfig, ResidualQuantizer

CONFIG = CodecConfig(dimension=8, num_codebooks=2, codebook_size=16, warmup_batches=0, quantizer_dropout=0.0)
STEPS = 3


def quantizer() -> ResidualQuantizer:
    torch.manual_seed(0)
    return ResidualQuantizer(CONFIG).train()


def latents(step: int) -> torch.Tensor:
    return torch.randn(6, 8, 20, generator=torch.Generator().manual_seed(step))


def train(rank: int, folder: str, initialized: bool) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store{initialized}", rank=rank, world_size=2)
    module = quantizer()
    if initialized:
        module.num_batches += 1
    torch.manual_seed(rank)  # ranks must not need equal random numbers
    for step in range(STEPS):
        module(latents(step)[rank::2])
    torch.save(module.state_dict(), Path(folder) / f"{initialized}{rank}.pt")
    distributed.destroy_process_group()


def test_two_ranks_learn_the_codebooks_of_one(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    commands = [[sys.executable, __file__, str(rank), str(tmp_path)] for rank in range(2)]
    ranks = [subprocess.Popen(command, env=environment) for command in commands]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]

    names = ("True0", "True1", "False0", "False1")
    states = {name: torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in names}
    alone = quantizer()
    alone.num_batches += 1
    for step in range(STEPS):
        alone(latents(step))
    for name, tensor in alone.state_dict().items():
        assert torch.equal(states["True0"][name], states["True1"][name]), name
        torch.testing.assert_close(states["True0"][name], tensor, rtol=1e-5, atol=1e-6)
        assert torch.equal(states["False0"][name], states["False1"][name]), name  # k-means of rank 0's batch


if __name__ == "__main__":
    for initialized in (True, False):  # in one pair of processes, since starting them is what takes time
        train(int(sys.argv[1]), sys.argv[2], initialized)
