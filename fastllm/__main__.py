"""``python -m fastllm``: the command line."""

import sys

from fastllm.lm.cli import main

sys.exit(main())
