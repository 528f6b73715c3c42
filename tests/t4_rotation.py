"""New keys for people whose homes are mounted: the whole story, over a file and over a real service."""

from __future__ import annotations

import errno

import evil
import pytest
from homes import Person, errno_of, fails, invite, needs_fuse, reason_code, wait_until
from homes import write_synced as put
from service import Service

from meshkitfs.core.keys import kid_of
from meshkitfs.core.records import Roster

pytestmark = needs_fuse


@pytest.fixture(params=["embedded", "service"])
def story(request, tmp_path):
    """Alice and bob, both mounted, and the database of their metadata."""

    def people(*stores, database):
        with Person(tmp_path / "alice", "alice") as alice, Person(tmp_path / "bob", "bob") as bob:
            for person in (alice, bob):
                person.cli("init", "--identity", person.name, "--key-vault", "plain-file", *stores)
                person.mount()
            yield alice, bob, database

    blocks = ("--provider", f"local:{tmp_path}/blocks")
    database = tmp_path / "metadata.db"
    if request.param == "embedded":
        yield from people(*blocks, "--metadata", str(database), database=database)
        return
    with Service(database) as service:
        yield from people(*blocks, "--metadata", service.url, database=database)


def keys(person):
    shown = person.ask("identity.show")
    return shown["kid"], shown["enc_kid"]


def shows(path, data):
    def there():
        return errno_of(open, path) == 0 and path.read_bytes() == data

    wait_until(there, f"{data!r} in {path}")


def test_two_people_rotate_their_keys_while_they_work(story):
    alice, bob, database = story
    (alice.mnt / "first").mkdir()
    mine = alice.mnt / "first" / "file"
    put(mine, b"before")
    theirs = bob.mnt / invite(alice, "first", bob, "--rights", "write")["name"] / "file"
    shows(theirs, b"before")
    code = alice.ask("contacts.verify", handle="bob")["code"]
    alice.ask("contacts.verify", handle="bob", code=code)
    bob.ask("contacts.verify", handle="alice", code=code)

    # The owner, mounted: through the control socket.
    old = keys(alice)
    with open(theirs, "rb") as held:
        done = alice.cli("identity", "rotate")
        assert (done["signed"], done["left"], done["resumed"], done["problems"]) == (["first"], [], False, [])
        assert not set(keys(alice)) & set(old)
        assert held.read() == b"before"  # what is open goes on
    put(mine, b"by alice's new key")
    shows(theirs, b"by alice's new key")
    put(theirs, b"by bob")
    shows(mine, b"by bob")
    (contact,) = bob.ask("contacts.list")["contacts"]
    assert (contact["trust"], contact["fingerprint"]) == ("verified", done["fingerprint"])
    assert contact["key_changed"]
    assert "by a valid chain" in bob.run("contacts", "list").out

    # The member, not mounted: the command opens the home itself.
    old = keys(bob)
    bob.umount()
    done = bob.cli("identity", "rotate")
    assert (done["signed"], done["left"], done["published"]) == ([], [], True)
    new = done["kid"], done["enc_kid"]
    assert not set(new) & set(old)
    bob.mount()
    shows(theirs, b"by bob")
    put(theirs, b"by bob, before alice has heard")
    shows(mine, b"by bob, before alice has heard")
    alice.remount()  # a home asks about members when it is opened, and then once a minute
    mine.read_bytes()
    (share,) = evil.shares(database)

    def listed():
        roster = evil.peek(Roster, evil.newest_roster(database, share))
        return {kid_of(writer).hex() for writer in roster.writers} == {keys(alice)[0], new[0]}

    wait_until(listed, "the list with bob's new key")
    put(theirs, b"by bob's new key")
    shows(mine, b"by bob's new key")
    put(mine, b"and back")
    shows(theirs, b"and back")
    (contact,) = alice.ask("contacts.list")["contacts"]
    assert (contact["trust"], bool(contact["key_changed"])) == ("verified", True)

    # Both past keys and present ones open the past.
    past = sorted((theirs.parent / ".snapshots").iterdir())
    assert (past[1] / "file").read_bytes() == b"before"

    alice.cli("share", "revoke", "first", "bob")
    wait_until(lambda: errno_of(open, theirs) == errno.EACCES, "the revocation")
    with fails(errno.EACCES):
        theirs.read_bytes()
    assert reason_code(theirs.parent) == "share_revoked"
    defects = [line for line in alice.logs().splitlines() + bob.logs().splitlines() if "Traceback" in line]
    assert defects == []
