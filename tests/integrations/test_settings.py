"""MEGATRON_TILING, and hooks on trainers: slime, miles and verl are small modules with their functions' signatures."""

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from megatron_tiling import TilingConfig
from megatron_tiling.config import VARIABLE
from megatron_tiling.integrations import custom_provider, settings

SETTING = "factor=8 keep=0"


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Puts modules in place of a trainer's."""

    def put(path: str, **members: Any) -> None:
        parts = path.split(".")
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            if name not in sys.modules:
                monkeypatch.setitem(sys.modules, name, ModuleType(name))
        for name, member in members.items():
            monkeypatch.setattr(sys.modules[path], name, member, raising=False)

    monkeypatch.setenv(VARIABLE, SETTING)
    yield put
    for name in [name for name in sys.modules if name.startswith("megatron_tiling.integrations.verl")]:
        del sys.modules[name]


@pytest.fixture
def tiled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What a hook was given to tile, in place of tiling it."""
    seen: list[Any] = []

    def hook(config: TilingConfig) -> Any:
        def tile(chunks: list[Any]) -> list[Any]:
            seen.extend((chunk, config) for chunk in chunks)
            return chunks

        return tile

    monkeypatch.setattr(custom_provider, "tiling_hook", hook)
    monkeypatch.setattr("megatron_tiling.trainer.hook.tiling_hook", hook)
    return seen


def test_what_the_environment_says() -> None:
    text = "factor=8 keep=all modules=fc1,fc2,output splits=fc1=1x16,fc2=16x1 head_tokens=64"
    config = settings.config_from_environment({VARIABLE: text})
    grids = {"fc1": (1, 16), "fc2": (16, 1)}
    assert config == TilingConfig(8, ("fc1", "fc2", "output"), grids, mlp_keep="all", head_tokens=64)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("", "MEGATRON_TILING is not set: say what to tile"),
        ("factor", "MEGATRON_TILING=\"factor\": --tile-factor '': must be a whole number of at least 1"),
        ("factor=x keep=0", "MEGATRON_TILING=\"factor=x keep=0\": --tile-factor 'x': must be a whole number of at"),
        ("factor=2 factor=3", "MEGATRON_TILING: factor=3: write each of factor, keep, "),
        ("storage=partitioned", "MEGATRON_TILING: storage=partitioned: write each of factor, keep, "),
        ("factor=0", 'MEGATRON_TILING="factor=0": --tile-factor 0: must be a whole number of at least 1'),
        ("keep=auto", "MEGATRON_TILING=\"keep=auto\": --tiled-mlp-keep 'auto': must be a whole number of at least 0"),
        ("splits=fc1=8", "MEGATRON_TILING: splits=fc1=8: --tiled-linear-splits fc1=8: write MODULE=INxOUT"),
    ],
)
def test_what_it_cannot_say(text: str, answer: str) -> None:
    with pytest.raises(ValueError) as refusal:
        settings.config_from_environment({VARIABLE: text})
    assert str(refusal.value).startswith(answer)


SCORES = {
    "slime": ("slime.backends.megatron_utils.loss", "with_entropy_grad", ", log_prob_keep_mask=None"),
    "miles": ("miles.backends.training_utils.loss_hub.logit_processors", "entropy_requires_grad", ""),
}


@pytest.mark.feature("{trainer}: the model of its provider, on small modules of its signatures", page="integrations")
@pytest.mark.parametrize("trainer", ["slime", "miles"])
def test_custom_providers(
    trainer: str,
    modules: Any,
    tiled: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The trainer's own model, tiled; by our flags where its parser knows them; gone functions by name."""
    scores, entropy_gradient, more = SCORES[trainer]
    name = "calculate_log_probs_and_entropy"
    stock = eval(f"lambda logits, tokens, tp_group, with_entropy=False, {entropy_gradient}=True{more}: logits")
    modules(scores, **{name: stock})
    args = SimpleNamespace(custom_model_provider_path="ours")
    calls: list[Any] = []

    def get_model_provider_func(args: Any, role: str = "actor") -> Any:
        assert args.custom_model_provider_path is None and role == "actor"

        def provider(pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None) -> Any:
            calls.append((pre_process, post_process, vp_stage))
            return "model"

        return provider

    path = f"{trainer}.backends.megatron_utils.model_provider"
    modules(path, get_model_provider_func=get_model_provider_func)
    modules("megatron.training", get_args=lambda: args)
    ours = importlib.import_module(f"megatron_tiling.integrations.{trainer}")
    assert ours.model_provider(pre_process=True, post_process=False) == "model"
    assert ours.model_provider(False, True, vp_stage=1) == "model"
    assert calls == [(True, False, None), (False, True, 1)]
    assert tiled == [("model", TilingConfig(8, mlp_keep=0))] * 2
    assert args.custom_model_provider_path == "ours"
    args.use_tiled_linear, args.tile_factor, args.transformer_impl = True, 2, "local"
    ours.model_provider()
    assert tiled[-1] == ("model", TilingConfig(2))
    assert "MEGATRON_TILING has no effect beside --use-tiled-linear: " in capsys.readouterr().out
    deferred: list[Any] = []
    monkeypatch.setattr(custom_provider, "defer_logits", lambda model: deferred.append(model) or "")
    for mode, stages, expected in (
        (False, (True, True), 1),
        (True, (True, True), trainer == "slime"),
        (False, (True, False), 0),
    ):
        args.true_on_policy_mode = mode
        ours.model_provider(*stages)
        assert len(deferred) == expected
        deferred.clear()
    hooked = getattr(sys.modules[scores], name)
    assert hooked is not stock and hooked("a tensor", "tokens", "group") == "a tensor"
    for change, words in ((lambda logits: logits, "takes no"), (None, f"{scores}.{name}, which is not there")):
        monkeypatch.setattr(sys.modules[scores], name, change)
        if change is None:
            monkeypatch.delattr(sys.modules[scores], name)
        with pytest.raises(ImportError, match=words):
            ours.model_provider()
    monkeypatch.delattr(sys.modules[path], "get_model_provider_func")
    with pytest.raises(ImportError, match=rf"{path}.get_model_provider_func.*tested with"):
        ours.model_provider()


@pytest.mark.feature(
    "verl: models of Bridge, mbridge and its own, on small modules of its signatures", page="integrations"
)
def test_verl(modules: Any, tiled: list[Any]) -> None:
    """Bridge's providers, models of mbridge before its callbacks, and verl's own."""

    def make_megatron_module(wrap_config: Any, bridge: Any = None, provider: Any = None, peft_cls: Any = None) -> Any:
        if provider is not None:
            return provider.hooks
        return bridge.get_model(post_model_creation_callbacks=["theirs"], fp16=False)

    modules("verl.utils.megatron_utils", make_megatron_module=make_megatron_module)
    modules("verl.models.mcore", init_mcore_model=lambda *args, **kwargs: "model")
    modules("verl.models.mcore.model_forward_fused", linear_cross_entropy=None)
    importlib.import_module("megatron_tiling.integrations.verl").install()
    hooked = sys.modules["verl.utils.megatron_utils"].make_megatron_module  # type: ignore[attr-defined]
    provider = SimpleNamespace(hooks=[])
    provider.register_pre_wrap_hook = provider.hooks.append
    assert len(hooked("config", provider=provider)) == 1
    bridge = SimpleNamespace(get_model=lambda post_model_creation_callbacks, fp16: post_model_creation_callbacks)
    for _ in range(2):
        first, second = hooked("config", bridge=bridge)
        assert second == "theirs" and first("chunk", pre_process=True) == "chunk"
    assert sys.modules["verl.models.mcore"].init_mcore_model() == "model"  # type: ignore[attr-defined]
    assert [chunk for chunk, _ in tiled] == ["chunk", "chunk", "model"]


def test_a_moved_function_of_verl(modules: Any) -> None:
    modules("verl.utils.megatron_utils")
    with pytest.raises(ImportError, match=r"verl.utils.megatron_utils.make_megatron_module.*tested with"):
        importlib.import_module("megatron_tiling.integrations.verl")
