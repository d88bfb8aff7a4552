"""The operators of the package, torch.ops.two_level_mha; what each takes and gives is in operators.pyi."""

import torch

ops = torch.ops.two_level_mha
