"""Run the command line as `python -m student`, also under torchrun and DeepSpeed's launcher."""

import sys

from student.cli import main

# DeepSpeed's launcher adds --local_rank, which the environment variable LOCAL_RANK contains too
sys.exit(main([argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]))
