"""The variant of a call says which kernels run, and a small call of the same variant stands for a large one."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastgpt import ops
from fastgpt.ops.compared_heads import separate
from fastgpt.ops.variants import CALLS, FACTS, UNKNOWN, Attention, Draw, Norm, calls_of, small_call, typical_calls

pytest.importorskip("triton")
from fastgpt.triton_kernels import attention, layer_norm, target

CPU = torch.device("cpu")
CHIPS = {"A100": (108, 80), "H100": (132, 90), "B200": (148, 100)}  # multiprocessors, compute capability
ALL = (True, True, True)


@pytest.fixture(params=CHIPS)
def chip(request, monkeypatch):
    monkeypatch.setattr(target, "_without_gpu", CHIPS[request.param])


@pytest.fixture
def launches(monkeypatch) -> list[tuple[str, dict]]:
    """The kernels that attention launches, with their constants; nothing runs."""
    launched: list[tuple[str, dict]] = []

    class Recorded:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple) -> object:
            return lambda *args, **constants: launched.append((self.name, constants))

    for name in [name for name in vars(attention) if name.endswith("_kernel")]:
        monkeypatch.setattr(attention, name, Recorded(name))
    monkeypatch.setattr(attention, "TensorDescriptor", lambda *args: args)
    return launched


def in_words(name: str, constants: dict) -> str:
    """What `kernels_of_call` has to say of a launch."""
    words = {"decode_kernel": "decode", "grad_q_kernel": "dQ", "grad_kv_kernel": "dK and dV", "forward_kernel": "tiles"}
    kernel = words.get(name, "one tile")
    tile = "x".join(str(constants[key]) for key in ("ROWS", "BLOCK_M", "BLOCK_N") if key in constants)
    kernel = f"persistent {kernel}" if constants.get("PERSISTENT") else kernel
    by = " by descriptors" if constants.get("DESCRIPTORS") else ""
    return f"{kernel} {tile}{by}, {constants['num_warps']} warps, {constants['num_stages']} stages"


# B, H, Hkv, Tq, Tk, D
SIZES = [
    *((1, 2, 2, T, T, 64) for T in (1, 17, 32, 33, 64, 65, 256, 257)),
    (40, 12, 12, 512, 512, 64),
    (2, 8, 2, 1, 1000, 64),
    (2, 8, 2, 5, 300, 128),
    (1, 4, 1, 300, 300, 128),
    (1, 2, 2, 100, 300, 256),
]


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_words_are_those_of_the_launch(sizes, dtype, dropout, chip, launches) -> None:
    B, H, Hkv, Tq, Tk, D = sizes
    q = torch.empty(B, Tq, H, D, dtype=dtype).transpose(1, 2)
    k = torch.empty(B, Tk, Hkv, D, dtype=dtype).transpose(1, 2)
    p, seed = (0.2, torch.tensor(1)) if dropout else (0.0, None)
    call = Attention(*FACTS["attention"](q, k, k, dropout_p=p))
    out, lse = attention.forward(q, k, k, True, 1.0, p, seed)
    forward = [in_words(name, constants) for name, constants in launches if "join" not in name]
    launches.clear()
    attention.backward(out, q, k, k, out, lse, True, 1.0, p, seed, ALL)
    backward = [in_words(name, constants) for name, constants in launches]
    said = attention.kernels_of_call(
        *sizes, dtype.itemsize, dropout, call.aligned, target.architecture(q), target.multiprocessors(q)
    )
    assert said[0].partition(", splits")[0] == forward[0] and said[1] == "; ".join(backward)
    assert said[0] in call.variant(CPU) and "gradients" not in call.variant(CPU)


def test_rows_at_any_address_are_another_variant() -> None:
    """Triton compiles other loads for them, whichever kernel serves."""
    for T in (1, 40, 300):
        whole, padded = torch.zeros(1, 2, T, 64), torch.zeros(1, 2, T, 65)[..., 1:]
        aligned, other = (Attention(*FACTS["attention"](q, q, q)).variant(CPU) for q in (whole, padded))
        assert "rows at any address" in other.split(", ") and "address" not in aligned


LARGE = [
    (16, 12, 12, 1024, 1024, 64),
    (1, 16, 16, 8192, 8192, 128),
    (200, 4, 4, 64, 64, 32),
    (512, 32, 8, 1000, 1000, 128),
    (8, 12, 12, 200, 200, 64),
    (64, 32, 8, 1, 4000, 128),
    (1, 12, 12, 1, 130, 64),
    (1, 12, 12, 1, 100_000, 64),
    (4, 8, 8, 700, 5000, 96),
]


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("sizes", LARGE, ids=str)
def test_a_small_call_is_of_the_same_variant(sizes, dropout, chip) -> None:
    call = Attention(torch.bfloat16, *sizes, True, dropout, None, ALL)
    small = small_call(call, CPU)
    assert small.variant(CPU) == call.variant(CPU)
    of_small, of_call = (c.B * c.H * c.Tq * c.Tk for c in (small, call))
    assert of_small <= max(of_call, 2**22)
    assert of_small < 2**25 or sizes[3] > 4096 or "persistent" in call.variant(CPU)


@pytest.mark.parametrize("op", FACTS)
def test_the_inputs_are_of_the_same_variant(op) -> None:
    """What `inputs` draws has the facts that it was drawn for."""
    for call, aligned in itertools.product(typical_calls(op), (True, False)):
        if op == "attention":
            call = small_call(call, CPU)._replace(layout=None if aligned else ((2,) * 4, (2,) * 4, (2,) * 4, 0))
        elif op == "embedding":
            call = call._replace(layout=None if aligned else (1, 0, 1, 0)[: 4 if call.has_positions else 2])
        elif not aligned:
            continue
        tensors, options = call.inputs(Draw(CPU))
        for name in call.asked_for():
            tensors[name].requires_grad_()
        if isinstance(call, Attention):
            if call.route == "attention_cached":
                tensors = {"q": tensors["q"], "k": tensors["keys"], "v": tensors["values"]}
            tensors = separate(call, tensors)
            options.pop("n_head", None)
            options["route"] = call.route
        with torch.autocast(
            "cpu", dtype=getattr(call, "autocast", None), enabled=bool(getattr(call, "autocast", None))
        ):
            drawn = CALLS[op](*FACTS[op](**tensors, **options))
        if isinstance(call, Norm):
            drawn = drawn._replace(read_as=call.read_as)
        assert drawn.variant(CPU) == call.variant(CPU)
        options.pop("route", None)
        ops.explain(op, **tensors, **options)  # they are arguments of the op


def test_rows_of_one_of_sixteen_and_of_any_number() -> None:
    for n_rows, words in ((1, "one row"), (64, "rows in sixteens"), (63, "rows")):
        call = Norm(torch.float32, None, torch.float32, 8, n_rows, False, False, None, None, ())
        x = call.inputs(Draw(CPU))[0]["x"]
        assert words in call.variant(CPU).split(", ") and words in call._replace(n_rows=len(x)).variant(CPU).split(", ")


@pytest.mark.parametrize("n_rows", [1, 16, 100, 600, 100_000])
@pytest.mark.parametrize("width", [64, 768, 16384])
def test_the_inputs_of_a_norm_are_launched_as_the_call_is(width, n_rows, chip, monkeypatch) -> None:
    """Few rows are spread over more warps: such a call is another variant, and its self-test has few rows, too."""
    launched = []

    class Recorded:
        def __getitem__(self, grid: tuple) -> object:
            return lambda *args, **constants: launched.append((constants["ROWS"], constants["num_warps"]))

    monkeypatch.setattr(layer_norm, "forward_kernel", Recorded())
    draw = Draw(CPU)
    draw.n_elements = 2**21  # as on a GPU
    call = Norm(torch.bfloat16, None, torch.bfloat16, width, n_rows, False, False, None, None, ())
    for x in (torch.empty(n_rows, width, device="meta"), call.inputs(draw)[0]["x"]):
        layer_norm.forward(x, None, x[0], None, 1e-5, 0.0, None, x.dtype)
        assert call._replace(n_rows=len(x)).variant(CPU) == call.variant(CPU)
    assert launched[0] == launched[1] and "{} by {} warps".format(*launched[0]) in call.variant(CPU)


def test_unknown_sizes_stand_for_typical_ones() -> None:
    call = Attention(torch.bfloat16, UNKNOWN, 4, 4, UNKNOWN, UNKNOWN, 64, True, False, None, ())
    calls = calls_of("attention", tuple(call))
    assert len(calls) == 3 and all(UNKNOWN not in found[:7] and found.Tq == found.Tk for found in calls)
    assert calls_of("attention", tuple(calls[0])) == [calls[0]]
    assert calls_of("attention", tuple(calls[0]._replace(B=0))) == []
    norm = Norm(torch.float32, None, torch.float32, 768, UNKNOWN, True, False, None, None, ())
    assert [call.n_rows for call in calls_of("layer_norm", tuple(norm))] == [64, 65536], "few, and many"


def test_facts_are_keys_and_tell_what_is_asked_for() -> None:
    q = torch.zeros(1, 2, 3, 16, requires_grad=True)
    facts = FACTS["attention"](q, q.detach(), q.detach())
    assert hash(facts) and Attention(*facts).asked_for() == ["q"]
    with torch.no_grad():
        assert Attention(*FACTS["attention"](q, q, q)).asked == ()
    assert Attention(*FACTS["attention"](q[..., :15], q[..., :15], q[..., :15])).aligned
    padded = torch.zeros(1, 2, 3, 17)[..., 1:]
    assert not Attention(*FACTS["attention"](padded, padded, padded)).aligned
