"""`python -m student train ...`, also under torchrun and DeepSpeed's launcher."""

import sys

from student.cli import main

# DeepSpeed's launcher adds --local_rank; the environment says the same
sys.exit(main([word for word in sys.argv[1:] if not word.startswith("--local_rank")]))
