"""bdh: train, run and look inside Dragon Hatchling language models.

Names are loaded when first used, so that `import bdh` and `bdh --help` stay quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "AsyncLLM": "bdh.inference.async_llm",
    "BDHConfig": "bdh.model",
    "BDHError": "bdh.errors",
    "BDHForCausalLM": "bdh.model",
    "BDHModel": "bdh.model",
    "BDHState": "bdh.model",
    "Engine": "bdh.inference.engine",
    "LLM": "bdh.inference.llm",
    "Request": "bdh.inference.request",
    "SamplingParams": "bdh.inference.sampling_params",
    "TrainConfig": "bdh.training.config",
    "byte_tokenizer": "bdh.data.tokenizer",
    "load_export": "bdh.model.export",
    "train": "bdh.training.loop",
}

__all__ = [*_HOME, "__version__"]

if TYPE_CHECKING:
    from bdh.data.tokenizer import byte_tokenizer as byte_tokenizer
    from bdh.errors import BDHError as BDHError
    from bdh.inference.async_llm import AsyncLLM as AsyncLLM
    from bdh.inference.engine import Engine as Engine
    from bdh.inference.llm import LLM as LLM
    from bdh.inference.request import Request as Request
    from bdh.inference.sampling_params import SamplingParams as SamplingParams
    from bdh.model import BDHConfig as BDHConfig
    from bdh.model import BDHForCausalLM as BDHForCausalLM
    from bdh.model import BDHModel as BDHModel
    from bdh.model import BDHState as BDHState
    from bdh.model.export import load_export as load_export
    from bdh.training.config import TrainConfig as TrainConfig
    from bdh.training.loop import train as train


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'bdh' has no attribute '{name}'")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
