"""Train an image model. Start it with `accelerate launch --config_file accelerate_configs/<machine>.yaml train.py`."""

import sys

from toolkit.train import main

if __name__ == "__main__":
    sys.exit(main())
