"""The cache of keys and values: its dtype and device, and the errors of its wrong uses."""

from __future__ import annotations

import pytest
import torch

from altered_models import CFG, IDX, built
from fastgpt import GPT


def test_the_cache_takes_its_dtype_from_the_keys() -> None:
    model = built().float().eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        cache = model.new_cache(3)
        pieces = [model.hidden(part, cache) for part in IDX.split([3, 1, 4], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), model.hidden(IDX), rtol=0.1, atol=0.1)
    assert cache.tensor.dtype == torch.bfloat16 and cache.length == 8
    with torch.no_grad():
        cache = model.half().new_cache(3)
        model.hidden(IDX[:, :2], cache)
    assert cache.tensor.dtype == torch.float16
    with torch.no_grad(), torch.device("meta"):
        cache = GPT(CFG).new_cache(3)
        assert GPT(CFG).hidden(IDX.to("meta"), cache).device == cache.tensor.device == torch.device("meta")


def test_wrong_uses_of_the_cache_are_errors() -> None:
    model = built()
    with pytest.raises(RuntimeError, match=r"^cache: keeps no gradients; use it under torch\.no_grad\(\)"):
        model.hidden(IDX, model.new_cache(3))
    frozen = built().requires_grad_(False)
    torch.testing.assert_close(frozen.hidden(IDX, frozen.new_cache(3)), model.hidden(IDX))
    with torch.no_grad(), pytest.raises(ValueError, match=r"^cache: made for 2 sequences, got 3"):
        model.hidden(IDX, model.new_cache(2))
    with torch.inference_mode():
        cache = model.new_cache(3)
        pieces = [model.hidden(part, cache) for part in IDX.split([7, 1], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model.hidden(IDX).detach())
