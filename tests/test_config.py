"""Settings: numbers as users bring them."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import tomli_w
import torch

from fastgpt.config import ConfigError, GPTConfig, TrainConfig


def equal_and_plain(config, expected) -> bool:
    """Equal, of Python's own types, and what the files hold of it is read back as the same."""
    plain = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    assert all(type(v) in (int, float, bool, str, type(None)) for v in plain.values())
    assert json.loads(json.dumps(plain)) == plain
    toml = {name: value for name, value in plain.items() if value is not None}
    assert tomllib.loads(tomli_w.dumps(toml)) == toml
    return config == expected


def test_numbers_of_other_libraries() -> None:
    class Eleven:
        def __index__(self) -> int:
            return 11

    for three in (np.int64(3), np.uint8(3), np.array(3), torch.tensor(3)):
        config = GPTConfig(vocab_size=Eleven(), n_head=three, n_embd=3 * three, bias=np.bool_(False))
        assert equal_and_plain(config, GPTConfig(vocab_size=11, n_head=3, n_embd=9, bias=False))
    for quarter in (np.float32(0.25), np.float16(0.25), Fraction(1, 4), Decimal("0.25"), torch.tensor(0.25)):
        assert equal_and_plain(GPTConfig(dropout=quarter), GPTConfig(dropout=0.25))
        assert equal_and_plain(
            TrainConfig(target_loss=quarter, seed=np.uint64(2**62)), TrainConfig(target_loss=0.25, seed=2**62)
        )
    assert equal_and_plain(TrainConfig(lr=np.int8(1)), TrainConfig(lr=1.0))
    assert equal_and_plain(GPTConfig(norm=np.str_("post")), GPTConfig(norm="post"))


@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [
        ("n_layer", True, "an integer"),
        ("n_layer", np.bool_(True), "an integer"),
        ("n_layer", torch.tensor(True), "an integer"),
        ("n_layer", np.float64(2), "an integer"),
        ("n_layer", "2", "an integer"),
        ("n_layer", None, "an integer"),
        ("dropout", False, "a number"),
        ("dropout", 0.1j, "a number"),
        ("dropout", "0.1", "a number"),
        ("dropout", np.complex64(0), "a number"),
        ("dropout", np.float32("nan"), "a finite number"),
        ("dropout", Decimal("Infinity"), "a finite number"),
        ("dropout", 10**400, "a number"),
        ("bias", np.int64(1), "true or false"),
        ("norm", 1, "text"),
    ],
)
def test_what_is_no_such_value_is_refused(setting, value, expected) -> None:
    with pytest.raises(ConfigError, match=f"^{setting}: expected {expected}, got ") as error:
        GPTConfig(**{setting: value})
    assert repr(value) in str(error.value)
