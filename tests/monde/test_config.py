"""MondeConfig: what it takes, what it refuses, and with which words."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from accelerate.utils.modeling import convert_file_size_to_int
from hypothesis import given
from hypothesis import strategies as st

import monde
from hostcompute.topology import machine_memory_bytes
from monde.models.sizing import resolve_device
from monde.sizes import format_bytes, format_number, parse_size_bytes


@given(st.integers(0, 5000), st.sampled_from(["KB", "MB", "GB", "KiB", "MiB", "GiB"]))
def test_sizes_parse_as_accelerate_does(number: int, unit: str) -> None:
    assert parse_size_bytes(f"{number}{unit}", "x") == convert_file_size_to_int(f"{number}{unit}")


@pytest.mark.parametrize(
    ("size", "num_bytes"), [("2PiB", 2**51), ("1.5 pb", 15 * 10**14), ("3TB", 3 * 10**12)]
)
def test_sizes_of_whole_clusters(size: str, num_bytes: int) -> None:
    assert parse_size_bytes(size, "x") == num_bytes


@pytest.mark.parametrize("size", ["12 bananas", "", "GiB", "-3GiB", "1.5", "16 G B", "nan", 1.5, True, [1]])
def test_unreadable_sizes(size: Any) -> None:
    with pytest.raises(ValueError, match=r'gpu_memory: cannot read .* as a size; write it as "16GiB"'):
        monde.MondeConfig(gpu_memory=size)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gpu_memory": -1}, "gpu_memory: expected a size of at least 0, got -1"),
        ({"host_memory": machine_memory_bytes() + 1}, "more than this machine's"),
        ({"max_memory": {0: "1GiB"}, "gpu_memory": 1}, "not both"),
        ({"max_memory": {1: "1GiB"}}, "expected the keys 0"),
        ({"cpu_backend": "cuda"}, "cpu_backend: expected one of auto, native, numba, reference"),
        (
            {"split_policy": "greedy"},
            "split_policy: expected one of best, monde-rule, fiddler, two-ended, all-host, all-fetch, got 'greedy'",
        ),
        ({"num_threads": 0}, "num_threads: expected a whole number of at least 1"),
        ({"max_context": "4k"}, "max_context: expected a whole number"),
        ({"max_batch": -2}, "max_batch: expected a whole number"),
        ({"mesh": 4}, "mesh: expected a DeviceMesh"),
        ({"parallel": "tensor"}, "parallel: expected one of sharded, peers, auto"),
        ({"parallel": "peers"}, "parallel: peers needs ranks; give mesh="),
        ({"mesh_shares": (1, 2)}, "mesh_shares: there are no ranks to share; give mesh= too"),
        ({"mesh_timeout_s": 0}, "mesh_timeout_s: expected seconds above 0"),
    ],
)
def test_refused_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        monde.MondeConfig(**settings)


@pytest.mark.parametrize(
    "device",
    ["meta", torch.device("meta"), "gpu", "", "CPU", "cpu:3", 0, True, 1.5],
    ids=repr,
)
def test_refused_devices(device: Any) -> None:
    with pytest.raises(
        ValueError, match=r'device: expected "cpu", "cuda" or a GPU as "cuda:0", got '
    ) as error:
        monde.MondeConfig(device=device)
    assert str(error.value).endswith(repr(device))


@pytest.mark.parametrize(
    ("device", "num_gpus", "message"),
    [
        ("cuda", 0, 'device: cuda was asked for and this machine has no usable GPU; use device="cpu"'),
        ("cuda:7", 1, "device: cuda:7 was asked for and this machine has cuda:0 alone; name one it has"),
        ("cuda:2", 2, "device: cuda:2 was asked for and this machine has cuda:0 to cuda:1; name one it has"),
    ],
)
def test_devices_that_the_machine_lacks(
    device: str, num_gpus: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    with pytest.raises(ValueError, match=f"^{message}$"):
        resolve_device(monde.MondeConfig(device=device))


def test_a_device_of_torch_is_written_down() -> None:
    config = monde.MondeConfig(device=torch.device("cuda", 1))
    assert json.loads(config.to_json_string())["device"] == "cuda:1"
    assert '"device": "cuda:1"' in repr(config)
    assert monde.MondeConfig(device=torch.device("cpu", 0)).to_dict()["device"] == "cpu"
    assert resolve_device(monde.MondeConfig(device="cpu")) == torch.device("cpu")


def test_unknown_setting() -> None:
    with pytest.raises(TypeError, match="gpu_memroy"):
        monde.MondeConfig(gpu_memroy="1GiB")  # type: ignore[call-arg]


def test_max_memory() -> None:
    config = monde.MondeConfig(max_memory={0: "1GiB", "cpu": "2GiB"})
    assert (config.gpu_memory, config.host_memory) == (2**30, 2**31)


def test_survives_its_dictionary() -> None:
    config = monde.MondeConfig(gpu_memory="3MiB", device="cpu", num_threads=2)
    assert monde.MondeConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


def test_explain() -> None:
    assert monde.MondeConfig(gpu_memory="1.5GiB").explain() == (
        "device auto; GPU: 1.5 GiB; host: free host memory; host backend auto"
    )


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**40, "1 TiB"), (3 * 2**49, "1.5 PiB")],
)
def test_format_bytes(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.1234, "0.123"), (9.5, "9.5"), (99.96, "100"), (1134.0, "1,130"), (1.999e6, "2,000,000")],
)
def test_format_number(value: float, text: str) -> None:
    assert format_number(value) == text


def test_importing_monde_is_cheap() -> None:
    code = "import sys, monde; print(sorted({'torch', 'transformers', 'cupy'} & set(sys.modules)))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )


def test_public_names_exist() -> None:
    assert all(getattr(monde, name) is not None for name in monde.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        monde.nothing  # noqa: B018
