"""Compile the Triton kernels for an H100 or H200, which needs no GPU; JSON lines of what came out.

    TRITON_INTERPRET=0 python tests/kernels/compiled.py [--all]

A line for each kernel, dtype and size: registers of a thread, bytes that it spills, shared memory.
``--all``: every size that the autotuner may take, in bfloat16 and float32; else the first of each.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from actsparse.kernels import triton_decode, triton_pack, triton_products

HOPPER = GPUTarget("cuda", 90, 32)
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
INTEGERS = {
    "n", "m", "h", "d", "about_n", "blocks", "out_row", "out_column", "tokens", "tiles", "splits",
    "up_unit", "up_channel",
}  # fmt: skip
FLOATS = {"floor", "rounding", "eps"}
POINTERS = {
    "pointer": "i64", "start": "i64", "index": "i32", "unit": "i32", "count": "i32", "local": "u8",
    "codes": "i8", "scale": "fp32", "norm": "fp32", "error": "fp32", "whole": "fp32",
    "partial": "fp32",
}  # fmt: skip
WIDTHS = {"d", "h", "m", "up_unit"}  # usually multiples of 16, which the compiler makes use of


def kernels() -> Iterator[tuple[Any, dict[str, Any]]]:
    """Each kernel with the constants of a call."""
    yield triton_products._multiply, {"HAS_BIAS": True, "PART": 128}
    yield triton_products._sample, {"PROGRAMS": 1}
    tile = {"TILE": triton_pack.TILE}
    many = {**tile, "MANY": 16}
    kept = {**tile, "HAS_BIAS": True, "WHOLE": True, "WIDE": False, "ROOM": triton_pack.ROOM}
    yield triton_pack._multiply_and_pack, kept
    yield triton_pack._multiply_and_pick, {**tile, "WHOLE": False, "WIDE": False, "BLOCK": 384}
    yield triton_pack._count, many
    for room in (0, triton_pack.ROOM):
        yield triton_pack._move, {**many, "ROOM": room}
    for of_many, tokens, few in ((0, 1, 4), (1, triton_decode.MOST, 16)):
        how = {"WIDE": False, "TILE": triton_decode.TILE, "BT": tokens}
        yield triton_decode._active[of_many], {**how, "HAS_BIAS": True, "ACT": 1}
        yield triton_decode._candidates[of_many], {**how, "HAS_BIAS": True}
        for gated in (False, True):
            listed = {"HAS_BIAS": True, "ACT": 1, "GATED": gated, "FEW": few}
            yield triton_decode._listed[of_many], {**how, **listed}
        yield triton_decode._gather[of_many], how
        splits = triton_decode.SPLITS[of_many]
        yield triton_decode._add, {"HAS_BIAS": True, "BT": tokens, "BS": splits, "BD": 32}


def bare(kernel: Any) -> Any:
    """The function under autotune and heuristics."""
    return kernel if isinstance(kernel, triton.JITFunction) else bare(kernel.fn)


def compiled(kernel: Any, constants: dict[str, Any], dtype: str, config: Any) -> dict[str, Any]:
    """What the compiler made of one kernel at one size."""
    kernel = bare(kernel)
    constants = constants | ({} if config is None else config.kwargs)
    names = kernel.arg_names
    types, known = {}, {}
    for place, name in enumerate(names):
        if name in constants:
            types[name] = "constexpr"
        elif name in INTEGERS:
            types[name] = "i32"
        elif name in FLOATS:
            types[name] = "fp32"
        else:
            types[name] = "*" + POINTERS.get(name, dtype)
        if types[name].startswith("*") or name in WIDTHS:
            known[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(
        kernel, types, {(names.index(name),): each for name, each in constants.items()}, known
    )
    options = {} if config is None else {
        "num_warps": config.num_warps, "num_stages": config.num_stages
    }  # fmt: skip
    made = triton.compile(source, target=HOPPER, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(made.asm["cubin"])
        cubin.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", cubin.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, spilled = (re.search(rf"{what}:(\d+)", told) for what in ("REG", "STACK"))
    assert registers is not None
    assert spilled is not None
    return {
        "kernel": kernel.__name__,
        "dtype": dtype,
        "size": {} if config is None else config.all_kwargs(),
        "registers": int(registers[1]),
        "spilled": int(spilled[1]),
        "shared": made.metadata.shared,
        "tensor_cores": "mma" in made.asm["ptx"],
    }


def main(every: bool) -> None:
    for dtype in ("bf16", "fp32") if every else ("bf16",):
        for kernel, constants in kernels():
            if dtype == "fp32" and bare(kernel).__name__.startswith("_multiply_and_"):
                continue  # float32 is cuBLAS's there
            configs = getattr(kernel, "configs", [None])
            for config in configs if every else configs[:1]:
                print(json.dumps(compiled(kernel, constants, dtype, config)), flush=True)


if __name__ == "__main__":
    main("--all" in sys.argv)
