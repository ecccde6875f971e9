"""What Prometheus is told: names and units, few labels, engines read when asked, many tokens at once."""

import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from bdh.inference.stats import EngineStats
from bdh.serving.observability.metrics import Metrics
from tests.inference.small import letters, small_llm


def families(metrics: Metrics) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(metrics.render().decode())}


def value(metrics: Metrics, name: str, **labels: str) -> float:
    found = [
        sample.value
        for family in families(metrics).values()
        for sample in family.samples
        if sample.name == name and sample.labels == labels
    ]
    assert len(found) == 1, (name, labels, found)
    return found[0]


@pytest.fixture
def metrics() -> Iterator[Metrics]:
    """Of one model that has done nothing yet."""
    made = Metrics()
    made.watch("tiny", EngineStats, 4, 1000)
    yield made


def test_an_engine_is_read_when_asked_for() -> None:
    llm = small_llm(n_slots=2)
    metrics = Metrics()
    metrics.watch(
        "small",
        lambda: llm.engine.stats,
        llm.runner.n_slots,
        llm.runner.state_nbytes,
        lambda: {"prefix_cache": llm.engine.prefixes.nbytes, "sessions": 12},
    )
    assert value(metrics, "bdh_engine_slots", model="small") == 2
    assert value(metrics, "bdh_engine_finished_total", model="small") == 0
    answers = [llm.start(llm.text_request("abc", letters(max_new_tokens=5)), wants_deltas=False) for _ in range(3)]
    llm.step()
    assert value(metrics, "bdh_engine_running", model="small") == 2
    assert value(metrics, "bdh_engine_waiting", model="small") == 1
    assert value(metrics, "bdh_state_memory_bytes", model="small", place="running") == 2 * llm.runner.state_nbytes
    assert value(metrics, "bdh_state_memory_bytes", model="small", place="prefix_cache") == 0
    assert value(metrics, "bdh_state_memory_bytes", model="small", place="sessions") == 12
    llm.drop(answers.pop())
    while any(answer.unfinished for answer in answers):
        llm.step()
    assert value(metrics, "bdh_engine_finished_total", model="small") == 2
    assert value(metrics, "bdh_engine_cancelled_total", model="small") == 1
    assert value(metrics, "bdh_engine_prompt_tokens_total", model="small") == 6
    assert value(metrics, "bdh_engine_written_tokens_total", model="small") == llm.engine.stats.decode_tokens
    assert value(metrics, "bdh_state_memory_bytes", model="small", place="running") == 0


def test_what_happened_is_counted(metrics: Metrics) -> None:
    metrics.request_done("/v1/chat/completions", "tiny", 200, 0.3)
    metrics.request_done("/v1/chat/completions", "tiny", 200, 400)
    metrics.request_done("/v1/models", None, 401, 0.001)
    metrics.first_token("tiny", 0.02)
    metrics.usage("tiny", 10, 4, 7)
    metrics.refused("queue_full")
    metrics.disconnected("tiny")
    chat = {"endpoint": "/v1/chat/completions"}
    assert value(metrics, "bdh_http_requests_total", **chat, model="tiny", status="200") == 2
    assert value(metrics, "bdh_http_requests_total", endpoint="/v1/models", model="", status="401") == 1
    assert value(metrics, "bdh_http_request_duration_seconds_count", **chat) == 2
    assert value(metrics, "bdh_http_request_duration_seconds_bucket", **chat, le="600.0") == 2
    assert value(metrics, "bdh_time_to_first_token_seconds_bucket", model="tiny", le="0.01") == 0
    assert value(metrics, "bdh_time_to_first_token_seconds_bucket", model="tiny", le="0.025") == 1
    for name, tokens in (("prompt", 10), ("cached", 4), ("completion", 7)):
        assert value(metrics, f"bdh_usage_{name}_tokens_total", model="tiny") == tokens
    assert value(metrics, "bdh_requests_refused_total", reason="queue_full") == 1
    assert value(metrics, "bdh_client_disconnects_total", model="tiny") == 1


def test_token_times_take_many_at_once_and_from_many_threads(metrics: Metrics) -> None:
    name = "bdh_time_per_token_seconds"
    assert value(metrics, f"{name}_count", model="tiny") == 0  # there from the beginning, so that it has a rate
    metrics.token_times("tiny", 0.004, 1000)
    metrics.token_times("tiny", 0.005, 1)  # on a bound: belongs below it
    metrics.token_times("tiny", 100, 2)
    metrics.token_times("tiny", 0.004, 0)
    assert value(metrics, f"{name}_bucket", model="tiny", le="0.0025") == 0
    assert value(metrics, f"{name}_bucket", model="tiny", le="0.005") == 1001
    assert value(metrics, f"{name}_bucket", model="tiny", le="60.0") == 1001
    assert value(metrics, f"{name}_bucket", model="tiny", le="+Inf") == 1003
    assert value(metrics, f"{name}_count", model="tiny") == 1003
    assert value(metrics, f"{name}_sum", model="tiny") == pytest.approx(4 + 0.005 + 200)

    def work() -> None:
        for _ in range(500):
            metrics.token_times("tiny", 1, 3)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert value(metrics, f"{name}_count", model="tiny") == 1003 + 4 * 500 * 3


def test_labels_have_few_values_whatever_clients_send(metrics: Metrics) -> None:
    before = metrics.render().count(b"\n")
    for i in range(200):
        name = f'model-{i}"}} 1\nbdh_evil 1'
        metrics.request_done("/v1/completions", name, 404, 0.01)
        metrics.first_token(name, 0.1)
        metrics.token_times(name, 0.1, 1)
        metrics.usage(name, 1, 0, 1)
        metrics.disconnected(name)
    assert value(metrics, "bdh_client_disconnects_total", model="unknown") == 200
    assert metrics.render().count(b"\n") - before < 100
    assert b"evil" not in metrics.render()


def test_names_follow_the_conventions(metrics: Metrics) -> None:
    metrics.request_done("/v1/models", None, 200, 0.01)
    metrics.refused("auth")
    for name, family in families(metrics).items():
        assert name.startswith(("bdh_", "process_")), name
        assert family.documentation, name
        if family.type == "histogram":
            assert name.endswith("_seconds"), name
    buckets = {
        float(s.labels["le"]) for s in families(metrics)["bdh_time_per_token_seconds"].samples if "le" in s.labels
    }
    assert {0.001, 60.0, float("inf")} <= buckets
    assert Metrics.content_type.startswith("text/plain")


def test_two_apps_in_one_process_have_figures_of_their_own(metrics: Metrics) -> None:
    other = Metrics()
    other.watch("tiny", EngineStats, 4, 1000)
    other.disconnected("tiny")
    assert value(metrics, "bdh_client_disconnects_total", model="tiny") == 0
    assert value(other, "bdh_client_disconnects_total", model="tiny") == 1


def test_importing_it_does_not_import_torch() -> None:
    modules = "bdh.serving.observability.metrics, bdh.serving.observability.logs"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
