"""Requests made of the server's own description, right and wrong: no answer is a fault of the server.

RESULTS.md has the counts of the long run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.schemas import APIOperation
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from mmllm.serving.config import ServeConfig
from mmllm.serving.run import Server
from tests.serving_fixtures import get, served, tiny_model

CONFIG = ServeConfig(max_new_tokens=20, max_speech_characters=200, max_context=2000)
CHECKS = [
    not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance,
]  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with served(tiny_model(), CONFIG) as running:
        yield running
        assert get(f"{running.url}/health").status_code == 200


def routes(server: Server) -> list[APIOperation]:
    schema = schemathesis.openapi.from_dict(get(f"{server.url}/openapi.json").json())
    return [found.ok() for found in schema.get_all_operations()]


def ask_all(
    route: APIOperation, mode: GenerationMode, url: str, num_examples: int, session: requests.Session
) -> Counter[int]:
    """Asks a route as it describes itself, and each time also for the model that is there; the answers by status."""
    wrong = [negative_data_rejection] if mode is GenerationMode.NEGATIVE else []
    statuses: Counter[int] = Counter()

    @settings(
        max_examples=num_examples, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True,
        database=None,
    )  # fmt: skip
    @given(case=route.as_strategy(generation_mode=mode))
    def ask(case):
        answer = case.call(base_url=url, session=session)
        case.validate_response(answer, checks=[*CHECKS, *wrong])
        statuses[answer.status_code] += 1
        if isinstance(case.body, dict) and "model" in case.body:
            case.body["model"] = "tiny"
            answer = case.call(base_url=url, session=session)
            case.validate_response(answer, checks=CHECKS)
            statuses[answer.status_code] += 1

    ask()
    return statuses


def ask_everything(server: Server, mode: GenerationMode, num_examples: int) -> Counter[int]:
    statuses: Counter[int] = Counter()
    with requests.Session() as session:
        for route in routes(server):
            if mode is GenerationMode.POSITIVE or route.body:  # else nothing of it can be wrong
                statuses += ask_all(route, mode, server.url, num_examples, session)
    assert not any(status >= 500 for status in statuses)
    assert sum(statuses.values()) >= 5 * num_examples and statuses[200 if mode is GenerationMode.POSITIVE else 400]
    return statuses


MODES = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE]


@pytest.mark.parametrize("mode", MODES)
def test_the_served_schema(server, mode):
    """Requests that the schema allows, and such that it doesn't."""
    ask_everything(server, mode, 6)


@pytest.mark.proof
@pytest.mark.parametrize("mode", MODES)
def test_the_served_schema_at_length(server, mode, request):
    """As above, with many: some 10,000 requests."""
    statuses = ask_everything(server, mode, 500)
    request.node.user_properties.append((f"{mode.value} requests: answers by status", str(sorted(statuses.items()))))
