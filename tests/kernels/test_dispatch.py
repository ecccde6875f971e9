"""The choice of kernels for training and inference, and its log lines."""

import logging
import sys

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from bdh.errors import BDHError
from bdh.kernels.dispatch import MIN_PRODUCTS, choose_decode_kernels, use_kernels
from bdh.kernels.triton.operations import TritonOperations
from tests.kernels.test_fused_layer import make_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_auto_leaves_little_work_to_the_plain_form() -> None:
    model = make_model(n_embd=8, mlp_internal_dim_multiplier=64)  # 256 neurons a head
    use_kernels(model.model.layer, "auto", CPU)
    kernels = model.model.layer.kernels
    assert kernels is not None
    small, large = (torch.zeros(8, T, 8, dtype=torch.float64) for T in (16, 128))
    assert kernels.begin(model.model.layer, small, None, None, None) is None
    assert kernels.begin(model.model.layer, large, None, None, None) is not None


def test_auto_takes_triton_on_hopper_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Test the choice only, with Triton's interpreter instead of such a GPU."""
    monkeypatch.setattr("bdh.kernels.dispatch.triton_unavailable", lambda device: None)
    monkeypatch.setattr("bdh.kernels.dispatch.make_operations", lambda *args: TritonOperations())
    monkeypatch.setattr("bdh.kernels.dispatch.max_saved_bytes", lambda device: 0)
    monkeypatch.setattr("bdh.kernels.dispatch.hopper_unavailable", lambda *args: "Gluon is missing")
    monkeypatch.setitem(MIN_PRODUCTS, "triton", 0)
    model = make_model(dtype=torch.float32, n_embd=16, mlp_internal_dim_multiplier=4)
    layer, x = model.model.layer, torch.randn(2, 7, 16)
    for capability, taken in (((9, 0), True), ((8, 0), False), ((10, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        use_kernels(layer, "auto", torch.device("cuda"))
        assert (layer.kernels is not None) == taken
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    use_kernels(layer, "auto", torch.device("cuda"))
    assert layer.kernels is not None and layer.kernels.begin(layer, x, None, None, None) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.kernels.begin(layer, x, None, None, None) is not None
    use_kernels(layer, "triton", torch.device("cuda"))
    assert layer.kernels.begin(layer, x, None, None, None) is not None
    assert layer.kernels.begin(model.double().model.layer, x.double(), None, None, None) is None  # it knows no float64


def test_adapters_take_the_plain_form_or_are_refused() -> None:
    from peft import LoraConfig, get_peft_model

    model = make_model(n_embd=8)
    get_peft_model(model, LoraConfig(r=2, target_modules=["encoder_v.1"]))
    use_kernels(model.model.layer, "auto", CPU)
    assert model.model.layer.kernels is None
    with pytest.raises(BDHError, match=r"model\.kernels is torch, but it works on plain weights, and this model has"):
        use_kernels(model.model.layer, "torch", CPU)
    with pytest.raises(BDHError, match=r"model\.kernels is triton, but Triton needs an NVIDIA GPU, and the device is"):
        use_kernels(make_model().model.layer, "triton", CPU)


def test_weights_that_are_gathered_when_used_take_the_plain_form_or_are_refused() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        layer = make_model(n_embd=8).model.layer
        fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
        use_kernels(layer, "auto", CPU)
        assert layer.kernels is None
        with pytest.raises(BDHError, match=r"model\.kernels is torch, but it does not work with distributed\.strategy"):
            use_kernels(layer, "torch", CPU)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "auto",
            "training on cpu uses the torch kernels (model.kernels auto); not triton, because Triton needs an NVIDIA "
            "GPU, and the device is cpu",
        ),
        ("reference", "training on cpu uses the reference kernels (model.kernels reference)"),
    ],
)
def test_the_choice_is_logged_in_one_line(name: str, message: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "bdh"):
        use_kernels(make_model().model.layer, name, CPU)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [("INFO", message)]


def test_a_failure_of_gluon_is_a_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("bdh.kernels.dispatch.triton_unavailable", lambda device: None)
    monkeypatch.setattr("bdh.kernels.dispatch.max_saved_bytes", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setitem(sys.modules, "bdh.kernels.hopper.operations", None)
    layer = make_model().model.layer
    with caplog.at_level(logging.INFO, "bdh"):
        use_kernels(layer, "triton", CUDA)
    warning, choice = caplog.records
    reason = "Gluon failed: ModuleNotFoundError: import of bdh.kernels.hopper.operations halted; None in sys.modules"
    assert (warning.levelname, choice.levelname) == ("WARNING", "INFO")
    assert warning.getMessage().endswith(reason)
    assert choice.getMessage().startswith("training on cuda uses the triton kernels (model.kernels triton); not hopper")
    assert choice.getMessage().endswith(reason)
    assert layer.kernels is not None and type(layer.kernels.operations) is TritonOperations  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("device", "has_triton", "kernels", "reason"),
    [
        ("cpu", True, "torch", ""),
        ("cuda", True, "triton", ""),
        ("cuda", False, "reference", "; not triton, because it is not installed"),
        ("mps", True, "reference", "; not triton, because it needs an NVIDIA GPU, and the device is mps"),
    ],
)
def test_kernels_of_inference(
    device: str,
    has_triton: bool,
    kernels: str,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("bdh.kernels.dispatch.find_spec", lambda name: object() if has_triton else None)
    with caplog.at_level(logging.INFO, "bdh"):
        assert choose_decode_kernels(torch.device(device)) == kernels
    assert [record.getMessage() for record in caplog.records] == [
        f"inference on {device} uses the {kernels} kernels{reason}"
    ]
