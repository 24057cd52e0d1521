"""The one place that chooses the device: what is asked for wins, and a device that is not here is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from npedit.errors import UserError
from npedit.nets import device

SOURCE = Path(device.__file__).parents[1]
CPU = torch.device("cpu")


def test_without_a_request_the_accelerator_is_chosen_else_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(device.VARIABLE, raising=False)
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    assert device.pick_device() == (torch.device(found.type) if found else CPU)
    assert device.is_accelerator(device.pick_device()) == (found is not None)


def test_the_environment_variable_overrides_the_choice_and_a_request_overrides_both(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(device.VARIABLE, " cpu ")
    assert device.pick_device() == CPU
    assert device.accelerator_count() == 0
    monkeypatch.setenv(device.VARIABLE, "no such device")
    assert device.pick_device("cpu") == device.pick_device(CPU) == CPU


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "meta", "cpu:7", "hpu"])
def test_a_device_that_is_not_here_is_refused_with_those_that_are(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(device.VARIABLE, name)
    with pytest.raises(UserError, match=rf"NPEDIT_DEVICE: expected .* has cpu \(1\).*; got '{name}'; choose"):
        device.pick_device()


def test_what_a_cpu_answers() -> None:
    assert device.device_name(CPU) == "cpu"
    assert device.default_dtype(CPU) == torch.float32
    assert device.process_group_backend(CPU) == "gloo"
    assert device.supports_dtype(CPU, torch.float32) and not device.supports_dtype(CPU, torch.float8_e4m3fn)
    assert 0.01 < device.peak_memory_gb(CPU) < 1000
    assert not device.is_cuda(CPU) and not device.is_accelerator(CPU)
    assert device.profiler_activities(CPU) == [torch.profiler.ProfilerActivity.CPU]
    device.synchronize(CPU)


@pytest.mark.parametrize("kind, backend", [("cuda", "cpu:gloo,cuda:nccl"), ("xpu", "cpu:gloo,xpu:xccl")])
def test_a_gpus_tensors_get_the_backend_of_its_kind(kind: str, backend: str) -> None:
    assert device.process_group_backend(torch.device(kind)) == backend
    assert device.default_dtype(torch.device(kind)) == torch.bfloat16


def test_no_other_file_names_a_device() -> None:
    """Only `nets/device.py` compares device types or calls torch.cuda."""
    asked = re.compile(r"""\bdevice\.type\s*[!=]=|torch\.(cuda|xpu|mps|accelerator)\b|["'](cuda|mps|xpu)\b""")
    found = {
        str(path.relative_to(SOURCE)) for path in SOURCE.rglob("*.py") if asked.search(path.read_text(encoding="utf-8"))
    }
    assert found == {"nets/device.py"}


@pytest.mark.gpu
def test_what_a_gpu_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(device.VARIABLE, raising=False)
    gpu = device.pick_device()
    assert device.is_accelerator(gpu) and device.accelerator_count() >= 1
    assert device.device_name(gpu) != gpu.type
    held = torch.ones(2**20, device=gpu)
    device.synchronize(gpu)
    assert device.peak_memory_gb(gpu) >= held.nbytes / 2**30
    device.set_process_device(gpu, 0)
    monkeypatch.setenv(device.VARIABLE, f"{gpu.type}:0")
    assert device.pick_device().index == 0 and device.accelerator_count() == 1


@pytest.mark.parametrize(("name", "precision"), [("cpu", "highest"), ("cuda", "high")])
def test_tf32_is_for_cuda_alone(name: str, precision: str) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        device.allow_tf32(torch.device(name))
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
