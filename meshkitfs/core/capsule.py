"""Capsules: an owner's signed grant, with the key in it wrapped to exactly one recipient.

The header is hashed into the HPKE ``info`` together with the recipient's kid, so that an edited header does
not open even when it is signed again; ``kc`` commits to the key, so that no two keys fit one header.
Unwrapping is in `meshkitfs.core._unwrap`, which only the gate may import.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any, ClassVar, Final

from meshkitfs.core import cbor, cose, hpke
from meshkitfs.core.fields import Check, array, blob, check_fields, choice, nullable, refuse, time, uint
from meshkitfs.core.fields import text as text_field
from meshkitfs.core.keys import SigningKey, key_commit, kid_of
from meshkitfs.core.release import ReleaseService

__all__ = [
    "RIGHTS",
    "RULES_MAX",
    "WRAP_SIZE",
    "Capsule",
    "capsule_header",
    "capsule_info",
    "capsule_type",
    "make_capsule",
]

RIGHTS: Final = ("list", "read", "reshare", "write")
WRAP_SIZE: Final = 32 + hpke.OVERHEAD
RULES_MAX: Final = 8192  # bytes of the rules of a policy
DEMANDS_MAX: Final = 8  # of a recipient's key vault
TYPE: Final = "mk/cap@1"
TYPE_2: Final = "mk/cap@2"
TYPE_3: Final = "mk/cap@3"

# What a provider decides, and what the recipient's own device decides by the rules that stand here.
_ASKED_FIELDS: Final[Mapping[str, Check]] = {
    "id": text_field(256, 1),
    "key": nullable(blob(32)),
    "url": nullable(text_field(1024, 1)),
}
_RULES_FIELDS: Final[Mapping[str, Check]] = {
    "id": text_field(256, 1),
    "rules": text_field(RULES_MAX, 1),
    "who": text_field(256, 1),
}


def _policy(value: Any) -> bool:
    fields = _RULES_FIELDS if type(value) is dict and "rules" in value else _ASKED_FIELDS
    check_fields(value, fields, "a policy")
    return True


_RELEASE_FIELDS: Final[Mapping[str, Check]] = {
    "key": blob(32),
    "part": choice("half", "whole"),
    "url": text_field(1024, 1),
}


def _release(value: Any) -> bool:
    check_fields(value, _RELEASE_FIELDS, "a release service")
    return True


_HEADER: Final[Mapping[str, Check]] = {
    "v": uint(1, 1),
    "t": choice(TYPE),
    "id": blob(16),
    "grant": choice("live", "snapshot"),
    "kind": uint(0, 1),
    "share": blob(16),
    "oid": blob(16),
    "epoch": uint(1),
    "ver": uint(),
    "root": blob(0, 32),
    "nbf": time,
    "exp": time,
    "minver": uint(),
    "seq": uint(),
    "rights": array(choice(*RIGHTS), len(RIGHTS)),
    "kc": blob(32),
    "frm": blob(16),
    "to": blob(16),
    "pol": nullable(_policy),
    "vault": nullable(text_field(256, 1)),
    "cap": nullable(text_field(256, 1)),
    "offline_grace": uint(0, 366 * 86400),
}
_HEADER_2: Final[Mapping[str, Check]] = {
    **_HEADER,
    "v": uint(2, 2),
    "t": choice(TYPE_2),
    "rel": _release,
}
_HEADER_3: Final[Mapping[str, Check]] = {
    **_HEADER,
    "v": uint(3, 3),
    "t": choice(TYPE_3),
    "rel": nullable(_release),
    # Words that this program does not know are taken in: the gate refuses them, with a code that says why.
    "keyvault": array(text_field(64, 1), DEMANDS_MAX),
}
_VERSIONS: Final = {TYPE: (1, _HEADER), TYPE_2: (2, _HEADER_2), TYPE_3: (3, _HEADER_3)}
# What a caller may leave out of a header it wants signed.
_DEFAULTS: Final[Mapping[str, Any]] = {
    "ver": 0,
    "root": b"",
    "minver": 0,
    "pol": None,
    "vault": None,
    "cap": None,
    "offline_grace": 0,
    "kind": 0,
}
_OURS: Final = frozenset(("v", "t", "kc", "frm", "to"))


def capsule_type(blob: bytes) -> str:
    """Return of which type a capsule says that it is. Nothing is verified."""
    return next((typ for typ in (TYPE_3, TYPE_2) if cose.claims(blob, typ)), TYPE)


def capsule_header(blob: bytes) -> Mapping[str, Any]:
    """Return the header of a capsule that was made or verified here before. Nothing is verified.

    Raises MeshkitError ``invalid_record`` for what is no capsule at all.
    """
    header: Mapping[str, Any] = cose.peek1(blob, capsule_type(blob))["h"]
    return header


def capsule_info(header: Mapping[str, Any]) -> bytes:
    """Return the HPKE info of a capsule with this header: label, header hash, recipient kid."""
    label: bytes = header["t"].encode()
    return label + b"\0" + hashlib.sha256(cbor.encode(dict(header))).digest() + bytes(header["to"])


def _check_header(header: Any, typ: str) -> None:
    check_fields(header, _VERSIONS[typ][1], "a capsule")
    if header["grant"] == "live":
        if header["ver"] or header["root"]:
            raise refuse("a live grant names no version")
    elif not header["ver"] or not header["root"]:
        raise refuse("a snapshot names one version and its digest")
    if header["nbf"] >= header["exp"]:
        raise refuse("a capsule that ends before it begins")
    if not header["rights"] or header["rights"] != sorted(header["rights"]):
        raise refuse("rights out of order, or none")
    if header.get("rel") and header["grant"] == "snapshot" and header["rel"]["part"] != "half":
        raise refuse("a snapshot holds no seed")
    if typ == TYPE_3 and (not header["keyvault"] or header["keyvault"] != sorted(header["keyvault"])):
        raise refuse("demands of a key vault out of order, or none")


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class Capsule:
    """A parsed grant; the attributes are the header's fields (docs/format.md), ``wrap`` the wrapped key.

    ``grant`` is "live" (the key is the share's epoch key; ver 0, root b"") or "snapshot" (the key is that
    of one manifest, whose version and digest ``ver`` and ``root`` pin). ``to`` is the kid of the recipient's
    encryption key, ``frm`` that of the owner's signing key, ``digest`` the capsule's record hash. ``pol`` is
    None or a map: ``id``, ``key`` and ``url`` (a provider is asked), or ``id``, ``rules`` and ``who`` (the
    rules are here, and ``who`` is the recipient's name in them). ``rel`` is None, or a map with the ``url``
    and the Ed25519 ``key`` of the release service, and the ``part`` that ``wrap`` holds: "half" or "whole".
    ``keyvault`` is what the recipient's key vault has to give (version 3), sorted; empty if nothing is
    demanded of it.
    """

    TYPE: ClassVar[str] = TYPE

    v: int
    t: str
    id: bytes
    grant: str
    kind: int
    share: bytes
    oid: bytes
    epoch: int
    ver: int
    root: bytes
    nbf: int
    exp: int
    minver: int
    seq: int
    rights: tuple[str, ...]
    kc: bytes
    frm: bytes
    to: bytes
    pol: dict[str, Any] | None
    vault: str | None
    cap: str | None
    offline_grace: int
    wrap: bytes
    info: bytes
    digest: bytes
    rel: dict[str, Any] | None = None
    keyvault: tuple[str, ...] = ()

    @property
    def service(self) -> ReleaseService | None:
        """Who holds the other half of the key, if it is in halves."""
        return None if self.rel is None else ReleaseService(self.rel["url"], self.rel["key"])

    def __repr__(self) -> str:
        return f"Capsule(id={self.id.hex()}, grant={self.grant}, rights={','.join(self.rights)})"

    @classmethod
    def parse(cls, blob: bytes, owner_keys: Mapping[bytes, bytes]) -> Capsule:
        """Return the capsule in ``blob`` if one of ``owner_keys`` (kid -> public key) signed it.

        Raises MeshkitError ``invalid_record``: not signed by them, ``frm`` is not the signer, a field is
        missing, unknown or invalid, or the wrapped key has another length than `WRAP_SIZE`.
        """
        typ = capsule_type(blob)
        payload, kid = cose.verify1(blob, owner_keys, typ)
        if payload.keys() != {"t", "h", "w"}:
            raise refuse("fields of a capsule")
        header, wrap = payload["h"], payload["w"]
        _check_header(header, typ)
        if header["frm"] != kid:
            raise refuse("a capsule that names another sender")
        # The length is checked before any key touches it (partitioning oracles).
        if type(wrap) is not bytes or len(wrap) != WRAP_SIZE:
            raise refuse("wrapped key of another length")
        info = capsule_info(header)
        values = header | {"rights": tuple(header["rights"]), "keyvault": tuple(header.get("keyvault", ()))}
        return cls(**values, wrap=wrap, info=info, digest=cose.record_hash(blob))


def make_capsule(
    owner: SigningKey, header: Mapping[str, Any], key: bytes, recipient_public: bytes, held: bytes = b""
) -> bytes:
    """Return a signed capsule that wraps ``key`` (32 bytes) to an X-Wing public key.

    ``header`` has the fields of `Capsule` except v, t, kc, frm and to, which are filled in; ver, root,
    minver, pol, vault, cap, offline_grace and kind may be left out; rights and ``keyvault`` are sorted, and
    the capsule is of the lowest version that has what is in its header. For a live grant
    ``key`` is the share's epoch key, for a snapshot the key of that manifest. With ``rel`` in the header,
    what is wrapped is ``held`` (32 bytes), which leads to ``key`` (`meshkitfs.core.release`). Raises
    MeshkitError ``invalid_record`` for a header that breaks a rule or an unusable recipient key.
    """
    if len(key) != 32:
        raise ValueError("a capsule holds a key of 32 bytes")
    if _OURS & header.keys():
        raise ValueError("v, t, kc, frm and to are filled in here")
    if len(held) != (32 if header.get("rel") else 0):
        raise ValueError("a capsule holds something else than its key if, and only if, that is in halves")
    full: dict[str, Any] = {**_DEFAULTS, **header}
    full["rights"] = sorted(full.get("rights", ()))
    if full.get("keyvault"):
        typ = TYPE_3
        full["rel"] = full.get("rel")
        full["keyvault"] = sorted(full["keyvault"])
    else:
        full.pop("keyvault", None)
        typ = TYPE_2 if "rel" in header else TYPE
    if type(full.get("pol")) is dict and "rules" not in full["pol"]:
        full["pol"] = {"key": None, "url": None} | full["pol"]
    full |= {
        "v": _VERSIONS[typ][0],
        "t": typ,
        "frm": owner.kid,
        "to": kid_of(recipient_public),
        "kc": bytes(32),
    }
    _check_header(full, typ)
    full["kc"] = key_commit(key, full["oid"], full["epoch"], full["ver"])
    wrap = hpke.wrap(recipient_public, capsule_info(full), held or key)
    return cose.sign1(owner, typ, {"t": typ, "h": full, "w": wrap})
