"""How long the random series of kills and signals are: short in `make test`, long in `make kills`."""

import os

LONG = os.environ.get("LONG_SERIES") == "1"
