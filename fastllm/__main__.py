"""``python -m fastllm``: the command line."""

import sys

from fastllm.cli import main

sys.exit(main())
