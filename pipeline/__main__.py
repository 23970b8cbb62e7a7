"""`python -m pipeline <verb>` is `ditc <verb>`."""

import sys

from pipeline.cli import main

sys.exit(main())
