"""The command line: its grammar, its two kinds of output, its exit codes, and what it never prints.

Commands run against a real daemon's control socket (`control_daemon`); only the service behind it is small.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pty
import re
import secrets
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import segno
from control_daemon import running
from rich.console import Console

from meshkitfs.cli import _people, main
from meshkitfs.cli._output import ago, duration, fields, printable, size, table
from meshkitfs.cli._parser import build_parser
from meshkitfs.cli._passphrase import PassphraseSource
from meshkitfs.cli._progress import ProgressLine
from meshkitfs.cli._targets import mounted_at, share_path
from meshkitfs.daemon import client
from meshkitfs.daemon.home import Home
from meshkitfs.errors import TABLE, MeshkitError, exit_code_for
from meshkitfs.keyvault import NEW_PASSPHRASE_PROMPT, PASSPHRASE_PROMPT

PHRASE = f"pass {secrets.token_hex(8)}"


@pytest.fixture(autouse=True)
def _own_environment(tmp_path, monkeypatch):
    """No test may meet the home of the person who runs it."""
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    monkeypatch.setenv("MESHKITFS_HOME", str(tmp_path / "home"))
    for name in ("MESHKIT_CONFIG", "XDG_DATA_HOME", "MESHKITFS_PASSPHRASE_FILE", "MESHKITFS_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "user").mkdir()


@pytest.fixture
def daemon(tmp_path):
    with running(tmp_path / "home") as daemon:
        yield daemon


@pytest.fixture
def run(capsys):
    """Run one command; give its exit code, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main(arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def start(*arguments: str, encoding: str = "utf-8", **options) -> subprocess.Popen[bytes]:
    code = str(Path(__file__).resolve().parents[1])
    environment = {**os.environ, "PYTHONPATH": code, "PYTHONIOENCODING": encoding}
    return subprocess.Popen(
        [sys.executable, "-m", "meshkitfs", *arguments],
        env=environment,
        # Who runs the tests in the background of a script has it ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **{"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
    )


# -- grammar ----------------------------------------------------------------------------------------------


def leaves(parser: argparse.ArgumentParser, path: tuple[str, ...] = ()):
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not below:
        yield path, parser
    for action in below:
        for name, child in action.choices.items():
            yield from leaves(child, (*path, name))


COMMANDS = dict(leaves(build_parser()))


def test_every_command_of_the_interface_is_there():
    assert {" ".join(path) for path in COMMANDS} == {
        "audit", "decline", "service members", "service shares", "service audit", "service stats", "service remove-member",
        "service remove-share", "service readmit", "service release-handle",
        "init", "mount", "umount", "lock", "unlock", "support-bundle", "inbox", "accept", "status", "sync", "explain", "doctor", "version", "desktop install", "desktop uninstall",
        "history", "restore", "keyvault show", "keyvault list", "keyvault migrate",
        "share create", "share list", "share show", "share add", "share revoke", "share reencrypt",
        "share accept-rollback", "share invite", "share invitations", "share uninvite", "claim",
        "identity show", "identity create", "identity publish", "identity rotate",
        "identity doctor", "identity export", "identity import", "identity recovery create", "identity recovery restore",
        "contacts list", "contacts add", "contacts verify",
        "device request", "device approve", "device list", "device revoke",
        "policy create", "policy list", "policy show", "policy test", "policy edit", "policy delete",
        "vault create", "vault list", "vault show", "vault add", "vault remove", "vault delete",
        "capability issue", "capability narrow", "capability list", "capability inspect", "capability add",
        "capability remove", "capability revoke",
        "prune", "gc", "verify", "repair", "providers test",
        "serve", "serve-invite", "completion", "autostart install", "autostart uninstall", "autostart status", "mount-helper",
    }  # fmt: skip


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_command_has_help_and_json(path, run):
    code, out, err = run(*path, "--help")
    assert code == 0
    assert err == ""
    assert out.startswith(f"usage: meshkitfs {' '.join(path)}")
    assert "--json" in out
    assert "--home DIR" in out
    assert "SUPPRESS" not in out
    assert "--ready-fd" not in out
    description = COMMANDS[path].description
    assert description
    assert description.endswith(".")


def test_a_code_is_shown_as_a_qr_code():
    code = "12345 67890 98765 43210 11111 22222 33333 44444 55555 66666 77777 88888"
    lines = _people.qr_lines(code, colours=False)
    shades = {" ": (0, 0), "▀": (1, 0), "▄": (0, 1), "█": (1, 1)}
    rows = [[shades[c][half] for c in line] for line in lines[:-1] for half in (0, 1)]
    wanted = [list(row) for row in segno.make(code.replace(" ", ""), micro=False).matrix_iter(border=4)]
    assert rows[: len(wanted)] == wanted
    assert all(line.startswith("\x1b[30;47m") for line in _people.qr_lines(code, colours=True)[:-1])


@pytest.mark.parametrize("option", COMMANDS.values(), ids=[" ".join(path) for path in COMMANDS])
def test_no_option_takes_a_secret(option):
    names = [name for action in option._actions for name in action.option_strings]
    assert not [
        name
        for name in names
        if re.search("pass|secret|token|key", name) and not name.endswith(("-fd", "-file", "-vault"))
    ]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["sahre"], "'sahre' is not known here: did you mean 'share'?"),
        (
            ["service", "install"],
            "'install' is not known here: systemd units are 'meshkitfs autostart install'",
        ),
        (["share", "lst"], "did you mean 'list'?"),
        (["share", "zzzzzz"], "choose from create, list, show, add, revoke"),
        (["share"], "the following arguments are required: COMMAND"),
        (["share", "add", "first"], "the following arguments are required: RECIPIENT"),
        (["share", "add", "first", "bob", "--rights", "raed"], "'raed' is not a right: did you mean 'read'?"),
        (["share", "add", "first", "bob", "--rights", ""], "'' is not a right"),
        (["status", "--jsno"], "unrecognized arguments: --jsno"),
        (["status", "--js"], "unrecognized arguments: --js"),
        (["sync", "--timeout", "soon"], "'soon' is not a number of seconds"),
        (["sync", "--timeout", "nan"], "'nan' is not a number of seconds"),
        (["sync", "--timeout", "-1"], "'-1' is not a number of seconds"),
        (["init", "--key-vault", "plain-fil"], "did you mean 'plain-file'?"),
        (["status", "--passphrase-fd", "x"], "'x' is not a file descriptor"),
    ],
)
def test_usage_errors_say_what_and_where_and_exit_with_2(run, arguments, says):
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    assert says in err
    assert re.search(r"Try 'meshkitfs[a-z ]* --help'\.", err)
    code, out, err = run("--json", *arguments)
    assert code == 2
    assert out == ""
    (line,) = err.splitlines()
    error = json.loads(line)["error"]
    assert error["code"] == "invalid_argument"
    assert says in error["detail"]
    assert set(error) == {"code", "message", "detail", "suggestion"}


def test_no_arguments_show_the_help_and_exit_with_2(run):
    code, out, err = run()
    assert code == 2
    assert out == ""
    assert "share add" not in err
    assert "commands:" in err


def test_version(run):
    assert run("--version")[1].startswith("meshkitfs 0")
    assert run("version")[1].startswith("meshkitfs 0")
    assert set(json.loads(run("version", "--json")[1])) == {"version", "python", "system"}


@pytest.mark.parametrize("arguments", [["--json", "status"], ["status", "--json"]])
def test_common_options_work_before_and_after_the_command(run, daemon, arguments):
    daemon.service.answers["status"] = {"identity": "alice"}
    assert run(*arguments) == (0, '{"identity":"alice"}\n', "")


def test_an_option_before_the_command_is_not_undone_by_its_default_after_it(tmp_path, run):
    with running(tmp_path / "other") as other:
        other.service.answers["status"] = {"identity": "bob"}
        home = str(tmp_path / "other")
        assert run("--home", home, "status", "--json")[1] == '{"identity":"bob"}\n'
        assert run("status", "--json", "--home", home)[1] == '{"identity":"bob"}\n'


# -- what a command asks for ------------------------------------------------------------------------------

PEOPLE = {"handle": "bob", "fingerprint": "ABCD-EFGH", "trust": "pinned", "first_seen": 0}
VAULT = {
    "name": "team", "id": "0f" * 16, "vault": "0f@did:key:z6Mka", "seq": 3, "valid_until": 1, "members": ["bob", "carol"],
}  # fmt: skip
TOKEN = {
    "id": "4f0c", "token": "91ab", "name": "editors", "issuer": "did:key:z6Mka", "holder": "did:key:z6Mkb",
    "rights": ["list", "read"], "share": None, "expires": 1, "blocks": 1,
}  # fmt: skip
REENCRYPTED = {
    "share": "first", "files": 3, "directories": 2, "blocks": 12, "bytes": 2 << 20, "skipped": 0, "epoch": 2,
    "version": 9, "complete": True, "unreadable": [],
}  # fmt: skip
SHARE = {"name": "first", "id": "00ff", "owner": "alice", "mine": True, "rights": ["list", "read", "write"],
         "version": 3, "state": "clean", "expires": None}  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "method", "params", "answer", "says"),
    [
        (["share", "create", "first"], "share.create", {"name": "first"}, SHARE, "Created the share first."),
        (["share", "list"], "share.list", {}, {"shares": [SHARE]}, "first  you    list, read, write"),
        (["share", "list"], "share.list", {}, {"shares": []}, "There are no shares."),
        (
            ["share", "show", "first"],
            "share.show",
            {"share": "first"},
            {**SHARE, "recipients": []},
            "Nobody else",
        ),
        (
            ["share", "show", "first"],
            "share.show",
            {"share": "first"},
            {
                **SHARE,
                "recipients": [{"handle": "bob", "rights": ["read"], "policy": "p1", "grant": "snapshot"}],
            },
            "bob        /     read    -        snapshot, policy p1",
        ),
        (
            ["share", "add", "first", "bob", "--rights", "write,read", "--expires", "7d"],
            "share.add",
            {
                "target": "first",
                "recipient": "bob",
                "rights": ["read", "write"],
                "expires": "7d",
                "snapshot": False,
                "policy": None,
                "vault": None,
                "capability": None,
                "offline_grace": None,
                "require_key_vault": None,
            },
            {"rights": ["read", "write"], "grant": "live", "trust": "pinned"},
            "bob may read, write first, from now on.",
        ),
        (
            [
                "share",
                "add",
                "first/a.pdf",
                "bob",
                "--snapshot",
                "--policy",
                "p",
                "--vault",
                "v",
                "--capability",
                "c",
                "--offline-grace",
                "3d",
                "--require-key-vault",
                "persistent,hardware_backed",
            ],
            "share.add",
            {
                "target": "first/a.pdf",
                "recipient": "bob",
                "rights": ["read"],
                "expires": None,
                "snapshot": True,
                "policy": "p",
                "vault": "v",
                "capability": "c",
                "offline_grace": "3d",
                "require_key_vault": ["persistent", "hardware_backed"],
            },
            {"rights": ["read"], "grant": "snapshot", "cid": "bafkrei"},
            "bob may read first/a.pdf, exactly this version.",
        ),
        (
            ["share", "revoke", "first", "bob"],
            "share.revoke",
            {"share": "first", "recipient": "bob"},
            {"bound_seconds": 300},
            "what is open ends within 5m.",
        ),
        (
            ["policy", "create", "team", "--member", "bob", "--member", "carol", "--expires", "7d"],
            "policy.create",
            {"name": "team", "rules": "", "members": ["bob", "carol"], "expires": "7d"},
            {"name": "team", "rules": [{}, {}]},
            "Created the policy team: 2 rules.",
        ),
        (
            ["policy", "list"],
            "policy.list",
            {},
            {"policies": [], "provider": "https://pdp.example"},
            "Other names are asked of https://pdp.example.",
        ),
        (
            ["policy", "show", "team"],
            "policy.show",
            {"name": "team"},
            {"changed": 0, "rules": [{}], "text": "permit();\x1b[2J", "recipients": []},
            "No grant demands it.",
        ),
        (
            ["policy", "test", "team", "bob", "--action", "read", "--at", "2026-12-01"],
            "policy.test",
            {"name": "team", "identity": "bob", "action": "read", "at": "2026-12-01"},
            {
                "name": "team",
                "identity": "bob",
                "at": 0,
                "decisions": [{"action": "read", "allow": False, "reason": "no rule permits it"}],
            },
            "read    deny      no rule permits it",
        ),
        (
            ["policy", "edit", "team", "--member", "bob"],
            "policy.edit",
            {"name": "team", "rules": "", "members": ["bob"], "expires": None},
            {
                "name": "team",
                "rules": [{}],
                "renewed": 2,
                "ended": [{"share": "first", "handle": "bob", "path": "a"}],
                "failed": [],
                "bound_seconds": 1,
            },
            "The snapshot first/a for bob was taken back",
        ),
        (
            ["policy", "delete", "team"],
            "policy.delete",
            {"name": "team"},
            {"name": "team"},
            "Deleted the policy team.",
        ),
        (
            ["share", "reencrypt", "first"],
            "share.reencrypt",
            {"share": "first"},
            REENCRYPTED,
            "Wrote 3 files (2.0 MiB, 12 blocks) and 2 directories of first again, under new keys.",
        ),
        (
            ["inbox"],
            "inbox.list",
            {},
            {"letters": [{"id": "4f", "from": "alice", "name": "x", "kind": "file", "rights": ["read"]}]},
            "4f  alice (unverified)  x     file  read    -        no",
        ),
        (["vault", "create", "team"], "vault.create", {"name": "team"}, VAULT, "Created the vault team."),
        (["vault", "list"], "vault.list", {}, {"vaults": []}, "There are no vaults."),
        (["vault", "list"], "vault.list", {}, {"vaults": [VAULT]}, "team  2 members  3"),
        (["vault", "show", "team"], "vault.show", {"name": "team"}, VAULT, "bob, carol"),
        (
            ["vault", "add", "team", "bob"],
            "vault.add",
            {"name": "team", "member": "bob"},
            VAULT,
            "bob is in team.",
        ),
        (
            ["vault", "remove", "team", "bob"],
            "vault.remove",
            {"name": "team", "member": "bob"},
            VAULT | {"bound_seconds": 61.0},
            "what is open ends within 1m",
        ),
        (
            ["vault", "delete", "team"],
            "vault.delete",
            {"name": "team"},
            {"name": "team", "bound_seconds": 1.0},
            "opens for nobody",
        ),
        (
            [
                "capability",
                "issue",
                "editors",
                "bob",
                "--rights",
                "write",
                "--expires",
                "2d",
                "--share",
                "first",
            ],
            "capability.issue",
            {
                "name": "editors",
                "recipient": "bob",
                "rights": ["write"],
                "expires": "2d",
                "share": "first",
                "format": "cose",
                "send": True,
            },
            TOKEN,
            "Sent a token to bob.",
        ),
        (
            ["capability", "narrow", "4f0c", "carol", "--out", "-"],
            "capability.narrow",
            {
                "capability": "4f0c",
                "recipient": "carol",
                "rights": None,
                "expires": None,
                "share": None,
                "send": False,
            },
            TOKEN | {"text": "meshkit-capability1:AAAA"},
            "meshkit-capability1:AAAA\n",
        ),
        (
            ["capability", "list"],
            "capability.list",
            {},
            {"held": [], "issued": [], "received": 0},
            "There are no capability tokens.",
        ),
        (
            ["capability", "list"],
            "capability.list",
            {},
            {
                "held": [TOKEN],
                "issued": [
                    {
                        "token": "91ab",
                        "name": "x",
                        "recipient": "bob",
                        "rights": ["read"],
                        "expires": 1,
                        "revoked": 2,
                    }
                ],
                "received": 1,
            },
            "91ab   x",
        ),
        (
            ["capability", "inspect", "4f0c"],
            "capability.inspect",
            {"capability": "4f0c"},
            TOKEN
            | {
                "mine": True,
                "chain": [
                    {"rights": ["read"], "share": None, "expires": 1, "made": 1, "holder": "did:key:z6Mkb"}
                ],
            },
            "did:key:z6Mkb",
        ),
        (
            ["capability", "remove", "4f0c"],
            "capability.remove",
            {"capability": "4f0c"},
            TOKEN,
            "Forgot the token 4f0c of editors.",
        ),
        (
            ["capability", "revoke", "91ab"],
            "capability.revoke",
            {"token": "91ab"},
            {"token": "91ab", "bound_seconds": 1.0},
            "Revoked 91ab, and whatever was made from it.",
        ),
        (["inbox"], "inbox.list", {}, {"letters": []}, "There are no invitations."),
        (
            ["accept", "4f"],
            "inbox.accept",
            {"letter": "4f", "name": None},
            {"name": "x (alice)"},
            "as x (alice).",
        ),
        (
            ["accept", "4f", "--name", "y"],
            "inbox.accept",
            {"letter": "4f", "name": "y"},
            {"name": "y"},
            "as y.",
        ),
        (
            ["identity", "show"],
            "identity.show",
            {},
            {"handle": "alice", "published": False, "key_vault": {"kind": "plain-file", "exportable": True}},
            "  exportable       yes",
        ),
        (
            ["identity", "show", "--export"],
            "identity.show",
            {},
            {"record": "meshkit-identity1:AA"},
            "meshkit-identity1:AA",
        ),
        (["identity", "publish"], "identity.publish", {}, {"handle": "alice"}, "Published as alice"),
        (
            ["identity", "rotate"],
            "identity.rotate",
            {"keys": "both", "again": False},
            {"fingerprint": "ABCD-EFGH", "resumed": False, "signed": ["a", "b"], "left": []},
            "Signed anew, under new keys: a, b.",
        ),
        (
            ["identity", "rotate", "--replace", "none", "--again"],
            "identity.rotate",
            {"keys": "none", "again": True},
            {"fingerprint": "ABCD-EFGH", "resumed": True, "signed": [], "left": []},
            "Finished the rotation that was begun before.",
        ),
        (["contacts", "list"], "contacts.list", {}, {"contacts": [PEOPLE]}, "bob      pinned  ABCD-EFGH"),
        (
            ["contacts", "list"],
            "contacts.list",
            {},
            {"contacts": [PEOPLE | {"key_changed": 1764000000}]},
            "by a valid chain",
        ),
        (
            ["contacts", "list"],
            "contacts.list",
            {},
            {"contacts": [PEOPLE | {"trust": "blocked"}]},
            "without a valid chain",
        ),
        (["contacts", "add", "bob"], "contacts.add", {"handle": "bob"}, PEOPLE, "Added bob."),
        (
            ["contacts", "add", "bob", "meshkit-identity1:AA"],
            "contacts.add",
            {"handle": "bob", "record": "meshkit-identity1:AA"},
            PEOPLE,
            "fingerprint  ABCD-EFGH",
        ),
        (
            ["contacts", "verify", "bob"],
            "contacts.verify",
            {"handle": "bob"},
            {"code": "123 456"},
            "    123 456",
        ),
        (
            ["contacts", "verify", "bob", "123", "456"],
            "contacts.verify",
            {"handle": "bob", "code": "123 456"},
            PEOPLE,
            "bob is verified",
        ),
        (
            ["status"],
            "status",
            {},
            {
                "identity": "alice",
                "mountpoint": "/m",
                "pid": 5,
                "shares": [SHARE],
                "pending": {"blocks": 2, "bytes": 2048, "memory": 1024},
                "errors": [{"path": "first/a", "code": "share_revoked", "time": 0}],
            },
            "unsent      2 blocks, 2.0 KiB; 1.0 KiB in memory",
        ),
        (
            ["sync", "--timeout", "5"],
            "sync",
            {"timeout": 5.0, "wait": True},
            {"left": []},
            "Everything is published.",
        ),
        (
            ["explain", "first/a"],
            "explain",
            {"path": "first/a"},
            {
                "path": "first/a",
                "steps": [
                    {"step": "identity", "result": "passed", "evidence": "alice", "code": ""},
                    {"step": "roster", "result": "refused", "evidence": "roster 7", "code": "share_revoked"},
                    {"step": "head", "result": "not reached", "evidence": "", "code": ""},
                ],
            },
            "roster    REFUSED  share_revoked: roster 7",
        ),
    ],
)
def test_a_command_is_one_call_and_shows_its_result(run, daemon, arguments, method, params, answer, says):
    daemon.service.answers[method] = answer
    code, out, err = run(*arguments)
    assert code == 0, err
    assert (method, params) in daemon.service.calls
    assert says in out
    code, out, err = run(*arguments, "--json")
    assert (code, err) == (0, "")
    assert out.count("\n") == 1
    assert json.loads(out) == answer


def test_a_token_goes_into_a_new_file_and_comes_from_one(run, daemon, tmp_path):
    place = tmp_path / "for bob"
    daemon.service.answers["capability.issue"] = TOKEN | {"text": "meshkit-capability1:AAAA"}
    code, out, err = run("capability", "issue", "editors", "bob", "--out", str(place), "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == TOKEN | {"file": str(place)}
    assert (place.read_text(), place.stat().st_mode & 0o777) == ("meshkit-capability1:AAAA\n", 0o600)
    code, _, err = run("capability", "issue", "editors", "bob", "--out", str(place))
    assert (code, "File exists" in err) == (2, True)
    daemon.service.answers["capability.issue"] = MeshkitError("contact_unknown", "bob")
    code, _, _ = run("capability", "issue", "editors", "bob", "--out", str(tmp_path / "other"))
    assert (code, (tmp_path / "other").exists()) == (2, False)
    daemon.service.answers |= {
        "capability.add": TOKEN,
        "capability.inspect": TOKEN | {"mine": False, "chain": []},
    }
    assert run("capability", "add", str(place))[0] == 0
    assert daemon.service.calls[-1] == ("capability.add", {"text": place.read_text()})
    assert run("capability", "inspect", str(place))[0] == 0
    assert daemon.service.calls[-1] == ("capability.inspect", {"text": place.read_text()})
    code, _, err = run("capability", "add", str(tmp_path / "nothing"))
    assert (code, "No such file" in err) == (2, True)


def test_revoking_and_rewriting_are_two_calls_and_one_result(run, daemon):
    daemon.service.answers |= {"share.revoke": {"bound_seconds": 1}, "share.reencrypt": REENCRYPTED}
    code, out, err = run("share", "revoke", "first", "bob", "--reencrypt")
    assert (code, err) == (0, "")
    assert daemon.service.calls == [
        ("share.revoke", {"share": "first", "recipient": "bob"}),
        ("share.reencrypt", {"share": "first"}),
    ]
    for says in (
        "Revoked what bob could do in first.",
        "Version 9 of first names no block",
        "pruned and coll",
    ):
        assert says in out
    code, out, _ = run("share", "revoke", "first", "bob", "--reencrypt", "--json")
    assert json.loads(out) == {"bound_seconds": 1, "reencrypted": REENCRYPTED}


def test_a_rewriting_that_fails_does_not_hide_that_the_revocation_stands(run, daemon):
    daemon.service.answers |= {"share.revoke": {}, "share.reencrypt": MeshkitError("no_space", "spool")}
    code, out, err = run("share", "revoke", "first", "bob", "--reencrypt")
    assert (code, out) == (8, "")
    assert "Revoked what bob could do in first." in err
    assert "'meshkitfs share reencrypt first' goes on" in err
    code, out, err = run("share", "revoke", "first", "bob", "--reencrypt", "--json")
    assert json.loads(err)["error"]["detail"] == "revoked, but not all written again: spool"


@pytest.mark.parametrize(
    ("odd", "says"),
    [
        ({"unreadable": ["a/\x1b[2J", "b"]}, "2 could not be read, and keep their old keys:\n  a/"),
        ({}, "Others changed it faster than it could be rewritten: run it again."),
    ],
)
def test_a_rewriting_that_is_not_complete_is_an_exit_code(run, daemon, odd, says):
    daemon.service.answers["share.reencrypt"] = REENCRYPTED | {"complete": False} | odd
    code, out, _ = run("share", "reencrypt", "first")
    assert code == 7
    assert says in out
    assert "\x1b" not in out
    assert "names no block" not in out


def test_explain_tells_the_sentence_and_the_remedy(run, daemon):
    steps = [{"step": "roster", "result": "refused", "evidence": "", "code": "share_revoked"}]
    daemon.service.answers["explain"] = {"path": "first", "steps": steps}
    _code, out, _err = run("explain", "first")
    assert TABLE["share_revoked"].sentence in out
    assert TABLE["share_revoked"].remedy in out
    daemon.service.answers["explain"] = {"path": "first", "steps": []}
    assert "It may be opened." in run("explain", "first")[1]


def test_what_is_left_to_send_shows_and_is_an_exit_code(run, daemon):
    left = [{"share": "first", "blocks": 3, "bytes": 3145728, "reason": "provider_request_failed"}]
    daemon.service.answers["sync"] = {"left": left}
    code, out, _err = run("sync")
    assert code == exit_code_for(MeshkitError("commit_pending")) == 7
    assert "first  3 blocks, 3.0 MiB: provider_request_failed" in out
    assert run("sync", "--json")[0] == 7


def test_a_share_that_could_not_be_signed_anew_shows_and_is_an_exit_code(run, daemon):
    left = [{"share": "second"} | MeshkitError("metadata_unavailable").as_dict()]
    daemon.service.answers["identity.rotate"] = {"resumed": False, "signed": ["first"], "left": left}
    code, out, err = run("identity", "rotate")
    assert code == exit_code_for(MeshkitError("metadata_unavailable"))
    assert f"second: not signed anew yet: {TABLE['metadata_unavailable'].sentence}" in out
    assert "when it is run again" in err


def test_creating_what_is_there_is_harmless_only_when_asked_for(run, daemon):
    daemon.service.answers["share.create"] = MeshkitError("share_exists", "first")
    daemon.service.answers["share.show"] = SHARE
    assert run("share", "create", "first")[0] == exit_code_for(MeshkitError("share_exists"))
    code, out, _err = run("share", "create", "first", "--if-needed")
    assert code == 0
    assert "is there already" in out
    daemon.service.answers["share.create"] = MeshkitError("no_space")
    assert run("share", "create", "first", "--if-needed")[0] == 8


def test_a_record_comes_from_a_file_or_stdin(run, daemon, tmp_path, monkeypatch):
    (tmp_path / "bob.identity").write_text("meshkit-identity1:BB\n")
    assert run("contacts", "add", "bob", str(tmp_path / "bob.identity"))[0] == 0
    monkeypatch.setattr(sys, "stdin", io.StringIO("meshkit-identity1:CC\n"))
    assert run("contacts", "add", "bob", "-")[0] == 0
    assert [params["record"] for _method, params in daemon.service.calls] == [
        "meshkit-identity1:BB",
        "meshkit-identity1:CC",
    ]
    assert run("contacts", "add", "bob", str(tmp_path / "none"))[0] == 2


# -- failures ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", TABLE)
def test_every_failure_has_its_exit_code_and_both_forms(run, daemon, code):
    failure = MeshkitError(code, "about /a/b")
    daemon.service.answers["status"] = failure
    exit_code, out, err = run("status", "--json")
    assert (exit_code, out) == (exit_code_for(failure), "")
    assert exit_code not in (0, 1)
    assert json.loads(err) == {"error": failure.as_dict()}
    exit_code, out, err = run("status")
    assert (exit_code, out) == (exit_code_for(failure), "")
    assert err.startswith("meshkitfs: error: ")
    assert "about /a/b" in err
    assert failure.remedy in err


def test_no_home_is_said_and_nothing_is_created(run, tmp_path):
    code, _out, err = run("status")
    assert code == 3
    assert "meshkitfs init" in err
    assert not (tmp_path / "home").exists()


def test_an_unforeseen_failure_prints_no_traceback_and_no_text_of_it(run, daemon, monkeypatch):
    canary = secrets.token_hex(32)

    def broken(*_args, **_options):
        raise ValueError(f"the key is {canary}")

    monkeypatch.setattr(client, "run", broken)
    code, out, err = run("status")
    assert (code, out) == (70, "")
    assert "internal_error" in err
    assert canary not in err
    assert "Traceback" not in err
    monkeypatch.setenv("MESHKITFS_DEBUG", "1")
    code, out, err = run("status")
    assert "Traceback" in err
    assert canary not in err


def test_ctrl_c_ends_the_wait_here_and_there(daemon):
    daemon.service.answers["sync"] = "wait"
    process = start("sync", "--json")
    assert daemon.service.started.wait(20)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert out == b""
    assert json.loads(err)["error"]["code"] == "operation_aborted"
    assert daemon.service.cancelled.wait(20)


def test_a_closed_pipe_is_no_noise(daemon):
    daemon.service.answers["share.list"] = {"shares": [SHARE] * 5000}
    read_end, write_end = os.pipe()
    os.close(read_end)
    process = start("share", "list", stdout=write_end)
    os.close(write_end)
    _out, err = process.communicate(timeout=20)
    assert process.returncode == 141
    assert err == b""


def test_a_terminal_that_cannot_write_it_still_gets_it(daemon):
    daemon.service.answers["share.list"] = {"shares": [{**SHARE, "name": "Über 中"}]}
    process = start("share", "list", encoding="ascii")
    out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (0, b"")
    assert b"\\xdcber" in out


# -- what is printed --------------------------------------------------------------------------------------

HOSTILE = "a\x1b[2J\x07\r\n\u202egpj.exe\u200b" + os.fsdecode(b"\xff")


def test_other_peoples_names_cannot_drive_the_terminal(run, daemon):
    letter = {"id": "1", "from": HOSTILE, "name": HOSTILE, "kind": "file", "rights": [HOSTILE]}
    daemon.service.answers["inbox.list"] = {"letters": [letter]}
    daemon.service.answers["status"] = MeshkitError("share_not_found", HOSTILE)
    _code, out, _err = run("inbox")
    assert len(out.splitlines()) == 2
    for text in (out, run("status")[2]):
        assert not [c for c in text if c not in "\n" and not c.isprintable()]
    assert "a\\x1b[2J" in out
    assert "\\xff" in out


def test_tables_align_by_what_is_seen():
    lines = table(("name", "n"), [["中文", 1], ["é", None], ["e\u0301", ""]])
    assert lines == ["NAME  N", "中文  1", "é     -", "e\u0301     -"]
    assert fields([("a", 1), ("bb", None), ("ccc", "x")]) == ["a    1", "ccc  x"]


def test_amounts_and_times_are_for_people():
    assert [size(n) for n in (0, 1023, 1024, 1536 * 1024, 5 * 1024**4)] == [
        "0 B", "1023 B", "1.0 KiB", "1.5 MiB", "5.0 TiB",
    ]  # fmt: skip
    assert [duration(n) for n in (0, 59, 61, 3600, 90061)] == ["0s", "59s", "1m 1s", "1h", "1d 1h"]
    assert ago(1000060, now=1000000).endswith("(in 1m)")
    assert ago(999940, now=1000000).endswith("(1m ago)")
    assert ago(None) == ""
    assert printable("plain ü 中") == "plain ü 中"


def test_progress_is_for_terminals_only(capfd):
    with ProgressLine(enabled=False) as line:
        line.update({"stage": "x", "done": 1, "total": 2})
    assert capfd.readouterr().err == ""


def test_a_name_in_a_progress_line_is_text_and_not_markup():
    with ProgressLine(enabled=True) as line:
        line.update({"stage": "[red]x\x1b[2J", "done": 1, "total": 2, "unit": "bytes"})
        line.update({"stage": "[red]x\x1b[2J", "done": "?", "total": None})
        screen = io.StringIO()
        console = Console(file=screen, force_terminal=True, width=100, color_system="standard")
        assert line._progress is not None
        console.print(line._progress.get_renderable())
    assert "[red]x\\x1b[2J" in screen.getvalue()
    assert "\x1b[2J" not in screen.getvalue()


# -- places in shares -------------------------------------------------------------------------------------


def test_a_path_under_the_mount_point_is_a_place_in_a_share(tmp_path, monkeypatch):
    point = tmp_path / "MeshKit"
    (point / "first" / "docs").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path)
    points = [point]
    assert share_path(str(point / "first/docs"), points) == "first/docs"
    assert share_path(f"{point}/first/../first/docs/", points) == "first/docs"
    assert share_path(str(tmp_path / "link/MeshKit/first"), points) == "first"
    # What the gate refuses cannot be looked at, and is still ours by its name.
    assert share_path(str(point / "first/refused"), points) == "first/refused"
    assert share_path("first/docs", points) == "first/docs"
    monkeypatch.chdir(point / "first")
    assert share_path("docs", points) == "first/docs"
    assert share_path("./x", points) == "first/x"
    assert share_path("photos", points) == "photos"
    assert share_path(str(tmp_path), points) == str(tmp_path)
    assert mounted_at(str(point), points) is None
    assert mounted_at(str(tmp_path / "MeshKit2/first"), points) is None


def test_share_add_and_explain_take_such_a_path(run, tmp_path):
    point = tmp_path / "MeshKit"
    (point / "first").mkdir(parents=True)
    with running(tmp_path / "home", mountpoint=str(point)) as daemon:
        assert run("share", "add", str(point / "first"), "bob")[0] == 0
        assert run("explain", str(point / "first/a"))[0] == 0
        assert daemon.service.calls[0][1]["target"] == "first"
        assert daemon.service.calls[1][1] == {"path": "first/a"}


# -- passphrases ------------------------------------------------------------------------------------------


def test_a_passphrase_from_a_descriptor_is_read_once_and_kept():
    read_end, write_end = os.pipe()
    os.write(write_end, PHRASE.encode() + b"\nrest")
    os.close(write_end)
    source = PassphraseSource(read_end, {})
    assert source(PASSPHRASE_PROMPT) == PHRASE
    assert source(NEW_PASSPHRASE_PROMPT) == PHRASE
    assert PHRASE not in repr(source)
    with pytest.raises(MeshkitError) as caught:
        PassphraseSource(read_end, {})(PASSPHRASE_PROMPT)
    assert caught.value.code == "invalid_argument"


def test_a_passphrase_file_must_be_private(tmp_path):
    file = tmp_path / "phrase"
    file.write_text(PHRASE + "\n")
    file.chmod(0o600)
    environment = {"MESHKITFS_PASSPHRASE_FILE": str(file)}
    assert PassphraseSource(None, environment)(PASSPHRASE_PROMPT) == PHRASE
    file.chmod(0o640)
    with pytest.raises(MeshkitError) as caught:
        PassphraseSource(None, environment)(PASSPHRASE_PROMPT)
    assert caught.value.code == "invalid_config"
    with pytest.raises(MeshkitError) as caught:
        PassphraseSource(None, {"MESHKITFS_PASSPHRASE_FILE": str(tmp_path)})(PASSPHRASE_PROMPT)
    assert caught.value.code == "invalid_config"


def test_an_empty_passphrase_is_none():
    read_end, write_end = os.pipe()
    os.close(write_end)
    with pytest.raises(MeshkitError) as caught:
        PassphraseSource(read_end, {})(PASSPHRASE_PROMPT)
    assert caught.value.code == "identity_locked"


@pytest.mark.parametrize(
    ("written", "first", "second"),
    [("one\ntwo\n", "one", "two"), ("one\n", "one", "one"), ("one", "one", "one"), ("one\n\n", "one", "one"),
     ("one\r\ntwo", "one", "two"), ("one\ntwo\nthree\n", "one", "two")],
)  # fmt: skip
def test_a_second_passphrase_is_the_second_line(tmp_path, written, first, second):
    path = tmp_path / "phrases"
    path.write_bytes(written.encode())
    path.chmod(0o600)
    sources = [PassphraseSource(None, {"MESHKITFS_PASSPHRASE_FILE": str(path)})]
    read_end, write_end = os.pipe()
    os.write(write_end, written.encode())
    os.close(write_end)
    sources.append(PassphraseSource(read_end, {}))
    for source in sources:
        other = source.second()
        # In whichever order they are asked.
        assert other(NEW_PASSPHRASE_PROMPT) == second
        assert source(PASSPHRASE_PROMPT) == first


def test_one_passphrase_is_not_waited_for_longer_than_its_line():
    """Whoever writes it may keep the descriptor open."""
    read_end, write_end = os.pipe()
    try:
        os.write(write_end, b"one\n")
        assert PassphraseSource(read_end, {})(PASSPHRASE_PROMPT) == "one"
    finally:
        os.close(write_end)


ASK = "from meshkitfs.cli._passphrase import PassphraseSource; import sys; "
ASK += "from meshkitfs.errors import MeshkitError\n"
ASK += "try: print('got', PassphraseSource(None, {})(sys.argv[1]))\n"
ASK += "except MeshkitError as error: print('refused', error.code)"


def test_without_a_terminal_nobody_is_asked():
    ended = subprocess.run(
        [sys.executable, "-c", ASK, PASSPHRASE_PROMPT],
        input=PHRASE + "\n",
        capture_output=True,
        text=True,
        start_new_session=True,
        check=True,
    )
    assert ended.stdout == "refused identity_locked\n"


@pytest.mark.parametrize(
    ("prompt", "typed", "expected"),
    [
        (PASSPHRASE_PROMPT, ["one"], b"got one"),
        (NEW_PASSPHRASE_PROMPT, ["one", "one"], b"got one"),
        (NEW_PASSPHRASE_PROMPT, ["one", "two"], b"refused verification_failed"),
        (PASSPHRASE_PROMPT, [""], b"refused identity_locked"),
    ],
)
def test_on_a_terminal_it_is_asked_without_echo_and_a_new_one_twice(prompt, typed, expected):
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", ASK, prompt])  # noqa: S606
    seen = b""
    try:
        for answer in typed:
            while not seen.endswith(b": "):
                seen += os.read(terminal, 1000)
            assert b"one" not in seen  # nothing typed was echoed
            os.write(terminal, answer.encode() + b"\n")
            seen = b""
        while chunk := os.read(terminal, 1000):
            seen += chunk
    except OSError:  # EIO: the other end of the terminal is closed
        pass
    finally:
        os.close(terminal)
        os.waitpid(pid, 0)
    assert seen.strip() == expected


# -- doctor, mount, umount with nothing there -------------------------------------------------------------


def doctor(run) -> tuple[int, dict[str, dict[str, str]]]:
    code, out, err = run("doctor", "--json")
    assert err == ""
    data = json.loads(out)
    assert data["ok"] is (code == 0)
    for check in data["checks"]:
        assert set(check) == {"name", "status", "detail", "remedy"}
        assert check["status"] in ("ok", "info", "warn", "fail")
    return code, {check["name"]: check for check in data["checks"]}


def test_doctor_works_with_nothing_set_up_and_changes_nothing(run, tmp_path):
    code, checks = doctor(run)
    assert code in (0, 1)  # 1 where this machine cannot mount
    assert {"python", "pyfuse3", "kernel", "/dev/fuse", "home", "daemon", "mount point"} <= set(checks)
    assert checks["home"]["status"] == "info"
    assert "meshkitfs init" in checks["home"]["remedy"]
    assert "key vault passphrase-file" in checks
    assert not (tmp_path / "home").exists()
    assert "What to do:" in run("doctor")[1]


@pytest.mark.parametrize(
    ("spoil", "name", "says"),
    [
        (lambda home: home.config_path.write_text("{"), "configuration", "line 1"),
        (lambda home: home.config_path.write_text('{"version":1,"x":1}'), "configuration", "field 'x'"),
        (lambda home: home.root.chmod(0o777), "home", "mode 0777"),
        (lambda home: home.identity_file.chmod(0o644), "identity", "mode 0644"),
        (lambda home: home.blocks_dir.rmdir(), "byte store", "is not there"),
        (lambda home: home.metadata_db.unlink(), "metadata store", "is not there"),
        (
            lambda home: (home.identity_file.unlink(), home.identity_file.symlink_to("/nowhere")),
            "identity",
            "none yet",
        ),
    ],
)
def test_doctor_finds_what_is_broken(run, tmp_path, spoil, name, says):
    home = Home(tmp_path / "home")
    home.ensure()
    home.identity_file.touch(0o600)
    home.config_path.write_text('{"version": 1}')
    home.blocks_dir.mkdir()
    home.metadata_db.touch()
    before = doctor(run)[1]
    assert before[name]["status"] == "ok"
    spoil(home)
    after = doctor(run)[1]
    assert after[name]["status"] in ("fail", "warn", "info")
    assert after[name]["remedy"]
    assert says in after[name]["detail"]


def test_doctor_shows_what_the_daemon_knows(run, daemon):
    refused = {"name": "photos (bob)", "state": "refused", "reason": "share_revoked"}
    daemon.service.answers["status"] = {"shares": [refused, SHARE], "left": [{"share": "first"}]}
    _code, checks = doctor(run)
    assert checks["daemon"]["status"] == "ok"
    assert checks["share photos (bob)"]["status"] == "warn"
    assert checks["share photos (bob)"]["remedy"] == TABLE["share_revoked"].remedy
    assert "share first" not in checks
    assert "1 shares" in checks["unsent"]["detail"]


def test_doctor_survives_a_check_that_breaks(run, daemon, monkeypatch):
    daemon.service.answers["status"] = MeshkitError("metadata_unavailable", "gone")
    monkeypatch.setattr("meshkitfs.cli._doctor.preflight.check_system", lambda: 1 / 0)
    code, checks = doctor(run)
    assert code == 1
    assert checks["fuse"]["detail"] == "ZeroDivisionError"
    assert checks["daemon"] == {
        "name": "daemon",
        "status": "fail",
        "detail": "gone",
        "remedy": TABLE["metadata_unavailable"].remedy,
    }
    assert "mount point" in checks


def test_umount_of_nothing(run):
    code, _out, err = run("umount")
    assert code == 10
    assert "not_mounted" in err
    assert run("umount", "--if-needed") == (0, "", "")
    assert json.loads(run("umount", "--if-needed", "--json")[1])["unmounted"] is False


def test_umount_asks_the_daemon_waits_for_its_end_and_says_what_is_left(run, tmp_path):
    with running(tmp_path / "home", mountpoint="/mnt/nothing-there") as daemon:
        code, out, _err = run("umount", "--timeout", "9")
        assert code == 0
        assert out == "Unmounted /mnt/nothing-there. Everything is published.\n"
        assert daemon.stop_params == {"timeout": 9.0, "force": False}
        assert daemon.home.holder() is None
    with running(tmp_path / "home", mountpoint="/mnt/nothing-there") as daemon:
        daemon.stop_result = {"left": [{"share": "first", "commits": 1, "reason": "metadata_unavailable"}]}
        code, out, _err = run("umount", "--force")
        assert code == 7
        assert "first  1 commits: metadata_unavailable" in out
        assert daemon.stop_params["force"] is True


def test_umount_of_another_directory_leaves_the_daemon_alone(run, tmp_path):
    with running(tmp_path / "home", mountpoint="/mnt/nothing-there") as daemon:
        assert run("umount", str(tmp_path / "elsewhere"))[0] == 10
        assert daemon.stop_params is None


def test_mount_without_init_and_mount_of_a_mounted_home(run, tmp_path):
    code, _out, err = run("mount", "--json")
    assert (code, json.loads(err)["error"]["code"]) == (3, "not_initialized")
    point = tmp_path / "point"
    point.mkdir()
    with running(tmp_path / "home", mountpoint=str(point)) as daemon:
        daemon.home.config_path.write_text('{"version": 1}')
        code, out, _err = run("mount", str(point))
        assert (code, out) == (0, f"It is mounted at {point} already.\n")
        code, _out, err = run("mount", str(tmp_path))
        assert code == exit_code_for(MeshkitError("home_busy"))
        assert str(point) in err


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["{tmp}/none"], "mountpoint_missing"),
        (["{tmp}/full"], "mountpoint_not_empty"),
        (["{home}/inside"], "mountpoint_inside_state"),
        (["/proc"], "mountpoint_busy"),
    ],
)
@pytest.mark.skipif(not os.path.exists("/dev/fuse"), reason="/dev/fuse is not there")
def test_a_bad_mount_point_is_said_before_anything_starts(run, tmp_path, arguments, code, monkeypatch):
    home = Home(tmp_path / "home")
    home.ensure()
    home.identity_file.touch()
    home.config_path.write_text('{"version": 1, "keyVault": {"type": "passphrase-file"}}')
    (home.root / "inside").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    monkeypatch.setattr("meshkitfs.daemon.background.start", lambda *_args: pytest.fail("started"))
    places = [text.format(tmp=tmp_path, home=home.root) for text in arguments]
    _code, out, err = run("mount", *places, "--json")
    assert out == ""
    assert json.loads(err)["error"]["code"] == code


# -- speed ------------------------------------------------------------------------------------------------


def test_a_command_that_asks_the_daemon_loads_none_of_the_filesystem():
    """Nor what only few commands need: it is there at once."""
    others = (
        "trio",
        "cryptography",
        "rich",
        "apsw",
        "httpx",
        "pyfuse3",
        "importlib.metadata",
        "logging.handlers",
    )
    script = f"import sys, meshkitfs.cli; print([m for m in {others} if m in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ended.stdout == "[]\n"


def test_every_exit_code_is_documented_in_the_help(run):
    _code, out, _err = run("--help")
    table_text = out[out.index("exit codes:") : out.index("environment:")]
    for code in {exit_code_for(MeshkitError(name)) for name in TABLE}:
        assert re.search(rf"\b{code} [a-z]", table_text), code


@pytest.mark.long
def test_an_unprotected_file_is_warned_of_however_it_comes_about(run, tmp_path, monkeypatch):
    """By `init`, and by importing an identity into one: in the same words."""
    file, stores = str(tmp_path / "alice.identity"), tmp_path / "home"

    def told(*arguments):
        read, write = os.pipe()
        os.write(write, f"{PHRASE}\n".encode())
        os.close(write)
        code, _, err = run(*arguments, "--passphrase-fd", str(read))
        assert code == 0, err
        return [line for line in err.splitlines() if "without a passphrase" in line]

    (warning,) = told("init", "--identity", "alice", "--key-vault", "plain-file")
    assert warning.startswith("Warning: ")
    assert not told("identity", "export", file)
    monkeypatch.setenv("MESHKITFS_HOME", str(tmp_path / "second"))
    places = ("--provider", f"local:{stores}/blocks", "--metadata", f"{stores}/metadata.db")
    assert told("identity", "import", file, "--key-vault", "plain-file", *places) == [warning]
