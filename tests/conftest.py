"""What every process that runs tests does first."""

import torch

# At its first backward pass autograd makes the threads that it may need. Where `torch.compile` or FlexAttention ran
# before that, it makes some, and refuses backward passes in processes that are forked later, as those of ranks are.
torch.ones(1, requires_grad=True).sum().backward()
