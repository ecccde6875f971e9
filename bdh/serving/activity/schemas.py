"""Responses about the activity of neurons: pydantic models that document /v1/brain and produce its JSON."""

from pydantic import BaseModel, Field


class BrainToken(BaseModel):
    """A token that was read or written."""

    index: int = Field(description="In the trace, from 0.")
    id: int = Field(description="Of the token in the vocabulary.")
    text: str = Field(description="Bytes that are a part of a character are written as <0xE2>.")
    prompt: bool
    share: list[float] = Field(description="Of each layer, which part of its neurons was active.")
    raster: list[str] = Field(
        description="Of each layer, base64 of one byte for each bin of neurons, in their order: 0 if all of them were "
        "silent, else ceil(255 * sqrt(a / sqrt(n_embd))), 255 at most, where a is the largest activity among them. "
        "Each bin has ceil(n_neurons / 256) neurons, but for the last, which may have fewer."
    )


class BrainReference(BaseModel):
    """Id of the trace of a whole response."""

    trace: str


class BrainChunk(BrainReference):
    """Activity in a chunk of a stream. Tokens beyond the capacity of the trace are omitted."""

    tokens: list[BrainToken]


class BrainTrace(BrainChunk):
    """A whole trace."""

    model: str
    n_layer: int
    n_head: int
    n_neurons: int = Field(description="Of all heads together; neuron k of head i has the number i * n / n_head + k.")
    bins: int = Field(description="Of a raster.")
    tokens: list[BrainToken]


class NeuronActivity(BaseModel):
    neuron: int
    activity: float


class BrainSynapse(BaseModel):
    """A connection from one neuron to another of its head. A negative strength keeps the receiver from firing."""

    sender: int = Field(alias="from")
    receiver: int = Field(alias="to")
    strength: float


class Source(BaseModel):
    index: int
    text: str
    weight: float


class BrainLayer(BaseModel):
    """Activity of a token in a layer. All lists begin with the strongest, by absolute value."""

    layer: int
    active: int = Field(description="Number of active neurons.")
    share: float = Field(description="Share of active neurons.")
    neurons: list[NeuronActivity] = Field(description="The most active neurons.", max_length=32)
    written: list[BrainSynapse] = Field(description="Synapses that the token changed.", max_length=16)
    read: list[BrainSynapse] = Field(
        description="Input of the receivers from the past, because the senders fired.", max_length=16
    )
    sources: list[Source] = Field(description="Earlier tokens with the largest weights.", max_length=16)
    log_decay: list[float] | None = Field(
        description="Of each head, the logarithm of the part of its synapses that the token retains; null if no "
        "synapses decay."
    )
    write_strength: list[float] | None = Field(
        description="Of each head, how much of the difference between the token's vector and what the synapses already "
        "return is written, from 0 to 1; null if the model does not write by the delta rule."
    )


class TokenDetails(BaseModel):
    """Activity at one token, in all layers."""

    index: int
    id: int
    text: str
    layers: list[BrainLayer]


class TokenActivity(BaseModel):
    index: int
    text: str
    activity: float


class NeuronDetails(BaseModel):
    """Tokens that excited one neuron."""

    layer: int
    neuron: int
    head: int
    fired: int = Field(description="Number of tokens that excited it.")
    of: int = Field(description="Number of recorded tokens.")
    tokens: list[TokenActivity] = Field(description="Tokens that excited it most.", max_length=32)
