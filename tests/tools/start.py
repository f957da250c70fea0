"""The program as a process of its own: as the script itself does, but compiled once and not for
each start, which takes twice as long."""

import os
import sys

sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import s3napback  # noqa: E402

s3napback.run_as_script()
