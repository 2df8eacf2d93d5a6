"""What `make gpu-tune` tunes: each kernel in the calls that matter, its candidates, and the call that is timed.

A subject is a kernel and the key under which a table has its entry (triton_kernels/tuned.py). From the key follow the
sizes of its call, GPT-2's where there is a choice. `timed` is the call whose time counts, and `results` are the results
and gradients, which are compared with the formula in float64. Both go through the launchers, so that what is compiled,
checked and timed is what a model would run under the table.

Importing this module imports no triton: whether kernels are compiled or interpreted is settled by its first import.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastgpt import ops
from fastgpt.ops import reference
from fastgpt.ops.cross_entropy import REDUCTIONS, cuda_plan
from fastgpt.ops.embedding import CUDA_CHUNK
from fastgpt.ops.yardsticks import yardstick_for
from fastgpt.triton_kernels import tuned

Choices = dict[str, int]
DROPOUT = 0.1
SEED = 7
TOKENS, WIDTH = 16384, 768  # of a step of GPT-2


Draw = Callable[..., Tensor]  # draw(*shape, dtype=...) makes a tensor


def random_on(device: str, seed: int) -> Draw:
    """Normal numbers."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device=device).to(dtype)

    return draw


def no_numbers(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """For launches that are only compiled."""
    return torch.empty(shape, dtype=dtype)


def grid(**values: tuple[int, ...]) -> Iterator[Choices]:
    """Every combination of the values."""
    for combination in itertools.product(*values.values()):
        yield dict(zip(values, combination, strict=True))


@dataclass(frozen=True)
class Subject:
    kernel: str
    key: dict[str, Any]

    op = ""  # whose formula is the oracle

    @property
    def compiled(self) -> bool:
        """Whether a candidate is compiled anew; kernels in csrc/ take their plans as they run."""
        return not tuned.KERNELS[self.kernel].of_csrc

    @property
    def backend(self) -> str:
        return "triton" if self.compiled else "native"

    @property
    def name(self) -> str:
        return " ".join([self.kernel, *(f"{key}={value}" for key, value in self.key.items())])

    @property
    def options(self) -> dict[str, Any]:
        """The options of the op that the formula takes."""
        return {"dropout_p": DROPOUT, "seed": SEED} if self.key.get("dropout") else {}

    def default(self, arch: int) -> Choices:
        """What is chosen without a table."""
        raise NotImplementedError

    def every_candidate(self) -> Iterator[Choices]:
        raise NotImplementedError

    def candidates(self, arch: int) -> list[Choices]:
        default = self.default(arch)
        return [choices for choices in self.every_candidate() if choices != default]

    def small(self) -> Subject:
        """The same kernel under the key of the smallest calls that it is taken for; its candidates fit them, too."""
        return self

    def inputs(self, draw: Draw, full: bool) -> dict[str, Tensor]:
        """Random arguments of the op by name, and the gradients of its results. Few, but of this key, if not `full`."""
        raise NotImplementedError

    def results(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The results of the launchers, "out" and others, and the gradient "d x" of each argument x."""
        raise NotImplementedError

    def timed(self, inputs: dict[str, Tensor]) -> Callable[[], object]:
        raise NotImplementedError

    def part(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the formula computes of `inputs` or `results`: so little that float64 scores fit into memory."""
        return tensors

    def by_formula(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The results and gradients in float64."""
        exact = {name: x.double() if x.is_floating_point() else x for name, x in self.part(inputs).items()}
        return _through_autograd(getattr(reference, self.op), exact, self.options)

    def by_pytorch(self, inputs: dict[str, Tensor], device: str) -> dict[str, Tensor]:
        """The same by PyTorch in the kernel's dtype: the yardstick of its error."""
        yardstick = yardstick_for(self.op, self.backend, device, bool(self.key.get("dropout")))
        return _through_autograd(yardstick, self.part(inputs), self.options)

    def entry(self, arch: int, choices: Choices, facts: dict[str, Any] | None = None) -> tuned.Entry:
        return tuned.Entry(arch, self.kernel, self.key, choices, facts or {})


def _through_autograd(function: Callable, inputs: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Tensor]:
    """Results and gradients. Of `inputs`, those called "grad ..." are the gradients of the results."""
    upstream = [x for name, x in inputs.items() if name.startswith("grad ")]
    arguments = {name: x.detach() for name, x in inputs.items() if not name.startswith("grad ")}
    leaves = {name: x.requires_grad_() for name, x in arguments.items() if upstream and x.is_floating_point()}
    found = function(**arguments, **options)
    outputs = found if isinstance(found, tuple) else (found,)
    results = dict(zip(("out", "h"), outputs, strict=False))
    if upstream:
        grads = torch.autograd.grad(
            outputs, list(leaves.values()), [g.to(y.dtype) for g, y in zip(upstream, outputs, strict=True)]
        )
        results |= {f"d {name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {name: x.detach() for name, x in results.items()}


def _seed(device: torch.device, options: dict[str, Any]) -> Tensor | None:
    return torch.full((), options["seed"], device=device) if "seed" in options else None


class Attention(Subject):
    """attention.forward, .grad_q and .grad_kv: causal, with q, k and v as the views of one projection that a model has.

    The formula computes two heads of the first sequence, whose dropout mask is the same in a call of their own.
    """

    op = "attention"

    def default(self, arch: int) -> Choices:
        from fastgpt.triton_kernels import attention_configs as configs

        function = getattr(configs, self.kernel.removeprefix("attention.") + "_config")
        with tuned.use(tuned.Table()):
            chosen = function(**self.key, arch=arch)
            if self.kernel == "attention.forward":
                chosen = chosen | {"persistent": configs.forward_programs(**self.key, arch=arch)}
        return {key: chosen[key] for key in tuned.KERNELS[self.kernel].choices}

    def every_candidate(self) -> Iterator[Choices]:
        large, descriptors = self.key["head_size"] > 64, self.key["descriptors"]
        if self.kernel == "attention.forward":
            if not descriptors:
                tiles = grid(BLOCK_M=(64, 128), BLOCK_N=(32, 64), num_warps=(4, 8), num_stages=(2, 3))
            elif large:
                tiles = itertools.chain(
                    grid(BLOCK_M=(128,), BLOCK_N=(64, 128), num_warps=(8,), num_stages=(2, 3)),
                    grid(BLOCK_M=(64,), BLOCK_N=(64,), num_warps=(4,), num_stages=(2, 3, 4)),
                )
            else:
                tiles = grid(BLOCK_M=(64, 128), BLOCK_N=(64, 128), num_warps=(4, 8), num_stages=(2, 3, 4))
            for tile in tiles:
                for persistent in (8 // tile["num_warps"], 0) if descriptors else (0,):
                    yield tile | {"persistent": persistent}
        elif not descriptors:
            yield from grid(BLOCK_M=(32, 64), BLOCK_N=(32, 64), num_warps=(4, 8), num_stages=(2, 3))
        elif self.kernel == "attention.grad_q":
            yield from grid(BLOCK_M=(128,), BLOCK_N=(32, 64, 128), num_warps=(8,), num_stages=(2, 3, 4))
            yield from grid(BLOCK_M=(64,), BLOCK_N=(32, 64), num_warps=(4,), num_stages=(2, 3))
        else:
            yield from grid(BLOCK_M=(32, 64, 128), BLOCK_N=(128,), num_warps=(8,), num_stages=(2, 3, 4))
            yield from grid(BLOCK_M=(32, 64), BLOCK_N=(64,), num_warps=(4,), num_stages=(2, 3))

    def small(self) -> Subject:
        return replace(self, key=self.key | {"longest": 512 if self.key["descriptors"] else 128})

    def inputs(self, draw: Draw, full: bool) -> dict[str, Tensor]:
        D, longest, group = self.key["head_size"], self.key["longest"], self.key.get("group", 1)
        B, H, T = (max(1, TOKENS // longest), WIDTH // D, longest) if full else (1, group, 9 * longest // 16)
        q, k, v = (x.view(B, T, -1, D).transpose(1, 2) for x in _projection(draw, B, T, H * D, H // group * D))
        return {"q": q, "k": k, "v": v, "grad out": draw(B, T, H, D).transpose(1, 2)}

    def results(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        forward, backward_of = self._calls(inputs)
        out, lse = forward()
        return {"out": out} | dict(zip(("d q", "d k", "d v"), backward_of(out, lse)(), strict=True))

    def timed(self, inputs: dict[str, Tensor]) -> Callable[[], object]:
        forward, backward_of = self._calls(inputs)
        return forward if self.kernel == "attention.forward" else backward_of(*forward())

    def _calls(self, inputs: dict[str, Tensor]) -> tuple[Callable, Callable]:
        """The call of forward, and the function that makes the call of backward from what forward has returned."""
        from fastgpt.triton_kernels import attention

        q, k, v, grad_out = inputs.values()
        options = True, q.shape[3] ** -0.5, self.options.get("dropout_p", 0.0), _seed(q.device, self.options)

        def backward_of(out: Tensor, lse: Tensor) -> Callable[[], tuple[Tensor, ...]]:
            return lambda: attention.backward(grad_out, q, k, v, out, lse, *options, (True, True, True))

        return lambda: attention.forward(q, k, v, *options), backward_of

    def part(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        n_key_heads = 2 // self.key.get("group", 1)
        return {name: x[:1, : n_key_heads if name[-1] in "kv" else 2] for name, x in tensors.items()}


def _projection(draw: Draw, B: int, T: int, of_queries: int, of_keys: int) -> tuple[Tensor, ...]:
    return draw(B, T, of_queries + 2 * of_keys).split([of_queries, of_keys, of_keys], dim=2)


class Decode(Subject):
    """attention.decode: one query of each head, against 1024 keys of a batch of 8."""

    op = "attention"

    def default(self, arch: int) -> Choices:
        from fastgpt.triton_kernels import attention_configs as configs

        with tuned.use(tuned.Table()):
            chosen = configs.decode_config(**self.key, arch=arch)
            chosen = chosen | {"programs": configs.decode_programs(**self.key, arch=arch)}
        return {key: chosen[key] for key in tuned.KERNELS[self.kernel].choices}

    def every_candidate(self) -> Iterator[Choices]:
        yield from grid(BLOCK_N=(32, 64, 128), num_warps=(4,), num_stages=(2, 3, 4), programs=(1, 2, 4))

    def inputs(self, draw: Draw, full: bool) -> dict[str, Tensor]:
        D = self.key["head_size"]
        B, H, Tk = (8, WIDTH // D, 1024) if full else (1, 2, 300)
        return {"q": draw(B, H, 1, D), "k": draw(B, H, Tk, D), "v": draw(B, H, Tk, D)}

    def results(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        from fastgpt.triton_kernels import attention

        q, k, v = inputs.values()
        return {"out": attention.forward(q, k, v, True, q.shape[3] ** -0.5, 0.0, None)[0]}

    def timed(self, inputs: dict[str, Tensor]) -> Callable[[], object]:
        return lambda: self.results(inputs)


class Norm(Subject):
    """layer_norm.forward and .backward, measured as the add_layer_norm with dropout of a model's every block.

    Under autocast a bfloat16 branch joins a float32 stream, and the result is bfloat16 again.
    """

    op = "add_layer_norm"

    @property
    def options(self) -> dict[str, Any]:
        return {"dropout_p": DROPOUT, "seed": SEED}

    def default(self, arch: int) -> Choices:
        from fastgpt.triton_kernels import layer_norm

        with tuned.use(tuned.Table()):
            if self.kernel == "layer_norm.forward":
                chosen = layer_norm.forward_config(**self.key, arch=arch)
            else:
                chosen = layer_norm.backward_config(**self.key, arch=arch)
                chosen = chosen | {"programs": layer_norm.backward_programs(**self.key, arch=arch)}
        return {key: chosen[key] for key in tuned.KERNELS[self.kernel].choices}

    def every_candidate(self) -> Iterator[Choices]:
        if self.kernel == "layer_norm.forward":
            yield from grid(ROWS=(1, 2, 4, 8), num_warps=(1, 2, 4, 8))
        else:
            yield from grid(ROWS=(1, 2, 4), STAGES=(1, 2), num_warps=(2, 4, 8), programs=(2, 4, 8))

    def inputs(self, draw: Draw, full: bool) -> dict[str, Tensor]:
        width = 3 * self.key["width"] // 4  # GPT-2's 768 of the bucket 1024
        n_rows, wide = TOKENS if full else 37, torch.float32
        x, grad_y = draw(n_rows, width), draw(n_rows, width)
        residual, grad_h = draw(n_rows, width, dtype=wide), draw(n_rows, width, dtype=wide)
        affine = {"weight": draw(width, dtype=wide), "bias": draw(width, dtype=wide)}
        return {"x": x, "residual": residual, **affine, "grad out": grad_y, "grad h": grad_h}

    def results(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        forward, backward_of = self._calls(inputs)
        out, h, stats = forward()
        grad_residual, grad_x, (grad_weight, grad_bias) = backward_of(out, h, stats)()
        return {
            "out": out, "h": h,
            "d x": grad_x, "d residual": grad_residual, "d weight": grad_weight, "d bias": grad_bias,
        }  # fmt: skip

    def timed(self, inputs: dict[str, Tensor]) -> Callable[[], object]:
        forward, backward_of = self._calls(inputs)
        return forward if self.kernel == "layer_norm.forward" else backward_of(*forward())

    def _calls(self, inputs: dict[str, Tensor]) -> tuple[Callable, Callable]:
        """The call of forward, and the function that makes the call of backward from what forward has returned."""
        from fastgpt.triton_kernels import layer_norm

        x, residual, weight, bias, grad_y, grad_h = inputs.values()
        seed = _seed(x.device, self.options)

        def backward_of(out: Tensor, h: Tensor, stats: Tensor) -> Callable[[], tuple[Tensor, ...]]:
            dtypes, asked = (residual.dtype, x.dtype), (True, True, True, True)
            return lambda: layer_norm.backward(grad_y, grad_h, h, weight, stats, DROPOUT, seed, *dtypes, asked)

        return lambda: layer_norm.forward(x, residual, weight, bias, 1e-5, DROPOUT, seed, x.dtype), backward_of


class CrossEntropy(Subject):
    """cross_entropy: the mean loss of 2048 rows with its gradient (two passes over a row), or alone (one pass)."""

    op = "cross_entropy"
    vocabularies: ClassVar = {65536: 50304, 131072: 128256}  # GPT-2's, padded, and Llama 3's

    def default(self, arch: int) -> Choices:
        if not torch.cuda.is_available():
            return {}  # the chip is asked for it
        rows = torch.empty(16, self.vocabularies[self.key["classes"]], dtype=torch.bfloat16, device="cuda")
        return dict(zip(("threads", "blocks"), cuda_plan(rows, self.key["passes"]), strict=True))

    def every_candidate(self) -> Iterator[Choices]:
        if self.key["passes"] == 1:
            yield from grid(threads=(128, 256, 512), blocks=(0,))
        else:
            one = (1,) if self.key["classes"] <= 65536 else ()  # more do not fit the shared memory of one block
            yield from grid(threads=(128, 256, 512), blocks=(0, *one))
            yield from grid(threads=(256, 512), blocks=(2, 4, 8))

    def inputs(self, draw: Draw, full: bool) -> dict[str, Tensor]:
        rows, classes = (2048, self.vocabularies[self.key["classes"]]) if full else (16, 300)
        logits = draw(rows, classes)
        inputs = {"logits": logits, "targets": draw(rows, dtype=torch.float32).mul(1e6).long().remainder(classes)}
        # The gradient of a mean is small beside the tolerances. Times the number of rows, it is not.
        upstream = torch.full((), float(rows), device=logits.device)
        return inputs | ({"grad out": upstream} if self.key["passes"] == 2 else {})

    def results(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return _through_autograd(partial(ops.cross_entropy, backend="native"), inputs, {})

    def timed(self, inputs: dict[str, Tensor]) -> Callable[[], object]:
        rows = inputs["logits"], inputs["targets"]
        op, with_grad = torch.ops.fastgpt.cross_entropy_native, self.key["passes"] == 2
        return lambda: op(*rows, None, None, -100, REDUCTIONS["mean"], 0.0, 0.0, 0.0, with_grad, False)


class Embedding(Subject):
    """embedding: the gradients of GPT-2's tables, from the tokens of a step."""

    op = "embedding"

    def default(self, arch: int) -> Choices:
        return {"chunk": CUDA_CHUNK}

    def every_candidate(self) -> Iterator[Choices]:
        yield from grid(chunk=(8, 16, 32, 64, 128))

    def inputs(self, draw: Draw, full: bool) -> dict[str, Tensor]:
        B, T, V, C = (self.key["tokens"] // 1024, 1024, 50304, WIDTH) if full else (2, 40, 50, 64)
        # Words of a text: the rank of a common one is small.
        tokens = draw(B, T, dtype=torch.float32).abs().mul(3.0).exp().long().clamp(max=V - 1)
        tables = {"token_table": draw(V, C), "position_table": draw(T, C)}
        return {"tokens": tokens, **tables, "grad out": draw(B, T, C)}

    def results(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return _through_autograd(partial(ops.embedding, backend="native"), inputs, {})

    def timed(self, inputs: dict[str, Tensor]) -> Callable[[], object]:
        tokens, token_table, position_table, grad = inputs.values()
        sizes = token_table.shape[0], position_table.shape[0], 0
        return lambda: torch.ops.fastgpt.embedding_native_backward(grad, tokens, *sizes, True, True)


CLASSES: dict[str, type[Subject]] = {
    "attention.forward": Attention,
    "attention.grad_q": Attention,
    "attention.grad_kv": Attention,
    "attention.decode": Decode,
    "layer_norm.forward": Norm,
    "layer_norm.backward": Norm,
    "cross_entropy": CrossEntropy,
    "embedding": Embedding,
}


def subject_of(kernel: str, **key: Any) -> Subject:
    return CLASSES[kernel](kernel, key)


def _tiled(kernel: str, head_size: int, longest: int, dropout: bool) -> Subject:
    of_keys = {"group": 1} if kernel == "attention.grad_kv" else {}
    return subject_of(
        kernel,
        head_size=head_size,
        element_size=2,
        longest=longest,
        descriptors=longest > 256,
        dropout=dropout,
        **of_keys,
    )


_PASSES = ("attention.forward", "attention.grad_q", "attention.grad_kv")
_DECODED = {"element_size": 2, "n_rows": 16}
# The most valuable ones first: the time may run out.
SUBJECTS: list[Subject] = [
    *(_tiled(kernel, 64, 1024, False) for kernel in _PASSES),
    *(_tiled(kernel, 128, 1024, False) for kernel in _PASSES),
    subject_of("layer_norm.forward", width=1024),
    subject_of("layer_norm.backward", width=1024),
    subject_of("cross_entropy", element_size=2, passes=2, classes=65536),
    subject_of("attention.decode", head_size=64, **_DECODED),
    subject_of("embedding", element_size=2, tokens=TOKENS),
    *(_tiled(kernel, 64, 256, True) for kernel in _PASSES),  # the character model's
    *(_tiled(kernel, 64, 1024, True) for kernel in _PASSES),
    *(_tiled(kernel, 128, 8192, False) for kernel in _PASSES),
    *(_tiled(kernel, 64, 4096, False) for kernel in _PASSES),
    subject_of("layer_norm.forward", width=512),
    subject_of("layer_norm.backward", width=512),
    subject_of("layer_norm.forward", width=2048),
    subject_of("layer_norm.backward", width=2048),
    subject_of("attention.decode", head_size=128, **_DECODED),
    subject_of("cross_entropy", element_size=2, passes=1, classes=65536),
    subject_of("cross_entropy", element_size=2, passes=2, classes=131072),
]


def subjects_for(arch: int, kernels: list[str]) -> list[Subject]:
    """The subjects of these kernels, or of all; only sm_90 has tensor descriptors."""
    found = [subject for subject in SUBJECTS if not kernels or subject.kernel in kernels]
    if arch // 10 == 9:
        return found
    return [replace(s, key=s.key | {"descriptors": False}) if "descriptors" in s.key else s for s in found]
