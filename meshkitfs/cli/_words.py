"""The words of a recovery file: 24 of the BIP 39 list, which spell 256 random bits and a checksum.

They are shown once, on the terminal itself and never on standard output, or written to a descriptor; and read
from a terminal without being shown, or from a descriptor. Never an argument.
"""

from __future__ import annotations

import getpass
import os
from typing import Final

from ..core.secret_memory import wipe, wipe_text
from ..errors import MeshkitError

__all__ = ["WORDS", "WordsPlace", "ask_words", "words_of"]

WORDS: Final = 24
_PROMPT: Final = f"The {WORDS} words, with spaces between (they are not shown): "
_MOST: Final = 4096
_COLUMNS: Final = 4


class WordsPlace:
    """Where new words go. Opened before anything is made, so that there is a place for them.

    Raises ``invalid_argument`` if there is neither a descriptor nor a terminal.
    """

    def __init__(self, descriptor: int | None) -> None:
        self._terminal = descriptor is None
        try:
            if descriptor is None:
                descriptor = os.open("/dev/tty", os.O_WRONLY | os.O_NOCTTY | os.O_CLOEXEC)
            else:
                os.fstat(descriptor)
        except OSError as error:
            if self._terminal:
                raise MeshkitError(
                    "invalid_argument", "there is no terminal to show the words on; use --words-fd"
                ) from None
            raise MeshkitError("invalid_argument", f"--words-fd {descriptor}: {error.strerror}") from None
        self._descriptor = descriptor

    def show(self, words: str) -> None:
        """Write them, and close. Raises ``invalid_argument`` if that fails."""
        text = _table(words) if self._terminal else words + "\n"
        data = bytearray(text.encode())
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(self._descriptor, view) :]
        except OSError as error:
            detail = f"the words could not be written: {error.strerror}"
            raise MeshkitError("invalid_argument", detail) from None
        finally:
            view.release()
            wipe(data)
            self.close()

    def close(self) -> None:
        """Let go of the place; may be called again."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def words_of(secret: bytes) -> str:
    """Return the words that spell 32 bytes."""
    from mnemonic import Mnemonic  # only these commands need it

    return str(Mnemonic("english").to_mnemonic(secret))


def ask_words(descriptor: int | None) -> bytes:
    """Return the 32 bytes that the words spell which somebody gives; four letters of a word are enough.

    Raises ``identity_locked`` where there is nobody to ask, ``wrong_words`` if they cannot be right: the
    detail says which word is none of the list, and never what was given.
    """
    from mnemonic import Mnemonic

    text = _from_terminal() if descriptor is None else _from_descriptor(descriptor)
    try:
        given = text.lower().split()
        if len(given) != WORDS:
            raise MeshkitError("wrong_words", f"there are {len(given)} words, not {WORDS}")
        language = Mnemonic("english")
        whole = [language.expand_word(word) for word in given]
        for number, word in enumerate(whole, 1):
            if word not in language.wordlist:
                raise MeshkitError("wrong_words", f"word {number} is not one of the list")
        try:
            return bytes(language.to_entropy(whole))
        except ValueError:
            raise MeshkitError(
                "wrong_words", "their checksum is not right: a word is another, or not in its place"
            ) from None
    finally:
        wipe_text(text)


def _from_terminal() -> str:
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        raise MeshkitError(
            "identity_locked", "the words are needed and there is no terminal to ask on; use --words-fd"
        ) from None
    try:
        return getpass.getpass(_PROMPT)
    except EOFError:
        return ""


def _from_descriptor(descriptor: int) -> str:
    data, size = bytearray(_MOST), 0
    try:
        with memoryview(data) as view:
            while b"\n" not in data[:size] and size < _MOST and (got := os.readv(descriptor, [view[size:]])):
                size += got
        os.close(descriptor)
        return data[:size].partition(b"\n")[0].decode("ascii", "replace")
    except OSError as error:
        raise MeshkitError("invalid_argument", f"--words-fd {descriptor}: {error.strerror}") from None
    finally:
        wipe(data)


def _table(words: str) -> str:
    """Return the words numbered, in columns that are read downwards."""
    numbered = [f"{number:2} {word:<10}" for number, word in enumerate(words.split(), 1)]
    rows = -(-len(numbered) // _COLUMNS)
    lines = ["  ".join(numbered[row::rows]).rstrip() for row in range(rows)]
    return "\n".join(["", *(f"  {line}" for line in lines), "", ""])
