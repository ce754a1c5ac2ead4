"""The application's parts: the API stands without the playground, and does not know it."""

import ast
from pathlib import Path

import httpx2 as httpx

import tokensieve.serve
from tests.support import servers
from tokensieve.engine import EngineConfig

SERVE = Path(tokensieve.serve.__file__).parent


def test_the_api_without_the_playground() -> None:
    with servers.running(servers.tiny(), EngineConfig(pages=8, running=1), playground=False) as (at, _):
        for path in ("/", "/page/main.js"):
            assert httpx.get(at + path).status_code == 404
        for path in ("/lens", "/documents"):
            assert httpx.post(at + path, json={}).status_code == 404
        assert "/lens" not in httpx.get(at + "/openapi.json").json()["paths"]
        body = {"model": "sparse", "prompt": "a", "max_tokens": 2}
        assert httpx.post(at + "/v1/completions", json=body).json()["usage"]["completion_tokens"] == 2


def test_only_the_application_knows_the_playground() -> None:
    for path in SERVE.rglob("*.py"):
        if path.name == "app.py" or path.is_relative_to(SERVE / "playground"):
            continue
        names = [
            f"{getattr(node, 'module', '')}.{alias.name}"
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        ]
        assert not [name for name in names if "playground" in name], path
