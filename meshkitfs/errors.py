"""Every way meshkitfs can fail: one table, one exception.

A failure has a stable ``code`` (a script may depend on it), a sentence for the person, a remedy that
person can act on, an errno for the kernel and an exit code for the shell. The four places that show a
failure (xattr ``user.meshkit.reason``, ``.meshkit/errors.txt``, ``meshkitfs explain`` and the log) all
print the same row of this table.

Codes that MeshKit's public documentation names are used with MeshKit's spelling; the others are ours.
The rule for errno: *the gate answers EACCES, the bytes answer EIO*. ENOENT is never used for something
a manifest says exists.

This module imports nothing of the project, and everything may import it.
"""

from __future__ import annotations

import errno as _errno
from dataclasses import dataclass
from typing import Final

__all__ = ["TABLE", "MeshkitError", "Reason", "exit_code_for"]


@dataclass(frozen=True, slots=True)
class Reason:
    """One row of the error table: what happened, in words, and what to do about it."""

    code: str
    category: str
    errno: int
    sentence: str
    remedy: str


# Exit codes are by category, so that a script can tell "you may not" from "the disk is full" without
# parsing text. They are part of the CLI's interface (docs/cli.md) and never change meaning.
_EXIT_CODES: Final = {
    "usage": 2,
    "config": 3,
    "identity": 4,
    "access": 5,
    "integrity": 6,
    "unavailable": 7,
    "space": 8,
    "conflict": 9,
    "mount": 10,
    "internal": 70,
}

# One row, three lines: what it is, what happened, what to do.
# fmt: off
_ROWS: Final = (
    # -- the gate: who may open what, and is that provable now ---------------------------------------
    ("identity_not_found", "identity", _errno.EACCES,
     "There is no identity on this device.",
     "Create one with 'meshkitfs init', or point MESHKITFS_HOME at the home that holds it."),
    ("identity_locked", "identity", _errno.EACCES,
     "This identity is locked, or the key vault that holds it cannot be reached.",
     "If it is mounted, run 'meshkitfs unlock'; else unlock the keyring or give the passphrase. "
     "'meshkitfs doctor' says which key vault is meant."),
    ("recipient_not_authorized", "access", _errno.EACCES,
     "No capsule of this share is addressed to this identity.",
     "Ask the owner to run 'meshkitfs share add' for this identity."),
    ("key_unwrap_failed", "access", _errno.EACCES,
     "The capsule does not open with this identity's key, or the key in it is not the one it promises.",
     "Ask the owner to grant the share again; the capsule was damaged, or made for another key."),
    ("capsule_not_found", "access", _errno.EACCES,
     "The grant (capsule) for this share cannot be found or is not signed by the share's owner.",
     "Check that the metadata store is the one the owner uses, then ask for a new grant."),
    ("share_expired", "access", _errno.EACCES,
     "The grant is outside its validity time.",
     "Ask the owner for a new grant; if the date on this device is wrong, correct it."),
    ("share_revoked", "access", _errno.EACCES,
     "The owner has revoked this grant.",
     "Ask the owner to share it again if this was not meant."),
    ("freshness_unproven", "access", _errno.EACCES,
     "Nobody vouches that this grant is still valid now: the proof is missing, old or not believable.",
     "Check the connection to the metadata store and this device's clock, then try again."),
    ("policy_provider_required", "access", _errno.EACCES,
     "The grant demands a policy decision and no policy provider is configured.",
     "Configure the policy provider that the owner named, or ask for a grant without a policy."),
    ("policy_provider_error", "access", _errno.EACCES,
     "The policy provider did not give a usable answer.",
     "Try again; if it persists, tell whoever runs the policy provider."),
    ("policy_denied", "access", _errno.EACCES,
     "The policy provider refused.",
     "Ask the owner of the policy."),
    ("keyvault_strength_required", "access", _errno.EACCES,
     "The grant demands more of the key vault than this home's key vault gives.",
     "'meshkitfs keyvault list' shows what each kind gives, 'meshkitfs keyvault migrate' moves the key; or "
     "ask the owner for a grant without that demand."),
    ("vault_membership_required", "access", _errno.EACCES,
     "The grant demands membership of a vault, and that membership is not proved.",
     "Ask the owner to add this identity to the vault."),
    ("capability_required", "access", _errno.EACCES,
     "The grant demands a capability token and none was presented.",
     "Ask the owner for the token."),
    ("capability_denied", "access", _errno.EACCES,
     "The capability token does not allow this, or is not good (any more).",
     "Ask the owner for a new token, or for one with the right it lacks."),
    ("biscuit_not_installed", "access", _errno.EACCES,
     "The capability token is a Biscuit, and this installation cannot read those.",
     "Install the optional part ('pip install meshkitfs[biscuit]') and mount again, or ask the issuer for a "
     "token in the built-in format."),
    ("key_release_refused", "access", _errno.EACCES,
     "The service that holds the other half of this share's key does not hand it out.",
     "The detail has its reason: ask the share's owner for what is missing there."),
    ("key_release_unavailable", "access", _errno.EACCES,
     "The service that holds the other half of this share's key gave no usable answer.",
     "Try again; if it stays, tell whoever runs that service, and check this device's clock. A service that "
     "this home does not know has to be named in its configuration ('release.service')."),
    ("right_not_granted", "access", _errno.EACCES,
     "The grant does not include this right.",
     "Ask the owner for it ('meshkitfs share add SHARE YOU --rights write')."),
    ("key_replaced", "access", _errno.EACCES,
     "The list of who has access is signed with a key that the share's owner has replaced.",
     "Ask the owner to run 'meshkitfs identity rotate' again, which signs it with the new key. If that is "
     "done, somebody else uses the old key, and this share stays closed until the true list is back."),
    # -- the bytes: what came back is not what was stored ---------------------------------------------
    ("cid_mismatch", "integrity", _errno.EIO,
     "The store returned bytes that do not match their CID; they were thrown away unread.",
     "Nothing was decrypted. Restore the block at the store, or read from another copy of it."),
    ("invalid_envelope", "integrity", _errno.EIO,
     "A sealed object does not open, or is not what its place says it is.",
     "The data was not written by a holder of this share's keys; tell the share's owner."),
    ("invalid_record", "integrity", _errno.EIO,
     "A signed record is malformed, or its signature is not valid.",
     "The metadata store holds something no member of the share signed; tell the share's owner."),
    ("head_rollback", "integrity", _errno.EIO,
     "The metadata store offers an older state of this share than this device has already seen.",
     "The share is quarantined here. If the store was restored from a backup on purpose, run "
     "'meshkitfs share accept-rollback SHARE'."),
    ("head_fork", "integrity", _errno.EIO,
     "The metadata store shows this device another history of the share than it did before.",
     "The share is quarantined here. Compare with the other members, then run "
     "'meshkitfs share accept-rollback SHARE'."),
    ("roster_rollback", "integrity", _errno.EIO,
     "The metadata store offers an older list of who has access than this device has already seen.",
     "The share is quarantined here until the newer one is back. If the store was restored from a backup on "
     "purpose, run 'meshkitfs share accept-rollback SHARE'."),
    ("roster_fork", "integrity", _errno.EIO,
     "The metadata store shows another list of who has access, under the number of the one seen before.",
     "The share is quarantined here until the one seen is back. Compare with the other members; if the store "
     "was restored on purpose, run 'meshkitfs share accept-rollback SHARE'."),
    ("verify_failed", "integrity", _errno.EIO,
     "Blocks are missing or damaged.",
     "'meshkitfs repair SHARE --from local:DIR' fetches them from another copy of the store."),
    ("gc_unsafe", "integrity", _errno.EIO,
     "It is not certain what is still needed, so nothing was deleted.",
     "The detail says what cannot be found; look at it with 'meshkitfs verify', then try again."),
    ("block_unavailable", "unavailable", _errno.EIO,
     "A block that the manifest names is not at the store.",
     "Bring the store back, or have 'meshkitfs repair' fetch the block from a copy of it; without a copy, "
     "'meshkitfs restore SHARE --at WHEN --exact' goes back to a version that is whole."),
    ("provider_http_error", "unavailable", _errno.EIO,
     "The byte store answered with an error.",
     "The detail has its answer; 'meshkitfs providers test' tries each step. Unsent changes stay here."),
    ("provider_request_failed", "unavailable", _errno.EIO,
     "The byte store could not be reached or did not answer in time.",
     "Check that it runs and is reachable; 'meshkitfs providers test' tries it. Unsent changes stay here."),
    ("metadata_unavailable", "unavailable", _errno.EIO,
     "The metadata store cannot be reached or read.",
     "Check its path or address with 'meshkitfs doctor'. Nothing here was changed."),
    ("metadata_unauthorized", "access", _errno.EACCES,
     "The metadata service does not accept that this request comes from a member of it.",
     "Check this device's clock ('meshkitfs doctor'). Somebody who is new there needs an invitation or the "
     "service's token: see 'meshkitfs init --help'."),
    ("metadata_forbidden", "access", _errno.EACCES,
     "The metadata service knows this identity and does not allow it to do that.",
     "Only the owner of a mailbox, share or record may do this; ask the owner, or whoever runs the service."),
    ("service_key_changed", "access", _errno.EACCES,
     "The metadata service shows another key for its timestamps than this home has known.",
     "Ask whoever runs the service whether that is meant; if it is, run "
     "'meshkitfs doctor --trust-service'."),
    ("roster_not_renewed", "unavailable", _errno.EIO,
     "The list of who has access to a share of yours runs out before long, and could not be renewed.",
     "It is tried again by itself while this home is mounted. When the list has run out, the share closes "
     "for everybody else until it is renewed; the detail says what keeps it from that."),
    ("rate_limited", "unavailable", _errno.EIO,
     "The service is asked too often by this identity or address.",
     "It is tried again by itself; wait a minute if this stays."),
    ("quota_exceeded", "space", _errno.EDQUOT,
     "What this identity may keep at the service is used up.",
     "Remove what is not needed any more, or ask whoever runs the service for more."),
    ("no_space", "space", _errno.ENOSPC,
     "There is no room left for this.",
     "Free some space where the blocks are kept; 'meshkitfs status' shows what is waiting."),
    ("head_conflict", "conflict", _errno.EIO,
     "Somebody else published a newer version at the same moment.",
     "It is merged and tried again by itself; run 'meshkitfs sync' if this message stays."),
    ("sync_conflict", "conflict", _errno.EEXIST,
     "Another job or record has that key or id already, or has ended.",
     "Look at the one that is there; the conflict policies 'dedupe' and 'replace' do not refuse."),
    ("commit_pending", "unavailable", _errno.EIO,
     "The change is safe on this device, but is not published yet.",
     "It is retried by itself; 'meshkitfs status' shows what is waiting and why."),
    # -- this device ------------------------------------------------------------------------------------
    ("state_corrupt", "integrity", _errno.EIO,
     "This device's own memory (state.db) is damaged or was written with another key.",
     "Restore state.db from a backup. Keep the damaged file: the list of shares, and changes that were "
     "never published, are only in it."),
    ("home_busy", "conflict", _errno.EBUSY,
     "Another meshkitfs process is using this home directory.",
     "Use the running mount (the commands talk to it), or end it with 'meshkitfs umount'."),
    ("not_initialized", "config", _errno.EACCES,
     "This home directory has not been set up.",
     "Run 'meshkitfs init'."),
    ("already_initialized", "config", _errno.EEXIST,
     "This home directory already holds an identity.",
     "Use it as it is, or set MESHKITFS_HOME to another directory."),
    ("invalid_config", "config", _errno.EINVAL,
     "The configuration is not valid.",
     "Correct the named field; docs/operations.md lists them all."),
    ("invalid_cli_config", "config", _errno.EINVAL,
     "The configuration file cannot be read.",
     "Correct the file; docs/operations.md has an example with every field."),
    ("keyvault_unavailable", "identity", _errno.EACCES,
     "The chosen key vault cannot be used on this machine.",
     "Start, unlock or install what is missing ('meshkitfs keyvault list' shows each kind), or choose "
     "another with --key-vault."),
    ("keyvault_refused", "identity", _errno.EACCES,
     "That key vault would be weaker than what was asked for, so it is not used.",
     "Choose a key vault by name; nothing falls back to a weaker one by itself."),
    ("keyvault_too_weak", "identity", _errno.EACCES,
     "The key vault does not give what is demanded of it.",
     "'meshkitfs keyvault list' shows what each kind gives; 'meshkitfs keyvault migrate' moves the key."),
    ("keyvault_locked_out", "identity", _errno.EACCES,
     "The TPM takes no PIN for now, because too many were wrong.",
     "Wait as long as the detail says. Whoever has the TPM's lockout password can end it: "
     "'tpm2_dictionarylockout --clear-lockout'."),
    ("keyvault_pcr_changed", "identity", _errno.EACCES,
     "The machine was started in another way than the key in the TPM is bound to.",
     "Start it as before (firmware settings, boot loader, Secure Boot). After a change that is meant to "
     "stay, restore the home from a backup whose key vault is of another kind."),
    ("keyvault_replaced", "identity", _errno.EACCES,
     "What the key was sealed with is not there any more: another TPM, a cleared one, or another credential.",
     "Bring that machine or that credential back, or restore the home from a backup whose key vault is of "
     "another kind."),
    ("wrong_passphrase", "identity", _errno.EACCES,
     "The passphrase or PIN does not open the key vault, or the exported identity.",
     "Try again; there is no way around a lost passphrase."),
    ("identity_corrupt", "identity", _errno.EIO,
     "A file that keeps this identity (its key vault file or identity.sealed) is damaged.",
     "Restore that file from a backup of the home directory. Keep the damaged one: without it and without "
     "a backup nobody can open what was shared with this identity."),
    ("sealed_file_invalid", "identity", _errno.EIO,
     "This is not a whole export of an identity, or recovery file: damaged, cut short, or something else.",
     "Nothing was done with it. Take another copy of the file, and see whether it is 'import' or "
     "'recovery restore' that is for it."),
    ("sealed_file_version", "identity", _errno.EINVAL,
     "The file was written by a newer version of meshkitfs.",
     "Install that version here."),
    ("wrong_words", "identity", _errno.EACCES,
     "These are not the words of this recovery file.",
     "Compare them with what was written down, in their order; each file has words of its own."),
    ("identity_outdated", "identity", _errno.EACCES,
     "The keys in the file are not the newest of this identity: they were replaced after it was written.",
     "Take a file that was written after the last 'meshkitfs identity rotate'. If it is the directory that "
     "has lost what it knew, say --unchecked."),
    ("device_revoked", "identity", _errno.EACCES,
     "This device was taken off the list of the identity's devices: its keys are of no use any more.",
     "If that was you: set up a new home with 'meshkitfs device request'. If it was not, find out who has "
     "your other devices."),
    ("device_not_found", "usage", _errno.ENOENT,
     "There is no such device.",
     "'meshkitfs device list' shows those of this identity. For a code: the new device has to wait with "
     "'meshkitfs device request', at the same metadata store."),
    ("device_exists", "conflict", _errno.EEXIST,
     "This identity has a device of that name, or as many devices as it may have.",
     "Choose another name, or run 'meshkitfs device revoke' for one that is gone."),
    ("device_behind", "conflict", _errno.EIO,
     "Another device of this identity has changed something that has not arrived here yet.",
     "Try again in a moment. If it stays so, mount the other device once, so that it can send the rest."),
    ("clock_rollback", "access", _errno.EACCES,
     "This device's clock is behind a time it has already shown.",
     "Correct the clock. If it was wrong before and is right now, run 'meshkitfs doctor --reset-clock'; "
     "until then every share stays closed."),
    # -- people --------------------------------------------------------------------------------------------
    ("contact_unknown", "usage", _errno.ENOENT,
     "Nobody of that name is known here or in the directory.",
     "Ask them to run 'meshkitfs identity publish', or add their record with 'meshkitfs contacts add'."),
    ("contact_key_changed", "access", _errno.EACCES,
     "The directory shows another key for this contact, without a valid chain from the old one.",
     "Do not share until you have compared fingerprints in person; then add the contact again."),
    ("verification_failed", "access", _errno.EACCES,
     "The code does not belong to this contact and you.",
     "Compare again, in person or by voice. If it still differs, somebody is in between."),
    ("identity_handle_taken", "conflict", _errno.EEXIST,
     "The directory already holds another identity of that name.",
     "Choose another name with 'meshkitfs init --identity NAME'."),
    # -- what was asked for -----------------------------------------------------------------------------
    ("share_not_found", "usage", _errno.ENOENT,
     "There is no share of that name here.",
     "'meshkitfs share list' shows the shares."),
    ("not_owner", "access", _errno.EACCES,
     "Only the owner of a share can do this.",
     "Ask the owner; 'meshkitfs share show SHARE' names them."),
    ("not_shared", "usage", _errno.ENOENT,
     "Nobody of that name has access to this share.",
     "'meshkitfs share show SHARE' lists who has."),
    ("share_exists", "usage", _errno.EEXIST,
     "There is already a share of that name here.",
     "Choose another name."),
    ("invalid_name", "usage", _errno.EINVAL,
     "That is not a usable name.",
     "A share name has 1 to 255 bytes, no '/', no NUL, and does not start with a dot."),
    ("invalid_argument", "usage", _errno.EINVAL,
     "That argument is not understood.",
     "See 'meshkitfs COMMAND --help'."),
    ("invalid_cid", "usage", _errno.EINVAL,
     "That is not a CID this system uses (CIDv1, raw, sha2-256, base32).",
     "Copy the CID again, whole; it starts with 'bafkrei' and has 59 characters."),
    ("policy_not_found", "usage", _errno.ENOENT,
     "There is no policy of that name here, and no policy provider is configured that could have it.",
     "'meshkitfs policy list' shows the policies; 'meshkitfs policy create' makes one."),
    ("policy_exists", "conflict", _errno.EEXIST,
     "There is already a policy of that name here.",
     "Change it with 'meshkitfs policy edit', or choose another name."),
    ("policy_invalid", "usage", _errno.EINVAL,
     "The rules of the policy are not valid.",
     "Correct the places that are named; docs/policies.md says what rules may use. Nothing was changed."),
    ("policy_in_use", "conflict", _errno.EBUSY,
     "Grants still demand this policy.",
     "Give these people a grant without it, or revoke them; then delete the policy."),
    ("letter_not_found", "usage", _errno.ENOENT,
     "There is no such invitation in the inbox.",
     "'meshkitfs inbox' lists them."),
    ("vault_not_found", "usage", _errno.ENOENT,
     "There is no vault of this home's own with that name, or nobody of that name in it.",
     "List them with 'meshkitfs vault list' and 'meshkitfs vault show NAME'."),
    ("vault_exists", "usage", _errno.EEXIST,
     "There is a vault of that name already.",
     "Choose another name, or add members to that one."),
    ("capability_not_found", "usage", _errno.ENOENT,
     "There is no capability token of that id here.",
     "List those that are held and issued with 'meshkitfs capability list'."),
    ("path_not_found", "usage", _errno.ENOENT,
     "There is no such path in the share.",
     "Check the spelling; 'meshkitfs share show SHARE' tells what is there."),
    ("path_exists", "conflict", _errno.EEXIST,
     "Something else is at that place already.",
     "Nothing was changed there; name another place with --to."),
    ("version_not_found", "usage", _errno.ENOENT,
     "No such version is kept.",
     "'meshkitfs history SHARE' lists the versions that are."),
    ("version_not_granted", "access", _errno.EACCES,
     "This version is from a time for which this identity was never given a key.",
     "Ask the owner, or somebody who had access then, to bring back what is needed."),
    ("not_supported", "usage", _errno.EOPNOTSUPP,
     "This is not supported.",
     "docs/known-gaps.md lists the deliberate gaps and what to do instead."),
    # -- mounting ------------------------------------------------------------------------------------------
    ("fuse_missing", "mount", _errno.ENODEV,
     "/dev/fuse cannot be opened.",
     "Load the module ('sudo modprobe fuse'); in a container pass the device in (--device /dev/fuse). If it "
     "is there but refused, an administrator has to let users open it (mode 0666 is usual)."),
    ("fusermount_missing", "mount", _errno.ENOENT,
     "The program fusermount3 is not installed or not set up for ordinary users.",
     "Install it: 'sudo apt-get install fuse3'."),
    ("mountpoint_missing", "mount", _errno.ENOENT,
     "The mount point does not exist or is not a directory.",
     "Make it ('mkdir -p DIR') and try again."),
    ("mountpoint_busy", "mount", _errno.EBUSY,
     "Something is already mounted there.",
     "Use that mount, or end it with 'meshkitfs umount DIR'."),
    ("mount_in_use", "mount", _errno.EBUSY,
     "A program is still using the mount, so it stays mounted.",
     "End that program ('fuser -vm DIR' shows it) or leave the directory; 'umount --force' cuts it off."),
    ("mountpoint_stale", "mount", _errno.ENOTCONN,
     "A mount whose daemon has died is still there.",
     "Clear it with 'meshkitfs umount DIR'; 'meshkitfs mount' does so by itself where it may."),
    ("mountpoint_not_empty", "mount", _errno.ENOTEMPTY,
     "The mount point is not empty; its files would be hidden.",
     "Choose an empty directory, or say --nonempty if hiding them is meant."),
    ("mountpoint_inside_state", "mount", _errno.EINVAL,
     "The mount point is inside meshkitfs' own state, or the state is inside the mount point.",
     "Choose another directory; a filesystem that stores itself inside itself hangs."),
    ("mount_failed", "mount", _errno.EIO,
     "The kernel refused the mount.",
     "The detail says why; 'meshkitfs doctor' checks the usual causes."),
    ("not_mounted", "mount", _errno.ENOENT,
     "Nothing of ours is mounted there.",
     "'meshkitfs status' shows the mounts."),
    ("daemon_unreachable", "mount", _errno.EIO,
     "The daemon of this home does not answer.",
     "Look at its log (the path is in 'meshkitfs doctor'); end it with 'meshkitfs umount'."),
    ("operation_aborted", "unavailable", _errno.EINTR,
     "The operation was stopped before it was done.",
     "Run it again; what was already done is kept."),
    ("output_failed", "unavailable", _errno.EIO,
     "What the command printed could not be written.",
     "Look at where its output goes: a disk may be full. What the command does may be done already."),
    ("timed_out", "unavailable", _errno.ETIMEDOUT,
     "It did not finish in the time given.",
     "Try again, with a longer --timeout if the work is large."),
    ("internal_error", "internal", _errno.EIO,
     "Something went wrong that should not be possible.",
     "Please report it with the log; no data was given up."),
)
# fmt: on

TABLE: Final[dict[str, Reason]] = {row[0]: Reason(*row) for row in _ROWS}


class MeshkitError(Exception):
    """A classified failure. ``code`` is a key of `TABLE`; an unknown code is a programming error.

    ``detail`` may name paths, CIDs, share names and fields, never keys, tokens or plaintext: it is
    shown to people and written to logs.
    """

    def __init__(self, code: str, detail: str = "") -> None:
        self.reason = TABLE[code]
        self.detail = detail
        super().__init__(f"{code}: {detail or self.reason.sentence}")

    @property
    def code(self) -> str:
        return self.reason.code

    @property
    def errno(self) -> int:
        """What a system call answers for this failure."""
        return self.reason.errno

    @property
    def remedy(self) -> str:
        return self.reason.remedy

    def as_dict(self) -> dict[str, str]:
        """The form the CLI prints with ``--json`` and the control socket carries."""
        return {
            "code": self.code,
            "message": self.reason.sentence,
            "detail": self.detail,
            "suggestion": self.remedy,
        }


def exit_code_for(error: MeshkitError) -> int:
    """Return the documented process exit code for ``error``."""
    return _EXIT_CODES[error.reason.category]
