"""Who may reach the server: names that it answers to, and HEAD."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from export.errors import RecipeError
from pipeline.serve.__main__ import is_local, listening, main, names_of
from pipeline.serve.app import make_app
from pipeline.serve.images_request import PATH
from tests.support.serving import served

MINE = frozenset({"pictures.example.org"})


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    with served(tmp_path) as server:
        yield TestClient(make_app(server.service, None, MINE), raise_server_exceptions=False)


def ask(client: TestClient, host: str) -> list[Any]:
    """Of every kind of address: page, API, pictures, health."""
    headers = {"host": host.encode("latin-1")}
    by_url = client.post(PATH, json={"prompt": "1", "steps": 1, "response_format": "url"}, headers=headers)
    return [by_url, *(client.get(path, headers=headers) for path in ("/", "/health", "/v1/models", "/no"))]


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1:8000", "localhost", "LOCALHOST.:80", "[::1]:3", "10.0.0.7", "a.localhost", "Pictures.example.org"],
)
def test_addresses_and_own_names_are_answered(host: str, client: TestClient) -> None:
    answers = ask(client, host)
    assert [answer.status_code for answer in answers] == [200, 200, 200, 200, 404]
    assert answers[0].json()["data"][0]["url"].startswith(f"http://{host}/pictures/")


FOREIGN = [
    "evil.example",
    "localhost.evil.example",
    "127.0.0.1.evil.example:8000",
    "evil.example#localhost",
    "[::1",
    "",
]


@pytest.mark.parametrize("host", [*FOREIGN, "a b", "user@127.0.0.1", "127.0.0.1:99999", "127.0.0.1/x", "\xff"])
def test_a_page_of_a_foreign_name_gets_nothing(host: str, client: TestClient) -> None:
    """Not a picture, and no page; whatever else stands in the header is no name either."""
    for answer in ask(client, host):
        error = answer.json()["error"]
        assert answer.status_code == 421 and error["code"] == "misdirected_request"
        assert "ask for 127.0.0.1 or localhost, or start the server with --allowed-host" in error["message"]


def test_one_of_two_hosts_is_enough_to_be_refused(client: TestClient) -> None:
    hosts = [(b"host", b"localhost"), (b"host", b"evil.example")]
    assert client.get("/health", headers=hosts).status_code == 421


def test_a_server_of_this_machine_alone_asks_for_the_name() -> None:
    with listening("127.0.0.1", 0) as local, listening("0.0.0.0", 0) as open_to_all:
        assert is_local(local) and not is_local(open_to_all)
        assert names_of(local, []) == frozenset() and names_of(local, ["A.example."]) == {"a.example"}
        assert names_of(open_to_all, []) is None and names_of(open_to_all, ["a.example"]) == {"a.example"}
        with pytest.raises(RecipeError, match="--allowed-host a b is no name"):
            names_of(local, ["a b"])


def test_all_loopback_addresses_are_of_this_machine(caplog: pytest.LogCaptureFixture) -> None:
    with listening("127.0.0.2", 0) as listener:
        assert is_local(listener)
    if socket.has_ipv6 and Path("/proc/net/if_inet6").exists() and "1 " in Path("/proc/net/if_inet6").read_text():
        with listening("::1", 0) as listener:
            assert is_local(listener)


def test_a_wrong_name_is_refused_before_the_engine_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nothing", "--port", "0", "--allowed-host", "http://a.example/"]) == RecipeError.exit_code
    assert "--allowed-host http://a.example/ is no name" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["/", "/health", "/metrics", "/v1/models", "/page.js", "/openapi.json"])
def test_head_is_get_without_the_body(path: str, client: TestClient) -> None:
    head, full = (client.request(method, path, headers={"host": "localhost"}) for method in ("HEAD", "GET"))
    assert head.status_code == full.status_code == 200 and head.content == b"" and full.content
    assert head.headers["content-type"] == full.headers["content-type"]


def test_what_may_only_be_posted_has_no_head(client: TestClient) -> None:
    answer = client.head(PATH, headers={"host": "localhost"})
    assert answer.status_code == 405 and answer.headers["allow"] == "POST"
