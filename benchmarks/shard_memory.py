"""The memory that a large model takes of one GPU, whole, and of each of several with FSDP2: worked out, not measured.

    python -m benchmarks.shard_memory

Trains a step on fake tensors, which have shapes and no numbers, with fake messages, and lets PyTorch's memory trackers
add up what is there at once. Needs no GPU and no memory; `benchmarks.scale --only shards` measures the same model on
real ones. Writes benchmarks/results/shard_memory.json.
"""

import argparse
import json
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from bdh.distributed.config import DistributedConfig
from bdh.distributed.parallel import ParallelModel
from bdh.distributed.processes import Processes
from bdh.model import BDHConfig, BDHForCausalLM
from bdh.training.device_setup import recompute_layers
from benchmarks.record import save
from benchmarks.scale import LARGE


def peak(processes: int, rows: int, length: int) -> int:
    """Bytes of one of so many processes: weights, optimizer, gradients and activity of the fullest moment."""
    mesh = init_device_mesh("cpu", (1, processes, 1), mesh_dim_names=("replicas", "shards", "heads"))
    strategy = "fsdp" if processes > 1 else "ddp"
    fleet = SimpleNamespace(
        mesh=mesh if processes > 1 else None,
        config=DistributedConfig(strategy=strategy),  # type: ignore[arg-type]
        device=torch.device("cpu"),
        alone=processes == 1,
        size=processes,
    )
    with FakeTensorMode():
        model = BDHForCausalLM(BDHConfig(**LARGE))
        model.to = lambda *to: model  # type: ignore[method-assign, assignment]  # it is there; fakes cannot be swapped
        parallel_model = ParallelModel(model, cast(Processes, fleet), bfloat16=True)
        recompute_layers(parallel_model.model)
        optimizer = torch.optim.AdamW(parallel_model.model.parameters(), lr=1e-3, foreach=False)
        tracker = FSDPMemTracker(parallel_model.model, optimizer) if processes > 1 else MemTracker()
        if not isinstance(tracker, FSDPMemTracker):
            tracker.track_external(parallel_model.model, optimizer)
        tokens = torch.randint(0, 256, (rows, length + 1))  # (B, T + 1)
        with tracker:
            for _ in range(2):  # the optimizer's memory is made by its first step
                with torch.autocast("cpu", torch.bfloat16):
                    logits = parallel_model.forward(tokens[:, :-1], use_cache=False).logits.float()  # (B, T, V)
                    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                tracker.reset_mod_stats()
    snapshots: dict[Any, dict[str, int]] = tracker.get_tracker_snapshot("peak")
    return max(snapshot["Total"] for snapshot in snapshots.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--rows", type=int, default=1, help="sequences a GPU")
    parser.add_argument("--length", type=int, default=512)
    args = parser.parse_args()
    peaks = []
    for processes in (1, args.gpus):
        dist.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
        peaks.append(peak(processes, args.rows, args.length))
        dist.destroy_process_group()
    result = {**vars(args), "one_gpu_peak_bytes": peaks[0], "peak_bytes_a_gpu": peaks[1]}
    result["share_of_one_gpu"] = round(peaks[1] / peaks[0], 3)
    print(json.dumps(result, indent=1))
    print(save("shard_memory", result))


if __name__ == "__main__":
    main()
