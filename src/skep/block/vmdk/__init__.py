"""VMDK, VMware's format: ``descriptor`` is the text that says what the disk is made of, ``extent`` one part of it,
``image`` the disk.

The reference is VMware's technical note "Virtual Disk Format 5.0"; comments name its chapters.
"""
