"""Where a passphrase comes from: a file descriptor, a private file, or the terminal. Never an argument."""

from __future__ import annotations

import contextlib
import getpass
import os
import stat
import sys
from collections.abc import Mapping
from typing import Final

from ..core.secret_memory import wipe, wipe_text
from ..errors import MeshkitError

__all__ = ["FILE_VARIABLE", "PassphraseSource"]

FILE_VARIABLE: Final = "MESHKITFS_PASSPHRASE_FILE"
_MAX_BYTES: Final = 4096


class PassphraseSource:
    """Answers a prompt with the passphrase; called only when a key vault really needs one.

    The sources, first one wins: ``--passphrase-fd``, the file named by ``MESHKITFS_PASSPHRASE_FILE``, the
    terminal. What it answered is kept for the life of the command, because a descriptor reads only once.
    """

    def __init__(self, descriptor: int | None = None, environ: Mapping[str, str] = os.environ) -> None:
        self._descriptor = descriptor
        self._file = environ.get(FILE_VARIABLE)
        self._answer: str | None = None
        self._first: PassphraseSource | None = None
        self._wanted = 1
        self._read: list[str] = []

    def second(self) -> PassphraseSource:
        """Return the source of another passphrase: of the key vault that a key is moved to.

        It is the second line of the descriptor or file (where there is one line, that is for both), or asked
        on the terminal. To be called before anything was asked.
        """
        other = PassphraseSource(self._descriptor, {FILE_VARIABLE: self._file} if self._file else {})
        other._first = self
        self._wanted = 2
        return other

    def __repr__(self) -> str:
        return "PassphraseSource(...)"

    @property
    def given(self) -> bool:
        """Whether it comes from a descriptor or a file, and nobody has to be asked."""
        return self._descriptor is not None or bool(self._file)

    def forget(self) -> None:
        """Wipe the answer: a process that lives on does not keep it."""
        if self._answer is not None:
            wipe_text(self._answer)
        for line in self._read:
            wipe_text(line)
        self._answer = None
        self._read.clear()

    def __call__(self, prompt: str) -> str:
        """Return the passphrase; a person who sets a new one types it twice.

        Raises ``identity_locked`` when there is nobody and nothing to ask, ``verification_failed`` when
        what was typed differs.
        """
        if self._answer is None:
            if self._descriptor is not None or self._file:
                answer = self._lines()[0] if self._first is None else self._first._lines()[-1]
            else:
                answer = _from_terminal(prompt)
            if not answer:
                raise MeshkitError("identity_locked", "the passphrase is empty")
            self._answer = answer
        return self._answer

    def _lines(self) -> list[str]:
        if not self._read and self._descriptor is not None:
            self._read = _from_descriptor(self._descriptor, self._wanted)
        elif not self._read:
            self._read = _from_file(self._file or "", self._wanted)
        return self._read


def _from_descriptor(descriptor: int, wanted: int) -> list[str]:
    data = bytearray(_MAX_BYTES + 1)
    size = 0
    try:
        with memoryview(data) as view:
            # Into a buffer that can be wiped, and no further than needed: whoever writes may keep it open.
            while data.count(b"\n", 0, size) < wanted and (got := os.readv(descriptor, [view[size:]])):
                size += got
                if size > _MAX_BYTES:
                    raise MeshkitError(
                        "invalid_argument", f"the passphrase is longer than {_MAX_BYTES} bytes"
                    )
        os.close(descriptor)
        return _some_lines(data, size, wanted)
    except OSError as error:
        raise MeshkitError("invalid_argument", f"--passphrase-fd {descriptor}: {error.strerror}") from None
    finally:
        wipe(data)


def _from_file(path: str, wanted: int) -> list[str]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            info = os.fstat(file.fileno())
            if not stat.S_ISREG(info.st_mode) or info.st_uid != os.geteuid() or info.st_mode & 0o077:
                raise MeshkitError(
                    "invalid_config", f"{FILE_VARIABLE}: {path} must be a file of yours with mode 0600"
                )
            data = bytearray(file.read(_MAX_BYTES))
            try:
                return _some_lines(data, len(data), wanted)
            finally:
                wipe(data)
    except OSError as error:
        raise MeshkitError("invalid_config", f"{FILE_VARIABLE}: {path}: {error.strerror}") from None


def _from_terminal(prompt: str) -> str:
    # getpass falls back to an echoing read of stdin when there is no terminal; that must not happen.
    if not sys.stdin.isatty():
        try:
            os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
        except OSError:
            raise MeshkitError(
                "identity_locked",
                "a passphrase is needed and there is no terminal to ask on; "
                f"use --passphrase-fd or {FILE_VARIABLE}",
            ) from None
    from ..keyvault import NEW_PROMPTS  # its libraries take longer to load than most commands run

    with contextlib.suppress(EOFError):
        answer = getpass.getpass(prompt)
        if prompt not in NEW_PROMPTS or getpass.getpass("The same again: ") == answer:
            return answer
        raise MeshkitError("verification_failed", "what was typed the second time differs")
    return ""


def _some_lines(data: bytearray, size: int, wanted: int) -> list[str]:
    """Return the first ``wanted`` lines; of the later ones only those that are not empty."""
    lines: list[str] = []
    start = 0
    for _ in range(wanted):
        end = data.find(b"\n", start, size)
        line = bytearray(memoryview(data)[start : size if end < 0 else end])
        try:
            text = line.removesuffix(b"\r").decode("utf-8", "surrogateescape")
        finally:
            wipe(line)
        if text or not lines:
            lines.append(text)
        if end < 0:
            break
        start = end + 1
    return lines
