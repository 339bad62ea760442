"""What a server tells Prometheus."""

import httpx
import pytest

from tests.support import serving


def told(http, **options):
    """The metrics by name and labels. Each one is told once, after its type."""
    text = http.get("/metrics", **options).raise_for_status().text
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    values = {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}
    assert len(values) == len(lines)
    for name in values:
        assert f"# TYPE {name.partition('{')[0]} " in text
    return values


def requests(method, route, status):
    return f'fheconv_requests_total{{method="{method}",route="{route}",status="{status}"}}'


@pytest.fixture
def http(server, tmp_path, unstarted):
    with (
        serving.serving(server, tmp_path, metrics=True) as url,
        httpx.Client(base_url=url, timeout=60) as made,
    ):
        yield made


def test_requests_are_counted_by_route_and_status_and_names_do_not_show(http):
    for _ in range(3):
        http.get("/circuit")
    http.get(f"/keys/{'a' * 64}")
    http.get('/an"y/thing')
    http.request("BREW", "/keys")
    values = told(http)
    assert values[requests("GET", "circuit", 200)] == 3
    assert values[requests("GET", "keys", 404)] == 1
    assert values[requests("GET", "other", 404)] == 1
    assert values[requests("other", "keys", 405)] == 1
    assert values[requests("GET", "circuit", 200).replace("requests", "request_seconds")] > 0
    assert "aaaa" not in http.get("/metrics").text
    assert told(http)[requests("GET", "metrics", 200)] == 2


def test_stored_keys_and_free_places_are_told(http, client):
    keys = client.evaluation_keys
    before = told(http)
    assert (before["fheconv_keys"], before["fheconv_key_bytes"]) == (0, 0)
    http.put(f"/keys/{keys.name}", content=keys.to_bytes()).raise_for_status()
    after = told(http)
    assert (after["fheconv_keys"], after["fheconv_key_bytes"]) == (1, len(keys.to_bytes()))
    assert (after["fheconv_running"], after["fheconv_waiting"], after["fheconv_places"]) == (0, 0, 9)


def test_metrics_need_the_token_and_the_option(server, tmp_path, unstarted):
    with serving.serving(server, tmp_path / "a", metrics=True, token="secret") as url:
        assert httpx.get(f"{url}/metrics").status_code == 401
        with httpx.Client(base_url=url, headers={"Authorization": "Bearer secret"}) as known:
            assert told(known)[requests("GET", "metrics", 401)] == 1
    with serving.serving(server, tmp_path / "b") as url:
        assert httpx.get(f"{url}/metrics").status_code == 404
