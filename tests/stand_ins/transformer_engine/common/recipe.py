"""Only imported: nothing here runs FP8."""


class DelayedScaling: ...


class Format: ...
