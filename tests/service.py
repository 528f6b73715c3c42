"""The real service in a process of its own, and people who send it requests of every kind, good and bad.

with Service(tmp_path / "db", "--join", "open") as service:
    alice = Person("alice", service)
    alice.join()
    alice.get(f"/v1/identities/bob")
"""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
from t1_metadata_contract import Share, identity

from meshkitfs.core.keys import EncryptionKey, SigningKey
from meshkitfs.core.records import record_hash
from meshkitfs.metadata._wire import b64, write_publication
from meshkitfs.net import SignatureAuth

HERE = Path(__file__).resolve().parent
PATIENCE = 60
_IMPATIENT = """
import sys
from meshkitfs.cli import main
from meshkitfs.server import _run
_run.HEADER_SECONDS = {}
sys.exit(main())
"""


class Service:
    """``meshkitfs serve`` as a process, on a port that the kernel chooses (or the one it had before).

    ``prefix`` is a command that runs it elsewhere and becomes it; ``header_seconds`` shortens how long it waits
    for the headers of a request.
    """

    def __init__(
        self,
        database,
        *options,
        config=None,
        join="open",
        listen="127.0.0.1:0",
        env=None,
        check=True,
        prefix=(),
        header_seconds=None,
    ):
        self.prefix = prefix
        self.program = ["-m", "meshkitfs"]
        if header_seconds is not None:
            self.program = ["-c", _IMPATIENT.format(header_seconds)]
        self.database = str(database)
        self.options = [*map(str, options)]
        self.config = config
        self.join = join
        self.listen = listen
        self.env = {k: v for k, v in os.environ.items() if not k.startswith("MESHKIT")}
        self.env |= {"PYTHONPATH": str(HERE.parent), "LC_ALL": "C.UTF-8"} | (env or {})
        self.process: subprocess.Popen | None = None
        self.said = ""
        if check:
            self.start()

    def start(self):
        arguments = ["--json", "serve", *self.options]
        if self.database:
            arguments += ["--database", self.database]
        if self.join:
            arguments += ["--join", self.join]
        if self.listen:
            arguments += ["--listen", self.listen]
        if self.config:
            arguments += ["--config", str(self.config)]
        self.process = subprocess.Popen(
            [*self.prefix, sys.executable, *self.program, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.env,
            cwd="/",
        )
        line = self.process.stdout.readline()
        if not line:
            raise AssertionError(f"the service did not start: {self.process.communicate()[1]}")
        self.info = json.loads(line)
        self.url = self.info["listening"][0]
        if self.listen == "127.0.0.1:0":
            self.listen = self.url.removeprefix("http://")  # the next start is at the same place

    def kill(self):
        """As a crash would, and wait until it is gone."""
        self.process.send_signal(signal.SIGKILL)
        self._ended()

    def stop(self):
        """As an operator would. Returns its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self._ended()

    def _ended(self):
        out, err = self.process.communicate(timeout=PATIENCE)
        self.said += out + err
        self.process.stdout.close()
        self.process.stderr.close()
        return self.process.returncode

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.kill()

    def get(self, path, **options):
        return httpx.get(self.url + path, timeout=PATIENCE, **options)


class Person:
    """Somebody with keys, and a signature for every request. ``verify`` and ``uds`` are for the transport."""

    def __init__(self, handle, service, **transport):
        self.handle = handle
        self.service = service
        self.key = SigningKey.generate()
        self.enc = EncryptionKey.generate()
        self.record = identity(handle, self.key, enc=self.enc.public)
        self.http = httpx.Client(timeout=PATIENCE, **transport)

    @property
    def kid(self):
        """The address of this person's mailbox and capsules."""
        return self.enc.kid

    def signed(self, method, path, *, content=None, now=None, key=None, url=None, headers=None, **options):
        """A signed request that was not sent yet. ``json`` and ``params`` are httpx's."""
        request = self.http.build_request(
            method, (url or self.service.url) + path, content=content, headers=headers, **options
        )
        auth = SignatureAuth(lambda: key or self.key, lambda: time.time() if now is None else now)
        return next(auth.sync_auth_flow(request))

    def send(self, request):
        return self.http.send(request)

    def ask(self, method, path, **options):
        return self.send(self.signed(method, path, **options))

    def get(self, path, **options):
        return self.ask("GET", path, **options)

    def post(self, path, body, **options):
        return self.ask("POST", path, json=body, **options)

    def put(self, path, body, **options):
        return self.ask("PUT", path, json=body, **options)

    def delete(self, path, **options):
        return self.ask("DELETE", path, **options)

    def join(self, **headers):
        answer = self.post(f"/v1/identities/{self.handle}", {"record": b64(self.record)}, headers=headers)
        assert answer.status_code == 204, answer.text
        return self

    # -- shares ------------------------------------------------------------------------------------------

    def share(self):
        """A share of this person's, not published yet."""
        return Share(self.key, os.urandom(16), os.urandom(16))

    def publish(self, share, *, roster=None, head=None, capsules=(), check=True):
        """Publish as the share believes it goes, and take that over into it."""
        answer = self.post(
            f"/v1/shares/{share.share.hex()}/publications",
            write_publication(share.publication(roster=roster, head=head, capsules=capsules)),
        )
        if check:
            assert answer.status_code == 204, answer.text
            if roster:
                share.seq += 1
            if head:
                share.ver += 1
                share.prev = record_hash(head)
        return answer

    def new_share(self):
        share = self.share()
        self.publish(share, roster=share.roster(), head=share.head())
        return share

    def grant(self, share, to):
        """A capsule of the share for somebody, published."""
        capsule_id = os.urandom(16)
        blob = share.capsule(to.enc, id=capsule_id)
        self.publish(share, capsules=[(to.kid, capsule_id, blob)])
        return blob

    def state(self, share, kid=None):
        return self.get(f"/v1/shares/{share.share.hex()}/state", params={"kid": (kid or self.kid).hex()})

    def changes(self, shares=(), mailbox=None, after=None, wait=0):
        answer = self.post(
            "/v1/changes",
            {"shares": [b64(s.share) for s in shares], "mailbox": b64(mailbox), "after": after, "wait": wait},
        )
        assert answer.status_code == 200, answer.text
        return answer.json()


def refused(answer, status, code, about=""):
    """The answer is this refusal, in the documented form, and tells nothing of the inside."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"code", "message", "detail"}
    assert error["code"] == code
    assert about in error["detail"], error["detail"]
    assert answer.headers["content-type"] == "application/json"
    assert "Traceback" not in answer.text
    return error


def unb64(text):
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
