"""Hundreds of log lines about T5-XXL's LoRA keys become one."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator

import pytest
from distilled_t5.encoder import lora_log
from distilled_t5.encoder.lora_log import FoldLoraLines, fold_lora_lines
from distilled_t5.students.t5 import T5
from torch import nn

NOTICE = FoldLoraLines(T5, "T5-XXL").notice
T5_KEYS = [
    "lora_te2_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight",
    "lora_te3_encoder_block_23_layer_1_DenseReluDense_wi_1.lora_up.weight",
    "lora_te2_shared_.alpha",
    "text_encoders.t5xxl.transformer.encoder.block.3.layer.0.SelfAttention.k.lora_A.weight",
    "text_encoder_2.encoder.block.1.layer.0.SelfAttention.o.lora_B.weight",
    "text_encoder_3.encoder.block.1.layer.0.SelfAttention.o.lora_B.weight",
    "t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.v.diff",
    "lora_te2_shared.lora_down.weight",
    "lora_te3_encoder_final_layer_norm.diff",
    "te2.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight",
    "te2.shared.lora_down.weight",
    "te3_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight",
    "t5.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight",
    "lora_t5xxl_encoder_block_0_layer_0_SelfAttention_q.alpha",
    "lycoris_te2_encoder_block_0_layer_0_SelfAttention_q.lokr_w1",
    "lycoris_te2_shared.lokr_w1",
    "base_model.model.text_encoder_2.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight",
    "base_model.model.text_encoder_3.shared.lora_embedding_A",
    "text_encoder_2.shared.lora_A.weight",
    "text_encoder_2.encoder.final_layer_norm.diff",
    "text_encoders.transformer.encoder.block.3.layer.0.SelfAttention.k.lora_A.weight",
]
OTHER_KEYS = [
    "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
    "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
    "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight",
    "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight",
    "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight",
    "lycoris_te2_text_model_encoder_layers_0_mlp_fc1.lokr_w1",
    "te2.text_model.encoder.layers.0.mlp.fc1.lora_A.weight",
    "base_model.model.text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_A.weight",
    "text_encoders.t5base.transformer.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight",
    "encoder.block.0.layer.0.lora_A.weight",
]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds as the filter sees it; assign to [0]."""
    now = [100.0]
    monkeypatch.setattr(lora_log.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def host_log(clock: list[float]) -> Iterator[tuple[logging.Logger, list[str]]]:
    """A logger with the filter, and what comes out of it."""
    lines: list[str] = []
    logger = logging.Logger("host")
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # pyright: ignore[reportAttributeAccessIssue]
    logger.addHandler(handler)
    logger.addFilter(FoldLoraLines(T5, "T5-XXL"))
    yield logger, lines
    logger.handlers.clear()


def load_lora(logger: logging.Logger, keys: list[str]) -> None:
    """Log keys without a place as ComfyUI's comfy.lora.load_lora does."""
    for key in keys:
        logger.warning("lora key not loaded: {}".format(key))  # noqa: UP032 (as in ComfyUI)


def test_hundreds_of_t5xxl_keys_give_one_line(host_log):
    logger, lines = host_log
    load_lora(logger, [f"lora_te2_encoder_block_{i // 10}_layer_0_SelfAttention_q.lora_{i}" for i in range(500)])
    assert lines == [NOTICE]
    assert len(NOTICE.splitlines()) == 1


@pytest.mark.parametrize("key", T5_KEYS)
def test_every_spelling_of_a_t5xxl_key_is_known(host_log, key):
    logger, lines = host_log
    load_lora(logger, [key])
    assert lines == [NOTICE]


@pytest.mark.parametrize("key", OTHER_KEYS)
def test_keys_of_other_models_are_still_logged(host_log, key):
    logger, lines = host_log
    load_lora(logger, [*T5_KEYS, key, *T5_KEYS[1:]])
    assert f"lora key not loaded: {key}" in lines


def test_every_lora_has_its_line(host_log, clock):
    logger, lines = host_log
    load_lora(logger, T5_KEYS)
    load_lora(logger, T5_KEYS)
    assert lines == [NOTICE, NOTICE]
    clock[0] += lora_log.SAME_LORA_S + 0.1
    load_lora(logger, [key + "_of_another_lora" for key in T5_KEYS])
    assert lines == [NOTICE] * 3


def test_slow_logging_of_one_lora_is_still_one_row(host_log, clock):
    logger, lines = host_log
    for key in T5_KEYS:
        load_lora(logger, [key])
        clock[0] += lora_log.SAME_LORA_S * 0.9
    assert lines == [NOTICE]


def test_other_records_pass_untouched(host_log):
    logger, lines = host_log
    logger.info("%s of %d", "7", 9)
    logger.warning(ValueError("an object, no text"))
    logger.warning("shared lora key not loaded: lora_te2_encoder_block_0")
    assert lines == ["7 of 9", "an object, no text", "shared lora key not loaded: lora_te2_encoder_block_0"]


def filters() -> list[logging.Filter]:
    return [each for each in logging.getLogger().filters if isinstance(each, FoldLoraLines)]


def test_one_filter_is_on_the_root_logger_for_as_long_as_a_text_model_lives():
    gc.collect()
    assert not filters()
    first, second = nn.Linear(1, 1), nn.Linear(1, 1)
    fold_lora_lines(first, T5, "T5-XXL")
    fold_lora_lines(second, T5, "T5-XXL")
    assert len(filters()) == 1
    del first
    gc.collect()
    assert len(filters()) == 1
    del second
    gc.collect()
    assert not filters()


def test_a_second_lora_with_other_keys_has_its_line_at_once(caplog):
    model = nn.Linear(1, 1)
    fold_lora_lines(model, T5, "T5-XXL")
    with caplog.at_level(logging.WARNING):
        for keys in (T5_KEYS[:4], T5_KEYS[4:]):
            model.state_dict()  # as comfy.lora.model_lora_keys_clip does
            load_lora(logging.getLogger(), keys)
    assert caplog.messages == [NOTICE, NOTICE]
