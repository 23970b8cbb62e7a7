"""`python -m pipeline <verb>` is `ditc <verb>`."""

from pipeline.cli import main
from pipeline.signals import leave

leave(main)
