"""A VM's configuration: a tree of dotted names with strings for leaves, as bhyve_config(5) has it.

Options, files and API calls only write the tree. It is then frozen, which expands ``%(name)``, and from there on it
is the VM's identity: its dump, fed back, builds the same VM. Whoever owns a part of the tree reads it through a typed
view (:mod:`skep.config.views`), where a key that nobody knows is an error. This room knows no devices.
"""

from skep.config.grammar import parse_options
from skep.config.settings import Settings, check_settings
from skep.config.tree import Node, Tree
from skep.config.views import View, keys_of, option, view

__all__ = ["Node", "Settings", "Tree", "View", "check_settings", "keys_of", "option", "parse_options", "view"]
