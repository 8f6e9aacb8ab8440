"""The hot operations of latent diffusion: fused kernels where this machine has them, plain torch everywhere else.

Every implementation of an op obeys one contract, judged against fp64; `reference` is the plain-torch one, for any device.
Which implementation runs is decided by device and dtype from a shipped table (`ldmkit kernels` prints it), and can be forced by
`backend=` in a call, by `with ldmkit.kernels.use("geglu=cpu"):`, or by the environment variable LDMKIT_KERNELS, in that order.
A forced implementation that cannot serve a call raises `KernelError`; nothing falls back silently.
"""

from ldmkit.kernels.backends import use
from ldmkit.kernels.cross_attention import cross_attention
from ldmkit.kernels.geglu import geglu
from ldmkit.kernels.group_norm_silu import group_norm_silu

__all__ = ["cross_attention", "geglu", "group_norm_silu", "use"]
