"""The OpenAPI document: the server does what it says, whatever is sent."""

import pytest

import edgevl
from running_server import EagerScheduler, serving

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from schemathesis import GenerationMode  # noqa: E402
from schemathesis.specs.openapi.checks import positive_data_acceptance  # noqa: E402

EXAMPLES = 40
OPERATIONS = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model}"),
    ("GET", "/metrics"),
    ("GET", "/health"),
    ("GET", "/ready"),
]


@pytest.fixture(scope="module")
def document():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgevl.serve.service.Scheduler", EagerScheduler)
        with serving(lambda: edgevl.load("tiny", threads=1)) as running:
            yield schemathesis.openapi.from_url(f"{running.url}/openapi.json")


def test_all_operations_are_tried(document):
    operations = [found.ok() for found in document.get_all_operations()]
    assert sorted((found.method.upper(), found.path) for found in operations) == sorted(OPERATIONS)


@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [(*operation, GenerationMode.POSITIVE) for operation in OPERATIONS]
    + [(*operation, GenerationMode.NEGATIVE) for operation in OPERATIONS[:2]],
)
def test_every_response_is_as_documented(document, method, path, mode):
    @given(case=document[path][method].as_strategy(generation_mode=mode))
    @settings(
        max_examples=EXAMPLES if method == "POST" else 3,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    def check(case):
        body = case.body
        # Most names are of no model; with the one that is, what comes after is reached.
        if isinstance(body, dict) and isinstance(body.get("model"), str):
            body["model"] = body["model"] if len(body["model"]) > 512 else "tiny"
        # What a schema cannot say may be refused: a URL of no picture, fields that exclude others.
        case.call_and_validate(excluded_checks=[positive_data_acceptance])

    check()
