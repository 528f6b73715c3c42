"""The JSON of every request and answer, as pydantic models: what is checked is what OpenAPI says.

Bytes are base64url without padding; what that spells is checked again, canonically, by `_wire`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_NUMBER = 2**63 - 1
_B64 = r"^[A-Za-z0-9_-]*$"
_ID = r"^[A-Za-z0-9_-]{21}[AQgw]$"  # 16 bytes in base64url: the last letter carries two bits
_WORD = r"^[a-z0-9][a-z0-9._:-]*$"

Number = Annotated[int, Field(ge=0, le=MAX_NUMBER)]
Id = Annotated[str, Field(pattern=_ID, description="16 bytes, base64url")]
Blob = Annotated[str, Field(pattern=_B64, min_length=2, max_length=1_400_000, description="base64url")]
SmallBlob = Annotated[str, Field(pattern=_B64, max_length=87_384, description="base64url, up to 64 KiB")]
Letter = Annotated[str, Field(pattern=_B64, min_length=2, max_length=349_528, description="base64url")]
Word = Annotated[str, Field(pattern=_WORD, max_length=64)]


class _Strict(BaseModel):
    """Exactly these fields, each of its type."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Problem(_Strict):
    """Why a request was refused."""

    code: str = Field(description="a code of docs/operations.md")
    message: str
    detail: str


class Refusal(_Strict):
    """The body of every answer that is no success."""

    error: Problem


# -- the service itself ------------------------------------------------------------------------------------


class ServiceLimits(_Strict):
    """The sizes and numbers that requests must keep to."""

    publication_bytes: int
    letter_bytes: int
    record_bytes: int
    poll_shares: int
    poll_seconds: int


class ServiceInfo(_Strict):
    """Who this is, and how to join."""

    service: Literal["meshkitfs"] = "meshkitfs"
    version: Literal[1] = 1
    key: str = Field(description="the Ed25519 key of this service's timestamps, base64url")
    time: int = Field(description="its clock, UNIX seconds")
    join: Literal["open", "token", "invite"]
    limits: ServiceLimits


class Health(_Strict):
    """It is there, and so is its database."""

    status: Literal["ok"] = "ok"


# -- shares ------------------------------------------------------------------------------------------------


class CapsuleIn(_Strict):
    """A capsule, the kid it is for, and its id."""

    kid: Id
    id: Id
    blob: Blob


class PublicationIn(_Strict):
    """One atomic change of a share; see `meshkitfs.metadata.Publication`."""

    expect_head: Annotated[str, Field(pattern=_B64, max_length=43)] | None
    head: Blob | None
    head_ver: Number
    head_epoch: Number
    expect_roster: Number | None
    roster: Blob | None
    roster_seq: Number
    roster_epoch: Number
    capsules: Annotated[list[CapsuleIn], Field(max_length=10_000)]


class RecordIn(_Strict):
    """One signed record."""

    record: Blob


class ShareStateOut(_Strict):
    """All that the gate needs, of one moment."""

    capsules: list[str]
    roster: str | None
    timestamp: str | None
    head: str | None


class CapsulesOut(_Strict):
    """The capsules for one kid, oldest first."""

    capsules: list[str]


class RecordOut(_Strict):
    """One signed record, or null."""

    record: str | None


class HeadsOut(_Strict):
    """A page of heads, oldest first."""

    heads: list[str]
    more: bool


# -- releasing keys ----------------------------------------------------------------------------------------


class ReleaseServiceOut(_Strict):
    """What a release service says of itself."""

    key: str = Field(description="the Ed25519 key that signs what it says, base64url")
    record: str = Field(description="its encryption key, signed with that")
    home: str = Field(description="the key of the timestamps over the rosters it looks at")
    seconds: int = Field(description="how long a release lasts at most")


class DepositIn(_Strict):
    """A half of an epoch's key, sealed to the release service; signed by the owner of the share."""

    record: Annotated[str, Field(pattern=_B64, min_length=2, max_length=4096, description="base64url")]


class ReleaseIn(_Strict):
    """The id of one's capsule in force, the epoch of the half, 16 random bytes, tokens that are asked for."""

    capsule: Id
    tokens: Annotated[
        list[Annotated[str, Field(pattern=_B64, min_length=2, max_length=88_000, description="base64url")]],
        Field(max_length=16),
    ]
    epoch: Annotated[int, Field(ge=1, le=2**53 - 1)]
    nonce: Id


class ReleaseOut(_Strict):
    """The signed answer, with the half sealed to the recipient's encryption key."""

    record: str


# -- letters and people --------------------------------------------------------------------------------------


class LetterIn(_Strict):
    """A sealed letter."""

    letter: Letter


class IdOut(_Strict):
    """The id of what was made."""

    id: str


class LetterOut(_Strict):
    """One letter."""

    id: str
    blob: str


class LettersOut(_Strict):
    """A page of a mailbox, oldest first."""

    letters: list[LetterOut]
    more: bool


class ChainOut(_Strict):
    """A chain of identity records, oldest first."""

    chain: list[str]


class InvitationIn(_Strict):
    """How long it is good for, in seconds."""

    expires_in: Annotated[int, Field(ge=60, le=30 * 86400)]


class InvitationOut(_Strict):
    """The code, which is shown this once, when it ends, and by what it is taken back."""

    id: str
    code: str
    expires: int


class InvitationLine(_Strict):
    """One of one's own invitations; who has used it."""

    id: str
    expires: int
    used_by: str | None


class InvitationsOut(_Strict):
    """One's own invitations, the newest first."""

    invitations: list[InvitationLine]


# -- changes -------------------------------------------------------------------------------------------------


class ChangesIn(_Strict):
    """What to wait for, since when, and how long."""

    shares: Annotated[list[Id], Field(max_length=1000)]
    mailbox: Id | None
    after: Annotated[str, Field(pattern=r"^[0-9]{1,19}$")] | None
    wait: Annotated[int, Field(ge=0, le=30)]


class ChangesOut(_Strict):
    """What has changed, and the cursor to ask with next."""

    cursor: str
    shares: list[str]
    mailbox: bool


# -- MeshKit's other records ---------------------------------------------------------------------------------


class ProofIn(_Strict):
    """What somebody says about the bytes of a CID."""

    share: Id | None
    provider: Word
    bytes: Number
    envelope: Number
    algorithms: Annotated[list[Word], Field(max_length=16)]
    operations: Annotated[list[Word], Field(max_length=16)]
    verified: bool


class ProofOut(ProofIn):
    """The same, with who said it, and when."""

    by: str
    at: int


class ProofsOut(_Strict):
    """What is said about a CID, one's own first."""

    proofs: list[ProofOut]


class JobIn(_Strict):
    """A sync job. At most one is active for each key."""

    kind: Word
    payload: SmallBlob
    key: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[!-~]+$")]
    policy: Literal["dedupe", "fail", "replace"]


class JobPatch(_Strict):
    """What to change of an active job; null leaves it as it is."""

    status: Literal["running", "done", "failed"] | None
    checkpoint: SmallBlob | None


class JobOut(_Strict):
    """A sync job. The payload is empty once it has ended."""

    id: str
    kind: str
    payload: str
    key: str
    policy: str
    status: Literal["queued", "running", "done", "failed", "replaced"]
    checkpoint: str | None
    created: int
    updated: int


class JobsOut(_Strict):
    """Several sync jobs."""

    jobs: list[JobOut]


class VaultIn(_Strict):
    """A vault, or a revocation list: the seq it replaces (0: none), its record, its members' signing kids."""

    expect: Number
    record: SmallBlob
    members: Annotated[list[Id], Field(max_length=1000)]


class VaultOut(_Strict):
    """A vault or a revocation list. The timestamp is null for a record that the service cannot read."""

    id: str
    owner: str
    seq: int
    record: str
    timestamp: str | None
    members: list[str]


class SeqOut(_Strict):
    """The number that is in force now."""

    seq: int


class CapabilityIn(_Strict):
    """A capability for the holder of a signing key. Its secret does not belong in here."""

    kid: Id
    record: SmallBlob


class CapabilityOut(_Strict):
    """A capability; when it was revoked."""

    id: str
    owner: str
    kid: str
    record: str
    created: int
    revoked: int | None


class CapabilitiesOut(_Strict):
    """Several capabilities, the newest first."""

    capabilities: list[CapabilityOut]


class LogLine(_Strict):
    """What a provider was asked for, and how that ended."""

    at: Number
    provider: Word
    operation: Word
    outcome: Word
    bytes: Number


class LogIn(_Strict):
    """Lines for one's own log."""

    events: Annotated[list[LogLine], Field(min_length=1, max_length=500)]


class LogLineOut(LogLine):
    """A line with its number."""

    n: int


class LogOut(_Strict):
    """A page of one's own log, oldest first."""

    events: list[LogLineOut]
    more: bool
