"""The tables of a metadata home, and how an older database gets those that are new.

They are written for SQLite; `for_postgresql` says the same to PostgreSQL. The version number is one for both.
"""

import re
from typing import Final

__all__ = ["APPLICATION_ID", "MIGRATIONS", "SCHEMA", "VERSION", "for_postgresql"]

APPLICATION_ID: Final = 0x4D4B6D64  # "MKmd", in the file's header
VERSION: Final = 5
_RETENTIONS: Final = """
CREATE TABLE retentions (      -- which versions the owner has given up; the newest record only
    share BLOB PRIMARY KEY,
    seq   INTEGER NOT NULL,
    blob  BLOB NOT NULL        -- the signed record
) STRICT, WITHOUT ROWID;
"""
_RECIPIENTS: Final = """
CREATE TABLE recipients (      -- whose mailbox an encryption key is: the first who published it
    kid    BLOB PRIMARY KEY,   -- an encryption key that occurs in the chain
    handle TEXT NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE changes (         -- when a share or a mailbox has changed last
    subject BLOB PRIMARY KEY,  -- 's' and the share, 'm' and the mailbox's kid, or nothing: any of them
    n       INTEGER NOT NULL   -- a number that grows with every change, in the order of the commits
) STRICT, WITHOUT ROWID;
"""
# The tables of the service (see service.py). A home that is not served keeps them empty.
_SERVICE: Final = """
CREATE TABLE nonces (          -- requests that were served: none is served twice
    keyid   BLOB NOT NULL,     -- the kid of the key that signed
    nonce   TEXT NOT NULL,
    token   BLOB NOT NULL,     -- random: who wrote this row
    created INTEGER NOT NULL,  -- the time in the signature
    PRIMARY KEY (keyid, nonce)
) STRICT, WITHOUT ROWID;
CREATE INDEX nonces_by_time ON nonces (created);
CREATE TABLE invitations (
    hash    BLOB PRIMARY KEY,  -- SHA-256 of the code, which itself is nowhere
    id      BLOB NOT NULL UNIQUE,
    inviter TEXT NOT NULL,     -- handle; '' for the operator
    created INTEGER NOT NULL,
    expires INTEGER NOT NULL,
    handle  TEXT               -- who has used it
) STRICT, WITHOUT ROWID;
CREATE TABLE counts (          -- what somebody has used of a quota
    handle TEXT NOT NULL,
    kind   TEXT NOT NULL,
    period INTEGER NOT NULL,   -- days since the epoch; 0 where the quota is for good
    n      INTEGER NOT NULL,
    PRIMARY KEY (handle, kind, period)
) STRICT, WITHOUT ROWID;
CREATE TABLE audit (
    n       INTEGER PRIMARY KEY,
    at      INTEGER NOT NULL,
    who     TEXT NOT NULL,     -- handle; '' for somebody unknown, '-' for the operator
    kind    TEXT NOT NULL,
    share   BLOB,              -- or the mailbox
    outcome TEXT NOT NULL      -- ok, or the code of the refusal
) STRICT;
CREATE INDEX audit_by_time ON audit (at);
CREATE TABLE proofs (          -- where the bytes of a CID are, in the words of who stored them
    handle TEXT NOT NULL,
    cid    TEXT NOT NULL,
    share  BLOB,               -- its members may read it too
    at     INTEGER NOT NULL,
    record TEXT NOT NULL,      -- JSON
    PRIMARY KEY (handle, cid)
) STRICT, WITHOUT ROWID;
CREATE INDEX proofs_by_cid ON proofs (cid);
CREATE TABLE sync_jobs (
    n          INTEGER PRIMARY KEY, -- order of arrival
    id         BLOB NOT NULL UNIQUE,
    handle     TEXT NOT NULL,
    kind       TEXT NOT NULL,
    payload    BLOB NOT NULL,
    key        TEXT NOT NULL,  -- at most one active job for each
    policy     TEXT NOT NULL,  -- dedupe, fail, replace
    status     TEXT NOT NULL,  -- queued, running, done, failed, replaced
    active     INTEGER NOT NULL,
    checkpoint BLOB,
    created    INTEGER NOT NULL,
    updated    INTEGER NOT NULL
) STRICT;
CREATE UNIQUE INDEX sync_jobs_active ON sync_jobs (handle, key) WHERE active = 1;
CREATE TABLE vaults (
    id     BLOB PRIMARY KEY,   -- 16 bytes
    owner  TEXT NOT NULL,
    seq    INTEGER NOT NULL,
    record BLOB NOT NULL       -- opaque here
) STRICT, WITHOUT ROWID;
CREATE TABLE vault_members (
    id  BLOB NOT NULL,
    kid BLOB NOT NULL,         -- signing key
    PRIMARY KEY (id, kid)
) STRICT, WITHOUT ROWID;
CREATE TABLE capabilities (
    id      BLOB PRIMARY KEY,  -- 16 bytes
    owner   TEXT NOT NULL,
    kid     BLOB NOT NULL,     -- the signing key of who may use it
    record  BLOB NOT NULL,     -- opaque here, and without its secret
    created INTEGER NOT NULL,
    revoked INTEGER            -- when
) STRICT, WITHOUT ROWID;
CREATE INDEX capabilities_by_user ON capabilities (kid);
CREATE TABLE provider_logs (
    n         INTEGER PRIMARY KEY,
    handle    TEXT NOT NULL,
    at        INTEGER NOT NULL,
    provider  TEXT NOT NULL,
    operation TEXT NOT NULL,
    outcome   TEXT NOT NULL,
    bytes     INTEGER NOT NULL
) STRICT;
CREATE INDEX provider_logs_by_handle ON provider_logs (handle, n);
"""
_REMOVED: Final = """
CREATE TABLE removed (         -- what the operator has removed, so that nobody brings it back
    kind TEXT NOT NULL,        -- member, share
    id   BLOB NOT NULL,        -- the handle in UTF-8, or the share
    at   INTEGER NOT NULL,
    PRIMARY KEY (kind, id)
) STRICT, WITHOUT ROWID;
"""
# The release service's (see _releasing.py).
_DEPOSITS: Final = """
CREATE TABLE deposits (        -- halves of epoch keys, each sealed to a key that is not in the database
    share BLOB NOT NULL,
    owner BLOB NOT NULL,       -- kid of the signing key of who left it
    epoch INTEGER NOT NULL,
    blob  BLOB NOT NULL,       -- the signed record
    PRIMARY KEY (share, owner, epoch)
) STRICT, WITHOUT ROWID;
"""
# What a database of the version before lacks: MIGRATIONS[1] makes one of version 1 one of version 2. What
# has to be computed for the rows that are there is in _queries.COMPLETE.
MIGRATIONS: Final = {1: _RETENTIONS, 2: _RECIPIENTS + _SERVICE, 3: _REMOVED, 4: _DEPOSITS}
SCHEMA: Final = (
    """
CREATE TABLE service (         -- one row: the key that signs this home's timestamps
    seed BLOB NOT NULL         -- Ed25519 seed, 32 bytes; see EmbeddedMetadata for what that means
) STRICT;
CREATE TABLE rosters (
    share BLOB NOT NULL,       -- 16 bytes
    seq   INTEGER NOT NULL,    -- the roster's number; the highest is in force
    owner BLOB NOT NULL,       -- Ed25519 public key that signed it, the same in all rosters of a share
    hash  BLOB NOT NULL,       -- SHA-256 of blob
    blob  BLOB NOT NULL,       -- the signed record
    PRIMARY KEY (share, seq)
) STRICT, WITHOUT ROWID;
CREATE TABLE heads (
    share BLOB NOT NULL,
    ver   INTEGER NOT NULL,    -- the head's version; the highest is the newest
    hash  BLOB NOT NULL,       -- SHA-256 of blob: what the next head's prev holds
    blob  BLOB NOT NULL,       -- the signed record
    PRIMARY KEY (share, ver)
) STRICT, WITHOUT ROWID;
CREATE TABLE capsules (        -- revoked ones stay: the roster says which are in force
    n     INTEGER PRIMARY KEY, -- order of arrival
    share BLOB NOT NULL,
    kid   BLOB NOT NULL,       -- the recipient's encryption key, 16 bytes
    id    BLOB NOT NULL,       -- the capsule's own id, 16 bytes
    blob  BLOB NOT NULL,       -- the signed record
    UNIQUE (share, id)
) STRICT;
CREATE INDEX capsules_by_recipient ON capsules (share, kid);
CREATE TABLE letters (
    n     INTEGER PRIMARY KEY, -- order of arrival
    kid   BLOB NOT NULL,       -- the mailbox: the recipient's encryption key
    id    BLOB NOT NULL UNIQUE,-- 16 random bytes
    blob  BLOB NOT NULL        -- sealed to the recipient
) STRICT;
CREATE INDEX letters_by_recipient ON letters (kid);
CREATE TABLE identities (
    handle TEXT NOT NULL,      -- application id such as alice
    n      INTEGER NOT NULL,   -- place in the chain, from 0
    blob   BLOB NOT NULL,      -- the signed record
    PRIMARY KEY (handle, n)
) STRICT, WITHOUT ROWID;
CREATE TABLE identity_keys (
    kid    BLOB PRIMARY KEY,   -- a signing key that occurs in the chain
    handle TEXT NOT NULL
) STRICT, WITHOUT ROWID;
"""
    + _RETENTIONS
    + _RECIPIENTS
    + _SERVICE
    + _REMOVED
    + _DEPOSITS
)


def for_postgresql(sql: str) -> str:
    """Return the statements of a schema or a migration in PostgreSQL's words."""
    sql = re.sub(r"--[^\n]*", "", sql)
    sql = re.sub(r"\)\s*STRICT(, WITHOUT ROWID)?;", ");", sql)
    sql = sql.replace("INTEGER PRIMARY KEY", "BIGINT GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY")
    return re.sub(r"\bINTEGER\b", "BIGINT", re.sub(r"\bBLOB\b", "BYTEA", sql))
