"""What the server offers beside OpenAI's API: the page, text from PDFs, the attention trace, and the mirror.

The API does not import this package: only `app` does, which adds its routes and gives the mirror the answers.
"""

from fastapi import APIRouter

from tokensieve.serve.playground import page, trace, uploads


def router() -> APIRouter:
    """The routes: `/`, `/page/`, `/documents` and `/lens`."""
    routes = APIRouter()
    for part in (page.router(), uploads.router(), trace.router):
        routes.include_router(part)
    return routes
