"""An endpoint is a route: all else that must know of it follows."""

import logging

import httpx2
import pytest
from pydantic import BaseModel

import edgevl
from edgevl.serve import app
from edgevl.serve.errors import error_responses
from edgevl.serve.requests import Strict
from running_server import EagerScheduler, serving

KEY = {"authorization": "Bearer key"}


class EchoRequest(Strict):
    """What to say."""

    text: str


class EchoReply(BaseModel):
    """What was said."""

    text: str


@pytest.fixture(scope="module")
def server():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgevl.serve.service.Scheduler", EagerScheduler)
        patch.setattr(app.api, "routes", list(app.api.routes))

        @app.api.post("/v1/echo", responses=error_responses(400, 401, 413, 415))
        async def echo(body: EchoRequest) -> EchoReply:
            """Say it again."""
            return EchoReply(text=body.text)

        limits = {"max_request_bytes": 1000, "api_key": "key"}
        with serving(lambda: edgevl.load("tiny", threads=1), **limits) as running:
            yield running


def post(server, body, **headers):
    return httpx2.post(f"{server.url}/v1/echo", json=body, headers=KEY | headers)


def test_it_answers_and_names_what_it_ignores(server):
    response = post(server, {"text": "Hello", "colour": 1})
    assert (response.status_code, response.json()) == (200, {"text": "Hello"})
    assert response.headers["x-edgevl-ignored"] == "colour"


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        ({"text": "Hello"}, {"authorization": "Bearer other"}, 401),
        ({"text": 5}, {}, 400),
        ({}, {}, 400),
        ({"text": "x" * 1000}, {}, 413),
        ({"text": "Hello"}, {"content-type": "text/plain"}, 415),
    ],
)
def test_what_stands_before_it(server, body, headers, status):
    response = post(server, body, **headers)
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_it_is_described_logged_and_counted(server, caplog):
    with caplog.at_level(logging.INFO, "edgevl.serve"):
        assert post(server, {"text": "Hello"}).status_code == 200
        metrics = httpx2.get(f"{server.url}/metrics", headers=KEY).text
    assert 'edgevl_requests_total{route="/v1/echo",status="200"}' in metrics
    lines = [record.msg for record in caplog.records if isinstance(record.msg, dict)]
    assert lines[0]["route"] == "/v1/echo"
    paths = httpx2.get(f"{server.url}/openapi.json").json()["paths"]
    assert paths["/v1/echo"]["post"]["security"] == [{"HTTPBearer": []}]
