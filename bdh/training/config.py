"""The configuration of a run: nested dataclasses that are the YAML and the command line at once.

Nothing here imports torch, so that a wrong setting is answered at once. What can be wrong with one setting by itself is
in `LIMITS`; what two settings make impossible together is in `validate`.
"""

import os
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

from bdh.data.settings import DataConfig, data_config
from bdh.distributed.config import DistributedConfig
from bdh.errors import BDHError
from bdh.kernels import KERNEL_ALIASES


@dataclass
class ModelConfig:
    """Architecture: the fields of BDHConfig, and how it is computed.

    Args:
        n_layer: How many times the shared layer is applied (L).
        n_embd: Width of a token's vector (D).
        n_head: Heads (h); must divide the neurons into even parts.
        mlp_internal_dim_multiplier: Neurons per unit of n_embd: n = n_embd * multiplier.
        vocab_size: Tokens the model knows (V); null takes the tokenizer's.
        dropout: Probability of silencing a neuron's product while training.
        rope_theta: Base of the rotary phases.
        layer_norm_eps: Epsilon of the layer norms.
        initializer_range: Standard deviation of the initial weights.
        chunk_size: Longer sequences are read in chunks of this many tokens; changes speed, not the function.
        decay: How synapses decay: none, as published; fixed, each head with a half-life of its own; gated, at a rate
            that each head computes from the token, starting from its half-life.
        decay_half_lives: Half-life of each head's synapses in tokens, as in [16, 64, 256, 1024]; null in the list is a
            head that never decays. Null as a whole spaces the heads from 16 to 1024 tokens.
        write: What a token writes into the synapses: add, its vector, as published; delta, the difference between its
            vector and what the synapses already return for its key, times a strength that each head computes from the
            token (the delta rule).
        kernels: Implementation of the layer in training: reference is the model's own code; torch computes head by head
            in PyTorch, triton in kernels for NVIDIA GPUs; auto takes torch on a CPU, and triton in bfloat16 on an H100
            or H200, where it is faster. Changes speed and memory, not the function.
    """

    n_layer: int = 6
    n_embd: int = 256
    n_head: int = 4
    mlp_internal_dim_multiplier: int = 128
    vocab_size: int | None = None
    dropout: float = 0.1
    rope_theta: float = 65536.0
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    chunk_size: int = 512
    decay: Literal["none", "fixed", "gated"] = "gated"
    decay_half_lives: list[float | None] | None = None
    write: Literal["add", "delta"] = "delta"
    kernels: Literal["auto", "reference", "torch", "triton", "chunked"] = "auto"

    def __post_init__(self) -> None:
        self.kernels = KERNEL_ALIASES.get(self.kernels, self.kernels)

    def architecture(self) -> dict[str, Any]:
        """The fields of BDHConfig."""
        return {name: value for name, value in asdict(self).items() if name != "kernels"}


@dataclass
class TrainingConfig:
    """The loop.

    Args:
        seed: Of the weights, the data order and dropout.
        device: Where to train; auto takes the GPU if there is one.
        precision: bfloat16 means autocast over float32 weights; auto takes it where the hardware has it.
        compile: Whether to compile the model with torch.compile (needs a C++ compiler; slow to start, then faster).
        gradient_checkpointing: Recompute each layer in the backward pass: less memory, about a third more work.
        max_steps: Optimizer steps of the whole run.
        batch_size: Sequences of one optimizer step, however many processes or pieces share it.
        micro_batch_size: Sequences of one forward pass of a process; gradients accumulate over the pieces. Null: all
            that are the process's own.
        optimizer: adamw for all weights; or muon, which learns from fewer tokens: Muon for the layer's matrices, AdamW
            for the rest, at one learning rate; in one process, or in several with distributed.strategy ddp.
        learning_rate: Peak learning rate.
        min_learning_rate: Where cosine and wsd end.
        schedule: cosine, constant, or wsd (constant, then a straight line down over the last steps), after the warm-up.
        warmup_steps: Steps of linear warm-up.
        decay_steps: Steps of wsd's descent.
        weight_decay: Of either optimizer, on matrices only.
        beta1: AdamW's first decay rate.
        beta2: AdamW's second decay rate.
        eps: AdamW's small number in the denominator.
        gradient_clip: Largest global norm of the gradient; 0 never clips.
        carry_state: Let each row go on where it stopped in the step before, with its synapses, until its document ends
            (truncated back-propagation through time); costs a state for each row in memory. With model.decay it has
            not lowered the loss at any position, and without decay it ruins a model: docs/memory.md.
        eval_interval: Steps between validations; each checkpoint is validated as well.
        eval_windows: Validate on this many windows, always the same; null means the whole split, the tokens after its
            last whole window included.
        eval_batch_size: Sequences of one forward pass in validation.
    """

    seed: int = 1337
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: bool = False
    gradient_checkpointing: bool = False
    max_steps: int = 3000
    batch_size: int = 32
    micro_batch_size: int | None = None
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-3
    min_learning_rate: float = 1e-4
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    warmup_steps: int = 100
    decay_steps: int = 500
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    gradient_clip: float = 1.0
    carry_state: bool = False
    eval_interval: int = 250
    eval_windows: int | None = None
    eval_batch_size: int = 8


@dataclass
class LoraConfig:
    """Fine-tuning with LoRA: adapters are trained beside the weights of init_from, which stay as they are.

    Args:
        rank: Rank of the adapters; 0 trains all weights instead.
        alpha: What the adapters add is multiplied by alpha / rank.
        dropout: Probability of silencing an adapter's input while training.
        targets: The matrices that get adapters: of encoder, encoder_v, decoder, lm_head.
    """

    rank: int = 0
    alpha: int = 16
    dropout: float = 0.0
    targets: list[Literal["encoder", "encoder_v", "decoder", "lm_head"]] = field(
        default_factory=lambda: ["encoder", "encoder_v", "decoder"]  # type: ignore[arg-type, return-value]
    )


@dataclass
class CheckpointConfig:
    """Checkpoints.

    Args:
        interval: Steps between checkpoints; one more is written at the end. They are written beside the training.
        keep: How many of the last checkpoints stay on disk; the best one stays besides.
    """

    interval: int = 500
    keep: int = 2


@dataclass
class LoggingConfig:
    """Settings of metrics, samples and trackers.

    Args:
        interval: Steps between lines of metrics.jsonl and of plain output.
        sample_interval: Steps between samples written to samples.md; 0 writes none.
        sample_prompts: What the samples go on from.
        sample_tokens: Tokens of a sample.
        sample_temperature: Its temperature; 0 always takes the likeliest token.
        parameter_interval: Steps between norms of each parameter and of its gradient; 0 takes none.
        activity_windows: Windows of the validation text that are looked into at each validation, for how active the
            neurons are; 0 looks into none.
        peak_tflops: What one GPU could do at best, in 10^12 floating-point operations a second, for the model FLOP
            utilisation; null takes what is known of the GPU.
        trackers: Where figures go besides the run's folder; each is an extra to install, as pip install 'bdh[wandb]'.
        tracking_mode: online sends them where the tracker's own settings say; offline keeps them in the run's folder;
            disabled uses no tracker.
        project: What trackers group runs by.
    """

    interval: int = 10
    sample_interval: int = 500
    sample_prompts: list[str] = field(default_factory=lambda: ["The ", "In "])
    sample_tokens: int = 200
    sample_temperature: float = 0.7
    parameter_interval: int = 100
    activity_windows: int = 4
    peak_tflops: float | None = None
    trackers: list[Literal["tensorboard", "wandb", "trackio", "mlflow"]] = field(default_factory=list)
    tracking_mode: Literal["online", "offline", "disabled"] = "online"
    project: str = "bdh"


@dataclass
class TrainConfig:
    """A run.

    Args:
        run_dir: The run's folder: configuration, checkpoints, metrics, samples, curves and the export.
        init_from: The folder of an export to begin with, or of a run or a checkpoint: its weights, its sizes, and its
            tokenizer. Null begins with random weights.
        model: Architecture.
        data: Text.
        training: The loop.
        lora: Fine-tuning with LoRA.
        checkpoint: Checkpoints.
        logging: Output.
        distributed: Several processes.
    """

    run_dir: str = "runs/bdh"
    init_from: str | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)


# Fields that say how synapses decay and are written. A run that begins with a model (init_from) may change them.
SYNAPSES = ("decay", "decay_half_lives", "write")

# What a checkpoint cannot be resumed, or averaged, without sharing.
ARCHITECTURE = (
    "n_layer",
    "n_embd",
    "n_head",
    "mlp_internal_dim_multiplier",
    "vocab_size",
    "rope_theta",
    "layer_norm_eps",
    *SYNAPSES,
)

# Values of settings that runs of earlier versions did not save, where they are not the defaults of new runs.
BEFORE: dict[str, dict[str, Any]] = {"model": {"decay": "none", "decay_half_lives": None, "write": "add"}}

# What adapters cannot be taken up again without.
ADAPTERS = ("lora.rank", "lora.alpha", "lora.targets")

# field: (smallest value, largest value, whether these two themselves are allowed)
Limit = tuple[float, float, str]
_INF = float("inf")
LIMITS: dict[str, Limit] = {
    "model.n_layer": (1, _INF, "[]"),
    "model.n_embd": (1, _INF, "[]"),
    "model.n_head": (1, _INF, "[]"),
    "model.mlp_internal_dim_multiplier": (1, _INF, "[]"),
    "model.vocab_size": (1, _INF, "[]"),
    "model.dropout": (0, 1, "[)"),
    "model.rope_theta": (0, _INF, "()"),
    "model.layer_norm_eps": (0, _INF, "()"),
    "model.initializer_range": (0, _INF, "()"),
    "model.chunk_size": (1, _INF, "[]"),
    "data.train_split": (0, 1, "()"),
    "data.block_size": (1, _INF, "[]"),
    "data.shuffle_blocks": (1, 1 << 20, "[]"),
    "data.num_workers": (0, 256, "[]"),
    "data.num_proc": (1, 1024, "[]"),
    "training.seed": (0, 2**63 - 1, "[]"),
    "training.max_steps": (1, _INF, "[]"),
    "training.batch_size": (1, _INF, "[]"),
    "training.micro_batch_size": (1, _INF, "[]"),
    "training.learning_rate": (0, _INF, "()"),
    "training.min_learning_rate": (0, _INF, "[)"),
    "training.warmup_steps": (0, _INF, "[]"),
    "training.decay_steps": (1, _INF, "[]"),
    "training.weight_decay": (0, _INF, "[)"),
    "training.beta1": (0, 1, "[)"),
    "training.beta2": (0, 1, "[)"),
    "training.eps": (0, _INF, "[)"),
    "training.gradient_clip": (0, _INF, "[)"),
    "training.eval_interval": (1, _INF, "[]"),
    "training.eval_windows": (1, _INF, "[]"),
    "training.eval_batch_size": (1, _INF, "[]"),
    "lora.rank": (0, _INF, "[]"),
    "lora.alpha": (1, _INF, "[]"),
    "lora.dropout": (0, 1, "[)"),
    "checkpoint.interval": (1, _INF, "[]"),
    "checkpoint.keep": (1, _INF, "[]"),
    "logging.interval": (1, _INF, "[]"),
    "logging.sample_interval": (0, _INF, "[]"),
    "logging.sample_tokens": (1, _INF, "[]"),
    "logging.sample_temperature": (0, _INF, "[)"),
    "distributed.shards": (1, _INF, "[]"),
    "distributed.tensor_parallel": (1, _INF, "[]"),
    "distributed.timeout_seconds": (1, 1e6, "[]"),
    "logging.parameter_interval": (0, _INF, "[]"),
    "logging.activity_windows": (0, _INF, "[]"),
    "logging.peak_tflops": (0, _INF, "()"),
}


def validate(config: TrainConfig) -> None:
    """Refuses a configuration that cannot run.

    Raises:
        BDHError: One line that names the field, its value, and what is allowed.
    """
    settings = flatten(config)
    for name, limit in LIMITS.items():
        check_limit(name, settings[name], limit)

    model, training = config.model, config.training
    neurons = model.n_embd * model.mlp_internal_dim_multiplier
    sizes = f"model.n_embd {model.n_embd} * model.mlp_internal_dim_multiplier {model.mlp_internal_dim_multiplier}"
    if neurons % model.n_head:
        raise BDHError(f"model.n_head is {model.n_head}; it must divide the {neurons} neurons ({sizes})")
    if neurons // model.n_head % 2:
        raise BDHError(
            f"model.n_head is {model.n_head}, which leaves {neurons // model.n_head} neurons a head ({sizes}); "
            "the number must be even"
        )
    _check_half_lives(model)
    if training.micro_batch_size is not None and training.batch_size % training.micro_batch_size:
        raise BDHError(
            f"training.micro_batch_size is {training.micro_batch_size}; it must divide training.batch_size "
            f"{training.batch_size}"
        )
    if config.lora.rank and config.distributed.tensor_parallel > 1:
        raise BDHError("lora.rank and distributed.tensor_parallel are both given; adapters are not split by heads")
    if config.distributed.strategy == "ddp" and (config.distributed.shards or config.distributed.cpu_offload):
        name = "shards" if config.distributed.shards else "cpu_offload"
        raise BDHError(f"distributed.{name} is for distributed.strategy fsdp; leave it out, or choose fsdp")
    _check_optimizer(config)
    if training.min_learning_rate > training.learning_rate:
        raise BDHError(
            f"training.min_learning_rate is {training.min_learning_rate}; it must not exceed training.learning_rate "
            f"{training.learning_rate}"
        )
    falling = training.warmup_steps + (training.decay_steps if training.schedule == "wsd" else 0)
    if falling > training.max_steps:
        raise BDHError(
            f"training.max_steps is {training.max_steps}, too few for training.warmup_steps {training.warmup_steps}"
            + (f" and training.decay_steps {training.decay_steps}" if training.schedule == "wsd" else "")
            + f"; it must be at least {falling}"
        )
    if config.init_from == "":
        raise BDHError("init_from is empty; it must name the folder of an export, or be left out")
    if config.lora.rank and config.init_from is None:
        raise BDHError(
            f"lora.rank is {config.lora.rank}, but there is no model to fine-tune; name one: --init_from DIR"
        )
    if config.lora.rank and not config.lora.targets:
        raise BDHError("lora.targets is empty; it must name a matrix at least, as in [encoder, encoder_v, decoder]")
    if not config.run_dir:
        raise BDHError("run_dir is empty; it must name a folder for the run")
    _check_data(config)
    if any(not prompt for prompt in config.logging.sample_prompts):
        raise BDHError("logging.sample_prompts has an empty prompt; each needs a character at least")
    if not config.logging.project:
        raise BDHError("logging.project is empty; it must name what trackers group runs by")
    _check_text(config)


def _check_half_lives(model: ModelConfig) -> None:
    """Refuses half-lives that do not fit the decay or the heads."""
    half_lives = model.decay_half_lives
    if half_lives is None:
        return
    given = f"model.decay_half_lives is {_list_text(half_lives)}"
    if model.decay == "none":
        raise BDHError(f"{given}, but model.decay is none; set it to null, or choose model.decay fixed or gated")
    if len(half_lives) != model.n_head:
        raise BDHError(
            f"{given}; it must have an entry for each of the {model.n_head} heads (model.n_head), or be null for 16 to "
            "1024 tokens"
        )
    if wrong := [value for value in half_lives if value is not None and not 0 < value < _INF]:
        raise BDHError(f"{given}; {wrong[0]:g} is not a half-life: it must be a positive number of tokens, or null")


def _list_text(values: list[float | None]) -> str:
    """A list of numbers as YAML shows it."""
    return f"[{', '.join('null' if value is None else f'{value:g}' for value in values)}]"


def _check_optimizer(config: TrainConfig) -> None:
    """Refuses Muon where its step would not be the one that a single process takes, or was not tried.

    It takes a matrix as a whole. Of one that is spread it would step each part by itself (large matrices under fsdp are
    pieces), or with sums of bfloat16 that come out otherwise by a hundredth.
    """
    distributed = config.distributed
    if config.training.optimizer != "muon":
        return
    if config.lora.rank:
        raise BDHError(
            f"training.optimizer is muon and lora.rank is {config.lora.rank}; muon is for whole matrices and not for "
            "adapters: choose training.optimizer adamw"
        )
    if distributed.strategy == "fsdp" or distributed.tensor_parallel > 1:
        name = "strategy" if distributed.strategy == "fsdp" else "tensor_parallel"
        given = f"distributed.{name} is {getattr(distributed, name)}"
        raise BDHError(
            f"training.optimizer is muon and {given}; muon needs each matrix whole in every process: choose "
            "training.optimizer adamw, or copies of the model (distributed.strategy ddp, tensor_parallel 1)"
        )


def _check_data(config: TrainConfig) -> None:
    """Refuses texts that are not named, or that cannot be mixed as asked."""
    data = config.data
    if data.path == "":
        raise BDHError("data.path is empty; it must name a file, a folder or a dataset, or be left out")
    if data.tokenizer == "":
        raise BDHError("data.tokenizer is empty; it must name a folder or a tokenizer on the hub, or be left out")
    if data.path is not None and data.mixture:
        raise BDHError(f"data.path is {data.path} and data.mixture is given too; leave one of them out")
    if data.chat and data.path is None:
        what = "each of data.mixture, not for all" if data.mixture else "data.path, which is missing"
        raise BDHError(f"data.chat true is for {what}; it says that rows are conversations")
    for number, source in enumerate(data.mixture):
        if not source.path:
            raise BDHError(f"data.mixture has no path at number {number + 1}")
        check_limit(f"data.mixture weight of {source.path}", source.weight, (0, _INF, "()"))
    if data.streaming and data.train_split > 0.9999 and not all(s.validation_split for s in data.sources()):
        raise BDHError(
            f"data.train_split is {data.train_split}; of a stream it must be at most 0.9999, or name a "
            "data.validation_split"
        )
    if config.training.carry_state and len(data.mixture) > 1:
        raise BDHError("training.carry_state true reads one text from beginning to end; leave data.mixture out")
    if config.training.carry_state and config.training.compile:
        raise BDHError("training.carry_state and training.compile are both true; choose one of them")


def _check_text(config: TrainConfig) -> None:
    """Refuses text that UTF-8 cannot hold: file names in another encoding, half characters in prompts."""
    data = config.data
    texts = {
        "run_dir": config.run_dir,
        "init_from": config.init_from or "",
        "data.path": data.path or "",
        "data.cache_dir": data.cache_dir,
    }
    texts |= {"data.tokenizer": data.tokenizer or "", "data.mixture": "".join(entry.path for entry in data.mixture)}
    texts |= {
        "logging.sample_prompts": "".join(config.logging.sample_prompts),
        "logging.project": config.logging.project,
    }
    for name, text in texts.items():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BDHError(f"{name} is not valid UTF-8 at character {error.start}; use another name") from error


def check_limit(name: str, value: Any, limit: Limit) -> None:
    """Refuses a value outside its limit; None is always allowed. Raises BDHError."""
    low, high, brackets = limit
    if value is None:
        return
    above = value > low or (value == low and brackets[0] == "[")
    below = value < high or (value == high and brackets[1] == "]")
    if not (above and below):  # NaN fails both
        lower = f"{'at least' if brackets[0] == '[' else 'above'} {low:g}"
        upper = "" if high == _INF else f" and {'at most' if brackets[1] == ']' else 'below'} {high:g}"
        raise BDHError(f"{name} is {value}; it must be {lower}{upper}")


def flatten(config: TrainConfig) -> dict[str, Any]:
    """All settings as `section.field: value`, in the order they are declared."""
    flat: dict[str, Any] = {}
    for entry in fields(config):
        value = getattr(config, entry.name)
        if is_dataclass(value) and not isinstance(value, type):
            flat.update({f"{entry.name}.{key}": setting for key, setting in asdict(value).items()})
        else:
            flat[entry.name] = value
    return flat


def with_earlier_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """Saved settings, with the values that a run of an earlier version had for settings that it did not save."""
    return {**settings, **{name: {**values, **settings.get(name, {})} for name, values in BEFORE.items()}}


def from_dict(settings: dict[str, Any]) -> TrainConfig:
    """The configuration that `dataclasses.asdict` made `settings` from.

    Settings that it lacks take the values that they had before they were settings, else their defaults.
    """
    settings = with_earlier_defaults(settings)
    sections: dict[str, Any] = {
        "model": ModelConfig,
        "data": lambda **given: data_config(given),
        "training": TrainingConfig,
        "lora": LoraConfig,
        "checkpoint": CheckpointConfig,
        "logging": LoggingConfig,
        "distributed": DistributedConfig,
    }
    parts: dict[str, Any] = {name: kind(**settings.get(name, {})) for name, kind in sections.items()}
    return TrainConfig(run_dir=settings["run_dir"], init_from=settings.get("init_from"), **parts)


def with_vocabulary(config: TrainConfig, tokens: int) -> TrainConfig:
    """The configuration with `model.vocab_size` filled in; refuses one smaller than the tokenizer's."""
    size = config.model.vocab_size
    if size is not None and size < tokens:
        raise BDHError(f"model.vocab_size is {size}; it must be at least {tokens}, the tokens of the tokenizer")
    return replace(config, model=replace(config.model, vocab_size=tokens if size is None else size))


def with_whole_path(config: TrainConfig) -> TrainConfig:
    """The configuration with all paths of this disk from the root, so that a run can be taken up from any folder."""
    data = config.data
    mixture = [replace(source, path=_whole(source.path)) for source in data.mixture]
    return replace(
        config,
        init_from=_whole(config.init_from),
        data=replace(data, path=_whole(data.path), tokenizer=_whole(data.tokenizer), mixture=mixture),
    )


def _whole(path: Any) -> Any:
    """A path from the root if it begins with something that is here; a name on the hub, or nothing, as it is."""
    if path is None or "://" in path:
        return path
    local = Path(path).expanduser()
    here = local.exists() or any(mark in path for mark in "*?[") or path.startswith(("/", "~", "."))
    return os.path.abspath(local) if here else path  # noqa: PTH100 - a glob must not be resolved


def compare(saved: dict[str, Any], config: TrainConfig) -> list[str]:
    """Lists the differences between a checkpoint's configuration and the current one, one line each.

    Raises:
        BDHError: The architecture or the adapters differ, and all differing fields are named; or the optimizer does,
            whose state would not fit; or the model to begin with, which is not read any more.
    """
    before, now = flatten(from_dict(saved)), flatten(config)
    different = [name for name in now if before[name] != now[name] and name != "run_dir"]
    clashes = [name for name in different if name.removeprefix("model.") in ARCHITECTURE]
    if clashes:
        listed = ", ".join(f"{name} {before[name]} -> {now[name]}" for name in clashes)
        raise BDHError(f"the checkpoint has another architecture: {listed}; keep these settings, or begin a new run")
    if any(name in different for name in ADAPTERS):
        listed = ", ".join(f"{name} {before[name]} -> {now[name]}" for name in ADAPTERS if name in different)
        raise BDHError(f"the checkpoint has other adapters: {listed}; keep these settings, or begin a new run")
    if "training.optimizer" in different:
        raise BDHError(
            f"the checkpoint has the state of another optimizer: training.optimizer {before['training.optimizer']} -> "
            f"{now['training.optimizer']}; keep this setting, or begin a new run with the weights: --init_from DIR"
        )
    if "init_from" in different and not now["lora.rank"]:
        raise BDHError(
            f"init_from is {now['init_from']}, but a run that goes on has its weights from the checkpoint; leave it out"
        )
    return [f"{name} was {before[name]} and is now {now[name]}" for name in different]
