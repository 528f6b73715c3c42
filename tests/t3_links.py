"""Invitations as links, with the byte store in them; taking them back with their code; declining."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from homes import Person
from inner_service import InnerService
from t3_inviting import Somebody, call, invite, letters_of, place, stage, three, ticket_of  # noqa: F401 - fixtures

from meshkitfs.core.ticket import Ticket, link_of
from meshkitfs.errors import MeshkitError
from meshkitfs.metadata import EmbeddedMetadata
from meshkitfs.providers import ProviderSpec, shareable

BASE = Path("/base")


def spec(**fields):
    return ProviderSpec.from_config(fields, BASE)


S3 = {"type": "s3", "endpoint": "https://s3.example", "bucket": "team"}
KUBO = {"type": "ipfs-http", "ipfsApiUrl": "https://ipfs.example"}


@pytest.mark.parametrize(
    ("fields", "shared"),
    [
        (S3, S3),
        (
            S3 | {"prefix": "blocks", "credentialsFile": "keys", "profile": "mine", "region": "eu"},
            S3 | {"prefix": "blocks", "region": "eu"},
        ),
        (S3 | {"accessKeyIdEnv": "MY_ID", "caFile": "ca.pem", "timeoutMs": 5000}, S3 | {"timeoutMs": 5000}),
        (KUBO | {"username": "me", "tokenFile": "secret"}, KUBO),
        (KUBO | {"ipfsApiUrl": "http://10.0.0.5:5001", "allowInsecure": True},
         KUBO | {"ipfsApiUrl": "http://10.0.0.5:5001"}),
        (
            {"type": "gateway-retrieval", "gatewayUrl": "https://gw.example", "storage": KUBO | {"tokenEnv": "T"}},
            {"type": "gateway-retrieval", "gatewayUrl": "https://gw.example", "storage": KUBO},
        ),
        (
            {"type": "fallback", "providers": [KUBO, S3 | {"profile": "mine"}]},
            {"type": "fallback", "providers": [KUBO, S3]},
        ),
        ({"type": "fallback", "providers": [{"type": "local-dev", "store": s} for s in "ab"]}, None),
        ({"type": "local-dev", "store": "blocks"}, None),
    ],
)  # fmt: skip
def test_what_others_are_told_of_a_byte_store(fields, shared):
    assert shareable(spec(**fields)) == shared


def test_a_link_is_read_as_what_it_holds():
    owner = Somebody("alice")
    made = ticket_of(owner, store=json.dumps(S3))
    text = made.to_text(owner.signing)
    link = link_of(text, made.url)
    assert link.startswith("https://mesh.example/join#meshkit-invitation1:")
    assert Ticket.from_text(link) == Ticket.from_text(text) == made
    assert Ticket.from_text(link[:50] + "\n  " + link[50:]) == made
    for wrong in (
        link.replace("mesh.example", "evil.example"), link.replace("/join#", "/join?x#"),
        link.replace("https", "http", 1), "#" + text, link.replace("#", "?"), link + "#x",
    ):  # fmt: skip
        with pytest.raises(MeshkitError) as caught:
            Ticket.from_text(wrong)
        assert caught.value.code == "invalid_argument"
        assert text[60:90] not in str(caught.value)


def test_the_whole_way_by_a_link(place, tmp_path):  # noqa: F811
    behind = EmbeddedMetadata.create(f"{place}/service.db")
    with (
        InnerService(behind, "invite") as server,
        Person(f"{place}/alice", "alice") as alice,
        Person(f"{place}/carol", "carol") as carol,
        Person(f"{place}/dave", "dave") as dave,
    ):
        vault = ("--key-vault", "plain-file", "--provider", f"local:{place}/blocks")
        join = {"env": {"MESHKITFS_JOIN_TOKEN": server.invite()}}
        alice.cli("init", "--identity", "alice", "--metadata", server.url, *vault, **join)
        alice.cli("share", "create", "photos")
        made = alice.cli("share", "invite", "photos", "--link", "--out", "-")
        link = alice.outputs.pop(-2) and made.pop("link")
        assert link.startswith(f"{server.url}/join#meshkit-invitation1:")
        assert "ticket" not in made
        assert made["store"] == "", "a directory of this machine is told to nobody"
        # What a browser is sent to says what to do, and has nothing to do with the secret.
        page = httpx.get(link)
        assert page.status_code == 200
        assert "meshkitfs init --invitation -" in page.text
        assert "#" not in str(page.request.url.raw_path)
        assert "default-src 'none'" in page.headers["content-security-policy"]
        # The words of a command are no place for it, and it is not repeated.
        for words in (["init", "--invitation", link], ["claim", link]):
            refused = carol.run(*words, check=False)
            assert refused.code == 2
            assert "secret" in refused.err
            assert link[60:90] not in refused.err
        joined = carol.cli("init", "--identity", "carol", "--invitation", "-", *vault, stdin=link.encode())
        assert joined["invitation"]["owner"] == "alice"
        assert alice.cli("share", "invitations")["granted"] == [made["id"]]
        # Somebody who does not want it.
        (letter,) = carol.cli("inbox")["letters"]
        assert carol.cli("decline", letter["id"])["name"] == "photos"
        assert carol.cli("inbox")["letters"] == []
        assert carol.cli("decline", letter["id"], check=False).error["code"] == "letter_not_found"
        # Taken back: nobody becomes a member with it either.
        file = f"{place}/link"
        second = alice.cli("share", "invite", "photos", "--link", "--out", file)
        assert "link" not in second
        assert Path(file).read_text().startswith(server.url)
        assert alice.cli("share", "uninvite", second["id"])["joining"] == "taken_back"
        late = dave.cli("init", "--identity", "dave", "--invitation", file, *vault, check=False)
        assert late.error["code"] == "metadata_unauthorized"
        used = alice.cli("share", "uninvite", made["id"])
        assert (used["stage"], used["joining"]) == ("done", "none")
        for person in (alice, carol, dave):
            assert link[60:90] not in "".join(person.outputs) + person.logs()
    behind.close()


def test_the_byte_store_in_an_invitation_is_shown_and_used(place):  # noqa: F811
    """S3 without a server: what is refused at opening names the very store of the invitation."""
    behind = EmbeddedMetadata.create(f"{place}/service.db")
    with (
        InnerService(behind, "open") as server,
        Person(f"{place}/alice", "alice") as alice,
        Person(f"{place}/carol", "carol") as carol,
    ):
        alice.cli("init", "--identity", "alice", "--metadata", server.url, "--key-vault", "plain-file",
                  "--provider", f"local:{place}/blocks")  # fmt: skip
        alice.cli("share", "create", "photos")
        dead = {"type": "ipfs-http", "ipfsApiUrl": "http://127.0.0.1:9", "tokenFile": "secret"}
        config = alice.root / "meshkit.config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"provider": dead}))
        (alice.root / "secret").write_text("t")
        (alice.root / "secret").chmod(0o600)
        file = f"{place}/for-carol"
        made = alice.cli("share", "invite", "photos", "--out", file)
        assert json.loads(made["store"]) == {"type": "ipfs-http", "ipfsApiUrl": "http://127.0.0.1:9"}
        vault = ("--identity", "carol", "--key-vault", "plain-file")
        tried = carol.run("init", "--invitation", file, *vault, check=False)
        assert "names this byte store" in tried.err
        assert "http://127.0.0.1:9" in tried.err
        assert "[provider_request_failed]" in tried.err
        assert not (carol.root / "identity.sealed").exists()
        # What is said by oneself goes before.
        carol.cli("init", "--invitation", file, *vault, "--provider", f"local:{place}/blocks")
    behind.close()


@pytest.mark.parametrize(
    "store",
    [
        '{"type": "local-dev", "store": "/etc"}',
        json.dumps(KUBO | {"tokenFile": "/home/carol/.ssh/id_ed25519"}),
        json.dumps(S3 | {"accessKeyIdEnv": "HOME"}),
        json.dumps(KUBO | {"ipfsApiUrl": "http://10.0.0.5:5001", "allowInsecure": True}),
        json.dumps(S3 | {"secretAccessKey": "x"}),
        "no json",
    ],
)
def test_a_byte_store_that_reaches_for_what_is_not_its_own_is_refused(tmp_path, store):
    owner = Somebody("eve")
    file = tmp_path / "invitation"
    file.touch(0o600)
    file.write_text(ticket_of(owner, url="http://127.0.0.1:9", store=store).to_text(owner.signing))
    with Person(tmp_path / "carol", "carol") as carol:
        refused = carol.cli(
            "init", "--identity", "carol", "--key-vault", "plain-file", "--invitation", file, check=False
        )
        assert refused.error["code"] == "invalid_argument"
        assert "byte store in the invitation" in refused.error["detail"]
        assert not (carol.root / "identity.sealed").exists()


def test_an_invitation_is_pasted_at_a_terminal_without_being_shown(tmp_path):
    """Longer than a line of a terminal may be: it comes in whole, and is not echoed."""
    program = (
        "import sys; from meshkitfs.cli._inviting import read_ticket; "
        "text = read_ticket('-'); print(len(text), text[:8], text[-4:], file=sys.stderr)"
    )
    ours, theirs = pty.openpty()
    code = str(Path(__file__).resolve().parents[1])
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=theirs, stdout=theirs, stderr=theirs, cwd=code
    )
    os.close(theirs)
    seen = b""
    while b"not shown): " not in seen:
        seen += os.read(ours, 4096)
    secret = b"https://" + b"x" * 6000 + b"end!"
    sent = 0
    while sent < len(secret):
        sent += os.write(ours, secret[sent : sent + 1000])
    os.write(ours, b"\r")
    while b"end!" not in seen:
        seen += os.read(ours, 4096)
    assert process.wait(60) == 0
    os.close(ours)
    assert b"xxx" not in seen
    assert f"{len(secret)} https:// end!".encode() in seen


def test_a_link_needs_a_service(three):  # noqa: F811
    alice, *_ = three
    with pytest.raises(MeshkitError) as refused:
        call(alice, "share.invite", share="first", link=True)
    assert refused.value.code == "invalid_argument"
    assert call(alice, "share.invitations")["invitations"] == []


def test_declining_tells_nobody_and_changes_nothing_else(three):  # noqa: F811
    alice, bob, _ = three
    made = invite(alice)
    call(bob, "invitation.claim", ticket=made["ticket"])
    assert call(alice, "share.invitations")["granted"] == [made["id"]]
    assert stage(alice)[0] == "done"
    (letter,) = call(bob, "inbox.list")["letters"]
    declined = call(bob, "inbox.decline", letter=letter["id"])
    assert (declined["from"], declined["name"]) == ("alice", "first")
    assert letters_of(bob) == []
    assert bob.session.book.shares == {}
    alice.refresh()
    assert {member.handle for member in alice.session.book.standing(alice.share())} == {"alice", "bob"}
    with pytest.raises(MeshkitError) as refused:
        call(bob, "inbox.decline", letter=letter["id"])
    assert refused.value.code == "letter_not_found"
