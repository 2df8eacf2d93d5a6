"""Compile every kernel, in every configuration, for a GPU that need not be in this machine, and read the machine code.

    python -m fastgpt.triton_kernels.offline --arch 90             # all cases for sm_90, a row each
    python -m fastgpt.triton_kernels.offline --arch 90 --json      # the same for a program

Triton's wheel contains NVIDIA's assembler and disassembler, so registers, spills, shared memory and the instructions of
the tensor cores are known without a GPU. `cases` lists the configurations that the launchers in this package choose.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

from . import attention, attention_cached, attention_configs, layer_norm, ptx, tuned
from .target import INTERPRETING, ASTSource, GPUTarget

ARCHITECTURES = (80, 90, 100)
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
_COUNTS = [
    *("batch_size", "n_heads", "group", "n_queries", "n_keys", "section", "last_dropped", "split_size", "n_splits"),
    *("n_rows", "width", "x_stride", "residual_stride", "grad_y_stride", "grad_sum_stride"),
    *("capacity", "grad_q_stride"),
    *(f"{x}_{part}stride" for x in ("q", "k", "v", "new_k", "new_v", "grad") for part in ("batch_", "head_", "")),
]
_TYPES = (
    dict.fromkeys(_COUNTS, "i32")
    | dict.fromkeys(("score_scale", "scale", "keep_scale", "eps"), "fp32")
    | dict.fromkeys(("Lse", "Delta", "PartialOut", "PartialLse", "Stats", "Partial"), "*fp32")
    | {"Seed": "*i64", "Length": "*i64", "rows_before": "i64"}
)
_ALIGNED = ("stride", "width")  # compiled as multiples of 16, which they are for every usual width


@dataclass(frozen=True)
class KernelCase:
    """What is compiled: a kernel, the element type of its tensors, its constants and launch options."""

    name: str
    kernel: Any
    dtype: str
    constants: dict[str, Any]
    descriptors: bool = False


def _attention_cases(arch: int) -> Iterator[KernelCase]:
    def case(name, kernel, dtype, head_size, config, **constants):
        wanted = (
            {"HEAD_SIZE": head_size, "CAUSAL": True, "PRECISION": "ieee"}
            | dict.fromkeys(("DESCRIPTORS", "PERSISTENT", "PACKED"), False)
            | {"SPLIT": True}
            | dict.fromkeys(("GRAD_Q", "GRAD_K", "GRAD_V"), True)
            | constants
        )
        wanted = {key: value for key, value in wanted.items() if key in kernel.arg_names}
        descriptors = bool(wanted.get("DESCRIPTORS"))
        return KernelCase(f"attention.{name}.d{head_size}", kernel, dtype, wanted | config, descriptors)

    def three(regime, dtype, head_size, longest, descriptors, dropout, **constants):
        size = 4 if dtype == "fp32" else 2
        label = f"{regime}.dropout" if dropout else regime
        flags = {"DESCRIPTORS": descriptors, "DROPOUT": dropout} | constants
        config = attention_configs.forward_config(head_size, size, longest, descriptors, dropout, arch)
        yield case(f"forward.{label}", attention.forward_kernel, dtype, head_size, config, **flags)
        config = attention_configs.grad_q_config(head_size, size, longest, descriptors, dropout, arch)
        yield case(f"grad_q.{label}", attention.grad_q_kernel, dtype, head_size, config, **flags)
        config = attention_configs.grad_kv_config(head_size, size, longest, descriptors, dropout, 2, arch)
        yield case(f"grad_kv.{label}", attention.grad_kv_kernel, dtype, head_size, config, **flags)

    for head_size in (64, 128, 256):
        # For sm_100 the compiler takes four times as long. Where a kernel has the same configuration with and without
        # dropout, only the one with dropout is compiled for it, because a mask only adds registers.
        for dropout in (True,) if arch == 100 and head_size > 64 else (False, True):
            yield from three("tiled", "bf16", head_size, 4096, False, dropout)
    if arch == 90:
        for head_size in (64, 128):
            for dropout in (False, True):
                yield from three("long", "bf16", head_size, 4096, True, dropout)
                config = attention_configs.forward_config(head_size, 2, 4096, True, dropout, arch)
                flags = {"DESCRIPTORS": True, "PERSISTENT": True, "DROPOUT": dropout}
                name = "forward.long.persistent" + (".dropout" if dropout else "")
                yield case(name, attention.forward_kernel, "bf16", head_size, config, **flags)
        config = attention_configs.grad_kv_config(128, 2, 4096, True, False, 1, arch)
        flags = {"DESCRIPTORS": True, "DROPOUT": False, "group": 1}
        yield case("grad_kv.long.group1", attention.grad_kv_kernel, "bf16", 128, config, **flags)
        flags = {"DESCRIPTORS": True, "DROPOUT": False, "CAUSAL": False}
        config = attention_configs.forward_config(80, 2, 4096, True, False, arch)
        yield case("forward.long.full", attention.forward_kernel, "bf16", 80, config, **flags)
    if arch != 100:
        for head_size in (64, 128):
            yield from three("float32", "fp32", head_size, 4096, False, False)
    for dropout in (False, True) if arch == 90 else (True,):
        yield from three("float32", "fp32", 256, 4096, False, dropout)
    if arch == 90:
        yield from three("tf32", "fp32", 256, 4096, False, True, PRECISION="tf32")
    for head_size, rows in ((128, 32), (256, 16)):
        config = attention_configs.decode_config(head_size, 4, rows, arch)
        yield case(f"decode.float32.rows{config['ROWS']}", attention.decode_kernel, "fp32", head_size, config)
    config = attention_configs.forward_config(256, 2, 32, False, True, arch)
    yield case("forward.tiny.dropout", attention.forward_kernel, "bf16", 256, config, DROPOUT=True)
    one_tile = ((16, 128, True), (32, 128, True), (64, 64, False), (64, 64, True), (64, 32, True))
    for longest, head_size, dropout in one_tile:
        config = attention_configs.one_tile_forward_config(head_size, 2, longest, dropout, arch)
        name = f"one_tile_forward.t{longest}" + (".dropout" if dropout else "")
        yield case(name, attention.one_tile_forward_kernel, "bf16", head_size, config, DROPOUT=dropout)
    for longest, head_size, dropout in ((16, 64, True), (32, 64, True), (64, 64, False), (64, 32, True)):
        config = attention_configs.one_tile_backward_config(head_size, 2, longest, dropout, arch)
        if config is None:  # these sizes take two passes
            continue
        name = f"one_tile_backward.t{longest}" + (".dropout" if dropout else "")
        yield case(name, attention.one_tile_backward_kernel, "bf16", head_size, config, DROPOUT=dropout)
    for head_size, rows in ((64, 8), (128, 64), (256, 8)):
        config = attention_configs.decode_config(head_size, 2, rows, arch)
        yield case(f"decode.rows{config['ROWS']}", attention.decode_kernel, "bf16", head_size, config)
        name = f"decode.one_split.rows{config['ROWS']}"
        yield case(name, attention.decode_kernel, "bf16", head_size, config, SPLIT=False)
    for dtype, head_size, rows in (("bf16", 64, 1), ("bf16", 128, 32), ("bf16", 256, 1), ("fp32", 64, 1)):
        config = attention_configs.decode_config(head_size, 4 if dtype == "fp32" else 2, rows, arch)
        name = f"cached_decode{'.float32' if dtype == 'fp32' else ''}.rows{config['ROWS']}"
        config = {**config, "BLOCK_NEW": attention_cached.BLOCK_NEW}
        yield case(name, attention_cached.cached_decode_kernel, dtype, head_size, config)
    for splits in (2, 128):
        config = {"SPLITS": splits, "BLOCK_D": 128, **attention_configs.JOIN_CONFIG}
        yield case(f"join_splits.s{splits}", attention.join_splits_kernel, "bf16", 128, config)


def _layer_norm_cases(arch: int) -> Iterator[KernelCase]:
    grads = dict.fromkeys(("HAS_GRAD_SUM", "WRITE_GRAD_RESIDUAL", "WRITE_GRAD_X", "DROPOUT"), True)
    affine = dict.fromkeys(("WRITE_GRAD_WEIGHT", "WRITE_GRAD_BIAS"), True)
    widths = [2**n for n in (4, 6, 7, 8, 9, 10, 11, 12, 14)] if arch == 90 else [16, 1024, 4096, 16384]
    for width in widths:
        config = layer_norm.forward_config(width, arch)
        flags = {"ADD": True, "DROPOUT": True, "HAS_BIAS": True}
        yield KernelCase(f"add_layer_norm.forward.w{width}", layer_norm.forward_kernel, "bf16", flags | config)
        flags = {"ADD": False, "DROPOUT": False, "HAS_BIAS": True}
        if arch == 90 and width in (128, 1024, 16384):
            yield KernelCase(f"layer_norm.forward.w{width}", layer_norm.forward_kernel, "bf16", flags | config)
        if arch == 90 and width in (1024, 4096):
            name, config = f"layer_norm.forward.single.w{width}", layer_norm.single_row_config(width)
            yield KernelCase(name, layer_norm.forward_kernel, "bf16", flags | config)
        if width > layer_norm.MAX_FUSED_WIDTH:
            continue
        config = layer_norm.backward_config(width, arch)
        for dtype in ("bf16", "fp32") if width == layer_norm.MAX_FUSED_WIDTH else ("bf16",):
            flags = grads | affine
            name = f"add_layer_norm.backward.{dtype}.w{width}"
            yield KernelCase(name, layer_norm.backward_kernel, dtype, flags | config)
    name = "add_layer_norm.wide_backward"
    yield KernelCase(name, layer_norm.wide_backward_kernel, "bf16", grads | layer_norm.WIDE_CONFIG)
    config = affine | layer_norm.AFFINE_GRAD_CONFIG
    yield KernelCase("layer_norm.affine_grad", layer_norm.affine_grad_kernel, "bf16", config)


def cases(arch: int) -> list[KernelCase]:
    """Every case for sm_`arch`, in a fixed order, in the configurations that are chosen without a tuned table."""
    with tuned.use(tuned.Table()):
        return [*_attention_cases(arch), *_layer_norm_cases(arch)]


def _signature(case: KernelCase) -> dict[str, str]:
    types = {}
    for name in case.kernel.arg_names:
        if name in case.constants:
            types[name] = "constexpr"
        elif case.descriptors and name in ("Q", "GradOut", "K", "V"):
            rows = case.constants["BLOCK_M" if name in ("Q", "GradOut") else "BLOCK_N"]
            types[name] = f"tensordesc<{case.dtype}[1,1,{rows},{case.constants['BLOCK_D']}]>"
        elif name == "Out" and case.constants.get("SPLIT"):  # the sums of a split, which are joined in float32
            types[name] = "*fp32"
        else:
            types[name] = _TYPES.get(name, f"*{case.dtype}")
    return types


def measure_kernel(case: KernelCase, arch: int) -> dict[str, Any]:
    """A compiled case: registers a thread, bytes spilled, bytes shared, programs that fit a multiprocessor at one time,
    for sm_90 the counts of instructions, and what `ptx.faults` finds.
    """
    if INTERPRETING:
        raise RuntimeError("TRITON_INTERPRET=1 is set, and what it interprets cannot be compiled; unset it")
    options = {key: value for key, value in case.constants.items() if key in _OPTIONS}
    constants = {key: value for key, value in case.constants.items() if key not in _OPTIONS}
    signature = _signature(case)
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or (kind == "i32" and name.endswith(_ALIGNED))
    }
    source = ASTSource(case.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return {"arch": arch, "name": case.name, **machine_code(compiled, arch)}


def machine_code(compiled: Any, arch: int) -> dict[str, Any]:
    """The figures of a kernel that Triton compiled for sm_`arch`, as `measure_kernel` gives them."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.check_output([tools / "cuobjdump", "-res-usage", cubin.name], encoding="utf-8")
        # The disassembler takes a third of a second, and what is counted comes from these two instructions alone.
        wanted = arch == 90 and re.search(r"\b(wgmma|cp\.async\.bulk\.tensor)\b", compiled.asm["ptx"])
        command = [tools / "nvdisasm", "--no-dataflow", cubin.name]
        assembly = subprocess.check_output(command, encoding="utf-8") if wanted else ""
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))
    return {
        "registers": registers,
        "spilled_bytes": stack + local,
        "shared_bytes": compiled.metadata.shared,
        "programs": _programs(registers, compiled.metadata.shared, compiled.metadata.num_warps, arch),
        "hgmma": len(re.findall(r"\bHGMMA\b", assembly)),
        "hgmma_waits": len(re.findall(r"\bWARPGROUP\.DEPBAR\b", assembly)),
        "tma_loads": len(re.findall(r"\bUTMALDG\b", assembly)),
        "faults": ptx.faults(compiled.asm["ptx"]),
    }


def _programs(registers: int, shared_bytes: int, num_warps: int, arch: int) -> int:
    """How many programs a multiprocessor holds at one time: of its 64 warps, 64 K registers and shared memory.

    Registers are given to a warp in units of 8 for each lane; 1 KB of shared memory is lost for each program.
    """
    by_registers = 2**16 // (-(-registers // 8) * 8 * 32 * num_warps)
    by_shared = (164 if arch == 80 else 228) * 1024 // (shared_bytes + 1024)
    return min(32, 64 // num_warps, by_registers, by_shared)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--part", default="0/1", help="i/n: every n-th case from the i-th on, to compile in parallel")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    arguments = parser.parse_args()
    first, step = map(int, arguments.part.split("/"))
    wanted = [(arch, case) for arch in arguments.arch for case in cases(arch)]
    for arch, case in wanted[first::step]:
        row = measure_kernel(case, arch)
        if arguments.json:
            print(json.dumps(row), flush=True)
        else:
            print("  ".join(f"{key} {value}" for key, value in row.items() if key != "name").ljust(100), row["name"])


if __name__ == "__main__":
    main()
