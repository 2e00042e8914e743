"""Lets tests of scaling laws import record_peers, which makes their recorded values again."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
