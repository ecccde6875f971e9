"""The model card of an export: what it is, what it learned from, how good it is, how to load it."""

from bdh.model.configuration_bdh import BDHConfig

Section = tuple[str, dict[str, str]]
WRITES = {"add": "add, as published", "delta": "delta rule"}


def parameter_count(config: BDHConfig) -> int:
    """Parameters of a model of this configuration: 3 n D + 2 V D, and of its gates h (D + 2) and h (D + 1)."""
    gates = (config.n_embd + 2) * (config.decay == "gated") + (config.n_embd + 1) * (config.write == "delta")
    return 3 * config.n_neurons * config.n_embd + 2 * config.vocab_size * config.n_embd + config.n_head * gates


def state_bytes(config: BDHConfig) -> int:
    """Bytes of one sequence's synapses in float32: 4 L n D."""
    return 4 * config.n_layer * config.n_neurons * config.n_embd


def architecture(config: BDHConfig) -> dict[str, str]:
    """The sizes of a model in words."""
    return {
        "parameters": f"{parameter_count(config):,}",
        "layers": f"{config.n_layer}, sharing one set of weights",
        "width (n_embd)": f"{config.n_embd}",
        "heads (n_head)": f"{config.n_head}",
        "neurons": f"{config.n_neurons:,} in all, {config.neurons_per_head:,} a head",
        "decay of synapses": decay_text(config),
        "write rule": WRITES[config.write],
        "vocabulary": f"{config.vocab_size:,} tokens",
        "state of a sequence": f"{state_bytes(config) / 1e6:,.1f} MB in float32, whatever its length",
    }


def decay_text(config: BDHConfig) -> str:
    """Describes the decay of a model's synapses in words."""
    if config.decay == "none":
        return "none, as published"
    lives = ", ".join("never" if life is None else f"{life:g}" for life in config.decay_half_lives or [])
    how = "fixed, half-lives" if config.decay == "fixed" else "gated by the token, at initialization half-lives"
    return f"{how} {lives} (tokens, by head)"


def model_card(name: str, config: BDHConfig, sections: list[Section]) -> str:
    """A model card in Markdown.

    Args:
        name: Title.
        config: The model's.
        sections: Further sections: a heading and its rows.
    """
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- bdh\n- dragon-hatchling\n---\n",
        f"# {name}\n",
        "A Dragon Hatchling (BDH) language model: sparse positive neurons, linear attention, and a memory of synapses "
        "of constant size instead of a growing cache (Kosowski et al., [arXiv 2509.26507]"
        "(https://arxiv.org/abs/2509.26507)). Made with `bdh`.\n",
    ]
    parts += tables([("Architecture", architecture(config)), *sections])
    parts.append(
        "## How to load it\n\n"
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        "folder = '.'  # this folder\n"
        "tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)\n"
        "model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)\n"
        "prompt = tokenizer('The ', return_tensors='pt')\n"
        "print(tokenizer.decode(model.generate(**prompt, max_new_tokens=200, do_sample=True)[0]))\n"
        "```\n\n"
        "`trust_remote_code=True` runs `modeling_bdh.py` of this folder; read it first. With `bdh` installed: "
        '`bdh generate --model FOLDER --prompt "The "`.\n'
    )
    return "\n".join(parts)


def adapter_card(name: str, base: str, sections: list[Section]) -> str:
    """The card of LoRA adapters.

    Args:
        name: Title.
        base: What the model is called that they belong to.
        sections: As for `model_card`.
    """
    parts = [
        "---\nlibrary_name: peft\npipeline_tag: text-generation\ntags:\n- bdh\n- dragon-hatchling\n- lora\n---\n",
        f"# {name}\n",
        f"LoRA adapters for a Dragon Hatchling (BDH) language model: {base}, without which they are nothing. Made with "
        "`bdh`.\n",
        *tables(sections),
        "## How to load them\n\n"
        "```python\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n\n"
        "base = AutoModelForCausalLM.from_pretrained('BASE', trust_remote_code=True)  # the folder of that model\n"
        "model = PeftModel.from_pretrained(base, '.')  # this folder\n"
        "```\n",
    ]
    return "\n".join(parts)


def tables(sections: list[Section]) -> list[str]:
    """Sections as Markdown."""
    parts = []
    for heading, rows in sections:
        table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
        parts.append(f"## {heading}\n\n| | |\n| --- | --- |\n{table}\n")
    return parts
