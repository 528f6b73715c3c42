-- The tables of metadata.db, version 1 (application_id 0x4D4B6D64, user_version 1), as they were released.
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
