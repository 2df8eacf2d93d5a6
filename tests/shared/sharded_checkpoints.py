"""A sharded checkpoint without the processes that write one: the format, by hand."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from fastgpt.checkpoint import Checkpoint


def write_sharded(saved: Checkpoint, path: Path, n: int = 2, is_best: bool = False) -> Path:
    """The directory `path` as `n` processes would write it that have a part of the rows of each tensor."""
    path.mkdir(parents=True)
    sizes = {}
    for shard in range(n):
        tensors, places = {}, {}
        for number, (name, tensor) in enumerate(saved.tensors.items()):
            offsets = [0] * tensor.ndim
            if tensor.ndim == 0:
                if shard != number % n:
                    continue
            else:
                rows = -(-tensor.shape[0] // n)
                offsets[0] = min(shard * rows, tensor.shape[0])
                tensor = tensor[offsets[0] : offsets[0] + rows]
            tensors[name], places[name] = tensor.detach().clone().contiguous(), {"saved_offsets": offsets}
        file = path / f"shard-{shard + 1:05d}-model-00001-of-00001.safetensors"
        save_file(tensors, file, {"DCP_SHARDING_INFO": json.dumps(places), "DCP_VERSION": "1.0", "format": "pt"})
        sizes[file.name] = file.stat().st_size
    settings = saved.settings() | {"is_best": is_best, "shards": sizes}
    (path / "checkpoint.json").write_text(json.dumps(settings))
    return path
