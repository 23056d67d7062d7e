"""Of the op fuser, which no test uses: what Megatron 0.16 to 0.18 name in annotations."""


class Sequential: ...


class FusibleOperation: ...
