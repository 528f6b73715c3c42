"""A policy decision point that is not ours: Cerbos, which speaks AuthZEN 1.0 and watches its policy files."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

from servers.install import TARGET, missing
from servers.process import HOST, Server, free_port, not_tested, responds, started

_PACKAGE = "cerbos-linux-x64"


@dataclass(slots=True)
class Cerbos:
    """A running server; ``allow`` writes what it permits, and it takes note of that by itself."""

    url: str
    policies: Path
    process: Server

    def allow(self, *actions: str) -> None:
        """Permit these actions with any capsule, and nothing else."""
        write_policy(self.policies, actions)

    def decides(self, action: str) -> bool:
        """What it says now, asked as anybody would."""
        body = {
            "subject": {"type": "identity", "id": "someone"},
            "action": {"name": action},
            "resource": {"type": "capsule", "id": "any", "properties": {"policyId": "p1"}},
        }
        # Never through a proxy of the environment: the target is on this machine.
        answer = httpx.post(f"{self.url}/access/v1/evaluation", json=body, timeout=10, trust_env=False)
        return bool(answer.raise_for_status().json()["decision"])


def write_policy(directory: Path, actions: tuple[str, ...]) -> None:
    """Put a policy in place whole: the server may read it at any moment."""
    rules = [{"actions": sorted(actions), "effect": "EFFECT_ALLOW", "roles": ["*"]}] if actions else []
    policy = {
        "apiVersion": "api.cerbos.dev/v1",
        "resourcePolicy": {"version": "default", "resource": "capsule", "rules": rules},
    }
    temporary = directory / ".capsule.tmp"
    temporary.write_text(json.dumps(policy))
    temporary.rename(directory / "capsule.json")


@contextlib.contextmanager
def cerbos(place: Path, *actions: str) -> Iterator[Cerbos]:
    """A server whose policies are in ``place``, which permits ``actions``."""
    why = missing(TARGET, "node", "cerbos")
    binary = TARGET / "cerbos" / "node_modules" / "@cerbos" / _PACKAGE / _PACKAGE
    if why:
        not_tested("policies decided by Cerbos", why)
    policies = place / "policies"
    policies.mkdir(parents=True)
    write_policy(policies, actions)
    port, other = free_port(), free_port()
    config = place / "conf.json"
    config.write_text(
        json.dumps(
            {
                "server": {"httpListenAddr": f"{HOST}:{port}", "grpcListenAddr": f"{HOST}:{other}"},
                "telemetry": {"disabled": True},
                "storage": {
                    "driver": "disk",
                    "disk": {"directory": str(policies), "watchForChanges": True},
                },
            }
        )
    )
    url = f"http://{HOST}:{port}"
    ready = responds(f"{url}/_cerbos/health")
    with started([binary, "server", "--config", config], ready=ready, name="Cerbos") as process:
        yield Cerbos(url, policies, process)
