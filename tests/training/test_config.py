"""The configuration: flags, files, environment; and one line for every mistake."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from bdh.cli import train as cli_train
from bdh.cli.parsing import ready_configs
from bdh.cli.run_config import build_config, train_parser
from bdh.errors import BDHError
from bdh.model import BDHConfig
from bdh.training import checkpoint
from bdh.training.config import (
    LIMITS,
    SYNAPSES,
    ModelConfig,
    TrainConfig,
    TrainingConfig,
    compare,
    flatten,
    from_dict,
    validate,
)


def parse(*argv: str) -> TrainConfig:
    parser = train_parser("bdh train", "")
    return build_config(parser, parser.parse_args(list(argv)))


def test_later_files_win_and_flags_win_over_files(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("model: {n_layer: 3, n_embd: 64}\ntraining: {max_steps: 500}\n")
    (tmp_path / "b.yaml").write_text("model: {n_layer: 4}\n")
    config = parse("--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml"), "--model.n_embd", "32")
    assert (config.model.n_layer, config.model.n_embd, config.training.max_steps) == (4, 32, 500)
    assert config.data == TrainConfig().data
    early = parse("--model.n_embd=32", "--config", str(tmp_path / "a.yaml"), f"--config={tmp_path / 'b.yaml'}")
    assert early == config  # wherever they stand


def test_environment_variables_set_fields_and_flags_win_over_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BDH_TRAINING__LEARNING_RATE", "0.002")
    monkeypatch.setenv("BDH_MODEL__N_LAYER", "5")
    config = parse("--model.n_layer", "2")
    assert config.training.learning_rate == 0.002 and config.model.n_layer == 2
    monkeypatch.setenv("BDH_DATA__BLOCK_SIZE", "77")
    assert parse("--config", "quickstart").data.block_size == 128  # a file, too, wins over the environment
    assert parse("--data.corpus", "stdlib").data.block_size == 77


NAMES = [
    *("quickstart", "shakespeare", "large", "chat"),
    *("wikitext-103", "openwebtext", "fineweb-edu", "c4-en", "tinystories"),
]


@pytest.mark.parametrize("name", NAMES)
def test_ready_configurations_are_valid_and_found_by_name(name: str) -> None:
    config = parse("--config", name)
    assert config == parse("--config", ready_configs()[name])
    assert config.run_dir == f"runs/{name}" and set(ready_configs()) == set(NAMES)


def test_the_published_recipe() -> None:
    config = parse("--config", "shakespeare")
    training = config.training
    assert (training.batch_size, config.data.block_size, training.max_steps) == (32, 512, 3000)
    assert (training.learning_rate, training.weight_decay) == (1e-3, 0.1)
    assert config.model == ModelConfig(decay="none", write="add")  # the sizes are the defaults


def test_the_large_model_has_101_million_parameters() -> None:
    model = parse("--config", "large").model
    assert round(3 * model.n_embd**2 * model.mlp_internal_dim_multiplier / 1e6) == 101


def test_what_is_saved_reads_back_the_same(tmp_path: Path) -> None:
    config = parse("--config", "quickstart", "--logging.sample_prompts", "[a, 'b: c']", "--data.path", "x.txt")
    (tmp_path / "saved.yaml").write_text(yaml.safe_dump(asdict(config)))
    assert parse("--config", str(tmp_path / "saved.yaml")) == config == from_dict(asdict(config))


def test_every_number_has_a_limit_and_every_field_a_help_text(capsys: pytest.CaptureFixture[str]) -> None:
    numbers = {k for k, v in flatten(TrainConfig()).items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    assert numbers <= set(LIMITS)
    with pytest.raises(SystemExit):
        train_parser("bdh train", "").parse_args(["--help"])
    shown = capsys.readouterr().out
    for name in flatten(TrainConfig()):
        entry = shown.split(f"--{name} ", 2)[-1].split("ARG:")[0]
        words = [line for line in entry.splitlines() if line.strip() and "ENV:" not in line][1:]
        assert words and not words[0].strip().startswith("(type:"), f"{name} is not explained"


def test_model_settings_are_those_of_the_model() -> None:
    """But for new runs, whose synapses decay by default; a config.json without these fields is of a published model."""
    defaults, model = BDHConfig(), ModelConfig()
    assert (defaults.decay, defaults.write, model.decay, model.write) == ("none", "add", "gated", "delta")
    for name, value in model.architecture().items():
        if name not in SYNAPSES:
            assert getattr(defaults, name) == (value if name != "vocab_size" else 256)


MISTAKES = {
    "--model.n_lyer 3": "--model.n_lyer is not an option; did you mean --model.n_layer?",
    "--model.n_layer x": "model.n_layer is x; it must be a whole number",
    "--model.n_layer 0": "model.n_layer is 0; it must be at least 1",
    "--model.n_head 3": "model.n_head is 3; it must divide the 32768 neurons (model.n_embd 256 * model.mlp_internal_"
    "dim_multiplier 128)",
    "--model.n_head 32768": "model.n_head is 32768, which leaves 1 neurons a head (model.n_embd 256 * model.mlp_"
    "internal_dim_multiplier 128); the number must be even",
    "--model.decay fxed": "model.decay is fxed; it must be one of none, fixed, gated; did you mean fixed?",
    "--model.decay none --model.decay_half_lives [16,64,256,1024]": "model.decay_half_lives is [16, 64, 256, 1024], "
    "but model.decay is none; set it to null, or choose model.decay fixed or gated",
    "--model.decay gated --model.decay_half_lives [16,null]": "model.decay_half_lives is [16, null]; it must have an "
    "entry for each of the 4 heads (model.n_head)",
    "--model.decay fixed --model.decay_half_lives [16,0,1,2]": "model.decay_half_lives is [16, 0, 1, 2]; 0 is not a "
    "half-life: it must be a positive number of tokens, or null",
    "--model.decay fixed --model.decay_half_lives [16,x,1,2]": "model.decay_half_lives is [16.0, 'x', 1, 2]; it "
    "must be a list of numbers or nulls, or null",
    "--model.vocab_size x": "model.vocab_size is x; it must be a whole number, or null",
    "--model.dropout 1": "model.dropout is 1.0; it must be at least 0 and below 1",
    "--training.learning_rate nan": "training.learning_rate is nan; it must be a number",
    "--training.learning_rate fast": "training.learning_rate is fast; it must be a number",
    "--training.schedule cosin": "training.schedule is cosin; it must be one of cosine, constant, wsd; did you mean "
    "cosine?",
    "--training.micro_batch_size 5": "training.micro_batch_size is 5; it must divide training.batch_size 32",
    "--training.min_learning_rate 1": "training.min_learning_rate is 1.0; it must not exceed training.learning_rate "
    "0.001",
    "--training.max_steps 50": "training.max_steps is 50, too few for training.warmup_steps 100; it must be "
    "at least 100",
    "--training.schedule wsd --training.max_steps 550": "training.max_steps is 550, too few for training.warmup_steps "
    "100 and training.decay_steps 500; it must be at least 600",
    "--training.optimizer moun": "training.optimizer is moun; it must be one of adamw, muon; did you mean muon?",
    "--training.optimizer muon --distributed.strategy fsdp": "training.optimizer is muon and distributed.strategy is "
    "fsdp; muon needs each matrix whole in every process: choose training.optimizer adamw, or",
    "--training.optimizer muon --distributed.tensor_parallel 2": "training.optimizer is muon and distributed.tensor_"
    "parallel is 2; muon needs each matrix whole",
    "--training.optimizer muon --lora.rank 4 --init_from DIR": "training.optimizer is muon and lora.rank is 4; muon is "
    "for whole matrices and not for adapters: choose training.optimizer adamw",
    "--training.compile maybe": "training.compile is maybe; it must be true or false",
    "--data.train_split 1": "data.train_split is 1.0; it must be above 0 and below 1",
    "--data.corpus shakespear": "data.corpus is shakespear; it must be one of pydoc, stdlib, shakespeare; did you mean "
    "shakespeare?",
    "--config quikstart": "does not exist; did you mean quickstart?",
    "--config nowhere/at_all.yaml": "does not exist; ready ones are c4-en, chat, fineweb-edu, large, openwebtext, qu",
    "--run_dir=": "run_dir is empty; it must name a folder for the run",
    "stray": "stray is not an option",
    "--training.max_step 5": "--training.max_step is not an option; did you mean --training.max_steps?",
    "--data.path=": "data.path is empty",
    "--logging.sample_prompts [a,'']": "logging.sample_prompts has an empty prompt",
}


@pytest.mark.parametrize("flags", list(MISTAKES))
def test_a_mistake_on_the_command_line_is_one_clear_line(flags: str) -> None:
    with pytest.raises(BDHError) as caught:
        parse(*flags.split())
    assert MISTAKES[flags] in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {n_lyer: 3}", "model.n_lyer is not a setting; did you mean model.n_layer?"),
        ("trainin: {max_steps: 3}", "trainin.max_steps is not a setting; did you mean training.max_steps?"),
        ("training: {max_steps: many}", "training.max_steps is many; it must be a whole number"),
        ("model: [", "Problems parsing config"),
        ("training: {eval_interval: 0}", "training.eval_interval is 0; it must be at least 1"),
    ],
)
def test_a_mistake_in_a_file_is_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(BDHError) as caught:
        parse("--config", str(tmp_path / "bad.yaml"))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_mistake_in_the_environment_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BDH_MODEL__N_LAYER", "several")
    with pytest.raises(BDHError, match=r"model\.n_layer is several; it must be a whole number"):
        parse()


def test_a_misspelt_environment_variable_is_not_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BDH_TRAINING__MAX_STEP", "5")
    with pytest.raises(BDHError, match="BDH_TRAINING__MAX_STEP is not a setting; did you mean BDH_TRAINING__MAX_STEPS"):
        parse()


def test_a_file_that_is_no_text_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BDHError, match="is not a text file"):
        parse("--config", str(tmp_path / "bad.yaml"))


def test_a_checkpoint_that_names_no_optimizer_is_of_adamw() -> None:
    """Those of earlier versions."""
    saved = asdict(TrainConfig())
    del saved["training"]["optimizer"]
    assert compare(saved, TrainConfig()) == []
    other = TrainConfig(training=TrainingConfig(optimizer="muon"))
    with pytest.raises(BDHError, match=r"state of another optimizer: training\.optimizer adamw -> muon; keep this"):
        compare(saved, other)


def test_settings_saved_before_decay_are_of_a_model_that_never_decays() -> None:
    saved = asdict(TrainConfig(model=ModelConfig(decay="none", write="add")))
    before = from_dict(saved)
    for name in SYNAPSES:
        del saved["model"][name]
    assert from_dict(saved) == before
    assert compare(saved, before) == []
    with pytest.raises(
        BDHError, match=r"another architecture: model\.decay none -> gated, model\.write add -> delta; "
    ):
        compare(saved, TrainConfig(model=ModelConfig(decay="gated", write="delta")))


def test_chunked_is_an_earlier_name_of_the_torch_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a flag, a file, the environment and a saved run; it is not shown where values are listed."""
    expected = TrainConfig(model=ModelConfig(kernels="torch"))
    (tmp_path / "run.yaml").write_text("model:\n  kernels: chunked\n")
    assert parse("--model.kernels", "chunked") == expected
    assert parse("--config", str(tmp_path / "run.yaml")) == expected
    monkeypatch.setenv("BDH_MODEL__KERNELS", "chunked")
    assert parse() == expected
    monkeypatch.delenv("BDH_MODEL__KERNELS")
    saved = asdict(expected)
    saved["model"]["kernels"] = "chunked"
    assert from_dict(saved) == expected
    assert compare(saved, expected) == []
    with pytest.raises(SystemExit):
        parse("--help")
    assert "chunked" not in capsys.readouterr().out
    with pytest.raises(BDHError, match=r"model\.kernels is fast; it must be one of auto, reference, torch, triton$"):
        parse("--model.kernels", "fast")


def test_half_lives_are_a_list_with_an_entry_for_each_head() -> None:
    half_lives = parse("--model.decay", "fixed", "--model.decay_half_lives", "[16, 64.5, 1000, null]").model
    assert half_lives.decay_half_lives == [16.0, 64.5, 1000.0, None]
    config = BDHConfig(**half_lives.architecture() | {"vocab_size": 256})
    assert config.decay == "fixed" and config.decay_half_lives == half_lives.decay_half_lives
    assert parse("--model.decay", "gated", "--model.decay_half_lives", "null").model.decay_half_lives is None


def test_limits_hold_for_configurations_made_in_python_too() -> None:
    config = TrainConfig()
    config.training.batch_size = 0
    with pytest.raises(BDHError, match=r"training\.batch_size is 0; it must be at least 1"):
        validate(config)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[TrainConfig]:
    """The configurations that `bdh train` would have started with."""
    configs: list[TrainConfig] = []

    def finish(config: TrainConfig, checkpoint: Path | None) -> int:
        configs.append(config)
        return 0

    monkeypatch.setattr("bdh.cli.train.finish", finish)
    return configs


def test_the_environment_goes_before_what_a_run_was_saved_with(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: list[TrainConfig]
) -> None:
    saved = from_dict(checkpoint.read_state(checkpoint.find_checkpoint(finished_run))["config"])
    monkeypatch.setenv("BDH_TRAINING__MAX_STEPS", "90")
    monkeypatch.setenv("BDH_TRAINING__LEARNING_RATE", "0.002")
    (tmp_path / "more.yaml").write_text("training: {learning_rate: 0.003}\n")
    files = ["--config", str(tmp_path / "more.yaml")]
    for argv in ([], files, [*files, "--training.learning_rate", "0.004"]):
        assert cli_train.run(["--resume", str(finished_run), *argv]) == 0
    assert [config.training.learning_rate for config in started] == [0.002, 0.003, 0.004]
    expected = replace(saved, training=replace(saved.training, max_steps=90, learning_rate=0.002))
    assert replace(started[0], run_dir=saved.run_dir) == expected


def test_the_environment_goes_before_what_a_model_brings(
    finished_run: Path, monkeypatch: pytest.MonkeyPatch, started: list[TrainConfig]
) -> None:
    begin = ["--init_from", str(finished_run / "model")]
    assert cli_train.run(begin) == 0
    monkeypatch.setenv("BDH_MODEL__DROPOUT", "0.35")
    assert cli_train.run(begin) == 0
    plain, given = started
    assert plain.model.n_embd != TrainConfig().model.n_embd
    assert given == replace(plain, model=replace(plain.model, dropout=0.35))


def test_a_saved_setting_that_is_none_is_one_line(
    finished_run: Path, monkeypatch: pytest.MonkeyPatch, started: list[TrainConfig]
) -> None:
    def newer(path: Path) -> dict[str, Any]:
        return {"config": {"training": {"batch_size": 2, "of_the_future": 1}}}

    monkeypatch.setattr("bdh.training.checkpoint.read_state", newer)
    with pytest.raises(BDHError, match=r"checkpoint-\d+ has the setting training\.of_the_future, which this version"):
        cli_train.run(["--resume", str(finished_run)])
