"""Programs that measure."""

import time

STARTED = time.monotonic()  # before the imports, which count towards a deadline
