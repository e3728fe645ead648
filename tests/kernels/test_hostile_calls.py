"""No operator reads what it was not handed: a hostile call gets an error by name, or its answer.

The calls are made from each operator's own schema: every argument of a right call is exchanged for
everything that it should not be. `make sanitize` runs this file under AddressSanitizer.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from actsparse.kernels import backends, ops
from actsparse.kernels import pack as packing

REFUSALS = (RuntimeError, ValueError, TypeError, NotImplementedError)
# what no kernel is called with is PyTorch's to refuse: other types, meta, sparse, quantised
TORCHS = "schema|Could not run|Expected a value|one device|[Mm]eta [Tt]ensors|unknown activation"
N, D, H = 5, 7, 384  # H is one block: with one unit more, pointer has another length


class Subclass(Tensor):
    """A tensor class with nothing of its own."""


def keeps() -> Tensor:
    keep = torch.rand(N, H) < 0.3
    keep[:, [0, -1]] = True  # one unit less is one too few
    return keep


def calls(dtype: torch.dtype = torch.float32) -> dict[str, tuple[Any, ...]]:
    """A right call of every operator."""

    def drawn(*sizes: int) -> Tensor:
        return torch.randn(*sizes).to(dtype)

    x, up, bias, rows, down_bias = (drawn(*s) for s in [(N, D), (H, D), (H,), (H, D), (D,)])
    pointer, index = packing.pack(keeps())
    value, two, one, grad = (drawn(n) for n in (len(index), N, N, N))
    a, slope = drawn(2, N, H)
    down = rows.t().contiguous()
    called = {
        "actsparse::pack": (x, up, bias, [], "jsrelu"),
        "actsparse::pack_values": (x, up, bias, a, slope),
        "actsparse::sample": (pointer, index, x, up, bias),
        "actsparse::project": (pointer, index, value, down, rows, down_bias, N),
        "actsparse::multiply": (pointer, index, value, rows, down_bias, N, True),
        "actsparse::by_unit": (pointer, index, value, N, H),
        "actsparse::row_sums": (pointer, value, N),
        "actsparse::row_norms": (pointer, value, N),
        "actsparse::row_norms_backward": (pointer, value, two.abs(), one, grad),
    }
    if not backends.loaded():
        return called
    codes, panels = ops.quantise(up), ops.panels(rows)
    z, second = x @ up.t(), drawn(H, D)
    same = ("by_unit", "row_sums", "row_norms", "row_norms_backward", "sample")
    return called | {
        "actsparse::quantise": (up,),
        "actsparse::panels": (rows,),
        "actsparse::project (panels)": (pointer, index, value, down, panels, down_bias, N),
        "actsparse::pack (screened)": (x, up, bias, codes, "jsrelu"),
        **{f"actsparse_cpu::{name}": called[f"actsparse::{name}"] for name in same},
        "actsparse_cpu::multiply": (pointer, index, value, rows, down_bias, N, D, True),
        "actsparse_cpu::multiply (panels)": (pointer, index, value, panels, down_bias, N, D, False),
        "actsparse_cpu::pack": (z, 1, 0.1),
        "actsparse_cpu::cut": (z, drawn(H).float()),
        "actsparse_cpu::linear": (x, up, bias),
        "actsparse_cpu::panels": (rows,),
        "actsparse_cpu::quantise": (up,),
        "actsparse_cpu::fingerprint": (up, rows, second),
        "actsparse_cpu::screen": (x, up, bias, *codes, 1, 0.1),
        "actsparse_cpu::candidates": (x, up, bias, *codes, 0.1),
        "actsparse_cpu::forward": (z, None, x, second, bias, rows, down_bias, D, 2, 0.1),
        "actsparse_cpu::forward (threshold)": (
            z,
            drawn(H).float(),
            x,
            second,
            bias,
            rows,
            down_bias,
            D,
            0,
            0.0,
        ),
        "actsparse_cpu::forward_screened": (
            x,
            up,
            bias,
            *codes,
            second,
            bias,
            panels,
            down_bias,
            D,
            0,
            0.1,
        ),
        "actsparse_cpu::level": (-1,),
    }


# what no other argument says: another number there is another right call
FREE_ROWS = {
    ("cut", "v"),
    ("linear", "x"),
    ("pack", "x"),
    ("screen", "x"),
    ("candidates", "x"),
    ("forward_screened", "x"),
}
FREE_SIZES = {("panels", "matrix"), ("quantise", "up"), ("pack", "z")} | {
    ("fingerprint", name) for name in ("weight", "second", "third")
}
FREE_DTYPES = {"cut", "by_unit", "row_sums", "row_norms"}  # of PyTorch's own operators
COMPILED = (torch.float32, torch.bfloat16)


def misaligned(t: Tensor) -> Tensor:
    memory = bytearray(b"?" + t.contiguous().view(torch.uint8).numpy().tobytes())
    return torch.frombuffer(memory, dtype=t.dtype, offset=1).view(t.shape)


def spread(t: Tensor) -> Tensor:
    wide = t.new_zeros(*t.shape[:-1], 2 * t.shape[-1])
    wide[..., ::2] = t
    return wide[..., ::2]


def shifted(t: Tensor) -> Tensor:
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


def inference(t: Tensor) -> Tensor:
    with torch.inference_mode():
        return t.clone()


def layouts(t: Tensor) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """Other ways in which a tensor may lie in memory, or be one."""
    yield "spread", spread
    yield "shifted by one entry", shifted
    yield "misaligned", misaligned
    yield "inference", inference
    yield "subclass", lambda t: t.as_subclass(Subclass)
    yield "expanded", lambda t: t[:1].expand(t.shape)
    yield "overlapping", lambda t: t.flatten().as_strided(t.shape, (1,) * t.dim())
    yield "zeros without memory", lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype)
    if t.dim() == 2:
        yield "by columns", lambda t: t.t().contiguous().t()
    if t.dtype is not torch.int8:
        yield "negated view", lambda t: torch._neg_view(-t)
    if t.is_floating_point():
        yield "learns", lambda t: t.clone().requires_grad_()
        yield "parameter", lambda t: torch.nn.Parameter(t.clone())


def cut(t: Tensor, kept: int) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(kept)
    return t


def wrong(op: str, name: str, t: Tensor) -> Iterator[tuple[str, Any]]:
    """What is not right in place of t, whatever the other arguments."""
    public = op.startswith("actsparse::")
    bare = op.split("::")[1].split(" ")[0]
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.half, torch.bool, torch.int64,
                  torch.int32, torch.uint8, torch.int8, torch.complex64):  # fmt: skip
        free = (public and bare in FREE_DTYPES and dtype.is_floating_point) or (
            dtype in COMPILED and (bare in FREE_DTYPES or (bare, name) in FREE_SIZES)
        )
        wider = name == "index" and dtype is torch.int32
        if dtype is not t.dtype and not wider and not (free and t.is_floating_point()):
            yield str(dtype), t.to(dtype)
    yield "a scalar", t.flatten()[0].clone()
    any_rank = ("cut", "linear", "forward", "forward_screened", "candidates", "screen")
    if bare not in any_rank or name not in "xzv":
        yield "one dimension more", t[None].clone()
    if t.dim() == 2:
        yield "flat", t.flatten()
    for place, size in enumerate(t.shape):
        free = (bare, name) in FREE_SIZES or (place == 0 and (bare, name) in FREE_ROWS)
        if not free:
            longer = torch.cat([t, t.narrow(place, 0, 1)], place)
            yield f"one more in dimension {place}", longer
            yield f"one less in dimension {place}", t.narrow(place, 0, size - 1).contiguous()
            yield f"none in dimension {place}", t.narrow(place, 0, 0).contiguous()
    if (bare, name) not in FREE_SIZES or not public:  # alone, it gets a meta answer
        yield "meta", t.to("meta")
    yield "None", None
    yield "a number", 1.0
    if (bare, name) == ("project", "down"):  # rows is read instead
        return
    yield "sparse", t.to_sparse()
    if t.dtype is torch.float32:
        yield "quantised", torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)
    for kept in (0, t.element_size(), t.numel() * t.element_size() - 1):
        yield f"cut to {kept} bytes", cut(t, kept)
    if name == "pointer":
        nnz, half = int(t[-1]), len(t) // 2
        for place, values in [
            (0, (1, -1, 2**62)),
            (-1, (nnz + 1, nnz - 1, -1, 2**62, -(2**63))),
            (half, (-1, nnz + 1, -(2**63), 2**63 - 1)),
        ]:
            for number in values:
                yield f"pointer[{place}] = {number}", changed(t, place, number)
    if name == "index":
        for place in (0, len(t) // 2, -1):
            for number in (-1, H, H + 1, 2**31 - 1, -(2**31)):
                fits = abs(number) <= torch.iinfo(t.dtype).max
                wide = t if fits else t.int()
                yield f"index[{place}] = {number}", changed(wide, place, number)


def changed(t: Tensor, place: int, number: int) -> Tensor:
    t = t.clone()
    t[place] = number
    return t


WHOLE = (-1, 0, N + 1, N - 1, H + 1, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1, -(2**63))
WRONG: dict[str, tuple[Any, ...]] = {
    "n": WHOLE,
    "d": (-1, 0, D - 1, D + 1, 2**31 - 1, 2**31, 2**62, 2**63 - 1, -(2**63)),
    "units": (-1, 0, H - 1, H + 1, 2**31 - 1, 2**31, 2**40, 2**63 - 1, -(2**63)),
    "act": (-1, 3, 2**40, -(2**63)),
    "floor": (-1.0, float("nan"), float("-inf")),
    "wanted": (4, 7, 2**40),
    "activation": ("", "gelu", "nothing", "relu(threshold=nan)", "relu(threshold=-1)", None),
    "turned": ("yes",),
    "threshold": (1.0,),
}


def hostile(name: str, arguments: tuple[Any, ...]) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    """Argument, what is wrong with it, and the whole call."""
    for place, (argument, given) in enumerate(zip(schema(name), arguments, strict=True)):
        for kind, bad in instead(name, argument, given):
            if bad is None and argument.type.kind() == "OptionalType":
                continue
            call = (*arguments[:place], bad, *arguments[place + 1 :])
            yield argument.name, kind, call


def instead(name: str, argument: Any, given: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(given, Tensor):
        yield from wrong(name, argument.name, given)
    elif isinstance(given, list):
        yield "one", [torch.ones(2, 2)]
        yield "one too many", [*given, *given, torch.ones(1), torch.ones(1)]
        yield "None in it", [None, None, None]
        for place, code in enumerate(given):
            for kind, bad in wrong(name, "codes", code):
                yield f"codes[{place}]: {kind}", [*given[:place], bad, *given[place + 1 :]]
    else:
        for bad in WRONG[argument.name]:
            yield repr(bad), bad


def operator(name: str) -> Callable[..., Any]:
    space, bare = name.split(" ")[0].split("::")
    return getattr(getattr(torch.ops, space), bare)


def schema(name: str) -> list[Any]:
    return operator(name).default._schema.arguments


def refusal(name: str, call: tuple[Any, ...]) -> str | None:
    try:
        operator(name)(*call)
    except REFUSALS as error:
        return str(error)
    return None


def flat(result: Any) -> list[Any]:
    return [result] if isinstance(result, (Tensor, int)) else list(result)


def calls_of_this_way(way: str, dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    return {
        name: call
        for name, call in calls(dtype).items()
        if way != "reference" or name.startswith("actsparse::")
    }


@pytest.mark.skipif(not backends.loaded(), reason="no compiled kernels here")
def test_every_operator_is_called() -> None:
    registered = {
        name.split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith(("actsparse::", "actsparse_cpu::"))
    }
    missing = registered - {name.split(" ")[0] for name in calls()}
    # a GPU's; and a whole block's, which calls the others
    assert missing <= {"actsparse::decode", "actsparse::block"}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("dtype", COMPILED)
def test_what_does_not_fit_is_refused_by_name(way: str, dtype: torch.dtype) -> None:
    count = 0
    for name, arguments in calls_of_this_way(way, dtype).items():
        known = "|".join(argument.name for argument in schema(name))
        operator(name)(*arguments)
        for argument, kind, call in hostile(name, arguments):
            if (argument, kind) == ("threshold", "torch.bfloat16"):
                continue  # of models in bfloat16, whatever the operands are
            said = refusal(name, call)
            assert said is not None, f"{name} took {argument}: {kind}"
            named = rf"\b({known}|shift|bounds) .*must |no kernels of level|{TORCHS}"
            assert re.search(named, said), f"{name}({argument}: {kind}): {said}"
            count += 1
    assert count > 500


@pytest.mark.parametrize("dtype", COMPILED)
def test_any_layout_gives_the_numbers_of_a_plain_copy_or_is_refused(
    way: str, dtype: torch.dtype
) -> None:
    taken, near = 0, 1e-5 if dtype is torch.float32 else 0.02
    for name, arguments in calls_of_this_way(way, dtype).items():
        for place, given in enumerate(arguments):
            if not isinstance(given, Tensor):
                continue
            for kind, lay in layouts(given):
                odd = lay(given)
                plain = odd.detach().resolve_neg().clone(memory_format=torch.contiguous_format)
                plain = plain.as_subclass(Tensor)
                before, after = arguments[:place], arguments[place + 1 :]
                try:
                    results = flat(operator(name)(*before, odd, *after))
                except REFUSALS:
                    continue
                taken += 1
                wanted = flat(operator(name)(*before, plain, *after))
                for result, want in zip(results, wanted, strict=True):
                    if isinstance(result, Tensor):
                        result = result.detach().as_subclass(Tensor)
                        assert torch.allclose(result, want, near, near), f"{name}: {kind}"
                    else:
                        assert result == want, f"{name}: {kind}"
    assert taken > 50


@pytest.mark.skipif(not backends.loaded(), reason="no compiled kernels here")
def test_codes_of_any_value_are_read_within_their_bounds(way: str) -> None:
    """They are numbers, which cannot be checked: the answer is some mask."""
    if way == "reference":
        pytest.skip("nothing is screened")
    for d in (7, 1 << 16):
        x, up = torch.full((N, d), 3.0), torch.randn(70, d)
        codes, shift, bounds = ops.quantise(up)
        for code, most in itertools.product((-128, 127), (-(2**31), 2**31 - 1)):
            made = (torch.full_like(codes, code), torch.full_like(shift, most))
            for bound in (0.0, torch.nan, torch.inf, -3e38):
                last = torch.full_like(bounds, bound)
                pointer, index = torch.ops.actsparse_cpu.candidates(x, up, None, *made, last, 0.0)
                assert pointer[-1] == len(index)
                assert packing.unpack(pointer, index, torch.ones(len(index)), N, 70).max() <= 1


def test_one_meta_tensor_among_others_gets_no_answer() -> None:
    """torch then calls the fake, whose empty result would be taken for numbers."""
    pointer, index = packing.pack(keeps())
    value, rows = torch.randn(len(index)), torch.randn(H, D)
    with pytest.raises(RuntimeError, match="on one device"):
        ops.multiply(pointer.to("meta"), index, value, rows, None, N)
    y = ops.multiply(*(t.to("meta") for t in (pointer, index, value, rows)), None, N)
    assert y.is_meta
    assert y.shape == (N, D)


@pytest.mark.skipif(not backends.loaded(), reason="no compiled kernels here")
def test_a_thread_may_choose_the_instruction_set_while_others_compute() -> None:
    best = torch.ops.actsparse_cpu.level(-1)
    pointer, index = packing.pack(keeps())
    value, rows = torch.randn(len(index)), torch.randn(H, D)
    want = packing.unpack(pointer, index, value, N, H) @ rows

    def compute(_: int) -> Tensor:
        return ops.multiply(pointer, index, value, rows, None, N)

    def choose(turn: int) -> None:
        level = turn % (best + 1)
        assert torch.ops.actsparse_cpu.level(level) in range(best + 1)

    try:
        with ThreadPoolExecutor(3) as threads:
            chosen = threads.map(choose, range(1000))
            for y in threads.map(compute, range(1000)):
                torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)
            assert len(list(chosen)) == 1000
    finally:
        torch.ops.actsparse_cpu.level(best)


LIE = """
import ctypes, numpy, torch
from actsparse.kernels import build
assert build.load()
malloc = ctypes.CDLL(None).malloc
malloc.restype = ctypes.c_void_p
entries = (ctypes.c_float * 64).from_address(malloc(16))
t = torch.from_numpy(numpy.ctypeslib.as_array(entries)).view(8, 8)
torch.ops.actsparse_cpu.panels(t)
"""


@pytest.mark.skipif(os.environ.get("ACTSPARSE_SANITIZE") != "1", reason="for make sanitize")
def test_the_sanitizer_sees_a_tensor_that_lies_about_its_memory() -> None:
    """Else a run of this file under it would prove nothing."""
    result = subprocess.run([sys.executable, "-c", LIE], capture_output=True, text=True)
    assert result.returncode != 0
    assert "AddressSanitizer: heap-" in result.stderr
