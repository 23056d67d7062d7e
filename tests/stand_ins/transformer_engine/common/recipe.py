"""Only named: nothing here runs FP8."""


class DelayedScaling: ...


class Format:
    HYBRID = "hybrid"


class Float8BlockScaling:
    def __init__(self, fp8_format: str) -> None: ...
