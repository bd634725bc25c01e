"""A vCPU's architectural state by name, as :mod:`skep.engine.contract` has it."""

from __future__ import annotations

from typing import Any

from skep.engine.amd64.registers import GENERAL, SEGMENTS, SYSTEM_SEGMENTS, Cr0
from skep.engine.translate.layout import XSAVE_AREA, Kind, StateBlock
from skep.engine.translate.modelspecific import ModelSpecific

_PLAIN = ("cr0", "cr2", "cr3", "cr4", "efer", "xcr0", "dr0", "dr1", "dr2", "dr3", "dr6", "dr7")


def save(st: StateBlock, msrs: ModelSpecific) -> dict[str, Any]:
    state: dict[str, Any] = {name: getattr(st, name) for name in GENERAL}
    state["rip"] = st.rip
    state["rflags"] = st.rflags
    for name in (*SEGMENTS, *SYSTEM_SEGMENTS):
        state[name] = {
            "selector": getattr(st, f"{name}_sel"),
            "base": getattr(st, f"{name}_base"),
            "limit": getattr(st, f"{name}_limit"),
            "attributes": getattr(st, f"{name}_attr"),
        }
    state["gdtr"] = {"base": st.gdt_base, "limit": st.gdt_limit}
    state["idtr"] = {"base": st.idt_base, "limit": st.idt_limit}
    for name in _PLAIN:
        state[name] = getattr(st, name)
    state["xsave"] = bytes(st.bytes[XSAVE_AREA : XSAVE_AREA + 832])
    state["msrs"] = msrs.save()
    if st.inject:
        state["interrupt"] = st.inject & 0xFF
    if st.nmi_blocked:
        state["nmi_blocked"] = 1
    return state


def load(state: dict[str, Any], st: StateBlock, msrs: ModelSpecific) -> None:
    for name in (*GENERAL, "rip", "rflags", *_PLAIN):
        if name in state:
            setattr(st, name, state[name])
    for name in (*SEGMENTS, *SYSTEM_SEGMENTS):
        if name in state:
            segment = state[name]
            setattr(st, f"{name}_sel", segment["selector"])
            setattr(st, f"{name}_base", segment["base"])
            setattr(st, f"{name}_limit", segment["limit"])
            setattr(st, f"{name}_attr", segment["attributes"])
    for name, short in (("gdtr", "gdt"), ("idtr", "idt")):
        if name in state:
            setattr(st, f"{short}_base", state[name]["base"])
            setattr(st, f"{short}_limit", state[name]["limit"])
    if "rip" in state:
        st.inject = 0x100 | state["interrupt"] if "interrupt" in state else 0
        st.nmi_blocked = state.get("nmi_blocked", 0)
    if "msrs" in state:
        msrs.load(state["msrs"])
    if "xsave" in state:
        data = state["xsave"][:832]
        st.bytes[XSAVE_AREA : XSAVE_AREA + len(data)] = data
        st.bytes[XSAVE_AREA + 520 : XSAVE_AREA + 576] = bytes(56)
    if "cs" in state:
        st.cpl = st.cs_sel & 3 if st.cr0 & Cr0.PE else 0
    st.kind = Kind.BREAK
    st.site = 0
