"""`GET /health`, which needs no key, and `GET /metrics` for Prometheus."""

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from tokensieve.serve import openapi
from tokensieve.serve.state import state_of

public, router = APIRouter(), APIRouter()


@public.get("/health", response_model=openapi.Health, responses={503: {"model": openapi.Health}})
async def health(request: Request) -> Response:
    service = state_of(request).service
    fine = service.alive and not service.draining
    status = "ok" if fine else "draining" if service.alive else "the engine does not run"
    return JSONResponse({"status": status}, 200 if fine else 503)


@router.get("/metrics", response_class=Response, responses=openapi.METRICS)
async def metrics_page(request: Request) -> Response:
    return Response(state_of(request).metrics.page(), media_type="text/plain; version=0.0.4")
