"""schemathesis asks the service everything its OpenAPI description allows, and much that it does not."""

import os
from collections import Counter

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from service import Person, Service

CHECKS = (
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
)
EXAMPLES = int(os.environ.get("MESHKIT_TEST_EXAMPLES", "8"))


class Signing(requests.auth.AuthBase):
    """Signs whatever schemathesis has made up, as a member would."""

    def __init__(self, person):
        self.person = person

    def __call__(self, prepared):
        body = prepared.body.encode() if isinstance(prepared.body, str) else prepared.body
        url = prepared.url.removeprefix(self.person.service.url)
        kept = {
            k: v for k, v in prepared.headers.items() if k.lower() not in ("signature", "signature-input")
        }
        signed = self.person.signed(prepared.method, url, content=body)
        prepared.headers.clear()
        prepared.headers.update(kept)
        for name in ("signature", "signature-input", "content-digest"):
            if name in signed.headers:
                prepared.headers[name] = signed.headers[name]
        return prepared


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    place = tmp_path_factory.mktemp("fuzz")
    config = place / "service.json"
    plenty = '{"perSecond": 100000, "burst": 100000}'
    config.write_text(f'{{"rates": {{"identity": {plenty}, "address": {plenty}}}}}')
    with Service(place / "metadata.db", config=config) as running:
        yield running
        assert running.process.poll() is None
        assert running.stop() == 0
        assert running.said == ""  # nothing was worth a line in the log


@pytest.fixture(scope="module")
def alice(service):
    return Person("alice", service).join()


@pytest.fixture(scope="module")
def api(service):
    described = service.get("/openapi.json").json()
    # The signature is made here, when the request is: no tool could make one up.
    for methods in described["paths"].values():
        for operation in methods.values():
            operation.pop("security", None)
    schema = schemathesis.openapi.from_dict(described)
    schema.config.update(base_url=service.url)
    return schema


def every_operation(api, examples, check):
    """Give ``check`` that many made-up requests for each operation, good and bad ones."""
    failures, operations = [], 0
    for found in api.get_all_operations():
        operation = found.ok()
        operations += 1
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):

            @settings(
                max_examples=examples,
                deadline=None,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def ask(case):
                check(case)

            try:
                ask()
            except Unsatisfiable:
                assert mode is GenerationMode.NEGATIVE  # nothing about it can be wrong
            except (AssertionError, BaseExceptionGroup) as error:
                failures.append(f"{operation.method.upper()} {operation.path} {mode}: {_text(error)}")
    assert operations > 30
    assert not failures, "\n\n".join(failures)


def _text(error):
    inner = getattr(error, "exceptions", ())
    return "; ".join(map(_text, inner)) if inner else str(error)[:1500]


def test_a_member_asks_anything(api, alice):
    statuses = Counter()

    def check(case):
        if case.path == "/v1/changes" and isinstance(case.body, dict):
            wait = case.body.get("wait")
            if type(wait) is int and 1 < wait <= 30:
                case.body["wait"] = 1  # nothing will happen
        response = case.call(auth=Signing(alice), timeout=60)
        if response.status_code != 401 or case.path != "/v1/identities/{handle}":
            statuses[response.status_code] += 1  # a record there may be anybody's
        case.validate_response(response, checks=list(CHECKS))

    every_operation(api, EXAMPLES, check)
    assert 401 not in statuses  # else it has not come far
    assert {200, 201, 204, 400, 403, 404} <= statuses.keys(), statuses


def test_a_stranger_asks_anything(api):
    def check(case):
        response = case.call()
        if case.path not in ("/v1/service", "/v1/health"):
            assert response.status_code in (401, 413)
        case.validate_response(response, checks=[not_a_server_error, status_code_conformance])

    every_operation(api, 3, check)
