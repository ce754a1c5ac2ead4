"""Who may ask from a browser: names of the server, pages of other sites; and HEAD, and what no page loads."""

from collections.abc import Iterator

import httpx2 as httpx
import pytest

from tests.support import servers
from tokensieve.config import UserError
from tokensieve.engine import EngineConfig
from tokensieve.serve.hosts import is_allowed
from tokensieve.serve.settings import ServeConfig

FRIEND, STRANGER = "https://friend.example", "https://stranger.example"
ASKED = {"model": "sparse", "prompt": "a", "max_tokens": 1}
CROSS = {"Sec-Fetch-Site": "cross-site"}
PREFLIGHT = {
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
}


@pytest.fixture(scope="module")
def at() -> Iterator[str]:
    with servers.running(
        servers.tiny(),
        EngineConfig(pages=8, running=1),
        keys=("a-key",),
        allow_origins=(FRIEND,),
        allow_hosts=("Model.example", "*.inside.example"),
    ) as (at, _):
        yield at


@pytest.fixture(scope="module")
def closed() -> Iterator[str]:
    with servers.running(servers.tiny(), EngineConfig(pages=8, running=1)) as (at, _):
        yield at


def test_an_allowed_origin_may_ask_and_read(at: str) -> None:
    allowed = httpx.options(at + "/v1/completions", headers=PREFLIGHT | {"Origin": FRIEND})
    assert allowed.status_code == 200 and allowed.headers["Access-Control-Allow-Origin"] == FRIEND
    assert "x-stainless-os" in allowed.headers["Access-Control-Allow-Headers"]
    asks = CROSS | {"Origin": FRIEND}
    for key, status in (("a-key", 200), ("no-key", 401)):  # a page may read why it was refused
        headers = asks | {"Authorization": f"Bearer {key}"}
        answer = httpx.post(at + "/v1/completions", json=ASKED, headers=headers)
        assert answer.status_code == status and answer.headers["Access-Control-Allow-Origin"] == FRIEND
        assert "x-request-id" in answer.headers["Access-Control-Expose-Headers"].lower()


def test_other_origins_may_not(at: str, closed: str) -> None:
    for server, origin in ((at, STRANGER), (at, "null"), (closed, FRIEND)):
        refused = httpx.options(server + "/v1/completions", headers=PREFLIGHT | {"Origin": origin})
        assert not refused.is_success and "Access-Control-Allow-Origin" not in refused.headers
        headers = CROSS | {"Origin": origin, "Authorization": "Bearer a-key"}
        refused = httpx.post(server + "/v1/completions", json=ASKED, headers=headers)
        assert refused.status_code == 403 and "--allow-origin" in refused.json()["error"]["message"]
        read = httpx.get(server + "/v1/models", headers=headers)
        assert read.status_code == 200 and "Access-Control-Allow-Origin" not in read.headers


@pytest.mark.parametrize("host", ["localhost", "LocalHost:80", "127.0.0.1", "[::1]:8000", "10.1.2.3", "localhost.:9"])
def test_hosts(closed: str, host: str) -> None:
    assert httpx.get(closed + "/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["rebound.example:80", "localhost.example", "127.0.0.1.example", "x", "[::1", ""])
def test_a_name_that_a_page_may_own(closed: str, host: str) -> None:
    for path in ("/", "/v1/models", "/openapi.json"):
        refused = httpx.get(closed + path, headers={"Host": host})
        assert refused.status_code == 403 and "--allow-host" in refused.json()["error"]["message"]
    assert httpx.get(closed + "/health", headers={"Host": host}).status_code == 200  # balancers ask by any name


def test_hosts_that_are_allowed(at: str) -> None:
    key = {"Authorization": "Bearer a-key"}
    for host, status in {"model.example:8000": 200, "a.inside.example": 200, "inside.example": 403}.items():
        assert httpx.get(at + "/v1/models", headers=key | {"Host": host}).status_code == status
    assert is_allowed("any.example", ("*",)) and not is_allowed("any.example", ())


@pytest.mark.parametrize("origin", ["friend.example", "https://friend.example/", "https://a b", "", "https://"])
def test_what_is_no_origin(origin: str) -> None:
    with pytest.raises(UserError, match="is no origin"):
        ServeConfig("sparse", allow_origins=(origin,))


@pytest.mark.parametrize("host", ["http://model", "model:80", "a b", "", "*model"])
def test_what_is_no_host(host: str) -> None:
    with pytest.raises(UserError, match="is no host"):
        ServeConfig("sparse", allow_hosts=(host,))


@pytest.mark.parametrize("path", ["/", "/page/main.js", "/v1/models", "/v1/models/sparse", "/health", "/metrics"])
def test_head_is_get_without_a_body(closed: str, path: str) -> None:
    got, head = httpx.get(closed + path), httpx.head(closed + path)
    assert head.status_code == 200 and head.content == b"" and got.content
    assert head.headers["Content-Type"] == got.headers["Content-Type"]


def test_head_of_other_routes(closed: str) -> None:
    assert httpx.head(closed + "/v1/completions").status_code == 405
    assert httpx.head(closed + "/nothing").status_code == 404


def test_no_page_loads_anything_from_elsewhere(closed: str) -> None:
    for path in ("/docs", "/redoc", "/docs/oauth2-redirect"):
        assert httpx.get(closed + path).status_code == 404
    assert "'self'" in httpx.get(closed + "/").headers["Content-Security-Policy"]
    assert "/v1/completions" in httpx.get(closed + "/openapi.json").json()["paths"]
