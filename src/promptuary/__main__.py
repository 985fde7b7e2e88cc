"""`python -m promptuary`, the same as the command `promptuary`.

Knows nothing itself.
"""

import sys

from promptuary.cli.main import main

sys.exit(main())
