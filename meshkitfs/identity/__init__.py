"""Identities: who this person is, whom they know, and what the identity directory says about both.

The private keys are sealed under the key vault's secret; nothing here knows where that comes from. The
directory is reached over a protocol with two methods, which a metadata home fulfils.
"""

from meshkitfs.identity._device import DeviceKeys, followed
from meshkitfs.identity._directory import Directory, Standing, publish, standing
from meshkitfs.identity._exchange import PREFIX, from_text, to_text, verification_code
from meshkitfs.identity._files import Sealer, load_identity, save_identity, write_atomically
from meshkitfs.identity._identity import (
    LIFETIME,
    Identity,
    IdentityReport,
    Pending,
    check_handle,
    create_identity,
    open_identity,
    prepared,
    promoted,
    renewal_due,
    report,
    seal_identity,
)
from meshkitfs.identity._rotation import Holder, acting_as, settle
from meshkitfs.identity._signers import Signer, Signers
from meshkitfs.identity.contacts import Contact, ContactBook, ContactStore, Trust

__all__ = [
    "LIFETIME",
    "PREFIX",
    "Contact",
    "ContactBook",
    "ContactStore",
    "DeviceKeys",
    "Directory",
    "Holder",
    "Identity",
    "IdentityReport",
    "Pending",
    "Sealer",
    "Signer",
    "Signers",
    "Standing",
    "Trust",
    "acting_as",
    "check_handle",
    "create_identity",
    "followed",
    "from_text",
    "load_identity",
    "open_identity",
    "prepared",
    "promoted",
    "publish",
    "renewal_due",
    "report",
    "save_identity",
    "seal_identity",
    "settle",
    "standing",
    "to_text",
    "verification_code",
    "write_atomically",
]
