"""What a guest's serial port is plugged into on the host.

:mod:`~skep.chardev.stdio`, this process's standard input and output; :mod:`~skep.chardev.pty`,
:mod:`~skep.chardev.unix`, :mod:`~skep.chardev.tcp`, what others come to; :mod:`~skep.chardev.file`;
:mod:`~skep.chardev.console`, a program in this process; :mod:`~skep.chardev.null`, nothing.
:mod:`~skep.chardev.plugs` makes them. What waits for the host waits on :mod:`~skep.chardev.loop`.
"""
