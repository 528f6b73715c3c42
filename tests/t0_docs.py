"""The documents keep up with the code: codes, commands, fields, constants, tests and links that they name."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import importlib
import os
import re
import shlex
from pathlib import Path

import pytest

from meshkitfs import cli, errors, server
from meshkitfs.cli import _parser
from meshkitfs.daemon import config
from meshkitfs.errors import TABLE
from meshkitfs.gate import Trace
from meshkitfs.metadata import EmbeddedMetadata
from meshkitfs.metadata.service import Service
from meshkitfs.providers import _options, _spec
from meshkitfs.vfs import _xattrs

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])
NAMES = [path.relative_to(ROOT).as_posix() for path in DOCUMENTS]


def text_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


def without_code(text):
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def rows(name):
    """The cells of every table row of a document, without the rule below a heading."""
    lines = without_code(text_of(name)).splitlines()
    cells = [re.split(r"(?<!\\)\|", line.strip().strip("|")) for line in lines if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in cells if not set("".join(row)) <= set("-: ")]


def anchors(text):
    """The anchors of the headings, as code hosts make them from the words."""
    found = set()
    for heading in re.findall(r"^#+ (.*)$", without_code(text), flags=re.MULTILINE):
        words = re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", heading).lower())
        found.add(words.replace(" ", "-"))
    return found


def commands():
    """Every command of the grammar with its parser: ``{"share add": parser, ...}``."""

    def walk(parser, path):
        groups = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        if not groups:
            return {" ".join(path): parser}
        return {
            name: found
            for word, below in groups[0].choices.items()
            for name, found in walk(below, [*path, word]).items()
        }

    return walk(_parser.build_parser(), [])


# == docs/operations.md ==================================================================================


def test_every_code_is_explained_with_its_errno_and_exit_code():
    explained = {row[0].strip("`"): row for row in rows("docs/operations.md") if len(row) == 5}
    explained.pop("code")
    assert explained.keys() == TABLE.keys()
    for code, (_, number, leave, when, _) in explained.items():
        names = {name for name in dir(errno) if getattr(errno, name) == TABLE[code].errno}
        assert number in names, code
        assert int(leave) == errors.exit_code_for(errors.MeshkitError(code)), code
        assert len(when) > 10, code


def test_from_every_word_that_a_program_says_a_way_leads_to_the_codes():
    """Each errno of a code is among the symptoms, and each group of codes is linked from there."""
    listed = {
        (name, word)
        for row in rows("docs/troubleshooting.md")
        if len(row) == 4 and row[0].startswith('"')
        for name, word in zip(
            re.findall(r"\bE[A-Z]+", row[1]), re.findall(r'"([^"]+)"', row[0]), strict=False
        )
    }
    for code, reason in TABLE.items():
        names = {name for name in dir(errno) if getattr(errno, name) == reason.errno}
        assert any((name, os.strerror(reason.errno)) in listed for name in names), code
    by_code = text_of("docs/operations.md").partition("### By code")[2]
    groups = re.findall(r"^#### (.*)$", by_code, flags=re.MULTILINE)
    linked = set(re.findall(r"operations\.md#([\w-]+)", text_of("docs/troubleshooting.md")))
    assert len(groups) > 5
    assert [group for group in groups if not anchors(f"## {group}") <= linked] == []


def test_codes_that_the_symptoms_name_exist():
    named = set(
        re.findall(r"`([a-z]+_[a-z_]+)`", text_of("docs/troubleshooting.md") + text_of("docs/faq.md"))
    )
    assert len(named) > 20
    assert named <= TABLE.keys()


def test_every_field_of_the_configuration_is_listed():
    listed = {row[0].strip("`") for row in rows("docs/operations.md")}
    assert {name.partition(".")[0] for name in listed} >= set(config.FIELDS)
    assert {"provider.store", "metadata.path", "keyVault.type", "mount.point"} <= listed
    assert all(kind in text_of("docs/operations.md") for kind in config.KEY_VAULTS)


def test_the_example_configuration_is_valid(tmp_path):
    (example,) = re.findall(r"```json\n(.*?)```", text_of("docs/operations.md"), flags=re.DOTALL)
    read = config.loads(example.encode(), tmp_path)
    assert read.key_vault is not None
    assert read.provider.directories() == [tmp_path / "blocks"]


def jsonc_examples():
    return re.findall(r"```jsonc\n(.*?)```", text_of("docs/operations.md"), flags=re.DOTALL)


def test_the_other_examples_are_valid_too(tmp_path):
    examples = [text for text in jsonc_examples() if '"listen"' not in text]
    assert examples
    for example in examples:
        config.loads(example.encode(), tmp_path)


def test_every_field_of_a_byte_store_is_listed():
    text = text_of("docs/operations.md").partition("## Byte stores")[2].partition("\n## ")[0]
    for kind in _spec.KINDS:
        assert f"`{kind}`" in text_of("docs/operations.md"), kind
        for field in dataclasses.fields(_spec._options(kind)):
            name = _options._json_name(field.name)
            assert f"`{name}`" in text or f"`provider.{name}`" in text_of("docs/operations.md"), (kind, name)


def test_the_fields_and_the_example_of_the_services_configuration(tmp_path):
    (example,) = [text for text in jsonc_examples() if '"listen"' in text]
    path = tmp_path / "service.json"
    path.write_text(example)
    settings = server.load(path, {})
    assert settings.database_secret.file == tmp_path / "database.secret"
    defaults = server.Settings()
    assert (settings.identity_rate, settings.address_rate) == (defaults.identity_rate, defaults.address_rate)
    assert (settings.quotas, settings.join) == (defaults.quotas, defaults.join)
    listed = {name for row in rows("docs/operations.md") for name in re.findall(r"`(\w+)`", row[0])}
    assert set(server.settings.FIELDS) <= listed


def test_every_route_of_the_service_is_described_and_no_others(tmp_path):
    home = EmbeddedMetadata.create(tmp_path / "metadata.db")
    service = Service(home, server.Settings().quotas)
    gate = server._app.build(service, server._hub.Hub(home.database), server.Settings(), None, print)
    routes = {
        (method.upper(), re.sub(r"\{\w+\}", "{}", path))
        for path, methods in gate._app.openapi()["paths"].items()
        for method in methods
    }
    home.close()
    text = text_of("docs/service.md")
    written = set(re.findall(r"`[A-Z]* ?(/v1/[\w/{}-]*)", text)) | set(re.findall(r"`(/v1/[\w/{}-]*)", text))
    written = {re.sub(r"\{\w+\}", "{}", path) for path in written}
    for name in ("timestamp", "head", "retention"):
        assert f"`{name}`" in text
        written.add("/v1/shares/{}/" + name)
    assert {("GET", "/v1/health"), ("POST", "/v1/changes")} <= routes
    assert {path for _, path in routes} == written


def test_constants_have_the_value_that_is_written_down():
    named = [row for row in rows("docs/operations.md") if row[0].startswith("`meshkitfs.")]
    assert len(named) > 20
    for name, value, _ in named:
        module, _, constant = name.strip("`").rpartition(".")
        assert repr(getattr(importlib.import_module(module), constant)) == value, name


# == docs/cli.md =========================================================================================


def sections(text):
    """The text below each third-level heading, by command."""
    parts = re.split(r"^### `meshkitfs (.*)`$", text, flags=re.MULTILINE)
    bodies = zip(parts[1::2], parts[2::2], strict=True)
    return {name: re.split(r"^##", body, flags=re.MULTILINE)[0] for name, body in bodies}


def test_every_command_and_option_is_described_and_no_others():
    described = sections(text_of("docs/cli.md"))
    assert described.keys() == commands().keys()
    shared = {"--json", "--home", "--config", "--passphrase-fd", "--help"}
    assert all(f"`{option}" in text_of("docs/cli.md") for option in shared)
    for name, parser in commands().items():
        options = {
            option
            for action in parser._actions
            if action.help is not argparse.SUPPRESS
            for option in action.option_strings
            if option.startswith("--")
        }
        written = set(re.findall(r"`(--[a-z-]+)", described[name]))
        assert written == options - shared, name


def test_every_exit_code_is_listed():
    listed = {int(row[0]) for row in rows("docs/cli.md") if len(row) == 2 and row[0].isdigit()}
    special = {1, 130, 141}  # doctor, Ctrl-C, nobody reads the output
    assert listed == {0, *errors._EXIT_CODES.values()} | special


# == docs/concepts.md ====================================================================================


def test_the_steps_of_the_gate_are_in_their_order():
    steps = [step["step"] for step in Trace().as_list()]
    listed = [row[0] for row in rows("docs/concepts.md") if len(row) == 3]
    assert [name for name in listed if name in steps] == steps


def test_every_attribute_is_listed():
    text = text_of("docs/concepts.md")
    assert [name for name in _xattrs._NAMES if f"`user.meshkit.{name}`" not in text] == []


# == all of them =========================================================================================


@pytest.mark.parametrize("name", NAMES)
def test_internal_links_resolve(name):
    text = without_code(text_of(name))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        place, _, anchor = target.partition("#")
        path = (ROOT / name).parent / place if place else ROOT / name
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("name", NAMES)
def test_tests_that_are_cited_exist(name):
    for file, test in re.findall(r"(tests/\w+\.py)::(\w+)", text_of(name)):
        assert re.search(rf"^ *(async )?def {test}\(", text_of(file), flags=re.MULTILINE), f"{file}::{test}"


@pytest.mark.parametrize("name", NAMES)
def test_files_that_are_named_exist(name):
    for path in re.findall(r"`((?:meshkitfs|tests|docs|benchmarks)/[\w/.]*)`", text_of(name)):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("name", NAMES)
def test_every_command_line_that_is_shown_is_understood(name):
    text = text_of(name)
    shown = re.findall(r"`meshkitfs ([^`]+)`", without_code(text).replace("\n", " "))
    for block in re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL):
        shown += re.findall(r"^(?:bob|[\w./]*meshkitfs) +(.*)$", block, flags=re.MULTILINE)
    for line in shown:
        words = shlex.split(re.sub(r" \d?[<>].*", "", line), comments=True)
        if words[0] not in ("COMMAND", "--version") and line not in commands():
            _parser.build_parser().parse_args(words)


def test_the_help_and_the_documents_are_of_one_program():
    assert callable(cli.main)
    assert f"## {importlib.import_module('meshkitfs').__version__}" in text_of("CHANGELOG.md")
