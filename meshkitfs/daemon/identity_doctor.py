"""What there is to know of an identity's health: ``identity doctor``."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from typing import Any, Final

from meshkitfs import keyvault
from meshkitfs.core.identity_record import verify_chain
from meshkitfs.daemon.finding import FAIL, INFO, OK, WARN, Finding
from meshkitfs.daemon.session import Session
from meshkitfs.errors import MeshkitError
from meshkitfs.identity import LIFETIME, standing

__all__ = ["IdentityDoctor"]

_DAY: Final = 86400
# How old a recovery file may be until somebody should look whether it is still where it was put (s).
RECOVERY_OLD_S: Final = 365 * _DAY


class IdentityDoctor:
    """This command of one open home; ``methods`` by name, as `Service` has its own."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.methods: dict[str, Callable[..., Awaitable[dict[str, Any]]]] = {
            "identity.doctor": self._doctor,
        }

    async def _doctor(self) -> dict[str, Any]:
        self._session.unlocked()  # all of what it looks at is there only then
        found = [*self._chain(), self._rotation(), self._clock(), await self._vault()]
        found += [await self._directory(), await self._recovery()]
        return {
            "handle": self._session.identity.handle,
            "ok": all(finding.status != FAIL for finding in found),
            "checks": [asdict(finding) for finding in found],
        }

    def _chain(self) -> Iterator[Finding]:
        me, now = self._session.identity, int(time.time())
        try:
            record = verify_chain(me.chain)
        except MeshkitError as error:
            yield Finding("chain", FAIL, f"{error.code}: {error.detail}", error.remedy)
            return
        if (record.sig, record.enc) != (me.signing.public, me.encryption.public):
            yield Finding("chain", FAIL, "its newest record is of other keys", "Restore the home.")
        else:
            yield Finding("chain", OK, f"{len(me.chain)} records, each signed by the key before")
        renew = "Run 'meshkitfs identity rotate --replace none'."
        left = (record.exp - now) // _DAY
        if now < record.nbf:
            yield Finding("record", FAIL, "it is not valid yet", "Is the clock of this device right?")
        elif now >= record.exp:
            yield Finding("record", FAIL, f"it ran out {-left} days ago", renew)
        elif record.exp - now < LIFETIME // 4:
            yield Finding("record", WARN, f"it runs out in {left} days", renew)
        else:
            yield Finding("record", OK, f"valid for {left} days more")

    def _rotation(self) -> Finding:
        me = self._session.identity
        finish = "Run 'meshkitfs identity rotate'."
        if me.pending is not None:
            return Finding("rotation", FAIL, "new keys were made, and are not taken into use yet", finish)
        if me.unfinished:
            return Finding("rotation", WARN, "shares may still be signed with an old key", finish)
        at = self._session.life.schedule.next(me)
        when = f"the next is due at {time.strftime('%Y-%m-%d', time.gmtime(at))}" if at else "none is planned"
        return Finding("rotation", OK, f"none is under way; {when}")

    def _clock(self) -> Finding:
        try:
            self._session.clock.now()
        except MeshkitError as error:
            return Finding("clock", FAIL, error.detail, error.remedy)
        return Finding("clock", OK, "not behind what this device has seen")

    async def _vault(self) -> Finding:
        session = self._session
        report = await session.watched.look()
        chosen = session.config.key_vault
        try:
            keyvault.require(report, chosen.require if chosen is not None else ())
        except MeshkitError as error:
            return Finding("key vault", FAIL, error.detail, error.remedy)
        if not report.available:
            return Finding("key vault", WARN, f"{report.kind}: {report.detail}", "Start or unlock it.")
        if report.kind == keyvault.PLAIN_FILE:
            return Finding(
                "key vault", WARN, f"{report.kind}: whoever can read its file, or a backup of it, is you",
                "Move the key: 'meshkitfs keyvault migrate --to passphrase-file'.",
            )  # fmt: skip
        return Finding("key vault", OK, report.kind)

    async def _directory(self) -> Finding:
        session = self._session
        publish = "Run 'meshkitfs identity publish'."
        try:
            where = await standing(session.identity, session.metadata)
        except MeshkitError as error:
            return Finding("directory", WARN, f"it does not say: {error.code}", error.remedy)
        return {
            "current": Finding("directory", OK, "it has the very same records"),
            "unpublished": Finding("directory", INFO, "this identity is not published", publish),
            "behind": Finding("directory", WARN, "it lacks records of this identity", publish),
            "ahead": Finding(
                "directory", FAIL, "it has newer keys of this identity: this home is an old copy",
                "Use the home that has them. If none of yours has, somebody else has your keys.",
            ),
            "other": Finding(
                "directory", FAIL, "others are shown other keys under this name",
                "Ask whoever runs it; compare fingerprints with your contacts.",
            ),
        }[where]  # fmt: skip

    async def _recovery(self) -> Finding:
        create = "Run 'meshkitfs identity recovery create FILE'."
        with suppress(MeshkitError):  # the report says so itself
            await self._session.remembering.post()
        note = self._session.remembering.report()
        if note is None:
            return Finding("recovery file", WARN, "none: without this home nobody can be you", create)
        days = (int(time.time()) - note["made"]) // _DAY
        if not note["current"]:
            what = ", ".join(note["changed"])
            return Finding("recovery file", FAIL, f"changed since it was written: {what}", create)
        if note["unposted"]:
            return Finding(
                "recovery file", WARN, f"what is younger than it is not left for it yet: {note['unposted']}"
            )
        if days * _DAY > RECOVERY_OLD_S:
            return Finding("recovery file", INFO, f"{days} days old: is it still where you put it?")
        return Finding("recovery file", OK, f"{days} days old, and good for what this identity is now")
