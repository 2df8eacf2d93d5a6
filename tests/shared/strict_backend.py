"""Tests of one backend's kernels through calls that name no backend: none of them may be served by another one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from fastgpt.ops import backend


@contextlib.contextmanager
def only_on(name: str) -> Iterator[None]:
    """Prefer the backend `name`; a call that could run on it, names no backend and takes another one is an error."""
    choose = backend.choose

    def strictly(op: str, asked_for: str, *rest: Any) -> tuple[str, dict[str, str]]:
        taken, reasons = choose(op, asked_for, *rest)
        is_free = asked_for == "auto" and backend.implements(name, op)
        assert not is_free or taken == name, f"{op} does not run on {name}: {reasons}"
        return taken, reasons

    with backend.use_backend(name), pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "choose", strictly)
        yield
