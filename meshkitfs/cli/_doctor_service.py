"""What is wrong with a metadata service, in words. Asks it who it is, unsigned: no key is needed for that."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import Final

from ..daemon.client import run_async
from ..daemon.config import MetadataConfig
from ..errors import MeshkitError
from ..metadata import look
from ..net import Tls
from ._wrong import METADATA, explained

__all__ = ["examine"]

# Signed requests are refused from 120 s on; half of that is a clock to be mended.
_SKEW_FAIL_S: Final = 120
_SKEW_WARN_S: Final = 60


def examine(settings: MetadataConfig) -> Iterator[tuple[str, str, str]]:
    """Yield findings about the service: status (ok, warn, fail), what was found, what to do."""
    tls = Tls(settings.ca_file, settings.client_cert, settings.client_key)
    try:
        info = run_async(partial(look, settings.url, tls, settings.socket))
    except MeshkitError as error:
        if error.code != "metadata_unavailable":
            raise
        sentence, remedy = explained(error, METADATA) or (error.reason.sentence, error.remedy)
        yield "fail", f"{settings.url}: {sentence} ({error.detail})", remedy
        return
    yield "ok", f"{settings.url} answers (newcomers: {info.join})", ""
    skew = time.time() - info.time
    if abs(skew) >= _SKEW_WARN_S:
        where = "ahead of" if skew > 0 else "behind"
        yield (
            "fail" if abs(skew) >= _SKEW_FAIL_S else "warn",
            f"this device's clock is {abs(skew):.0f} s {where} the service's; from {_SKEW_FAIL_S} s on, no "
            "signed request is taken",
            "Set the clock of whichever is wrong; network time (NTP) keeps it right.",
        )
