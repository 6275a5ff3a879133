"""`python -m lowdft`."""

import sys

from lowdft.cli import main

sys.exit(main())
