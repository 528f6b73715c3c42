"""Notifications of a real mount on a real bus, beside a real keyring that holds the home's key."""

from __future__ import annotations

import json
import os

import homes
from homes import Person
from notified import Desktop
from secret_service import private_session

pytestmark = homes.needs_fuse


def test_a_share_comes_and_goes(tmp_path):
    with (
        private_session() as session,
        Desktop(session.env["DBUS_SESSION_BUS_ADDRESS"]) as desktop,
        Person(tmp_path / "rosa", "rosa") as rosa,
        Person(tmp_path / "sven", "sven") as sven,
    ):
        rosa.env.pop("DBUS_SESSION_BUS_ADDRESS", None)
        sven.env |= session.env
        rosa.init()
        sven.init(rosa, key_vault="secret-service")
        rosa.mount()
        sven.mount()
        rosa.cli("share", "create", "canary-share")
        homes.write_synced(rosa.mnt / "canary-share/canary-file", b"content")
        rosa.cli("share", "add", "canary-share", "sven", "--rights", "read")
        received = desktop.next(homes.PATIENCE)
        assert received[0] == "A share was received"
        letter = sven.cli("inbox")["letters"][0]["id"]
        name = sven.cli("accept", letter)["name"]
        path = sven.mnt / name / "canary-file"
        assert path.read_bytes() == b"content"
        rosa.cli("share", "revoke", "canary-share", "sven")
        refused = desktop.next(homes.PATIENCE)
        assert refused[0] == "Access to a share was refused"
        for _ in range(3):
            homes.errno_of(os.open, path, os.O_RDONLY)
        # The keyring is used over the same bus.
        sven.cli("lock")
        assert sven.cli("unlock")["locked"] is None
        told = sven.status()["notifications"]
        assert (told["active"], told["sent"], told["failed"], told["dropped"]) == (True, 2, 0, 0)
        assert desktop.told.empty()
        findings = {check["name"]: check for check in sven.cli("doctor", check=False).json["checks"]}
        assert (findings["notifications"]["status"], findings["notifications"]["detail"]) == ("ok", "2 shown")
        for named in ("canary", "rosa", "sven"):
            assert named not in json.dumps([received, refused])
        assert not rosa.status()["notifications"]["active"]
        assert "Traceback" not in sven.logs()
