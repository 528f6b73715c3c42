"""Every refusal of the error table through a real mount: errno, reason, and what did not happen before it.

Bob has a real mount; what the metadata store and the byte store hold is spoiled on disk, past all rules.
The gate's checks that no store on disk can provoke (late answers, policy providers) are in t3_gate.py.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import json
import os
import re
import subprocess
import time
from pathlib import Path

import evil
import pytest
from homes import Person, errno_of, fails, needs_fuse, reason, reason_code, tmpfs, wait_until
from homes import write_synced as put
from secret_service import missing as no_keyring
from secret_service import private_session

from meshkitfs import keyvault
from meshkitfs.core import cose, hpke
from meshkitfs.core._unwrap import open_capsule
from meshkitfs.core.capsule import capsule_info
from meshkitfs.core.cid import parse_cid
from meshkitfs.core.keys import EncryptionKey, SigningKey, did_key, ver_key
from meshkitfs.core.records import Capsule, Head, Roster, make_capsule, record_hash
from meshkitfs.errors import TABLE, MeshkitError, exit_code_for
from meshkitfs.identity import load_identity
from meshkitfs.state import State

pytestmark = needs_fuse

CAPSULE = "mk/cap@1"
NUMBER = re.compile(r"\d+")
PLAIN = b"the plaintext of a file of alice's "
# The key of a vault and of a capability that nobody here has anything of.
NOBODYS = did_key(SigningKey.from_seed(b"\x0f" * 32).public)


# == who takes part ==================================================================================


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    base = tmp_path_factory.mktemp("gate")
    with Person(base / "alice", "alice") as alice, Person(base / "bob", "bob") as bob:
        alice.init()
        bob.init(beside=alice)
        alice.mount()
        bob.mount()
        yield alice, bob
        look_for_secrets(alice, bob)


def identity_of(person):
    """The private keys of a person with a plain-file key vault."""
    secret = keyvault.open_vault("plain-file", person.root).load()
    return load_identity(person.home.identity_file, secret)


class Scene:
    """One share of alice's that she has given to bob, who may or may not have accepted it yet."""

    def __init__(self, pair, name):
        self.alice, self.bob = pair
        self.name = name
        self.mine = self.alice.mnt / name
        self.path = None
        os.mkdir(self.mine)
        put(self.mine / "file", PLAIN)
        self.id = bytes.fromhex(os.getxattr(self.mine, "user.meshkit.share").decode())
        self.db = self.alice.metadata
        self.log_start = len(self.bob.logs())

    def give(self, rights=("read",), **terms):
        self.alice.ask("share.add", target=self.name, recipient="bob", rights=list(rights), **terms)
        return self

    def accept(self):
        """Bob takes it in, whether or not the gate will let him open it; returns his path of it."""
        self.path = taken_in(self.bob, self.name)
        return self.path

    # -- alice's own keys, for records that are wrong and properly signed

    @property
    def owner(self):
        return identity_of(self.alice).signing

    @property
    def bobs_capsule(self):
        to = identity_of(self.bob).encryption.kid
        found = [blob for blob in evil.capsules(self.db, self.id) if self.header(blob)["to"] == to]
        return found[-1]

    @staticmethod
    def header(blob):
        return evil.peek1(blob, CAPSULE)["h"]

    def epoch_key(self):
        alice = identity_of(self.alice)
        keys = {alice.signing.kid: alice.signing.public}
        for blob in reversed(evil.capsules(self.db, self.id)):
            capsule = Capsule.parse(blob, keys)
            if capsule.to == alice.encryption.kid:
                return open_capsule(capsule, alice.encryption)
        raise AssertionError("alice has no capsule of her own share")

    def capsule(self, *, signer=None, to=None, key=None, **changes):
        """Bob's capsule with other terms; signed by alice, and with the right key, unless told otherwise."""
        header = self.header(self.bobs_capsule) | changes
        header = {k: v for k, v in header.items() if k not in ("v", "t", "kc", "frm", "to")}
        return make_capsule(
            signer or self.owner,
            header,
            key or self.epoch_key(),
            to or identity_of(self.bob).encryption.public,
        )

    def install(self, capsule):
        """Put a capsule in the place of bob's, and alice's signature under a roster that lists it."""
        old = self.bobs_capsule
        evil.replace_capsule(self.db, old, capsule)
        roster = evil.peek(Roster, evil.newest_roster(self.db, self.id))
        caps = tuple(record_hash(capsule) if digest == record_hash(old) else digest for digest in roster.caps)
        self.roster(caps=caps)

    def roster(self, signer=None, **changes):
        """Put another roster in the place of the newest one, by default signed by alice."""
        forged = evil.forged_roster(evil.newest_roster(self.db, self.id), signer or self.owner, **changes)
        evil.replace_roster(self.db, self.id, forged)

    def head(self, signer=None, **changes):
        """Put another head in the place of the newest one, by default signed by alice."""
        forged = evil.forged_head(evil.newest_head(self.db, self.id), signer or self.owner, **changes)
        evil.replace_head(self.db, self.id, forged)

    @contextlib.contextmanager
    def restored(self):
        """Afterwards the metadata store holds of this share what it held before."""
        with evil.opened(self.db) as db:
            kept = {
                table: db.execute(f"SELECT * FROM {table} WHERE share = ?", (self.id,)).fetchall()  # noqa: S608
                for table in ("heads", "rosters", "capsules")
            }
        try:
            yield
        finally:
            with evil.opened(self.db) as db:
                for table, rows in kept.items():
                    db.execute(f"DELETE FROM {table} WHERE share = ?", (self.id,))  # noqa: S608
                    for row in rows:
                        marks = ",".join("?" * len(row))
                        db.execute(f"INSERT INTO {table} VALUES ({marks})", row)  # noqa: S608


def taken_in(person, name):
    """Accept the invitation to the share of that name; returns the path of it."""
    letters = person.ask("inbox.list")["letters"]
    (letter,) = [item for item in letters if item["name"] == name and not item["accepted"]]
    return person.mnt / person.ask("inbox.accept", letter=letter["id"])["name"]


@pytest.fixture
def scene(pair, request):
    name = request.node.name.removeprefix("test_").replace("[", " ").replace("]", "")[:60]
    return Scene(pair, name)


ALL = ("unwraps", "fetches", "decrypts")
AFTER_UNWRAP = ("fetches", "decrypts")


def refused(person, path, code, *, step=None, unchanged=ALL, shown_at=None, call=None):
    """Assert that opening ``path`` is refused with ``code``, and that all four places say so alike."""
    row = TABLE[code]
    before = person.counters()
    with fails(row.errno):
        if call is not None:
            call()
        else:
            os.close(os.open(path, os.O_RDONLY))
    after = person.counters()
    spent = {name: after[name] - before[name] for name in unchanged}
    assert not any(spent.values()), f"before the refusal: {spent}"

    shown = reason(shown_at or path)
    assert shown.startswith(f"{code}: {row.sentence}")
    assert shown.endswith(row.remedy)
    explained = person.ask("explain", path=str(path))
    assert (explained["code"], explained["message"], explained["suggestion"]) == (
        code,
        row.sentence,
        row.remedy,
    )
    # The seconds in it go on.
    assert NUMBER.sub("", explained["detail"]) in NUMBER.sub("", shown)
    if step is not None:
        (stopped,) = [item for item in explained["steps"] if item["result"] == "refused"]
        assert (stopped["step"], stopped["code"]) == (step, code)
        reached = [item["result"] for item in explained["steps"]]
        assert "passed" not in reached[reached.index("refused") :]
    wait_until(lambda: f"{code}: {row.sentence}" in person.errors_text(), f"{code} in errors.txt", 5)
    assert row.remedy in person.errors_text()
    assert code in {item["code"] for item in person.status()["errors"]}
    assert f"code={code}" in person.logs()


def opens(path, content=PLAIN):
    """Assert that a file can be read, and that nothing is held against it."""
    assert path.read_bytes() == content
    assert reason(path) == "ok"


# == 1 identity ======================================================================================


def test_no_home_no_identity(tmp_path):
    nobody = Person(tmp_path / "nobody", "nobody")
    for command in (["mount", str(tmp_path)], ["share", "list"], ["explain", "x/y"]):
        result = nobody.cli(*command, check=False)
        assert (result.error["code"], result.code) == ("not_initialized", 3)


@pytest.fixture
def eve(pair, tmp_path):
    """A home with an identity and nothing else, not mounted."""
    with Person(tmp_path / "eve", "eve") as eve:
        eve.init()
        yield eve


def test_the_key_vault_is_gone(eve):
    (eve.root / "keyvault.plain-file").rename(eve.root / "elsewhere")
    for command in (["mount", str(eve.mnt)], ["share", "list"], ["status"]):
        eve.mnt.mkdir(exist_ok=True)
        result = eve.cli(*command, check=False)
        assert (result.error["code"], result.code) == ("identity_not_found", 4)
    assert not os.path.ismount(eve.mnt)
    (eve.root / "elsewhere").rename(eve.root / "keyvault.plain-file")
    assert eve.cli("share", "list") == {"shares": []}


def test_the_key_vault_holds_another_key(eve):
    path = eve.root / "keyvault.plain-file"
    path.unlink()
    keyvault.open_vault("plain-file", eve.root).create(os.urandom(32))
    result = eve.mount(check=False)
    assert result.error["code"] == "identity_corrupt"
    assert not os.path.ismount(eve.mnt)


def test_the_identity_is_damaged(eve):
    evil.overwrite(eve.home.identity_file, evil.flipped(eve.home.identity_file.read_bytes(), 60))
    result = eve.mount(check=False)
    assert result.error["code"] == "identity_corrupt"


def test_a_passphrase_is_asked_for_and_checked(tmp_path):
    with Person(tmp_path / "pat", "pat") as pat:
        phrase = tmp_path / "phrase"
        phrase.write_text("correct horse battery staple\n")
        phrase.chmod(0o600)
        right = {"MESHKITFS_PASSPHRASE_FILE": str(phrase)}
        pat.cli("init", "--identity", "pat", "--key-vault", "passphrase-file", env=right)
        pat.mnt.mkdir()
        locked = pat.cli("mount", str(pat.mnt), check=False)
        assert (locked.error["code"], locked.code) == ("identity_locked", 4)
        other = tmp_path / "other"
        other.write_text("wrong\n")
        other.chmod(0o600)
        wrong = pat.cli("mount", str(pat.mnt), check=False, env={"MESHKITFS_PASSPHRASE_FILE": str(other)})
        assert (wrong.error["code"], wrong.code) == ("wrong_passphrase", 4)
        assert not os.path.ismount(pat.mnt)
        pat.cli("mount", str(pat.mnt), env=right)
        assert os.path.ismount(pat.mnt)
        assert json_of(pat.mnt / ".meshkit/capabilities.json")["key_vault"] == "passphrase-file"
        assert "correct horse" not in pat.logs() + "".join(pat.outputs)


def json_of(path):
    return json.loads(path.read_bytes())


def test_a_key_vault_that_goes_away_changes_what_is_reported(pair):
    alice, _ = pair
    place = alice.mnt / "reports"
    place.mkdir()

    def capabilities():
        return (
            json_of(alice.mnt / ".meshkit/capabilities.json"),
            json.loads(os.getxattr(place, "user.meshkit.capabilities")),
        )

    for report in capabilities():
        assert report["key_vault"] == "plain-file"
        assert report["available"] is True
        assert report["exportable"] is True
        assert report["hardware_backed"] is False
    path = alice.root / "keyvault.plain-file"
    path.chmod(0o644)
    try:
        wait_until(lambda: not any(report["available"] for report in capabilities()), "the reports", 15)
        checks = {item["name"]: item for item in alice.cli("doctor", check=False).json["checks"]}
        assert checks["key vault plain-file"]["status"] == "fail"
        assert alice.ask("identity.show")["key_vault"]["available"] is False
    finally:
        path.chmod(0o600)
    wait_until(lambda: all(report["available"] for report in capabilities()), "the reports", 15)
    place.rmdir()


@pytest.mark.skipif(bool(no_keyring()), reason=f"NO REAL KEYRING HERE: {no_keyring()} not installed")
def test_a_keyring_that_is_locked_or_gone(tmp_path):
    with private_session() as session, Person(tmp_path / "kim", "kim") as kim:
        kim.env = session.env | {k: v for k, v in kim.env.items() if k not in session.env}
        kim.init(key_vault="secret-service")
        kim.mount()
        report = json_of(kim.mnt / ".meshkit/capabilities.json")
        assert (report["key_vault"], report["available"]) == ("secret-service", True)
        kim.umount()
        session.lock()
        kim.mount()
        assert kim.status()["locked"]["by"] == "keyring"
        with fails(errno.EACCES):
            os.listdir(kim.mnt)
        kim.umount()
        session.stop_keyring()
        gone = kim.mount(check=False)
        assert (gone.error["code"], gone.code) == ("keyvault_unavailable", 4)
        assert not os.path.ismount(kim.mnt)
        checks = {item["name"]: item for item in kim.cli("doctor", check=False).json["checks"]}
        assert checks["key vault secret-service"]["status"] == "fail"


# == 2 to 8: nothing is unwrapped, fetched or decrypted ==============================================


def other_scene(scene):
    """Another share of alice's, given to bob too."""
    return Scene((scene.alice, scene.bob), scene.name + " 2").give()


def capsule_row_lost(scene):
    with evil.opened(scene.db) as db:
        db.execute("DELETE FROM capsules WHERE blob = ?", (scene.bobs_capsule,))


def capsule_damaged(scene):
    evil.replace_capsule(scene.db, scene.bobs_capsule, evil.flipped(scene.bobs_capsule, 300))


def capsule_of_a_stranger(scene):
    scene.install(scene.capsule(signer=SigningKey.generate()))


def capsule_of_another_share(scene):
    evil.replace_capsule(scene.db, scene.bobs_capsule, other_scene(scene).bobs_capsule)


def capsule_naming_another_share(scene):
    scene.install(scene.capsule(share=os.urandom(16)))


def capsule_for_another_object(scene):
    scene.install(scene.capsule(oid=os.urandom(16)))


def capsule_of_a_snapshot_for_a_live_share(scene):
    root = parse_cid(os.getxattr(scene.mine, "user.meshkit.cid").decode())
    scene.install(scene.capsule(grant="snapshot", ver=2, root=root))


def capsule_of_an_old_epoch(scene):
    """Listed, but for the key of an epoch that is over."""
    scene.roster(epoch=2)


def capsule_for_another_key(scene):
    scene.install(scene.capsule(to=EncryptionKey.generate().public))


def roster_lost(scene):
    evil.roll_back_roster(scene.db, scene.id, 0)


def roster_damaged(scene):
    evil.flip_rows(scene.db, "rosters", scene.id)


def roster_of_a_stranger(scene):
    scene.roster(signer=SigningKey.generate())


def roster_of_another_share(scene):
    evil.replace_roster(scene.db, scene.id, evil.newest_roster(scene.db, other_scene(scene).id))


def roster_of_a_writer(scene):
    """Bob may write; that does not make him the one who says who may."""
    scene.roster(signer=identity_of(scene.bob).signing)


def roster_without_him(scene):
    scene.roster(caps=evil.peek(Roster, evil.newest_roster(scene.db, scene.id)).caps[:1])


def roster_run_out(scene):
    now = int(time.time())
    scene.roster(iat=now - 1000, exp=now - 10)


def timestamp_of_a_stranger(scene):
    scene.roster(timestamp_keys=(SigningKey.generate().public,))


def expired(scene):
    now = int(time.time())
    scene.install(scene.capsule(nbf=now - 1000, exp=now - 2))


def not_yet_valid(scene):
    now = int(time.time())
    scene.install(scene.capsule(nbf=now + 3600, exp=now + 7200))


def revoked(scene):
    scene.alice.ask("share.revoke", share=scene.name, recipient="bob")


SPOILED = [
    (capsule_row_lost, "capsule_not_found", "capsule"),
    (capsule_damaged, "capsule_not_found", "capsule"),
    (capsule_of_a_stranger, "capsule_not_found", "capsule"),
    (capsule_of_another_share, "capsule_not_found", "capsule"),
    (capsule_naming_another_share, "capsule_not_found", "capsule"),
    (capsule_for_another_object, "capsule_not_found", "capsule"),
    (capsule_of_a_snapshot_for_a_live_share, "capsule_not_found", "capsule"),
    (capsule_of_an_old_epoch, "share_revoked", "roster"),
    (capsule_for_another_key, "recipient_not_authorized", "capsule"),
    (roster_lost, "freshness_unproven", "roster"),
    (roster_damaged, "freshness_unproven", "roster"),
    (roster_of_a_stranger, "freshness_unproven", "roster"),
    (roster_of_a_writer, "freshness_unproven", "roster"),
    (roster_of_another_share, "freshness_unproven", "roster"),
    (roster_without_him, "share_revoked", "roster"),
    (revoked, "share_revoked", "roster"),
    (roster_run_out, "freshness_unproven", "freshness"),
    (timestamp_of_a_stranger, "freshness_unproven", "freshness"),
    (expired, "share_expired", "validity"),
    (not_yet_valid, "share_expired", "validity"),
]


@pytest.mark.parametrize(("spoil", "code", "step"), SPOILED, ids=[item[0].__name__ for item in SPOILED])
def test_refused_before_the_key(scene, spoil, code, step):
    scene.give(["write"] if spoil is roster_of_a_writer else ["read"])
    with contextlib.nullcontext() if spoil is revoked else scene.restored():
        spoil(scene)
        before = scene.bob.counters()
        path = scene.accept()
        refused(scene.bob, path / "file", code, step=step, shown_at=path)
        refused(scene.bob, path, code, step=step)
        if spoil is roster_lost:
            assert "no roster" in reason(path)
        for call in (
            lambda: os.listdir(path),
            lambda: os.mkdir(path / "new"),
            lambda: os.stat(path / "file"),
        ):
            with fails(errno.EACCES):
                call()
        # The share itself stays visible, so that the reason can be asked for.
        assert os.stat(path).st_size == 0
        after = scene.bob.counters()
        assert [after[name] - before[name] for name in ALL] == [0, 0, 0]
    scene.give()  # a newer roster of alice's ends whatever it was
    opens(path / "file")


@pytest.mark.parametrize(
    ("terms", "code", "step"),
    [
        ({"vault": f"{'0f' * 16}@{NOBODYS}"}, "vault_membership_required", "vault"),
        ({"capability": f"editors@{NOBODYS}"}, "capability_required", "capability"),
        ({"require_key_vault": ["hardware_backed"]}, "keyvault_strength_required", "keyvault"),
    ],
)
def test_conditions_that_nobody_here_can_meet(scene, terms, code, step):
    """Named and not available is a no, not a shrug."""
    before = scene.bob.counters()
    path = scene.give(**terms).accept()
    refused(scene.bob, path / "file", code, step=step, shown_at=path)
    after = scene.bob.counters()
    assert [after[name] - before[name] for name in ALL] == [0, 0, 0]
    scene.give()  # without the condition
    opens(path / "file")


@pytest.mark.parametrize("url", [None, "https://pdp.example"], ids=["nobody", "somebody"])
def test_policies_that_nobody_here_can_decide(scene, url):
    """The grant names a provider, and this home has none; or nobody at all is named."""
    scene.give()
    with scene.restored():
        scene.install(scene.capsule(pol={"id": "needs-approval", "url": url}))
        path = scene.accept()
        refused(scene.bob, path / "file", "policy_provider_required", step="policy", shown_at=path)
    scene.give()
    opens(path / "file")


def test_rules_that_say_no(scene):
    """The owner's rules are in the grant, so they are decided here, and changed by the owner."""
    name = "scene-policy"
    scene.alice.ask("policy.create", name=name, rules="forbid(principal, action, resource);")
    path = scene.give(policy=name).accept()
    refused(scene.bob, path / "file", "policy_denied", step="policy", shown_at=path)
    scene.alice.ask("policy.edit", name=name, members=["bob"])
    opens(path / "file")
    scene.give()
    scene.alice.ask("policy.delete", name=name)
    opens(path / "file")


def test_a_right_that_was_not_granted(scene):
    path = scene.give(["list"]).accept()
    assert os.listdir(path) == ["file"]
    refused(scene.bob, path / "file", "right_not_granted", step="rights")
    scene.give(["read"])
    opens(path / "file")
    before = scene.bob.counters()
    for call in (
        lambda: os.open(path / "file", os.O_WRONLY),
        lambda: os.open(path / "new", os.O_CREAT | os.O_WRONLY),
        lambda: os.truncate(path / "file", 1),
        lambda: os.unlink(path / "file"),
        lambda: os.rename(path / "file", path / "other"),
        lambda: os.mkdir(path / "dir"),
        lambda: os.symlink("x", path / "link"),
        lambda: os.link(path / "file", path / "hard"),
        lambda: os.chmod(path / "file", 0o600),
        lambda: os.utime(path / "file"),
        lambda: os.setxattr(path / "file", "user.x", b"1"),
    ):
        with fails(errno.EACCES):
            call()
    refused(scene.bob, path / "file", "right_not_granted", call=lambda: os.open(path / "file", os.O_WRONLY))
    after = scene.bob.counters()
    assert [after[name] - before[name] for name in ALL] == [0, 0, 0]
    opens(path / "file")


def test_a_grant_for_one_share_opens_no_other(scene):
    """The other share's files are in the same two stores, and stay closed."""
    path = scene.give().accept()
    other = Scene((scene.alice, scene.bob), scene.name + " other")
    put(other.mine / "file", b"not for bob")
    assert errno_of(os.listdir, scene.bob.mnt / other.name) == errno.ENOENT
    assert sorted(os.listdir(path)) == ["file"]
    result = scene.bob.cli("explain", f"{other.name}/file", check=False)
    assert result.error["code"] == "share_not_found"


# == 9 the key =======================================================================================


def wrap_damaged(scene):
    blob = scene.bobs_capsule
    payload = evil.peek1(blob, CAPSULE)
    payload["w"] = evil.flipped(payload["w"], 200)
    scene.install(cose.sign1(scene.owner, CAPSULE, payload))


def header_edited_and_signed_again(scene):
    payload = evil.peek1(scene.bobs_capsule, CAPSULE)
    payload["h"]["exp"] += 1000
    scene.install(cose.sign1(scene.owner, CAPSULE, payload))


def another_key_than_promised(scene):
    """Per-recipient content: the owner signs a capsule whose key is not the one it commits to."""
    honest, lying = scene.capsule(), scene.capsule(key=os.urandom(32))
    header = evil.peek1(honest, CAPSULE)["h"] | {"kc": evil.peek1(lying, CAPSULE)["h"]["kc"]}
    wrap = hpke.wrap(identity_of(scene.bob).encryption.public, capsule_info(header), scene.epoch_key())
    scene.install(cose.sign1(scene.owner, CAPSULE, {"t": CAPSULE, "h": header, "w": wrap}))


@pytest.mark.parametrize("spoil", [wrap_damaged, header_edited_and_signed_again, another_key_than_promised])
def test_a_capsule_that_does_not_open(scene, spoil):
    scene.give()
    with scene.restored():
        spoil(scene)
        path = scene.accept()
        refused(
            scene.bob, path / "file", "key_unwrap_failed", step="key", shown_at=path, unchanged=AFTER_UNWRAP
        )
    scene.give()
    opens(path / "file")


# == 10 the head =====================================================================================


def head_of_a_stranger(scene):
    scene.head(signer=SigningKey.generate())


def head_of_a_reader(scene):
    scene.head(signer=identity_of(scene.bob).signing)


def head_of_another_share(scene):
    evil.replace_head(scene.db, scene.id, evil.newest_head(scene.db, other_scene(scene).id))


def head_of_another_object(scene):
    scene.head(oid=os.urandom(16))


def head_of_another_epoch(scene):
    scene.head(epoch=2)


def head_damaged(scene):
    evil.flip_rows(scene.db, "heads", scene.id)


@pytest.mark.parametrize(
    "spoil",
    [
        head_of_a_stranger,
        head_of_a_reader,
        head_of_another_share,
        head_of_another_object,
        head_of_another_epoch,
        head_damaged,
    ],
)
@pytest.mark.parametrize("seen", [False, True], ids=["new", "seen"])
def test_a_head_that_nobody_may_have_signed(scene, spoil, seen):
    scene.give()
    path = scene.accept() if seen else None
    if seen:
        opens(path / "file")
    with scene.restored():
        spoil(scene)
        path = path or scene.accept()
        refused(
            scene.bob,
            path / "file",
            "invalid_record",
            step="head",
            unchanged=AFTER_UNWRAP,
            shown_at=path / "file" if seen else path,
        )
    opens(path / "file")


def test_no_head_at_all(scene):
    scene.give()
    with scene.restored():
        evil.roll_back_head(scene.db, scene.id, 0)
        path = scene.accept()
        refused(
            scene.bob, path / "file", "freshness_unproven", step="head", unchanged=AFTER_UNWRAP, shown_at=path
        )
    opens(path / "file")


def older_head(scene):
    evil.roll_back_head(scene.db, scene.id, evil.peek(Head, evil.newest_head(scene.db, scene.id)).ver - 1)


def every_head_lost(scene):
    evil.roll_back_head(scene.db, scene.id, 0)


def another_of_the_same_version(scene):
    scene.head(ts=1)


def newer_on_another_history(scene):
    head = evil.newest_head(scene.db, scene.id)
    version = evil.peek(Head, head).ver
    evil.append_head(
        scene.db, scene.id, evil.forged_head(head, scene.owner, ver=version + 1, prev=os.urandom(32))
    )


def rewritten_history(scene):
    """Two more versions, each chained to the one before, beginning at another version than bob has seen."""
    head = evil.newest_head(scene.db, scene.id)
    version = evil.peek(Head, head).ver
    fork = evil.forged_head(head, scene.owner, ts=1)
    evil.replace_head(scene.db, scene.id, fork)
    for step in (1, 2):
        fork = evil.forged_head(head, scene.owner, ver=version + step, prev=record_hash(fork))
        evil.append_head(scene.db, scene.id, fork)


HISTORIES = [
    (older_head, "head_rollback"),
    (every_head_lost, "head_rollback"),
    (another_of_the_same_version, "head_fork"),
    (newer_on_another_history, "head_fork"),
    (rewritten_history, "head_fork"),
]


@pytest.mark.parametrize(("spoil", "code"), HISTORIES, ids=[item[0].__name__ for item in HISTORIES])
def test_a_history_that_is_not_the_one_seen(scene, spoil, code):
    path = scene.give().accept()
    untouched = other_scene(scene).accept()
    put(scene.mine / "file", PLAIN)
    opens(path / "file")
    with scene.restored():
        spoil(scene)
        refused(scene.bob, path / "file", code, step="head")
        assert os.getxattr(path, "user.meshkit.state") == b"quarantined"
        assert "accept-rollback" in reason(path)
        opens(untouched / "file")
    # The honest history is back, and is not believed by itself: a person has to look.
    refused(scene.bob, path / "file", code, step="head")
    opens(untouched / "file")
    done = scene.bob.cli("share", "accept-rollback", path.name)
    assert done["now"]["reason"] is None
    opens(path / "file")
    again = scene.bob.cli("share", "accept-rollback", path.name, check=False)
    assert again.error["code"] == "invalid_argument"


@pytest.mark.parametrize("where", ["roster", "capsule"])
def test_versions_below_what_the_owner_allows(scene, where):
    """``minver``: after a mishap the owner can forbid everybody, newcomers too, to go back before it."""
    scene.give()
    version = evil.peek(Head, evil.newest_head(scene.db, scene.id)).ver
    with scene.restored():
        if where == "roster":
            scene.roster(minver=version + 1)
        else:
            scene.install(scene.capsule(minver=version + 1))
        path = scene.accept()
        refused(scene.bob, path / "file", "head_rollback", step="head", unchanged=AFTER_UNWRAP, shown_at=path)
    scene.give()
    scene.bob.cli("share", "accept-rollback", path.name)
    opens(path / "file")


def roster_rolled_back(scene):
    """The un-revoke attempt: the roster of before is served again."""
    seq = evil.peek(Roster, evil.newest_roster(scene.db, scene.id)).seq
    evil.roll_back_roster(scene.db, scene.id, seq - 1)


def roster_of_the_same_number(scene):
    scene.roster(iat=int(time.time()) - 5)


@pytest.mark.parametrize(
    ("spoil", "code"),
    [(roster_rolled_back, "roster_rollback"), (roster_of_the_same_number, "roster_fork")],
)
def test_a_roster_that_is_not_the_one_seen(scene, spoil, code):
    path = scene.give().accept()
    opens(path / "file")
    with scene.restored():
        spoil(scene)
        refused(scene.bob, path / "file", code, step="roster")
        assert "accept-rollback" in reason(path)
        assert os.getxattr(path, "user.meshkit.state") == b"quarantined"
    scene.give()
    opens(path / "file")


def test_revocation_cannot_be_undone_by_the_store(scene):
    path = scene.give().accept()
    opens(path / "file")
    with scene.restored():
        revoked(scene)
        refused(scene.bob, path / "file", "share_revoked", step="roster")
    # The roster of before the revocation is back. The newer one was owner-signed, and bob has seen it.
    refused(scene.bob, path / "file", "roster_rollback", step="roster")
    assert "was seen" in reason(path)
    scene.bob.remount()
    refused(scene.bob, path / "file", "roster_rollback", step="roster", shown_at=path)
    # Nor is this what accept-rollback is for, as long as the revocation stands.


def test_a_quarantine_survives_a_restart(tmp_path):
    """A restored backup of the metadata store: only what really went back is closed, until it is accepted."""
    with Person(tmp_path / "alice", "alice") as alice, Person(tmp_path / "bob", "bob") as bob:
        alice.init()
        bob.init(beside=alice)
        alice.mount()
        bob.mount()
        paths = {}
        for name in ("changed", "quiet"):
            (alice.mnt / name).mkdir()
            put(alice.mnt / name / "file", b"before the backup")
            alice.ask("share.add", target=name, recipient="bob", rights=["read"])
            paths[name] = taken_in(bob, name)
            opens(paths[name] / "file", b"before the backup")
        backup = tmp_path / "backup.db"
        with contextlib.closing(evil.apsw.Connection(str(alice.metadata))) as db:
            db.execute("VACUUM INTO ?", (str(backup),))
        put(alice.mnt / "changed/file", b"after the backup")
        opens(paths["changed"] / "file", b"after the backup")

        # What an administrator does: the file in its place, without the journal of the one before.
        for end in ("-wal", "-shm"):
            Path(f"{alice.metadata}{end}").unlink(missing_ok=True)
        backup.replace(alice.metadata)
        for person, path in ((bob, paths["changed"]), (alice, alice.mnt / "changed")):
            refused(person, path / "file", "head_rollback", step="head")
        opens(paths["quiet"] / "file", b"before the backup")
        bob.remount()
        refused(bob, paths["changed"] / "file", "head_rollback", step="head", shown_at=paths["changed"])
        assert os.getxattr(paths["changed"], "user.meshkit.state") == b"quarantined"
        opens(paths["quiet"] / "file", b"before the backup")
        put(alice.mnt / "quiet/file", b"goes on")
        opens(paths["quiet"] / "file", b"goes on")

        accepted = bob.cli("share", "accept-rollback", paths["changed"].name)
        assert accepted["was_version"] > accepted["now"]["version"]
        opens(paths["changed"] / "file", b"before the backup")
        alice.cli("share", "accept-rollback", "changed")
        put(alice.mnt / "changed/file", b"written after it")
        opens(paths["changed"] / "file", b"written after it")


# == the metadata store itself =======================================================================


def test_the_metadata_store_is_gone_and_comes_back(scene):
    path = scene.give().accept()
    opens(path / "file")
    hidden = scene.db.with_suffix(".hidden")
    scene.db.rename(hidden)
    try:
        # What was proved goes on to the end of its lease (t4_offline.py waits for that), and says why.
        wait_until(lambda: reason(path).startswith("freshness_unproven: "), "the notice")
        assert (path / "file").read_bytes() == PLAIN
        assert os.listdir(path) == ["file"]
        explained = scene.bob.ask("explain", path=str(path / "file"))
        assert explained["code"] == "freshness_unproven"
        assert [step["step"] for step in explained["steps"] if step["result"] == "refused"] == ["capsule"]
        assert (scene.mine / "file").read_bytes() == PLAIN
    finally:
        hidden.rename(scene.db)
    wait_until(lambda: {reason(path), reason(scene.mine)} == {"ok"}, "the confirmation")
    opens(path / "file")
    opens(scene.mine / "file")


def test_the_metadata_store_is_locked_for_good(scene):
    path = scene.give().accept()
    opens(path / "file")
    with contextlib.closing(evil.apsw.Connection(str(scene.db))) as db:
        # WAL readers are not kept out by a writer; an exclusive lock on the file is what does it.
        db.execute("PRAGMA locking_mode = EXCLUSIVE").fetchall()
        with contextlib.suppress(evil.apsw.BusyError):
            db.execute("BEGIN IMMEDIATE")
            db.execute("CREATE TABLE junk(x)")
            assert path.joinpath("file").read_bytes() == PLAIN  # a writer in between hurts no reader
            db.execute("ROLLBACK")
    opens(path / "file")


# == the clock =======================================================================================


def test_a_clock_that_was_set_back(tmp_path, pair):
    alice, _ = pair
    with Person(tmp_path / "tim", "tim") as tim:
        tim.init(beside=alice)
        (alice.mnt / "clock").mkdir()
        put(alice.mnt / "clock/file", PLAIN)
        tim.mount()
        alice.ask("share.add", target="clock", recipient="tim", rights=["read"])
        path = taken_in(tim, "clock")
        opens(path / "file")
        tim.umount()
        # As after a day with the clock a day ahead, or with the clock put back a day now.
        secret = keyvault.open_vault("plain-file", tim.root).load()
        state = State.open(tim.home.state_db, keyvault.derive_key(secret, "mk/state-db@1"))
        state.set_setting("clock_floor", int(time.time()) + 86400)
        state.close()
        tim.mount()
        refused(tim, path / "file", "clock_rollback", step="freshness", shown_at=path)
        assert "doctor --reset-clock" in reason(path)
        report = tim.cli("doctor", "--reset-clock", check=False).json
        assert {"name": "clock", "status": "ok"}.items() <= report["checks"][0].items()
        opens(path / "file")
        tim.umount()
        # Without a daemon it works as well.
        assert tim.cli("doctor", "--reset-clock", check=False).json["checks"][0]["status"] == "ok"


# == the bytes =======================================================================================


@pytest.fixture
def blocks(scene):
    """A function that writes a file of alice's; returns (name, its data, new digests, largest last)."""
    scene.give()
    scene.accept()

    def write(name, size=200_000):
        before = set(evil.all_blocks(scene.alice.blocks))
        data = os.urandom(size)
        put(scene.mine / name, data)
        new = {digest: path.stat().st_size for digest, path in evil.all_blocks(scene.alice.blocks).items()}
        fresh = sorted((digest for digest in new if digest not in before), key=new.__getitem__)
        return name, data, fresh

    return write


def spoil_flip(store, victim, other):
    evil.flip_file(store, victim)


def spoil_flip_last(store, victim, other):
    evil.flip_file(store, victim, -1)


def spoil_truncate(store, victim, other):
    evil.truncate_file(store, victim)


def spoil_empty(store, victim, other):
    evil.overwrite(evil.block_path(store, victim), b"")


def spoil_extend(store, victim, other):
    evil.extend_file(store, victim)


def spoil_other(store, victim, other):
    evil.overwrite(evil.block_path(store, victim), evil.block_path(store, other).read_bytes())


def spoil_error_page(store, victim, other):
    evil.overwrite(evil.block_path(store, victim), b"<html>502 Bad Gateway</html>")


def spoil_missing(store, victim, other):
    evil.remove_file(store, victim)


STORES = [
    (spoil_flip, "cid_mismatch"),
    (spoil_flip_last, "cid_mismatch"),
    (spoil_truncate, "cid_mismatch"),
    (spoil_empty, "cid_mismatch"),
    (spoil_extend, "cid_mismatch"),
    (spoil_other, "cid_mismatch"),
    (spoil_error_page, "cid_mismatch"),
    (spoil_missing, "block_unavailable"),
]


@pytest.mark.parametrize(("spoil", "code"), STORES, ids=[item[0].__name__ for item in STORES])
def test_a_block_that_is_not_what_it_was(scene, blocks, spoil, code):
    """Of the same file, in an older version, is one of the "others" too: a CID names one version's bytes."""
    _, _, old = blocks("victim")
    name, data, fresh = blocks("victim")
    blocks("innocent", 150_000)
    store, victim = scene.alice.blocks, fresh[-1]
    honest = evil.block_path(store, victim).read_bytes()
    spoil(store, victim, old[-1])
    fd = os.open(scene.path / name, os.O_RDONLY)
    try:
        # Find the bad block: the others of this file can be read, this one gives not one byte.
        offsets = range(0, len(data), 65536)
        before = scene.bob.counters()
        outcomes = [errno_of(os.pread, fd, 65536, offset) for offset in offsets]
        after = scene.bob.counters()
        assert set(outcomes) == {0, errno.EIO}
        assert outcomes.count(errno.EIO) == 1
        good = [data[at : at + 65536] for at, outcome in zip(offsets, outcomes, strict=True) if not outcome]
        # Nothing was decrypted but the good ones: a mismatch is found before the key is used.
        assert after["decrypts"] - before["decrypts"] == len(good)
        assert [os.pread(fd, 65536, at) for at in offsets if outcomes[at // 65536] == 0] == good
        bad = outcomes.index(errno.EIO) * 65536
        refused(
            scene.bob,
            scene.path / name,
            code,
            call=lambda: os.pread(fd, 10, bad),
            unchanged=("unwraps", "decrypts"),
        )
    finally:
        os.close(fd)
    with fails(errno.EIO):
        (scene.path / name).read_bytes()
    assert len((scene.path / "innocent").read_bytes()) == 150_000
    opens(scene.path / "file")
    evil.block_path(store, victim).write_bytes(honest)
    opens(scene.path / name, data)


def test_two_blocks_that_changed_places(scene, blocks):
    name, data, fresh = blocks("swapped")
    evil.swap_files(scene.alice.blocks, fresh[-1], fresh[-2])
    with fails(errno.EIO):
        (scene.path / name).read_bytes()
    assert reason_code(scene.path / name) == "cid_mismatch"
    evil.swap_files(scene.alice.blocks, fresh[-1], fresh[-2])
    opens(scene.path / name, data)


def test_a_manifest_that_is_not_what_it_was(scene, blocks):
    name, data, fresh = blocks("manifest")
    cid = os.getxattr(scene.mine / name, "user.meshkit.cid").decode()
    manifest = parse_cid(cid)
    assert manifest in fresh
    assert name in os.listdir(scene.path)
    evil.flip_file(scene.alice.blocks, manifest)
    refused(scene.bob, scene.path / name, "cid_mismatch", unchanged=("unwraps", "decrypts"))
    opens(scene.path / "file")
    evil.flip_file(scene.alice.blocks, manifest)
    opens(scene.path / name, data)


def test_the_root_of_a_share_is_not_what_it_was(scene):
    root = parse_cid(os.getxattr(scene.mine, "user.meshkit.cid").decode())
    scene.give()
    evil.flip_file(scene.alice.blocks, root)
    path = scene.accept()
    refused(scene.bob, path / "file", "cid_mismatch", unchanged=("unwraps", "decrypts"), shown_at=path)
    evil.flip_file(scene.alice.blocks, root)
    assert (path / "file").read_bytes() == PLAIN


def test_a_block_in_the_wrong_place(scene, blocks):
    """The CID is right and the head is signed; what it names is a file's manifest, not the share's root."""
    _, _, fresh = blocks("other")
    assert "other" in os.listdir(scene.path)
    with scene.restored():
        head = evil.newest_head(scene.db, scene.id)
        following = {"ver": evil.peek(Head, head).ver + 1, "prev": record_hash(head), "root": fresh[0]}
        evil.append_head(scene.db, scene.id, evil.forged_head(head, scene.owner, **following))
        with fails(errno.EIO):
            os.close(os.open(scene.path / "other", os.O_RDONLY))
        assert reason_code(scene.path / "other") == "invalid_envelope"
        assert scene.bob.ask("explain", path=str(scene.path / "other"))["code"] == "invalid_envelope"


def test_the_byte_store_is_gone_and_comes_back(scene, blocks):
    name, data, _ = blocks("gone")
    assert name in os.listdir(scene.path)
    hidden = scene.alice.blocks.with_name("hidden")
    scene.alice.blocks.rename(hidden)
    try:
        refused(scene.bob, scene.path / name, "provider_request_failed", unchanged=("unwraps", "decrypts"))
        assert sorted(os.listdir(scene.path)) == ["file", "gone"]
    finally:
        hidden.rename(scene.alice.blocks)
    opens(scene.path / name, data)


# == room ============================================================================================


def test_the_byte_store_is_full(tmp_path):
    with tmpfs(tmp_path / "store", 2 << 20) as store, Person(tmp_path / "sam", "sam") as sam:
        sam.init(None, "--provider", f"local:{store}/blocks", "--metadata", f"{tmp_path}/metadata.db")
        sam.cli("share", "create", "first")
        mnt = sam.mount() / "first"
        put(mnt / "small", b"fits")
        data = os.urandom(4 << 20)
        with open(mnt / "large", "wb", 0) as file:
            with fails(errno.ENOSPC):
                for at in range(0, len(data), 65536):
                    file.write(data[at : at + 65536])
                os.fsync(file.fileno())
            assert reason_code(mnt / "large") == "no_space"
        assert sam.explain(mnt / "large")["code"] == "no_space"
        wait_until(lambda: "no_space" in sam.errors_text(), "no_space in errors.txt", 5)
        assert (mnt / "small").read_bytes() == b"fits"
        left = sam.cli("sync", "--timeout", "5", check=False)
        assert left.code == exit_code_for(MeshkitError("commit_pending"))
        assert left.json["left"][0]["reason"] == "no_space"
        # Room is made: nothing of what was accepted is lost.
        subprocess.run(["mount", "-o", "remount,size=32m", store], check=True)
        assert sam.cli("sync") == {"left": []}
        if (mnt / "large").stat().st_size == len(data):
            assert (mnt / "large").read_bytes() == data
        sam.remount()
        assert (mnt / "small").read_bytes() == b"fits"


def test_the_home_is_full(tmp_path):
    with tmpfs(tmp_path / "disk", 8 << 20) as disk, Person(disk / "sam", "sam", mnt=tmp_path / "mnt") as sam:
        sam.init(None, "--provider", f"local:{tmp_path}/blocks", "--metadata", f"{tmp_path}/metadata.db")
        sam.cli("share", "create", "first")
        mnt = sam.mount() / "first"
        put(mnt / "small", b"fits")
        filler = disk / "filler"
        with contextlib.suppress(OSError), open(filler, "wb", 0) as file:
            while True:
                file.write(bytes(65536))
        data = os.urandom(3 << 20)
        fd = os.open(mnt / "large", os.O_RDWR | os.O_CREAT)
        try:
            with fails(errno.ENOSPC):
                for at in range(0, len(data), 65536):
                    os.write(fd, data[at : at + 65536])
                os.fsync(fd)
        finally:
            os.close(fd)
        assert (mnt / "small").read_bytes() == b"fits"
        filler.unlink()
        # A block that failed just before may be told to the next writer, once.
        wait_until(lambda: errno_of(put, mnt / "later", data) == 0, "room", 15)
        assert (mnt / "later").read_bytes() == data
        sam.remount()
        assert (mnt / "later").read_bytes() == data
        assert (mnt / "small").read_bytes() == b"fits"


# == the table =======================================================================================

# Codes that a mount or a command meets in another test file, and why they are not rows of this one.
ELSEWHERE = {
    "policy_provider_error": "needs a policy provider: t1_authzen.py, t3_policies.py, t4_policies.py",
    "policy_not_found": "t3_policies.py",
    "policy_exists": "t3_policies.py",
    "policy_invalid": "t3_policies.py, t4_policies.py",
    "policy_in_use": "t3_policies.py, t4_policies.py",
    "capability_denied": "t4_conditions.py",
    "biscuit_not_installed": "t3_biscuit.py",
    "key_release_refused": "needs a release service: t4_release.py, t3_release.py",
    "key_release_unavailable": "needs a release service: t4_release.py, t3_release.py",
    "provider_http_error": "needs a byte store that speaks HTTP: t1_s3.py, t1_ipfs.py",
    "metadata_unavailable": "the gate makes it freshness_unproven; for commands: t1_metadata_contract.py",
    "metadata_unauthorized": "the gate makes it freshness_unproven; t3_http_home.py, signatures: t0_wire.py",
    "metadata_forbidden": "the gate makes it freshness_unproven",
    "service_key_changed": "t1_http_metadata.py, t3_http_home.py",
    "sync_conflict": "t1_service.py",
    "roster_not_renewed": "t3_leases.py: no call of a program meets it",
    "rate_limited": "the gate makes it freshness_unproven",
    "quota_exceeded": "only a metadata service has quotas",
    "head_conflict": "merged and tried again, nobody sees it: t4_sharing.py, both write",
    "state_corrupt": "t4_bad_input.py",
    "home_busy": "t3_control.py",
    "already_initialized": "t3_config.py, t4_cli.py",
    "invalid_config": "t3_config.py",
    "invalid_cli_config": "t3_config.py",
    "keyvault_refused": "t1_keyvault.py (plaintext back ends)",
    "keyvault_too_weak": "t4_keyvault.py",
    "keyvault_locked_out": "t1_keyvault_tpm.py",
    "keyvault_pcr_changed": "t1_keyvault_tpm.py",
    "keyvault_replaced": "t1_keyvault_tpm.py, t1_keyvault_credential.py",
    "contact_unknown": "t4_sharing.py",
    "not_owner": "t4_sharing.py",
    "not_shared": "t4_sharing.py",
    "contact_key_changed": "t1_identity.py, t3_rotation.py",
    "key_replaced": "needs the owner's old key: t3_rotation.py",
    "verification_failed": "t4_sharing.py",
    "sealed_file_invalid": "t1_sealed_file.py, t4_recovery.py",
    "sealed_file_version": "t1_sealed_file.py",
    "wrong_words": "t1_sealed_file.py, t4_recovery.py",
    "identity_outdated": "t4_recovery.py",
    "device_revoked": "needs a second device: t3_devices.py, t4_devices.py",
    "device_not_found": "t3_devices.py",
    "device_exists": "t3_devices.py",
    "device_behind": "needs a second device: t3_devices.py",
    "identity_handle_taken": "t1_metadata_contract.py",
    "share_exists": "t4_cli.py",
    "invalid_name": "t4_sharing.py",
    "invalid_cid": "t0_codecs.py",
    "letter_not_found": "t4_sharing.py",
    "vault_not_found": "t3_conditions.py",
    "vault_exists": "t3_conditions.py",
    "capability_not_found": "t3_conditions.py",
    "path_not_found": "t4_sharing.py",
    "gc_unsafe": "t3_keeping.py",
    "verify_failed": "t3_verify.py, t4_keeping.py",
    "path_exists": "t4_history.py",
    "version_not_found": "t4_history.py",
    "version_not_granted": "t3_history.py",
    "not_supported": "t4_sharing.py",
    "fuse_missing": "t4_preflight.py",
    "fusermount_missing": "t4_preflight.py",
    "mountpoint_missing": "t4_preflight.py",
    "mountpoint_busy": "t4_preflight.py",
    "mountpoint_stale": "t4_preflight.py",
    "mountpoint_not_empty": "t4_preflight.py",
    "mountpoint_inside_state": "t4_preflight.py",
    "mount_failed": "t3_control.py",
    "mount_in_use": "t4_cli.py",
    "not_mounted": "t3_cli.py",
    "daemon_unreachable": "t3_control.py",
    "operation_aborted": "t3_cli.py",
    "output_failed": "t3_output.py",
    "timed_out": "t4_traps.py",
    "internal_error": "a defect by definition",
}


def test_every_code_has_a_test_or_a_reason():
    """Which rows of the table are proved here is read from this file itself; the rest is listed above."""
    here = Path(__file__).read_text().partition("# == the table ==")[0]
    proved = {code for code in TABLE if f'"{code}"' in here}
    assert not proved & ELSEWHERE.keys(), "listed as elsewhere, but it is here"
    assert proved | ELSEWHERE.keys() == TABLE.keys()


def test_the_gate_answers_eacces_and_the_bytes_answer_eio():
    by_design = {
        errno.EACCES: {
            "identity_not_found", "identity_locked", "recipient_not_authorized", "key_unwrap_failed",
            "capsule_not_found", "share_expired", "share_revoked", "freshness_unproven",
            "policy_provider_required", "policy_provider_error", "policy_denied", "vault_membership_required",
            "capability_required", "capability_denied", "key_release_refused", "key_release_unavailable",
            "biscuit_not_installed", "right_not_granted", "key_replaced", "contact_key_changed",
            "keyvault_strength_required",
        },
        errno.EIO: {
            "cid_mismatch", "invalid_envelope", "head_rollback", "head_fork", "roster_rollback", "roster_fork",
            "block_unavailable", "provider_http_error", "provider_request_failed",
        },
        errno.ENOSPC: {"no_space"},
    }  # fmt: skip
    for number, codes in by_design.items():
        assert {code: TABLE[code].errno for code in codes} == dict.fromkeys(codes, number)


# == secrets =========================================================================================


def secrets_of(person, db):
    """Every private key of a person, the share keys they can unwrap, and keys derived from those."""
    vault = keyvault.open_vault("plain-file", person.root).load()
    me = identity_of(person)
    found = {
        "wrapping key": vault,
        "state key": keyvault.derive_key(vault, "mk/state-db@1"),
        "identity key": keyvault.derive_key(vault, "mk/identity@1"),
        "signing seed": me.signing.seed,
        "encryption seed": me.encryption.seed,
    }
    for share in evil.shares(db):
        owner = {me.signing.kid: me.signing.public}
        for blob in evil.capsules(db, share):
            with contextlib.suppress(MeshkitError):
                capsule = Capsule.parse(blob, owner)
                key = open_capsule(capsule, me.encryption)
                found[f"epoch key {capsule.epoch} of {share.hex()}"] = key
                found[f"root key of {share.hex()}"] = ver_key(key, capsule.oid, capsule.epoch, 1)
    return found


def spellings(secret):
    """How a secret may be written; a dozen bytes of it in a row are bad enough."""
    for start in (0, 1, 2, len(secret) - 12):
        piece = secret[start : start + 12]
        yield piece
        yield piece.hex().encode()
        yield piece.hex().upper().encode()
        yield base64.b64encode(piece)
        yield base64.urlsafe_b64encode(piece)
        yield base64.b32encode(piece).rstrip(b"=")[:-1]
        yield repr(piece)[2:-1].encode()


def found_in(text, secrets):
    """Names of the secrets that occur in ``text`` in any spelling."""
    return {name for name, secret in secrets.items() if any(form in text for form in spellings(secret))}


def test_the_search_for_secrets_finds_them():
    secret = os.urandom(32)
    in_base64 = base64.b64encode(b"x" + secret).decode()
    for written in (secret.hex(), secret.hex().upper(), repr(secret), in_base64):
        assert found_in(f"before {written} after".encode(), {"it": secret}) == {"it"}, written
    assert found_in(b"a" + base64.b32encode(secret) + b"z", {"it": secret}) == {"it"}
    assert found_in(b"before" + secret + b"after", {"it": secret}) == {"it"}
    assert found_in(os.urandom(10_000), {"it": secret}) == set()


def look_for_secrets(alice, bob):
    """At the end of everything above: neither keys nor names nor content in anything that was put out."""
    secrets = {
        f"{person.name}'s {name}": secret
        for person in (alice, bob)
        for name, secret in secrets_of(person, alice.metadata).items()
    }
    assert len(secrets) > 10
    for person in (alice, bob):
        said = "".join(person.outputs).encode(errors="surrogateescape")
        control = person.mnt / ".meshkit"
        shown = [(control / name).read_bytes() for name in os.listdir(control)]
        process = Path(f"/proc/{person.pid}")
        started = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
        logs = b"".join(path.read_bytes() for path in person.root.glob("log/*") if path.is_file())
        assert b"level=info" in logs
        for place, text in (
            ("output", said), ("status", json.dumps(person.status()).encode()), ("log", logs),
            (".meshkit", b"".join(shown)), ("process", started),
        ):  # fmt: skip
            assert not found_in(text, secrets), place
        # The log is a plain file, so names and content are secrets there.
        for word in (PLAIN[:20], b"victim", b"innocent", b"refused_before_the_key", b"needs_approval"):
            assert word not in logs, word
