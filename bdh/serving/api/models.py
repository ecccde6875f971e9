"""GET /v1/models: the models that are served."""

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field

from bdh.serving.api.dependencies import CurrentCaller, Models
from bdh.serving.model_registry import ServedModel

router = APIRouter(tags=["OpenAI"])


class ModelDetails(BaseModel):
    n_layer: int
    n_embd: int
    n_head: int
    n_neurons: int = Field(description="Of all heads together.")
    vocab_size: int
    n_parameters: int
    state_bytes: int = Field(description="Of one sequence's synapses, however long it is.")
    slots: int = Field(description="Continuations in work at once.")
    device: str
    dtype: str
    quantization: str | None
    chat_template: bool
    max_prompt_tokens: int
    max_tokens: int


class ModelCard(BaseModel):
    """A model, with its sizes in `bdh`."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    bdh: ModelDetails


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


@router.get("/v1/models")
async def models(models: Models, caller: CurrentCaller) -> ModelList:
    """All models that are loaded."""
    return ModelList(object="list", data=[model_card(served) for served in models.all()])


@router.get("/v1/models/{id}")
async def model(id: str, models: Models, caller: CurrentCaller) -> ModelCard:
    """One of them."""
    return model_card(models.get(id))


def model_card(served: ServedModel) -> ModelCard:
    info = served.llm.model_info
    sizes = {name: getattr(info, name) for name in ModelDetails.model_fields if hasattr(info, name)}
    details = ModelDetails(
        **sizes,
        state_bytes=info.state_nbytes,
        slots=info.n_slots,
        quantization=None if served.settings.quantization == "none" else served.settings.quantization,
        chat_template=served.llm.prompt_encoder.tokenizer.chat_template is not None,
        max_prompt_tokens=served.limits.max_prompt_tokens,
        max_tokens=served.limits.max_tokens,
    )
    return ModelCard(id=served.name, object="model", created=served.created, owned_by="bdh", bdh=details)
