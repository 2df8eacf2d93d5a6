"""How an op of the `torch.library` namespace `fastgpt::` is registered, and every private name of PyTorch that is used.

Schemas are defined in Python, so the ops exist without compiled code.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from . import dtensor
from .flops import register_flops

library = torch.library.Library("fastgpt", "DEF")


def define_op(
    schema: str,
    *,
    forward: Callable[..., Any],
    fake: Callable[..., Any],
    forward_on_cuda: Callable[..., Any] | None = None,
    backward: Callable[..., tuple] | None = None,
    save: Callable[[Any, tuple, Any], None] | None = None,
    first_only: bool = False,
    is_gradient: bool = False,
    flops: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Register the op ``fastgpt::schema``, and return the function by which the package calls it.

    Args:
        schema: name, arguments and results, in the notation of torch.library.
        forward: computes the results on every device; a kernel of the extension is `native.load_at_first_call(name)`.
        fake: the results' shapes, dtypes and strides alone, for tensors without data.
        forward_on_cuda: takes the place of `forward` on CUDA.
        backward: (ctx, gradients of the results) -> gradients of the arguments. None: the op has no derivative.
        save: (ctx, arguments, results) keeps in ctx what `backward` needs.
        first_only: the results after the first are for `backward` alone, and have no gradient. The returned function
            gives the first result alone, because each result of an autograd.Function costs time; `first_and_last` makes
            one that gives the last result, too.
        is_gradient: the op computes a gradient. Differentiating it raises an error: PyTorch would treat its result as
            a constant, and a second derivative would be silently wrong.
        flops: (arguments, a shape in place of each tensor) -> operations; see `flops.py`.
    """
    name = schema.partition("(")[0]
    library.define(schema)
    library.impl(name, forward, "CompositeExplicitAutograd")
    if forward_on_cuda is not None:
        library.impl(name, forward_on_cuda, "CUDA")
    torch.library.register_fake(f"fastgpt::{name}", fake, lib=library)
    if flops is not None:
        register_flops(name, flops)
    if is_gradient:
        _raise_on_double_backward(name)
    run = getattr(torch.ops.fastgpt, name).default
    if is_gradient:
        return partial(_run_gradient, run)
    if backward is None or save is None:
        return run
    return _define_derivative(name, backward, save, first_only)


def _run_gradient(run: Callable[..., Any], *args: Any) -> Any:
    """run(*args), past the code that refuses a second derivative where autograd does not record one."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return run(*args)
    return below_autograd(run, *args)


def _raise_on_double_backward(name: str) -> None:
    def save(ctx: Any, inputs: tuple, output: Any) -> None:
        pass

    def backward(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(
            f"fastgpt::{name} computes a gradient and cannot be differentiated: double backward is not supported; "
            "the formulas of fastgpt.ops.reference have every derivative"
        )

    torch.library.register_autograd(f"fastgpt::{name}", backward, setup_context=save, lib=library)


def _define_derivative(
    name: str, backward: Callable[..., tuple], save: Callable[[Any, tuple, Any], None], first_only: bool
) -> Callable[..., Any]:
    """Register the derivative at the dispatcher, and return a faster way to call the op than the dispatcher.

    The dispatcher serves torch.compile and whoever calls torch.ops.fastgpt directly. In eager mode an
    autograd.Function runs the same `forward` and `backward`, which costs less time.
    """

    def save_at_dispatcher(ctx: Any, inputs: tuple, output: Any) -> None:
        if first_only:
            ctx.mark_non_differentiable(*output[1:])
            ctx.set_materialize_grads(False)  # or autograd fills zeros for them, as large as they are
        save(ctx, inputs, output)

    torch.library.register_autograd(f"fastgpt::{name}", backward, setup_context=save_at_dispatcher, lib=library)
    run = getattr(torch.ops.fastgpt, name).default
    results = _first if first_only else _all

    def forward(ctx: Any, *args: Any) -> Any:
        output = below_autograd(run, *args)
        save(ctx, args, output)
        return results(output)

    return _caller(name, run, forward, backward, results)


def first_and_last(
    name: str, backward: Callable[..., tuple], save: Callable[[Any, tuple, Any], None]
) -> Callable[..., tuple[Tensor, Tensor]]:
    """The function by which to call an op of `define_op(..., first_only=True)` for its first and its last result.

    The last result has no gradient. `backward` and `save` are those that the op was defined with.
    """
    run = getattr(torch.ops.fastgpt, name).default

    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        output = below_autograd(run, *args)
        save(ctx, args, output)
        ctx.mark_non_differentiable(output[-1])
        return _ends(output)

    return _caller(name, run, forward, backward, _ends)


def _all(output: Any) -> Any:
    return output


def _first(output: tuple) -> Any:
    return output[0]


def _ends(output: tuple) -> tuple[Any, Any]:
    return output[0], output[-1]


def _caller(
    name: str, run: Any, forward: Callable[..., Any], backward: Callable[..., tuple], results: Callable[[Any], Any]
) -> Callable[..., Any]:
    """The op `run` in eager mode by an autograd.Function, and where a graph is traced, by the dispatcher."""
    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    apply = _apply_of(type(name, (torch.autograd.Function,), methods))

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            output = run(*args)
        elif torch.is_grad_enabled() and _any_requires_grad(args):
            return apply(*args)
        else:
            output = below_autograd(run, *args)
        return results(output)

    return call


def refuse_forward_mode(op: str, *tensors: Tensor | None) -> None:
    """Raise where forward-mode AD (`torch.func.jvp`) reaches an op of ours: PyTorch would treat its derivative as 0."""
    if not in_forward_mode():
        return
    unknown = torch.compiler.is_compiling()  # a tensor that is being traced shows no tangent
    for tensor in tensors:
        if tensor is not None and (unknown or torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None):
            raise NotImplementedError(
                f"{op}: forward-mode derivatives are not supported; the formulas of fastgpt.ops.reference have them"
            )


# --- private names of PyTorch -----------------------------------------------------------------------------------------
#
# PyTorch promises none of these names. They are used in this file alone. Beside each stand the oldest and the newest
# torch in which it was seen to do what is needed here. tests/ops/test_library.py fails where the list is not complete,
# and where this torch lacks one of them.

PRIVATE_NAMES = {
    "torch._C._AutoDispatchBelowAutograd": ("2.11.0", "2.14.1"),
    "torch._C._any_requires_grad": ("2.11.0", "2.14.1"),
    "torch._C._are_functorch_transforms_active": ("2.11.0", "2.14.1"),
    "torch._C._cuda_endAllocateToPool": ("2.11.0", "2.15.0"),
    "torch._C._current_graph_task_id": ("2.11.0", "2.14.1"),
    "torch._C._len_torch_dispatch_stack": ("2.11.0", "2.14.1"),
    "torch._C._functorch.is_functorch_wrapped_tensor": ("2.11.0", "2.14.1"),
    "torch.autograd.forward_ad._current_level": ("2.11.0", "2.14.1"),
    "torch.autograd.function._SingleLevelFunction.apply": ("2.11.0", "2.14.1"),  # below torch.autograd.Function
    "torch._subclasses.fake_tensor.FakeTensor": ("2.11.0", "2.14.1"),
    "torch._higher_order_ops.scan": ("2.13.0", "2.13.0"),  # for exports of recurrent models
    "torch.utils._python_dispatch.TorchDispatchMode": ("2.13.0", "2.13.0"),  # for benchmarks, which count collectives
    "torch.nn.modules.module._has_any_global_hook": ("2.11.0", "2.14.1"),
    "module._forward_hooks": ("2.11.0", "2.14.1"),  # `module` is a torch.nn.Module
    "module._forward_pre_hooks": ("2.11.0", "2.14.1"),
    "module._backward_hooks": ("2.11.0", "2.14.1"),
    "module._backward_pre_hooks": ("2.11.0", "2.14.1"),
    "module._modules": ("2.11.0", "2.14.1"),
    "module._parameters": ("2.11.0", "2.14.1"),
    "model.config._attn_implementation": ("2.11.0", "2.13.0"),  # of transformers 5.24, whose guide names it
    "_dynamo_marked_constant": ("2.11.0", "2.14.1"),  # what torch.compiler.assume_constant_result sets on a function
}


def attention_implementation(model: Any) -> str | None:
    """The name of the function that a model of transformers takes from its registry of attention functions."""
    return model.config._attn_implementation


def below_autograd(op: Callable[..., Any], *args: Any) -> Any:
    """op(*args) without the derivative that was registered for it, whose Python code takes longer than a small op."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def _any_requires_grad(args: tuple) -> bool:
    """Whether one of `args`, tensors among them, needs a gradient; in Python the question costs a microsecond."""
    return torch._C._any_requires_grad(*args)


def inside_transform() -> str | None:
    """Why an op of ours cannot serve here, or None: PyTorch has no torch.func rules for the derivatives of such ops."""
    if torch._C._are_functorch_transforms_active():
        return "it does not work inside torch.func transforms"
    return None


def is_wrapped_by_transform(tensor: Tensor) -> bool:
    """Whether `tensor` stands for one inside a torch.func transform, and has no values of its own to read."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def in_forward_mode() -> bool:
    """Whether this is inside of forward-mode AD, where tensors may carry tangents."""
    return torch.autograd.forward_ad._current_level >= 0


def _apply_of(function: Any) -> Callable[..., Any]:
    """`function.apply` of an autograd.Function that is never called inside torch.func's transforms.

    Function.apply first unpacks the tensors that such transforms wrapped. This is the method that it calls after that.
    """
    return super(torch.autograd.Function, function).apply


def in_backward() -> bool:
    """Whether this runs inside of a backward pass, in one of autograd's threads."""
    return torch._C._current_graph_task_id() != -1


def end_allocating(device_index: int, pool: tuple[int, int]) -> None:
    """Take memory from `pool` no longer. torch 2.11 would do so for ever after a recording of a graph that failed.

    It would then keep what several streams have used, and raise an internal error where memory runs out.
    """
    with contextlib.suppress(RuntimeError):  # PyTorch has ended it already
        torch._C._cuda_endAllocateToPool(device_index, pool)


def has_address(tensor: Tensor) -> bool:
    """Whether `tensor` has memory of its own; one that is traced, or stands for others, has none."""
    return not torch.compiler.is_compiling() and type(tensor) in (Tensor, nn.Parameter)


def is_static(value: Any) -> bool:
    """Whether `value` is not a size that torch.compile leaves open. Only for values that are being traced."""
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return not isinstance(value, (int, torch.SymInt)) or has_static_value(value)


def scan(step: Callable[..., Any], state: Any, inputs: Tensor) -> tuple[Any, Any]:
    """(state, output) = step(state, input) for each of `inputs` along their first dimension, as one loop in a graph.

    Returns the last state, and the outputs, stacked along a first dimension.
    """
    from torch._higher_order_ops import scan

    return scan(step, state, inputs)


HOOKS = "it has hooks"


def hooks_of(module: nn.Module) -> str | None:
    """In words, whose hooks run when `module` is called; None where there are none."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return HOOKS
    if torch.nn.modules.module._has_any_global_hook():
        return "there are hooks on every module"
    return None


def has_hooks_of_fsdp_alone(module: nn.Module) -> bool:
    """Whether whatever runs when `module` is called, besides its forward, was put there by `fully_shard`."""
    if not hasattr(torch.distributed, "fsdp") or torch.nn.modules.module._has_any_global_hook():
        return False
    hooks = (hook for kind in (module._forward_pre_hooks, module._forward_hooks) for hook in dict.values(kind))
    owners = {type(getattr(hook, "__self__", None)).__module__ for hook in hooks}
    return (
        isinstance(module, torch.distributed.fsdp.FSDPModule)
        and all(owner.startswith("torch.distributed.fsdp.") for owner in owners)
        and not (module._backward_hooks or module._backward_pre_hooks)
    )


def no_parameter(module: nn.Module, name: str) -> str | None:
    """Why ``module.name`` is no parameter of the module's own that is dense, a DTensor, or empty; None where it is."""
    if name not in module._parameters:  # it is a property, or an attribute that something sets
        return f"its {name} is computed from something else"
    kind = type(module._parameters[name])
    return None if kind in _PLAIN_TENSORS or dtensor.is_kind(kind) else f"its {name} is a {kind.__name__}"


# In torch.export a FakeTensor takes the place of a plain tensor.
_PLAIN_TENSORS = (nn.Parameter, Tensor, torch._subclasses.fake_tensor.FakeTensor, type(None))


def in_dispatch_mode() -> bool:
    """Whether a mode watches every op that is called: a FLOP counter, a profiler of ops, fake tensors."""
    return torch._C._len_torch_dispatch_stack() > 0


DispatchMode = torch.utils._python_dispatch.TorchDispatchMode  # the base of modes that see each op that is called


class Unchanged:
    """Whether calls of `modules` still do what they did when this was made.

    They do while the modules keep their classes and children, nothing but their own forward runs, their parameters are
    the same tensors, and none is in training mode. Generation asks at each token, of sixty modules: the loops below are
    those of Python's built-in functions, which take a quarter of the time that a loop in Python would.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        self._watched = modules
        self._kinds = list(map(type, modules))
        kinds: set[Any] = set(self._kinds)
        self._methods = [(kind, kind.forward, kind.__call__) for kind in kinds]
        self._states = [module.__dict__ for module in modules]
        self._hooks = [
            hooks
            for module in modules
            for hooks in (
                *(module._forward_hooks, module._forward_pre_hooks),
                *(module._backward_hooks, module._backward_pre_hooks),
            )
        ]
        self._contents: list[dict[str, Any]] = []
        for module in modules:
            self._contents += [module._modules, module._parameters]
        self._kept = self._current()

    def _current(self) -> list[Any]:
        return list(itertools.chain.from_iterable(map(dict.values, self._contents)))

    def __call__(self) -> bool:
        return (
            not any(self._hooks)
            and not torch.nn.modules.module._has_any_global_hook()
            and not any(map(_training, self._states))
            and not any(map(dict.__contains__, self._states, itertools.repeat("forward")))
            and list(map(type, self._watched)) == self._kinds
            and all(kind.forward is forward and kind.__call__ is call for kind, forward, call in self._methods)
            and all(map(operator.is_, self._current(), self._kept))
        )


_training = operator.itemgetter("training")
_Function = TypeVar("_Function", bound=Callable[..., Any])


def assume_constant_result(function: _Function) -> _Function:
    """Does what torch.compiler.assume_constant_result does, which would import all of torch._dynamo."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
