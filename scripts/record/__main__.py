"""Entry point of `python -m scripts.record`."""

import sys

from scripts.record.run import main

sys.exit(main())
