"""``python -m mmebm``, which ``torchrun -m mmebm`` starts in several processes."""

from mmebm.cli.main import main

raise SystemExit(main())
