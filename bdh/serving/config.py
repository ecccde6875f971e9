"""All settings of a server: the `serve:` section of a YAML file, `--serve.x.y` flags, `BDH_SERVE__X__Y` variables."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from bdh.errors import BDHError
from bdh.serving.activity.traces import BrainSettings
from bdh.serving.auth.host_check import check_names
from bdh.serving.auth.rate_limits import LimitSettings
from bdh.serving.identifiers import checked_name
from bdh.serving.observability.logs import LogSettings
from bdh.serving.sessions.store import SessionSettings


@dataclass
class ModelSettings:
    """One model that is served.

    Attributes:
        path: Folder of an export.
        name: What requests call it; the folder's name if it is not given.
        device: "auto" (CUDA, then the CPU), "cpu", "cuda" or "mps"; None takes the server's.
        dtype: "auto", "float32" or "bfloat16", of weights and activity; None takes the server's.
        quantization: "int8" or "int4" of the weights on the CPU, or "none"; None takes the server's.
        max_batch_size: Continuations in work at once; None takes the server's.
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
    """Who may come in. With neither a file nor `BDH_API_KEYS` in the environment, everybody who reaches the port.

    Attributes:
        keys_file: Written by `bdh keys add`; it is read again when it changes.
    """

    keys_file: str | None = None


@dataclass
class RequestSettings:
    """What one request may ask for.

    Attributes:
        max_body_bytes: Of a request's body.
        max_prompt_tokens: Of one prompt. A state costs the same however long the text, but reading it takes time.
        max_prompts: In one request of /v1/completions.
        default_max_tokens: Written at most where a request does not say; never more than `max_tokens`.
        max_tokens: That a request may ask for.
        max_choices: `n` or `best_of`, times the prompts of the request.
        seconds: From when a request is read until its answer is complete.
        body_seconds: For a client to send a request: its head, and then its body.
        idle_seconds: A connection may stay open without a request.
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
    """Which pages of other origins may call this server; none unless named.

    Attributes:
        origins: As "https://app.example"; "*" is every page there is.
    """

    origins: list[str] = field(default_factory=list)


@dataclass
class RaySettings:
    """Several copies of the server under Ray Serve, each with all models, which answer at one address as one.

    Attributes:
        enabled: Whether to; `--ray` is short for it. It needs the extra bdh[ray].
        address: Of a Ray cluster that runs, as "HOST:6379" or "auto"; bdh and the models must be on all its machines.
            None: one is made on this machine, and ends with the server.
        min_replicas: That are there at least.
        max_replicas: That are made at most, if there is much to do. Each has its own sessions, which end with it.
        target_queue: Requests of one replica, in work or waiting: where there are more on average, another replica is
            made; where all would fit into fewer replicas for ten minutes, some end.
        cpus: Cores that are set aside for each. On the CPU a model computes with as many threads.
        gpus: GPUs that are set aside for each, or a part of one; None: one if there are any and models may use it.
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
        models: Which models; the first is the one the page begins with.
        host: Address to listen on. 127.0.0.1 is this machine only; 0.0.0.0 is everybody who can reach it.
        port: To listen on; 0 takes a free one and tells it.
        device: Of models that name none: "auto" (CUDA, then the CPU), "cpu", "cuda" or "mps".
        dtype: Of models that name none: "auto", "float32" or "bfloat16".
        quantization: Of models that name none: "none", "int8" or "int4", on the CPU.
        max_batch_size: Of models that name none: continuations in work at once; None chooses by the device.
        prefix_cache_bytes: What kept states of prompts' beginnings may take, for each model.
        queue_size: Continuations that may wait for a place in the batch, for each model; more are refused with 429,
            but for those of a key (or address) that has less than an equal share of them.
        drain_seconds: After SIGTERM, for requests in work to come to their end.
        allowed_hosts: Names by which clients may call a server without API keys, besides localhost and IP addresses:
            host.docker.internal, say, or one that a proxy passes on. "*" is every name, also one that a web page has
            made its own.
        trusted_proxies: Addresses whose X-Forwarded-For is believed, or "*".
        docs: Whether /openapi.json is there, which describes all routes.
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
        """The models with the server's settings where they have none."""
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


def validate(config: ServeConfig) -> None:
    """Raises BDHError for the first setting that cannot be, named as a flag has it."""
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
    wholes = {
        "serve.queue_size": config.queue_size,
        **{
            f"serve.models.{model.shown_name}.max_batch_size": model.max_batch_size for model in config.model_settings()
        },
        **{f"serve.requests.{name}": value for name, value in vars(config.requests).items()},
    }
    for name, value in wholes.items():
        if value is not None and value <= 0:
            raise BDHError(f"{name} is {value}; it must be more than 0")
    for name, number in (("prefix_cache_bytes", config.prefix_cache_bytes), ("drain_seconds", config.drain_seconds)):
        if number < 0:
            raise BDHError(f"serve.{name} is {number}; it must be at least 0")


def check_folders(config: ServeConfig) -> None:
    """Raises BDHError for a model whose folder is none, before anything is begun."""
    for model in config.models:
        if not (Path(model.path) / "config.json").is_file():
            raise BDHError(f"--model {model.path} is no folder of an export: there is no config.json in it")
