"""The tokenizer in a model's folder: the files that Hugging Face's libraries write and read.

`write_tokenizer` writes tokenizer.json, which says how a text is cut and what each token is, and
tokenizer_config.json, which says how `transformers.AutoTokenizer` opens it. Both tokenizers of FastGPT fit this format:
one id a character is a vocabulary of words ("WordLevel") over a text that is cut behind every character.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .files import atomic_path, expand_path
from .tokenizer import (
    BPETokenizer,
    CharTokenizer,
    Tokenizer,
    json_object,
    naming,
    read_json,
    tokenizer_from_json,
    tokens_by_id,
)

_ANY_CHARACTER = r"[\s\S]"
_OTHER_FILES = ("vocab.json", "merges.txt", "added_tokens.json")  # these say the same as tokenizer.json


def write_tokenizer(folder: str | Path, tokenizer: Tokenizer, block_size: int) -> None:
    """Write tokenizer.json and tokenizer_config.json. `block_size` is the most tokens that the model reads.

    Files in which the folder has another tokenizer, spelled another way, are removed: it would be read instead.
    """
    folder = expand_path(folder)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # as it is: GPT2Tokenizer would add a token of its own
        "model_max_length": block_size,
        "clean_up_tokenization_spaces": False,  # which would change the text that is decoded
    }
    if tokenizer.end_of_text is not None:
        config |= dict.fromkeys(("bos_token", "eos_token"), tokenizer.decode([tokenizer.end_of_text]))
    for name, data in (("tokenizer.json", _as_json(tokenizer)), ("tokenizer_config.json", config)):
        with atomic_path(folder / name) as temporary:
            temporary.write_text(json.dumps(data, ensure_ascii=False) + "\n", encoding="utf-8")
    for name in _OTHER_FILES:
        (folder / name).unlink(missing_ok=True)


def read_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a model's folder: what `write_tokenizer` wrote, or the files of a GPT-2 (`from_gpt2_files`).

    Or that of a folder which `fastgpt data prepare` wrote, so that further texts get the same tokens.

    Raises ValueError naming the file and what is wrong with it, or the files that are missing.
    """
    file = expand_path(folder) / "tokenizer.json"
    if file.is_file():
        data = read_json(file)
        if "kind" in data:  # as to_json() writes it into a prepared folder
            with naming(file):
                return tokenizer_from_json(json.dumps(data))
        model, splitter = json_object(data, "model"), json_object(data, "pre_tokenizer")
        if model.get("type") == "WordLevel" and splitter.get("pattern") == {"Regex": _ANY_CHARACTER}:
            with naming(file):
                return _read_characters(model.get("vocab"))
    return BPETokenizer.from_gpt2_files(folder)


def _read_characters(vocab: Any) -> CharTokenizer:
    characters = tokens_by_id(vocab)
    longer = next((token for token in characters if len(token) != 1), None)
    if longer is not None:
        raise ValueError(f"the token {longer!r} is not one character, as each token of this tokenizer is")
    return CharTokenizer("".join(characters))


def _as_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of tokenizer.json. A character that is not in the vocabulary is an error there, too."""
    data: dict[str, Any] = {"version": "1.0", "truncation": None, "padding": None, "normalizer": None}
    if isinstance(tokenizer, CharTokenizer):
        pattern = {"Regex": _ANY_CHARACTER}
        vocab = {character: i for i, character in enumerate(tokenizer.chars)}
        return data | {
            "added_tokens": [],
            "pre_tokenizer": {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False},
            "post_processor": None,
            "decoder": {"type": "Fuse"},
            "model": {"type": "WordLevel", "vocab": vocab, "unk_token": ""},
        }
    if isinstance(tokenizer, BPETokenizer):
        vocab = {token: i for i, token in enumerate(tokenizer.vocab)}
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        special = sorted(tokenizer.special_tokens.items(), key=lambda item: item[1])
        return data | {
            "added_tokens": [{"id": i, "content": token, **flags} for token, i in special],
            "pre_tokenizer": byte_level,
            "post_processor": None,
            "decoder": byte_level,
            "model": {"type": "BPE", "vocab": vocab, "merges": [" ".join(pair) for pair in tokenizer.merges]},
        }
    raise ValueError(f"tokenizer: expected a CharTokenizer or a BPETokenizer, got {type(tokenizer).__name__}")
