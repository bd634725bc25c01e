# make run    a Debian guest in this terminal; Ctrl-A x stops it
# make run-root    the same with systemd, on the disk debian.img, which is made if it is not there
# make test   the linters and the quick tests;  make test-all  the slow ones too
# make test-nested  what needs hardware virtualization, in a nested machine where this one has none
# make bench  beside QEMU and natively (BENCH_OPTIONS='--rows alu,crc --rounds 2 --boots 0'); COMPILED=1: with the
#             translator compiled, as wheels have it
# make fuzz FORMAT=qcow2 SECONDS=3600    a coverage-guided fuzzer of an image format, seconds of CPU; it keeps its corpus in .fuzz
# make lint   the linters alone
# make docs   this documentation, in docs/_build/html
#
# Debian packages are installed where we are root, and named where we are not.

SHELL := /bin/bash
PYTHON ?= python3
MEMORY ?= 512M
DISK ?= debian.img
FORMAT ?= qcow2
SECONDS ?= 3600

RUN_PACKAGES := python3 python3-venv
ROOT_PACKAGES := debootstrap e2fsprogs
TEST_PACKAGES := $(RUN_PACKAGES) $(ROOT_PACKAGES) acpica-tools binutils cpio cryptsetup-bin nbdkit dmidecode gdb linux-perf lz4 openssl python3-dev python3-libvhdi \
    qemu-user \
    gcc libc6-dev qemu-system-x86 qemu-utils socat sqlite3 strace tcc xz-utils zstd
BENCH_PACKAGES := $(RUN_PACKAGES) gcc libc6-dev qemu-system-x86

BIN := .venv/bin
# A stamp is newer than what it was made from, or is made again.
RUN_STAMP := .venv/run.stamp
DEV_STAMP := .venv/dev.stamp

.PHONY: run run-root test test-all test-nested bench fuzz lint docs clean
.DELETE_ON_ERROR:

run: $(RUN_STAMP)
	@paths=$$($(BIN)/skep guest debian) && \
	exec $(BIN)/skep run --memory $(MEMORY) \
	    --kernel "$$(sed -n 's/^kernel=//p' <<< "$$paths")" \
	    --initrd "$$(sed -n 's/^initrd=//p' <<< "$$paths")" $(RUN_OPTIONS)

run-root: $(RUN_STAMP)
	@tools/need $(ROOT_PACKAGES)
	@paths=$$($(BIN)/skep guest debian --root) && \
	made() { sed -n "s/^$$1=//p" <<< "$$paths"; } && \
	{ [ -e $(DISK) ] || cp --sparse=always --no-preserve=mode "$$(made root)" $(DISK); } && \
	exec $(BIN)/skep run --memory $(MEMORY) --kernel "$$(made kernel)" --initrd "$$(made initrd)" \
	    --disk $(DISK) --cmdline "console=ttyS0 root=/dev/vda" $(RUN_OPTIONS)

test: lint
	$(BIN)/pytest -m "not slow"

test-all: lint
	$(BIN)/pytest

test-nested: $(DEV_STAMP)
	$(BIN)/pytest -m hardware

lint: $(DEV_STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(DEV_STAMP)
	$(BIN)/sphinx-build -W --keep-going --quiet --builder html docs docs/_build/html
	@echo docs/_build/html/index.html

bench: $(DEV_STAMP)
	@tools/need $(BENCH_PACKAGES)
ifdef COMPILED
	$(BIN)/python tools/build/compiled.py .venv/compiled
endif
	$(if $(COMPILED),PYTHONPATH=$(CURDIR)/.venv/compiled) $(BIN)/python -m benchmarks $(BENCH_OPTIONS)

fuzz: $(DEV_STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[fuzz]'
	PYTHONPATH=. $(BIN)/python -m tests.fuzz $(FORMAT) $(SECONDS)

$(RUN_STAMP): pyproject.toml
	tools/need $(RUN_PACKAGES)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Skep needs Python 3.11 or newer")'
	[ -x $(BIN)/python ] || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(DEV_STAMP): pyproject.toml $(RUN_STAMP)
	tools/need $(TEST_PACKAGES)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev,docs]'
	touch $@

clean:
	rm -rf .venv dist docs/_build .fuzz .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
