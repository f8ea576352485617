#!/usr/bin/env bash
# Trains on the GPUs of one machine, or of several: run it on each with the same HEAD.
#   configs/launch/torchrun.sh decoder.yaml [options of mmllm fit]
#   NODES=2 NODE=0 HEAD=10.0.0.1 configs/launch/torchrun.sh decoder.yaml    # on the first machine; NODE=1 on the second
# A process that dies ends all of them; a run that was saved then goes on with --ckpt_path last, on any number of GPUs.
set -euo pipefail
config=${1:?give the YAML of the run}
shift
gpus=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1
exec python -m torch.distributed.run \
    --nnodes "${NODES:-1}" --node_rank "${NODE:-0}" --nproc_per_node "$gpus" \
    --rdzv_backend c10d --rdzv_endpoint "${HEAD:-localhost}:${PORT:-29400}" --max_restarts 0 \
    -m mmllm.cli fit -c "$config" \
    --trainer.devices "$gpus" --trainer.num_nodes "${NODES:-1}" "$@"
