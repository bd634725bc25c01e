"""What may be asked of a running VM, and the ways to ask: its socket, its terminal, a program.

:mod:`~skep.control.actions` is the whole of what can be asked, as types; :mod:`~skep.control.controller` has it
done.
:mod:`~skep.control.server` and :mod:`~skep.control.client` are the two ends of the socket, whose place
:mod:`~skep.control.directory` knows; :mod:`~skep.control.monitor` is the terminal's. None of them adds an action.
"""
