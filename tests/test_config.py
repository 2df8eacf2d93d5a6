"""Settings: paths and numbers as users bring them."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastgpt.config import ConfigError, expand_path


def test_home_folders_are_expanded(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand_path("~/runs/é a") == expand_path(Path("~/runs/é a")) == tmp_path / "runs" / "é a"
    assert expand_path("~") == tmp_path
    for path in ("run", "a/~/b", "/x~", "a~"):
        assert expand_path(path) == Path(path)


def test_an_unknown_home_folder_is_refused(monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"^'~no user/run': the home folder '~no user' is not known here") as error:
        expand_path("~no user/run")
    assert "\n" not in str(error.value)
    (tmp_path / "~notes.txt").touch()
    assert expand_path("~notes.txt") == Path("~notes.txt")
