"""Errors as OpenAI's clients read them."""

from __future__ import annotations

import json

import pytest

from fastgpt.serve.errors import ApiError, busy, wrong_value


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, "invalid_request_error"), (404, "invalid_request_error"), (401, "authentication_error"),
     (429, "rate_limit_error"), (500, "server_error"), (504, "server_error")],
)  # fmt: skip
def test_the_body_has_the_four_fields(status, kind):
    error = ApiError(status, "what is wrong", param="n", code="a_code")
    assert error.body() == {"error": {"message": "what is wrong", "type": kind, "param": "n", "code": "a_code"}}


def test_an_error_that_names_a_field_has_it_as_param():
    assert wrong_value(ValueError("top_k: expected an integer")).param == "top_k"
    assert wrong_value(ValueError("no colon")).param is None
    assert wrong_value(ValueError("two words: and a colon")).param is None


def test_busy_says_when_to_come_again():
    assert busy("later").status == 429 and busy("later").headers == {"Retry-After": "1"}


def test_half_a_surrogate_pair_can_be_told():
    json.dumps(ApiError(400, "got '\ud800'", param="\ud800").body(), ensure_ascii=False).encode()
