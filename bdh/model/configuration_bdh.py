"""The configuration of a Dragon Hatchling model, with the published field names.

This file is shipped beside `modeling_bdh.py` in every export, so it imports nothing of the `bdh` package.
"""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

MAX_LAYERS, MAX_HEADS, MAX_LABELS = 1024, 8192, 1024  # sizes that no shape of a weight confirms, or that come first
RANGES = {  # field: least and greatest value
    "dropout": (0.0, 1.0),
    "rope_theta": (1e-6, 1e30),
    "layer_norm_eps": (1e-30, 1.0),  # above 0: where no neuron fires, the norm of zeros would be NaN
    "initializer_range": (0.0, 1e30),
}
SHORTEST_HALF_LIFE, LONGEST_HALF_LIFE = 16.0, 1024.0  # of the heads of a model whose half-lives are not given


@strict
class BDHConfig(PreTrainedConfig):
    """Sizes and constants of a BDH model (paper: arXiv 2509.26507, the BDH-GPU form).

    Args:
        n_layer: How many times the one layer is applied (L). All layers share the same weights.
        n_embd: Width of a token's vector (D).
        n_head: Heads (h). Each holds `n_neurons / n_head` neurons.
        mlp_internal_dim_multiplier: Neurons of all heads together per unit of `n_embd`: n = n_embd * multiplier.
        vocab_size: Number of tokens (V); 256 means bytes.
        dropout: Probability of silencing a neuron's product Z = X * Y while training.
        rope_theta: Base of the rotary phases.
        layer_norm_eps: Epsilon of the parameter-free layer norms.
        initializer_range: Standard deviation of the normal distribution every weight is drawn from.
        chunk_size: Sequences longer than this many tokens are read in chunks of it, the synapses carried between
            chunks, so that cost grows linearly with length. Changes speed and memory, never the function.
        use_cache: Whether `forward` returns the state of the synapses unless told otherwise.
        decay: How synapses decay. "none": never, as published. "fixed": each head retains 2^(-1 / half-life) of its
            synapses at each token. "gated": the retention of each head depends on the token.
        decay_half_lives: Half-life of each head's synapses in tokens; None for a head that never decays. With decay
            "gated", the half-lives at initialization. None as a whole spaces the heads evenly in the logarithm, from 16
            to 1024 tokens.
        write: What a token writes into the synapses. "add": its vector x, as published. "delta": the difference between
            x and what the synapses already return for the token's key, times a write strength that depends on the
            token (the delta rule).
        training_block_size: Tokens of the blocks that the model was trained on; None if not known. It changes nothing
            about the function: a model without decay is unreliable past this length.

    Raises:
        ValueError: A size is not positive or too large, a number is NaN or out of range, heads do not divide the
            neurons, a head's neurons are odd in number, or the half-lives do not fit the heads or the decay.
    """

    model_type = "bdh"
    attribute_map = {"hidden_size": "n_embd", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer"}
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    n_layer: int = 6
    n_embd: int = 256
    n_head: int = 4
    mlp_internal_dim_multiplier: int = 128
    vocab_size: int = 256
    dropout: float = 0.1
    rope_theta: float = 65536.0
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    chunk_size: int = 512
    use_cache: bool = True
    decay: Literal["none", "fixed", "gated"] = "none"
    decay_half_lives: list[float | int | None] | None = None
    write: Literal["add", "delta"] = "add"
    training_block_size: int | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: object) -> None:
        labels = kwargs.get("num_labels") or 0
        if not isinstance(labels, int) or labels > MAX_LABELS:  # each gets a name, before anything else is looked at
            raise ValueError(f"num_labels is {labels!r}; a language model has no labels, remove it")
        super().__post_init__(**kwargs)
        for field in ("n_layer", "n_embd", "n_head", "mlp_internal_dim_multiplier", "vocab_size", "chunk_size"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be 1 or more")
        for field, most in (("n_layer", MAX_LAYERS), ("n_head", MAX_HEADS)):
            if getattr(self, field) > most:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be {most} or less")
        if self.training_block_size is not None and self.training_block_size < 1:
            raise ValueError(f"training_block_size is {self.training_block_size}; it must be 1 or more, or null")
        if self.dropout == 1.0:
            raise ValueError(f"dropout is {self.dropout}; it must be at least 0 and below 1")
        for field, (least, greatest) in RANGES.items():
            if not least <= (value := getattr(self, field)) <= greatest:  # NaN is not
                raise ValueError(f"{field} is {value}; it must be a number from {least:g} to {greatest:g}")
        if self.n_neurons % self.n_head:
            raise ValueError(
                f"n_head is {self.n_head}; it must divide the {self.n_neurons} neurons "
                f"(n_embd {self.n_embd} * mlp_internal_dim_multiplier {self.mlp_internal_dim_multiplier})"
            )
        if self.neurons_per_head % 2:
            raise ValueError(
                f"n_head is {self.n_head}, which leaves {self.neurons_per_head} neurons a head; "
                "the number must be even, because rotary phases turn neurons in pairs"
            )
        self.check_embeddings()
        self._check_half_lives()

    def check_embeddings(self) -> None:
        """Raises ValueError if the embeddings of input and output are to be one tensor, which a BDH does not have."""
        if self.tie_word_embeddings:
            raise ValueError(
                "tie_word_embeddings is true; a BDH has separate embeddings for input and output, set it to false"
            )

    def _check_half_lives(self) -> None:
        """Fills in the half-lives of a model that decays, and refuses those that do not fit."""
        if self.decay == "none":
            if self.decay_half_lives is not None:
                raise ValueError('decay_half_lives are given, but decay is "none"; set decay to "fixed" or "gated"')
            return
        if self.decay_half_lives is None:
            self.decay_half_lives = default_half_lives(self.n_head)
        if len(self.decay_half_lives) != self.n_head:
            raise ValueError(
                f"decay_half_lives has {len(self.decay_half_lives)} entries; it must have one for each of the "
                f"{self.n_head} heads (n_head)"
            )
        for half_life in self.decay_half_lives:
            if half_life is not None and not 1e-6 <= half_life < float("inf"):
                raise ValueError(f"decay_half_lives holds {half_life}; a half-life must be a positive number, or null")

    @property
    def n_neurons(self) -> int:
        """Neurons of all heads (n)."""
        return self.n_embd * self.mlp_internal_dim_multiplier

    @property
    def neurons_per_head(self) -> int:
        """Neurons of one head (N)."""
        return self.n_neurons // self.n_head

    @property
    def has_gates(self) -> bool:
        """Whether the synapses decay or are written by the delta rule."""
        return self.decay != "none" or self.write != "add"


def default_half_lives(n_head: int) -> list[float | int | None]:
    """Half-lives in tokens, one per head, evenly spaced in the logarithm."""
    if n_head == 1:
        return [(SHORTEST_HALF_LIFE * LONGEST_HALF_LIFE) ** 0.5]
    ratio = LONGEST_HALF_LIFE / SHORTEST_HALF_LIFE
    return [round(SHORTEST_HALF_LIFE * ratio ** (k / (n_head - 1)), 3) for k in range(n_head)]
