"""``python -m skep.cli``."""

import sys

from skep.cli import main

sys.exit(main())
