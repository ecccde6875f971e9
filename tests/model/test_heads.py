"""Heads of one model in several processes: the same function, its gradients, its states and its texts, in float64."""

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
from bdh.inference.params import SamplingParams
from bdh.inference.runner import ModelRunner
from bdh.data.tokenizer import byte_tokenizer
from bdh.model import BDHConfig, BDHForCausalLM, BDHState
from bdh.model.heads import part_of

count, port, synapses = int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])

def work(rank):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    config = BDHConfig(n_layer=3, n_embd=16, n_head=4, mlp_internal_dim_multiplier=8, dropout=0.0, chunk_size=16,
                       initializer_range=0.3, **synapses)
    whole = BDHForCausalLM(config).double()
    for name, p in whole.named_parameters():  # which begin as zeros, or the same in all heads
        if ".gates." in name:
            p.data += torch.randn_like(p)
    part, names = part_of(whole, init_device_mesh("cpu", (count,)))
    ids = torch.randint(0, 256, (3, 40))  # longer than a chunk
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    for given in ({}, {"attention_mask": mask}, {"use_cache": True}):
        found = {}
        for name, model in (("whole", whole), ("part", part)):
            model.zero_grad()
            extra = dict(given)
            if "use_cache" in given:
                heads = model.config.n_head
                torch.manual_seed(5)
                S = [torch.randn(3, 4, 32, 16, dtype=torch.float64) for _ in range(3)]
                first = names.first if name == "part" else 0
                S = [s[:, first : first + heads] for s in S]
                extra["past_key_values"] = BDHState(S, torch.tensor([5, 9, 2]), 9)
            out = model(ids, labels=ids, **extra)
            out.loss.backward()
            found[name] = out.logits
        assert torch.allclose(found["whole"], found["part"], atol=1e-11), (found["whole"] - found["part"]).abs().max()
        of_whole = {name: p.grad for name, p in whole.named_parameters()}
        for name, p in part.named_parameters():
            gradient = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
            assert torch.allclose(gradient, of_whole[names.whole(name)], atol=1e-11), name
    params = SamplingParams(max_new_tokens=30, temperature=0.9, seed=3)
    llms = [LLM(ModelRunner(model.eval(), 2), byte_tokenizer()) for model in (whole, part)]
    texts = [llm.generate(["ab", "c"], params) for llm in llms]
    assert [one.choices[0].tokens for one in texts[0]] == [one.choices[0].tokens for one in texts[1]]
    dist.destroy_process_group()

children = []
for rank in range(count):
    child = os.fork()
    if child == 0:
        try:
            work(rank)
        except BaseException:
            import traceback
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    children.append(child)
sys.exit(any([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]))
"""


SYNAPSES = [
    {},
    {"decay": "fixed", "decay_half_lives": [4, None, 16, 64]},
    {"decay": "gated", "decay_half_lives": [4, None, 16, 64], "write": "delta"},
]


def shared_by(count: int, folder: Path, synapses: dict[str, object]) -> None:
    command = [sys.executable, "-c", PROGRAM, str(count), str(free_port()), json.dumps(synapses)]
    done = subprocess.run(command, cwd=folder, env=surroundings(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("synapses", SYNAPSES)
def test_two_processes_compute_what_one_does(tmp_path: Path, synapses: dict[str, object]) -> None:
    shared_by(2, tmp_path, synapses)


@pytest.mark.parametrize("synapses", [SYNAPSES[0], SYNAPSES[-1]])
def test_a_process_may_have_a_single_head(tmp_path: Path, synapses: dict[str, object]) -> None:
    shared_by(4, tmp_path, synapses)
