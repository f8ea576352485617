"""Every Triton kernel compiles ahead of time for Hopper, and computes every address in int64. Needs no GPU."""

from __future__ import annotations

import os
import re

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)
triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from mmllm_kernels.gpu import gradients, nearest, products, routing  # noqa: E402

_ROUTE = {"E": 64, "K": 8, "S": 1, "BLOCK_T": 64, "BLOCK_E": 128, "BLOCK_J": 16}
_PRODUCT = {"E": 64, "S": 1, "PRECISION": "ieee", "BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP": 8}
_SIZES = {"D": 2048, "N": 1024, "J": 9}
_PARTS = {"NUM_PARTS": 8, "BLOCK_T": 32, "BLOCK_E": 64, "BLOCK_PARTS": 8, "E": 64, "K": 8, "S": 1}
_GRADIENT = {"HEIGHT": 2048, "WIDTH": 1024, "J": 9, "BLOCK_G": 128}
KERNELS = {
    "choose": (routing.choose_kernel, {**_ROUTE, "RENORMALISE": False, "ONE_BLOCK": False}),
    "choose few": (routing.choose_kernel, {**_ROUTE, "RENORMALISE": True, "ONE_BLOCK": True}),
    "prefix": (routing.prefix_kernel, {"E": 64, "BLOCK": 1024}),
    "place": (routing.place_kernel, _ROUTE),
    "tiles": (routing.tiles_kernel, {"G": 65, "BLOCK_M": 128, "BLOCK_G": 128, "BLOCK": 64}),
    "router gradient": (routing.router_gradient_kernel, {**_PARTS, "RENORMALISE": False}),
    "gate up": (products.gate_up_kernel, {**_PRODUCT, **_SIZES, "STORE_H": True, "STORE_A": True}),
    "project": (products.project_kernel, {**_PRODUCT, "DEPTH": 1024, "WIDTH": 2048, "TRANSPOSED": True}),
    "weighted sum": (
        products.weighted_sum_kernel,
        {"D": 2048, "J": 9, "WEIGHTED": True, "BLOCK_T": 4, "BLOCK_D": 512},
    ),
    "activation gradient": (gradients.activation_gradient_kernel, {**_PRODUCT, **_SIZES}),
    "weight gradient": (
        gradients.weight_gradient_kernel,
        {**_PRODUCT, **_GRADIENT, "GATHER_LEFT": True, "GATHER_RIGHT": False},
    ),
    "nearest": (nearest.nearest_kernel, {"D": 128, "V": 1024, "BLOCK_T": 128, "BLOCK_V": 128, "BLOCK_K": 64}),
}
_TYPES = {
    **dict.fromkeys(("order_ptr", "inverse_ptr", "tiles_ptr", "block_counts_ptr"), "*i32"),
    **dict.fromkeys(("experts_ptr", "counts_ptr", "codes_ptr"), "*i64"),
    **dict.fromkeys(("gates_ptr", "dots_ptr", "squares_ptr"), "*fp32"),
    **dict.fromkeys(("T", "num_blocks", "num_tiles"), "i32"),
}


def _compile(name: str, dtype: str = "bf16", **more):
    kernel, constants = KERNELS[name]
    constants = {**constants, **{key: value for key, value in more.items() if key in kernel.arg_names}}
    if "DOT" in kernel.arg_names:
        constants["DOT"] = triton.language.bfloat16 if dtype == "bf16" else triton.language.float32
    signature, attributes = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        signature[argument] = "constexpr" if argument in constants else _TYPES.get(argument, f"*{dtype}")
        if signature[argument].startswith("*"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": 8 if "BLOCK_K" in constants else 4, "num_stages": 3}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


@pytest.mark.parametrize("name", KERNELS)
def test_kernel_compiles_for_hopper_with_int64_addresses(name):
    compiled = _compile(name)
    assert len(compiled.asm["cubin"]) > 0
    assert_addresses_are_int64(compiled.asm["ttir"])
    if "DOT" in KERNELS[name][0].arg_names:
        assert "wgmma.mma_async" in compiled.asm["ptx"], "the product misses Hopper's tensor cores"
        assert re.search(r"cp\.async\.cg\.shared\.global .*0x10", compiled.asm["ptx"]), "gathers are not asynchronous"
        assert re.search(r"st\.local|ld\.local", compiled.asm["ptx"]) is None


@pytest.mark.proof
@pytest.mark.parametrize("name", KERNELS)
def test_kernel_compiles_for_a_single_token(name):
    # Triton makes a constant of an integer argument that is 1.
    assert len(_compile(name, T=1, num_blocks=1, num_tiles=1, S=0).asm["cubin"]) > 0


@pytest.mark.proof
@pytest.mark.parametrize("name", [name for name in KERNELS if "DOT" in KERNELS[name][0].arg_names])
def test_float32_kernel_compiles_for_hopper(name):
    assert len(_compile(name, "fp32").asm["cubin"]) > 0


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
