"""A model that is built without memory, and whose weights, shard by shard, are then those of one process to the bit.

Under `DeferredInit` modules are built on the meta device, and what their constructors do in place to each tensor
(`normal_`, `uniform_`, `ones_`, …) is written down, with the state of the random generator before it. The numbers are
drawn and thrown away, so that the generator goes on as if the model had been built. `materialize` does the same again,
one tensor at a time, and keeps this rank's shard. (torchdistx's deferred initialization, in small.)

The alternative is a generator for each parameter, seeded by its name. It would draw each number once, not twice or
three times, but would change the weights of every seed, and what open_clip's and timm's constructors draw couldn't
follow it. The price: about 10 s a billion weights on each rank, once.

What looks at numbers in order to draw others can't be written down: `torch.nn.init.trunc_normal_` does nothing on the
meta device. The decoder doesn't use it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_FACTORIES = {_aten.rand.default, _aten.randn.default, _aten.randint.low, _aten.randint.default, _aten.randperm.default}
_OVERWRITES = {_aten.normal_.default, _aten.uniform_.default, _aten.fill_.Scalar, _aten.zero_.default}
_DRAWS = {_aten.normal_.default, _aten.uniform_.default, _aten.bernoulli_.float}


@dataclass(frozen=True)
class _Call:
    """One operator on a tensor, in place."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    generator_state: Tensor | None


@dataclass
class _History:
    """What was done to a tensor since it was last overwritten."""

    storage: torch.UntypedStorage  # kept, so that no other tensor gets its address
    shape: torch.Size
    calls: list[_Call] = field(default_factory=list)
    is_known: bool = True
    """False: a part of it was written by itself, which nothing here can do again."""

    def replay(self, dtype: torch.dtype) -> Tensor:
        """The whole tensor, on the CPU."""
        value = torch.empty(self.shape, dtype=dtype)
        before = torch.get_rng_state()
        try:
            for call in self.calls:
                if call.generator_state is not None:
                    torch.set_rng_state(call.generator_state)
                call.function(value, *call.args, **call.kwargs)
        finally:
            torch.set_rng_state(before)
        return value


class DeferredInit(TorchDispatchMode):
    """Builds modules on the meta device and remembers how their weights begin.

    with DeferredInit() as deferred:
        model.decoder = Decoder(config)
    initializers = deferred.initializers(model.decoder)
    …  # shard it
    materialize(model.decoder, initializers, device)
    """

    def __init__(self) -> None:
        super().__init__()
        self._histories: dict[int, _History] = {}
        self._device = torch.device("meta")

    def __enter__(self) -> DeferredInit:
        """Makes the meta device the default."""
        self._device.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Ends both."""
        super().__exit__(*error)
        self._device.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Runs the operator, and writes it down if it changes a tensor that has no memory."""
        kwargs = kwargs or {}
        target = args[0] if args and isinstance(args[0], Tensor) else None
        if func in _FACTORIES and str(kwargs.get("device")) == "meta":
            raise NotImplementedError(f"{func} makes a random tensor; make it empty and fill it in place")
        if target is None or not target.is_meta or not _writes(func):
            return func(*args, **kwargs)
        history = self._history(target)
        state = torch.get_rng_state() if func in _DRAWS else None
        if func in _OVERWRITES:
            history.calls.clear()
        history.calls.append(_Call(func, args[1:], kwargs, state))
        if state is not None:
            func(torch.empty(target.shape, dtype=target.dtype, device="cpu"), *args[1:], **kwargs)
        return func(*args, **kwargs)

    def _history(self, target: Tensor) -> _History:
        storage = target.untyped_storage()
        history = self._histories.setdefault(storage._cdata, _History(storage, target.shape))
        if history.shape != target.shape or target.numel() * target.itemsize != storage.nbytes():
            history.is_known = False
        return history

    def initializers(self, module: nn.Module) -> dict[str, _History]:
        """How each parameter of a module begins, by its name; before it is sharded.

        Raises:
            NotImplementedError: nothing in place made it what it is.
        """
        histories = {name: self._history(parameter) for name, parameter in module.named_parameters()}
        for name, history in histories.items():
            if not history.calls or not history.is_known:
                raise NotImplementedError(f"{name} isn't initialized by operators that fill the whole of it in place")
        return histories


def _writes(func: Any) -> bool:
    schema = func._schema
    alias = schema.arguments[0].alias_info if schema.arguments else None
    return alias is not None and alias.is_write


@torch.no_grad()
def materialize(module: nn.Module, initializers: Mapping[str, _History], device: torch.device) -> None:
    """Gives a module that lies on the meta device, sharded or not, its memory and its weights.

    Args:
        module: whose parameters may have become DTensors since. Its modules with buffers fill them in
            `reset_buffers()`.
        initializers: of `DeferredInit.initializers`.
        device: where it is to lie.
    """
    module.to_empty(device=device)
    for name, parameter in module.named_parameters():
        fill(parameter, initializers[name].replay(parameter.dtype))
    for path, part in module.named_modules():
        if any(buffer is not None for buffer in part._buffers.values()):
            reset: Callable[[], None] | None = getattr(part, "reset_buffers", None)
            if reset is None:
                raise NotImplementedError(f"{path} has buffers but no reset_buffers() that fills them")
            reset()


@torch.no_grad()
def fill(parameter: Tensor, whole: Tensor) -> None:
    """Copies a whole tensor, or this rank's shard of it, to a parameter."""
    if isinstance(parameter, DTensor):
        whole = whole.to(parameter.device, parameter.dtype)
        part = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.to_local().copy_(part.to_local())
    else:
        parameter.copy_(whole)
