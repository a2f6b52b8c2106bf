"""The metrics endpoint: a service's figures as Prometheus reads them.

Owns names and shapes.  The figures are those of `dmh.observe.report`, read from shared memory when somebody asks, in a
thread of the launcher's that touches nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from dmh.config import split_address
from dmh.errors import ServiceError
from dmh.observe.names import COUNTERS
from dmh.observe.report import Snapshot

Metric = CounterMetricFamily | GaugeMetricFamily

GAUGES: dict[str, str] = {
    "page_size": "bytes a page",
    "pages": "pages of the region",
    "limit": "local pages allowed (memory.limit)",
    "high": "local pages at which eviction starts",
    "low": "local pages at which it stops",
    "resident": "pages in the region's memory",
    "staged": "pages in the victim buffer",
    "slots": "pages that the victim buffer holds",
    "pinned": "pages kept resident by a pin",
    "allocated": "pages handed out to arrays",
    "programs": "programs that have the region mapped",
    "writers": "of the programs, those that can write to it",
    "seconds": "seconds since the service started",
}
"""Field of a snapshot -> what it is."""


class Figures(Collector):
    """The figures of one service, taken anew for every request."""

    def __init__(self, snapshot: Callable[[], Snapshot]) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        """Every figure, with the region's name as its label."""
        now = self._snapshot()
        for name, help_text in GAUGES.items():
            gauge = GaugeMetricFamily(f"dmh_{name}", help_text, labels=["region"])
            gauge.add_metric([now.name], getattr(now, name))
            yield gauge
        states = GaugeMetricFamily("dmh_pages_in_state", "pages in each state", labels=["region", "state"])
        for state, pages in now.states.items():
            states.add_metric([now.name, state], pages)
        yield states
        times = GaugeMetricFamily(
            "dmh_fault_seconds",
            "from receipt of a fault to its page's installation, an upper bound of the quantile",
            labels=["region", "quantile"],
        )
        for name, microseconds in now.fault_us.items():
            times.add_metric([now.name, f"{int(name[1:]) / 100:g}"], microseconds / 1e6)
        yield times
        for name, help_text in COUNTERS.items():
            counter = CounterMetricFamily(f"dmh_{name}", help_text, labels=["region"])
            counter.add_metric([now.name], now.counters[name])
            yield counter


def serve(address: str, snapshot: Callable[[], Snapshot]) -> Callable[[], None]:
    """Answer on an address ("host:port") from now on; returns what ends it.

    Raises:
        ServiceError: the address cannot be used.
    """
    host, port = split_address(address)
    registry = CollectorRegistry()
    registry.register(Figures(snapshot))
    try:
        server, thread = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise ServiceError(
            f"service.metrics: {address} cannot be listened on ({error.strerror}): name a free port, or off"
        ) from error

    def end() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return end
