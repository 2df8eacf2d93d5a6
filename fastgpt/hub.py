"""A model by its name on the Hugging Face Hub, as "gpt2": its files are fetched once, and kept on this machine.

The library huggingface_hub does both. It need not be installed, and is imported when a name is asked for.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from pathlib import Path

from .files import FileError, expand_path

# Names without an owner, from the time before the hub had owners.
REPOSITORIES = {f"gpt2{size}": f"openai-community/gpt2{size}" for size in ("", "-medium", "-large", "-xl")}
REPOSITORIES["distilgpt2"] = "distilbert/distilgpt2"
_FILES = [
    "*.safetensors",
    "*.safetensors.index.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "tokenizer.json",
]
# "runs" is no owner: runs/demo is sampled from before there is a run, too, and the folder is then what is missing.
_OWNER_AND_NAME = re.compile(r"(?!runs/)[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def model_place(path: str | Path) -> Path:
    """The file or folder that `path` names on this machine, or else the folder of the model of that name on the hub.

    A name is one of REPOSITORIES, or "owner/name" where there is no folder "owner" here. What exists here counts before
    any name. Raises FileError where a name is given and the model cannot be fetched or is not a GPT-2. Any other path
    is given back, whether or not it exists.
    """
    place, asked = expand_path(path), os.fspath(path)
    if place.exists():
        if asked in REPOSITORIES:
            warnings.warn(
                f"{asked}: the folder {place.resolve()} is read, not the model of that name on the Hugging Face Hub",
                stacklevel=3,
            )
        return place
    repository = REPOSITORIES.get(asked)
    if repository is None and _OWNER_AND_NAME.fullmatch(asked) and not place.parent.exists():
        repository = asked
    return place if repository is None else _fetch(repository, asked)


def _fetch(repository: str, asked: str) -> Path:
    remedy = "or download the model elsewhere and give its folder"
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FileError(
            f"{asked}: is neither a file nor a folder here, and huggingface_hub, which fetches a model by its name, is "
            f"not installed: pip install huggingface_hub, {remedy}"
        ) from None
    try:
        folder = Path(snapshot_download(repository, allow_patterns=["config.json"]))
        _check_is_gpt2(folder / "config.json", repository)  # before gigabytes of another model are fetched
        snapshot_download(repository, allow_patterns=_FILES)
    except FileError:
        raise
    except Exception as error:  # those of the library, of its HTTP client, and of the operating system
        reason = " ".join([type(error).__name__, *str(error).split()])[:200]
        raise FileError(
            f"{asked}: is neither a file nor a folder here, and {repository} cannot be fetched from the Hugging Face "
            f"Hub: check the name and the connection, {remedy} ({reason})"
        ) from error
    return folder


def _check_is_gpt2(config: Path, repository: str) -> None:
    kind = json.loads(config.read_text(encoding="utf-8")).get("model_type", "gpt2")  # the first uploads do not say
    if kind not in ("gpt2", "fastgpt"):
        raise FileError(f"{repository}: is a model of type {kind!r}; FastGPT reads 'gpt2'")
