"""How strong a key vault is: what may be demanded of it, and which of two is the weaker."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from meshkitfs.errors import MeshkitError
from meshkitfs.keyvault._api import (
    PASSPHRASE_FILE,
    PLAIN_FILE,
    SECRET_SERVICE,
    SYSTEMD_CREDENTIAL,
    TPM2,
    KeyVaultReport,
)

DEMANDS: Final = ("hardware_backed", "not_exportable", "persistent", "user_presence")
"""What can be demanded of a key vault."""

_RANK: Final = {SECRET_SERVICE: 3, PASSPHRASE_FILE: 2, SYSTEMD_CREDENTIAL: 1, PLAIN_FILE: 0}
_CHIP, _NO_CHIP = 4, 1


def unmet(report: KeyVaultReport, demands: Iterable[str]) -> str:
    """Say which of ``demands`` the key vault does not meet, and why; empty if it meets all of them.

    A demand is met by what is known to be so: ``None`` in a report is "not known", and never enough. One that
    this version does not know is not met: it was made by somebody who needed it.
    """
    for demand in demands:
        if demand not in DEMANDS:
            return f"demanded: {demand}, which this version does not know"
        if not report.available:
            return f"demanded: {demand}; the {report.kind} key vault is not there"
        if demand != "persistent" and report.session_cache is not None:
            # What the session keeps has none of what protects the key in its vault.
            return f"demanded: {demand}; the key is in this session's {report.session_cache} keyring too"
        if not _met(report, demand):
            return f"demanded: {demand}; this is a {report.kind} key vault"
    return ""


def _met(report: KeyVaultReport, demand: str) -> bool:
    if demand == "not_exportable":
        return report.exportable is False
    return getattr(report, demand) is True


def require(report: KeyVaultReport, demands: Iterable[str]) -> None:
    """Raise MeshkitError ``keyvault_too_weak`` unless the key vault meets each of ``demands``."""
    missing = unmet(report, demands)
    if missing:
        raise MeshkitError("keyvault_too_weak", missing)


def rank(report: KeyVaultReport) -> int:
    """Return a number that is larger for a stronger key vault.

    A TPM counts as one only where a chip was seen. One made of software keeps its secrets in a file: it is
    no more than a credential of systemd, of which nothing can be seen either.
    """
    if report.kind == TPM2:
        return _CHIP if report.hardware_backed is True else _NO_CHIP
    return _RANK[report.kind]
