"""What a service remembers and for how long, on a clock of the test's; and whose address a request counts for."""

import pytest
import trio
from t1_metadata_contract import identity

from meshkitfs.core.keys import SigningKey
from meshkitfs.errors import MeshkitError
from meshkitfs.metadata import EmbeddedMetadata
from meshkitfs.metadata.service import Quotas, Service
from meshkitfs.net import signing
from meshkitfs.server import _run
from meshkitfs.server._gate import client_address

KEY, NONCE = bytes(16), bytes(range(16))
DAY = 86400


class Clock:
    now = 1_800_000_000

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def service(tmp_path, clock):
    home = EmbeddedMetadata.create(tmp_path / "metadata.db", clock=clock)
    yield Service(home, Quotas(), clock, audit_days=90)
    home.close()


class _Enough(Exception):
    pass


def tidy(service):
    """As the running service does it, once."""

    class Once:
        async def tidy(self, *args):
            await service.tidy(*args)
            raise _Enough

    with pytest.raises(_Enough):
        trio.run(_run._tidy, Once())


def test_a_nonce_is_remembered_for_as_long_as_its_signature_is_good(service, clock):
    """A signature may be from a clock that is ahead, and is good until it is too old by this one."""
    longest = 2 * signing.SKEW_S
    assert trio.run(service.claim_nonce, KEY, NONCE)
    for passed in (0, 60, longest):
        clock.now = Clock.now + passed
        tidy(service)
        assert not trio.run(service.claim_nonce, KEY, NONCE), passed
    clock.now = Clock.now + longest + 1
    tidy(service)
    assert trio.run(service.claim_nonce, KEY, NONCE)  # forgotten, and the table stays small


def test_a_nonce_is_a_keys_own(service):
    assert trio.run(service.claim_nonce, KEY, NONCE)
    assert trio.run(service.claim_nonce, bytes(15) + b"\1", NONCE)


def join(service, handle, code):
    key = SigningKey.generate()

    async def publish():
        record = identity(handle, key)
        return await service.publish_identity(handle, record, key.kid, welcome=False, code=code)

    return trio.run(publish)


def test_an_invitation_ends(service, clock):
    code, end = trio.run(service.invite, None, 3600)
    other, _ = trio.run(service.invite, None, 3600)
    assert end == clock.now + 3600
    clock.now = end - 1
    tidy(service)
    assert join(service, "alice", code)
    clock.now = end
    with pytest.raises(MeshkitError) as caught:
        join(service, "bob", other)
    assert caught.value.code == "metadata_unauthorized"
    assert "too old" in caught.value.detail


def test_the_audit_log_is_kept_as_long_as_said(service, clock):
    begun = clock.now

    def lines():
        return trio.run(service.home.read, lambda db: db.rows("SELECT kind FROM audit"))

    trio.run(service.note_refusals, [(begun, "", "GET v1/heads", None, "metadata_unauthorized")])
    clock.now = begun + 90 * DAY
    tidy(service)
    assert lines() == [("GET v1/heads",)]
    clock.now += 1
    tidy(service)
    assert lines() == []


@pytest.mark.parametrize(
    ("client", "forwarded", "counted"),
    [
        ("10.0.0.9", [], "10.0.0.9"),
        ("10.0.0.9", ["203.0.113.7"], "10.0.0.9"),  # nobody who is believed about others
        ("10.0.0.1", ["203.0.113.7"], "203.0.113.7"),
        ("10.0.0.1", ["1.2.3.4, 203.0.113.7"], "203.0.113.7"),
        ("10.0.0.1", ["1.2.3.4", "203.0.113.7"], "203.0.113.7"),
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", [""], "10.0.0.1"),
        # One customer has a /64: each of its addresses is the same one.
        ("2001:db8:1:2::1", [], "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff:ffff:ffff:ffff", [], "2001:db8:1:2::/64"),
        ("2001:db8:1:3::1", [], "2001:db8:1:3::/64"),
        ("10.0.0.1", ["2001:db8:1:2::1"], "2001:db8:1:2::/64"),
        ("10.0.0.1", ["x" * 500], "x" * 64),
        (None, ["203.0.113.7"], "unix"),
    ],
)
def test_whose_address_it_is(client, forwarded, counted):
    headers = [(b"x-forwarded-for", line.encode()) for line in forwarded]
    scope = {"client": client and (client, 1234), "headers": headers}
    assert client_address(scope, ["10.0.0.1"]) == counted
