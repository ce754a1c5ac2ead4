"""Requests drawn from the server's own OpenAPI document, valid and invalid. The document describes every response."""

import copy
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    ignored_auth,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from tests.support import servers
from tokensieve.engine import Engine, EngineConfig, Service
from tokensieve.serve.app import create_app
from tokensieve.serve.settings import ServeConfig

# Not `positive_data_acceptance`: a document cannot express that two fields exclude each other, and JSON Schema takes
# 5.0 for an integer.
CHECKS = [
    not_a_server_error,
    content_type_conformance,
    ignored_auth,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
]
KEY = {"Authorization": "Bearer a-key"}
OPERATIONS = [
    ("GET", "/health"),
    ("GET", "/metrics"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model}"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/lens"),
]


WITHOUT_DATA = ("/health", "/metrics", "/v1/models")

# Limits of the engine that are not in the document. Without them nearly every drawn request would be refused.
MODELS = {"enum": ["sparse", "sparse:dense"]}
IDS = {"type": "array", "items": {"enum": [*range(0, 4096, 37)]}, "maxItems": 80}
# refused without a second field beside them, or by this model's template
REFUSED = ("stream_options", "top_logprobs", "tools", "response_format", "thinking", "continue_final_message")
RANGES = {
    "model": MODELS,
    "n": {"const": 1},
    "max_tokens": {"type": "integer", "minimum": 1, "maximum": 3},
    "min_tokens": {"const": 0},
    "max_completion_tokens": {"type": "integer", "minimum": 1, "maximum": 3},
    "temperature": {"type": "number", "minimum": 0.01, "maximum": 100},
    "top_p": {"type": "number", "minimum": 0.01, "maximum": 1},
    "top_k": {"type": "integer", "minimum": 0, "maximum": 5000},
    "min_p": {"type": "number", "minimum": 0, "maximum": 1},
    "repetition_penalty": {"type": "number", "minimum": 0.1, "maximum": 10},
    "presence_penalty": {"type": "number", "minimum": -2, "maximum": 2},
    "frequency_penalty": {"type": "number", "minimum": -2, "maximum": 2},
    "logit_bias": {"enum": [{}, {"5": 1}, {"7": -100, "8": 2.5}]},
    "seed": {"type": "integer", "minimum": -(2**63), "maximum": 2**64 - 1},
    "stop": {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": 64},
    "prompt": {"anyOf": [{"type": "string"}, IDS]},
    "token_ids": IDS | {"minItems": 1},
}


def told(document: dict[str, Any]) -> dict[str, Any]:
    """The document without its catch-all, so that it must list every status by number; and with the served models."""
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("default", None)
            for parameter in operation.get("parameters", ()):
                parameter["schema"] = MODELS
    return document


def narrowed(document: dict[str, Any]) -> dict[str, Any]:
    schemas = document["components"]["schemas"]
    for name in ("ChatRequest", "CompletionRequest", "LensRequest"):
        properties = schemas[name]["properties"]
        schemas[name]["properties"] = {
            field: RANGES.get(field, said) for field, said in properties.items() if field not in REFUSED
        }
    schemas["Message"]["properties"] = {
        "role": {"enum": ["system", "user", "assistant"]},
        "content": {"type": "string"},
    }
    return document


@pytest.fixture(scope="module")
def api() -> Iterator[dict[GenerationMode, Any]]:
    """The documents from which valid and from which invalid requests are drawn."""
    with servers.running(
        servers.tiny(), EngineConfig(pages=64, running=16), keys=("a-key",), max_tokens=3, max_body=2**20
    ) as (at, _):
        document = told(httpx.get(at + "/openapi.json", headers=KEY).json())
        both = {
            GenerationMode.POSITIVE: schemathesis.openapi.from_dict(narrowed(copy.deepcopy(document))),
            GenerationMode.NEGATIVE: schemathesis.openapi.from_dict(document),
        }
        for loaded in both.values():
            loaded.config.update(base_url=at)
        yield both


def test_every_route_is_drawn_from(api) -> None:
    there = api[GenerationMode.NEGATIVE].get_all_operations()
    assert sorted(OPERATIONS) == sorted((o.ok().method.upper(), o.ok().path) for o in there)


def leaves(routes: list[Any]) -> Iterator[Any]:
    for route in routes:
        inside = getattr(route, "original_router", None)
        yield from [route] if inside is None else leaves(inside.routes)


def test_without_the_key_nothing_is_served(api) -> None:
    """That holds for routes in the document and for those that are not: pages, documents, the document itself."""
    model, tokenizer = servers.tiny()
    app = create_app(Service(Engine(model, tokenizer, EngineConfig(pages=4))), tokenizer, ServeConfig("sparse"))
    routes = list(leaves(app.routes))
    assert {"/", "/openapi.json", "/metrics", "/v1/chat/completions"} <= {route.path for route in routes}
    at = api[GenerationMode.POSITIVE].config.base_url
    for route in routes:
        for method in route.methods or ("GET",):
            told = httpx.request(method, at + route.path.replace("{name}", "page.js").replace("{model:path}", "sparse"))
            assert told.status_code == (200 if route.path == "/health" else 401), (method, route.path)


def fuzz(api: Any, method: str, path: str, mode: GenerationMode, examples: int, **how: Any) -> None:
    answered: Counter[int] = Counter()
    checks = [check for check in CHECKS if not (check is ignored_auth and path == "/health")]

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), **how)
    @given(case=api[mode][path][method].as_strategy(mode))
    def holds(case: Any) -> None:
        response = case.call(headers=KEY)
        answered[response.status_code] += 1
        # A body that is too large is refused before it is read, whatever it says: schemathesis expects other statuses.
        wanted = [c for c in checks if not (response.status_code == 413 and c is negative_data_rejection)]
        case.validate_response(response, checks=wanted, headers=KEY)

    holds()
    assert mode == GenerationMode.NEGATIVE or answered[200] >= answered.total() / 6, answered


MODES = [(*o, mode) for o in OPERATIONS for mode in GenerationMode if not (o[1] in WITHOUT_DATA and mode.is_negative)]


@pytest.mark.parametrize(("method", "path", "mode"), MODES)
def test_answers_are_as_documented(api, method: str, path: str, mode: GenerationMode) -> None:
    fuzz(api, method, path, mode, 12 if method == "POST" else 5, derandomize=True)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "path", "mode"), MODES)
def test_answers_are_as_documented_whatever_is_drawn(api, method: str, path: str, mode: GenerationMode) -> None:
    fuzz(api, method, path, mode, 1000 if method == "POST" else 50)


@given(cuts=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 3), st.binary(max_size=3)), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_bytes_that_are_nearly_a_request(api, cuts: list[tuple[int, int, bytes]]) -> None:
    """A body with some of its bytes replaced: parts of characters, broken strings, other numbers."""
    body = json.dumps({"model": "sparse", "prompt": "añ\u4f60", "stop": ["x"], "seed": 5, "max_tokens": 2}).encode()
    for at, length, new in cuts:
        body = body[:at] + new + body[at + length :]
    at = api[GenerationMode.POSITIVE].config.base_url
    with httpx.Client(
        base_url=at, headers=KEY, verify=False
    ) as client:  # certificates take a tenth of a second to read
        told = client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert told.status_code in (200, 400, 404), (body, told.text)
    assert told.status_code == 200 or set(told.json()["error"]) == {"message", "type", "param", "code"}
