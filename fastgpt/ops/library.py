"""The `torch.library` namespace `fastgpt::`, and every private name of PyTorch that the package uses.

Schemas are defined in Python, so the ops exist without compiled code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

library = torch.library.Library("fastgpt", "DEF")

# --- private names of PyTorch -----------------------------------------------------------------------------------------
#
# PyTorch promises none of these names. They are used in this file alone, each with the oldest and the newest torch in
# which it was seen to do what is needed here. tests/ops/test_library.py holds the list complete and says
# which one is gone.

PRIVATE_NAMES = {
    "torch._C._AutoDispatchBelowAutograd": ("2.11.0", "2.14.1"),
    "torch._C._any_requires_grad": ("2.11.0", "2.14.1"),
    "torch._C._are_functorch_transforms_active": ("2.11.0", "2.14.1"),
    "torch._C._len_torch_dispatch_stack": ("2.11.0", "2.14.1"),
    "torch._C._functorch.is_functorch_wrapped_tensor": ("2.11.0", "2.14.1"),
    "torch.autograd.forward_ad._current_level": ("2.11.0", "2.14.1"),
    "torch.autograd.function._SingleLevelFunction.apply": ("2.11.0", "2.14.1"),  # below torch.autograd.Function
    "torch._subclasses.fake_tensor.FakeTensor": ("2.11.0", "2.14.1"),
    "torch.nn.modules.module._has_any_global_hook": ("2.11.0", "2.14.1"),
    "module._forward_hooks": ("2.11.0", "2.14.1"),  # `module` is a torch.nn.Module
    "module._forward_pre_hooks": ("2.11.0", "2.14.1"),
    "module._backward_hooks": ("2.11.0", "2.14.1"),
    "module._backward_pre_hooks": ("2.11.0", "2.14.1"),
    "module._parameters": ("2.11.0", "2.14.1"),
    "_dynamo_marked_constant": ("2.11.0", "2.14.1"),  # what torch.compiler.assume_constant_result sets on a function
}


def below_autograd(op: Callable[..., Any], *args: Any) -> Any:
    """op(*args), past the autograd that was registered for it: in Python, that costs more than a small op computes."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def _any_requires_grad(args: tuple) -> bool:
    """Whether one of `args`, tensors among them, needs a gradient; in Python the question costs a microsecond."""
    return torch._C._any_requires_grad(*args)


def inside_transform() -> str | None:
    """Why an op with `register_autograd` cannot serve here: PyTorch has no torch.func rules for such ops."""
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
    """`function.apply` of an autograd.Function, which is used outside of torch.func's transforms alone.

    Function.apply first unpacks what such transforms wrapped; this is the one that it ends in.
    """
    return super(torch.autograd.Function, function).apply


def hooks_of(module: nn.Module) -> str | None:
    """Whose hooks run where `module` is called, in words; None where none do."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "it has hooks"
    if torch.nn.modules.module._has_any_global_hook():
        return "there are hooks on every module"
    return None


def no_parameter(module: nn.Module, name: str) -> str | None:
    """Why ``module.name`` is not a parameter of the module's own, a dense one or None; None where it is."""
    if name not in module._parameters:  # but a property, or an attribute that something sets
        return f"its {name} is computed from something else"
    kind = type(module._parameters[name])
    return None if kind in _PLAIN_TENSORS else f"its {name} is a {kind.__name__}"


# FakeTensor stands for a plain one in torch.export.
_PLAIN_TENSORS = (nn.Parameter, Tensor, torch._subclasses.fake_tensor.FakeTensor, type(None))


_Function = TypeVar("_Function", bound=Callable[..., Any])


def assume_constant_result(function: _Function) -> _Function:
    """torch.compiler.assume_constant_result, which would import all of torch._dynamo with this package."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


# --- registration -----------------------------------------------------------------------------------------------------


def raise_on_double_backward(op: str) -> None:
    """Give `fastgpt::op`, which computes a gradient, a derivative that says there is none.

    Without one, PyTorch would treat the op's result as a constant, and a second derivative would be silently wrong.
    """

    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        pass

    def backward(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(
            f"fastgpt::{op} is a gradient and has none of its own: double backward is not supported; "
            "the formulas of fastgpt.ops.reference have every derivative"
        )

    torch.library.register_autograd(f"fastgpt::{op}", backward, setup_context=setup_context, lib=library)


def register_autograd(
    op: str, backward: Callable[..., Any], setup_context: Callable[[Any, tuple, Any], None], first_only: bool = False
) -> Callable[..., Any]:
    """Give `fastgpt::op` its derivative, and return what to call it by.

    At the dispatcher, for torch.compile and everybody who calls torch.ops.fastgpt directly. Plain eager code takes the
    same forward and backward through an autograd.Function, which costs less.

    `first_only`: the other outputs are for backward, and have no gradient. What is returned gives the first alone: each
    output of an autograd.Function costs something.
    """

    def setup_all(ctx: Any, inputs: tuple, output: Any) -> None:
        if first_only:
            ctx.mark_non_differentiable(*output[1:])
            ctx.set_materialize_grads(False)  # or autograd fills zeros for them, as large as they are
        setup_context(ctx, inputs, output)

    torch.library.register_autograd(f"fastgpt::{op}", backward, setup_context=setup_all, lib=library)
    run = getattr(torch.ops.fastgpt, op).default

    def forward(ctx: Any, *args: Any) -> Any:
        output = below_autograd(run, *args)
        setup_context(ctx, args, output)
        return output[0] if first_only else output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    apply = _apply_of(type(op, (torch.autograd.Function,), methods))

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            output = run(*args)
        elif torch.is_grad_enabled() and _any_requires_grad(args):
            return apply(*args)
        else:
            output = below_autograd(run, *args)
        return output[0] if first_only else output

    return call


def refuse_forward_mode(op: str, *tensors: Tensor | None) -> None:
    """Raise where forward-mode AD (`torch.func.jvp`) reaches a registered op: PyTorch takes its derivative for 0."""
    if not in_forward_mode():
        return
    unknown = torch.compiler.is_compiling()  # a tensor that is being traced shows no tangent
    for tensor in tensors:
        if tensor is not None and (unknown or torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None):
            raise NotImplementedError(
                f"{op}: forward-mode derivatives are not supported; the formulas of fastgpt.ops.reference have them"
            )


def in_dispatch_mode() -> bool:
    """Whether a mode watches every op that is called: a FLOP counter, a profiler of ops, fake tensors."""
    return torch._C._len_torch_dispatch_stack() > 0
