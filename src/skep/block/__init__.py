"""Disk images: what a guest's sectors become on the host, and what tools do with images without any VM.

From below: ``file`` is the host's file (the protocol layer), with ``locking`` against second writers; a format
(``format`` has what all share, ``registry`` their names, ``raw`` and so on are the formats) makes a disk of it;
``record`` is a filter, which logs what was written and when it was durable. ``backend`` has the interfaces between
layers, ``options`` what a user may say of a VM's disk; ``image`` opens and makes whole chains.
"""
