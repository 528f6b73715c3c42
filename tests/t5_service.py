"""Two services on one PostgreSQL: killed and restarted under load, nothing acknowledged is lost, nothing forks."""

import itertools
import random
import threading
import time

import evil
import httpx
import postgres
import pytest
from service import Person, Service, refused, unb64
from t1_metadata_contract import cluster  # noqa: F401 - a fixture

from meshkitfs.core.records import Head, record_hash
from meshkitfs.metadata._wire import b64, write_publication

SECONDS = 12


@pytest.fixture
def pair(cluster):  # noqa: F811
    address = cluster.fresh()
    with Service(address) as one, Service(address) as two:
        yield one, two


def wait_until(condition, what, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.01)


def test_a_poll_at_one_is_woken_by_a_publication_at_the_other(pair):
    """That no pause on its way is long is in t3_http_home."""
    one, two = pair
    alice = Person("alice", one).join()
    share = alice.new_share()
    at_two = Person("alice", two)
    at_two.key, at_two.enc = alice.key, alice.enc
    for mailbox in (False, True, False):
        cursor = at_two.changes()["cursor"]
        result, began = {}, time.monotonic()

        def poll(cursor=cursor, result=result):
            result["news"] = at_two.changes([share], alice.kid, after=cursor, wait=30)
            result["at"] = time.monotonic()

        thread = threading.Thread(target=poll)
        thread.start()
        thread.join(1.0)
        assert thread.is_alive()  # it waits
        if mailbox:
            alice.post(f"/v1/mailboxes/{alice.kid.hex()}", {"letter": b64(b"x")})
        else:
            alice.publish(share, head=share.head())
        published = time.monotonic()
        thread.join(60)
        assert result["news"]["mailbox"] is mailbox
        assert result["news"]["shares"] == ([] if mailbox else [b64(share.share)])
        print(f"heard {result['at'] - published:.3f} s after it was published at the other")
        assert result["at"] - began < 30, "it ended with its time, not with the change"


def test_a_request_served_by_one_is_not_served_again_by_the_other(pair):
    one, _ = pair
    alice = Person("alice", one).join()
    # Both have one name, as behind a proxy.
    with httpx.Client(timeout=60) as http:
        for service in pair:
            service.stop()
        names = ("--name", "service.example")
        with Service(one.database, *names) as first, Service(one.database, *names) as second:
            request = alice.signed("GET", "/v1/invitations", url="http://service.example")
            answers = [
                http.send(
                    httpx.Request("GET", f"{s.url}/v1/invitations", headers=request.headers)
                ).status_code
                for s in (first, second, second, first)
            ]
    assert answers == [200, 401, 401, 401]


def test_a_database_that_goes_away_and_comes_back():
    with postgres.Cluster() as own, Service(own.fresh()) as service:
        alice = Person("alice", service).join()
        share = alice.new_share()
        own.stop("immediate")
        refused(service.get("/v1/health"), 503, "metadata_unavailable")
        refused(alice.get("/v1/invitations"), 503, "metadata_unavailable")
        own.start()
        wait_until(lambda: service.get("/v1/health").status_code == 200, "the service to be well again")
        alice.publish(share, head=share.head())
        cursor = alice.changes()["cursor"]
        poll = threading.Thread(target=alice.changes, args=([share],), kwargs={"after": cursor, "wait": 30})
        poll.start()
        alice.publish(share, head=share.head())
        poll.join(10)
        assert not poll.is_alive()  # announcements are heard again too
        assert service.stop() == 0
        lines = service.said.splitlines()
        assert any("metadata_unavailable" in line for line in lines)  # it was said, in lines
        assert "Traceback" not in service.said


class Publisher(threading.Thread):
    """Somebody who publishes heads at whichever service answers, as fast as possible, and remembers what was
    acknowledged."""

    def __init__(self, person, share, services, stop):
        super().__init__()
        self.person, self.share, self.services, self.stop = person, share, services, stop
        self.acknowledged = []  # (version, hash)
        self.conflicts = self.repeated = 0
        self.unexpected = []
        self.random = random.Random(person.key.public)

    def run(self):
        path = f"/v1/shares/{self.share.share.hex()}"
        with httpx.Client(timeout=30) as http:
            while not self.stop.is_set():
                newest = self._ask(http, "GET", f"{path}/head")
                if newest is None or newest.status_code != 200 or newest.json()["record"] is None:
                    continue
                blob = unb64(newest.json()["record"])
                self.share.ver, self.share.prev = evil.peek(Head, blob).ver, record_hash(blob)
                # Versions may skip. So rivals differ in theirs, and nothing but the lock keeps them apart.
                version = self.share.ver + self.random.randint(1, 3)
                head = self.share.head(self.person.key, ver=version)
                body = write_publication(self.share.publication(head=head))
                # As the client does: an answer that was lost is asked for again, until it is known.
                while not self.stop.is_set():
                    answer = self._ask(http, "POST", f"{path}/publications", json=body)
                    if answer is None or answer.status_code == 503:
                        self.repeated += 1
                        continue
                    if answer.status_code == 204:
                        self.acknowledged.append((version, record_hash(head)))
                    elif answer.status_code == 409:
                        self.conflicts += 1
                    else:
                        self.unexpected.append((answer.status_code, answer.text))
                    break

    def _ask(self, http, method, path, **options):
        service = self.random.choice(self.services)
        try:
            return http.send(self.person.signed(method, path, url=service.url, **options))
        except httpx.TransportError:
            time.sleep(0.02)  # it is not there now: no use in asking as fast as possible
            return None


def test_killed_and_restarted_under_load_nothing_acknowledged_is_lost(cluster, tmp_path):  # noqa: F811
    address = cluster.fresh()
    config = tmp_path / "service.json"
    plenty = {"perSecond": 10_000, "burst": 10_000}
    config.write_text(f'{{"rates": {{"identity": {plenty}, "address": {plenty}}}}}'.replace("'", '"'))
    with Service(address, config=config) as one, Service(address, config=config) as two:
        services = (one, two)
        people = [Person(f"writer{i}", services[i % 2]).join() for i in range(4)]
        share = people[0].share()
        writers = tuple(person.key.public for person in people)
        people[0].publish(share, roster=share.roster(writers=writers), head=share.head())
        for person in people[1:]:
            people[0].grant(share, person)
        stop = threading.Event()
        publishers = [
            Publisher(person, people[0].share(), services, stop) for person in people for _ in range(1)
        ]
        for publisher in publishers:
            publisher.share.share, publisher.share.oid = share.share, share.oid
            publisher.start()
        try:
            chaos = random.Random(7)
            ends = time.monotonic() + SECONDS
            kills = 0

            def done():
                return sum(len(publisher.acknowledged) for publisher in publishers)

            while time.monotonic() < ends or kills < 6:
                before = done()
                wait_until(lambda before=before: done() > before + 3, "publications between two kills")
                for service in chaos.choice(([one], [two], [one, two])):
                    service.kill()
                    kills += 1
                    service.start()
        finally:
            stop.set()
            for publisher in publishers:
                publisher.join(90)
        reader = people[0]
        reader.service = one
        heads, after = [], 0
        while True:
            page = reader.get(f"/v1/shares/{share.share.hex()}/heads", params={"after": after}).json()
            heads += [unb64(head) for head in page["heads"]]
            if not page["more"]:
                break
            after = evil.peek(Head, heads[-1]).ver
    assert [publisher.unexpected for publisher in publishers] == [[]] * len(publishers)
    chain = {evil.peek(Head, head).ver: record_hash(head) for head in heads}
    acknowledged = [entry for publisher in publishers for entry in publisher.acknowledged]
    lost = [ver for ver, digest in acknowledged if chain.get(ver) != digest]
    assert lost == []
    assert len(dict(acknowledged)) == len(acknowledged)  # no version was acknowledged to two people
    for previous, following in itertools.pairwise(heads):
        assert evil.peek(Head, following).prev == record_hash(previous)
    print(f"{kills} kills, {len(acknowledged)} acknowledged, {len(heads)} heads, ", end="")
    print(f"{sum(p.conflicts for p in publishers)} conflicts, {sum(p.repeated for p in publishers)} repeated")
    assert len(acknowledged) > 20
    assert kills >= 6
