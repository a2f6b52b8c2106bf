"""The metrics endpoint and `dmh stats --watch`: a running service's figures, as they are."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from regions import settings
from store_servers import free_port

import dmh
from dmh.errors import ConfigError, ServiceError
from dmh.observe.names import COUNTERS
from dmh.observe.report import Snapshot

OpenRegion = Callable[..., dmh.Region]


def scrape(port: int) -> dict[str, float]:
    """Metric -> value, of those with no label but the region."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {
        " ".join([s.name, *(value for label, value in sorted(s.labels.items()) if label != "region")]): s.value
        for s in samples
    }


def test_a_scrape_has_every_figure(open_region: OpenRegion) -> None:
    port = free_port()
    region = open_region(f"service.metrics=127.0.0.1:{port}")
    array = region.zeros(200_000)
    array[:] = np.arange(200_000)
    region.flush(array)
    assert array.sum() == 200_000 * 199_999 / 2
    while True:  # what was read ahead of the sum may still be on its way in
        before, scraped, figures = region.stats().counters, scrape(port), region.stats()
        if before == figures.counters:
            break
    for name in COUNTERS:
        assert scraped[f"dmh_{name}_total"] == figures.counters[name], name
    assert scraped["dmh_limit"] == 64
    assert scraped["dmh_resident"] == figures.resident > 0
    assert scraped["dmh_pages_in_state stored"] == figures.states["stored"] > 0
    assert 0 < scraped["dmh_fault_seconds 0.5"] < 10
    region.close()
    with pytest.raises(OSError, match="refused"):
        scrape(port)


def test_an_address_in_use_is_told() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ServiceError, match=r"service\.metrics: 127\.0\.0\.1:\d+ cannot be listened on"):
            dmh.open(settings(f"service.metrics=127.0.0.1:{taken.getsockname()[1]}"))


def test_addresses() -> None:
    assert settings("service.metrics=off").service.metrics == "off"
    assert settings("service.metrics='[::1]:9464'").service.metrics == "[::1]:9464"
    for wrong in ("9464", "host:", "127.0.0.1:70000", "http://x:1"):
        with pytest.raises(ConfigError, match=r"service\.metrics.*host:port"):
            settings(f"service.metrics='{wrong}'")


def test_watching_shows_what_changes_a_second(open_region: OpenRegion) -> None:
    region = open_region()
    array = region.zeros(200_000)
    with subprocess.Popen(
        [sys.executable, "-m", "dmh.cli.main", "stats", region.name, "--watch", "100ms"],
        stdout=subprocess.PIPE, text=True,
    ) as watching:  # fmt: skip
        assert watching.stdout is not None
        changed = None
        while changed is None:
            array[:] = 1.0
            changed = re.match(r"\s*faults +([\d,]+) +([\d,]+)$", watching.stdout.readline().rstrip())
        assert int(changed[1].replace(",", "")) > 0 < int(changed[2].replace(",", ""))
        watching.send_signal(signal.SIGINT)
        assert watching.wait(20) == 130
    region.close()


def test_watching_as_json_is_a_snapshot_a_line_and_ends_with_the_service(open_region: OpenRegion) -> None:
    region = open_region()
    command = [sys.executable, "-m", "dmh.cli.main", "stats", region.name, "--watch", "50ms", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as watching:
        assert watching.stdout is not None
        first, second = (Snapshot.from_wire(json.loads(watching.stdout.readline())) for _ in range(2))
        assert second.seconds > first.seconds
        region.close()
        _, err = watching.communicate(timeout=20)
        assert watching.returncode == 1
        assert "service" in err
        assert "Traceback" not in err
