"""Identities: who this person is, whom they know, and what the identity directory says about both.

The private keys are sealed under the key vault's secret; nothing here knows where that comes from. The
directory is reached over a protocol with two methods, which a metadata home fulfils.
"""

from meshkitfs.identity._directory import Directory, Standing, publish, standing
from meshkitfs.identity._exchange import PREFIX, from_text, to_text, verification_code
from meshkitfs.identity._files import load_identity, save_identity, write_atomically
from meshkitfs.identity._identity import (
    LIFETIME,
    Identity,
    IdentityReport,
    check_handle,
    create_identity,
    open_identity,
    renewed,
    report,
    seal_identity,
)
from meshkitfs.identity.contacts import Contact, ContactBook, ContactStore, Trust

__all__ = [
    "LIFETIME",
    "PREFIX",
    "Contact",
    "ContactBook",
    "ContactStore",
    "Directory",
    "Identity",
    "IdentityReport",
    "Standing",
    "Trust",
    "check_handle",
    "create_identity",
    "from_text",
    "load_identity",
    "open_identity",
    "publish",
    "renewed",
    "report",
    "save_identity",
    "seal_identity",
    "standing",
    "to_text",
    "verification_code",
    "write_atomically",
]
