"""The configuration of a Dragon Hatchling model, with the published field names.

This file is shipped beside `modeling_bdh.py` in every export, so it imports nothing of the `bdh` package.
"""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


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

    Raises:
        ValueError: A size is not positive, heads do not divide the neurons, or a head's neurons are odd in number.
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
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: object) -> None:
        super().__post_init__(**kwargs)
        for field in ("n_layer", "n_embd", "n_head", "mlp_internal_dim_multiplier", "vocab_size", "chunk_size"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be 1 or more")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is {self.dropout}; it must be at least 0 and below 1")
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

    @property
    def n_neurons(self) -> int:
        """Neurons of all heads (n)."""
        return self.n_embd * self.mlp_internal_dim_multiplier

    @property
    def neurons_per_head(self) -> int:
        """Neurons of one head (N)."""
        return self.n_neurons // self.n_head
