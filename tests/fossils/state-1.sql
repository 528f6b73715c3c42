-- The tables of state.db, version 1 (user_version 1), as they were released.
-- One row per thing the mount shows at its top level; columns as in ShareRow.
CREATE TABLE shares(
    ref BLOB PRIMARY KEY, share BLOB NOT NULL, oid BLOB NOT NULL, name BLOB NOT NULL UNIQUE,
    kind INTEGER NOT NULL, grant_kind TEXT NOT NULL, owner_public BLOB NOT NULL, owner_handle TEXT NOT NULL,
    mine INTEGER NOT NULL, mode INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, created INTEGER NOT NULL
) WITHOUT ROWID;
-- High-water marks by share id. Written, and on the disk, before plaintext that they cover is released.
CREATE TABLE marks(
    share BLOB PRIMARY KEY, roster_seq INTEGER NOT NULL, roster_hash BLOB NOT NULL,
    head_version INTEGER NOT NULL, head_hash BLOB NOT NULL
) WITHOUT ROWID;
-- Grants made by this home as owner; columns as in Member. revoked is a time, 0 while it stands.
CREATE TABLE members(
    capsule_id BLOB PRIMARY KEY, share BLOB NOT NULL, handle TEXT NOT NULL, capsule_hash BLOB NOT NULL,
    encryption_kid BLOB NOT NULL, encryption_public BLOB NOT NULL, signing_public BLOB NOT NULL,
    rights TEXT NOT NULL, not_before INTEGER NOT NULL, expires INTEGER NOT NULL, grant_kind TEXT NOT NULL,
    target TEXT NOT NULL, policy TEXT NOT NULL, vault TEXT NOT NULL, capability TEXT NOT NULL,
    blob BLOB NOT NULL, revoked INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX members_by_share ON members(share);
-- At most one unpublished tree per share: a newer local commit contains the older one.
CREATE TABLE commits(
    share BLOB PRIMARY KEY, root BLOB NOT NULL, epoch INTEGER NOT NULL, version INTEGER NOT NULL,
    base_hash BLOB NOT NULL, base_root BLOB NOT NULL, base_epoch INTEGER NOT NULL,
    base_version INTEGER NOT NULL
) WITHOUT ROWID;
-- Sealed blocks in the spool that a local commit names and the provider does not hold for certain yet.
CREATE TABLE staged(digest BLOB PRIMARY KEY, share BLOB NOT NULL, size INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX staged_by_share ON staged(share);
CREATE TABLE quarantine(
    share BLOB PRIMARY KEY, code TEXT NOT NULL, detail TEXT NOT NULL, since INTEGER NOT NULL
) WITHOUT ROWID;
-- Contacts: a JSON object per handle, in the form identity.contacts gives it.
CREATE TABLE contacts(handle TEXT PRIMARY KEY, row TEXT NOT NULL) WITHOUT ROWID;
-- Single values: clock_floor (seconds).
CREATE TABLE settings(name TEXT PRIMARY KEY, value NOT NULL) WITHOUT ROWID;
