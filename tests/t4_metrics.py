"""Metrics of a real mount at work: scraped over its socket, read by the client library's own parser."""

from __future__ import annotations

import os
import socket

import homes
import pytest
from homes import Person
from prometheus_client.parser import text_string_to_metric_families

from meshkitfs.errors import TABLE

pytestmark = homes.needs_fuse

SHARE, FILE = "canary-share", "canary-file.txt"
# A home with two shares and every kind of work stays far below; a label with names in it would not.
MOST_NAMES = 1000


def page(path):
    """One scrape, as text."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(homes.PATIENCE)
        sock.connect(str(path))
        sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = b""
        while data := sock.recv(65536):
            answer += data
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 "), head
    return body.decode()


def scraped(path):
    """One scrape: values by name and labels, as ``{("meshkitfs_x_total", ("code", "y")): 1.0}``."""
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(page(path))
        for sample in family.samples
    }


def test_a_mount_at_work(tmp_path):
    place = tmp_path / "metrics.sock"
    with Person(tmp_path / "mona", "mona") as mona, Person(tmp_path / "nick", "nick") as nick:
        mona.init()
        nick.init(mona)
        mona.configure(metrics={"listen": f"unix:{place}"})
        mona.mount()
        assert mona.status()["metrics"] == f"unix:{place}"
        other = tmp_path / "other.sock"
        nick.mount("--metrics", f"unix:{other}")
        before = scraped(place)
        assert before[("meshkitfs_locked",)] == 0
        assert before[("meshkitfs_unpublished_bytes", ("place", "spool"))] == 0
        mona.cli("share", "create", SHARE)
        content = os.urandom(300_000)
        homes.write_synced(mona.mnt / SHARE / FILE, content)
        name = homes.invite(mona, SHARE, nick, "--rights", "read")["name"]
        theirs = nick.mnt / name / FILE
        assert theirs.read_bytes() == content
        mona.cli("share", "revoke", SHARE, "nick")
        homes.errno_of(os.open, theirs, os.O_RDONLY)
        now, read = scraped(place), scraped(other)
        assert now[("meshkitfs_file_bytes_total", ("direction", "written"))] == 300_000
        assert now[("meshkitfs_requests_total", ("operation", "write"))] >= 1
        assert now[("meshkitfs_published_total", ("what", "heads"))] >= 1
        assert now[("meshkitfs_provider_blocks_total", ("operation", "put"))] >= 2
        assert now[("meshkitfs_provider_bytes_total", ("direction", "out"))] > 300_000
        assert now[("meshkitfs_provider_seconds_count", ("operation", "put"))] >= 1
        assert now[("meshkitfs_shares", ("state", "stored"))] == 1
        assert read[("meshkitfs_file_bytes_total", ("direction", "read"))] >= 300_000
        assert read[("meshkitfs_source_blocks_total", ("outcome", "served"), ("source", "0"))] >= 2
        assert read[("meshkitfs_unwraps_total",)] >= 1
        assert read[("meshkitfs_refusals_total", ("code", "share_revoked"))] >= 1
        assert read[("meshkitfs_access_ended_total", ("code", "share_revoked"))] == 1
        assert read[("meshkitfs_request_failures_total", ("errno", "EACCES"))] >= 1
        assert read[("meshkitfs_shares", ("state", "refused"))] == 1
        for path in (place, other):
            text = page(path)
            for named in (SHARE, FILE, name, "mona", "nick", str(tmp_path)):
                assert named not in text
            found = scraped(path)
            assert len(found) < MOST_NAMES
            codes = {value for key in found for label, value in key[1:] if label == "code"}
            assert codes <= TABLE.keys()
        mona.cli("lock")
        locked = scraped(place)
        assert locked[("meshkitfs_locked",)] == 1
        assert locked[("meshkitfs_unpublished_blocks",)] == 0
        mona.umount()
        assert not place.exists()


def test_what_cannot_be_listened_on_keeps_the_mount_from_starting(tmp_path):
    with Person(tmp_path / "olga", "olga") as olga, socket.create_server(("127.0.0.1", 0)) as taken:
        olga.init()
        for place in (f"127.0.0.1:{taken.getsockname()[1]}", "0.0.0.0:0", "nonsense"):
            failed = olga.mount("--metrics", place, check=False)
            assert failed.error["code"] == "invalid_config", failed
            assert "metrics" in failed.error["detail"]
        assert not os.path.ismount(olga.mnt)
        olga.configure(metrics={"listen": "192.0.2.1:9464"})
        with pytest.raises(homes.CliFailure, match="not an address of this machine only"):
            olga.mount()
