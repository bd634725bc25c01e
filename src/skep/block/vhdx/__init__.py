"""VHDX, Hyper-V's format: ``layout`` has the structures in the file, ``log`` its journal, ``image`` the disk.

The reference is [MS-VHDX], "Virtual Hard Disk v2 (VHDX) File Format"; comments name its sections.
"""
