"""`python -m mixedprec_plugin`, for torchrun."""

import sys

from mixedprec_plugin.cli.main import main

sys.exit(main())
