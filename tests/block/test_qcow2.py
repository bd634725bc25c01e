"""qcow2: the conformance of every variant, and what only this format has."""

from __future__ import annotations

from tests.block.conformance import ImageConformance


class TestConformance(ImageConformance):
    format = "qcow2"
    qemu_checks = True
    variants = (
        {},
        {"compat": "0.10"},
        {"cluster_size": "512"},
        {"cluster_size": "512", "refcount_bits": "64"},
        {"cluster_size": "4096", "refcount_bits": "1"},
        {"cluster_size": "2M", "refcount_bits": "8"},
        {"extended_l2": "on", "cluster_size": "16k"},
        {"extended_l2": "on"},
        {"preallocation": "metadata", "lazy_refcounts": "on"},
    )
