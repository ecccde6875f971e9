"""The beginning of `bdh serve`: models begin to load before this process has loaded what it needs itself."""

from bdh.inference.engine_process import EngineProcess
from bdh.serving.config import ServeConfig, check_folders, validate
from bdh.serving.model_registry import Models
from bdh.serving.observability.logs import configure_logging


def launch(config: ServeConfig, spare: EngineProcess | None) -> None:
    """Serves until a signal comes. Raises BDHError if it cannot begin, or a model cannot be loaded.

    Args:
        config: The server.
        spare: A process for the first model, if one was begun.
    """
    validate(config)
    check_folders(config)
    configure_logging(config.logging)
    models = Models(config, spare)
    try:
        models.begin()
        from bdh.serving.server import serve  # takes half a second

        serve(config, models)
    finally:
        models.abandon()
