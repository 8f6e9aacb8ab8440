"""The hot operations of latent diffusion: fused kernels where this machine has them, plain torch everywhere else.

Every implementation of an op obeys one contract, judged against fp64; `reference` is the plain-torch one, for any device.
Which implementation runs is decided by device, dtype and shape from shipped rules (`ldmkit kernels` prints them), and can be
forced by `backend=` in a call, by `with ldmkit.kernels.use("geglu=cpu"):`, or by the environment variable LDMKIT_KERNELS, in
that order. A forced implementation that cannot serve a call raises `KernelError`; nothing falls back silently.
`with ldmkit.kernels.record() as calls:` lists what really ran. Plugins offer further implementations through the hook
`ldmkit_kernels`.
"""

from ldmkit.kernels.backends import Call, record, use
from ldmkit.kernels.cross_attention import cross_attention
from ldmkit.kernels.geglu import geglu
from ldmkit.kernels.geglu_linear import geglu_linear
from ldmkit.kernels.group_norm_silu import group_norm_silu

__all__ = ["Call", "cross_attention", "geglu", "geglu_linear", "group_norm_silu", "record", "use"]
