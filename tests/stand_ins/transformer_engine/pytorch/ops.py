"""Of the op fuser, which no test uses: what Megatron 0.16 to 0.18 name in annotations. Norms run in ``Sequential``."""

from torch.nn import Sequential as Sequential


class FusibleOperation: ...
