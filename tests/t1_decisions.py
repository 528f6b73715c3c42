"""The service as a policy decision point: it answers AuthZEN by rules in a directory, and signs the answers."""

from __future__ import annotations

import json
import time

import httpx
import pytest
import trio
from service import Person, Service

from meshkitfs.core.decision import SignedDecision
from meshkitfs.core.keys import SigningKey, kid_of
from meshkitfs.errors import MeshkitError
from meshkitfs.metadata._wire import from_b64
from meshkitfs.policy import AuthZen, AuthZenOptions, Demand, PolicyRequest

RULES = """\
@id("bob reads")
permit(principal == Identity::"bob", action in [Action::"list", Action::"read"], resource);
"""
CAPSULE = "05" * 16


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("decisions")
    (place / "rules").mkdir()
    return place


@pytest.fixture(scope="module")
def service(place):
    config = place / "service.json"
    config.write_text(json.dumps({"policies": {"directory": "rules"}}))
    with Service(place / "db", config=config) as service:
        yield service


@pytest.fixture(scope="module")
def bob(service):
    bob = Person("bob", service)
    bob.join()
    return bob


@pytest.fixture(autouse=True)
def rules(place):
    (place / "rules" / "p1.cedar").write_text(RULES)
    return place / "rules" / "p1.cedar"


@pytest.fixture(scope="module")
def key(service):
    return from_b64(service.get("/v1/service").json()["key"], "key")


def asked(identity, *actions, **properties):
    body = {
        "subject": {"type": "identity", "id": identity},
        "resource": {
            "type": "capsule",
            "id": CAPSULE,
            "properties": {"policyId": "p1", "capsuleId": CAPSULE} | properties,
        },
        "context": {"nonce": "A" * 22},
    }
    if len(actions) == 1:
        return body | {"action": {"name": actions[0]}}
    return body | {"evaluations": [{"action": {"name": action}} for action in actions]}


def post(service, body, path="/access/v1/evaluation", **headers):
    return httpx.post(service.url + path, json=body, headers=headers, timeout=60)


def kid(person):
    return person.kid.hex()


def test_our_own_client_gets_signed_answers_by_handle(service, bob, key):
    async def main():
        provider = AuthZen(AuthZenOptions(service.url, timeout_s=30))
        requests = [
            PolicyRequest("p1", kid(bob), action, None, b"\5" * 16) for action in ("list", "read", "write")
        ]
        try:
            demand = Demand("p1", key=key, url=service.url)
            found = await provider.decide(demand, requests, int(time.time()))
            strange = Demand("p1", key=SigningKey.generate().public, url=service.url)
            with pytest.raises(MeshkitError) as caught:
                await provider.decide(strange, requests, int(time.time()))
            return found, caught.value.code, provider.asked
        finally:
            await provider.aclose()

    found, code, count = trio.run(main)
    assert [answer.allow for answer in found] == [True, True, False]
    assert all(0 < answer.ttl_seconds <= 31 for answer in found[:2])
    assert "bob reads" in found[1].reason
    assert kid_of(key).hex()[:16] in found[1].reason
    assert (code, count) == ("policy_provider_error", 2)


def test_changing_a_file_is_enough(service, bob, rules):
    assert post(service, asked(kid(bob), "read")).json()["decision"] is True
    rules.write_text(RULES.replace("bob", "carol"))
    assert post(service, asked(kid(bob), "read")).json()["decision"] is False
    rules.unlink()
    answer = post(service, asked(kid(bob), "read")).json()
    assert (answer["decision"], answer["context"]["rule"]) == (False, "no such policy")


def test_rules_that_became_wrong_are_no_decision(service, bob, rules):
    rules.write_text("permit(principal, action, resource)")
    assert post(service, asked(kid(bob), "read")).status_code == 500


def test_the_answer_is_of_the_standards_form(service, bob, key):
    answer = post(service, asked(kid(bob), "read"), **{"X-Request-ID": "abc"})
    assert (answer.status_code, answer.headers["x-request-id"]) == (200, "abc")
    assert answer.headers["content-type"] == "application/json"
    record = SignedDecision.parse(
        from_b64(answer.json()["context"]["signedDecision"], "it"), {kid_of(key): key}
    )
    assert (record.allow, record.nonce) == (True, bytes(16))
    denied = post(service, asked(kid(bob), "write"))
    assert (denied.status_code, denied.json()["decision"]) == (200, False)
    many = post(service, asked(kid(bob), "read", "write", "fly"), "/access/v1/evaluations").json()
    assert [item["decision"] for item in many["evaluations"]] == [True, False, False]
    about = service.get("/.well-known/authzen-configuration").json()
    assert about["policy_decision_point"] == service.url


def test_an_identity_is_called_by_its_handle_only(service, rules):
    """A kid that nobody has published is nobody's handle, whatever it looks like."""
    stranger = "ab" * 16
    rules.write_text(f'permit(principal == Identity::"{stranger}", action, resource);')
    assert post(service, asked(stranger, "read")).json()["decision"] is False
    rules.write_text(f'permit(principal == Identity::"kid:{stranger}", action, resource);')
    assert post(service, asked(stranger, "read")).json()["decision"] is True


@pytest.mark.parametrize(
    "policy", ["../p1", "p1.cedar/../p1", "/etc/passwd", "p1\0", "", "P" * 300, ".p1", "p1/"]
)
def test_no_name_leads_out_of_the_directory(service, bob, policy):
    answer = post(service, asked(kid(bob), "read", policyId=policy))
    assert answer.status_code in (200, 400)
    if answer.status_code == 200:
        assert answer.json()["decision"] is False


@pytest.mark.parametrize(
    "body",
    [
        b"", b"[]", b"{}", b"null", b'{"subject":{"type":"identity","id":"ab"}}', b"\xff", b"[" * 20000,
        b'{"subject":1,"subject":2}',
    ],
)  # fmt: skip
def test_what_is_no_question_is_a_400(service, body):
    for path in ("/access/v1/evaluation", "/access/v1/evaluations"):
        assert httpx.post(service.url + path, content=body, timeout=60).status_code == 400


def test_questions_that_mix_grants_are_refused(service, bob):
    body = asked(kid(bob), "read", "write")
    body["evaluations"][1]["subject"] = {"type": "identity", "id": "cd" * 16}
    assert post(service, body, "/access/v1/evaluations").status_code == 400
    body = asked(kid(bob), *["read"] * 17)
    assert post(service, body, "/access/v1/evaluations").status_code == 400


def test_too_long_and_other_methods(service):
    assert httpx.post(f"{service.url}/access/v1/evaluation", content=b" " * 70000).status_code == 413
    assert service.get("/access/v1/evaluation").status_code == 404


def test_the_token_is_asked_for_where_one_is_set(place, tmp_path):
    token = tmp_path / "token"
    token.write_text("letmein")
    token.chmod(0o600)
    config = tmp_path / "service.json"
    config.write_text(json.dumps({"policies": {"directory": str(place / "rules"), "tokenFile": str(token)}}))
    with Service(tmp_path / "db", config=config) as service:
        assert post(service, asked("ab" * 16, "read")).status_code == 401
        assert post(service, asked("ab" * 16, "read"), Authorization="Bearer other").status_code == 401
        assert post(service, asked("ab" * 16, "read"), Authorization="Bearer letmein").status_code == 200


def test_a_service_with_wrong_rules_does_not_start(tmp_path):
    (tmp_path / "rules").mkdir()
    (tmp_path / "rules" / "p.cedar").write_text('permit(principal,\naction == Action::"raed", resource);')
    config = tmp_path / "service.json"
    config.write_text(json.dumps({"policies": {"directory": "rules"}}))
    service = Service(tmp_path / "db", config=config, check=False)
    with pytest.raises(AssertionError) as caught:
        service.start()
    service.process.wait(60)
    assert "p.cedar: line 2, column 11" in str(caught.value)


def test_without_rules_there_is_no_decision_point(tmp_path):
    with Service(tmp_path / "db") as service:
        assert service.get("/.well-known/authzen-configuration").status_code in (401, 404)
