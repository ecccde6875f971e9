"""Tensor parallelism over heads against the whole model in float64: logits, gradients, carried state, texts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.launching import free_port, surroundings

PROGRAM = """
import json, os, sys
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from bdh.inference.llm import LLM
from bdh.inference.sampling_params import SamplingParams
from bdh.inference.runner import ModelRunner
from bdh.data.tokenizer import byte_tokenizer
from bdh.model import BDHConfig, BDHForCausalLM, BDHState
from bdh.distributed.tensor_parallel import shard_model

count, port, gates = int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])

def compare(rank):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    config = BDHConfig(n_layer=3, n_embd=16, n_head=4, mlp_internal_dim_multiplier=8, dropout=0.0, chunk_size=16,
                       initializer_range=0.3, **gates)
    whole = BDHForCausalLM(config).double()
    for name, p in whole.named_parameters():  # which begin as zeros, or the same in all heads
        if ".gates." in name:
            p.data += torch.randn_like(p)
    shard, names = shard_model(whole, init_device_mesh("cpu", (count,)))
    ids = torch.randint(0, 256, (3, 40))  # longer than a chunk
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    for arguments in ({}, {"attention_mask": mask}, {"use_cache": True}):
        logits = {}
        for name, model in (("whole", whole), ("shard", shard)):
            model.zero_grad()
            kwargs = dict(arguments)
            if "use_cache" in arguments:
                heads = model.config.n_head
                torch.manual_seed(5)
                S = [torch.randn(3, 4, 32, 16, dtype=torch.float64) for _ in range(3)]
                first = names.first if name == "shard" else 0
                S = [s[:, first : first + heads] for s in S]
                kwargs["past_key_values"] = BDHState(S, torch.tensor([5, 9, 2]), 9)
            out = model(ids, labels=ids, **kwargs)
            out.loss.backward()
            logits[name] = out.logits
        difference = (logits["whole"] - logits["shard"]).abs().max()
        assert torch.allclose(logits["whole"], logits["shard"], atol=1e-11), difference
        expected = {name: p.grad for name, p in whole.named_parameters()}
        for name, p in shard.named_parameters():
            gradient = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
            assert torch.allclose(gradient, expected[names.global_name(name)], atol=1e-11), name
    params = SamplingParams(max_new_tokens=30, temperature=0.9, seed=3)
    llms = [LLM(ModelRunner(model.eval(), 2), byte_tokenizer()) for model in (whole, shard)]
    texts = [[output.choices[0].tokens for output in llm.generate(["ab", "c"], params)] for llm in llms]
    assert texts[0] == texts[1]
    dist.destroy_process_group()

children = []
for rank in range(count):
    child = os.fork()
    if child == 0:
        try:
            compare(rank)
        except BaseException:
            import traceback
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    children.append(child)
sys.exit(any([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]))
"""


GATES = [
    {},
    {"decay": "fixed", "decay_half_lives": [4, None, 16, 64]},
    {"decay": "gated", "decay_half_lives": [4, None, 16, 64], "write": "delta"},
]


def run_processes(count: int, folder: Path, gates: dict[str, object]) -> None:
    command = [sys.executable, "-c", PROGRAM, str(count), str(free_port()), json.dumps(gates)]
    done = subprocess.run(command, cwd=folder, env=surroundings(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("gates", GATES)
def test_two_processes_compute_what_one_does(tmp_path: Path, gates: dict[str, object]) -> None:
    run_processes(2, tmp_path, gates)


@pytest.mark.parametrize("gates", [GATES[0], GATES[-1]])
def test_a_process_may_have_a_single_head(tmp_path: Path, gates: dict[str, object]) -> None:
    run_processes(4, tmp_path, gates)
