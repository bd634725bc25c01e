"""What a guest's serial port is plugged into on the host.

:mod:`~skep.chardev.stdio`, this process's standard input and output; :mod:`~skep.chardev.console`, a program in
this process; :mod:`~skep.chardev.null`, nothing. What waits for the host waits on :mod:`~skep.chardev.loop`.
"""
