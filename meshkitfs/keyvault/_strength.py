"""How strong a key vault is: what may be demanded of it, and which of two is the weaker."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
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

_MET: Final[Mapping[str, Callable[[KeyVaultReport], bool]]] = {
    "hardware_backed": lambda report: report.hardware_backed is True,
    "not_exportable": lambda report: report.exportable is False,
    "persistent": lambda report: report.persistent is True,
    "user_presence": lambda report: report.user_presence is True,
}
DEMANDS: Final = tuple(_MET)
"""What can be demanded of a key vault."""

# A demand is met by what is known to be so: ``None`` in a report is "not known", and never enough.
_RANK: Final = {SECRET_SERVICE: 3, PASSPHRASE_FILE: 2, SYSTEMD_CREDENTIAL: 1, PLAIN_FILE: 0}
_CHIP, _NO_CHIP = 4, 1


def require(report: KeyVaultReport, demands: Iterable[str]) -> None:
    """Raise MeshkitError ``keyvault_too_weak`` unless the key vault meets each of ``demands``.

    A demand that this version does not know is not met: it was made by somebody who needed it.
    """
    for demand in demands:
        met = _MET.get(demand)
        if met is None or not met(report):
            raise MeshkitError("keyvault_too_weak", f"demanded: {demand}; this is a {report.kind} key vault")


def rank(report: KeyVaultReport) -> int:
    """Return a number that is larger for a stronger key vault.

    A TPM counts as one only where a chip was seen. One made of software keeps its secrets in a file: it is
    no more than a credential of systemd, of which nothing can be seen either.
    """
    if report.kind == TPM2:
        return _CHIP if report.hardware_backed is True else _NO_CHIP
    return _RANK[report.kind]
