"""Private names: used in one file, listed there with the versions they were seen in, and still there today."""

from __future__ import annotations

import ast
import operator

import pytest
import torch

from fastgpt.ops import library
from names_in_source import FILES, NEEDS_SOURCE, ROOT, dotted, names_used, parse

LIBRARY = ROOT / "fastgpt" / "ops" / "library.py"
DOCUMENTED = {"_asdict", "_exit", "_fields", "_replace"}  # os._exit, and of named tuples


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name not in DOCUMENTED


def own_names(trees: list[ast.AST]) -> set[str]:
    """Private names that this project gives itself: functions, classes, fields, and what it stores in `self`."""
    own = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            own.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
        elif isinstance(node, ast.alias) and node.asname:
            own.add(node.asname)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and dotted(node.value) == "self":
            own.add(node.attr)
    return own


def private_names(tree: ast.AST, own: set[str]) -> dict[str, int]:
    """The names of others in `tree` that have a private part, each with a line."""
    names = names_used(tree)
    return {name: line for line, name in names if any(is_private(part) and part not in own for part in name.split("."))}


def test_private_names_are_found_however_they_are_reached() -> None:
    source = """
import torch._dynamo
import os as _os
from torch._subclasses.fake_tensor import FakeTensor
_ours = torch.nn.modules.module._global_forward_hooks
self._mine = getattr(module, "_backward_hooks", None) or self._modules
setattr(f, "_mark", _ours._mine), pair._replace(a=1), x.__dict__, _os.path
"""
    tree = ast.parse(source)
    assert private_names(tree, own_names([tree])) == {
        "torch._dynamo": 2,
        "torch._subclasses.fake_tensor.FakeTensor": 4,
        "torch.nn.modules.module._global_forward_hooks": 5,
        "module._backward_hooks": 6,
        "self._modules": 6,
        "f._mark": 7,
    }


@NEEDS_SOURCE
def test_private_names_stand_in_one_file() -> None:
    own = own_names([parse(file) for file in FILES])
    elsewhere = [
        f"{file.relative_to(ROOT)}:{line}: {name}"
        for file in FILES
        if file != LIBRARY
        for name, line in private_names(parse(file), own).items()
    ]
    assert not elsewhere, "private names of other packages belong into fastgpt/ops/library.py: " + ", ".join(elsewhere)


@NEEDS_SOURCE
def test_the_list_is_complete_and_has_no_stale_name() -> None:
    used = set(private_names(parse(LIBRARY), own_names([parse(LIBRARY)])))
    used = {"_dynamo_marked_constant" if name.endswith("._dynamo_marked_constant") else name for name in used}
    reached_by_super = {"torch.autograd.function._SingleLevelFunction.apply"}
    assert used | reached_by_super == set(library.PRIVATE_NAMES)


@pytest.mark.parametrize("name", [name for name in library.PRIVATE_NAMES if name.startswith("torch.")])
def test_torch_has(name: str) -> None:
    oldest, newest = library.PRIVATE_NAMES[name]
    try:
        operator.attrgetter(name.removeprefix("torch."))(torch)
    except AttributeError:
        pytest.fail(f"torch {torch.__version__} has no {name}, which torch {oldest} to {newest} had: see {LIBRARY}")


@pytest.mark.parametrize("name", [name for name in library.PRIVATE_NAMES if name.startswith("module.")])
def test_a_module_has(name: str) -> None:
    module = torch.nn.Linear(1, 1)
    assert isinstance(getattr(module, name.removeprefix("module."), None), dict), f"no {name} in {torch.__version__}"


def test_hooks_of_a_module_are_seen() -> None:
    def hook(*args): ...

    ways = ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook")
    for way in ways:
        module = torch.nn.Linear(1, 1)
        handle = getattr(module, f"register_{way}")(hook)
        assert library.hooks_of(module) == "it has hooks"
        handle.remove()
        handle = getattr(torch.nn.modules.module, f"register_module_{way}")(hook)
        assert library.hooks_of(module) == "there are hooks on every module"
        handle.remove()
        assert library.hooks_of(module) is None


def test_torch_marks_constant_functions_as_we_do() -> None:
    def ours(): ...
    def theirs(): ...

    library.assume_constant_result(ours)
    torch.compiler.assume_constant_result(theirs)
    assert vars(ours) == vars(theirs), "torch.compiler.assume_constant_result has changed: see fastgpt/ops/library.py"


def test_apply_of_a_function_is_the_one_that_functions_end_in() -> None:
    single = torch.autograd.function._SingleLevelFunction
    assert torch.autograd.Function.__mro__[1] is single, "the class below torch.autograd.Function is another one"
    function = type("double", (torch.autograd.Function,), {"forward": staticmethod(lambda ctx, x: x * 2)})
    assert library._apply_of(function)(torch.ones(2)).tolist() == [2.0, 2.0]
