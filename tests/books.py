"""Whether a server's books balance, as anybody can tell from its /metrics."""

import time
import urllib.request
from collections.abc import Callable

from prometheus_client.parser import text_string_to_metric_families

STANDING = {"latentd_model_state", "latentd_build_info"}
"""Gauges that say what is, not how much is under way."""


def unsettled(exposition: str) -> list[str]:
    """What contradicts rest: gauges that are not zero, and methods that began more or fewer requests than ended."""
    wrong: list[str] = []
    began: dict[str, float] = {}
    ended: dict[str, float] = {}
    for family in text_string_to_metric_families(exposition):
        if not family.name.startswith("latentd_"):
            continue
        for sample in family.samples:
            if (
                family.type == "gauge"
                and family.name not in STANDING
                and not _is_birthday(family.name)
                and sample.value
            ):
                wrong.append(f"{sample.name}{sample.labels or ''} is {sample.value:g}")
            elif sample.name == "latentd_requests_started_total":
                began[sample.labels["method"]] = sample.value
            elif sample.name == "latentd_requests_total":
                ended[sample.labels["method"]] = ended.get(sample.labels["method"], 0) + sample.value
    wrong += [
        f"{began.get(method, 0):g} requests of {method} began and {ended.get(method, 0):g} ended"
        for method in sorted(began | ended)
        if began.get(method, 0) != ended.get(method, 0)
    ]
    return wrong


def _is_birthday(name: str) -> bool:
    """Whether the Prometheus library added it, to say when a series began."""
    return name.endswith("_created")


def must_rest(exposition: Callable[[], str], patience_s: float = 10.0) -> None:
    """Wait until nothing is under way; fail if that does not come, saying what is."""
    give_up_s = time.monotonic() + patience_s
    while wrong := unsettled(exposition()):
        assert time.monotonic() < give_up_s, f"the server does not come to rest: {'; '.join(wrong)}"
        time.sleep(0.005)


def scrape(http: str) -> str:
    """The exposition of the server whose HTTP port is at HOST:PORT."""
    with urllib.request.urlopen(f"http://{http}/metrics", timeout=30) as response:
        text: str = response.read().decode()
        return text
