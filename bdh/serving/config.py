"""All settings of a server: the `serve:` section of a YAML file, `--serve.x.y` flags, `BDH_SERVE__X__Y` variables."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from bdh.errors import BDHError
from bdh.serving.auth.host_check import check_names

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")  # of models, keys and sessions: ends in paths, headers, logs


@dataclass
class ModelSettings:
    """One model that is served.

    Attributes:
        path: Folder of an export.
        name: Name in requests; by default that of the folder.
        device: "auto" (CUDA, then the CPU), "cpu", "cuda" or "mps"; None takes the server's.
        dtype: Data type of weights and activations: "auto", "float32" or "bfloat16"; None takes the server's.
        quantization: Quantization of the weights on the CPU: "int8", "int4" or "none"; None takes the server's.
        max_batch_size: Maximum number of running continuations; None takes the server's.
    """

    path: str
    name: str | None = None
    device: Literal["auto", "cpu", "cuda", "mps"] | None = None
    dtype: Literal["auto", "float32", "bfloat16"] | None = None
    quantization: Literal["none", "int8", "int4"] | None = None
    max_batch_size: int | None = None

    @property
    def shown_name(self) -> str:
        return self.name if self.name is not None else Path(self.path).resolve().name


@dataclass
class AuthSettings:
    """API keys. With neither a file nor `BDH_API_KEYS` in the environment, everybody who reaches the port has access.

    Attributes:
        keys_file: File written by `bdh keys add`; it is read again when it changes.
    """

    keys_file: str | None = None


@dataclass
class RequestSettings:
    """Limits of one request.

    Attributes:
        max_body_bytes: Maximum size of the body.
        max_prompt_tokens: Maximum length of one prompt. The state has the same size for any length, but reading takes
            time.
        max_prompts: Maximum number of prompts in one request of /v1/completions.
        default_max_tokens: Maximum number of generated tokens if the request has none; never more than `max_tokens`.
        max_tokens: Maximum of the number that a request may ask for.
        max_choices: Maximum of `n` or `best_of`, times the prompts of the request.
        seconds: Time from when a request is read until its response is complete.
        body_seconds: Time for a client to send the body of a request.
        idle_seconds: Time that a connection stays open without a request, or with a client that reads nothing.
    """

    max_body_bytes: int = 4 << 20
    max_prompt_tokens: int = 1 << 17
    max_prompts: int = 128
    default_max_tokens: int = 1024
    max_tokens: int = 1 << 16
    max_choices: int = 128
    seconds: float = 600.0
    body_seconds: float = 20.0
    idle_seconds: float = 30.0


@dataclass
class CorsSettings:
    """Web pages of other origins that may call this server.

    Attributes:
        origins: Origins such as "https://app.example"; "*" allows all.
    """

    origins: list[str] = field(default_factory=list)


@dataclass
class LimitSettings:
    """Rate limits of callers. Requests beyond them are refused with 429 and a Retry-After header. None is no limit.

    Attributes:
        requests_per_minute: Requests per minute of a key without a limit of its own, or of an address without keys.
        tokens_per_minute: Read and generated tokens per minute, of a key or an address likewise. A request reserves all
            tokens that it reads and may generate, is refused if fewer are left, and returns the unused ones at its end.
            A request for more than the whole limit starts only while the caller has no other in flight, and counts
            against those that follow.
        concurrent_requests: Requests in flight of a key or an address likewise, counted by each server for itself.
        address_requests_per_minute: Requests per minute from one address with any keys, including those refused for an
            invalid key, so that keys cannot be guessed fast. An IPv6 address counts with its /64 network.
        storage: Location of the counters: "memory://" for each server by itself, or "redis://HOST:PORT/DB" (or
            rediss://) for several servers together. While Redis does not answer, each server counts for itself, and the
            log has a warning.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_requests: int | None = None
    address_requests_per_minute: int | None = None
    storage: str = "memory://"


@dataclass
class SessionSettings:
    """Limits of sessions, each of which has a state of its own.

    Attributes:
        folder: Folder of saved sessions, and of those that are offloaded until they are used again. None: offloaded
            sessions are in a temporary folder, and saving is refused.
        memory_bytes: Maximum size of the states in memory. Beyond it, the least recently used session is offloaded to
            disk; while all others are in use, a session waits. One state always fits.
        max_sessions: Maximum number of sessions of one key, and of saved ones; more are refused with 429. Without keys,
            of all callers together.
        expire_seconds: Time after which an unused session ends. Saved sessions stay.
    """

    folder: str | None = None
    memory_bytes: int = 1 << 30
    max_sessions: int = 256
    expire_seconds: float = 86400.0


@dataclass
class BrainSettings:
    """Traces of the activity of neurons, for requests with `"brain": true`.

    Such a request reads its text a second time, and needs the memory of one more state while it runs. A recorded token
    takes 8 kB at the default sizes, 33 kB if the model writes by the delta rule; a trace that continues a session, or a
    prompt longer than its capacity, also has the state before its first token.

    Attributes:
        enabled: Whether requests may ask for a trace.
        max_traces: Number of traces that are kept. Beyond it, the least recently used trace of the key with most traces
            is deleted; sooner a complete one than one that is being recorded.
        max_tokens: Capacity of one trace. At most half of it is used for the last tokens of the prompt. A text that
            gets longer continues without being recorded.
    """

    enabled: bool = True
    max_traces: int = 16
    max_tokens: int = 2048


@dataclass
class LogSettings:
    """The log on stderr.

    Attributes:
        format: "json", "text", or "auto": text on a terminal, else JSON.
        level: "debug", "info", "warning" or "error".
        prompts: Whether to log prompts and responses, which may contain private data of users.
        access: Whether to log each request.
    """

    format: Literal["auto", "json", "text"] = "auto"
    level: Literal["debug", "info", "warning", "error"] = "info"
    prompts: bool = False
    access: bool = True


@dataclass
class RaySettings:
    """Replicas of the server under Ray Serve, each with all models, behind one address.

    Attributes:
        enabled: Whether to use Ray; `--ray` is short for it. It needs the extra bdh[ray].
        address: Address of a running Ray cluster, as "HOST:6379" or "auto"; bdh and the models must be on all its
            machines. None starts a cluster on this machine that ends with the server.
        min_replicas: Minimum number of replicas.
        max_replicas: Maximum number of replicas under load. Each has its own sessions, which end with it.
        target_queue: Running and waiting requests of one replica: with more on average, a replica is added; if all fit
            into fewer replicas for ten minutes, some are removed.
        cpus: Cores reserved for each replica. On the CPU a model computes with as many threads.
        gpus: GPUs reserved for each replica, or a fraction of one; None: one if there are any and models may use it.
    """

    enabled: bool = False
    address: str | None = None
    min_replicas: int = 1
    max_replicas: int = 4
    target_queue: float = 8.0
    cpus: float = 1.0
    gpus: float | None = None


@dataclass
class ServeConfig:
    """A server.

    Attributes:
        models: The models; the page starts with the first.
        host: Address to listen on. 127.0.0.1 is this machine only; 0.0.0.0 is everybody who can reach it.
        port: Port to listen on; 0 takes a free one, which the log shows.
        device: Device of models that have none: "auto" (CUDA, then the CPU), "cpu", "cuda" or "mps".
        dtype: Data type of models that have none: "auto", "float32" or "bfloat16".
        quantization: Quantization of models that have none: "none", "int8" or "int4", on the CPU.
        max_batch_size: Maximum number of running continuations of models that have none; None chooses by the device.
        prefix_cache_bytes: Size of the prefix cache of each model.
        queue_size: Continuations that may wait for a slot, for each model; more are refused with 429, except those of a
            key (or address) that has less than an equal share of the queue.
        drain_seconds: Time after SIGTERM for the requests in flight to complete.
        allowed_hosts: Names by which clients may call a server without API keys, besides localhost and IP addresses,
            such as host.docker.internal, or a name that a proxy passes on. "*" allows every name, including one that a
            web page has pointed at this server.
        trusted_proxies: Addresses whose X-Forwarded-For is trusted, or "*".
        docs: Whether /openapi.json, the description of all routes, is served.
    """

    models: list[ModelSettings] = field(default_factory=list)
    host: str = "127.0.0.1"
    port: int = 8000
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    quantization: Literal["none", "int8", "int4"] = "none"
    max_batch_size: int | None = None
    prefix_cache_bytes: int = 1 << 30
    queue_size: int = 256
    drain_seconds: float = 30.0
    allowed_hosts: list[str] = field(default_factory=list)
    trusted_proxies: list[str] = field(default_factory=lambda: ["127.0.0.1"])
    docs: bool = True
    auth: AuthSettings = field(default_factory=AuthSettings)
    requests: RequestSettings = field(default_factory=RequestSettings)
    limits: LimitSettings = field(default_factory=LimitSettings)
    sessions: SessionSettings = field(default_factory=SessionSettings)
    brain: BrainSettings = field(default_factory=BrainSettings)
    logging: LogSettings = field(default_factory=LogSettings)
    cors: CorsSettings = field(default_factory=CorsSettings)
    ray: RaySettings = field(default_factory=RaySettings)

    def model_settings(self) -> list[ModelSettings]:
        """Return the settings of all models, completed by those of the server."""
        return [
            ModelSettings(
                path=model.path,
                name=model.shown_name,
                device=model.device or self.device,
                dtype=model.dtype or self.dtype,
                quantization=model.quantization or self.quantization,
                max_batch_size=self.max_batch_size if model.max_batch_size is None else model.max_batch_size,
            )
            for model in self.models
        ]


def checked_name(name: str, what: str) -> str:
    """Return a valid name unchanged. Raises BDHError for any other text."""
    if not NAME.fullmatch(name):
        raise BDHError(
            f"{what} is {name[:80]!r}; it must begin with a letter or digit and have 64 of letters, digits, "
            "dots, dashes and underscores at most"
        )
    return name


def validate(config: ServeConfig) -> None:
    """Raises BDHError for the first invalid setting, with the name of its flag."""
    if not config.models:
        raise BDHError("there is no model to serve; name one: --model DIR, or --model NAME=DIR for each of several")
    names = [model.shown_name for model in config.models]
    for name in names:
        checked_name(name, "the model's name")
        if names.count(name) > 1:
            raise BDHError(f"two models are called {name}; give them names: --model NAME=DIR")
    check_names(config.allowed_hosts)
    if not 0 <= config.port <= 65535:
        raise BDHError(f"serve.port is {config.port}; it must be from 0 to 65535")
    positive = {
        "serve.queue_size": config.queue_size,
        **{
            f"serve.models.{model.shown_name}.max_batch_size": model.max_batch_size for model in config.model_settings()
        },
        **{f"serve.requests.{name}": value for name, value in vars(config.requests).items()},
    }
    for name, value in positive.items():
        if value is not None and value <= 0:
            raise BDHError(f"{name} is {value}; it must be more than 0")
    for name, number in (("prefix_cache_bytes", config.prefix_cache_bytes), ("drain_seconds", config.drain_seconds)):
        if number < 0:
            raise BDHError(f"serve.{name} is {number}; it must be at least 0")


def check_folders(config: ServeConfig) -> None:
    """Raises BDHError for a model whose folder is not an export."""
    for model in config.models:
        if not (Path(model.path) / "config.json").is_file():
            raise BDHError(f"--model {model.path} is no folder of an export: there is no config.json in it")
