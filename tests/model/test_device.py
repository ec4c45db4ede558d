"""Which device and which compute type are chosen, and that it is said."""

import collections

import pytest
import torch

from qdpo.errors import ConfigError
from qdpo.model.device import choose_device, choose_dtype

CPU = torch.device("cpu")


@pytest.fixture
def two_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = collections.namedtuple("properties", "name")("Some Card")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda index: [(3 * 2**30, 8 * 2**30), (7 * 2**30, 8 * 2**30)][index]
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)


def test_the_freest_card_is_taken(two_cards: None) -> None:
    said: list[str] = []
    assert choose_device("auto", said.append) == torch.device("cuda", 1)
    assert said == ["device: cuda:1 Some Card, 7.0 GiB free, the freest of 2 devices"]
    assert choose_device("cpu", said.append) == CPU


def test_no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto", print) == CPU
    with pytest.raises(ConfigError, match="qdpo run preset=demo"):
        choose_device("cuda", print)


@pytest.mark.parametrize(("ratio", "expected"), [(2.5, "bf16"), (0.2, "fp32")])
def test_the_cpu_computes_in_its_faster_type(monkeypatch: pytest.MonkeyPatch, ratio: float, expected: str) -> None:
    said: list[str] = []
    monkeypatch.setattr("qdpo.model.device._cpu_bf16_speed", lambda: ratio)
    assert choose_dtype("auto", CPU, said.append) == expected
    assert ("2.5 times as fast" if ratio > 1 else "5.0 times slower") in said[0]
    assert choose_dtype("fp16", CPU, said.append) == "fp16"


def test_a_card_without_bf16_gets_fp16_aloud(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert choose_dtype("auto", torch.device("cuda"), said.append) == "fp16" and "no bf16" in said[0]
