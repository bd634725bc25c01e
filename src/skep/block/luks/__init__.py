"""Encrypted disks: LUKS1, as an image format of its own and within qcow2.

The specification is "LUKS On-Disk Format Specification", version 1.2.3, whose names for fields are used. ``cipher`` is
the encryption of sectors; ``layer`` a file over another that encrypts; ``header`` the header, ``keys`` its key slots:
how a password becomes the key of the disk; ``image`` the format.
"""
