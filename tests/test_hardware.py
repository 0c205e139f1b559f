# SPDX-License-Identifier: Apache-2.0
# Profiles against arithmetic that does not come from the same tables; a card, a link, memory limits
# as a machine would tell of them.

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from hift_ext import hardware, memory, ops, profiles

# Boost clock in GHz, width of the memory in bits, Gbit/s of a pin, float32 lanes of an SM, and
# multiply-adds a cycle of an SM's tensor cores in TF32 and in 16 bits that add up in float32: from
# the architectures' descriptions, so that a slip in either table shows.
CHIPS = {
    "a6000": (1.80, 384, 16.0, 128, 256, 512),
    "rtx3090": (1.695, 384, 19.5, 128, 128, 256),
    "rtx4090": (2.52, 384, 21.0, 128, 128, 256),
    "l40s": (2.52, 384, 18.0, 128, 256, 512),
    "a100-40": (1.41, 5120, 2.43, 64, 512, 1024),
    "a100-80": (1.41, 5120, 3.186, 64, 512, 1024),
    "h100": (1.98, 5120, 5.2344, 128, 1024, 2048),
    "h200": (1.98, 6144, 6.25, 128, 1024, 2048),
}


@pytest.mark.parametrize("key", CHIPS)
def test_a_profile_agrees_with_its_chip(key) -> None:
    clock, bits, pin, lanes, tf32, half = CHIPS[key]
    profile = hardware.get(key)
    assert profile.bandwidth == pytest.approx(bits * pin * 1e9 / 8, rel=0.01)
    rates = {"float32": lanes, "tfloat32": tf32, "bfloat16": half, "float16": half}
    if key.startswith("h"):  # their tensor cores' peak is given at 1.83 GHz
        rates = {
            name: rate * (1 if name == "float32" else 1.83 / clock) for name, rate in rates.items()
        }
    for name, rate in rates.items():
        peak = 2 * rate * profile.sms * clock * 1e9
        assert profile.flops[name] == pytest.approx(peak, rel=0.015), name


def test_profiles_are_whole() -> None:
    assert list(hardware.PROFILES) == list(CHIPS)
    for key, profile in hardware.PROFILES.items():
        assert profile.key == key
        assert profiles.named(profile.name) is profile
        assert "whitepaper" in profile.source or "datasheet" in profile.source
        assert 0.9 * profile.memory_bytes < profile.usable_bytes < profile.memory_bytes
        assert profile.threads_per_sm == (2048 if profile.capability[1] == 0 else 1536)
    with pytest.raises(
        ValueError, match="no profile of a card 'voodoo2': known are a6000, rtx3090"
    ):
        hardware.get("voodoo2")
    with pytest.raises(TypeError):
        profiles.PROFILES["a6000"] = profiles.PROFILES["h100"]


def test_memory_that_tensors_can_have() -> None:
    a6000, l40s = hardware.get("a6000"), hardware.get("l40s")
    gib = 1 << 30
    assert a6000.usable_bytes == int(48 * gib * 0.98) - gib // 2
    assert l40s.usable_bytes == int(45 * gib * 0.98) - gib // 2  # error correction takes 3 GiB


@pytest.mark.parametrize(
    ("generation", "lanes", "rate"),
    [(1, 16, 4e9), (2, 8, 4e9), (3, 16, 15.75e9), (4, 16, 31.5e9), (4, 8, 15.75e9), (5, 16, 63e9)],
)
def test_links(generation, lanes, rate) -> None:
    assert hardware.link_bytes_per_s(generation, lanes) == pytest.approx(rate, rel=1e-3)


def test_a_link_of_no_generation() -> None:
    with pytest.raises(ValueError, match="1 to 6, not 7"):
        hardware.link_bytes_per_s(7, 16)


def device(folder, name, **files):
    (folder / name).mkdir(parents=True, exist_ok=True)
    for file, text in files.items():
        (folder / name / file).write_text(f"{text}\n")


def link_files(speed, lanes, best, best_lanes) -> dict[str, str]:
    return {
        "current_link_speed": f"{speed} GT/s PCIe",
        "current_link_width": lanes,
        "max_link_speed": f"{best} GT/s PCIe",
        "max_link_width": best_lanes,
    }


def test_a_link_as_the_kernel_tells(tmp_path) -> None:
    device(tmp_path, "0000:65:00.0", **link_files("2.5", 16, "16.0", 16))
    link = hardware.read_link("0000:65:00.0", tmp_path)
    assert link == hardware.Link(1, 16, 4, 16)  # asleep
    assert link.bytes_per_s == pytest.approx(31.5e9, rel=1e-3)
    assert hardware.read_link("0000:65:00.0".upper(), tmp_path) == link


def test_an_old_slot_holds_a_card_back(tmp_path) -> None:
    device(tmp_path, "0000:00:01.0", **link_files("8.0", 8, "8.0", 8))
    device(tmp_path / "0000:00:01.0", "card", **link_files("8.0", 8, "16.0", 16))
    (tmp_path / "0000:65:00.0").symlink_to(tmp_path / "0000:00:01.0" / "card")
    assert hardware.read_link("0000:65:00.0", tmp_path) == hardware.Link(3, 8, 3, 8)


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"current_link_speed": "16.0 GT/s", "current_link_width": "16"},
        link_files("Unknown", 16, "16.0", 16),
        link_files("3.0", 16, "16.0", 16),
        link_files("16.0", "many", "16.0", 16),
        link_files("16.0", 0, "16.0", 16),
    ],
)
def test_links_nobody_tells_of(files, tmp_path) -> None:
    device(tmp_path, "0000:65:00.0", **files)
    assert hardware.read_link("0000:65:00.0", tmp_path) is None
    assert hardware.read_link("", tmp_path) is None


def properties(name="NVIDIA RTX A6000", **more):
    told = {"major": 8, "minor": 6, "multi_processor_count": 84, "total_memory": 51 * 10**9}
    return SimpleNamespace(name=name, **{**told, **more})


def test_a_known_card_is_set_right_by_its_driver() -> None:
    found = hardware.from_properties(
        properties(multi_processor_count=80, L2_cache_size=5 << 20),
        {"copy_engines": 3},
        hardware.Link(1, 8, 3, 16),
    )
    assert (found.key, found.sms, found.l2_bytes, found.copy_engines) == ("a6000", 80, 5 << 20, 3)
    assert (found.pcie_generation, found.pcie_lanes) == (3, 8)
    assert found.usable_bytes == 51 * 10**9 - profiles.CONTEXT_BYTES
    assert found.bandwidth == 768e9
    plain = hardware.from_properties(properties(), {}, None)
    assert (plain.pcie_generation, plain.copy_engines, plain.l2_bytes) == (4, 2, 6 << 20)


def test_an_unknown_card_is_made_from_what_is_told() -> None:
    card = properties("NVIDIA Quark", major=7, minor=5, multi_processor_count=10)
    facts = {"copy_engines": 2, "clock_hz": 1.5e9, "memory_hz": 7e9, "bus_bits": 256}
    found = hardware.from_properties(card, facts, None)
    assert (found.key, found.name, found.copy_engines) == ("here", "NVIDIA Quark", 2)
    assert found.bandwidth == pytest.approx(448e9)
    assert set(found.flops.values()) == {2 * 10 * 64 * 1.5e9}
    assert found.link_bytes_per_s == hardware.link_bytes_per_s(3, 16)
    told = properties("X", memory_clock_rate=7_000_000, memory_bus_width=256, clock_rate=1_000_000)
    found = hardware.from_properties(told, {}, None)
    assert found.bandwidth == pytest.approx(448e9)
    assert found.flops["bfloat16"] == 2 * 84 * 128 * 1e9
    assert hardware.from_properties(properties("X"), {}, None).bandwidth == 300e9


def test_the_card_that_is_here(monkeypatch, tmp_path) -> None:
    device(tmp_path, "0000:0a:00.0", **link_files("16.0", 16, "16.0", 16))
    card = properties(pci_domain_id=0, pci_bus_id=10, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(hardware, "SYS", tmp_path)
    monkeypatch.setattr(ops, "cuda_info", lambda: {"devices": 0})
    found = hardware.present()
    assert found.known
    assert found.pci == "0000:0a:00.0"
    assert found.link == hardware.Link(4, 16, 4, 16)
    with pytest.raises(ValueError, match="no GPU 1: torch sees 1"):
        hardware.present(1)
    del card.pci_bus_id  # an older torch, and our CUDA part sees the card
    monkeypatch.setattr(ops, "cuda_info", lambda: {"devices": 1})
    monkeypatch.setattr(ops, "cuda_device", lambda index: {"pci": "0000:0A:00.0"})
    assert hardware.present().link == found.link
    monkeypatch.setattr(ops, "cuda_device", lambda index: {})
    assert hardware.present().link is None


def test_no_card() -> None:
    if not torch.cuda.is_available():
        assert hardware.present() is None
    if not ops.build_info()["cuda_built"]:
        assert ops.cuda_device(0) == {}


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5\n", "550.54.15"),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n",
            "580.65.06",
        ),
        ("something else", ""),
        (None, ""),
    ],
)
def test_driver(text, version, tmp_path) -> None:
    if text is not None:
        (tmp_path / "version").write_text(text)
    assert hardware.driver_version(tmp_path / "version") == version


def test_processor(tmp_path) -> None:
    (tmp_path / "cpuinfo").write_text("processor : 0\nmodel name\t: Abacus 9\n")
    assert hardware.cpu_name(tmp_path / "cpuinfo") == "Abacus 9"
    assert hardware.cpu_name(tmp_path / "absent")


def machine(root, groups, **files):
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    4000 kB\n")
    (root / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")


def test_free_host_memory(tmp_path) -> None:
    def free(name, groups, **files):
        machine(tmp_path / name, groups, **files)
        return memory.host_free_bytes(tmp_path / name)

    kernel = 4000 * 1024
    assert free("plain", "") == kernel
    limit, used = "memory_dot_max", "memory_dot_current"
    assert free("none", "0::/\n", **{limit: "max", used: 10}) == kernel
    assert free("top", "0::/gone/inside\n", **{limit: 1000, used: 10}) == 990
    outer = {f"a__{limit}": 500, f"a__{used}": 100, "a__memory_dot_stat": "inactive_file 50"}
    inner = {f"a__b__{limit}": 900, f"a__b__{used}": 100}
    assert free("nested", "0::/a/b\n", **outer, **inner) == 450
    assert free("over", "0::/\n", **{limit: 10, used: 30}) == 0
    old = {
        "memory__x__memory_dot_limit_in_bytes": 800,
        "memory__x__memory_dot_usage_in_bytes": 300,
        "memory__x__memory_dot_stat": "cache 9\ntotal_inactive_file 100",
    }
    assert free("v1", "4:cpu,memory:/x\n0::/\n", **old) == 600
    assert memory.host_free_bytes(tmp_path / "absent") is None
    assert memory.host_free_bytes() > 1 << 20


def test_free_device_memory(monkeypatch) -> None:
    assert memory.device_free_bytes(torch.device("cpu")) is None
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 60)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 50)
    assert memory.device_free_bytes(gpu) == 40
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 95)
    assert memory.device_free_bytes(gpu) == 0


@pytest.mark.parametrize(("text", "count"), [("8", 8), ("0", 1), ("many", 1), (None, 1)])
def test_processes_of_a_job(text, count, monkeypatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if text is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", text)
    assert memory.local_processes() == count
