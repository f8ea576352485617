"""One training step a request, inside Lightning's loop, and what is looked at while it runs."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any, Protocol

import lightning.pytorch as pl
import torch
from allocations import AllocationPeak
from attention_work import AttentionWork, sum_of_squares
from host_syncs import HostSyncs
from torch import Tensor
from train_names import attention_backends, blocks_of, embedding_of, load_weights, take_blocks_out
from train_requests import answer, receive, synchronize


class Observation(Protocol):
    """Looks at a step while it is entered, and says what it saw."""

    def __enter__(self) -> Any: ...
    def __exit__(self, kind: Any, error: Any, trace: Any, /) -> None: ...
    def values(self) -> dict[str, Any]:
        """JSON-serialisable."""
        ...


class Rounds(pl.Callback):
    """A step begins when a request comes, and is answered when Lightning would begin the next one.

    Requests: `{"do": "step"}`, or the name of an observation. Every answer has the step's seconds, loss and number of
    real tokens; the seconds hold the callbacks of the step's end and the fetching of the next batch.

    Args:
        device: "cpu" or "cuda".
        weights: folder of a Mixtral checkpoint to begin with; None: the module's own weights.
        without_layers: leave out the decoder's layers and freeze its embedding: head and loss are what is left.
    """

    def __init__(self, device: str, weights: str | None = None, without_layers: bool = False) -> None:
        self.device, self.weights, self.without_layers = device, weights, without_layers
        self.do = ""
        self.values: dict[str, Any] = {}
        self.began = 0.0
        self.observation: Observation | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Changes the model, which Lightning has built by now."""
        decoder = pl_module.model.decoder
        if self.weights is not None:
            load_weights(decoder, self.weights)
        if self.without_layers:
            take_blocks_out(decoder)
            embedding_of(decoder).weight.requires_grad_(False)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Answers the last request, and waits for the next."""
        synchronize()
        if self.do:
            answer({"seconds": time.perf_counter() - self.began, **self.values})
        self.do = receive()["do"]
        self.values = {"num_tokens": int((batch.document_ids_BT >= 0).sum())}
        self.observation = self._observation(pl_module.model.decoder, batch)
        if self.observation is not None:
            self.observation.__enter__()
        self.began = time.perf_counter()

    def _observation(self, decoder: Any, batch: Any) -> Observation | None:
        observations: dict[str, Callable[[], Observation]] = {
            "host syncs": CallsThatAsk if self.device == "cpu" else CallsThatWait,
            "attention work": lambda: Scores(len(blocks_of(decoder)), batch.document_ids_BT),
            "graph breaks": lambda: BlockCalls(blocks_of(decoder)),
            "memory": lambda: HeadMemory(decoder, self.device),
        }
        return None if self.do == "step" else observations[self.do]()

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """Of memory, the step ends here: what the optimizer holds is another matter."""
        if self.do == "memory":
            self._end_observation()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keeps what was seen and the loss."""
        self._end_observation()
        self.values["loss"] = float(outputs["loss"])

    def _end_observation(self) -> None:
        if self.observation is not None:
            self.observation.__exit__(None, None, None)
            self.values |= self.observation.values()
        self.observation = None


class CallsThatAsk(HostSyncs):
    """Calls on a CPU for which the host would wait for a GPU."""

    def values(self) -> dict[str, Any]:
        """`apart`: what is not counted."""
        apart = ", ".join(f"{count} x {what} in {place}" for (what, place), count in self.asked_apart.items())
        return {"count": self.count, "where": str(self), "apart": apart}


class CallsThatWait:
    """Calls for which the host does wait for the GPU, by PyTorch's own warnings."""

    def __enter__(self) -> None:
        self._catching = warnings.catch_warnings(record=True)
        self._caught: Any = self._catching.__enter__()
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")

    def __exit__(self, *error: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")
        self._catching.__exit__(*error)

    def values(self) -> dict[str, Any]:
        """As of `CallsThatAsk`."""
        found = [each for each in self._caught if "synchroniz" in str(each.message)]
        where = "\n".join(f"1 x in {each.filename}:{each.lineno}" for each in found)
        return {"count": len(found), "where": where, "apart": ""}


class Scores(AttentionWork):
    """Score elements of all layers, and what the documents of the batch need."""

    def __init__(self, num_layers: int, document_ids_BT: Tensor) -> None:
        super().__init__(num_layers)
        self._ideal = sum_of_squares(document_ids_BT) * num_layers

    def values(self) -> dict[str, Any]:
        """Score elements, and the names of backends that can be asked for."""
        return {"computed": self.computed, "ideal": self._ideal, "backends": attention_backends()}


class BlockCalls:
    """Keeps what each block is called with, and lets `torch.compile` explain the block for it."""

    def __init__(self, blocks: Any) -> None:
        self._blocks = blocks
        self._calls: list[tuple[Any, Any, Any]] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> None:
        self._hooks = [block.register_forward_pre_hook(self._keep, with_kwargs=True) for block in self._blocks]

    def _keep(self, block: Any, args: Any, kwargs: Any) -> None:
        self._calls.append((block, [_detached(arg) for arg in args], {k: _detached(v) for k, v in kwargs.items()}))

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()

    def values(self) -> dict[str, Any]:
        """`breaks`: of each block, how often the graph is left, and the reasons that are told."""
        breaks = []
        for block, args, kwargs in self._calls:
            torch._dynamo.reset()
            explained = torch._dynamo.explain(block)(*args, **kwargs)
            reasons = [each.reason.splitlines()[0] for each in explained.break_reasons]
            breaks.append({"count": explained.graph_break_count, "reasons": reasons})
        return {"breaks": breaks}


def _detached(value: Any) -> Any:
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


class HeadMemory(AllocationPeak):
    """From the decoder's last norm to the end of backward; of a first step, since later ones free old gradients."""

    def __init__(self, decoder: Any, device: str) -> None:
        super().__init__(device)
        self._hook = decoder.norm.register_forward_hook(lambda *_: self.start())

    def __exit__(self, *error: Any) -> None:
        self._hook.remove()
        super().__exit__(*error)

    def values(self) -> dict[str, Any]:
        """Bytes."""
        return {"bytes": self.peak}
