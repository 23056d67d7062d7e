"""How ``install`` puts functions in the place of Megatron's. What they do: check_install.py, from test_versions.py."""

import inspect
import sys
from argparse import Namespace
from types import ModuleType
from typing import Any

import pytest

from megatron_tiling.trainer.install import Call, Stock, _validated, replace_in_all_modules, wrap


def load(model: Any, *, strict: bool = True) -> tuple[Any, bool]:
    return model, strict


def around(stock: Stock, call: Call) -> Any:
    call.arguments["model"] += 1
    assert call.arguments["strict"] in (True, False), "defaults are there to be read"
    return stock(*call.args, **call.kwargs)


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("module")
    module.load = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "module", module)
    return module


def test_callers_may_use_stocks_names(module: ModuleType) -> None:
    wrapped = wrap(module, "load", around, ("model", "strict"))
    assert module.load is wrapped and inspect.signature(wrapped) == inspect.signature(load)
    assert wrapped(1) == wrapped(model=1) == (2, True)
    assert wrapped(strict=False, model=1) == (2, False)
    with pytest.raises(TypeError, match="missing a required argument: 'model'"):
        wrapped()


def test_a_function_is_wrapped_once(module: ModuleType) -> None:
    wrapped = wrap(module, "load", around, ("model", "strict"))
    assert wrap(module, "load", around, ("model", "strict")) is wrapped


def test_whoever_has_imported_it_gets_the_new_one(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    script = ModuleType("script")
    script.by_another_name = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "script", script)
    monkeypatch.setitem(sys.modules, "no module", object())  # type: ignore[arg-type]
    monkeypatch.setattr(sys.modules[__name__], "load", load)  # put back afterwards
    wrapped = wrap(module, "load", around, ("model", "strict"))
    replace_in_all_modules({id(load): wrapped})
    assert script.by_another_name is wrapped and sys.modules[__name__].load is wrapped


def test_the_environments_settings_are_not_for_megatrons_trainer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = "MEGATRON_TILING is set, and has no effect on runs of Megatron's own trainer: give flags"
    _validated(Namespace())
    assert line not in capsys.readouterr().out
    monkeypatch.setenv("MEGATRON_TILING", "factor=8")
    for args in (Namespace(), Namespace(use_tiled_linear=True)):
        _validated(args)
        assert line in capsys.readouterr().out
    _validated(Namespace(custom_model_provider_path="megatron_tiling.integrations.slime.model_provider"))
    assert line not in capsys.readouterr().out


def test_what_this_megatron_lacks_is_named(module: ModuleType) -> None:
    with pytest.raises(ImportError, match="module has no load_checkpoint: megatron_tiling knows megatron-core"):
        wrap(module, "load_checkpoint", around, ("model", "strict"))
    module.load = lambda *args, **kwargs: load(*args, **kwargs)  # type: ignore[attr-defined]
    with pytest.raises(ImportError, match=r"module\.load is .*<lambda>.*, which takes no model; .* functools\.wraps"):
        wrap(module, "load", around, ("model", "strict"))
