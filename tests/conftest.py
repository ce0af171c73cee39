"""One thread per process: the suite runs many small processes side by side."""

import torch

torch.set_num_threads(1)
