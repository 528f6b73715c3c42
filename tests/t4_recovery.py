"""An identity goes to another home: exported, or recovered after everything but a file and its words is lost."""

from __future__ import annotations

import os
import pty
import re
import shutil
import sqlite3
import subprocess
import sys

import pytest
import trio
from homes import CliFailure, Person, Result, invite, needs_fuse, sync_dir, wait_until, write_synced
from service import Service

from meshkitfs.cli._words import WORDS
from meshkitfs.daemon.founding import initialize
from meshkitfs.daemon.service import Service as Home
from meshkitfs.providers import ProviderSpec

PHRASE = "a phrase for the tests"


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    with Service(tmp_path_factory.mktemp("service") / "service.db") as running:
        yield running


@pytest.fixture
def place(tmp_path):
    """Makes people who share a byte store and the metadata store that is said."""
    made = []

    def person(directory, name, metadata=None):
        someone = Person(tmp_path / directory, name)
        made.append(someone)
        if metadata is not None:
            store = ProviderSpec.local(tmp_path / "blocks")
            with someone.home.hold():
                trio.run(initialize, someone.home, name, store, str(metadata), "plain-file", None, True)
        return someone

    yield person
    for someone in made:
        someone.end()


def ask(person, method, **params):
    """Do one method of a home that is not mounted, in this process: a command takes a second to start."""

    async def do():
        async with Home.open(person.home, None) as home:
            return await home.call(method, params)

    with person.home.hold():
        return trio.run(do)


def give(owner, share, recipient):
    """Have ``recipient`` accept a grant of a whole share, neither of them mounted."""
    ask(owner, "share.add", target=share, recipient=recipient.name)
    letter = next(item for item in ask(recipient, "inbox.list")["letters"] if not item["accepted"])
    ask(recipient, "inbox.accept", letter=letter["id"])


def told(person, *args, secret, option="--passphrase-fd", check=True):
    """Run a command that is told a secret over a descriptor; its `Result`, or with ``check`` its JSON."""
    read, write = os.pipe()
    os.write(write, secret.encode() + b"\n")
    os.close(write)
    try:
        done = subprocess.run(
            [person.python, "-m", "meshkitfs", "--json", *map(str, args), option, str(read)],
            env=person.env,
            capture_output=True,
            text=True,
            pass_fds=(read,),
            timeout=60,
            cwd="/",
        )
    finally:
        os.close(read)
    person.outputs += [done.stdout, done.stderr]
    result = Result(args, done.returncode, done.stdout, done.stderr)
    if check and result.code:
        raise CliFailure(repr(result))
    return result.json if check else result


def recovery_file(person, file):
    """Write a recovery file and return its words."""
    read, write = os.pipe()
    try:
        done = subprocess.run(
            [person.python, "-m", "meshkitfs", "--json", "identity", "recovery", "create", file, "--words-fd",
             str(write)],
            env=person.env, capture_output=True, text=True, pass_fds=(write,), timeout=60, cwd="/",
        )  # fmt: skip
    finally:
        os.close(write)
    with open(read) as pipe:
        words = pipe.read().strip()
    assert done.returncode == 0, done.stderr
    person.outputs += [done.stdout, done.stderr]
    assert len(words.split()) == WORDS
    return words


def imported(person, file, *options, phrase=PHRASE, **how):
    return told(
        person, "identity", "import", file, "--key-vault", "plain-file", *options, secret=phrase, **how
    )


def restored(person, file, words, *options, **how):
    arguments = ("identity", "recovery", "restore", file, "--key-vault", "plain-file", *options)
    return told(person, *arguments, secret=words, option="--words-fd", **how)


def checks(person):
    """The findings of ``identity doctor`` by name, and whether nothing failed."""
    if person.home.holder():
        result = person.cli("identity", "doctor", check=False)
        data = result.json
        assert result.code == (0 if data["ok"] else 1)
    else:
        data = ask(person, "identity.doctor")
    return {check["name"]: check for check in data["checks"]}, data["ok"]


def refused(result, code):
    assert result.error["code"] == code, result
    return True


# -- recovery ---------------------------------------------------------------------------------------------


@needs_fuse
def test_everything_is_lost_but_the_recovery_file(place, service, tmp_path):
    """The file is older than every share; alice's machine dies without a chance to say anything."""
    alice, bob = place("alice", "alice", service.url), place("bob", "bob", service.url)
    file = tmp_path / "alice.recovery"
    words = recovery_file(alice, file)
    mine, theirs = alice.mount(), bob.mount()
    os.mkdir(mine / "plans")
    write_synced(mine / "plans/draft", b"alice's own")
    os.mkdir(theirs / "photos")
    write_synced(theirs / "photos/beach", b"what bob gave")
    sync_dir(theirs)
    invite(bob, "photos", alice)
    invite(alice, "plans", bob, "--rights", "write")
    # The mounted home posts by itself within a minute, and whenever it is looked at.
    assert alice.ask("identity.doctor")["checks"][-1]["status"] == "ok"
    alice.kill9()
    shutil.rmtree(alice.root)

    again = place("new machine", "alice")
    assert restored(again, file, words)["shares"] == ["photos (bob)", "plans"]
    mnt = again.mount()
    assert (mnt / "plans/draft").read_bytes() == b"alice's own"
    assert (mnt / "photos (bob)/beach").read_bytes() == b"what bob gave"
    # She goes on as owner: what she writes arrives, and whom she gave access to she can take it from.
    write_synced(mnt / "plans/draft", b"and on it goes")
    wait_until(lambda: (theirs / "plans (alice)/draft").read_bytes() == b"and on it goes", "the change")
    assert [c["handle"] for c in again.cli("share", "show", "plans")["recipients"]] == ["bob"]
    again.cli("share", "revoke", "plans", "bob")
    found, good = checks(again)
    assert good, found
    assert found["recovery file"]["status"] == "ok"
    assert found["directory"]["status"] == "ok"
    # The words were for her alone.
    spoken = "".join(again.outputs + bob.outputs + alice.outputs) + again.logs()
    assert words not in spoken
    assert not any(words.encode() in path.read_bytes() for path in again.root.rglob("*") if path.is_file())


def test_letters_to_oneself_are_no_invitations_and_do_not_pile_up(place, service, tmp_path):
    alice, bob = place("alice", "dora", service.url), place("bob", "emil", service.url)
    recovery_file(alice, tmp_path / "file")
    for name in ("one", "two", "three"):
        ask(alice, "share.create", name=name)
    ask(bob, "share.create", name="gift")
    ask(bob, "share.add", target="gift", recipient="dora")
    inbox = ask(alice, "inbox.list")
    assert [letter["name"] for letter in inbox["letters"]] == ["gift"]
    assert inbox["unreadable"] == 0
    kid = bytes.fromhex(ask(alice, "identity.show")["enc_kid"])
    with sqlite3.connect(service.database) as db:
        ((count,),) = db.execute("SELECT count(*) FROM letters WHERE kid = ?", (kid,))
    assert count == 2  # bob's, and the newest of her own


def test_a_rotation_makes_the_file_out_of_date(place, service, tmp_path):
    alice = place("alice", "fay", service.url)
    old = recovery_file(alice, tmp_path / "old")
    told(alice, "identity", "export", tmp_path / "old.export", secret=PHRASE)
    assert ask(alice, "identity.show")["recovery"]["current"] is True
    assert checks(alice)[1]
    ask(alice, "identity.rotate")
    shown = ask(alice, "identity.show")
    assert shown["recovery"]["current"] is False
    assert any("recovery file is out of date" in problem for problem in shown["problems"])
    found, good = checks(alice)
    assert (good, found["recovery file"]["status"]) == (False, "fail")
    assert "signing key" in found["recovery file"]["detail"]

    again = place("again", "fay")
    assert refused(restored(again, tmp_path / "old", old, check=False), "identity_outdated")
    assert refused(imported(again, tmp_path / "old.export", check=False), "identity_outdated")
    assert not again.home.initialized  # nothing is left that a second try would meet
    words = recovery_file(alice, tmp_path / "new")
    assert refused(restored(again, tmp_path / "new", old, check=False), "wrong_words")
    assert restored(again, tmp_path / "new", words)["fingerprint"] == shown["fingerprint"]
    assert checks(again)[1]


def test_the_words_are_shown_once_and_on_the_terminal(place, service, tmp_path):
    alice = place("alice", "gwen", service.url)
    printed = tmp_path / "stdout"
    seen = on_a_terminal(alice, printed, "identity", "recovery", "create", str(tmp_path / "file"))
    numbered = dict(zip(*[iter(seen.partition("not shown again.")[2].split())] * 2, strict=False))
    words = " ".join(numbered[str(number)] for number in range(1, WORDS + 1))
    assert not shows(printed.read_text(), words)
    assert shows(seen, words)
    shutil.rmtree(alice.root)
    again = place("again", "gwen")
    typed = on_a_terminal(
        again, printed, "identity", "recovery", "restore", str(tmp_path / "file"), "--key-vault", "plain-file",
        answer=words,
    )  # fmt: skip
    assert not shows(typed, words)  # nothing is echoed
    assert "This home is gwen now." in printed.read_text()


def shows(text, words):
    """Whether all of the words are in a text; a single one of them can be there by chance."""
    return set(words.split()) <= set(re.findall("[a-z]+", text))


def on_a_terminal(person, stdout, *args, answer=None):
    """Run a command with a terminal, its standard output in a file; returns what the terminal showed."""
    pid, terminal = pty.fork()
    if pid == 0:
        descriptor = os.open(stdout, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(descriptor, 1)
        os.execve(sys.executable, [sys.executable, "-m", "meshkitfs", *args], person.env)  # noqa: S606
    seen = b""
    try:
        while chunk := os.read(terminal, 4096):
            seen += chunk
            if answer is not None and b"not shown): " in seen:
                os.write(terminal, answer.encode() + b"\n")
                answer = None
    except OSError:  # EIO: the other end of the terminal is closed
        pass
    finally:
        os.close(terminal)
        _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, seen
    return seen.decode()


def test_without_a_place_for_the_words_nothing_is_made(place, service, tmp_path):
    alice = place("alice", "hugo", service.url)
    file = tmp_path / "file"
    prefix = ("setsid", "--wait")  # without a terminal of its own
    result = alice.run("--json", "identity", "recovery", "create", file, check=False, prefix=prefix)
    assert refused(result, "invalid_argument")
    assert not file.exists()
    assert ask(alice, "identity.show")["recovery"] is None
    file.write_text("something else")
    with pytest.raises(AssertionError, match="invalid_argument"):
        recovery_file(alice, file)
    assert file.read_text() == "something else"


# -- export and import ------------------------------------------------------------------------------------


def test_an_identity_moves_with_what_its_home_knew(place, tmp_path):
    metadata = tmp_path / "metadata.db"
    alice, bob = place("alice", "alice", metadata), place("bob", "bob", metadata)
    ask(alice, "share.create", name="plans")
    give(alice, "plans", bob)
    code = ask(alice, "contacts.verify", handle="bob")["code"]
    ask(alice, "contacts.verify", handle="bob", code=code)
    ask(bob, "share.create", name="photos")
    give(bob, "photos", alice)
    file = tmp_path / "alice.identity"
    assert told(alice, "identity", "export", file, secret=PHRASE)["inside"] == []
    assert os.stat(file).st_mode & 0o777 == 0o600
    assert refused(told(alice, "identity", "export", file, secret=PHRASE, check=False), "invalid_argument")

    again = place("again", "alice")
    assert refused(imported(again, file, phrase="not that one", check=False), "wrong_passphrase")
    data = imported(again, file)
    assert data["shares"] == ["photos (bob)", "plans"]
    for method in ("share.list", "contacts.list"):
        before, after = ask(alice, method), ask(again, method)
        for share in (*before.get("shares", ()), *after.get("shares", ())):
            share.pop("freshness")
        assert before == after
    assert after["contacts"][0]["trust"] == "verified"
    ask(again, "share.revoke", share="plans", recipient="bob")
    assert refused(imported(again, file, check=False), "already_initialized")
    assert refused(imported(bob, file, check=False), "already_initialized")
    assert PHRASE not in "".join(alice.outputs + again.outputs) + alice.logs() + again.logs()
    assert not any(b"plans" in path.read_bytes() for path in (file, again.home.state_db))


def test_a_damaged_file_makes_no_home(place, tmp_path):
    alice = place("alice", "alice", tmp_path / "metadata.db")
    file, again = tmp_path / "file", place("again", "alice")
    told(alice, "identity", "export", file, secret=PHRASE)
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole[: len(whole) // 2], b""):
        file.write_bytes(damaged)
        assert refused(imported(again, file, check=False), "sealed_file_invalid")
    assert not again.home.initialized
    assert not again.home.config_path.exists()


def test_stores_that_are_not_there_are_not_made(place, tmp_path):
    """An empty store in the place of the true one would look as if everything had been lost."""
    alice, file = Person(tmp_path / "alice", "alice"), tmp_path / "file"
    alice.init()
    ask(alice, "share.create", name="plans")
    assert told(alice, "identity", "export", file, secret=PHRASE)["inside"] == [
        "byte store",
        "metadata store",
    ]
    again = place("again", "alice")
    assert imported(again, file, check=False).code != 0
    assert not again.blocks.exists()
    assert not again.metadata.exists()
    assert not again.home.initialized
    stores = ("--provider", f"local:{alice.blocks}", "--metadata", str(alice.metadata))
    imported(again, file, *stores)
    assert ask(again, "share.show", share="plans")["state"] == "stored"


def test_what_was_seen_is_not_forgotten_on_the_way(place, tmp_path):
    """A metadata store that shows an older roster to the new home is caught, as the old home would."""
    metadata, file = tmp_path / "metadata.db", tmp_path / "file"
    alice, bob = place("alice", "alice", metadata), place("bob", "bob", metadata)
    ask(alice, "share.create", name="plans")
    ask(alice, "share.add", target="plans", recipient="bob")
    older = metadata.read_bytes()
    assert not metadata.with_name("metadata.db-wal").exists()
    ask(alice, "share.revoke", share="plans", recipient="bob")
    told(alice, "identity", "export", file, secret=PHRASE)
    metadata.write_bytes(older)
    again = place("again", "alice")
    imported(again, file)
    assert ask(again, "share.show", share="plans")["reason"] == "roster_rollback"
    assert ask(bob, "inbox.list")["letters"]


def test_an_identity_that_the_directory_lost_is_taken_when_told_to(place, tmp_path):
    metadata, file = tmp_path / "metadata.db", tmp_path / "file"
    alice, again = place("alice", "alice", metadata), place("again", "alice")
    told(alice, "identity", "export", file, secret=PHRASE)
    ask(alice, "identity.rotate")
    assert refused(imported(again, file, check=False), "identity_outdated")
    imported(again, file, "--unchecked")
    found, good = checks(again)
    assert (good, found["directory"]["status"]) == (False, "fail")
    assert "old copy" in found["directory"]["detail"]
