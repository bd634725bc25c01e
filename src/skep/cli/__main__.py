"""``python -m skep.cli``."""

from skep.cli import command

command()
