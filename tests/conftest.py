"""Without a GPU the kernels run under Triton's interpreter, to be chosen before they are made."""
import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
