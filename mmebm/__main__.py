"""``python -m mmebm`` is the command line."""

import sys

from mmebm.cli.main import main

sys.exit(main())
