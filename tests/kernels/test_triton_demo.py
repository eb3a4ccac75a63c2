"""The kernels of DeMo's chunks compiled for Hopper; tests/comm/test_chunks.py compares their numbers."""

import pytest

pytest.importorskip("triton")

CHUNKS = {"HEIGHT": 32, "WIDTH": 32, "HIGH": 32, "WIDE": 32, "KEPT": 20}
LARGE = {"HEIGHT": 64, "WIDTH": 64, "HIGH": 64, "WIDE": 64, "KEPT": 32}
ODD = {"HEIGHT": 26, "WIDTH": 20, "HIGH": 32, "WIDE": 32, "KEPT": 10}
ROWS = {"HEIGHT": 1, "WIDTH": 4096, "HIGH": 1, "WIDE": 4096, "KEPT": 82, "rows": 1}
NUMBERS = {"fp32": "*fp32", "int8": "*i8", "sign": "*u8"}
POINTERS = {
    "x_ptr": "*fp32", "out_ptr": "*fp32", "down_ptr": "*fp32", "across_ptr": "*fp32", "indices_ptr": "*i32",
    "values_ptr": "*fp32", "sums_ptr": "*fp32", "scale_ptr": "*i16", "packed_ptr": "*u8", "alpha": "fp32",
    "decay": "fp32", "gain": "fp32",
}  # fmt: skip
COUNTS = ("rows", "cols", "down", "across", "first", "stride", "count", "replicas", "size")
ALIGNED = ("rows", "cols")


def cases() -> dict[str, tuple]:
    """By name: kernel, own types, constants, warps."""
    from stepline.kernels import triton_bits as bits
    from stepline.kernels import triton_demo as demo

    found = {}
    for name, shape, codec in (("chunks", CHUNKS, "sign"), ("large", LARGE, "int8"), ("rows", ROWS, "fp32")):
        warps = shape["HIGH"] * shape["WIDE"] // demo.VALUES_PER_WARP
        constants = shape | {"CODEC": codec, "TRANSFORMED": shape is not ROWS}
        found[f"encode {name}"] = (demo._encode_kernel, {"numbers_ptr": NUMBERS[codec]}, constants, warps)
    for name, shape, published in (("chunks", CHUNKS, False), ("odd", ODD, True), ("rows", ROWS, False)):
        warps = shape["HIGH"] * shape["WIDE"] // demo.VALUES_PER_WARP
        constants = shape | {"KEPT_2": 128, "TRANSFORMED": shape is not ROWS, "PUBLISHED": published}
        constants |= {"SIGN": published, "STORE": False}
        found[f"decode {name}"] = (demo._decode_kernel, {}, constants, warps)
    size = {"BITS": 10, "SIZE": bits.BLOCK}
    found["pack"] = (bits._pack_kernel, {"numbers_ptr": "*i32"}, size, 4)
    found["unpack"] = (bits._unpack_kernel, {"numbers_ptr": "*i32"}, size, 4)
    return found


def test_every_kernel_compiles_for_hopper_without_a_gpu(hopper):
    for case, (kernel, types, constants, warps) in cases().items():
        known = POINTERS | dict.fromkeys(COUNTS, "i32") | types
        pointers = {name for name, kind in known.items() if kind.startswith("*") and name != "packed_ptr"}
        ptx = hopper(kernel, known, constants, {*ALIGNED, *pointers} - {*constants}, {"num_warps": warps})
        assert "tf32" not in ptx, case  # products are of fp32
        if "chunks" in case or "rows" in case:
            assert "ld.global.v4.b32" in ptx, case  # 16 bytes a thread
        if "decode" in case:
            assert "bar.sync" in ptx or "bar.warp.sync" in ptx, case  # between sums of two replicas
