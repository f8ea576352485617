"""What a GPU would be asked to run compiles ahead of time for Hopper, fits, and spills nothing. Needs no GPU.

The launches are those of `launch` itself, called with tensors of PyTorch's meta device and recorded in place of
being run: shapes, flags and dtypes are not written down a second time here.

T tokens, D width, N inner width, E experts, S shared experts, K experts a token.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)
triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.errors import OutOfResources, PTXASError  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from mmllm_kernels.gpu import launch, tuning  # noqa: E402
from mmllm_kernels.gpu.tuning import Blocks, Key  # noqa: E402
from mmllm_kernels.sorted_tokens import Weights  # noqa: E402

SHARED_BYTES = 232448
"""What a block of threads may have on Hopper."""
_TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A layer, and what it is asked for; OLMoE's sizes unless said otherwise."""

    T: int = 32768
    D: int = 2048
    N: int = 1024
    E: int = 64
    K: int = 8
    S: int = 1
    norm_topk_prob: bool = False
    recompute: bool = False
    dtype: torch.dtype = torch.bfloat16
    precision: str = "ieee"
    all_guesses: bool = False


@dataclass(frozen=True)
class Launch:
    """A kernel with everything that decides its machine code."""

    kernel: Any
    types: tuple[tuple[str, str], ...]
    """Of its arguments, `constexpr` among them."""
    constants: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        told = {**dict(self.constants), **dict(self.options)}
        dtype = next((each for _, each in self.types if each in ("*bf16", "*fp16")), "*fp32").lstrip("*")
        return "-".join([self.kernel.__name__.removesuffix("_kernel"), dtype, *(f"{k}{v}" for k, v in told.items())])


def record(run: Run) -> list[Launch]:
    """The launches of a training step, of inference, and of the nearest code."""
    found: dict[Launch, None] = {}

    def note(self: Any, *args: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        bound = {**dict(zip(self.arg_names, args, strict=False)), **keywords}
        types, constants = {}, {}
        for parameter in self.params:
            value = bound.pop(parameter.name)
            if parameter.is_constexpr:
                types[parameter.name], constants[parameter.name] = "constexpr", value
            else:
                types[parameter.name] = f"*{_TYPES[value.dtype]}" if isinstance(value, torch.Tensor) else "i32"
        found[Launch(self, tuple(types.items()), tuple(constants.items()), tuple(bound.items()))] = None

    def blocks(key: Key, launch_one: Callable[[Blocks], None], device: torch.device) -> Blocks:
        guesses = tuning.guesses(key)
        for guess in guesses if run.all_guesses else guesses[:1]:
            launch_one(guess)
        return guesses[0]

    def empty(*shape: int, dtype: torch.dtype = run.dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    x, logits = empty(run.T, run.D), empty(run.T, run.E, dtype=torch.float32)
    w = Weights(*(empty(groups, *s) for groups in (run.E, run.S) for s in ((2 * run.N, run.D), (run.D, run.N))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", note)
        patch.setattr(tuning, "blocks", blocks)
        patch.setattr(launch, "_precision", lambda x: run.precision)
        gates, experts = launch.route(logits, run.K, run.norm_topk_prob)
        launch.route_backward(gates, gates, experts, logits, run.norm_topk_prob)
        sorting = launch.sort(experts, run.E, run.S)
        out, h = launch.forward(x, gates, w, sorting, save_h=not run.recompute)
        launch.backward(out, x, gates, h, w, sorting, weight_grads=True)
        launch.nearest_code(x[:, :128], empty(1024, 128))
    return list(found)


TRAINING = record(Run())
"""Every kernel as a training step of many tokens launches it when nothing is timed."""
MORE = [
    # Tiles of 16, 32, 64 and 128 rows.
    *(Run(T=T, S=S, all_guesses=True) for T in (1, 64, 200, 400, 32768) for S in (0, 1)),
    *(Run(T=T, S=0, norm_topk_prob=True, recompute=True) for T in (1, 8, 32768)),
    *(Run(T=T, E=128, N=768, S=0, norm_topk_prob=True) for T in (1, 32768)),  # Qwen3
    *(Run(T=T, D=4096, N=14336, E=8, K=2, S=0, norm_topk_prob=True) for T in (1, 64, 16384)),  # Mixtral
    Run(T=1024, D=200, N=136, E=8, K=2),  # divisible by no block
    *(Run(T=T, dtype=torch.float16) for T in (1, 32768)),
    *(Run(T=T, dtype=torch.float32, precision=p, all_guesses=True) for T in (1, 32768) for p in ("ieee", "tf32")),
]
OTHERS = list(dict.fromkeys(each for run in MORE for each in record(run) if each not in TRAINING))


def compile_for_hopper(asked: Launch) -> tuple[Any, str]:
    """The compiled kernel, and what Triton's own ptxas said about it, called with the options that a GPU run uses."""
    attributes = {(i,): [["tt.divisibility", 16]] for i, (_, each) in enumerate(asked.types) if each.startswith("*")}
    source = ASTSource(asked.kernel, dict(asked.types), dict(asked.constants), attributes)
    said = io.StringIO()
    with triton.knobs.compilation.scope(), triton.knobs.nvidia.scope(), contextlib.redirect_stdout(said):
        triton.knobs.compilation.always_compile = True  # ptxas says nothing about what lies in the cache
        triton.knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(asked.options))
    return compiled, said.getvalue()


def assert_compiles_well(asked: Launch) -> None:
    """No spills, shared memory that fits, int64 addresses; tensor cores and asynchronous copies in 16 bits."""
    compiled, log = compile_for_hopper(asked)
    spills = [int(number) for number in re.findall(r"(\d+) bytes spill (?:stores|loads)", log)]
    assert spills and not any(spills), log
    assert compiled.metadata.shared <= SHARED_BYTES
    assert_addresses_are_int64(compiled.asm["ttir"])
    constants = dict(asked.constants)
    if constants.get("DOT", triton.language.float32) == triton.language.float32:
        return
    ptx = compiled.asm["ptx"]
    assert re.search(r"cp\.async\.cg\.shared\.global .*0x10", ptx), "loads are not asynchronous"
    if constants.get("BLOCK_M", constants.get("BLOCK_T")) >= 64:
        assert "wgmma.mma_async" in ptx, "the product misses Hopper's tensor cores"


@pytest.mark.parametrize("asked", TRAINING, ids=str)
def test_kernel_of_a_training_step_compiles_without_spills(asked):
    assert_compiles_well(asked)


@pytest.mark.proof
@pytest.mark.parametrize("asked", OTHERS, ids=str)
def test_every_other_launch_compiles_without_spills(asked):
    assert_compiles_well(asked)


def test_the_number_of_tokens_compiles_nothing_again():
    for asked in [*TRAINING, *OTHERS]:
        numbers = [name for name, each in asked.types if each == "i32"]
        specialised = [p.name for p in asked.kernel.params if p.name in numbers and not p.do_not_specialize]
        assert not specialised, (asked.kernel.__name__, specialised)


@pytest.fixture
def timing(monkeypatch):
    """Lets `tuning.blocks` time without a GPU: every launch takes as long as the function that is handed in says."""
    clock = [0.0]

    class Event:
        def __init__(self, enable_timing: bool):
            self.at = 0.0

        def record(self) -> None:
            self.at = clock[0]

        def synchronize(self) -> None: ...

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    monkeypatch.setattr(tuning, "CACHE_BYTES", 0)
    monkeypatch.setattr(tuning, "_may_time", lambda: True)
    monkeypatch.setattr(tuning, "_device_name", lambda device: "a device")
    monkeypatch.setattr(tuning, "_tuned", {})
    return clock


KEY = Key("down", "bfloat16", 64, 64, 128)


def test_timing_passes_over_what_cannot_be_compiled_or_launched(timing):
    first, second, *_, last = tuning.guesses(KEY)

    def launch_one(blocks: Blocks) -> None:
        if blocks == first:
            raise PTXASError("Internal Triton PTX codegen error")
        if blocks == second:
            raise OutOfResources(300000, SHARED_BYTES, "shared memory")
        timing[0] += 1.0 if blocks == last else 2.0

    assert tuning.blocks(KEY, launch_one, torch.device("meta")) == last
    assert tuning.tuned().keys() == {f"a device {KEY}"}


def test_an_error_names_the_key_of_which_no_shape_can_be_launched(timing):
    def launch_one(blocks: Blocks) -> None:
        raise PTXASError("Internal Triton PTX codegen error")

    with pytest.raises(RuntimeError, match="none of the 5 block shapes for a device down bfloat16 64x64 128"):
        tuning.blocks(KEY, launch_one, torch.device("meta"))


def test_measured_shapes_are_not_timed_again(timing, monkeypatch):
    monkeypatch.setattr(tuning, "_table", lambda table={"measured": {}, "guesses": {}}: table)
    tuning.add_measured({f"a device {KEY}": [0, 128, 64, 8, 8, 3]})
    assert tuning.blocks(KEY, pytest.fail, torch.device("meta")) == Blocks(0, 128, 64, 8, 8, 3)


def assert_addresses_are_int64(ttir: str) -> None:
    """Every offset added to a pointer is int64, and none was multiplied by a width while it was int32.

    In int32 there are counts of rows and blocks, all below 2³¹ (api.moe refuses more pairs); a row or an
    expert is widened before it meets a width.
    """
    constants = dict(re.findall(r"(%\w+) = arith\.constant (?:dense<)?(-?\d+)>? : ", ttir))
    pointers = re.findall(r"tt\.addptr .*, (?:tensor<[\dx]*)?(i\d+)>?(?: loc.*)?$", ttir, flags=re.MULTILINE)
    assert pointers and set(pointers) == {"i64"}, f"offsets: {sorted(set(pointers))}"
    products_i32 = re.findall(r"arith\.muli (%\w+), (%\w+) : (?:tensor<[\dx]*)?i32>?", ttir)
    factors = [constants.get(left, constants.get(right)) for left, right in products_i32]
    # The only int32 products are of a program or tile number with a block size, or of T with a slot.
    assert all(factor is not None and abs(int(factor)) <= 1024 for factor in factors), factors
