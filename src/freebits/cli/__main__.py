"""`python -m freebits.cli`."""

import sys

from freebits.cli import main

sys.exit(main())
