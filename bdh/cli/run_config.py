"""The configuration of a run from flags, YAML files and environment variables."""

from typing import Any

from bdh.cli.parsing import Parser, ReadyConfigFile, check_environment, ready_configs, refuse_nulls
from bdh.training.config import TrainConfig, validate


def train_parser(prog: str, description: str) -> Parser:
    """A parser of all settings of a run: flags, YAML files in order, and BDH_SECTION__FIELD variables."""
    parser = Parser(prog=prog, description=description, default_env=True, env_prefix="BDH", allow_abbrev=False)
    ready = ", ".join(sorted(ready_configs()))
    parser.add_argument(
        "--config",
        action=ReadyConfigFile,
        help=f"YAML file, or a ready configuration ({ready}); may be given several times, later ones win",
    )
    parser.add_class_arguments(TrainConfig)
    return parser


def build_config(parser: Parser, parsed: Any) -> TrainConfig:
    """The parsed settings as a validated TrainConfig. Raises BDHError."""
    check_environment(parser)
    settings = parser.instantiate(parsed)
    config = TrainConfig(**{name: getattr(settings, name) for name in TrainConfig.__dataclass_fields__})
    refuse_nulls(config)
    validate(config)
    return config
