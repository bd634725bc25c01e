"""Virtio 1.2 devices: one queue, one configuration half and one worker for all of them, and a transport.

``queue`` is the split virtqueue, ``device`` what every device has and a transport drives, ``worker`` the thread that
moves the data, ``pci`` the transport. A device file holds what is the device's own.
"""
