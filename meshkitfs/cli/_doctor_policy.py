"""``doctor`` on the policy provider: is it there, and is it the one that is configured."""

from __future__ import annotations

from collections.abc import Iterator

from ..daemon.client import run_async
from ..daemon.config import PolicyConfig
from ..daemon.policy_provider import open_provider
from ..errors import MeshkitError

__all__ = ["examine"]


def examine(settings: PolicyConfig) -> Iterator[tuple[str, str, str]]:
    """Yield one finding: status (ok, fail), what was found, what to do. Nothing is decided."""

    async def look() -> bool:
        provider = open_provider(settings)
        try:
            return await provider.look()
        finally:
            await provider.aclose()

    try:
        many = run_async(look)
    except MeshkitError as error:
        yield "fail", error.detail or error.reason.sentence, error.remedy
        return
    costs = "one request for all rights" if many else "one request for each right"
    signed = "its decisions are signed" if settings.key is not None else "its decisions are not signed"
    yield "ok", f"{settings.endpoint} answers ({costs}; {signed})", ""
