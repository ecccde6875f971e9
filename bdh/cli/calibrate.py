"""`bdh calibrate`: finds the decay that keeps a model usable beyond the block that it was trained on."""

from pathlib import Path
from typing import Any

from bdh.cli.parsing import Parser
from bdh.errors import BDHError

DESCRIPTION = (
    "Give a model that was trained without decay a fixed decay of its synapses, so that it stays usable beyond the "
    "block it was trained on. The half-lives are those with the least loss on windows of several blocks of a text: "
    "--data.path as a whole, or the validation part of a corpus. The weights are not changed; the export in --output "
    "carries the half-lives in its configuration."
)


def run(argv: list[str]) -> int:
    from bdh.data.settings import DataConfig
    from bdh.training.config import TrainConfig, validate

    parser = Parser(prog="bdh calibrate", allow_abbrev=False, description=DESCRIPTION)
    parser.add_argument("model", metavar="MODEL", type=Path, help="folder of an export")
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help="the folder to write")
    parser.add_class_arguments(DataConfig, "data")
    parser.add_argument(
        "--block_size", type=int, help="tokens of the blocks the model was trained on, if its export does not say"
    )
    parser.add_argument(
        "--length", type=int, help="tokens of a window; without it, 8 blocks, or as many as the text has"
    )
    parser.add_argument("--windows", type=int, default=4, help="windows of the search, spread evenly over the text")
    parser.add_argument(
        "--per_head", type=bool, default=True, help="search a half-life for each head, after one for all heads"
    )
    parser.add_argument("--batch_size", type=int, default=4, help="windows of one forward pass")
    parser.add_argument("--device", type=str, default="auto", choices=["auto", "cpu", "cuda", "mps"])
    parser.add_argument("--precision", type=str, default="float32", choices=["auto", "float32", "bfloat16"])
    args = parser.parse_args(argv)
    data: DataConfig = parser.instantiate(args).data
    validate(TrainConfig(data=data))
    check(args)

    from rich.console import Console
    from rich.progress import Progress

    from bdh.data.loader import read_text
    from bdh.data.tokenizer import is_tokenizer
    from bdh.evaluation.calibration import calibrate, calibrated_card, check_calibratable, comparison, describe
    from bdh.model.device import choose_device
    from bdh.model.export import check_target, load_export, read_config, save_export
    from bdh.training.device_setup import autocast

    check_calibratable(read_config(args.model), str(args.model))
    check_target(args.output)
    if args.output.resolve() == args.model.resolve():
        raise BDHError(f"--output {args.output} is the model itself; name another folder")
    model, tokenizer = load_export(args.model)
    block_size = block_size_of(model.config.training_block_size, args)
    if data.tokenizer is not None and not is_tokenizer(tokenizer, data.tokenizer):
        raise BDHError(f"data.tokenizer {data.tokenizer} is not the tokenizer of {args.model}; leave it out")
    apart = not data.cross_documents
    if apart and tokenizer.eos_token_id is None:
        raise BDHError(f"{args.model} has a tokenizer without an end-of-text token: documents cannot be kept apart")
    console = Console(stderr=True)
    name, tokens, size = read_text(data, tokenizer, console.log if console.is_terminal else lambda line: None)
    length = length_of(args.length, block_size, name, len(tokens))
    device = choose_device(args.device)
    model.to(device)
    settings = TrainConfig().training
    settings.precision = args.precision
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("calibrating")

        def say(line: str) -> None:
            print(line, flush=True)

        result = calibrate(
            model,
            tokens,
            size / max(tokens.num_target_tokens(), 1),
            block_size=block_size,
            length=length,
            windows=args.windows,
            batch_size=args.batch_size,
            per_head=args.per_head,
            precision=lambda: autocast(settings, device),
            end_of_text=tokenizer.eos_token_id if apart else None,
            say=say,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    print("\n".join(comparison(result)))
    model.to("cpu")
    model.config.training_block_size = block_size
    save_export(model, tokenizer, args.output, calibrated_card(model.config, result, name, args.model))
    print(f"{args.output} is {args.model} with {describe(result.half_lives)}")
    return 0


def check(args: Any) -> None:
    """Refuses settings that are wrong whatever the model. Raises BDHError."""
    for name, smallest in (("block_size", 1), ("length", 2), ("windows", 1), ("batch_size", 1)):
        value = getattr(args, name)
        if value is not None and value < smallest:
            raise BDHError(f"{name} is {value}; it must be at least {smallest}")


def block_size_of(recorded: int | None, args: Any) -> int:
    """Tokens of a training block. Raises BDHError where nobody says, or the option says something else."""
    if recorded is None and args.block_size is None:
        raise BDHError(f"{args.model} does not record the block it was trained on; give it: --block_size N")
    if recorded is not None and args.block_size not in (None, recorded):
        raise BDHError(f"--block_size is {args.block_size}, but {args.model} was trained on {recorded}; leave it out")
    return int(recorded or args.block_size)


def length_of(length: int | None, block_size: int, name: str, tokens: int) -> int:
    """Tokens of a window. Raises BDHError where the text is too short, or the window is no longer than a block."""
    from bdh.evaluation.by_position import long_length

    longest = long_length(tokens, block_size)
    if longest is None:
        raise BDHError(
            f"{name} has {tokens:,} tokens; calibration needs at least {2 * block_size + 1:,}, two blocks of "
            f"{block_size}; use a longer text"
        )
    if length is None:
        return longest
    if length <= block_size:
        raise BDHError(f"length is {length}; it must be above {block_size}, the block the model was trained on")
    if length > tokens - 1:
        raise BDHError(f"length is {length}, but {name} has {tokens:,} tokens; use at most {tokens - 1}")
    return length
