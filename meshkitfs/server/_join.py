"""The page behind the link of an invitation says what to do with it. The secret is not sent to it."""

from __future__ import annotations

from typing import Final

from fastapi import APIRouter, Response

__all__ = ["PATH", "routes"]

PATH: Final = "/join"
_PAGE: Final = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>An invitation</title>
<h1>An invitation to a share</h1>
<p>Somebody has invited you to a share of encrypted files. The secret of the invitation is in the address
of this page, behind the #, and was not sent to this server. Whoever comes first with it is let in: show it
to nobody.</p>
<p>Install meshkitfs, then type this, and paste the whole address when it asks:</p>
<pre>meshkitfs init --invitation -</pre>
<p>With a home that is set up already: <code>meshkitfs claim -</code></p>
</html>
"""
# Nothing is loaded, nothing is run, and nobody is told where one has come from.
_HEADERS: Final = {
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'; form-action 'none'",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
    "x-content-type-options": "nosniff",
}

routes = APIRouter()


@routes.get(PATH, include_in_schema=False)
async def join() -> Response:
    """What to do with the link. Needs no signature."""
    return Response(_PAGE, media_type="text/html", headers=_HEADERS)
