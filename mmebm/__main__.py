"""``python -m mmebm``, which ``torchrun -m mmebm`` starts in several processes."""

from mmebm.cli.main import main

if __name__ == "__main__":  # a worker that is started anew imports this file
    raise SystemExit(main())
