"""`bdh serve`: models as a service."""

from dataclasses import dataclass, field
from typing import Any

from bdh.cli.parsing import Parser, ReadyConfigFile, check_environment
from bdh.errors import BDHError
from bdh.inference.engine_process import EngineProcess
from bdh.serving.config import ModelSettings, ServeConfig, check_folders, validate

USAGE = "bdh serve --model [NAME=]DIR [--model [NAME=]DIR …] [--config FILE] [options]"
DESCRIPTION = (
    "Serve models: the OpenAI API under /v1, a page to talk to them and watch them think at /, figures for Prometheus "
    "at /metrics. --model names an export, to be served by this name or by that of its folder; it may be given several "
    "times. Settings of its own follow after commas: small=DIR,quantization=int8,dtype=float32. "
    "A setting is taken from its flag, else from the `serve:` section of the last --config file that has "
    "it, else from BDH_SERVE__FIELD in the environment. --host, --port, --device, --dtype, --quantization, "
    "--max_batch_size and --keys_file are short for --serve.host and so on; --ray is --serve.ray.enabled=true."
)
SHORT = {
    **{f"--{name}": f"--serve.{name}" for name in ("host", "port", "device", "dtype", "quantization")},
    "--max_batch_size": "--serve.max_batch_size",
    "--keys_file": "--serve.auth.keys_file",
    "--ray": "--serve.ray.enabled=true",
}


@dataclass
class Settings:
    """Sections of a server's configuration file.

    Attributes:
        serve: The server.
    """

    serve: ServeConfig = field(default_factory=ServeConfig)


def run(argv: list[str]) -> int:
    spare = None
    try:
        if not {"-h", "--help", "--ray"} & {*argv}:
            spare = EngineProcess()  # starts while the settings are read
        config = parsed_config(argv)
        if not config.ray.enabled:
            serve_on_this_machine(config, spare)
            return 0
    finally:
        if spare is not None:
            spare.abandon()
    from bdh.serving.ray.deployment import serve_on_ray

    serve_on_ray(config)
    return 0


def serve_on_this_machine(config: ServeConfig, spare: EngineProcess | None) -> None:
    """Serve until a signal arrives. The models start to load before this process imports FastAPI.

    Args:
        config: Settings of the server.
        spare: A started process for the first model.

    Raises:
        BDHError: The server cannot start, or a model cannot be loaded.
    """
    from bdh.serving.model_registry import ModelRegistry
    from bdh.serving.observability.logs import configure_logging

    validate(config)
    check_folders(config)
    configure_logging(config.logging)
    models = ModelRegistry(config, spare)
    try:
        models.start_processes()
        from bdh.serving.server import serve  # takes half a second

        serve(config, models)
    finally:
        models.end_unused_processes()


def parsed_config(argv: list[str]) -> ServeConfig:
    """The settings that a command line, files and the environment give. Raises BDHError."""
    texts, others = model_flags(argv)
    parser = serve_parser()
    parsed = parser.parse_args([long_form(argument) for argument in others])
    check_environment(parser)
    settings: Any = parser.instantiate(parsed)
    config: ServeConfig = settings.serve
    if texts:
        config.models = [model_of(text) for text in texts]
    return config


def model_flags(argv: list[str]) -> tuple[list[str], list[str]]:
    """Separates the values of --model from all other arguments. Raises BDHError.

    It is no flag of the parser: that would take BDH_MODEL, and the `model:` of a file for bdh train, for it, too.
    """
    texts, others, left = [], [], iter(argv)
    for argument in left:
        name, equals, value = argument.partition("=")
        if name != "--model":
            others.append(argument)
        elif not equals and (value := next(left, "")).startswith("--"):
            raise BDHError(f"--model is followed by {value}; give NAME=DIR, or DIR")
        else:
            texts.append(value)
    return texts, others


def serve_parser() -> Parser:
    """A parser of all settings of a server."""
    parser = Parser(
        prog="bdh serve",
        usage=USAGE,
        description=DESCRIPTION,
        default_env=True,
        env_prefix="BDH",
        allow_abbrev=False,
    )
    parser.add_argument("--config", action=ReadyConfigFile, help="YAML file with a `serve:` section; later ones win")
    parser.add_class_arguments(Settings)
    return parser


def long_form(argument: str) -> str:
    """A flag's full name, where a short one was given."""
    name, equals, value = argument.partition("=")
    return SHORT.get(name, name) + equals + value


def model_of(text: str) -> ModelSettings:
    """A model as `--model` names it. Raises BDHError."""
    head, *more = text.split(",")
    name, equals, path = head.partition("=")
    given: dict[str, Any] = {"path": path, "name": name} if equals else {"path": head}
    if not given["path"]:
        raise BDHError(f"--model {text} names no folder; give NAME=DIR, or DIR")
    for setting in more:
        field_name, equals, value = setting.partition("=")
        if field_name not in MODEL_CHOICES or not equals:
            known = ", ".join(MODEL_CHOICES)
            raise BDHError(f"--model {text}: {field_name} is not a setting of a model; there are {known}")
        choices = MODEL_CHOICES[field_name]
        if choices and value not in choices:
            raise BDHError(f"--model {text}: {field_name} is {value}; it must be one of {', '.join(choices)}")
        if not choices and not value.isdigit():
            raise BDHError(f"--model {text}: {field_name} is {value}; it must be a whole number")
        given[field_name] = value if choices else int(value)
    return ModelSettings(**given)


MODEL_CHOICES: dict[str, tuple[str, ...]] = {
    "device": ("auto", "cpu", "cuda", "mps"),
    "dtype": ("auto", "float32", "bfloat16"),
    "quantization": ("none", "int8", "int4"),
    "max_batch_size": (),
}
