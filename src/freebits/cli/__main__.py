"""`python -m freebits.cli`."""

import sys

from freebits.cli.main import main

sys.exit(main())
