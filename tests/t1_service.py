"""The service over real sockets: every route, who may do what, and what is refused in which words."""

import base64
import contextlib
import hashlib
import json
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from dataclasses import replace

import httpx
import pytest
from service import Person, Service, refused, unb64
from t1_metadata_contract import cluster, identity  # noqa: F401 - a fixture

from meshkitfs.cli import main
from meshkitfs.core.keys import SigningKey, kid_of
from meshkitfs.core.membership import Revocations, VaultRecord, revocations_id
from meshkitfs.core.records import Head, Timestamp, record_hash, rotate
from meshkitfs.metadata._wire import b64, write_publication

CID = "bafkreif4nk5hnawxlkvrjxgpeyzvcf7xxvq6nfbzgegyiuuu5dcluxzv6q"
NAMES = iter(range(10**6))


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def service(request, tmp_path_factory):
    if request.param == "sqlite":
        database = tmp_path_factory.mktemp("service") / "metadata.db"
    else:
        database = request.getfixturevalue("cluster").fresh()
    with Service(database) as running:
        yield running
        assert running.stop() == 0
        assert running.said == ""  # no warnings, no tracebacks


@pytest.fixture
def alice(service):
    return Person(f"alice{next(NAMES)}", service).join()


@pytest.fixture
def bob(service):
    return Person(f"bob{next(NAMES)}", service).join()


@pytest.fixture
def share(alice):
    return alice.new_share()


def records(person, share):
    """What a person is shown of a share: by every route that reads."""
    path = f"/v1/shares/{share.share.hex()}"
    found = {
        name: person.get(f"{path}/{name}").json() for name in ("roster", "head", "timestamp", "retention")
    }
    found["heads"] = person.get(f"{path}/heads").json()
    found["state"] = person.state(share).json()
    found["capsules"] = person.get(f"{path}/capsules", params={"kid": person.kid.hex()}).json()
    return found


# -- the service itself ------------------------------------------------------------------------------------


def test_it_says_who_it_is_without_a_signature(service):
    answer = service.get("/v1/service")
    assert answer.status_code == 200
    info = answer.json()
    assert info["service"] == "meshkitfs"
    assert info["version"] == 1
    assert len(unb64(info["key"])) == 32
    assert abs(info["time"] - time.time()) < 60
    assert info["join"] == "open"
    assert service.get("/v1/health").json() == {"status": "ok"}


def test_every_status_is_documented(service):
    schema = service.get("/openapi.json").json()
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            wanted = {"400", "401", "403", "404", "408", "409", "413", "422", "429", "503", "507"}
            if path in ("/v1/service", "/v1/health"):
                wanted = {"405", "429", "503"}
            assert wanted <= set(operation["responses"]), (path, method)
    assert len(schema["paths"]) == 27


# -- signatures --------------------------------------------------------------------------------------------


def test_unsigned_is_refused_on_every_route(service):
    schema = service.get("/openapi.json").json()
    signed = 0
    for path, methods in schema["paths"].items():
        if path in ("/v1/service", "/v1/health"):
            continue
        for method in methods:
            place = path.replace("{cid}", CID).replace("{handle}", "alice")
            for name in ("share", "kid", "letter", "job", "vault", "capability", "invitation"):
                place = place.replace(f"{{{name}}}", "00" * 16)
            answer = httpx.request(method, service.url + place, content=b"{}" if method != "get" else None)
            if answer.status_code == 413:
                assert method == "delete"
                answer = httpx.request(method, service.url + place)
            refused(answer, 401, "metadata_unauthorized", "not signed")
            signed += 1
    assert signed > 30


def test_a_key_that_no_member_has(service, alice):
    stranger = SigningKey.generate()
    refused(alice.get("/v1/invitations", key=stranger), 401, "metadata_unauthorized", "no member")


def test_a_signature_of_somebody_else_under_a_members_name(service, alice):
    request = alice.signed("GET", "/v1/invitations")
    forged = alice.signed("GET", "/v1/invitations", key=SigningKey.generate())
    request.headers["signature"] = forged.headers["signature"]
    refused(alice.send(request), 401, "metadata_unauthorized")


@pytest.mark.parametrize("late", [-600, -130, 130, 600])
def test_a_signature_that_is_too_old_or_from_the_future(alice, late):
    refused(alice.get("/v1/invitations", now=time.time() + late), 401, "metadata_unauthorized")


def test_clocks_may_be_a_minute_apart(alice):
    for late in (-60, 60):
        assert alice.get("/v1/invitations", now=time.time() + late).status_code == 200


def test_a_request_is_served_once(alice):
    request = alice.signed("POST", "/v1/invitations", json={"expires_in": 60})
    assert alice.send(request).status_code == 201
    for _ in range(2):
        refused(alice.send(request), 401, "metadata_unauthorized", "made before")
    assert len(alice.get("/v1/invitations").json()["invitations"]) == 1


def test_a_captured_request_cannot_be_raced(alice):
    """The same request twelve times at once: one is served."""
    request = alice.signed("POST", "/v1/invitations", json={"expires_in": 60})
    statuses = []

    def send():
        with httpx.Client(timeout=60) as http:
            statuses.append(http.send(request).status_code)

    threads = [threading.Thread(target=send) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [201] + [401] * 11


def test_a_body_that_was_changed_after_signing(alice):
    request = alice.signed("POST", "/v1/invitations", json={"expires_in": 60})
    other = json.dumps({"expires_in": 61}).encode()
    changed = httpx.Request("POST", request.url, headers=request.headers, content=other)
    changed.headers["content-length"] = str(len(other))
    refused(alice.send(changed), 401, "metadata_unauthorized")
    digest = base64.b64encode(hashlib.sha256(other).digest()).decode()
    changed.headers["content-digest"] = f"sha-256=:{digest}:"
    refused(alice.send(changed), 401, "metadata_unauthorized")


def test_a_body_that_is_not_signed(alice):
    request = alice.signed("POST", "/v1/invitations")
    body = json.dumps({"expires_in": 60}).encode()
    headers = dict(request.headers) | {"content-length": str(len(body)), "content-type": "application/json"}
    refused(
        alice.send(httpx.Request("POST", request.url, headers=headers, content=body)),
        401,
        "metadata_unauthorized",
    )


@pytest.mark.parametrize("what", ["method", "path", "query"])
def test_a_signature_is_for_one_request(alice, what):
    request = alice.signed("GET", f"/v1/shares/{'00' * 16}/heads?after=1")
    changed = {
        "method": lambda: httpx.Request("DELETE", request.url, headers=request.headers),
        "path": lambda: httpx.Request(
            "GET", request.url.copy_with(path=f"/v1/shares/{'11' * 16}/heads"), headers=request.headers
        ),
        "query": lambda: httpx.Request(
            "GET", request.url.copy_with(query=b"after=2"), headers=request.headers
        ),
    }
    refused(alice.send(changed[what]()), 401, "metadata_unauthorized")


def test_a_request_for_another_service_is_not_one_for_this(alice):
    """Who runs that other one could send it here otherwise, in alice's name."""
    request = alice.signed("GET", "/v1/invitations", url="http://other.example")
    here = httpx.Request("GET", alice.service.url + "/v1/invitations", headers=request.headers)
    assert here.headers["host"] == "other.example"
    refused(alice.send(here), 401, "metadata_unauthorized", "another service")


def test_two_signatures_are_not_one(alice):
    request = alice.signed("GET", "/v1/invitations")
    again = alice.signed("GET", "/v1/invitations")
    lines = [*request.headers.raw, (b"Signature-Input", again.headers["signature-input"].encode())]
    refused(alice.send(httpx.Request("GET", request.url, headers=lines)), 401, "metadata_unauthorized")


# -- joining -----------------------------------------------------------------------------------------------


def test_a_newcomer_signs_with_the_key_in_the_record(service):
    eve = Person("eve", service)
    path = "/v1/identities/eve"
    refused(
        eve.post(path, {"record": b64(eve.record)}, key=SigningKey.generate()), 401, "metadata_unauthorized"
    )
    refused(eve.post(path, {"record": "!"}), 401, "metadata_unauthorized")
    refused(eve.ask("POST", path, content=b"[" * 10_000), 401, "metadata_unauthorized")
    eve.join()
    eve.join()  # its answer was lost
    assert eve.get(path).json() == {"chain": [b64(eve.record)]}
    assert eve.get(f"/v1/identity-keys/{eve.key.kid.hex()}").json() == {"chain": [b64(eve.record)]}
    assert eve.get("/v1/identities/nobody").json() == {"chain": []}
    assert eve.get(f"/v1/identity-keys/{'00' * 16}").json() == {"chain": []}


def test_a_handle_and_a_key_belong_to_the_first(service, alice):
    eve = Person("eve2", service)
    other = identity(alice.handle, eve.key)
    refused(eve.post(f"/v1/identities/{alice.handle}", {"record": b64(other)}), 409, "identity_handle_taken")
    # A record that claims alice's encryption key would own alice's mailbox.
    eve.record = identity("eve2", eve.key, enc=alice.enc.public)
    refused(eve.post("/v1/identities/eve2", {"record": b64(eve.record)}), 409, "identity_handle_taken")
    refused(
        eve.post("/v1/identities/other", {"record": b64(identity("eve2", eve.key))}), 422, "invalid_record"
    )


def test_a_replaced_key_speaks_for_nobody_but_what_it_owns_is_kept(service, alice):
    share = alice.new_share()
    old_key, new_key = alice.key, SigningKey.generate()
    new = rotate(alice.record, old_key, _peek(identity(alice.handle, new_key)), new_key)
    assert alice.post(f"/v1/identities/{alice.handle}", {"record": b64(new)}).status_code == 204
    refused(alice.get("/v1/invitations", key=old_key), 401, "metadata_unauthorized", "no member has now")
    alice.key = new_key
    assert alice.get(f"/v1/identities/{alice.handle}").json() == {"chain": [b64(alice.record), b64(new)]}
    assert records(alice, share)["roster"]["record"] is not None
    assert alice.get(f"/v1/mailboxes/{alice.kid.hex()}").status_code == 200  # the old encryption key's


def _peek(record):
    import evil

    from meshkitfs.core.records import IdentityRecord

    return evil.peek(IdentityRecord, record)


def test_an_identity_is_not_continued_by_a_stranger(service, alice):
    eve = Person("eve3", service).join()
    stranger = SigningKey.generate()
    new = rotate(alice.record, alice.key, _peek(identity(alice.handle, stranger)), stranger)
    answer = eve.post(f"/v1/identities/{alice.handle}", {"record": b64(new)})
    refused(answer, 401, "metadata_unauthorized", "not this identity's")


@pytest.fixture(scope="module")
def closed(tmp_path_factory):
    """A service that wants invitations."""
    with Service(tmp_path_factory.mktemp("closed") / "metadata.db", join="invite") as running:
        yield running


def operator_invites(service, *options):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "meshkitfs",
            "--json",
            "serve-invite",
            "--database",
            service.database,
            *options,
        ],
        capture_output=True,
        text=True,
        env=service.env,
        cwd="/",
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["code"]


def test_invitations(closed):
    alice, bob, eve = (Person(f"{name}{next(NAMES)}", closed) for name in ("alice", "bob", "eve"))
    body = {"record": b64(alice.record)}
    path = f"/v1/identities/{alice.handle}"
    refused(alice.post(path, body), 401, "metadata_unauthorized", "an invitation")
    wrong = {"Meshkit-Invitation": "A" * 22}
    refused(alice.post(path, body, headers=wrong), 401, "metadata_unauthorized", "unknown, used")
    refused(alice.post(path, body, headers={"Authorization": "Bearer x"}), 401, "metadata_unauthorized")
    code = operator_invites(closed)
    alice.join(**{"Meshkit-Invitation": code})
    alice.join()  # a member's own record needs none
    refused(
        eve.post(
            f"/v1/identities/{eve.handle}", {"record": b64(eve.record)}, headers={"Meshkit-Invitation": code}
        ),
        401,
        "metadata_unauthorized",
        "unknown, used",
    )
    answer = alice.post("/v1/invitations", {"expires_in": 3600})
    assert answer.status_code == 201
    mine = answer.json()
    assert abs(mine["expires"] - time.time() - 3600) < 60
    (line,) = alice.get("/v1/invitations").json()["invitations"]
    assert line["used_by"] is None
    assert mine["code"] not in json.dumps(line)
    bob.join(**{"Meshkit-Invitation": mine["code"]})
    assert alice.get("/v1/invitations").json()["invitations"][0]["used_by"] == bob.handle
    refused(alice.delete(f"/v1/invitations/{line['id']}"), 404, "path_not_found")  # used up
    other = alice.post("/v1/invitations", {"expires_in": 60}).json()["code"]
    (unused,) = [i for i in alice.get("/v1/invitations").json()["invitations"] if i["used_by"] is None]
    refused(bob.delete(f"/v1/invitations/{unused['id']}"), 404, "path_not_found")  # not bob's
    assert bob.get("/v1/invitations").json() == {"invitations": []}
    assert alice.delete(f"/v1/invitations/{unused['id']}").status_code == 204
    refused(
        eve.post(
            f"/v1/identities/{eve.handle}", {"record": b64(eve.record)}, headers={"Meshkit-Invitation": other}
        ),
        401,
        "metadata_unauthorized",
    )


def test_one_invitation_lets_one_in_however_fast(closed):
    code = operator_invites(closed)
    statuses = []

    def join(person):
        answer = person.post(
            f"/v1/identities/{person.handle}",
            {"record": b64(person.record)},
            headers={"Meshkit-Invitation": code},
        )
        statuses.append(answer.status_code)

    people = [Person(f"racer{next(NAMES)}", closed) for _ in range(6)]
    threads = [threading.Thread(target=join, args=(person,)) for person in people]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [204] + [401] * 5


def test_an_invitation_is_nowhere_in_the_database(closed):
    code = operator_invites(closed)
    data = b"".join(path.read_bytes() for path in closed_files(closed))
    assert code.encode() not in data
    assert hashlib.sha256(b"mk/invitation@1\0" + code.encode()).digest() in data


def closed_files(service):
    from pathlib import Path

    return sorted(Path(service.database).parent.glob("metadata.db*"))


def test_a_token_lets_in(tmp_path):
    token = tmp_path / "token"
    token.write_text("a-long-secret-token\n")
    token.chmod(0o600)
    with Service(tmp_path / "m.db", "--join-token-file", token, join="token") as service:
        alice = Person("alice", service)
        body = {"record": b64(alice.record)}
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "Basic a-long-secret-token"},
        ):
            refused(alice.post("/v1/identities/alice", body, headers=headers), 401, "metadata_unauthorized")
        alice.join(Authorization="Bearer a-long-secret-token")
        alice.join()
        assert service.stop() == 0
        assert "secret-token" not in service.said


# -- shares ------------------------------------------------------------------------------------------------


def test_a_share_is_published_and_read(alice, service):
    share = alice.share()
    roster, head = share.roster(), share.head()
    alice.publish(share, roster=roster, head=head)
    shown = records(alice, share)
    assert shown["roster"] == {"record": b64(roster)}
    assert shown["head"] == {"record": b64(head)}
    assert shown["heads"] == {"heads": [b64(head)], "more": False}
    assert shown["retention"] == {"record": None}
    assert shown["state"]["roster"] == b64(roster)
    key = unb64(service.get("/v1/service").json()["key"])
    stamp = Timestamp.parse(unb64(shown["timestamp"]["record"]), {kid_of(key): key})
    assert stamp.roster == record_hash(roster)
    assert abs(stamp.iat - time.time()) < 60


def test_a_share_is_shown_to_whom_it_is_granted_and_to_nobody_else(alice, bob, share, service):
    nothing = {
        "roster": {"record": None},
        "head": {"record": None},
        "timestamp": {"record": None},
        "retention": {"record": None},
        "heads": {"heads": [], "more": False},
        "state": {"capsules": [], "roster": None, "timestamp": None, "head": None},
        "capsules": {"capsules": []},
    }
    carol = Person(f"carol{next(NAMES)}", service).join()
    unknown = alice.share()
    assert records(carol, unknown) == nothing
    capsule = alice.grant(share, bob)
    assert records(carol, share) == nothing  # as if it did not exist
    shown = records(bob, share)
    assert shown["capsules"] == {"capsules": [b64(capsule)]}
    assert shown["state"]["capsules"] == [b64(capsule)]
    assert all(shown[name]["record"] for name in ("roster", "head", "timestamp"))
    # Whose capsules they are: one's own, or all of one's own share's.
    assert alice.state(share, bob.kid).json()["capsules"] == [b64(capsule)]
    for someone, kid in ((bob, alice.kid), (carol, bob.kid)):
        refused(someone.state(share, kid), 403, "metadata_forbidden")
        refused(someone.state(unknown, kid), 403, "metadata_forbidden")
        path = f"/v1/shares/{share.share.hex()}/capsules"
        refused(someone.get(path, params={"kid": kid.hex()}), 403, "metadata_forbidden")


def test_a_foreign_share_is_refused_like_an_unknown_one(alice, share, service):
    carol = Person(f"carol{next(NAMES)}", service).join()
    unknown = replace(share, share=os.urandom(16))
    attempts = [
        lambda s: carol.publish(s, head=s.head(carol.key), check=False),
        lambda s: carol.publish(s, roster=s.roster(seq=2), check=False),
        lambda s: carol.publish(
            s, capsules=[(carol.kid, bytes(16), s.capsule(carol.enc, carol.key))], check=False
        ),
        lambda s: carol.put(f"/v1/shares/{s.share.hex()}/retention", {"record": b64(s.retention((1, 1)))}),
    ]
    for attempt in attempts:
        answers = [attempt(s) for s in (share, unknown)]
        assert answers[0].status_code == answers[1].status_code in (409, 422)
        assert answers[0].json() == answers[1].json()
    # Taking it over: the one thing that an unknown share allows.
    mine = carol.share()
    mine.share = share.share
    refused(carol.publish(mine, roster=mine.roster(), check=False), 403, "metadata_forbidden")
    assert records(alice, share)["roster"]["record"] is not None


def test_a_new_share_is_its_owners(alice, bob):
    share = bob.share()
    refused(
        alice.publish(share, roster=share.roster(), head=share.head(), check=False), 403, "metadata_forbidden"
    )
    bob.publish(share, roster=share.roster(), head=share.head())
    assert records(bob, share)["head"]["record"] is not None


def test_a_writer_publishes_and_a_reader_does_not(alice, bob, share):
    alice.grant(share, bob)
    refused(bob.publish(share, head=share.head(bob.key), check=False), 422, "invalid_record")
    alice.publish(share, roster=share.roster(writers=(alice.key.public, bob.key.public)))
    bob.publish(share, head=share.head(bob.key))
    refused(
        bob.publish(share, roster=share.roster(bob.key, writers=(bob.key.public,)), check=False),
        422,
        "invalid_record",
    )


def test_conflicts_and_repetitions(alice, share):
    path = f"/v1/shares/{share.share.hex()}/publications"
    mine, theirs = (write_publication(share.publication(head=share.head())) for _ in range(2))
    assert alice.post(path, theirs).status_code == 204
    refused(alice.post(path, mine), 409, "head_conflict")
    assert alice.post(path, theirs).status_code == 204  # its answer was lost


def test_many_heads_come_in_pages(alice, share):
    for _ in range(7):
        alice.publish(share, head=share.head())
    path = f"/v1/shares/{share.share.hex()}/heads"
    page = alice.get(path, params={"after": 2, "upto": 5}).json()
    assert [_version(head) for head in page["heads"]] == [3, 4, 5]
    assert page["more"] is False


def _version(text):
    import evil

    return evil.peek(Head, unb64(text)).ver


def test_retention(alice, bob, share):
    for _ in range(3):
        alice.publish(share, head=share.head())
    alice.grant(share, bob)
    path = f"/v1/shares/{share.share.hex()}/retention"
    first = share.retention((1, 2))
    refused(bob.put(path, {"record": b64(share.retention((1, 2), signer=bob.key))}), 422, "invalid_record")
    assert alice.put(path, {"record": b64(first)}).status_code == 204
    assert bob.get(path).json() == {"record": b64(first)}
    refused(alice.put(path, {"record": b64(share.retention((1, 1), seq=3))}), 409, "head_conflict")


def test_what_is_malformed_is_refused(alice, share):
    path = f"/v1/shares/{share.share.hex()}/publications"
    good = write_publication(share.publication(head=share.head()))
    for wrong in (
        good | {"extra": 1},
        {k: v for k, v in good.items() if k != "head"},
        good | {"head_ver": "2"},
        good | {"head_ver": -1},
        good | {"head_ver": 2**63},
        good | {"head_ver": 1.0},
        good | {"head": "not base64!"},
        good | {"head": good["head"] + "="},
        good | {"capsules": [{"kid": "AA", "id": "AA", "blob": "AA"}]},
        good | {"head": None},
        [],
        "text",
        None,
    ):
        refused(alice.post(path, wrong), 400, "invalid_argument")
    for body in (b"", b"{", b"\xff\xfe", b"[" * 100_000, b"NaN"):
        answer = alice.ask("POST", path, content=body, headers={"content-type": "application/json"})
        refused(answer, 400, "invalid_argument")
    refused(alice.ask("POST", path, content=b"{}"), 400, "invalid_argument")  # no content type
    for place in ("/v1/shares/xyz/head", f"/v1/shares/{'0' * 31}/head", f"/v1/shares/{'AA' * 16}/head"):
        refused(alice.get(place), 400, "invalid_argument")
    refused(alice.get(f"/v1/shares/{'00' * 16}/state"), 400, "invalid_argument")
    refused(alice.get("/v1/nothing"), 404, "path_not_found")
    answer = alice.ask("DELETE", "/v1/logs")
    refused(answer, 405, "invalid_argument")
    assert answer.headers["allow"]
    junk = good | {"head": b64(os.urandom(100))}
    refused(alice.post(path, junk), 422, "invalid_record")


# -- mailboxes ---------------------------------------------------------------------------------------------


def test_letters(alice, bob):
    path = f"/v1/mailboxes/{bob.kid.hex()}"
    first = alice.post(path, {"letter": b64(b"one")})
    assert first.status_code == 201
    bob.post(path, {"letter": b64(b"two")})
    page = bob.get(path).json()
    assert [unb64(letter["blob"]) for letter in page["letters"]] == [b"one", b"two"]
    assert page["letters"][0]["id"] == first.json()["id"]
    assert page["more"] is False
    letter = unb64(first.json()["id"]).hex()
    behind = bob.get(path, params={"after": letter}).json()
    assert [unb64(letter["blob"]) for letter in behind["letters"]] == [b"two"]
    # A mailbox is its owner's: not even the sender looks into it or takes a letter back.
    refused(alice.get(path), 403, "metadata_forbidden")
    refused(alice.delete(f"{path}/{letter}"), 403, "metadata_forbidden")
    refused(alice.get(f"/v1/mailboxes/{os.urandom(16).hex()}"), 403, "metadata_forbidden")
    assert len(bob.get(path).json()["letters"]) == 2
    assert bob.delete(f"{path}/{letter}").status_code == 204
    assert bob.delete(f"{path}/{letter}").status_code == 204
    assert [unb64(letter["blob"]) for letter in bob.get(path).json()["letters"]] == [b"two"]


def test_large_letters_come_in_pages(alice, bob):
    path = f"/v1/mailboxes/{bob.kid.hex()}"
    blobs = [os.urandom(256 << 10) for _ in range(20)]
    for blob in blobs:
        assert alice.post(path, {"letter": b64(blob)}).status_code == 201
    got, params = [], {}
    for _ in range(20):
        page = bob.get(path, params=params).json()
        got += [unb64(letter["blob"]) for letter in page["letters"]]
        params = {"after": unb64(page["letters"][-1]["id"]).hex()}
        if not page["more"]:
            break
    assert got == blobs
    assert params
    refused(alice.post(path, {"letter": b64(bytes((256 << 10) + 1))}), 400, "invalid_argument")
    refused(alice.post(path, {"letter": ""}), 400, "invalid_argument")


# -- limits ------------------------------------------------------------------------------------------------


def test_too_large_is_refused_while_it_comes(alice):
    """Without a length that would say so before."""
    sent = 0

    def endless():
        nonlocal sent
        while True:
            sent += 1
            yield bytes(1 << 16)

    request = alice.signed("POST", "/v1/logs", content=b"x")
    headers = [(k, v) for k, v in request.headers.raw if k.lower() != b"content-length"]
    answer = None
    with contextlib.suppress(httpx.TransportError):  # it may be cut off before it has read the answer
        answer = alice.send(httpx.Request("POST", request.url, headers=headers, content=endless()))
    if answer is not None:
        refused(answer, 413, "invalid_argument")
    assert sent < 1000  # 64 MiB, of 2 that are allowed: buffers of the kernel take some
    assert alice.get("/v1/invitations").status_code == 200


def test_too_large_with_a_length(alice):
    answer = alice.ask("POST", "/v1/logs", content=bytes((2 << 20) + 1))
    refused(answer, 413, "invalid_argument")
    assert answer.headers["connection"] == "close"
    refused(alice.ask("GET", "/v1/logs", content=b"x"), 413, "invalid_argument")


def limited(tmp_path, **fields):
    config = tmp_path / "service.json"
    config.write_text(json.dumps(fields))
    return Service(tmp_path / "m.db", config=config)


def test_a_slow_client_is_not_waited_for(tmp_path):
    with limited(tmp_path, bodySeconds=1) as service:
        alice = Person("alice", service).join()
        request = alice.signed("POST", "/v1/logs", content=bytes(1000))
        raw = b"POST /v1/logs HTTP/1.1\r\n" + b"".join(
            k + b": " + v + b"\r\n" for k, v in request.headers.raw
        )
        host, port = service.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=30) as slow:
            started = time.monotonic()
            slow.sendall(raw + b"\r\n" + b"x")
            answer = b""
            while part := slow.recv(65536):
                answer += part
            assert time.monotonic() - started < 20
            assert answer.startswith(b"HTTP/1.1 408")
            assert b"timed_out" in answer
        assert alice.get("/v1/invitations").status_code == 200


def burst(size):
    """A rate of so many at once, and then one in 17 minutes: what is counted does not depend on how long it takes.

    That tokens come back with time is in t1_limits.
    """
    return {"perSecond": 0.001, "burst": size}


def test_rate_of_an_identity(tmp_path):
    with limited(tmp_path, rates={"identity": burst(5)}) as service:
        alice, bob = Person("alice", service).join(), Person("bob", service).join()
        answers = [alice.get("/v1/invitations") for _ in range(7)]
        assert [answer.status_code for answer in answers] == [200] * 5 + [429] * 2
        refused(answers[-1], 429, "rate_limited", "identity")
        assert 1 <= int(answers[-1].headers["retry-after"]) <= 1000
        assert bob.get("/v1/invitations").status_code == 200


def test_a_large_body_counts_as_several_requests(tmp_path):
    with limited(tmp_path, rates={"identity": burst(5)}) as service:
        alice = Person("alice", service).join()
        large = b" " * (2 << 20)
        assert alice.ask("POST", "/v1/logs", content=large).status_code == 400
        refused(alice.ask("POST", "/v1/logs", content=large), 429, "rate_limited")
        assert alice.get("/v1/invitations").status_code == 200  # for a small one there is still room


def test_rate_of_an_address(tmp_path):
    with limited(tmp_path, rates={"address": burst(20)}) as service:
        answers = [service.get("/v1/health") for _ in range(22)]
        assert [answer.status_code for answer in answers] == [200] * 20 + [429] * 2
        refused(answers[-1], 429, "rate_limited", "address")


def test_failed_signatures_cost_their_address_more(tmp_path):
    with limited(tmp_path, rates={"address": burst(60)}) as service:
        statuses = [service.get("/v1/logs").status_code for _ in range(12)]
        assert statuses == [401] * 10 + [429] * 2


def test_a_proxy_speaks_for_its_clients_only_if_it_is_trusted(tmp_path):
    def statuses(service, *clients):
        return [
            service.get("/v1/health", headers={"X-Forwarded-For": client}).status_code for client in clients
        ]

    rates = {"address": burst(10)}
    with limited(tmp_path, rates=rates, proxies=["127.0.0.1"]) as service:
        assert statuses(service, *["10.0.0.1"] * 11) == [200] * 10 + [429]
        # The client may have made up the first; the last is the proxy's word.
        assert statuses(service, "10.0.0.1, 10.0.0.2", "10.0.0.2, 10.0.0.1") == [200, 429]
    with limited(tmp_path, rates=rates) as service:
        assert statuses(service, *(f"10.0.0.{i}" for i in range(11))) == [200] * 10 + [429]


def test_quotas(tmp_path):
    quotas = {"recordBytes": 3000, "shares": 3, "lettersPerDay": 2}
    with limited(tmp_path, quotas=quotas) as service:
        alice, bob = Person("alice", service).join(), Person("bob", service).join()
        share = alice.new_share()
        answers = [alice.publish(share, head=share.head(), check=False) for _ in range(1)]
        assert answers[0].status_code == 204
        while (answer := _grow(alice, share)).status_code == 204:
            pass
        refused(answer, 403, "quota_exceeded", "bytes")
        kept = len(alice.get(f"/v1/shares/{share.share.hex()}/heads").json()["heads"])
        refused(_grow(alice, share), 403, "quota_exceeded")
        assert len(alice.get(f"/v1/shares/{share.share.hex()}/heads").json()["heads"]) == kept
        for _ in range(3):
            small = bob.share()
            bob.publish(small, roster=small.roster())
        small = bob.share()
        refused(bob.publish(small, roster=small.roster(), check=False), 403, "quota_exceeded", "shares")
        path = f"/v1/mailboxes/{bob.kid.hex()}"
        for _ in range(2):
            assert alice.post(path, {"letter": b64(b"x")}).status_code == 201
        refused(alice.post(path, {"letter": b64(b"x")}), 403, "quota_exceeded", "letters")
        assert len(bob.get(path).json()["letters"]) == 2
        assert bob.post(path, {"letter": b64(b"x")}).status_code == 201


def _grow(person, share):
    newest = person.get(f"/v1/shares/{share.share.hex()}/head").json()["record"]
    share.ver, share.prev = _version(newest), record_hash(unb64(newest))
    return person.publish(share, head=share.head(), check=False)


def test_a_full_mailbox(alice, bob, service):
    if not service.database.endswith(".db"):
        pytest.skip("filled through the file")
    import apsw

    db = apsw.Connection(service.database)
    db.set_busy_timeout(5000)
    with db:
        for _ in range(1000):
            db.execute("INSERT INTO letters (kid, id, blob) VALUES (?, ?, x'00')", (bob.kid, os.urandom(16)))
    db.close()
    refused(alice.post(f"/v1/mailboxes/{bob.kid.hex()}", {"letter": b64(b"x")}), 507, "no_space")


# -- changes -----------------------------------------------------------------------------------------------


def test_a_poll_without_a_cursor_tells_where_to_begin(alice, share):
    first = alice.changes([share], alice.kid, wait=30)  # does not wait
    assert first == {"cursor": first["cursor"], "shares": [], "mailbox": False}
    again = alice.changes([share], alice.kid, after=first["cursor"])
    assert (again["shares"], again["mailbox"]) == ([], False)
    alice.publish(share, head=share.head())
    news = alice.changes([share], alice.kid, after=again["cursor"])
    assert (news["shares"], news["mailbox"]) == ([b64(share.share)], False)
    assert alice.changes([share], alice.kid, after=news["cursor"])["shares"] == []
    # A cursor from before the database was restored: whatever it knew may not be so any more.
    lost = alice.changes([share], alice.kid, after=str(2**62))
    assert (lost["shares"], lost["mailbox"]) == ([b64(share.share)], True)
    assert int(lost["cursor"]) < 2**62
    # An old cursor is told again what has changed since.
    assert alice.changes([share], alice.kid, after=first["cursor"])["shares"] == [b64(share.share)]


def test_polls_tell_of_every_kind_of_change(alice, bob, share):
    alice.publish(share, head=share.head())
    cursor = alice.changes()["cursor"]

    def changed():
        return alice.changes([share], alice.kid, after=cursor)

    for act in (
        lambda: alice.publish(share, roster=share.roster()),
        lambda: alice.grant(share, bob),
        lambda: alice.put(
            f"/v1/shares/{share.share.hex()}/retention", {"record": b64(share.retention((1, 1)))}
        ),
    ):
        act()
        news = changed()
        assert news["shares"] == [b64(share.share)]
        cursor = news["cursor"]
    bob.post(f"/v1/mailboxes/{alice.kid.hex()}", {"letter": b64(b"x")})
    assert changed()["mailbox"] is True


def test_polls_tell_nobody_of_foreign_shares_and_mailboxes(alice, bob, share):
    cursor = bob.changes()["cursor"]
    alice.publish(share, head=share.head())
    assert bob.changes([share], after=cursor)["shares"] == []
    body = {"shares": [], "mailbox": b64(alice.kid), "after": None, "wait": 0}
    refused(bob.post("/v1/changes", body), 403, "metadata_forbidden")
    alice.grant(share, bob)
    assert bob.changes([share], after=cursor)["shares"] == [b64(share.share)]


def poll_in_thread(person, *args, **options):
    """A poll under way: a thread, and where its result and the time it came will be."""
    result = {}

    def poll():
        result["news"] = person.changes(*args, **options)
        result["at"] = time.monotonic()

    thread = threading.Thread(target=poll)
    thread.start()
    return thread, result


def test_a_poll_is_woken_by_a_change(alice, bob, share):
    """That no pause on its way is long is in t3_http_home."""
    alice.grant(share, bob)
    for _ in range(3):
        cursor = bob.changes()["cursor"]
        began = time.monotonic()
        thread, result = poll_in_thread(bob, [share], bob.kid, after=cursor, wait=30)
        assert not wait_for(lambda t=thread: not t.is_alive(), 1.0)  # it waits
        alice.publish(share, head=share.head())
        published = time.monotonic()
        thread.join(60)
        assert result["news"]["shares"] == [b64(share.share)]
        print(f"heard {result['at'] - published:.3f} s after the publication")
        assert result["at"] - began < 30, "it ended with its time, not with the change"


def wait_for(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def test_a_poll_ends_when_its_time_is_over(alice, share):
    cursor = alice.changes()["cursor"]
    started = time.monotonic()
    news = alice.changes([share], after=cursor, wait=1)
    assert 0.9 < time.monotonic() - started < 10
    assert news["shares"] == []


def test_too_many_polls_of_one(alice, share, service):
    cursor = alice.changes()["cursor"]
    requests = [
        alice.signed(
            "POST",
            "/v1/changes",
            json={"shares": [b64(share.share)], "mailbox": None, "after": cursor, "wait": 30},
        )
        for _ in range(40)
    ]
    statuses = []

    def send(request):
        with httpx.Client(timeout=60) as http:
            statuses.append(http.send(request).status_code)

    threads = [threading.Thread(target=send, args=(request,)) for request in requests]
    for thread in threads:
        thread.start()
    assert wait_for(lambda: len(statuses) >= 8)
    assert set(statuses) == {429}
    alice.publish(share, head=share.head())
    for thread in threads:
        thread.join(30)
    assert sorted(statuses) == [200] * 32 + [429] * 8
    # Those who have gone do not count any more.
    assert alice.changes([share], after=cursor)["shares"]


# -- MeshKit's other records ---------------------------------------------------------------------------------


def proof(**changes):
    return {
        "share": None,
        "provider": "ipfs-http",
        "bytes": 1234,
        "envelope": 1,
        "algorithms": ["cobblestone-256"],
        "operations": ["put", "pin"],
        "verified": True,
    } | changes


def test_proofs(alice, bob, share):
    path = f"/v1/proofs/{CID}"
    assert alice.put(path, proof()).status_code == 204
    assert bob.get(path).json() == {"proofs": []}
    assert alice.put(path, proof(share=b64(share.share), verified=False)).status_code == 204
    assert bob.get(path).json() == {"proofs": []}
    alice.grant(share, bob)
    (shown,) = bob.get(path).json()["proofs"]
    assert abs(shown.pop("at") - time.time()) < 60
    assert shown == proof(share=b64(share.share), verified=False) | {"by": alice.handle}
    assert bob.put(path, proof(provider="local")).status_code == 204
    assert [p["by"] for p in bob.get(path).json()["proofs"]] == [bob.handle, alice.handle]
    refused(bob.put(path, proof(share=b64(bytes(16)))), 403, "metadata_forbidden")
    refused(alice.get("/v1/proofs/bafkreinope"), 400, "invalid_argument")


def job(key="k", policy="dedupe", **changes):
    return {"kind": "upload", "payload": b64(b"what"), "key": key, "policy": policy} | changes


def test_sync_jobs_and_their_conflict_policies(alice, bob):
    first = alice.post("/v1/sync/jobs", job())
    assert first.status_code == 201
    assert first.json()["status"] == "queued"
    again = alice.post("/v1/sync/jobs", job(payload=b64(b"other")))
    assert (again.status_code, again.json()["id"]) == (200, first.json()["id"])
    refused(alice.post("/v1/sync/jobs", job(policy="fail")), 409, "sync_conflict")
    new = alice.post("/v1/sync/jobs", job(policy="replace", payload=b64(b"new")))
    assert new.status_code == 201
    assert [j["id"] for j in alice.get("/v1/sync/jobs").json()["jobs"]] == [new.json()["id"]]
    (old,) = alice.get("/v1/sync/jobs", params={"active": "false"}).json()["jobs"]
    assert (old["id"], old["status"]) == (first.json()["id"], "replaced")
    path = f"/v1/sync/jobs/{new.json()['id']}"
    refused(bob.get(path), 404, "path_not_found")
    refused(bob.ask("PATCH", path, json={"status": "done", "checkpoint": None}), 404, "path_not_found")
    assert bob.get("/v1/sync/jobs").json() == {"jobs": []}
    at = alice.ask("PATCH", path, json={"status": "running", "checkpoint": b64(b"half")}).json()
    assert (at["status"], at["checkpoint"], at["payload"]) == ("running", b64(b"half"), b64(b"new"))
    done = alice.ask("PATCH", path, json={"status": "done", "checkpoint": None}).json()
    assert (done["status"], done["checkpoint"], done["payload"]) == ("done", b64(b"half"), "")
    assert alice.ask("PATCH", path, json={"status": "done", "checkpoint": None}).status_code == 200
    refused(alice.ask("PATCH", path, json={"status": "running", "checkpoint": None}), 409, "sync_conflict")
    refused(alice.ask("PATCH", path, json={"status": None, "checkpoint": b64(b"x")}), 409, "sync_conflict")
    assert alice.post("/v1/sync/jobs", job(policy="fail")).status_code == 201
    refused(alice.post("/v1/sync/jobs", job(policy="merge")), 400, "invalid_argument")


def test_one_job_for_each_key_however_fast(alice):
    found = []

    def enqueue():
        with httpx.Client(timeout=60) as http:
            answer = http.send(alice.signed("POST", "/v1/sync/jobs", json=job(key="race")))
            found.append((answer.status_code, answer.json()["id"]))

    threads = [threading.Thread(target=enqueue) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({i for _, i in found}) == 1
    assert sorted(status for status, _ in found) == [200] * 7 + [201]


def test_vaults(alice, bob, service):
    carol = Person(f"carol{next(NAMES)}", service).join()
    path = f"/v1/vaults/{os.urandom(16).hex()}"
    body = {"expect": 0, "record": b64(b"members"), "members": [b64(bob.key.kid)]}
    assert alice.put(path, body).json() == {"seq": 1}
    assert alice.put(path, body).json() == {"seq": 1}  # its answer was lost
    for person in (alice, bob):
        assert person.get(path).json()["members"] == [b64(bob.key.kid)]
    refused(carol.get(path), 404, "path_not_found")
    refused(bob.put(path, body | {"expect": 1}), 403, "metadata_forbidden")
    refused(alice.put(path, body | {"expect": 0, "record": b64(b"late")}), 409, "head_conflict")
    assert alice.put(path, body | {"expect": 1, "members": []}).json() == {"seq": 2}
    refused(bob.get(path), 404, "path_not_found")
    refused(bob.delete(path), 404, "path_not_found")
    assert alice.delete(path).status_code == 204
    refused(alice.delete(path), 404, "path_not_found")


def a_list(kind, person, seq=1, before=b"", **content):
    """A vault record or revocation list of a person's."""
    now = int(time.time())
    fields = {
        "id": revocations_id(person.key.public), "seq": seq, "prev": record_hash(before) if before else b"",
        "owner": person.key.public, "iat": now, "exp": now + 1000,
    }  # fmt: skip
    return kind(**fields | content).sign(person.key)


def test_a_vault_record_brings_its_number_and_gets_a_timestamp(alice, bob):
    vault = os.urandom(16)
    path = f"/v1/vaults/{vault.hex()}"
    first = a_list(VaultRecord, alice, id=vault, members=())
    body = {"expect": 0, "record": b64(first), "members": [b64(bob.key.kid)]}
    assert alice.put(path, body).json() == {"seq": 1}
    shown = bob.get(path).json()
    key = unb64(alice.get("/v1/service").json()["key"])
    stamp = Timestamp.parse(unb64(shown["timestamp"]), {kid_of(key): key})
    assert (stamp.share, stamp.roster) == (vault, record_hash(first))
    # Numbers may be left out, after a restore; they never fall.
    later = a_list(VaultRecord, alice, 5, b"x", id=vault, members=())
    assert alice.put(path, body | {"expect": 1, "record": b64(later)}).json() == {"seq": 5}
    again = a_list(VaultRecord, alice, 5, b"y", id=vault, members=())
    refused(alice.put(path, body | {"expect": 5, "record": b64(again)}), 422, "invalid_record")
    # What is none of that id, or signed by another key than it names, is kept and not vouched for.
    for number, record in enumerate((a_list(VaultRecord, alice, 9, b"x", members=()), b"anything")):
        assert alice.put(path, body | {"expect": 5 + number, "record": b64(record)}).json() == {
            "seq": 6 + number
        }
        assert bob.get(path).json()["timestamp"] is None


def test_whoever_was_taken_out_of_a_vault_is_told(alice, bob):
    vault = os.urandom(16)
    path = f"/v1/vaults/{vault.hex()}"
    body = {
        "expect": 0,
        "record": b64(a_list(VaultRecord, alice, id=vault, members=())),
        "members": [b64(bob.key.kid)],
    }
    assert alice.put(path, body).status_code == 200
    ask = {"shares": [b64(vault)], "mailbox": None, "after": None, "wait": 0}
    cursor = bob.post("/v1/changes", ask).json()["cursor"]
    removed = a_list(VaultRecord, alice, 2, b"x", id=vault, members=())
    assert alice.put(path, body | {"expect": 1, "record": b64(removed), "members": []}).json() == {"seq": 2}
    refused(bob.get(path), 404, "path_not_found")
    told = bob.post("/v1/changes", ask | {"after": cursor, "wait": 20}).json()
    assert told["shares"] == [b64(vault)]
    assert alice.delete(path).status_code == 204
    told = bob.post("/v1/changes", ask | {"after": told["cursor"], "wait": 20}).json()
    assert told["shares"] == [b64(vault)]


def test_a_revocation_list_is_everybodys_to_read_and_its_issuers_to_write(alice, bob, service):
    carol = Person(f"carol{next(NAMES)}", service).join()
    list_id = revocations_id(alice.key.public)
    path = f"/v1/vaults/{list_id.hex()}"
    # Somebody has put something else there first; the issuer's own list takes the place of it.
    squat = {"expect": 0, "record": b64(b"mine"), "members": []}
    assert bob.put(path, squat).json() == {"seq": 1}
    mine = a_list(Revocations, alice, tokens=(b"t" * 16,))
    body = {"expect": 0, "record": b64(mine), "members": []}
    refused(bob.put(path, body | {"expect": 0}), 409, "head_conflict")
    refused(carol.put(path, body), 403, "metadata_forbidden")  # properly signed, and not hers to publish
    assert alice.put(path, body).json() == {"seq": 1}
    for person in (alice, bob, carol):
        shown = person.get(path).json()
        assert (unb64(shown["record"]), shown["owner"]) == (mine, alice.handle)
        assert shown["timestamp"] is not None
    refused(bob.put(path, squat | {"expect": 1}), 403, "metadata_forbidden")
    refused(bob.delete(path), 404, "path_not_found")


def test_capabilities(alice, bob, service):
    carol = Person(f"carol{next(NAMES)}", service).join()
    made = alice.post("/v1/capabilities", {"kid": b64(bob.key.kid), "record": b64(b"read only")})
    assert made.status_code == 201
    path = f"/v1/capabilities/{made.json()['id']}"
    for person in (alice, bob):
        shown = person.get(path).json()
        assert (shown["owner"], shown["record"], shown["revoked"]) == (alice.handle, b64(b"read only"), None)
        assert [c["id"] for c in person.get("/v1/capabilities").json()["capabilities"]] == [shown["id"]]
    refused(carol.get(path), 404, "path_not_found")
    assert carol.get("/v1/capabilities").json() == {"capabilities": []}
    refused(bob.delete(path), 404, "path_not_found")
    assert alice.delete(path).status_code == 204
    when = bob.get(path).json()["revoked"]
    assert abs(when - time.time()) < 60
    assert alice.delete(path).status_code == 204
    assert bob.get(path).json()["revoked"] == when


def test_logs(alice, bob):
    events = [
        {"at": i, "provider": "s3", "operation": "get", "outcome": "ok", "bytes": i} for i in range(600)
    ]
    refused(alice.post("/v1/logs", {"events": events}), 400, "invalid_argument")
    refused(alice.post("/v1/logs", {"events": []}), 400, "invalid_argument")
    for part in (events[:300], events[300:]):
        assert alice.post("/v1/logs", {"events": part}).status_code == 204
    page = alice.get("/v1/logs").json()
    assert page["more"] is True
    rest = alice.get("/v1/logs", params={"after": page["events"][-1]["n"]}).json()
    assert rest["more"] is False
    got = page["events"] + rest["events"]
    assert [{k: v for k, v in event.items() if k != "n"} for event in got] == events
    assert bob.get("/v1/logs").json() == {"events": [], "more": False}


# -- the audit log -----------------------------------------------------------------------------------------


def test_the_audit_log_tells_who_did_what_and_no_content(tmp_path):
    config = tmp_path / "service.json"
    config.write_text(json.dumps({"audit": {"reads": True, "days": 7}}))
    with Service(tmp_path / "m.db", config=config) as service:
        alice, bob = Person("alice", service).join(), Person("bob", service).join()
        share = alice.new_share()
        alice.post(f"/v1/mailboxes/{bob.kid.hex()}", {"letter": b64(b"canary-in-a-letter")})
        alice.get(f"/v1/mailboxes/{bob.kid.hex()}")
        bob.publish(share, head=share.head(bob.key), check=False)
        alice.get(f"/v1/shares/{share.share.hex()}/head")
        service.get("/v1/canary-in-a-path")
        assert service.stop() == 0
        import apsw

        db = apsw.Connection(service.database)
        lines = list(db.execute("SELECT who, kind, share, outcome FROM audit ORDER BY n"))
        audit = "\n".join(map(str, db.execute("SELECT * FROM audit")))
        db.close()
    assert ("alice", "join", None, "ok") in lines
    assert ("alice", "publish", share.share, "ok") in lines
    assert ("alice", "letter", bob.kid, "ok") in lines
    assert ("alice", "GET v1/mailboxes/*", bob.kid, "metadata_forbidden") in lines
    assert ("bob", "POST v1/shares/*/publications", share.share, "head_conflict") in lines
    assert ("alice", "GET v1/shares/*/head", share.share, "read") in lines
    assert ("", "GET v1/*", None, "metadata_unauthorized") in lines
    assert "canary" not in audit


# -- sockets -----------------------------------------------------------------------------------------------


def test_a_unix_socket(tmp_path):
    path = tmp_path / "s"
    with Service(tmp_path / "m.db", listen=f"unix:{path}") as service:
        assert service.info["listening"] == [f"unix:{path}"]
        service.url = "http://localhost"
        alice = Person("alice", service, transport=httpx.HTTPTransport(uds=str(path))).join()
        assert alice.get("/v1/invitations").status_code == 200
        second = Service(tmp_path / "m.db", listen=f"unix:{path}", check=False)
        with pytest.raises(AssertionError, match="somebody listens there already"):
            second.start()
        assert alice.get("/v1/invitations").status_code == 200
        service.kill()  # leaves its socket, which the next one replaces
        assert stat.S_ISSOCK(path.stat().st_mode)
        service.start()
        service.url = "http://localhost"
        assert alice.get("/v1/invitations").status_code == 200


def test_a_unix_socket_replaces_nothing_else(tmp_path):
    path = tmp_path / "s"
    path.write_text("mine")
    with pytest.raises(AssertionError, match="something else is there"):
        Service(tmp_path / "m.db", listen=f"unix:{path}")
    assert path.read_text() == "mine"


ACTIVATE = """
import os, socket, sys
sock = socket.socket()
sock.bind(("127.0.0.1", 0))
sock.listen()
os.dup2(sock.fileno(), 9)
os.dup2(9, 3, inheritable=True)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1", "LISTEN_FDNAMES": "x"}
os.execv(sys.executable, [sys.executable, "-m", "meshkitfs", *sys.argv[1:]])
"""


def test_a_socket_that_systemd_hands_over(tmp_path):
    service = Service(tmp_path / "m.db", check=False)
    arguments = ["--json", "serve", "--database", service.database, "--join", "open"]
    process = subprocess.Popen(
        [sys.executable, "-c", ACTIVATE, *arguments], stdout=subprocess.PIPE, text=True, env=service.env
    )
    try:
        service.url = json.loads(process.stdout.readline())["listening"][0]
        assert not service.url.endswith(":8787")
        Person("alice", service).join()
    finally:
        process.terminate()
        assert process.wait(30) == 0
        process.stdout.close()


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    import trustme

    place = tmp_path_factory.mktemp("tls")
    ca = trustme.CA()
    server, client = ca.issue_cert("127.0.0.1", "localhost"), ca.issue_cert("device-1")
    ca.cert_pem.write_to_path(place / "ca.pem")
    for name, cert in (("server", server), ("client", client)):
        cert.private_key_pem.write_to_path(place / f"{name}.key")
        for blob in cert.cert_chain_pems:
            blob.write_to_path(place / f"{name}.pem", append=True)
    return place


def trusting(place, client=None):
    import ssl

    context = ssl.create_default_context(cafile=str(place / "ca.pem"))
    if client:
        context.load_cert_chain(place / f"{client}.pem", place / f"{client}.key")
    return context


def test_tls(tmp_path, authority):
    options = ("--tls-cert-file", authority / "server.pem", "--tls-key-file", authority / "server.key")
    with Service(tmp_path / "m.db", *options) as service:
        assert service.url.startswith("https://")
        for http2 in (False, True):
            alice = Person(f"alice{http2}".lower(), service, verify=trusting(authority), http2=http2).join()
            answer = alice.get("/v1/invitations")
            assert answer.status_code == 200
            assert answer.http_version == ("HTTP/2" if http2 else "HTTP/1.1")
        with pytest.raises(httpx.ConnectError):
            Person("eve", service).join()  # does not know the authority
        with pytest.raises(httpx.TransportError):
            httpx.get(service.url.replace("https", "http") + "/v1/service")


def test_mutual_tls(tmp_path, authority):
    options = ["--tls-cert-file", authority / "server.pem", "--tls-key-file", authority / "server.key"]
    with Service(tmp_path / "m.db", *options, "--tls-client-ca-file", authority / "ca.pem") as service:
        with pytest.raises(httpx.TransportError):
            httpx.get(service.url + "/v1/service", verify=trusting(authority))
        Person("alice", service, verify=trusting(authority, "client")).join()


def test_a_connection_that_says_nothing_is_closed(tmp_path):
    """And one that says its headers a byte at a time: the time for them does not begin again."""
    with Service(tmp_path / "m.db", header_seconds=2.0) as service:
        host, port = service.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=60) as slow:
            started = time.monotonic()
            slow.sendall(b"GET /v1/health HTTP/1.1\r\nX-Slow: ")
            slow.settimeout(0.5)
            while time.monotonic() - started < 60:
                try:
                    slow.sendall(b"a")
                    if not slow.recv(1000):
                        break
                except TimeoutError:
                    continue
                except OSError:
                    break
            else:
                pytest.fail("every byte has bought it more time")


# -- starting and ending -------------------------------------------------------------------------------------


def test_polls_are_answered_when_it_ends(tmp_path):
    with Service(tmp_path / "m.db") as service:
        alice = Person("alice", service).join()
        share = alice.new_share()
        cursor = alice.changes()["cursor"]
        began = time.monotonic()
        thread, result = poll_in_thread(alice, [share], after=cursor, wait=30)
        assert not wait_for(lambda: not thread.is_alive(), 1.0)
        assert service.stop() == 0
        thread.join(30)
        assert result["at"] - began < 30, "it ended with its time, not with the service"
        assert result["news"]["shares"] == []
        assert service.said == ""


@pytest.fixture
def start_fails(capsys):
    """Start it in this process, where it has to end by itself; returns what it says about that."""

    def start_fails(*options):
        assert main(["--json", "serve", *map(str, options)]) != 0
        said = capsys.readouterr()
        assert said.out == ""
        return said.err

    return start_fails


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--listen", "nonsense"], "invalid_config"),
        (["--listen", "0.0.0.0:0"], "invalid_config"),
        (["--join", "everybody"], "invalid_config"),
        (["--join", "token"], "invalid_config"),
        (["--tls-cert-file", "/nowhere", "--tls-key-file", "/nowhere"], "invalid_config"),
        (["--tls-cert-file", "/nowhere"], "invalid_argument"),
        (["--database", "postgresql://me:hunter2@localhost/db"], "invalid_config"),
        (["--config", "/nowhere"], "invalid_cli_config"),
        (["--database-file", "/nowhere"], "invalid_config"),
    ],
)
def test_it_says_what_is_wrong_with_its_settings(start_fails, tmp_path, options, code):
    database = [] if "--database" in " ".join(options) else ["--database", tmp_path / "m.db"]
    said = start_fails(*options, *database)
    assert f'"code":"{code}"' in said
    assert "hunter2" not in said


def test_a_configuration_file_is_strict(start_fails, tmp_path):
    config = tmp_path / "service.json"
    for wrong in (
        {"lisen": "127.0.0.1:0"},
        {"join": {"policy": "token", "token": "secret"}},
        {"rates": {"identity": {"perSecond": 0, "burst": 1}}},
        {"rates": {"identity": {"perSecond": 0.0001, "burst": 1}}},
        {"rates": {"identity": {"perSecond": float("nan"), "burst": 1}}},
        {"rates": {"identity": {"perSecond": True, "burst": 1}}},
        {"rates": {"identity": {"perSecond": 1, "burst": 1.5}}},
        {"quotas": {"shares": True}},
        {"tls": {"certificate": "x"}},
        [],
    ):
        config.write_text(json.dumps(wrong))
        said = start_fails("--database", tmp_path / "m.db", "--config", config)
        assert '"code":"invalid_config"' in said, wrong
    config.write_text('{"listen": "a", "listen": "b"}')
    assert "twice" in start_fails("--database", tmp_path / "m.db", "--config", config)


def test_a_database_address_in_a_file(tmp_path, cluster):  # noqa: F811
    secret = tmp_path / "database"
    secret.write_text(cluster.fresh())
    secret.chmod(0o644)
    with pytest.raises(AssertionError, match="chmod 600"):
        Service("", "--database-file", secret)
    secret.chmod(0o600)
    with Service("", "--database-file", secret) as service:
        Person("alice", service).join()


def test_nothing_in_the_service_unwraps_a_key():
    code = (
        "import sys, meshkitfs.server; "
        "print([m for m in sys.modules if m.startswith('meshkitfs.core.') and "
        "m.rpartition('.')[2] in ('_mint', '_unwrap')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
