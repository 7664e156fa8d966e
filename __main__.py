"""``python -m mixzoo`` is the command ``mixzoo``."""

import sys

from .scripts.cli import main

sys.exit(main())
