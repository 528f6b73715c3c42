"""A program that grants a share and revokes it again, and writes down what it was promised.

Run as ``crash_granter.py HOME SHARE WHO MANIFEST ROUNDS``; it goes over the control socket of HOME's daemon, as the
commands do. Each line of the manifest is fsynced before the next step: ``granting`` and ``revoking`` are about to
happen, ``granted`` and ``revoked`` were acknowledged. It ends after ROUNDS revocations (0: with the daemon).
"""

import os
import sys
from pathlib import Path

from meshkitfs.daemon import client
from meshkitfs.daemon.home import Home
from meshkitfs.errors import MeshkitError

home, share, who, manifest, rounds = Home(Path(sys.argv[1])), *sys.argv[2:5], int(sys.argv[5])
log = os.open(manifest, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


def say(line):
    os.write(log, line.encode() + b"\n")
    os.fsync(log)


def ask(method, **params):
    if client.ask_daemon(home, method, params) is None:
        raise MeshkitError("daemon_unreachable")


def has_access():
    shown = client.ask_daemon(home, "share.show", {"share": share})
    return any(member["handle"] == who and not member["revoked"] for member in shown["recipients"])


try:
    if has_access():
        # The daemon died after it published a grant, and before it said so.
        say("revoking")
        ask("share.revoke", share=share, recipient=who)
        say("revoked")
    done = 0
    while not rounds or done < rounds:
        say("granting")
        ask("share.add", target=share, recipient=who, rights=["read"])
        say("granted")
        say("revoking")
        ask("share.revoke", share=share, recipient=who)
        say("revoked")
        done += 1
except (MeshkitError, OSError) as error:
    print(f"the daemon ended: {error}", file=sys.stderr)
    sys.exit(3)
