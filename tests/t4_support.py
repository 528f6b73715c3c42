"""The support bundle: what is in it, what is not, and that nothing is written without a yes; and one story in
which every kind of secret is planted and looked for everywhere a process leaves traces."""

import base64
import json
import os
import stat
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import evil
import homes
import pytest
import t4_gate
from homes import Person, needs_fuse, wait_until

from meshkitfs.daemon import support
from meshkitfs.daemon.home import Home

pytestmark = needs_fuse
SHARE = "tax papers 2026"
FILE = "canary-file-name.txt"
CONTENT = b"canary-content-of-a-file"
HANDLE = "canary.person"
BEARER = "CANARYbearer0123456789token"
# No words that the product itself writes: pieces of it are looked for.
PHRASE = "canary kestrel umbra 7b1f quartz"


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """A home with names, refusals and faults of its own, mounted."""
    with Person(tmp_path_factory.mktemp("support") / "canary-home", HANDLE) as person:
        person.init()
        person.mount()
        person.ask("share.create", name=SHARE)
        homes.write_synced(person.mnt / SHARE / FILE, CONTENT)
        blocks = person.blocks.rename(person.blocks.with_name("away"))
        person.remount()
        with pytest.raises(OSError):
            (person.mnt / SHARE / FILE).read_bytes()
        blocks.rename(person.blocks)
        wait_until(lambda: (person.mnt / SHARE / FILE).read_bytes() == CONTENT, "the byte store")
        yield person


def canaries(person):
    """What must not be in a bundle, by name."""
    secrets = {
        name: [raw.hex(), base64.b64encode(raw).decode(), base64.urlsafe_b64encode(raw).decode()]
        for name, raw in t4_gate.secrets_of(person, person.metadata).items()
    }
    return secrets | {
        "share": [SHARE, "tax papers"], "file": [FILE], "content": [CONTENT.decode()], "handle": [HANDLE],
        "home": [str(person.root), "canary-home"], "mount point": [str(person.mnt)],
        "share id": [os.getxattr(person.mnt / SHARE, "user.meshkit.share").decode()],
    }  # fmt: skip


def bundle(path):
    with zipfile.ZipFile(path) as archive:
        return {name.partition("/")[2]: archive.read(name).decode() for name in archive.namelist()}


def test_nothing_is_written_without_a_yes(story, tmp_path):
    target = tmp_path / "bundle.zip"
    shown = story.run("support-bundle", "--output", target)
    assert "log.txt" in shown.out
    assert "Nothing was written" in shown.out
    assert not target.exists()
    everything = story.cli("support-bundle", "--show")["content"]
    said = story.cli("support-bundle", "--output", target, "--yes")
    assert said["written"] == str(target)
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    written = bundle(target)
    assert {item["name"]: item["bytes"] for item in said["files"]} == {
        name: len(text.encode()) for name, text in written.items()
    }
    assert everything.keys() == written.keys()
    assert everything["versions.json"] == written["versions.json"]
    # What is there is never written over.
    assert (
        story.cli("support-bundle", "--output", target, "--yes", check=False).error["code"]
        == "invalid_argument"
    )


def test_on_a_terminal_it_asks(story, tmp_path):
    for answer, there in ((b"n\n", False), (b"\n", False), (b"y\n", True)):
        target = tmp_path / f"{answer[0]}.zip"
        ours, theirs = os.openpty()
        process = subprocess.Popen(
            [sys.executable, "-m", "meshkitfs", "support-bundle", "--output", target],
            stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=story.env, cwd="/",
        )  # fmt: skip
        os.close(theirs)
        os.write(ours, answer)
        _, said = process.communicate(timeout=homes.PATIENCE)
        os.close(ours)
        assert process.returncode == 0, said
        assert b"[y/N]" in said
        assert target.exists() is there


def test_what_is_in_it_and_what_is_not(story):
    text = story.cli("support-bundle", "--show")["content"]
    for name, spellings in canaries(story).items():
        for file, content in text.items():
            for spelling in spellings:
                assert spelling not in content, f"{name} in {file}"
    status = json.loads(text["status.json"])
    assert status["mounted"]
    assert [share["state"] for share in status["shares"]] == ["stored"]
    assert {tuple(item) for item in status["errors"]} == {("code", "time")}
    assert status["counters"]["gate_walks"] > 0
    assert json.loads(text["versions.json"])["cryptography"]
    assert json.loads(text["config.json"])["provider"] == {"type": "local-dev", "store": "[left out]"}
    assert {check["name"] for check in json.loads(text["doctor.json"])} >= {
        "python",
        "kernel",
        "home",
        "daemon",
    }
    mount = json.loads(text["mounts.json"])[0]
    assert "default_permissions" in mount["filesystem"]
    assert "msg=mounted" in text["log.txt"]


def test_a_json_log_stays_json_and_loses_the_same():
    veil = support._Veil(Home("/srv/canary-home"), {"identity": "canary-me"}, names=False, hosts=False)
    line = {
        "event": "asked https://store.example.org/a",
        "place": "/srv/canary-home/x",
        "n": 5,
        "by": ["canary-me"],
    }
    text = veil.over_log(json.dumps(line) + f"\ntime=x msg=https://store.example.org/a key={'ab' * 32}\n")
    first, second = text.splitlines()
    shown = json.loads(first)
    assert shown["n"] == 5
    assert shown["event"] == "asked https://HOST/PATH"
    for secret in ("canary", "example.org", "ab" * 32):
        assert secret not in first + second


def test_names_and_hosts_by_choice(story, tmp_path):
    assert SHARE in story.cli("support-bundle", "--show", "--names")["content"]["status.json"]
    with Person(tmp_path / "erin", "erin") as erin:
        erin.init()
        settings = json.loads((erin.root / "meshkit.config.json").read_bytes())
        settings["provider"] = {
            "type": "s3", "endpoint": "https://user:CANARYpw@store.example.org:9000/x?key=CANARYkey", "bucket": "canary-bucket",
        }  # fmt: skip
        (erin.root / "meshkit.config.json").write_text(json.dumps(settings))
        (erin.root / "log").mkdir(exist_ok=True)
        (erin.root / "log/meshkitfs.log").write_text(
            f'time=x level=info msg="asked https://store.example.org/a/b with Bearer {BEARER}" key={"ab" * 32}\n'
        )
        for options, hosts in (((), False), (("--hosts",), True)):
            text = erin.cli("support-bundle", "--show", *options)["content"]
            everything = "".join(text.values())
            assert ("store.example.org" in everything) is hosts
            assert ("https://store.example.org:9000" in text["config.json"]) is hosts
            for secret in ("CANARY", "canary-bucket", "ab" * 32, str(erin.root)):
                assert secret not in everything, secret
            assert json.loads(text["status.json"]) == {"daemon": "not running"}


# == one story with every kind of secret =============================================================


def traces_of(pid):
    """What the kernel shows of a process to others: its arguments and its environment (to root)."""
    found = {}
    for name in ("cmdline", "environ"):
        try:
            found[name] = Path(f"/proc/{pid}/{name}").read_bytes()
        except OSError:
            found[name] = b""
    return found


class Watch(threading.Thread):
    """Looks at the arguments and environment of every process that runs this program, all the time."""

    def __init__(self):
        super().__init__(daemon=True)
        self.ends = threading.Event()
        self.seen = {}

    def run(self):
        while not self.ends.wait(0.02):
            for entry in os.listdir("/proc"):
                if entry.isdecimal():
                    found = traces_of(entry)
                    if b"meshkitfs" in found["cmdline"]:
                        self.seen.update({(entry, name, content): name for name, content in found.items()})

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.ends.set()
        self.join(homes.PATIENCE)


def test_no_canary_in_any_trace(tmp_path):
    """A passphrase, a bearer token, keys, names and contents: in no argument list, environment, log (at DEBUG),
    output, traceback or bundle, through granting, refusals, faults, a crash of a command, locking and unlocking.
    """
    with (
        Watch() as watch,
        Person(tmp_path / "frank", "frank") as frank,
        Person(tmp_path / "grace", "grace") as grace,
    ):
        frank.env["MESHKITFS_DEBUG"] = grace.env["MESHKITFS_DEBUG"] = "1"
        phrase = PHRASE.encode() + b"\n"

        def said(person, *args, check=True):
            return person.cli(*args, "--passphrase-fd", "0", stdin=phrase, check=check)

        said(frank, "init", "--identity", "frank", "--key-vault", "passphrase-file")
        grace.init(frank)
        # The one log is text, the other JSON.
        grace.configure(log={"format": "json"})
        (grace.root / "log/meshkitfs.log").unlink()
        frank.mnt.mkdir()
        frank.daemons.append(said(frank, "mount", str(frank.mnt))["pid"])
        grace.mount()
        frank.cli("share", "create", SHARE)
        homes.write_synced(frank.mnt / SHARE / FILE, CONTENT)
        (name,) = [homes.invite(frank, SHARE, grace, "--rights", "read")["name"]]
        theirs = grace.mnt / name
        assert (theirs / FILE).read_bytes() == CONTENT
        secrets = t4_gate.secrets_of(grace, frank.metadata)
        # Refusals and faults, each with its traceback where there is one.
        spoiled = evil.all_blocks(frank.blocks)
        for block in spoiled:
            evil.flip_file(frank.blocks, block)
        for person, place in ((frank, frank.mnt / SHARE), (grace, theirs)):
            person.ask("lock")
            homes.errno_of(os.listdir, place)
            if person is frank:
                assert said(frank, "unlock") == {"locked": None}
            else:
                person.cli("unlock")
            homes.errno_of(os.open, place / FILE, os.O_RDONLY)
            person.cli("explain", f"{place.name}/{FILE}")
        for block in spoiled:
            evil.flip_file(frank.blocks, block)
        frank.cli("share", "revoke", SHARE, "grace")
        homes.errno_of(os.listdir, theirs)
        # A token in the environment is where it was put, and nowhere else.
        tokens = {"MESHKITFS_JOIN_TOKEN": BEARER}
        served = ("--provider", f"s3:http://127.0.0.1:9/{'b' * 5}", "--metadata", "http://127.0.0.1:9")
        failed = Person(tmp_path / "heidi", "heidi").run(
            "init",
            "--identity",
            "heidi",
            "--key-vault",
            "plain-file",
            *served,
            env=tokens | frank.env,
            check=False,
        )
        assert failed.code
        for person in (frank, grace):
            person.run("support-bundle", "--show", "--names", "--hosts")
        for person in (frank, grace):
            person.run("umount", check=False)
    texts = {
        "logs": (frank.logs() + grace.logs()).encode(),
        "outputs": "".join([*frank.outputs, *grace.outputs, failed.out, failed.err]).encode(),
        "argument lists": b"\n".join(content for (_, kind, content) in watch.seen if kind == "cmdline"),
        "environments": b"\n".join(content for (_, kind, content) in watch.seen if kind == "environ"),
    }
    assert b"mount" in texts["argument lists"]
    assert b"MESHKITFS_HOME" in texts["environments"]
    assert "level=debug" in frank.logs()
    lines = [json.loads(line) for line in (grace.root / "log/meshkitfs.log").read_text().splitlines()]
    assert {line["level"] for line in lines} >= {"debug", "info"}
    assert any(line.get("code") == "share_revoked" for line in lines)
    assert {where for where, text in texts.items() if BEARER.encode() in text} <= {"environments"}
    secrets |= {"passphrase": PHRASE.encode(), "content": CONTENT}
    for where, text in texts.items():
        assert not t4_gate.found_in(text, secrets), where
        if where == "logs":
            for named in (SHARE, FILE):
                assert named.encode() not in text, f"{named} in the {where}"
