"""Disk images, as backends of any disk device: what a guest's sectors become on the host.

``backend`` is the interface, ``options`` what a user may say, ``image`` opens what was said; ``raw`` is the one
format so far, ``locking`` keeps a second writer away, ``record`` logs what was written and when it was durable.
"""
