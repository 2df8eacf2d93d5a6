"""A server of completions as small as can be, for the tests of the page."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import torch

from fastgpt.generate import next_token
from fastgpt.serve import page


class Engine:
    async def call(self, function: Any, *args: Any) -> Any:
        return function(*args)  # between two tokens


def app_of(model: Any, tokenizer: Any, *, name: str, run: Any = None) -> Any:
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse, StreamingResponse
    from starlette.routing import Route

    async def completions(request):
        asked = await request.json()

        async def drawn():
            generator = torch.Generator().manual_seed(asked["seed"])
            idx = torch.tensor([tokenizer.encode(asked["prompt"])])
            for _ in range(asked["max_tokens"]):
                with torch.no_grad():
                    logits = model.next_logits(idx[:, -model.cfg.block_size :])
                token = next_token(logits, asked["temperature"], asked.get("top_k"), asked["top_p"], generator)
                idx = torch.cat([idx, token], dim=1)
                logprobs = logits[0].log_softmax(-1)
                text = tokenizer.decode([int(token)])
                top = {tokenizer.decode([i]): float(logprobs[i]) for i in logprobs.topk(5).indices.tolist()}
                found = {"tokens": [text], "token_logprobs": [float(logprobs[token])], "top_logprobs": [top]}
                yield event({"text": text, "logprobs": found, "finish_reason": None})
                await asyncio.sleep(0)
            yield event({"text": "", "logprobs": None, "finish_reason": "length"})
            yield "data: [DONE]\n\n"

        return StreamingResponse(drawn(), media_type="text/event-stream")

    def event(choice: dict[str, Any]) -> str:
        return f"data: {json.dumps({'choices': [choice]})}\n\n"

    def refused(request, error):
        return JSONResponse({"error": {"message": str(error)}}, status_code=400)

    routes = [Route("/v1/completions", completions, methods=["POST"])]
    routes += page.routes(model, tokenizer, Engine(), name=name, run=run)
    return Starlette(routes=routes, exception_handlers={ValueError: refused})
