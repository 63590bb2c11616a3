"""`python -m teachercache build ...`, also under torchrun."""

import sys

from teachercache.cli import main

sys.exit(main())
