"""What Skep costs, measured beside QEMU's TCG: ``python -m benchmarks``, or ``make bench``."""
