"""CPU models: what CPUID says."""

from __future__ import annotations

import struct

import pytest

from skep.engine.amd64 import cpuid, features
from skep.engine.amd64.cpuid import AMD_VENDOR, INTEL_VENDOR, Cpuid, Feature
from skep.engine.amd64.registers import Cr4
from skep.errors import HostError, UserError
from skep.irqchip import lapictimer

HZ = 2_599_998_306


@pytest.fixture(params=[INTEL_VENDOR, AMD_VENDOR])
def vendor(request: pytest.FixtureRequest) -> bytes:
    return request.param  # type: ignore[no-any-return]


def bit(model: Cpuid, feature: Feature) -> int:
    leaf, subleaf, register, number = feature.value
    return model.read(leaf, subleaf, 0, 0)[register] >> number & 1


def test_feature_bits_are_where_they_belong(vendor: bytes) -> None:
    for name in cpuid.MODELS:
        model = cpuid.make(name, HZ, vendor=vendor)
        for feature in Feature:
            if feature.value[0] != 0x8000_0001 or vendor != AMD_VENDOR:
                assert bit(model, feature) == model.has(feature), feature


def test_baseline_is_x86_64_v2_everywhere() -> None:
    """The psABI's levels: all of v2, and of v3 what needs AVX state is absent."""
    model = cpuid.make("baseline", HZ)
    f = Feature
    v2 = (
        f.CMOV, f.CX8, f.FPU, f.FXSR, f.MMX, f.SSE, f.SSE2, f.SYSCALL, f.LM,
        f.CX16, f.LAHF, f.POPCNT, f.SSE3, f.SSE4_1, f.SSE4_2, f.SSSE3,
    )  # fmt: skip
    assert all(bit(model, feature) for feature in v2)
    assert not any(bit(model, feature) for feature in (f.XSAVE, f.OSXSAVE, f.AVX, f.AVX2, f.BMI1, f.BMI2, f.FMA))
    assert model.read(0xD, 0, 0, 0) == (0, 0, 0, 0)
    assert model.xcr0_bits == 0
    assert not model.cr4_bits & Cr4.OSXSAVE


def test_host_has_no_more_than_the_host() -> None:
    model = cpuid.make("host", HZ)
    added = model.features - cpuid.make("baseline", HZ).features
    assert all(cpuid.host_has(feature) for feature in added)
    assert Feature.AVX not in added or model.xcr0_bits == 7


def test_xsave_sizes_follow_xcr0() -> None:
    model = cpuid.make("host", HZ)
    if not model.has(Feature.AVX):
        pytest.skip("the host has no AVX")
    assert model.read(0xD, 0, 0, 3)[:3] == (7, 576, 832)
    assert model.read(0xD, 0, 0, 7)[:3] == (7, 832, 832)
    assert model.read(0xD, 1, 0, 7) == (0, 0, 0, 0)
    assert model.read(0xD, 2, 0, 7) == (256, 576, 0, 0)


def test_osxsave_follows_cr4() -> None:
    model = cpuid.make("host", HZ)
    assert not model.read(1, 0, 0, 0)[2] >> 27 & 1
    assert model.read(1, 0, Cr4.OSXSAVE, 0)[2] >> 27 & 1


@pytest.mark.parametrize("hz", [HZ, 2_600_000_000, 1_800_000_000, 3_693_060_000, 999_999_999, 4_999_123_456])
def test_tsc_frequency_by_leaf_15_within_linux_arithmetic(hz: int) -> None:
    """Linux multiplies kHz in 32 bits; what comes out is the frequency to the few kHz that this loses."""
    denominator, numerator, crystal, _ = cpuid.make("baseline", hz).read(0x15, 0, 0, 0)
    assert abs(crystal - lapictimer.TIMER_HZ) < lapictimer.TIMER_HZ / 5000
    assert abs(crystal * numerator / denominator - hz) <= numerator / denominator
    product = crystal // 1000 * numerator
    assert product < 1 << 32
    assert abs(product // denominator - hz / 1000) <= numerator / denominator + 1
    assert cpuid.make("baseline", hz).read(0x4000_0010, 0, 0, 0)[:2] == (hz // 1000, lapictimer.TIMER_HZ // 1000)


def test_vendor_brand_and_hypervisor(vendor: bytes) -> None:
    model = cpuid.make("host", HZ, vendor=vendor)
    largest, b, c, d = model.read(0, 0, 0, 0)
    assert struct.pack("<III", b, d, c) == vendor
    assert largest == 0x16
    brand = b"".join(struct.pack("<4I", *model.read(leaf, 0, 0, 0)) for leaf in (0x8000_0002, 0x8000_0003, 0x8000_0004))
    assert brand.rstrip(b"\0") == b"Skep virtual CPU"
    largest, b, c, d = model.read(0x4000_0000, 0, 0, 0)
    assert struct.pack("<III", b, c, d) == b"KVMKVMKVM\0\0\0"
    assert largest == 0x4000_0010
    assert model.read(0x4000_0001, 0, 0, 0) == (0, 0, 0, 0)  # no paravirtual feature
    largest, b, c, d = model.read(0x4000_0100, 0, 0, 0)
    assert struct.pack("<III", b, c, d) == b"SkepSkepSkep"
    assert largest == 0x4000_0100
    assert model.read(0x8000_0000, 0, 0, 0)[0] >= 0x8000_0008
    assert model.read(0x8000_0008, 0, 0, 0)[0] == 40 | 48 << 8


@pytest.mark.parametrize("cpus", [1, 2, 3, 48])
def test_topology(cpus: int) -> None:
    for apic_id in (0, cpus - 1):
        model = cpuid.make("baseline", HZ, apic_id, cpus)
        _, b, _, d = model.read(1, 0, 0, 0)
        assert b >> 24 == apic_id
        assert b >> 16 & 0xFF == cpus
        assert d >> 28 & 1 == (cpus > 1)
        assert model.read(0xB, 0, 0, 0) == (0, 1, 0x100, apic_id)
        shift, count, level, x2apic = model.read(0xB, 1, 0, 0)
        assert (count, level, x2apic) == (cpus, 0x201, apic_id)
        assert apic_id >> shift == 0
        assert model.read(0xB, 2, 0, 0) == (0, 0, 2, apic_id)


def test_caches_have_the_sizes_they_should(vendor: bytes) -> None:
    model = cpuid.make("baseline", HZ, vendor=vendor)
    leaf = 0x8000_001D if vendor == AMD_VENDOR else 4
    sizes = []
    for subleaf in range(5):
        a, b, c, _ = model.read(leaf, subleaf, 0, 0)
        if a & 0x1F:
            sizes.append((b & 0xFFF) + 1 and ((b & 0xFFF) + 1) * ((b >> 22) + 1) * (c + 1))
    assert sizes == [32 << 10, 32 << 10, 1 << 20, 32 << 20]


def test_leaves_without_subleaves_ignore_ecx_and_unknown_leaves_are_zero(vendor: bytes) -> None:
    model = cpuid.make("host", HZ, vendor=vendor)
    assert model.read(1, 77, 0, 0) == model.read(1, 0, 0, 0)
    for leaf in (5, 0xA, 0x14, 0x17, 0x4000_0001, 0x8000_1000, 0xFFFF_FFFF):
        assert model.read(leaf, 0, 0, 0) == (0, 0, 0, 0)


def test_amd_repeats_its_basic_bits() -> None:
    model = cpuid.make("baseline", HZ, vendor=AMD_VENDOR)
    basic, extended = model.read(1, 0, 0, 0)[3], model.read(0x8000_0001, 0, 0, 0)[3]
    assert extended & cpuid.MIRRORED == basic & cpuid.MIRRORED
    assert extended >> 11 & 1  # SYSCALL, where leaf 1 has SEP


def test_unknown_model() -> None:
    with pytest.raises(UserError, match=r"cpu\.model: no such CPU model: q; take one of baseline, host"):
        cpuid.make("q", HZ)


def test_this_host_will_do_and_another_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    features.require()
    monkeypatch.setattr(features, "host_has", lambda feature: feature is not Feature.BMI2)
    with pytest.raises(HostError) as refused:
        features.require()
    assert "BMI2" in str(refused.value)
    assert "\n" not in str(refused.value)
