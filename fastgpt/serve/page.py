"""The page of `fastgpt serve`, and what it asks for besides completions: facts, attention maps, the loss curve.

The page is plain files in static/, which need no other host. It gets its text from /v1/completions, like any client.

    GET  /                  the page; /static/... its style and its scripts
    GET  /page/model        what is served, and the facts that the page shows
    POST /page/attention    {"text", "layer", "head"}: which tokens of the text's end that head attends to
    POST /page/context      {"text"}: as much of the text's end as a prompt may have
    GET  /page/curve        the losses in the run's metrics.jsonl
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..attention_maps import weights_of_head
from ..config import as_int_argument
from ..generate_text import prompt_tokens
from ..language_model import LanguageModel
from ..model import GPT
from ..ops import backend
from ..report import counted
from ..tokenizer import Tokenizer, label
from ..training import TrainingError
from ..training.run_folder import read_metrics

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

MOST_SHOWN = 64  # tokens of an attention map
MAKERS = {"native": "Native kernels", "triton": "Triton kernels", "torch": "By PyTorch"}
MOST_POINTS = 2000  # rows of a long run's training losses

TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
# Nothing but what this server has, and no script or style inside the page: what a model writes cannot become either.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def routes(
    model: LanguageModel, tokenizer: Tokenizer, engine: Any, *, name: str, run: Path | None = None, max_tokens: int = 0
) -> list[Route]:
    """The routes of the page for a `model` that is served under `name`, trained in the folder `run` if there is one.

    `engine.call(function, *args)` runs a function where no token is computed meanwhile. `max_tokens` is the most that a
    completion may have, 0 for no limit. A wrong request raises ValueError naming the field.
    """
    from starlette.concurrency import run_in_threadpool
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    described = describe(model, tokenizer, name, max_tokens)

    def facts(request: Request) -> Response:
        return JSONResponse(described)

    async def attention(request: Request) -> Response:
        text, layer, head = asked_map(request.scope["json"])
        idx = await run_in_threadpool(last_tokens, model, tokenizer, text)
        return JSONResponse(await engine.call(attention_map, model, tokenizer, idx, layer, head))

    async def context(request: Request) -> Response:
        text = asked_text(request.scope["json"])
        return JSONResponse({"text": await run_in_threadpool(fitting, model, tokenizer, text)})

    def losses(request: Request) -> Response:
        return JSONResponse(curve(run))

    return [
        *(Route(path, _file(content, kind)) for path, content, kind in files()),
        Route("/page/model", facts),
        Route("/page/attention", attention, methods=["POST"]),
        Route("/page/context", context, methods=["POST"]),
        Route("/page/curve", losses),
    ]


# ---- the files of the page ----


def files() -> list[tuple[str, bytes, str]]:
    """(path on the server, content, media type) of each file in static/."""
    found = []
    for file in sorted(resources.files(__package__).joinpath("static").iterdir(), key=lambda file: file.name):
        if (suffix := Path(file.name).suffix) in TYPES:
            path = "/" if file.name == "index.html" else f"/static/{file.name}"
            found.append((path, file.read_bytes(), TYPES[suffix]))
    return found


def _file(content: bytes, kind: str) -> Callable[[Request], Response]:
    from starlette.responses import Response

    return lambda request: Response(content, media_type=f"{kind}; charset=utf-8", headers=HEADERS)


# ---- facts ----


def describe(model: LanguageModel, tokenizer: Tokenizer, name: str, max_tokens: int = 0) -> dict[str, Any]:
    """What the page shows of the model and offers for it."""
    cfg, device = model.cfg, next(model.parameters()).device
    has_attention = isinstance(model, GPT)
    prompt, hint = first_prompt(tokenizer, model.layout)
    if model.context_size is not None:
        hint += f" It sees the last {counted(model.context_size, 'token')} at most."
    return {
        "name": name,
        "kind": model.kind,
        "parameters": model.num_parameters(),
        "device": str(device),
        "context_size": model.context_size,
        "end": None if tokenizer.end_of_text is None else tokenizer.decode([tokenizer.end_of_text]),
        "has_attention": has_attention,
        "n_layer": cfg.n_layer if has_attention else 0,
        "n_head": cfg.n_head if has_attention else 0,
        "max_tokens": max_tokens,
        "prompt": prompt,
        "prompt_hint": hint,
        "facts": list(_facts(model, tokenizer, device)),
    }


def _facts(model: LanguageModel, tokenizer: Tokenizer, device: torch.device) -> Iterator[tuple[str, str]]:
    """Terms and what they are, in the order in which they are shown."""
    cfg = model.cfg
    yield "Kind", model.kind
    yield "Parameters", f"{model.num_parameters():,}"
    if isinstance(model, GPT):
        yield "Shape", f"{counted(cfg.n_layer, 'layer')} of {counted(cfg.n_head, 'head')}, width {cfg.n_embd}"
    elif model.context_size is None:  # a recurrent model
        yield "Shape", f"{counted(cfg.n_layer, 'layer')}, width {cfg.n_embd}"
    yield "Context", "all of the text" if model.context_size is None else counted(model.context_size, "token")
    words = {"char": "characters", "bpe": "byte pairs"}
    yield "Vocabulary", f"{tokenizer.vocab_size:,} {words.get(tokenizer.kind, tokenizer.kind)}"
    threads = f", {counted(torch.get_num_threads(), 'thread')}" if device.type == "cpu" else ""
    yield "Device", f"{device}{threads}, {next(model.parameters()).dtype}".replace("torch.", "")
    ops_of: dict[str, list[str]] = {}
    for op in backend.OPS:
        ops_of.setdefault(backend.usual(op, device.type), []).append(op)
    for maker, ops in sorted(ops_of.items(), key=lambda item: -len(item[1])):
        yield MAKERS[maker], ", ".join(op.replace("_", " ") for op in ops)


def first_prompt(tokenizer: Tokenizer, layout: str) -> tuple[str, str]:
    """The prompt that stands for an empty one, and what to tell a reader of prompts."""
    prompt = "\n"
    try:
        tokenizer.encode(prompt)
    except ValueError:  # trained on a text of one line
        prompt = label(tokenizer, 0)
    begins = "begins a new line" if prompt == "\n" else f"begins with “{prompt}”"
    hints = {
        "names": "The model goes on with the last line. Left empty, it begins a new name.",
        "completions": "The model completes prompts like those that it was trained on.",
    }
    return prompt, hints.get(layout, f"The model goes on from here. Left empty, it {begins}.")


# ---- the end of a text ----


def asked_text(body: Any) -> str:
    """The text in a request. Raises ValueError naming what is wrong."""
    if not isinstance(body, dict):
        raise ValueError("body: expected a JSON object")
    if not isinstance(text := body.get("text"), str):
        raise ValueError("text: expected a string")
    return text


def last_tokens(model: LanguageModel, tokenizer: Tokenizer, text: str) -> torch.Tensor:
    """The tokens (1, T) at the end of `text`, as many as the model sees. Raises ValueError naming `text`."""
    try:
        idx = prompt_tokens(tokenizer, text, model.layout)
    except ValueError as error:
        raise ValueError(str(error).replace("prompt:", "text:", 1)) from None
    return idx if model.context_size is None else idx[:, -model.context_size :]


def fitting(model: LanguageModel, tokenizer: Tokenizer, text: str) -> str:
    """The end of `text` that is a prompt of no more tokens than the model sees. Raises ValueError naming `text`."""
    ids, limit = last_tokens(model, tokenizer, text)[0].tolist(), model.context_size
    if limit is None or len(ids) < limit:
        return text
    for begin in range(len(ids)):  # more than once where a cut makes other tokens of the beginning
        end = tokenizer.decode(ids[begin:]).lstrip("\ufffd")  # the rest of a character that was cut
        if end and prompt_tokens(tokenizer, end, model.layout).shape[1] <= limit:
            return end
    return text


# ---- attention ----


def asked_map(body: Any) -> tuple[str, int, int]:
    """Text, layer and head of a request. Raises ValueError naming the field."""
    text = asked_text(body)
    layer, head = (as_int_argument(name, body.get(name)) for name in ("layer", "head"))
    return text, layer, head


def attention_map(
    model: LanguageModel, tokenizer: Tokenizer, idx: torch.Tensor, layer: int, head: int
) -> dict[str, Any]:
    """The weights of one head for the tokens idx (1, T), of which the last 64 are shown.

    Returns their labels, the place of the first of them in the context, counted from 1, and the weights, a row for each
    token, of four decimals. A row sums to 1 less what goes to tokens that are not shown. Layers and heads are counted
    from 1. Raises ValueError naming the argument.
    """
    if not isinstance(model, GPT):
        raise ValueError(f"model: one of kind {model.kind!r} has no attention")
    skipped = max(idx.shape[1] - MOST_SHOWN, 0)
    weights = weights_of_head(model, idx, layer, head)[skipped:, skipped:]
    if not weights.isfinite().all():
        raise ValueError("model: its attention weights are not finite numbers")
    return {
        "layer": layer,
        "head": head,
        "is_causal": model.cfg.is_causal,
        "first": skipped + 1,
        "labels": [label(tokenizer, token) for token in idx[0, skipped:].tolist()],
        "weights": [[round(share, 4) for share in row] for row in weights.tolist()],
    }


# ---- the loss ----


def curve(run: Path | None) -> dict[str, Any]:
    """The step, split and loss of each row of the run's metrics, or why there is none. Of a long run every n-th."""
    path = None if run is None else run / "metrics.jsonl"
    if path is None or not path.is_file():
        return {"rows": [], "why": "This model comes without the metrics of a run, so there is no curve."}
    try:
        rows = read_metrics(path)
    except (TrainingError, OSError) as error:
        return {"rows": [], "why": f"The metrics of the run cannot be read: {error}"}
    names = ("step", "split", "loss")
    kept = [{name: row[name] for name in names} for row in rows if math.isfinite(row.get("loss") or math.nan)]
    thinned: list[dict[str, Any]] = []
    for split in ("train", "val"):
        of_split = [row for row in kept if row["split"] == split]
        every = -(-len(of_split) // MOST_POINTS) or 1
        thinned += of_split[::-every][::-1]  # counted from the last, which is kept
    why = None if thinned else "This run has no losses yet."
    return {"rows": thinned, "why": why}
