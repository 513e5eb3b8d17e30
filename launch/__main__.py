"""`python -m launch COMMAND`: the command `tracevision` without installing the package."""

import sys

from launch.cli import main

sys.exit(main())
