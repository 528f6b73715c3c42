"""Metrics of a real service at work: what is counted, for whom, and that they name nobody."""

from __future__ import annotations

from service import Person, Service
from t4_metrics import MOST_NAMES, page, scraped

from meshkitfs.errors import TABLE

MEMBER = "canary-member"


def test_a_service_at_work(tmp_path):
    place = tmp_path / "metrics.sock"
    config = tmp_path / "service.json"
    config.write_text('{"rates": {"address": {"perSecond": 0.001, "burst": 12}}}')
    with Service(tmp_path / "db", "--metrics", f"unix:{place}", config=config) as service:
        member = Person(MEMBER, service)
        member.join()
        assert member.get(f"/v1/identities/{MEMBER}").status_code == 200
        for path in (f"/v1/{MEMBER}", "/v1/identities/../../x", "/metrics"):
            member.get(path)
        assert service.get("/v1/vaults/unsigned").status_code == 401  # costs more than others
        while service.get("/v1/health").status_code == 200:
            pass
        found, text = scraped(place), page(place)

        def total(**wanted):
            return sum(
                value
                for key, value in found.items()
                if key[0] == "meshkitfs_service_requests_total" and wanted.items() <= dict(key[1:]).items()
            )

        assert total(route="/v1/identities/{handle}", status="200", method="GET") == 1
        assert total(route="/v1/health", status="200") >= 1
        assert total(route="none", status="401") == 1
        assert total(route="none", status="429") == 1
        assert found[("meshkitfs_service_refusals_total", ("code", "rate_limited"))] == 1
        assert found[("meshkitfs_service_database_seconds_count", ("kind", "read"))] >= 3
        assert found[("meshkitfs_service_database_seconds_count", ("kind", "write"))] >= 1
        assert found[("meshkitfs_service_requests_open",)] <= 1
        codes = {value for key in found for label, value in key[1:] if label == "code"}
        assert codes <= TABLE.keys()
        assert len(found) < MOST_NAMES
        for named in (MEMBER, member.kid.hex(), str(tmp_path), "unsigned"):
            assert named not in text
        # It is shown where it was said, and not to whoever may ask the service.
        assert "meshkitfs_service_requests" not in service.get("/metrics").text
        assert service.stop() == 0
    assert not place.exists()
