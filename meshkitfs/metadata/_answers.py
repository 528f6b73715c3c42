"""Reading what a metadata service answers: its refusals, and the shapes of its JSON.

Nothing in here believes a service. A refusal counts only if its status and its code belong together and the
call can be refused in that way; an answer counts only if it has exactly the expected form. Everything else is
``metadata_unavailable``: nothing was learned.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from meshkitfs.errors import MeshkitError
from meshkitfs.metadata._api import AccessList
from meshkitfs.metadata._wire import from_b64, read_blob, read_blobs, read_fields
from meshkitfs.net import Reply, Secret

__all__ = [
    "ANSWERED",
    "LAST",
    "PUBLISHING",
    "ServiceInfo",
    "read",
    "read_access_list",
    "read_chain",
    "read_invitation",
    "read_letters",
    "read_service",
    "refusal",
]

T = TypeVar("T")

# The statuses that a code of the service may come with.
_STATUSES: Final = {
    "invalid_argument": (400, 413),
    "metadata_unauthorized": (401,),
    "metadata_forbidden": (403,),
    "key_release_refused": (403,),
    "path_not_found": (404,),
    "quota_exceeded": (403,),
    "head_conflict": (409,),
    "identity_handle_taken": (409,),
    "invalid_record": (422,),
    "rate_limited": (429,),
    "no_space": (507,),
}
# Refusals that say what is wrong, and are not tried again: the client reads them itself.
ANSWERED: Final = frozenset({400, 401, 403, 404, 409, 413, 422, 507})
# Tried again first; what it says in the end is read.
LAST: Final = frozenset({429})
# What every call can be refused with, and what those that store something can be refused with besides.
_ANY: Final = frozenset({"metadata_unauthorized", "metadata_forbidden", "rate_limited"})
PUBLISHING: Final = frozenset({"no_space", "quota_exceeded", "invalid_argument"})
_SAYS: Final = 200

SERVICE: Final = "meshkitfs"
WIRE_VERSION: Final = 1
JOINS: Final = ("open", "token", "invite")
_KEY_BYTES: Final = 32
_CODE_MAX: Final = 1024


@dataclass(frozen=True, slots=True)
class ServiceInfo:
    """What a service says of itself. ``key`` signs its timestamps, ``time`` is its clock in UNIX seconds,
    ``join`` what it asks of newcomers: one of ``open``, ``token``, ``invite``."""

    key: bytes
    time: float
    join: str


def refusal(reply: Reply, codes: Collection[str], name: str) -> MeshkitError:
    """Return the error that a reply other than the wanted one means; ``name`` is the service's address."""
    code, message = _said(reply)
    if code in _ANY or code in codes:
        if reply.status in _STATUSES[code]:
            return MeshkitError(code, message)
        message = f"HTTP {reply.status} with the code of another refusal"
    else:
        message = f"HTTP {reply.status}" + (f": {message}" if message else "")
    return MeshkitError("metadata_unavailable", f"{name}: {message}")


def _said(reply: Reply) -> tuple[str, str]:
    """Return the code and the text of a refusal; both empty if it is not in the form of the service."""
    try:
        error = json.loads(reply.body)["error"]
        code, message, detail = error["code"], error["message"], error.get("detail") or ""
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "", ""
    if not all(isinstance(text, str) for text in (code, message, detail)):
        return "", ""
    text = (detail or message)[:_SAYS]
    return code, "".join(c if c.isprintable() else " " for c in text).strip()


def read(reply: Reply, reader: Callable[[Any], T], name: str) -> T:
    """Return what ``reader`` makes of the JSON. Raises metadata_unavailable for every other form."""
    value = reply.json()
    try:
        return reader(value)
    except MeshkitError as error:
        raise MeshkitError("metadata_unavailable", f"{name}: {error.detail}") from None
    except (ValueError, TypeError, RecursionError):
        raise MeshkitError("metadata_unavailable", f"{name}: not the answer to what was asked") from None


def read_service(value: Any) -> ServiceInfo:
    """Return what the service says of itself. Fields of later versions are no obstacle, a later wire is."""
    if not isinstance(value, dict) or value.get("service") != SERVICE:
        raise MeshkitError("invalid_argument", "that is not a meshkitfs service")
    version = value.get("version")
    if type(version) is not int or version != WIRE_VERSION:
        raise MeshkitError("invalid_argument", f"it speaks version {version!r:.20}, not {WIRE_VERSION}")
    key, join = from_b64(value.get("key"), "key"), value.get("join")
    moment: Any = value.get("time")
    if type(moment) not in (int, float) or not math.isfinite(moment):
        raise MeshkitError("invalid_argument", "it does not say its time")
    if len(key) != _KEY_BYTES or join not in JOINS:
        raise MeshkitError("invalid_argument", "it does not say its key, and how to join")
    return ServiceInfo(key, float(moment), join)


def read_invitation(value: Any) -> tuple[str, Secret]:
    """Return the id of a new invitation (32 hex digits), and its code."""
    fields = read_fields(value, ("id", "code", "expires"), "an invitation")
    name, code = fields["id"], fields["code"]
    if not isinstance(name, str) or not re.fullmatch("[0-9a-f]{32}", name):
        raise MeshkitError("invalid_argument", "an invitation without an id")
    if not isinstance(code, str) or not 0 < len(code) <= _CODE_MAX:
        raise MeshkitError("invalid_argument", "an invitation without a code")
    return name, Secret.checked(code, "the service's answer")


def read_letters(value: Any) -> tuple[list[tuple[bytes, bytes]], bool]:
    """Return a page of a mailbox: letters as (id, blob), and whether there are more."""
    fields = read_fields(value, ("letters", "more"), "a mailbox")
    letters, more = fields["letters"], fields["more"]
    if not isinstance(letters, list) or type(more) is not bool:
        raise MeshkitError("invalid_argument", "a mailbox without letters")
    return [_letter(letter) for letter in letters], more


def _letter(value: Any) -> tuple[bytes, bytes]:
    fields = read_fields(value, ("id", "blob"), "a letter")
    letter_id = from_b64(fields["id"], "id")
    if len(letter_id) != 16:
        raise MeshkitError("invalid_argument", "a letter's id is not 16 bytes")
    return letter_id, from_b64(fields["blob"], "blob")


def read_access_list(value: Any, list_id: bytes) -> AccessList:
    """Return a vault record or revocation list, as it is served: whether it is one, its readers check."""
    names = ("id", "owner", "seq", "record", "timestamp", "members")
    fields = read_fields(value, names, "an access list")
    if fields["id"] != list_id.hex():
        raise MeshkitError("invalid_argument", "an access list that was not asked for")
    return AccessList(from_b64(fields["record"], "record"), read_blob(fields["timestamp"], "timestamp"))


def read_chain(value: Any) -> list[bytes]:
    """Return a chain of identity records, as it is served: whether it is one, its readers check."""
    return read_blobs(read_fields(value, ("chain",), "an identity")["chain"], "chain")
