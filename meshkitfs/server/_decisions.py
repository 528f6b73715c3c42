"""Policy decisions: OpenID AuthZEN 1.0 from rules in a directory, signed with the key of the timestamps.

Whoever can reach the service and, where one is set, shows the token, may ask: an answer says nothing but yes
or no about a policy. Records of different types cannot be taken for each other, so one key can sign both.
"""

from __future__ import annotations

import hmac
import json
import logging
import re
from pathlib import Path
from typing import Any, Final

import trio

from meshkitfs.errors import MeshkitError
from meshkitfs.metadata.service import Service
from meshkitfs.policy import pdp, rules

__all__ = ["DECISION_BYTES", "Decisions"]

_log = logging.getLogger(__name__)

DECISION_BYTES: Final = 64 << 10  # it is read before anybody is known
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")


class Decisions:
    """The decision point. Raises policy_invalid for a file in ``directory`` that is not valid."""

    paths = (pdp.DISCOVERY, pdp.EVALUATION, pdp.EVALUATIONS)

    def __init__(self, service: Service, directory: Path, token: bytes | None) -> None:
        self._service = service
        self._directory = directory
        self._token = token
        try:
            for path in sorted(directory.glob("*.cedar")):
                self._read(path)
        except OSError as error:
            raise MeshkitError("invalid_config", f"field 'policies': {error.strerror}") from None
        if not directory.is_dir():
            raise MeshkitError("invalid_config", f"field 'policies': {directory} is not a directory")

    async def answer(
        self, method: str, path: str, base: str, headers: list[tuple[bytes, bytes]], body: bytes
    ) -> tuple[list[tuple[bytes, bytes]], bytes]:
        """Return the header lines and the body of a 200. Raises what the request is refused with."""
        if method != ("GET" if path == pdp.DISCOVERY else "POST"):
            raise MeshkitError("path_not_found", "no such route")
        if path == pdp.DISCOVERY:
            return self._written(pdp.about(base), headers)
        self._check(headers)
        question = pdp.read(body, many=path == pdp.EVALUATIONS)
        asked = question.requests[0]
        text = await trio.to_thread.run_sync(self._rules, asked.policy_id)
        key = await self._service.signing_key()
        try:
            found = pdp.answer(question, text, await self._who(asked.identity), key, self._service.now())
        except MeshkitError as error:
            _log.warning("policy %r: %s (%s)", asked.policy_id, error.code, error.detail)
            raise MeshkitError("internal_error") from None
        return self._written(found, headers)

    def _check(self, headers: list[tuple[bytes, bytes]]) -> None:
        if self._token is None:
            return
        shown = b"".join(value for name, value in headers if name == b"authorization")
        if not hmac.compare_digest(shown, b"Bearer " + self._token):
            raise MeshkitError("metadata_unauthorized", "this decision point asks for its token")

    async def _who(self, identity: str) -> str:
        """What rules call an identity: its handle in the directory, else ``kid:`` and its kid."""
        handle = None
        if re.fullmatch("[0-9a-f]{32}", identity):
            handle = await self._service.recipient(bytes.fromhex(identity))
        # No handle has a colon in it.
        return handle or f"kid:{identity}"

    def _rules(self, policy: str) -> str | None:
        if not _NAME.match(policy):
            return None
        try:
            return self._read(self._directory / f"{policy}.cedar")
        except FileNotFoundError:
            return None
        except (OSError, MeshkitError) as error:
            _log.warning("policy %r cannot be used: %s", policy, error)
            raise MeshkitError("internal_error") from None

    @staticmethod
    def _read(path: Path) -> str:
        try:
            text = path.read_bytes().decode()
            rules.check(text)
        except UnicodeDecodeError:
            raise MeshkitError("policy_invalid", f"{path.name}: not UTF-8") from None
        except MeshkitError as error:
            raise MeshkitError(error.code, f"{path.name}: {error.detail}") from None
        return text

    @staticmethod
    def _written(
        value: dict[str, Any], headers: list[tuple[bytes, bytes]]
    ) -> tuple[list[tuple[bytes, bytes]], bytes]:
        body = json.dumps(value, separators=(",", ":")).encode()
        lines = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        lines.append((b"cache-control", b"no-store"))
        ids = [line for line in headers if line[0] == b"x-request-id" and len(line[1]) <= 128]
        return lines + ids[:1], body
