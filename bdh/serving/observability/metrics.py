"""Prometheus metrics of a server. Each `Metrics` has its own registry, so that several apps can share a process.

Labels have few values, whatever clients send: a model that is not served here is "unknown", and requests are counted by
the template of their route. The engines' figures are read when they are asked for, and cost nothing before.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, Info, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from bdh import __version__

if TYPE_CHECKING:
    from bdh.inference.stats import EngineStats

UNKNOWN = "unknown"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60)
LONG_SECONDS = (*SECONDS[3:], 120, 300, 600)  # of whole requests

GAUGES = {  # figure of EngineStats: name and what it says
    "running": ("bdh_engine_running", "Continuations that have a slot."),
    "waiting": ("bdh_engine_waiting", "Continuations that wait for a slot."),
}
COUNTS = {
    "finished": ("bdh_engine_finished", "Requests whose continuations all came to an end."),
    "cancelled": (
        "bdh_engine_cancelled",
        "Requests that were given up, as their clients went away or they took too long.",
    ),
    "preempted": ("bdh_engine_preempted", "Continuations that gave up their slot to another client for a while."),
    "prefill_tokens": ("bdh_engine_prompt_tokens", "Tokens of prompts that were read; without those saved."),
    "decode_tokens": ("bdh_engine_written_tokens", "Tokens that were written."),
    "prefix_hits": ("bdh_prefix_cache_hits", "Requests whose prompt began with a kept state."),
    "prefix_tokens_saved": ("bdh_prefix_cache_saved_tokens", "Tokens of prompts that need not be read again."),
}


@dataclass(frozen=True)
class Watched:
    """An engine, and what else of its model keeps states."""

    stats: "Callable[[], EngineStats]"
    slots: int
    state_nbytes: int
    extra: Callable[[], Mapping[str, float]] | None
    resident: Callable[[], float]
    loaded: float

    def figures(self) -> "tuple[EngineStats, dict[str, float]]":
        """The engine's figures, and the bytes of states by where they are."""
        stats = self.stats()
        running = stats.running * self.state_nbytes
        memory = {
            "running": float(running),
            "idle_slots": float(max(0, stats.slots_nbytes - running)),
            "preempted": float(stats.preempted_nbytes),
        }
        return stats, memory | dict(self.extra() if self.extra is not None else {})


class Engines(Collector):
    """Reads the figures of all engines at the moment they are asked for."""

    def __init__(self) -> None:
        self.watched: dict[str, Watched] = {}

    def describe(self) -> list[Metric]:
        return []  # or they would be read when they are registered

    def collect(self) -> Iterator[Metric]:
        engines = [(model, engine, *engine.figures()) for model, engine in list(self.watched.items())]
        slots = GaugeMetricFamily("bdh_engine_slots", "Continuations that can be in work at once.", labels=["model"])
        memory = GaugeMetricFamily(
            "bdh_state_memory_bytes", "What states take, by where they are kept.", labels=["model", "place"]
        )
        resident = GaugeMetricFamily(
            "bdh_engine_resident_memory_bytes", "Memory of an engine's own process.", labels=["model"]
        )
        loaded = GaugeMetricFamily(
            "bdh_engine_loaded_memory_bytes",
            "Of that memory, what there was when the model was loaded: its weights and the program.",
            labels=["model"],
        )
        for model, engine, _, places in engines:
            loaded.add_metric([model], engine.loaded)
            slots.add_metric([model], engine.slots)
            resident.add_metric([model], engine.resident())
            for place, size in places.items():
                memory.add_metric([model, place], size)
        yield from (slots, memory, resident, loaded)
        for kind, table in ((GaugeMetricFamily, GAUGES), (CounterMetricFamily, COUNTS)):
            for field, (name, words) in table.items():
                family = kind(name, words, labels=["model"])
                for model, _, stats, _ in engines:
                    family.add_metric([model], getattr(stats, field))
                yield family


class TokenTimes(Collector):
    """A histogram that takes many equal observations at once, as the library's cannot."""

    def __init__(self, name: str, words: str, bounds: Sequence[float]):
        self.name, self.words = name, words
        self.bounds = [*bounds, float("inf")]
        self.counts: dict[str, list[int]] = {}
        self.sums: dict[str, float] = {}
        self.lock = Lock()

    def describe(self) -> list[Metric]:
        return [HistogramMetricFamily(self.name, self.words, labels=["model"])]

    def begin(self, model: str) -> None:
        with self.lock:
            self.counts.setdefault(model, [0] * len(self.bounds))
            self.sums.setdefault(model, 0.0)

    def observe(self, model: str, seconds: float, count: int) -> None:
        self.begin(model)
        place = bisect_left(self.bounds, seconds)
        with self.lock:
            self.counts[model][place] += count
            self.sums[model] += seconds * count

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self.name, self.words, labels=["model"])
        with self.lock:
            for model, counts in self.counts.items():
                sums = [sum(counts[: i + 1]) for i in range(len(counts))]
                buckets = list(zip(map(floatToGoString, self.bounds), sums, strict=True))
                family.add_metric([model], buckets, self.sums[model])
        yield family


class Metrics:
    """The figures of one server. May be used from several threads.

    A model is named as in the request; None where the request names none.
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.engines = Engines()
        self.registry.register(self.engines)
        ProcessCollector(registry=self.registry)
        Info("bdh_build", "The version that runs.", registry=self.registry).info({"version": __version__})
        self.requests = self._counter("bdh_http_requests", "Answered requests.", "endpoint", "model", "status")
        self.request_seconds = self._histogram(
            "bdh_http_request_duration_seconds",
            "From a request's head to the end of its answer.",
            LONG_SECONDS,
            "endpoint",
        )
        self.first_tokens = self._histogram(
            "bdh_time_to_first_token_seconds", "From a request's head to its first token.", SECONDS, "model"
        )
        self.token_seconds = TokenTimes(
            "bdh_time_per_token_seconds", "From one token of a continuation to the next.", SECONDS
        )
        self.registry.register(self.token_seconds)
        self.prompt_tokens = self._counter("bdh_usage_prompt_tokens", "Tokens of prompts, as told to clients.", "model")
        self.cached_tokens = self._counter("bdh_usage_cached_tokens", "Those of them that were kept.", "model")
        self.completion_tokens = self._counter(
            "bdh_usage_completion_tokens", "Tokens written, as told to clients.", "model"
        )
        self.refusals = self._counter("bdh_requests_refused", "Requests that were turned away.", "reason")
        self.disconnects = self._counter(
            "bdh_client_disconnects", "Clients that went away before their answer was complete.", "model"
        )

    def watch(
        self,
        model: str,
        stats: "Callable[[], EngineStats]",
        slots: int,
        state_nbytes: int,
        extra: Callable[[], Mapping[str, float]] | None = None,
        resident: Callable[[], float] = lambda: 0.0,
        loaded: float = 0.0,
    ) -> None:
        """Makes a model known, and its engine's figures part of what is told.

        Args:
            model: Its name.
            stats: The engine's figures now.
            slots: Continuations that it can have in work at once.
            state_nbytes: Of one state.
            extra: Bytes of what else keeps states, by a name of the place: {"prefix_cache": 0, "sessions": 0}.
            resident: Memory of the engine's own process.
            loaded: What that was when the model was loaded.
        """
        self.engines.watched[model] = Watched(stats, slots, state_nbytes, extra, resident, loaded)
        for labelled in (self.prompt_tokens, self.cached_tokens, self.completion_tokens, self.disconnects):
            labelled.labels(model)  # what is there from the beginning has a rate from its first count on
        self.first_tokens.labels(model)
        self.token_seconds.begin(model)

    # ------------------------------------------------------------------------------------------------ what happened

    def request_done(self, endpoint: str, model: str | None, status: int, seconds: float) -> None:
        """A request is answered, or its client is gone (status 499). `endpoint` is the template of its route."""
        self.requests.labels(endpoint, self._known(model), str(status)).inc()
        self.request_seconds.labels(endpoint).observe(seconds)

    def first_token(self, model: str, seconds: float) -> None:
        """The first token of a request came after so long."""
        self.first_tokens.labels(self._known(model)).observe(seconds)

    def token_times(self, model: str, seconds_per_token: float, count: int) -> None:
        """So many tokens came, each so long after the one before it."""
        if count > 0:
            self.token_seconds.observe(self._known(model), seconds_per_token, count)

    def usage(self, model: str, prompt: int, cached: int, completion: int) -> None:
        """The tokens that a client was told of."""
        known = self._known(model)
        self.prompt_tokens.labels(known).inc(prompt)
        self.cached_tokens.labels(known).inc(cached)
        self.completion_tokens.labels(known).inc(completion)

    def refused(self, reason: str | None) -> None:
        """Counts a refused request by the short name of the reason; None is not counted."""
        if reason is not None:
            self.refusals.labels(reason).inc()

    def disconnected(self, model: str | None) -> None:
        """A client went away before its answer was complete."""
        self.disconnects.labels(self._known(model)).inc()

    def render(self) -> bytes:
        """All figures now, in Prometheus' text format."""
        return generate_latest(self.registry)

    # ------------------------------------------------------------------------------------------------ how it is kept

    def _known(self, model: str | None) -> str:
        if model is None:
            return ""
        return model if model in self.engines.watched else UNKNOWN

    def _counter(self, name: str, words: str, *labels: str) -> Counter:
        return Counter(name, words, labels, registry=self.registry)

    def _histogram(self, name: str, words: str, bounds: Sequence[float], *labels: str) -> Histogram:
        return Histogram(name, words, labels, registry=self.registry, buckets=bounds)
