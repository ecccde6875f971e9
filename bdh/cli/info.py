"""`bdh info`: how large a model is."""

from pathlib import Path

from bdh.cli.parsing import Parser
from bdh.json_text import to_json


def run(argv: list[str]) -> int:
    parser = Parser(
        prog="bdh info",
        allow_abbrev=False,
        description="Show a model's architecture, parameters, memory and state size.",
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="folder of an export, a run or a checkpoint")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)

    from bdh.model.model_card import architecture, parameter_count, state_bytes
    from bdh.training.export import describe

    config, where = describe(args.directory)
    parameters, state = parameter_count(config), state_bytes(config)
    if args.json:
        names = ("n_layer", "n_embd", "n_head", "vocab_size", "n_neurons", "decay", "decay_half_lives", "write")
        sizes = {name: getattr(config, name) for name in names}
        print(to_json({**sizes, "parameters": parameters, "weight_bytes": 4 * parameters, "state_bytes": state}))
        return 0
    layer = 3 * config.n_neurons * config.n_embd  # weights of which Muon keeps one moment and not two
    rows = {
        "model": str(where),
        **architecture(config),
        "weights in memory": f"{4 * parameters / 1e6:,.1f} MB in float32, {2 * parameters / 1e6:,.1f} MB in bfloat16",
        "training in memory": f"{16 * parameters / 1e6:,.2f} MB for weights, gradients and AdamW's moments in float32, "
        f"{(16 * parameters - 4 * layer) / 1e6:,.2f} MB with Muon",
    }
    width = max(map(len, rows))
    print("\n".join(f"{key:<{width}}  {value}" for key, value in rows.items()))
    return 0
