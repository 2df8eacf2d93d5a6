"""`fastgpt.patch(model)`: FastGPT's ops in a model that others wrote, and `unpatch`, which takes them out again.

A module is patched by giving the instance another class, as PyTorch's parametrizations do: a subclass of its own class,
of the same name, whose `forward` calls an op where the op computes the same. Its parameters, buffers, attributes, hooks
and the keys of its state dict are not touched, and no class and no function that another model uses is changed.
Because every module is still called, hooks run, and what wraps a module still wraps it.
"""

from __future__ import annotations

import copyreg
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import ops, patched_attention
from .modules import LINEAR, say_once, why_called
from .nn import CrossEntropyLoss, Embedding, LayerNorm, is_dense_float, why_no_embedding, why_no_layer_norm
from .ops.backend import usual
from .ops.library import attention_implementation
from .patched_attention import CallsAttention, calls_attention
from .patched_gpt2 import FusedBlock, FusedLoss, why_block_unknown, why_head_unknown


class GELU(nn.GELU):
    """torch.nn.GELU by `ops.activation`."""

    def forward(self, input: Tensor) -> Tensor:
        if not is_dense_float(input):
            return nn.GELU.forward(self, input)
        return ops.activation(input, kind="gelu_tanh" if self.approximate == "tanh" else "gelu")


class NewGELU(nn.Module):
    """Before transformers' NewGELUActivation, whose formula is that of "gelu_tanh"."""

    def forward(self, input: Tensor) -> Tensor:
        return ops.activation(input, kind="gelu_tanh") if is_dense_float(input) else super().forward(input)


class Registered(nn.Module):
    """Before a model of transformers that looks up its attention function: a pickle of it registers ours first."""


@dataclass(frozen=True)
class Rule:
    """What takes the place of a class: `base` is put before it, in a subclass of both."""

    base: type[nn.Module]
    what: str  # in the report
    op: str
    why_not: Callable[[Any], str | None] = lambda module: None  # why an instance is left alone


_RULES: dict[type[nn.Module], Rule] = {
    nn.LayerNorm: Rule(LayerNorm, "layer norm", "layer_norm", why_no_layer_norm),
    nn.Embedding: Rule(Embedding, "embedding", "embedding", why_no_embedding),
    nn.CrossEntropyLoss: Rule(CrossEntropyLoss, "loss", "cross_entropy"),
    nn.GELU: Rule(GELU, "activation", "activation"),
}
_CALLS_ATTENTION = Rule(CallsAttention, "attention, called in a forward", "attention")
TESTED_WITH = "transformers 5.24.0"
_GPT2 = "transformers.models.gpt2.modeling_gpt2"
_RULES_OF_TRANSFORMERS: dict[tuple[str, str], Rule] = {
    ("transformers.activations", "NewGELUActivation"): Rule(NewGELU, "activation", "activation"),
    (_GPT2, "GPT2Block"): Rule(
        FusedBlock, "sum and layer norm", "add_layer_norm", lambda block: why_block_unknown(type(block))
    ),
    (_GPT2, "GPT2LMHeadModel"): Rule(
        FusedLoss, "head and loss, in training", "linear_cross_entropy", lambda model: _why_no_loss(model)
    ),
}


def _why_no_loss(model: Any) -> str | None:
    reason = why_head_unknown(type(model))
    if reason is None and (called := why_called(model.lm_head, LINEAR, "weight", "bias")):
        reason = f"lm_head is called as a module ({called}), and its logits are made"
    return reason


# --- classes ----------------------------------------------------------------------------------------------------------


class _Patched:
    """What all classes have that are made here, and how their instances are copied and pickled: pickle finds a class
    by its name, and finds the one that is not patched.
    """

    _fastgpt_unpatched: Any  # the module's own class
    _fastgpt_base: Any  # what was put before it

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(max(2, protocol))
        make, arguments, *state = reduced
        if make is copyreg.__newobj__:  # type: ignore[attr-defined]
            make, arguments = _rebuild, (self._fastgpt_unpatched, self._fastgpt_base, *arguments[1:])
        return make, arguments, *state


def _rebuild(cls: Any, base: Any, *arguments: Any) -> nn.Module:
    if _is_of_transformers(cls):
        patched_attention.register()
    made: Any = patched_class(cls, base)
    return made.__new__(made, *arguments)


@functools.cache
def patched_class(cls: Any, base: Any) -> Any:
    """The subclass of `base` and `cls`. It has the name of `cls`, which tools and files of a model's settings read."""
    names = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    namespace: dict[str, Any] = names | {"_fastgpt_unpatched": cls, "_fastgpt_base": base}
    if "forward" in vars(base) and not issubclass(base, cls):
        namespace["forward"] = _forward_of(cls, base)
    return type(cls)(cls.__name__, (_Patched, base, cls), namespace)


def _forward_of(cls: type[nn.Module], base: type[nn.Module]) -> Callable[..., Any]:
    """The forward of `base`, with the signature of that of `cls`, which transformers' Trainer and generate() read.

    What wrapped the method while the model was patched, as mixed precision does, still calls it after `unpatch`.
    """

    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        taken = base if isinstance(self, base) else cls
        return taken.forward(self, *args, **kwargs)

    return forward


def _is_of_transformers(cls: type) -> bool:
    """Whether `cls` is a model of transformers, which is not imported here."""
    theirs = sys.modules.get("transformers.modeling_utils")
    return theirs is not None and issubclass(cls, theirs.PreTrainedModel)


# --- which modules ----------------------------------------------------------------------------------------------------


def _walk(module: nn.Module, name: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, nn.Module]]:
    """Every module once, with its name; not what is inside of FastGPT's own."""
    seen = set() if seen is None else seen
    if id(module) in seen:
        return
    seen.add(id(module))
    yield name, module
    if not _is_ours(module):
        for child_name, child in module.named_children():
            yield from _walk(child, f"{name}.{child_name}" if name else child_name, seen)


def _is_ours(module: nn.Module) -> bool:
    return type(module).__module__.startswith("fastgpt.")


@functools.cache
def _rule_of(cls: Any) -> Rule | None:
    rule = _RULES.get(cls) or _RULES_OF_TRANSFORMERS.get((cls.__module__, cls.__qualname__))
    return _CALLS_ATTENTION if rule is None and calls_attention(cls) else rule


def _why_left(module: nn.Module, rule: Rule) -> str | None:
    """Why a module that has a rule is left alone, or None."""
    if "forward" in module.__dict__:
        return "its forward was replaced in this instance"
    if isinstance(module, torch.jit.ScriptModule):
        return "it is compiled by TorchScript"
    return rule.why_not(module)


def _why_unknown(module: nn.Module) -> str | None:
    """In words, why a module without a rule is left alone, where one might expect that it is not."""
    cls = type(module)
    if _is_ours(module):
        return "it is FastGPT's own, and is on the ops already"
    if isinstance(module, nn.MultiheadAttention):
        return "PyTorch's own class, which calls its attention where it cannot be exchanged"
    for known in (nn.LayerNorm, nn.Embedding, nn.CrossEntropyLoss):
        if isinstance(module, known):
            return f"it is not exactly torch.nn.{known.__name__}: another class, or parametrized"
    if _is_of_transformers(cls) and hasattr(module, "lm_head"):
        return "the loss of this class is not known; that of GPT2LMHeadModel is"
    names = getattr(getattr(cls.forward, "__code__", None), "co_names", ())
    if "cross_entropy" in names and not cls.__module__.startswith(("torch.", "transformers.")):
        return "its forward calls F.cross_entropy, which is left alone; ops.linear_cross_entropy takes its place"
    return None


# --- the public functions ---------------------------------------------------------------------------------------------


class Patch:
    """What one call of `patch` changed. As a context manager it undoes this at the end; `str` is the report."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._modules: list[nn.Module] = []
        self._attention: list[Any] = []
        self._patched_before: list[Any] = []  # models within this one, which another patch keeps

    @property
    def report(self) -> Report:
        """What is in use in the model now, and what is left alone, with the reason."""
        return explain(self.model)

    def __str__(self) -> str:
        return str(self.report)

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *exc: object) -> None:
        _restore(self._modules, self._attention)
        if self._attention:  # the name in a model's config is also given to the models within it
            for inner in self._patched_before:
                inner.set_attn_implementation(patched_attention.NAME)
        self._modules, self._attention, self._patched_before = [], [], []


def patch(model: nn.Module, *, keep_logits: bool = False) -> Patch:
    """Take FastGPT's ops in `model`, a transformers GPT-2 or any model made of PyTorch's layers, until `unpatch`.

    Replaced are torch.nn.LayerNorm, Embedding, CrossEntropyLoss and GELU, calls of F.scaled_dot_product_attention in a
    module's own forward, attention that is looked up in transformers' registry, and in transformers' GPT-2 also its
    activation, the sum before a block's second norm, and head and loss of a training step, whose output then has no
    logits. `print(fastgpt.patch(model))` says what was replaced, and what was left alone and why. Whatever is not known
    is left alone; a model of which nothing is known raises no error, and a warning says so once. Outputs and gradients
    are those of the model up to rounding; the masks of dropout are others.

    Args:
        model: changed in place: classes of its modules, and the name of its attention function in its config.
        keep_logits: True leaves GPT-2's head and loss alone, so that the output of a training step has its logits.

    Raises: TypeError naming the argument.

    >>> with fastgpt.patch(model):
    ...     trainer.train()
    """
    _check_module(model)
    if not isinstance(keep_logits, bool):
        raise TypeError(f"keep_logits: expected True or False, got {keep_logits!r}")
    made = Patch(model)
    found = [module for _, module in _walk(model)]
    made._patched_before = [
        module
        for module in found
        if _is_of_transformers(type(module)) and attention_implementation(module) == patched_attention.NAME
    ]
    for module in found:  # while the classes are still their own, because transformers reads the code of their files
        if _is_of_transformers(type(module)) and _exchange_attention(module):
            made._attention.append(module)
    for module in found:
        if _exchange_class(module, keep_logits):
            made._modules.append(module)
    if not any(isinstance(module, _Patched) for module in found):
        name = type(model).__name__
        say_once(f"patch changes nothing in this {name}", "print(fastgpt.explain(model)) says why")
    return made


def unpatch(model: nn.Module) -> None:
    """Undo `patch`: every module has its class again, and the config the name of its attention function.

    Raises: TypeError for an argument that is no module; ValueError where something else has changed the class of a
    module after `patch`, as parametrizations do; nothing is undone then.
    """
    _check_module(model)
    found = [module for _, module in _walk(model)]
    attention = [module for module in found if _is_of_transformers(type(module))]
    _restore([module for module in found if isinstance(module, _Patched)], attention)


def _check_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def _exchange_class(module: nn.Module, keep_logits: bool) -> bool:
    cls: Any = type(module)
    if isinstance(module, _Patched) or _is_ours(module):
        return False
    rule = _rule_of(cls)
    base: Any = None if rule is None or _why_left(module, rule) else rule.base
    if base is FusedLoss and keep_logits:
        base = None
    if base is None and _is_of_transformers(cls) and attention_implementation(module) == patched_attention.NAME:
        base = Registered
    if base is None:
        return False
    module.__class__ = patched_class(cls, base)
    return True


def _exchange_attention(model: Any) -> bool:
    if _why_attention_left(model) is not None or attention_implementation(model) == patched_attention.NAME:
        return False
    patched_attention.register()
    model.set_attn_implementation(patched_attention.NAME)
    return attention_implementation(model) == patched_attention.NAME


def _why_attention_left(model: Any) -> str | None:
    name = attention_implementation(model)
    if name not in (patched_attention.NAME, patched_attention.PYTORCHS):
        return f"its attention is {name!r}; only 'sdpa' is replaced, which model.set_attn_implementation('sdpa') takes"
    if getattr(model.config, "sub_configs", None):
        return "it is made of several models, each with a config of its own"
    return None


def _restore(modules: list[nn.Module], attention: list[Any]) -> None:
    for module in modules:
        if isinstance(module, _Patched) and "_fastgpt_unpatched" not in vars(type(module)):
            name = type(module).__name__
            raise ValueError(f"model: something has changed the class of a {name} after it was patched; undo it first")
    for module in modules:
        if isinstance(module, _Patched):
            module.__class__ = module._fastgpt_unpatched
    for model in attention:
        if attention_implementation(model) == patched_attention.NAME:
            model.set_attn_implementation(patched_attention.PYTORCHS)


# --- the report -------------------------------------------------------------------------------------------------------


@dataclass
class Report:
    """What is in use in a model. The lists have the names of modules; `left` has reasons as keys.

    `used`: what was replaced, with the op that took its place. `unused`: what `patch` would replace.
    """

    model: str
    device: str
    used: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    unused: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    left: dict[str, list[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.model} on {self.device}"]
        for title, found in (("by FastGPT", self.used), ("not patched", self.unused)):
            for (what, op), names in found.items():
                lines.append(f"  {title}: {what}, {_count(names)}: ops.{op}, mostly on {usual(op, self.device)}")
        lines += [f"  left alone: {_count(names)}: {reason}" for reason, names in self.left.items()]
        return "\n".join(lines if len(lines) > 1 else [*lines, "  left alone: nothing in it is known"])


def _count(names: list[str]) -> str:
    first = names[0] or "the model itself"
    return first if len(names) == 1 else f"{len(names)} modules ({first}, ...)"


def explain(model: nn.Module) -> Report:
    """What FastGPT's ops do in `model`, what `patch` would make them do, and what it leaves alone, with the reason.

    Raises: TypeError where `model` is no module.
    """
    _check_module(model)
    parameter = next(model.parameters(), None)
    report = Report(type(model).__name__, "cpu" if parameter is None else parameter.device.type)
    configs: set[int] = set()  # a model and the one inside of it share theirs
    for name, module in _walk(model):
        _explain_class(report, name, module)
        if _is_of_transformers(type(module)) and id(module.config) not in configs:
            configs.add(id(module.config))
            _explain_attention(report, name, module)
    return report


def _explain_class(report: Report, name: str, module: nn.Module) -> None:
    is_patched = isinstance(module, _Patched)
    cls: Any = module._fastgpt_unpatched if is_patched else type(module)
    rule = None if _is_ours(module) else _rule_of(cls)
    if is_patched and module._fastgpt_base is not Registered:
        assert rule is not None
        report.used.setdefault((rule.what, rule.op), []).append(name)
        return
    reason = _why_unknown(module) if rule is None else _why_left(module, rule)
    if reason is None and is_patched and rule is not None:
        reason = "keep_logits=True leaves its head and loss alone"
    if reason is not None:
        report.left.setdefault(reason, []).append(name)
    elif rule is not None:
        report.unused.setdefault((rule.what, rule.op), []).append(name)


def _explain_attention(report: Report, name: str, model: Any) -> None:
    what = ("attention without a mask, by transformers' registry", "attention")
    reason = _why_attention_left(model)
    if reason is not None:
        report.left.setdefault(reason, []).append(name)
    elif attention_implementation(model) == patched_attention.NAME:
        report.used.setdefault(what, []).append(name)
    else:
        report.unused.setdefault(what, []).append(name)
