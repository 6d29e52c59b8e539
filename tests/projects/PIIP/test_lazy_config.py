"""Overrides name settings that exist, and have the types of what they replace."""

from __future__ import annotations

import argparse
import copy
import functools
import logging

import pytest

pytest.importorskip("detectron2")

from detectron2.config import LazyConfig, instantiate
from detectron2.engine import default_setup
from omegaconf import OmegaConf

from piip import setting_types
from piip.lazy_config import load_config
from piip_core.errors import ConfigError

UPERNET, MASK_RCNN = "tiny_upernet.py", "tiny_piip_mask_rcnn.py"


@pytest.fixture(scope="module")
def loaded():
    return functools.cache(LazyConfig.load)


@pytest.fixture
def config(repo_root, loaded, monkeypatch):
    """Paths of configurations, which are executed once only."""
    monkeypatch.setattr(LazyConfig, "load", lambda path: copy.deepcopy(loaded(path)))
    return lambda name: str(repo_root / "tests/projects/PIIP" / name)


@pytest.mark.parametrize(
    ("file", "override", "value"),
    [
        *[(UPERNET, f"data.reduce_zero_label={word}", False) for word in ("no", "off", "False", "'False'", "NO")],
        *[(UPERNET, f"data.reduce_zero_label={word}", True) for word in ("yes", "on", "true")],
        (UPERNET, "data.reduce_zero_label=null", None),
        (UPERNET, "data.classes=19", 19),
        (UPERNET, "data.classes=2024_01", "2024_01"),
        (UPERNET, "data.classes=[a,b]", ["a", "b"]),
        (UPERNET, "data.train.images=2024_01", "2024_01"),
        (UPERNET, "data.train.images=true", "true"),
        (UPERNET, 'data.train.images="/a b,c=d"', "/a b,c=d"),
        (UPERNET, "data.test.images=null", None),
        (UPERNET, "data.train.ratio_range=[1,2]", [1, 2]),
        (UPERNET, "model.window=64.0", 64),
        (UPERNET, "model.sem_seg_head.dropout=1", 1),
        (UPERNET, "model.sem_seg_head.align_corners=on", True),
        (MASK_RCNN, "train.amp.enabled=no", False),
        (MASK_RCNN, "train.load_pretrained=no", False),
        (MASK_RCNN, "dataloader.train.dataset.filter_empty=no", False),
        (MASK_RCNN, "dataloader.train.mapper.use_instance_mask=off", False),
        (MASK_RCNN, "train.max_iter=1e3", 1000),
        (MASK_RCNN, "train.max_iter=1_000", 1000),
        (MASK_RCNN, "++train.max_iter=7", 7),
        (MASK_RCNN, "train.clip_norm=3", 3),
        (MASK_RCNN, "train.output_dir=1e3", "1e3"),
        (MASK_RCNN, "train.ema.decay=null", None),
        (MASK_RCNN, "train.eval_period=${train.max_iter}", 4),
        (MASK_RCNN, "dataloader.train.num_workers=2.0", 2),
        (MASK_RCNN, "optimizer.lr=1", 1),
        (MASK_RCNN, "model.proposal_generator.pre_nms_topk=[20,10]", [20, 10]),
        (MASK_RCNN, "model.backbone.bottom_up.config.interaction.units=bidirectional_cycle", "bidirectional_cycle"),
        (MASK_RCNN, "model.backbone.bottom_up.config.merging.branches=[1,2]", [1, 2]),
        (MASK_RCNN, "model.roi_heads.mask_head=null", None),
    ],
)
def test_a_value_is_meant_as_the_setting_is(config, file, override, value):
    found = OmegaConf.select(load_config(config(file), [override]), override.partition("=")[0].lstrip("+"))
    assert found == value
    assert isinstance(found, int) == isinstance(value, int)  # 1000.0 == 1000


def test_a_group_is_checked_by_its_fields(config):
    assert load_config(config(MASK_RCNN), ["train.amp={enabled:no}"]).train.amp == {
        "enabled": False,
        "precision": "bfloat16",
        "float32_heads": False,
    }
    with pytest.raises(ConfigError, match=r"data.train.images=202401: expected text \(.* is quoted twice"):
        load_config(config(UPERNET), ["data.train={images:2024_01}"])
    with pytest.raises(ConfigError, match=r"train.amp has no 'enabld'; did you mean 'enabled'"):
        load_config(config(MASK_RCNN), ["train.amp={enabld:no}"])


@pytest.mark.parametrize(
    ("file", "override", "expected"),
    [
        (UPERNET, "data.reduce_zero_label=maybe", "true or false or null"),
        (UPERNET, "data.reduce_zero_label=0", "true or false or null"),
        (UPERNET, "data.classes=null", "a whole number or text or a list"),
        (UPERNET, "data.train.images=null", "text"),
        (UPERNET, "model.stride=x", "a whole number or a number"),
        (UPERNET, "model.pixel_mean.0=abc", "a number"),
        (MASK_RCNN, "train.amp=no", "a group of settings"),
        (MASK_RCNN, "optimizer=5", "a group of settings or null"),
        *[(MASK_RCNN, f"train.amp.enabled={value}", "true or false") for value in ("1", "null", "")],
        *[(MASK_RCNN, f"train.max_iter={v}", "a whole number") for v in ("1.5", "nan", "inf", "0x10", "", "null", "x")],
        *[(MASK_RCNN, f"train.clip_norm={v}", "a number") for v in ("nan", "abc", "true")],
        (MASK_RCNN, "train.ema.decay=no", "a number or null"),
        (MASK_RCNN, "train.eval_period=${train.output_dir}", "a whole number"),
        (MASK_RCNN, "++train.max_iter=x", "a whole number"),
        (MASK_RCNN, "dataloader.train.dataset.filter_empty=maybe", "true or false"),
        (MASK_RCNN, "optimizer.lr=abc", "a number"),
    ],
)
def test_a_wrong_type_names_setting_value_and_what_is_expected(config, file, override, expected):
    key = override.partition("=")[0].lstrip("+")
    with pytest.raises(ConfigError, match=rf"^{key}=.*: expected {expected}$"):
        load_config(config(file), [override])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.pixel_mean=[1,b,3]", "model.pixel_mean.1=b: expected a number"),
        ("data.train.scales=[60,40]", "data.train.scales.0=60: expected a list"),
        ("data.train.scales=[[60,x]]", "data.train.scales.0.1=x: expected a whole number"),
        ("data.train.scales.0=[60,x]", "data.train.scales.0.1=x: expected a whole number"),
    ],
)
def test_elements_of_a_list_are_like_those_before(config, override, words):
    with pytest.raises(ConfigError, match=f"^{words}$"):
        load_config(config(MASK_RCNN), [override])


@pytest.mark.parametrize("override", ["data.train.images=/a,b", "~train.ema", "train@x=1", "train.seed=range(1,3)"])
def test_what_is_no_single_value_is_an_error(config, override):
    with pytest.raises(ConfigError, match="expected key=value with one value"):
        load_config(config(MASK_RCNN), [override])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.max_itr=3", "train has no 'max_itr'; did you mean 'max_iter'"),
        ("trian.max_iter=3", "has no 'trian'; did you mean 'train'"),
        ("data.train.image=x", "did you mean 'images'"),
        ("data.train.scales.3=x", "is a list of 1"),
        ("data.train.images=/a (b", "expected key=value; quote values"),
        ("--resume", "expected key=value"),
    ],
)
def test_an_override_of_nothing_is_an_error(config, override, words):
    with pytest.raises(ConfigError, match="override .*" + words.replace("(", r"\(")):
        load_config(config(MASK_RCNN), [override])


def test_overrides_that_add_something_known(config):
    cfg = load_config(
        config(MASK_RCNN), ["dataloader.test.batch_size=2", "+train.note=mine", "data.train.scales=[[60,40]]"]
    )
    assert cfg.data.train.scales == [[60, 40]]
    assert (cfg.dataloader.test.batch_size, cfg.train.note) == (2, "mine")
    with pytest.raises(ConfigError, match="no such file"):
        load_config("nowhere.py")


@pytest.fixture
def detectron2_script(config, tmp_path, monkeypatch):
    """What Detectron2's own script does before it starts."""
    setting_types.register_check()
    monkeypatch.setattr(setting_types, "_warn_once", logging.getLogger("piip").warning)

    def start(file, overrides, eval_only=False):
        cfg = LazyConfig.apply_overrides(LazyConfig.load(file), [f"train.output_dir={tmp_path}", *overrides])
        default_setup(cfg, argparse.Namespace(eval_only=eval_only))
        return cfg

    return start


@pytest.mark.parametrize(
    ("file", "override", "words"),
    [
        (UPERNET, "data.reduce_zero_label=no", "reduce_zero_label=no: expected true or false or null"),
        (UPERNET, "data.train.images=2024_01", r"images=202401: expected text .* quoted twice"),
        (MASK_RCNN, "train.amp.enabled=no", "train.amp.enabled=no: expected true or false"),
        (MASK_RCNN, "train.load_pretrained=off", "train.load_pretrained=off: expected true or false"),
        (MASK_RCNN, "dataloader.train.dataset.filter_empty=no", "filter_empty=no: expected true or false"),
        (MASK_RCNN, "train.max_iter=1e3", "train.max_iter=1000.0: expected a whole number"),
        (MASK_RCNN, "train.ema.decay=no", "train.ema.decay=no: expected a number or null"),
    ],
)
def test_detectron2_s_own_script_refuses_them_before_it_starts(config, detectron2_script, file, override, words):
    with pytest.raises(Exception, match=words):
        detectron2_script(config(file), [override])


def test_detectron2_s_own_script_names_settings_without_effect(config, detectron2_script, tmp_path, caplog):
    cfg = detectron2_script(config(MASK_RCNN), ["train.seed=-1", "train.amp.enabled=true"], eval_only=True)
    (record,) = {r.getMessage() for r in caplog.records if "without effect" in r.getMessage()}
    assert "train.amp.precision=bfloat16 (mixed precision is float16 there), train.clip_norm=1.0. " in record
    assert "seed" not in record
    assert cfg.dataloader.train.seed == -1
    # its saved configuration is read and checked, too
    again = LazyConfig.load(str(tmp_path / "config.yaml"))
    assert instantiate(again.dataloader.train.mapper).is_train
    with pytest.raises(Exception, match=r"train.amp.enabled=no: expected true or false"):
        detectron2_script(str(tmp_path / "config.yaml"), ["train.amp.enabled=no"])
