"""Talking to a TPM 2.0: seal 32 bytes, unseal them, and what kind of thing it is that answers.

Uses tpm2-pytss (the extra ``meshkitfs[tpm]``). Every failure comes out as a `MeshkitError`; the calls block.
What is sealed and the PIN cross the bus encrypted, in a session salted with the storage key.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from meshkitfs.errors import MeshkitError

# Imported where it is used: it loads the TPM's libraries, which most homes never need.
if TYPE_CHECKING:
    from tpm2_pytss import ESAPI

DEFAULT_TPM: Final = "device:/dev/tpmrm0"
"""The kernel's resource manager of the first TPM."""

# Only what these libraries connect to by themselves: other transmission interfaces can run programs.
_TCTI: Final = re.compile(
    r"device:/dev/tpm(?:rm)?\d{1,3}|swtpm:path=/[^,\s$]{1,100}|swtpm:host=127\.0\.0\.1,port=\d{1,5}", re.ASCII
)
# The storage key that every program can make again in the same TPM (ECC P-256, AES-128-CFB).
_STORAGE_KEY: Final = "ecc256:aes128cfb"
_PIN_LABEL: Final = b"mk/tpm-pin@1\0"
# TPM_PT_*: what a TPM says of itself (TPM 2.0 Library, Part 2, 6.13).
_MANUFACTURER, _VENDOR, _PERMANENT = 0x105, 0x106, 0x200
_COUNTER, _MAX_TRIES, _INTERVAL = 0x20E, 0x20F, 0x210
_IN_LOCKOUT: Final = 0x200
# Software that answers as a TPM: libtpms (swtpm, QEMU's emulated one), and Microsoft's reference.
_SIMULATORS: Final = ((b"IBM", b"SW"), (b"MSFT", b""))


@dataclass(frozen=True, slots=True)
class Sealed:
    """A key sealed by one TPM: the two parts of the object, and the name of the storage key above it."""

    public: bytes
    private: bytes
    parent: bytes


@dataclass(frozen=True, slots=True)
class Nature:
    """What a TPM is. ``chip``: not one made of software, as far as can be seen. ``tries``: how many wrong
    PINs it still takes; ``lockout``: it takes none now; ``interval`` (s): until it takes one more."""

    chip: bool
    name: str
    tries: int
    lockout: bool
    interval: int


def checked_tcti(tcti: str) -> str:
    """Return ``tcti`` if it names a TPM, or a software TPM, of this machine; else ``invalid_argument``."""
    if _TCTI.fullmatch(tcti) is None:
        raise MeshkitError(
            "invalid_argument",
            f"no TPM {tcti!r}: device:/dev/tpmrm0, swtpm:path=SOCKET or swtpm:host=127.0.0.1,port=N",
        )
    return tcti


class Tpm:
    """One conversation with a TPM, from `opened`."""

    def __init__(self, esapi: ESAPI, tcti: str) -> None:
        self._esapi = esapi
        self._tcti = tcti

    @classmethod
    @contextlib.contextmanager
    def opened(cls, tcti: str) -> Iterator[Tpm]:
        """Connect to the TPM. Raises MeshkitError ``keyvault_unavailable``."""
        device = checked_tcti(tcti).removeprefix("device:")
        # Otherwise its libraries write to stderr what we raise.
        os.environ.setdefault("TSS2_LOG", "all+NONE")
        try:
            from tpm2_pytss import ESAPI
        except (ImportError, OSError):
            raise MeshkitError(
                "keyvault_unavailable", "Python's tpm2-pytss is not installed: pip install 'meshkitfs[tpm]'"
            ) from None
        if device != tcti and not os.access(device, os.R_OK | os.W_OK):
            why = "may not be used by you (group tss)" if os.path.exists(device) else "is not there"
            raise MeshkitError("keyvault_unavailable", f"the TPM {device} {why}")
        with _classified(tcti):
            esapi = ESAPI(tcti)
        try:
            yield cls(esapi, tcti)
        finally:
            esapi.close()

    def nature(self) -> Nature:
        with _classified(self._tcti):
            values = self._properties(_MANUFACTURER, 2) | self._properties(_COUNTER, 3)
            values |= self._properties(_PERMANENT, 1)
        maker, model = (values.get(at, 0).to_bytes(4, "big").strip(b"\0 ") for at in (_MANUFACTURER, _VENDOR))
        software = any(maker == name and model.startswith(begin) for name, begin in _SIMULATORS)
        return Nature(
            chip=not software and is_tpm_device(self._tcti.removeprefix("device:")),
            name=f"{maker.decode('ascii', 'replace')} {model.decode('ascii', 'replace')}".strip(),
            tries=max(0, values.get(_MAX_TRIES, 0) - values.get(_COUNTER, 0)),
            lockout=bool(values.get(_PERMANENT, 0) & _IN_LOCKOUT),
            interval=values.get(_INTERVAL, 0),
        )

    def seal(self, secret: bytes, pin: str | None, pcrs: tuple[int, ...]) -> Sealed:
        """Seal ``secret`` for this TPM, under a PIN and the present values of ``pcrs`` (SHA-256 bank)."""
        from tpm2_pytss import types as t
        from tpm2_pytss.constants import TPM2_ALG, TPMA_OBJECT

        attributes = TPMA_OBJECT.FIXEDTPM | TPMA_OBJECT.FIXEDPARENT
        if not pcrs:
            attributes |= TPMA_OBJECT.USERWITHAUTH
        if pin is None:
            # Nothing to guess, so other programs' wrong guesses must not lock it.
            attributes |= TPMA_OBJECT.NODA
        with _classified(self._tcti), self._storage_key() as (parent, name):
            template = t.TPM2B_PUBLIC(
                t.TPMT_PUBLIC(
                    type=TPM2_ALG.KEYEDHASH,
                    nameAlg=TPM2_ALG.SHA256,
                    objectAttributes=attributes,
                    authPolicy=self._policy(pin is not None, pcrs) if pcrs else t.TPM2B_DIGEST(),
                    parameters=t.TPMU_PUBLIC_PARMS(
                        keyedHashDetail=t.TPMS_KEYEDHASH_PARMS(t.TPMT_KEYEDHASH_SCHEME(TPM2_ALG.NULL))
                    ),
                )
            )
            inside = t.TPM2B_SENSITIVE_CREATE(
                t.TPMS_SENSITIVE_CREATE(userAuth=_authorization(pin), data=secret)
            )
            with self._session(parent, policy=False) as session:
                private, public, *_ = self._esapi.create(parent, inside, template, session1=session)
            return Sealed(bytes(public.marshal()), bytes(private.marshal()), name)

    def unseal(self, sealed: Sealed, pin: str | None, pcrs: tuple[int, ...]) -> bytes:
        """Return what was sealed.

        Raises MeshkitError ``keyvault_replaced`` before the PIN is used, ``wrong_passphrase``,
        ``keyvault_locked_out``, ``keyvault_pcr_changed``.
        """
        from tpm2_pytss import types as t

        with _classified(self._tcti), self._storage_key() as (parent, name):
            if name != sealed.parent:
                raise MeshkitError("keyvault_replaced", f"the TPM at {self._tcti} has another storage key")
            private, _ = t.TPM2B_PRIVATE.unmarshal(sealed.private)
            public, _ = t.TPM2B_PUBLIC.unmarshal(sealed.public)
            with self._flushed(self._esapi.load(parent, private, public)) as handle:
                self._esapi.tr_set_auth(handle, _authorization(pin))
                with self._session(parent, policy=bool(pcrs)) as session:
                    if pcrs:
                        self._demand(session, pin is not None, pcrs)
                    return bytes(self._esapi.unseal(handle, session1=session))

    def _properties(self, first: int, count: int) -> dict[int, int]:
        from tpm2_pytss.constants import TPM2_CAP

        _, data = self._esapi.get_capability(TPM2_CAP.TPM_PROPERTIES, first, count)
        return {int(item.property): int(item.value) for item in data.data.tpmProperties}

    @contextlib.contextmanager
    def _storage_key(self) -> Iterator[tuple[Any, bytes]]:
        from tpm2_pytss import types as t
        from tpm2_pytss.constants import TPMA_OBJECT

        # NODA, as the TCG's own template has it: it has no password, so wrong PINs must not lock it.
        template = t.TPM2B_PUBLIC.parse(
            _STORAGE_KEY,
            objectAttributes=TPMA_OBJECT.RESTRICTED
            | TPMA_OBJECT.DECRYPT
            | TPMA_OBJECT.FIXEDTPM
            | TPMA_OBJECT.FIXEDPARENT
            | TPMA_OBJECT.SENSITIVEDATAORIGIN
            | TPMA_OBJECT.USERWITHAUTH
            | TPMA_OBJECT.NODA,
        )
        handle, public, *_ = self._esapi.create_primary(t.TPM2B_SENSITIVE_CREATE(), template)
        with self._flushed(handle):
            yield handle, bytes(public.get_name())

    @contextlib.contextmanager
    def _session(self, parent: Any, *, policy: bool) -> Iterator[Any]:
        """A session whose parameters are encrypted with a key that only the TPM can have made out."""
        from tpm2_pytss.constants import ESYS_TR, TPM2_SE, TPMA_SESSION

        kind = TPM2_SE.POLICY if policy else TPM2_SE.HMAC
        with self._started(parent, ESYS_TR.NONE, kind, _aes()) as session:
            flags = TPMA_SESSION.DECRYPT | TPMA_SESSION.ENCRYPT | TPMA_SESSION.CONTINUESESSION
            self._esapi.trsess_set_attributes(session, flags)
            yield session

    def _policy(self, pin: bool, pcrs: tuple[int, ...]) -> Any:
        from tpm2_pytss import types as t
        from tpm2_pytss.constants import ESYS_TR, TPM2_ALG, TPM2_SE

        no_cipher = t.TPMT_SYM_DEF(algorithm=TPM2_ALG.NULL)
        with self._started(ESYS_TR.NONE, ESYS_TR.NONE, TPM2_SE.TRIAL, no_cipher) as trial:
            self._demand(trial, pin, pcrs)
            return self._esapi.policy_get_digest(trial)

    def _demand(self, session: Any, pin: bool, pcrs: tuple[int, ...]) -> None:
        from tpm2_pytss import types as t

        selection = t.TPML_PCR_SELECTION.parse("sha256:" + ",".join(map(str, pcrs)))
        self._esapi.policy_pcr(session, t.TPM2B_DIGEST(), selection)
        if pin:
            self._esapi.policy_auth_value(session)

    @contextlib.contextmanager
    def _started(self, parent: Any, bind: Any, kind: Any, cipher: Any) -> Iterator[Any]:
        from tpm2_pytss.constants import TPM2_ALG

        session = self._esapi.start_auth_session(parent, bind, kind, cipher, TPM2_ALG.SHA256)
        with self._flushed(session):
            yield session

    @contextlib.contextmanager
    def _flushed(self, handle: Any) -> Iterator[Any]:
        """Without a resource manager a TPM keeps three objects at most; what stays would lock us out."""
        from tpm2_pytss import TSS2_Exception

        try:
            yield handle
        finally:
            with contextlib.suppress(TSS2_Exception):
                self._esapi.flush_context(handle)


def is_tpm_device(path: str, sysfs: Path = Path("/sys/dev/char")) -> bool:
    """Whether ``path`` is a device that a driver of the kernel's TPM subsystem found on a bus.

    A proxy that a program made (vtpm) has no bus. ``sysfs`` is where the kernel lists character devices.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISCHR(status.st_mode):
            return False
        entry = sysfs / f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
        return (entry / "subsystem").resolve().name in ("tpm", "tpmrm") and (entry / "device").exists()
    except OSError:
        return False


def _authorization(pin: str | None) -> bytes:
    """A PIN of any length as 32 characters: a TPM takes no more, and would cut zeros off the end of bytes."""
    if pin is None:
        return b""
    return hashlib.sha256(_PIN_LABEL + pin.encode()).hexdigest()[:32].encode()


def _aes() -> Any:
    from tpm2_pytss import types as t
    from tpm2_pytss.constants import TPM2_ALG

    return t.TPMT_SYM_DEF(
        algorithm=TPM2_ALG.AES,
        keyBits=t.TPMU_SYM_KEY_BITS(aes=128),
        mode=t.TPMU_SYM_MODE(aes=TPM2_ALG.CFB),
    )


@contextlib.contextmanager
def _classified(tcti: str) -> Iterator[None]:
    from tpm2_pytss import TSS2_Exception
    from tpm2_pytss.constants import TPM2_RC

    try:
        yield
    except TSS2_Exception as error:
        # Without the number of the handle, session or parameter that it is about.
        code = int(error.error)
        if code in (TPM2_RC.AUTH_FAIL, TPM2_RC.BAD_AUTH):
            raise MeshkitError("wrong_passphrase", f"the TPM at {tcti} does not take the PIN") from None
        if code == TPM2_RC.LOCKOUT:
            raise MeshkitError("keyvault_locked_out", f"the TPM at {tcti}") from None
        if code in (TPM2_RC.POLICY_FAIL, TPM2_RC.PCR_CHANGED):
            raise MeshkitError("keyvault_pcr_changed", f"the TPM at {tcti}") from None
        if code == TPM2_RC.INTEGRITY:
            raise MeshkitError("keyvault_replaced", f"the TPM at {tcti} did not make this key") from None
        raise MeshkitError("keyvault_unavailable", f"the TPM at {tcti}: {error}") from None
    except (RuntimeError, OSError, ValueError) as error:
        raise MeshkitError("keyvault_unavailable", f"the TPM at {tcti} ({type(error).__name__})") from None
