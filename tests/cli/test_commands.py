"""Every command as a user runs it."""

import importlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bdh import __version__
from bdh.cli.main import COMMANDS
from bdh.model.export import load_export, load_model_only
from bdh.training.checkpoint import find_checkpoint
from bdh.training.export import load_model
from bdh.training.run_log import read_metrics
from tests.conftest import GOLDEN, TEXT, TINY, Run, environment


def test_help_answers_within_a_second(bdh: Run) -> None:
    times = []
    for _ in range(3):
        started = time.monotonic()
        done = bdh("--help")
        times.append(time.monotonic() - started)
    assert min(times) < 1.0
    assert done.returncode == 0 and done.stderr == ""
    assert all(name in done.stdout for name in COMMANDS) and "bdh quickstart" in done.stdout
    assert bdh().stdout == done.stdout
    assert bdh("--version").stdout == f"bdh {__version__}\n"


def test_help_loads_no_torch(bdh: Run) -> None:
    for argv in (["--help"], ["train", "--help"]):
        script = f"import sys\nfrom bdh.cli.main import main\ntry:\n main({argv!r})\nexcept SystemExit: pass\n"
        script += "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment())
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", list(COMMANDS))
def test_each_command_explains_itself(command: str, bdh: Run) -> None:
    done = bdh(command, "--help")
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith(f"usage: bdh {command} ")


def test_the_console_command_is_installed() -> None:
    done = subprocess.run([Path(sys.executable).parent / "bdh", "--version"], capture_output=True, text=True)
    assert done.stdout == f"bdh {__version__}\n"


def test_print_config_shows_what_would_run(bdh: Run) -> None:
    done = bdh("train", "--config", "quickstart", "--training.max_steps", "77", "--print_config")
    assert done.returncode == 0 and "max_steps: 77" in done.stdout and "run_dir: runs/quickstart" in done.stdout


def test_export_of_a_run_and_of_a_checkpoint(finished_run: Path, tmp_path: Path, bdh: Run) -> None:
    done = bdh("export", finished_run, "from_run")
    assert done.returncode == 0 and done.stderr == ""
    best = find_checkpoint(finished_run, prefer="best")
    assert done.stdout == f"from_run is the export of {best}\n"
    oldest = finished_run / "checkpoints" / "checkpoint-0000030"
    assert bdh("export", oldest, "from_checkpoint").returncode == 0
    for source, folder in ((best, "from_run"), (oldest, "from_checkpoint")):
        exported, _ = load_export(tmp_path / folder)
        expected, _ = load_model(source)
        assert all(torch.equal(a, b) for a, b in zip(exported.parameters(), expected.parameters(), strict=True))
    card = (tmp_path / "from_checkpoint" / "README.md").read_text()
    for phrase in ("# run at step 30", "text.txt", "30 of 40", "bits per byte", "0.003, cosine", "trust_remote_code"):
        assert phrase in card


def test_generate(finished_run: Path, bdh: Run) -> None:
    model = finished_run / "model"
    arguments = ["generate", "--model", model, "--prompt", "The 1 ", "--max_new_tokens", 40, "--seed", 4]
    done = bdh(*arguments)
    assert done.returncode == 0 and done.stderr == "" and done.stdout.startswith("The 1 ")
    assert bdh(*arguments).stdout == done.stdout
    streamed = bdh(*arguments, "--stream")
    assert streamed.returncode == 0 and streamed.stdout.rstrip("\n").startswith("The 1 ")
    assert streamed.stdout == done.stdout
    greedy = ["generate", "--model", model, "--prompt", "-", "--max_new_tokens", 10, "--temperature", 0]
    assert bdh(*greedy, input="The ").stdout == bdh(*greedy[:4], "The ", *greedy[5:]).stdout


def test_generate_streams_while_it_writes(finished_run: Path, tmp_path: Path) -> None:
    command = ["generate", "--model", finished_run / "model", "--prompt", "T", "--max_new_tokens", 3000, "--stream"]
    process = subprocess.Popen(
        [sys.executable, "-m", "bdh", *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    assert process.stdout is not None
    assert process.stdout.read(5) and process.poll() is None  # text is there while it still writes
    process.stdout.close()  # the reader goes away, as `| head` does
    assert process.wait(timeout=120) == 141
    assert process.stderr is not None and b"Traceback" not in process.stderr.read()


HELP = [
    *({"keys", "tokenizer"} ^ set(COMMANDS)),
    *(f"tokenizer {name}" for name in ("train", "info", "encode", "decode")),
]


@pytest.mark.parametrize("command", sorted(HELP))
def test_help_shows_types_in_words(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    name, *rest = command.split()
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"bdh.cli.{name}").run([*rest, "--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and shown.startswith("usage: ")
    assert not re.search(r"<(class|function|locals)|lambda| at 0x|\(\)(?! reads)", shown)


@pytest.mark.parametrize(
    "command", ["--help", "info --help", "tokenizer decode bytes 65", "generate --model {model} --prompt a"]
)
def test_a_closed_stdout_is_one_line(finished_run: Path, command: str) -> None:
    arguments = command.format(model=finished_run / "model").split()
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, "-m", "bdh", *arguments],
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 2
    assert re.fullmatch(r"bdh( \w+)?: error: the output cannot be written: Bad file descriptor\n", done.stderr)


def test_closed_streams_are_opened_so_that_no_file_takes_their_numbers(tmp_path: Path) -> None:
    script = (
        "import sys; from bdh.cli.main import open_closed_streams as opened; opened(); "
        f"file = open({str(tmp_path / 'a')!r}, 'w'); print('lost', file=sys.stderr); file.write(str(file.fileno())); "
        "file.write(repr(sys.stdin.read()))"
    )
    subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", script], check=True)
    assert (tmp_path / "a").read_text() == "3''"


def test_eval_of_a_file_and_of_a_corpus(finished_run: Path, tmp_path: Path, bdh: Run) -> None:
    (tmp_path / "known.txt").write_text(TEXT[:5000])
    (tmp_path / "strange.txt").write_text("zqxj" * 1000)
    known = bdh(
        "eval", "--model", finished_run / "model", "--data.path", "known.txt", "--data.block_size", 16, "--json"
    )
    assert known.returncode == 0 and known.stderr == "", known.stderr
    figures = json.loads(known.stdout)
    assert figures["tokens"] == 5000  # all bytes but the first, and the end of the text
    strange = bdh(
        "eval", "--model", finished_run / "model", "--data.path", "strange.txt", "--data.block_size", 16, "--json"
    )
    assert json.loads(strange.stdout)["bits_per_byte"] > figures["bits_per_byte"] + 1
    spoken = bdh("eval", "--model", finished_run / "model", "--data.corpus", "pydoc", "--batch_size", 64)
    assert spoken.returncode == 0 and spoken.stdout.startswith("pydoc: loss ") and "bits per byte" in spoken.stdout


def test_eval_gives_the_figure_training_gave(tmp_path: Path, bdh: Run) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "validation.txt").write_text(TEXT[int((len(TEXT) + 1) * 0.9) :])
    whole = ["--training.eval_windows", "null", "--training.precision", "float32"]
    done = bdh("train", "--data.path", "text.txt", "--run_dir", "run", *TINY, *whole)
    assert done.returncode == 0, done.stderr
    trained = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "validation_loss" in r][-1]
    given = ["eval", "--model", "run/model", "--data.path", "validation.txt", "--data.block_size", 16, "--json"]
    scored = json.loads(bdh(*given).stdout)
    assert scored["loss"] == pytest.approx(trained["validation_loss"], rel=1e-6)
    assert scored["accuracy"] == trained["accuracy"]


def test_convert_there_and_back(tmp_path: Path, bdh: Run) -> None:
    weights = {
        k.removeprefix("weights."): v for k, v in load_file(GOLDEN / "small.safetensors").items() if "weights" in k
    }
    torch.save(weights, tmp_path / "published.pt")
    done = bdh("convert", "published.pt", "export", "--n_layer", 3)
    assert done.returncode == 0 and done.stdout == "export is the export of published.pt\n", done.stderr
    assert bdh("convert", "export", "back.safetensors", "--to-published").returncode == 0
    back = load_file(tmp_path / "back.safetensors")
    assert all(torch.equal(back[name], tensor) for name, tensor in weights.items())
    assumed = bdh("convert", "published.pt", "assumed")
    assert "notice: the file does not say how many layers" in assumed.stdout
    again = bdh("convert", "back.safetensors", "again")  # the configuration now comes from the file
    assert "notice" not in again.stdout and load_model_only(tmp_path / "again").config.n_layer == 3


def test_average_is_the_mean(finished_run: Path, tmp_path: Path, bdh: Run) -> None:
    folder = finished_run / "checkpoints"
    a, b = folder / "checkpoint-0000030", folder / "checkpoint-0000040"
    done = bdh("average", a, b, "--output", "mean")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    mean, _ = load_export(tmp_path / "mean")
    for m, x, y in zip(mean.parameters(), load_model(a)[0].parameters(), load_model(b)[0].parameters(), strict=True):
        assert torch.allclose(m, (x + y) / 2, atol=1e-7)
    assert str(a) in (tmp_path / "mean" / "README.md").read_text()
    assert bdh("average", "mean", finished_run, finished_run / "model", "--output", "mixed").returncode == 0


def test_info(finished_run: Path, bdh: Run) -> None:
    for target in (finished_run, finished_run / "model", finished_run / "checkpoints" / "latest"):
        done = bdh("info", target)
        assert done.returncode == 0 and "14,406" in done.stdout and "sharing one set of weights" in done.stdout
        assert "0.23 MB for weights, gradients and AdamW's moments in float32, 0.21 MB with Muon" in done.stdout
    sizes = json.loads(bdh("info", finished_run / "model", "--json").stdout)
    assert sizes["parameters"] == 14406 and sizes["weight_bytes"] == 57624
    assert sizes["state_bytes"] == 4 * 2 * 128 * 16


def test_quickstart_trains_exports_writes_and_says_what_next(tmp_path: Path, bdh: Run) -> None:
    """The whole command, shortened; at full length it is a benchmark."""
    short = ["--training.max_steps", 60, "--training.warmup_steps", 5, "--training.eval_windows", 8]
    done = bdh("quickstart", *short, "--training.eval_interval", 20)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    shown = done.stdout
    assert "trained for" in shown and shown.count("bits per byte") >= 4 and "Three samples:" in shown
    assert shown.count("  | The ") >= 1 and "  | A function " in shown
    *_, first, second, third, fourth = shown.splitlines()
    assert all(line.split()[0].endswith("bdh") for line in (first, second, third, fourth))
    assert " chat --model runs/quickstart/model" in second
    assert (tmp_path / "runs" / "quickstart" / "loss.png").exists()
    suggested = [*first.split('"')[0].split(), "Python is", "--max_new_tokens", "5"]
    assert bdh(*suggested[1:]).stdout.startswith("Python is")
    again = bdh("quickstart", *short, "--print_config")
    assert "run_dir: runs/quickstart-2" in again.stdout
