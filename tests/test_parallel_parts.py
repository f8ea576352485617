"""Dispatchers, the split vocabulary, norms and checkpoints against slow and obvious references, on four processes.

All checks run in the same processes, each of which says what went wrong. Shapes: as in the modules that are tested.
"""

from __future__ import annotations

import contextlib
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from mmllm.batch import IGNORE
from mmllm.losses import chunked, vocabulary
from mmllm.parallel.checkpoint import gathered, is_folder, load_folder, save_folder, sharded
from mmllm.parallel.experts import AllToAllDispatcher, TensorDispatcher
from mmllm.parallel.mesh import ParallelConfig, ParallelMesh
from mmllm.parallel.norms import scale_to_norm_, total_norm

RANKS = 4
NUM_EXPERTS, TOP_K, WIDTH = 8, 3, 5


def _experts(x_TD: Tensor, gates_TK: Tensor, experts_TK: Tensor, weight_EDD: Tensor) -> Tensor:
    """Each token through each of its experts, one by one."""
    out_TD = []
    for x_D, gates_K, experts_K in zip(x_TD, gates_TK, experts_TK.tolist(), strict=True):
        parts = [g * (x_D @ weight_EDD[e]).tanh() for g, e in zip(gates_K, experts_K, strict=True) if e >= 0]
        out_TD.append(torch.stack(parts).sum(dim=0) if parts else torch.zeros_like(x_D))
    return torch.stack(out_TD) if out_TD else x_TD @ weight_EDD[0] * gates_TK.sum()


def _routed(num_tokens: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x_ND = torch.randn(num_tokens, WIDTH, generator=generator, dtype=torch.float64)
    gates_NK = torch.rand(num_tokens, TOP_K, generator=generator, dtype=torch.float64)
    scores_NE = torch.rand(num_tokens, NUM_EXPERTS, generator=generator)
    experts_NK = scores_NE.topk(TOP_K, dim=1).indices
    dropped_NK = torch.rand(num_tokens, TOP_K, generator=generator) < 0.2
    return x_ND, gates_NK, experts_NK.masked_fill(dropped_NK, -1)


def _weights() -> Tensor:
    return torch.randn(NUM_EXPERTS, WIDTH, WIDTH, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def tokens_travel_to_their_experts(rank: int, work: Path) -> None:
    for sizes in ((5, 0, 1, 9), (3, 3, 3, 3), (0, 0, 0, 0), (0, 0, 0, 1)):
        of_ranks = [_routed(size, seed) for seed, size in enumerate(sizes)]
        x_ND, gates_NK = (torch.cat([each[i] for each in of_ranks]).requires_grad_() for i in (0, 1))
        weight_EDD = _weights().requires_grad_()
        wanted_ND = _experts(x_ND, gates_NK, torch.cat([each[2] for each in of_ranks]), weight_EDD)
        slope_ND = torch.randn(wanted_ND.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        (wanted_ND * slope_ND).sum().backward()
        here = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))

        own_x_ND, own_gates_NK = (tensor.detach()[here].requires_grad_() for tensor in (x_ND, gates_NK))
        num_here = NUM_EXPERTS // RANKS
        own = slice(rank * num_here, (rank + 1) * num_here)
        own_EDD = _weights()[own].requires_grad_()
        dispatcher = AllToAllDispatcher(dist.group.WORLD, NUM_EXPERTS)  # pyright: ignore
        out_ND = dispatcher(own_x_ND, own_gates_NK, of_ranks[rank][2], lambda x, g, e, w=own_EDD: _experts(x, g, e, w))
        (out_ND * slope_ND[here]).sum().backward()
        assert torch.allclose(out_ND, wanted_ND[here], atol=1e-13)
        for found, wanted in ((own_x_ND, x_ND), (own_gates_NK, gates_NK)):
            assert found.grad is not None and wanted.grad is not None
            assert torch.allclose(found.grad, wanted.grad[here], atol=1e-13)
        assert own_EDD.grad is not None and weight_EDD.grad is not None
        assert torch.allclose(own_EDD.grad * RANKS, weight_EDD.grad[own], atol=1e-13), "a mean over ranks follows"


def ranks_with_the_same_tokens_share_the_experts(rank: int, work: Path) -> None:
    for size in (7, 0):
        x_ND, gates_NK, experts_NK = _routed(size, seed=3)
        num_here = NUM_EXPERTS // RANKS
        own = slice(rank * num_here, (rank + 1) * num_here)
        results = []
        for is_split in (False, True):
            x, gates = x_ND.clone().requires_grad_(), gates_NK.clone().requires_grad_()
            weight = (_weights()[own] if is_split else _weights()).requires_grad_()
            if is_split:
                dispatcher = TensorDispatcher(dist.group.WORLD, NUM_EXPERTS)  # pyright: ignore
                out = dispatcher(x, gates, experts_NK, lambda x, g, e, w=weight: _experts(x, g, e, w))
            else:
                out = _experts(x, gates, experts_NK, weight)
            out.square().sum().backward()
            assert x.grad is not None and gates.grad is not None and weight.grad is not None
            results.append((out.detach(), x.grad, gates.grad, weight.grad if is_split else weight.grad[own]))
        for found, wanted in zip(results[1], results[0], strict=True):
            assert torch.allclose(found, wanted, atol=1e-13)


def a_split_vocabulary_gives_the_losses_of_a_whole_one(rank: int, work: Path) -> None:
    mesh = init_device_mesh("cpu", (RANKS,))
    generator = torch.Generator().manual_seed(1)
    first_row, block, num_codes = 13, 5, 3  # of 28 rows, 7 a rank: blocks lie on two ranks
    for num_targets, num_frames, z_coef, cap in (
        (9, 4, 0.0, 0.0),
        (9, 4, 0.3, 5.0),
        (1, 0, 0.1, 0.0),
        (0, 0, 0.0, 0.0),
    ):
        hidden_MD = torch.randn(num_targets, 6, generator=generator, dtype=torch.float64)
        weight_VD = torch.randn(28, 6, generator=generator, dtype=torch.float64)
        labels_M = torch.randint(0, 28, (num_targets,), generator=generator)
        labels_M[::4] = IGNORE
        if num_targets > 2:
            weight_VD[20] = weight_VD[3]
            labels_M[1], labels_M[2] = 20, 3  # of equal logits the first is the best
        frames_U = torch.randperm(max(num_targets, 1), generator=generator)[:num_frames]
        codes_UJ = torch.randint(0, block, (num_frames, num_codes), generator=generator)
        codes_UJ[1:2, 0] = IGNORE
        weights_M = torch.rand(num_targets, generator=generator, dtype=torch.float64)
        code_weights_UJ = torch.rand(num_frames, num_codes, generator=generator, dtype=torch.float64)
        rest = (labels_M, weights_M, frames_U, codes_UJ, code_weights_UJ, first_row, block, z_coef, cap, torch.float64)
        for chunk_bytes in (1, 2**20):
            hidden, weight = hidden_MD.clone().requires_grad_(), weight_VD.clone().requires_grad_()
            wanted = chunked.weighted(hidden, weight, weight[:0], *rest, chunk_bytes, True, True, False)[:5]
            (wanted[0] * 3).backward()
            own_hidden = hidden_MD.clone().requires_grad_()
            own_weight = distribute_tensor(weight_VD, mesh, [Shard(0)], src_data_rank=None).requires_grad_()
            found = vocabulary.weighted(own_hidden, own_weight, *rest, chunk_bytes)  # pyright: ignore
            (found[0] * 3).backward()
            for mine, whole in zip(found, wanted, strict=True):
                assert mine.dtype == whole.dtype and mine.shape == whole.shape
                assert (
                    torch.equal(mine, whole) if whole.dtype == torch.bool else torch.allclose(mine, whole, atol=1e-12)
                )
            assert own_weight.grad is not None and own_hidden.grad is not None
            assert hidden.grad is not None and weight.grad is not None
            assert torch.allclose(own_hidden.grad, hidden.grad, atol=1e-12)
            own = slice(7 * rank, 7 * rank + 7)
            assert torch.allclose(own_weight.grad.to_local(), weight.grad[own], atol=1e-12)  # pyright: ignore


def norms_are_those_of_whole_gradients(rank: int, work: Path) -> None:
    mesh = ParallelMesh.build(ParallelConfig(fsdp=4, expert=2), "cpu")
    flat, two = mesh.dense["fsdp"], mesh.sparse["expert_fsdp", "expert"]
    generator = torch.Generator().manual_seed(2)
    wholes, gradients = [], []
    for device_mesh, places, shape in (
        (flat, [Shard(0)], (5, 3)),
        (flat, [Shard(0)], (1,)),
        (flat, [Replicate()], (4, 2)),
        (two, [Shard(1), Shard(0)], (4, 6, 2)),
        (two, [Replicate(), Shard(0)], (2, 3)),
        (None, [], (3, 3)),
    ):
        whole = torch.randn(*shape, generator=generator, dtype=torch.float64)
        wholes.append(whole)
        gradient = whole.clone()
        if device_mesh is not None:
            gradient = distribute_tensor(gradient, device_mesh, places, src_data_rank=None)
        gradients.append(gradient)
    wanted = torch.stack([whole.norm() for whole in wholes]).norm()
    assert torch.allclose(total_norm(gradients), wanted, rtol=1e-14)
    scale_to_norm_(gradients, wanted, 1.5)
    for gradient, whole in zip(gradients, wholes, strict=True):
        found = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        assert torch.allclose(found, whole * 1.5 / (wanted + 1e-6), rtol=1e-12)


def checkpoints_are_read_in_any_layout(rank: int, work: Path) -> None:
    mesh = ParallelMesh.build(ParallelConfig(fsdp=4, expert=2), "cpu")
    flat, two = mesh.dense["fsdp"], mesh.sparse["expert_fsdp", "expert"]
    generator = torch.Generator().manual_seed(3)
    rows, stack = (torch.randn(*shape, generator=generator) for shape in ((5, 3), (4, 6, 2)))

    def place(whole: Tensor, device_mesh, places) -> DTensor:
        return distribute_tensor(whole, device_mesh, places, src_data_rank=None)

    checkpoint = {
        "state_dict": {"rows": place(rows, flat, [Shard(0)]), "stack": place(stack, two, [Shard(1), Shard(0)])},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(3.0), "exp_avg": place(rows * 2, flat, [Shard(0)])}}}],
        "scalar": place(torch.tensor(7.0), flat, [Replicate()]),
        "half": place(stack.bfloat16(), flat, [Shard(0)]),
        "loops": {"epoch": 2, "names": ["a", None], "pair": (1, 2.5)},
    }
    folder = work / "folder"
    for turn in (1, 2):  # the second takes the first one's place
        save_folder({**checkpoint, "turn": turn}, folder)
    assert is_folder(folder) and not [path for path in folder.iterdir() if path.suffix not in (".safetensors", ".pt")]
    whole = load_folder(folder)
    assert whole["turn"] == 2 and whole["loops"] == checkpoint["loops"] and whole["scalar"] == 7
    assert torch.equal(whole["state_dict"]["rows"], rows) and torch.equal(whole["state_dict"]["stack"], stack)
    state = whole["optimizer_states"][0]["state"][0]
    assert state["step"] == 3 and torch.equal(state["exp_avg"], rows * 2)
    assert whole["half"].dtype == torch.bfloat16 and torch.equal(whole["half"], stack.bfloat16())

    other = {"rows": place(torch.zeros(5, 3), flat, [Replicate()]), "stack": place(stack * 0, flat, [Shard(1)])}
    found = load_folder(folder, lambda rest: lambda name: other.get(name.split("/")[-1]))
    for name, wanted in (("rows", rows), ("stack", stack)):
        tensor = found["state_dict"][name]
        assert tensor.placements == other[name].placements and torch.equal(tensor.full_tensor(), wanted)
    gathered_here = gathered(checkpoint)["state_dict"]
    assert (gathered_here["rows"] is None) == (rank > 0)
    again = sharded({"state_dict": {"rows": rows}}, lambda name: checkpoint["state_dict"].get(name.split("/")[-1]))
    assert torch.equal(again["state_dict"]["rows"].to_local(), checkpoint["state_dict"]["rows"].to_local())
    dist.barrier()
    if rank == 0:
        for path in folder.glob("*.safetensors"):
            path.write_bytes(path.read_bytes()[:20])
    dist.barrier()
    with pytest.raises(ValueError, match="can't be read as a checkpoint"):
        load_folder(folder)


CHECKS: dict[str, Callable[[int, Path], None]] = {
    check.__name__: check
    for check in (
        tokens_travel_to_their_experts,
        ranks_with_the_same_tokens_share_the_experts,
        a_split_vocabulary_gives_the_losses_of_a_whole_one,
        norms_are_those_of_whole_gradients,
        checkpoints_are_read_in_any_layout,
    )
}


def _rank(rank: int, port: int, work: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    for name, check in CHECKS.items():
        error = None
        try:
            check(rank, Path(work))
        except Exception:
            error = traceback.format_exc()
        Path(work, f"{name}.{rank}").write_text(error or "")
        if error is not None:
            raise SystemExit(1)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("parts")
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with contextlib.suppress(torch.multiprocessing.ProcessExitedException):  # what they wrote says why
        torch.multiprocessing.start_processes(_rank, args=(port, str(work)), nprocs=RANKS, start_method="fork")
    return work


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("name", CHECKS)
def test_on_four_processes(results: Path, name: str) -> None:
    said = {rank: path.read_text() for rank in range(RANKS) if (path := results / f"{name}.{rank}").is_file()}
    assert not any(said.values()), next(text for text in said.values() if text)
    assert len(said) == RANKS, "not reached: an earlier check failed"
