"""FP8 is off."""

from contextlib import nullcontext
from typing import Any


class FP8GlobalStateManager:
    @staticmethod
    def is_fp8_enabled() -> bool:
        return False


def fp8_autocast(*args: Any, **kwargs: Any) -> Any:
    return nullcontext()


def fp8_model_init(*args: Any, **kwargs: Any) -> Any:
    return nullcontext()
