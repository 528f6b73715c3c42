"""A process that moves the keys of homes and is killed on the way; the program of t1_keyvault_move.py.

It reads lines ``{"home": …, "to": …, "number": …}`` and answers each with ``killed`` or ``done``. Each move is made by
a child of its own, which dies before its ``number``-th change to the disk or the keyring. The children are forked
from a process that has never had a second thread: libraries' locks do not survive a fork beside one.
"""

import contextlib
import itertools
import json
import os
import signal
import sys
import traceback
from pathlib import Path

from keyvault_support import new_answers, old_answers, stretch_cheaply

from meshkitfs import keyvault
from meshkitfs.daemon import config
from meshkitfs.keyvault._secret_service import SecretServiceVault


def kill_before(number):
    """Arrange that this process is killed before the ``number``-th change that it makes."""
    count = itertools.count(1)

    def counted(function):
        def call(*args, **options):
            if next(count) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)

        return call

    for name in ("link", "rename", "unlink", "fsync"):
        setattr(os, name, counted(getattr(os, name)))
    plain_open = os.open
    creating_open = counted(plain_open)
    os.open = lambda path, flags, *args, **options: (creating_open if flags & os.O_CREAT else plain_open)(
        path, flags, *args, **options
    )
    for name in ("_store", "_delete"):
        setattr(SecretServiceVault, name, counted(getattr(SecretServiceVault, name)))


def move(home, to):
    keyvault.migrate(
        home,
        to,
        lambda kind: config.set_key_vault(home / "meshkit.config.json", kind),
        old_passphrase=old_answers,
        new_passphrase=new_answers,
        weaker=True,
    )


def main():
    stretch_cheaply(setattr)
    # What is imported on first use; otherwise each child would do it.
    for name in ("keyring.backends.SecretService", "secretstorage", "tpm2_pytss"):
        with contextlib.suppress(ImportError):
            __import__(name)
    for line in sys.stdin:
        wanted = json.loads(line)
        child = os.fork()
        if child == 0:
            try:
                kill_before(wanted["number"])
                move(Path(wanted["home"]), wanted["to"])
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            print("killed", flush=True)
        else:
            print("done" if os.waitstatus_to_exitcode(status) == 0 else "failed", flush=True)


if __name__ == "__main__":
    main()
