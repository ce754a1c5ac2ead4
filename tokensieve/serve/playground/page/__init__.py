"""The page at `/`. Its files are read once and served by name, so that no path from a request is ever opened."""

from importlib import resources

from fastapi import APIRouter
from fastapi.responses import Response

from tokensieve.serve.errors import ApiError

KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
}
POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "connect-src": "'self'",
    "img-src": "'self' data:",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
}
HEADERS = {
    "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in POLICY.items()),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def router() -> APIRouter:
    routes = APIRouter(include_in_schema=False)
    files = {
        file.name: Response(file.read_bytes(), media_type=KINDS[ending], headers=HEADERS)
        for file in resources.files(__package__).iterdir()
        if (ending := "." + file.name.rpartition(".")[2]) in KINDS
    }

    @routes.get("/")
    async def page() -> Response:
        return files["index.html"]

    @routes.get("/page/{name}")
    async def part(name: str) -> Response:
        if name not in files:
            raise ApiError(404, "Not Found: no such route")
        return files[name]

    return routes
